"""Run one decoder layer over the calibration samples, a few at a time, and watch its intermediates."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.models.decoder import Block, Cache, Rope, attention, visible

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
    value_centre: Tensor  # (Hkv, D), `attended_mean` of the first batch
    down: ChannelStatistics  # (intermediate,), the input of down_proj


@torch.inference_mode()
def observe(block: Block, x: Tensor, rope: Rope) -> LayerStatistics:
    """Run the layer over x (samples, T, hidden), which stays as it is."""
    queries, keys, down = (ChannelStatistics() for _ in range(3))
    centre = None
    for (batch,) in batches(x):
        q, k, v = block.heads(block.norm("input_layernorm", batch), rope)
        for statistics, heads in ((queries, q), (keys, k)):
            statistics.add(heads.transpose(1, 2).flatten(0, 1))
        window = block.spec.windows[block.index]
        centre = attended_mean(q, k, v, window) if centre is None else centre
        middle = batch + block.linears["self_attn.o_proj"](attention(q, k, v, window))
        down.add(block.feed(block.norm("post_attention_layernorm", middle)).flatten(0, 1))
    assert centre is not None
    return LayerStatistics(queries, keys, centre, down)


def attended_mean(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Mean of v (B, Hkv, T, D) over tokens weighted by the squared attention each gets, (Hkv, D) float32.

    A query's output takes the error of a token's value times its attention. Attention sinks weigh most, and their
    values lie far from the plain mean: centred by that, the row with the largest share would have the largest error.
    """
    mask = visible(k.shape[2], k.shape[2], window, k.device)
    total = torch.zeros(v.shape[1], v.shape[3], device=v.device)
    mass = torch.zeros(v.shape[1], 1, device=v.device)
    for sample in range(len(k)):  # one head at a time: (group, T, T)
        for head, queries in enumerate(q[sample].unflatten(0, (k.shape[1], -1))):
            scores = (queries @ k[sample, head].T).float() * q.shape[-1] ** -0.5
            weight = scores.masked_fill_(~mask, -torch.inf).softmax(-1).square_().sum((0, 1))
            total[head] += weight @ v[sample, head].float()
            mass[head] += weight.sum()
    return total / mass
