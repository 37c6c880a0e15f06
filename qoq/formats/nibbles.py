"""4-bit codes in int32 words, eight to a word, the first in the lowest bits.

compressed-tensors and Humming pack along K, GPTQ along K of the transposed matrix, AWQ along N of the transposed
one with its own order inside a word.
"""

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each nibble, lowest first


def pack(codes: Tensor) -> Tensor:
    """(..., K) uint8 codes in 0..15, K % 8 == 0 -> (..., K/8) int32."""
    low, high = codes[..., 0::2], codes[..., 1::2]
    packed = (low | (high << 4)).flatten().view(torch.int32)  # flat: a single row may have odd strides
    return packed.view(*codes.shape[:-1], codes.shape[-1] // 8)


def unpack(words: Tensor) -> Tensor:
    """(..., K/8) int32 -> (..., K) uint8."""
    packed = words.contiguous().view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_columns(codes: Tensor) -> Tensor:
    """(N, G) uint8, N % 8 == 0 -> (N/8, G) int32: packed along the first axis."""
    return pack(codes.T).T.contiguous()


def unpack_columns(words: Tensor) -> Tensor:
    """(N/8, G) int32 -> (N, G) uint8."""
    return unpack(words.T).T.contiguous()


def unpack_awq(words: Tensor) -> Tensor:
    """(K, N/8) int32 in AWQ's order -> (K, N) uint8."""
    nibbles = unpack(words).unflatten(-1, (-1, 8))
    return nibbles[..., torch.tensor(AWQ_ORDER).argsort()].flatten(-2)
