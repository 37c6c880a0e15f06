"""A quantized linear as the runtime calls it: through the kernel on a GPU, through the specification on a CPU.

Linears that read the same input (q, k, v; gate, up) are one: packed tensors are concatenated, which packs the
concatenation (`qoq.packing`).
"""

from collections.abc import Callable, Mapping, Sequence
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
        szero = weight.szero if isinstance(weight, ChannelWeight) else None
        return UnpackedLinear(weight.integers(), weight.s1, szero, linear.bias)

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
    tensors = {suffix: x.to(device) for suffix, x in joined_tensors(checkpoint, index, names).items()}
    kind = UnpackedLinear if device.type == "cpu" else PackedLinear
    return kind.of(tensors, f"model.layers.{index}.{'+'.join(names)}")


def joined_tensors(checkpoint: Checkpoint, index: int, names: Sequence[str]) -> dict[str, Tensor]:
    """Suffix -> tensors of several linears, one behind the other along N."""
    tensors = {}
    for suffix in linear_tensors(0, 0, checkpoint.group_size, names[0] in checkpoint.spec.biases):
        parts = [checkpoint.tensor(f"model.layers.{index}.{name}.{suffix}") for name in names]
        tensors[suffix] = torch.cat(parts, dim=1 if suffix.startswith("s2_") else 0)
    return tensors
