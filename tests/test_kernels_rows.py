"""Rows to int8: the faces on the CPU, what the kernel's blocks look like, and on a GPU the same integers."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_quant import golden
from torch import Tensor

from qoq import kernels, quant
from qoq.kernels import rows, selftest
from qoq.models import decoder

CUDA = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def poisoned() -> Iterator[None]:
    with selftest.poisoned_outputs():
        yield


def test_faces_on_the_cpu_are_the_specification():
    torch.manual_seed(0)
    x, gate_up = selftest.random_rows(9, 576), selftest.random_rows(9, 1152)
    weight, residual = torch.randn(576).half(), torch.randn(9, 576).half()
    assert selftest.wrong_rows(kernels.quant_rows(x), quant.quantize_rows(x)) == 0
    assert selftest.wrong_rows(kernels.silu_mul_quant(gate_up), quant.silu_mul_quant(gate_up)) == 0
    normed = quant.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(kernels.rmsnorm(x, weight, 1e-5), normed, rtol=0, atol=0, equal_nan=True)
    assert selftest.wrong_rows(kernels.rmsnorm_quant(x, weight, 1e-5), quant.quantize_rows(normed)) == 0

    stream = x.clone()
    out = kernels.rmsnorm_quant(stream, weight, 1e-5, residual)
    torch.testing.assert_close(stream, x + residual, rtol=0, atol=0, equal_nan=True)
    assert selftest.wrong_rows(out, quant.rmsnorm_quant(x + residual, weight, 1e-5)) == 0


def test_the_specification_is_what_the_decoder_computes():
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.float32, torch.float64):
        x, y, weight = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype), torch.randn(64)
        assert torch.equal(quant.rms_norm(x, weight, 1e-6), decoder.rms_norm(x, weight, 1e-6))
        assert torch.equal(quant.silu_mul(x, y), decoder.silu_mul(x, y))


def test_scales_are_rounded_divisions():
    """Not products with a reciprocal, which are off by a bit for one row in ten."""
    torch.manual_seed(0)
    x = torch.randn(2000, 8).half()
    amax = x.float().abs().amax(dim=1).numpy()
    inverse = np.float32(127) / amax
    out = quant.quantize_rows(x)
    assert np.array_equal(out.sx.numpy(), amax / np.float32(127))
    assert np.array_equal(out.x8.numpy(), np.rint(x.float().numpy() * inverse[:, None]).astype(np.int8))


def test_every_width_has_a_block():
    for width in range(8, rows.MAX_WIDTH + 1, 8):
        vectors, most, threads = rows.block(width)
        assert threads % rows.WARP == 0 and threads <= most
        assert (vectors - 1) * threads * 8 <= width <= vectors * threads * 8, width


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 16), "x: torch.float32 (2, 16), expected torch.float16 (*, *)"),
        (torch.zeros(16).half(), "x: torch.float16 (16,), expected torch.float16 (*, *)"),
        (torch.zeros(2, 12).half(), "x: rows of 12, expected a multiple of 8 up to 53504"),
        (torch.zeros(1, 53512).half(), "x: rows of 53512, expected a multiple of 8 up to 53504"),
        (torch.zeros(32, 8).half().T, "x: expected contiguous, at a multiple of 16 bytes"),
        (torch.zeros(17).half()[1:].view(2, 8), "x: expected contiguous, at a multiple of 16 bytes"),
    ],
)
def test_wrong_rows_are_refused(x: Tensor, message: str):
    with pytest.raises(ValueError) as error:
        kernels.quant_rows(x)
    assert str(error.value) == message


def test_wrong_norm_arguments_are_refused():
    x, weight = torch.zeros(2, 16).half(), torch.zeros(16).half()
    with pytest.raises(ValueError, match=r"weight: torch.float16 \(8,\), expected torch.float16 \(16\)"):
        kernels.rmsnorm(x, weight[:8], 1e-5)
    with pytest.raises(ValueError, match=r"residual: torch.float16 \(1, 16\), expected torch.float16 \(2, 16\)"):
        kernels.rmsnorm_quant(x, weight, 1e-5, x[:1])
    with pytest.raises(ValueError, match=r"gate_up: torch.float16 \(2, 17\), expected torch.float16 \(\*, 16\)"):
        kernels.silu_mul_quant(torch.zeros(2, 17).half())
    with pytest.raises(ValueError, match="x: rows of 16392, expected a multiple of 8 up to 16384"):
        kernels.rmsnorm(torch.zeros(1, 16392).half(), torch.zeros(16392).half(), 1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param(CUDA, marks=[pytest.mark.gpu, needs_gpu])])
def test_rows_in_parts_are_rows_one_behind_the_other(device: str, poisoned: None):
    torch.manual_seed(3)
    x = selftest.random_rows(12, 40).to(device)
    for counts in ((12,), (5, 7), (1, 0, 11)):
        assert selftest.wrong_rows(kernels.quant_rows(*x.split(counts)), quant.quantize_rows(x.cpu())) == 0
    with pytest.raises(ValueError, match=r"x: torch.float16 \(2, 48\), expected torch.float16 \(\*, 40\)"):
        kernels.quant_rows(x, torch.zeros(2, 48, device=device).half())


def test_no_rows_is_no_error():
    out = kernels.quant_rows(torch.zeros(0, 16).half())
    assert out.x8.shape == (0, 16) and out.sx.shape == (0,) and out.sums.shape == (0,)


@pytest.mark.parametrize(("name", "check"), [pair for pair in selftest.CHECKS if pair[0] != "sample"])
def test_checks_hold_for_the_specification(name: str, check: selftest.Check, poisoned: None):
    torch.manual_seed(0)
    assert check(torch.device("cpu")).ok, name


# On a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "check"), [pair for pair in selftest.CHECKS if pair[0] != "sample"])
def test_kernels_agree_with_the_specification(name: str, check: selftest.Check, seed: int, poisoned: None):
    torch.manual_seed(seed)
    outcome = check(CUDA)
    assert outcome.ok, f"{name}: {outcome}"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["w4a8_g128", "w4a8_g64", "w4a8_channel"])
def test_golden_activations(name: str, poisoned: None):
    g = golden(name)
    out = kernels.quant_rows(g["x"].to(CUDA))
    assert torch.equal(out.x8.cpu(), g["x8"])
    assert torch.equal(out.sx.cpu(), g["sx"])
    assert torch.equal(out.sums.cpu(), g["Sx"])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("width", [16, 2048, 2056, 4096, 11008, 16384, 16392, 28672, 32768, 32776, 53248, 53504])
def test_every_block_shape_on_a_gpu(width: int, poisoned: None):
    torch.manual_seed(width)
    x, gate_up = selftest.random_rows(9, width), selftest.random_rows(2, 2 * width)
    assert selftest.wrong_rows(kernels.quant_rows(x.to(CUDA)), quant.quantize_rows(x)) == 0
    out = kernels.silu_mul_quant(gate_up.to(CUDA))
    assert torch.equal(out.sums, out.x8.sum(dim=1, dtype=torch.int32))


@pytest.mark.gpu
@needs_gpu
def test_a_row_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    x, weight = torch.randn(300, 4096).half().to(CUDA), torch.randn(4096).half().to(CUDA)
    together = kernels.rmsnorm(x.clone(), weight, 1e-5)
    for i in (0, 131, 299):
        assert torch.equal(kernels.rmsnorm(x[i : i + 1].clone(), weight, 1e-5), together[i : i + 1])


@pytest.mark.gpu
@needs_gpu
def test_rows_in_a_graph_and_on_another_stream():
    torch.manual_seed(0)
    x = torch.randn(7, 4096).half().to(CUDA)
    expected = kernels.quant_rows(x.clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        static = torch.zeros_like(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernels.quant_rows(static)
        static.copy_(x)
        graph.replay()
    torch.cuda.current_stream().wait_stream(stream)
    assert selftest.wrong_rows(out, expected) == 0


@pytest.mark.gpu
@needs_gpu
def test_more_rows_than_a_grid_has_in_y():
    x = torch.randn(70_000, 64).half()
    assert selftest.wrong_rows(kernels.quant_rows(x.to(CUDA)), quant.quantize_rows(x)) == 0
