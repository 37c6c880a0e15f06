"""The `qoq` command. Each verb is a file of its own that imports what it needs when it runs."""

import io
import sys

import click

import qoq
from qoq.cli.bench import bench
from qoq.cli.chat import chat
from qoq.cli.compare import compare
from qoq.cli.convert import convert
from qoq.cli.eval import evaluate
from qoq.cli.gate import gate
from qoq.cli.inspect import inspect
from qoq.cli.latency import latency
from qoq.cli.push import push
from qoq.cli.quantize import quantize
from qoq.cli.serve import serve
from qoq.cli.throughput import throughput
from qoq.errors import QoqError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(qoq.__version__, prog_name="qoq")
def group() -> None:
    """Quantize a Hugging Face LLM to W4A8KV4, prove the checkpoint right, and run it."""


for command in (quantize, evaluate, compare, gate, inspect, convert, push, chat, serve, bench):
    group.add_command(command)
for measurement in (throughput, latency):
    bench.add_command(measurement)


def main() -> None:
    """Entry point: a QoqError is one line and exit code 1, a bug keeps its traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        group()
    except QoqError as error:
        click.echo(f"qoq: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
