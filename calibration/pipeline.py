"""The order of a quantization run, in one function. One decoder layer is in memory at a time.

Two streams of hidden states travel through the layers: `x_fp` through the transformed layers in full precision,
`x_q` through the quantized ones (A8 and KV4 on). A third pair, a few random tokens through the original and the
transformed layers, proves before each layer is quantized that the transforms left its function unchanged.
Interrupted runs replay the streams through the finished layers, so that the result has the same bits.
"""

import datetime
import logging
import platform
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qoq
from qoq import checkpoint, recipe
from qoq.calibration import blocks, data, insight, layer, pad, publish, rotate
from qoq.calibration.blocks import Streams
from qoq.calibration.work import Work
from qoq.errors import QuantizationError
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LINEARS, LM_HEAD, ModelSpec
from qoq.models.decoder import (
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


@dataclass(frozen=True)
class Plan:
    """What a run will do and need, known before it starts."""

    source: str
    layers: int
    parameters: int  # in quantized linears
    source_bytes: int
    output_bytes: int
    memory_bytes: int  # estimated peak
    tokens: int

    def line(self, output: Path) -> str:
        gib = 2**30
        return (
            f"{self.source}: {self.layers} layers, {self.parameters / 1e6:.0f} M weights to quantize, "
            f"{self.source_bytes / gib:.2f} GiB -> {output} {self.output_bytes / gib:.2f} GiB; "
            f"about {self.memory_bytes / gib:.1f} GiB of memory, {self.tokens} calibration tokens"
        )


def plan(source: Source, settings: Recipe) -> Plan:
    """Sizes from config and headers alone.

    Raises:
        QuantizationError: the model does not fit the group size.
    """
    spec = target_spec(source.spec, settings)
    checkpoint.check_group_size(spec, settings.group_size)
    left = checkpoint.half_linears(spec, settings.modules_to_not_convert)
    per_layer = spec.linear_parameters() // spec.num_layers
    tokens = settings.calibration.nsamples * settings.calibration.seqlen
    widest = max(spec.linear_shape(name)[1] for name in LINEARS)
    moments = 4 * 6 * widest**2 if settings.weights.gptq else 0
    working_set = 4 * 4 * per_layer + moments  # float32: original, transformed, dequantized, in the making
    streams = 2 * 4 * tokens * spec.hidden_size
    embedding = 10 * spec.vocab_size * spec.hidden_size
    return Plan(
        source=source.name,
        layers=spec.num_layers,
        parameters=spec.linear_parameters(),
        source_bytes=source.bytes(),
        output_bytes=checkpoint.size_in_bytes(spec, settings.group_size, settings.kv_cache, left),
        memory_bytes=500 * 2**20 + max(working_set, embedding) + streams,
        tokens=tokens,
    )


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

    def embedding(self, matrix: Tensor) -> Tensor:
        """(vocab, hidden) -> (vocab, width)."""
        return matrix if self.residual is None else rotate.rotate_matrix(matrix, self.residual)

    def layer(self, tensors: dict[str, Tensor], original: ModelSpec, spec: ModelSpec) -> None:
        """Fold the norms of a layer, rotate and pad it, in place."""
        if self.residual is None or self.values is None:
            return
        rotate.fold_norms(tensors)
        rotate.rotate_residual(tensors, self.residual)
        rotate.rotate_values(tensors, original, self.values)
        pad.pad_layer(tensors, original, spec)

    def head(self, norm: Tensor, lm_head: Tensor) -> tuple[Tensor, Tensor]:
        """The gain of the final norm (width,) and lm_head (vocab, width), the gain folded into it."""
        if self.residual is None:
            return norm, lm_head
        head = rotate.rotate_matrix(lm_head, rotate.reading(self.residual), norm)
        return torch.ones(head.shape[1]), head


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
    work: Work
    device: str


def quantize(
    source: Source,
    output: Path,
    settings: Recipe,
    *,
    device: str = "cpu",
    resume: bool = True,
    on_layer: Callable[[Mapping[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Make a checkpoint of `source` in the new folder `output`; returns the report that is written with it.

    `on_layer` hears of each finished layer, those of an interrupted run included.

    Raises:
        QoqError: see the kinds in `qoq.errors`; whatever was finished stays in the work folder.
    """
    started = time.monotonic()
    plan(source, settings)
    tokenizer = source.tokenizer()
    calibration = settings.calibration
    tokens = data.samples(tokenizer, calibration.dataset, calibration.nsamples, calibration.seqlen, settings.seed)
    spec = target_spec(source.spec, settings)
    widest = max(spec.linear_shape(name)[1] for name in LINEARS)
    if settings.weights.gptq and tokens.numel() < TOKENS_PER_FEATURE * widest:
        logging.getLogger(__name__).warning(
            "%d calibration tokens are few for Hessians of %d features; %d or more are better",
            tokens.numel(),
            widest,
            TOKENS_PER_FEATURE * widest,
        )
    identity = {
        "source files": source.hashes(),
        "recipe": recipe.as_dict(settings),
        "calibration tokens": data.token_hash(tokens),
        "version": qoq.__version__,
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
    }
    work = Work(output, identity, resume)

    run = Run(source, spec, settings, rotations(source.spec, spec, settings, device), work, device)
    streams, probe = _embed(run, tokens)
    drift = insight.Drift(streams)
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
        "layers": layers,
        "kl": divergence,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_bytes": 0 if device == "cpu" else torch.cuda.max_memory_allocated(device),
        "seconds": round(time.monotonic() - started, 1),
    }
    publish.publish(source, spec, settings, tokenizer, report, work)
    return report


def _embed(run: Run, tokens: Tensor) -> tuple[Streams, Probe]:
    """Write the embedding and start streams and probe from it."""
    original = run.source.embedding()
    generator = torch.Generator().manual_seed(0)
    probe_ids = torch.randint(0, run.source.spec.vocab_size, (1, PROBE_TOKENS), generator=generator)
    rotated = run.rotations.embedding(original)
    half = checkpoint.to_fp16(EMBEDDING, rotated)
    if not run.work.has("embed"):
        run.work.write("embed", {EMBEDDING: half}, {"digests": {EMBEDDING: publish.digest(half)}})
    dtype = torch.float32 if run.device == "cpu" else torch.float16
    rope = rotary_embedding(run.source.config)
    streams = Streams(
        x_fp=rotated[tokens].to(run.device, dtype),
        x_q=half[tokens].to(run.device, dtype),
        rope=_to(rope(torch.arange(tokens.shape[1])), run.device),
    )
    probe = Probe(
        original[probe_ids].to(run.device, torch.float32),
        rotated[probe_ids].to(run.device, torch.float32),
        _to(rope(torch.arange(PROBE_TOKENS)), run.device),
    )
    return streams, probe


def _to(rope: Rope, device: str) -> Rope:
    return rope[0].to(device), rope[1].to(device)


def _layer(run: Run, index: int, streams: Streams, probe: Probe, drift: insight.Drift) -> dict[str, Any]:
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
    blocks.propagate(float_block(spec, index, weights), probe.transformed, probe.rope)
    error = probe.error(run.rotations.residual)
    check_transform(error, f"layer {index}")

    done = run.work.has(part)
    if done:
        quantized = layer.unpack(run.work.path(part), spec, index, settings, streams.x_fp.device)
        _replay(weights, quantized, run, index, streams)
    else:
        quantized, losses = layer.quantize(weights, kv, spec, index, streams, settings, passes)
    with passes("insight"):
        ratios = settings.kv_cache.clip_ratios
        causes = drift.advance(insight.variants(weights, quantized, spec, index, drift.rope, ratios))
    if done:
        return {key: value for key, value in run.work.report(part).items() if key != "digests"}
    report = {
        "layer": index,
        "loss": relative_error(streams.x_q, streams.x_fp),
        "transform_error": error,
        **choices,
        "linears": losses,
        "causes": causes,
    }
    with passes("pack"):
        tensors, digests = layer.pack(quantized, index)
    report |= {"seconds": round(time.monotonic() - started, 2), "passes": passes.seconds}
    run.work.write(part, tensors, {**report, "digests": digests})
    return report


def _replay(weights: dict[str, Tensor], quantized: QuantizedLayer, run: Run, index: int, streams: Streams) -> None:
    """Move the streams past a layer that an interrupted run finished."""
    dtype = streams.x_fp.dtype
    blocks.propagate(float_block(run.spec, index, weights, dtype), streams.x_fp, streams.rope)
    cache = simulated_cache(run.settings.kv_cache.clip_ratios)
    blocks.propagate(simulated_block(run.spec, index, quantized, dtype), streams.x_q, streams.rope, cache)


def _head(run: Run, probe: Probe, drift: insight.Drift) -> dict[str, float]:
    """Compare the logits of the transformed model with the original's, and write the final norm and lm_head.

    Returns the KL divergence of each cause.
    """
    eps, new_eps = run.source.spec.rms_norm_eps, run.spec.rms_norm_eps
    original, norm = run.source.lm_head(), run.source.final_norm()
    gain, head = run.rotations.head(norm, original)
    expected = _logits(probe.original, norm, original, eps)
    check_transform(relative_error(_logits(probe.transformed, gain, head, new_eps), expected) ** 0.5, "the logits")
    if not run.work.has("head"):
        tensors = {
            FINAL_NORM: checkpoint.to_fp16(FINAL_NORM, gain),
            LM_HEAD: checkpoint.to_fp16(LM_HEAD, head).contiguous(),
        }
        digests = {name: publish.digest(tensor) for name, tensor in tensors.items()}
        run.work.write("head", tensors, {"digests": digests})
    return drift.divergence(lambda x: _logits(x, gain, head, new_eps))


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
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(x, reference, strict=True))
    return difference / max(sum(float(b.double().square().sum()) for b in reference), 1e-300)
