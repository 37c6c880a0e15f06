#!/usr/bin/env python3
"""Quantize one model under many recipes and print one table: perplexity, mean KL on held-back C4, seconds.

    scripts/ablation.py --model smollm2-135m --device cuda --ppl tests/data/wiki.test.head.raw

First KV4 alone and A8 alone under the whole recipe's transforms, weights in full precision; then each row is the one
above with one pass more; then the whole recipe without one pass. Rows can be chosen with --rows.
"""

import dataclasses
import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from torch import Tensor

from qoq import evaluate, recipe
from qoq.calibration import blocks, data, insight, layer, pipeline
from qoq.checkpoint import Checkpoint
from qoq.compare import divergence, top_k
from qoq.errors import QuantizationError
from qoq.models.decoder import Cache, Decoder, float_block, rotary_embedding, simulated_cache
from qoq.models.source import Source, open_source
from qoq.recipe import KVCache, Recipe, Weights

HELD_BACK = Path(__file__).parent.parent / "tests" / "data" / "c4_heldout.jsonl"


def rows(group_size: int, nsamples: int, seqlen: int, dataset: str) -> Iterator[tuple[str, Recipe]]:
    """The ladder from plain rounding to the whole recipe, then the whole recipe without one pass."""
    calibration = recipe.Calibration(dataset, nsamples, seqlen)
    ratios = recipe.load("qoq-g64").kv_cache.clip_ratios
    row = Recipe("ablation", group_size, calibration=calibration)
    yield "plain rounding", row
    steps: list[tuple[str, dict[str, object]]] = [
        ("+ rotation", {"rotate": True}),
        ("+ cache rotation, offsets, ratios", {"kv_cache": KVCache(True, True, ratios)}),
        ("+ SmoothAttention", {"smooth_attention": True}),
        ("+ smoothing of down_proj", {"smooth_down": True}),
        ("+ grid search", {"weights": Weights("search")}),
        ("+ GPTQ", {"weights": Weights("search", gptq=True)}),
        ("+ asymmetric", {"weights": Weights("search", gptq=True, asymmetric=0.5)}),
    ]
    for name, change in steps:
        row = dataclasses.replace(row, **change)  # type: ignore[arg-type]
        yield name, row
    without: list[tuple[str, dict[str, object]]] = [
        ("all - rotation", {"rotate": False}),
        ("all - SmoothAttention", {"smooth_attention": False}),
        ("all - smoothing of down_proj", {"smooth_down": False}),
        ("all + reorder", {"reorder": True}),
        ("all, fully asymmetric", {"weights": Weights("search", gptq=True, asymmetric=1.0)}),
        ("all - grid search", {"weights": Weights("round", gptq=True, asymmetric=0.5)}),
        ("all - cache rotation", {"kv_cache": KVCache(False, True, ratios)}),
        ("all - cache offsets", {"kv_cache": KVCache(True, False, ratios)}),
        ("all - cache ratios", {"kv_cache": KVCache(True, True)}),
    ]
    for name, change in without:
        yield name, dataclasses.replace(row, **change)  # type: ignore[arg-type]


class Alone:
    """The transformed model with unquantized weights, and one quantizer."""

    def __init__(self, decoder: Decoder, cache: Cache | None):
        self.decoder, self.cache = decoder, cache

    def logits(self, ids: Tensor) -> Tensor:
        return self.decoder(ids.to(self.decoder.embedding.device), self.cache)


def alone(source: Source, settings: Recipe, device: str) -> Iterator[tuple[str, Alone]]:
    """KV4 alone, A8 alone."""
    spec, calibration = pipeline.target_spec(source.spec, settings), settings.calibration
    turn = pipeline.rotations(source.spec, spec, settings, device)
    tokens = data.samples(
        source.tokenizer(), calibration.dataset, calibration.nsamples, calibration.seqlen, settings.seed
    )
    embedding, rope = torch.cat(list(turn.embedding(source.embedding()))).to(device), rotary_embedding(source.config)
    x = embedding[tokens.to(device)]
    streams = blocks.Streams(x, x, rope(torch.arange(tokens.shape[1], device=device)))
    with_kv, with_a8 = [], []
    for index in range(spec.num_layers):
        tensors = source.layer(index, device)
        turn.layer(tensors, source.spec, spec)
        kv, _ = layer.transform(tensors, spec, index, streams, settings)
        block = float_block(spec, index, tensors)
        blocks.propagate(block, x, streams.rope)
        with_kv.append(dataclasses.replace(block, kv=kv))
        linears = {name: insight.on_rows(linear) for name, linear in block.linears.items()}
        with_a8.append(dataclasses.replace(block, linears=linears))
    norm, slices = turn.head(source.final_norm(), source.lm_head())
    norm, head = norm.float().to(device), torch.cat(list(slices)).float().to(device)
    yield (
        "KV4 alone",
        Alone(Decoder(embedding, with_kv, norm, head, rope), simulated_cache(settings.kv_cache)),
    )
    yield "A8 alone", Alone(Decoder(embedding, with_a8, norm, head, rope), None)


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--ppl", "datasets", multiple=True, required=True, help="Text for perplexity; may be repeated.")
@click.option("--windows", default=8, show_default=True)
@click.option("--group-size", "group_sizes", multiple=True, type=int, default=(64,), show_default=True)
@click.option("--calib-dataset", default="c4", show_default=True)
@click.option("--nsamples", default=128, show_default=True)
@click.option("--seqlen", default=1024, show_default=True)
@click.option("--rows", "chosen", default="", help="Only rows whose name contains one of these, by commas.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the numbers.")
def main(model, device, datasets, windows, group_sizes, calib_dataset, nsamples, seqlen, chosen, output):
    """Run the rows and print the table."""
    source = open_source(model)
    tokenizer = source.tokenizer()
    texts = {
        Path(name).name: evaluate.windows(tokenizer, evaluate.evaluation_text(name), 2048, windows) for name in datasets
    }
    held_back = evaluate.windows(tokenizer, evaluate.evaluation_text(str(HELD_BACK)), 2048, windows)
    original = evaluate.OriginalModel(source, device)
    reference = top_k(original, held_back)
    results = [{"row": "full precision"} | _perplexities(original, texts)]
    del original
    _print_row(results[0])
    wanted = chosen.split(",")
    for group_size in group_sizes:
        table = dict(rows(group_size, nsamples, seqlen, calib_dataset))
        if any(part in "KV4 alone, A8 alone" for part in wanted):
            for name, model in alone(source, table["+ asymmetric"], device):
                results.append({"row": f"{group_size:4} {name}"} | _perplexities(model, texts))
                _print_row(results[-1])
        for name, settings in table.items():
            if not any(part in name for part in wanted):
                continue
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "checkpoint"
                try:
                    report = pipeline.quantize(source, path, settings, device=device)
                except QuantizationError as error:
                    print(f"{name}: {error}", flush=True)
                    continue
                made = evaluate.QuantizedModel(Checkpoint(path), "simulate", device)
            found = divergence(reference, made, held_back)
            row = {"row": f"{group_size:4} {name}"} | _perplexities(made, texts)
            results.append(row | {"KL": found.mean_kl, "same top-1": found.same_top1, "seconds": report["seconds"]})
            _print_row(results[-1])
            del made
            gc.collect()
    if output:
        output.write_text(json.dumps(results, indent=2) + "\n")


def _perplexities(model, texts):
    return {
        name: evaluate.perplexity(model, ids, name="", backend="", dataset=name).perplexity
        for name, ids in texts.items()
    }


def _print_row(row):
    values = (f"{key} {value:.4f}" for key, value in row.items() if key != "row")
    print(f"{row['row']:42} {'   '.join(values)}", flush=True)


if __name__ == "__main__":
    main()
