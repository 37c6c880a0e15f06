"""Humming's own folders (https://github.com/vllm-project/humming): uint4 with zero points, int8 for each token.

    weight (N, K/8) int32, weight_scale (N, G) fp16, zero_point (N/8, G) int32: codes and zeros as in `nibbles`

With int8 activations Humming itself rounds group scales, at load, to multiples of a 1024th of the largest in the
matrix. The loss counts that.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from qoq.formats import nibbles
from qoq.formats.affine import AffineWeight, Loss, loss_between, to_affine
from qoq.quant import QuantizedWeight

LEVELS = 1024


def humming_weight(name: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], Loss]:
    """The tensors of a linear."""
    affine, loss = to_affine(weight)
    affine = without_idle_scales(affine)
    tensors = {
        f"{name}.weight": nibbles.pack(affine.codes),
        f"{name}.weight_scale": affine.scale,
        f"{name}.zero_point": nibbles.pack_columns(affine.zero),
    }
    if affine.groups > 1:
        loss = loss_between(as_loaded(affine), weight.dequantize(), loss.rounded, loss.groups)
    return tensors, loss


def without_idle_scales(weight: AffineWeight) -> AffineWeight:
    """The same weight, groups of zeros with the smallest scale in use: theirs is 1, and would be the largest."""
    idle = (weight.centred() == 0).all(2)
    used = weight.scale.masked_fill(idle, torch.inf).amin()
    return weight if idle.all() else dataclasses.replace(weight, scale=torch.where(idle, used, weight.scale))


def as_loaded(weight: AffineWeight) -> Tensor:
    """(N, K) float32 with the group scales that Humming multiplies by."""
    unit = weight.scale.float().amax() / LEVELS
    return (weight.centred() * ((weight.scale.float() / unit).round() * unit)[..., None]).flatten(1)


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
