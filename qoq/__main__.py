from qoq.cli.main import main

main()
