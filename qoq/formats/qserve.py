"""QServe's folders, as its converters and deepcompressor's wrote them: our tensors in pickles or safetensors.

They have no quantization_config and may have any float dtype beside the linears. deepcompressor's own converter
orders the columns of s2_scales and s2_zeros, since February 2025, as no kernel reads them:

    kernels            0 8 16 24 1 9 17 25 ... 7 15 23 31      of each 32 channels
    deepcompressor     0 8 1 9 2 10 ... 7 15 16 24 17 25 ... 23 31
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qoq import packing
from qoq.errors import CheckpointError, QuantizationError
from qoq.formats.affine import Loss
from qoq.formats.origin import ForeignFolder, Shapes, require_dtype
from qoq.layout import linear_tensors
from qoq.models.architecture import LINEARS
from qoq.quant import ChannelWeight, GroupedWeight, QuantizedWeight, check_legal

ORDERS = ("kernel", "deepcompressor")
CLEAR = 1.5  # how much more one order must scatter than the other to be the wrong one


def unpack_deepcompressor_level2(packed: Tensor) -> Tensor:
    """(G, N) int8 in deepcompressor's column order -> (N, G) int32, values in [-128, 127]."""
    groups, n = packed.shape
    natural = packed.view(groups, n // packing.TILE, 2, 8, 2).transpose(3, 4).reshape(groups, n)
    return natural.T.to(torch.int32, memory_format=torch.contiguous_format)


class QServeFolder(ForeignFolder):
    """A published QServe folder, grouped or per channel.

    `order` is one of `ORDERS`, or None to tell it from the weights.
    """

    format = "qserve"

    def __init__(self, folder: Path, order: str | None = None):
        super().__init__(folder)
        self.order = order or ("kernel" if self.group_size == -1 else self._find_order())

    def find_group_size(self) -> int:
        names = self.tensors.shapes
        if any(name.endswith(".dequant_scale") for name in names):
            raise CheckpointError(f"{self.folder}: a W8A8 folder (*.dequant_scale); only W4A8 is read")
        if any(name.endswith(".s1_szeros") for name in names):
            return -1
        first = f"model.layers.0.{next(iter(LINEARS))}.s2_scales"
        if first not in names:
            raise CheckpointError(f"{self.folder}: neither *.s1_szeros nor {first}; not a QServe folder")
        if len(names[first]) != 2:
            raise CheckpointError(f"{self.folder}: {first} has shape {list(names[first])}, expected [K/g, N]")
        return self.spec.linear_shape(next(iter(LINEARS)))[1] // max(1, names[first][0])

    def weight_shapes(self, n: int, k: int) -> Shapes:
        return {suffix: shape for suffix, (_, shape) in linear_tensors(n, k, self.group_size, False).items()}

    def weight(self, name: str) -> tuple[QuantizedWeight, Loss]:
        unpack = packing.unpack_level2 if self.order == "kernel" else unpack_deepcompressor_level2
        weight = self._unpack(name, unpack)
        try:
            check_legal(weight, f"{name}.qweight")
        except QuantizationError as error:
            raise CheckpointError(f"{self.folder}: {error}") from None
        return weight, Loss(0, 0, 0, weight.codes.shape[0])

    def _unpack(self, name: str, unpack_level2: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        qweight, s1 = self.read_all(name, "qweight", "s1_scales")
        codes = packing.unpack_qweight(require_dtype(f"{name}.qweight", qweight, torch.int8, torch.uint8))
        s1 = require_dtype(f"{name}.s1_scales", s1, torch.float16)
        if self.group_size == -1:
            (szero,) = self.read_all(name, "s1_szeros")
            return ChannelWeight(codes, s1, require_dtype(f"{name}.s1_szeros", szero, torch.float16))
        scales, zeros = (require_dtype(name, x, torch.int8) for x in self.read_all(name, "s2_scales", "s2_zeros"))
        s2 = unpack_level2(scales)
        # `unpack_zeros` takes the kernels' order
        z = packing.unpack_zeros(packing.pack_level2(unpack_level2(zeros)), codes, s2, f"{name}.s2_zeros")
        return GroupedWeight(codes, s1, s2, z)

    def _find_order(self) -> str:
        """The order under which zeros match the codes of their own rows.

        In its own row, z / s2 is where the codes of a group are centred, for weights average near zero; in another
        row it is not. This needs no base model, and rotation, smoothing and reordering leave it as it is.

        Raises:
            CheckpointError: the two orders fit alike.
        """
        layers = sorted({0, self.spec.num_layers // 2, self.spec.num_layers - 1})
        names = [f"model.layers.{index}.{name}" for index in layers for name in LINEARS]
        kernel = sum(self._scatter(name, packing.unpack_level2) for name in names)
        other = sum(self._scatter(name, unpack_deepcompressor_level2) for name in names)
        if max(kernel, other) < CLEAR * min(kernel, other) or kernel == other:
            raise CheckpointError(
                f"{self.folder}: the weights do not tell in which order s2_scales stand; "
                f"give --level2-order {' or '.join(ORDERS)}"
            )
        return "kernel" if kernel < other else "deepcompressor"

    def _scatter(self, name: str, unpack_level2: Callable[[Tensor], Tensor]) -> float:
        """Mean square of (mean code - z / s2) over the groups of a linear, z of any multiple of 256 that is nearest."""
        qweight, scales, zeros = self.read_all(name, "qweight", "s2_scales", "s2_zeros")
        s2 = unpack_level2(scales).clamp(min=1)
        centre = packing.unpack_qweight(qweight).float().unflatten(1, (s2.shape[1], -1)).mean(2) * s2
        apart = torch.remainder(centre + unpack_level2(zeros) + 128, 256) - 128
        return float((apart / s2).square().mean())
