"""How fast the engine is: all requests at once, as QServe measures it, or as they arrive, as `vllm bench serve` does.

Prompts are random token ids and no answer ends early, so that the work is known before. Everything a user waits for is
in the time: scheduling, sampling, detokenization. Loading the model and capturing graphs is not.
"""

import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from qoq.checkpoint import Checkpoint
from qoq.errors import QoqError
from qoq.models.architecture import ModelSpec
from qoq.paged import PAGE
from qoq.roofline import Dimensions
from qoq.runtime.cache import page_bytes
from qoq.runtime.engine import LLMEngine, RequestOutput
from qoq.runtime.loading import spare_the_collector
from qoq.runtime.sampler import SamplingParams


@dataclass(frozen=True)
class Round:
    """One batch from its first prefill to its last token."""

    output_tokens: int
    seconds: float
    prefill_seconds: float  # until each request had its first token; decode steps of the first ones may lie within
    steps: Sequence[float]  # seconds of each step that gave all requests a token and read no prompt
    context: float = 0.0  # mean tokens of a request behind the last of these

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    def record(self) -> dict[str, Any]:
        """As JSON has it; the median is of the last half of the steps. Null where no step was without a prompt."""
        late = self.steps[len(self.steps) // 2 :]
        return {
            "throughput_tokens_per_s": self.tokens_per_second,
            "output_tokens": self.output_tokens,
            "seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_steps": len(self.steps),
            "mean_decode_step_ms": 1000 * statistics.fmean(self.steps) if late else None,
            "median_decode_step_ms": 1000 * statistics.median(late) if late else None,
            "median_decode_step_context": round(self.context - len(late) / 2) if late else None,
        }


@dataclass
class Timeline:
    """When one request came and when each of its tokens did, in seconds."""

    arrival: float
    tokens: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def first(self) -> float:
        return self.tokens[0] - self.arrival

    @property
    def whole(self) -> float:
        return self.tokens[-1] - self.arrival

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]


def load(
    checkpoint: Checkpoint, device: str, batch_size: int, input_len: int, output_len: int, **options: Any
) -> LLMEngine:
    """An engine for so many requests of this length at a time; `options` are those of `LLMEngine.from_checkpoint`.

    Raises:
        QoqError: the model does not take this length, or see `LLMEngine.from_checkpoint`.
    """
    check_length(input_len, output_len, checkpoint.config.max_position_embeddings)
    length = input_len + output_len
    engine = LLMEngine.from_checkpoint(checkpoint, device, max_model_len=length, max_num_seqs=batch_size, **options)
    spare_the_collector()
    return engine


def check_length(input_len: int, output_len: int, longest: int) -> None:
    """Raises QoqError: requests of this length are longer than the model takes."""
    length = input_len + output_len
    if length > longest:
        raise QoqError(f"input_len {input_len} and output_len {output_len}: {length} tokens, the model takes {longest}")


def release() -> None:
    """Give back the GPU memory of engines that nobody holds any more."""
    gc.unfreeze()
    gc.collect()  # objects that hold each other are not gone before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def cache_tokens(engine: LLMEngine) -> int:
    """How many tokens the KV cache holds."""
    return engine.scheduler.pages.count * PAGE


def cache_room(engine: LLMEngine, utilization: float) -> int:
    """How many tokens it could hold: an engine takes no more pages than its requests can fill."""
    if engine.device.type == "cpu":
        return cache_tokens(engine)
    free, total = torch.cuda.mem_get_info(engine.device)
    spare = max(int(total * utilization) - (total - free), 0)
    return cache_tokens(engine) + spare // page_bytes(engine.plain.spec, engine.plain.cache.layouts) * PAGE


def kv_bits(engine: LLMEngine) -> float:
    """Of the KV cache: of each layer, or their mean where some of a 4-bit cache have 8."""
    bits = [layout.bits for layout in engine.plain.cache.layouts]
    return bits[0] if len(set(bits)) == 1 else statistics.fmean(bits)


def dimensions(spec: ModelSpec) -> Dimensions:
    """What `qoq.roofline` counts of a model."""
    return Dimensions(
        model_type=spec.model_type,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        vocab_size=spec.vocab_size,
        head_dim=spec.head_dim,
    )


def device_name(engine: LLMEngine) -> str:
    return torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"


def random_prompts(count: int, length: int, vocab_size: int, generator: np.random.Generator) -> list[list[int]]:
    return generator.integers(vocab_size, size=(count, length)).tolist()


def run_round(
    engine: LLMEngine, batch_size: int, input_len: int, output_len: int, generator: np.random.Generator
) -> Round:
    """Give the engine a batch of prompts that it has not seen, and time it to the end.

    Raises:
        QoqError: the engine failed on a request.
    """
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    prompts = random_prompts(batch_size, input_len, engine.vocab_size, generator)
    waiting, tokens, prefilled = set(map(str, range(batch_size))), 0, 0.0
    steps: list[float] = []
    last: Sequence[RequestOutput] = ()
    started = now = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        before, now = now, time.perf_counter()
        if waiting:
            waiting -= {output.request_id for output in outputs}
            prefilled = now - started
        elif len(outputs) == batch_size:
            steps.append(now - before)
            last = outputs
        for output in outputs:
            if output.error is not None:
                raise QoqError(output.error)
            if output.finish_reason is not None:
                tokens += output.length
    seconds = time.perf_counter() - started
    if tokens != batch_size * output_len:
        raise QoqError(f"{tokens} tokens came, expected {batch_size * output_len}: answers ended early")
    lengths = [len(output.prompt_token_ids) + output.length for output in last]
    return Round(tokens, seconds, prefilled, steps, statistics.fmean(lengths) if lengths else 0.0)


def arrivals(count: int, rate: float, generator: np.random.Generator) -> list[float]:
    """Seconds at which requests of a Poisson process of `rate` a second come; all at once if it is infinite."""
    if math.isinf(rate):
        return [0.0] * count
    return generator.exponential(1 / rate, count).cumsum().tolist()


def run_arrivals(
    engine: LLMEngine, prompts: Sequence[list[int]], times: Sequence[float], output_len: int
) -> list[Timeline]:
    """Give the engine each prompt at its time (ascending, in seconds from now); what became of each."""
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    timelines = [Timeline(arrival) for arrival in times]
    coming = deque(enumerate(prompts))
    started = time.perf_counter()
    while coming or engine.has_unfinished_requests():
        now = time.perf_counter() - started
        while coming and times[coming[0][0]] <= now:
            number, prompt = coming.popleft()
            engine.add_request(str(number), prompt, params)
        if not engine.has_unfinished_requests():
            time.sleep(max(times[coming[0][0]] - (time.perf_counter() - started), 0))
            continue
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            timeline = timelines[int(output.request_id)]
            timeline.error = output.error
            if output.error is None:
                timeline.tokens.append(now)
    return timelines


def summary(timelines: Sequence[Timeline], input_len: int) -> dict[str, float | int]:
    """Figures under the names of `vllm bench serve`; times in ms, from a request's arrival, queueing included.

    TTFT is the time to the first token, ITL the gaps between tokens, TPOT a request's mean gap, E2EL its whole time.
    Only requests without error count.
    """
    done = [timeline for timeline in timelines if timeline.error is None and timeline.tokens]
    duration = max((timeline.tokens[-1] for timeline in done), default=0.0)
    inputs, outputs = len(done) * input_len, sum(len(timeline.tokens) for timeline in done)
    per_second = 1 / duration if duration else 0.0
    figures: dict[str, float | int] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(timelines) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) * per_second,
        "output_throughput": outputs * per_second,
        "total_token_throughput": (inputs + outputs) * per_second,
    }
    times = {
        "ttft": [timeline.first for timeline in done],
        "tpot": [sum(timeline.gaps) / len(timeline.gaps) for timeline in done if timeline.gaps],
        "itl": [gap for timeline in done for gap in timeline.gaps],
        "e2el": [timeline.whole for timeline in done],
    }
    for name, seconds in times.items():
        ms = np.array(seconds or [0.0]) * 1000  # as vLLM: 0 where there is nothing to measure
        figures |= {
            f"mean_{name}_ms": float(ms.mean()),
            f"median_{name}_ms": float(np.median(ms)),
            f"std_{name}_ms": float(ms.std()),
            f"p99_{name}_ms": float(np.percentile(ms, 99)),
        }
    return figures
