"""The specification of W4A8KV4 arithmetic, in plain torch.

Calibration calls it, the CPU runtime executes it, every GPU kernel is tested against it. `fp16()` rounds to
nearest even, as do all roundings to integers. Shapes: M tokens, N output features, K input features,
G = K / group_size groups. Sources: QServe (arXiv 2405.04532), sections 4.1 (progressive group quantization)
and 4.2 (KV4); integer products accumulate in int32, so every implementation of the GEMM gives the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qoq.errors import QuantizationError

# The level-1 range of grouped weights: the largest symmetric bound for which rounding to (s2, z, q) cannot
# leave int8 (QServe 4.1, "protective range"; proven by enumeration in tests/test_quant.py).
PROTECTIVE_RANGE = 119
# s2 * 15 must fit the unsigned byte in which four codes are multiplied at once: 17 * 15 = 255.
MAX_S2 = 17
SMALLEST_NORMAL_FP16 = 2.0**-14
# |x8 * w8| <= 127 * 128, so sums of 1024 products stay below 2**24: exact in float32 in any order.
EXACT_FP32_CHUNK = 1024


def fp16(x: Tensor) -> Tensor:
    """Round to IEEE half precision (nearest even) and keep it as float16."""
    return x.to(torch.float16)


def is_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor Inf; makes no copy of x."""
    return x.numel() == 0 or bool(torch.isfinite(torch.stack(x.aminmax())).all())


# Activations


@dataclass(frozen=True)
class QuantizedRows:
    """Activations in A8: x ~ x8 * sx, one scale for each token."""

    x8: Tensor  # (M, K) int8 in [-127, 127]
    sx: Tensor  # (M,) float32; NaN for a row that held NaN or Inf
    sums: Tensor  # (M,) int32, the sum of x8 over K

    def dequantize(self) -> Tensor:
        """(M, K) float32."""
        return self.x8.float() * self.sx[:, None]


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Quantize each row of x (M, K), any float dtype, to int8 with a dynamic symmetric scale.

    A zero row gives x8 = 0, sx = 0. A row with NaN or Inf gives x8 = 0, sx = NaN, so that it stays visible.
    """
    x = x.float()
    amax = x.abs().amax(dim=1)
    finite = torch.isfinite(amax)
    usable = finite & (amax > 0)
    # tensors on both sides: torch computes number / tensor, and on a GPU tensor / number, by an inexact reciprocal
    top = torch.full_like(amax, 127.0)
    inverse = torch.where(usable, top / torch.where(usable, amax, 1.0), 0.0)
    scaled = torch.where(usable[:, None], x * inverse[:, None], 0.0)
    x8 = scaled.round().clamp(-127, 127).to(torch.int8)
    sx = torch.where(finite, amax / top, torch.nan)
    return QuantizedRows(x8, sx, x8.sum(dim=1, dtype=torch.int32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension, in float32 or wider, to the dtype of x."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in float32 or wider, to the dtype of gate."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def rmsnorm_quant(x: Tensor, weight: Tensor, eps: float) -> QuantizedRows:
    """The norm of x (M, K) float16 as the next linear takes it."""
    return quantize_rows(rms_norm(x, weight, eps))


def silu_mul_quant(gate_up: Tensor) -> QuantizedRows:
    """gate_up (M, 2K) float16, the gate in its first half -> silu(gate) * up (M, K) as the next linear takes it."""
    return quantize_rows(silu_mul(*gate_up.chunk(2, dim=1)))


# Weights


@dataclass(frozen=True)
class GroupedWeight:
    """Two-level W4: w8 = codes * s2 - z, W ~ w8 * s1."""

    codes: Tensor  # (N, K) uint8 in 0..15
    s1: Tensor  # (N,) float16
    s2: Tensor  # (N, G) int32 in 1..17
    z: Tensor  # (N, G) int32

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.s2.shape[1]

    def integers(self) -> Tensor:
        """w8, (N, K) int8."""
        grouped = self.codes.to(torch.int32).unflatten(1, (-1, self.group_size))
        return (grouped * self.s2[..., None] - self.z[..., None]).flatten(1).to(torch.int8)

    def dequantize(self) -> Tensor:
        """(N, K) float32."""
        return self.integers().float() * self.s1.float()[:, None]


@dataclass(frozen=True)
class ChannelWeight:
    """Per-channel W4: W ~ codes * s1 - szero."""

    codes: Tensor  # (N, K) uint8 in 0..15
    s1: Tensor  # (N,) float16
    szero: Tensor  # (N,) float16

    def integers(self) -> Tensor:
        """The codes as the GEMM takes them, (N, K) int8."""
        return self.codes.to(torch.int8)

    def dequantize(self) -> Tensor:
        """(N, K) float32."""
        return self.codes.float() * self.s1.float()[:, None] - self.szero.float()[:, None]


QuantizedWeight = GroupedWeight | ChannelWeight


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer in W4A8: its weight and its bias, if any."""

    weight: QuantizedWeight
    bias: Tensor | None  # (N,) float16

    def to(self, device: str | torch.device) -> "QuantizedLinear":
        """The same linear on a device."""
        moved = (tensor.to(device) for tensor in vars(self.weight).values())
        return QuantizedLinear(type(self.weight)(*moved), None if self.bias is None else self.bias.to(device))

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) float -> (..., N) float16, by the integer GEMM."""
        return self.multiply(quantize_rows(x.flatten(0, -2))).unflatten(0, x.shape[:-1])

    def matrix(self) -> Tensor:
        """The weight that is multiplied by, (N, K) float32."""
        return self.weight.dequantize()

    def multiply(self, rows: QuantizedRows) -> Tensor:
        """(M, K) in A8 -> (M, N) float16."""
        weight = self.weight
        if isinstance(weight, ChannelWeight):
            return gemm_channel(rows, weight.integers(), weight.s1, weight.szero, self.bias)
        return gemm_grouped(rows, weight.integers(), weight.s1, self.bias)


@dataclass(frozen=True)
class HalfLinear:
    """A linear layer left in 16 bits: float16 weights on activations as they come."""

    weight: Tensor  # (N, K) float16
    bias: Tensor | None  # (N,) float16

    def to(self, device: str | torch.device) -> "HalfLinear":
        """The same linear on a device."""
        return HalfLinear(self.weight.to(device), None if self.bias is None else self.bias.to(device))

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) float -> (..., N) float16, summed in float32."""
        return fp16(F.linear(x.float(), self.matrix(), None if self.bias is None else self.bias.float()))

    def matrix(self) -> Tensor:
        """The weight that is multiplied by, (N, K) float32."""
        return self.weight.float()


StoredLinear = QuantizedLinear | HalfLinear


def guarded_scale(scale: Tensor) -> Tensor:
    """fp16 scale, never subnormal; 1 where the row is zero."""
    return torch.where(scale == 0, 1.0, fp16(scale.clamp(min=SMALLEST_NORMAL_FP16)).float()).to(torch.float16)


def row_scales(w: Tensor) -> Tensor:
    """Level-1 scales of grouped weights: (N, K) float32 -> (N,) float16."""
    return guarded_scale(w.abs().amax(dim=1) / PROTECTIVE_RANGE)


def round_grouped(w: Tensor, group_size: int) -> GroupedWeight:
    """Progressive rounding of w (N, K) float32, K % group_size == 0 (QServe 4.1, integer u4 zero points)."""
    s1 = row_scales(w)
    v = w / s1.float()[:, None]
    v8 = v.round().clamp(-PROTECTIVE_RANGE, PROTECTIVE_RANGE).unflatten(1, (-1, group_size))
    high = v8.amax(dim=2).clamp(min=0)
    low = v8.amin(dim=2).clamp(max=0)
    s2 = ((high - low) / 15).round().clamp(1, 16)
    z4 = (-low / s2).round().clamp(0, 15)
    codes = ((v8 / s2[..., None]).round() + z4[..., None]).clamp(0, 15)
    return GroupedWeight(codes.flatten(1).to(torch.uint8), s1, s2.to(torch.int32), (z4 * s2).to(torch.int32))


def round_channel(w: Tensor) -> ChannelWeight:
    """Per-channel rounding of w (N, K) float32 with an integer u4 zero point."""
    high = w.amax(dim=1).clamp(min=0)
    low = w.amin(dim=1).clamp(max=0)
    s1 = guarded_scale((high - low) / 15)
    scale = s1.float()
    z4 = (-low / scale).round().clamp(0, 15)
    codes = ((w / scale[:, None]).round() + z4[:, None]).clamp(0, 15)
    return ChannelWeight(codes.to(torch.uint8), s1, fp16(scale * z4))


def round_to_nearest(w: Tensor, group_size: int) -> QuantizedWeight:
    """Plain rounding: grouped for a positive group_size, per channel for -1."""
    return round_channel(w) if group_size == -1 else round_grouped(w, group_size)


def check_legal(weight: QuantizedWeight, name: str) -> None:
    """Refuse what the kernels cannot multiply exactly.

    Raises:
        QuantizationError: a code above 15, a scale that is not finite, and for grouped weights s2 outside
            1..17 (so that codes * s2 <= 255), or codes * s2 - z outside [-128, 127]. Names the first offender.
    """
    if weight.codes.amax() > 15:
        raise QuantizationError(f"{name}: code {int(weight.codes.amax())}, expected 0..15")
    if not torch.isfinite(weight.s1).all():
        row = int((~torch.isfinite(weight.s1)).nonzero()[0])
        raise QuantizationError(f"{name}: s1_scales[{row}] is {float(weight.s1[row])}, expected a finite scale")
    if isinstance(weight, ChannelWeight):
        if not torch.isfinite(weight.szero).all():
            row = int((~torch.isfinite(weight.szero)).nonzero()[0])
            raise QuantizationError(f"{name}: s1_szeros[{row}] is not finite")
        return
    s2, z = weight.s2, weight.z
    codes = weight.codes.unflatten(1, (-1, weight.group_size))
    low = codes.amin(dim=2).to(torch.int32) * s2
    high = codes.amax(dim=2).to(torch.int32) * s2
    rules = (
        (s2 < 1, "s2 below 1"),
        (s2 > MAX_S2, f"s2 above {MAX_S2}"),
        (low - z < -128, "code * s2 - z below -128"),
        (high - z > 127, "code * s2 - z above 127"),
    )
    for broken, rule in rules:
        if broken.any():
            row, group = (int(i) for i in broken.nonzero()[0])
            raise QuantizationError(
                f"{name}: row {row}, group {group} is illegal ({rule}): s2 = {int(s2[row, group])}, "
                f"z = {int(z[row, group])}, codes * s2 in {int(low[row, group])}..{int(high[row, group])}"
            )


# GEMM


def int_gemm(x8: Tensor, w8: Tensor) -> Tensor:
    """acc = x8 @ w8.T, exactly: (M, K) int8, (N, K) int8 -> (M, N) int32."""
    acc = torch.zeros(x8.shape[0], w8.shape[0], dtype=torch.int32, device=x8.device)
    for k in range(0, x8.shape[1], EXACT_FP32_CHUNK):
        part = x8[:, k : k + EXACT_FP32_CHUNK].float() @ w8[:, k : k + EXACT_FP32_CHUNK].float().T
        acc += part.to(torch.int32)
    return acc


def gemm_grouped(rows: QuantizedRows, w8: Tensor, s1: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = fp16(float(acc) * (sx * s1) + bias): w8 (N, K) int8, s1 (N,) fp16 -> (M, N) float16."""
    y = int_gemm(rows.x8, w8).float() * (rows.sx[:, None] * s1.float())
    return fp16(y if bias is None else y + bias.float())


def gemm_channel(rows: QuantizedRows, codes: Tensor, s1: Tensor, szero: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = fp16((float(acc) * s1 - float(sums) * szero) * sx + bias) -> (M, N) float16."""
    acc = int_gemm(rows.x8, codes).float()
    y = (acc * s1.float() - rows.sums.float()[:, None] * szero.float()) * rows.sx[:, None]
    return fp16(y if bias is None else y + bias.float())


# KV cache


@dataclass(frozen=True)
class QuantizedKV:
    """Rows of K or V: value = codes * scale + minimum, one pair for each token and head."""

    codes: Tensor  # (..., D) uint8
    scale: Tensor  # (...) float16
    minimum: Tensor  # (...) float16

    def dequantize(self) -> Tensor:
        """(..., D) float32."""
        return self.codes.float() * self.scale.float()[..., None] + self.minimum.float()[..., None]


def quantize_kv(x: Tensor, bits: int = 4, clip_ratios: Sequence[float] = (1.0,)) -> QuantizedKV:
    """Quantize rows x (..., D), rounded to fp16 first, asymmetrically to `bits` bits over D.

    Each ratio r shrinks [min, max] around its centre; the one of least squared error is kept, the earlier one on
    a tie. Every operation is rounded to float32, and the squares are summed by halving (`sum_by_halves`), so that
    all implementations agree. A constant row is exact. NaN and Inf propagate as NaN.
    """
    x = fp16(x).float()
    best, *others = (_quantize_range(x, bits, ratio) for ratio in clip_ratios)
    if not others:
        return best
    least = _squared_error(best, x)
    for candidate in others:
        error = _squared_error(candidate, x)
        better = error < least
        least = torch.where(better, error, least)
        best = QuantizedKV(
            torch.where(better[..., None], candidate.codes, best.codes),
            torch.where(better, candidate.scale, best.scale),
            torch.where(better, candidate.minimum, best.minimum),
        )
    return best


def _quantize_range(x: Tensor, bits: int, ratio: float) -> QuantizedKV:
    levels = 2**bits - 1
    low, width = x.amin(dim=-1), x.amax(dim=-1) - x.amin(dim=-1)
    minimum = fp16(low + width * ((1 - ratio) / 2))
    scale = fp16(width * ratio / levels)
    divisor = scale.float()[..., None]
    steps = (x - minimum.float()[..., None]) / torch.where(divisor == 0, 1.0, divisor)
    codes = torch.where(divisor == 0, 0.0, steps).round().clamp(0, levels).nan_to_num(0.0)
    return QuantizedKV(codes.to(torch.uint8), scale, minimum)


def _squared_error(rows: QuantizedKV, x: Tensor) -> Tensor:
    return sum_by_halves((rows.dequantize() - x).square())


def sum_by_halves(x: Tensor) -> Tensor:
    """Sum over the last dimension, padded with zeros to a power of two: first half plus second half, repeatedly."""
    x = F.pad(x, (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension D by the normalised Hadamard matrix, in float32, to the dtype of x.

    Butterflies of stride 1, 2, 4, ... and then one multiplication. Where D is no power of two (96), blocks of its
    largest power of two (32) are rotated.
    """
    block = x.shape[-1] & -x.shape[-1]
    rows = x.float().unflatten(-1, (-1, block))
    stride = 1
    while stride < block:
        pairs = rows.unflatten(-1, (-1, 2, stride))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        rows = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        stride *= 2
    return (rows * block**-0.5).flatten(-2).to(x.dtype)
