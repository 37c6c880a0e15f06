"""The output head: the face on the CPU, which tile runs, and on a GPU logits that do not depend on the batch."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qoq import kernels
from qoq.kernels import head, selftest
from qoq.kernels.build import ARCHITECTURES
from qoq.kernels.cards import LIMITS

CUDA = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPES = ((128256, 4096), (32000, 576), (1003, 2048), (129, 8))  # V, K


@pytest.fixture
def poisoned() -> Iterator[None]:
    with selftest.poisoned_outputs():
        yield


def test_on_the_cpu_it_is_a_product_in_float32(poisoned: None):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64).half(), torch.randn(33, 64).half()
    logits = kernels.lm_head(x, weight)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, F.linear(x.float(), weight.float()))
    assert torch.equal(logits, kernels.lm_head(x, weight.float()))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 16), torch.zeros(8, 16).half(), "x: torch.float32 (2, 16), expected torch.float16 (*, *)"),
        (torch.zeros(2, 12).half(), torch.zeros(8, 12).half(), "x: rows of 12, expected a multiple of 8"),
        (torch.zeros(2, 0).half(), torch.zeros(8, 0).half(), "x: rows of 0, expected a multiple of 8"),
        (
            torch.zeros(2, 16).half(),
            torch.zeros(8, 24).half(),
            "weight: torch.float16 (8, 24), expected torch.float16 (*, 16)",
        ),
        (
            torch.zeros(2, 16).half(),
            torch.zeros(8, 16).bfloat16(),
            "weight: torch.bfloat16 (8, 16), expected torch.float16 (*, 16)",
        ),
        (
            torch.zeros(2, 16).half(),
            torch.zeros(16, 8).half().T,
            "weight: expected contiguous, at a multiple of 16 bytes",
        ),
    ],
)
def test_wrong_arguments_are_refused(x: Tensor, weight: Tensor, message: str):
    with pytest.raises(ValueError) as error:
        kernels.lm_head(x, weight)
    assert str(error.value) == message


def test_no_rows_is_no_error():
    assert kernels.lm_head(torch.zeros(0, 16).half(), torch.zeros(8, 16).half()).shape == (0, 8)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_number_of_tokens_has_a_tile(arch: str):
    limits = LIMITS[arch]
    compiled = [dict(one.defines) for one in head.SPECIALISATIONS if arch in one.architectures]
    assert len(compiled) == len(head.TILES)
    for tokens in (*range(1, 300), 1024, 100_000):
        defines = head.tile(tokens, limits)
        assert defines in compiled
        assert defines["STAGES"] >= 2 and defines["TOKENS"] >= min(tokens, 128)
        shared = head.LINE_BYTES * (defines["ROWS"] + defines["TOKENS"]) * defines["STAGES"]
        assert shared + 1024 <= limits.shared_bytes


def test_the_measure_of_errors_notices_one():
    """Of the size of a product that was left out, or of one NaN."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 64).half(), torch.randn(10, 64).half()
    exact = (x.double() @ weight.double().T).float()
    assert selftest.head_error(exact, x, weight) < 0.1
    wrong = exact.clone()
    wrong[1, 2] -= x[1, 5].float() * weight[2, 5].float()
    assert selftest.head_error(wrong, x, weight) > 100
    wrong[1, 2] = torch.nan
    assert selftest.head_error(wrong, x, weight) == torch.inf


# On a GPU


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("v", "k"), SHAPES)
def test_logits_do_not_depend_on_the_batch(v: int, k: int, poisoned: None):
    """Each row's bits are those it has alone, whatever the number of rows and its place among them."""
    torch.manual_seed(v)
    x, weight = torch.randn(1000, k).half().to(CUDA), (0.02 * torch.randn(v, k)).half().to(CUDA)
    alone = torch.cat([kernels.lm_head(x[i : i + 1], weight) for i in range(257)])
    for m in (1, 2, 7, 8, 9, 17, 33, 64, 65, 100, 128, 129, 200, 256, 1000):
        logits = kernels.lm_head(x[:m], weight)
        assert same_bits(logits[:257], alone[:m]), m
        order = torch.randperm(m, device=CUDA)
        assert same_bits(kernels.lm_head(x[:m][order], weight), logits[order]), m


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("m", [1, 8, 9, 30, 64, 100, 200])
@pytest.mark.parametrize(("v", "k"), [*SHAPES[1:], (32000, 4096), (264, 8192), (128, 32), (127, 24), (1, 64)])
def test_errors_are_below_those_of_torch(m: int, v: int, k: int, poisoned: None):
    torch.manual_seed(m)
    x, weight = torch.randn(m, k).half().to(CUDA), (0.02 * torch.randn(v, k)).half().to(CUDA)
    exact = x.double() @ weight.double().T
    error = (kernels.lm_head(x, weight).double() - exact).abs()
    rival = (F.linear(x, weight).double() - exact).abs()
    assert error.max() <= 2 * rival.max() + 1e-5
    assert error.mean() <= 0.5 * rival.mean() + 1e-6  # which rounds to float16


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("m", [1, 12, 100, 300])
def test_a_row_that_is_not_finite_touches_no_other(m: int, poisoned: None):
    torch.manual_seed(m)
    x, weight = torch.randn(m, 512).half().to(CUDA), torch.randn(3001, 512).half().to(CUDA)
    before = kernels.lm_head(x, weight)
    x[m // 2, 5], x[m - 1, 511] = torch.nan, torch.inf
    logits = kernels.lm_head(x, weight)
    touched = torch.zeros(m, dtype=torch.bool)
    touched[[m // 2, m - 1]] = True
    assert not logits[touched].isfinite().any()
    assert logits[m // 2].isnan().all()
    assert same_bits(logits[~touched], before[~touched])


@pytest.mark.gpu
@needs_gpu
def test_logits_in_a_graph_behind_another_kernel(poisoned: None):
    """The weight may be fetched before x is there, x must not."""
    torch.manual_seed(0)
    x, gain = torch.randn(70, 4096).half().to(CUDA), torch.randn(4096).half().to(CUDA)
    weight = (0.02 * torch.randn(5000, 4096)).half().to(CUDA)
    expected = kernels.lm_head(kernels.rmsnorm(x, gain, 1e-5), weight)
    static = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = kernels.lm_head(kernels.rmsnorm(static, gain, 1e-5), weight)
    for _ in range(3):
        static.copy_(x)
        graph.replay()
        assert same_bits(logits, expected)
        static.zero_()
        graph.replay()
        assert not logits.any()
