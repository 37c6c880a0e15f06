"""Decode attention over the paged cache on the GPU (csrc/decode.cu), with append in front too (csrc/append_decode.cu).

On CPU tensors the same faces run the specification, `qoq.paged`; attention is compared with it, in float64, within a
bound that the tests state.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qoq import paged
from qoq.kernels.build import ARCHITECTURES, Argument, Specialisation, architecture, module
from qoq.kernels.kv_cache import (
    CLIP_RATIOS,
    LAYOUTS,
    WARP,
    append_cpu,
    append_defines,
    check_append,
    check_cache,
    how_to_append,
    layout_defines,
)
from qoq.kernels.library import expect, register
from qoq.models.decoder import KVTransform, Rope
from qoq.paged import PAGE, HeadNorms, Layout

# As in common/attend.cuh and common/kv_warp.cuh: pages that one block takes at most until a sequence has MAX_SPLITS
# splits, and limits.
SPLIT_PAGES, MAX_SPLITS, MAX_BATCH, COLUMNS = 32, 32, 1024, 8
STEP = 16  # tokens that a warp takes at once
MAX_STAGES = 4
# Shared memory of a multiprocessor, and what a block needs of it beside the rings.
SHARED_BYTES = {"sm_80": 164 << 10, "sm_87": 164 << 10, "sm_90a": 228 << 10, "sm_100": 228 << 10, "sm_103": 228 << 10}
LEAST_SHARED_BYTES = 100 << 10
BLOCK_BYTES = 10 << 10


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


def _decode_defines(layout: Layout, tile: Tile) -> dict[str, int | str]:
    return layout_defines(layout) | {
        "WARPS": tile.warps,
        "STAGES": tile.stages,
        "BLOCKS": tile.blocks,
        "APART": int(tile.apart),
    }


CODE = (r"HMMA\.16816\.F32", r"LDSM\.16\.MT88\.4", r"MOVM\.16\.MT88", r"LDGSTS\.E\.BYPASS\.128")
SPECIALISATIONS = tuple(
    Specialisation(source, defines | _decode_defines(layout, Tile.of(layout, arch)), (arch,), CODE)
    for layout in LAYOUTS
    for source, defines in (("decode.cu", {}), ("append_decode.cu", append_defines(layout, CLIP_RATIOS)))
    for arch in ARCHITECTURES
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
    kv_heads = check_cache(cache, layout)
    expect("q", q, torch.float16, (None, None, layout.head_dim), like=cache)
    if q.shape[1] % kv_heads != 0:
        raise ValueError(f"q: {q.shape[1]} heads, expected a multiple of {kv_heads}")
    if v_offset is not None:
        expect("v_offset", v_offset, torch.float16, (kv_heads, layout.head_dim), like=cache)
    room = _check_decode(q.shape, cache, block_tables, context_lens, scale, workspace)
    out = torch.empty_like(q)
    if len(q) > 0:
        where = block_tables, context_lens
        _decode(q, cache, layout.bits, *where, scale, window or 0, v_offset, settled, room.partials, room.counters, out)
    return out


def _check_decode(
    queries: Sequence[int],
    cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    workspace: Workspace | None,
) -> Workspace:
    """The workspace that was given, if it is large enough for queries of this shape, or another."""
    batch, q_heads, head_dim = queries
    if batch > MAX_BATCH:
        raise ValueError(f"q: {batch} sequences, expected at most {MAX_BATCH}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale}, expected a positive number")
    expect("block_tables", block_tables, torch.int32, (batch, None), like=cache, alignment=4)
    expect("context_lens", context_lens, torch.int32, (batch,), like=cache, alignment=4)
    sizes = batch, q_heads, cache.shape[1], head_dim, block_tables.shape[1]
    if workspace is None:
        return Workspace.of(*sizes, cache.device)
    workspace.check(*sizes)
    return workspace


@cache
def _tile(layout: Layout, device: torch.device) -> Tile:
    return Tile.of(layout, architecture(device))


def _launch(
    source: str,
    name: str,
    defines: Mapping[str, int | str],
    arguments: Sequence[Argument],
    layout: Layout,
    cache: Tensor,
    block_tables: Tensor,
    out: Tensor,
    scale: float,
    window: int,
    settled: bool,
) -> None:
    """Launch one of the kernels, which differ in `defines` and in their first arguments."""
    (batch, q_heads, _), kv_heads, max_pages = out.shape, cache.shape[1], block_tables.shape[1]
    group, splits, tile = q_heads // kv_heads, max_splits(max_pages), _tile(layout, out.device)
    kernels = module(source, out.device, {**defines, **_decode_defines(layout, tile)})
    grid = min(batch * kv_heads * -(-group // COLUMNS) * splits, tile.blocks * kernels.multiprocessors)
    sizes = batch, kv_heads, group, max_pages, splits, window, settled
    args = (*arguments, scale * math.log2(math.e), *sizes)
    kernels.launch(name, (grid, 1, 1), tile.warps * WARP, args, tile.shared_bytes(layout))


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
    tensors = q, cache, block_tables, context_lens, v_offset, out, partials, counters
    layout = Layout(q.shape[2], bits)
    _launch("decode.cu", "kv_decode", {}, tensors, layout, cache, block_tables, out, scale, window, settled)


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


# Append and decode attention


def kv4_append_decode(
    qkv: Tensor,
    tables: Rope,
    cache: Tensor,
    layout: Layout,
    transform: KVTransform,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    clip_ratios: Sequence[float] = (1.0,),
    norms: HeadNorms | None = None,
    window: int | None = None,
    workspace: Workspace | None = None,
    settled: bool = False,
) -> Tensor:
    """`rope_kv4_append` of the last token of each context, and `kv4_decode` of its queries: one kernel, the same bits.

    qkv (B, (Hq + 2 Hkv) * D) float16 -> (B, Hq, D) float16; other arguments as theirs. A token's position and its place
    in the cache follow from its context's length and block table; a context of 0 tokens has none. The offset of values
    is the transform's. `settled` promises that all but qkv was there when the kernel launched just before began.

    Raises:
        ValueError: an argument of a wrong shape, type or device.
    """
    shape = check_append(qkv, tables, cache, layout, transform, clip_ratios, norms)
    room = _check_decode(shape, cache, block_tables, context_lens, scale, workspace)
    out = torch.empty(shape, dtype=torch.float16, device=qkv.device)
    if len(out) > 0:
        how = how_to_append(transform, clip_ratios, norms)
        attended = block_tables, context_lens, scale, window or 0, settled, room.partials, room.counters
        _append_decode(qkv, *tables, *how, layout.bits, cache, *attended, out)
    return out


def _append_decode_cuda(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_offset: Tensor | None,
    v_offset: Tensor | None,
    rotate: bool,
    clip_ratios: list[float],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    bits: int,
    cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    settled: bool,
    partials: Tensor,
    counters: Tensor,
    out: Tensor,
) -> None:
    new = qkv, cos, sin, k_offset, v_offset, q_norm, k_norm, eps, rotate
    tensors = *new, cache, block_tables, context_lens, out, partials, counters
    layout = Layout(out.shape[2], bits)
    defines, where = append_defines(layout, tuple(clip_ratios)), (cache, block_tables, out)
    _launch("append_decode.cu", "kv_append_decode", defines, tensors, layout, *where, scale, window, settled)


def _append_decode_cpu(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_offset: Tensor | None,
    v_offset: Tensor | None,
    rotate: bool,
    clip_ratios: list[float],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    bits: int,
    cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    settled: bool,
    partials: Tensor,
    counters: Tensor,
    out: Tensor,
) -> None:
    last, offsets, norms = paged.last_tokens(block_tables, context_lens), (k_offset, v_offset), (q_norm, k_norm)
    q = torch.empty_like(out)
    append_cpu(qkv, cos, sin, *last, *offsets, rotate, clip_ratios, *norms, eps, bits, cache, q)
    where = block_tables, context_lens
    _decode_cpu(q, cache, bits, *where, scale, window, v_offset, settled, partials, counters, out)


_append_decode = register(
    "kv4_append_decode(Tensor qkv, Tensor cos, Tensor sin, Tensor? k_offset, Tensor? v_offset, bool rotate,"
    " float[] clip_ratios, Tensor? q_norm, Tensor? k_norm, float eps, int bits, Tensor(a!) cache, Tensor block_tables,"
    " Tensor context_lens, float scale, int window, bool settled, Tensor(b!) partials, Tensor(c!) counters,"
    " Tensor(d!) out) -> ()",
    cuda=_append_decode_cuda,
    cpu=_append_decode_cpu,
)
