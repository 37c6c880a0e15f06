"""A layer's linears as the runtime calls them, and the passes that give them their input, for each precision.

W4A8 goes through the kernels on a GPU and through the specification on a CPU; FP16 multiplies the same weights
dequantized, as what W4A8 is measured against. Linears that read the same input (q, k, v; gate, up) are one: packed
tensors are concatenated, which packs the concatenation (`qoq.packing`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qoq import packing, quant
from qoq.checkpoint import Checkpoint, unpack_linear
from qoq.errors import CheckpointError, QuantizationError
from qoq.kernels import PackedWeight, gate_up_silu, quant_rows, rmsnorm, rmsnorm_quant, silu_mul_quant, w4a8_gemm
from qoq.kernels.gemm import fuses_swiglu
from qoq.layout import linear_tensors
from qoq.quant import ChannelWeight, QuantizedRows

# (rows (M, K) as the precision has them, residual (M, N) float16 or None) -> (M, N) float16: rows times W^T, plus
# bias, plus residual
Linear = Callable[[Any, Tensor | None], Tensor]


@dataclass(frozen=True)
class PackedLinear:
    """Weights stay in four bits."""

    weight: PackedWeight
    bias: Tensor | None  # (N,) float16

    @staticmethod
    def of(tensors: Mapping[str, Tensor], name: str) -> "PackedLinear":
        """Of tensors by their suffix; `name` is for messages. Raises CheckpointError for an illegal group."""
        try:
            return PackedLinear(PackedWeight.from_tensors(tensors), tensors.get("bias"))
        except (QuantizationError, CheckpointError) as error:
            raise CheckpointError(f"{name}: {error}") from None

    def __call__(self, rows: QuantizedRows, residual: Tensor | None = None) -> Tensor:
        return w4a8_gemm(rows, self.weight, self.bias, residual)


@dataclass(frozen=True)
class SwigluLinear:
    """Gate and up, and silu(gate) * up, in one kernel: gives (M, F) where gate and up have 2F rows together."""

    weight: PackedWeight  # interleaved
    bias: Tensor | None  # (2F,) float16, likewise

    @staticmethod
    def of(gate_up: PackedLinear) -> "SwigluLinear":
        bias = None if gate_up.bias is None else packing.interleave_rows(gate_up.bias)
        return SwigluLinear(gate_up.weight.interleaved(), bias)

    def __call__(self, rows: QuantizedRows, residual: Tensor | None = None) -> Tensor:
        assert residual is None, "silu(gate) * up is no part of the residual stream"
        return gate_up_silu(rows, self.weight, self.bias)


@dataclass(frozen=True)
class UnpackedLinear:
    """Weights are unpacked once, to int8: a CPU would spend its time on unpacking."""

    integers: Tensor  # (N, K) int8
    s1: Tensor  # (N,) float16
    szero: Tensor | None  # (N,) float16; per-channel weights alone
    bias: Tensor | None  # (N,) float16

    @staticmethod
    def of(tensors: Mapping[str, Tensor], name: str) -> "UnpackedLinear":
        """As `PackedLinear.of`."""
        linear = unpack_linear(name, {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
        weight = linear.weight
        assert not isinstance(weight, Tensor), f"{name}: in 16 bits, which `load_linear` gives to FloatLinear"
        szero = weight.szero if isinstance(weight, ChannelWeight) else None
        return UnpackedLinear(weight.integers(), weight.s1, szero, linear.bias)

    def __call__(self, rows: QuantizedRows, residual: Tensor | None = None) -> Tensor:
        if self.szero is None:
            y = quant.gemm_grouped(rows, self.integers, self.s1, self.bias)
        else:
            y = quant.gemm_channel(rows, self.integers, self.s1, self.szero, self.bias)
        return y if residual is None else residual + y


@dataclass(frozen=True)
class FloatLinear:
    """Weights are dequantized once and multiplied by torch."""

    weight: Tensor  # (N, K); float16, and on a CPU, where half precision has no fast product, float32
    bias: Tensor | None  # (N,) likewise

    @staticmethod
    def of(tensors: Mapping[str, Tensor], name: str) -> "FloatLinear":
        """As `PackedLinear.of`."""
        linear = unpack_linear(name, {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
        weight = linear.matrix().to(torch.float16)
        dtype = torch.float32 if weight.device.type == "cpu" else torch.float16
        return FloatLinear(weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype))

    def __call__(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(rows.to(self.weight.dtype), self.weight, self.bias).to(torch.float16)
        return y if residual is None else y.add_(residual)


@dataclass(frozen=True)
class Precision:
    """How a layer computes: each pass makes of float16 activations what `linear`'s products take."""

    norm: Callable[[Tensor, Tensor, float], Any]  # rows (M, K), weight (K,), eps
    rows: Callable[..., Any]  # rows (M, K) as they are; of several tensors one behind the other
    silu_mul: Callable[[Tensor], Any]  # gate and up (M, 2K); behind `fuse_swiglu` perhaps silu(gate) * up (M, K)
    linear: Callable[[Mapping[str, Tensor], str], Linear]  # of a checkpoint's tensors by their suffix, and a name


def w4a8_linear(tensors: Mapping[str, Tensor], name: str) -> PackedLinear | UnpackedLinear:
    """As the tensors' device multiplies them; see `PackedLinear.of`."""
    kind = UnpackedLinear if tensors["qweight"].device.type == "cpu" else PackedLinear
    return kind.of(tensors, name)


def _join(*parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate).mul_(up)


PRECISIONS: Mapping[str, Precision] = {
    "w4a8": Precision(rmsnorm_quant, quant_rows, silu_mul_quant, w4a8_linear),
    "fp16": Precision(rmsnorm, _join, _silu_mul, FloatLinear.of),
}


@dataclass(frozen=True)
class Stage:
    """Linears that read one input, run as one, and the passes that give them that input."""

    linear: Linear
    to: Precision


def fuse_swiglu(gate_up: Stage, down: Stage) -> tuple[Stage, Stage]:
    """The same stages, with SwiGLU in the kernel of gate_up where there is one for that: `down.to.silu_mul` then takes
    silu(gate) * up as it is. A down in W4A8 gets the same bits both ways.
    """
    linear = gate_up.linear
    if isinstance(linear, PackedLinear) and fuses_swiglu(linear.weight.qweight.device):
        gate_up = replace(gate_up, linear=SwigluLinear.of(linear))
        down = replace(down, to=replace(down.to, silu_mul=down.to.rows))
    return gate_up, down


def load_linear(
    checkpoint: Checkpoint, index: int, names: Sequence[str], device: torch.device, precision: Precision
) -> Stage:
    """The linears `names` of layer `index`, which have the same input, as one; in FP16 if the checkpoint has them so.

    Raises:
        CheckpointError: a group that cannot be multiplied exactly; names the linears.
    """
    if is_half(checkpoint, index, names):
        precision = PRECISIONS["fp16"]
    tensors = {suffix: x.to(device) for suffix, x in joined_tensors(checkpoint, index, names).items()}
    return Stage(precision.linear(tensors, f"model.layers.{index}.{'+'.join(names)}"), precision)


def is_half(checkpoint: Checkpoint, index: int, names: Sequence[str]) -> bool:
    """Whether these linears of layer `index` were left in 16 bits: all of one input, or none."""
    return f"model.layers.{index}.{names[0]}" in checkpoint.half_precision


def joined_tensors(checkpoint: Checkpoint, index: int, names: Sequence[str]) -> dict[str, Tensor]:
    """Suffix -> tensors of several linears, one behind the other along N."""
    tensors = {}
    half = is_half(checkpoint, index, names)
    for suffix in linear_tensors(0, 0, checkpoint.group_size, names[0] in checkpoint.spec.biases, half):
        parts = [checkpoint.tensor(f"model.layers.{index}.{name}.{suffix}") for name in names]
        tensors[suffix] = torch.cat(parts, dim=1 if suffix.startswith("s2_") else 0)
    return tensors
