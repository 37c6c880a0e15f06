"""One decoder layer: transforms, then weights stage by stage, each fed by what is quantized already."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq import checkpoint, layout, shards
from qoq.calibration import publish, rotate, smooth, weights
from qoq.calibration.blocks import Stopwatch, Streams, observe
from qoq.errors import QuantizationError
from qoq.models.architecture import LINEARS, ModelSpec
from qoq.models.decoder import (
    Block,
    KVTransform,
    Linear,
    QuantizedLayer,
    float_block,
    simulated_cache,
    simulated_linear,
)
from qoq.quant import (
    ChannelWeight,
    GroupedWeight,
    HalfLinear,
    QuantizedLinear,
    QuantizedWeight,
    StoredLinear,
    is_finite,
)
from qoq.recipe import Recipe

Layer = dict[str, Tensor]


@torch.inference_mode()
def transform(
    layer: Layer, spec: ModelSpec, index: int, streams: Streams, settings: Recipe
) -> tuple[KVTransform, dict[str, Any]]:
    """Smooth and reorder the layer in place; returns the cache transform and what was chosen."""
    report: dict[str, Any] = {}
    if not (settings.smooth_attention or settings.smooth_down or settings.reorder or settings.kv_cache.offset):
        return KVTransform(settings.kv_cache.rotate), report
    block = float_block(spec, index, layer, streams.x_fp.dtype)
    some = streams.some()
    found = observe(block, streams.x_fp, streams.rope, some, streams.tokens_at_once)
    found.combine(streams.ranks)
    scales = None
    if settings.smooth_attention:
        scales, choice = smooth.search_attention(block, some, streams.rope, found, settings.kv_cache)
        smooth.smooth_attention(layer, spec, scales)
        report["smooth_attention"] = asdict(choice)
    salience = found.down.absmax
    if settings.smooth_down:
        middle = block.attention_half(some, streams.rope, None)
        x = block.feed(block.norm("post_attention_layernorm", middle)).flatten(0, 1).float()
        counts = token_weight(block.mlp_half(middle)).flatten()
        scale, choice = smooth.search_down(x, counts, layer["mlp.down_proj.weight"], found.down, settings.group_size)
        smooth.smooth_down(layer, scale)
        salience = salience / scale
        report["smooth_down"] = asdict(choice)
    if settings.reorder:
        smooth.reorder_down(layer, salience)
    return smooth.kv_transform(settings.kv_cache, found, scales), report


@torch.inference_mode()
def quantize(
    layer: Layer,
    kv: KVTransform,
    spec: ModelSpec,
    index: int,
    streams: Streams,
    settings: Recipe,
    passes: Stopwatch,
) -> tuple[QuantizedLayer, dict[str, Any]]:
    """Quantize a transformed layer and move both streams past it; also gives the losses of each linear.

    The order is q, k, v, then o, then gate, up, then down; in between the streams advance by half a layer.
    """
    prefix, dtype, rope = f"model.layers.{index}.", streams.x_fp.dtype, streams.rope
    cache = simulated_cache(settings.kv_cache)
    fp = float_block(spec, index, layer, dtype)
    norms = {name: checkpoint.to_fp16(f"{prefix}{name}.weight", layer[f"{name}.weight"]) for name in spec.norm_shapes()}
    linears: dict[str, StoredLinear] = {}
    left = layout.half_linears(spec, settings.modules_to_not_convert)
    running: dict[str, Linear] = dict(fp.linears)
    q = Block(spec, index, {name: norm.float() for name, norm in norms.items()}, running, kv)
    report: dict[str, Any] = {}

    def bias_of(name: str) -> Tensor | None:
        bias = layer.get(f"{name}.bias")
        return None if bias is None else checkpoint.to_fp16(f"{prefix}{name}.bias", bias)

    def keep(name: str, linear: StoredLinear, losses: dict[str, float]) -> None:
        linears[name], running[name], report[name] = linear, simulated_linear(linear, dtype), losses

    def stage(names: Sequence[str], inputs: Callable[[Block, Tensor], Tensor]) -> None:
        if prefix + names[0] in left:
            for name in names:
                half = checkpoint.to_fp16(f"{prefix}{name}.weight", layer[f"{name}.weight"])
                keep(name, HalfLinear(half, bias_of(name)), {"rounded": 0.0, "loss": 0.0})
            return
        moments = None
        if settings.weights.gptq or settings.weights.grid == "search" or settings.weights.asymmetric:
            moments = weights.Moments(spec.linear_shape(names[0])[1], streams.device)
            with passes("moments"):
                for x_fp, x_q in streams.batches():
                    x_fp = x_fp.to(streams.device)
                    y_fp, counts = inputs(fp, x_fp), None
                    if names[0] in rotate.WRITERS:
                        counts = token_weight(x_fp + fp.linears[names[0]](y_fp))
                    moments.add(inputs(q, x_q.to(streams.device)), y_fp, counts)
                del x_fp, x_q, y_fp, counts  # a batch of the widest activations
                streams.ranks.sum(moments.h, moments.g)
                if not (is_finite(moments.h) and is_finite(moments.g)):
                    raise not_finite(f"{prefix}{names[0]}: its input", dtype)
        with passes("weights"):
            chosen = chosen_by_first(names, moments)
        for name, (weight, losses) in chosen.items():
            keep(name, QuantizedLinear(weight, bias_of(name)), losses)

    def chosen_by_first(
        names: Sequence[str], moments: weights.Moments | None
    ) -> dict[str, tuple[QuantizedWeight, dict[str, Any]]]:
        """Rank 0 decides: on another card the same search may end otherwise."""
        chosen = {}
        if streams.ranks.rank == 0:
            chosen = weights.quantize({name: layer[f"{name}.weight"] for name in names}, moments, settings)
        fields = {(name, field): x for name, (weight, _) in chosen.items() for field, x in vars(weight).items()}
        losses = {name: losses for name, (_, losses) in chosen.items()}
        fields, losses = streams.ranks.share(fields, losses, streams.device)
        kind = ChannelWeight if settings.group_size == -1 else GroupedWeight
        return {
            name: (kind(**{field: x for (of, field), x in fields.items() if of == name}), losses[name])
            for name in names
        }

    def before_attention(block: Block, x: Tensor) -> Tensor:
        return block.norm("input_layernorm", x)

    def before_o(block: Block, x: Tensor) -> Tensor:
        return block.attend(before_attention(block, x), rope, cache if block is q else None)

    def before_mlp(block: Block, x: Tensor) -> Tensor:
        return block.norm("post_attention_layernorm", x)

    stage(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], before_attention)
    stage(["self_attn.o_proj"], before_o)
    with passes("propagate"):
        for x_fp, x_q in streams.batches():
            x_fp.copy_(fp.attention_half(x_fp.to(streams.device), rope, None))
            x_q.copy_(q.attention_half(x_q.to(streams.device), rope, cache))
    stage(["mlp.gate_proj", "mlp.up_proj"], before_mlp)
    stage(["mlp.down_proj"], lambda block, x: block.feed(before_mlp(block, x)))
    with passes("propagate"):
        for x_fp, x_q in streams.batches():
            x_fp.copy_(fp.mlp_half(x_fp.to(streams.device)))
            x_q.copy_(q.mlp_half(x_q.to(streams.device)))
    return QuantizedLayer({name: linears[name] for name in LINEARS}, norms, kv), report


def not_finite(what: str, dtype: torch.dtype) -> QuantizationError:
    kind = str(dtype).removeprefix("torch.")
    return QuantizationError(f"{what} has NaN or Inf on calibration tokens, expected finite {kind} values")


def token_weight(residual: Tensor) -> Tensor:
    """1 / mean square of the residual stream (..., hidden) -> (...): the next norm divides errors by it.

    Without it a handful of tokens with massive activations would outvote all others.
    """
    return 1 / residual.float().square().mean(-1).clamp(min=1e-12)


def pack(quantized: QuantizedLayer, index: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a layer under their full names, and digests of what they hold: of linears before packing."""
    prefix = f"model.layers.{index}."
    tensors = {f"{prefix}{name}.weight": norm.cpu() for name, norm in quantized.norms.items()}
    for name, offset in zip(layout.OFFSETS, (quantized.kv.k_offset, quantized.kv.v_offset), strict=True):
        if offset is not None:
            tensors[prefix + name] = offset.cpu()
    digests = {name: publish.digest(tensor) for name, tensor in tensors.items()}
    for name, linear in quantized.linears.items():
        tensors |= checkpoint.pack_linear(prefix + name, linear)
        digests[prefix + name] = publish.linear_digest(linear)
    return tensors, digests


def read(path: Path) -> Layer:
    """The tensors of a finished layer, from its file."""
    return {name: shards.read_tensor(path, name) for name in shards.read_header(path)}


def unpack(packed: Layer, spec: ModelSpec, index: int, settings: Recipe, device: str) -> QuantizedLayer:
    """The inverse of `pack`."""
    prefix = f"model.layers.{index}."
    tensors = {name: tensor.to(device) for name, tensor in packed.items()}
    return QuantizedLayer(
        {name: checkpoint.unpack_linear(prefix + name, tensors) for name in LINEARS},
        {name: tensors[f"{prefix}{name}.weight"] for name in spec.norm_shapes()},
        KVTransform(settings.kv_cache.rotate, *(tensors.get(prefix + name) for name in layout.OFFSETS)),
    )
