"""Where the time of decode steps goes on a GPU: kernel by kernel, and how long none of them runs.

Kernels are watched by CUPTI (`torch.profiler`), inside CUDA graphs too, which makes a step a little slower; so the
times here are for shares, and those of `qoq.runtime.benchmark` for speed. A kernel may start while the one before it
still runs, and then waits for it: its time counts from the end of all that began before it.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qoq.errors import QoqError
from qoq.runtime.benchmark import random_prompts
from qoq.runtime.engine import LLMEngine
from qoq.runtime.sampler import SamplingParams

STEPS = 20


@dataclass(frozen=True)
class Activity:
    """A kernel or a copy on the GPU; microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Account:
    """Of some steps that are alike, one after the other; microseconds, but for the context."""

    steps: int
    context: float  # mean tokens of a request
    whole: float  # from the beginning of the first activity to the end of the last
    idle: float  # of that, when nothing ran
    gap: float  # the longest time of a step, typically, in which nothing ran: the host was late
    kernels: Mapping[str, tuple[int, float]]  # name -> how often in all steps, and its own time; the longest first

    @staticmethod
    def of(activities: Sequence[Activity], steps: int, context: float) -> "Account":
        """Activities in any order; they may overlap."""
        ordered = sorted(activities, key=lambda activity: activity.start)
        gaps, end = [], ordered[0].start
        sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        for activity in ordered:
            if activity.start > end:
                gaps.append(activity.start - end)
            own = sums[short_name(activity.name)]
            own[0] += 1
            own[1] += max(activity.end - max(activity.start, end), 0.0)
            end = max(end, activity.end)
        longest = sorted(gaps)[-steps:]
        kernels = {name: (int(count), time) for name, (count, time) in sums.items()}
        return Account(
            steps=steps,
            context=context,
            whole=end - ordered[0].start,
            idle=sum(gaps),
            gap=statistics.median(longest) if longest else 0.0,
            kernels=dict(sorted(kernels.items(), key=lambda item: -item[1][1])),
        )

    def record(self) -> dict[str, Any]:
        """As JSON has it, for one step."""
        return {
            "steps": self.steps,
            "context": round(self.context),
            "step_us": round(self.whole / self.steps, 1),
            "idle_us": round(self.idle / self.steps, 1),
            "gap_us": round(self.gap, 1),
            "kernels": [
                {
                    "name": name,
                    "launches": round(count / self.steps, 2),
                    "us": round(time / self.steps, 1),
                    "share": round(time / self.whole, 4),
                }
                for name, (count, time) in self.kernels.items()
            ],
        }


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces, template arguments and parameters."""
    head = name.removeprefix("void ").split("<")[0].split("(")[0].strip()
    return head.rpartition("::")[2] or name


def watch(
    engine: LLMEngine, batch_size: int, input_len: int, output_len: int, generator: np.random.Generator
) -> Account:
    """Let a batch of new prompts be read, then watch up to STEPS steps in which all requests get a token.

    Raises:
        QoqError: no CUDA device; too few tokens are left behind the prompts; the engine failed on a request.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if engine.device.type != "cuda":
        raise QoqError("the account is of kernels on a GPU; expected device cuda")
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    names = [f"account-{number}" for number in range(batch_size)]
    prompts = random_prompts(batch_size, input_len, engine.vocab_size, generator)
    waiting, most = set(names), 0
    try:
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, prompt, params)
        while waiting:
            for output in engine.step():
                if output.error is not None:
                    raise QoqError(output.error)
                waiting.discard(output.request_id)
                most = max(most, output.length)
        steps = min(STEPS, output_len - most - 3)  # the first one and what an engine computes ahead stay out
        if steps < 1:
            raise QoqError(f"output_len is {output_len}, too few tokens to watch steps behind the prompts")
        engine.step()
        torch.cuda.synchronize(engine.device)
        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            for _ in range(steps):
                outputs = engine.step()
            torch.cuda.synchronize(engine.device)
    finally:
        for name in names:
            engine.abort_request(name)
        while engine.has_unfinished_requests():
            engine.step()
    context = statistics.fmean(len(output.prompt_token_ids) + output.length for output in outputs) - steps / 2
    activities = [
        Activity(event.name, event.time_range.start, event.time_range.end)
        for event in traced.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    if not activities:
        raise QoqError("the profiler saw no kernel; is CUPTI of torch's CUDA installed?")
    return Account.of(activities, steps, context)
