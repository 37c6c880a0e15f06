"""Calibration samples: seeded, packed without gaps, hashed."""

import hashlib
import json

import pytest
import torch
from conftest import make_tokenizer

from qoq.calibration.data import mixture, samples, token_hash
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


def test_a_mixture_takes_from_each_part(tokenizer, letters):
    ids = samples(tokenizer, f"c4:2,{letters}:3", nsamples=99, seqlen=20, seed=0)
    assert ids.shape == (5, 20)
    assert torch.equal(ids[:2], samples(tokenizer, "c4", 2, 20, 0))
    assert torch.equal(ids[2:], samples(tokenizer, letters, 3, 20, 0))


def test_parts_without_a_number_share_the_samples():
    assert mixture("a.txt,b.txt", 8) == [("a.txt", 4), ("b.txt", 4)]
    assert mixture("a.txt:1,b:c.txt", 8) == [("a.txt", 1), ("b:c.txt", 4)]


@pytest.mark.parametrize("dataset", ["a.txt:0", "a.txt,", ","])
def test_an_empty_part_is_refused(dataset):
    with pytest.raises(DataError, match="expected names or files with at least one sample each"):
        mixture(dataset, 8)


def test_conversations_are_rendered_with_one_bos(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    has_bos = rendered.startswith(tokenizer.bos_token)
    expected = tokenizer(rendered, add_special_tokens=not has_bos).input_ids
    ids = samples(tokenizer, str(path), 1, len(expected), 0)[0].tolist()
    assert ids == expected and ids.count(tokenizer.bos_token_id) == 1


def test_conversations_need_a_template(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    plain = make_tokenizer()
    plain.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        samples(plain, str(path), 1, 4, 0)
