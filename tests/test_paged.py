"""The paged cache against the quantizer, the decoder's own attention, and bytes laid out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq import paged, quant, recipe
from qoq.models import decoder
from qoq.models.decoder import KVTransform, Rope
from qoq.paged import PAGE, HeadNorms, Layout
from qoq.quant import quantize_kv
from qoq.runtime.model import KVCache

LAYOUTS = [Layout(head_dim, bits) for head_dim in paged.HEAD_DIMS for bits in paged.BITS]
RATIOS = (1.0, 0.96, 0.92, 0.88, 0.84)
HQ, HKV = 4, 2


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tables(head_dim: int, positions: int = 512) -> Rope:
    angles = torch.arange(positions)[:, None] / 10000.0 ** (torch.arange(head_dim // 2) / (head_dim // 2))
    return angles.cos(), angles.sin()


def transforms(head_dim: int) -> list[KVTransform]:
    k_offset, v_offset = normal(1, 2, HKV, head_dim).half()
    return [KVTransform(False), KVTransform(True), KVTransform(True, k_offset, v_offset)]


def spread(length: int, seed: int = 0, spare: int = 3) -> tuple[Tensor, Tensor, int]:
    """Shuffled pages for one sequence: its block table (1, max_pages), nonsense at its end; its slots; all pages."""
    used = -(-length // PAGE)
    pages = torch.randperm(used + spare, generator=torch.Generator().manual_seed(seed))[:used]
    token = torch.arange(length)
    table = torch.cat((pages, torch.tensor([-1000000]))).to(torch.int32)[None]
    return table, pages[token // PAGE] * PAGE + token % PAGE, used + spare


@pytest.mark.parametrize("transform", range(3))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_gathered_is_what_the_decoder_would_cache(layout, transform):
    """The same keys, values and queries, bit for bit, as on the runtime's own path in float16."""
    kv = transforms(layout.head_dim)[transform]
    length = 130
    table, slots, pages = spread(length)
    qkv = normal(0, length, (HQ + 2 * HKV) * layout.head_dim).half()
    cos, sin = tables(layout.head_dim)
    cache = layout.allocate(pages, HKV)
    positions = torch.arange(length) + 7
    q = paged.append(qkv, (cos, sin), positions, slots, cache, layout, kv, RATIOS)
    k, v = paged.gather(cache, layout, table, torch.tensor([0, length]))

    heads = qkv.unflatten(1, (-1, layout.head_dim)).transpose(0, 1)[None]
    rope = (cos[positions].repeat(1, 2), sin[positions].repeat(1, 2))
    first, second, values = heads.split((HQ, HKV, HKV), dim=1)
    queries, keys, values = kv.enter(decoder.apply_rope(first, rope), decoder.apply_rope(second, rope), values)
    assert torch.equal(q, queries[0].transpose(0, 1))
    for found, rows in ((k, keys), (v, values)):
        if layout.bits < 16:
            rows = quantize_kv(rows, layout.bits, RATIOS).dequantize()
        assert torch.equal(found, rows[0].transpose(0, 1).float())
    if layout.bits == 4:
        cached = KVCache(1, recipe.KVCache(clip_ratios=RATIOS))(0, keys, values)
        assert torch.equal(k, cached[0][0].transpose(0, 1)) and torch.equal(v, cached[1][0].transpose(0, 1))


@pytest.mark.parametrize("window", [None, 1, 70, 64, 1000])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_attention_is_the_decoders(length, window):
    layout = Layout(64)
    kv = transforms(64)[2]
    table, slots, pages = spread(length)
    cache = layout.allocate(pages, HKV)
    qkv = normal(2, length, (HQ + 2 * HKV) * 64).half()
    q = paged.append(qkv, tables(64), torch.arange(length), slots, cache, layout, kv)
    k, v = (x.transpose(0, 1)[None] for x in paged.gather(cache, layout, table, torch.tensor([0, length])))
    lens = torch.tensor([length], dtype=torch.int32)
    found = paged.attention(q[-1:], cache, layout, table, lens, 64**-0.5, window, kv.v_offset)
    expected = decoder.attention(q[-1:].transpose(0, 1)[None].double(), k, v, window, torch.float64)
    assert torch.allclose(found.flatten(), kv.leave(expected).flatten(), rtol=0, atol=1e-6)


def test_a_batch_is_ragged_and_an_empty_context_gives_zeros():
    layout, lengths = Layout(64), (70, 0, 1, 128)
    cache = layout.allocate(6, 1)
    kv, order = transforms(64)[0], torch.tensor([4, 0, -1, 3, 5, 2])
    block_tables = torch.full((4, 3), -9, dtype=torch.int32)
    block_tables[0, :2], block_tables[2, :1], block_tables[3, :2] = order[:2], order[3:4], order[4:]
    rows = [normal(b, n, 3 * 64).half() for b, n in enumerate(lengths)]
    queries = []
    for table, qkv in zip(block_tables, rows, strict=True):
        token = torch.arange(len(qkv))
        slots = table[token // PAGE].long() * PAGE + token % PAGE
        queries.append(paged.append(qkv, tables(64), token, slots, cache, layout, kv)[-1:])
    queries[1] = normal(9, 1, 1, 64).half()
    lens = torch.tensor(lengths, dtype=torch.int32)
    together = paged.attention(torch.cat(queries), cache, layout, block_tables, lens, 0.125)
    assert not together[1].any()
    for b in (0, 2, 3):
        alone = paged.attention(queries[b], cache, layout, block_tables[b : b + 1], lens[b : b + 1], 0.125)
        assert torch.equal(together[b], alone[0])
    k, v = paged.gather(cache, layout, block_tables, torch.tensor([0, 70, 70, 71, 199]))
    assert k.shape == v.shape == (199, 1, 64)
    assert torch.equal(k[70:71], paged.gather(cache, layout, block_tables[2:3], torch.tensor([0, 1]))[0])


@given(st.integers(0, 2**32 - 1), st.integers(0, 200), st.sampled_from(LAYOUTS))
def test_only_the_slots_are_written(seed, tokens, layout):
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(5 * PAGE, generator=generator)[:tokens]
    skipped = torch.rand(tokens, generator=generator) < 0.3
    slots[skipped] = -1
    cache = torch.full_like(layout.allocate(5, HKV), 0xA5)
    qkv = normal(seed, tokens, 3 * HKV * layout.head_dim).half()
    positions = torch.randint(0, 512, (tokens,), generator=generator)
    q = paged.append(qkv, tables(layout.head_dim), positions, slots, cache, layout, KVTransform(False))
    assert q.shape == (tokens, HKV, layout.head_dim) and q.isfinite().all()
    rows = qkv.unflatten(1, (3 * HKV, -1))[:, -HKV:]
    untouched = torch.ones(5 * PAGE, dtype=torch.bool)
    untouched[slots[~skipped]] = False
    table = torch.arange(5, dtype=torch.int32)[None]
    for side in paged.sides(cache, layout):
        assert (side.codes.transpose(1, 2).flatten(0, 1)[untouched] == 0xA5).all()
        if side.grids is not None:
            assert (side.grids.transpose(1, 2).flatten(0, 1)[untouched].contiguous().view(torch.uint8) == 0xA5).all()
    _, v = paged.gather(cache, layout, table, torch.tensor([0, 5 * PAGE]))
    expected = rows.float() if layout.bits == 16 else quantize_kv(rows, layout.bits).dequantize()
    assert torch.equal(v[slots[~skipped]], expected[~skipped])


def test_bytes_of_a_record():
    """One token, by hand: row and grid where the drawing says, the even dimension in the low nibble."""
    layout = Layout(128)
    assert (layout.row_bytes, layout.record_bytes) == (64, 8704)
    assert [Layout(64, 8).record_bytes, Layout(128, 8).record_bytes, Layout(128, 16).record_bytes] == [
        8704,
        16896,
        32768,
    ]
    cache = layout.allocate(2, HKV)
    qkv = torch.zeros(1, 3 * HKV, 128, dtype=torch.float16)
    qkv[0, HKV + 1] = torch.arange(128) % 16 * 0.5 - 1  # K of head 1
    qkv[0, 2 * HKV + 1] = 15 - torch.arange(128) % 16  # V
    slots = torch.tensor([PAGE + 5])
    paged.append(qkv.flatten(1), tables(128), torch.tensor([0]), slots, cache, layout, KVTransform(False))
    record = cache[1, 1]
    assert record[5 * 64 : 6 * 64].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 8
    v_row = 64 * 64 + 5 * 64
    assert record[v_row : v_row + 64].tolist() == [0xEF, 0xCD, 0xAB, 0x89, 0x67, 0x45, 0x23, 0x01] * 8
    grid = 2 * 64 * 64 + 5 * 8
    assert record[grid : grid + 8].view(torch.float16).tolist() == [0.5, -1, 1, 0]
    assert int(cache.count_nonzero()) == int(record.count_nonzero())


def test_head_norm_is_the_decoders_norm():
    x, weight = normal(0, 5, 3, 96).half() * 3, normal(1, 96).half()
    found, expected = paged.head_norm(x, weight, 1e-5), quant.rms_norm(x, weight.float(), 1e-5)
    assert found.dtype == torch.float16
    assert torch.allclose(found.float(), expected.float(), rtol=2e-3, atol=0)
    assert (found == expected).float().mean() > 0.99  # but for the order of the sum


def test_norms_come_before_rope():
    layout, kv = Layout(64), KVTransform(False)
    norms = HeadNorms(normal(1, 64).half(), normal(2, 64).half(), 1e-6)
    qkv, slots = normal(0, 3, 4 * 64).half(), torch.arange(3)
    heads = qkv.unflatten(1, (4, 64))
    normed = torch.stack(
        (
            paged.head_norm(heads[:, 0], norms.q, 1e-6),
            paged.head_norm(heads[:, 1], norms.q, 1e-6),
            paged.head_norm(heads[:, 2], norms.k, 1e-6),
            heads[:, 3],
        ),
        dim=1,
    )
    caches = [layout.allocate(1, 1) for _ in range(2)]
    found = paged.append(qkv, tables(64), slots, slots, caches[0], layout, kv, norms=norms)
    expected = paged.append(normed.flatten(1), tables(64), slots, slots, caches[1], layout, kv)
    assert torch.equal(found, expected) and torch.equal(*caches)


def test_rope_tables_are_half_of_the_decoders(llama):
    from transformers import AutoConfig

    rope = decoder.rotary_embedding(AutoConfig.from_pretrained(llama))
    cos, sin = rope(torch.arange(100))
    halves = paged.rope_tables(rope, 100)
    assert all(half.shape == (100, 32) and half.is_contiguous() for half in halves)
    assert torch.equal(halves[0].repeat(1, 2), cos) and torch.equal(halves[1].repeat(1, 2), sin)


@pytest.mark.parametrize("layout", [(80, 4), (512, 4), (128, 3)])
def test_other_layouts_are_refused(layout):
    with pytest.raises(ValueError, match="expected one of"):
        Layout(*layout)
