"""Calibration samples: text packed into token ids."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from qoq.errors import DataError
from qoq.text import documents


def samples(tokenizer: Any, dataset: str, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """Token ids (nsamples, seqlen) int64: documents in seeded order, packed without gaps.

    Each document is encoded with the special tokens its tokenizer adds (one BOS where the model has one).

    Raises:
        DataError: the text is too short for one sample. Fewer samples than asked for are given as they are.
    """
    texts = [text for text in documents(dataset) if text.strip()]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    for index in order:
        ids += tokenizer(texts[index]).input_ids
        if len(ids) >= nsamples * seqlen:
            break
    count = min(nsamples, len(ids) // seqlen)
    if count == 0:
        raise DataError(f"{dataset}: {len(ids)} tokens of text, expected at least seqlen = {seqlen}")
    return torch.tensor(ids[: count * seqlen], dtype=torch.int64).view(count, seqlen)


def token_hash(ids: Tensor) -> str:
    """sha256 of the ids as little-endian int64, row by row."""
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
