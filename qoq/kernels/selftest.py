"""Run every op on this machine's GPU against its specification on the CPU: `python -m qoq.kernels.selftest`.

Prints a line for each op and exits with 1 if one is wrong. Inputs are random and hold what breaks kernels: odd sizes,
zero rows, NaN and infinities, ties. Outputs are filled with NaN or the largest integer beforehand.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from qoq import kernels, packing, paged, quant, sampling
from qoq.errors import KernelError
from qoq.kernels import build, gemm, tiling
from qoq.kernels.cards import card_of
from qoq.kernels.gemm import PackedWeight
from qoq.kernels.kv_cache import CLIP_RATIOS, LAYOUTS
from qoq.kernels.tiling import Config
from qoq.models.decoder import KVTransform
from qoq.paged import Layout
from qoq.quant import QuantizedLinear, QuantizedRows

WIDTHS = (8, 576, 4096, 4104, 14336)  # of rows
VOCABULARIES = (5, 1001, 32000, 128256)


@dataclass(frozen=True)
class Outcome:
    """What a check found. `error` is in the unit that `bound` has; integers must be equal, so both are 0."""

    cases: int
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


Check = Callable[[torch.device], Outcome]


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill whatever torch.empty gives with NaN or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fill_uninitialized_memory is on by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# Rows


def random_rows(count: int, width: int) -> Tensor:
    """(count, width) float16 of very different scales; if there are 8 or more, some of them special."""
    x = torch.randn(count, width) * torch.exp2(torch.randint(-20, 8, (count, 1)).float())
    if count >= 8:
        x[1] = 0
        x[2, width // 2] = torch.nan
        x[3, width - 1] = -torch.inf
        x[4] = torch.randint(-254, 255, (width,)) / 2  # codes and a half: ties
        x[4, 0] = 127
        x[5] = 2.0**-24  # subnormal
        x[6, 0] = 65504
    return x.to(torch.float16)


def wrong_rows(out: QuantizedRows, expected: QuantizedRows) -> int:
    """How many values differ; NaN equals NaN."""
    pairs = zip(vars(out).values(), vars(expected).values(), strict=True)
    return sum(int(((a.cpu() != b.cpu()) & ~(a.cpu().isnan() & b.cpu().isnan())).sum()) for a, b in pairs)


def check_quant_rows(device: torch.device) -> Outcome:
    """x8, sx and sums are equal."""
    wrong = 0
    for count in (1, 9):
        for width in WIDTHS:
            x = random_rows(count, width)
            wrong += wrong_rows(kernels.quant_rows(x.to(device)), quant.quantize_rows(x))
    return Outcome(2 * len(WIDTHS), wrong, 0)


def norm_error(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> float:
    """The largest error of y against float64, in units of half a step of fp16 (1 is a correct rounding)."""
    exact = quant.rms_norm(x.double(), weight.double(), eps)
    finite = exact.isfinite() & (exact.abs() < 65504)
    step = torch.exp2(exact.abs().clamp(min=quant.SMALLEST_NORMAL_FP16).log2().floor() - 10)
    if not torch.equal(y.cpu().isfinite() & finite, finite):
        return torch.inf
    return float(((y.cpu().double() - exact).abs() / (step / 2))[finite].max())


def check_rmsnorm(device: torch.device) -> Outcome:
    """Within one rounding to fp16, and x += residual is exact."""
    worst = 0.0
    for width in WIDTHS:
        x, residual, weight = random_rows(9, width), random_rows(9, width), torch.randn(width).half()
        stream = x.clone().to(device)
        y = kernels.rmsnorm(stream, weight.to(device), 1e-5, residual.to(device))
        total = x + residual
        if not torch.equal(stream.cpu().nan_to_num(), total.nan_to_num()):
            worst = torch.inf
        worst = max(worst, norm_error(y, total, weight, 1e-5))
        alone = kernels.rmsnorm(x.to(device), weight.to(device), 1e-5)
        worst = max(worst, norm_error(alone, x, weight, 1e-5))
    return Outcome(2 * len(WIDTHS), worst, 1.01)


def check_rmsnorm_quant(device: torch.device) -> Outcome:
    """Equal to quantizing what rmsnorm gives."""
    wrong = 0
    for width in WIDTHS:
        x, residual = random_rows(9, width).to(device), random_rows(9, width).to(device)
        weight = torch.randn(width).half().to(device)
        y = kernels.rmsnorm(x.clone(), weight, 1e-5, residual)
        out = kernels.rmsnorm_quant(x, weight, 1e-5, residual)
        wrong += wrong_rows(out, quant.quantize_rows(y.cpu()))
    return Outcome(len(WIDTHS), wrong, 0)


def check_silu_mul_quant(device: torch.device) -> Outcome:
    """Codes within 1, scales within 2^-10, NaN where expected; sums are those of the codes."""
    worst = 0.0
    for width in WIDTHS:
        gate_up = random_rows(9, 2 * width)
        out, expected = kernels.silu_mul_quant(gate_up.to(device)), quant.silu_mul_quant(gate_up)
        if not torch.equal(out.sums, out.x8.sum(dim=1, dtype=torch.int32)):
            worst = torch.inf
        sx = out.sx.cpu()
        if not torch.allclose(sx, expected.sx, rtol=2**-10, atol=2**-24 / 127, equal_nan=True):
            worst = torch.inf
        off = (out.x8.cpu().int() - expected.x8.int()).abs().amax(dim=1)
        coarse = expected.sx < 2**-14  # a last bit of fp16 is then more than a code
        worst = max(worst, float(off[~coarse].max()))
    return Outcome(len(WIDTHS), worst, 1)


# GEMM


def gemm_configs(device: torch.device, m: int, n: int, k: int, group_size: int) -> Iterator[Config | None]:
    """What is chosen, and on a GPU the smallest and the largest tile of each kernel, alone and shared by two blocks."""
    yield None
    if device.type == "cuda":
        card = card_of(device)
        for kernel in card.limits.kernels:
            smallest, *_, largest = tiling.configs(kernel, card, group_size)
            for tile in (smallest, largest):
                yield from islice(tiling.splits(tile, card, m, n, k, group_size), 2)


def check_w4a8_gemm(device: torch.device) -> Outcome:
    """Equal bits, with bias and residual, for each grouping and kernel."""
    wrong, cases, n = 0, 0, 288
    for group_size, k in ((128, 4096), (64, 576), (-1, 1056)):
        weight, bias = quant.round_to_nearest(torch.randn(n, k), group_size), torch.randn(n).half()
        packed = PackedWeight.pack(weight).to(device)
        for m in (1, 9, 100):
            rows, residual = quant.quantize_rows(random_rows(m, k)), torch.randn(m, n).half()
            expected = residual + QuantizedLinear(weight, bias).multiply(rows)
            moved = QuantizedRows(*(x.to(device) for x in vars(rows).values()))
            for config in gemm_configs(device, m, n, k, group_size):
                out = kernels.w4a8_gemm(moved, packed, bias.to(device), residual.to(device), config).cpu()
                wrong += int(((out != expected) & ~(out.isnan() & expected.isnan())).sum())
                cases += 1
    return Outcome(cases, wrong, 0)


def check_gate_up_silu(device: torch.device) -> Outcome:
    """Quantized, equal to `silu_mul_quant` of what `w4a8_gemm` gives; only where there is a kernel for it."""
    wrong, cases, n = 0, 0, 448
    if device.type == "cuda" and not gemm.fuses_swiglu(device):
        return Outcome(0, 0, 0)
    for group_size, k in ((128, 4096), (64, 576), (-1, 1056)):
        weight = quant.round_to_nearest(torch.randn(n, k), group_size)
        bias, packed = torch.randn(n).half().to(device), PackedWeight.pack(weight).to(device)
        interleaved, its_bias = packed.interleaved(), packing.interleave_rows(bias)
        for m in (1, 9, 100):
            rows = QuantizedRows(*(x.to(device) for x in vars(quant.quantize_rows(random_rows(m, k))).values()))
            expected = kernels.silu_mul_quant(kernels.w4a8_gemm(rows, packed, bias))
            for config in gemm_configs(device, m, n, k, group_size):
                if config is None or tiling.KERNELS[config.kernel].swiglu:
                    y = kernels.gate_up_silu(rows, interleaved, its_bias, config)
                    wrong += wrong_rows(kernels.quant_rows(y), expected)
                    cases += 1
    return Outcome(cases, wrong, 0)


# Output head


def check_lm_head(device: torch.device) -> Outcome:
    """The error against float64, in units of what rounding in fp32 may do; on a GPU a row alone has the same bits."""
    worst, cases = 0.0, 0
    for v, k in ((1000, 4096), (133, 576), (7, 8)):
        weight = torch.randn(v, k).half()
        for m in (1, 9, 100, 200):
            x = random_rows(m, k)
            logits = kernels.lm_head(x.to(device), weight.to(device))
            worst, cases = max(worst, head_error(logits, x, weight)), cases + 1
            if device.type == "cuda":
                alone = kernels.lm_head(x[-1:].to(device), weight.to(device))
                if not torch.equal(alone.view(torch.int32), logits[-1:].view(torch.int32)):
                    worst = torch.inf
    return Outcome(cases, worst, 1)


def head_error(logits: Tensor, x: Tensor, weight: Tensor) -> float:
    """The largest error of logits against float64, where that is finite; elsewhere they must not be finite either.

    The unit is that of K / 16 sums of 16 products, and of a few more, each sum cut to 23 bits; of products without
    their signs; and what tensor cores cut off sums of subnormals (2e-12 on an H100, cuBLAS alike).
    """
    exact = x.double() @ weight.double().T
    finite, k = exact.isfinite(), x.shape[1]
    if not torch.equal(logits.cpu().isfinite(), finite):
        return torch.inf
    unit = (k / 16 + 8) * 2**-23 * (x.double().abs() @ weight.double().abs().T) + 2**-38
    return float(((logits.cpu().double() - exact).abs() / unit)[finite].max())


# Cache


def random_cache(layout: Layout, lengths: Sequence[int], device: str | torch.device) -> tuple[Tensor, ...]:
    """A cache of two KV heads filled by `rope_kv4_append`, its block table, its lengths, the queries (tokens, 8, D)."""
    pages = [-(-length // paged.PAGE) for length in lengths]
    block_tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    order, slots = iter(torch.randperm(sum(pages)).tolist()), []
    for table, length, count in zip(block_tables, lengths, pages, strict=True):
        table[:count] = torch.tensor([next(order) for _ in range(count)])
        token = torch.arange(length)
        slots.append(table[token // paged.PAGE].long() * paged.PAGE + token % paged.PAGE)
    angles = torch.rand(max(lengths), layout.head_dim // 2) * 6
    g = torch.Generator().manual_seed(len(lengths))
    qkv = torch.randn(sum(lengths), 12 * layout.head_dim, generator=g).half()
    cache = layout.allocate(sum(pages), 2, device)
    transform = KVTransform(True, *(torch.randn(2, layout.head_dim, generator=g).half().to(device) for _ in range(2)))
    q = kernels.rope_kv4_append(
        qkv.to(device),
        (angles.cos().to(device), angles.sin().to(device)),
        torch.cat([torch.arange(length) for length in lengths]).to(device),
        torch.cat(slots).to(device),
        cache,
        layout,
        transform,
        CLIP_RATIOS,
    )
    return cache, block_tables, torch.tensor(lengths, dtype=torch.int32), q


def check_rope_kv4_append(device: torch.device) -> Outcome:
    """Queries and every byte of the cache are equal."""
    wrong = 0
    for layout in LAYOUTS:
        made = []
        for where in ("cpu", device):
            torch.manual_seed(layout.head_dim)
            made.append(random_cache(layout, (70, 3, 128), where))
        wrong += sum(int((a.cpu() != b.cpu()).sum()) for a, b in zip(*made, strict=True))
    return Outcome(len(LAYOUTS), wrong, 0)


def check_kv4_decode(device: torch.device) -> Outcome:
    """Relative error against float64, of all queries of a sequence."""
    worst, lengths = 0.0, (1, 64, 65, 700, 3000)
    for layout in LAYOUTS:
        cache, block_tables, context_lens, q = random_cache(layout, lengths, device)
        last = q[context_lens.cumsum(0).to(device) - 1]
        arguments = last, cache, layout, block_tables.to(device), context_lens.to(device), layout.head_dim**-0.5
        out, exact = kernels.kv4_decode(*arguments).double(), paged.attention(*arguments)
        worst = max(worst, float(((out - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).nan_to_num(torch.inf).max()))
    return Outcome(len(LAYOUTS) * len(lengths), worst, 2e-3)


def check_kv4_append_decode(device: torch.device) -> Outcome:
    """Outputs and every byte of the cache are those of `rope_kv4_append` and `kv4_decode`."""
    wrong, lengths = 0, (1, 64, 65, 700, 3000)
    for layout in LAYOUTS:
        one, block_tables, context_lens, _ = random_cache(layout, lengths, device)
        where, two = (block_tables.to(device), context_lens.to(device)), one.clone()
        angles = torch.rand(max(lengths), layout.head_dim // 2, device=device) * 6
        qkv = torch.randn(len(lengths), 12 * layout.head_dim).half().to(device)
        new, how = (qkv, (angles.cos(), angles.sin())), (layout, KVTransform(True))
        q = kernels.rope_kv4_append(*new, *paged.last_tokens(*where), one, *how)
        expected = kernels.kv4_decode(q, one, layout, *where, layout.head_dim**-0.5)
        found = kernels.kv4_append_decode(*new, two, *how, *where, layout.head_dim**-0.5)
        wrong += int((found != expected).sum()) + int((one != two).sum())
    return Outcome(len(LAYOUTS) * len(lengths), wrong, 0)


# Sampling


def random_requests(batch: int, vocabulary: int) -> dict[str, Tensor]:
    """Arguments of `sample`, float32 logits; some rows greedy, masked or unusable."""

    def one_of(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (batch,))]

    logits = torch.randn(batch, vocabulary) * one_of(0.5, 2.0, 6.0)[:, None]
    if batch >= 8:
        logits[1, vocabulary // 2] = torch.nan
        logits[2, : vocabulary // 2] = -torch.inf
        logits[3] = logits[3].round()  # ties
        logits[4] = -torch.inf
    return {
        "logits": logits,
        "temperature": one_of(0, 0.3, 0.7, 1, 1.5),
        "top_k": one_of(-1, 0, 1, 5, 50, 10**6).int(),
        "top_p": one_of(0, 0.1, 0.5, 0.9, 1, 1),
        "min_p": one_of(0, 0, 0.05, 0.3),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (batch,)),
        "positions": torch.randint(0, 2**40, (batch,)),
    }


def check_sample(device: torch.device) -> Outcome:
    """The same tokens but for rounding: at most 1 of 100 draws may differ."""
    different = cases = 0
    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.float16):
            request = random_requests(25, vocabulary)
            request["logits"] = request["logits"].to(dtype)
            tokens = kernels.sample(**{name: tensor.to(device) for name, tensor in request.items()})
            different += int((tokens.cpu() != sampling.sample(**request)).sum())
            cases += len(tokens)
    return Outcome(cases, different / cases, 1 / 100)


CHECKS: list[tuple[str, Check]] = [
    ("quant_rows", check_quant_rows),
    ("rmsnorm", check_rmsnorm),
    ("rmsnorm_quant", check_rmsnorm_quant),
    ("silu_mul_quant", check_silu_mul_quant),
    ("w4a8_gemm", check_w4a8_gemm),
    ("gate_up_silu", check_gate_up_silu),
    ("lm_head", check_lm_head),
    ("rope_kv4_append", check_rope_kv4_append),
    ("kv4_decode", check_kv4_decode),
    ("kv4_append_decode", check_kv4_append_decode),
    ("sample", check_sample),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qoq.kernels.selftest", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    torch.manual_seed(parser.parse_args().seed)
    device = torch.device("cuda", 0)
    try:
        arch = build.architecture(device)
        print(f"{torch.cuda.get_device_name(device)} ({arch})")
        good = True
        with poisoned_outputs():
            for name, check in CHECKS:
                outcome = check(device)
                good &= outcome.ok
                error = "equal" if outcome.error == 0 else f"error {outcome.error:.3g}, bound {outcome.bound:g}"
                print(f"{name:18}{outcome.cases:5} cases   {error:32}{'ok' if outcome.ok else 'WRONG'}", flush=True)
    except KernelError as error:
        print(f"selftest: {error}", file=sys.stderr)
        return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
