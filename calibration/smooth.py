"""Smoothing: scale channels of one tensor down and of its partner up, so that both quantize well (QServe 4.2, 4.3.2).

Both searches try exponents and keep those of least output error under the quantizers that will really run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.calibration.blocks import ChannelStatistics, LayerStatistics
from qoq.models.architecture import ModelSpec
from qoq.models.decoder import Block, KVTransform, Rope, attention, simulated_cache
from qoq.quant import quantize_rows, round_to_nearest
from qoq.recipe import KVCache

Layer = dict[str, Tensor]
# Exponents of the keys' and of the queries' spread. With a rotated cache (.5, .5) minimises the expected error of
# the scores (Cauchy-Schwarz); without one the keys alone matter.
ATTENTION_EXPONENTS = ((0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.25))
# Exponents of the activations' and of the weights' spread.
DOWN_EXPONENTS = tuple((a / 20, b) for a in range(0, 13, 2) for b in (0.0, 1 - a / 20))
SMALLEST_SCALE, LARGEST_SCALE = 1e-4, 1e4


@dataclass(frozen=True)
class Choice:
    """What a search chose, and the loss (relative squared error) before and after."""

    alpha: float
    beta: float
    before: float
    after: float


def least(candidates: Sequence[tuple[float, float, Tensor]], loss: Callable[[Tensor], float]) -> tuple[Tensor, Choice]:
    """The scale of least loss among (alpha, beta, scale); the first stands for doing nothing."""
    losses = [loss(scale) for _, _, scale in candidates]
    best = min(range(len(losses)), key=losses.__getitem__)
    alpha, beta, scale = candidates[best]
    return scale, Choice(alpha, beta, losses[0], losses[best])


def spread_ratio(a: Tensor, b: Tensor, alpha: float, beta: float) -> Tensor:
    """a**alpha / b**beta, 1 where that is not a usable scale."""
    scale = a.float().pow(alpha) / b.float().pow(beta)
    usable = torch.isfinite(scale) & (scale > 0)
    return torch.where(usable, scale, 1.0).clamp(SMALLEST_SCALE, LARGEST_SCALE)


def attention_scales(spec: ModelSpec, found: LayerStatistics, alpha: float, beta: float) -> Tensor:
    """lambda = std(K)**alpha / std(Q)**beta for each KV head and channel, (Hkv, D).

    It is equal inside each RoPE pair (i, i + D/2), so that it commutes with RoPE, and for all query heads of a KV
    head. With QK-norm, whose gains all heads share, it is equal for all heads.
    """
    keys, queries = found.keys.std.square(), found.queries.std.square()
    queries = queries.unflatten(0, (spec.num_kv_heads, -1)).mean(1)
    if spec.qk_norm:
        keys, queries = (x.mean(0, keepdim=True).expand_as(x) for x in (keys, queries))
    keys, queries = (x.unflatten(1, (2, -1)).mean(1).repeat(1, 2).sqrt() for x in (keys, queries))
    return spread_ratio(keys, queries, alpha, beta)


@torch.inference_mode()
def search_attention(
    block: Block, x: Tensor, rope: Rope, found: LayerStatistics, kv_cache: KVCache
) -> tuple[Tensor, Choice]:
    """The lambda (Hkv, D) of least error of the output of o_proj with the cache quantizer on, for some samples x."""
    q, k, v = block.heads(block.norm("input_layernorm", x), rope)
    project, window = block.linears["self_attn.o_proj"], block.spec.windows[block.index]
    target = project(attention(q, k, v, window)).float()
    repeats = block.spec.num_heads // block.spec.num_kv_heads
    cache = simulated_cache(kv_cache)

    def loss(scales: Tensor) -> float:
        kv = kv_transform(kv_cache, found, scales)
        per_query = scales.repeat_interleave(repeats, dim=0)[:, None]
        inside = kv.enter((q * per_query).to(q.dtype), (k / scales[:, None]).to(k.dtype), v)
        keys, values = cache(block.index, *inside[1:])
        out = kv.leave(attention(inside[0], keys, values, window))
        return float((project(out).float() - target).square().sum() / target.square().sum().clamp(min=1e-30))

    candidates = [(a, b, attention_scales(block.spec, found, a, b)) for a, b in ATTENTION_EXPONENTS]
    return least(candidates, loss)


def kv_transform(kv_cache: KVCache, found: LayerStatistics, scales: Tensor | None) -> KVTransform:
    """The cache transform of a layer whose keys are divided by `scales` (Hkv, D), offsets float16."""
    if not kv_cache.offset:
        return KVTransform(kv_cache.rotate)
    keys = found.keys.mean if scales is None else found.keys.mean / scales
    return KVTransform(kv_cache.rotate, keys.to(torch.float16), found.value_centre.to(torch.float16))


def smooth_attention(layer: Layer, spec: ModelSpec, scales: Tensor) -> None:
    """Q <- Q * lambda, K <- K / lambda, in the projections and their biases, or in the QK-norm gains."""
    if spec.qk_norm:  # a scale before the norm would be normalised away
        layer["self_attn.q_norm.weight"] = layer["self_attn.q_norm.weight"] * scales[0]
        layer["self_attn.k_norm.weight"] = layer["self_attn.k_norm.weight"] / scales[0]
        return
    per_query = scales.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=0).flatten()
    for name, factor in (("self_attn.q_proj", per_query), ("self_attn.k_proj", 1 / scales.flatten())):
        layer[f"{name}.weight"] = layer[f"{name}.weight"] * factor[:, None]
        if (bias := layer.get(f"{name}.bias")) is not None:
            layer[f"{name}.bias"] = bias * factor


@torch.inference_mode()
def search_down(
    x: Tensor, token_weight: Tensor, weight: Tensor, found: ChannelStatistics, group_size: int
) -> tuple[Tensor, Choice]:
    """The scale s (K,) of least error of (x / s) (W s)^T with A8 and rounded W4.

    x (tokens, K) is the input of down_proj, weight (N, K); token_weight (tokens,) weighs the squared errors.
    """
    target = x @ weight.T
    spread = weight.abs().amax(0)

    def error(y: Tensor) -> float:
        return float((y.square().sum(1) * token_weight).sum())

    def loss(scale: Tensor) -> float:
        rows = quantize_rows(x / scale).dequantize()
        rounded = round_to_nearest(weight * scale, group_size).dequantize()
        return error(rows @ rounded.T - target) / max(error(target), 1e-30)

    identity = torch.ones_like(spread)
    candidates = [(0.0, 0.0, identity)]
    candidates += [(a, b, spread_ratio(found.absmax, spread, a, b)) for a, b in DOWN_EXPONENTS if (a, b) != (0, 0)]
    return least(candidates, loss)


def smooth_down(layer: Layer, scale: Tensor) -> None:
    """Divide the input of down_proj by `scale` (K,): up_proj's rows shrink, down_proj's columns grow."""
    layer["mlp.up_proj.weight"] = layer["mlp.up_proj.weight"] / scale[:, None]
    if (bias := layer.get("mlp.up_proj.bias")) is not None:
        layer["mlp.up_proj.bias"] = bias / scale
    layer["mlp.down_proj.weight"] = layer["mlp.down_proj.weight"] * scale


def reorder_down(layer: Layer, salience: Tensor) -> None:
    """Sort the input channels of down_proj by salience (K,), least first: like ones share a group (QServe 4.3.3)."""
    order = salience.argsort(stable=True)
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in layer:
                layer[part] = layer[part][order]
    layer["mlp.down_proj.weight"] = layer["mlp.down_proj.weight"][:, order]
