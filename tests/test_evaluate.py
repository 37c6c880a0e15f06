"""Perplexity on models whose perplexity is known, windows, and lm-eval through the runtime."""

import inspect
import json
import math
import shutil

import pytest
import torch
from conftest import TESTS, make_tokenizer
from torch import Tensor
from transformers.utils import ModelOutput

from qoq import evaluate
from qoq.checkpoint import Checkpoint
from qoq.errors import DataError, ModelError
from qoq.models.source import open_source


class Uniform:
    """Every token is equally likely."""

    vocab = 512

    def logits(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.vocab)

    def stream(self, token_ids, max_tokens):
        return iter([7] * max_tokens)


class Knowing(Uniform):
    """The next token of an arithmetic sequence gets probability p; what the last window token predicts is unused."""

    def __init__(self, p: float):
        self.p = p

    def logits(self, ids: Tensor) -> Tensor:
        others = (1 - self.p) / (self.vocab - 1)
        logits = torch.full((*ids.shape, self.vocab), math.log(others))
        return logits.scatter(2, (ids[..., None] + 1) % self.vocab, math.log(self.p))


def measure(model, ids):
    return evaluate.perplexity(model, ids, name="m", backend="b", dataset="d")


def test_the_perplexity_of_a_uniform_model_is_its_vocabulary():
    result = measure(Uniform(), torch.randint(0, 512, (3, 20)))
    assert result.perplexity == pytest.approx(512, rel=1e-6)
    assert (result.windows, result.seqlen, result.tokens) == (3, 20, 57)
    assert (result.model, result.backend, result.dataset) == ("m", "b", "d")


def test_each_token_is_predicted_from_those_before_it():
    ids = torch.arange(40).view(2, 20)
    assert measure(Knowing(0.25), ids).perplexity == pytest.approx(4, rel=1e-6)
    assert measure(Knowing(0.25), ids.flip(1)).perplexity > 500


def test_the_mean_is_over_all_windows():
    """Nats are averaged over tokens, not perplexities over windows."""
    known, unknown = torch.arange(10), torch.arange(0, 100, 10)
    first, second = (evaluate.mean_nll(Knowing(0.5), ids[None]) for ids in (known, unknown))
    both = torch.stack((known, unknown))
    assert evaluate.mean_nll(Knowing(0.5), both) == pytest.approx((first + second) / 2, rel=1e-6)
    assert measure(Knowing(0.5), both).perplexity == pytest.approx(math.exp((first + second) / 2), rel=1e-6)


def test_every_window_is_announced():
    seen = []
    evaluate.mean_nll(Uniform(), torch.zeros(4, 5, dtype=torch.int64), on_window=lambda: seen.append(1))
    assert len(seen) == 4


def test_windows_cut_one_tokenization():
    tokenizer, text = make_tokenizer(), "abcdefghij"
    ids = tokenizer(text).input_ids
    assert len(ids) == 11
    assert evaluate.windows(tokenizer, text, 4).tolist() == [ids[:4], ids[4:8]]
    assert evaluate.windows(tokenizer, text, 4, limit=1).tolist() == [ids[:4]]
    assert evaluate.windows(tokenizer, text, 11, limit=5).shape == (1, 11)
    with pytest.raises(DataError, match="11 tokens of text, expected at least one window of 12"):
        evaluate.windows(tokenizer, text, 12)


def test_raw_rows_are_joined_as_the_data_set_is(tmp_path):
    """WikiText's protocol: the rows, empty ones included, joined by blank lines."""
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = Title = \n \n Text of it . \n")
    assert evaluate.evaluation_text(str(path)) == "\n\n = Title = \n\n\n\n\n Text of it . \n"
    head = evaluate.evaluation_text(str(TESTS / "data" / "wiki.test.head.raw"))
    assert head.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")


def test_documents_are_joined_by_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "One."}\n{"text": "Two."}\n')
    assert evaluate.evaluation_text(str(path)) == "One.\n\nTwo."


def test_the_original_model_gives_the_loss_of_transformers(any_model):
    from transformers import AutoModelForCausalLM

    source = open_source(str(any_model))
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loss = AutoModelForCausalLM.from_pretrained(any_model)(ids, labels=ids).loss
    assert evaluate.mean_nll(evaluate.OriginalModel(source), ids) == pytest.approx(float(loss), rel=1e-4)


def test_the_original_model_streams_greedily(llama):
    model = evaluate.OriginalModel(open_source(str(llama)))
    ids = [256, 10, 20]
    tokens = list(model.stream(ids, 5))
    for token in tokens:
        assert int(model.logits(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)


class OlderNames(torch.nn.Module):
    """A model as code from the hub and transformers before 5.24 have it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.given = model, []

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        self.given.append(past_key_values)
        out = self.model(input_ids, cache=past_key_values, use_cache=use_cache)
        return ModelOutput(logits=out.logits, past_key_values=out.cache)


def test_the_cache_may_have_its_older_name(llama):
    model = evaluate.OriginalModel(open_source(str(llama)))
    if "cache" not in inspect.signature(model.model.forward).parameters:
        pytest.skip("transformers before 5.24: it has no other name")
    expected = list(model.stream([256, 10], 4))
    model.model = OlderNames(model.model)
    assert list(model.stream([256, 10], 4)) == expected
    assert model.model.given[0] is None and None not in model.model.given[1:]


def test_an_incomplete_original_model_is_refused(copy_of, llama):
    """Transformers would fill the gap with random weights."""
    from safetensors.torch import load_file, save_file

    folder = copy_of(llama)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        evaluate.OriginalModel(open_source(str(folder)))


def test_quantization_costs_little_on_a_tiny_model(checkpoint_folder, llama):
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    made = Checkpoint(checkpoint_folder())
    original = evaluate.mean_nll(evaluate.OriginalModel(open_source(str(llama))), ids)
    packed, simulated = (evaluate.mean_nll(evaluate.QuantizedModel(made, b), ids) for b in ("runtime", "simulate"))
    assert packed == pytest.approx(simulated, rel=0.02)
    assert packed == pytest.approx(original, rel=0.3) and packed != original


def test_the_engine_has_the_runtimes_perplexity(any_checkpoint):
    """Whether it computes windows as prompts or token by token; and nothing of a window is left for the next."""
    ids = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(0))
    made = Checkpoint(any_checkpoint)
    packed = evaluate.mean_nll(evaluate.QuantizedModel(made, "runtime"), ids)
    for backend in ("prefill", "decode"):
        model = evaluate.EngineModel(made, backend)
        assert evaluate.mean_nll(model, ids) == pytest.approx(packed, rel=1e-4)
        assert len(list(model.stream(ids[0].tolist(), 3))) == 3
        assert model.engine.scheduler.pages.free == model.engine.scheduler.pages.count


# lm-eval

TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture
def task_file(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"q{i}", "choices": ["yes", "no"], "answer": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "letters.yaml").write_text(TASK)
    return tmp_path / "letters.yaml"


def test_an_own_task_runs_through_the_runtime(task_file, checkpoint_folder):
    made = Checkpoint(checkpoint_folder())
    model, tokenizer = evaluate.QuantizedModel(made, "runtime"), made.tokenizer()
    accuracy = evaluate.tasks(model, tokenizer, [str(task_file)], 256, None)["letters"]["acc,none"]
    right = 0
    for index in range(4):
        scores = []
        for choice in ("yes", "no"):
            context, whole = tokenizer(f"q{index}").input_ids, tokenizer(f"q{index} {choice}").input_ids
            logprobs = model.logits(torch.tensor([whole]))[0].log_softmax(-1)
            scores.append(sum(float(logprobs[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        right += scores[index % 2] == max(scores)
    assert accuracy == right / 4


def test_a_limit_shortens_a_task(task_file):
    asked = []

    class Counting(Uniform):
        def logits(self, ids):
            asked.append(ids)
            return super().logits(ids)

    evaluate.tasks(Counting(), make_tokenizer(), [str(task_file)], 256, 1)
    assert len(asked) == 2


def test_a_task_that_cannot_be_loaded_is_named(task_file, tmp_path):
    with pytest.raises(DataError, match="absent.yaml: no such task file"):
        evaluate.tasks(Uniform(), make_tokenizer(), [str(tmp_path / "absent.yaml")], 256, None)
    task_file.write_text("[1, 2")
    with pytest.raises(DataError, match="letters.yaml: not an lm-eval task"):
        evaluate.tasks(Uniform(), make_tokenizer(), [str(task_file)], 256, None)
    for content in (
        b"- 1",
        b"dataset_path: json",
        "task: caf\u00e9".encode("latin-1"),
        TASK.replace("rows.jsonl", "3").encode(),
    ):
        task_file.write_bytes(content)
        with pytest.raises(DataError, match="letters.yaml: not an lm-eval task"):
            evaluate.tasks(Uniform(), make_tokenizer(), [str(task_file)], 256, None)


def test_a_task_whose_data_cannot_be_loaded_is_named(task_file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("datasets.load_dataset", no_network)
        with pytest.raises(DataError, match=r"^--tasks hellaswag: cannot be loaded \(ConnectionError\)$"):
            evaluate.tasks(Uniform(), make_tokenizer(), ["hellaswag"], 256, None)
    (task_file.parent / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"^--tasks letters: cannot be loaded \(.*rows.jsonl"):
        evaluate.tasks(Uniform(), make_tokenizer(), [str(task_file)], 256, None)


def no_network(*args, **options):
    raise ConnectionError


@pytest.mark.parametrize(
    ("files", "split", "rows"),
    [
        ("rows.jsonl", "train", 4),
        ("[rows.jsonl, more.jsonl]", "train", 8),
        ("{test: [rows.jsonl, more.jsonl]}", "test", 8),
    ],
)
def test_every_form_of_data_files(task_file, files, split, rows):
    shutil.copyfile(task_file.parent / "rows.jsonl", task_file.parent / "more.jsonl")
    plain = "data_files:\n    test: rows.jsonl\ntest_split: test"
    task_file.write_text(TASK.replace(plain, f"data_files: {files}\ntest_split: {split}"))
    asked = []

    class Counting(Uniform):
        def logits(self, ids):
            asked.append(ids)
            return super().logits(ids)

    evaluate.tasks(Counting(), make_tokenizer(), [str(task_file)], 256, None)
    assert len(asked) == 2 * rows


def lm(max_length=64, model=None):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from qoq.lm_eval_model import QoqLM

    return QoqLM(model or Uniform(), make_tokenizer(), max_length)


class Request:
    def __init__(self, *args):
        self.args = args


def test_loglikelihood_is_of_the_continuation_alone():
    scored = lm(model=Knowing(0.5))._loglikelihood_tokens([(None, [1, 2], [3, 4]), (None, [1, 2], [9])])
    assert scored[0] == (pytest.approx(2 * math.log(0.5), rel=1e-5), True)
    assert scored[1] == (pytest.approx(math.log(0.5 / 511), rel=1e-5), False)


def test_rolling_likelihood_scores_every_token_once():
    text = "x" * 150  # more than two windows of 64
    assert lm().loglikelihood_rolling([Request(text)]) == [pytest.approx(-151 * math.log(512), rel=1e-5)]


def test_generation_ends_at_a_stop_string():
    class Spelling(Uniform):
        def stream(self, token_ids, max_tokens):
            return iter(make_tokenizer()("ab.cd", add_special_tokens=False).input_ids[:max_tokens])

    options = {"until": ["."], "max_gen_toks": 5}
    assert lm(model=Spelling())._generate("x", options) == "ab"
    assert lm(model=Spelling())._generate("x", options | {"until": "cd"}) == "ab."
    assert lm(model=Spelling())._generate("x", {"until": [], "max_gen_toks": 4}) == "ab.c"


@pytest.mark.parametrize("room", [10, 63, 64, 1000])
def test_generation_keeps_some_of_a_prompt_and_stays_in_the_context(room):
    seen = []

    class Noting(Uniform):
        def stream(self, token_ids, max_tokens):
            seen.append((list(token_ids), max_tokens))
            return iter([])

    prompt = "abcdefghij" * 20
    lm(model=Noting())._generate(prompt, {"max_gen_toks": room})
    ids, asked = seen[0]
    assert ids and asked >= 1 and len(ids) + asked <= 64
    assert ids == make_tokenizer()(prompt).input_ids[-len(ids) :]
