"""The arithmetic against golden vectors, against brute force, and against what must never happen."""

from collections.abc import Mapping

import pytest
import torch
from conftest import TESTS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from qoq import quant
from qoq.errors import QuantizationError
from qoq.quant import (
    ChannelWeight,
    GroupedWeight,
    QuantizedLinear,
    check_legal,
    gemm_channel,
    gemm_grouped,
    hadamard,
    int_gemm,
    quantize_kv,
    quantize_rows,
    round_channel,
    round_grouped,
    round_to_nearest,
    sum_by_halves,
)

SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.sampled_from([1e-30, 1e-8, 1e-4, 1.0, 3e4, 1e30])


def golden(name: str) -> Mapping[str, Tensor]:
    return load_file(TESTS / "golden" / f"{name}.safetensors")


def same(x: Tensor, y: Tensor) -> bool:
    """Equal dtype, shape and bits (NaNs too)."""
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grouped_of(g: Mapping[str, Tensor]) -> GroupedWeight:
    return GroupedWeight(g["codes"], g["s1_scales"], g["s2"], g["z"])


def true_integers(weight: GroupedWeight) -> Tensor:
    """codes * s2 - z (N, G, group) without wrapping to int8."""
    return (
        weight.codes.to(torch.int32).unflatten(1, (-1, weight.group_size)) * weight.s2[..., None] - weight.z[..., None]
    )


# Golden vectors


@pytest.mark.parametrize("name", ["w4a8_g128", "w4a8_g64", "w4a8_channel"])
def test_golden_activations(name):
    g = golden(name)
    rows = quantize_rows(g["x"])
    assert same(rows.x8, g["x8"]) and same(rows.sx, g["sx"]) and same(rows.sums, g["Sx"])


@pytest.mark.parametrize("name", ["w4a8_g128", "w4a8_g64"])
def test_golden_grouped_gemm(name):
    g = golden(name)
    weight = grouped_of(g)
    rows = quantize_rows(g["x"])
    assert same(weight.integers(), g["w8"])
    assert same(int_gemm(rows.x8, weight.integers()), g["acc"])
    assert same(gemm_grouped(rows, g["w8"], g["s1_scales"]), g["y"])
    assert same(gemm_grouped(rows, g["w8"], g["s1_scales"], g["bias"]), g["y_bias"])
    assert same(QuantizedLinear(weight, g["bias"])(g["x"]), g["y_bias"])


def test_golden_channel_gemm():
    g = golden("w4a8_channel")
    weight = ChannelWeight(g["codes"], g["s1_scales"], g["s1_szeros"])
    rows = quantize_rows(g["x"])
    assert same(int_gemm(rows.x8, weight.integers()), g["acc"])
    assert same(gemm_channel(rows, weight.integers(), g["s1_scales"], g["s1_szeros"]), g["y"])
    assert same(QuantizedLinear(weight, None)(g["x"]), g["y"])


def test_golden_kv():
    g = golden("kv4")
    kv = quantize_kv(g["x"])
    for name in ("codes", "scale", "minimum"):
        assert same(getattr(kv, name), g[name]), name
    assert same(kv.dequantize(), g["value"])


# Activations


@given(SEEDS, SCALES, st.integers(1, 300))
def test_rows_are_off_by_half_a_step_at_most(seed, scale, k):
    x = normal(seed, 5, k).pow(3) * scale
    rows = quantize_rows(x)
    half_step = rows.sx[:, None].double() / 2
    assert ((x.double() - rows.x8.double() * rows.sx[:, None].double()).abs() <= half_step * (1 + 1e-4)).all()
    assert rows.x8.abs().amax() == 127
    assert torch.equal(rows.sums, rows.x8.int().sum(1).int())
    assert torch.allclose(rows.dequantize(), rows.x8.float() * rows.sx[:, None])


def test_rounding_is_half_to_even():
    assert quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])).x8.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_a_zero_row_is_zero():
    rows = quantize_rows(torch.zeros(2, 32))
    assert not rows.x8.any() and not rows.sx.any() and not rows.sums.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_value_spoils_its_own_row_only(bad):
    x = normal(0, 3, 64)
    clean = quantize_rows(x)
    x[1, 7] = bad
    rows = quantize_rows(x)
    assert rows.sx.isnan().tolist() == [False, True, False]
    assert not rows.x8[1].any()
    assert torch.equal(rows.x8[[0, 2]], clean.x8[[0, 2]]) and torch.equal(rows.sx[[0, 2]], clean.sx[[0, 2]])
    y = QuantizedLinear(round_grouped(normal(1, 32, 64), 64), None)(x)
    assert y.isnan().all(dim=1).tolist() == [False, True, False]


# GEMM


@given(SEEDS, st.sampled_from([1, 31, 1024, 1025, 2500, 5120]), st.integers(1, 4), st.integers(1, 5))
def test_int_gemm_is_exact(seed, k, m, n):
    generator = torch.Generator().manual_seed(seed)
    x8 = torch.randint(-127, 128, (m, k), generator=generator).to(torch.int8)
    w8 = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    w8[0] = -128
    x8[0] = torch.where(x8[0] < 0, -127, 127)
    assert torch.equal(int_gemm(x8, w8).long(), x8.long() @ w8.long().T)


@pytest.mark.parametrize("k", [1041, 2049, 4097])
def test_int_gemm_is_exact_beyond_float32(k):
    """Odd sums above 2**24, which no float32 can hold."""
    x8, w8 = torch.full((1, k), 127, dtype=torch.int8), torch.full((1, k), 127, dtype=torch.int8)
    assert k * 127 * 127 > 2**24
    assert int_gemm(x8, w8).item() == k * 127 * 127


@pytest.mark.parametrize("group_size", [128, 64, -1])
def test_a_linear_is_close_to_its_float_twin(group_size):
    w, x, bias = normal(0, 64, 256), normal(1, 2, 9, 256), normal(2, 64).half()
    linear = QuantizedLinear(round_to_nearest(w, group_size), bias)
    float_twin = x @ linear.weight.dequantize().T + bias.float()
    assert linear(x).shape == (2, 9, 64) and linear(x).dtype == torch.float16
    assert (linear(x) - float_twin).norm() / float_twin.norm() < 0.01


# Weights


def adversarial(kind: str) -> Tensor:
    """(32, 256) float32 weights that break careless quantizers."""
    w = normal(3, 32, 256)
    rows = torch.arange(32)
    changes = {
        "normal": lambda: None,
        "constant groups": lambda: w.copy_(normal(4, 32, 4).repeat_interleave(64, 1)),
        "one huge value": lambda: w.view(-1)[rows * 256 + rows].fill_(1e5),
        "one huge negative value": lambda: w.view(-1)[rows * 256 + rows].fill_(-1e5),
        "all positive": lambda: w.abs_().add_(5),
        "all negative": lambda: w.abs_().add_(5).neg_(),
        "denormals": lambda: w.mul_(1e-40),
        "zero rows": lambda: w[::2].zero_(),
        "zero groups": lambda: w[:, 64:128].zero_(),
        "rows of 1e-8": lambda: w.mul_(1e-8),
        "alternating extremes": lambda: w.copy_(torch.where(w > 0, 3.0, -3.0)),
        "large": lambda: w.mul_(1e4),
    }
    changes[kind]()
    return w


KINDS = (
    "normal|constant groups|one huge value|one huge negative value|all positive|all negative|denormals|zero rows|"
    "zero groups|rows of 1e-8|alternating extremes|large"
).split("|")


@pytest.mark.parametrize("group_size", [128, 64, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_always_legal_and_close(kind, group_size):
    w = adversarial(kind)
    weight = round_to_nearest(w, group_size)
    check_legal(weight, kind)
    error = (weight.dequantize().double() - w.double()).abs().amax(1)
    span = (w.amax(1).clamp(min=0) - w.amin(1).clamp(max=0)).double()
    assert (error <= torch.maximum(span * 0.07, torch.tensor(2.0**-14))).all()
    if isinstance(weight, GroupedWeight):
        assert torch.equal(weight.integers().int().unflatten(1, (-1, group_size)), true_integers(weight))


@given(SEEDS, SCALES, st.sampled_from([64, 128]), st.integers(1, 9))
def test_any_weight_rounds_legally(seed, scale, group_size, power):
    scale = min(scale, 1e5)
    weight = round_grouped(normal(seed, 8, 256).pow(power).clamp(-60, 60) * scale, group_size)
    check_legal(weight, "w")
    assert weight.s1.min() >= 2.0**-14


def test_zero_rows_stay_zero():
    for group_size in (64, -1):
        weight = round_to_nearest(torch.zeros(32, 128), group_size)
        assert not weight.dequantize().any()
        assert (weight.s1 == 1).all()


def test_a_scale_beyond_fp16_is_refused():
    for group_size in (64, -1):
        with pytest.raises(QuantizationError, match=r"w: s1_scales\[2\] is inf"):
            w = normal(0, 32, 128)
            w[2] *= 1e9
            check_legal(round_to_nearest(w, group_size), "w")


@pytest.mark.parametrize(
    ("v", "s2", "z", "codes"),
    [
        ((-119, -60.3, 0, 0.49, 59.5, 119), 16, 112, (0, 3, 7, 7, 11, 14)),
        ((-113, 120, 7.5, 0), 15, 120, (0, 15, 9, 8)),
        ((10.2, 11.7, 25, 40.4), 3, 0, (3, 4, 8, 13)),
        ((-3.2, -1.1, 0.4, 2.6), 1, 3, (0, 2, 3, 6)),
        ((0, 0, 0, 0), 1, 0, (0, 0, 0, 0)),
        ((-40, -40, -40, -40), 3, 39, (0, 0, 0, 0)),
        ((119, -10, 30, 5.5), 9, 9, (14, 0, 4, 2)),
    ],
)
def test_progressive_rounding_by_hand(v, s2, z, codes):
    """Groups in units of s1, beside a group that pins s1 to 1."""
    width = len(v)
    w = torch.tensor([[min(x, 119.0) for x in v] + [119.0] * width])
    weight = round_grouped(w, width)
    assert weight.s1.item() == 1
    assert (weight.s2[0, 0].item(), weight.z[0, 0].item()) == (s2, z)
    assert tuple(weight.codes[0, :width].tolist()) == codes


def extremes(bound: int) -> tuple[GroupedWeight, Tensor]:
    """Every group with integer bounds low in [-bound, 0] and high in [0, bound], rounded; and its true w8."""
    low, high = torch.arange(-bound, 1), torch.arange(bound + 1)
    pairs = torch.cartesian_prod(low, high).float()
    w = torch.cat((pairs.flatten(), torch.tensor([float(bound)] * 2)))[None]
    weight = round_grouped(w, 2)
    assert weight.s1.item() == 1
    return weight, true_integers(weight)


def test_119_protects_int8_for_every_group():
    """Level 1 clamps to integers in [-119, 119]; whatever bounds a group has, level 2 stays in 8 bits."""
    weight, w8 = extremes(119)
    assert w8.amin() >= -128 and w8.amax() <= 127 and w8.abs().amax() <= 127
    products = weight.codes.int().unflatten(1, (-1, 2)) * weight.s2[..., None]
    assert products.amin() >= 0 and products.amax() <= 255


def test_120_would_not_protect(monkeypatch):
    """119 is the largest bound: with 120 some group reaches |w8| = 128."""
    monkeypatch.setattr(quant, "PROTECTIVE_RANGE", 120)
    _, w8 = extremes(120)
    assert w8.abs().amax() > 127


def legal_group() -> GroupedWeight:
    codes = torch.full((32, 128), 7, dtype=torch.uint8)
    codes[:, ::2] = 15
    s1 = torch.ones(32, dtype=torch.float16)
    return GroupedWeight(
        codes, s1, torch.full((32, 2), 8, dtype=torch.int32), torch.full((32, 2), 60, dtype=torch.int32)
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("s2", 0, r"layer.3: row 5, group 1 is illegal \(s2 below 1\): s2 = 0"),
        ("s2", 18, r"layer.3: row 5, group 1 is illegal \(s2 above 17\): s2 = 18"),
        ("z", 200, r"layer.3: row 5, group 1 is illegal \(code \* s2 - z below -128\).*z = 200, .* 56\.\.120"),
        ("z", -8, r"layer.3: row 5, group 1 is illegal \(code \* s2 - z above 127\).*z = -8"),
    ],
)
def test_an_illegal_group_is_named(field, value, message):
    weight = legal_group()
    check_legal(weight, "layer.3")
    getattr(weight, field)[5, 1] = value
    with pytest.raises(QuantizationError, match=message):
        check_legal(weight, "layer.3")


def test_the_whole_byte_may_be_used():
    """s2 = 17 with code 15 gives 255; zeros may be negative or above 128."""
    weight = legal_group()
    weight.codes[0, :64] = 15
    weight.s2[0, 0], weight.z[0, 0] = 17, 255
    weight.codes[1, :64] = 0
    weight.z[1, 0] = -127
    check_legal(weight, "w")
    assert weight.integers()[0, 0] == 0 and weight.integers()[1, 0] == 127


def test_bad_codes_and_scales_are_named():
    weight = legal_group()
    weight.codes[3, 3] = 16
    with pytest.raises(QuantizationError, match="w: code 16, expected 0..15"):
        check_legal(weight, "w")
    weight = legal_group()
    weight.s1[4] = torch.nan
    with pytest.raises(QuantizationError, match=r"w: s1_scales\[4\] is nan"):
        check_legal(weight, "w")
    channel = round_channel(normal(0, 32, 64))
    channel.szero[9] = torch.inf
    with pytest.raises(QuantizationError, match=r"w: s1_szeros\[9\] is not finite"):
        check_legal(channel, "w")


# KV cache


@given(SEEDS, st.sampled_from([1e-6, 1.0, 1e3]), st.sampled_from([4, 8]))
def test_kv_is_off_by_half_a_step_at_most(seed, scale, bits):
    x = (normal(seed, 3, 2, 64) * scale).half()
    kv = quantize_kv(x, bits)
    assert kv.codes.amax() <= 2**bits - 1
    step = kv.scale.double()[..., None]
    # Scale and minimum are rounded to fp16: a relative 2**-11 of the whole range, and of what is subnormal.
    slack = x.abs().amax(-1, keepdim=True).double() * 2**-10 + (2**bits - 1) * 2.0**-25
    assert ((kv.dequantize().double() - x.double()).abs() <= step / 2 + slack + (2**bits - 1) * step * 2**-10).all()


@given(st.floats(-65504, 65504, width=16))
def test_a_constant_kv_row_is_exact(value):
    x = torch.full((2, 64), value, dtype=torch.float16)
    assert torch.equal(quantize_kv(x).dequantize(), x.float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e6])
def test_a_bad_kv_value_spoils_its_own_row_only(bad):
    x = normal(0, 3, 64)
    clean = quantize_kv(x).dequantize()
    x[1, 5] = bad
    value = quantize_kv(x).dequantize()
    assert value[1].isnan().all()
    assert torch.equal(value[[0, 2]], clean[[0, 2]])


RATIOS = (1.0, 0.96, 0.92, 0.88, 0.84)


@given(SEEDS, st.sampled_from([1e-3, 1.0, 1e3]), st.integers(1, 7))
def test_the_best_clip_ratio_is_kept(seed, scale, power):
    x = (normal(seed, 5, 64).pow(power) * scale).clamp(-6e4, 6e4).half()
    chosen = quantize_kv(x, clip_ratios=RATIOS)
    candidates = [quantize_kv(x, clip_ratios=(ratio,)) for ratio in RATIOS]
    errors = torch.stack([(kv.dequantize() - x.float()).double().square().sum(-1) for kv in candidates])
    error = (chosen.dequantize() - x.float()).double().square().sum(-1)
    assert (error <= errors.amin(0) * (1 + 1e-5)).all()
    for row in range(5):
        same_as = [
            torch.equal(chosen.codes[row], kv.codes[row]) and chosen.scale[row] == kv.scale[row] for kv in candidates
        ]
        assert any(same_as)


def test_an_outlier_is_clipped_when_that_pays():
    x = torch.linspace(-1, 1, 128).half()[None].clone()
    x[0, 0] = -1.15
    assert quantize_kv(x, clip_ratios=RATIOS).scale < quantize_kv(x).scale


def test_clip_ratios_keep_constants_and_nans():
    x = torch.tensor([[3.0] * 32, [0.0] * 16 + [torch.nan] * 16])
    value = quantize_kv(x, clip_ratios=RATIOS).dequantize()
    assert (value[0] == 3).all() and value[1].isnan().all()


def test_clip_ratios_tie_to_the_earlier():
    """Both ratios miss -60 and 60 by 7.5, with scales of 7 and 15."""
    x = torch.tensor([[-60.0] * 16 + [60.0] * 16])
    for ratios, scale in (((7 / 8, 15 / 8), 7), ((15 / 8, 7 / 8), 15)):
        kv = quantize_kv(x, clip_ratios=ratios)
        assert ((kv.dequantize() - x).abs() == 7.5).all() and kv.scale.item() == scale


@given(SEEDS, st.integers(1, 130))
def test_sums_by_halves_are_sums_in_a_fixed_order(seed, n):
    integers = torch.randint(-1000, 1000, (3, n), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(sum_by_halves(integers), integers.sum(-1))
    a, b, c = normal(seed, 3)
    assert sum_by_halves(torch.stack((a, b, c))) == (a + c) + b  # padded to four: (a + c) + (b + 0)


@pytest.mark.parametrize(("d", "block"), [(64, 64), (128, 128), (96, 32), (256, 256)])
def test_hadamard_is_an_orthogonal_matrix_of_equal_magnitudes(d, block):
    matrix = hadamard(torch.eye(d))
    assert torch.allclose(matrix @ matrix.T, torch.eye(d), atol=1e-6)
    sylvester = torch.ones(1, 1)
    while len(sylvester) < block:
        sylvester = torch.cat((torch.cat((sylvester, sylvester), 1), torch.cat((sylvester, -sylvester), 1)))
    assert torch.allclose(matrix, torch.block_diag(*[sylvester * block**-0.5] * (d // block)), atol=1e-7)
    assert hadamard(torch.ones(2, d, dtype=torch.float16)).dtype == torch.float16
