"""Pages are given, shared and freed exactly; memory is counted to the byte."""

import statistics

import pytest
import torch
from conftest import VOCAB
from hypothesis import given
from hypothesis import strategies as st

from qoq import roofline
from qoq.checkpoint import Checkpoint
from qoq.errors import ModelError
from qoq.layout import kv_bytes
from qoq.models.architecture import ModelSpec
from qoq.paged import BITS, HEAD_DIMS, PAGE
from qoq.recipe import KVCache
from qoq.runtime.benchmark import dimensions
from qoq.runtime.cache import PagedCache, layouts_of, page_bytes
from qoq.runtime.pages import Pages, page_name


def take(pages: Pages, count: int) -> list[int]:
    taken = pages.take(count)
    assert taken is not None
    return taken


def test_pages_are_taken_once_and_come_back():
    pages = Pages(4, 8)
    first, second = take(pages, 3), take(pages, 1)
    assert sorted(first + second) == [0, 1, 2, 3] and pages.free == 0
    assert pages.take(1) is None and pages.take(0) == []
    pages.release(first)
    assert pages.free == 3 and pages.take(4) is None and pages.free == 3
    with pytest.raises(ValueError, match=f"page {first[2]} is free already"):
        pages.release(first)


def test_needed_pages_are_whole():
    pages = Pages(4, 8)
    assert [pages.needed(tokens) for tokens in (0, 1, 8, 9, 16, 17)] == [0, 1, 1, 2, 2, 3]


def test_a_name_is_of_all_tokens_before():
    first, other = page_name(b"", [1, 2]), page_name(b"", [2, 1])
    assert first == page_name(b"", (1, 2)) and len(first) == 16
    assert len({first, other, page_name(first, [3, 4]), page_name(other, [3, 4]), page_name(b"", [3, 4])}) == 5


def test_named_pages_are_found_used_or_idle():
    pages, names = Pages(4, 2), [page_name(b"", [i, i]) for i in range(3)]
    own = take(pages, 2)
    for page, name in zip(own, names, strict=False):
        pages.name(page, name)
    assert pages.find(names) == own and pages.find(names[1:]) == own[1:] and pages.find([names[2], names[0]]) == []
    pages.release(own)
    assert pages.free == 4 and pages.find(names) == own
    pages.share(own)
    pages.share(own)
    assert pages.free == 2
    pages.release(own)
    assert pages.free == 2
    pages.release(own)
    assert pages.free == 4


def test_blank_pages_go_first_then_those_idle_longest():
    pages, names = Pages(4, 2), [page_name(b"", [i, i]) for i in range(3)]
    own = take(pages, 3)
    for page, name in zip(own, names, strict=True):
        pages.name(page, name)
    pages.release(own[:1])
    pages.release(own[1:])  # the end of a sequence falls idle before its beginning
    blank, *idle = (take(pages, 1)[0] for _ in range(4))
    assert blank not in own and idle == [own[0], own[2], own[1]]
    assert pages.find(names[:1]) == pages.find(names[1:2]) == pages.find(names[2:]) == []


def test_one_page_of_a_name_is_enough():
    pages, name = Pages(2, 2), page_name(b"", [1, 1])
    first, second = take(pages, 2)
    pages.name(first, name)
    pages.name(second, name)
    assert pages.find([name]) == [first]
    pages.release([second])
    assert pages.take(1) == [second]  # blank
    pages.release([first])
    assert pages.find([name]) == [first]


@pytest.mark.parametrize(
    ("family", "bits", "in_8_bits", "tokens"),
    [
        ("llama", 4, (), (2 * 32 + 8, 2 * 32 + 8)),
        ("llama", 4, (1,), (2 * 32 + 8, 2 * 64 + 8)),
        ("llama", 16, (1,), (2 * 128, 2 * 128)),
        ("qwen3", 8, (0,), (2 * 128 + 8, 2 * 128 + 8)),
    ],
)
def test_memory_is_counted_to_the_byte(checkpoint_folder, family, bits, in_8_bits, tokens):
    spec = Checkpoint(checkpoint_folder(family)).spec
    layouts = layouts_of(spec, KVCache(layers_in_8_bits=in_8_bits), bits)
    assert page_bytes(spec, layouts) == 2 * 64 * sum(tokens)  # KV heads, tokens
    cache = PagedCache.allocate(spec, layouts, 5, "cpu")
    assert [layer.nbytes for layer in cache.layers] == [5 * 2 * 64 * token for token in tokens]
    assert len(cache.layers) == 2 and {layer.dtype for layer in cache.layers} == {torch.uint8}


@given(st.data())
def test_a_token_is_counted_alike_everywhere(data):
    layers, heads = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 16))
    head_dim, bits = data.draw(st.sampled_from(HEAD_DIMS)), data.draw(st.sampled_from(BITS))
    kv_cache = KVCache(layers_in_8_bits=tuple(sorted(data.draw(st.sets(st.integers(0, layers - 1))))))
    windows = (None,) * layers
    spec = ModelSpec("llama", layers, 96, 96, heads, heads, head_dim, VOCAB, 1e-5, False, False, windows, frozenset())
    found = kv_bytes(spec, kv_cache, bits)
    assert PAGE * found == page_bytes(spec, layouts_of(spec, kv_cache, bits))
    mean = statistics.fmean(kv_cache.bits(layer, bits) for layer in range(layers))
    assert roofline.kv_bytes(dimensions(spec), mean) == found


def test_what_the_cache_cannot_hold_is_refused():
    spec = ModelSpec("llama", 1, 96, 96, 2, 2, 48, VOCAB, 1e-5, False, False, (None,), frozenset())
    with pytest.raises(ModelError, match="head_dim is 48; the KV cache takes 64, 96, 128, 256"):
        layouts_of(spec, KVCache(), 4)
