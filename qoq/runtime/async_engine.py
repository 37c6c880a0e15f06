"""The engine on a thread of its own, for the requests of an event loop.

Requests enter through a queue; what a step brings goes back to the loop in one call. A reader that is slow gets the
outputs of several steps as one, so nothing piles up, and one that leaves has its requests aborted.
"""

import asyncio
import dataclasses
import logging
import queue
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

import torch

from qoq.runtime.engine import LLMEngine, Prompt, RequestOutput
from qoq.runtime.sampler import SamplingParams

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """More requests than may wait."""


class EngineDead(Exception):
    """A step failed, or the server ends; no request goes on."""


class Answers:
    """The outputs of the prompts of one call, for one reader, in its event loop."""

    def __init__(self, ids: Sequence[str], abort: Callable[[Sequence[str]], None]):
        self.ids, self._abort = ids, abort
        self._left = set(range(len(ids)))
        self._unread: dict[int, RequestOutput] = {}
        self._failure: Exception | None = None
        self._event = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(Index of the prompt, its output) as they come; `delta` is what is new to this reader.

        Raises:
            EngineDead: before all have ended.
        """
        while self._left:
            await self._event.wait()
            self._event.clear()
            if self._failure is not None:
                raise self._failure
            unread, self._unread = self._unread, {}
            for index, output in unread.items():
                if output.finish_reason is not None:
                    self._left.discard(index)
                yield index, output

    async def last(self) -> list[RequestOutput]:
        """The last output of each prompt."""
        done = {index: output async for index, output in self}
        return [done[index] for index in range(len(self.ids))]

    def close(self) -> None:
        """The reader leaves: what has not ended is aborted."""
        if self._left:
            self._abort([self.ids[index] for index in sorted(self._left)])
            self._left.clear()

    def push(self, index: int, output: RequestOutput) -> None:
        earlier = self._unread.get(index)
        if earlier is not None:
            output = output._replace(delta=earlier.delta + output.delta)
        self._unread[index] = output
        self._event.set()

    def fail(self, failure: Exception) -> None:
        self._failure = failure
        self._event.set()


@dataclasses.dataclass
class _Asked:
    """A request that the engine has: where its outputs go."""

    answers: Answers
    index: int
    told: int = 0  # tokens that are counted


class AsyncEngine:
    """Owns an engine from `start` to `stop`; its methods are for the event loop that called `start`.

    Args:
        max_queue: requests beyond those that can run at a time.
    """

    def __init__(self, engine: LLMEngine, max_queue: int):
        self.engine = engine
        self.capacity = engine.scheduler.max_requests + max_queue
        self.unfinished = 0  # requests whose last output has not come back to the loop
        self.prompt_tokens = self.generated_tokens = 0
        self.finished: Counter[str] = Counter()  # requests by finish reason
        self.failure: Exception | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._entering: set[asyncio.Future[None]] = set()  # calls that the thread has not taken in
        self._asked: dict[str, _Asked] = {}
        self._count = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="qoq-engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread; requests that are left end with EngineDead."""
        self._inbox.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    @property
    def running(self) -> int:
        return len(self.engine.scheduler.running)

    @property
    def waiting(self) -> int:
        return max(self.unfinished - self.running, 0)

    async def submit(self, prompts: Sequence[Prompt], params: SamplingParams) -> Answers:
        """Let the prompts take part in the steps to come, all of them or none.

        Raises:
            QoqError: a prompt that the engine refuses.
            QueueFull: they would be more than the engine's capacity.
            EngineDead: there is no engine any more.
        """
        if self.failure is not None:
            raise self.failure
        if self.unfinished + len(prompts) > self.capacity:
            raise QueueFull(f"{self.unfinished} requests are in progress or wait, at most {self.capacity} can")
        self.unfinished += len(prompts)
        ids = [f"request-{self._count + index}" for index in range(len(prompts))]
        self._count += len(prompts)
        answers = Answers(ids, lambda left: self._inbox.put(partial(self._abort, left)))
        accepted: asyncio.Future[None] = self._loop.create_future()
        self._entering.add(accepted)
        self._inbox.put(partial(self._add, answers, prompts, params, accepted))
        try:
            await accepted
        except asyncio.CancelledError:
            answers.close()
            raise
        finally:
            self._entering.discard(accepted)
        return answers

    # On the thread

    def _run(self) -> None:
        try:
            if self.engine.device.type == "cuda":
                torch.cuda.set_device(self.engine.device)  # each thread has its own current device
            while not self._stopping:
                self._take_in()
                if self.engine.has_unfinished_requests():
                    self._tell(self.engine.step())
            self._end(EngineDead("the server ends"))
        except Exception as error:
            log.exception("the engine failed")
            self._end(EngineDead(f"the engine failed: {error}"))

    def _take_in(self) -> None:
        """Do what the loop asked for; wait for it if there is nothing else to do."""
        wait = not self.engine.has_unfinished_requests()
        while True:
            try:
                self._inbox.get(block=wait)()
            except queue.Empty:
                return
            wait = False

    def _stop(self) -> None:
        self._stopping = True

    def _add(
        self, answers: Answers, prompts: Sequence[Prompt], params: SamplingParams, accepted: asyncio.Future[None]
    ) -> None:
        added: list[str] = []
        try:
            for request_id, prompt in zip(answers.ids, prompts, strict=True):
                self.engine.add_request(request_id, prompt, params)
                added.append(request_id)
        except Exception as error:  # of this call alone
            self._abort(added)  # nobody is told: they are not in _asked
            self._loop.call_soon_threadsafe(self._refused, len(prompts), accepted, error)
            return
        self._asked |= {request_id: _Asked(answers, index) for index, request_id in enumerate(answers.ids)}
        self._loop.call_soon_threadsafe(_resolve, accepted, None)

    def _abort(self, ids: Sequence[str]) -> None:
        for request_id in ids:
            self.engine.abort_request(request_id)

    def _tell(self, outputs: Sequence[RequestOutput]) -> None:
        """Count what a step brought and send it to the loop."""
        news: list[tuple[_Asked, RequestOutput]] = []
        for output in outputs:
            asked = self._asked.get(output.request_id)
            if asked is None:
                continue
            if asked.told == 0 and output.length:
                self.prompt_tokens += len(output.prompt_token_ids)
            self.generated_tokens += output.length - asked.told
            asked.told = output.length
            if output.finish_reason is not None:
                del self._asked[output.request_id]
                self.finished[output.finish_reason] += 1
            news.append((asked, output))
        if news:
            self._loop.call_soon_threadsafe(self._deliver, news)

    def _end(self, failure: EngineDead) -> None:
        self._loop.call_soon_threadsafe(self._fail, failure, list(self._asked.values()))

    # On the loop

    def _deliver(self, news: Sequence[tuple[_Asked, RequestOutput]]) -> None:
        for asked, output in news:
            self.unfinished -= output.finish_reason is not None
            asked.answers.push(asked.index, output)

    def _refused(self, count: int, accepted: asyncio.Future[None], error: Exception) -> None:
        self.unfinished -= count
        _resolve(accepted, error)

    def _fail(self, failure: EngineDead, asked: Sequence[_Asked]) -> None:
        self.failure, self.unfinished = failure, 0
        for one in asked:
            one.answers.fail(failure)
        for accepted in self._entering:
            _resolve(accepted, failure)


def _resolve(future: asyncio.Future[None], error: Exception | None) -> None:
    """Unless its waiter has left."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
