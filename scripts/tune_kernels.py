#!/usr/bin/env python3
"""Measure the GEMM configurations of a model's linears on this GPU and write the fastest into a tuning table.

    scripts/tune_kernels.py --model llama-3-8b

For each linear and each number of tokens the configurations that `tiling` holds for the most promising are compared:
first their bits, then their time, in CUDA graphs over weights that L2 cannot hold. A model takes less than a minute.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from qoq.errors import KernelError
from qoq.kernels import tiling
from qoq.kernels.bench import gemm_specialisations, random_rows, random_weights
from qoq.kernels.cards import Card
from qoq.kernels.gemm import w4a8_gemm
from qoq.kernels.tiling import BUCKETS, KERNELS, Config
from qoq.kernels.timing import Machine, compile_all, microseconds
from qoq.roofline import MODELS

CANDIDATES = 24  # for one linear and one number of tokens


def candidates(card: Card, m: int, n: int, k: int, group_size: int) -> list[Config]:
    """The configurations of least modelled time, the best first; each tile in its three best splits."""

    def clocks(config: Config) -> float:
        return KERNELS[config.kernel].clocks(config, card, m, n, k, group_size)

    best: list[Config] = []
    tried: Counter[Config] = Counter()
    for config in sorted(tiling.candidates(card, m, n, k, group_size), key=clocks):
        tile = replace(config, splits=1)
        tried[tile] += 1
        if tried[tile] <= 3:
            best.append(config)
    return best[:CANDIDATES]


def tune(machine: Machine, n: int, k: int, group_size: int, tokens: Sequence[int]) -> dict[str, list]:
    """Tokens -> the fields of the fastest configuration."""
    weights = random_weights(n, k, group_size, machine)
    found = {}
    for m in tokens:
        rows = random_rows(m, k, machine.device)
        reference: Tensor | None = None
        times: dict[Config, float] = {}
        for config in candidates(machine.card, m, n, k, group_size):
            y = w4a8_gemm(rows, weights[0], config=config)
            reference = y if reference is None else reference
            if not torch.equal(y, reference):
                raise click.ClickException(f"{config} gives other bits at M = {m}, N = {n}, K = {k}")
            times[config] = microseconds([partial(w4a8_gemm, rows, weight, config=config) for weight in weights])
        modelled, best = next(iter(times)), min(times, key=lambda config: times[config])
        found[str(m)] = fields(best)
        tops, speed = 2e-6 * m * n * k / times[best], 1e-3 * n * k / 2 / times[best]
        print(
            f"{n:6} x {k:<6} M {m:<5} {times[best]:8.1f} us {tops:7.0f} TOPS {speed:6.0f} GB/s   {found[str(m)]}   "
            f"modelled best: {times[modelled]:.1f} us {fields(modelled)}",
            flush=True,
        )
    return found


def fields(config: Config) -> list:
    """As the table has them: tails are chosen for each M."""
    return [config.kernel, config.rows, config.tokens, config.stages, config.splits]


def write(path: Path, table: dict[str, dict[str, dict[str, list]]]) -> None:
    """One line for each shape."""
    cards = []
    for card, shapes in sorted(table.items()):
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(buckets)}" for name, buckets in sorted(shapes.items()))
        cards.append(f"  {json.dumps(card)}: {{\n{lines}\n  }}")
    path.write_text("{\n" + ",\n".join(cards) + "\n}\n")


@click.command()
@click.option("--model", "models", type=click.Choice(tuple(MODELS)), multiple=True, required=True)
@click.option("--group-size", type=click.Choice(("128", "64", "-1")), default="128", show_default=True)
@click.option("--tokens", type=int, multiple=True, help="Only these entries; all by default.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=tiling.TUNING, show_default=True)
def main(models: Sequence[str], group_size: str, tokens: Sequence[int], output: Path) -> None:
    torch.manual_seed(0)
    group, chosen = int(group_size), tokens or BUCKETS
    table = json.loads(output.read_text()) if output.is_file() else {}
    try:
        machine = Machine.here()
        card = machine.card
        shapes = sorted({shape for model in models for shape in MODELS[model].linears().values()})
        configs = [config for n, k in shapes for m in chosen for config in candidates(card, m, n, k, group)]
        compile_all(gemm_specialisations(configs, card, group), card.architecture)
        for n, k in shapes:
            entries = table.setdefault(card.name, {}).setdefault(tiling.entry_name(n, k, group), {})
            entries |= tune(machine, n, k, group, chosen)
            write(output, table)
    except KernelError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
