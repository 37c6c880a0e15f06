"""How tokens are chosen: what a request asks for, and the draw of one token for each row of logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qoq.errors import QoqError
from qoq.kernels import sample
from qoq.runtime.batch import to_device

MAX_LOGPROBS = 20
INT32, INT64 = 2**31, 2**63


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for; by default the likeliest token, always.

    Raises:
        QoqError: a value of the wrong type, or out of range.
    """

    max_tokens: int = 128  # 0: nothing but what is asked of the prompt
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # off unless positive
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: another one for each request
    stop: Sequence[str] = ()  # a string is a sequence of one; none of them is part of the text
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many likeliest tokens to tell, besides the chosen one
    prompt_logprobs: int | None = None  # the same of the prompt's own tokens, of which the first has none

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            _expect(name, value, isinstance(value, (list, tuple)), "a list")
            object.__setattr__(self, name, tuple(value))
        _expect("max_tokens", self.max_tokens, _is_int(self.max_tokens, 0), "an integer of 0 or more")
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
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            known = value is None or _is_int(value, 0, MAX_LOGPROBS + 1)
            _expect(name, value, known, f"an integer from 0 to {MAX_LOGPROBS}")


def _expect(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise QoqError(f"{name} is {value!r}, expected {expected}")


def _is_int(value: object, low: int, end: int = INT32) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < end


def _is_float(value: object, high: float) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= high and math.isfinite(value)  # type: ignore[operator, arg-type]


class Draws:
    """With what rows of logits are sampled, on the device: each row's parameters and seed."""

    def __init__(self, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device):
        self.rows = [row for row, p in enumerate(params) if p.logprobs is not None]
        self.counts = [params[row].logprobs or 0 for row in self.rows]
        floats, self.top_k, self.seeds, places = to_device(
            [
                np.array([[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]], "f4"),
                np.array([p.top_k for p in params], np.int32),
                np.array(seeds, np.int64),
                np.array(self.rows, np.int64),
            ],
            device,
        )
        self.temperature, self.top_p, self.min_p = floats
        self.places = None if len(self.rows) == len(params) else places  # of the rows, where these are not all


@dataclass(frozen=True)
class Wanted:
    """Log-probabilities of rows that are on their way from the device."""

    rows: list[int]
    counts: list[int]  # how many of the likeliest each row wants
    chosen: Tensor  # (R,) float32, of the row's own token
    values: Tensor  # (R, n) float32, likeliest first
    ids: Tensor  # (R, n) int64
    done: torch.cuda.Event | None  # when they have arrived

    def read(self, tokens: Sequence[int]) -> list[dict[int, float]]:
        """Wait; of each row, the likeliest tokens and its own."""
        if self.done is not None:
            self.done.synchronize()
        columns = self.counts, self.chosen.tolist(), self.values.tolist(), self.ids.tolist()
        return [
            dict(zip(ids[:count], values[:count], strict=True)) | {token: own}
            for token, count, own, values, ids in zip(tokens, *columns, strict=True)
        ]


class Choice:
    """A token for each row of logits, chosen on the device; the host may read it later.

    It depends on the row, its parameters, its seed and its position alone. A row of NaN gives -1. Log-probabilities
    are those of the model, before temperature and cuts.
    """

    def __init__(self, logits: Tensor, draws: Draws, positions: Tensor):
        """logits (B, vocabulary) float16 or float32; positions (B,) int64 of the tokens to be chosen."""
        cuts = draws.temperature, draws.top_k, draws.top_p, draws.min_p
        self.tokens = sample(logits, *cuts, draws.seeds, positions)  # (B,) int64
        self._wanted = None
        if draws.rows:
            all_rows = draws.places is None
            own = logits if all_rows else logits[draws.places]
            tokens = self.tokens if all_rows else self.tokens[draws.places]
            self._wanted = wanted(own, tokens.clamp_min(0), draws.rows, draws.counts)
        self._host = to_host(self.tokens)
        self._done = event(logits.device)

    def read(self) -> tuple[list[int], list[dict[int, float] | None]]:
        """Wait for the tokens: one for each row, and log-probabilities where they are wanted."""
        if self._done is not None:
            self._done.synchronize()
        tokens = self._host.tolist()
        logprobs: list[dict[int, float] | None] = [None] * len(tokens)
        if self._wanted is not None:
            rows = self._wanted.rows
            for row, told in zip(rows, self._wanted.read([tokens[row] for row in rows]), strict=True):
                logprobs[row] = told if tokens[row] >= 0 else None
        return tokens, logprobs


def wanted(logits: Tensor, tokens: Tensor, rows: list[int], counts: list[int]) -> Wanted:
    """Log-probabilities of logits (R, vocabulary): of the tokens (R,) and of the `counts` likeliest; not awaited."""
    told = logits.float().log_softmax(dim=1)
    best = told.topk(min(max(counts), told.shape[1]), dim=1)
    chosen = told.gather(1, tokens[:, None])[:, 0]
    found = to_host(chosen), to_host(best.values), to_host(best.indices)
    return Wanted(rows, counts, *found, event(logits.device))


def to_host(x: Tensor) -> Tensor:
    """A copy on the host, to be read once what is queued on the device's stream by now is done."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def event(device: torch.device) -> torch.cuda.Event | None:
    """To wait for what is queued on the device's stream by now; None where nothing is ever queued."""
    if device.type == "cpu":
        return None
    done = torch.cuda.Event()
    done.record()
    return done
