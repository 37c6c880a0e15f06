"""Folders of GPTQ and AWQ: the matrix transposed, K first, eight 4-bit codes to an int32.

GPTQ    qweight (K/8, N), packed along K; qzeros (K/g, N/8); scales (K/g, N); g_idx (K,). AutoGPTQ and most
        others store zeros less one (`checkpoint_format: gptq`), gptq_v2 stores them as they are.
AWQ     qweight (K, N/8), packed along N in AWQ's order; qzeros (K/g, N/8) likewise; scales (K/g, N).
"""

from typing import Any

import torch

from qoq.errors import CheckpointError
from qoq.formats import nibbles
from qoq.formats.affine import AffineWeight, Loss, to_qoq
from qoq.formats.compressed_tensors import fp16_scales
from qoq.formats.origin import ForeignFolder, Shapes, require_dtype
from qoq.quant import QuantizedWeight


class GPTQFolder(ForeignFolder):
    """A GPTQ folder of 4 bits whose groups are in order: without activation order, or with static groups.

    Raises:
        CheckpointError: other bits or layouts; scattered groups are found when a weight is read.
    """

    format = "gptq"

    @property
    def declared(self) -> dict[str, Any]:
        return self.config.get("quantization_config") or {}

    def find_group_size(self) -> int:
        if self.declared.get("bits") != 4:
            raise CheckpointError(f"{self.folder}: bits is {self.declared.get('bits')!r}, expected 4")
        kind = self.declared.get("checkpoint_format", "gptq")
        if kind not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"{self.folder}: checkpoint_format is {kind!r}, expected 'gptq' or 'gptq_v2'")
        self.added = 1 if kind == "gptq" else 0  # to stored zeros
        return int(self.declared.get("group_size", 128))

    def weight_shapes(self, n: int, k: int) -> Shapes:
        groups = self._groups(k)
        return {"qweight": (k // 8, n), "qzeros": (groups, n // 8), "scales": (groups, n)}

    def _groups(self, k: int) -> int:
        return 1 if self.group_size == -1 else k // self.group_size

    def weight(self, name: str) -> tuple[QuantizedWeight, Loss]:
        qweight, qzeros, scales = self.read_all(name, "qweight", "qzeros", "scales")
        codes = nibbles.unpack_columns(require_dtype(f"{name}.qweight", qweight, torch.int32)).T
        zero = nibbles.unpack(require_dtype(f"{name}.qzeros", qzeros, torch.int32)).T + self.added
        if f"{name}.g_idx" in self.tensors:
            (group_of,) = self.read_all(name, "g_idx")
            k = codes.shape[1]
            if not torch.equal(group_of.long(), torch.arange(k) // (k // self._groups(k))):
                raise CheckpointError(f"{self.folder}: {name} has activation order (g_idx), whose groups are scattered")
        scale = fp16_scales(f"{name}.scales", scales).T.contiguous()
        return to_qoq(AffineWeight(codes.contiguous(), scale, zero.contiguous()), self.group_size)


class AWQFolder(ForeignFolder):
    """An AWQ folder of 4 bits in the "gemm" layout.

    Raises:
        CheckpointError: other bits or layouts.
    """

    format = "awq"

    def find_group_size(self) -> int:
        declared = self.config.get("quantization_config") or {}
        bits, version = declared.get("bits", declared.get("w_bit")), declared.get("version", "gemm")
        if bits != 4 or str(version).lower() != "gemm" or not declared.get("zero_point", True):
            raise CheckpointError(
                f"{self.folder}: bits {bits!r}, version {version!r}, zero_point {declared.get('zero_point', True)}; "
                "expected 4, 'gemm', true"
            )
        return int(declared.get("group_size", declared.get("q_group_size", 128)))

    def weight_shapes(self, n: int, k: int) -> Shapes:
        groups = 1 if self.group_size == -1 else k // self.group_size
        return {"qweight": (k, n // 8), "qzeros": (groups, n // 8), "scales": (groups, n)}

    def weight(self, name: str) -> tuple[QuantizedWeight, Loss]:
        qweight, qzeros, scales = self.read_all(name, "qweight", "qzeros", "scales")
        codes = nibbles.unpack_awq(require_dtype(f"{name}.qweight", qweight, torch.int32)).T.contiguous()
        zero = nibbles.unpack_awq(require_dtype(f"{name}.qzeros", qzeros, torch.int32)).T.contiguous()
        scale = fp16_scales(f"{name}.scales", scales).T.contiguous()
        return to_qoq(AffineWeight(codes, scale, zero), self.group_size)
