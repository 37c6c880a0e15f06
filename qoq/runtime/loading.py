"""What an engine needs to know before it runs: its device, the memory for its cache, the tokens that end an answer."""

import atexit
import dataclasses
import gc
import reprlib
from typing import Any

import torch

from qoq.checkpoint import Checkpoint
from qoq.device import device_name
from qoq.errors import CheckpointError, QoqError
from qoq.paged import PAGE
from qoq.runtime.batch import Batches
from qoq.runtime.executor import Executor
from qoq.runtime.sampler import Choice, Draws, SamplingParams
from qoq.runtime.scheduler import Chunk, Request
from qoq.shards import read_object

LOGPROB_ROWS = 256  # of a prompt, whose logits are computed at once


def device_of(name: str) -> torch.device:
    """The device of this name, which becomes the current one.

    Raises:
        QoqError: there is no such device.
    """
    device = torch.device(device_name(name))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)  # kernels and graphs run on the current device's stream
    return device


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises QoqError: the value is outside."""
    if not low <= value <= high:
        raise QoqError(f"{name} is {value}, expected {low} to {high}")


def free_bytes(executor: Executor, max_requests: int, max_tokens: int, utilization: float) -> int:
    """What a GPU has left for the cache beside the weights and the largest step, which is run to see what it takes.

    That step is the end of several sequences of the greatest length, all of whose pages are one. Its logits are of as
    many rows as the requests can have, or their prompts.
    """
    device = executor.device
    executor.allocate(1)
    batches = Batches(max_requests, executor.max_pages, device)
    context = executor.max_pages * PAGE
    sequences = min(-(-batches.gathered // context), max_requests, max_tokens)
    chunks = []
    for number in range(sequences):
        count = 1 if number else max(1, min(max_tokens - sequences + 1, context))
        request = Request(str(number), [0] * context, context + 1, pages=[0] * executor.max_pages)
        chunks.append(Chunk(request, context - count, count, True))
    batch = batches.of(chunks)
    batch = dataclasses.replace(batch, slots=torch.full_like(batch.slots, -1))
    torch.cuda.reset_peak_memory_stats(device)
    hidden = executor.hidden(batch)
    rows = max(max_requests, LOGPROB_ROWS)
    logits = executor.logits(hidden[torch.arange(rows, device=device) % len(hidden)])
    draws = Draws([SamplingParams(logprobs=1)] * rows, [0] * rows, device)
    Choice(logits, draws, torch.zeros(rows, dtype=torch.int64, device=device)).read()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del hidden, logits
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    elsewhere = total - free - torch.cuda.memory_reserved(device)  # the driver's, and other processes'
    return int(total * utilization) - elsewhere - peak


def spare_the_collector() -> None:
    """Let Python's garbage collector pass over all objects there are by now, for a process that has loaded its engine.

    Going through those of torch and transformers stops the steps for 0.15 s and more, every now and then.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries that count what is left at the end complain of leaks


def eos_token_ids(checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    """From generation_config.json, else the config, else the tokenizer.

    Raises:
        CheckpointError: generation_config.json cannot be read, or what is there is no token id.
    """
    path = checkpoint.folder / "generation_config.json"
    try:
        eos = read_object(path).get("eos_token_id") if path.is_file() else None
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    for other in (checkpoint.config, tokenizer):
        eos = getattr(other, "eos_token_id", None) if eos is None else eos
    found = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for token in found:
        if type(token) is not int:
            raise CheckpointError(f"{checkpoint.folder}: eos_token_id is {reprlib.repr(eos)}, expected token ids")
    return found
