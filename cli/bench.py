"""qoq bench: how fast the GPU is, and how far from what its hardware allows."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qoq.cli.output import Numbers, common_options, in_a_folder, note, print_json
from qoq.roofline import (
    CARDS,
    MODELS,
    USABLE,
    DataSheet,
    Dimensions,
    Limit,
    Workload,
    head_bytes,
    kv_bytes,
    limit,
    linear_bytes,
    sheet_of,
)

if TYPE_CHECKING:
    from qoq.kernels.bench import Pass, Product
    from qoq.kernels.timing import Machine

    Result = Product | Pass

OPS = ("gemm", "rows", "swiglu", "attention", "head", "sample")
PRODUCT_COLUMNS = (
    *("GEMM", "N x K", "M", "us", "floor us", "of floor", "TOPS", "GB/s", "x fp16", "x int8", "x fp8"),
    "kernel, tile, stages, splits, tail",
)
LENGTH = click.IntRange(1, 1 << 20)
FILE: click.Path = click.Path(dir_okay=False, path_type=Path)
PASS_COLUMNS = ("op", "sizes", "us", "GB/s", "of copy")
LIMIT_COLUMNS = (
    *("batch", "step ms", "linear ms", "head ms", "attention ms", "passes ms", "launch ms", "prefill s"),
    *("decode tok/s", "tokens/s", "cache", "fits"),
)


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
    """Measure speed, or say what a card allows."""


@bench.command()
@click.option(
    "--model", "name", type=click.Choice(tuple(MODELS)), default="llama-3-8b", show_default=True, help="Shapes."
)
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
        from qoq.cli.plot import check_matplotlib

        if "gemm" not in ops:
            raise click.UsageError("--plot shows GEMMs, and --ops leaves them out")
        check_matplotlib()
    import torch
    from tqdm import tqdm

    from qoq.errors import KernelError
    from qoq.kernels.bench import MEASUREMENTS, Plan, Product, specialisations
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
        from qoq.cli.plot import roofline

        write_bytes(plot_path, roofline([result for result in results if isinstance(result, Product)], machine))
    if as_json:
        about = {"model": name, "group_size": plan.group_size, "seconds": round(time.monotonic() - started, 2)}
        print_json({**describe(machine), **about, "results": records})


@bench.command()
@click.option("--model", "name", type=click.Choice(tuple(MODELS)), default="llama-3-8b", show_default=True)
@click.option("--card", type=click.Choice(tuple(CARDS)), help="The one here by default, else l40s.")
@click.option("--batch-size", "batches", type=Numbers(4096), default="64,128,256", show_default=True, help="Sequences.")
@click.option("--input-len", type=LENGTH, default=1024, show_default=True, help="Tokens of each prompt.")
@click.option("--output-len", type=LENGTH, default=512, show_default=True, help="Tokens generated for each.")
@click.option("--kv-bits", type=click.Choice(("4", "8", "16")), default="4", show_default=True, help="Of the cache.")
@common_options
def roofline(
    name: str,
    card: str | None,
    batches: tuple[int, ...],
    input_len: int,
    output_len: int,
    kv_bits: str,
    as_json: bool,
) -> None:
    """What a card allows a W4A8KV4 model end to end; needs no GPU.

    `a -> b`: the data sheet's rates alone, then those that good kernels reach, with elementwise passes and launches.
    `tokens/s` counts generated tokens over all of the time, prefill included; `decode tok/s` leaves prefill out.
    """
    model, sheet = MODELS[name], CARDS[card] if card else sheet_here()
    works = [Workload(batch, input_len, output_len, int(kv_bits)) for batch in batches]
    limits = [(limit(model, sheet.ideal, work), limit(model, sheet.achievable, work)) for work in works]
    if not as_json:
        click.echo(limits_heading(name, sheet, works[0]) + "\n\n" + limits_table(limits, model, sheet))
        return
    print_json(
        {
            "card": sheet.name,
            "memory_bytes": sheet.memory,
            "model": name,
            "group_size": works[0].group_size,
            "kv_bits": works[0].kv_bits,
            "input_len": input_len,
            "output_len": output_len,
            "weight_bytes": linear_bytes(model),
            "embedding_and_head_bytes": 2 * head_bytes(model),
            "kv_bytes_per_token": kv_bytes(model, works[0].kv_bits),
            "results": [limits_record(ideal, real, model, sheet) for ideal, real in limits],
        }
    )


def sheet_here() -> DataSheet:
    """Of this machine's GPU; of an L40S where there is none or an unknown one."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        found = sheet_of(name)
        if found is not None:
            return found
        note(f"{name}: data sheet not known; this is an L40S's, --card takes {', '.join(CARDS)}")
    return CARDS["l40s"]


def limits_heading(name: str, sheet: DataSheet, work: Workload) -> str:
    model = MODELS[name]
    return (
        f"{sheet.name}, {name}, W4A8 in groups of {work.group_size}, KV{work.kv_bits}; "
        f"{work.input_len} tokens in, {work.output_len} out\n"
        f"weights {gigabytes(linear_bytes(model))}, embedding and lm_head {gigabytes(2 * head_bytes(model))}, "
        f"cache {kv_bytes(model, work.kv_bits)} bytes a token; "
        f"the card has {gigabytes(sheet.memory)}, {percent(USABLE)} of it for these"
    )


def limits_table(limits: Sequence[tuple[Limit, Limit]], model: Dimensions, sheet: DataSheet) -> str:
    lines = [LIMIT_COLUMNS, *(limits_line(ideal, real, model, sheet) for ideal, real in limits)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def limits_record(ideal: Limit, real: Limit, model: Dimensions, sheet: DataSheet) -> dict[str, Any]:
    """As JSON has it."""
    work = real.work
    return {
        "batch_size": work.batch,
        "kv_bytes": work.cache_bytes(model),
        "needed_bytes": work.memory_bytes(model),
        "fits": work.fits(model, sheet),
        "ideal": ideal.record(),
        "achievable": real.record(),
    }


def limits_line(ideal: Limit, real: Limit, model: Dimensions, sheet: DataSheet) -> tuple[str, ...]:
    def both(value: Callable[[Limit], float], form: str) -> str:
        return f"{value(ideal):{form}} -> {value(real):{form}}"

    return (
        str(real.work.batch),
        both(lambda found: 1e3 * found.step.total, ".2f"),
        both(lambda found: 1e3 * found.step.linear, ".2f"),
        both(lambda found: 1e3 * found.step.head, ".2f"),
        both(lambda found: 1e3 * found.step.attention, ".2f"),
        f"{1e3 * real.step.elementwise:.2f}",
        f"{1e3 * real.step.launch:.2f}",
        both(lambda found: found.prefill.total, ".2f"),
        both(lambda found: found.decode_tokens_per_s, ",.0f"),
        both(lambda found: found.tokens_per_s, ",.0f"),
        gigabytes(real.work.cache_bytes(model)),
        "yes" if real.work.fits(model, sheet) else "no",
    )


def gigabytes(size: int) -> str:
    return f"{1e-9 * size:.2f} GB"


def describe(machine: "Machine") -> dict[str, Any]:
    """The GPU, as JSON has it."""
    import torch

    sheet = machine.sheet
    return {
        "device": machine.card.name,
        "architecture": machine.card.architecture,
        "torch": torch.__version__,
        "copy_gb_per_s": round(1e-9 * machine.copy, 1),
        "peak_gb_per_s": sheet and 1e-9 * sheet.bandwidth,
        "peak_tops": sheet and 1e-12 * sheet.int8,
    }


def heading(model: str, group_size: int, machine: "Machine") -> str:
    sheet = machine.sheet
    groups = "per channel" if group_size == -1 else f"groups of {group_size}"
    rates = f"{1e-9 * sheet.bandwidth:.0f} GB/s and {1e-12 * sheet.int8:.0f} TOPS" if sheet else "not known"
    return (
        f"{machine.card.name} ({machine.card.architecture}), {model}, {groups}; "
        f"device copy {1e-9 * machine.copy:.0f} GB/s; data sheet {rates}"
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
        f"{config.kernel} {config.rows} x {config.tokens}, {config.stages}, {config.splits}, {config.tail}",
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
