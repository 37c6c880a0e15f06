#!/usr/bin/env python3
"""Measure the GEMM configurations of a model's linears on this GPU and write the fastest into a tuning table.

    scripts/tune_kernels.py --model llama-3-8b

A GEMM's first copies begin while the kernels before it still run, in what those leave free of a multiprocessor, so a
configuration that is the fastest alone need not be so in a model. What is measured is therefore a step of a few layers,
whose weights L2 cannot hold, in a CUDA graph: of one token of each of some sequences, or of one prompt. Linear by
linear, those configurations are tried that `tiling` holds for promising; all must give the same bits. The table gets
what makes the step faster than the model of time does.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import click
import torch

from qoq.errors import QoqError
from qoq.kernels import tiling
from qoq.kernels.bench import gemm_specialisations
from qoq.kernels.build import Specialisation
from qoq.kernels.cards import Card
from qoq.kernels.gemm import fuses_swiglu
from qoq.kernels.tiling import BUCKETS, KERNELS, Config
from qoq.kernels.timing import Machine, compile_all, microseconds
from qoq.paged import PAGE
from qoq.roofline import MODELS, Dimensions
from qoq.runtime.batch import Batch, Batches
from qoq.runtime.executor import Executor
from qoq.runtime.random_weights import RandomCheckpoint
from qoq.runtime.scheduler import Chunk, Request

PROMISING = 1.3  # times the least modelled time
WORTH = 0.997  # of the time of a step: what is nearer to the best than that is noise
ROUNDS = 2  # over the linears: the choice for one depends on those of its neighbours
CONTEXT = 1024  # tokens of a sequence
MOST_DECODES = 256  # more tokens in a step are a prompt's
LAYERS = 16  # of the model that is measured: enough that the first and the last one hardly count


def candidates(card: Card, m: int, n: int, k: int, group_size: int) -> list[Config]:
    """The promising configurations, without tails, the best first, and each with fewer stages, too: a block that takes
    less of a multiprocessor's memory leaves more to its neighbours."""
    clocks: dict[Config, float] = {}
    for config in tiling.candidates(card, m, n, k, group_size):
        for one in (config, dataclasses.replace(config, stages=config.stages * 3 // 4)):
            if tiling.problem(one, card, m, n, k, group_size) is None:
                clocks[one] = KERNELS[one.kernel].clocks(one, card, m, n, k, group_size)
    least = min(clocks.values())
    return sorted((one for one in clocks if clocks[one] <= PROMISING * least), key=lambda one: clocks[one])


class Tuner:
    """The table of a card, as far as a model's linears are concerned, and what runs by it."""

    def __init__(self, machine: Machine, model: Dimensions, group_size: int, most_tokens: int):
        self.card, self.shapes, self.group_size = machine.card, model.linears(), group_size
        layers = min(LAYERS, model.num_layers)
        checkpoint = RandomCheckpoint(
            "a model", dataclasses.replace(model, num_layers=layers), group_size, 0, machine.device
        )
        decodes = min(most_tokens, MOST_DECODES)
        self.executor = Executor(checkpoint, machine.device, max(CONTEXT, most_tokens), decodes, 4)
        self.executor.allocate(max(decodes * CONTEXT // PAGE, self.executor.max_pages))
        self.fused = fuses_swiglu(machine.device)

    def specialisations(self, m: int) -> list[Specialisation]:
        """All that measuring steps of `m` tokens takes."""
        found = []
        for name, (n, k) in self.shapes.items():
            tried = candidates(self.card, m, n, k, self.group_size)
            configs = [one for each in tried for one in tiling.tails(each, self.card, m, n, k, self.group_size)]
            found += gemm_specialisations(configs, self.card, self.group_size, self.fused and name == "gate_up")
        return found

    def tune(self, m: int) -> None:
        """Fill the entries for `m` tokens."""
        batch, bucket = self.batch(m), str(tiling.bucket(m))
        by_size = sorted(self.shapes, key=lambda linear: self.shapes[linear][0] * self.shapes[linear][1])
        self.choose(bucket, {})
        modelled, reference = self.measure(batch), self.executor.hidden(batch)
        found = [(modelled, dict[str, list]())]
        for order in (by_size, by_size[::-1]):  # what is best for one depends on what the others have
            time, choices = modelled, dict[str, list]()
            for linear in order * ROUNDS:
                kept = choices
                for config in candidates(self.card, m, *self.shapes[linear], self.group_size):
                    tried = choices | {linear: fields(config)}
                    self.choose(bucket, tried)
                    took = self.measure(batch)
                    if not torch.equal(self.executor.hidden(batch), reference):
                        raise click.ClickException(f"{config} gives other bits at M = {m} of {linear}")
                    if took < WORTH * time:
                        time, kept = took, tried
                choices = kept
            found.append((time, choices))
        time, choices = min(found, key=lambda each: each[0])
        self.choose(bucket, choices)
        layers = len(self.executor.layers)
        print(f"M {m:<5} a layer {modelled / layers:8.1f} -> {time / layers:.1f} us   {choices}", flush=True)

    def choose(self, bucket: str, choices: Mapping[str, list]) -> None:
        """What the table in use has for a bucket: linear -> fields, or nothing."""
        for linear, (n, k) in self.shapes.items():
            shapes = tiling.tuned().setdefault(self.card.name, {})
            entry = shapes.setdefault(tiling.entry_name(n, k, self.group_size), {})
            if linear in choices:
                entry[bucket] = choices[linear]
            else:
                entry.pop(bucket, None)
        tiling.chosen.cache_clear()

    def batch(self, m: int) -> Batch:
        """A step of `m` tokens."""
        batches = Batches(MOST_DECODES, self.executor.max_pages, self.executor.device)
        if m > MOST_DECODES:
            pages = list(range(self.executor.max_pages))
            return batches.of([Chunk(Request("", [0] * m, m, pages=pages), 0, m, True)])
        chunks = []
        for number, token in enumerate(torch.randint(self.executor.spec.vocab_size, (m,)).tolist()):
            first = number * CONTEXT // PAGE
            request = Request(str(number), [0], CONTEXT, pages=list(range(first, first + CONTEXT // PAGE)))
            request.tokens += [0] * (CONTEXT - 2) + [token]
            chunks.append(Chunk(request, CONTEXT - 1, 1, True))
        return batches.of(chunks)

    def measure(self, batch: Batch) -> float:
        """Microseconds of a step."""
        return microseconds([partial(self.executor.hidden, batch)])


def fields(config: Config) -> list:
    """As the table has them: tails are chosen for each M."""
    return [config.kernel, config.rows, config.tokens, config.stages, config.splits]


def write(path: Path, table: dict[str, dict[str, dict[str, list]]]) -> None:
    """One line for each shape that has entries, whose buckets are in order."""
    cards = []
    for card, shapes in sorted(table.items()):
        rows = {name: dict(sorted(buckets.items(), key=lambda item: int(item[0]))) for name, buckets in shapes.items()}
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()) if row)
        cards.append(f"  {json.dumps(card)}: {{\n{lines}\n  }}")
    path.write_text("{\n" + ",\n".join(cards) + "\n}\n")


@click.command()
@click.option("--model", "models", type=click.Choice(tuple(MODELS)), multiple=True, required=True)
@click.option("--group-size", type=click.Choice(("128", "64", "-1")), default="128", show_default=True)
@click.option(
    "--tokens", type=click.Choice([str(m) for m in BUCKETS]), multiple=True, help="Only these entries; all by default."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=tiling.TUNING, show_default=True)
def main(models: Sequence[str], group_size: str, tokens: Sequence[str], output: Path) -> None:
    torch.manual_seed(0)
    chosen = [int(m) for m in tokens] or BUCKETS
    table = tiling.tuned()  # by which tiles are chosen while steps are measured
    table.clear()
    table |= json.loads(output.read_text()) if output.is_file() else {}
    try:
        machine = Machine.here()
        for model in models:
            tuner = Tuner(machine, MODELS[model], int(group_size), max(chosen))
            compile_all([one for m in chosen for one in tuner.specialisations(m)], machine.card.architecture)
            for m in chosen:
                tuner.tune(m)
                write(output, table)
    except QoqError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
