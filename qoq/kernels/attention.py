"""The paged KV cache on the GPU: append (csrc/append.cu), decode attention (csrc/decode.cu), gather (csrc/gather.cu).

On CPU tensors the same faces run the specification, `qoq.paged`. Appending gives the same bits on both, gathering
too; attention is compared with float64 within a bound that the tests state.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qoq import paged
from qoq.kernels.build import ARCHITECTURES, Specialisation, architecture, module
from qoq.kernels.library import expect, register
from qoq.models.decoder import KVTransform, Rope
from qoq.paged import PAGE, HeadNorms, Layout

WARP = 32
APPEND_WARPS, APPEND_TOKENS, GATHER_THREADS, GATHER_DIMS = 4, 4, 256, 8  # as in the sources
# Also as in decode.cu and common/kv_warp.cuh: pages that one block takes at most until a sequence has MAX_SPLITS
# splits, and limits.
SPLIT_PAGES, MAX_SPLITS, MAX_BATCH, COLUMNS = 32, 32, 1024, 8
STEP = 16  # tokens that a warp takes at once
MAX_STAGES = 4
# Shared memory of a multiprocessor, and what a block needs of it beside the rings.
SHARED_BYTES = {"sm_80": 164 << 10, "sm_87": 164 << 10, "sm_90a": 228 << 10, "sm_100": 228 << 10, "sm_103": 228 << 10}
LEAST_SHARED_BYTES = 100 << 10
BLOCK_BYTES = 6 << 10


# What is compiled


@dataclass(frozen=True)
class Tile:
    """How decode attention occupies a multiprocessor."""

    warps: int  # in a block
    stages: int  # of copies in a warp's ring
    blocks: int  # on a multiprocessor
    apart: bool  # results have their own memory, so that the next item's copies need not wait for them

    @staticmethod
    def of(layout: Layout, arch: str) -> "Tile":
        """Many warps where their registers and at least two stages fit; results apart where four stages remain."""
        shared = SHARED_BYTES.get(arch, LEAST_SHARED_BYTES)
        bits = layout.head_dim * layout.bits  # of a row: sums and queries take registers with it
        for warps, blocks, most in ((8, 2, 512), (4, 3, 1024), (4, 2, 2048), (2, 2, 4096), (2, 1, 4096)):
            room = (shared // blocks - BLOCK_BYTES) // warps
            stages, beside = room // stage_bytes(layout), (room - result_bytes(layout)) // stage_bytes(layout)
            if bits <= most and stages >= 2:
                apart = beside >= MAX_STAGES
                return Tile(warps, min(stages, MAX_STAGES), blocks, apart)
        raise AssertionError(f"{layout} does not fit {arch}")

    def shared_bytes(self, layout: Layout) -> int:
        """Dynamic: the rings, and what results take beside them."""
        return self.warps * (self.stages * stage_bytes(layout) + (result_bytes(layout) if self.apart else 0))


def stage_bytes(layout: Layout) -> int:
    """What a warp copies at once."""
    return layout.record_bytes * STEP // PAGE


def result_bytes(layout: Layout) -> int:
    """Of a warp's sums; 4 floats spread the banks."""
    return COLUMNS * (layout.head_dim + 4) * 4


def _layout_defines(layout: Layout) -> dict[str, int | str]:
    return {"HEAD_DIM": layout.head_dim, "BITS": layout.bits}


@cache
def _append_defines(layout: Layout, clip_ratios: tuple[float, ...]) -> dict[str, int | str]:
    """The ratios, and what each takes off either end of the range, in double precision until the last rounding."""

    def literals(values: list[float]) -> str:
        rounded = (struct.unpack("f", struct.pack("f", value))[0] for value in values)
        return ",".join(f"{value.hex()}f" for value in rounded)

    margins = [(1 - ratio) / 2 for ratio in clip_ratios]
    return _layout_defines(layout) | {"RATIOS": literals(list(clip_ratios)), "MARGINS": literals(margins)}


def _decode_defines(layout: Layout, tile: Tile) -> dict[str, int | str]:
    return _layout_defines(layout) | {
        "WARPS": tile.warps,
        "STAGES": tile.stages,
        "BLOCKS": tile.blocks,
        "APART": int(tile.apart),
    }


DECODE_CODE = (r"HMMA\.16816\.F32", r"LDSM\.16\.MT88\.4", r"MOVM\.16\.MT88", r"LDGSTS\.E\.BYPASS\.128")
CHECKED = (*(Layout(head_dim) for head_dim in paged.HEAD_DIMS), Layout(128, 8), Layout(128, 16))
SPECIALISATIONS = (
    *(Specialisation("append.cu", _append_defines(layout, (1, 0.96, 0.92, 0.88, 0.84))) for layout in CHECKED),
    *(Specialisation("gather.cu", _layout_defines(layout), expected=(r"STG\.E\.128",)) for layout in CHECKED),
    *(
        Specialisation("decode.cu", _decode_defines(layout, Tile.of(layout, arch)), (arch,), DECODE_CODE)
        for layout in CHECKED
        for arch in ARCHITECTURES
    ),
)


# Append


def rope_kv4_append(
    qkv: Tensor,
    tables: Rope,
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
    layout: Layout,
    transform: KVTransform,
    clip_ratios: Sequence[float] = (1.0,),
    norms: HeadNorms | None = None,
) -> Tensor:
    """QK-norm, RoPE, `transform`, quantization and storage of new tokens -> their queries (tokens, Hq, D) float16.

    The arguments are those of `paged.append`. Norms and offsets are float16; no two tokens share a slot.

    Raises:
        ValueError: an argument of a wrong shape, type or device.
    """
    kv_heads = _check_cache(cache, layout)
    head_dim, (cos, sin), tokens = layout.head_dim, tables, qkv.shape[0]
    expect("qkv", qkv, torch.float16, (None, None), like=cache)
    q_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    if qkv.shape[1] % head_dim != 0 or q_heads <= 0 or q_heads % kv_heads != 0:
        raise ValueError(f"qkv: rows of {qkv.shape[1]}, expected (Hq + 2 * {kv_heads}) * {head_dim}, whole groups")
    expect("cos", cos, torch.float32, (None, head_dim // 2), like=cache)
    expect("sin", sin, torch.float32, cos.shape, like=cache)
    expect("positions", positions, torch.int64, (tokens,), like=cache, alignment=8)
    expect("slots", slots, torch.int64, (tokens,), like=cache, alignment=8)
    for name, offset in (("k_offset", transform.k_offset), ("v_offset", transform.v_offset)):
        if offset is not None:
            expect(name, offset, torch.float16, (kv_heads, head_dim), like=cache)
    if norms is not None:
        expect("norms.q", norms.q, torch.float16, (head_dim,), like=cache)
        expect("norms.k", norms.k, torch.float16, (head_dim,), like=cache)
    if not clip_ratios:
        raise ValueError("clip_ratios: none, expected at least one")
    q = torch.empty(tokens, q_heads, head_dim, dtype=torch.float16, device=qkv.device)
    _append(
        qkv,
        cos,
        sin,
        positions,
        slots,
        transform.k_offset,
        transform.v_offset,
        transform.rotate,
        list(clip_ratios),
        norms.q if norms else None,
        norms.k if norms else None,
        norms.eps if norms else 0.0,
        layout.bits,
        cache,
        q,
    )
    return q


def _append_cuda(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_offset: Tensor | None,
    v_offset: Tensor | None,
    rotate: bool,
    clip_ratios: list[float],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    bits: int,
    cache: Tensor,
    q: Tensor,
) -> None:
    tokens, q_heads, head_dim = q.shape
    kv_heads = cache.shape[1]
    defines = _append_defines(Layout(head_dim, bits), tuple(clip_ratios))
    warps = -(-tokens // APPEND_TOKENS) * (q_heads + 2 * kv_heads)  # one head of APPEND_TOKENS tokens each
    blocks = -(-warps // APPEND_WARPS)
    offsets, norms = (k_offset, v_offset), (q_norm, k_norm)
    args = (qkv, cos, sin, positions, slots, *offsets, *norms, eps, rotate, cache, q, tokens, q_heads, kv_heads)
    module("append.cu", q.device, defines).launch("rope_kv_append", (blocks, 1, 1), APPEND_WARPS * WARP, args)


def _append_cpu(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_offset: Tensor | None,
    v_offset: Tensor | None,
    rotate: bool,
    clip_ratios: list[float],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    bits: int,
    cache: Tensor,
    q: Tensor,
) -> None:
    norms = None if q_norm is None or k_norm is None else HeadNorms(q_norm, k_norm, eps)
    transform, layout = KVTransform(rotate, k_offset, v_offset), Layout(q.shape[2], bits)
    q.copy_(paged.append(qkv, (cos, sin), positions, slots, cache, layout, transform, clip_ratios, norms))


_append = register(
    "rope_kv4_append(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor slots, Tensor? k_offset,"
    " Tensor? v_offset, bool rotate, float[] clip_ratios, Tensor? q_norm, Tensor? k_norm, float eps, int bits,"
    " Tensor(a!) cache, Tensor(b!) q) -> ()",
    cuda=_append_cuda,
    cpu=_append_cpu,
)


# Decode attention


@dataclass(frozen=True)
class Workspace:
    """Where the splits of long sequences meet. Between calls the counters are zero; calls on two streams need two."""

    partials: Tensor  # float32
    counters: Tensor  # int32

    @staticmethod
    def of(
        batch: int, query_heads: int, kv_heads: int, head_dim: int, max_pages: int, device: str | torch.device
    ) -> "Workspace":
        """Enough for batches and tables up to these sizes."""
        partials, counters = _workspace_sizes(batch, query_heads, kv_heads, head_dim, max_pages)
        return Workspace(
            torch.empty(partials, dtype=torch.float32, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )

    def check(self, *sizes: int) -> None:
        """Refuse to be too small, with a ValueError; the arguments are those of `of`, without the device."""
        for tensor, size in zip((self.partials, self.counters), _workspace_sizes(*sizes), strict=True):
            if tensor.numel() < size:
                raise ValueError(f"workspace: {tensor.numel()} elements of {tensor.dtype}, expected {size} or more")


def max_splits(max_pages: int) -> int:
    """Into how many parts a sequence with at most so many pages is split."""
    return min(max(-(-max_pages // SPLIT_PAGES), 1), MAX_SPLITS)


def _workspace_sizes(batch: int, query_heads: int, kv_heads: int, head_dim: int, max_pages: int) -> tuple[int, int]:
    """Elements of partials and of counters."""
    group = query_heads // kv_heads
    places, splits = batch * kv_heads * -(-group // COLUMNS), max_splits(max_pages)
    partials = places * splits * min(group, COLUMNS) * (head_dim + 2) if splits > 1 else 0
    return partials, 2 + places


def kv4_decode(
    q: Tensor,
    cache: Tensor,
    layout: Layout,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    v_offset: Tensor | None = None,
    workspace: Workspace | None = None,
    settled: bool = False,
) -> Tensor:
    """Attention of one query token for each sequence -> (B, Hq, D) float16: `paged.attention`, rounded.

    q (B, Hq, D) float16 as `rope_kv4_append` returned it; block_tables (B, max_pages) int32; context_lens (B,) int32,
    at most 64 * max_pages, both read when the kernel runs; scale > 0. Of a table only the pages that the context needs
    are read. A sequence's result does not depend on the others. `workspace` is made anew where none is given, which
    costs a fill.

    `settled` promises that q and the last token of each context are all that was still to be written when the kernel
    launched just before began; tables, lengths and other tokens are then read while it runs. What the kernels here
    write is settled once a launch of torch's, or of a graph, lies between: their own launches overlap.

    Raises:
        ValueError: an argument of a wrong shape, type or device.
    """
    kv_heads = _check_cache(cache, layout)
    expect("q", q, torch.float16, (None, None, layout.head_dim), like=cache)
    batch, q_heads, head_dim = q.shape
    if q_heads % kv_heads != 0:
        raise ValueError(f"q: {q_heads} heads, expected a multiple of {kv_heads}")
    if batch > MAX_BATCH:
        raise ValueError(f"q: {batch} sequences, expected at most {MAX_BATCH}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale}, expected a positive number")
    expect("block_tables", block_tables, torch.int32, (batch, None), like=cache, alignment=4)
    expect("context_lens", context_lens, torch.int32, (batch,), like=cache, alignment=4)
    if v_offset is not None:
        expect("v_offset", v_offset, torch.float16, (kv_heads, head_dim), like=cache)
    out = torch.empty_like(q)
    if batch == 0:
        return out
    sizes = batch, q_heads, kv_heads, head_dim, block_tables.shape[1]
    if workspace is None:
        workspace = Workspace.of(*sizes, q.device)
    workspace.check(*sizes)
    partials, counters = workspace.partials, workspace.counters
    where = block_tables, context_lens
    _decode(q, cache, layout.bits, *where, scale, window or 0, v_offset, settled, partials, counters, out)
    return out


@cache
def _tile(layout: Layout, device: torch.device) -> Tile:
    return Tile.of(layout, architecture(device))


def _decode_cuda(
    q: Tensor,
    cache: Tensor,
    bits: int,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    v_offset: Tensor | None,
    settled: bool,
    partials: Tensor,
    counters: Tensor,
    out: Tensor,
) -> None:
    (batch, q_heads, head_dim), kv_heads, max_pages = q.shape, cache.shape[1], block_tables.shape[1]
    layout, group, splits = Layout(head_dim, bits), q_heads // kv_heads, max_splits(max_pages)
    tile = _tile(layout, q.device)
    kernels = module("decode.cu", q.device, _decode_defines(layout, tile))
    items = batch * kv_heads * -(-group // COLUMNS) * splits
    grid = min(items, tile.blocks * kernels.multiprocessors)
    tensors = q, cache, block_tables, context_lens, v_offset, out, partials, counters
    sizes = batch, kv_heads, group, max_pages, splits, window, settled
    args = (*tensors, scale * math.log2(math.e), *sizes)
    kernels.launch("kv_decode", (grid, 1, 1), tile.warps * WARP, args, tile.shared_bytes(layout))


def _decode_cpu(
    q: Tensor,
    cache: Tensor,
    bits: int,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    v_offset: Tensor | None,
    settled: bool,
    partials: Tensor,
    counters: Tensor,
    out: Tensor,
) -> None:
    layout = Layout(q.shape[2], bits)
    out.copy_(paged.attention(q, cache, layout, block_tables, context_lens, scale, window or None, v_offset))


_decode = register(
    "kv4_decode(Tensor q, Tensor cache, int bits, Tensor block_tables, Tensor context_lens, float scale, int window,"
    " Tensor? v_offset, bool settled, Tensor(a!) partials, Tensor(b!) counters, Tensor(c!) out) -> ()",
    cuda=_decode_cuda,
    cpu=_decode_cpu,
)


# Gather


def kv4_gather(
    cache: Tensor,
    layout: Layout,
    block_tables: Tensor,
    starts: Tensor,
    rows: int,
    v_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """K and V of whole sequences, one after the other, (rows, Hkv, D) float16 each: `paged.gather`, rounded.

    For attention over a part of a prompt and all before it: K fits the rotated queries of `rope_kv4_append`, V has its
    offset (Hkv, D) back. block_tables (sequences, max_pages) int32; starts (sequences + 1,) int32 on the device, from 0
    to `rows`, which the host must know.

    Raises:
        ValueError: an argument of a wrong shape, type or device.
    """
    kv_heads = _check_cache(cache, layout)
    expect("block_tables", block_tables, torch.int32, (None, None), like=cache, alignment=4)
    expect("starts", starts, torch.int32, (block_tables.shape[0] + 1,), like=cache, alignment=4)
    if v_offset is not None:
        expect("v_offset", v_offset, torch.float16, (kv_heads, layout.head_dim), like=cache)
    k, v = (torch.empty(rows, kv_heads, layout.head_dim, dtype=torch.float16, device=cache.device) for _ in "kv")
    _gather(cache, layout.bits, block_tables, starts, v_offset, k, v)
    return k, v


def _gather_cuda(
    cache: Tensor, bits: int, block_tables: Tensor, starts: Tensor, v_offset: Tensor | None, k: Tensor, v: Tensor
) -> None:
    (rows, kv_heads, head_dim), (sequences, max_pages) = k.shape, block_tables.shape
    blocks = -(-rows * kv_heads * head_dim // (GATHER_DIMS * GATHER_THREADS))
    args = (cache, block_tables, starts, v_offset, k, v, rows, sequences, kv_heads, max_pages)
    kernels = module("gather.cu", k.device, _layout_defines(Layout(head_dim, bits)))
    kernels.launch("kv_gather", (blocks, 2, 1), GATHER_THREADS, args)


def _gather_cpu(
    cache: Tensor, bits: int, block_tables: Tensor, starts: Tensor, v_offset: Tensor | None, k: Tensor, v: Tensor
) -> None:
    for out, rows in zip(
        (k, v), paged.gather(cache, Layout(k.shape[2], bits), block_tables, starts, v_offset), strict=True
    ):
        out.copy_(rows)


_gather = register(
    "kv4_gather(Tensor cache, int bits, Tensor block_tables, Tensor starts, Tensor? v_offset, Tensor(a!) k,"
    " Tensor(b!) v) -> ()",
    cuda=_gather_cuda,
    cpu=_gather_cpu,
)


def _check_cache(cache: Tensor, layout: Layout) -> int:
    """Its KV heads."""
    expect("cache", cache, torch.uint8, (None, None, layout.record_bytes))
    return cache.shape[1]
