"""What enters the paged KV cache and leaves it on a GPU: append (csrc/append.cu), gather (csrc/gather.cu).

On CPU tensors the same faces run the specification, `qoq.paged`, with the same bits.
"""

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qoq import paged
from qoq.kernels.build import Specialisation, module
from qoq.kernels.library import expect, register
from qoq.models.decoder import KVTransform, Rope
from qoq.paged import HeadNorms, Layout

WARP = 32
APPEND_WARPS, APPEND_TOKENS, GATHER_THREADS, GATHER_DIMS = 4, 4, 256, 8  # as in the sources


# What is compiled


def layout_defines(layout: Layout) -> dict[str, int | str]:
    return {"HEAD_DIM": layout.head_dim, "BITS": layout.bits}


@cache
def append_defines(layout: Layout, clip_ratios: tuple[float, ...]) -> dict[str, int | str]:
    """The ratios, and what each takes off either end of the range, in double precision until the last rounding."""

    def literals(values: list[float]) -> str:
        rounded = (struct.unpack("f", struct.pack("f", value))[0] for value in values)
        return ",".join(f"{value.hex()}f" for value in rounded)

    margins = [(1 - ratio) / 2 for ratio in clip_ratios]
    return layout_defines(layout) | {"RATIOS": literals(list(clip_ratios)), "MARGINS": literals(margins)}


LAYOUTS = (*(Layout(head_dim) for head_dim in paged.HEAD_DIMS), Layout(128, 8), Layout(128, 16))
CLIP_RATIOS = (1, 0.96, 0.92, 0.88, 0.84)
SPECIALISATIONS = (
    *(Specialisation("append.cu", append_defines(layout, CLIP_RATIOS)) for layout in LAYOUTS),
    *(Specialisation("gather.cu", layout_defines(layout), expected=(r"STG\.E\.128",)) for layout in LAYOUTS),
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
    shape = check_append(qkv, tables, cache, layout, transform, clip_ratios, norms)
    expect("positions", positions, torch.int64, shape[:1], like=cache, alignment=8)
    expect("slots", slots, torch.int64, shape[:1], like=cache, alignment=8)
    q = torch.empty(shape, dtype=torch.float16, device=qkv.device)
    _append(qkv, *tables, positions, slots, *how_to_append(transform, clip_ratios, norms), layout.bits, cache, q)
    return q


def check_append(
    qkv: Tensor,
    tables: Rope,
    cache: Tensor,
    layout: Layout,
    transform: KVTransform,
    clip_ratios: Sequence[float],
    norms: HeadNorms | None,
) -> tuple[int, int, int]:
    """The shape of the queries, or a ValueError."""
    kv_heads = check_cache(cache, layout)
    head_dim, (cos, sin), tokens = layout.head_dim, tables, qkv.shape[0]
    expect("qkv", qkv, torch.float16, (None, None), like=cache)
    q_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    if qkv.shape[1] % head_dim != 0 or q_heads <= 0 or q_heads % kv_heads != 0:
        raise ValueError(f"qkv: rows of {qkv.shape[1]}, expected (Hq + 2 * {kv_heads}) * {head_dim}, whole groups")
    expect("cos", cos, torch.float32, (None, head_dim // 2), like=cache)
    expect("sin", sin, torch.float32, cos.shape, like=cache)
    for name, offset in (("k_offset", transform.k_offset), ("v_offset", transform.v_offset)):
        if offset is not None:
            expect(name, offset, torch.float16, (kv_heads, head_dim), like=cache)
    if norms is not None:
        expect("norms.q", norms.q, torch.float16, (head_dim,), like=cache)
        expect("norms.k", norms.k, torch.float16, (head_dim,), like=cache)
    if not clip_ratios:
        raise ValueError("clip_ratios: none, expected at least one")
    return tokens, q_heads, head_dim


def how_to_append(transform: KVTransform, clip_ratios: Sequence[float], norms: HeadNorms | None) -> tuple[Any, ...]:
    """As the ops take it."""
    q, k, eps = (norms.q, norms.k, norms.eps) if norms else (None, None, 0.0)
    return transform.k_offset, transform.v_offset, transform.rotate, list(clip_ratios), q, k, eps


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
    defines = append_defines(Layout(head_dim, bits), tuple(clip_ratios))
    warps = -(-tokens // APPEND_TOKENS) * (q_heads + 2 * kv_heads)  # one head of APPEND_TOKENS tokens each
    blocks = -(-warps // APPEND_WARPS)
    offsets, norms = (k_offset, v_offset), (q_norm, k_norm)
    args = (qkv, cos, sin, positions, slots, *offsets, *norms, eps, rotate, cache, q, tokens, q_heads, kv_heads)
    module("append.cu", q.device, defines).launch("rope_kv_append", (blocks, 1, 1), APPEND_WARPS * WARP, args)


def append_cpu(
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
    cpu=append_cpu,
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
    kv_heads = check_cache(cache, layout)
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
    kernels = module("gather.cu", k.device, layout_defines(Layout(head_dim, bits)))
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


def check_cache(cache: Tensor, layout: Layout) -> int:
    """Its KV heads."""
    expect("cache", cache, torch.uint8, (None, None, layout.record_bytes))
    return cache.shape[1]
