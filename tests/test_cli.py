"""The command line: results on stdout, everything else on stderr, one line and exit code 1 for an error."""

import json
import math
import subprocess
import sys
import weakref

import pytest
import torch
from click.testing import CliRunner
from conftest import TESTS, only_line
from safetensors.torch import load_file, save_file

import qoq as package
from qoq import recipe
from qoq.checkpoint import Checkpoint
from qoq.cli.main import group
from qoq.cli.output import print_json
from qoq.cli.subject import Subject
from qoq.evaluate import EngineModel

SHARD = "model-00001-of-00001.safetensors"


# Help


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from click.testing import CliRunner; from qoq.cli.main import group\n"
        "assert CliRunner().invoke(group, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'datasets', 'lm_eval', 'yaml') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=TESTS.parent, capture_output=True, text=True)
    assert ended.stdout == "[]\n", ended.stderr


def test_help_names_the_verbs():
    result = CliRunner().invoke(group, ["--help"])
    assert result.exit_code == 0
    for verb in ("quantize", "eval", "compare", "inspect", "chat"):
        assert f"  {verb} " in result.output
        help_text = CliRunner().invoke(group, [verb, "--help"])
        assert help_text.exit_code == 0 and "--json" in help_text.output


def test_version():
    assert package.__version__ in CliRunner().invoke(group, ["--version"]).output


def test_a_command_that_is_none(qoq):
    code, out, err = qoq("quantise")
    assert code == 2 and out == "" and "quantise" in err and "Traceback" not in err


# The verbs


def test_quantize(qoq, llama, settings_file, tmp_path, checkpoint_folder):
    output = tmp_path / "out"
    code, out, err = qoq("quantize", "--model", llama, "--output", output, "--recipe", settings_file, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["output"] == str(output) and document["recipe"] == "tiny"
    assert [layer["layer"] for layer in document["layers"]] == [0, 1]
    assert document["seconds"] > 0 and document["peak_rss_bytes"] > 0 and document["peak_gpu_bytes"] == 0
    assert (output / SHARD).read_bytes() == (checkpoint_folder() / SHARD).read_bytes()
    assert "calibration tokens" in err and "layer 1" in err and "verified bit for bit" in err
    assert "\r" not in err


def test_quantize_options_go_before_the_recipe(qoq, llama, settings_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "own.txt"
    text.write_text("Only this text. " * 50)
    options = ["--group-size", "64", "--calib-dataset", text, "--nsamples", "3", "--seqlen", "24", "--seed", "7"]
    code, out, _ = qoq("quantize", "--model", llama, "--recipe", settings_file, *options)
    assert (code, out) == (0, "")
    made = tmp_path / "llama-QoQ-g64"
    used = recipe.load(str(made / "qoq_recipe.yaml"))
    assert (used.group_size, used.seed) == (64, 7)
    assert (used.calibration.dataset, used.calibration.nsamples, used.calibration.seqlen) == (str(text), 3, 24)
    assert Checkpoint(made).group_size == 64


def test_quantize_without_resume(qoq, llama, settings_file, tmp_path):
    parts = tmp_path / "out.work" / "parts"
    parts.mkdir(parents=True)
    (parts.parent / "run.json").write_text("{}")
    command = ["quantize", "--model", llama, "--output", tmp_path / "out", "--recipe", settings_file]
    code, out, err = qoq(*command)
    assert code == 1 and "use --no-resume to start over" in err.splitlines()[-1]
    assert qoq(*command, "--no-resume")[0] == 0


def test_eval_perplexity_of_every_backend(qoq, checkpoint_folder, text_file):
    options = ["--ppl", text_file, "--seqlen", "32", "--limit", "2", "--json"]
    names = ["runtime", "simulate", "original", "prefill", "decode"]
    backends = [word for name in names for word in ("--backend", name)]
    code, out, err = qoq("eval", checkpoint_folder(), *options, *backends)
    assert code == 0, err
    results = json.loads(out)["results"]
    assert [result["backend"] for result in results] == names
    for result in results:
        assert result["dataset"] == text_file.name
        assert (result["seqlen"], result["windows"], result["tokens"]) == (32, 2, 62)
        assert result["model"] == str(checkpoint_folder()) and result["seconds"] >= 0
    packed, simulated, original, prefill, decode = (result["perplexity"] for result in results)
    assert prefill == pytest.approx(packed, rel=1e-4) and decode == pytest.approx(packed, rel=1e-4)
    assert math.log(packed) == pytest.approx(math.log(simulated), rel=0.02) and packed != original


def test_eval_holds_one_model_at_a_time(qoq, checkpoint_folder, text_file, monkeypatch):
    loaded: list[weakref.ref] = []
    load = Subject.load

    def watched(self, *args):
        assert not any(model() for model in loaded), "two models at a time"
        runner = load(self, *args)
        loaded.append(weakref.ref(runner.engine if isinstance(runner, EngineModel) else runner))
        return runner

    monkeypatch.setattr(Subject, "load", watched)
    backends = [word for name in ("original", "runtime", "decode", "prefill") for word in ("--backend", name)]
    code, _, err = qoq("eval", checkpoint_folder(), "--ppl", text_file, "--seqlen", "16", "--limit", "1", *backends)
    assert code == 0 and len(loaded) == 4, err


def test_eval_of_a_source_and_of_a_checkpoint_without_options(qoq, llama, checkpoint_folder, text_file):
    options = ["--ppl", text_file, "--seqlen", "16", "--limit", "1", "--json"]
    for model, backend in ((llama, "original"), (checkpoint_folder(), "runtime")):
        code, out, err = qoq("eval", model, *options)
        assert code == 0, err
        assert [result["backend"] for result in json.loads(out)["results"]] == [backend]


def test_a_cpu_has_a_number_too(qoq, checkpoint_folder, text_file):
    options = ["--ppl", text_file, "--seqlen", "16", "--limit", "1", "--json", "--device", "cpu:0"]
    code, out, err = qoq("eval", checkpoint_folder(), *options)
    assert code == 0 and json.loads(out)["results"][0]["backend"] == "runtime", err


def test_eval_prints_its_result_for_people_too(qoq, llama, text_file):
    code, out, err = qoq("eval", llama, "--ppl", text_file, "--seqlen", "16", "--limit", "1")
    assert (code, out) == (0, "") and "perplexity" in err


def test_chat(qoq, checkpoint_folder):
    code, out, err = qoq("chat", checkpoint_folder(), "--prompt", "Hello", "--max-tokens", "5", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["prompt_tokens"] == len("u:Hello\na:")  # the chat template, which has no <s>
    assert 1 <= document["completion_tokens"] <= 5 and document["finish_reason"] in ("length", "stop")
    raw = json.loads(qoq("chat", checkpoint_folder(), "--prompt", "Hello", "--raw", "--max-tokens", "1", "--json")[1])
    assert raw["prompt_tokens"] == 1 + len("Hello")
    options = ["--system", "Be kind", "--max-tokens", "1", "--json"]
    told = json.loads(qoq("chat", checkpoint_folder(), "--prompt", "Hello", *options)[1])
    assert told["prompt_tokens"] == len("s:Be kind\nu:Hello\na:")


def test_chat_prints_the_text_alone(qoq, checkpoint_folder):
    command = ["chat", checkpoint_folder(), "--prompt", "Hello", "--max-tokens", "5"]
    text = json.loads(qoq(*command, "--json")[1])["text"]
    code, out, err = qoq(*command)
    assert code == 0 and out == text + "\n" and "tokens/s" in err


@pytest.mark.parametrize("group_size", [128, 64, -1])
@pytest.mark.parametrize("verify", [[], ["--verify"]])
def test_inspect(qoq, checkpoint_folder, group_size, verify):
    folder = checkpoint_folder("llama", group_size)
    code, out, err = qoq("inspect", folder, *verify, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["problems"] == [] and found["verified"] == bool(verify)
    assert (found["group_size"], found["model_type"], found["layers"], found["hidden_size"]) == (
        group_size,
        "llama",
        2,
        256,
    )
    assert found["recipe"] == "tiny" and 4 < found["bits_per_linear_weight"] < 5
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * (64 // 2 + 4)
    counted = {row["class"]: row["tensors"] for row in found["tensors"]}
    assert counted["qweight"] == 14 and counted["norms"] == 5 and counted["lm_head"] == 1
    made = Checkpoint(folder)
    assert sum(row["bytes"] for row in found["tensors"]) == sum(entry.bytes for entry in made.entries.values())
    scales = torch.cat([made.tensor(name) for name in made.entries if name.endswith("s1_scales")])
    assert found["scales"]["s1_scales"] == pytest.approx([float(scales.min()), float(scales.max())])
    code, out, err = qoq("inspect", folder, *verify)
    assert code == 0 and err == ""
    assert ("every tensor read, every group legal" if verify else "names, shapes and dtypes are right") in out


# Damage


def drop(tensors):
    del tensors["model.layers.0.mlp.up_proj.s1_scales"]


def reshape(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def illegal(tensors):
    tensors["model.layers.0.mlp.up_proj.s2_scales"][0, 0] = 0


def not_finite(tensors):
    tensors["lm_head.weight"][5, 5] = torch.inf


@pytest.mark.parametrize(
    ("damage", "verify", "problem"),
    [
        (drop, False, "tensor model.layers.0.mlp.up_proj.s1_scales is missing"),
        (reshape, False, "model.norm.weight: shape [255], expected [256]"),
        (illegal, True, "row 0, group 0 is illegal"),
        (not_finite, True, "lm_head.weight: NaN or Inf"),
    ],
)
def test_inspect_explains_damage(qoq, copy_of, checkpoint_folder, damage, verify, problem):
    folder = copy_of(checkpoint_folder())
    tensors = load_file(folder / SHARD)
    damage(tensors)
    save_file(tensors, folder / SHARD)
    options = ["--verify"] if verify else []
    code, out, err = qoq("inspect", folder, *options)
    lines = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert code == 1 and err == "" and len(lines) == 1 and problem in lines[0]
    code, out, err = qoq("inspect", folder, "--json", *options)
    assert code == 1 and err == "" and problem in json.loads(out)["problems"][0]


def truncate(folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-9])


def contradict(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))


def no_config(folder):
    (folder / "config.json").unlink()


def bad_report(folder):
    (folder / "qoq_report.json").write_text("{")


DAMAGES = [
    (truncate, "truncated or damaged safetensors"),
    (contradict, "quantization_config.group_size is 64"),
    (no_config, "no config.json"),
    (bad_report, "qoq_report.json"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES)
def test_inspect_explains_a_broken_folder(qoq, copy_of, checkpoint_folder, damage, problem):
    folder = copy_of(checkpoint_folder())
    damage(folder)
    code, out, err = qoq("inspect", folder, "--json")
    problems = json.loads(out)["problems"]
    assert code == 1 and err == "" and len(problems) == 1 and problem in problems[0]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES[:3])
def test_a_broken_folder_is_not_run(qoq, copy_of, checkpoint_folder, text_file, damage, problem):
    folder = copy_of(checkpoint_folder())
    damage(folder)
    assert problem in only_line(qoq("eval", folder, "--ppl", text_file, "--seqlen", "16"))
    assert problem in only_line(qoq("chat", folder, "--prompt", "Hi"))


def test_inspect_of_what_is_no_checkpoint(qoq, llama, tmp_path):
    code, out, _ = qoq("inspect", llama, "--json")
    assert code == 1 and "not a QoQ checkpoint" in json.loads(out)["problems"][0]
    code, out, _ = qoq("inspect", tmp_path, "--json")
    assert code == 1 and "no *.safetensors" in json.loads(out)["problems"][0]
    assert "no such folder" in only_line(qoq("inspect", tmp_path / "absent"))


def test_what_is_not_finite_is_null_in_json(capsys):
    print_json({"a": [1.5, math.nan], "b": {"c": (-math.inf, True)}, "d": "NaN"})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": [1.5, None],
        "b": {"c": [None, True]},
        "d": "NaN",
    }


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "--model", "./absent"], "./absent: no such model"),
        (["quantize", "--model", "nobody/nothing"], "nobody/nothing: no such folder, and the hub did not give it"),
        (["quantize", "--model", "{llama}", "--recipe", "qoq-g12"], "'qoq-g12': no such recipe"),
        (["quantize", "--model", "{llama}", "--recipe", "{tmp}/bad.yaml"], "unknown key gruop_size"),
        (["quantize", "--model", "{checkpoint}", "--recipe", "rtn-g128"], "expected the unquantized model"),
        (["eval", "./absent", "--ppl", "{text}"], "./absent: no such model"),
        (["eval", "{llama}", "--ppl", "{tmp}/absent.txt"], "no such file"),
        (["eval", "{llama}", "--ppl", "{text}", "--seqlen", "1000000"], "expected at least one window of 1000000"),
        (["eval", "{checkpoint}", "--ppl", "{tmp}/bad.jsonl"], "line 1: expected an object"),
        (["chat", "{llama}", "--prompt", "x"], "not a QoQ checkpoint"),
        (["chat", "./absent", "--prompt", "x"], "no such checkpoint folder"),
        (
            ["chat", "{checkpoint}", "--raw", "--prompt", "{long}"],
            "prompt of 301 tokens, the model takes fewer than 256",
        ),
    ],
)
def test_an_error_is_one_line(qoq, llama, checkpoint_folder, text_file, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)  # where the default output would go
    (tmp_path / "bad.yaml").write_text("name: bad\ngruop_size: 64\n")
    (tmp_path / "bad.jsonl").write_text("{\n")
    places = {"llama": llama, "checkpoint": checkpoint_folder(), "text": text_file, "tmp": tmp_path, "long": "x" * 300}
    code, out, err = qoq(*(argument.format(**places) for argument in arguments))
    errors = [line for line in err.splitlines() if " layers, " not in line]  # what the plan says comes first
    assert code == 1 and out == "" and len(errors) == 1 and errors[0].startswith("qoq: ") and message in errors[0], err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{llama}"], "nothing to measure"),
        (["eval", "{llama}", "--ppl", "x.txt", "--backend", "runtime"], "only --backend original can run it"),
        (["eval", "{llama}", "--ppl", "x.txt", "--device", "toaster"], "'toaster', expected cpu, cuda or cuda:N"),
        (["eval", "{llama}", "--ppl", "x.txt", "--device", "meta"], "'meta', expected cpu, cuda or cuda:N"),
        (["quantize", "--model", "{llama}", "--plan", "--device", "mps"], "'mps', expected cpu, cuda or cuda:N"),
        (["quantize", "--model", "{llama}", "--gpu-memory", "1", "--device", "cpu:0"], "expected --device cuda too"),
        (["quantize", "--model", "{llama}", "--group-size", "32"], "32"),
        (["quantize", "--model", "{llama}", "--nsamples", "0"], "nsamples"),
        (["quantize"], "--model"),
    ],
)
def test_a_wrong_option_is_a_usage_error(qoq, llama, arguments, message):
    code, out, err = qoq(*(argument.format(llama=llama) for argument in arguments))
    assert code == 2 and out == "" and message in err and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here(qoq, llama):
    code, _, err = qoq("quantize", "--model", llama, "--device", "cuda")
    assert code == 2 and "no CUDA device is available" in err


@pytest.mark.parametrize("verb", ["eval", "chat"])
def test_one_gpu_more_than_there_are(qoq, checkpoint_folder, monkeypatch, verb):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    code, out, err = qoq(verb, checkpoint_folder(), *(["--ppl", "x.txt"] if verb == "eval" else []), "--device=cuda:2")
    assert code == 2 and out == "" and "device 'cuda:2': there are 2 CUDA devices" in err


def test_the_process_ends_with_the_exit_code(tmp_path):
    command = [sys.executable, "-m", "qoq", "inspect", tmp_path / "absent"]
    ended = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr == f"qoq: {tmp_path / 'absent'}: no such folder\n"


def test_a_bug_keeps_its_traceback(qoq, monkeypatch, checkpoint_folder):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(Checkpoint, "header_problems", broken)
    with pytest.raises(ZeroDivisionError):
        qoq("inspect", checkpoint_folder())
