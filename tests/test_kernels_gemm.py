"""The W4A8 GEMM: its bits are the specification's, for every legal weight, shape, split, tile and neighbour."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import TESTS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from qoq import packing, quant
from qoq.checkpoint import pack_linear
from qoq.errors import QoqError
from qoq.kernels import cards, gemm, tiling
from qoq.kernels.cards import Card
from qoq.kernels.gemm import PackedWeight, gate_up_silu, w4a8_gemm
from qoq.kernels.rows import quant_rows, silu_mul_quant
from qoq.kernels.tiling import KERNELS, Config, Wgmma
from qoq.quant import ChannelWeight, GroupedWeight, QuantizedLinear, QuantizedRows, QuantizedWeight, quantize_rows

GROUP_SIZES = (128, 64, -1)
LINEARS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # N, K of Llama 3 8B
CARDS = (
    Card("A100", "sm_80", 108),
    Card("RTX 3090", "sm_86", 82),
    Card("L40S", "sm_89", 142),
    Card("H100", "sm_90a", 132),
    Card("RTX 5090", "sm_120", 170),
    Card("a card to come", "sm_130", 7),
)


def generator(seed: int, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def extreme_weight(n: int, k: int, group_size: int, seed: int, device: str = "cpu") -> QuantizedWeight:
    """Legal weights of all kinds: groups of one code, of few or of all; s2 up to 17; z up to both of its limits."""
    g = generator(seed, device)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g, device=device)

    s1 = (torch.rand(n, generator=g, device=device) * 0.01 + 1e-4).half()
    if group_size == -1:
        szero = (torch.rand(n, generator=g, device=device) * 0.1).half()
        return ChannelWeight(integers(0, 15, n, k).to(torch.uint8), s1, szero)
    groups = k // group_size
    low, high = integers(0, 15, 2, n, groups, 1).sort(dim=0).values
    low, high = (torch.where(integers(0, 3, n, groups, 1) == 0, end, x) for end, x in ((0, low), (15, high)))
    codes = integers(0, 15, n, groups, group_size).clamp(low, high)
    s2 = integers(1, 17, n, groups)
    first, last = codes.amax(2) * s2 - 127, codes.amin(2) * s2 + 128  # of all legal z
    where = torch.rand(n, groups, generator=g, device=device) * 1.5 - 0.25
    z = (first + (where * (last - first)).round()).clamp(first, last)
    return GroupedWeight(codes.flatten(1).to(torch.uint8), s1, s2.to(torch.int32), z.to(torch.int32))


def extreme_rows(m: int, k: int, seed: int, device: str = "cpu") -> QuantizedRows:
    """Rows of -127, of 127 and of everything between."""
    g = generator(seed, device)
    x8 = torch.randint(-127, 128, (m, k), generator=g, device=device)
    x8[::5] = 127
    x8[3::7] = -127
    sx = torch.rand(m, generator=g, device=device) * 0.01
    return QuantizedRows(x8.to(torch.int8), sx, x8.sum(1, dtype=torch.int32))


def expected(
    rows: QuantizedRows, weight: QuantizedWeight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """The specification; on a GPU too it is exact, as float32 products there are not rounded to tf32."""
    assert not torch.backends.cuda.matmul.allow_tf32
    if isinstance(weight, ChannelWeight):
        y = quant.gemm_channel(rows, weight.integers(), weight.s1, weight.szero, bias)
    else:
        y = quant.gemm_grouped(rows, weight.integers(), weight.s1, bias)
    return y if residual is None else residual + y


def same(x: Tensor, y: Tensor) -> bool:
    """Equal bits, and NaN in the same places."""
    bits = torch.equal(x.nan_to_num(0).view(torch.int16), y.nan_to_num(0).view(torch.int16))
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.isnan(), y.isnan()) and bits


def vectors(m: int, n: int, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A bias and a residual."""
    g = generator(seed, device)
    return torch.randn(n, generator=g, device=device).half(), torch.randn(m, n, generator=g, device=device).half()


# Packed weights


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_packing_keeps_every_legal_weight(group_size):
    weight = extreme_weight(96, 384, group_size, seed=1)
    quant.check_legal(weight, "weight")
    unpacked = PackedWeight.pack(weight).unpack()
    assert all(torch.equal(x, y) for x, y in zip(vars(weight).values(), vars(unpacked).values(), strict=True))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_checkpoint_packs_alike(group_size):
    weight = extreme_weight(64, 256, group_size, seed=2)
    tensors = {name.removeprefix("x."): t for name, t in pack_linear("x", QuantizedLinear(weight, None)).items()}
    packed, loaded = PackedWeight.pack(weight), PackedWeight.from_tensors(tensors)
    assert (packed.N, packed.K, packed.group_size) == (64, 256, group_size)
    for x, y in zip(vars(packed).values(), vars(loaded).values(), strict=True):
        assert x is y is None or torch.equal(x, y)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("n", [64, 192])
def test_interleaved_rows_of_gate_and_up(n, group_size):
    weight = extreme_weight(n, 384, group_size, seed=25)
    order = torch.tensor(
        [row + side for first in range(0, n // 2, 8) for side in (0, n // 2) for row in range(first, first + 8)]
    )
    expected = PackedWeight.pack(type(weight)(*(x[order] for x in vars(weight).values())))
    found = PackedWeight.pack(weight).interleaved()
    for x, y in zip(vars(expected).values(), vars(found).values(), strict=True):
        assert x is y is None or torch.equal(x, y)
    assert torch.equal(packing.interleave_rows(torch.arange(n)), order)


def test_interleaving_needs_whole_strips_of_both():
    odd = PackedWeight.pack(extreme_weight(96, 128, 128, seed=26))
    with pytest.raises(ValueError, match="N = 96, expected a multiple of 64"):
        odd.interleaved()
    with pytest.raises(ValueError, match="N = 96, expected a multiple of 64"):
        gate_up_silu(extreme_rows(1, 128, 27), odd)


def test_z_far_outside_a_byte():
    """All weights of a group negative, or all positive: the low byte of z alone would say otherwise."""
    codes = torch.tensor([[15] * 64 + [0] * 64] * 32, dtype=torch.uint8)
    s2, z = torch.full((32, 2), 17), torch.tensor([[383, -127]] * 32)
    weight = GroupedWeight(codes, torch.ones(32).half(), s2.int(), z.int())
    rows = quantize_rows(torch.ones(1, 128))
    assert weight.integers()[0, ::64].tolist() == [-128, 127]
    assert same(w4a8_gemm(rows, PackedWeight.pack(weight)), expected(rows, weight))


def test_an_illegal_checkpoint_is_refused():
    weight = extreme_weight(32, 128, 64, seed=3)
    tensors = {name.removeprefix("x."): t for name, t in pack_linear("x", QuantizedLinear(weight, None)).items()}
    tensors["s2_scales"] = torch.full_like(tensors["s2_scales"], 18)
    with pytest.raises(QoqError, match="s2"):
        PackedWeight.from_tensors(tensors)


# The face on the CPU


@pytest.mark.parametrize("name", ["w4a8_g128", "w4a8_g64", "w4a8_channel"])
def test_golden_products(name):
    g = {key: tensor.clone() for key, tensor in load_file(TESTS / "golden" / f"{name}.safetensors").items()}  # aligned
    rows, weight = QuantizedRows(g["x8"], g["sx"], g["Sx"]), PackedWeight.from_tensors(g)
    assert same(w4a8_gemm(rows, weight), g["y"])
    if "bias" in g:
        assert same(w4a8_gemm(rows, weight, g["bias"]), g["y_bias"])


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_products_on_the_cpu(group_size, m):
    weight, rows = extreme_weight(96, 384, group_size, seed=4), extreme_rows(m, 384, seed=5)
    packed, (bias, residual) = PackedWeight.pack(weight), vectors(m, 96, seed=6)
    assert same(w4a8_gemm(rows, packed), expected(rows, weight))
    assert same(w4a8_gemm(rows, packed, bias), expected(rows, weight, bias))
    assert same(w4a8_gemm(rows, packed, residual=residual), expected(rows, weight, residual=residual))
    assert same(w4a8_gemm(rows, packed, bias, residual), expected(rows, weight, bias, residual))


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_swiglu_on_the_cpu(group_size, m):
    weight, rows = extreme_weight(192, 384, group_size, seed=28), extreme_rows(m, 384, seed=29)
    packed, (bias, _) = PackedWeight.pack(weight), vectors(m, 192, seed=30)
    found = gate_up_silu(rows, packed.interleaved())
    assert found.shape == (m, 96) and same(found, quant.silu_mul(*w4a8_gemm(rows, packed).chunk(2, dim=1)))
    found = gate_up_silu(rows, packed.interleaved(), packing.interleave_rows(bias))
    assert same(found, quant.silu_mul(*w4a8_gemm(rows, packed, bias).chunk(2, dim=1)))


def test_nan_stays_in_its_row():
    x = torch.randn(3, 128, generator=generator(7))
    x[1, 17] = torch.nan
    y = w4a8_gemm(quantize_rows(x), PackedWeight.pack(extreme_weight(32, 128, 128, seed=8)))
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def broken_weight(**changes: Tensor | None) -> PackedWeight:
    packed = PackedWeight.pack(extreme_weight(64, 256, 64, seed=9))
    return PackedWeight(**{**vars(packed), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": torch.zeros(48, 128, dtype=torch.int8)}, "N = 48"),
        ({"qweight": torch.zeros(64, 120, dtype=torch.int8)}, "K = 240"),
        ({"qweight": torch.zeros(32, 2**16, dtype=torch.int8)}, "K <= 66311"),
        ({"qweight": torch.zeros(64, 128, dtype=torch.uint8)}, "qweight"),
        ({"s1": torch.zeros(32).half()}, "s1"),
        ({"s1": torch.zeros(64)}, "s1"),
        ({"s2": torch.zeros(3, 64, dtype=torch.int8)}, "zeros"),
        ({"s2": torch.ones(8, 64, dtype=torch.int8), "zeros": torch.ones(8, 64, dtype=torch.int8)}, "groups of 128"),
        ({"s2": None}, "expected s2 and zeros"),
        ({"szero": torch.zeros(64).half()}, "szero"),
    ],
)
def test_wrong_weights(changes, message):
    with pytest.raises(ValueError, match=message):
        broken_weight(**changes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x8", torch.zeros(2, 128, dtype=torch.int8), "x8"),
        ("x8", torch.zeros(256, 2, dtype=torch.int8).T, "x8.*contiguous"),
        ("sx", torch.zeros(3), "sx"),
        ("sums", torch.zeros(2), "sums"),
        ("bias", torch.zeros(64), "bias"),
        ("residual", torch.zeros(2, 32).half(), "residual"),
    ],
)
def test_wrong_arguments(name, value, message):
    bias, residual = vectors(2, 64, seed=10)
    arguments = {**vars(extreme_rows(2, 256, seed=11)), "bias": bias, "residual": residual, name: value}
    rows = QuantizedRows(arguments["x8"], arguments["sx"], arguments["sums"])
    with pytest.raises(ValueError, match=message):
        w4a8_gemm(rows, broken_weight(), arguments["bias"], arguments["residual"])


# The choice of tiles


@given(
    st.sampled_from(CARDS),
    st.integers(1, 100_000),
    st.integers(1, 2_000),
    st.integers(1, 500),
    st.sampled_from(GROUP_SIZES),
)
def test_a_legal_choice_for_every_shape(card, m, n, k, group_size):
    n, k = 32 * n, k * (32 if group_size == -1 else group_size)
    config = tiling.choose(card, m, n, k, group_size)
    kernel = KERNELS[config.kernel]
    assert tiling.problem(config, card, m, n, k, group_size) is None
    assert tiling.resident(config, card, group_size) >= 1
    parts = tiling.parts(config, card, group_size, m, n)
    assert [part.first for part in parts] == [0, parts[0].tiles][: len(parts)]
    assert sum(part.tiles for part in parts) == config.tiles(m, n)
    assert all(blocks >= 1 for part in parts for blocks in kernel.grid(part, card, group_size))
    assert kernel.threads(config) <= 1024


def test_few_tokens_fill_the_card():
    for n, k in LINEARS:
        for card in CARDS[:5]:
            config = tiling.choose(card, 1, n, k, 128)
            assert config.tiles(1, n) * config.splits >= 0.5 * card.multiprocessors


def test_many_tokens_take_large_tiles():
    for card in CARDS[:5]:
        config = tiling.choose(card, 4096, 28672, 4096, 128)
        assert config.rows * config.tokens >= 128 * 128 and config.splits == 1


@pytest.mark.parametrize(("n", "k"), LINEARS)
def test_hopper_takes_its_own_kernel(n, k):
    """In tiles that were the fastest, or nearly, when they were measured."""
    for m in (1, 16, 64, 128, 256, 1024, 4096):
        for group_size in GROUP_SIZES:
            config = tiling.choose(CARDS[3], m, n, k, group_size)
            assert config.kernel == "wgmma"
            assert config.tokens == min(256, max(m, 8)) or (config.tokens, m) == (128, 256)
    assert tiling.choose(CARDS[3], 1, n, k, 128).splits == {6144: 4, 28672: 1}.get(n, 6)
    assert tiling.choose(CARDS[3], 256, n, k, 128).splits == {28672: 1, 4096: 2 if k == 4096 else 3}.get(n, 2)


def test_the_table_goes_first_where_it_is_legal(monkeypatch):
    card = CARDS[0]
    table = {card.name: {"4096x4096 g64": {"16": ["mma", 64, 16, 2, 3], "32": ["mma", 64, 16, 99, 1]}}}
    monkeypatch.setattr(tiling, "tuned", lambda: table)
    tiling.chosen.cache_clear()
    assert tiling.choose(card, 9, 4096, 4096, 64) == Config("mma", 64, 16, 2, 3)
    assert tiling.choose(card, 8, 4096, 4096, 64).tokens == 8
    assert tiling.choose(card, 17, 4096, 4096, 64).stages < 99
    tiling.chosen.cache_clear()


def test_the_table_is_well_formed():
    for shapes in json.loads(tiling.TUNING.read_text()).values():
        for shape, buckets in shapes.items():
            n, k, group = (int(part) for part in shape.replace("x", " ").replace("g", "").split())
            assert shape == tiling.entry_name(n, k, group)
            for tokens, fields in buckets.items():
                config = Config(*fields)
                card = Card("any", "sm_90a" if config.kernel == "wgmma" else "sm_80", 132)
                assert int(tokens) in tiling.BUCKETS
                assert tiling.problem(config, card, int(tokens), n, k, group) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config("wgmma", 128, 16, 4), "no kernel"),
        (Config("mma", 96, 16, 4), "no tile"),
        (Config("mma", 128, 16, 1), "stages"),
        (Config("mma", 256, 128, 8), "shared memory"),
        (Config("mma", 128, 16, 2, 9), "splits"),
        (Config("mma", 128, 16, 2, 0), "splits"),
        (Config("mma", 128, 16, 2, 1, 2), "a tail of 2 beside 1 splits of kernel 'mma', expected 1"),
    ],
)
def test_illegal_configurations(config, message):
    assert message in str(tiling.problem(config, CARDS[2], 16, 4096, 1024, 128))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config("wgmma", 128, 256, 5, 1, 2), "None"),
        (Config("wgmma", 128, 256, 5, 2, 2), "a tail of 2 beside 2 splits of kernel 'wgmma', expected 1"),
        (Config("wgmma", 128, 256, 5, 1, 0), "0 splits"),
        (Config("wgmma", 128, 256, 5, 1, 9), "9 splits"),
        (Config("wgmma", 128, 256, 2, 1, 2), "no room for the partial sums"),
    ],
)
def test_legal_and_illegal_tails(config, message):
    assert message in str(tiling.problem(config, CARDS[3], 1024, 6144, 4096, 128))


def test_a_last_wave_that_is_not_full_is_split():
    """48 x 4 tiles on 132 multiprocessors; 32 x 4 fill them."""
    config = tiling.choose(CARDS[3], 1024, 6144, 4096, 128)
    whole, tail = tiling.parts(config, CARDS[3], 128, 1024, 6144)
    assert (whole.tiles, whole.config.splits) == (132, 1)
    assert (tail.first, tail.tiles, tail.config.splits) == (132, 60, 2)
    assert KERNELS["wgmma"].grid(tail, CARDS[3], 128) == (120, 1, 1)
    assert tiling.choose(CARDS[3], 1024, 4096, 4096, 128).tail == 1
    assert all(tiling.choose(CARDS[3], m, n, k, 128).tail == 1 for n, k in LINEARS for m in (1, 16, 64, 128))


def test_a_tail_suits_the_tokens_also_where_the_table_has_the_tile(monkeypatch):
    """192 and 144 tiles, of one bucket: 60 and 12 in the last wave."""
    table = {CARDS[3].name: {"6144x4096 g128": {"1024": ["wgmma", 128, 256, 5, 1]}}}
    monkeypatch.setattr(tiling, "tuned", lambda: table)
    tiling.chosen.cache_clear()
    assert [tiling.choose(CARDS[3], m, 6144, 4096, 128).tail for m in (1024, 768)] == [2, 8]
    tiling.chosen.cache_clear()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_tokens_share_a_choice_that_suits_them_all(card):
    """In tiles; a server meets every number of tokens, and a choice takes time."""
    n, k = 28672, 4096
    for m in range(1, 1100, 3):
        config, most = tiling.choose(card, m, n, k, 128), tiling.rounded(m)
        assert m <= most < m + 64 and config is tiling.choose(card, most, n, k, 128)
        assert config.tiles(m, n) == config.tiles(most, n) and tiling.problem(config, card, m, n, k, 128) is None
    assert len({tiling.rounded(m) for m in range(1, 8193)}) == 8 + 31 + 124


def test_a_block_has_no_more_stages_than_steps():
    """Of 32 steps; what it leaves of a multiprocessor is for its neighbours."""
    found = {
        each.splits: each.stages for each in tiling.splits(Config("wgmma", 128, 8, 11), CARDS[3], 1, 4096, 4096, 128)
    }
    assert found == {1: 11, 2: 11, 3: 11, 4: 8, 5: 7, 6: 6, 7: 5, 8: 4}
    few = tiling.splits(Config("wgmma", 128, 8, 11), CARDS[3], 1, 4096, 128, 128)
    assert [each.stages for each in few] == [KERNELS["wgmma"].fewest_stages]


@pytest.mark.parametrize("stages", [11, 12])
def test_blocks_that_do_not_fit_together_are_not_modelled_together(stages):
    """Twelve stages leave room for one block, eleven for two."""
    config = Config("wgmma", 128, 8, stages)
    (part,) = tiling.parts(config, CARDS[3], 128, 1, 37888)
    at_once = {11: 2, 12: 1}[stages]
    assert tiling.resident(config, CARDS[3], 128) == Wgmma()._waves(part, CARDS[3], 128)[0] == at_once


def test_partial_sums_have_limits():
    assert "partial sums" in str(tiling.problem(Config("mma", 128, 16, 2, 2), CARDS[0], 4096, 4096, 1024, 128))


# On a GPU


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda:0"


@contextmanager
def poison() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(
    rows: QuantizedRows,
    packed: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """w4a8_gemm into poisoned memory; the workspace must be left as it was found."""
    with poison():
        y = w4a8_gemm(rows, packed, bias, residual, config)
    assert gemm.workspace(rows.x8.device).count_nonzero() == 0
    return y


SMALL = tuple(range(1, 18))
EDGES = (127, 128, 129, 255, 256, 257)
CASES = [
    (96, 576, 64, (1, 8, 9, 17, 130)),
    (640, 640, 128, (1, 33, 64, 65)),
    (640, 640, -1, (1, 33, 64, 65)),
    (576, 1536, -1, (5, 200)),
    (896, 4864, 64, (*SMALL, 129)),
    (4864, 896, 128, (*SMALL, *EDGES)),
    (4864, 896, -1, (*SMALL, *EDGES)),
    (4096, 4096, 128, (1, 16, 64, *EDGES, 1000, 4096)),
    (4096, 4096, 64, (16, 128, 1000)),
    (4096, 11008, -1, (1, 16, 64, 257, 1000)),
    (4096, 14336, 128, (1, 16, 64, 256, 4096)),
    (18944, 3584, 64, (4, 257)),
    (28672, 4096, 128, (1, 16, 64, 256, 1000)),
    (8192, 28672, 128, (7, 128)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k", "group_size", "tokens"), CASES)
def test_bits_of_the_specification(cuda, n, k, group_size, tokens):
    weight = extreme_weight(n, k, group_size, n + k, cuda)
    packed = PackedWeight.pack(weight)
    for m in tokens:
        rows, (bias, residual) = extreme_rows(m, k, m, cuda), vectors(m, n, m, cuda)
        assert same(run(rows, packed), expected(rows, weight)), m
        assert same(run(rows, packed, bias, residual), expected(rows, weight, bias, residual)), m


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_configuration_gives_the_same_bits(cuda, group_size):
    """The last of the tiles lack rows and tokens; the last steps of K, where groups allow it, lack features."""
    n, k, m = 864, {128: 1664, 64: 1728, -1: 1760}[group_size], 137
    weight, rows = extreme_weight(n, k, group_size, 12, cuda), extreme_rows(m, k, 13, cuda)
    packed, (bias, residual), card = PackedWeight.pack(weight), vectors(m, n, 14, cuda), cards.card_of(rows.x8.device)
    reference = expected(rows, weight, bias, residual)
    for kernel in card.limits.kernels:
        few = (8, 64, 128) if kernel == "mma" else (64, 128)  # compiling them all would take minutes
        for config in tiling.configs(kernel, card, group_size):
            if group_size == 128 or config.tokens in few:
                tried = list(tiling.splits(config, card, m, n, k, group_size))
                both = kernel == "mma" or config.tokens in (16, 64, 128)
                for split in (tried[0], tried[-1]) if both else tried[:1]:
                    assert same(run(rows, packed, bias, residual, split), reference), split


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("rows", "tokens", "stages"), [(128, 256, 5), (128, 16, 10), (256, 128, 6)])
def test_tails_give_the_same_bits(hopper, rows, tokens, stages, group_size):
    """One wave and a few tiles, a wave alone, and less than one."""
    k, config = 1664 if group_size == 128 else 1728, Config("wgmma", rows, tokens, stages)
    card = cards.card_of(torch.device(hopper))
    wave = card.multiprocessors * tiling.resident(config, card, group_size)
    row_tiles = next(tiles for tiles in (11, 10, 9, 8) if wave % tiles == 0)
    n = row_tiles * rows - 32
    packed = PackedWeight.pack(weight := extreme_weight(n, k, group_size, 33, hopper))
    for tiles, expected_parts in ((wave + row_tiles, 2), (wave, 1), (wave - row_tiles, 1)):
        m = tiles // row_tiles * tokens - 5
        activations, (bias, residual) = extreme_rows(m, k, m, hopper), vectors(m, n, m, hopper)
        reference = expected(activations, weight, bias, residual)
        for tail in (2, 3, 8):
            split = replace(config, tail=tail)
            assert len(tiling.parts(split, card, group_size, m, n)) == expected_parts
            assert same(run(activations, packed, bias, residual, split), reference), (m, tail)


@pytest.mark.gpu
def test_a_row_alone_and_among_others(cuda):
    packed, rows = PackedWeight.pack(extreme_weight(1536, 2048, 128, 15, cuda)), extreme_rows(257, 2048, 16, cuda)
    together = run(rows, packed)
    for i in (0, 1, 128, 256):
        alone = QuantizedRows(*(tensor[i : i + 1].clone() for tensor in vars(rows).values()))
        assert same(run(alone, packed), together[i : i + 1])


@pytest.mark.gpu
def test_nan_stays_in_its_row_on_a_gpu(cuda):
    x = torch.randn(100, 512, generator=generator(17)).to(cuda)
    x[60, 100] = torch.inf
    for group_size in GROUP_SIZES:
        y = run(quantize_rows(x), PackedWeight.pack(extreme_weight(96, 512, group_size, 18, cuda)))
        assert y[60].isnan().all() and y.isnan().sum() == 96


@pytest.mark.gpu
def test_graphs_can_be_replayed(cuda):
    weight = extreme_weight(512, 4096, 64, 19, cuda)
    packed, rows = PackedWeight.pack(weight), extreme_rows(24, 4096, 20, cuda)
    split = Config("mma", 128, 32, 2, 5)
    run(rows, packed, config=split)  # compiles, and allocates the workspace
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = w4a8_gemm(rows, packed, config=split)
    for seed in (21, 22):
        fresh = extreme_rows(24, 4096, seed, cuda)
        for tensor, value in zip(vars(rows).values(), vars(fresh).values(), strict=True):
            tensor.copy_(value)
        graph.replay()
        assert same(y, expected(fresh, weight))


@pytest.mark.gpu
def test_a_tail_in_a_graph_between_other_kernels(hopper):
    """Whose launches may overlap there."""
    n, k, m, config = 6144, 1664, 1000, Config("wgmma", 128, 256, 5, 1, 2)
    packed = PackedWeight.pack(weight := extreme_weight(n, k, 128, 34, hopper))
    x = torch.randn(m, k, generator=generator(35)).half().to(hopper)

    def step() -> tuple[Tensor, QuantizedRows]:
        y = w4a8_gemm(quant_rows(x), packed, config=config)
        return y, quant_rows(y)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, rows = step()
    for seed in range(3):
        x.copy_(torch.randn(m, k, generator=generator(seed)))
        y.fill_(torch.nan)
        graph.replay()
        found = expected(quantize_rows(x), weight)
        assert same(y, found)
        assert torch.equal(rows.x8, quantize_rows(found).x8)


@pytest.mark.gpu
def test_an_illegal_configuration_is_refused(cuda):
    packed = PackedWeight.pack(extreme_weight(64, 256, 64, 23, cuda))
    with pytest.raises(ValueError, match="no tile"):
        w4a8_gemm(extreme_rows(1, 256, 24, cuda), packed, config=Config("mma", 96, 16, 4))


def silu_mul_of_the_rows(gate: Tensor, up: Tensor) -> Tensor:
    """What `silu_mul_quant` makes of two tensors before it quantizes; -0 is 0 and infinity NaN."""
    alone = torch.zeros(gate.numel(), 16, dtype=torch.float16, device=gate.device)  # one value, and zeros, in a row
    alone[:, 0], alone[:, 8] = gate.flatten(), up.flatten()
    rows = silu_mul_quant(alone)
    return (rows.sx * 127 * rows.x8[:, 0].sign().where(rows.sx.isfinite(), 1)).half().view_as(gate)


def finite(y: Tensor) -> Tensor:
    """-0 as 0, infinity as NaN."""
    return (y + 0).where(y.isfinite(), torch.nan)


@pytest.fixture
def hopper(cuda: str) -> str:
    if not gemm.fuses_swiglu(torch.device(cuda)):
        pytest.skip("no kernel that ends in SwiGLU on this card")
    return cuda


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("f", "k", "group_size"), [(4864, 896, 128), (96, 1600, 64), (1504, 1056, -1), (32, 4096, 128), (14336, 4096, 128)]
)
def test_swiglu_has_the_bits_of_the_pair(hopper, f, k, group_size):
    packed = PackedWeight.pack(extreme_weight(2 * f, k, group_size, f, hopper))
    interleaved = packed.interleaved()
    for m in (1, 8, 17, 64, 128, 300, 1000, 4096):
        rows, (bias, _) = extreme_rows(m, k, m, hopper), vectors(m, 2 * f, m, hopper)
        rows.sx.mul_(torch.exp2(-(torch.arange(m, device=hopper) % 12).float()))
        rows.sx[2::9] = torch.nan
        for linear_bias in (None, bias):
            with poison():
                y = gate_up_silu(rows, interleaved, None if linear_bias is None else packing.interleave_rows(bias))
            gate_up = w4a8_gemm(rows, packed, linear_bias)
            if m <= 300:
                assert same(finite(y), silu_mul_of_the_rows(*gate_up.chunk(2, dim=1))), m
            for x, expected in zip(vars(quant_rows(y)).values(), vars(silu_mul_quant(gate_up)).values(), strict=True):
                assert torch.equal(x.nan_to_num(-1), expected.nan_to_num(-1)), m


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_configuration_of_swiglu_gives_the_same_bits(hopper, group_size):
    n, k, m = 832, {128: 1664, 64: 1728, -1: 1760}[group_size], 137
    packed, rows = PackedWeight.pack(extreme_weight(n, k, group_size, 31, hopper)), extreme_rows(m, k, 32, hopper)
    card, interleaved = cards.card_of(rows.x8.device), packed.interleaved()
    expected = silu_mul_of_the_rows(*w4a8_gemm(rows, packed).chunk(2, dim=1))
    for config in tiling.configs("wgmma", card, group_size):
        if group_size == 128 or config.tokens in (8, 128, 256):
            tried = list(tiling.splits(config, card, m, n, k, group_size))
            for split in (tried[0], tried[-1]) if config.tokens in (16, 64, 128, 256) else tried[:1]:
                with poison():
                    y = gate_up_silu(rows, interleaved, config=split)
                assert same(finite(y), expected), split
