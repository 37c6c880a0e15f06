"""qoq bench throughput: tokens a second of a whole batch, by QServe's protocol."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qoq.cli.bench import Numbers
from qoq.cli.output import check_device, common_options, in_a_folder, note, print_json

COLUMNS = (
    *("device", "model", "batch_size", "input_len", "output_len", "throughput_tokens_per_s"),
    *("seconds", "prefill_seconds", "output_tokens", "rounds", "seed", "kv_cache_tokens"),
)


@click.command()
@click.argument("checkpoint")
@click.option("--input-len", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens of a prompt.")
@click.option("--output-len", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of an answer.")
@click.option("--batch-size", type=click.IntRange(1, 1024), default=128, show_default=True, help="Requests at a time.")
@click.option("--sweep", type=Numbers(1024), help="Batch sizes, one after the other, in place of --batch-size.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="The last one counts.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random prompts.")
@click.option("--device", default="cuda", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=in_a_folder,
    help="Append a row for each batch size.",
)
@common_options
def throughput(
    checkpoint: str,
    input_len: int,
    output_len: int,
    batch_size: int,
    sweep: tuple[int, ...] | None,
    rounds: int,
    seed: int,
    device: str,
    csv_path: Path | None,
    as_json: bool,
) -> None:
    """Time CHECKPOINT on batches of random prompts, prefill included, as QServe does."""
    import numpy as np

    from qoq.runtime import benchmark

    check_device(device)
    sizes = sweep or (batch_size,)
    engine = benchmark.load(checkpoint, device, max(sizes), input_len, output_len)
    say: Callable[[str], Any] = note if as_json else click.echo
    generator, records = np.random.default_rng(seed), []  # one for all rounds: no prompt comes twice
    for size in sizes:
        say(f"{checkpoint}: Batch={size}, Input={input_len}, Output={output_len}")
        for number in range(rounds):
            last = benchmark.run_round(engine, size, input_len, output_len, generator)
            say(f"Round {number} Throughput: {last.tokens_per_second:.2f} tokens / second")
        values = (
            *(benchmark.device_name(engine), checkpoint, size, input_len, output_len, last.tokens_per_second),
            *(last.seconds, last.prefill_seconds, last.output_tokens, rounds, seed, benchmark.cache_tokens(engine)),
        )
        records.append(dict(zip(COLUMNS, values, strict=True)))
        if csv_path is not None:
            _append(csv_path, records[-1])
    if as_json:
        print_json({"results": records} if sweep else records[0])


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(record)
