"""The paged KV cache: where its bytes lie, and what the GPU kernels do to it, in plain torch.

A layer's cache is one tensor (pages, KV heads, record_bytes) uint8. A page holds 64 tokens; the record of a page and
KV head, for D dims of b bits and index = token % 64:

    K codes   64 x D*b/8 bytes     token `index` is row `index`; 4 bits: dim 2i in the low nibble of byte i, 2i+1 high
    V codes   64 x D*b/8 bytes     likewise
    grids     64 x 4 fp16          K's scale and minimum, V's scale and minimum: value = code * scale + minimum

At 16 bits the rows hold fp16 values and there are no grids. `slots` says where a token goes: page * 64 + index. A
sequence's `block_table` lists its pages in order. What is stored is what `KVTransform.enter` makes of keys and
values after RoPE: without their offsets, keys rotated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qoq.models.decoder import KVTransform, Rope, apply_rope
from qoq.quant import QuantizedKV, fp16, quantize_kv, sum_by_halves

PAGE = 64  # tokens
HEAD_DIMS, BITS = (64, 96, 128, 256), (4, 8, 16)


@dataclass(frozen=True)
class Layout:
    """How the cache of a layer is laid out."""

    head_dim: int
    bits: int = 4

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim is {self.head_dim}, expected one of {HEAD_DIMS}")
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}, expected one of {BITS}")

    @property
    def row_bytes(self) -> int:
        """Of one token's codes."""
        return self.head_dim * self.bits // 8

    @property
    def record_bytes(self) -> int:
        """Of one page and KV head."""
        return PAGE * (2 * self.row_bytes + (8 if self.bits < 16 else 0))

    def allocate(self, num_pages: int, kv_heads: int, device: str | torch.device = "cpu") -> Tensor:
        """An empty cache of one layer."""
        return torch.zeros(num_pages, kv_heads, self.record_bytes, dtype=torch.uint8, device=device)


def pack_codes(rows: QuantizedKV, bits: int = 4) -> QuantizedKV:
    """At 4 bits two codes to a byte, even dimension in the low nibble: (..., D) uint8 -> (..., D/2) uint8."""
    if bits == 8:
        return rows
    return QuantizedKV(rows.codes[..., ::2] | (rows.codes[..., 1::2] << 4), rows.scale, rows.minimum)


def unpack_codes(rows: QuantizedKV, bits: int = 4) -> QuantizedKV:
    """The inverse of `pack_codes`."""
    if bits == 8:
        return rows
    codes = torch.stack((rows.codes & 15, rows.codes >> 4), dim=-1).flatten(-2)
    return QuantizedKV(codes, rows.scale, rows.minimum)


@dataclass(frozen=True)
class Side:
    """K or V of a cache, as views of its bytes."""

    codes: Tensor  # (pages, kv_heads, 64, row_bytes) uint8
    grids: Tensor | None  # (pages, kv_heads, 64, 2) float16: scale, minimum

    def write(self, x: Tensor, slots: Tensor, layout: Layout, clip_ratios: Sequence[float]) -> None:
        """Store x (tokens, kv_heads, D) float16."""
        page, index = slots // PAGE, slots % PAGE
        if self.grids is None:
            codes = x.contiguous().view(torch.uint8)
        else:
            rows = quantize_kv(x, layout.bits, clip_ratios)
            codes = pack_codes(rows, layout.bits).codes
            self.grids[page, :, index] = torch.stack((rows.scale, rows.minimum), dim=-1)
        self.codes[page, :, index] = codes

    def read(self, page: Tensor, index: Tensor, layout: Layout) -> Tensor:
        """(tokens, kv_heads, D) float32."""
        codes = self.codes[page, :, index]
        if self.grids is None:
            return codes.view(torch.float16).float()
        rows = QuantizedKV(codes, *self.grids[page, :, index].unbind(-1))
        return unpack_codes(rows, layout.bits).dequantize()


def sides(cache: Tensor, layout: Layout) -> tuple[Side, Side]:
    """K and V of a cache (pages, kv_heads, record_bytes) uint8."""
    rows = PAGE * layout.row_bytes
    k, v = (cache[..., start : start + rows].unflatten(-1, (PAGE, -1)) for start in (0, rows))
    if layout.bits == 16:
        return Side(k, None), Side(v, None)
    grids = cache[..., 2 * rows :].view(torch.float16).unflatten(-1, (PAGE, 2, 2))
    return Side(k, grids[..., 0, :]), Side(v, grids[..., 1, :])


def rope_tables(rope: Callable[[Tensor], Rope], positions: int) -> Rope:
    """cos and sin (positions, D/2) float32 of `rotary_embedding`, whose two halves are alike."""
    cos, sin = rope(torch.arange(positions))
    half = cos.shape[1] // 2
    return cos[:, :half].contiguous(), sin[:, :half].contiguous()


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., D) float16 by weight (D,), as `rms_norm`, with a fixed order of the sum."""
    wide = x.float()
    mean = sum_by_halves(wide.square())[..., None] / x.shape[-1]
    return fp16(wide * (1 / (mean + eps).sqrt()) * weight.float())


@dataclass(frozen=True)
class HeadNorms:
    """QK-norm: RMSNorm of each head of Q and K before RoPE."""

    q: Tensor  # (D,) float16
    k: Tensor  # (D,) float16
    eps: float

    def to(self, device: str | torch.device) -> "HeadNorms":
        """The same norms on a device."""
        return HeadNorms(self.q.to(device), self.k.to(device), self.eps)


def append(
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
    """Store K and V of new tokens; their queries as attention wants them.

    qkv (tokens, (Hq + 2 Hkv) * D) float16 before RoPE; tables of `rope_tables`; positions and slots (tokens,) int64, a
    slot of -1 keeps nothing. Returns (tokens, Hq, D) float16.
    """
    kv_heads = cache.shape[1]
    heads = qkv.unflatten(1, (-1, layout.head_dim)).transpose(0, 1)  # (Hq + 2 Hkv, tokens, D)
    q, k, v = heads.split((heads.shape[0] - 2 * kv_heads, kv_heads, kv_heads))
    if norms is not None:
        q, k = head_norm(q, norms.q, norms.eps), head_norm(k, norms.k, norms.eps)
    cos, sin = (table[positions].repeat(1, 2) for table in tables)
    q, k, v = transform.enter(apply_rope(q, (cos, sin)), apply_rope(k, (cos, sin)), v)
    kept = slots >= 0
    for side, x in zip(sides(cache, layout), (k, v), strict=True):
        side.write(x.transpose(0, 1)[kept], slots[kept], layout, clip_ratios)
    return q.transpose(0, 1).contiguous()


def last_tokens(block_tables: Tensor, context_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and slots (B,) int64 of each context's last token, as `append` takes them; 0 and -1 where it is empty.

    block_tables (B, max_pages) int32; context_lens (B,) int32.
    """
    positions = (context_lens.long() - 1).clamp_min(0)
    pages = block_tables.gather(1, positions[:, None] // PAGE)[:, 0].long()
    return positions, torch.where(context_lens > 0, pages * PAGE + positions % PAGE, -1)


def gather(
    cache: Tensor, layout: Layout, block_tables: Tensor, starts: Tensor, v_offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """K and V of whole sequences, one after the other, as float32 (rows, Hkv, D).

    block_tables (sequences, max_pages) int32; starts (sequences + 1,) int32, from 0: the first row of each sequence.
    K stays as stored, which is what rotated queries want; V gets its offset (Hkv, D) back.
    """
    lengths = starts.diff().long()
    sequence = torch.repeat_interleave(lengths)
    token = torch.arange(len(sequence), device=cache.device) - starts.long()[sequence]
    page = block_tables[sequence, token // PAGE].long()
    k, v = (side.read(page, token % PAGE, layout) for side in sides(cache, layout))
    return k, v if v_offset is None else v + v_offset.float()


def attention(
    q: Tensor,
    cache: Tensor,
    layout: Layout,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    v_offset: Tensor | None = None,
) -> Tensor:
    """Attention of one query token for each sequence, the last of its context, in float64.

    q (B, Hq, D) float16 as `append` returned it; block_tables (B, max_pages) int32; context_lens (B,) int32, the query
    included; `window` counts the tokens that are seen. Returns (B, Hq, D) float64, zeros for an empty context.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for b, length in enumerate(context_lens.tolist()):
        if length == 0:
            continue
        first = max(length - window, 0) if window else 0
        starts = torch.tensor([0, length], device=q.device)
        k, v = (x[first:].double().transpose(0, 1) for x in gather(cache, layout, block_tables[b : b + 1], starts))
        out[b] = F.scaled_dot_product_attention(q[b, :, None].double(), k, v, scale=scale, enable_gqa=True)[:, 0]
        if v_offset is not None:
            out[b] += v_offset.double().repeat_interleave(q.shape[1] // cache.shape[1], dim=0)
    return out
