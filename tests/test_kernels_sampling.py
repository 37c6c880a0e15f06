"""Sampling: the generator's known answers, the cuts against brute force, the distribution, and the kernel."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq import kernels, sampling
from qoq.kernels import selftest

CUDA = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def arguments(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seeds: Tensor | None = None,
) -> dict[str, Tensor]:
    """The arguments of `sample`, the same for all rows; row b has seed b and position 0 unless told otherwise."""
    batch = logits.shape[0]
    return {
        "logits": logits,
        "temperature": torch.full((batch,), float(temperature)),
        "top_k": torch.full((batch,), top_k, dtype=torch.int32),
        "top_p": torch.full((batch,), top_p),
        "min_p": torch.full((batch,), min_p),
        "seeds": torch.arange(batch) if seeds is None else seeds,
        "positions": torch.zeros(batch, dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]):
    out = sampling.philox4x32(np.array(counter, dtype=np.uint32), np.array(key, dtype=np.uint32))
    assert tuple(int(word) for word in out) == words


def test_exponentials_follow_seed_and_position_alone():
    seeds = torch.tensor([7, 7, -8, 7 + 2**32])
    positions = torch.tensor([3, 4, 3, 3])
    together = sampling.exponentials(seeds, positions, 1001)
    for i in range(4):
        assert torch.equal(sampling.exponentials(seeds[i : i + 1], positions[i : i + 1], 1001)[0], together[i])
        assert torch.equal(sampling.exponentials(seeds[i : i + 1], positions[i : i + 1], 5)[0], together[i, :5])
    assert all(not torch.equal(together[i], together[j]) for i in range(4) for j in range(i))
    many = sampling.exponentials(torch.arange(20), torch.zeros(20, dtype=torch.int64), 50_000).double()
    assert abs(many.mean() - 1) < 0.005 and abs(many.var() - 1) < 0.02 and many.min() > 0


def cut_one_by_one(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens left, by sorting one row in plain Python."""
    weights = [np.exp((x - max(logits)) / temperature) for x in logits]
    left = {i for i, w in enumerate(weights) if w > 0}
    if 0 < top_k < len(logits):
        left = {i for i in left if logits[i] >= sorted(logits)[-top_k]}
    total = sum(weights[i] for i in left)
    above = {i: sum(weights[j] for j in left if logits[j] > logits[i]) for i in left}
    left = {i for i in left if top_p >= 1 or above[i] == 0 or above[i] < top_p * total}
    return {i for i in left if weights[i] >= min_p}


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=30),
    st.sampled_from([0.25, 1.0, 2.0]),
    st.integers(-1, 12),
    st.sampled_from([0.0, 0.3, 0.77, 0.95, 1.0]),
    st.sampled_from([0.0, 0.011, 0.3, 1.0]),
)
def test_cuts_are_those_of_sorting(whole: list[int], temperature: float, top_k: int, top_p: float, min_p: float):
    logits = [x / 8 for x in whole]
    given_to = arguments(torch.tensor([logits]), temperature, top_k, top_p, min_p)
    del given_to["seeds"], given_to["positions"]
    weights = sampling.kept_weights(**given_to)[0]
    assert set(weights.nonzero()[:, 0].tolist()) == cut_one_by_one(logits, temperature, top_k, top_p, min_p)


def chi_squared(tokens: Tensor, probabilities: Tensor) -> float:
    """Of the counts of tokens, per degree of freedom; tokens of probability 0 must not occur."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities[probabilities > 0] * len(tokens)
    return float(((counts[probabilities > 0] - expected) ** 2 / expected).sum() / max(len(expected) - 1, 1))


CUTS = [
    {},
    {"temperature": 0.5},
    {"top_k": 4},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
]


def distribution_is_right(device: torch.device, cuts: dict[str, float]) -> bool:
    """20,000 draws from one row of 13 logits; chi squared per degree of freedom stays below 3."""
    torch.manual_seed(1)
    row = torch.randn(1, 13)
    request = arguments(row.expand(20_000, -1).contiguous(), **cuts)  # type: ignore[arg-type]
    tokens = kernels.sample(**{name: tensor.to(device) for name, tensor in request.items()}).cpu()
    one = arguments(row, **cuts)  # type: ignore[arg-type]
    weights = sampling.kept_weights(*(one[name] for name in ("logits", "temperature", "top_k", "top_p", "min_p")))[0]
    return chi_squared(tokens, weights.double() / weights.double().sum()) < 3


@pytest.mark.parametrize("cuts", CUTS)
def test_draws_have_the_distribution(cuts: dict[str, float]):
    assert distribution_is_right(torch.device("cpu"), cuts)


def test_temperature_0_takes_the_first_of_the_largest():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [-0.0, 0.0, -1.0, 0.0], [-torch.inf, -5.0, -torch.inf, -6.0]])
    assert kernels.sample(**arguments(logits, temperature=0)).tolist() == [1, 0, 1]
    assert kernels.sample(**arguments(logits, top_k=1, min_p=0.5)).tolist()[2] == 1
    assert kernels.sample(**arguments(logits[2:], top_p=0.0)).tolist() == [1]


def test_a_bad_row_gives_minus_1_and_leaves_the_others_alone():
    torch.manual_seed(0)
    logits = torch.randn(5, 100)
    good = kernels.sample(**arguments(logits))
    logits[1, 3], logits[2, 99] = torch.nan, torch.inf
    logits[3] = -torch.inf
    for temperature in (0.0, 1.0):
        tokens = kernels.sample(**arguments(logits, temperature))
        assert tokens[1:4].tolist() == [-1, -1, -1]
    assert tokens[[0, 4]].tolist() == good[[0, 4]].tolist()


def test_wrong_arguments_are_refused():
    request = arguments(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="logits: torch.bfloat16, expected float16 or float32"):
        kernels.sample(**request | {"logits": torch.zeros(2, 8).bfloat16()})
    with pytest.raises(ValueError, match=r"top_k: torch.int64 \(2,\), expected torch.int32 \(2\)"):
        kernels.sample(**request | {"top_k": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"seeds: torch.int64 \(3,\), expected torch.int64 \(2\)"):
        kernels.sample(**request | {"seeds": torch.zeros(3, dtype=torch.int64)})
    assert kernels.sample(**arguments(torch.zeros(0, 8))).shape == (0,)


# On a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_draws_what_the_specification_draws(seed: int):
    torch.manual_seed(seed)
    with selftest.poisoned_outputs():
        outcome = selftest.check_sample(CUDA)
    assert outcome.ok, outcome


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("cuts", CUTS)
def test_draws_have_the_distribution_on_a_gpu(cuts: dict[str, float]):
    assert distribution_is_right(CUDA, cuts)


@pytest.mark.gpu
@needs_gpu
def test_a_request_gives_the_same_token_in_any_batch():
    torch.manual_seed(0)
    request = {name: tensor.to(CUDA) for name, tensor in selftest.random_requests(200, 32_000).items()}
    together = kernels.sample(**request)
    order = torch.randperm(200, device=CUDA)
    assert torch.equal(kernels.sample(**{name: tensor[order] for name, tensor in request.items()}), together[order])
    for i in (5, 63, 199):
        alone = kernels.sample(**{name: tensor[i : i + 1] for name, tensor in request.items()})
        assert alone.tolist() == together[i : i + 1].tolist()
