"""qoq bench throughput: tokens a second of a whole batch, by QServe's protocol."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qoq.cli.bench import FILE, percent
from qoq.cli.engine import Weights, engine_options, weights_options
from qoq.cli.output import Numbers, check_device, common_options, in_a_folder, note, print_json
from qoq.roofline import CARDS, DataSheet, Workload, decode_step, limit, sheet_of

if TYPE_CHECKING:
    from qoq.checkpoint import Checkpoint
    from qoq.runtime.engine import LLMEngine

PRECISIONS = ("w4a8", "fp16")
KV_BITS = {"w4a8": 4, "fp16": 16}  # unless told otherwise
LIMITED = {"w4a8_gemm": "linear", "lm_head": "head", "kv_append_decode": "attention"}  # kernel -> part of a roofline
COLUMNS = (
    *("device", "model", "random_weights", "precision", "group_size", "kv_bits"),
    *("batch_size", "input_len", "output_len", "throughput_tokens_per_s", "output_tokens", "seconds"),
    *("prefill_seconds", "decode_steps", "mean_decode_step_ms", "median_decode_step_ms", "median_decode_step_context"),
    *("rounds", "seed", "kv_cache_tokens", "kv_cache_room_tokens", "max_num_batched_tokens"),
    *("card", "roofline_tokens_per_s", "roofline_share", "achievable_tokens_per_s", "achievable_share"),
)


@click.command()
@weights_options
@click.option("--input-len", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens of a prompt.")
@click.option("--output-len", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of an answer.")
@click.option("--batch-size", type=click.IntRange(1, 1024), default=128, show_default=True, help="Requests at a time.")
@click.option("--sweep", type=Numbers(1024), help="Batch sizes, one after the other, in place of --batch-size.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="The last one counts.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="w4a8",
    show_default=True,
    help="fp16: the same engine with float16 weights and, unless --kv-bits says otherwise, a 16-bit cache.",
)
@click.option("--baseline", is_flag=True, help="Measure fp16 too, afterwards, and say how much slower it is.")
@click.option("--roofline", is_flag=True, help="Say what the card allows, and the share reached.")
@click.option("--account", is_flag=True, help="Watch decode steps afterwards: time of each kernel, and of none.")
@click.option("--card", type=click.Choice(tuple(CARDS)), help="Of --roofline.  [default: the one here]")
@engine_options(16384)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of prompts and random weights.")
@click.option("--device", default="cuda", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option("--csv", "csv_path", type=FILE, callback=in_a_folder, help="Append a row for each batch size.")
@click.option(
    "--plot", "plot_path", type=FILE, callback=in_a_folder, help="Write a PNG: tokens a second against batch size."
)
@common_options
def throughput(
    weights: Weights,
    input_len: int,
    output_len: int,
    batch_size: int,
    sweep: tuple[int, ...] | None,
    rounds: int,
    precision: str,
    baseline: bool,
    roofline: bool,
    account: bool,
    card: str | None,
    engine: dict[str, Any],
    seed: int,
    device: str,
    csv_path: Path | None,
    plot_path: Path | None,
    as_json: bool,
) -> None:
    """Time CHECKPOINT on batches of random prompts, prefill included, as QServe does.

    Or, with --model NAME --random-weights, the shapes of a model that is not at hand.
    """
    device = check_device(device)
    if baseline and precision == "fp16":
        raise click.UsageError("--baseline is fp16; --precision fp16 measures that alone")
    if account and not device.startswith("cuda"):
        raise click.UsageError("--account watches kernels on a GPU; expected --device cuda")
    sheet = find_sheet(device, card, roofline)
    if plot_path is not None:
        from qoq.cli.plot import check_matplotlib

        check_matplotlib()
    if csv_path is not None:
        check_columns(csv_path)

    from qoq.errors import QoqError
    from qoq.runtime import benchmark

    say: Callable[[str], Any] = note if as_json else click.echo
    checkpoint, sizes = weights.open(device, seed), sweep or (batch_size,)

    def measure(precision: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        """Load, measure all sizes, let go of the engine."""
        loaded = benchmark.load(checkpoint, device, max(sizes), input_len, output_len, precision=precision, **options)
        about = describe(loaded, weights, checkpoint, precision, options) | {"rounds": rounds, "seed": seed}
        found = []
        for record in measure_sizes(loaded, about, sizes, input_len, output_len, rounds, seed, say):
            found.append(record | limits(checkpoint, record, sheet))
            say(summary(found[-1], roofline))
            if csv_path is not None:
                append(csv_path, found[-1])
            if account:
                found[-1]["account"] = watched = watch(loaded, checkpoint, found[-1], sheet)
                say(account_table(watched) if watched else "no account")
        return found

    records = measure(precision, {"kv_bits": KV_BITS[precision], **engine})
    rivals: list[dict[str, Any]] = []
    if baseline:
        benchmark.release()
        try:
            rivals = measure("fp16", {**engine, "kv_bits": KV_BITS["fp16"]})
        except QoqError as error:  # what was measured stays
            note(f"no baseline: {error}")
        for record, rival in zip(records, rivals, strict=False):
            record["baseline"] = rival
            record["speedup"] = record["throughput_tokens_per_s"] / rival["throughput_tokens_per_s"]
            say(f"Batch={record['batch_size']}: {record['speedup']:.2f} times the throughput of fp16")
    if plot_path is not None:
        from qoq.cli.plot import throughput as draw
        from qoq.shards import write_bytes

        write_bytes(plot_path, draw([*records, *rivals]))
    if as_json:
        print_json({"results": records} if sweep else records[0])


def find_sheet(device: str, card: str | None, needed: bool) -> DataSheet | None:
    """The data sheet of `card`, else of the device.

    Raises:
        click.UsageError: it is needed and not known.
    """
    import torch

    if card is not None:
        return CARDS[card]
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    sheet = sheet_of(name)
    if sheet is None and needed:
        raise click.UsageError(f"--roofline: data sheet of {name} not known; expected --card {' or '.join(CARDS)}")
    return sheet


def describe(
    loaded: "LLMEngine", weights: Weights, checkpoint: "Checkpoint", precision: str, options: dict[str, Any]
) -> dict[str, Any]:
    """What was measured, as JSON and CSV have it."""
    from qoq.runtime import benchmark

    return {
        "device": benchmark.device_name(loaded),
        "model": weights.name,
        "random_weights": weights.random,
        "precision": precision,
        "group_size": checkpoint.group_size if precision == "w4a8" else None,
        "kv_bits": benchmark.kv_bits(loaded),
        "kv_cache_tokens": benchmark.cache_tokens(loaded),
        "kv_cache_room_tokens": benchmark.cache_room(loaded, options["gpu_memory_utilization"]),
        "max_num_batched_tokens": options["max_num_batched_tokens"],
    }


def measure_sizes(
    loaded: "LLMEngine",
    about: dict[str, Any],
    sizes: Sequence[int],
    input_len: int,
    output_len: int,
    rounds: int,
    seed: int,
    say: Callable[[str], Any],
) -> Iterator[dict[str, Any]]:
    """The last round of each batch size."""
    import numpy as np

    from qoq.runtime import benchmark

    generator = np.random.default_rng(seed)  # one for all rounds: no prompt comes twice
    name = about["model"] + ("" if about["precision"] == "w4a8" else f" in {about['precision']}")
    for size in sizes:
        say(f"{name}: Batch={size}, Input={input_len}, Output={output_len}")
        for number in range(rounds):
            last = benchmark.run_round(loaded, size, input_len, output_len, generator)
            say(f"Round {number} Throughput: {last.tokens_per_second:.2f} tokens / second")
        lengths = {"batch_size": size, "input_len": input_len, "output_len": output_len}
        yield {**about, **lengths, **last.record()}


def limits(checkpoint: "Checkpoint", record: dict[str, Any], sheet: DataSheet | None) -> dict[str, Any]:
    """What the card allows of what was measured: by its data sheet, and with the rates that good kernels reach."""
    from qoq.runtime import benchmark

    names = ("roofline", "achievable")
    if sheet is None:
        return {"card": None} | {f"{name}_{what}": None for name in names for what in ("tokens_per_s", "share")}
    work = Workload(
        batch=record["batch_size"],
        input_len=record["input_len"],
        output_len=record["output_len"],
        kv_bits=record["kv_bits"],
        group_size=checkpoint.group_size,
        precision=record["precision"],
    )
    found: dict[str, Any] = {"card": sheet.name}
    for name, rates in zip(names, (sheet.ideal, sheet.achievable), strict=True):
        most = limit(benchmark.dimensions(checkpoint.spec), rates, work).tokens_per_s
        found |= {f"{name}_tokens_per_s": most, f"{name}_share": record["throughput_tokens_per_s"] / most}
    return found


def summary(record: dict[str, Any], roofline: bool) -> str:
    """What a round was made of, in a line or two."""
    step, context = record["median_decode_step_ms"], record["median_decode_step_context"]
    held, room = record["kv_cache_tokens"], record["kv_cache_room_tokens"]
    parts = [
        f"prefill {record['prefill_seconds']:.2f} s",
        *([f"decode step {step:.2f} ms at {context} tokens"] if step is not None else []),
        f"KV{record['kv_bits']:.3g} tokens held {held:,}, room for {room:,}",
    ]
    lines = [", ".join(parts)]
    if roofline:
        ideal, real = record["roofline_tokens_per_s"], record["achievable_tokens_per_s"]
        shares = percent(record["roofline_share"]), percent(record["achievable_share"])
        lines.append(
            f"{record['card']} allows {ideal:,.0f} tokens / second by its data sheet, {shares[0]} reached; "
            f"{real:,.0f} with good kernels, {shares[1]}"
        )
    return "\n".join(lines)


def watch(
    loaded: "LLMEngine", checkpoint: "Checkpoint", record: dict[str, Any], sheet: DataSheet | None
) -> dict[str, Any] | None:
    """An account of decode steps of what was measured, as JSON has it; what measures weights and cache gets its limit.

    None, and a note, where there is none: what was measured stays.
    """
    import numpy as np

    from qoq.errors import QoqError
    from qoq.runtime import account, benchmark

    batch, input_len, output_len = record["batch_size"], record["input_len"], record["output_len"]
    generator = np.random.default_rng(record["seed"] + 1)
    try:
        watched = account.watch(loaded, batch, input_len, output_len, generator).record()
    except QoqError as error:
        note(f"no account: {error}")
        return None
    if sheet is not None:
        sizes = batch, watched["context"], record["kv_bits"]
        model = benchmark.dimensions(checkpoint.spec)
        least = decode_step(model, sheet.ideal, *sizes, checkpoint.group_size, record["precision"])
        for kernel in watched["kernels"]:
            if kernel["name"] in LIMITED:
                kernel["limit_us"] = round(1e6 * getattr(least, LIMITED[kernel["name"]]), 1)
                kernel["limit_share"] = round(kernel["limit_us"] / kernel["us"], 4)
    return watched


def account_table(watched: dict[str, Any]) -> str:
    """One line for each kernel that takes a thousandth of a step or more."""
    lines = [
        f"a decode step under watch, {watched['context']} tokens: {watched['step_us']:,.0f} us, "
        f"{watched['idle_us']:,.0f} us without a kernel, {watched['gap_us']:,.0f} us in one piece",
        f"{'kernel':40}{'launches':>10}{'us':>10}{'share':>8}{'of limit':>10}",
    ]
    for kernel in watched["kernels"]:
        if kernel["share"] >= 1e-3:
            share = f"{100 * kernel['share']:.1f} %"
            lines.append(
                f"{kernel['name'][:39]:40}{kernel['launches']:>10.1f}{kernel['us']:>10,.1f}{share:>8}"
                f"{percent(kernel.get('limit_share')):>10}"
            )
    return "\n".join(lines)


def check_columns(path: Path) -> None:
    """Refuse to append to a table of other columns, before anything is measured.

    Raises:
        OutputError: names the file.
    """
    from qoq.errors import OutputError

    if path.is_file() and path.stat().st_size > 0:
        with path.open(newline="") as file:
            if tuple(next(csv.reader(file), ())) != COLUMNS:
                raise OutputError(f"{path}: a table with other columns; give --csv another name")


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({name: record[name] for name in COLUMNS})
