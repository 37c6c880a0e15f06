"""Calibration samples: seeded, packed without gaps, hashed."""

import hashlib
import json

import pytest
import torch
from conftest import make_tokenizer

from qoq.calibration.data import samples, token_hash
from qoq.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def letters(tmp_path):
    """Twenty documents of ten equal letters each, and an empty one."""
    path = tmp_path / "letters.jsonl"
    texts = [chr(97 + i) * 10 for i in range(20)] + ["  \n"]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def test_documents_are_packed_without_gaps(tokenizer, letters):
    ids = samples(tokenizer, letters, nsamples=3, seqlen=20, seed=0)
    assert ids.shape == (3, 20) and ids.dtype == torch.int64
    flat = ids.flatten().tolist()
    assert all(flat[i] == 256 for i in range(0, 60, 11))  # one bos before each document
    for start in range(0, 55, 11):
        assert len(set(flat[start + 1 : start + 11])) == 1


def test_the_seed_decides_the_order(tokenizer, letters):
    first, again, other = (samples(tokenizer, letters, 3, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_samples_begin_with_the_same(tokenizer, letters):
    assert torch.equal(samples(tokenizer, letters, 5, 20, 0)[:2], samples(tokenizer, letters, 2, 20, 0))


def test_fewer_than_asked_for_are_given(tokenizer, letters):
    assert samples(tokenizer, letters, 1000, 22, 0).shape == (10, 22)


def test_bundled_text_gives_real_samples(tokenizer):
    ids = samples(tokenizer, "c4", 2, 64, 0)
    assert ids.shape == (2, 64) and len(ids.unique()) > 10


def test_too_short_a_text(tokenizer, letters, tmp_path):
    with pytest.raises(DataError, match=r"letters\.jsonl: 220 tokens of text, expected at least seqlen = 221"):
        samples(tokenizer, letters, 1, 221, 0)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(DataError, match="0 tokens"):
        samples(tokenizer, str(empty), 1, 2, 0)


def test_the_hash_is_of_the_ids():
    ids = torch.tensor([[1, 2], [256, 70000]])
    content = b"".join(value.to_bytes(8, "little") for value in (1, 2, 256, 70000))
    assert token_hash(ids) == hashlib.sha256(content).hexdigest()
    assert token_hash(ids.T.contiguous().T) == token_hash(ids)
    assert token_hash(ids + 1) != token_hash(ids)
