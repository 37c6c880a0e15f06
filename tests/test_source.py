"""Reading source models: what is read is what was saved, and each fault is named."""

import errno
import hashlib
import json

import pytest
import torch
from conftest import make_model
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qoq.errors import ModelError, OutputError, QuantizationError
from qoq.models.source import open_source

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def broken(copy_of, llama):
    return copy_of(llama)


def edit(folder, change):
    """Rewrite the weights after `change(tensors)`."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_every_tensor_is_read_as_saved(any_model):
    saved = load_file(any_model / WEIGHTS)
    source = open_source(str(any_model))
    assert set(source.files) == set(saved)
    for index in range(source.spec.num_layers):
        layer = source.layer(index)
        prefix = f"model.layers.{index}."
        assert {prefix + name for name in layer} == {name for name in saved if name.startswith(prefix)}
        assert all(torch.equal(layer[name], saved[prefix + name]) for name in layer)
    assert torch.equal(source.embedding(), saved["model.embed_tokens.weight"])
    assert torch.equal(source.lm_head(), saved.get("lm_head.weight", saved["model.embed_tokens.weight"]))
    assert torch.equal(source.final_norm(), saved["model.norm.weight"])


def test_hashes_and_size_are_of_the_files(llama):
    source = open_source(str(llama))
    content = (llama / WEIGHTS).read_bytes()
    assert source.bytes() == len(content)
    assert source.hashes() == {
        "config.json": hashlib.sha256((llama / "config.json").read_bytes()).hexdigest(),
        WEIGHTS: hashlib.sha256(content).hexdigest(),
    }


def test_sharded_and_half_precision_models_are_read(tmp_path):
    model = make_model("llama").bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / INDEX).is_file() and len(list(tmp_path.glob("*.safetensors"))) > 1
    source = open_source(str(tmp_path))
    state = model.state_dict()
    layer = source.layer(1)
    assert all(torch.equal(layer[name], state[f"model.layers.1.{name}"].float()) for name in layer)
    assert source.embedding().dtype == torch.bfloat16 and source.final_norm().dtype == torch.float32


def test_the_tokenizer_is_loaded(llama):
    tokenizer = open_source(str(llama)).tokenizer()
    ids = tokenizer("Ab\u00e9").input_ids
    assert ids[0] == 256 and len(ids) == 5
    assert tokenizer.decode(ids[1:]) == "Ab\u00e9"


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "absent", "a/b/c", "~/absent-model", "x.gguf"])
def test_no_such_model(name):
    with pytest.raises(ModelError, match=r"no such (model|file)"):
        open_source(name)


def test_an_unreachable_hub_id_is_one_line():
    with pytest.raises(ModelError, match="nobody/nothing: no such folder, and the hub did not give it") as caught:
        open_source("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_fetched_from_the_hub(monkeypatch, llama, trusted):
    """Whatever opens the model, its code only if trusted, and the weights once."""
    there = ["config.json", "model.safetensors", "merges.txt", "vocab.json", "vocab.txt", "LICENCE.txt"]
    there += ["configuration_own.py"]
    there += ["pytorch_model.bin", "consolidated.safetensors", "consolidated-00001-of-00002.safetensors"]
    there += ["original/params.json", "original/consolidated.00.pth"]
    fetched: list[str] = []

    def fetch(hub_id, **patterns):
        fetched.extend(filter_repo_objects(there, **patterns))
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    open_source("nobody/nothing", trust_remote_code=trusted)
    assert fetched == there[: 7 if trusted else 6]


@pytest.mark.parametrize("content", [b"not a gguf file at all", b"GGUF", b"GGUF\x03\0\0\0" + bytes(range(40))])
def test_a_file_that_is_no_gguf(tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="model.gguf: GGUF cannot be read"):
        open_source(str(path))
    assert [found for found in (tmp_path / "cache").rglob("*") if found.name not in ("qoq", "gguf")] == []


@pytest.mark.parametrize("fault", ["file", "disk", "weights"])
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, fault):
    """It is not the GGUF file's fault, and no half of a model stays behind."""

    class Unwritable:
        def save_pretrained(self, folder):
            if fault == "disk":
                raise OSError(errno.ENOSPC, "No space left on device")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("qoq.models.source.check_header", lambda path: None)
    monkeypatch.setattr("qoq.models.source._read_gguf", lambda path: (Unwritable(), Unwritable()))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    if fault == "file":
        cache.write_text("in the way")
    reason = "Not a directory" if fault == "file" else "No space left on device"
    with pytest.raises(OutputError, match=rf"cache/qoq/gguf/\w+-v1: cannot write \(.*{reason}"):
        open_source(str(path))
    assert not [found for found in cache.rglob("*") if found.name not in ("qoq", "gguf")]


def test_no_weights(broken):
    (broken / WEIGHTS).rename(broken / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors in .* \(pickled weights are not read\)"):
        open_source(str(broken))


def test_no_config(broken):
    (broken / "config.json").unlink()
    with pytest.raises(ModelError, match="no config.json; expected a Hugging Face model folder"):
        open_source(str(broken))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"model_type": "nobody-knows"}', '{"model_type": "llama", "hidden_size": "wide"}', "\x00"],
)
def test_a_config_that_says_nothing_useful(broken, content):
    (broken / "config.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        open_source(str(broken))
    assert str(broken) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unsupported_architecture(broken):
    config = json.loads((broken / "config.json").read_text()) | {"model_type": "gpt2", "architectures": ["GPT2LMHead"]}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="architecture 'gpt2' is not supported; supported are llama"):
        open_source(str(broken))


@pytest.mark.parametrize("size", [0, 7, 100, 2000, -1])
def test_truncated_weights(broken, size):
    content = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(content[:size])
    with pytest.raises(ModelError, match="model.safetensors: truncated or damaged safetensors"):
        open_source(str(broken))


def test_a_quantized_model_is_refused_by_its_config(broken):
    config = json.loads((broken / "config.json").read_text())
    for found in (None, {"quant_method": "compressed-tensors", "format": "int-quantized"}):
        (broken / "config.json").write_text(json.dumps(config | {"quantization_config": found}))
        if found is None:
            open_source(str(broken))
    message = r"quantization_config \(quant_method 'compressed-tensors'\), expected the unquantized model"
    with pytest.raises(ModelError, match=message):
        open_source(str(broken))


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")], ids=str
)
def test_a_quantized_tensor_is_refused(broken, dtype, name):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(384, 256).to(dtype)

    edit(broken, change)
    with pytest.raises(ModelError, match=rf"up_proj.weight is {name}, expected F16, BF16, F32, F64"):
        open_source(str(broken)).layer(0)


def test_a_missing_tensor(broken):
    edit(broken, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match="tensor model.layers.1.mlp.up_proj.weight is missing"):
        open_source(str(broken)).layer(1)


def test_a_tensor_of_another_shape(broken):
    def change(tensors):
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.ones(64, 256)

    edit(broken, change)
    with pytest.raises(ModelError, match=r"k_proj.weight has shape \[64, 256\], the config says \[128, 256\]"):
        open_source(str(broken)).layer(0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"])
def test_a_value_that_is_not_finite(broken, name, value):
    def change(tensors):
        tensors[name][3, 5] = value

    edit(broken, change)
    source = open_source(str(broken))
    with pytest.raises(QuantizationError, match=rf"{name}: {value} at \[3, 5\], expected finite weights"):
        source.layer(1)
        source.embedding()


def test_an_index_that_names_an_absent_file(broken):
    weight_map = dict.fromkeys(load_file(broken / WEIGHTS), "model-00001-of-00002.safetensors")
    (broken / WEIGHTS).rename(broken / "model-00002-of-00002.safetensors")
    (broken / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="model-00001-of-00002.safetensors is named by the index but is not there"):
        open_source(str(broken))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '"x"', '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(broken, content):
    (broken / WEIGHTS).rename(broken / "model-00001-of-00001.safetensors")
    (broken / INDEX).write_text(content)
    with pytest.raises(ModelError, match="not a safetensors index"):
        open_source(str(broken))


def test_weights_are_those_that_transformers_takes(broken):
    """Of an index, other files, and model.safetensors: the last."""
    saved = load_file(broken / WEIGHTS)
    save_file({name: 2 * x for name, x in saved.items()}, broken / "other.safetensors", metadata={"format": "pt"})
    (broken / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(saved, "other.safetensors")}))
    norm, loaded = "model.norm.weight", AutoModelForCausalLM.from_pretrained(broken, dtype="auto")
    source = open_source(str(broken))
    assert torch.equal(source.final_norm(), loaded.state_dict()[norm]) and torch.equal(source.final_norm(), saved[norm])
    assert set(source.hashes()) == {"config.json", WEIGHTS}
    (broken / WEIGHTS).unlink()
    assert torch.equal(open_source(str(broken)).final_norm(), 2 * saved[norm])


def test_without_an_index_a_tensor_is_in_one_file(broken):
    saved = load_file(broken / WEIGHTS)
    (broken / WEIGHTS).rename(broken / "a.safetensors")
    assert set(open_source(str(broken)).files) == set(saved)
    save_file({"model.norm.weight": torch.ones(256)}, broken / "b.safetensors")
    with pytest.raises(ModelError, match=r"b\.safetensors: tensor model.norm.weight is in a\.safetensors too"):
        open_source(str(broken))


def test_no_tokenizer(broken):
    for path in broken.glob("token*"):
        path.unlink()
    with pytest.raises(ModelError, match="no usable tokenizer") as caught:
        open_source(str(broken)).tokenizer()
    assert "\n" not in str(caught.value)


def test_remote_code_is_not_run(broken):
    config = json.loads((broken / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "evil.py").write_text("raise SystemExit('the remote code ran')")
    with pytest.raises(ModelError):
        open_source(str(broken))
