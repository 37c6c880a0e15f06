"""deepcompressor's and lmquant's dumps: `model.pt`, rounded fp16 weights under HF names, beside `scale.pt`.

    X.weight.scale.0      s1, one for a row
    X.weight.scale.1      s2, one for a group; absent per channel
    X.weight.zero         zeros in codes: w8 = (code - zero) * s2
    X.weight.scaled_zero  or after scaling: w8 = code * s2 - zero, per channel W = code * s1 - zero

Codes and zeros may be signed (-8..7). Shapes have ones in between: [N, 1, G, 1]. The dump has no config; the base
model's folder gives it.
"""

from pathlib import Path

import torch
from torch import Tensor

from qoq.errors import CheckpointError, QuantizationError
from qoq.formats.affine import Loss, loss_between
from qoq.formats.origin import ForeignFolder, Shapes, require_dtype
from qoq.formats.tensors import Tensors, load_pickle
from qoq.models.architecture import LINEARS
from qoq.quant import ChannelWeight, GroupedWeight, QuantizedWeight, check_legal, fp16

MODEL, SCALES = "model.pt", "scale.pt"
# How far a code may be from a whole number: fp16 weights are off by 2**-11 of at most 127 steps.
TOLERANCE = 0.1


def is_dump(folder: Path) -> bool:
    return (folder / MODEL).is_file() and (folder / SCALES).is_file()


class Dump(ForeignFolder):
    """A folder with model.pt and scale.pt.

    Raises:
        CheckpointError: as `ForeignFolder`, or the weights do not lie on the grid of their scales.
    """

    format = "deepcompressor"

    def __init__(self, folder: Path, base: Path):
        self.scales = {name: value for name, value in load_pickle(folder / SCALES).items()}
        super().__init__(folder, described_by=base)

    def open(self) -> Tensors:
        return Tensors(self.folder, [self.folder / MODEL])

    def find_group_size(self) -> int:
        name = next(iter(LINEARS))
        level2 = self._scale(f"model.layers.0.{name}", 1)
        k = self.spec.linear_shape(name)[1]
        return -1 if level2 is None else k // max(1, level2.numel() // self.spec.linear_shape(name)[0])

    def weight_shapes(self, n: int, k: int) -> Shapes:
        return {"weight": (n, k)}

    def _check_headers(self) -> None:
        super()._check_headers()
        for index in range(self.spec.num_layers):
            for name in LINEARS:
                full = f"model.layers.{index}.{name}"
                if self._scale(full, 0) is None:
                    raise CheckpointError(f"{self.folder}/{SCALES}: {full}.weight.scale.0 is missing")
                if (self._scale(full, 1) is None) != (self.group_size == -1):
                    raise CheckpointError(
                        f"{self.folder}/{SCALES}: {full} and the first linear differ in levels of scales"
                    )

    def _scale(self, name: str, level: int) -> Tensor | None:
        """The scale of a level; newer dumps may number it `scale.1.0`."""
        prefix = f"{name}.weight.scale.{level}"
        return next((self.scales[key] for key in (prefix, f"{prefix}.0") if key in self.scales), None)

    def weight(self, name: str) -> tuple[QuantizedWeight, Loss]:
        (stored,) = self.read_all(name, "weight")
        w = require_dtype(f"{name}.weight", stored, torch.float16, torch.bfloat16, torch.float32).float()
        n, k = w.shape
        groups = 1 if self.group_size == -1 else k // self.group_size
        level1 = self._scale(name, 0)
        assert level1 is not None, name  # the header check saw it
        s1 = _spread(f"{name}.weight.scale.0", level1, n, 1)
        zero, scaled = self._zero(name, n, groups)
        if groups == 1 and self.group_size == -1:
            offset = zero if scaled else zero * s1
            codes, shift = _whole_codes(name, (w + offset) / s1)
            made: QuantizedWeight = ChannelWeight(codes, fp16(s1[:, 0]), fp16((offset + shift * s1)[:, 0]))
        else:
            level2 = self._scale(name, 1)
            assert level2 is not None, name
            s2 = _spread(f"{name}.weight.scale.1", level2, n, groups).round()
            z = (zero if scaled else zero * s2).round()
            w8 = _whole(name, w / s1).unflatten(1, (groups, -1))
            codes, shift = _whole_codes(name, ((w8 + z[..., None]) / s2[..., None]).flatten(1))
            made = GroupedWeight(codes, fp16(s1[:, 0]), s2.to(torch.int32), (z + shift * s2).to(torch.int32))
        try:
            check_legal(made, f"{name}.weight")
        except QuantizationError as error:
            raise CheckpointError(f"{self.folder}: {error}") from None
        return made, loss_between(made.dequantize(), w, 0, n * groups)

    def _zero(self, name: str, n: int, groups: int) -> tuple[Tensor, bool]:
        """Zeros (N, G) float32, and whether they are scaled."""
        for suffix, scaled in (("scaled_zero", True), ("zero", False)):
            key = f"{name}.weight.{suffix}"
            if key in self.scales:
                return _spread(key, self.scales[key], n, groups), scaled
        return torch.zeros(n, groups), False


def _spread(name: str, values: Tensor, n: int, groups: int) -> Tensor:
    """One value, or one for a row and group -> (N, G) float32."""
    if values.numel() not in (1, n * groups) or not torch.isfinite(values.float()).all():
        raise CheckpointError(f"{SCALES}: {name} has shape {list(values.shape)}, expected {n} x {groups} finite values")
    return values.float().flatten().expand(n * groups).reshape(n, groups)


def _whole_codes(name: str, exact: Tensor) -> tuple[Tensor, int]:
    """Codes in 0..15 as uint8, and what was added to signed ones: 8, or 0."""
    codes = _whole(name, exact)
    shift = 8 if codes.amin() < 0 else 0
    low, high = int(codes.amin()) + shift, int(codes.amax()) + shift
    if low < 0 or high > 15:
        raise CheckpointError(f"{MODEL}: {name}.weight has codes {low}..{high}, expected 0..15")
    return (codes + shift).to(torch.uint8), shift


def _whole(name: str, exact: Tensor) -> Tensor:
    """Integers (N, K) that fp16 made a little off."""
    whole = exact.round()
    off = (exact - whole).abs()
    if not off.amax() <= TOLERANCE:
        row, column = divmod(int(off.argmax()), exact.shape[1])
        raise CheckpointError(
            f"{MODEL}: {name}.weight[{row}, {column}] is {float(exact[row, column]):.3f} steps of its scale, expected "
            f"a whole number; {SCALES} belongs to another run, or the weights were changed after rounding"
        )
    return whole
