"""The order of a quantization run, in one function. One decoder layer is in memory at a time.

Two streams of hidden states travel through the layers: `x_fp` through the transformed layers in full precision,
`x_q` through the quantized ones (A8 and KV4 on). A third pair, a few random tokens through the original and the
transformed layers, proves before each layer is quantized that the transforms left its function unchanged.
Interrupted runs replay the streams through the finished layers, so that the result has the same bits.
"""

import datetime
import logging
import math
import platform
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qoq
from qoq import checkpoint, layout, recipe
from qoq.calibration import blocks, data, insight, layer, pad, publish, rotate
from qoq.calibration.blocks import Streams
from qoq.calibration.memory import Placement
from qoq.calibration.ranks import Ranks
from qoq.calibration.work import Work, refuse_existing
from qoq.errors import DataError, QuantizationError
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LINEARS, LM_HEAD, ModelSpec
from qoq.models.decoder import (
    KVTransform,
    QuantizedLayer,
    Rope,
    float_block,
    rotary_embedding,
    simulated_block,
    simulated_cache,
)
from qoq.models.source import Source
from qoq.quant import rms_norm
from qoq.recipe import Recipe

PROBE_TOKENS = 16
TOKENS_PER_FEATURE = 8  # below this, perplexity on other text was seen to rise
MAX_TRANSFORM_ERROR = 1e-4  # of the hidden states and of the logits, relative, in float32


def target_spec(spec: ModelSpec, settings: Recipe) -> ModelSpec:
    """The dimensions of the checkpoint: padded to the group size where the recipe rotates."""
    return pad.padded_spec(spec, settings.group_size) if settings.rotate else spec


@dataclass
class Probe:
    """A few random tokens, (1, T, hidden) float32: the run's own proof that its transforms are exact."""

    original: Tensor  # through the original layers
    transformed: Tensor  # through the transformed layers
    rope: Rope

    def error(self, residual: Tensor | None) -> float:
        """Relative difference of the two, in one basis."""
        expected = self.original if residual is None else self.original.double() @ residual
        return relative_error(self.transformed, expected) ** 0.5


@dataclass(frozen=True)
class Rotations:
    """float64 on the run's device; None where the recipe does not rotate."""

    residual: Tensor | None  # (hidden, width), width the hidden size of the checkpoint
    values: Tensor | None  # (head_dim, head_dim)

    def embedding(self, matrix: Tensor) -> Iterator[Tensor]:
        """(vocab, hidden) -> (vocab, width), in slices of rows."""
        if self.residual is None:
            return iter(matrix.split(rotate.ROWS_AT_ONCE))
        return rotate.rotated_slices(matrix, self.residual)

    def layer(self, tensors: dict[str, Tensor], original: ModelSpec, spec: ModelSpec) -> None:
        """Fold the norms of a layer, rotate and pad it, in place."""
        if self.residual is None or self.values is None:
            return
        rotate.fold_norms(tensors)
        rotate.rotate_residual(tensors, self.residual)
        rotate.rotate_values(tensors, original, self.values)
        pad.pad_layer(tensors, original, spec)

    def head(self, norm: Tensor, lm_head: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
        """The gain of the final norm (width,) and lm_head (vocab, width) in slices of rows, the gain folded in."""
        if self.residual is None:
            return norm, iter(lm_head.split(rotate.ROWS_AT_ONCE))
        reading = rotate.reading(self.residual)
        return torch.ones(reading.shape[1]), rotate.rotated_slices(lm_head, reading, norm)


def rotations(original: ModelSpec, spec: ModelSpec, settings: Recipe, device: str) -> Rotations:
    """The rotations of a run that makes a checkpoint of dimensions `spec`."""
    if not settings.rotate:
        return Rotations(None, None)
    residual = rotate.rotation(spec.hidden_size, settings.seed)[: original.hidden_size]
    return Rotations(residual.to(device), rotate.rotation(spec.head_dim, settings.seed).to(device))


@dataclass(frozen=True)
class Run:
    """What stays the same from the first layer to the last."""

    source: Source
    spec: ModelSpec  # of the checkpoint
    settings: Recipe
    rotations: Rotations
    work: Work | None  # of rank 0, which alone writes
    device: str
    ranks: Ranks
    placement: Placement

    def has(self, part: str) -> bool:
        """Whether an interrupted run finished a part."""
        done = self.work is not None and self.work.has(part)
        return bool(self.ranks.share({}, done, "cpu")[1])


def quantize(
    source: Source,
    output: Path,
    settings: Recipe,
    *,
    device: str = "cpu",
    resume: bool = True,
    on_layer: Callable[[Mapping[str, Any]], None] = lambda report: None,
    placement: Placement | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Make a checkpoint of `source` in the new folder `output`; returns the report that is written with it.

    `on_layer` hears of each finished layer, those of an interrupted run included. `placement` says where the samples
    lie and how many tokens a batch has. Of several `ranks`, each computes with its share of the samples, and rank 0
    writes; call it within `ranks.together()`.

    Raises:
        QoqError: see the kinds in `qoq.errors`; whatever was finished stays in the work folder.
    """
    placement, ranks = placement or Placement(), ranks or Ranks()
    started = time.monotonic()
    spec = target_spec(source.spec, settings)
    layout.check_group_size(spec, settings.group_size)
    layout.check_cache_layers(spec, settings.kv_cache)
    if ranks.rank == 0:
        refuse_existing(output)  # before minutes of hashing
    tokenizer = source.tokenizer()
    calibration = settings.calibration
    tokens = data.samples(tokenizer, calibration.dataset, calibration.nsamples, calibration.seqlen, settings.seed)
    if len(tokens) < ranks.size:
        raise DataError(f"{len(tokens)} calibration samples for {ranks.size} ranks, expected one for each at least")
    widest = max(spec.linear_shape(name)[1] for name in LINEARS)
    if ranks.rank == 0 and settings.weights.gptq and tokens.numel() < TOKENS_PER_FEATURE * widest:
        logging.getLogger(__name__).warning(
            "%d calibration tokens are few for Hessians of %d features; %d or more are better",
            tokens.numel(),
            widest,
            TOKENS_PER_FEATURE * widest,
        )
    identity = {
        "source files": source.hashes() if ranks.rank == 0 else {},  # others have no work folder
        "recipe": recipe.as_dict(settings),
        "calibration tokens": data.token_hash(tokens),
        "version": qoq.__version__,
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "batch": placement.tokens_at_once,
        "ranks": ranks.size,
    }
    held: AbstractContextManager[Work | None]
    held = Work(output).hold(identity, resume) if ranks.rank == 0 else nullcontext()
    with held as work:
        turn = rotations(source.spec, spec, settings, device)
        run = Run(source, spec, settings, turn, work, device, ranks, placement)
        streams, probe = _embed(run, tokens[ranks.share_of(len(tokens))])
        drift = insight.Drift(streams) if ranks.rank == 0 else None
        layers = []
        for index in range(spec.num_layers):
            layers.append(_layer(run, index, streams, probe, drift))
            on_layer(layers[-1])
        divergence = _head(run, probe, drift)

        report = {
            "model": source.name,
            "version": qoq.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": identity["device"],
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "source_files": identity["source files"],
            "calibration": {
                "dataset": calibration.dataset,
                "samples": tokens.shape[0],
                "seqlen": tokens.shape[1],
                "sha256": identity["calibration tokens"],
            },
            "recipe": identity["recipe"],
            "ranks": ranks.size,
            "layers": layers,
            "kl": divergence,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_gpu_bytes": 0 if device == "cpu" else torch.cuda.max_memory_allocated(device),
            "seconds": round(time.monotonic() - started, 1),
        }
        if work is not None:
            publish.publish(source, spec, settings, tokenizer, report, work)
    return report


def _embed(run: Run, tokens: Tensor) -> tuple[Streams, Probe]:
    """Write the embedding and start streams and probe from it; a slice of the rotated matrix is in memory at a time."""
    original = run.source.embedding()
    generator = torch.Generator().manual_seed(0)
    probe_ids = torch.randint(0, run.source.spec.vocab_size, (1, PROBE_TOKENS), generator=generator)
    dtype, home = torch.float32 if run.device == "cpu" else torch.float16, run.placement.home(run.device)
    x_fp, x_q = (torch.empty(*tokens.shape, run.spec.hidden_size, dtype=dtype, device=home) for _ in range(2))
    transformed = torch.empty(*probe_ids.shape, run.spec.hidden_size)
    half = torch.empty(len(original), run.spec.hidden_size, dtype=torch.float16)
    start = 0
    for rows in run.rotations.embedding(original):
        part = half[start : start + len(rows)]
        part.copy_(checkpoint.to_fp16(EMBEDDING, rows))
        for ids, source, target in ((tokens, rows, x_fp), (tokens, part, x_q), (probe_ids, rows, transformed)):
            _gather(ids - start, source, target)
        start += len(rows)
    if run.work is not None and not run.work.has("embed"):
        run.work.write("embed", {EMBEDDING: half}, {"digests": {EMBEDDING: publish.digest(half)}})
    rope = rotary_embedding(run.source.config)
    streams = Streams(
        x_fp,
        x_q,
        _to(rope(torch.arange(tokens.shape[1])), run.device),
        run.placement.tokens_at_once,
        run.ranks,
    )
    probe = Probe(
        original[probe_ids].to(run.device, torch.float32),
        transformed.to(run.device),
        _to(rope(torch.arange(PROBE_TOKENS)), run.device),
    )
    return streams, probe


def _gather(ids: Tensor, rows: Tensor, target: Tensor) -> None:
    """target[s, t] = rows[ids[s, t]] where there is such a row."""
    for sample, into in zip(ids, target, strict=True):
        at = ((sample >= 0) & (sample < len(rows))).nonzero()[:, 0]
        into[at.to(into.device)] = rows[sample[at]].to(into)


def _to(rope: Rope, device: str) -> Rope:
    return rope[0].to(device), rope[1].to(device)


def _layer(run: Run, index: int, streams: Streams, probe: Probe, drift: insight.Drift | None) -> dict[str, Any]:
    """Transform, check, quantize and write one layer, and move everything past it."""
    started, passes = time.monotonic(), blocks.Stopwatch(torch.device(run.device))
    spec, settings, part = run.spec, run.settings, f"layer-{index:05d}"
    with passes("read"):
        weights = run.source.layer(index, run.device)
    blocks.propagate(float_block(run.source.spec, index, dict(weights)), probe.original, probe.rope)
    with passes("rotate"):
        run.rotations.layer(weights, run.source.spec, spec)
    with passes("smooth"):
        kv, choices = layer.transform(weights, spec, index, streams, settings)
        weights, kv, choices = _agree(run, weights, kv, choices)
    blocks.propagate(float_block(spec, index, weights), probe.transformed, probe.rope)
    error = probe.error(run.rotations.residual)
    check_transform(error, f"layer {index}")

    done = run.has(part)
    if done:
        quantized = _finished(run, part, index)
        _replay(weights, quantized, run, index, streams)
    else:
        quantized, losses = layer.quantize(weights, kv, spec, index, streams, settings, passes)
    loss = _loss(streams)
    if drift is None or run.work is None:
        return {"layer": index, "loss": loss}
    with passes("insight"):
        variants = insight.variants(weights, quantized, spec, index, drift.rope, settings.kv_cache)
        causes = drift.advance(variants)
    if done:
        return {key: value for key, value in run.work.report(part).items() if key != "digests"}
    report = {
        "layer": index,
        "loss": loss,
        "transform_error": error,
        **choices,
        "linears": losses,
        "causes": causes,
    }
    with passes("pack"):
        tensors, digests = layer.pack(quantized, index)  # names a weight that no scale fits
    if not math.isfinite(loss):
        raise layer.not_finite(f"layer {index}: its output", streams.x_fp.dtype)
    report |= {"seconds": round(time.monotonic() - started, 2), "passes": passes.seconds}
    run.work.write(part, tensors, {**report, "digests": digests})
    return report


def _agree(
    run: Run, weights: dict[str, Tensor], kv: KVTransform, choices: dict[str, Any]
) -> tuple[dict[str, Tensor], KVTransform, dict[str, Any]]:
    """The transformed layer of rank 0, on every rank."""
    if run.ranks.size == 1:
        return weights, kv, choices
    offsets = {name: x for name, x in (("k_offset", kv.k_offset), ("v_offset", kv.v_offset)) if x is not None}
    tensors, choices = run.ranks.share(weights | offsets, choices, run.device)
    offsets = {name: tensors.pop(name) for name in offsets}
    return tensors, KVTransform(kv.rotate, **offsets), choices


def _finished(run: Run, part: str, index: int) -> QuantizedLayer:
    """A layer that an interrupted run finished; rank 0 reads it."""
    tensors = {} if run.work is None else layer.read(run.work.path(part))
    return layer.unpack(run.ranks.share(tensors, None, "cpu")[0], run.spec, index, run.settings, run.device)


def _loss(streams: Streams) -> float:
    """`relative_error` of the quantized stream, over the samples of all ranks."""
    found, expected = ((sample.to(streams.device) for sample in x) for x in (streams.x_q, streams.x_fp))
    sums = torch.tensor(squared_sums(found, expected), dtype=torch.float64)
    streams.ranks.sum(sums)
    return float(sums[0]) / max(float(sums[1]), 1e-300)


def _replay(weights: dict[str, Tensor], quantized: QuantizedLayer, run: Run, index: int, streams: Streams) -> None:
    """Move the streams past a layer that an interrupted run finished."""
    dtype = streams.x_fp.dtype
    rope, tokens = streams.rope, streams.tokens_at_once
    blocks.propagate(float_block(run.spec, index, weights, dtype), streams.x_fp, rope, None, tokens)
    cache = simulated_cache(run.settings.kv_cache)
    blocks.propagate(simulated_block(run.spec, index, quantized, dtype), streams.x_q, rope, cache, tokens)


def _head(run: Run, probe: Probe, drift: insight.Drift | None) -> dict[str, float]:
    """Compare the logits of the transformed model with the original's, and write the final norm and lm_head.

    Returns the KL divergence of each cause, as the written lm_head tells it.
    """
    eps, new_eps = run.source.spec.rms_norm_eps, run.spec.rms_norm_eps
    original, norm = run.source.lm_head(), run.source.final_norm()
    gain, slices = run.rotations.head(norm, original)
    expected = _logits(probe.original, norm, original, eps)
    half = torch.empty(len(original), run.spec.hidden_size, dtype=torch.float16)
    found, start = torch.empty_like(expected), 0
    for rows in slices:
        half[start : start + len(rows)] = checkpoint.to_fp16(LM_HEAD, rows)
        found[..., start : start + len(rows)] = _logits(probe.transformed, gain, rows, new_eps)
        start += len(rows)
    del original
    check_transform(relative_error(found, expected) ** 0.5, "the logits")
    if run.work is not None and not run.work.has("head"):
        tensors = {FINAL_NORM: checkpoint.to_fp16(FINAL_NORM, gain), LM_HEAD: half}
        digests = {name: publish.digest(tensor) for name, tensor in tensors.items()}
        run.work.write("head", tensors, {"digests": digests})
    return {} if drift is None else drift.divergence(lambda x: _logits(x, gain, half, new_eps))


def _logits(x: Tensor, gain: Tensor, head: Tensor, eps: float) -> Tensor:
    """(1, T, hidden) -> (1, T, vocab) float32 on the CPU."""
    hidden = rms_norm(x.cpu(), gain, eps)
    return torch.cat([F.linear(hidden, rows.float()) for rows in head.split(rotate.ROWS_AT_ONCE)], dim=-1)


def check_transform(error: float, where: str) -> None:
    """Raise QuantizationError where a transform changed what the model computes."""
    if not error < MAX_TRANSFORM_ERROR:
        raise QuantizationError(
            f"{where}: the transformed model differs from the original by {error:.2e}, "
            f"expected less than {MAX_TRANSFORM_ERROR:.0e}; nothing was written from here on"
        )


def relative_error(x: Tensor, reference: Tensor) -> float:
    """|x - reference|**2 / |reference|**2, of (samples, ...) tensors."""
    difference, size = squared_sums(x, reference)
    return difference / max(size, 1e-300)


def squared_sums(x: Iterable[Tensor], reference: Iterable[Tensor]) -> tuple[float, float]:
    """|x - reference|**2 and |reference|**2, sample by sample."""
    difference, size = 0.0, 0.0
    for a, b in zip(x, reference, strict=True):
        difference += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    return difference, size
