"""A quantized linear as the runtime calls it: through the kernel on a GPU, through the specification on a CPU.

Linears that read the same input (q, k, v; gate, up) are one: packed tensors are concatenated, which packs the
concatenation (`qoq.packing`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq import quant
from qoq.checkpoint import Checkpoint, linear_tensors, unpack_linear
from qoq.errors import CheckpointError, QuantizationError
from qoq.kernels import PackedWeight, w4a8_gemm
from qoq.quant import ChannelWeight, QuantizedRows

# (rows (M, K), residual (M, N) float16 or None) -> (M, N) float16: rows times W^T, plus bias, plus residual
Linear = Callable[[QuantizedRows, Tensor | None], Tensor]


@dataclass(frozen=True)
class PackedLinear:
    """Weights stay in four bits."""

    weight: PackedWeight
    bias: Tensor | None  # (N,) float16

    def __call__(self, rows: QuantizedRows, residual: Tensor | None = None) -> Tensor:
        return w4a8_gemm(rows, self.weight, self.bias, residual)


@dataclass(frozen=True)
class UnpackedLinear:
    """Weights are unpacked once, to int8: a CPU would spend its time on unpacking."""

    integers: Tensor  # (N, K) int8
    s1: Tensor  # (N,) float16
    szero: Tensor | None  # (N,) float16; per-channel weights alone
    bias: Tensor | None  # (N,) float16

    def __call__(self, rows: QuantizedRows, residual: Tensor | None = None) -> Tensor:
        if self.szero is None:
            y = quant.gemm_grouped(rows, self.integers, self.s1, self.bias)
        else:
            y = quant.gemm_channel(rows, self.integers, self.s1, self.szero, self.bias)
        return y if residual is None else residual + y


def load_linear(checkpoint: Checkpoint, index: int, names: Sequence[str], device: torch.device) -> Linear:
    """The linears `names` of layer `index`, which have the same input, as one.

    Raises:
        CheckpointError: a group that cannot be multiplied exactly; names the linears.
    """
    prefix, joined = f"model.layers.{index}.", "+".join(names)
    tensors = {}
    for suffix in linear_tensors(0, 0, checkpoint.group_size, names[0] in checkpoint.spec.biases):
        parts = [checkpoint.tensor(f"{prefix}{name}.{suffix}") for name in names]
        tensors[suffix] = torch.cat(parts, dim=1 if suffix.startswith("s2_") else 0)
    if device.type == "cpu":
        full = prefix + joined
        linear = unpack_linear(full, {f"{full}.{suffix}": tensor for suffix, tensor in tensors.items()})
        weight = linear.weight
        szero = weight.szero if isinstance(weight, ChannelWeight) else None
        return UnpackedLinear(weight.integers(), weight.s1, szero, linear.bias)
    moved = {suffix: tensor.to(device) for suffix, tensor in tensors.items()}
    try:
        return PackedLinear(PackedWeight.from_tensors(moved), moved.get("bias"))
    except (QuantizationError, CheckpointError) as error:
        raise CheckpointError(f"{prefix}{joined}: {error}") from None
