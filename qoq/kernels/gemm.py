"""The W4A8 GEMM: packed weights as kernels read them, and `w4a8_gemm` over csrc/gemm_mma.cu and csrc/gemm_wgmma.cu."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qoq import packing, quant
from qoq.kernels import tiling
from qoq.kernels.build import Specialisation, module
from qoq.kernels.cards import card_of
from qoq.kernels.library import expect, register
from qoq.kernels.tiling import KERNELS, Config
from qoq.quant import ChannelWeight, GroupedWeight, QuantizedLinear, QuantizedRows, QuantizedWeight

# Sums of K products of a byte and an int8 must fit int32, and so must those of per-channel codes times 16.
MAX_K = (2**31 - 1) // (255 * 127)
NEGATIVE = 128  # in a byte of PackedWeight.s2: 128 - z is negative

MMA_CODE = (r"IMMA\.16832\.U8\.S8", r"LDS\.128", r"LDSM\.16\.M88\.4", r"LDGSTS\.E\.BYPASS\.128")
WGMMA_CODE = (
    r"IGMMA\.64x\d+x32\.U8\.S8",
    r"LDS\.128",
    r"UBLKCP",
    r"UTMALDG\.2D",
    r"STSM\.16\.MT88",
    r"ACQBULK",  # griddepcontrol.wait
)
PREFETCH_CODE = r"UBLKPF\.L2"  # of weights, where a block has a tile for itself
SWIGLU_CODE = r"MUFU\.EX2", r"MUFU\.RCP"


def _wgmma_specialisation(tile: tuple[int, int], group_size: int, splits: int, swiglu: bool = False) -> Specialisation:
    kernel, config = KERNELS["wgmma"], Config("wgmma", *tile, 5, splits)
    expected = WGMMA_CODE + (PREFETCH_CODE,) * (splits == 1) + SWIGLU_CODE * swiglu
    return Specialisation(kernel.source, kernel.defines(config, group_size, swiglu), ("sm_90a",), expected)


SPECIALISATIONS = (
    *(
        Specialisation("gemm_mma.cu", KERNELS["mma"].defines(Config("mma", *tile, 3), group_size), expected=MMA_CODE)
        for tile in KERNELS["mma"].shapes
        for group_size in ((128, 64, -1) if tile in ((32, 16), (64, 64), (128, 128), (256, 128)) else (128,))
    ),
    *(
        _wgmma_specialisation(tile, group_size, splits)
        for tile in KERNELS["wgmma"].shapes
        for group_size in (128, 64, -1)
        for splits in ((1, 2, 5, 8) if tile in ((128, 8), (128, 64), (256, 128), (128, 256)) else (1,))
    ),
    *(
        _wgmma_specialisation(tile, group_size, splits, swiglu=True)
        for tile in KERNELS["wgmma"].shapes
        for group_size, splits in (
            ((128, 1), (128, 2), (64, 5), (-1, 8)) if tile in ((128, 8), (256, 128), (128, 256)) else ((128, 1),)
        )
    ),
)


# Weights


@dataclass(frozen=True)
class PackedWeight:
    """W4 in the byte order of a checkpoint (`qoq.packing`), N % 32 == 0.

    One byte differs from a checkpoint's. A kernel computes w8 + 128 = codes * s2 + (128 - z) for four weights at
    once, which works only with the true 128 - z, of nine bits: z may lie outside 0..255 where the weights of a group
    have one sign. The byte of `zeros` holds eight of them, and bit 7 of the byte of `s2` (1..17) is set where
    128 - z < 0.
    """

    qweight: Tensor  # (N, K/2) int8
    s1: Tensor  # (N,) float16
    s2: Tensor | None = None  # (G, N) int8, columns in packed order; grouped weights alone, as zeros
    zeros: Tensor | None = None  # (G, N) int8, -z mod 256
    szero: Tensor | None = None  # (N,) float16; per-channel weights alone

    def __post_init__(self) -> None:
        """Check shapes, types, devices.

        Raises:
            ValueError: what was expected.
        """
        expect("qweight", self.qweight, torch.int8, (None, None))
        n, k = self.qweight.shape[0], self.qweight.shape[1] * 2
        if n == 0 or n % packing.TILE != 0 or k == 0 or k % packing.TILE != 0 or k > MAX_K:
            raise ValueError(f"qweight: N = {n}, K = {k}, expected multiples of {packing.TILE} with K <= {MAX_K}")
        expect("s1", self.s1, torch.float16, (n,), like=self.qweight)
        if self.szero is not None:
            if self.s2 is not None or self.zeros is not None:
                raise ValueError("szero and s2: expected s2 and zeros of groups, or szero of channels")
            expect("szero", self.szero, torch.float16, (n,), like=self.qweight)
        elif self.s2 is not None and self.zeros is not None:
            expect("s2", self.s2, torch.int8, (None, n), like=self.qweight)
            expect("zeros", self.zeros, torch.int8, self.s2.shape, like=self.qweight)
            if self.group_size not in (128, 64) or k % self.group_size != 0:
                raise ValueError(f"s2: {self.s2.shape[0]} groups of K = {k}, expected groups of 128 or 64")
        else:
            raise ValueError("expected s2 and zeros of groups, or szero of channels")

    @property
    def N(self) -> int:
        return self.qweight.shape[0]

    @property
    def K(self) -> int:
        return self.qweight.shape[1] * 2

    @property
    def group_size(self) -> int:
        """128 or 64, -1 per channel."""
        return -1 if self.s2 is None else self.K // max(1, self.s2.shape[0])

    @staticmethod
    def pack(weight: QuantizedWeight) -> "PackedWeight":
        """The kernels' form of a legal weight (`quant.check_legal`)."""
        qweight = packing.pack_qweight(weight.codes)
        if isinstance(weight, ChannelWeight):
            return PackedWeight(qweight, weight.s1, szero=weight.szero)
        s2 = weight.s2 | torch.where(weight.z > 128, NEGATIVE, 0)
        return PackedWeight(qweight, weight.s1, packing.pack_level2(s2), packing.pack_zeros(weight.z))

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "PackedWeight":
        """From a linear's tensors in a checkpoint: qweight, s1_scales, and s2_scales, s2_zeros or s1_szeros.

        Checks them on their device, which for grouped weights takes a moment of K * N bytes of memory.

        Raises:
            CheckpointError, QuantizationError: a group that no kernel can multiply exactly.
        """
        qweight, s1 = tensors["qweight"], tensors["s1_scales"]
        codes = packing.unpack_qweight(qweight)
        if "s1_szeros" in tensors:
            quant.check_legal(ChannelWeight(codes, s1, tensors["s1_szeros"]), "qweight")
            return PackedWeight(qweight, s1, szero=tensors["s1_szeros"])
        s2 = packing.unpack_level2(tensors["s2_scales"])
        z = packing.unpack_zeros(tensors["s2_zeros"], codes, s2)
        quant.check_legal(GroupedWeight(codes, s1, s2, z), "qweight")
        marked = packing.pack_level2(s2 | torch.where(z > 128, NEGATIVE, 0))
        return PackedWeight(qweight, s1, marked, tensors["s2_zeros"])

    def unpack(self) -> QuantizedWeight:
        """The inverse of `pack`."""
        codes = packing.unpack_qweight(self.qweight)
        if self.s2 is None or self.zeros is None:
            assert self.szero is not None
            return ChannelWeight(codes, self.s1, self.szero)
        s2 = packing.unpack_level2(self.s2)
        z = 128 - (packing.unpack_level2(self.zeros) + 128 & 255) + torch.where(s2 < 0, 256, 0)
        return GroupedWeight(codes, self.s1, s2 & 31, z.to(torch.int32))

    def interleaved(self) -> "PackedWeight":
        """As `gate_up_silu` takes it: of the rows of a gate and then of an up, N % 64 == 0."""
        if self.N % (2 * packing.TILE) != 0:
            raise ValueError(f"N = {self.N}, expected a multiple of {2 * packing.TILE}: a gate's rows and an up's")
        rows, level2 = packing.interleave_rows, packing.interleave_level2
        return PackedWeight(
            packing.interleave_qweight(self.qweight),
            rows(self.s1),
            None if self.s2 is None else level2(self.s2),
            None if self.zeros is None else level2(self.zeros),
            None if self.szero is None else rows(self.szero),
        )

    def to(self, device: str | torch.device) -> "PackedWeight":
        """The same weight on a device."""
        moved: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in vars(self).items()}
        return PackedWeight(**moved)


# The op


def w4a8_gemm(
    rows: QuantizedRows,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """rows (M, K) times W^T, plus bias (N,) float16, then plus residual (M, N) float16 -> (M, N) float16.

    The bits are those of `quant.gemm_grouped` or `quant.gemm_channel`, and of a separate addition of the residual, for
    every M, card and `config`; a row with sx = NaN is NaN and touches no other. `config` forces a kernel and its
    tiles, which `tiling.choose` picks otherwise.

    Products with few tiles are shared by several blocks, through one workspace for each device: calls on two streams
    of a device must not run at the same time. Before a CUDA graph is captured, `workspace` must have been called.

    Raises:
        ValueError: an argument of a wrong shape, type or device, or an illegal `config`.
    """
    return _multiply(rows, weight, bias, residual, config, swiglu=False)


def gate_up_silu(
    rows: QuantizedRows, weight: PackedWeight, bias: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """silu(gate) * up (M, F) float16 of rows (M, K) times a weight of 2F rows, `interleaved`, as is its bias (2F,).

    The bits are those of `w4a8_gemm` and then `quant.silu_mul`, for which a GPU has `silu_mul_quant`. Only some cards
    have a kernel for it: those where `fuses_swiglu`. For all else see `w4a8_gemm`.

    Raises:
        ValueError: as `w4a8_gemm`; no such kernel.
    """
    if weight.N % (2 * packing.TILE) != 0:
        raise ValueError(f"qweight: N = {weight.N}, expected a multiple of {2 * packing.TILE}: rows of gate and up")
    return _multiply(rows, weight, bias, None, config, swiglu=True)


def fuses_swiglu(device: torch.device) -> bool:
    """Whether a device has a kernel for `gate_up_silu`."""
    return device.type == "cuda" and KERNELS[card_of(device).limits.kernels[-1]].swiglu


def _multiply(
    rows: QuantizedRows,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    config: Config | None,
    swiglu: bool,
) -> Tensor:
    x8 = rows.x8
    expect("x8", x8, torch.int8, (None, weight.K), like=weight.qweight)
    m, n = x8.shape[0], weight.N
    expect("sx", rows.sx, torch.float32, (m,), like=x8)
    expect("sums", rows.sums, torch.int32, (m,), like=x8)
    if bias is not None:
        expect("bias", bias, torch.float16, (n,), like=x8)
    if residual is not None:
        expect("residual", residual, torch.float16, (m, n), like=x8)
    out = torch.empty(m, n // 2 if swiglu else n, dtype=torch.float16, device=x8.device)
    if m == 0:
        return out

    tile: list[int] = []
    partials = None
    if x8.is_cuda:
        card = card_of(x8.device)
        shape = m, n, weight.K, weight.group_size
        if config is None:
            config = tiling.choose(card, *shape)
        elif problem := tiling.problem(config, card, *shape):
            raise ValueError(f"config: {problem}")
        if swiglu and not KERNELS[config.kernel].swiglu:
            raise ValueError(f"config: kernel {config.kernel!r} on {card.architecture} makes no SwiGLU")
        tile = [config.rows, config.tokens, config.stages, config.splits, config.tail]
        partials = workspace(x8.device)
    _w4a8_gemm(
        x8,
        rows.sx,
        rows.sums,
        weight.qweight,
        weight.s1,
        weight.s2,
        weight.zeros,
        weight.szero,
        bias,
        residual,
        swiglu,
        config.kernel if config else "",
        tile,
        weight.group_size,
        partials,
        out,
    )
    return out


@cache
def workspace(device: torch.device) -> Tensor:
    """Counters and partial sums for split tiles on a CUDA device; all zero whenever no GEMM runs there.

    Raises:
        RuntimeError: a CUDA graph is being captured, whose memory pool must not own what later calls use.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"w4a8_gemm: call workspace({str(device)!r}) before a CUDA graph is captured")
    return torch.zeros(tiling.COUNTERS + tiling.PARTIALS, dtype=torch.int32, device=device)


def _gemm_cuda(
    x8: Tensor,
    sx: Tensor,
    sums: Tensor,
    qweight: Tensor,
    s1: Tensor,
    s2: Tensor | None,
    zeros: Tensor | None,
    szero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
    kernel: str,
    tile: list[int],
    group_size: int,
    workspace: Tensor | None,
    out: Tensor,
) -> None:
    (m, k), n, config = x8.shape, qweight.shape[0], Config(kernel, *tile)
    face = KERNELS[kernel]
    tensors = sx, sums, qweight, s1, s2, zeros, szero, bias, residual, out, workspace
    card = card_of(x8.device)
    for part in tiling.parts(config, card, group_size, m, n):
        kernels = module(face.source, x8.device, face.defines(part.config, group_size, swiglu))
        x = kernels.tensor_map(x8, (config.tokens, tiling.STEP)) if face.tensor_map else x8
        kernels.launch(
            "w4a8_gemm",
            face.grid(part, card, group_size),
            face.threads(part.config),
            (x, *tensors, m, n, k, *face.arguments(part)),
            face.shared_bytes(part.config, group_size),
        )


def _gemm_cpu(
    x8: Tensor,
    sx: Tensor,
    sums: Tensor,
    qweight: Tensor,
    s1: Tensor,
    s2: Tensor | None,
    zeros: Tensor | None,
    szero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
    kernel: str,
    tile: list[int],
    group_size: int,
    workspace: Tensor | None,
    out: Tensor,
) -> None:
    weight = PackedWeight(qweight, s1, s2, zeros, szero).unpack()
    y = QuantizedLinear(weight, bias).multiply(QuantizedRows(x8, sx, sums))
    if swiglu:
        y = quant.silu_mul(*(side.flatten(1) for side in y.unflatten(1, (-1, 2, packing.INTERLEAVED)).unbind(2)))
    out.copy_(y if residual is None else residual + y)


_w4a8_gemm = register(
    "w4a8_gemm(Tensor x8, Tensor sx, Tensor sums, Tensor qweight, Tensor s1, Tensor? s2, Tensor? zeros, Tensor? szero,"
    " Tensor? bias, Tensor? residual, bool swiglu, str kernel, int[] tile, int group_size, Tensor(a!)? workspace,"
    " Tensor(b!) out) -> ()",
    cuda=_gemm_cuda,
    cpu=_gemm_cpu,
)
