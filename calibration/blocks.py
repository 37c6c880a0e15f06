"""Run one decoder layer over the calibration samples, a few at a time, and watch its intermediates."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qoq.calibration.ranks import Ranks
from qoq.models.decoder import Block, Cache, Rope, attention, visible

TOKENS_AT_ONCE = 4096
SEARCH_TOKENS = 4096  # of the samples, for the searches' objectives and the centre of the values


@dataclass
class Streams:
    """Hidden states on their way through the layers, (samples, T, hidden) in the dtype of the run.

    They may lie in host memory: layers compute where `rope` lies, a batch at a time.
    """

    x_fp: Tensor  # through the transformed layers, unquantized
    x_q: Tensor  # through the quantized layers
    rope: Rope  # of positions 0 .. T - 1, on the device of the layers
    tokens_at_once: int = TOKENS_AT_ONCE
    ranks: Ranks = field(default_factory=Ranks)  # which hold the other samples

    @property
    def device(self) -> torch.device:
        return self.rope[0].device

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Matching views of `x_fp` and `x_q`, wherever they lie."""
        yield from batches(self.x_fp, self.x_q, tokens_at_once=self.tokens_at_once)  # type: ignore[misc]

    def some(self) -> Tensor:
        """The first samples of all ranks, `SEARCH_TOKENS` tokens but at least one sample, of the unquantized stream."""
        return self.ranks.first(self.x_fp, max(1, SEARCH_TOKENS // self.x_fp.shape[1])).to(self.device)


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


def batches(*streams: Tensor, tokens_at_once: int = TOKENS_AT_ONCE) -> Iterator[tuple[Tensor, ...]]:
    """Matching views of (samples, T, ...) tensors, `tokens_at_once` tokens but at least one sample at a time."""
    samples = max(1, tokens_at_once // streams[0].shape[1])
    yield from zip(*(x.split(samples) for x in streams), strict=True)


@torch.inference_mode()
def propagate(
    block: Block, x: Tensor, rope: Rope, cache: Cache | None = None, tokens_at_once: int = TOKENS_AT_ONCE
) -> None:
    """Replace the hidden states x (samples, T, hidden) by the output of the layer, in place."""
    for (batch,) in batches(x, tokens_at_once=tokens_at_once):
        batch.copy_(block(batch.to(rope[0].device), rope, cache))


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

    def combine(self, ranks: Ranks) -> None:
        """Take in what other ranks saw."""
        rows = torch.tensor([self.rows], dtype=torch.float64)
        ranks.sum(self.sum, self.squares, rows)
        ranks.max(self.absmax)
        self.rows = int(rows)

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
    value_centre: Tensor  # (Hkv, D), `attended_mean` of some samples
    down: ChannelStatistics  # (intermediate,), the input of down_proj

    def combine(self, ranks: Ranks) -> None:
        """Take in what other ranks saw; `value_centre` is of samples that all ranks have."""
        for statistics in (self.queries, self.keys, self.down):
            statistics.combine(ranks)


@torch.inference_mode()
def observe(
    block: Block, x: Tensor, rope: Rope, some: Tensor | None = None, tokens_at_once: int = TOKENS_AT_ONCE
) -> LayerStatistics:
    """Run the layer over x (samples, T, hidden), which stays as it is.

    `some` are the samples whose values are centred, on the device of the layer; x itself where nothing is said.
    """
    queries, keys, down = (ChannelStatistics() for _ in range(3))
    window = block.spec.windows[block.index]
    for (batch,) in batches(x, tokens_at_once=tokens_at_once):
        batch = batch.to(rope[0].device)
        q, k, v = block.heads(block.norm("input_layernorm", batch), rope)
        for statistics, heads in ((queries, q), (keys, k)):
            statistics.add(heads.transpose(1, 2).flatten(0, 1))
        middle = batch + block.linears["self_attn.o_proj"](attention(q, k, v, window))
        del q, k, v, heads
        down.add(block.feed(block.norm("post_attention_layernorm", middle)).flatten(0, 1))
    normed = block.norm("input_layernorm", x.to(rope[0].device) if some is None else some)
    return LayerStatistics(queries, keys, attended_mean(*block.heads(normed, rope), window), down)


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
