"""A checkpoint as a decoder: decode, prefill in parts and one prefill are one function."""

import pytest
import torch
from conftest import VOCAB, WINDOW, relative

from qoq import recipe
from qoq.errors import CheckpointError
from qoq.paged import pack_codes, unpack_codes
from qoq.quant import quantize_kv
from qoq.runtime import model
from qoq.runtime.model import KVCache, greedy


def some_ids(length=3 * WINDOW):
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(9))


def in_parts(decoder, ids, sizes):
    """Logits of ids (1, T) fed in parts of these sizes."""
    cache, logits = KVCache(len(decoder.blocks), decoder.kv_cache), []
    for chunk in ids.split(sizes, dim=1):
        logits.append(decoder(chunk, cache, start=cache.length))
    assert cache.length == ids.shape[1]
    return torch.cat(logits, dim=1)


# The model


def test_prefill_in_parts_is_one_prefill(any_checkpoint):
    decoder, ids = model.load(any_checkpoint), some_ids()
    whole = in_parts(decoder, ids, [48])
    assert relative(in_parts(decoder, ids, [1] * 48), whole) < 1e-3
    assert relative(in_parts(decoder, ids, [20, 1, 7, 20]), whole) < 1e-3


def test_a_batch_is_its_rows(any_checkpoint):
    decoder, ids = model.load(any_checkpoint), some_ids(24)
    other = ids.flip(1)
    both = decoder(torch.cat((ids, other)), KVCache(len(decoder.blocks), decoder.kv_cache))
    assert relative(both[0], in_parts(decoder, ids, [24])[0]) < 1e-3
    assert relative(both[1], in_parts(decoder, other, [24])[0]) < 1e-3


def test_greedy_decoding_is_repeated_prefill(any_checkpoint):
    decoder, ids = model.load(any_checkpoint), some_ids(8)[0].tolist()
    tokens = list(greedy(decoder, ids, 24))
    for token in tokens:
        logits = decoder(torch.tensor([ids]), KVCache(len(decoder.blocks), decoder.kv_cache))[0, -1]
        assert logits[token] >= logits.max() - 1e-3 * logits.abs().max()
        ids.append(token)
    assert len(tokens) == 24


@pytest.mark.parametrize("group_size", [128, 64, -1])
def test_packed_integers_compute_what_was_simulated(checkpoint_folder, group_size):
    """Float fake quantization against int8 x int4: they differ by fp16 roundings that flip single codes."""
    folder, ids = checkpoint_folder("llama", group_size), some_ids()
    packed = in_parts(model.load(folder), ids, [48])
    simulated = in_parts(model.load(folder, simulate=True), ids, [48])
    assert packed.dtype == torch.float32
    assert relative(packed, simulated) < 0.1


def test_the_quantized_model_is_near_the_original(any_checkpoint, any_model):
    from test_decoder import reference_logits

    ids = some_ids()
    assert relative(in_parts(model.load(any_checkpoint), ids, [48]), reference_logits(any_model, ids)) < 0.6


def test_a_damaged_checkpoint_is_not_loaded(copy_of, checkpoint_folder):
    folder = copy_of(checkpoint_folder())
    path = folder / "model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        model.load(folder)


# The cache


def test_the_cache_holds_four_bits_a_value():
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(1, recipe.KVCache(clip_ratios=(1.0, 0.9)))
    parts = [torch.randn(1, 2, n, 32, generator=generator).half() for n in (5, 1, 3)]
    for part in parts:
        k, v = cache(0, part, -part)
    whole = torch.cat(parts, dim=2)
    assert cache.length == 9
    for found, rows in ((k, whole), (v, -whole)):
        assert torch.equal(found, quantize_kv(rows, clip_ratios=(1.0, 0.9)).dequantize())
    assert sum(chunk.codes.numel() for chunk in cache.keys[0]) == whole.numel() // 2


def test_a_layer_may_have_eight_bits_a_value():
    """Alone of the layers, and without the search."""
    x = torch.randn(1, 2, 5, 32, generator=torch.Generator().manual_seed(0)).half()
    cache = KVCache(2, recipe.KVCache(clip_ratios=(0.9, 0.5), layers_in_8_bits=(1,)))
    four, eight = cache(0, x, -x), cache(1, x, -x)
    assert torch.equal(four[0], quantize_kv(x, 4, (0.9, 0.5)).dequantize())
    assert torch.equal(eight[0], quantize_kv(x, 8).dequantize())
    assert torch.equal(eight[1], quantize_kv(-x, 8).dequantize())
    assert [chunks[0].codes.shape[-1] for chunks in cache.keys] == [16, 32] and cache.length == 5


def test_codes_are_packed_even_dimension_low():
    rows = quantize_kv(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
    packed = pack_codes(rows)
    assert packed.codes.shape == (3, 32)
    assert torch.equal(packed.codes & 15, rows.codes[:, 0::2]) and torch.equal(packed.codes >> 4, rows.codes[:, 1::2])
    assert torch.equal(unpack_codes(packed).codes, rows.codes)
