"""The tile order: where single codes land, round trips, and concatenation."""

import pytest
import torch
from conftest import TESTS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from qoq.errors import CheckpointError
from qoq.packing import pack_level2, pack_qweight, pack_zeros, unpack_level2, unpack_qweight, unpack_zeros
from qoq.quant import round_grouped

TILES = st.integers(1, 5)
SEEDS = st.integers(0, 2**32 - 1)
K = 96


def random_codes(seed: int, n: int, k: int) -> Tensor:
    return torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("n", "k", "byte", "nibble"),
    [
        (0, 0, 0, "low"),
        (16, 0, 0, "high"),
        (8, 0, 4, "low"),
        (0, 16, 8, "low"),
        (0, 4, 16, "low"),
        (1, 0, 64, "low"),
        (0, 32, 512, "low"),
        (32, 0, 16 * K, "low"),
        (0, 1, 1, "low"),
        (24, 0, 4, "high"),
    ],
)
def test_where_a_code_lies(n, k, byte, nibble):
    codes = torch.zeros(64, K, dtype=torch.uint8)
    codes[n, k] = 11
    packed = pack_qweight(codes).view(torch.uint8).flatten()
    assert packed.nonzero().flatten().tolist() == [byte]
    assert int(packed[byte]) == (11 if nibble == "low" else 11 << 4)


@given(SEEDS, TILES, TILES)
def test_qweight_round_trip(seed, rows, columns):
    codes = random_codes(seed, 32 * rows, 32 * columns)
    packed = pack_qweight(codes)
    assert packed.dtype == torch.int8 and packed.shape == (32 * rows, 16 * columns)
    assert torch.equal(unpack_qweight(packed), codes)


@given(SEEDS, TILES, TILES, TILES)
def test_packing_commutes_with_concatenation(seed, first, second, columns):
    a, b = random_codes(seed, 32 * first, 32 * columns), random_codes(seed + 1, 32 * second, 32 * columns)
    assert torch.equal(torch.cat((pack_qweight(a), pack_qweight(b))), pack_qweight(torch.cat((a, b))))
    s2_a, s2_b = a[:, :3].int(), b[:, :3].int()
    assert torch.equal(torch.cat((pack_level2(s2_a), pack_level2(s2_b)), 1), pack_level2(torch.cat((s2_a, s2_b))))


@pytest.mark.parametrize(
    ("channel", "column"), [(0, 0), (8, 1), (16, 2), (24, 3), (1, 4), (9, 5), (31, 31), (32, 32), (40, 33)]
)
def test_where_a_channel_lies(channel, column):
    values = torch.zeros(64, 2, dtype=torch.int32)
    values[channel, 1] = 9
    packed = pack_level2(values)
    assert packed.shape == (2, 64) and packed.dtype == torch.int8
    assert packed[1].nonzero().flatten().tolist() == [column]
    assert not packed[0].any()


@given(SEEDS, TILES, st.integers(1, 6))
def test_level2_round_trip(seed, rows, groups):
    values = torch.randint(-128, 128, (32 * rows, groups), generator=torch.Generator().manual_seed(seed)).int()
    assert torch.equal(unpack_level2(pack_level2(values)), values)


def test_zeros_are_stored_negated_modulo_256():
    z = torch.zeros(32, 1, dtype=torch.int32)
    z[0], z[1], z[8] = 240, 7, -3
    packed = pack_zeros(z)[0]
    assert packed[0] == 16  # -240 mod 256
    assert packed[4] == -7
    assert packed[1] == 3


@given(SEEDS, st.integers(0, 15), st.integers(1, 17), st.integers(0, 255))
def test_zeros_are_recovered_from_their_low_byte(seed, largest_code, s2, offset):
    """Any legal z, from the one that puts the largest product at 127 down to the smallest at -128."""
    codes = random_codes(seed, 32, 64) % (largest_code + 1)
    high, low = int(codes.max()) * s2, int(codes.min()) * s2
    z = high - 127 + offset % (low + 128 - (high - 127) + 1)
    zeros, scales = torch.full((32, 1), z, dtype=torch.int32), torch.full((32, 1), s2, dtype=torch.int32)
    codes[:, 0], codes[:, 1] = codes.max(), codes.min()
    assert torch.equal(unpack_zeros(pack_zeros(zeros), codes, scales), zeros)


@given(SEEDS, st.sampled_from([64, 128]))
def test_zeros_of_rounded_weights_are_recovered(seed, group_size):
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)).pow(3)
    weight = round_grouped(w, group_size)
    assert torch.equal(unpack_zeros(pack_zeros(weight.z), weight.codes, weight.s2), weight.z)


def test_an_impossible_group_is_named():
    codes, s2 = torch.zeros(32, 128, dtype=torch.uint8), torch.full((32, 2), 17, dtype=torch.int32)
    codes[6, 64], codes[6, 65] = 15, 0  # spans 0..255: only z = 128 would do
    assert unpack_zeros(pack_zeros(torch.full((32, 2), 128).int()), codes, s2)[6, 1] == 128
    with pytest.raises(CheckpointError, match=r"x\.s2_zeros: row 6, group 1 is illegal: codes \* s2 span 0\.\.255"):
        unpack_zeros(pack_zeros(torch.full((32, 2), 100).int()), codes, s2, "x.s2_zeros")


@pytest.mark.parametrize("name", ["w4a8_g128", "w4a8_g64"])
def test_golden_grouped_tensors(name):
    g = load_file(TESTS / "golden" / f"{name}.safetensors")
    assert torch.equal(pack_qweight(g["codes"]), g["qweight"])
    assert torch.equal(unpack_qweight(g["qweight"]), g["codes"])
    assert torch.equal(pack_level2(g["s2"]), g["s2_scales"])
    assert torch.equal(unpack_level2(g["s2_scales"]), g["s2"])
    assert torch.equal(pack_zeros(g["z"]), g["s2_zeros"])
    assert torch.equal(unpack_zeros(g["s2_zeros"], g["codes"], g["s2"]), g["z"])


def test_golden_channel_tensors():
    g = load_file(TESTS / "golden" / "w4a8_channel.safetensors")
    assert torch.equal(pack_qweight(g["codes"]), g["qweight"])
