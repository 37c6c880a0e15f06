"""The specification of sampling: one token for each row of logits, a function of that row and its parameters alone.

Order and meaning of the cuts are those of transformers and vLLM: temperature, top_k, top_p (of what top_k leaves,
renormalised), min_p (relative to the likeliest token). Tokens of equal logit are cut or kept together.

The draw is an exponential race: token t wins by the largest weight_t / e_t, where e_t is exponentially distributed
and follows from (seed, position, t) by Philox. So a request gives the same tokens in every batch, and a cut never
changes what the tokens it leaves are drawn by.
"""

import numpy as np
import torch
from torch import Tensor

PHILOX_ROUNDS = 10


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., 2011): counter (..., 4) and key (..., 2) uint32 -> (..., 4) uint32."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(PHILOX_ROUNDS):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (second >> word) ^ c1 ^ k0, second & low, (first >> word) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def exponentials(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """e (B, vocabulary) float32 for seeds and positions (B,) int64; one Philox call serves four tokens."""
    groups = np.arange(-(-vocabulary // 4), dtype=np.uint32)
    halves = [x.cpu().numpy().astype("<i8").view("<u4").reshape(-1, 2) for x in (seeds, positions)]
    counter = np.zeros((len(seeds), len(groups), 4), dtype=np.uint32)
    counter[..., 0] = groups
    counter[..., 2:] = halves[1][:, None]
    words = philox4x32(counter, halves[0][:, None]).reshape(len(seeds), -1)[:, :vocabulary]
    uniform = np.minimum(words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33), np.float32(1 - 2**-24))
    return -torch.log1p(-torch.from_numpy(uniform))


def kept_weights(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """exp((logit - largest) / temperature) of the tokens that the cuts leave, 0 of the others: (B, vocabulary) float32.

    The temperatures must be positive; see `sample` for the rest.
    """
    logits = logits.float()
    largest = logits.amax(dim=1, keepdim=True)
    weights = torch.exp((logits - largest) * (1.0 / temperature.float())[:, None])
    descending, order = logits.sort(dim=1, descending=True)
    size = logits.shape[1]

    k = torch.where((top_k > 0) & (top_k < size), top_k, size).long()
    smallest = descending.gather(1, k[:, None] - 1)
    weights = torch.where(logits >= smallest, weights, 0.0)

    # a token stays where those that are likelier have less than top_p of the mass
    masses = weights.gather(1, order).double().cumsum(dim=1)
    likelier = torch.searchsorted(-descending, -logits.contiguous(), side="left")  # how many are
    above = torch.where(likelier > 0, masses.gather(1, (likelier - 1).clamp(min=0)), 0.0)
    top_p = top_p.double()[:, None]
    weights = torch.where((top_p >= 1) | (above == 0) | (above < top_p * masses[:, -1:]), weights, 0.0)

    return torch.where(weights < min_p.float().clamp(max=1)[:, None], 0.0, weights)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """logits (B, vocabulary) float -> token ids (B,) int64.

    Args, (B,) each:
        temperature: float; 0 takes the largest logit, the first of equals.
        top_k: int32; off unless 0 < top_k < vocabulary.
        top_p: float in [0, 1]; 1 is off. The likeliest token always stays.
        min_p: float in [0, 1]; 0 is off.
        seeds, positions: int64, what the draw depends on: one seed for a request, one position for a token.

    A row that holds NaN or +inf, or -inf only, gives -1.
    """
    largest = logits.float().amax(dim=1)
    drawn = (logits.float() == largest[:, None]).int().argmax(dim=1)  # argmax gives the first of equals
    rows = (torch.isfinite(largest) & (temperature != 0)).nonzero()[:, 0]
    if len(rows) > 0:
        weights = kept_weights(*(x[rows] for x in (logits, temperature, top_k, top_p, min_p)))
        drawn[rows] = (weights / exponentials(seeds[rows], positions[rows], logits.shape[1])).argmax(dim=1)
    return torch.where(torch.isfinite(largest), drawn, -1)
