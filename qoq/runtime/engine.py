"""Text from a checkpoint: requests come and go, and every step brings each running one a token."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from qoq.checkpoint import Checkpoint
from qoq.errors import QoqError, first_sentence
from qoq.kernels.attention import MAX_BATCH
from qoq.paged import PAGE
from qoq.runtime.batch import Batches, to_device
from qoq.runtime.cache import page_bytes
from qoq.runtime.executor import Executor
from qoq.runtime.graphs import GraphExecutor
from qoq.runtime.loading import LOGPROB_ROWS, check_range, device_of, eos_token_ids, free_bytes
from qoq.runtime.pages import Pages
from qoq.runtime.sampler import Choice, Draws, SamplingParams, Wanted, wanted
from qoq.runtime.scheduler import Chunk, Request, Scheduler
from qoq.runtime.text_stream import TextStream, push_each

CPU_CACHE_BYTES = 1 << 30  # of a cache on a CPU, unless told otherwise
GREEDY = SamplingParams()
Prompt = str | Sequence[int]


@dataclass
class Answer:
    """What a request has got so far. Nothing in it changes but that it grows: an output tells how far it counts."""

    token_ids: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)  # of the text
    logprobs: list[dict[int, float]] | None = None


class RequestOutput(NamedTuple):
    """A request as it stood after a step, on whatever thread and however late it is read.

    An output costs what the step has added; `token_ids`, `text` and `logprobs` copy the answer each time.
    """

    request_id: str
    prompt_token_ids: list[int]
    answer: Answer
    length: int  # of the answer, in tokens
    parts: int  # of the answer's text
    delta: str  # what the last step added to the text
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"
    error: str | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None  # of each token of the prompt; None for the first

    @property
    def token_ids(self) -> list[int]:
        """The stop token included."""
        return self.answer.token_ids[: self.length]

    @property
    def text(self) -> str:
        """The stop token and the stop string left out."""
        return "".join(self.answer.parts[: self.parts])

    @property
    def logprobs(self) -> list[dict[int, float]] | None:
        """Of each token: the likeliest, and the chosen one."""
        return None if self.answer.logprobs is None else self.answer.logprobs[: self.length]


class _Running:
    """What the engine knows of a request besides its tokens."""

    def __init__(self, request: Request, params: SamplingParams, stop_ids: frozenset[int], tokenizer: Any):
        self.request, self.params, self.stop_ids = request, params, stop_ids
        self.prompt = list(request.tokens)
        self.seed = random.getrandbits(63) if params.seed is None else params.seed
        self.text = TextStream(tokenizer, params.stop, self.prompt)
        self.answer = Answer(logprobs=None if params.logprobs is None else [])
        self.ended = False
        self.prompt_logprobs: list[dict[int, float] | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(self.prompt)

    def reason(self, token: int) -> str | None:
        """Why the request ends with this token, its last one, if it does."""
        if self.params.max_tokens == 0:
            return "length"
        if token in self.stop_ids or self.text.stopped:
            return "stop"
        return "length" if len(self.request.tokens) == self.request.limit else None

    def output(self, finish_reason: str | None = None, error: str | None = None) -> RequestOutput:
        if finish_reason is not None:
            self.text.finish()
            if self.text.stopped and finish_reason == "length":
                finish_reason = "stop"
        delta, answer = self.text.take(), self.answer
        if delta:
            answer.parts.append(delta)
        return RequestOutput(
            self.request.id,
            self.prompt,
            answer,
            len(answer.token_ids),
            len(answer.parts),
            delta,
            finish_reason,
            error,
            self.prompt_logprobs,
        )


@dataclass(frozen=True)
class _Flight:
    """A step that the device has been given: what is sampled, and for whom."""

    states: list[_Running]
    choice: Choice | None
    prompts: list[tuple[_Running, int, Wanted]]  # log-probabilities of prompts, from a position on


class LLMEngine:
    """A loaded checkpoint, its tokenizer, and the requests in progress; for one thread.

    On a GPU it is one step ahead: while the device computes a step, the host reads what the one before has sampled,
    tells it, and prepares the next, whose tokens the device takes from its own memory. A request that ends with a
    stop token or string has then been given one token too many, which nobody sees.
    """

    def __init__(
        self,
        executor: Executor | GraphExecutor,
        scheduler: Scheduler,
        tokenizer: Any,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        ahead: bool = False,
    ):
        self.executor, self.scheduler, self.tokenizer = executor, scheduler, tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_model_len = max_model_len
        self.plain = plain = executor.executor if isinstance(executor, GraphExecutor) else executor  # without graphs
        self.device, self.vocab_size = plain.device, plain.spec.vocab_size
        self.ahead = ahead
        self._batches = Batches(scheduler.max_requests, plain.max_pages, plain.device, executor.sizes)
        self._flight: _Flight | None = None
        self._draws: tuple[list[_Running], Draws] = [], Draws([], [], plain.device)  # for whom they are, and they
        self._running: dict[str, _Running] = {}
        self._aborted: list[RequestOutput] = []
        self._count = 0  # of requests that `generate` and `stream` made

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | Path | Checkpoint,
        device: str = "cpu",
        kv_bits: int = 4,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        gpu_memory_utilization: float = 0.9,
        memory_bytes: int | None = None,
        precision: str = "w4a8",
    ) -> "LLMEngine":
        """Load a checkpoint, from its folder or as it is open.

        Args:
            kv_bits: of the KV cache: 8, 16, or 4, with 8 in the layers that the checkpoint names.
            max_model_len: tokens of the longest request, answer included; the model's own limit unless given.
            max_num_seqs: requests that run at a time.
            max_num_batched_tokens: tokens that a step computes.
            gpu_memory_utilization: the part of a GPU's memory that is taken, weights included.
            memory_bytes: of the KV cache. Unless given, 1 GiB on a CPU, and on a GPU what that part leaves.
            precision: "w4a8", or "fp16" for the dequantized weights, to compare with.

        Raises:
            CheckpointError, ModelError: the folder or its tokenizer cannot be read.
            QoqError: an option out of range, memory for less than one request, or a model that does not fit.
        """
        where = device_of(device)
        check_range("max_num_seqs", max_num_seqs, 1, MAX_BATCH)
        check_range("max_num_batched_tokens", max_num_batched_tokens, 1, 1 << 20)
        check_range("gpu_memory_utilization", gpu_memory_utilization, 0, 1)
        checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
        tokenizer, longest = checkpoint.tokenizer(), checkpoint.config.max_position_embeddings
        wanted = longest if max_model_len is None else max_model_len
        check_range("max_model_len", wanted, 2, longest)
        eos = eos_token_ids(checkpoint, tokenizer)
        try:
            executor = Executor(checkpoint, where, wanted, max_num_seqs, kv_bits, precision)
            if memory_bytes is None:
                memory_bytes = CPU_CACHE_BYTES
                if where.type == "cuda":
                    memory_bytes = free_bytes(executor, max_num_seqs, max_num_batched_tokens, gpu_memory_utilization)
            page = page_bytes(checkpoint.spec, executor.cache.layouts)
            count = min(memory_bytes // page, max_num_seqs * executor.max_pages)
            room = count * PAGE
            if room < (max_model_len or PAGE):
                raise QoqError(
                    f"{memory_bytes} bytes of KV cache hold {max(room, 0)} tokens, max_model_len is {wanted}"
                )
            executor.allocate(count)
            return cls(
                GraphExecutor(executor, max_num_seqs) if where.type == "cuda" else executor,
                Scheduler(Pages(count, PAGE), max_num_seqs, max_num_batched_tokens),
                tokenizer,
                eos,
                min(wanted, room),
                ahead=where.type == "cuda",
            )
        except torch.OutOfMemoryError as error:
            raise QoqError(f"{checkpoint.folder}: out of GPU memory ({first_sentence(error)})") from None

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams = GREEDY) -> None:
        """Let a request take part in the steps to come.

        Args:
            prompt: text, which the tokenizer may put a special token before, or token ids as they are.

        Raises:
            QoqError: an id in use, or a prompt that is empty, too long, or holds what is no token.
        """
        if request_id in self._running:
            raise QoqError(f"request {request_id}: a request of this id is in progress")
        tokens = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise QoqError("empty prompt: expected at least one token")
        for token in tokens:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                raise QoqError(f"token id {token!r} in the prompt, expected 0..{self.vocab_size - 1}")
        if len(tokens) >= self.max_model_len:
            raise QoqError(f"prompt of {len(tokens)} tokens, the model takes fewer than {self.max_model_len}")
        limit = min(len(tokens) + max(params.max_tokens, 1), self.max_model_len)
        request = Request(request_id, tokens, limit, sharable=params.prompt_logprobs is None)
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        self.scheduler.add(request)
        self._running[request_id] = _Running(request, params, stop_ids, self.tokenizer)

    def abort_request(self, request_id: str) -> bool:
        """End a request; the next step gives its last output. False if there is none of this id."""
        running = self._running.get(request_id)
        if running is not None:
            self._aborted.append(self._end(running, "abort"))
        return running is not None

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._running or self._aborted)

    def step(self) -> list[RequestOutput]:
        """Compute once; the outputs of all requests that got a token or ended."""
        outputs, self._aborted = self._aborted, []
        flight = self._launch()
        if self.ahead:
            flight, self._flight = self._flight, flight
        return outputs if flight is None else outputs + self._land(flight)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = GREEDY
    ) -> list[RequestOutput]:
        """Continue all prompts, together; the last output of each. Not while other requests are in progress.

        Raises:
            QoqError: see `add_request`.
        """
        if self.has_unfinished_requests():
            raise QoqError("generate: other requests are in progress")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        ids = [self._own_id() for _ in prompts]
        done: dict[str, RequestOutput] = {}
        try:
            for request_id, prompt, own in zip(ids, prompts, each, strict=True):
                self.add_request(request_id, prompt, own)
            while self._running:
                done |= {output.request_id: output for output in self.step() if output.finish_reason}
        finally:
            self._forget(ids)
        return [done[request_id] for request_id in ids]

    def stream(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Iterator[RequestOutput]:
        """Continue one prompt, with an output for each token. Not while other requests are in progress.

        Raises:
            QoqError: see `add_request`.
        """
        if self.has_unfinished_requests():
            raise QoqError("stream: other requests are in progress")
        request_id = self._own_id()
        self.add_request(request_id, prompt, params)
        try:
            while self._running:
                yield from self.step()
        finally:
            self._forget([request_id])

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], by_token: bool = False) -> torch.Tensor:
        """Logits behind every token of a sequence, (T, vocabulary) float32, as requests get them.

        The sequence is computed in chunks, as a prompt is, or `by_token`, as an answer is. Not while requests are in
        progress; prefixes are not shared.

        Raises:
            QoqError: requests are in progress, or the sequence is empty or too long.
        """
        if self.has_unfinished_requests():
            raise QoqError("logits: requests are in progress")
        if not 0 < len(token_ids) <= self.max_model_len:
            raise QoqError(f"sequence of {len(token_ids)} tokens, the model takes 1 to {self.max_model_len}")
        request = Request("logits", list(token_ids), len(token_ids) + 1)
        pages = self.scheduler.pages
        request.pages = pages.take(pages.needed(len(token_ids))) or []
        size = 1 if by_token else self.scheduler.max_tokens
        if by_token:
            request.prompt_length = 0
        parts = []
        try:
            for start in range(0, len(token_ids), size):
                chunk = Chunk(request, start, min(size, len(token_ids) - start), False)
                hidden = self.executor.hidden(self._batches.of([chunk]))[: chunk.count]
                parts += [self.executor.logits(rows) for rows in hidden.split(LOGPROB_ROWS)]
        finally:
            pages.release(request.pages)
        return torch.cat(parts)

    def _launch(self) -> _Flight | None:
        """Give the device the next step, if there is anything to compute."""
        chunks = sorted(self.scheduler.schedule(), key=lambda chunk: not chunk.decodes)
        if not chunks:
            return None
        before = self._flight
        sampled = {state.request: place for place, state in enumerate(before.states)} if before is not None else {}
        unread = None if before is None or before.choice is None else before.choice.tokens
        batch = self._batches.of(chunks, sampled, unread)
        hidden = self.executor.hidden(batch)
        self.scheduler.complete(chunks)
        owners = [self._running[chunk.request.id] for chunk in chunks]
        prompts = self._prompt_logprobs(chunks, owners, hidden)
        states = [state for chunk, state in zip(chunks, owners, strict=True) if chunk.samples]
        if not states:
            return _Flight([], None, prompts)
        if states != self._draws[0]:
            draws = Draws([state.params for state in states], [state.seed for state in states], self.device)
            self._draws = states, draws
        choice = Choice(self.executor.logits(hidden[batch.sampled]), self._draws[1], batch.sampled_positions)
        for state in states:
            state.request.pending += 1
        return _Flight(states, choice, prompts)

    def _prompt_logprobs(
        self, chunks: Sequence[Chunk], owners: Sequence[_Running], hidden: torch.Tensor
    ) -> list[tuple[_Running, int, Wanted]]:
        """Of the prompts' tokens behind those of the chunks, for requests that want them."""
        found, first = [], 0
        for chunk, state in zip(chunks, owners, strict=True):
            count = state.params.prompt_logprobs
            if count is not None:
                end = min(chunk.start + chunk.count, len(state.prompt) - 1)
                for start in range(chunk.start, end, LOGPROB_ROWS):
                    stop = min(start + LOGPROB_ROWS, end)
                    logits = self.executor.logits(hidden[first + start - chunk.start : first + stop - chunk.start])
                    (tokens,) = to_device([np.array(state.prompt[start + 1 : stop + 1])], self.device)
                    rows = list(range(start + 1, stop + 1))
                    found.append((state, start + 1, wanted(logits, tokens, rows, [count] * len(rows))))
            first += chunk.count
        return found

    def _land(self, flight: _Flight) -> list[RequestOutput]:
        """Wait for a step; what its requests have got."""
        outputs: list[RequestOutput] = []
        tokens, logprobs = flight.choice.read() if flight.choice is not None else ([], [])
        for state, start, known in flight.prompts:
            if state.prompt_logprobs is not None:
                stop = start + len(known.rows)
                state.prompt_logprobs[start:stop] = known.read(state.prompt[start:stop])
        texts: list[TextStream] = []
        written: list[int] = []
        for state, token, told in zip(flight.states, tokens, logprobs, strict=True):
            state.request.pending -= 1
            if state.ended or token < 0 or state.params.max_tokens == 0:
                continue
            state.request.tokens.append(token)
            state.answer.token_ids.append(token)
            if told is not None and state.answer.logprobs is not None:
                state.answer.logprobs.append(told)
            if token not in state.stop_ids:
                texts.append(state.text)
                written.append(token)
        push_each(texts, written)
        for state, token in zip(flight.states, tokens, strict=True):
            if state.ended:
                continue
            if token < 0:
                outputs.append(self._end(state, "error", "the model's output is not a number"))
                continue
            reason = state.reason(token)
            outputs.append(state.output() if reason is None else self._end(state, reason))
        return outputs

    def _end(self, state: _Running, reason: str, error: str | None = None) -> RequestOutput:
        self.scheduler.remove(state.request)
        state.ended = True
        del self._running[state.request.id]
        return state.output(reason, error)

    def _own_id(self) -> str:
        self._count += 1
        return f"own-{self._count}"

    def _forget(self, ids: Sequence[str]) -> None:
        """Abort what is left of these requests and tell nobody."""
        for request_id in ids:
            self.abort_request(request_id)
        self._aborted = [output for output in self._aborted if output.request_id not in ids]
