"""qoq serve: an OpenAI-compatible server."""

from typing import Any

import click

from qoq.cli.engine import engine_options
from qoq.cli.output import check_device, note, set_up_logging

GRACE_SECONDS = 10  # that running requests get to end when the server is told to


@click.command()
@click.argument("checkpoint")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: one that is free.")
@click.option("--api-key", envvar="QOQ_API_KEY", show_envvar=True, help="What clients must send.  [default: nothing]")
@click.option("--served-model-name", help="What clients call the model.  [default: the folder's name]")
@click.option(
    "--max-queue", type=click.IntRange(min=0), default=1024, show_default=True, help="Requests that may wait."
)
@click.option("--max-num-seqs", type=click.IntRange(min=1), default=256, show_default=True, help="Running at a time.")
@click.option("--max-model-len", type=click.IntRange(min=2), help="Tokens of a request.  [default: the model's limit]")
@engine_options()
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option("-v", "--verbose", is_flag=True, help="Log requests on stderr.")
def serve(
    checkpoint: str,
    host: str,
    port: int,
    api_key: str | None,
    served_model_name: str | None,
    max_queue: int,
    max_num_seqs: int,
    max_model_len: int | None,
    engine: dict[str, Any],
    device: str,
    verbose: bool,
) -> None:
    """Serve CHECKPOINT over HTTP, with OpenAI's API, until Ctrl-C."""
    import importlib.util
    import socket
    from pathlib import Path

    from qoq.errors import QoqError

    if any(importlib.util.find_spec(package) is None for package in ("fastapi", "uvicorn")):
        raise QoqError("serve needs fastapi and uvicorn; pip install 'qoq[serve]'")
    if api_key == "":
        raise click.BadParameter("it is empty, expected a key", param_hint="--api-key")
    set_up_logging(verbose)
    device = check_device(device)
    import uvicorn

    from qoq.runtime.engine import LLMEngine
    from qoq.runtime.loading import spare_the_collector
    from qoq.runtime.server import create_app

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))  # before the long work; nobody can connect until the server runs
        except OSError as error:
            raise QoqError(f"{host}:{port}: {error.strerror or error}, expected an address that is free") from None
        loaded = LLMEngine.from_checkpoint(
            checkpoint, device, max_model_len=max_model_len, max_num_seqs=max_num_seqs, **engine
        )
        spare_the_collector()
        app = create_app(loaded, served_model_name or Path(checkpoint).resolve().name, max_queue, api_key)
        # h11, because it bounds headers
        config = uvicorn.Config(
            app, http="h11", ws="none", log_config=None, access_log=verbose, timeout_graceful_shutdown=GRACE_SECONDS
        )
        shown = f"[{host}]" if ":" in host else host
        note(f"http://{shown}:{listener.getsockname()[1]}/v1, Ctrl-C to end")
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            note("ended")
