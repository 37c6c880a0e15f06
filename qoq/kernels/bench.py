"""How fast every op runs on this machine's GPU at the shapes of a model (`qoq.kernels.timing` says how that is timed).

GEMMs are compared with a physical floor, from the card's data sheet, and with torch's own products; ops bound by
memory with a device copy. All are measured alike, in one run. Weights, caches and rows of many tokens come from device
memory, the small inputs of few tokens from L2, as in a model.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qoq import paged
from qoq.kernels import attention, head, kv_cache, rows, sampling, tiling
from qoq.kernels.attention import Workspace, kv4_append_decode, kv4_decode
from qoq.kernels.build import Specialisation
from qoq.kernels.cards import Card
from qoq.kernels.gemm import PackedWeight, gate_up_silu, w4a8_gemm
from qoq.kernels.head import lm_head
from qoq.kernels.kv_cache import CLIP_RATIOS, kv4_gather, rope_kv4_append
from qoq.kernels.rows import quant_rows, rmsnorm_quant, silu_mul_quant
from qoq.kernels.sampling import sample
from qoq.kernels.tiling import KERNELS, Config
from qoq.kernels.timing import Machine, microseconds
from qoq.models.decoder import KVTransform, Rope
from qoq.paged import PAGE, Layout
from qoq.quant import QuantizedRows, quantize_rows
from qoq.roofline import DataSheet, Dimensions, weight_bytes

logger = logging.getLogger(__name__)

ROW_TOKENS = (1, 64, 4096)
HEAD_TOKENS = (1, 16, 64, 128, 256)
SAMPLE_BATCHES = (1, 128)
PREFILL = 4096  # tokens appended or gathered at once
RIVALS = {"fp16": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}  # operands of torch's products


# What is measured


@dataclass(frozen=True)
class Plan:
    """What to measure: `tokens` are those of GEMMs, `batches` and `contexts` those of attention."""

    model: Dimensions
    group_size: int
    ops: Sequence[str]  # of MEASUREMENTS
    tokens: Sequence[int]
    batches: Sequence[int]
    contexts: Sequence[int]


# Results


@dataclass(frozen=True)
class Product:
    """A measured W4A8 GEMM, M tokens times W (N, K)."""

    linear: str
    M: int
    N: int
    K: int
    group_size: int
    config: Config
    us: float
    rivals: Mapping[str, float | None]  # of RIVALS: microseconds, None where there is no such product
    sheet: DataSheet | None

    @property
    def operations(self) -> int:
        return 2 * self.M * self.N * self.K

    @property
    def bytes(self) -> int:
        """That must move: x8, sx, sums, the weight, and the float16 output."""
        return self.M * self.K + 8 * self.M + weight_bytes(self.N, self.K, self.group_size) + 2 * self.M * self.N

    @property
    def tops(self) -> float:
        return 1e-6 * self.operations / self.us

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.operations / self.bytes

    @property
    def floor_us(self) -> float | None:
        return 1e6 * self.sheet.ideal.seconds(self.bytes, self.operations) if self.sheet else None

    def record(self) -> dict[str, Any]:
        """As JSON and CSV have it; `*_speedup` is torch's time over this one."""
        floor = self.floor_us
        return {
            "op": "w4a8_gemm",
            "linear": self.linear,
            "M": self.M,
            "N": self.N,
            "K": self.K,
            "us": round(self.us, 3),
            "tops": round(self.tops, 3),
            "gb_per_s": round(1e-3 * self.bytes / self.us, 2),
            "floor_us": floor and round(floor, 3),
            "floor_share": floor and round(floor / self.us, 4),
            **{f"{name}_us": us and round(us, 3) for name, us in self.rivals.items()},
            **{f"{name}_speedup": us and round(us / self.us, 3) for name, us in self.rivals.items()},
            "kernel": self.config.kernel,
            "tile_rows": self.config.rows,
            "tile_tokens": self.config.tokens,
            "stages": self.config.stages,
            "splits": self.config.splits,
            "tail": self.config.tail,
            "operations_per_byte": round(self.intensity, 3),
        }


@dataclass(frozen=True)
class Pass:
    """A measured op that is bound by memory."""

    op: str
    sizes: Mapping[str, int]
    bytes: int  # that must move
    us: float
    copy: float  # bytes/s of a device copy

    def record(self) -> dict[str, Any]:
        """As JSON and CSV have it."""
        return {
            "op": self.op,
            **self.sizes,
            "us": round(self.us, 3),
            "gb_per_s": round(1e-3 * self.bytes / self.us, 2),
            "copy_share": round(1e6 * self.bytes / self.us / self.copy, 4),
        }


# Compiling


def specialisations(plan: Plan, card: Card) -> list[Specialisation]:
    """What the ops of a plan ask for on a card."""
    found: list[Specialisation] = []
    if "gemm" in plan.ops:
        shapes = plan.model.linears().values()
        configs = [tiling.choose(card, m, n, k, plan.group_size) for n, k in shapes for m in plan.tokens]
        found += gemm_specialisations(configs, card, plan.group_size)
    if "swiglu" in plan.ops:
        n, k = plan.model.linears()["gate_up"]
        configs = [tiling.choose(card, m, n, k, plan.group_size) for m in plan.tokens]
        for swiglu in (False, True) if KERNELS[card.limits.kernels[-1]].swiglu else (False,):
            found += gemm_specialisations(configs, card, plan.group_size, swiglu)
    if {"rows", "swiglu"} & {*plan.ops}:
        found += rows.SPECIALISATIONS
    if "attention" in plan.ops:
        layout = {"HEAD_DIM": plan.model.head_dim, "BITS": 4}
        each = (*kv_cache.SPECIALISATIONS, *attention.SPECIALISATIONS)
        found += [one for one in each if layout.items() <= one.defines.items()]
    if "head" in plan.ops:
        defines = [head.tile(m, card.limits) for m in HEAD_TOKENS]
        found += [one for one in head.SPECIALISATIONS if one.defines in defines]
    if "sample" in plan.ops:
        found += sampling.SPECIALISATIONS
    return unique(one for one in found if card.architecture in one.architectures)


def gemm_specialisations(
    configs: Iterable[Config], card: Card, group_size: int, swiglu: bool = False
) -> list[Specialisation]:
    """What runs some configurations on a card."""
    kernels = ((KERNELS[config.kernel], launched) for config in configs for launched in config.launched)
    return unique(
        Specialisation(kernel.source, kernel.defines(config, group_size, swiglu), (card.architecture,))
        for kernel, config in kernels
    )


def unique(found: Iterable[Specialisation]) -> list[Specialisation]:
    return list({(one.source, *one.defines.items()): one for one in found}.values())


# GEMM


def random_weight(n: int, k: int, group_size: int, device: torch.device) -> PackedWeight:
    """A legal weight; its codes are uniform."""
    qweight = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8, device=device)
    s1 = torch.full((n,), 1e-3, dtype=torch.float16, device=device)
    if group_size == -1:
        return PackedWeight(qweight, s1, szero=8 * s1)
    s2 = torch.randint(1, 16, (k // group_size, n), dtype=torch.int8, device=device)
    return PackedWeight(qweight, s1, s2, -8 * s2)


def random_weights(n: int, k: int, group_size: int, machine: Machine) -> list[PackedWeight]:
    """As many as L2 cannot hold."""
    count = machine.copies(weight_bytes(n, k, group_size))
    return [random_weight(n, k, group_size, machine.device) for _ in range(count)]


def random_rows(m: int, k: int, device: torch.device) -> QuantizedRows:
    """A8 of what the rivals multiply, too."""
    return quantize_rows(torch.randn(m, k, device=device))


def random_matrix(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (n, k), dtype=dtype, device=device)
    return torch.randn(n, k, dtype=torch.float16, device=device).to(dtype)


def products(plan: Plan, machine: Machine) -> Iterator[Product]:
    """The linears of a layer, each at all numbers of tokens."""
    group_size, device = plan.group_size, machine.device
    for linear, (n, k) in plan.model.linears().items():
        weights = random_weights(n, k, group_size, machine)
        inputs = {m: random_rows(m, k, device) for m in plan.tokens}
        ours = {m: microseconds([partial(w4a8_gemm, x, w) for w in weights]) for m, x in inputs.items()}
        del weights  # rivals need the room
        rivals = {name: rival_times(dtype, n, k, plan.tokens, machine) for name, dtype in RIVALS.items()}
        for m in plan.tokens:
            config = tiling.choose(machine.card, m, n, k, group_size)
            theirs = {name: times[m] for name, times in rivals.items()}
            yield Product(linear, m, n, k, group_size, config, ours[m], theirs, machine.sheet)


def rival_times(dtype: torch.dtype, n: int, k: int, tokens: Iterable[int], machine: Machine) -> dict[int, float | None]:
    """Tokens -> microseconds of torch's product of operands of a type, None where this torch or card has none."""
    size = n * k * dtype.itemsize
    weights = [random_matrix(n, k, dtype, machine.device) for _ in range(machine.copies(size))]
    times: dict[int, float | None] = {}
    for m in tokens:
        try:
            times[m] = microseconds(rival_calls(random_matrix(m, k, dtype, machine.device), weights))
        except (RuntimeError, AttributeError) as error:
            logger.info("no torch product of %s at M = %d, N = %d, K = %d: %s", dtype, m, n, k, error)
            times[m] = None
    return times


def rival_calls(x: Tensor, weights: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
    """x (M, K) times each of weights (N, K), all of one type of RIVALS; FP8 with a scale for each tensor."""
    if x.dtype == torch.int8:
        return [partial(torch._int_mm, x, w.t()) for w in weights]
    if x.dtype == torch.float16:
        return [partial(torch.mm, x, w.t()) for w in weights]
    scales = {"scale_a": torch.ones((), device=x.device), "scale_b": torch.ones((), device=x.device)}
    scaled = partial(torch._scaled_mm, **scales, out_dtype=torch.float16, use_fast_accum=True)
    return [partial(scaled, x, w.t()) for w in weights]


# Rows, output head, sampling


def row_passes(plan: Plan, machine: Machine) -> Iterator[Pass]:
    hidden, inner, device = plan.model.hidden_size, plan.model.intermediate_size, machine.device
    weight = torch.randn(hidden, device=device).half()
    for m in ROW_TOKENS:
        results, size = 8 * m, m * hidden  # of sx and sums; of x8

        moved = 3 * size + results
        calls: list[Callable[[], object]] = [partial(quant_rows, x) for x in halves(machine, moved, m, hidden)]
        yield one_pass("quant_rows", {"tokens": m, "width": hidden}, moved, calls, machine)

        moved = 7 * size + results + 2 * hidden
        pairs = zip(halves(machine, moved, m, hidden), halves(machine, moved, m, hidden), strict=True)
        calls = [partial(rmsnorm_quant, x, weight, 1e-5, residual) for x, residual in pairs]
        yield one_pass("rmsnorm_quant + residual", {"tokens": m, "width": hidden}, moved, calls, machine)

        moved = 5 * m * inner + results
        calls = [partial(silu_mul_quant, x) for x in halves(machine, moved, m, 2 * inner)]
        yield one_pass("silu_mul_quant", {"tokens": m, "width": inner}, moved, calls, machine)


def swiglu_passes(plan: Plan, machine: Machine) -> Iterator[Pass]:
    """From gate_up's input to down's: SwiGLU behind the GEMM, and at its end where the card has a kernel for that."""
    (n, k), group_size = plan.model.linears()["gate_up"], plan.group_size
    weights = random_weights(n, k, group_size, machine)
    ways: dict[str, tuple[Callable[..., object], int]] = {
        "w4a8_gemm, silu_mul_quant": (lambda x, w: silu_mul_quant(w4a8_gemm(x, w)), 4 * n)
    }
    if KERNELS[machine.card.limits.kernels[-1]].swiglu:
        ways["gate_up_silu, quant_rows"] = (lambda x, w: quant_rows(gate_up_silu(x, w)), 2 * n)
    for m in plan.tokens:
        x = random_rows(m, k, machine.device)
        for name, (way, half_bytes) in ways.items():
            moved = weight_bytes(n, k, group_size) + m * (k + half_bytes + n // 2 + 16)
            calls = [partial(way, x, weight) for weight in weights]
            yield one_pass(name, {"tokens": m, "width": n // 2}, moved, calls, machine)


def head_passes(plan: Plan, machine: Machine) -> Iterator[Pass]:
    """The output head, then torch's product, whose logits are float16."""
    vocabulary, hidden = plan.model.vocab_size, plan.model.hidden_size
    size = 2 * vocabulary * hidden
    weights = [random_matrix(vocabulary, hidden, torch.float16, machine.device) for _ in range(machine.copies(size))]
    for name, op, logit_bytes in (("lm_head", lm_head, 4), ("lm_head, torch fp16", F.linear, 2)):
        for m in HEAD_TOKENS:
            moved = size + 2 * m * hidden + logit_bytes * m * vocabulary
            x = random_matrix(m, hidden, torch.float16, machine.device)
            sizes = {"tokens": m, "vocabulary": vocabulary, "width": hidden}
            yield one_pass(name, sizes, moved, [partial(op, x, weight) for weight in weights], machine)


def sample_passes(plan: Plan, machine: Machine) -> Iterator[Pass]:
    vocabulary, device = plan.model.vocab_size, machine.device
    for batch in SAMPLE_BATCHES:
        moved, ids = 2 * batch * vocabulary, torch.arange(batch, device=device)  # seeds and positions
        for name, temperature, top_k, top_p in (("greedy", 0.0, 0, 1.0), ("top-k 50, top-p 0.9", 0.8, 50, 0.9)):
            cuts = (
                torch.full((batch,), temperature, device=device),
                torch.full((batch,), top_k, dtype=torch.int32, device=device),
                torch.full((batch,), top_p, device=device),
                torch.zeros(batch, device=device),
            )
            logits = halves(machine, moved, batch, vocabulary)
            calls = [partial(sample, 3 * each, *cuts, ids, ids) for each in logits]
            yield one_pass(f"sample, {name}", {"batch": batch, "vocabulary": vocabulary}, moved, calls, machine)


def one_pass(
    op: str, sizes: Mapping[str, int], moved: int, calls: Sequence[Callable[[], object]], machine: Machine
) -> Pass:
    return Pass(op, sizes, moved, microseconds(calls), machine.copy)


def halves(machine: Machine, moved: int, m: int, k: int) -> Sequence[Tensor]:
    """Random (m, k) float16 for as many calls as it takes to leave L2, when each moves so many bytes."""
    return torch.randn(machine.copies(moved), m, k, dtype=torch.float16, device=machine.device).unbind()


# Attention


def attention_passes(plan: Plan, machine: Machine) -> Iterator[Pass]:
    """Append, gather and decode over one paged cache that L2 cannot hold, its pages in random order."""
    model, device, layout = plan.model, machine.device, Layout(plan.model.head_dim)
    token_bytes = model.num_kv_heads * layout.record_bytes // PAGE
    cases = [(batch, context) for batch in plan.batches for context in plan.contexts]
    sets = {case: machine.copies(case[0] * case[1] * token_bytes) for case in (*cases, (1, PREFILL))}
    pages = max(count * batch * pages_of(context) for (batch, context), count in sets.items())
    pages = max(pages, *plan.batches)  # an appended token of each sequence has a page
    cache = random_cache(pages, model.num_kv_heads, layout, device)
    v_offset = 0.1 * torch.randn(model.num_kv_heads, layout.head_dim, device=device).half()

    def tables(count: int, batch: int, context: int) -> Sequence[Tensor]:
        """Block tables without a common page, (batch, pages) int32 each."""
        used = count * batch * pages_of(context)
        return torch.randperm(pages, device=device)[:used].int().view(count, batch, -1).unbind()

    transform = KVTransform(True, v_offset.clone(), v_offset)
    rope = random_rope(max(PREFILL, *plan.contexts), layout, device)
    for tokens in sorted({*plan.batches, PREFILL}):
        yield append_pass(tokens, cache, rope, layout, transform, plan, machine)

    moved = PREFILL * (token_bytes + 4 * model.num_kv_heads * layout.head_dim)
    starts = torch.tensor([0, PREFILL], dtype=torch.int32, device=device)
    gather = partial(kv4_gather, cache, layout, starts=starts, rows=PREFILL, v_offset=v_offset)
    gathers = [partial(gather, table) for table in tables(sets[1, PREFILL], 1, PREFILL)]
    yield one_pass("kv4_gather", {"tokens": PREFILL}, moved, gathers, machine)

    scale, width = layout.head_dim**-0.5, (model.num_heads + 2 * model.num_kv_heads) * layout.head_dim
    for batch, context in cases:
        q = torch.randn(batch, model.num_heads, layout.head_dim, dtype=torch.float16, device=device)
        qkv = torch.randn(batch, width, dtype=torch.float16, device=device)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        workspace = Workspace.of(batch, model.num_heads, model.num_kv_heads, layout.head_dim, pages_of(context), device)
        places, moved = tables(sets[batch, context], batch, context), batch * context * token_bytes
        decode = partial(kv4_decode, scale=scale, v_offset=v_offset, workspace=workspace)
        calls = [partial(decode, q, cache, layout, table, lengths) for table in places]
        yield one_pass("kv4_decode", {"batch": batch, "context": context}, moved, calls, machine)
        both = partial(kv4_append_decode, scale=scale, clip_ratios=CLIP_RATIOS, workspace=workspace)
        calls = [partial(both, qkv, rope, cache, layout, transform, table, lengths) for table in places]
        moved += 2 * qkv.numel()
        yield one_pass("kv4_append_decode", {"batch": batch, "context": context}, moved, calls, machine)


def append_pass(
    tokens: int, cache: Tensor, rope: Rope, layout: Layout, transform: KVTransform, plan: Plan, machine: Machine
) -> Pass:
    """PREFILL tokens are of one prompt, others of a sequence each."""
    model, device, (pages, _, record_bytes) = plan.model, machine.device, cache.shape
    q_bytes, kv_bytes = (2 * heads * layout.head_dim for heads in (model.num_heads, 2 * model.num_kv_heads))
    stored = model.num_kv_heads * record_bytes // PAGE
    moved = tokens * (2 * q_bytes + kv_bytes + stored + 4 * layout.head_dim + 16)  # of cos and sin; position and slot
    index = torch.arange(tokens, device=device)
    calls = []
    for qkv in halves(machine, moved, tokens, (q_bytes + kv_bytes) // 2):
        order = torch.randperm(pages, device=device)
        if tokens == PREFILL:
            positions, slots = index, order[index // PAGE] * PAGE + index % PAGE
        else:
            positions = torch.randint(len(rope[0]), (tokens,), device=device)
            slots = order[index] * PAGE + positions % PAGE
        calls.append(partial(rope_kv4_append, qkv, rope, positions, slots, cache, layout, transform, CLIP_RATIOS))
    return one_pass("rope_kv4_append", {"tokens": tokens}, moved, calls, machine)


def pages_of(context: int) -> int:
    return -(-context // PAGE)


def random_cache(pages: int, kv_heads: int, layout: Layout, device: torch.device) -> Tensor:
    """Uniform codes on grids around zero."""
    shape = pages, kv_heads, layout.record_bytes
    cache = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    for side in paged.sides(cache, layout):
        assert side.grids is not None
        side.grids[..., 0].uniform_(0.1, 0.2)
        side.grids[..., 1].uniform_(-1.5, -0.75)
    return cache


def random_rope(positions: int, layout: Layout, device: torch.device) -> Rope:
    """cos and sin (positions, D/2) float32 of random angles."""
    angles = torch.rand(positions, layout.head_dim // 2, device=device) * 2 * torch.pi
    return angles.cos(), angles.sin()


MEASUREMENTS: dict[str, Callable[[Plan, Machine], Iterator[Product | Pass]]] = {
    "gemm": products,
    "rows": row_passes,
    "swiglu": swiglu_passes,
    "attention": attention_passes,
    "head": head_passes,
    "sample": sample_passes,
}
