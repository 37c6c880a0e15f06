"""Weights onto the 4-bit grid: a searched grid for every group, then GPTQ on it (arXiv 2210.17323).

The target of a linear is what it gives in the full-precision model; its input is what the already quantized
part of the model gives it. Least squares turns this asymmetric objective (QEP, GPTAQ) into the symmetric one:
with H = sum x_q x_q^T and G = sum x_fp x_q^T, the weights W G H^-1 map x_q to the target as well as any can,
and rounding them under H costs what the objective costs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qoq.quant import (
    MAX_S2,
    ChannelWeight,
    GroupedWeight,
    QuantizedWeight,
    fp16,
    guarded_scale,
    is_finite,
    quantize_rows,
    round_channel,
    round_grouped,
    round_to_nearest,
)
from qoq.recipe import Recipe

BLOCK = 128  # columns between lazy updates
ROWS_AT_ONCE = 4096  # of a weight in the grid search
ORDERED_ROWS = 512  # of H, brought into another order
SHRINKS = (1.0, 0.92, 0.85, 0.78, 0.7)  # of a group's range: clipping
SHIFTS = (-0.6, -0.3, 0.0, 0.3, 0.6)  # of its centre, in steps
CHANNEL_SHRINKS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58)
DAMPING = 0.01  # of the mean diagonal, first try
MAX_DAMPING = 1.0


class Moments:
    """Second moments of the input of a linear, summed over tokens, float32."""

    def __init__(self, features: int, device: torch.device | str):
        self.h = torch.zeros(features, features, device=device)  # sum x_q x_q^T
        self.g = torch.zeros(features, features, device=device)  # sum x_fp x_q^T

    def add(self, x_q: Tensor, x_fp: Tensor, token_weight: Tensor | None = None) -> None:
        """Inputs (..., K) of the quantized model, before A8, and of the full-precision one, for the same tokens.

        `token_weight` (...) says how much a squared error of each token counts.
        """
        x_q, x_fp = quantize_rows(x_q.flatten(0, -2)).dequantize(), x_fp.flatten(0, -2).float()
        if token_weight is not None:
            factor = token_weight.flatten().sqrt()[:, None]
            x_q, x_fp = x_q * factor, x_fp * factor
        with tensor_cores():
            self.h.addmm_(x_q.T, x_q)
            self.g.addmm_(x_fp.T, x_q)


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Let float32 products on a GPU round their inputs to TF32: A8 has no more than its 11 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True)
class Grid:
    """The values each weight may take: (code * step - zero) * s1 for code in low..high, by row and group."""

    s1: Tensor  # (N,) float16
    step: Tensor  # (N, G) float32, in units of s1
    zero: Tensor  # (N, G) float32, in units of s1
    low: Tensor  # (N, G) float32
    high: Tensor  # (N, G) float32
    per_channel: bool = False

    @property
    def groups(self) -> int:
        return self.step.shape[1]


def nearest_code(v: Tensor, step: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The code in low..high whose value code * step - zero is nearest to v; all broadcast."""
    return torch.minimum(torch.maximum(((v + zero) / step).round_(), low), high)


def damped_cholesky(h: Tensor) -> tuple[Tensor, float] | None:
    """Lower Cholesky factor of h + damping * mean(diag h), with the first damping that works, or None.

    h (K, K) is damped in place: at K = 14336 every copy is 0.8 GB.
    """
    mean = h.diagonal().mean()
    damping, added = DAMPING, 0.0
    while damping <= MAX_DAMPING:
        h.diagonal().add_((damping - added) * mean)
        added = damping
        factor, info = torch.linalg.cholesky_ex(h)
        if info == 0 and is_finite(factor):
            return factor, damping
        damping *= 10
    return None


def corrected(w: Tensor, moments: Moments, strength: float) -> Tensor:
    """W + strength * W (G - H) (H + d I)^-1, d the damping: W itself where both models agree. (N, K) float32.

    Half of the correction generalises better than all of it.
    """
    solved = damped_cholesky(moments.h.clone()) if strength > 0 else None
    if solved is None:
        return w
    shift = torch.cholesky_solve((w @ moments.g - w @ moments.h).T, solved[0]).T
    return w + strength * shift


def search_grid(w: Tensor, group_size: int, importance: Tensor, whole_zeros: bool = False) -> Grid:
    """The best legal grid of each group by sum_j importance_j * (w_j - value_j)**2.

    w (N, K) float32, importance (K,) float32. Grouped: any integer zero, or with `whole_zeros` 0..15 times s2; s2 from
    the rounded one down to where clipping stops paying, up to one step above. Per channel: shrunken ranges.
    """
    parts = [_search_rows(rows, group_size, importance, whole_zeros) for rows in w.split(ROWS_AT_ONCE)]
    joined = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in ("s1", "step", "zero", "low", "high")
    }
    return Grid(**joined, per_channel=group_size == -1)


def _search_rows(w: Tensor, group_size: int, importance: Tensor, whole_zeros: bool) -> Grid:
    if group_size == -1:
        return _search_channel(w, importance)
    return _search_grouped(w, group_size, importance, whole_zeros)


def _search_grouped(w: Tensor, group_size: int, importance: Tensor, whole_zeros: bool) -> Grid:
    plain = round_grouped(w, group_size)
    s1 = plain.s1
    v = (w / s1.float()[:, None]).unflatten(1, (-1, group_size))  # (N, G, group)
    weight = importance.view(1, -1, group_size)
    low, high = v.amin(2), v.amax(2)
    needed, centre = (high - low) / 15, (low + high) / 2
    best = _Best(v, weight, whole_zeros)
    best.offer(plain.s2.float(), plain.z.float())
    for step in (needed.ceil(), *((needed * shrink).round() for shrink in SHRINKS)):
        step = step.clamp(1, MAX_S2)
        for shift in SHIFTS:
            best.offer(step, (7.5 * step - centre + shift * step).round())
    return best.grid(s1)


class _Best:
    """The best (step, zero) of each group so far, for values v (N, G, group) and their weights (1, G, group)."""

    def __init__(self, v: Tensor, weight: Tensor, whole_zeros: bool):
        self.v, self.weight, self.whole_zeros = v, weight, whole_zeros
        self.loss = torch.full_like(v[..., 0], torch.inf)
        self.step, self.zero = torch.ones_like(self.loss), torch.zeros_like(self.loss)

    def offer(self, step: Tensor, zero: Tensor) -> None:
        """Keep step and zero (N, G), integers, where they are legal and better."""
        if self.whole_zeros:
            zero = (zero / step).round().clamp(0, 15) * step
        code_low, code_high = code_range(step, zero)
        codes = nearest_code(self.v, *(x[..., None] for x in (step, zero, code_low, code_high)))
        loss = ((codes * step[..., None] - zero[..., None] - self.v).square() * self.weight).sum(2)
        better = (loss < self.loss) & (code_low <= code_high)
        self.loss = torch.where(better, loss, self.loss)
        self.step, self.zero = torch.where(better, step, self.step), torch.where(better, zero, self.zero)

    def grid(self, s1: Tensor) -> Grid:
        return Grid(s1, self.step, self.zero, *code_range(self.step, self.zero))


def code_range(step: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The codes a group may use: code * step - zero in [-128, 127], code * step <= 255."""
    low = ((zero - 128) / step).ceil().clamp(min=0)
    high = torch.minimum(((zero + 127) / step).floor(), (255 / step).floor()).clamp(max=15)
    return low, high


def _search_channel(w: Tensor, importance: Tensor) -> Grid:
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    plain = round_channel(w)
    candidates = [(plain.s1.float()[:, None], plain.szero.float()[:, None])]
    for shrink_low in CHANNEL_SHRINKS:
        for shrink_high in CHANNEL_SHRINKS:
            width = high * shrink_high - low * shrink_low
            candidates.append((guarded_scale(width / 15).float(), fp16(-low * shrink_low).float()))
    best_loss = torch.full_like(low, torch.inf)
    best_step, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for step, zero in candidates:
        codes = ((w + zero) / step).round().clamp(0, 15)
        loss = ((codes * step - zero - w).square() * importance).sum(1, keepdim=True)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_step, best_zero = torch.where(better, step, best_step), torch.where(better, zero, best_zero)
    s1 = fp16(best_step[:, 0])
    ones = torch.ones_like(best_step)
    return Grid(s1, ones, best_zero / best_step, 0 * ones, 15 * ones, True)


def onto_grid(w: Tensor, grid: Grid) -> QuantizedWeight:
    """Round w (N, K) float32 to the nearest grid values."""
    v = (w / grid.s1.float()[:, None]).unflatten(1, (grid.groups, -1))
    codes = nearest_code(v, *(x[..., None] for x in (grid.step, grid.zero, grid.low, grid.high)))
    return as_weight(codes.flatten(1), grid)


def as_weight(codes: Tensor, grid: Grid) -> QuantizedWeight:
    codes = codes.to(torch.uint8)
    if grid.per_channel:
        return ChannelWeight(codes, grid.s1, fp16(grid.zero[:, 0] * grid.s1.float()))
    return GroupedWeight(codes, grid.s1, grid.step.to(torch.int32), grid.zero.to(torch.int32))


def reordered(h: Tensor, order: Tensor) -> Tensor:
    """h[order][:, order] (K, K), some rows at a time: on a GPU one index for both takes four times the memory of h."""
    out = torch.empty_like(h)
    for rows, into in zip(order.split(ORDERED_ROWS), out.split(ORDERED_ROWS), strict=True):
        torch.index_select(h[rows], 1, order, out=into)
    return out


def gptq(w: Tensor, grid: Grid, h: Tensor) -> tuple[QuantizedWeight, float] | None:
    """Round column after column, each error spread over the columns to come; static groups, activation order.

    w (N, K) float32, h (K, K) float32. Returns the weight and the damping used, or None where h cannot be
    factored with any damping.
    """
    order = h.diagonal().argsort(descending=True, stable=True)
    solved = damped_cholesky(reordered(h, order))
    if solved is None:
        return None
    factor, damping = solved
    del solved  # each of these is 0.8 GB at K = 14336
    inverse = torch.cholesky_inverse(factor)
    del factor
    inverse = torch.linalg.cholesky(inverse, upper=True)
    columns = (w / grid.s1.float()[:, None]).T[order]  # (K, N): a column of w is a contiguous row
    step, zero, low, high = (x.T.contiguous() for x in (grid.step, grid.zero, grid.low, grid.high))  # (G, N)
    group_of = (order // (len(order) // grid.groups)).tolist()
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, len(order), BLOCK):
        block = columns[start : start + BLOCK]
        u = inverse[start : start + len(block), start : start + len(block)]
        errors = torch.empty_like(block)
        for j in range(len(block)):
            g = group_of[start + j]
            code = nearest_code(block[j], step[g], zero[g], low[g], high[g])
            codes[start + j] = code
            errors[j] = (block[j] - (code * step[g] - zero[g])) / u[j, j]
            block[j + 1 :] -= u[j, j + 1 :, None] * errors[j]
        stop = start + len(block)
        columns[stop:] -= inverse[start:stop, stop:].T @ errors
    natural = torch.empty_like(codes)
    natural[order] = codes
    return as_weight(natural.T.contiguous(), grid), damping


def quantize(
    matrices: Mapping[str, Tensor], moments: Moments | None, settings: Recipe
) -> dict[str, tuple[QuantizedWeight, dict[str, Any]]]:
    """Quantize weights (N, K) that share an input, as the recipe says; each with its losses.

    `rounded` and `loss` are relative squared errors of the output, of plain rounding and of what was chosen,
    against what the best unrounded weights give; without moments, of the weight. `damping` is GPTQ's, None where
    no damping made H positive definite and the weight was rounded to its grid instead. Uses `moments.g` up.
    """
    w = torch.cat(list(matrices.values()))
    plain = round_to_nearest(w, settings.group_size)
    chosen, target = plain, w
    extra: dict[str, Any] = {}
    if moments is not None:
        target = corrected(w, moments, settings.weights.asymmetric)
        moments.g = moments.g.new_empty(0)  # 0.8 GB at K = 14336
        mean = moments.h.diagonal().mean()
        importance = torch.where(mean > 0, moments.h.diagonal() / mean, 1.0)  # 1 for an input that is always zero
        search = settings.weights.grid == "search"
        whole = settings.weights.whole_zeros
        grid = search_grid(target, settings.group_size, importance, whole) if search else as_grid(plain)
        solved = gptq(target, grid, moments.h) if settings.weights.gptq else None
        if solved is None:
            chosen = onto_grid(target, grid)
            extra = {"damping": None} if settings.weights.gptq else {}  # none worked: rounded instead
        else:
            chosen, extra["damping"] = solved
    losses = {
        "rounded": output_error(plain, target, moments),
        "loss": output_error(chosen, target, moments),
    }
    sizes = [len(matrix) for matrix in matrices.values()]
    parts = zip(*(value.split(sizes) for value in vars(chosen).values()), strict=True)
    return {name: (type(chosen)(*part), losses | extra) for name, part in zip(matrices, parts, strict=True)}


def as_grid(weight: QuantizedWeight) -> Grid:
    """The grid of an already quantized weight."""
    if isinstance(weight, ChannelWeight):
        ones = torch.ones_like(weight.s1[:, None], dtype=torch.float32)
        return Grid(weight.s1, ones, (weight.szero.float() / weight.s1.float())[:, None], 0 * ones, 15 * ones, True)
    step, zero = weight.s2.float(), weight.z.float()
    return Grid(weight.s1, step, zero, *code_range(step, zero))


def output_error(weight: QuantizedWeight, target: Tensor, moments: Moments | None) -> float:
    """|(W_hat - W) x_q|**2 / |W x_q|**2, or |W_hat - W|**2 / |W|**2 without moments."""
    delta = weight.dequantize() - target
    if moments is None:
        return float(delta.square().sum() / target.square().sum().clamp(min=1e-30))
    return float((delta @ moments.h * delta).sum() / (target @ moments.h * target).sum().clamp(min=1e-30))
