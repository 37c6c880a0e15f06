"""The plan: what the config of a model tells of a run and of its result."""

import dataclasses
import json

import pytest
from click import BadParameter
from conftest import only_line, tensors_of

from qoq import recipe, roofline
from qoq.calibration import plan
from qoq.cli.plan import Size
from qoq.formats import parallel
from qoq.models.architecture import model_spec
from qoq.models.source import describe, open_source


def of(model, name="qoq-g128", device="cuda"):
    return plan.of_config(model, recipe.load(name), device)


def test_sizes_of_a_known_model():
    found = of("llama-3-8b")
    assert found.parameters == 8_030_261_248 and found.quantized_parameters == 6_979_321_856
    assert found.source_bytes == 2 * found.parameters
    assert dict(found.kv_bytes) == {4: 32 * 2 * 8 * 68, 8: 32 * 2 * 8 * 132, 16: 32 * 2 * 8 * 256}
    assert found.tensor_parallel == [1, 2, 4, 8]
    card = found.cards["h100"]
    room = 0.9 * roofline.CARDS["h100"].memory - found.output_bytes
    assert card.tokens_held[4] == int(room) // 34816
    assert card.seconds and 351 / 2 < card.seconds.total < 351  # half the tokens of the run below
    assert of("llama-3-70b").cards["rtx-4090"].tokens_held == {4: 0, 8: 0, 16: 0}


def test_the_measured_run_on_an_h100():
    """Random Llama-3-8B's shapes, qoq-g128, 128 x 2048: 351 s."""
    settings = recipe.load("qoq-g128")
    settings = dataclasses.replace(settings, calibration=dataclasses.replace(settings.calibration, seqlen=2048))
    card = plan.of_config("llama-3-8b", settings, "cuda").cards["h100"]
    assert card.seconds and card.seconds.total == pytest.approx(351, rel=0.15)


def test_a_plan_needs_nothing_but_the_config(qoq, llama, tmp_path):
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    code, out, err = qoq("quantize", "--model", tmp_path, "--plan", "--json")
    assert code == 0, err
    document = json.loads(out)
    parameters = sum(tensor.numel() for tensor in tensors_of(llama).values())
    assert document["parameters"] == parameters
    assert document["run"]["device"] == "cpu" and document["run"]["peak_bytes"]["host"] > 4e8
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    code, out, err = qoq("quantize", "--model", tmp_path, "--plan", "--device", "cuda")
    assert (code, out) == (0, "") and "tensor parallel" in err and "GPU memory" in err and "rtx-4090" in err


def test_the_plan_of_linears_left_in_16_bits(qoq, llama, tmp_path):
    command = ["quantize", "--model", llama, "--plan", "--json"]
    whole, left = (json.loads(qoq(*command, *more)[1]) for more in ((), ("--leave", "model.layers.1")))
    assert left["quantized_parameters"] == whole["quantized_parameters"] / 2
    assert left["run"]["disk_bytes"]["output"] > whole["run"]["disk_bytes"]["output"]
    assert "model.layers.7 is no linear" in only_line(qoq(*command, "--leave", "model.layers.7"))
    assert "no such budget file" in only_line(qoq(*command, "--gate", tmp_path / "absent.yaml"))


def test_of_a_hub_id_only_the_config_is_fetched(monkeypatch):
    from transformers import AutoConfig, LlamaConfig

    asked = []

    def fetch(pretrained_model_name_or_path, **more):
        asked.append(pretrained_model_name_or_path)
        return LlamaConfig()

    monkeypatch.setattr(AutoConfig, "from_pretrained", fetch)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **more: pytest.fail("a download"))
    assert plan.of_config("some/model", recipe.load("rtn-g128"), "cpu").layers == 32
    assert asked == ["some/model"]


@pytest.mark.parametrize("model", ["./nothing", "nothing", "/no/such/folder"])
def test_a_model_that_is_not_there(qoq, model):
    assert "no such model" in only_line(qoq("quantize", "--model", model, "--plan"))


def test_the_disk_is_what_the_files_take(checkpoint_folder, llama, tiny_recipe):
    folder = checkpoint_folder()
    found = plan.of_source(open_source(str(llama)), tiny_recipe(), "cpu")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert found.output_bytes == pytest.approx(size, rel=0.02)


def test_degrees_cut_no_head_and_no_group(any_model):
    spec = model_spec(describe(str(any_model)), "model")
    for size in (128, 64, -1):
        degrees = parallel.legal_degrees(spec, size)
        assert degrees[0] == 1 and all(spec.num_kv_heads % degree == 0 for degree in degrees)
        assert all(spec.intermediate_size % (degree * max(32, size)) == 0 for degree in degrees)
    qwen = model_spec(describe("qwen2.5-7b"), "qwen")  # 18944 = 148 groups of 128, and 4 KV heads
    assert parallel.legal_degrees(qwen, 128) == [1, 2, 4]


def test_budgets_on_the_command_line(qoq, llama, settings_file, tmp_path):
    command = ["quantize", "--model", llama, "--recipe", settings_file, "--output", tmp_path / "out"]
    line = only_line(qoq(*command, "--cpu-memory", "100MB"))
    assert "--cpu-memory: 0.10 GB is too little, this run needs at least 0.5" in line or "at least 0.6" in line
    assert not (tmp_path / "out.work").exists()
    code, _, err = qoq(*command, "--gpu-memory", "8")
    assert code == 2 and "expected --device cuda" in err
    code, _, err = qoq(*command, "--cpu-memory", "lots")
    assert code == 2 and "expected a size such as 24 (GiB), 500MiB or 80GB" in err


@pytest.mark.parametrize(
    "text, size",
    [("24", 24 << 30), ("500MiB", 500 << 20), ("80GB", 80 * 10**9), ("1.5g", 3 << 29), ("2 tb", 2 * 10**12)],
)
def test_sizes(text, size):
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GB", "1e9", "3kB", "1.2.3", "٣"])
def test_what_is_no_size(text):
    with pytest.raises(BadParameter, match="expected a size"):
        Size().convert(text, None, None)
