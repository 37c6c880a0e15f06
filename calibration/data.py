"""Calibration samples: text packed into token ids."""

import hashlib
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from qoq.errors import DataError
from qoq.text import documents

MAX_DOCUMENTS = 20_000  # read of a data set, so that none of the hub is read to its end


def samples(tokenizer: Any, dataset: str, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """Token ids (nsamples, seqlen) int64: documents in seeded order, packed without gaps.

    `dataset` is what `text.documents` takes, or a mixture with its samples: "a.jsonl:96,b.txt:32"; a part without a
    number gets an equal share of `nsamples`. Each document is encoded with the special tokens its tokenizer adds
    (one BOS where the model has one). Conversations are rendered by the tokenizer's chat template.

    Raises:
        DataError: a text is too short for one sample, or there is no chat template for conversations. Fewer samples
            than asked for are given as they are.
    """
    parts = mixture(dataset, nsamples)
    return torch.cat([_pack(tokenizer, name, count, seqlen, seed) for name, count in parts])


def mixture(dataset: str, nsamples: int) -> list[tuple[str, int]]:
    """The parts of a mixture with their samples."""
    parts = [part.strip() for part in dataset.split(",")]
    found = []
    for part in parts:
        name, _, count = part.rpartition(":")
        given = bool(name) and count.isdecimal()
        found.append((name, int(count)) if given else (part, -(-nsamples // len(parts))))
    if any(not name or count < 1 for name, count in found):
        raise DataError(
            f"{dataset!r}: expected names or files with at least one sample each, as in a.jsonl:96,b.txt:32"
        )
    return found


def _pack(tokenizer: Any, dataset: str, nsamples: int, seqlen: int, seed: int) -> Tensor:
    def render(messages: list[dict[str, str]]) -> str:
        if not tokenizer.chat_template:
            raise DataError(f"{dataset}: holds conversations, and the tokenizer has no chat template")
        return tokenizer.apply_chat_template(messages, tokenize=False)

    texts = [text for text in islice(documents(dataset, render=render), MAX_DOCUMENTS) if text.strip()]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    for index in order:
        has_bos = bool(tokenizer.bos_token) and texts[index].startswith(tokenizer.bos_token)
        ids += tokenizer(texts[index], add_special_tokens=not has_bos).input_ids
        if len(ids) >= nsamples * seqlen:
            break
    count = min(nsamples, len(ids) // seqlen)
    if count == 0:
        raise DataError(f"{dataset}: {len(ids)} tokens of text, expected at least seqlen = {seqlen}")
    return torch.tensor(ids[: count * seqlen], dtype=torch.int64).view(count, seqlen)


def token_hash(ids: Tensor) -> str:
    """sha256 of the ids as little-endian int64, row by row."""
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
