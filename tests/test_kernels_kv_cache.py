"""The cache kernels: appended and gathered bits are the specification's."""

import pytest
import torch
from test_paged import HKV, HQ, LAYOUTS, RATIOS, normal, spread, tables, transforms
from torch import Tensor

from qoq import paged
from qoq.kernels.kv_cache import kv4_gather, rope_kv4_append
from qoq.models.decoder import KVTransform
from qoq.paged import PAGE, HeadNorms, Layout

GPU = "cuda:0"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_gpu(*values: object, **named: object) -> object:
    return pytest.param(*values, marks=gpu, **named)  # type: ignore[arg-type]


DEVICES = ["cpu", on_gpu(GPU)]


def to(device: str, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


def same(x: Tensor, y: Tensor) -> bool:
    """Equal values, any NaN equal to any other."""
    x, y = x.cpu(), y.cpu()
    return x.dtype == y.dtype and bool(((x == y) | ((x != x) & (y != y))).all())


def same_cache(x: Tensor, y: Tensor, layout: Layout) -> bool:
    for left, right in zip(paged.sides(x.cpu(), layout), paged.sides(y.cpu(), layout), strict=True):
        if left.grids is None or right.grids is None:
            if not same(*(side.codes.contiguous().view(torch.float16) for side in (left, right))):
                return False
        elif not (torch.equal(left.codes, right.codes) and same(left.grids, right.grids)):
            return False
    return True


def random_cache(
    layout: Layout,
    kv_heads: int,
    lengths: tuple[int, ...],
    device: str,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A cache with sequences of these lengths in shuffled pages, their tables and lengths.

    All that is not theirs is poison: NaN in the cache, pages far outside of it in the tables.
    """
    generator = torch.Generator().manual_seed(sum(lengths) + layout.head_dim)
    used = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(used) + 2, generator=generator)
    block_tables = torch.full((len(lengths), max(used) + 1), -(2**30), dtype=torch.int32)
    cache = torch.full_like(layout.allocate(len(order), kv_heads), 0xFF)
    owned = torch.zeros(len(order), PAGE, dtype=torch.bool)
    for table, pages, length in zip(block_tables, order.split([*used, 2]), lengths, strict=False):
        table[: len(pages)] = pages
        token = torch.arange(length)
        owned[pages[token // PAGE], token % PAGE] = True
    page, index = owned.nonzero().T
    count = len(page)
    for side, scale in zip(paged.sides(cache, layout), (key_scale, value_scale), strict=True):
        if side.grids is None:
            rows = (torch.randn(count, kv_heads, layout.head_dim, generator=generator) * scale).half().view(torch.uint8)
        else:
            levels = 2**layout.bits - 1
            rows = torch.randint(0, 256, (count, kv_heads, layout.row_bytes), generator=generator).to(torch.uint8)
            width = (torch.rand(count, kv_heads, generator=generator) * 4 + 2) * scale
            minimum = -width * torch.rand(count, kv_heads, generator=generator)
            side.grids[page, :, index] = torch.stack((width / levels, minimum), dim=-1).half()
        side.codes[page, :, index] = rows
    moved = to(device, cache, block_tables, torch.tensor(lengths, dtype=torch.int32))
    return moved[0], moved[1], moved[2]


def difficult_rows(tokens: int, width: int) -> Tensor:
    """Rows of many sizes; among them constant, zero, tiny, huge ones, and some with NaN or infinity."""
    qkv = normal(3, tokens, width) * normal(4, tokens, 1).exp() * 2
    qkv[0], qkv[1], qkv[2] = 1.5, 0.0, -0.0
    qkv[3] *= 1e-7
    qkv[4] = (torch.rand(width, generator=torch.Generator().manual_seed(5)) * 2 - 1) * 65504
    qkv[5:8] = qkv[5:8].round()  # ties
    rows = qkv.half()
    rows[8, ::37], rows[9, 3], rows[10, -5] = torch.nan, torch.inf, -torch.inf
    return rows


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("ratios", [(1.0,), RATIOS])
@pytest.mark.parametrize("transform", range(3))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_appended_bits_are_the_specifications(device, layout, transform, ratios, with_norms):
    if device == "cpu" and (with_norms or ratios != RATIOS):
        pytest.skip("the CPU runs the specification itself")
    kv, tokens, head_dim = transforms(layout.head_dim)[transform], 77, layout.head_dim
    qkv = difficult_rows(tokens, (HQ + 2 * HKV) * head_dim)
    slots = spread(tokens)[1]
    slots[20:23] = -1
    positions = torch.randint(0, 512, (tokens,), generator=torch.Generator().manual_seed(6))
    norms = HeadNorms(normal(7, head_dim).half(), normal(8, head_dim).half(), 1e-6) if with_norms else None
    cache = torch.full_like(layout.allocate(6, HKV), 0xA5)
    arguments = qkv, tables(head_dim), positions, slots
    expected_cache = cache.clone()
    expected = paged.append(*arguments, expected_cache, layout, kv, ratios, norms)

    cache, *moved = to(device, cache, qkv, *arguments[1], positions, slots)
    on_device = None if norms is None else norms.to(device)
    q = rope_kv4_append(
        moved[0], (moved[1], moved[2]), moved[3], moved[4], cache, layout, kv.to(device), ratios, on_device
    )
    assert same(q, expected)
    assert same_cache(cache, expected_cache, layout)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_gathered_bits_are_the_specifications(device, layout, with_offset):
    cache, block_tables, _ = random_cache(layout, HKV, (70, 0, 129, 1), "cpu")
    starts = torch.tensor([0, 70, 70, 199, 200], dtype=torch.int32)
    offset = transforms(layout.head_dim)[2].v_offset if with_offset else None
    expected = paged.gather(cache, layout, block_tables, starts, offset)
    cache, block_tables, starts = to(device, cache, block_tables, starts)
    found = kv4_gather(cache, layout, block_tables, starts, 200, None if offset is None else offset.to(device))
    for rows, wanted in zip(found, expected, strict=True):
        assert rows.shape == (200, HKV, layout.head_dim)
        assert same(rows, wanted.half())


def test_wrong_arguments_are_refused():
    layout = Layout(64)
    cache, block_tables, lens = random_cache(layout, 2, (70, 3), "cpu")
    with pytest.raises(ValueError, match="qkv: rows of 100"):
        rope_kv4_append(normal(0, 2, 100).half(), tables(64), lens, lens, cache, layout, KVTransform(False))
    with pytest.raises(ValueError, match="slots: torch.int32"):
        rope_kv4_append(normal(0, 2, 6 * 64).half(), tables(64), lens.long(), lens, cache, layout, KVTransform(False))
    with pytest.raises(ValueError, match="starts"):
        kv4_gather(cache, layout, block_tables, lens, 73)
