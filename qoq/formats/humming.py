"""Humming's own folders (https://github.com/vllm-project/humming): uint4 with zero points, int8 for each token.

The words are those of compressed-tensors under other names: weight (N, K/8) int32, weight_scale (N, G) fp16,
zero_point (N/8, G) int32. With int8 activations Humming itself rounds group scales, at load, to multiples of a
1024th of the largest in the (fused) matrix.
"""

from typing import Any

from torch import Tensor

from qoq.formats.affine import Loss
from qoq.formats.compressed_tensors import pack_weight
from qoq.quant import QuantizedWeight

NAMES = {"weight_packed": "weight", "weight_scale": "weight_scale", "weight_zero_point": "zero_point"}


def humming_weight(name: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], Loss]:
    """The tensors of a linear."""
    packed, loss = pack_weight(name, weight)
    return {f"{name}.{new}": packed[f"{name}.{old}"] for old, new in NAMES.items()}, loss


def humming_config(group_size: int) -> dict[str, Any]:
    """The keys by their full names: the short ones mean weights and activations at once."""
    return {
        "quant_method": "humming",
        "b_dtype": "uint4",
        "a_dtype": "int8",
        "weight_scale_group_size": max(group_size, 0),  # 0: one scale a row
        "input_scale_group_size": 0,  # one scale a token
        "has_zero_point": True,
        "ignore": ["lm_head"],
    }
