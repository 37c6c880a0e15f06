"""The runtime: decode, prefill in parts and one prefill are one function; the engine stops where it must."""

import json

import pytest
import torch
from conftest import VOCAB, WINDOW, relative

from qoq.errors import CheckpointError, QoqError
from qoq.quant import quantize_kv
from qoq.runtime import model
from qoq.runtime.cache import KVCache, pack_codes, unpack_codes
from qoq.runtime.engine import LLMEngine, SamplingParams, greedy

PROMPT = "Nobody knows"


def some_ids(length=3 * WINDOW):
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(9))


def in_parts(decoder, ids, sizes):
    """Logits of ids (1, T) fed in parts of these sizes."""
    cache, logits = KVCache(len(decoder.blocks), decoder.clip_ratios), []
    for chunk in ids.split(sizes, dim=1):
        logits.append(decoder(chunk, cache, start=cache.length))
    assert cache.length == ids.shape[1]
    return torch.cat(logits, dim=1)


@pytest.fixture(scope="module")
def engine(checkpoint_folder):
    return LLMEngine.from_checkpoint(checkpoint_folder())


# The model


def test_prefill_in_parts_is_one_prefill(any_checkpoint):
    decoder, ids = model.load(any_checkpoint), some_ids()
    whole = in_parts(decoder, ids, [48])
    assert relative(in_parts(decoder, ids, [1] * 48), whole) < 1e-3
    assert relative(in_parts(decoder, ids, [20, 1, 7, 20]), whole) < 1e-3


def test_a_batch_is_its_rows(any_checkpoint):
    decoder, ids = model.load(any_checkpoint), some_ids(24)
    other = ids.flip(1)
    both = decoder(torch.cat((ids, other)), KVCache(len(decoder.blocks), decoder.clip_ratios))
    assert relative(both[0], in_parts(decoder, ids, [24])[0]) < 1e-3
    assert relative(both[1], in_parts(decoder, other, [24])[0]) < 1e-3


def test_greedy_decoding_is_repeated_prefill(any_checkpoint):
    decoder, ids = model.load(any_checkpoint), some_ids(8)[0].tolist()
    tokens = list(greedy(decoder, ids, 24))
    for token in tokens:
        logits = decoder(torch.tensor([ids]), KVCache(len(decoder.blocks), decoder.clip_ratios))[0, -1]
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
    cache = KVCache(1, (1.0, 0.9))
    parts = [torch.randn(1, 2, n, 32, generator=generator).half() for n in (5, 1, 3)]
    for part in parts:
        k, v = cache(0, part, -part)
    whole = torch.cat(parts, dim=2)
    assert cache.length == 9
    for found, rows in ((k, whole), (v, -whole)):
        assert torch.equal(found, quantize_kv(rows, clip_ratios=(1.0, 0.9)).dequantize())
    assert sum(chunk.codes.numel() for chunk in cache.keys[0]) == whole.numel() // 2


def test_codes_are_packed_even_dimension_low():
    rows = quantize_kv(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
    packed = pack_codes(rows)
    assert packed.codes.shape == (3, 32)
    assert torch.equal(packed.codes & 15, rows.codes[:, 0::2]) and torch.equal(packed.codes >> 4, rows.codes[:, 1::2])
    assert torch.equal(unpack_codes(packed).codes, rows.codes)


# The engine


def test_generation_is_greedy_text(engine):
    output = engine.generate([PROMPT], SamplingParams(max_tokens=8, ignore_eos=True))[0]
    assert output.prompt_token_ids == engine.tokenizer(PROMPT).input_ids
    assert output.token_ids == list(greedy(engine.decoder, output.prompt_token_ids, 8))
    assert output.text == engine.tokenizer.decode(output.token_ids)
    assert output.finish_reason == "length"


def test_prompts_do_not_disturb_each_other(engine):
    params = SamplingParams(max_tokens=6)
    together = engine.generate([PROMPT, "Fox", PROMPT], params)
    assert together[0] == together[2] == engine.generate([PROMPT], params)[0]
    assert together[1] == engine.generate(["Fox"], params)[0]


def test_stop_ids_end_the_text_and_are_left_out_of_it(engine):
    ids = engine.generate([PROMPT], SamplingParams(max_tokens=8, ignore_eos=True))[0].token_ids
    stop = ids[3]
    expected = ids[: ids.index(stop) + 1]
    output = engine.generate([PROMPT], SamplingParams(max_tokens=8, stop_token_ids=(stop,), ignore_eos=True))[0]
    assert output.token_ids == expected and output.finish_reason == "stop"
    assert output.text == engine.tokenizer.decode(expected[:-1])


def test_eos_stops_unless_ignored(engine, copy_of, checkpoint_folder):
    ids = engine.generate([PROMPT], SamplingParams(max_tokens=8, ignore_eos=True))[0].token_ids
    folder = copy_of(checkpoint_folder())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, ids[2]]}))
    stopping = LLMEngine.from_checkpoint(folder)
    assert stopping.eos_token_ids == {300, ids[2]}
    output = stopping.generate([PROMPT], SamplingParams(max_tokens=8))[0]
    assert output.token_ids == ids[: ids.index(ids[2]) + 1] and output.finish_reason == "stop"
    assert stopping.generate([PROMPT], SamplingParams(max_tokens=8, ignore_eos=True))[0].token_ids == ids


def test_eos_is_known_without_a_generation_config(copy_of, checkpoint_folder):
    folder = copy_of(checkpoint_folder())
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert LLMEngine.from_checkpoint(folder).eos_token_ids == {257}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert LLMEngine.from_checkpoint(folder).eos_token_ids == {257}  # the tokenizer's


def test_an_empty_prompt_is_refused(engine):
    with pytest.raises(QoqError, match="empty prompt"):
        list(engine.stream([], SamplingParams()))


def test_the_context_is_not_left(engine):
    assert engine.max_model_len == 256
    with pytest.raises(QoqError, match="prompt of 256 tokens, the model takes fewer than 256"):
        list(engine.stream([1] * 256, SamplingParams()))
    assert len(list(engine.stream([1] * 250, SamplingParams(max_tokens=100, ignore_eos=True)))) == 6


def test_no_tokens_asked_for_are_none(engine):
    output = engine.generate([PROMPT], SamplingParams(max_tokens=0))[0]
    assert output.token_ids == [] and output.text == "" and output.finish_reason == "length"
