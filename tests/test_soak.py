"""Ten minutes of a busy server: everything is answered, nothing is lost, memory does not grow. Run with `-m slow`."""

import os
import random
import threading
import time
from collections import Counter

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from test_server import MODEL, Served, load, until  # noqa: E402

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
CLIENTS = 8


def resident() -> int:
    """Bytes of this process's memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Client(threading.Thread):
    """Completions and chats, whole and streamed, long and short, some wrong, some left in the middle."""

    def __init__(self, url: str, seed: int, end: float):
        super().__init__()
        self.random, self.end, self.done = random.Random(seed), end, Counter[str]()
        self.http = httpx.Client(base_url=url, timeout=60)
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            with self.http:
                while time.monotonic() < self.end:
                    name = self.random.choice(("whole", "whole", "stream", "chat", "leave", "wrong", "echo"))
                    getattr(self, name)()
                    self.done[name] += 1
        except BaseException as failure:
            self.failure = failure

    def asked(self) -> dict[str, object]:
        words = self.random.choices(("the", "fox", "and", "a", "é", "😀"), k=self.random.randint(1, 30))
        answer = {
            "max_tokens": self.random.randint(1, 24),
            "temperature": self.random.choice((0, 1)),
            "ignore_eos": True,
        }
        return {"model": MODEL, "prompt": " ".join(words), "seed": self.random.randint(0, 9), **answer}

    def whole(self) -> None:
        asked = self.asked()
        answer = self.http.post("/v1/completions", json=asked)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == asked["max_tokens"]

    def echo(self) -> None:
        answer = self.http.post("/v1/completions", json=self.asked() | {"echo": True, "logprobs": 2})
        assert answer.status_code == 200 and answer.json()["choices"][0]["logprobs"]["token_logprobs"][0] is None

    def chat(self) -> None:
        asked = self.asked()
        asked["messages"] = [{"role": "user", "content": asked.pop("prompt")}]
        assert self.http.post("/v1/chat/completions", json=asked).status_code == 200

    def stream(self) -> None:
        with self.http.stream("POST", "/v1/completions", json=self.asked() | {"stream": True}) as answer:
            assert list(answer.iter_lines())[-2] == "data: [DONE]"

    def leave(self) -> None:
        with self.http.stream("POST", "/v1/completions", json=self.asked() | {"stream": True}) as answer:
            next(answer.iter_lines())

    def wrong(self) -> None:
        assert self.http.post("/v1/completions", json=self.asked() | {"temperature": -1}).status_code == 400


@pytest.mark.slow
def test_a_busy_server_does_not_grow(checkpoint_folder):
    sizes = []
    with Served(load(checkpoint_folder(), max_num_seqs=6)) as server:
        begun = time.monotonic()
        clients = [Client(server.url, seed, begun + SECONDS) for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            time.sleep(min(SECONDS / 20, 10))
            sizes.append(resident())
        until(lambda: server.engine.unfinished == 0)
        pages = server.engine.engine.scheduler.pages
        assert pages.free == pages.count
    done = sum((client.done for client in clients), Counter[str]())
    quarter = len(sizes) // 4
    early, late = sizes[quarter], max(sizes[-quarter:])
    print(f"{sum(done.values())} requests {dict(done)}; memory {early / 2**20:.1f} MiB, then {late / 2**20:.1f} MiB")
    assert [client.failure for client in clients] == [None] * CLIENTS
    assert len(done) == 6 and all(client.done for client in clients)
    assert late < 1.03 * early + (4 << 20)
