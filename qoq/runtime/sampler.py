"""How tokens are chosen: what a request asks for, and the draw of one token for each row of logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.errors import QoqError
from qoq.kernels import sample

MAX_LOGPROBS = 20
INT32, INT64 = 2**31, 2**63


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for; by default the likeliest token, always.

    Raises:
        QoqError: a value of the wrong type, or out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # off unless positive
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: another one for each request
    stop: Sequence[str] = ()  # a string is a sequence of one; none of them is part of the text
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many likeliest tokens to tell, besides the chosen one

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            _expect(name, value, isinstance(value, (list, tuple)), "a list")
            object.__setattr__(self, name, tuple(value))
        _expect("max_tokens", self.max_tokens, _is_int(self.max_tokens, 1), "a positive integer")
        _expect("temperature", self.temperature, _is_float(self.temperature, math.inf), "a number of 0 or more")
        _expect("top_k", self.top_k, _is_int(self.top_k, -1), "an integer, 0 for off")
        _expect("top_p", self.top_p, _is_float(self.top_p, 1) and self.top_p > 0, "a number above 0, up to 1")
        _expect("min_p", self.min_p, _is_float(self.min_p, 1), "a number from 0 to 1")
        _expect("seed", self.seed, self.seed is None or _is_int(self.seed, -INT64, INT64), "an integer of 64 bits")
        for text in self.stop:
            _expect("stop", text, isinstance(text, str) and text != "", "strings that are not empty")
        for token in self.stop_token_ids:
            _expect("stop_token_ids", token, _is_int(token, 0), "token ids")
        _expect("ignore_eos", self.ignore_eos, isinstance(self.ignore_eos, bool), "true or false")
        known = self.logprobs is None or _is_int(self.logprobs, 0, MAX_LOGPROBS + 1)
        _expect("logprobs", self.logprobs, known, f"an integer from 0 to {MAX_LOGPROBS}")


def _expect(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise QoqError(f"{name} is {value!r}, expected {expected}")


def _is_int(value: object, low: int, end: int = INT32) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < end


def _is_float(value: object, high: float) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= high and math.isfinite(value)  # type: ignore[operator, arg-type]


@dataclass(frozen=True)
class Draw:
    """One row of logits to choose from. The choice depends on it and on nothing else."""

    params: SamplingParams
    seed: int
    position: int  # of the token to be chosen, in its request


def choose(logits: Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[dict[int, float] | None]]:
    """logits (B, vocabulary) float16 or float32 -> a token for each row, and log-probabilities where they are wanted.

    A row of NaN gives -1. Log-probabilities are those of the model, before temperature and cuts, likeliest first.
    """
    device, params = logits.device, [draw.params for draw in draws]
    floats = torch.tensor([[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]])
    keys = torch.tensor([[draw.seed for draw in draws], [draw.position for draw in draws]]).to(device)
    temperature, top_p, min_p = floats.float().to(device)
    top_k = torch.tensor([p.top_k for p in params], dtype=torch.int32).to(device)
    tokens = sample(logits, temperature, top_k, top_p, min_p, keys[0], keys[1]).tolist()
    logprobs: list[dict[int, float] | None] = [None] * len(draws)
    rows = [row for row, p in enumerate(params) if p.logprobs is not None and tokens[row] >= 0]
    if rows:
        told = logits[rows].float().log_softmax(dim=1)
        best = told.topk(min(max(p.logprobs or 0 for p in params), told.shape[1]), dim=1)
        chosen = told.gather(1, torch.tensor([[tokens[row]] for row in rows], device=device))[:, 0].tolist()
        for row, own, values, ids in zip(rows, chosen, best.values.tolist(), best.indices.tolist(), strict=True):
            count = params[row].logprobs
            logprobs[row] = dict(zip(ids[:count], values[:count], strict=True)) | {tokens[row]: own}
    return tokens, logprobs
