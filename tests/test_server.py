"""The server over a real socket, with the openai client: it says what the engine says, and errs in OpenAI's form."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import VOCAB, only_line

from qoq.checkpoint import Checkpoint
from qoq.runtime.engine import LLMEngine

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

MODEL, KEY = "tiny", "secret-é"
PROMPT = "Nobody knows"
GREEDY: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
LONG = GREEDY | {"max_tokens": 200, "extra_body": {"ignore_eos": True}}
FULL = {"ignore_eos": True}


class Served:
    """A server in a thread."""

    def __init__(self, engine: LLMEngine, **options: Any):
        from qoq.runtime.server import create_app

        self.app = create_app(engine, MODEL, **options)
        self.engine = self.app.state.engine
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(self.app, http="h11", log_config=None, timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self) -> "Served":
        self.thread.start()
        until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive() and not self.engine._thread.is_alive()

    def client(self, key: str = "none") -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def post(self, path: str, **options: Any) -> Any:
        return httpx.post(self.url + path, timeout=20, **options)


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def load(folder: Any, **options: Any) -> LLMEngine:
    return LLMEngine.from_checkpoint(folder, memory_bytes=1 << 20, **options)


@pytest.fixture(scope="module")
def served(checkpoint_folder: Callable[..., Any]) -> Iterator[Served]:
    with Served(load(checkpoint_folder())) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return served.client()


@pytest.fixture
def idle(served: Served) -> Iterator[None]:
    """Nothing is left behind."""
    yield
    until(lambda: served.engine.unfinished == 0)
    pages = served.engine.engine.scheduler.pages
    assert pages.free == pages.count


@contextmanager
def slow(server: Served, seconds: float = 0.03) -> Iterator[None]:
    engine, step = server.engine.engine, server.engine.engine.step

    def late() -> Any:
        time.sleep(seconds)
        return step()

    engine.step = late
    try:
        yield
    finally:
        engine.step = step


# Answers


def test_a_completion_is_the_engines(client, served):
    answer = client.completions.create(**GREEDY, extra_body=FULL)
    choice, usage = answer.choices[0], answer.usage
    assert answer.object == "text_completion" and answer.model == MODEL and choice.finish_reason == "length"
    prompt = len(PROMPT) + 1  # with <s>
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 8, prompt + 8)
    tokens = served.engine.engine.tokenizer(PROMPT).input_ids
    by_ids = client.completions.create(**GREEDY | {"prompt": tokens}, extra_body=FULL)
    assert by_ids.choices[0].text == choice.text
    echoed = client.completions.create(**GREEDY, echo=True, extra_body=FULL)
    assert echoed.choices[0].text == PROMPT + choice.text


def test_lists_of_prompts(client):
    texts = ["Fox", "The quick", PROMPT]
    alone = [client.completions.create(**GREEDY | {"prompt": text}).choices[0].text for text in texts]
    together = client.completions.create(**GREEDY | {"prompt": texts})
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in client.completions.create(**GREEDY | {"prompt": texts}, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone
    lists = client.completions.create(**GREEDY | {"prompt": [[1, 2, 3], [4]]})
    assert len(lists.choices) == 2 and lists.usage.prompt_tokens == 4


def test_a_stream_is_the_whole_in_parts(client, idle):
    whole = client.completions.create(**GREEDY, extra_body=FULL)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(**GREEDY, **options, extra_body=FULL))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage and len({chunk.id for chunk in chunks}) == 1


def test_chat(client, idle):
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**asked, extra_body=FULL)
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len("u:Hello\na:") and whole.usage.completion_tokens == 8
    by_hand = client.completions.create(**GREEDY | {"prompt": list(whole_ids("u:Hello\na:"))}, extra_body=FULL)
    assert by_hand.choices[0].text == whole.choices[0].message.content
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**asked, **options, extra_body=FULL))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage == whole.usage
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    in_parts = client.chat.completions.create(**asked | {"messages": [{"role": "user", "content": parts}]})
    assert in_parts.usage.prompt_tokens == whole.usage.prompt_tokens


def test_fields_that_change_nothing(client, served):
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    chat: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 4}
    texts = []
    changes: list[dict[str, Any]] = [
        {},
        {"user": "a", "metadata": {"b": "c"}, "store": True, "service_tier": "auto", "safety_identifier": "d"},
        {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "auto"},
        {"reasoning_effort": None, "logit_bias": None, "guided_json": None, "skip_special_tokens": True},
        {"chat_template_kwargs": None, "stop": None, "stream_options": None},
        {"messages": [{"role": "user", "content": "Hi", "name": "Jo", "tool_calls": None, "annotations": []}]},
    ]
    for more in changes:
        answer = served.post("/v1/chat/completions", json=chat | more)
        assert answer.status_code == 200, answer.text
        texts.append(answer.json()["choices"][0]["message"]["content"])
    assert len(set(texts)) == 1
    # an answer may come back in the form that the client gave it
    said = client.chat.completions.create(model=MODEL, **chat).choices[0].message.model_dump()
    asked = chat | {"messages": [*messages, said, *messages]}
    assert served.post("/v1/chat/completions", json=asked).status_code == 200


def test_variables_of_the_chat_template(checkpoint_folder):
    engine = load(checkpoint_folder())
    engine.tokenizer.chat_template = "{{ messages[0]['content'] }}{% if thinking is false %}<x>{% endif %}"
    with Served(engine) as server:
        counts = []
        for variables in ({}, {"thinking": True}, {"thinking": False}):
            asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
            answer = server.post("/v1/chat/completions", json=asked | {"chat_template_kwargs": variables})
            counts.append(answer.json()["usage"]["prompt_tokens"])
    assert counts == [2, 2, 5]


def whole_ids(text: str) -> list[int]:
    from conftest import make_tokenizer

    return make_tokenizer()(text, add_special_tokens=False).input_ids


def test_a_stream_ends_with_done(served):
    lines = served.post("/v1/completions", json=GREEDY | {"stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: {") for line in lines[:-2])


def test_stop_strings(client):
    whole = client.completions.create(**GREEDY | {"max_tokens": 30}, extra_body=FULL).choices[0].text
    stop = whole[4:6]
    for given in (stop, ["never this", stop]):
        choice = client.completions.create(**GREEDY | {"max_tokens": 30}, stop=given, extra_body=FULL).choices[0]
        assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"


def test_seeds(client):
    warm = GREEDY | {"temperature": 1.5, "max_tokens": 20, "extra_body": FULL | {"top_k": 100, "min_p": 0.01}}
    texts = [client.completions.create(**warm, top_p=0.95, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_requests_beside_each_other_are_each_alone(client, idle):
    prompts = [f"{number} foxes" for number in range(12)]

    def ask(prompt: str) -> str:
        asked = GREEDY | {"prompt": prompt, "max_tokens": 12, "temperature": 0.7 * (len(prompt) % 2)}
        return client.completions.create(**asked, seed=5, extra_body=FULL).choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, prompts)) == alone


def test_logprobs(client):
    told = client.completions.create(**GREEDY, logprobs=3, extra_body=FULL).choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == 8
    assert [max(top.values()) for top in told.top_logprobs] == told.token_logprobs  # greedy
    parts = [
        part.choices[0].logprobs
        for part in client.completions.create(**GREEDY, logprobs=3, stream=True, extra_body=FULL)
    ]
    assert [value for part in parts for value in part.token_logprobs] == told.token_logprobs
    assert [value for part in parts for value in part.text_offset] == told.text_offset
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 3}
    content = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)
    for count in (0, 1):  # a token that is not the likeliest is not among them
        warm = asked | {"temperature": 2, "max_tokens": 20, "seed": 1, "logprobs": True}
        content = client.chat.completions.create(**warm, top_logprobs=count or None).choices[0].logprobs.content
        assert {len(entry.top_logprobs) for entry in content} == {count}
    assert any(entry.token != entry.top_logprobs[0].token for entry in content)


def test_logprobs_of_parts_of_characters(client):
    """Each token is a byte here; what they make together is the text."""
    asked = GREEDY | {"prompt": "né→", "max_tokens": 0, "logprobs": 0, "echo": True}
    told = client.completions.create(**asked).choices[0].logprobs
    assert told.tokens == ["<s>", "n", *["\ufffd"] * 5]
    assert told.text_offset == [0, 0, 1, 1, 2, 2, 2]  # the text has no <s>
    messages = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "temperature": 2, "seed": 1}
    whole = client.chat.completions.create(**messages, max_tokens=60, logprobs=True, extra_body=FULL)
    content = whole.choices[0].logprobs.content
    assert all(len(entry.bytes) == 1 or entry.token in ("", "<s>", "</s>") for entry in content)
    assert any(entry.token == "\ufffd" for entry in content)
    said = b"".join(bytes(entry.bytes) for entry in content if entry.token not in ("<s>", "</s>"))
    assert said.decode(errors="replace").rstrip("\ufffd") == whole.choices[0].message.content.rstrip("\ufffd")


def test_logprobs_of_an_echo(client):
    """As lm-eval's local-completions asks for them: those of the prompt, then of one token."""
    asked = GREEDY | {"max_tokens": 1, "logprobs": 1, "echo": True}
    whole = client.completions.create(**asked).choices[0]
    told, count = whole.logprobs, len(whole_ids(PROMPT)) + 1  # and the tokenizer's first token
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == count + 1
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    for own, top in list(zip(told.token_logprobs, told.top_logprobs, strict=True))[1:]:
        assert own <= max(top.values())
    # a prompt's token has the log-probability that it would be sampled with
    asked["prompt"] = [256, *whole_ids(PROMPT)]
    by_ids = client.completions.create(**asked).choices[0]
    offsets = {"text_offset"}  # this text has the first token
    assert by_ids.logprobs.model_dump(exclude=offsets) == told.model_dump(exclude=offsets)
    for choice in (whole, by_ids):
        places = zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
        assert all(choice.text.startswith(name, offset) for name, offset in list(places)[1:count])
    before = asked | {"prompt": asked["prompt"][:5], "echo": False, "logprobs": 20}
    top = client.completions.create(**before).choices[0].logprobs.top_logprobs[0]
    name = told.tokens[5]
    assert name not in top or top[name] == pytest.approx(told.token_logprobs[5], abs=1e-3)
    (only,) = client.completions.create(**asked | {"max_tokens": 0}).choices
    assert only.text.endswith(PROMPT)
    assert only.logprobs.token_logprobs == told.token_logprobs[:-1] and only.finish_reason == "length"
    streamed = client.completions.create(**asked, stream=True)
    values = [
        value for part in streamed if part.choices[0].logprobs for value in part.choices[0].logprobs.token_logprobs
    ]
    assert values == told.token_logprobs


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_written_where_the_tokenizer_is(client, served, monkeypatch, stream):
    """A long answer has many; the event loop is for all clients."""
    from qoq.runtime.protocol import Reply

    threads, inner = set(), Reply._logprobs

    def seen(*args: Any) -> Any:
        threads.add(threading.current_thread())
        return inner(*args)

    monkeypatch.setattr(Reply, "_logprobs", seen)
    told = client.completions.create(**GREEDY, logprobs=1, echo=True, stream=stream)
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=4, logprobs=True, stream=stream
    )
    assert list(told) and list(chat)
    assert len(threads) == 1 and served.thread not in threads


def test_lm_eval_scores_through_the_server(served, checkpoint_folder):
    """Its local-completions asks for the log-probabilities of echoed token ids."""
    pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from qoq.evaluate import EngineModel
    from qoq.lm_eval_model import QoqLM

    folder = checkpoint_folder()
    checkpoint = Checkpoint(folder)
    here = QoqLM(EngineModel(checkpoint, "prefill"), checkpoint.tokenizer(), 256)
    url, names = f"{served.url}/v1/completions", {"model": MODEL, "tokenizer": str(folder)}
    there = LocalCompletionsAPI(base_url=url, **names, add_bos_token=True, max_length=256)
    pairs = [("Nobody knows", " the fox"), ("The quick", " brown fox jumps"), ("One", " two")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for (found, greedy), (expected, expected_greedy) in zip(
        there.loglikelihood(requests, disable_tqdm=True), here.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert found == pytest.approx(expected, abs=0.02) and greedy == expected_greedy


def test_what_is_served(client, served):
    assert [model.id for model in client.models.list()] == [MODEL]
    health = httpx.get(f"{served.url}/health")
    assert health.status_code == 200 and health.content == b""
    from qoq import __version__

    assert httpx.get(f"{served.url}/version").json() == {"version": __version__}


def test_metrics(client, served, idle):
    def counts() -> dict[str, float]:
        text = httpx.get(f"{served.url}/metrics").text
        rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("qoq:").replace(f'model_name="{MODEL}"', ""): float(value) for name, value in rows}

    before = counts()
    client.completions.create(**GREEDY, extra_body=FULL)
    after = counts()
    grown = {name: value - before[name] for name, value in after.items() if value != before[name]}
    length = 'request_success_total{,finished_reason="length"}'
    assert grown == {"prompt_tokens_total{}": len(PROMPT) + 1, "generation_tokens_total{}": 8, length: 1}
    assert after["num_requests_running{}"] == after["num_requests_waiting{}"] == after["kv_cache_usage_perc{}"] == 0


# Errors


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "empty prompt"),
        ({"prompt": [[]]}, "empty prompt"),
        ({"prompt": "x" * 300}, "prompt of 301 tokens, the model takes fewer than 256"),
        ({"prompt": [1, VOCAB]}, f"token id {VOCAB} in the prompt"),
        ({"prompt": [1, -1]}, "token id -1"),
        ({"prompt": [1, -1], "echo": True}, "token id -1"),
        ({"prompt": [[1], [True]]}, "token id True"),
        ({"prompt": [1, 2.5]}, "prompt: expected a string"),
        ({"prompt": ["a", 1]}, "prompt: expected a string"),
        ({"prompt": None}, "prompt: expected a string"),
        ({"prompt": [[1]] * 2000}, "2000 prompts, at most 1280 can wait"),
        ({"n": 2}, "n is not supported, expected 1"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"max_token": 5}, "max_token is not supported"),
        ({"guided_json": {}}, "guided_json is not supported"),
        ({"skip_special_tokens": False}, "skip_special_tokens is not supported, expected True"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs is not supported"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats is not"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": "8"}, "max_tokens: Input should be a valid integer"),
        ({"temperature": -1}, "temperature is -1"),
        ({"stop": [""]}, "stop is ''"),
        ({"stop": ["x"] * 17}, "stop: expected a string or at most 16 strings"),
        ({"stop": ["x", 1]}, "stop: expected a string or at most 16 strings"),
        ({"logprobs": 21}, "logprobs is 21"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_completion(served, idle, changes, message, stream):
    error = error_of(served.post("/v1/completions", json=GREEDY | changes | {"stream": stream}), 400)
    assert message in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages: "),
        ({"messages": [{"content": "x"}]}, "messages.0.role: Field required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content of type 'image_url'"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "the model takes fewer than 256"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"tools": [{}]}, "tools is not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort is not supported"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages.0.tool_call_id is not"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls is not supported"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs: Input should be"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template is not supported"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs.tokenize is not supported"),
        ({"chat_template_kwargs": {"messages": []}}, "the chat template refuses the messages"),
    ],
)
def test_a_refused_chat(served, idle, changes, message):
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert message in error_of(served.post("/v1/chat/completions", json=asked | changes), 400)["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'{"prompt": "\xff\xfe"}', b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"prompt": 1e999}'],
)
def test_a_body_that_is_no_request(served, idle, body):
    error_of(served.post("/v1/completions", content=body), 400)


def test_a_body_that_is_too_large(served):
    error_of(served.post("/v1/completions", content=b" " * (17 << 20)), 413)


def test_what_is_not_here(served, client):
    with pytest.raises(openai.NotFoundError, match="model 'other' is not here, expected 'tiny'"):
        client.completions.create(**GREEDY | {"model": "other"})
    error_of(served.post("/v1/embeddings", json={}), 404)
    error_of(httpx.get(f"{served.url}/v1/completions"), 405)
    assert served.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1}).status_code == 200  # any model


def test_huge_headers_harm_nobody(served, client):
    try:
        assert httpx.get(f"{served.url}/health", headers={"x": "y" * (1 << 20)}).status_code == 400
    except httpx.TransportError:
        pass  # closed while the client still wrote
    assert client.completions.create(**GREEDY)


def test_a_key_a_short_queue_and_a_dead_engine(checkpoint_folder):
    with Served(load(checkpoint_folder(), max_num_seqs=1), max_queue=1, api_key=KEY) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY.encode()}):
            response = server.post("/v1/completions", json=GREEDY, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/health").status_code == 200
        headers = {"Authorization": f"Bearer {KEY}".encode()}
        with slow(server), ThreadPoolExecutor(2) as pool:
            asked = GREEDY | {"max_tokens": 20} | FULL
            pending = [pool.submit(server.post, "/v1/completions", json=asked, headers=headers) for _ in range(2)]
            until(lambda: server.engine.unfinished == 2)
            assert (
                "at most 2 can" in error_of(server.post("/v1/completions", json=asked, headers=headers), 429)["message"]
            )
            texts = [job.result().json()["choices"][0]["text"] for job in pending]
        assert texts[0] == texts[1]

        def broken() -> None:
            raise RuntimeError("no more")

        server.engine.engine.step = broken  # type: ignore[method-assign, assignment]
        for _ in range(2):
            error = error_of(server.post("/v1/completions", json=GREEDY, headers=headers), 503)
            assert error["message"] == "the engine failed: no more"
        assert httpx.get(f"{server.url}/health").status_code == 503


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_has_its_request_aborted(served, idle, stream):
    engine, aborted = served.engine, served.engine.finished["abort"]
    asked = {"prompt": ["a", "b"], "max_tokens": 200, "temperature": 0, "stream": stream} | FULL
    body = json.dumps(asked).encode()
    with slow(served):
        with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":")[-1]))) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            until(lambda: engine.running == 2)
        until(lambda: engine.unfinished == 0, seconds=3)
    assert engine.finished["abort"] == aborted + 2


def test_a_reader_that_is_late_gets_all(client, served, idle):
    whole = client.completions.create(**LONG).choices[0].text
    stream = client.completions.create(**LONG, stream=True)
    until(lambda: served.engine.unfinished == 0)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole


def test_the_end_of_the_server_cancels_what_takes_long(checkpoint_folder):
    with ThreadPoolExecutor(1) as pool:
        with Served(load(checkpoint_folder())) as server, slow(server, 0.1):
            job = pool.submit(server.client().completions.create, **LONG)
            until(lambda: server.engine.running == 1)
            server.server.should_exit = True
            server.thread.join(15)
        with pytest.raises(openai.APIError):
            job.result()


# The command


def test_serve_says_what_is_wrong(qoq, checkpoint_folder, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: " in only_line(qoq("serve", checkpoint_folder(), "--port", port))
    assert "no such checkpoint folder" in only_line(qoq("serve", "./absent", "--port", 0))
    assert qoq("serve", checkpoint_folder(), "--api-key", "")[0] == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'qoq[serve]'" in only_line(qoq("serve", checkpoint_folder()))


def test_serve_serves(qoq, checkpoint_folder, monkeypatch):
    """Up to the loop, which is the tests' above."""
    seen = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: seen.append(self.config.app))
    code, out, err = qoq("serve", checkpoint_folder(), "--port", 0, "--max-num-seqs", 3, "--max-queue", 4)
    assert (code, out) == (0, "") and "http://127.0.0.1:" in err
    assert seen[0].state.engine.capacity == 7
