"""Decode attention is near float64; with append in front it gives the bits of both."""

import pytest
import torch
from test_kernels_kv_cache import DEVICES, random_cache, to
from test_paged import HKV, HQ, LAYOUTS, RATIOS, normal, spread, tables, transforms
from torch import Tensor

from qoq import paged
from qoq.kernels import attention
from qoq.kernels.attention import Tile, Workspace, kv4_append_decode, kv4_decode
from qoq.kernels.build import ARCHITECTURES
from qoq.kernels.kv_cache import rope_kv4_append
from qoq.models.decoder import KVTransform
from qoq.paged import PAGE, HeadNorms, Layout


def queries(lengths: tuple[int, ...], heads: int, layout: Layout, device: str, scale: float = 1.0) -> Tensor:
    return (normal(11, len(lengths), heads, layout.head_dim) * scale).half().to(device)


def plain(
    q: Tensor,
    cache: Tensor,
    layout: Layout,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    v_offset: Tensor | None,
) -> Tensor:
    """The same attention in plain torch, every tensor in float16."""
    out = torch.zeros_like(q)
    for b, length in enumerate(context_lens.tolist()):
        if length == 0:
            continue
        starts = torch.tensor([0, length], device=q.device)
        first = max(length - window, 0) if window else 0
        rows = paged.gather(cache, layout, block_tables[b : b + 1], starts, v_offset)
        k, v = (x[first:].half().repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1) for x in rows)
        scores = (q[b, :, None] * scale) @ k.transpose(1, 2)
        out[b] = (scores.float().softmax(-1).half() @ v)[:, 0]
    return out


def off(x: Tensor, reference: Tensor) -> float:
    return float((x.double() - reference).norm())


def check_attention(
    layout: Layout,
    kv_heads: int,
    group: int,
    lengths: tuple[int, ...],
    device: str,
    window: int | None = None,
    with_offset: bool = False,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    query_scale: float = 1.0,
) -> None:
    """The error is below twice that of plain float16, plus one rounding of the output."""
    cache, block_tables, lens = random_cache(layout, kv_heads, lengths, device, key_scale, value_scale)
    q = queries(lengths, kv_heads * group, layout, device, query_scale)
    v_offset = normal(12, kv_heads, layout.head_dim).half().to(device) if with_offset else None
    scale = layout.head_dim**-0.5
    arguments = q, cache, layout, block_tables, lens, scale, window, v_offset
    expected, by_halves = paged.attention(*arguments), plain(*arguments)
    found = kv4_decode(*arguments)
    assert found.isfinite().all()
    for b, length in enumerate(lengths):
        floor = float(expected[b].norm()) * 2.0**-11 + 2.0**-24 * expected[b].numel() ** 0.5
        error = off(found[b], expected[b])
        assert error <= 2 * off(by_halves[b], expected[b]) + floor or not by_halves[b].isfinite().all()
        assert error <= 0.02 * float(expected[b].norm()) + floor
        if length == 0:
            assert not found[b].any()


RAGGED = (1, 15, 16, 17, 0, 63, 64, 65, 127, 129, 300, 1023, 1024, 1025, 2049, 3000)


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_attention_is_near_float64(device, layout, group):
    lengths = RAGGED if device != "cpu" else (1, 0, 65)
    check_attention(layout, 2, group, lengths, device)


@pytest.mark.parametrize("group", [2, 3, 5, 6, 7, 9, 16])
@pytest.mark.parametrize("device", DEVICES[1:])
def test_any_number_of_query_heads_shares_a_kv_head(device, group):
    check_attention(Layout(128), 2, group, (1, 64, 200, 1500), device)


@pytest.mark.parametrize("kv_heads", [1, 3, 32])
@pytest.mark.parametrize("device", DEVICES[1:])
def test_any_number_of_kv_heads(device, kv_heads):
    check_attention(Layout(128), kv_heads, 1, (5, 700, 1100), device)


@pytest.mark.parametrize("layout", [Layout(128), Layout(64), Layout(128, 16)], ids=str)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_long_contexts(device, layout):
    check_attention(layout, 2, 4, (70000, 5, 32768, 33000), device)


@pytest.mark.parametrize("layout", [Layout(128), Layout(96, 8), Layout(64, 16)], ids=str)
@pytest.mark.parametrize("window", [1, 64, 100, 1500])
@pytest.mark.parametrize("device", DEVICES[1:])
def test_windows_and_offsets(device, layout, window):
    check_attention(layout, 2, 4, RAGGED, device, window, with_offset=True)


@pytest.mark.parametrize("bits", paged.BITS)
@pytest.mark.parametrize(
    "scales",
    [(1, 1e-3, 1), (1, 1e-5, 1), (1, 5e3, 1), (5e3, 1, 1e-4), (30, 1, 1), (1e-4, 1, 1), (1, 1, 100)],
    ids=lambda scales: "k{:g}-v{:g}-q{:g}".format(*scales),
)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_sizes_of_keys_values_and_queries(device, scales, bits):
    key_scale, value_scale, query_scale = scales
    check_attention(Layout(128, bits), 2, 4, (3, 500, 1100), device, None, False, key_scale, value_scale, query_scale)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_constant_rows(device):
    layout, length = Layout(128), 200
    table, slots, pages = spread(length)
    cache = layout.allocate(pages, HKV)
    qkv = normal(0, length, HQ + 2 * HKV, 1).expand(-1, -1, 128).half().flatten(1)
    arguments = to(device, qkv, *tables(128), torch.zeros(length, dtype=torch.int64), slots, cache, table)
    qkv, cos, sin, positions, slots, cache, table = arguments
    q = rope_kv4_append(qkv, (cos, sin), positions, slots, cache, layout, KVTransform(False))
    lens = torch.tensor([length], dtype=torch.int32, device=device)
    found = kv4_decode(q[-1:], cache, layout, table, lens, 128**-0.5)
    expected = paged.attention(q[-1:], cache, layout, table, lens, 128**-0.5)
    assert off(found, expected) <= 1e-3 * float(expected.norm())


@pytest.mark.parametrize("layout", [Layout(128), Layout(96), Layout(256, 8), Layout(64, 16)], ids=str)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_sequence_does_not_depend_on_its_batch(device, layout):
    lengths = (1500, 40, 0, 1025, 64, 300, 5000, 2)
    cache, block_tables, lens = random_cache(layout, 2, lengths, device)
    q = queries(lengths, 8, layout, device)
    together = kv4_decode(q, cache, layout, block_tables, lens, 0.1)
    order = torch.tensor([6, 2, 0, 0, 7, 5, 1, 3, 4] * 30, device=device)
    wider = torch.nn.functional.pad(block_tables, (0, 1000), value=-5).contiguous()
    others = kv4_decode(q[order], cache, layout, wider[order].contiguous(), lens[order], 0.1)
    assert torch.equal(others, together[order])
    for b in range(len(lengths)):
        one = slice(b, b + 1)
        alone = kv4_decode(q[one], cache, layout, block_tables[one], lens[one].clone(), 0.1)
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("layout", [Layout(128), Layout(128, 16)], ids=str)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_nan_stays_in_its_row(device, layout):
    lengths = (1500, 40, 300)
    cache, block_tables, lens = random_cache(layout, 2, lengths, device)
    q = queries(lengths, 8, layout, device)
    clean = kv4_decode(q, cache, layout, block_tables, lens, 0.1)
    q[0, 3, 7], q[2, 0] = torch.nan, torch.nan
    found = kv4_decode(q, cache, layout, block_tables, lens, 0.1)
    bad = torch.zeros(3, 8, dtype=torch.bool, device=device)
    bad[0, 3] = bad[2, 0] = True
    assert found[bad].isnan().all()
    assert torch.equal(found[~bad], clean[~bad])


@pytest.mark.parametrize("device", DEVICES[1:])
def test_one_workspace_serves_many_calls_and_every_output_is_written(device):
    layout, lengths = Layout(128), (3000, 1500, 7, 0, 20000)
    cache, block_tables, lens = random_cache(layout, 2, lengths, device)
    workspace = Workspace.of(64, 32, 2, 128, 600, device)
    workspace.partials.fill_(torch.nan)
    for group in (4, 16, 1):
        q = queries(lengths, 2 * group, layout, device)
        expected = kv4_decode(q, cache, layout, block_tables, lens, 0.1)
        for rows in (slice(0, 5), slice(3, 5), slice(0, 1)):
            parts = q[rows], cache, 4, block_tables[rows], lens[rows].clone(), 0.1, 0, None, False
            out = torch.full_like(q[rows], torch.nan)
            attention._decode(*parts, workspace.partials, workspace.counters, out)
            assert torch.equal(out, expected[rows])
            assert not workspace.counters.any()


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_captured_graph_follows_lengths_and_tables(device):
    layout, kv, lengths = Layout(128), transforms(128)[2].to(device), (1500, 40, 1025, 63)
    cache, block_tables, lens = random_cache(layout, HKV, lengths, device)
    qkv = normal(0, 4, (HQ + 2 * HKV) * 128).half().to(device)
    rope = tables(128, 4096)
    cos, sin = to(device, *rope)
    workspace = Workspace.of(4, HQ, HKV, 128, block_tables.shape[1], device)
    positions, slots = torch.zeros(4, dtype=torch.int64, device=device), torch.full((4,), -1, device=device)

    def step() -> Tensor:
        q = rope_kv4_append(qkv, (cos, sin), positions, slots, cache, layout, kv, RATIOS)
        return kv4_decode(q, cache, layout, block_tables, lens, 0.1, None, kv.v_offset, workspace)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for turn in range(3):
        order = torch.roll(torch.arange(4, device=device), turn)
        block_tables.copy_(block_tables[order])
        lens.copy_(lens[order])
        positions.copy_(lens - 1)
        page = block_tables.gather(1, (positions // PAGE)[:, None])[:, 0]
        slots.copy_(page * PAGE + positions % PAGE)
        qkv.copy_(normal(turn, *qkv.shape))
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        from_graph = out.clone()
        assert torch.equal(from_graph, step())
        q = rope_kv4_append(qkv, (cos, sin), positions, slots, cache, layout, kv, RATIOS)
        expected = paged.attention(q, cache, layout, block_tables, lens, 0.1, None, kv.v_offset)
        assert off(from_graph, expected) <= 2e-3 * float(expected.norm())


@pytest.mark.parametrize("layout", [Layout(128), Layout(96), Layout(256, 8), Layout(64, 16)], ids=str)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_settled_tokens_are_read_while_the_last_ones_are_appended(device, layout):
    """Whose places hold NaN until then."""
    lengths = (1, 2, 16, 17, 40, 64, 65, 129, 300, 511, 512, 513, 1500, 2049, 5000)
    cache, block_tables, lens = random_cache(layout, HKV, lengths, device)
    qkv = normal(0, len(lengths), (HQ + 2 * HKV) * layout.head_dim).half().to(device)
    cos, sin = to(device, *tables(layout.head_dim, max(lengths)))
    positions = lens.long() - 1
    pages = block_tables.gather(1, (positions // PAGE)[:, None])[:, 0].long()
    slots, kv = pages * PAGE + positions % PAGE, transforms(layout.head_dim)[2].to(device)

    def step(settled: bool) -> Tensor:
        for side in paged.sides(cache, layout):
            side.codes[pages, :, positions % PAGE] = 0xFF
            if side.grids is not None:
                side.grids[pages, :, positions % PAGE] = torch.nan
        torch.cuda.synchronize()
        q = rope_kv4_append(qkv, (cos, sin), positions, slots, cache, layout, kv, RATIOS)
        return kv4_decode(q, cache, layout, block_tables, lens, 0.1, None, kv.v_offset, workspace, settled)

    workspace = Workspace.of(len(lengths), HQ, HKV, layout.head_dim, block_tables.shape[1], device)
    expected = step(False)
    assert expected.isfinite().all()
    for _ in range(5):
        assert torch.equal(step(True), expected)


@pytest.mark.parametrize(
    ("layout", "kv_heads", "group", "window"),
    [
        (Layout(128), 2, 4, None),
        (Layout(128), 8, 4, None),
        (Layout(128), 1, 8, None),
        (Layout(64), 1, 1, 100),
        (Layout(96, 8), 2, 12, None),
        (Layout(256, 8), 2, 3, 300),
        (Layout(128, 16), 2, 4, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("many", [False, True], ids=["", "many"])
@pytest.mark.parametrize("device", DEVICES)
def test_appending_and_attending_in_one_kernel(device, layout, kv_heads, group, window, many):
    """Whatever was where the new tokens go; two rows stand for nobody."""
    lengths = (0, *range(1, 600, 2), 0) if many else (1, 2, 63, 64, 65, 300, 513, 0, 0)
    if device != "cpu":
        lengths += (2049, 5000)
    elif many:
        lengths = lengths[-40:]
    cache, block_tables, lens = random_cache(layout, kv_heads, lengths, device)
    qkv = normal(0, len(lengths), (group + 2) * kv_heads * layout.head_dim).half().to(device)
    cos, sin = to(device, *tables(layout.head_dim, max(lengths)))
    positions = (lens.long() - 1).clamp_min(0)
    pages = block_tables.gather(1, (positions // PAGE)[:, None])[:, 0].long()
    slots = torch.where(lens > 0, pages * PAGE + positions % PAGE, -1)
    kv = KVTransform(True, *(normal(seed, kv_heads, layout.head_dim).half() for seed in (1, 2))).to(device)
    weights = [normal(seed, layout.head_dim).half() for seed in (3, 4)]
    norms = HeadNorms(weights[0], weights[1], 1e-6).to(device) if many else None
    sizes = len(lengths), kv_heads * group, kv_heads, layout.head_dim, block_tables.shape[1]
    workspace, there = Workspace.of(*sizes, device), lens > 0
    workspace.partials.fill_(torch.nan)
    for side in paged.sides(cache, layout):
        side.codes[pages[there], :, positions[there] % PAGE] = 0xFF
        if side.grids is not None:
            side.grids[pages[there], :, positions[there] % PAGE] = torch.nan
    before = cache.clone()
    q = rope_kv4_append(qkv, (cos, sin), positions, slots, cache, layout, kv, RATIOS, norms)
    expected = kv4_decode(q, cache, layout, block_tables, lens, 0.1, window, kv.v_offset, workspace)
    assert expected.isfinite().all()
    for settled in (False, True) * (3 if device != "cpu" else 1):
        own = before.clone()
        if device != "cpu":
            torch.cuda.synchronize()
        seen = block_tables, lens, 0.1
        new = qkv, (cos, sin), own, layout, kv
        found = kv4_append_decode(*new, *seen, RATIOS, norms, window, workspace, settled)
        assert torch.equal(found, expected) and torch.equal(own, cache)
        assert not workspace.counters.any()


# What is compiled, and what is refused


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_999"])
def test_every_layout_fits_every_card(arch):
    shared = attention.SHARED_BYTES.get(arch, attention.LEAST_SHARED_BYTES)
    for layout in LAYOUTS:
        tile = Tile.of(layout, arch)
        assert tile.stages >= 2 and tile.blocks * (tile.shared_bytes(layout) + attention.BLOCK_BYTES) <= shared
        assert tile.apart or attention.result_bytes(layout) <= tile.stages * attention.stage_bytes(layout)


def test_long_sequences_are_split():
    assert [attention.max_splits(pages) for pages in (0, 1, 32, 33, 64, 1024, 10000)] == [1, 1, 1, 2, 2, 32, 32]
    assert Workspace.of(3, 8, 2, 128, 32, "cpu").partials.numel() == 0
    assert Workspace.of(3, 8, 2, 128, 64, "cpu").partials.numel() == 3 * 2 * 2 * 4 * 130
    assert Workspace.of(3, 48, 4, 128, 16, "cpu").counters.numel() == 2 + 3 * 4 * 2


def test_wrong_arguments_are_refused():
    layout = Layout(64)
    cache, block_tables, lens = random_cache(layout, 2, (70, 3), "cpu")
    q = queries((70, 3), 4, layout, "cpu")
    with pytest.raises(ValueError, match="cache: .* expected torch.uint8"):
        kv4_decode(q, cache, Layout(128), block_tables, lens, 0.1)
    with pytest.raises(ValueError, match="q: 3 heads, expected a multiple of 2"):
        kv4_decode(q[:, :3].contiguous(), cache, layout, block_tables, lens, 0.1)
    with pytest.raises(ValueError, match="context_lens: torch.int64"):
        kv4_decode(q, cache, layout, block_tables, lens.long(), 0.1)
    with pytest.raises(ValueError, match="scale: 0"):
        kv4_decode(q, cache, layout, block_tables, lens, 0)
    with pytest.raises(ValueError, match="workspace: 2 elements"):
        kv4_decode(q, cache, layout, block_tables, lens, 0.1, workspace=Workspace.of(0, 4, 2, 64, 1, "cpu"))
    qkv, rope = normal(0, 2, 8 * 64).half(), tables(64)
    with pytest.raises(ValueError, match="qkv: rows of 512, expected .Hq . 2 . 3. . 64"):
        kv4_append_decode(qkv, rope, layout.allocate(1, 3), layout, KVTransform(False), block_tables, lens, 0.1)
    with pytest.raises(ValueError, match="block_tables: torch.int64"):
        kv4_append_decode(qkv, rope, cache, layout, KVTransform(False), block_tables.long(), lens, 0.1)
