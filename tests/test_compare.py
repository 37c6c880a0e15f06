"""KL against a calculation by hand, and `qoq compare` between any two models."""

import json
import math
import weakref

import pytest
import torch
from conftest import make_tokenizer, only_line

from qoq.cli.subject import Subject
from qoq.compare import divergence, top_k

IDS = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])


class Table:
    """Predicts a row of probabilities from each token, whatever came before it."""

    def __init__(self, rows):
        self.rows = torch.tensor(rows, dtype=torch.float64)
        self.windows = 0

    def logits(self, ids):
        self.windows += 1
        return self.rows[ids].log() + 3.0  # logits, not log-probabilities

    def stream(self, token_ids, max_tokens):
        raise NotImplementedError


P = [[0.5, 0.3, 0.15, 0.05], [0.1, 0.6, 0.1, 0.2], [0.4, 0.1, 0.3, 0.2], [0.25, 0.2, 0.05, 0.5]]
Q = [[0.2, 0.4, 0.3, 0.1], [0.2, 0.5, 0.2, 0.1], [0.3, 0.2, 0.4, 0.1], [0.1, 0.2, 0.1, 0.6]]
SEEN = [0, 1, 2, 3, 2, 1]  # the tokens of IDS from which another one is predicted


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def folded(p, q, k):
    """The k most likely outcomes of p, the rest as one; q alike."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    return tuple([row[i] for i in order[:k]] + [sum(row[i] for i in order[k:])] for row in (p, q))


def test_kl_of_whole_distributions():
    found = divergence(top_k(Table(P), IDS), Table(Q), IDS)
    each = [kl(P[token], Q[token]) for token in SEEN]
    assert found.mean_kl == pytest.approx(sum(each) / 6, rel=1e-5)
    assert found.p99_kl == pytest.approx(max(each), rel=1e-5)
    assert found.tail_mass == pytest.approx(0, abs=1e-6)
    assert found.tokens == 6


def test_the_tail_is_one_outcome():
    kept = top_k(Table(P), IDS, k=2)
    assert kept.tokens.shape == (6, 2) and kept.tokens[0].tolist() == [0, 1]
    found = divergence(kept, Table(Q), IDS)
    each = [kl(*folded(P[token], Q[token], 2)) for token in SEEN]
    assert found.mean_kl == pytest.approx(sum(each) / 6, rel=1e-5)
    assert found.mean_kl < sum(kl(P[token], Q[token]) for token in SEEN) / 6  # a lower bound
    assert found.tail_mass == pytest.approx((0.2 + 0.2 + 0.3 + 0.25 + 0.3 + 0.2) / 6, rel=1e-5)


def test_same_top1_and_both_perplexities():
    found = divergence(top_k(Table(P), IDS), Table(Q), IDS)
    assert found.same_top1 == pytest.approx(3 / 6)  # from 1, twice, and from 3
    following = [1, 2, 3, 2, 1, 0]
    for rows, perplexity in ((P, found.reference_perplexity), (Q, found.perplexity)):
        nll = -sum(math.log(rows[a][b]) for a, b in zip(SEEN, following, strict=True)) / 6
        assert perplexity == pytest.approx(math.exp(nll), rel=1e-5)


def test_a_model_is_no_distance_from_itself():
    found = divergence(top_k(Table(P), IDS, k=2), Table(P), IDS)
    assert found.mean_kl < 1e-7 and found.p99_kl < 1e-6 and found.same_top1 == 1


# The command


def options(text_file, *more):
    return ["--text", text_file, "--seqlen", "32", *more]


def test_compare_a_checkpoint_with_its_original(qoq, llama, checkpoint_folder, text_file):
    code, out, err = qoq("compare", llama, checkpoint_folder(), *options(text_file, "--limit", "3", "--json"))
    assert code == 0, err
    found = json.loads(out)
    assert (found["reference"], found["reference_backend"]) == (str(llama), "original")
    assert (found["model"], found["backend"]) == (str(checkpoint_folder()), "runtime")
    assert (found["dataset"], found["windows"], found["tokens"]) == (text_file.name, 3, 93)
    assert 0 <= found["noise_floor"] < 1e-6 and 1e-4 < found["mean_kl"] < found["p99_kl"]
    assert 0 < found["same_top1"] <= 1 and 0 < found["tail_mass"] < 1 and found["top_k"] == 256
    ppl = ["--ppl", text_file, "--seqlen", "32", "--limit", "3", "--json"]
    for model, key in ((llama, "reference_perplexity"), (checkpoint_folder(), "perplexity")):
        assert found[key] == pytest.approx(json.loads(qoq("eval", model, *ppl)[1])["results"][0]["perplexity"])


def test_compare_a_model_with_itself(qoq, checkpoint_folder, text_file):
    command = ["compare", checkpoint_folder(), checkpoint_folder(), *options(text_file, "--limit", "2", "--json")]
    for backend in ("runtime", "simulate"):
        found = json.loads(qoq(*command, "--backend", backend)[1])
        assert found["reference_backend"] == found["backend"] == backend
        assert found["mean_kl"] < 1e-6 and found["same_top1"] == 1


def test_compare_prints_its_result_for_people_too(qoq, llama, checkpoint_folder, text_file):
    code, out, err = qoq("compare", llama, checkpoint_folder(), *options(text_file, "--limit", "1"))
    assert code == 0, err
    for label in ("mean KL", "99th percentile", "same top-1", "perplexity", "noise floor", "most likely tokens"):
        assert label in out


def test_one_model_is_loaded_at_a_time(qoq, llama, checkpoint_folder, text_file, monkeypatch):
    """The reference must be gone before the other is opened."""
    loaded: list[weakref.ref] = []
    load = Subject.load

    def watched(self, *args):
        assert not any(model() for model in loaded), "two models at a time"
        model = load(self, *args)
        loaded.append(weakref.ref(getattr(model, "model", model)))  # what transformers made, where it did
        return model

    monkeypatch.setattr(Subject, "load", watched)
    assert qoq("compare", llama, checkpoint_folder(), *options(text_file, "--limit", "1"))[0] == 0
    assert len(loaded) == 2


def test_other_vocabularies_are_refused(qoq, llama, checkpoint_folder, text_file, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    for reference in (llama, checkpoint_folder()):
        line = only_line(qoq("compare", reference, tmp_path / "other", *options(text_file)))
        assert f"a vocabulary of 300 tokens, expected 288 as in {reference}" in line


def test_compare_errors(qoq, llama, checkpoint_folder, text_file, tmp_path):
    assert "no such model" in only_line(qoq("compare", llama, tmp_path / "absent", *options(text_file)))
    assert "no such file" in only_line(qoq("compare", llama, llama, *options("absent.txt")))
    code, _, err = qoq("compare", llama, llama, *options(text_file, "--backend", "simulate"))
    assert code == 2 and "neither model is one" in err
