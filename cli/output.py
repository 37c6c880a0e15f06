"""What every command says the same way: JSON on stdout, everything else on stderr."""

import functools
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


class Numbers(click.ParamType):
    """Whole numbers from `least` to `most`, separated by commas; sorted."""

    name = "N,N,..."

    def __init__(self, most: int, least: int = 1):
        self.least, self.most = least, most

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = value.split(",")
        if not all(part.strip().isdecimal() and self.least <= int(part) <= self.most for part in parts):
            wanted = f"whole numbers from {self.least} to {self.most}, separated by commas"
            self.fail(f"{value!r}, expected {wanted}", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json and -v to a command; -v is handled here."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
    @click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
    @functools.wraps(command)
    def wrapped(*args: Any, verbose: bool, **kwargs: Any) -> Any:
        set_up_logging(verbose)
        return command(*args, **kwargs)

    return wrapped


def html_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --html, a file in a folder that is there: a long run must not end without its page."""
    return click.option(
        "--html", type=click.Path(dir_okay=False, path_type=Path), callback=in_a_folder, help="Write a page of layers."
    )(command)


def in_a_folder(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file in a folder that is not there, before a long run."""
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"{path.parent}: no such folder")
    return path


def set_up_logging(verbose: bool) -> None:
    """Log to stderr; the libraries keep quiet unless asked, and draw bars on terminals only."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO if verbose else logging.ERROR, format="%(message)s")
    logging.getLogger("qoq").setLevel(logging.INFO if verbose else logging.WARNING)
    from transformers.utils import logging as transformers_logging

    if not verbose:
        transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def print_json(document: Any) -> None:
    """JSON has no NaN and no infinity: they are null."""
    click.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def note(message: str) -> None:
    """A line for the person at the terminal."""
    click.echo(message, err=True)


def check_device(device: str, here: bool = True) -> str:
    """The device by the name that comparisons expect; a usage error for none, or for one that is not here."""
    from qoq.device import device_name
    from qoq.errors import QoqError

    try:
        return device_name(device, here)
    except QoqError as error:
        raise click.BadParameter(str(error), param_hint="--device") from None
