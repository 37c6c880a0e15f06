"""The paged KV cache of a whole model: one tensor a layer, laid out as `qoq.paged` says."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.errors import ModelError
from qoq.models.architecture import ModelSpec
from qoq.paged import BITS, HEAD_DIMS, Layout
from qoq.recipe import KVCache


def layouts_of(spec: ModelSpec, kv_cache: KVCache, bits: int) -> tuple[Layout, ...]:
    """The layout of each layer's cache, where `bits` are asked for.

    Raises:
        ModelError: a head_dim or a number of bits that the cache does not have.
    """
    if spec.head_dim not in HEAD_DIMS:
        raise ModelError(f"head_dim is {spec.head_dim}; the KV cache takes {', '.join(map(str, HEAD_DIMS))}")
    if bits not in BITS:
        raise ModelError(f"kv_bits is {bits}, expected {', '.join(map(str, BITS))}")
    return tuple(Layout(spec.head_dim, kv_cache.bits(layer, bits)) for layer in range(spec.num_layers))


def page_bytes(spec: ModelSpec, layouts: Sequence[Layout]) -> int:
    """Memory that one page takes in all layers, which have these layouts."""
    return spec.num_kv_heads * sum(layout.record_bytes for layout in layouts)


@dataclass(frozen=True)
class PagedCache:
    """The caches of all layers; a page has the same number in each."""

    layouts: tuple[Layout, ...]
    layers: tuple[Tensor, ...]  # each (pages, KV heads, record_bytes) uint8

    @staticmethod
    def allocate(spec: ModelSpec, layouts: tuple[Layout, ...], pages: int, device: str | torch.device) -> "PagedCache":
        """An empty cache, of pages * page_bytes(spec, layouts) bytes."""
        return PagedCache(layouts, tuple(layout.allocate(pages, spec.num_kv_heads, device) for layout in layouts))
