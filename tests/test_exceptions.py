"""Linears left in 16 bits: made, read back, run, and refused where they cannot be."""

import json

import pytest
import torch
from conftest import relative, tensors_of
from safetensors.torch import load_file

from qoq import checkpoint, layout, verify
from qoq.calibration import pipeline, plan
from qoq.checkpoint import Checkpoint
from qoq.convert import convert, open_origin
from qoq.errors import CheckpointError, ModelError, QuantizationError
from qoq.models.source import open_source
from qoq.quant import HalfLinear, QuantizedLinear
from qoq.runtime.engine import LLMEngine
from qoq.runtime.model import load
from qoq.runtime.sampler import SamplingParams

SHARD = "model-00001-of-00001.safetensors"
NAMES = ("model.layers.0.mlp", "model.layers.1.self_attn.o_proj")
LINEARS = {f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")} | {"model.layers.1.self_attn.o_proj"}


@pytest.fixture(scope="module")
def run(source_folder, tiny_recipe, tmp_path_factory):
    """(folder, report) of a checkpoint of a model with biases, `NAMES` in 16 bits."""
    path = tmp_path_factory.mktemp("exceptions") / "made"
    source = open_source(str(source_folder("llama-bias-tied")))
    return path, pipeline.quantize(source, path, tiny_recipe(modules_to_not_convert=NAMES))


@pytest.fixture
def made(run):
    return run[0]


def test_it_is_whole_and_says_so(made, source_folder, tiny_recipe):
    assert verify.problems(made) == []
    folder = Checkpoint(made)
    assert folder.half_precision == LINEARS
    declared = json.loads((made / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert declared == ["lm_head", *sorted(LINEARS)]
    tensors = load_file(made / SHARD)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == folder.expected
    size = sum(tensor.nbytes for tensor in tensors.values())
    source = open_source(str(source_folder("llama-bias-tied")))
    planned = plan.of_source(source, tiny_recipe(modules_to_not_convert=NAMES), "cpu")
    left = sum(tensors[f"{name}.weight"].numel() for name in LINEARS)
    assert planned.quantized_parameters == folder.spec.linear_parameters() - left
    assert planned.output_bytes == size > layout.size_in_bytes(folder.spec, 128, folder.kv_cache)


def test_linears_are_read_as_what_they_are(made):
    folder = Checkpoint(made)
    for index, layer in enumerate(folder.layer(i) for i in range(2)):
        for name, linear in layer.linears.items():
            assert isinstance(linear, HalfLinear if f"model.layers.{index}.{name}" in LINEARS else QuantizedLinear)
            assert (linear.bias is not None) == (name in folder.spec.biases)
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0)).half()
    o = folder.linear(1, "self_attn.o_proj")
    assert isinstance(o, HalfLinear) and o.bias is not None
    expected = torch.nn.functional.linear(x.double(), o.weight.double(), o.bias.double())
    assert o(x).dtype == torch.float16 and relative(o(x), expected) < 5e-4


def test_nothing_is_lost_in_them(run, source_folder, checkpoint_folder):
    """A layer whose MLP has 16 bits loses by A8 and W4 less than the same layer with 4."""
    path, report = run
    usual = Checkpoint(checkpoint_folder("llama-bias-tied")).report()
    for cause in ("w4", "a8"):
        assert report["layers"][0]["causes"][cause] < 0.9 * usual["layers"][0]["causes"][cause]
    assert report["layers"][0]["linears"]["mlp.down_proj"]["loss"] == 0
    assert report["layers"][0]["linears"]["self_attn.q_proj"]["loss"] > 0


def test_it_runs_packed_and_simulated(made, source_folder, checkpoint_folder):
    ids = torch.arange(40)[None]
    packed, simulated = load(made)(ids), load(made, simulate=True)(ids)
    assert relative(packed, simulated) < 0.05
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        original = AutoModelForCausalLM.from_pretrained(source_folder("llama-bias-tied"))(ids).logits
    assert relative(packed, original) < relative(load(checkpoint_folder("llama-bias-tied"))(ids), original)


def test_an_interrupted_run_gives_the_same_bits(run, source_folder, tiny_recipe, tmp_path, monkeypatch):
    source, settings = open_source(str(source_folder("llama-bias-tied"))), tiny_recipe(modules_to_not_convert=NAMES)

    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(source, tmp_path / "again", settings, on_layer=stop)
    pipeline.quantize(source, tmp_path / "again", settings)
    assert (tmp_path / "again" / SHARD).read_bytes() == (run[0] / SHARD).read_bytes()


def test_the_engine_runs_it(made):
    """Its first token is the decoder's, and so is the probability it gives it."""
    prompt = list(range(40))
    engine = LLMEngine.from_checkpoint(made, "cpu", max_model_len=64, max_num_seqs=2)
    (found,) = engine.generate([prompt], SamplingParams(max_tokens=1, logprobs=1, ignore_eos=True))
    expected = load(made)(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    assert found.token_ids == [int(expected.argmax())]
    assert found.logprobs is not None
    assert found.logprobs[0][found.token_ids[0]] == pytest.approx(float(expected.max()), abs=0.02)


def test_transformers_says_that_it_does_not_run_it(made):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ModelError, match="is in 16 bits, which qoq's engine runs and transformers does not"):
        AutoModelForCausalLM.from_pretrained(made)


@pytest.mark.parametrize("to", ["hf", "compressed-tensors", "compressed-tensors-w8a8"])
def test_formats_that_have_them(made, tmp_path, to):
    origin = open_origin(made)
    report = convert(origin, tmp_path / "out", to, max_error=0.2)
    ours, tensors = tensors_of(made), tensors_of(tmp_path / "out")
    assert all(torch.equal(tensors[f"{name}.weight"], ours[f"{name}.weight"]) for name in LINEARS)
    declared = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config", {})
    if to != "hf":
        assert declared["ignore"] == ["lm_head", *sorted(LINEARS)]
        assert "Note: 4 linears were in 16 bits and are." in (tmp_path / "out" / "README.md").read_text()
    assert report["layers"][0]["linears"]["mlp.up_proj"] == 0
    if to == "compressed-tensors-w8a8":
        assert report["error"] == 0


def test_transformers_opens_an_export_that_has_them(made, tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    convert(open_origin(made), tmp_path / "out", "compressed-tensors-w8a8")
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    for index, layer in enumerate(Checkpoint(made).layer(i) for i in range(2)):
        for name, linear in layer.linears.items():
            found = model.get_parameter(f"model.layers.{index}.{name}.weight")
            assert relative(found, linear.matrix()) < 5e-4


def test_formats_that_have_none(made, tmp_path):
    for to in ("qserve", "humming"):
        with pytest.raises(
            QuantizationError, match=f"--to {to} has no linears in 16 bits, model.layers.0.mlp.down_proj"
        ):
            convert(open_origin(made), tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


def test_tensor_parallel_cuts_them(tiny_recipe, llama, tmp_path):
    settings = tiny_recipe("rtn", 64, modules_to_not_convert=("model.layers.0",))
    pipeline.quantize(open_source(str(llama)), tmp_path / "made", settings)
    convert(open_origin(tmp_path / "made"), tmp_path / "tp", "qoq", tensor_parallel=2)
    whole, parts = tensors_of(tmp_path / "made"), [tensors_of(tmp_path / "tp" / f"rank-{rank}") for rank in range(2)]
    for name, dim in (("mlp.up_proj", 0), ("mlp.down_proj", 1)):
        full = f"model.layers.0.{name}.weight"
        assert torch.equal(torch.cat([part[full] for part in parts], dim), whole[full])
    declared = json.loads((tmp_path / "tp" / "rank-0" / "config.json").read_text())["quantization_config"]
    assert len(declared["modules_to_not_convert"]) == 8


def test_inspect_lists_them(qoq, made):
    code, out, err = qoq("inspect", made, "--json")
    found = json.loads(out)
    assert code == 0 and found["linears_in_16_bits"] == sorted(LINEARS) and found["loads_in"] == ["qoq"], err
    assert "model.layers.1.self_attn.o_proj" in qoq("inspect", made)[1]


def test_quantize_takes_their_names(qoq, llama, settings_file, tmp_path):
    command = ["quantize", "--model", llama, "--recipe", settings_file, "--output", tmp_path / "out"]
    assert qoq(*command, "--leave", "model.layers.1")[0] == 0
    assert Checkpoint(tmp_path / "out").half_precision == {f"model.layers.1.{name}" for name in checkpoint.LINEARS}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.2"], "model.layers.2 is no linear or layer of this model; names are like model.layers.0"),
        (["mlp.down_proj"], "mlp.down_proj is no linear or layer"),
        (
            ["model.layers.0.self_attn.k_proj"],
            "k_proj without model.layers.0.self_attn.q_proj; those that read one input",
        ),
        (["model.layers.0.mlp.up_proj"], "up_proj without model.layers.0.mlp.gate_proj"),
        (["model.layers"], "names every linear, nothing is left to quantize"),
    ],
)
def test_names_that_cannot_be(llama, names, message):
    spec = open_source(str(llama)).spec
    with pytest.raises(QuantizationError, match=message):
        layout.half_linears(spec, names)
    assert layout.half_linears(spec, ["lm_head"]) == frozenset()


def test_a_config_that_forgets_one(made, copy_of):
    folder = copy_of(made)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].remove("model.layers.1.self_attn.o_proj")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.self_attn\.o_proj\.qweight is missing"):
        Checkpoint(folder)
    listed = verify.problems(folder, values=False)
    assert any("o_proj.weight: no tensor of this model" in line for line in listed) and len(listed) == 5
