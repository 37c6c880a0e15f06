"""Odd widths made multiples of the group size, exactly.

The residual stream of width d is embedded in the first d dimensions of width d' and rotated there. RMS over d' is
sqrt(d / d') of RMS over d, so the linears that read a norm shrink by that factor, and eps by its square. A query
head of zeros is added to each KV head until the input of o_proj fits: its columns of o_proj are zero.
"""

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from qoq.models.architecture import ModelSpec

Layer = dict[str, Tensor]


def padded_spec(spec: ModelSpec, group_size: int) -> ModelSpec:
    """The smallest dimensions that fit the group size; `spec` itself where it fits, or where padding cannot help.

    With QK-norm the one eps of the config belongs to head_dim as well, so that the width must stay.
    """
    if group_size == -1 or (spec.qk_norm and spec.hidden_size % group_size):
        return spec
    repeats = spec.num_heads // spec.num_kv_heads
    while spec.num_kv_heads * repeats * spec.head_dim % group_size:
        repeats += 1
    hidden = -(-spec.hidden_size // group_size) * group_size
    if _transformers_refuses(spec, hidden, spec.num_kv_heads * repeats) and spec.biases:
        return spec
    return dataclasses.replace(
        spec,
        hidden_size=hidden,
        intermediate_size=-(-spec.intermediate_size // group_size) * group_size,
        num_heads=spec.num_kv_heads * repeats,
        rms_norm_eps=spec.rms_norm_eps * spec.hidden_size / hidden,
    )


def _transformers_refuses(spec: ModelSpec, hidden_size: int, num_heads: int) -> bool:
    """LlamaConfig insists on a hidden size that is a multiple of the heads, whatever head_dim says."""
    return spec.model_type == "llama" and hidden_size % num_heads != 0


def config_changes(spec: ModelSpec) -> dict[str, Any]:
    """What config.json of the checkpoint says of its dimensions.

    A Llama that its own config class would refuse is written as the Mistral it equals: without biases, and without
    a window, the two are one architecture.
    """
    changes: dict[str, Any] = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.rms_norm_eps,
    }
    if _transformers_refuses(spec, spec.hidden_size, spec.num_heads):
        changes |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    return changes


def pad_layer(layer: Layer, spec: ModelSpec, padded: ModelSpec) -> None:
    """Add the zero heads and the zero channels of the MLP; the width is the rotation's business."""
    heads, rows = padded.num_heads // spec.num_kv_heads, padded.intermediate_size - spec.intermediate_size
    old = spec.num_heads // spec.num_kv_heads
    for part in ("self_attn.q_proj.weight", "self_attn.q_proj.bias"):
        if part in layer:
            grouped = layer[part].unflatten(0, (spec.num_kv_heads, old, spec.head_dim))
            trailing = (0, 0) * (grouped.dim() - 2)
            layer[part] = F.pad(grouped, (*trailing, 0, heads - old)).flatten(0, 2)
    o = layer["self_attn.o_proj.weight"].unflatten(1, (spec.num_kv_heads, old, spec.head_dim))
    layer["self_attn.o_proj.weight"] = F.pad(o, (0, 0, 0, heads - old)).flatten(1)
    for part in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        layer[part] = F.pad(layer[part], (0, 0, 0, rows))
    layer["mlp.down_proj.weight"] = F.pad(layer["mlp.down_proj.weight"], (0, rows))
