"""A whole run, and everything that can interrupt it."""

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GROUP_SIZES, TESTS, make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from qoq import recipe, shards, verify
from qoq.calibration import insight, pipeline, plan
from qoq.checkpoint import Checkpoint
from qoq.errors import CheckpointError, OutputError, QuantizationError
from qoq.models.architecture import LINEARS
from qoq.models.source import open_source
from qoq.quant import round_to_nearest

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def source(llama):
    return open_source(str(llama))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def part(output, name):
    return output.with_name(output.name + ".work") / "parts" / f"{name}.safetensors"


def interrupt(source, output, settings):
    """A run that ends after layer 0, as by Ctrl-C."""

    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(source, output, settings, on_layer=stop)


# The result


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_run_makes_a_sound_checkpoint(checkpoint_folder, source, tiny_recipe, group_size):
    folder = checkpoint_folder("llama", group_size)
    made = Checkpoint(folder)
    assert made.group_size == group_size
    assert verify.problems(folder) == []
    assert made.config.tie_word_embeddings is False and made.config.quantization_config["group_size"] == group_size
    assert recipe.parse((folder / "qoq_recipe.yaml").read_text()) == tiny_recipe(group_size=group_size)
    names = {"config.json", "qoq_report.json", "README.md", "tokenizer.json", shards.INDEX, SHARD}
    assert names <= {path.name for path in folder.iterdir()}
    assert not folder.with_name(folder.name + ".work").exists()


def test_every_family_makes_a_sound_checkpoint(any_checkpoint):
    assert verify.problems(any_checkpoint) == []


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_plain_rounding_holds_the_rounded_weights_of_the_source(source, tiny_recipe, tmp_path, group_size):
    """From source to packed file and back, bit for bit."""
    pipeline.quantize(source, tmp_path / "out", tiny_recipe("rtn", group_size))
    made = Checkpoint(tmp_path / "out")
    for index in range(2):
        layer = source.layer(index)
        for linear in LINEARS:
            weight, expected = (
                made.linear(index, linear).weight,
                round_to_nearest(layer[f"{linear}.weight"], group_size),
            )
            for field in dataclasses.fields(expected):
                assert torch.equal(getattr(weight, field.name), getattr(expected, field.name)), (linear, field.name)
        for norm, gain in made.layer(index).norms.items():
            assert torch.equal(gain, layer[f"{norm}.weight"].half())
    assert torch.equal(made.tensor("lm_head.weight"), source.lm_head().half())
    assert torch.equal(made.tensor("model.embed_tokens.weight"), source.embedding().half())
    assert torch.equal(made.tensor("model.norm.weight"), source.final_norm().half())


def test_tied_embeddings_become_two_tensors(checkpoint_folder):
    made = Checkpoint(checkpoint_folder("qwen2"))
    assert made.config.tie_word_embeddings is False
    assert made.tensor("lm_head.weight").shape == made.tensor("model.embed_tokens.weight").shape
    assert not torch.equal(made.tensor("lm_head.weight"), made.tensor("model.embed_tokens.weight"))  # the norm's gain


def test_the_report_says_what_happened(checkpoint_folder, source, tiny_recipe):
    report = json.loads((checkpoint_folder() / "qoq_report.json").read_text())
    assert report["model"] == source.name
    assert report["source_files"] == source.hashes()
    assert report["calibration"]["samples"] == 4 and report["calibration"]["seqlen"] == 32
    assert len(report["calibration"]["sha256"]) == 64
    assert report["recipe"]["group_size"] == 128
    assert report["seconds"] > 0 and report["peak_rss_bytes"] > 2**20
    for layer in report["layers"]:
        assert 0 < layer["loss"] < 0.2
        assert set(layer["linears"]) == set(LINEARS)
        assert all(0 < losses["loss"] < losses["rounded"] < 0.1 for losses in layer["linears"].values())
        for search in ("smooth_attention", "smooth_down"):
            assert 0 < layer[search]["after"] <= layer[search]["before"]


def test_the_plan_knows_the_size_of_the_result(checkpoint_folder, source, tiny_recipe):
    for group_size in GROUP_SIZES:
        index = json.loads((checkpoint_folder("llama", group_size) / shards.INDEX).read_text())
        made = plan.of_source(source, tiny_recipe(group_size=group_size), "cpu")
        assert made.output_bytes == index["metadata"]["total_size"]
        assert made.layers == 2 and made.tokens == 128 and made.source_bytes == source.bytes()


def test_licences_travel(copy_of, llama, tiny_recipe, tmp_path):
    folder = copy_of(llama)
    (folder / "LICENSE.txt").write_text("be kind")
    pipeline.quantize(open_source(str(folder)), tmp_path / "out", tiny_recipe("rtn"))
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "be kind"


def test_folders_named_like_licences_stay(copy_of, llama, tiny_recipe, tmp_path):
    folder = copy_of(llama)
    (folder / "LICENSES").mkdir()
    (folder / "LICENSE").write_text("be kind")
    pipeline.quantize(open_source(str(folder)), tmp_path / "out", tiny_recipe("rtn"))
    assert [path.name for path in (tmp_path / "out").glob("LICENSE*")] == ["LICENSE"]


def test_plan_and_card_know_the_parts_of_a_mixture(source, text_file, tiny_recipe, tmp_path):
    calibration = recipe.Calibration(f"c4:2,{text_file}:3", nsamples=4, seqlen=32)
    settings = tiny_recipe("rtn", calibration=calibration)
    report = pipeline.quantize(source, tmp_path / "out", settings)
    assert plan.of_source(source, settings, "cpu").tokens == 5 * 32
    assert report["calibration"]["samples"] == 5
    assert "5 x 32 tokens of c4 (2), calibration.txt (3), sha256" in (tmp_path / "out" / "README.md").read_text()


def test_dead_blocks_are_quantized(copy_of, llama, tiny_recipe, tmp_path):
    folder = copy_of(llama)
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"] *= 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = pipeline.quantize(open_source(str(folder)), tmp_path / "out", tiny_recipe())
    assert report["layers"][1]["linears"]["mlp.down_proj"]["loss"] == 0
    assert verify.problems(tmp_path / "out") == []


# What cannot be quantized


@pytest.mark.parametrize("stream, value", [("x_q", torch.nan), ("x_fp", torch.inf)])
@pytest.mark.parametrize(
    "kind, where",
    [("qoq", r"model\.layers\.0\.self_attn\.q_proj: its input"), ("rtn", "layer 0: its output")],
)
def test_an_overflow_on_calibration_tokens_is_named(
    source, tiny_recipe, tmp_path, monkeypatch, kind, where, stream, value
):
    embed = pipeline._embed

    def overflow(run, tokens):
        streams, probe = embed(run, tokens)
        getattr(streams, stream)[1, 3, 7] = value
        return streams, probe

    monkeypatch.setattr(pipeline, "_embed", overflow)
    message = f"^{where} has NaN or Inf on calibration tokens, expected finite float32 values"
    with pytest.raises(QuantizationError, match=message):
        pipeline.quantize(source, tmp_path / "out", tiny_recipe(kind))
    assert not (tmp_path / "out").exists() and not part(tmp_path / "out", "layer-00000").exists()


def test_a_report_that_is_no_json_is_not_written(source, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(insight.Drift, "divergence", lambda drift, logits: {"w4": torch.nan})
    with pytest.raises(ValueError, match="JSON"):
        pipeline.quantize(source, tmp_path / "out", tiny_recipe("rtn"))
    assert not (tmp_path / "out").exists()


def test_a_width_that_no_group_fits_is_refused_first(tmp_path, tiny_recipe):
    make_model("llama", hidden_size=192).save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    source = open_source(str(tmp_path / "m"))
    message = "q_proj: 192 input features are not a multiple of group size 128; fitting here: --group-size 64 or -1"
    with pytest.raises(QuantizationError, match=message):
        pipeline.quantize(source, tmp_path / "out", tiny_recipe("rtn"))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    pipeline.quantize(source, tmp_path / "out", tiny_recipe("rtn", 64))
    assert verify.problems(tmp_path / "out") == []


@pytest.mark.parametrize("value", [torch.nan, 1e9])
def test_a_bad_weight_is_named_and_nothing_is_made(copy_of, llama, tiny_recipe, tmp_path, value):
    folder = copy_of(llama)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7, 7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj"):
        pipeline.quantize(open_source(str(folder)), tmp_path / "out", tiny_recipe("rtn"))
    assert not (tmp_path / "out").exists()


def test_a_value_beyond_fp16_is_named(copy_of, llama, tiny_recipe, tmp_path):
    folder = copy_of(llama)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 7] = 7e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"model\.embed_tokens\.weight: .* exceeds float16"):
        pipeline.quantize(open_source(str(folder)), tmp_path / "out", tiny_recipe("rtn"))


# Interruption


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_an_interrupted_run_goes_on_to_the_same_bits(checkpoint_folder, source, tiny_recipe, tmp_path, group_size):
    output, settings = tmp_path / "out", tiny_recipe(group_size=group_size)
    interrupt(source, output, settings)
    assert not output.exists()
    done = {name: part(output, name).stat().st_mtime_ns for name in ("embed", "layer-00000")}
    assert not part(output, "layer-00001").exists()
    heard = []

    def listen(report):
        heard.append(report["layer"])
        assert {name: part(output, name).stat().st_mtime_ns for name in done} == done

    pipeline.quantize(source, output, settings, on_layer=listen)
    assert heard == [0, 1]
    assert contents(output) == contents(checkpoint_folder("llama", group_size))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families_go_on_to_the_same_bits(checkpoint_folder, source_folder, tiny_recipe, tmp_path, family):
    source, output = open_source(str(source_folder(family))), tmp_path / "out"
    interrupt(source, output, tiny_recipe())
    pipeline.quantize(source, output, tiny_recipe())
    assert contents(output) == contents(checkpoint_folder(family))


KILLED = """
import os, signal, sys
from pathlib import Path
from qoq import recipe
from qoq.calibration import pipeline
from qoq.models.source import open_source
kill = lambda report: os.kill(os.getpid(), signal.SIGKILL)
pipeline.quantize(open_source(sys.argv[1]), Path(sys.argv[2]), recipe.load(sys.argv[3]), on_layer=kill)
"""


def test_a_killed_run_goes_on_to_the_same_bits(checkpoint_folder, llama, source, tiny_recipe, tmp_path):
    output, settings = tmp_path / "out", tmp_path / "settings.yaml"
    settings.write_text(recipe.dump(tiny_recipe()))
    ended = subprocess.run([sys.executable, "-c", KILLED, llama, output, settings], cwd=TESTS.parent)
    assert ended.returncode == -signal.SIGKILL
    assert part(output, "layer-00000").is_file() and not output.exists()
    part(output, "layer-00001").with_suffix(".safetensors.tmp").write_bytes(b"what a kill leaves of a file")
    modified = part(output, "layer-00000").stat().st_mtime_ns

    def listen(report):
        assert part(output, "layer-00000").stat().st_mtime_ns == modified

    pipeline.quantize(source, output, tiny_recipe(), on_layer=listen)
    assert contents(output) == contents(checkpoint_folder())
    assert [path.name for path in output.iterdir() if path.suffix == ".tmp"] == []


def test_a_run_with_other_settings_does_not_go_on(source, source_folder, tiny_recipe, tmp_path, text_file):
    output = tmp_path / "out"
    interrupt(source, output, tiny_recipe())
    before = part(output, "layer-00000").read_bytes()
    with pytest.raises(OutputError, match=r"left by a run with another recipe; use --no-resume"):
        pipeline.quantize(source, output, tiny_recipe(rotate=False))
    with pytest.raises(OutputError, match=r"another source files"):
        pipeline.quantize(open_source(str(source_folder("mistral"))), output, tiny_recipe())
    other_text = tmp_path / "other.txt"
    other_text.write_text(text_file.read_text().upper())
    calibration = dataclasses.replace(tiny_recipe().calibration, dataset=str(other_text))
    with pytest.raises(OutputError, match=r"another recipe and calibration tokens"):
        pipeline.quantize(source, output, tiny_recipe(calibration=calibration))
    assert part(output, "layer-00000").read_bytes() == before


def test_no_resume_starts_over(checkpoint_folder, source, tiny_recipe, tmp_path):
    output = tmp_path / "out"
    interrupt(source, output, tiny_recipe(seed=3))
    stale = part(output, "layer-00000").read_bytes()
    pipeline.quantize(source, output, tiny_recipe(), resume=False)
    assert contents(output) == contents(checkpoint_folder())
    assert stale not in contents(output).values()


def test_no_resume_redoes_finished_layers(source, tiny_recipe, tmp_path):
    output = tmp_path / "out"
    interrupt(source, output, tiny_recipe("rtn"))
    part(output, "layer-00000").write_bytes(b"damaged")

    def listen(report):
        assert part(output, "layer-00000").stat().st_size > 1000

    pipeline.quantize(source, output, tiny_recipe("rtn"), resume=False, on_layer=listen)


def test_a_damaged_part_is_named(source, tiny_recipe, tmp_path):
    output = tmp_path / "out"
    interrupt(source, output, tiny_recipe())
    part(output, "layer-00000").write_bytes(b"damaged")
    with pytest.raises((OutputError, CheckpointError), match=r"layer-00000\.safetensors"):
        pipeline.quantize(source, output, tiny_recipe())
    assert not output.exists()


# The output folder


def test_an_empty_output_folder_is_taken(checkpoint_folder, source, tiny_recipe, tmp_path):
    (tmp_path / "out").mkdir()
    pipeline.quantize(source, tmp_path / "out", tiny_recipe())
    assert contents(tmp_path / "out") == contents(checkpoint_folder())


def test_a_foreign_output_is_left_alone(source, tiny_recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="out: exists and is not a checkpoint of ours"):
        pipeline.quantize(source, tmp_path / "out", tiny_recipe("rtn"), resume=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file: exists and is not"):
        pipeline.quantize(source, tmp_path / "file", tiny_recipe("rtn"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "file"}


def test_a_finished_checkpoint_is_left_alone(checkpoint_folder, source, tiny_recipe):
    output = checkpoint_folder()
    before = contents(output)
    for resume in (True, False):
        with pytest.raises(OutputError, match="holds a finished checkpoint; remove it or name another --output"):
            pipeline.quantize(source, output, tiny_recipe("rtn"), resume=resume)
    assert contents(output) == before


@pytest.mark.parametrize("resume", [True, False])
def test_a_foreign_work_folder_is_left_alone(source, tiny_recipe, tmp_path, resume):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="out.work: exists and is no work folder of qoq"):
        pipeline.quantize(source, tmp_path / "out", tiny_recipe("rtn"), resume=resume)
    assert (tmp_path / "out.work" / "notes.txt").read_text() == "mine"


def test_a_file_in_place_of_the_work_folder_is_left_alone(source, tiny_recipe, tmp_path):
    (tmp_path / "out.work").write_text("mine")
    with pytest.raises(OutputError, match="out.work: exists and is no work folder of qoq"):
        pipeline.quantize(source, tmp_path / "out", tiny_recipe("rtn"))
    assert (tmp_path / "out.work").read_text() == "mine"


def test_an_output_that_is_there_is_refused_before_anything_is_read(source, tiny_recipe, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("mine")
    for name in ("tokenizer", "hashes"):
        monkeypatch.setattr(type(source), name, None)
    with pytest.raises(OutputError, match="out: exists"):
        pipeline.quantize(source, tmp_path / "out", tiny_recipe("rtn"))


def test_the_folder_one_is_in_can_be_the_output(source, tiny_recipe, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pipeline.quantize(source, Path("."), tiny_recipe("rtn"))
    assert verify.problems(tmp_path / "here") == []


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_is_alone_in_its_work_folder(source, tiny_recipe, tmp_path, resume):
    output, refused = tmp_path / "out", []

    def start_again(report):
        with pytest.raises(OutputError, match="out.work: another run is at work here"):
            pipeline.quantize(source, output, tiny_recipe("rtn"), resume=resume)
        refused.append(report["layer"])

    pipeline.quantize(source, output, tiny_recipe("rtn"), on_layer=start_again)
    assert refused == [0, 1] and verify.problems(output) == []


def test_a_work_folder_that_holds_only_a_lock_is_taken(source, tiny_recipe, tmp_path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "lock").touch()
    pipeline.quantize(source, tmp_path / "out", tiny_recipe("rtn"))
    assert verify.problems(tmp_path / "out") == []


def test_an_output_below_a_file_cannot_be_written(source, tiny_recipe, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        pipeline.quantize(source, tmp_path / "file" / "out", tiny_recipe())


# A full disk


HOW_TO_GO_ON = "out.work: make room and run the same command again"


@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def layer_bytes(folder):
    return sum(entry.bytes for name, entry in shards.read_entries(folder).items() if ".layers.0." in name)


def test_a_disk_that_fills_up_with_shards(checkpoint_folder, source, tiny_recipe, tmp_path):
    output = tmp_path / "out"
    with largest_file(layer_bytes(checkpoint_folder()) + 20_000):
        with pytest.raises(OutputError, match=rf"cannot write \(File too large\); .*/{HOW_TO_GO_ON}"):
            pipeline.quantize(source, output, tiny_recipe())
    assert part(output, "head").is_file() and not output.exists()
    pipeline.quantize(source, output, tiny_recipe())
    assert contents(output) == contents(checkpoint_folder())


def test_a_disk_that_fills_up_with_layers(checkpoint_folder, llama, source, tiny_recipe, tmp_path):
    """In a process of its own: one line, exit code 1, and the same command goes on."""
    settings, output = tmp_path / "tiny.yaml", tmp_path / "out"
    settings.write_text(recipe.dump(tiny_recipe()))
    size = layer_bytes(checkpoint_folder())
    ended = subprocess.run(
        [sys.executable, "-m", "qoq", "quantize", "--model", llama, "--output", output, "--recipe", settings],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 1 and "Traceback" not in ended.stderr and ended.stdout == ""
    assert last.startswith("qoq: ") and "cannot write (File too large)" in last and last.endswith(HOW_TO_GO_ON)
    assert part(output, "embed").is_file() and not part(output, "layer-00000").exists() and not output.exists()
    pipeline.quantize(source, output, tiny_recipe())
    assert contents(output) == contents(checkpoint_folder())


# Verification


@pytest.mark.parametrize("byte", [-1, -100_000, -200_000])
def test_a_flipped_bit_in_the_draft_is_found(source, tiny_recipe, tmp_path, monkeypatch, byte):
    write = shards.write_shards

    def write_and_flip(folder, files, *args, **kwargs):
        write(folder, files, *args, **kwargs)
        content = bytearray((folder / SHARD).read_bytes())
        content[byte] ^= 1
        (folder / SHARD).write_bytes(content)

    monkeypatch.setattr(shards, "write_shards", write_and_flip)
    with pytest.raises(CheckpointError, match=r"^(model|lm_head)\..*(: what was written differs|is illegal)"):
        pipeline.quantize(source, tmp_path / "out", tiny_recipe("rtn"))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    pipeline.quantize(source, tmp_path / "out", tiny_recipe("rtn"))
    assert verify.problems(tmp_path / "out") == []
