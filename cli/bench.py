"""qoq bench: how fast the GPU is, and how far from what its hardware allows."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qoq.cli.output import common_options, in_a_folder, print_json

if TYPE_CHECKING:
    from qoq.kernels.bench import Pass, Product
    from qoq.kernels.timing import Machine

    Result = Product | Pass

MODELS = ("llama-3-8b", "llama-3-70b", "qwen2.5-7b")  # of qoq.kernels.bench, which takes seconds to import
OPS = ("gemm", "rows", "attention", "sample")
PRODUCT_COLUMNS = (
    *("GEMM", "N x K", "M", "us", "floor us", "of floor", "TOPS", "GB/s", "x fp16", "x int8", "x fp8"),
    "kernel, tile, stages, splits",
)
FILE: click.Path = click.Path(dir_okay=False, path_type=Path)
PASS_COLUMNS = ("op", "sizes", "us", "GB/s", "of copy")


class Numbers(click.ParamType):
    """Whole numbers from 1 to `most`, separated by commas; sorted."""

    name = "N,N,..."

    def __init__(self, most: int):
        self.most = most

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = value.split(",")
        if not all(part.strip().isdecimal() and 1 <= int(part) <= self.most for part in parts):
            self.fail(f"{value!r}, expected whole numbers from 1 to {self.most}, separated by commas", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


class Ops(click.ParamType):
    """Some of OPS, separated by commas; in their order."""

    name = "OP,OP,..."

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = {part.strip() for part in value.split(",")}
        if not names <= set(OPS):
            self.fail(f"{value!r}, expected some of {', '.join(OPS)}, separated by commas", param, ctx)
        return tuple(op for op in OPS if op in names)


@click.group()
def bench() -> None:
    """Measure speed on a GPU: `qoq bench kernels`."""


@bench.command()
@click.option("--model", "name", type=click.Choice(MODELS), default=MODELS[0], show_default=True, help="Shapes.")
@click.option(
    "--group-size", type=click.Choice(("128", "64", "-1")), default="128", show_default=True, help="-1: per channel."
)
@click.option("--ops", type=Ops(), default=",".join(OPS), show_default=True, help="What to measure.")
@click.option("--tokens", type=Numbers(32768), default="1,16,64,128,256,1024,4096", show_default=True, help="Of GEMMs.")
@click.option("--batches", type=Numbers(1024), default="1,32,128", show_default=True, help="Of attention: sequences.")
@click.option(
    "--contexts", type=Numbers(1 << 20), default="512,1024,8192,32768", show_default=True, help="Of attention: tokens."
)
@click.option("--csv", "csv_path", type=FILE, callback=in_a_folder, help="Write all results as a table.")
@click.option(
    "--plot", "plot_path", type=FILE, callback=in_a_folder, help="Write a PNG: the GEMMs under the card's roofline."
)
@common_options
def kernels(
    name: str,
    group_size: str,
    ops: tuple[str, ...],
    tokens: tuple[int, ...],
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    csv_path: Path | None,
    plot_path: Path | None,
    as_json: bool,
) -> None:
    """Time every kernel at the shapes of a model.

    `floor` is the least time that the card's data sheet allows a GEMM, for its bytes or its operations. `x fp16`, `x
    int8` and `x fp8` say how much longer torch.mm, torch._int_mm and torch._scaled_mm take; `-` where they cannot.
    """
    if plot_path is not None:
        check_plot(ops)
    import torch
    from tqdm import tqdm

    from qoq.errors import KernelError
    from qoq.kernels.bench import MEASUREMENTS, MODELS, Plan, Product, specialisations
    from qoq.kernels.timing import Machine, compile_all
    from qoq.shards import write_bytes

    started = time.monotonic()
    torch.manual_seed(0)
    plan = Plan(MODELS[name], int(group_size), ops, tokens, batches, contexts)
    machine = Machine.here()
    compile_all(specialisations(plan, machine.card), machine.card.architecture)
    if not as_json:
        click.echo(heading(name, plan.group_size, machine))
    results: list[Result] = []
    for op in ops:
        try:
            found = list(tqdm(MEASUREMENTS[op](plan, machine), desc=op, unit="row", leave=False, disable=None))
        except torch.OutOfMemoryError:
            raise KernelError(f"{op}: out of GPU memory; try fewer --tokens, --batches or --contexts") from None
        if not as_json:
            click.echo("\n" + table(found))
        results += found
    records = [result.record() for result in results]
    if csv_path is not None:
        write_bytes(csv_path, csv_text(records))
    if plot_path is not None:
        from qoq.cli.roofline import roofline

        write_bytes(plot_path, roofline([result for result in results if isinstance(result, Product)], machine))
    if as_json:
        about = {"model": name, "group_size": plan.group_size, "seconds": round(time.monotonic() - started, 2)}
        print_json({**describe(machine), **about, "results": records})


def check_plot(ops: Sequence[str]) -> None:
    """Refuse a plot that cannot be drawn before anything is measured.

    Raises:
        OutputError: matplotlib is missing.
    """
    from importlib.util import find_spec

    from qoq.errors import OutputError

    if "gemm" not in ops:
        raise click.UsageError("--plot shows GEMMs, and --ops leaves them out")
    if find_spec("matplotlib") is None:
        raise OutputError("--plot needs matplotlib; pip install 'qoq[plot]'")


def describe(machine: "Machine") -> dict[str, Any]:
    """The GPU, as JSON has it."""
    import torch

    peak = machine.peak
    return {
        "device": machine.card.name,
        "architecture": machine.card.architecture,
        "torch": torch.__version__,
        "copy_gb_per_s": round(1e-9 * machine.copy, 1),
        "peak_gb_per_s": peak and 1e-9 * peak.bandwidth,
        "peak_tops": peak and 1e-12 * peak.operations,
    }


def heading(model: str, group_size: int, machine: "Machine") -> str:
    peak = machine.peak
    groups = "per channel" if group_size == -1 else f"groups of {group_size}"
    sheet = f"{1e-9 * peak.bandwidth:.0f} GB/s and {1e-12 * peak.operations:.0f} TOPS" if peak else "not known"
    return (
        f"{machine.card.name} ({machine.card.architecture}), {model}, {groups}; "
        f"device copy {1e-9 * machine.copy:.0f} GB/s; data sheet {sheet}"
    )


def table(results: "Sequence[Result]") -> str:
    """Of results that are all products or all passes."""
    from qoq.kernels.bench import Product
    from qoq.kernels.check import aligned

    lines: list[Sequence[str]] = [PRODUCT_COLUMNS if isinstance(results[0], Product) else PASS_COLUMNS]
    lines += [product_line(each) if isinstance(each, Product) else pass_line(each) for each in results]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(aligned(line, widths)) for line in lines)


def product_line(product: "Product") -> list[str]:
    found, config = product.record(), product.config
    return [
        product.linear,
        f"{product.N} x {product.K}",
        str(product.M),
        f"{product.us:.1f}",
        number(found["floor_us"]),
        percent(found["floor_share"]),
        f"{found['tops']:.0f}",
        f"{found['gb_per_s']:.0f}",
        *(number(found[f"{rival}_speedup"], 2) for rival in ("fp16", "int8", "fp8")),
        f"{config.kernel} {config.rows} x {config.tokens}, {config.stages}, {config.splits}",
    ]


def pass_line(measured: "Pass") -> list[str]:
    found, sizes = measured.record(), ", ".join(f"{name} {size}" for name, size in measured.sizes.items())
    return [measured.op, sizes, f"{measured.us:.1f}", f"{found['gb_per_s']:.0f}", percent(found["copy_share"])]


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def csv_text(records: Iterable[dict[str, Any]]) -> str:
    """One line for each, with a column for each key that any of them has."""
    import csv
    import io

    rows = list(records)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
