"""Weights as most 4-bit formats hold them, W ~ (code - zero) * scale, to and from the integers of QoQ.

One level of scales and zero points in 0..15 against two levels and any zero: neither form holds all of the other.
What fits is converted exactly, up to the rounding of fp16(s1 * s2); what does not is rounded again, and the error
that adds is returned with the weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qoq.quant import (
    MAX_S2,
    SMALLEST_NORMAL_FP16,
    ChannelWeight,
    GroupedWeight,
    QuantizedWeight,
    fp16,
    guarded_scale,
)

ROWS_AT_ONCE = 1024
# Trial scales of the first level, as how often they go into the row's largest group scale. The steps between whole
# numbers let every group of a row find a multiple near its own scale.
LEVEL1_STEPS = tuple(1 + j / 4 for j in range(4 * MAX_S2 - 3))


@dataclass(frozen=True)
class AffineWeight:
    """W ~ (codes - zero) * scale, G groups in a row, G = 1 for one scale a row."""

    codes: Tensor  # (N, K) uint8 in 0..15
    scale: Tensor  # (N, G) float16
    zero: Tensor  # (N, G) uint8, 0..16: one version of GPTQ knows a 16

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    def centred(self) -> Tensor:
        """codes - zero, (N, G, K/G) float32."""
        return self.codes.float().unflatten(1, (self.groups, -1)) - self.zero.float()[..., None]

    def dequantize(self) -> Tensor:
        """(N, K) float32."""
        return (self.centred() * self.scale.float()[..., None]).flatten(1)


@dataclass(frozen=True)
class Loss:
    """What a conversion changed: squared errors over a weight, and how many groups had to be rounded again."""

    error: float
    power: float
    rounded: int
    groups: int

    @property
    def relative(self) -> float:
        """|W' - W| / |W|."""
        return (self.error / max(self.power, 1e-30)) ** 0.5


def loss_between(new: Tensor, old: Tensor, rounded: int, groups: int) -> Loss:
    """The loss of new against old, (N, K) float32 each."""
    delta = new - old
    return Loss(float(delta.square().sum()), float(old.square().sum()), rounded, groups)


# From QoQ


def to_affine(weight: QuantizedWeight) -> tuple[AffineWeight, Loss]:
    """The same weight with one level of scales and whole zero points in 0..15.

    Exact up to fp16(s1 * s2) where z is a multiple of s2 in 0..15 * s2. Other groups get a new grid and new codes.
    """
    parts = _row_blocks(weight)
    made = [_channel_to_affine(x) if isinstance(x, ChannelWeight) else _grouped_to_affine(x) for x in parts]
    affine = _joined([part for part, _ in made])
    rounded = sum(count for _, count in made)
    return affine, loss_between(affine.dequantize(), weight.dequantize(), rounded, affine.scale.numel())


def _row_blocks(weight: Any) -> list[Any]:
    """A weight of any kind, a block of rows at a time."""
    return [type(weight)(*part) for part in zip(*(x.split(ROWS_AT_ONCE) for x in vars(weight).values()), strict=True)]


def _joined(parts: Sequence[Any]) -> Any:
    return type(parts[0])(*(torch.cat(tensors) for tensors in zip(*(vars(x).values() for x in parts), strict=True)))


def _grouped_to_affine(weight: GroupedWeight) -> tuple[AffineWeight, int]:
    zero = torch.div(weight.z, weight.s2, rounding_mode="floor")
    fits = (zero * weight.s2 == weight.z) & (zero >= 0) & (zero <= 15)
    s1 = weight.s1.float()[:, None]
    exact = AffineWeight(weight.codes, fp16(s1 * weight.s2), zero.clamp(0, 15).to(torch.uint8))
    if fits.all():
        return exact, 0
    values = weight.integers().float().unflatten(1, (weight.s2.shape[1], -1))
    return _merge(exact, _refit(values, weight.s2.float(), weight.z.float(), s1), fits), int((~fits).sum())


def _channel_to_affine(weight: ChannelWeight) -> tuple[AffineWeight, int]:
    s1 = torch.where(weight.s1 == 0, 1.0, weight.s1.float())[:, None]
    zero = (weight.szero.float()[:, None] / s1).round()
    fits = (fp16(zero * s1) == weight.szero[:, None]) & (zero >= 0) & (zero <= 15)
    exact = AffineWeight(weight.codes, weight.s1[:, None], zero.clamp(0, 15).to(torch.uint8))
    if fits.all():
        return exact, 0
    offset = weight.szero.float()[:, None] / s1  # in units of s1, as z is
    values = (weight.codes.float() - offset)[:, None]
    return _merge(exact, _refit(values, torch.ones_like(s1), offset, s1), fits), int((~fits).sum())


def _refit(values: Tensor, step: Tensor, zero: Tensor, s1: Tensor) -> AffineWeight:
    """The best of a few grids with a whole zero for values (N, G, group) in units of s1 (N, 1)."""
    low, high = values.amin(2).clamp(max=0), values.amax(2).clamp(min=0)
    spans = step, torch.maximum((high - low) / 15, step / 2)
    trials = [(size, torch.where(size == step, zero, -low) / size) for size in spans]
    best_loss = torch.full_like(low, torch.inf)
    best: tuple[Tensor, ...] = (torch.zeros_like(values), torch.zeros_like(low), torch.zeros_like(low))
    for size, exact_zero in trials:
        for whole in (exact_zero.floor(), exact_zero.ceil()):
            whole = whole.clamp(0, 15)
            centred = _nearest(values, size, whole)
            # the scale that fits these codes best, and the codes that fit that scale
            fitted = ((values * centred).sum(2) / centred.square().sum(2).clamp(min=1)).clamp(min=1e-6)
            scale = guarded_scale(fitted * s1).float() / s1
            centred = _nearest(values, scale, whole)
            loss = (centred * scale[..., None] - values).square().sum(2)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            new = centred + whole[..., None], scale, whole
            best = _where(better, new, best)
    codes, scale, zero_points = best
    return AffineWeight(codes.flatten(1).to(torch.uint8), fp16(scale * s1), zero_points.to(torch.uint8))


def _where(better: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """By group: tensors (N, G) or (N, G, group)."""
    wide = better[..., None]
    return tuple(torch.where(wide if x.dim() == 3 else better, x, y) for x, y in zip(new, old, strict=True))


def _nearest(values: Tensor, size: Tensor, zero: Tensor) -> Tensor:
    """code - zero, code the one in 0..15 nearest to values (N, G, group)."""
    return ((values / size[..., None]).round() + zero[..., None]).clamp(0, 15) - zero[..., None]


def _merge(exact: AffineWeight, other: AffineWeight, fits: Tensor) -> AffineWeight:
    wide = fits.repeat_interleave(exact.codes.shape[1] // exact.groups, 1)
    return AffineWeight(
        torch.where(wide, exact.codes, other.codes),
        torch.where(fits, exact.scale, other.scale),
        torch.where(fits, exact.zero, other.zero),
    )


# To QoQ


def to_qoq(weight: AffineWeight, group_size: int) -> tuple[QuantizedWeight, Loss]:
    """The same weight in the integers of QoQ: two levels for a positive group size, else per channel.

    Two levels need group scales that are 1..17 times a scale of their row. Where they are, s2 and s1 are found again
    and every code stays; else the nearest multiple is taken and the group is rounded to it.
    """
    if group_size == -1:
        scale = weight.scale[:, 0]
        made: QuantizedWeight = ChannelWeight(weight.codes, scale, fp16(scale.float() * weight.zero[:, 0].float()))
        return made, loss_between(made.dequantize(), weight.dequantize(), 0, len(scale))
    grouped = _joined([_to_grouped(part) for part in _row_blocks(weight)])
    same = fp16(grouped.s1.float()[:, None] * grouped.s2) == weight.scale
    return grouped, loss_between(grouped.dequantize(), weight.dequantize(), int((~same).sum()), same.numel())


def _to_grouped(weight: AffineWeight) -> GroupedWeight:
    centred, scale = weight.centred(), weight.scale.float()
    s1 = _level1(centred, scale)
    v = centred * (scale / s1[:, None])[..., None]
    nearest = (scale / s1[:, None]).round().clamp(1, MAX_S2)
    best_loss = torch.full_like(scale, torch.inf)
    best: tuple[Tensor, ...] = (torch.zeros_like(v), nearest, torch.zeros_like(scale))
    middle = (v.amin(2) + v.amax(2)) / 2
    for s2 in (nearest, (nearest - 1).clamp(min=1), (nearest + 1).clamp(max=MAX_S2)):
        for z in (weight.zero.float() * s2, (7.5 * s2 - middle).round()):
            low = ((z - 128) / s2).ceil().clamp(min=0)
            high = torch.minimum(((z + 127) / s2).floor(), (255 / s2).floor()).clamp(max=15)
            codes = torch.minimum(
                torch.maximum(((v + z[..., None]) / s2[..., None]).round(), low[..., None]), high[..., None]
            )
            loss = (codes * s2[..., None] - z[..., None] - v).square().sum(2)
            better = (loss < best_loss) & (low <= high)
            best_loss = torch.where(better, loss, best_loss)
            best = _where(better, (codes, s2, z), best)
    codes, s2, z = best
    return GroupedWeight(codes.flatten(1).to(torch.uint8), fp16(s1), s2.to(torch.int32), z.to(torch.int32))


def _level1(centred: Tensor, scale: Tensor) -> Tensor:
    """The scale of each row, fp16 values as (N,) float32, whose multiples come nearest to its group scales (N, G).

    Codes stay as they are in this comparison, and multiples that take them out of int8 are refused.
    """
    low, high, power = centred.amin(2), centred.amax(2), centred.square().sum(2)
    top = scale.amax(1)
    best = guarded_scale(top)
    best_loss = torch.full_like(top, torch.inf)
    for steps in LEVEL1_STEPS:
        near = guarded_scale(top / steps)
        # the neighbours too: fp16(s1 * s2) hides the last bit of s1
        for trial in (near, *(_neighbour(near, by) for by in ((-1, 1) if steps == int(steps) else ()))):
            s1 = trial.float()[:, None]
            s2 = (scale / s1).round().clamp(1, MAX_S2)
            loss = ((fp16(s1 * s2).float() - scale).square() * power).sum(1)
            legal = ((low * s2 >= -128) & (high * s2 <= 127)).all(1)
            better = legal & (loss < best_loss)
            best_loss = torch.where(better, loss, best_loss)
            best = torch.where(better, trial, best)
    return best.float()


def _neighbour(scale: Tensor, by: int) -> Tensor:
    """The fp16 number next to a positive one."""
    return (scale.view(torch.int16) + by).view(torch.float16).clamp(min=SMALLEST_NORMAL_FP16)
