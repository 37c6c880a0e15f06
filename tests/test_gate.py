"""The gate: budgets, verdicts, and the change that would pass."""

import dataclasses
import json
from functools import partial
from typing import Any

import pytest
from conftest import only_line

from qoq import gate
from qoq.checkpoint import Checkpoint
from qoq.errors import DataError, RecipeError
from qoq.gate import Budget, Change, Check
from qoq.layout import half_linears, size_in_bytes

GENEROUS = {"perplexity_ratio": 1e6, "mean_kl": 100, "p99_kl": 1000, "same_top1": 1e-9}


@pytest.fixture
def budget_file(tmp_path, text_file):
    """Limits as keywords -> a budget file on the calibration text."""

    def write(**limits):
        path = tmp_path / "budget.yaml"
        own = {"text": str(text_file), "seqlen": 32, "windows": 2} | limits
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in own.items()))
        return path

    return write


# Budgets


def test_a_budget_is_read(tmp_path):
    path = tmp_path / "b.yaml"
    path.write_text(
        "text: a.txt\np99_kl: 1e-3\nmean_kl: 1\nsame_top1: 0.9\ntokens_per_second: 5\nspeed: {batch_size: 2}\n"
    )
    found = gate.load(path)
    assert found.limits() == {"mean_kl": 1.0, "p99_kl": 1e-3, "same_top1": 0.9, "tokens_per_second": 5.0}
    assert (found.speed.batch_size, found.speed.output_len) == (2, 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean_lk: 1", "unknown key mean_lk; known are text, .*mean_kl"),
        ("speed: {batch: 1}", "unknown key speed.batch"),
        ("text: a", "budget: None, expected at least one limit"),
        ("mean_kl: 1", "text: None, expected a text, to measure quality on"),
        ("{text: a, mean_kl: 0}", "mean_kl: 0.0, expected a number above 0"),
        ("{text: a, mean_kl: .nan}", "mean_kl: nan, expected a number above 0"),
        ("{text: a, same_top1: 95}", "same_top1: 95.0, expected a share, up to 1"),
        ("{text: a, mean_kl: low}", "mean_kl: 'low', expected of type float"),
        ("{size_bytes: 1.5}", "size_bytes: 1.5, expected of type int"),
        ("{size_bytes: 1, seqlen: 1}", "seqlen: 1, expected at least 2"),
        ("{size_bytes: 1, speed: {rounds: 0}}", "speed.rounds: 0, expected at least 1"),
    ],
)
def test_a_budget_that_is_none(tmp_path, text, message):
    path = tmp_path / "b.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf"b\.yaml: {message}"):
        gate.load(path)


def test_no_such_budget(tmp_path):
    with pytest.raises(RecipeError, match="no such budget file"):
        gate.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("name", "value", "passed"),
    [
        ("mean_kl", 0.1, True),
        ("mean_kl", 0.11, False),
        ("mean_kl", float("nan"), False),
        ("same_top1", 0.1, True),
        ("same_top1", 0.09, False),
        ("same_top1", float("nan"), False),
        ("tokens_per_second", 0.2, True),
    ],
)
def test_a_limit_holds_on_its_side(name, value, passed):
    assert Check(name, value, 0.1).passed is passed


# The change that would pass


@pytest.fixture(scope="module")
def made(checkpoint_folder):
    return Checkpoint(checkpoint_folder())


def with_losses(monkeypatch, folder, kl, weights, cache=(0.1, 0.1)):
    """A report with these divergences by cause, and these errors of layers by their weights and by their cache."""
    causes = [{"w4": w, "a8": 0.0, "k4": k, "v4": 0.0} for w, k in zip(weights, cache, strict=True)]
    rows = [{"layer": i, "causes": own} for i, own in enumerate(causes)]
    monkeypatch.setattr(
        folder, "report", lambda: {"kl": dict(zip(("w4", "a8", "k4", "v4"), kl, strict=True)), "layers": rows}
    )


def change_for(folder, measured, **limits):
    budget = Budget(text="t", **limits)
    return gate.smallest_change(folder, budget, gate.check(budget, measured))


def test_the_worst_layer_is_named(made, monkeypatch):
    with_losses(monkeypatch, made, (0.6, 0.2, 0.1, 0.1), (0.1, 0.3))
    measured = {"mean_kl": 0.1, "perplexity_ratio": 1.2, "same_top1": 0.9, "p99_kl": 1.0, "size_bytes": 1e6}
    found = change_for(made, measured, mean_kl=0.05, perplexity_ratio=1.1)
    assert isinstance(found, Change) and found.recipe == {"modules_to_not_convert": ["model.layers.1"]}
    part = 1 - 0.8 * 0.75
    assert found.estimate == pytest.approx({"mean_kl": 0.1 * part, "perplexity_ratio": 1.2**part})
    left = half_linears(made.spec, ["model.layers.1"])
    assert f"{size_in_bytes(made.spec, 128, made.kv_cache, left)} bytes" in found.why
    same_top1 = change_for(made, measured, same_top1=0.93)
    assert isinstance(same_top1, Change) and same_top1.estimate["same_top1"] == pytest.approx(1 - 0.1 * part**0.5)


def test_the_worst_cache_is_named(made, monkeypatch):
    """It is preferred where it is enough: the checkpoint stays as large as it is."""
    with_losses(monkeypatch, made, (0.4, 0.0, 0.2, 0.4), (0.1, 0.3), cache=(0.3, 0.1))
    measured = {"mean_kl": 0.1, "size_bytes": 1e6, "tokens_per_second": 50.0}
    found = change_for(made, measured, mean_kl=0.06, size_bytes=10**6, tokens_per_second=10.0)
    assert isinstance(found, Change) and found.recipe == {"kv_cache.layers_in_8_bits": [0]}
    part = 1 - 0.6 * 0.75 * (1 - 1 / 289)
    assert found.estimate == pytest.approx({"mean_kl": 0.1 * part, "size_bytes": 1e6})
    token = 2 * 2 * (32 + 4)  # K and V of two heads
    assert found.why == (
        f"cache layers 0 in 8 bits: {token + 2 * 2 * (64 + 4)} bytes a token instead of {2 * token}; "
        "slower by what is to be measured"
    )
    both = change_for(made, measured, mean_kl=0.041)
    assert isinstance(both, Change) and both.recipe == {"kv_cache.layers_in_8_bits": [0, 1]}
    assert both.why.startswith("cache all layers in 8 bits: ")


def test_weights_are_named_beside_a_whole_cache(made, monkeypatch):
    with_losses(monkeypatch, made, (0.5, 0.0, 0.2, 0.3), (0.1, 0.4))
    found = change_for(made, {"mean_kl": 0.1, "size_bytes": 1.0}, mean_kl=0.02)
    assert isinstance(found, Change)
    assert found.recipe == {"kv_cache.layers_in_8_bits": [0, 1], "modules_to_not_convert": ["model.layers.1"]}
    size = size_in_bytes(made.spec, 128, made.kv_cache, half_linears(made.spec, ["model.layers.1"]))
    assert found.estimate["mean_kl"] == pytest.approx(0.1 * (1 - 0.5 * (1 - 1 / 289) - 0.5 * 0.8))
    assert found.why.endswith(f"; leave layers 1 in 16 bits: {size} bytes")


def test_what_is_an_exception_already_stays_one(made, monkeypatch):
    """An 8-bit cache is not offered twice, nor a layer that is in 16 bits."""
    with_losses(monkeypatch, made, (0.4, 0.0, 0.2, 0.4), (0.1, 0.3), cache=(0.1, 0.3))
    monkeypatch.setattr(made, "kv_cache", dataclasses.replace(made.kv_cache, layers_in_8_bits=(1,)))
    found = change_for(made, {"mean_kl": 0.1}, mean_kl=0.09)
    assert isinstance(found, Change) and found.recipe == {"kv_cache.layers_in_8_bits": [0, 1]}
    monkeypatch.setattr(made, "half_precision", half_linears(made.spec, ["model.layers.1"]))
    assert "estimated to be too much" in change_for(made, {"mean_kl": 0.1}, mean_kl=0.001)


def test_where_no_layer_helps(made, monkeypatch):
    with_losses(monkeypatch, made, (0.1, 0.0, 0.5, 0.4), (0.1, 0.3))
    assert change_for(made, {"mean_kl": 0.1}, mean_kl=0.001) == (
        "it is estimated to be too much with an 8-bit cache and all layers but one in 16 bits"
    )
    monkeypatch.setattr(made, "report", lambda: {})
    assert "no qoq_report.json with the losses" in change_for(made, {"mean_kl": 0.1}, mean_kl=0.05)
    with_losses(monkeypatch, made, (0.0,) * 4, (0.0, 0.0))
    assert "no usable losses" in change_for(made, {"mean_kl": 0.1}, mean_kl=0.05)
    with_losses(monkeypatch, made, (0.1,) * 4, (0.1, 0.1, 0.1), (0.1, 0.1, 0.1))
    assert "no usable losses" in change_for(made, {"mean_kl": 0.1}, mean_kl=0.05)


def test_other_limits_bound_the_change(made, monkeypatch):
    with_losses(monkeypatch, made, (0.6, 0.2, 0.1, 0.1), (0.1, 0.3))
    size = sum(entry.bytes for entry in made.entries.values())
    measured = {"mean_kl": 0.1, "size_bytes": float(size), "tokens_per_second": 50.0}
    assert f"of {size} allowed" in change_for(made, measured, mean_kl=0.05, size_bytes=size)
    slower = change_for(made, measured, mean_kl=0.05, tokens_per_second=10.0)
    assert isinstance(slower, Change) and "slower by what is to be measured" in slower.why
    assert "tokens_per_second" not in slower.estimate
    assert "known to make it faster" in change_for(made, measured, tokens_per_second=100.0)
    assert "quality asks for more bytes" in change_for(made, measured, mean_kl=0.05, size_bytes=size - 1)


def test_a_smaller_layout(made):
    size = sum(entry.bytes for entry in made.entries.values())
    channel = size_in_bytes(made.spec, -1, made.kv_cache)
    found = change_for(made, {"size_bytes": float(size)}, size_bytes=channel)
    assert isinstance(found, Change) and found.recipe == {"group_size": -1}
    assert found.estimate == {"size_bytes": channel}
    assert "no layout" in change_for(made, {"size_bytes": float(size)}, size_bytes=channel - 1)


def test_a_smaller_layout_is_one_that_a_recipe_may_have(made, monkeypatch):
    size, channel = sum(entry.bytes for entry in made.entries.values()), size_in_bytes(made.spec, -1, made.kv_cache)
    report = made.report()
    report["recipe"]["weights"]["whole_zeros"] = True
    monkeypatch.setattr(made, "report", lambda: report)
    found = change_for(made, {"size_bytes": float(size)}, size_bytes=channel)
    assert isinstance(found, Change) and found.recipe == {"group_size": -1, "weights.whole_zeros": False}
    reports: list[dict[str, Any]] = [{}, {"recipe": None}, {"recipe": {"weights": []}}]
    for broken in reports:
        monkeypatch.setattr(made, "report", partial(dict, broken))
        found = change_for(made, {"size_bytes": float(size)}, size_bytes=channel)
        assert isinstance(found, Change) and found.recipe == {"group_size": -1}


def test_a_smaller_layout_beside_linears_in_16_bits_has_the_bytes_of_its_recipe(made, monkeypatch):
    left = ["model.layers.1.mlp.down_proj"]
    monkeypatch.setattr(made, "spec", dataclasses.replace(made.spec, num_layers=100))  # where either may be smaller
    monkeypatch.setattr(made, "half_precision", half_linears(made.spec, left))

    def bytes_of(group_size, names):
        return size_in_bytes(made.spec, group_size, made.kv_cache, half_linears(made.spec, names))

    size = float(bytes_of(128, left))
    quantized: dict[str, Any] = {"modules_to_not_convert": []}
    for recipe in (quantized, {"group_size": -1}, quantized | {"group_size": -1}):
        limit = bytes_of(recipe.get("group_size", 128), recipe.get("modules_to_not_convert", left))
        found = change_for(made, {"size_bytes": size}, size_bytes=limit)
        assert isinstance(found, Change) and found.recipe == recipe
        assert found.estimate == {"size_bytes": limit} and f" {limit} bytes" in found.why
    assert "no layout" in change_for(made, {"size_bytes": size}, size_bytes=limit - 1)


# The command


def test_accept_and_reject(qoq, checkpoint_folder, budget_file):
    folder = checkpoint_folder()
    size = sum(entry.bytes for entry in Checkpoint(folder).entries.values())
    code, out, err = qoq("gate", folder, budget_file(**GENEROUS, size_bytes=size), "--json")
    verdict = json.loads(out)
    assert (code, verdict["verdict"], verdict["change"]) == (0, "ACCEPT", None), err
    values = {one["name"]: one["value"] for one in verdict["checks"]}
    assert values["size_bytes"] == size and 0 < values["mean_kl"] < values["p99_kl"] and 0 < values["same_top1"] <= 1
    assert all(one["passed"] for one in verdict["checks"])

    code, out, err = qoq("gate", folder, budget_file(**GENEROUS | {"mean_kl": values["mean_kl"] / 1.01}), "--json")
    verdict = json.loads(out)
    assert (code, verdict["verdict"]) == (2, "REJECT") and err == ""
    assert [one["name"] for one in verdict["checks"] if not one["passed"]] == ["mean_kl"]
    (layer,) = verdict["change"]["recipe"]["kv_cache.layers_in_8_bits"]
    code, out, _ = qoq("gate", folder, budget_file(mean_kl=values["mean_kl"] / 1.01))
    assert code == 2 and f"\nsmallest change: cache layers {layer} in 8 bits: " in out
    assert f"\n  in the recipe: kv_cache.layers_in_8_bits: [{layer}]\n" in out
    assert out.endswith("\nREJECT\n")


def test_the_same_figures_as_compare(qoq, llama, checkpoint_folder, budget_file, text_file):
    options = ["--text", text_file, "--seqlen", "32", "--limit", "2", "--json"]
    expected = json.loads(qoq("compare", llama, checkpoint_folder(), *options)[1])
    code, out, _ = qoq("gate", checkpoint_folder(), budget_file(**GENEROUS), "--reference", llama, "--json")
    found = {one["name"]: one["value"] for one in json.loads(out)["checks"]}
    ratio = expected["perplexity"] / expected["reference_perplexity"]
    names = ("mean_kl", "p99_kl", "same_top1")
    assert code == 0 and found == pytest.approx({"perplexity_ratio": ratio} | {name: expected[name] for name in names})


def test_speed_is_measured(qoq, checkpoint_folder, tmp_path):
    path = tmp_path / "speed.yaml"
    speed = "speed: {batch_size: 2, input_len: 4, output_len: 3, rounds: 1}\n"
    for limit, expected in ((0.001, 0), (1e9, 2)):
        path.write_text(f"tokens_per_second: {limit}\n{speed}")
        code, out, err = qoq("gate", checkpoint_folder(), path, "--json")
        verdict = json.loads(out)
        assert code == expected and verdict["checks"][0]["value"] > 0.001, err


def test_quantize_ends_at_the_gate(qoq, llama, settings_file, budget_file, tmp_path):
    command = ["quantize", "--model", llama, "--recipe", settings_file, "--output", tmp_path / "out", "--json"]
    bad = tmp_path / "bad.yaml"
    bad.write_text("mean_kl: 1\n")
    assert "expected a text" in only_line(qoq(*command, "--gate", bad)) and not (tmp_path / "out").exists()
    code, out, err = qoq(*command, "--gate", budget_file(**GENEROUS | {"mean_kl": 1e-9}))
    assert code == 2 and json.loads(out)["gate"]["verdict"] == "REJECT", err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| mean_kl | " in card and "| at most 1e-09 |" in card and "2 windows of 32 tokens" in card
    assert Checkpoint(tmp_path / "out").group_size == 128  # rejected, and kept


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"text": "absent.txt", "mean_kl": 1}, "absent.txt: no such file"),
        ({"seqlen": 100000, "mean_kl": 1}, "expected at least one window of 100000"),
        ({"tokens_per_second": 1, "speed": {"input_len": 250, "output_len": 7}}, "257 tokens, the model takes 256"),
        (
            {"tokens_per_second": 1, "speed": {"batch_size": 1025, "input_len": 4, "output_len": 3}},
            "expected 1 to 1024",
        ),
    ],
)
def test_what_the_gate_measures_on_is_checked_before_the_run(
    qoq, llama, settings_file, budget_file, tmp_path, limits, message
):
    options = ["--recipe", settings_file, "--output", tmp_path / "out", "--gate", budget_file(**limits)]
    assert message in only_line(qoq("quantize", "--model", llama, *options))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_a_checkpoint_without_a_verdict_is_told(qoq, llama, settings_file, budget_file, tmp_path, monkeypatch):
    def lost(*args):
        raise DataError("the text is gone")

    monkeypatch.setattr("qoq.cli.quantize.judge", lost)
    command = ["quantize", "--model", llama, "--recipe", settings_file, "--output", tmp_path / "out", "--json"]
    code, out, err = qoq(*command, "--gate", budget_file(mean_kl=1))
    document = json.loads(out)
    assert code == 1 and document["output"] == str(tmp_path / "out") and "gate" not in document
    assert err.splitlines()[-1] == "qoq: the text is gone"


@pytest.mark.parametrize(("share", "keys"), [(0.8, ["kv_cache.layers_in_8_bits"]), (0.3, None)])
def test_what_it_names_does_pass(qoq, llama, settings_file, budget_file, tmp_path, checkpoint_folder, share, keys):
    """Follow the advice, an 8-bit cache or that and linears in 16 bits: the next run is accepted."""
    code, out, _ = qoq("gate", checkpoint_folder(), budget_file(mean_kl=1000.0), "--json")
    measured = json.loads(out)["checks"][0]["value"]
    budget = budget_file(mean_kl=share * measured)
    verdict = json.loads(qoq("gate", checkpoint_folder(), budget, "--json")[1])
    change = verdict["change"]["recipe"]
    assert list(change) == (keys or ["kv_cache.layers_in_8_bits", "modules_to_not_convert"])
    options = ["--kv8", ",".join(map(str, change["kv_cache.layers_in_8_bits"]))]
    options += [word for name in change.get("modules_to_not_convert", []) for word in ("--leave", name)]
    command = ["quantize", "--model", llama, "--recipe", settings_file, "--output", tmp_path / "out", "--json"]
    code, out, err = qoq(*command, *options, "--gate", budget)
    assert code == 0 and json.loads(out)["gate"]["verdict"] == "ACCEPT", (err, out)


def test_a_gate_on_what_is_no_checkpoint(qoq, llama, budget_file):
    assert "not a QoQ checkpoint" in only_line(qoq("gate", llama, budget_file(mean_kl=1.0)))


def test_a_budget_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget(size_bytes=1).size_bytes = 2  # type: ignore[misc]
