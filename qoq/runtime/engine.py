"""Text from a checkpoint: requests come and go, and every step brings each running one a token."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qoq.checkpoint import Checkpoint
from qoq.errors import QoqError
from qoq.kernels.attention import MAX_BATCH
from qoq.paged import PAGE
from qoq.runtime.cache import layout_of, page_bytes
from qoq.runtime.executor import Batch, Executor
from qoq.runtime.graphs import GraphExecutor
from qoq.runtime.pages import Pages
from qoq.runtime.sampler import Draw, SamplingParams, choose
from qoq.runtime.scheduler import Chunk, Request, Scheduler
from qoq.runtime.text_stream import TextStream

CPU_CACHE_BYTES = 1 << 30  # of a cache on a CPU, unless told otherwise
GREEDY = SamplingParams()
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class RequestOutput:
    """A request as it stands after a step."""

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]  # the stop token included
    text: str  # the stop token and the stop string left out
    delta: str  # what the last step added to the text
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"
    error: str | None = None
    logprobs: list[dict[int, float]] | None = None  # of each token: the likeliest, and the chosen one


class _Running:
    """What the engine knows of a request besides its tokens."""

    def __init__(self, request: Request, params: SamplingParams, stop_ids: frozenset[int], tokenizer: Any):
        self.request, self.params, self.stop_ids = request, params, stop_ids
        self.prompt_length = len(request.tokens)
        self.seed = random.getrandbits(63) if params.seed is None else params.seed
        self.text = TextStream(tokenizer, params.stop)
        self.shown = 0  # characters of the text that outputs have had
        self.logprobs: list[dict[int, float]] | None = None if params.logprobs is None else []

    def draw(self) -> Draw:
        return Draw(self.params, self.seed, len(self.request.tokens))

    def accept(self, token: int) -> str | None:
        """Append a sampled token; why the request ends with it, if it does."""
        self.request.tokens.append(token)
        if token in self.stop_ids:
            return "stop"
        self.text.push(token)
        if self.text.stopped:
            return "stop"
        return "length" if len(self.request.tokens) == self.request.limit else None

    def output(self, finish_reason: str | None = None, error: str | None = None) -> RequestOutput:
        if finish_reason is not None:
            self.text.finish()
            if self.text.stopped and finish_reason == "length":
                finish_reason = "stop"
        shown, tokens = self.shown, self.request.tokens
        self.shown = len(self.text.text) if finish_reason else self.text.safe
        return RequestOutput(
            request_id=self.request.id,
            prompt_token_ids=tokens[: self.prompt_length],
            token_ids=tokens[self.prompt_length :],
            text=self.text.text[: self.shown],
            delta=self.text.text[shown : self.shown],
            finish_reason=finish_reason,
            error=error,
            logprobs=None if self.logprobs is None else list(self.logprobs),
        )


class LLMEngine:
    """A loaded checkpoint, its tokenizer, and the requests in progress; for one thread."""

    def __init__(
        self,
        executor: Executor | GraphExecutor,
        scheduler: Scheduler,
        tokenizer: Any,
        eos_token_ids: Sequence[int],
        max_model_len: int,
    ):
        self.executor, self.scheduler, self.tokenizer = executor, scheduler, tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_model_len = max_model_len
        plain = executor.executor if isinstance(executor, GraphExecutor) else executor
        self.device, self.max_pages, self.vocab_size = plain.device, plain.max_pages, plain.spec.vocab_size
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
            kv_bits: of the KV cache: 4, 8 or 16.
            max_model_len: tokens of the longest request, answer included; the model's own limit unless given.
            max_num_seqs: requests that run at a time.
            max_num_batched_tokens: tokens that a step computes.
            gpu_memory_utilization: the part of a GPU's memory that is taken, weights included.
            memory_bytes: of the KV cache. Unless given, 1 GiB on a CPU, and on a GPU what that part leaves.
            precision: "w4a8", or "fp16" for the dequantized weights, to compare with.

        Raises:
            CheckpointError, ModelError: the folder or its tokenizer cannot be read.
            QoqError: an option out of range, or memory for less than one request.
        """
        where = _device(device)
        _check_range("max_num_seqs", max_num_seqs, 1, MAX_BATCH)
        _check_range("max_num_batched_tokens", max_num_batched_tokens, 1, 1 << 20)
        _check_range("gpu_memory_utilization", gpu_memory_utilization, 0, 1)
        checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
        tokenizer, longest = checkpoint.tokenizer(), checkpoint.config.max_position_embeddings
        wanted = longest if max_model_len is None else max_model_len
        _check_range("max_model_len", wanted, 2, longest)
        layout = layout_of(checkpoint.spec, kv_bits)
        executor = Executor(checkpoint, where, wanted, max_num_seqs, kv_bits, precision)
        if memory_bytes is None:
            memory_bytes = CPU_CACHE_BYTES
            if where.type == "cuda":
                memory_bytes = _free_bytes(executor, max_num_seqs, max_num_batched_tokens, gpu_memory_utilization)
        count = min(memory_bytes // page_bytes(checkpoint.spec, layout), max_num_seqs * executor.max_pages)
        room = count * PAGE
        if room < (max_model_len or PAGE):
            raise QoqError(f"{memory_bytes} bytes of KV cache hold {max(room, 0)} tokens, max_model_len is {wanted}")
        executor.allocate(count)
        return cls(
            GraphExecutor(executor, max_num_seqs) if where.type == "cuda" else executor,
            Scheduler(Pages(count, PAGE), max_num_seqs, max_num_batched_tokens),
            tokenizer,
            eos_token_ids(checkpoint, tokenizer),
            min(wanted, room),
        )

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
        request = Request(request_id, tokens, min(len(tokens) + params.max_tokens, self.max_model_len))
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
        chunks = sorted(self.scheduler.schedule(), key=lambda chunk: chunk.count > 1)
        if not chunks:
            return outputs
        hidden = self.executor.hidden(Batch.of(chunks, self.max_pages, self.device))
        self.scheduler.complete(chunks)
        last = torch.tensor([chunk.count for chunk in chunks]).cumsum(0) - 1
        rows = [row for row, chunk in enumerate(chunks) if chunk.samples]
        if rows:
            outputs += self._sample(self.executor.logits(hidden[last[rows].to(self.device)]), [chunks[r] for r in rows])
        return outputs

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

    def _sample(self, logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[RequestOutput]:
        """Choose the next token of each chunk's request."""
        states = [self._running[chunk.request.id] for chunk in chunks]
        tokens, logprobs = choose(logits, [state.draw() for state in states])
        outputs = []
        for state, token, told in zip(states, tokens, logprobs, strict=True):
            if token < 0:
                outputs.append(self._end(state, "error", "the model's output is not a number"))
                continue
            if state.logprobs is not None and told is not None:
                state.logprobs.append(told)
            reason = state.accept(token)
            outputs.append(state.output() if reason is None else self._end(state, reason))
        return outputs

    def _end(self, state: _Running, reason: str, error: str | None = None) -> RequestOutput:
        self.scheduler.remove(state.request)
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


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise QoqError(f"device {name!r}, expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise QoqError(f"device {name!r}, expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise QoqError(f"device {name!r}: no CUDA device is available")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise QoqError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)  # kernels and graphs run on the current device's stream
    return device


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise QoqError(f"{name} is {value}, expected {low} to {high}")


def _free_bytes(executor: Executor, max_requests: int, max_tokens: int, utilization: float) -> int:
    """What a GPU has left for the cache beside the weights and the largest step, which is run to see what it takes.

    The step is the end of a sequence of the greatest length, all of whose pages are one.
    """
    device = executor.device
    executor.allocate(1)
    context = executor.max_pages * PAGE
    count = max(2, min(max_tokens, context))
    batch = Batch(
        ids=torch.zeros(count, dtype=torch.int64, device=device),
        positions=torch.zeros(count, dtype=torch.int64, device=device),
        slots=torch.full((count,), -1, dtype=torch.int64, device=device),
        block_tables=torch.zeros(1, executor.max_pages, dtype=torch.int32, device=device),
        context_lens=torch.tensor([context], dtype=torch.int32, device=device),
        spans=torch.tensor([[0, context]], dtype=torch.int32, device=device),
        prefills=((count, context),),
    )
    torch.cuda.reset_peak_memory_stats(device)
    hidden = executor.hidden(batch)
    logits = executor.logits(hidden[torch.arange(max_requests, device=device) % count])
    choose(logits, [Draw(SamplingParams(logprobs=1), 0, 0)] * max_requests)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del hidden, logits
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    elsewhere = total - free - torch.cuda.memory_reserved(device)  # the driver's, and other processes'
    return int(total * utilization) - elsewhere - peak


def eos_token_ids(checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    """From generation_config.json, else the config, else the tokenizer."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(checkpoint.folder).eos_token_id
    except OSError:
        eos = getattr(checkpoint.config, "eos_token_id", None)
    eos = tokenizer.eos_token_id if eos is None else eos
    return [] if eos is None else eos if isinstance(eos, list) else [eos]
