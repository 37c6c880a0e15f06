"""The engine: a request gives the same tokens whatever runs beside it, and ends where it must."""

import dataclasses
import json

import pytest
import torch
from conftest import GROUP_SIZES, VOCAB, WINDOW, make_tokenizer, relative
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qoq.checkpoint import Checkpoint
from qoq.errors import CheckpointError, ModelError, QoqError
from qoq.quant import quantize_rows
from qoq.runtime import graphs, loading, model, text_stream
from qoq.runtime.engine import LLMEngine, RequestOutput
from qoq.runtime.executor import Executor
from qoq.runtime.graphs import GraphExecutor, batch_sizes
from qoq.runtime.linear import PackedLinear, UnpackedLinear, joined_tensors
from qoq.runtime.pages import Pages
from qoq.runtime.sampler import Choice, Draws, SamplingParams
from qoq.runtime.scheduler import Chunk, Request, Scheduler
from qoq.runtime.text_stream import TextStream, decode_each

PROMPT = "Nobody knows"
SEEDED = SamplingParams(max_tokens=10, temperature=1.5, top_k=100, top_p=0.95, seed=3, ignore_eos=True)


def ids(length, seed=9):
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedily(max_tokens, **changes):
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **changes)


@pytest.fixture(scope="module")
def loaded(checkpoint_folder):
    """One loaded engine for all tests of the module; `fresh` gives it without memory of the others."""
    return LLMEngine.from_checkpoint(checkpoint_folder(), memory_bytes=1 << 20)


def fresh(loaded, pages=40, max_num_seqs=8, max_num_batched_tokens=512, ahead=False):
    """The same model with an empty cache and another scheduler."""
    loaded.executor.allocate(pages)
    scheduler = Scheduler(Pages(pages, 64), max_num_seqs, max_num_batched_tokens)
    return LLMEngine(loaded.executor, scheduler, loaded.tokenizer, loaded.eos_token_ids, loaded.max_model_len, ahead)


class Replayed:
    """A graph that is replayed by computing what it captured."""

    def __init__(self, executor, size):
        self.executor, self.size = executor, size

    def replay(self):
        batch = self.executor.batches[self.size]
        self.executor.out[: self.size].copy_(self.executor.executor.hidden(batch))


@pytest.fixture
def with_graphs(monkeypatch):
    """An engine's like, whose steps of decodes alone are graphs."""
    monkeypatch.setattr(graphs, "workspace", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(GraphExecutor, "_capture", lambda self, size, pool: Replayed(self, size))

    def made(engine):
        executor = GraphExecutor(engine.executor, engine.scheduler.max_requests)
        rest = engine.scheduler, engine.tokenizer, engine.eos_token_ids, engine.max_model_len, engine.ahead
        return LLMEngine(executor, *rest)

    return made


@pytest.fixture(params=["", "graphs"])
def engine(loaded, request, with_graphs):
    """As on a CPU, and as on a GPU: one step ahead, with graphs."""
    return with_graphs(fresh(loaded, ahead=True)) if request.param else fresh(loaded)


def choose(logits, draws):
    """draws: params, seed and position of each row."""
    params, seeds, positions = zip(*draws, strict=True)
    return Choice(logits, Draws(params, seeds, logits.device), torch.tensor(positions)).read()


def tokens_of(outputs):
    return [output.token_ids for output in outputs]


def hidden(engine, tokens, sizes):
    """The residual stream of all tokens, fed in chunks of these sizes."""
    request = Request("x", list(tokens), len(tokens), pages=engine.scheduler.pages.take(-(-len(tokens) // 64)))
    request.prompt_length = sizes[0]  # what follows in chunks of one is decoded
    start, parts = 0, []
    for size in sizes:
        batch = engine._batches.of([Chunk(request, start, size, False)])
        parts.append(engine.executor.hidden(batch).clone())
        start += size
    assert start == len(tokens)
    return torch.cat(parts)


# The model


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_logits_are_the_decoders(checkpoint_folder, group_size):
    folder, tokens = checkpoint_folder("llama", group_size), ids(80)
    engine = LLMEngine.from_checkpoint(folder, memory_bytes=1 << 20)
    decoder = model.load(folder)
    expected = decoder(torch.tensor([tokens]), model.KVCache(2, decoder.kv_cache))[0]
    assert relative(engine.executor.logits(hidden(engine, tokens, [80])), expected) < 1e-3


def test_greedy_tokens_are_the_decoders(any_checkpoint):
    """Every family: biases, QK-norm, a sliding window of 16 tokens."""
    engine, tokens = LLMEngine.from_checkpoint(any_checkpoint, memory_bytes=1 << 20), ids(3 * WINDOW)
    expected = list(model.greedy(model.load(any_checkpoint), tokens, 20))
    assert tokens_of(engine.generate([tokens], greedily(20))) == [expected]


def test_prefill_in_chunks_is_one_prefill(any_checkpoint):
    """Chunks of one token go through decode attention."""
    engine, tokens = LLMEngine.from_checkpoint(any_checkpoint, memory_bytes=1 << 20), ids(100)
    whole = hidden(engine, tokens, [100])
    for sizes in ([64, 36], [7, 50, 30, 13], [70, *[1] * 30]):
        assert relative(hidden(engine, tokens, sizes), whole) < 1e-3


@pytest.mark.parametrize("bits", [8, 16])
def test_wider_caches_are_nearer_to_a_float_one(checkpoint_folder, bits):
    folder, tokens = checkpoint_folder(), ids(80)
    decoder = model.load(folder)
    engine = LLMEngine.from_checkpoint(folder, kv_bits=bits, memory_bytes=1 << 20)
    found = engine.executor.logits(hidden(engine, tokens, [40, 40]))
    assert relative(found, decoder(torch.tensor([tokens]))[0]) < {8: 0.05, 16: 0.02}[bits]


@pytest.mark.parametrize(("family", "group_size"), [("llama", 128), ("llama", -1), ("qwen2", 64)])
def test_both_kinds_of_linears_are_the_checkpoints(checkpoint_folder, family, group_size):
    """Joined as packed tensors, on a GPU and on a CPU, they give the bits of each linear by itself."""
    checkpoint, names = Checkpoint(checkpoint_folder(family, group_size)), [f"self_attn.{x}_proj" for x in "qkv"]
    tensors = joined_tensors(checkpoint, 1, names)
    x = torch.randn(3, checkpoint.spec.hidden_size, generator=torch.Generator().manual_seed(0)).half()
    expected = torch.cat([checkpoint.linear(1, name)(x) for name in names], dim=1)
    residual = expected.flip(0)
    for linear in (PackedLinear.of(tensors, "x"), UnpackedLinear.of(tensors, "x")):
        assert torch.equal(linear(quantize_rows(x)), expected)
        assert torch.equal(linear(quantize_rows(x), residual), residual + expected)
    tensors["s1_scales"][5] = torch.nan
    for kind in (PackedLinear, UnpackedLinear):
        with pytest.raises(CheckpointError, match="model.layers.1.x"):
            kind.of(tensors, "model.layers.1.x")


def test_a_graph_computes_its_batch(engine, loaded, with_graphs):
    """Batches between two sizes, prefills beside decodes."""
    prompts, params = [ids(5 + 30 * i, i) for i in range(6)], [greedily(3 + i) for i in range(6)]
    expected = tokens_of(engine.generate(prompts, params))
    again = with_graphs(fresh(loaded, max_num_batched_tokens=100))
    assert tokens_of(again.generate(prompts, params)) == expected


# Requests beside each other


def test_a_batch_is_its_requests(engine, loaded):
    prompts = [ids(5, 1), PROMPT, ids(90, 2), ids(70, 3), "Fox"]
    params = [greedily(12), SEEDED, greedily(4), dataclasses.replace(SEEDED, seed=4), greedily(9, logprobs=2)]
    together = engine.generate(prompts, params)
    for prompt, own, output in zip(prompts, params, together, strict=True):
        alone = fresh(loaded).generate([prompt], own)[0]
        assert alone.token_ids == output.token_ids and alone.text == output.text
        assert len(output.token_ids) == own.max_tokens and output.finish_reason == "length"


def test_chunks_give_the_same_tokens(engine, loaded):
    prompts, params = [ids(150, 1), ids(60, 2), ids(33, 3)], [greedily(8), SEEDED, greedily(8)]
    expected = tokens_of(engine.generate(prompts, params))
    for budget in (40, 7):
        assert tokens_of(fresh(loaded, max_num_batched_tokens=budget).generate(prompts, params)) == expected


def test_a_prefix_hit_gives_the_same_tokens(engine, loaded):
    tokens = ids(150)
    first = engine.generate([tokens], greedily(8))
    engine.add_request("again", tokens, greedily(8))
    assert engine.scheduler.schedule()[0].start == 128
    engine.abort_request("again")
    engine.step()
    assert tokens_of(engine.generate([tokens], greedily(8))) == tokens_of(first)
    longer = tokens + first[0].token_ids + ids(10)
    assert tokens_of(engine.generate([longer], SEEDED)) == tokens_of(fresh(loaded).generate([longer], SEEDED))


def test_preemption_gives_the_same_tokens(engine, loaded, monkeypatch):
    prompts, params = [ids(60, seed) for seed in range(4)], [greedily(80), dataclasses.replace(SEEDED, max_tokens=80)]
    expected = tokens_of(engine.generate(prompts, params * 2))
    crowded = fresh(loaded, pages=5)
    evicted = []
    preempt = crowded.scheduler._preempt

    def counted():
        evicted.append(preempt())
        return evicted[-1]

    monkeypatch.setattr(crowded.scheduler, "_preempt", counted)
    assert tokens_of(crowded.generate(prompts, params * 2)) == expected
    assert len(evicted) >= 3 and crowded.scheduler.pages.free == 5


def test_requests_come_and_go(engine):
    """One is aborted, one comes later; the others do not notice."""
    expected = tokens_of(engine.generate([ids(20, 1), ids(20, 2)], greedily(10)))
    engine.add_request("a", ids(20, 1), greedily(10))
    engine.add_request("b", PROMPT, greedily(200))
    done = {}
    for step in range(20):
        if step == 3:
            engine.add_request("c", ids(20, 2), greedily(10))
        if step == 5:
            assert engine.abort_request("b") and not engine.abort_request("b") and not engine.abort_request("nobody")
            assert engine.has_unfinished_requests()
        for output in engine.step():
            assert output.request_id not in done
            if output.finish_reason:
                done[output.request_id] = output
    assert not engine.has_unfinished_requests() and engine.step() == []
    assert [done["a"].token_ids, done["c"].token_ids] == expected
    assert done["b"].finish_reason == "abort" and len(done["b"].token_ids) == (4 if engine.ahead else 5)
    assert engine.scheduler.pages.free == 40


def test_unseeded_requests_differ(engine):
    free = SamplingParams(max_tokens=8, temperature=5.0, ignore_eos=True)
    first, second = engine.generate([PROMPT, PROMPT], free)
    assert first.token_ids != second.token_ids


def test_a_broken_model_ends_its_request_alone(engine, monkeypatch):
    """NaN in one request's logits."""
    expected = engine.generate([PROMPT], greedily(6))[0].token_ids
    logits = engine.executor.logits

    def broken(x):
        found = logits(x).clone()
        found[len(found) - 1 :] = torch.nan
        return found

    engine.add_request("good", PROMPT, greedily(6))
    engine.add_request("bad", "Fox", greedily(6))
    monkeypatch.setattr(engine.executor, "logits", broken)
    outputs = engine.step()
    monkeypatch.undo()
    outputs = outputs or engine.step()
    assert [output.finish_reason for output in outputs] == [None, "error"] and "not a number" in outputs[1].error
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert outputs[0].token_ids == expected


# Where a request ends


def test_outputs_add_up(engine):
    outputs = list(engine.stream(PROMPT, greedily(12, logprobs=3)))
    assert [len(output.token_ids) for output in outputs] == list(range(1, 13))
    assert "".join(output.delta for output in outputs) == outputs[-1].text
    last = outputs[-1]
    assert last.prompt_token_ids == engine.tokenizer(PROMPT).input_ids and last.finish_reason == "length"
    assert last.text == engine.tokenizer.decode(last.token_ids, skip_special_tokens=True).rstrip("\ufffd")
    assert [max(told, key=told.get) for told in last.logprobs] == last.token_ids
    assert all(len(told) == 3 for told in last.logprobs)
    assert not engine.has_unfinished_requests()


def test_an_output_stays_as_it_was(engine):
    """And shares the answer with the others: a step adds what is new to it."""
    outputs = list(engine.stream(PROMPT, greedily(12, logprobs=1)))
    last = outputs[-1]
    for count, output in enumerate(outputs, start=1):
        assert output.answer is last.answer
        assert output.token_ids == last.token_ids[:count] and output.logprobs == last.logprobs[:count]
        assert output.text == "".join(earlier.delta for earlier in outputs[:count])


def test_logprobs_of_a_prompt_are_the_models(engine, loaded, checkpoint_folder):
    """In chunks too; a prompt that was computed before is computed again for them."""
    tokens = ids(150)
    decoder = model.load(checkpoint_folder())
    told = decoder(torch.tensor([tokens]), model.KVCache(2, decoder.kv_cache))[0].log_softmax(1)
    engine.generate([tokens], greedily(1))
    params = SamplingParams(max_tokens=0, prompt_logprobs=2)
    small = fresh(loaded, max_num_batched_tokens=37, ahead=engine.ahead)
    for output in (engine.generate([tokens], params)[0], small.generate([ids(9), tokens], params)[1]):
        assert output.token_ids == [] and output.text == "" and output.finish_reason == "length"
        first, *others = output.prompt_logprobs
        assert first is None and len(others) == len(tokens) - 1
        for position, own in enumerate(others):
            assert own[tokens[position + 1]] == pytest.approx(float(told[position, tokens[position + 1]]), abs=0.02)
            assert max(own.values()) == pytest.approx(float(told[position].max()), abs=0.02) and len(own) in (2, 3)


def test_a_stream_that_is_left_is_forgotten(engine):
    for output in engine.stream(PROMPT, greedily(50)):
        if len(output.token_ids) == 3:
            break
    assert not engine.has_unfinished_requests() and engine.scheduler.pages.free == 40


def test_stop_ids_end_the_text_and_are_left_out_of_it(engine):
    tokens = engine.generate([PROMPT], greedily(8))[0].token_ids
    stop = tokens[3]
    output = engine.generate([PROMPT], greedily(8, stop_token_ids=[stop]))[0]
    assert output.token_ids == tokens[: tokens.index(stop) + 1] and output.finish_reason == "stop"
    kept = engine.tokenizer.decode(output.token_ids[:-1], skip_special_tokens=True)
    assert output.text == kept.rstrip("\ufffd")


def test_eos_stops_unless_ignored(engine, copy_of, checkpoint_folder):
    tokens = engine.generate([PROMPT], greedily(8))[0].token_ids
    folder = copy_of(checkpoint_folder())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, tokens[2]]}))
    stopping = LLMEngine.from_checkpoint(folder)
    assert stopping.eos_token_ids == {300, tokens[2]}
    output = stopping.generate([PROMPT], SamplingParams(max_tokens=8))[0]
    assert output.token_ids == tokens[: tokens.index(tokens[2]) + 1] and output.finish_reason == "stop"
    assert stopping.generate([PROMPT], greedily(8))[0].token_ids == tokens


def test_eos_is_known_without_a_generation_config(copy_of, checkpoint_folder):
    folder = copy_of(checkpoint_folder())
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert LLMEngine.from_checkpoint(folder).eos_token_ids == {257}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert LLMEngine.from_checkpoint(folder).eos_token_ids == {257}  # the tokenizer's
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [9]}))
    for generation in ({}, {"eos_token_id": None, "max_new_tokens": -1}):
        (folder / "generation_config.json").write_text(json.dumps(generation))
        assert LLMEngine.from_checkpoint(folder).eos_token_ids == {9}


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ([257], r"generation_config.json: cannot be read \(expected an object\)"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected token ids"),
        ({"eos_token_id": [257, None]}, r"eos_token_id is \[257, None\], expected token ids"),
    ],
)
def test_a_bad_generation_config_is_one_line(copy_of, checkpoint_folder, generation, message):
    folder = copy_of(checkpoint_folder())
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(CheckpointError, match=message):
        LLMEngine.from_checkpoint(folder)


def test_the_context_is_not_left(engine):
    assert engine.max_model_len == 256
    with pytest.raises(QoqError, match="prompt of 256 tokens, the model takes fewer than 256"):
        engine.add_request("long", [1] * 256)
    output = engine.generate([[1] * 250], greedily(100))[0]
    assert len(output.token_ids) == 6 and output.finish_reason == "length"


# Text


def stream_of(text, stop=()):
    """The bytes of a text as tokens -> the text after each, and whether it stopped."""
    tokenizer = make_tokenizer()
    stream, shown = TextStream(tokenizer, stop), [""]
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        stream.push(token)
        shown.append(shown[-1] + stream.take())
        if stream.stopped:
            break
    return stream, shown[1:]


def test_characters_come_whole():
    stream, shown = stream_of("aé€😀b")
    assert shown == ["a", "a", "aé", "aé", "aé", "aé€", *["aé€"] * 3, "aé€😀", "aé€😀b"]
    stream.finish()
    assert stream.take() == ""


def test_a_character_that_is_never_finished_is_left_out():
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer)
    for token in tokenizer("a€", add_special_tokens=False).input_ids[:-1]:
        stream.push(token)
    stream.finish()
    assert stream.take() == "a"


def pieces_tokenizer():
    """As Llama 2's: it drops the space before the first token that it decodes; bytes are tokens, </s> is special."""
    vocab = {"▁one": 0, "▁two": 1, "x": 2, "<0xC3>": 3, "<0xA9>": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    parts = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(list(parts))
    tokenizer.add_special_tokens(["</s>"])  # 5
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def taken(stream, tokens):
    """What each token adds."""
    found = []
    for token in tokens:
        stream.push(token)
        found.append(stream.take())
    return found


def test_a_piece_is_decoded_behind_the_one_before():
    stream = TextStream(pieces_tokenizer())
    assert taken(stream, (0, 1, 2, 3, 4, 1)) == ["one", " two", "x", "", "é", " two"]


@pytest.mark.parametrize(
    ("prompt", "tokens", "expected"),
    [
        ([0], [1, 2], [" two", "x"]),
        ([5, *[2] * 20], [1], [" two"]),
        ([0, 5], [1, 1], ["two", " two"]),  # behind a special token, as of a chat template, text begins anew
        ([0, 5, 2], [5, 1], ["", " two"]),
        ([0, 3], [4, 1], ["é", " two"]),  # a character that the prompt began
        ([0, 3], [2, 1], ["x", " two"]),  # and one that nobody finishes
        ([3, 4] * 6, [3, 4, 1], ["", "é", " two"]),
        ([2, *[3, 4] * 4][:-1], [4, 3, 4], ["é", "", "é"]),
        ([*[3, 4] * 4, 2], [3, 4], ["", "é"]),  # the last tokens begin within a character
        ([*[3, 4] * 4, 3], [4, 1], ["é", " two"]),
    ],
)
def test_an_answer_is_decoded_behind_its_prompt(prompt, tokens, expected):
    stream = TextStream(pieces_tokenizer(), (), prompt)
    assert taken(stream, tokens) == expected
    stream.finish()
    assert stream.take() == ""


def test_an_answer_finishes_the_character_of_its_prompt(engine, monkeypatch):
    *prompt, last = engine.tokenizer("é").input_ids
    logits = torch.nn.functional.one_hot(torch.tensor([last]), VOCAB).float()
    monkeypatch.setattr(engine.executor, "logits", lambda x: logits)
    assert engine.generate([prompt], greedily(1))[0].text == "é"


def test_a_stop_string_is_none_of_the_prompt():
    stream = TextStream(pieces_tokenizer(), ["one two", "x x"], [5, 0])
    assert "".join(taken(stream, [1, 0])) == " two " and not stream.stopped
    assert "".join(taken(stream, [1])) == "" and stream.stopped


@pytest.mark.parametrize(("token", "text"), [(5, ""), (4, "\ufffd")])
def test_tokens_without_text_are_decoded_a_few_times(monkeypatch, token, text):
    """Special ones, and bytes that are no character."""
    longest = 0

    def counted(tokenizer, pieces):
        nonlocal longest
        longest = max(longest, *map(len, pieces))
        return decode_each(tokenizer, pieces)

    monkeypatch.setattr(text_stream, "decode_each", counted)
    stream = TextStream(pieces_tokenizer(), (), [0])
    assert "".join(taken(stream, [token] * 500 + [1])) == text * 500 + " two"
    assert longest < 20


def test_bytes_that_are_no_character_do_not_stop_the_text():
    tokenizer = make_tokenizer()
    stream, tokens = TextStream(tokenizer), tokenizer("é", add_special_tokens=False).input_ids
    for token in (*tokens[1:] * 3, *tokens, tokenizer("x").input_ids[1]):
        stream.push(token)
    assert stream.take() == "\ufffd\ufffd\ufffdéx"


@pytest.mark.parametrize(
    ("text", "stop", "expected", "last"),
    [
        ("one STOP two", ["STOP"], "one ", "one "),
        ("one STO two", ["STOP"], "one STO two", "one STO two"),
        ("ababac", ["abac", "zz"], "ab", "ab"),
        ("one\n\ntwo", ["two", "\n\n"], "one", "one"),
        ("half ST", ["STOP"], "half ST", "half "),
        ("né é€x", ["é€"], "né ", "né "),
    ],
)
def test_stop_strings_are_found_across_tokens(text, stop, expected, last):
    stream, shown = stream_of(text, stop)
    assert shown[-1] == last
    assert all(expected.startswith(part) for part in shown)  # nothing is taken back
    stream.finish()
    assert last + stream.take() == expected and stream.stopped == (expected != text)


def test_a_stop_string_ends_its_request(engine):
    plain = engine.generate([PROMPT], greedily(30))[0]
    text = plain.text
    stop = text[4:6]
    outputs = list(engine.stream(PROMPT, greedily(30, stop=stop)))
    assert outputs[-1].text == text[: text.index(stop)] and outputs[-1].finish_reason == "stop"
    assert "".join(output.delta for output in outputs) == outputs[-1].text
    assert plain.token_ids[: len(outputs[-1].token_ids)] == outputs[-1].token_ids


# Sampling


def test_a_draw_depends_on_its_row_alone():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    warm = SamplingParams(temperature=1.0, logprobs=4)
    draws = [(warm, 5, 7), (SamplingParams(), 0, 0), (warm, 5, 8)]
    tokens, logprobs = choose(logits, draws)
    for row, draw in enumerate(draws):
        assert choose(logits[row : row + 1].clone(), [draw]) == ([tokens[row]], [logprobs[row]])
    assert tokens[1] == int(logits[1].argmax()) and logprobs[1] is None
    for others in ([(warm, i, 7) for i in range(20)], [(warm, 5, i) for i in range(20)]):
        assert len(set(choose(logits[:1].expand(20, -1).contiguous(), others)[0])) > 5
    told = logits[0].log_softmax(0)
    own = logprobs[0] or {}
    assert set(own) == {*told.topk(4).indices.tolist(), tokens[0]}
    assert own[tokens[0]] == pytest.approx(float(told[tokens[0]]))
    assert choose(torch.full((1, 50), torch.nan), draws[:1]) == ([-1], [None])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": -1}, "max_tokens is -1, expected an integer of 0 or more"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number of 0 or more"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0}, "top_p is 0, expected a number above 0, up to 1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"seed": 1 << 63}, "expected an integer of 64 bits"),
        ({"stop": [""]}, "stop is '', expected strings that are not empty"),
        ({"stop": 3}, "stop is 3, expected a list"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids is 'a', expected token ids"),
        ({"logprobs": 21}, "logprobs is 21, expected an integer from 0 to 20"),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
    ],
)
def test_parameters_are_checked(changes, message):
    with pytest.raises(QoqError, match=message.replace("(", r"\(")):
        SamplingParams(**changes)


# Errors


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [
        ("new", [], "empty prompt"),
        ("new", [1, VOCAB], f"token id {VOCAB} in the prompt, expected 0..{VOCAB - 1}"),
        ("new", [1, -1], "token id -1"),
        ("new", [1, 2.0], "token id 2.0"),
        ("new", [1] * 300, "prompt of 300 tokens"),
        ("there", [1], "request there: a request of this id is in progress"),
    ],
)
def test_a_refused_request_harms_nobody(engine, name, prompt, message):
    expected = engine.generate([PROMPT], greedily(4))[0].token_ids
    engine.add_request("there", PROMPT, greedily(4))
    with pytest.raises(QoqError, match=message):
        engine.add_request(name, prompt)
    with pytest.raises(QoqError, match="other requests are in progress"):
        engine.generate([PROMPT])
    outputs: list[RequestOutput] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].token_ids == expected and {output.request_id for output in outputs} == {"there"}


def test_a_refused_prompt_refuses_the_list(engine):
    with pytest.raises(QoqError, match="empty prompt"):
        engine.generate([PROMPT, []])
    assert not engine.has_unfinished_requests() and engine.scheduler.pages.free == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "toaster"}, "device 'toaster', expected cpu, cuda or cuda:N"),
        ({"kv_bits": 5}, "kv_bits is 5, expected 4, 8, 16"),
        ({"max_model_len": 257}, "max_model_len is 257, expected 2 to 256"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_seqs": 2000}, "max_num_seqs is 2000, expected 1 to 1024"),
        ({"memory_bytes": 1000}, "1000 bytes of KV cache hold 0 tokens, max_model_len is 256"),
        ({"memory_bytes": 2 * 18432, "max_model_len": 200}, "hold 128 tokens, max_model_len is 200"),
    ],
)
def test_options_are_checked(checkpoint_folder, options, message):
    with pytest.raises((QoqError, ModelError), match=message):
        LLMEngine.from_checkpoint(checkpoint_folder(), **options)


def test_a_model_that_does_not_fit_is_one_line(checkpoint_folder, monkeypatch):
    def allocate(self, pages):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(Executor, "allocate", allocate)
    with pytest.raises(QoqError, match=r"llama.*: out of GPU memory \(CUDA out of memory\)$"):
        LLMEngine.from_checkpoint(checkpoint_folder())


def test_little_memory_is_a_short_model(checkpoint_folder):
    engine = LLMEngine.from_checkpoint(checkpoint_folder(), memory_bytes=2 * 18432 + 5)
    assert engine.max_model_len == 128 and engine.scheduler.pages.count == 2
    assert len(engine.generate([ids(120)], greedily(20))[0].token_ids) == 8


@pytest.mark.parametrize("max_requests", [3, 300])
def test_the_memory_probe_computes_the_most_logits(loaded, monkeypatch, max_requests):
    rows = []
    engine, logits = fresh(loaded), loaded.executor.logits

    def counted(x):
        rows.append(len(x))
        return logits(x)

    monkeypatch.setattr(loaded.executor, "logits", counted)
    for name in ("reset_peak_memory_stats", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    for name in ("max_memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8000, 10000))
    assert loading.free_bytes(engine.plain, max_requests, 64, 0.5) == 5000 - 1000 - 1000
    assert rows == [max(max_requests, loading.LOGPROB_ROWS)]


# On a GPU


def test_graphs_are_few_and_reach_the_largest_batch():
    assert batch_sizes(1) == [1] and batch_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert batch_sizes(256)[-2:] == [248, 256] and batch_sizes(1024)[-2:] == [992, 1024] and len(batch_sizes(256)) == 35


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graphs_compute_what_the_step_does(checkpoint_folder):
    """And that is what the CPU computes, but for roundings, which flip codes and so grow from layer to layer."""
    prompts = [ids(5, 1), ids(90, 2), ids(70, 3)]

    def engine(device):
        return LLMEngine.from_checkpoint(checkpoint_folder(), device, memory_bytes=1 << 20, max_num_seqs=5)

    replaying, launching, on_cpu = engine("cuda"), engine("cuda"), engine("cpu")
    assert isinstance(replaying.executor, GraphExecutor) and isinstance(launching.executor, GraphExecutor)
    launching.executor = launching.executor.executor
    found = replaying.generate(prompts, greedily(12))
    assert tokens_of(launching.generate(prompts, greedily(12))) == tokens_of(found)
    on_gpu, expected = (hidden(engine, ids(100), [64, 36]).cpu() for engine in (launching, on_cpu))
    assert relative(on_gpu, expected) < 0.1
