"""The scheduler: who computes what, and that no schedule loses a page, a token or a request."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qoq.errors import QoqError
from qoq.runtime.pages import Pages, page_name
from qoq.runtime.scheduler import Request, Scheduler

SIZE = 4  # tokens of a page


class Model:
    """What a step would do to the cache: every slot remembers the tokens up to its own; the next token is their sum."""

    def __init__(self, scheduler, ahead=False):
        self.scheduler, self.ahead = scheduler, ahead
        self.slots = {}
        self.computed = 0
        self.unread = {}  # what a step has sampled and nobody has read

    def tokens(self, request):
        return request.tokens + ([self.unread[request]] if request in self.unread else [])

    def read(self, requests):
        """The requests that are still there, with their tokens."""
        found = []
        for request in requests:
            request.pending -= 1
            token = self.unread.pop(request)
            if request in self.scheduler.running or request in self.scheduler.waiting:
                request.tokens.append(token)
                found.append(request)
        return found

    def step(self):
        """Requests whose tokens came."""
        scheduler, before = self.scheduler, list(self.unread)
        chunks = scheduler.schedule()
        assert sum(chunk.count for chunk in chunks) <= scheduler.max_tokens
        assert len(scheduler.running) <= scheduler.max_requests
        assert len({chunk.request for chunk in chunks}) == len(chunks)
        written = []
        for chunk in chunks:
            request, end = chunk.request, chunk.start + chunk.count
            assert chunk.count > 0 and end <= request.length < request.limit and chunk.start == request.computed
            assert request.length == len(self.tokens(request)) and chunk.samples == (end == request.length)
            for position in range(chunk.start, end):
                slot = request.pages[position // SIZE], position % SIZE
                written.append(slot)
                self.slots[slot] = tuple(self.tokens(request)[: position + 1])
            self.computed += chunk.count
        assert len(set(written)) == len(written)
        scheduler.complete(chunks)
        for request in scheduler.running:  # everything that attention may see is what it should be
            for position in range(request.computed):
                slot = request.pages[position // SIZE], position % SIZE
                assert self.slots[slot] == tuple(self.tokens(request)[: position + 1])
        sampled = {chunk.request: sum(self.tokens(chunk.request)) % 3 for chunk in chunks if chunk.samples}
        arrived = self.read(before)
        for request, token in sampled.items():
            request.pending += 1
            self.unread[request] = token
        return arrived if self.ahead else self.read(sampled)

    def check_pages(self):
        """Every page is free or held by exactly those that list it."""
        pages = self.scheduler.pages
        held = Counter(page for request in self.scheduler.running for page in request.pages)
        assert all(not request.pages and request.computed == 0 for request in self.scheduler.waiting)
        assert pages._users == [held[page] for page in range(pages.count)]
        assert pages.free == pages.count - len(held)
        assert sorted([*pages._blank, *pages._idle, *held]) == list(range(pages.count))
        assert {page: name for name, page in pages._page.items()} == pages._name
        assert set(pages._idle) <= set(pages._name)


def run(scheduler, requests):
    """All requests to their limits; in which order they ended, and their tokens."""
    model, ended = Model(scheduler), []
    for request in requests:
        scheduler.add(request)
    while scheduler.waiting or scheduler.running:
        for request in model.step():
            if len(request.tokens) == request.limit:
                scheduler.remove(request)
                ended.append(request.id)
        model.check_pages()
    return model, ended


def request(name, length, more, start=0):
    return Request(name, [(start + i) % 3 for i in range(length)], length + more)


def expected(name, length, more, start=0):
    tokens = request(name, length, more, start).tokens
    for _ in range(more):
        tokens.append(sum(tokens) % 3)
    return tokens


# how many requests, then of each: prompt, answer, first token
ADD = st.tuples(st.sampled_from([4, 1, 2]), st.integers(1, 12), st.sampled_from([20, 1, 7, 13]), st.integers(0, 2))
ACTIONS = st.lists(st.one_of(ADD, st.just("step"), st.integers(0, 9)), min_size=4, max_size=40)


@settings(max_examples=150)
@given(
    actions=ACTIONS,
    pages=st.integers(8, 14),
    max_requests=st.sampled_from([6, 1, 2, 3]),
    max_tokens=st.integers(1, 24),
    ahead=st.booleans(),
)
def test_any_schedule_ends_every_request_once(actions, pages, max_requests, max_tokens, ahead):
    """Requests come, go and are aborted (by a number: one of those in progress) between steps.

    With `ahead`, a step's tokens come when the next one has begun.
    """
    scheduler = Scheduler(Pages(pages, SIZE), max_requests, max_tokens)
    model, ended, steps = Model(scheduler, ahead), [], 0
    alive: dict[str, Request] = {}
    wanted: dict[str, list[int]] = {}

    def end(request):
        scheduler.remove(request)
        del alive[request.id]
        ended.append(request.id)

    def step():
        before = {request.id: (request.length, request.computed) for request in alive.values()}
        oldest = next(iter(alive.values()), None)
        for request in model.step():
            if len(request.tokens) == request.limit:
                assert request.tokens == wanted[request.id]
                end(request)
        if oldest is not None:  # nobody starves: the oldest always gets on
            assert oldest.id not in alive or (oldest.length, oldest.computed) > before[oldest.id]

    for action in actions:
        if isinstance(action, tuple):
            copies, *kind = action
            for _ in range(copies):
                name = str(len(wanted))
                alive[name], wanted[name] = request(name, *kind), expected(name, *kind)
                scheduler.add(alive[name])
        elif action == "step":
            step()
        elif alive:
            end(list(alive.values())[action % len(alive)])
        model.check_pages()
    while alive:
        step()
        model.check_pages()
        steps += 1
        assert steps < 3000
    assert sorted(ended) == sorted(wanted) and scheduler.pages.free == pages
    assert not scheduler.running and not scheduler.waiting and scheduler.schedule() == []


def test_a_budget_is_shared_oldest_first():
    scheduler = Scheduler(Pages(20, SIZE), 8, 10)
    first, second, third = request("a", 6, 9), request("b", 13, 9, 1), request("c", 2, 9, 2)
    for each in (first, second, third):
        scheduler.add(each)
    model = Model(scheduler)

    def counts():
        chunks = scheduler.schedule()
        scheduler.complete(chunks)
        for chunk in chunks:
            if chunk.samples:
                chunk.request.tokens.append(0)
        return [(chunk.request.id, chunk.start, chunk.count, chunk.samples) for chunk in chunks]

    assert counts() == [("a", 0, 6, True), ("b", 0, 4, False)]
    assert counts() == [("a", 6, 1, True), ("b", 4, 9, True)]
    assert counts() == [("a", 7, 1, True), ("b", 13, 1, True), ("c", 0, 2, True)]
    assert counts() == [("a", 8, 1, True), ("b", 14, 1, True), ("c", 2, 1, True)]
    model.check_pages()


def test_a_shared_beginning_is_computed_once():
    scheduler = Scheduler(Pages(20, SIZE), 1, 64)
    model, ended = run(scheduler, [request("a", 11, 1), request("b", 11, 1), request("c", 12, 1), request("d", 13, 1)])
    assert ended == ["a", "b", "c", "d"]
    # c's three pages are full, but its last token must be computed; d has one token behind them
    assert model.computed == 11 + (11 - 8) + (12 - 8) + (13 - 12)


def test_an_answer_is_a_beginning_too():
    scheduler = Scheduler(Pages(20, SIZE), 1, 64)
    first = request("a", 6, 8)
    model, _ = run(scheduler, [first])
    before = model.computed
    again = Request("b", [*first.tokens, 1, 2], len(first.tokens) + 3)
    scheduler.add(again)
    assert scheduler.schedule()[0].start == 12 and before == 13


def test_the_youngest_gives_way_and_comes_back_first():
    scheduler = Scheduler(Pages(5, SIZE), 4, 64)
    old, young, late = request("old", 7, 6), request("young", 7, 6, 1), request("late", 9, 1, 2)
    model = Model(scheduler)
    for each in (old, young, late):
        scheduler.add(each)
    model.step()
    model.step()
    assert scheduler.running == [old, young] and list(scheduler.waiting) == [late]
    model.step()  # both want a third page, and there is one
    assert scheduler.running == [old] and list(scheduler.waiting) == [young, late] and young.pages == []
    model.check_pages()
    scheduler.remove(old)
    model.step()
    assert scheduler.running == [young] and len(young.tokens) == 10


def test_what_never_fits_is_refused():
    scheduler = Scheduler(Pages(3, SIZE), 4, 64)
    with pytest.raises(QoqError, match="request a: up to 13 tokens, the KV cache holds 12"):
        scheduler.add(request("a", 10, 3))
    assert run(scheduler, [request("b", 10, 2), request("c", 1, 11)])[1] == ["b", "c"]


def test_equal_pages_behind_other_tokens_are_not_shared():
    scheduler = Scheduler(Pages(20, SIZE), 1, 64)
    one, two = Request("a", [1, 1, 1, 1, 5, 5, 5, 5, 5], 10), Request("b", [2, 2, 2, 2, 5, 5, 5, 5, 5], 10)
    model, _ = run(scheduler, [one, two])
    assert model.computed == 18
    assert page_name(page_name(b"", one.tokens[:4]), [5] * 4) != page_name(page_name(b"", two.tokens[:4]), [5] * 4)


def test_it_needs_no_torch():
    code = "import sys, qoq.runtime.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
