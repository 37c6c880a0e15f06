"""Which tokens the next step computes: continuous batching over a paged cache, first come first served.

A step gives every running request what it lacks, oldest first: one token in decode, up to the rest of the budget of
tokens in prefill. What is left of the budget admits waiting requests. Pages are taken as tokens need them; where none
are left, the youngest running request gives up its own and goes back to the head of the queue, to be computed again.
The oldest can always go on, since every request fits the cache alone, so each one ends.

Full pages are shared: a request begins after the pages that hold the beginning of its tokens already.
"""

from collections import deque
from dataclasses import dataclass, field

from qoq.errors import QoqError
from qoq.runtime.pages import Pages, page_name


@dataclass(eq=False)
class Request:
    """Tokens to be computed; sampled ones are appended to `tokens` by whoever samples them."""

    id: str
    tokens: list[int]
    limit: int  # tokens it will never have more of
    sharable: bool = True  # it may begin after pages that others have computed
    pending: int = 0  # tokens that a step under way samples: they count, but nobody has read them yet
    computed: int = 0  # the first so many tokens have their K and V in the cache, or will when the steps under way end
    pages: list[int] = field(default_factory=list)
    named: int = 0  # the first so many of these can be found by others
    names: list[bytes] = field(default_factory=list)  # of the full pages, as far as they were needed
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def length(self) -> int:
        """Its tokens, pending ones included."""
        return len(self.tokens) + self.pending

    def full_pages(self, count: int, size: int) -> list[bytes]:
        """Names of at least the first `count` pages of `size` tokens, all of them full."""
        for page in range(len(self.names), count):
            previous = self.names[-1] if self.names else b""
            self.names.append(page_name(previous, self.tokens[page * size : (page + 1) * size]))
        return self.names


@dataclass(eq=False, slots=True)
class Chunk:
    """Tokens start .. start + count - 1 of a request."""

    request: Request
    start: int
    count: int
    samples: bool  # it reaches the last token, whose successor is wanted

    @property
    def decodes(self) -> bool:
        """It is one sampled token. A token of a prompt never is: what is computed for it does not depend on chunks."""
        return self.count == 1 and self.start >= self.request.prompt_length


class Scheduler:
    """Requests that wait and run.

    Args:
        max_requests: that run at a time.
        max_tokens: that a step computes.
    """

    def __init__(self, pages: Pages, max_requests: int, max_tokens: int):
        self.pages, self.max_requests, self.max_tokens = pages, max_requests, max_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first; all are older than those that wait

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue.

        Raises:
            QoqError: the cache could not hold it alone.
        """
        if self.pages.needed(request.limit) > self.pages.count:
            raise QoqError(
                f"request {request.id}: up to {request.limit} tokens, the KV cache holds "
                f"{self.pages.count * self.pages.size}"
            )
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """What the next step computes; `complete` must follow.

        A request whose pending token is its last one waits for its end. While there are others, it is not empty.
        """
        chunks: list[Chunk] = []
        budget, turn, size = self.max_tokens, 0, self.pages.size
        while turn < len(self.running) and budget > 0:
            request = self.running[turn]
            length = len(request.tokens) + request.pending
            if length == request.limit:
                turn += 1
                continue
            count = min(length - request.computed, budget)
            end = request.computed + count
            if end <= len(request.pages) * size or self._make_room(request, end):
                chunks.append(Chunk(request, request.computed, count, end == length))
                budget -= count
                turn += 1
        while self.waiting and budget > 0 and len(self.running) < self.max_requests:
            request = self.waiting[0]
            if request.length == request.limit or not self._admit(request):
                break
            count = min(request.length - request.computed, budget)
            chunks.append(Chunk(request, request.computed, count, request.computed + count == request.length))
            budget -= count
        return chunks

    def complete(self, chunks: list[Chunk]) -> None:
        """The step that computes these chunks has begun: later ones may see them, and share their full pages."""
        for chunk in chunks:
            request = chunk.request
            request.computed = chunk.start + chunk.count
            if request.computed // self.pages.size > request.named:
                self._name(request)

    def remove(self, request: Request) -> None:
        """A request has ended, or shall."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._name(request)
        self._give_up_pages(request)

    def _name(self, request: Request) -> None:
        """Let others find the full pages of what is computed and known."""
        size = self.pages.size
        full = min(request.computed, len(request.tokens)) // size
        for page in range(request.named, full):
            self.pages.name(request.pages[page], request.full_pages(page + 1, size)[page])
        request.named = max(request.named, full)

    def _make_room(self, request: Request, tokens: int) -> bool:
        """Give a running request the pages for so many tokens; False if it had to give up its own."""
        while not self._grow(request, tokens):
            if self._preempt() is request:
                return False
        return True

    def _grow(self, request: Request, tokens: int) -> bool:
        """Whether its pages now hold so many tokens."""
        taken = self.pages.take(max(self.pages.needed(tokens) - len(request.pages), 0))
        request.pages += taken or []
        return taken is not None

    def _admit(self, request: Request) -> bool:
        """Let the head of the queue run, if pages for all its tokens are free; they are taken at once.

        Shared pages never hold all tokens: the last one has to be computed, for its successor.
        """
        size = self.pages.size
        sharable = (len(request.tokens) - 1) // size if request.sharable else 0
        shared = self.pages.find(request.full_pages(sharable, size)[:sharable])
        self.pages.share(shared)
        request.pages, request.computed, request.named = shared, len(shared) * size, len(shared)
        if not self._grow(request, request.length):
            self._give_up_pages(request)
            return False
        self.running.append(self.waiting.popleft())
        return True

    def _preempt(self) -> Request:
        youngest = self.running.pop()
        self._give_up_pages(youngest)
        self.waiting.appendleft(youngest)
        return youngest

    def _give_up_pages(self, request: Request) -> None:
        self.pages.release(request.pages)
        request.pages, request.computed, request.named = [], 0, 0
