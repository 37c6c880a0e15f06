"""SmoothAttention (QServe 4.2): move the outliers of post-RoPE keys into the queries, which stay in 16 bits."""

import torch
from torch import Tensor

from qoq.models.architecture import ModelSpec

Layer = dict[str, Tensor]


def key_scales(key_absmax: Tensor, alpha: float, shared: bool = False) -> Tensor:
    """lambda = max|K| ** alpha, equal inside each RoPE pair (i, i + D/2): (Hkv, D) -> (Hkv, D) float32.

    Equal values in a pair commute with RoPE, so that the division can be done before it. A pair that is
    never used gets 1. With `shared` all heads get the largest, as QK-norm gains need it.
    """
    if shared:
        key_absmax = key_absmax.amax(dim=0, keepdim=True).expand_as(key_absmax)
    first, second = key_absmax.chunk(2, dim=1)
    pair = torch.maximum(first, second)
    scale = torch.where(pair > 0, pair, 1.0).pow(alpha).clamp(1e-4, 1e4)
    return torch.cat((scale, scale), dim=1)


def smooth_attention(layer: Layer, spec: ModelSpec, key_absmax: Tensor, alpha: float) -> None:
    """Q <- Q * lambda, K <- K / lambda, in the projections and their biases, or in the QK-norm gains.

    `key_absmax` is (Hkv, D), the largest |key| after RoPE of each channel. Query heads take the lambda of
    their KV head.
    """
    scales = key_scales(key_absmax.float(), alpha, shared=spec.qk_norm)
    if spec.qk_norm:  # a scale before the norm would be normalised away
        layer["self_attn.q_norm.weight"] = layer["self_attn.q_norm.weight"] * scales[0]
        layer["self_attn.k_norm.weight"] = layer["self_attn.k_norm.weight"] / scales[0]
        return
    per_key = scales.flatten()
    per_query = scales.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=0).flatten()
    for name, factor in (("self_attn.q_proj", per_query), ("self_attn.k_proj", 1 / per_key)):
        layer[f"{name}.weight"] = layer[f"{name}.weight"] * factor[:, None]
        if (bias := layer.get(f"{name}.bias")) is not None:
            layer[f"{name}.bias"] = bias * factor
