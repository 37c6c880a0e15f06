"""Grids and GPTQ: always legal, never worse than rounding where they should not be, and equal to a naive reference."""

import dataclasses

import pytest
import torch
from conftest import GROUP_SIZES, relative
from test_quant import KINDS, adversarial

from qoq.calibration import weights
from qoq.quant import ChannelWeight, GroupedWeight, check_legal, quantize_rows, round_to_nearest
from qoq.recipe import Recipe, Weights

EVERYTHING = Weights(grid="search", gptq=True, asymmetric=1.0)


def settings(group_size, how):
    return Recipe("w", group_size, weights=how)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed, tokens=400, features=256):
    """Activations (tokens, features) with large and small channels that depend on each other."""
    mix = normal(100, features, features) / 16 + torch.eye(features)
    return normal(seed, tokens, features) @ mix * normal(101, features).exp()


def moments_of(x_q, x_fp=None):
    moments = weights.Moments(x_q.shape[1], "cpu")
    moments.add(x_q, x_q if x_fp is None else x_fp)
    return moments


def test_moments_are_of_what_the_linear_sees():
    x_q, x_fp = correlated(0), correlated(1)
    moments = weights.Moments(256, "cpu")
    moments.add(x_q[:100].view(2, 50, 256), x_fp[:100].view(2, 50, 256))
    moments.add(x_q[100:], x_fp[100:])
    seen = quantize_rows(x_q).dequantize()
    assert relative(moments.h, seen.T @ seen) < 1e-5 and relative(moments.g, x_fp.T @ seen) < 1e-5
    weight = torch.rand(400, generator=torch.Generator().manual_seed(0))
    weighed = weights.Moments(256, "cpu")
    weighed.add(x_q, x_fp, weight)
    assert relative(weighed.h, seen.T @ (seen * weight[:, None])) < 1e-5
    assert relative(weighed.g, x_fp.T @ (seen * weight[:, None])) < 1e-5


@pytest.mark.parametrize("how", [Weights(), Weights("search"), Weights("search", gptq=True), EVERYTHING], ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_is_legal(kind, group_size, how):
    w = adversarial(kind)
    moments = None if how == Weights() else moments_of(correlated(0), correlated(0) * 1.01)
    made, losses = weights.quantize({"w": w}, moments, settings(group_size, how))["w"]
    check_legal(made, kind)
    assert type(made) is (ChannelWeight if group_size == -1 else GroupedWeight)
    assert made.dequantize().isfinite().all()
    assert losses["loss"] >= 0 and losses["rounded"] >= 0


@pytest.mark.parametrize("how", [Weights("search"), EVERYTHING], ids=str)
@pytest.mark.parametrize(("group_size", "features"), [(128, 128), (64, 64)])
def test_a_linear_of_a_single_group_stays_grouped(group_size, features, how):
    w, x = normal(0, 32, features), normal(1, 300, features)
    made, _ = weights.quantize({"w": w}, moments_of(x), settings(group_size, how))["w"]
    assert isinstance(made, GroupedWeight) and made.group_size == group_size
    assert relative(made.dequantize(), w) < 0.15


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_each_step_lowers_the_output_error(group_size):
    w, x = normal(0, 64, 256), correlated(0)
    ways = [Weights(), Weights("search"), Weights("round", gptq=True), Weights("search", gptq=True)]
    plain, searched, gptq, both = (
        weights.quantize({"w": w}, moments_of(x), settings(group_size, how))["w"][1]["loss"] for how in ways
    )
    assert searched < plain and gptq < 0.7 * plain and both < searched and both < gptq


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_the_searched_grid_is_better_than_rounding(group_size):
    w, importance = normal(0, 64, 256).pow(3), normal(1, 256).exp()
    found = weights.onto_grid(w, weights.search_grid(w, group_size, importance)).dequantize()
    rounded = round_to_nearest(w, group_size).dequantize()
    losses = [((made - w).square() * importance).sum() for made in (found, rounded)]
    assert losses[0] < 0.95 * losses[1]


@pytest.mark.parametrize("group_size", [128, 64])
def test_whole_zeros_are_codes(group_size):
    w = normal(0, 64, 256).pow(3) + 0.3  # many groups of one sign
    how = Weights("search", whole_zeros=True, gptq=True)
    made, _ = weights.quantize({"w": w}, moments_of(normal(1, 400, 256)), settings(group_size, how))["w"]
    assert isinstance(made, GroupedWeight)
    check_legal(made, "whole")
    codes, rest = made.z.int() // made.s2.int(), made.z.int() % made.s2.int()
    assert not rest.any() and codes.min() >= 0 and codes.max() <= 15
    free, _ = weights.quantize({"w": w}, moments_of(normal(1, 400, 256)), settings(group_size, EVERYTHING))["w"]
    assert isinstance(free, GroupedWeight) and (free.z.int() % free.s2.int()).any()


def test_rounding_onto_its_own_grid_changes_nothing():
    for group_size in GROUP_SIZES:
        plain = round_to_nearest(normal(0, 32, 256), group_size)
        again = weights.onto_grid(plain.dequantize(), weights.as_grid(plain))
        assert all(torch.equal(getattr(again, f.name), getattr(plain, f.name)) for f in dataclasses.fields(plain))


def naive_gptq(w, grid, h, damping):
    """Column by column in float64, the inverse Hessian of the columns to come made anew each time."""
    h = h.double() + damping * h.double().diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    order = h.diagonal().argsort(descending=True, stable=True).tolist()
    v = w.double() / grid.s1.double()[:, None]
    codes = torch.empty_like(v)
    for at, column in enumerate(order):
        rest = order[at:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        step, zero, low, high = (x[:, column * grid.groups // len(order)].double() for x in vars_of(grid))
        code = ((v[:, column] + zero) / step).round().clamp(low, high)
        error = v[:, column] - (code * step - zero)
        v[:, rest] -= error[:, None] * inverse[0] / inverse[0, 0]
        codes[:, column] = code
    return codes


def vars_of(grid):
    return grid.step, grid.zero, grid.low, grid.high


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_gptq_is_the_textbooks(group_size, monkeypatch):
    monkeypatch.setattr(weights, "ORDERED_ROWS", 100)
    w, moments = normal(0, 32, 256), moments_of(correlated(0))
    grid = weights.search_grid(w, group_size, moments.h.diagonal())
    solved = weights.gptq(w, grid, moments.h)
    assert solved is not None
    made, damping = solved
    expected = naive_gptq(w, grid, moments.h, damping)
    assert (made.codes == expected).float().mean() > 0.98  # float32 flips a tie now and then
    assert damping == weights.DAMPING


def test_a_hopeless_hessian_is_rounded_instead():
    w, moments = normal(0, 32, 128), weights.Moments(128, "cpu")
    moments.add(normal(1, 10, 128), normal(1, 10, 128))
    moments.h[5, 5] = torch.nan
    made, losses = weights.quantize({"w": w}, moments, settings(64, Weights("round", gptq=True)))["w"]
    assert losses["damping"] is None
    assert relative(made.dequantize(), w) < 0.2


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_an_input_that_is_always_zero_leaves_the_grid_of_the_weights(group_size):
    w = normal(0, 32, 256)
    made, losses = weights.quantize({"w": w}, moments_of(torch.zeros(10, 256)), settings(group_size, EVERYTHING))["w"]
    expected = weights.onto_grid(w, weights.search_grid(w, group_size, torch.ones(256)))
    assert torch.equal(made.dequantize(), expected.dequantize())
    assert losses == {"rounded": 0.0, "loss": 0.0, "damping": None}


def test_correction_aims_at_the_output_of_the_full_model():
    w, x_fp = normal(0, 64, 256), correlated(0)
    x_q = quantize_rows(x_fp * 0.9 + 0.1 * correlated(5)).dequantize()
    moments = moments_of(x_q, x_fp)
    target = x_fp @ w.T
    fixed = weights.corrected(w, moments, 1.0)
    assert relative(x_q @ fixed.T, target) < 0.8 * relative(x_q @ w.T, target)
    agreeing = moments_of(x_q)
    agreeing.g = agreeing.h.clone()
    assert torch.equal(weights.corrected(w, agreeing, 1.0), w)


def test_linears_that_share_an_input_are_split_again():
    matrices = {"a": normal(0, 32, 256), "b": normal(1, 96, 256), "c": normal(2, 64, 256)}
    moments = moments_of(correlated(0))
    together = weights.quantize(matrices, moments, settings(128, EVERYTHING))
    assert list(together) == ["a", "b", "c"]
    for name, w in matrices.items():
        alone, _ = weights.quantize({name: w}, moments_of(correlated(0)), settings(128, EVERYTHING))[name]
        assert together[name][0].codes.shape == w.shape
        assert (together[name][0].codes == alone.codes).float().mean() > 0.99
