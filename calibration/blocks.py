"""Run one decoder layer over the calibration samples, a few at a time, and watch its intermediates."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qoq.models.decoder import Block, Cache, Rope

TOKENS_AT_ONCE = 4096


def batches(x: Tensor) -> Iterator[Tensor]:
    """Views of x (samples, T, ...) of at most `TOKENS_AT_ONCE` tokens, but at least one sample."""
    yield from x.split(max(1, TOKENS_AT_ONCE // x.shape[1]))


@torch.inference_mode()
def propagate(block: Block, x: Tensor, rope: Rope, cache: Cache | None = None) -> None:
    """Replace the hidden states x (samples, T, hidden) by the output of the layer, in place."""
    for batch in batches(x):
        batch.copy_(block(batch, rope, cache))


class AbsMax:
    """Running maximum of |x| over all dimensions but those kept."""

    def __init__(self, keep: Callable[[Tensor], Tensor]):
        self.keep = keep  # x -> (rows, ...) with everything to reduce in rows
        self.value: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        largest = self.keep(x).abs().amax(dim=0)
        self.value = largest if self.value is None else torch.maximum(self.value, largest)


def key_channels(keys: Tensor) -> Tensor:
    """(B, Hkv, T, D) -> (B * T, Hkv, D)."""
    return keys.transpose(1, 2).flatten(0, 1)
