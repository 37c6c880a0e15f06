"""The paged KV cache of a whole model: one tensor a layer, laid out as `qoq.paged` says."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.errors import ModelError
from qoq.models.architecture import ModelSpec
from qoq.paged import BITS, HEAD_DIMS, Layout


def layout_of(spec: ModelSpec, bits: int) -> Layout:
    """The layout of a model's cache.

    Raises:
        ModelError: a head_dim or a number of bits that the cache does not have.
    """
    if spec.head_dim not in HEAD_DIMS:
        raise ModelError(f"head_dim is {spec.head_dim}; the KV cache takes {', '.join(map(str, HEAD_DIMS))}")
    if bits not in BITS:
        raise ModelError(f"kv_bits is {bits}, expected {', '.join(map(str, BITS))}")
    return Layout(spec.head_dim, bits)


def page_bytes(spec: ModelSpec, layout: Layout) -> int:
    """Memory that one page takes in all layers."""
    return spec.num_layers * spec.num_kv_heads * layout.record_bytes


@dataclass(frozen=True)
class PagedCache:
    """The caches of all layers; a page has the same number in each."""

    layout: Layout
    layers: tuple[Tensor, ...]  # each (pages, KV heads, record_bytes) uint8

    @staticmethod
    def allocate(spec: ModelSpec, layout: Layout, pages: int, device: str | torch.device) -> "PagedCache":
        """An empty cache, of pages * page_bytes(spec, layout) bytes."""
        layers = (layout.allocate(pages, spec.num_kv_heads, device) for _ in range(spec.num_layers))
        return PagedCache(layout, tuple(layers))
