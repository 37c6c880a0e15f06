"""A8 of whole rows: activations to int8, alone or behind the norm or the SwiGLU that makes them (csrc/rows.cu)."""

import torch
from torch import Tensor

from qoq import quant
from qoq.kernels.build import Specialisation, module
from qoq.kernels.library import expect, register
from qoq.quant import QuantizedRows

# (VECTORS, THREADS): vectors of 8 values in a thread, and threads in a block at most. Few vectors for short rows, so
# that a single row is soon read; more for longer ones, so that several blocks fit a multiprocessor.
SHAPES = ((1, 256), (2, 256), (4, 512), (8, 512), (11, 608))
MAX_NORM_WIDTH, MAX_WIDTH = (8 * vectors * threads for vectors, threads in (SHAPES[2], SHAPES[-1]))
WARP = 32

SPECIALISATIONS = tuple(
    Specialisation("rows.cu", {"VECTORS": vectors, "THREADS": threads}, expected=(r"LDG\.E\.128",))
    for vectors, threads in SHAPES
)


def block(width: int) -> tuple[int, int, int]:
    """What makes a row of `width` values: VECTORS, THREADS, and how many threads start."""
    vectors, most = next(shape for shape in SHAPES if 8 * shape[0] * shape[1] >= width)
    return vectors, most, -(-width // (8 * vectors * WARP)) * WARP


def _launch(name: str, rows: Tensor, args: tuple[Tensor | float | None, ...]) -> None:
    """One block for each row of `rows`, (M, K), whose width K ends the kernel's arguments."""
    count, width = rows.shape
    vectors, most, threads = block(width)
    kernels = module("rows.cu", rows.device, {"VECTORS": vectors, "THREADS": most})
    kernels.launch(name, (count, 1, 1), threads, (*args, width))


def _write(rows: QuantizedRows, x8: Tensor, sx: Tensor, sums: Tensor) -> None:
    x8.copy_(rows.x8)
    sx.copy_(rows.sx)
    sums.copy_(rows.sums)


def _quant_rows_cuda(x: Tensor, x8: Tensor, sx: Tensor, sums: Tensor) -> None:
    _launch("quant_rows", x, (x, x8, sx, sums))


def _quant_rows_cpu(x: Tensor, x8: Tensor, sx: Tensor, sums: Tensor) -> None:
    _write(quant.quantize_rows(x), x8, sx, sums)


def _rmsnorm_cuda(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, y: Tensor) -> None:
    _launch("rmsnorm", x, (x, residual, weight, eps, y))


def _rmsnorm_cpu(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, y: Tensor) -> None:
    y.copy_(quant.rms_norm(x if residual is None else x.add_(residual), weight, eps))


def _rmsnorm_quant_cuda(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, x8: Tensor, sx: Tensor, sums: Tensor
) -> None:
    _launch("rmsnorm_quant", x, (x, residual, weight, eps, x8, sx, sums))


def _rmsnorm_quant_cpu(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, x8: Tensor, sx: Tensor, sums: Tensor
) -> None:
    _write(quant.rmsnorm_quant(x if residual is None else x.add_(residual), weight, eps), x8, sx, sums)


def _silu_mul_quant_cuda(gate_up: Tensor, x8: Tensor, sx: Tensor, sums: Tensor) -> None:
    _launch("silu_mul_quant", x8, (gate_up, x8, sx, sums))


def _silu_mul_quant_cpu(gate_up: Tensor, x8: Tensor, sx: Tensor, sums: Tensor) -> None:
    _write(quant.silu_mul_quant(gate_up), x8, sx, sums)


_quant_rows = register(
    "quant_rows(Tensor x, Tensor(a!) x8, Tensor(b!) sx, Tensor(c!) sums) -> ()",
    cuda=_quant_rows_cuda,
    cpu=_quant_rows_cpu,
)
_rmsnorm = register(
    "rmsnorm(Tensor(a!) x, Tensor weight, float eps, Tensor? residual, Tensor(b!) y) -> ()",
    cuda=_rmsnorm_cuda,
    cpu=_rmsnorm_cpu,
)
_rmsnorm_quant = register(
    "rmsnorm_quant(Tensor(a!) x, Tensor weight, float eps, Tensor? residual,"
    " Tensor(b!) x8, Tensor(c!) sx, Tensor(d!) sums) -> ()",
    cuda=_rmsnorm_quant_cuda,
    cpu=_rmsnorm_quant_cpu,
)
_silu_mul_quant = register(
    "silu_mul_quant(Tensor gate_up, Tensor(a!) x8, Tensor(b!) sx, Tensor(c!) sums) -> ()",
    cuda=_silu_mul_quant_cuda,
    cpu=_silu_mul_quant_cpu,
)


def _check_rows(name: str, x: Tensor, width: int, widest: int) -> None:
    expect(name, x, torch.float16, (None, None))
    if width % 8 != 0 or not 0 < width <= widest:
        raise ValueError(f"{name}: rows of {width}, expected a multiple of 8 up to {widest}")


def _empty_rows(count: int, width: int, device: torch.device) -> QuantizedRows:
    return QuantizedRows(
        torch.empty(count, width, dtype=torch.int8, device=device),
        torch.empty(count, dtype=torch.float32, device=device),
        torch.empty(count, dtype=torch.int32, device=device),
    )


def quant_rows(*parts: Tensor) -> QuantizedRows:
    """A8 of x (M, K) float16, K % 8 == 0; of several x, their rows one behind the other."""
    first = parts[0]
    _check_rows("x", first, first.shape[-1], MAX_WIDTH)
    for x in parts[1:]:
        expect("x", x, torch.float16, (None, first.shape[1]), like=first)
    counts = [len(x) for x in parts]
    out = _empty_rows(sum(counts), first.shape[1], first.device)
    outputs = (each.split(counts) for each in (out.x8, out.sx, out.sums))
    for x, *own in zip(parts, *outputs, strict=True):
        _quant_rows(x, *own)
    return out


def _check_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    _check_rows("x", x, x.shape[-1], MAX_NORM_WIDTH)
    expect("weight", weight, torch.float16, x.shape[1:], like=x)
    if residual is not None:
        expect("residual", residual, torch.float16, x.shape, like=x)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """The norm of x (M, K) float16 with weight (K,) float16 -> (M, K) float16.

    With a `residual` (M, K) float16, x += residual first, in place: x is the residual stream.
    """
    _check_norm(x, weight, residual)
    y = torch.empty_like(x)
    _rmsnorm(x, weight, eps, residual, y)
    return y


def rmsnorm_quant(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> QuantizedRows:
    """A8 of `rmsnorm`, with the same effect on x."""
    _check_norm(x, weight, residual)
    out = _empty_rows(len(x), x.shape[1], x.device)
    _rmsnorm_quant(x, weight, eps, residual, out.x8, out.sx, out.sums)
    return out


def silu_mul_quant(gate_up: Tensor) -> QuantizedRows:
    """A8 of silu(gate) * up (M, K), where gate_up (M, 2K) float16 holds the gate in its first half; K % 8 == 0."""
    width = gate_up.shape[-1] // 2
    _check_rows("gate_up", gate_up, width, MAX_WIDTH)
    expect("gate_up", gate_up, torch.float16, (None, 2 * width))
    out = _empty_rows(len(gate_up), width, gate_up.device)
    _silu_mul_quant(gate_up, out.x8, out.sx, out.sums)
    return out
