"""compressed-tensors folders (https://github.com/vllm-project/compressed-tensors), in and out.

    pack-quantized      weight_packed (N, K/8) int32, weight_scale (N, G) fp16, weight_zero_point (N/8, G) int32,
                        weight_shape (2,) int64: 4-bit codes and zeros, see `nibbles`. Weights only: 16-bit activations.
    int-quantized       weight (N, K) int8, weight_scale (N, 1) fp16: the integers that QoQ's GEMM multiplies, with
                        int8 activations and a scale for each token. The same function, at 8 bits a weight.

`input_activations` stay out of the 4-bit form: vLLM 0.26 ignores the zero points of an asymmetric weight with int8
activations.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from qoq.errors import CheckpointError, QuantizationError
from qoq.formats import nibbles
from qoq.formats.affine import AffineWeight, Loss, to_affine, to_qoq
from qoq.formats.origin import ForeignFolder, Shapes, require_dtype
from qoq.quant import GroupedWeight, QuantizedWeight, is_finite

METHOD = "compressed-tensors"


# Out


def pack_weight(name: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], Loss]:
    """The tensors of a pack-quantized linear."""
    affine, loss = to_affine(weight)
    shape = torch.tensor(affine.codes.shape)
    tensors = {"weight_packed": nibbles.pack(affine.codes), "weight_scale": affine.scale}
    tensors |= {"weight_zero_point": nibbles.pack_columns(affine.zero), "weight_shape": shape}
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}, loss


def int8_weight(name: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], Loss]:
    """The tensors of an int-quantized linear; exact.

    Raises:
        QuantizationError: a per-channel weight, whose zeros no symmetric int8 weight has.
    """
    if not isinstance(weight, GroupedWeight):
        raise QuantizationError(f"{name}: per-channel weights have zero points, which int8 weights have not")
    return {f"{name}.weight": weight.integers(), f"{name}.weight_scale": weight.s1[:, None]}, Loss(0, 0, 0, 0)


def pack_config(group_size: int, half_precision: Collection[str] = ()) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "dynamic": False, **strategy}
    return _config("pack-quantized", weights, None, half_precision)


def int8_config(half_precision: Collection[str] = ()) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel"}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    return _config("int-quantized", weights, activations, half_precision)


def _config(
    form: str, weights: dict[str, Any], activations: dict[str, Any] | None, half_precision: Collection[str]
) -> dict[str, Any]:
    """Readers differ in which of the two `format` they take."""
    group = {"format": form, "targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": METHOD,
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", *sorted(half_precision)],
        "config_groups": {"group_0": group},
    }


# In


class CompressedTensorsFolder(ForeignFolder):
    """A pack-quantized folder with 4-bit integer weights, symmetric or not, bf16 or fp16 scales.

    Raises:
        CheckpointError: another form, more than one scheme, activation order, or a transform that runs online.
    """

    format = METHOD

    def find_group_size(self) -> int:
        declared = self.config.get("quantization_config") or {}
        groups = declared.get("config_groups") or {}
        if len(groups) != 1:
            raise CheckpointError(f"{self.folder}: {len(groups)} config_groups, expected one scheme for all linears")
        (group,) = groups.values()
        form = group.get("format") or declared.get("format")
        weights = group.get("weights") or {}
        wanted = {"format": (form, "pack-quantized"), "num_bits": (weights.get("num_bits"), 4)}
        wanted |= {
            "type": (weights.get("type"), "int"),
            "transform_config": (declared.get("transform_config") or None, None),
        }
        for key, (found, expected) in wanted.items():
            if found != expected:
                raise CheckpointError(f"{self.folder}: {key} is {found!r}, expected {expected!r}")
        self.symmetric = bool(weights.get("symmetric", True))
        strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
        if strategy not in ("group", "channel"):
            raise CheckpointError(f"{self.folder}: strategy {strategy!r}, expected 'group' or 'channel'")
        return int(weights["group_size"]) if strategy == "group" else -1

    def weight_shapes(self, n: int, k: int) -> Shapes:
        groups = 1 if self.group_size == -1 else k // self.group_size
        shapes = {"weight_packed": (n, k // 8), "weight_scale": (n, groups), "weight_shape": (2,)}
        return shapes if self.symmetric else shapes | {"weight_zero_point": (n // 8, groups)}

    def weight(self, name: str) -> tuple[QuantizedWeight, Loss]:
        if f"{name}.weight_g_idx" in self.tensors:
            raise CheckpointError(
                f"{self.folder}: {name} has activation order (weight_g_idx), whose groups are scattered"
            )
        packed, stored = self.read_all(name, "weight_packed", "weight_scale")
        codes = nibbles.unpack(require_dtype(f"{name}.weight_packed", packed, torch.int32))
        scale = fp16_scales(f"{name}.weight_scale", stored)
        zero = torch.full(scale.shape, 8, dtype=torch.uint8)
        if not self.symmetric:
            (zeros,) = self.read_all(name, "weight_zero_point")
            zero = nibbles.unpack_columns(require_dtype(f"{name}.weight_zero_point", zeros, torch.int32))
        return to_qoq(AffineWeight(codes, scale, zero), self.group_size)


def fp16_scales(name: str, scales: Tensor) -> Tensor:
    """Scales of any float dtype as float16.

    Raises:
        CheckpointError: a scale that is negative, not finite or too large for float16.
    """
    require_dtype(name, scales, torch.float16, torch.bfloat16, torch.float32)
    half = scales.to(torch.float16)
    if not is_finite(half) or bool((half < 0).any()):
        raise CheckpointError(
            f"{name}: scales from {float(scales.min()):.4g} to {float(scales.max()):.4g}, expected 0..65504"
        )
    return half
