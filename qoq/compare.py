"""How far apart two models are, token by token: KL divergence, agreement, perplexity of both.

The reference is kept as its K most likely tokens and the mass of the rest at each position, so that a long text
never needs two matrices of logits. KL over these K + 1 outcomes is a lower bound of the whole KL, tight where the
tail is small; the tail's mean mass is reported beside it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.evaluate import Model, perplexity_of

TOP_K = 256
POSITIONS_AT_ONCE = 512


@dataclass(frozen=True)
class TopK:
    """The predictions of a model for windows (n, T): positions 0 .. T - 2, flattened to P."""

    tokens: Tensor  # (P, K) int32
    logprobs: Tensor  # (P, K) float32
    tail: Tensor  # (P,) float32, probability of all other tokens
    nll: float  # mean, of the true next tokens


@dataclass(frozen=True)
class Divergence:
    """KL(reference || other) in nats over all positions."""

    mean_kl: float
    p99_kl: float
    same_top1: float  # share of positions with the same most likely token
    reference_perplexity: float
    perplexity: float
    tail_mass: float  # of the reference, mean
    tokens: int


def top_k(model: Model, ids: Tensor, k: int = TOP_K, on_window: Callable[[], object] = lambda: None) -> TopK:
    """What a model predicts for windows ids (n, T)."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    nll = 0.0
    for window in ids:
        for logprobs, target in _slices(model, window):
            top = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
            tail = (1 - top.values.double().exp().sum(-1)).clamp(min=0).float()
            parts.append((top.indices.to(torch.int32).cpu(), top.values.cpu(), tail.cpu()))
            nll -= float(logprobs.gather(1, target[:, None]).double().sum())
        on_window()
    tokens, logprobs, tail = (torch.cat(column) for column in zip(*parts, strict=True))
    return TopK(tokens, logprobs, tail, nll / len(tail))


def divergence(
    reference: TopK, model: Model, ids: Tensor, on_window: Callable[[], object] = lambda: None
) -> Divergence:
    """KL of `model` from `reference`, which was made of the same windows ids (n, T)."""
    kl: list[Tensor] = []
    same, nll, start = 0, 0.0, 0
    for window in ids:
        for logprobs, target in _slices(model, window):
            stop = start + len(logprobs)
            tokens = reference.tokens[start:stop].to(logprobs.device, torch.int64)
            p = reference.logprobs[start:stop].to(logprobs.device).double()
            q = logprobs.gather(1, tokens).double()
            p_tail = reference.tail[start:stop].to(logprobs.device).double()
            q_tail = (1 - q.exp().sum(-1)).clamp(min=1e-12)
            rest = torch.where(p_tail > 0, p_tail * (p_tail.clamp(min=1e-12) / q_tail).log(), 0.0)
            kl.append(((p.exp() * (p - q)).sum(-1) + rest).clamp(min=0).float().cpu())
            same += int((logprobs.argmax(-1) == tokens[:, 0]).sum())
            nll -= float(logprobs.gather(1, target[:, None]).double().sum())
            start = stop
        on_window()
    values = torch.cat(kl)
    return Divergence(
        mean_kl=float(values.double().mean()),
        p99_kl=float(values.sort().values[math.ceil(0.99 * len(values)) - 1]),
        same_top1=same / len(values),
        reference_perplexity=perplexity_of(reference.nll),
        perplexity=perplexity_of(nll / len(values)),
        tail_mass=float(reference.tail.double().mean()),
        tokens=len(values),
    )


def _slices(model: Model, window: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities (positions, vocab) float32 and the true next tokens, a slice of a window at a time."""
    logits = model.logits(window[None])[0, :-1]
    targets = window[1:].to(logits.device)
    for start in range(0, len(logits), POSITIONS_AT_ONCE):
        part = slice(start, start + POSITIONS_AT_ONCE)
        yield logits[part].float().log_softmax(-1), targets[part]
