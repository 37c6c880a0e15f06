"""Run one decoder layer over the calibration samples, a few at a time, and watch its intermediates."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.models.decoder import Block, Cache, Rope, attention

TOKENS_AT_ONCE = 4096


@dataclass
class Streams:
    """Hidden states on their way through the layers, (samples, T, hidden) in the dtype of the run."""

    x_fp: Tensor  # through the transformed layers, unquantized
    x_q: Tensor  # through the quantized layers
    rope: Rope  # of positions 0 .. T - 1


class Stopwatch:
    """Seconds spent in named passes; waits for the GPU, so that each pass pays its own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 3)


def batches(*streams: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching views of (samples, T, ...) tensors, `TOKENS_AT_ONCE` tokens but at least one sample at a time."""
    samples = max(1, TOKENS_AT_ONCE // streams[0].shape[1])
    yield from zip(*(x.split(samples) for x in streams), strict=True)


@torch.inference_mode()
def propagate(block: Block, x: Tensor, rope: Rope, cache: Cache | None = None) -> None:
    """Replace the hidden states x (samples, T, hidden) by the output of the layer, in place."""
    for (batch,) in batches(x):
        batch.copy_(block(batch, rope, cache))


class ChannelStatistics:
    """Largest magnitude, mean and standard deviation of each channel, accumulated over rows."""

    def __init__(self) -> None:
        self.rows = 0
        self.absmax = self.sum = self.squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """x (rows, ...): the first dimension is reduced."""
        x = x.float()
        self.rows += x.shape[0]
        self.absmax = torch.maximum(self.absmax.to(x.device), x.abs().amax(0))
        self.sum = self.sum.to(x.device) + x.sum(0)
        self.squares = self.squares.to(x.device) + x.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.rows

    @property
    def std(self) -> Tensor:
        return (self.squares / self.rows - self.mean.square()).clamp(min=0).sqrt()


@dataclass
class LayerStatistics:
    """What the transforms want to know of a layer, from the unquantized stream."""

    queries: ChannelStatistics  # (Hq, D), after RoPE
    keys: ChannelStatistics  # (Hkv, D), after RoPE
    values: ChannelStatistics  # (Hkv, D)
    down: ChannelStatistics  # (intermediate,), the input of down_proj


@torch.inference_mode()
def observe(block: Block, x: Tensor, rope: Rope) -> LayerStatistics:
    """Run the layer over x (samples, T, hidden), which stays as it is."""
    found = LayerStatistics(*(ChannelStatistics() for _ in range(4)))
    for (batch,) in batches(x):
        q, k, v = block.heads(block.norm("input_layernorm", batch), rope)
        for statistics, heads in ((found.queries, q), (found.keys, k), (found.values, v)):
            statistics.add(heads.transpose(1, 2).flatten(0, 1))
        out = attention(q, k, v, block.spec.windows[block.index])
        middle = batch + block.linears["self_attn.o_proj"](out)
        found.down.add(block.feed(block.norm("post_attention_layernorm", middle)).flatten(0, 1))
    return found
