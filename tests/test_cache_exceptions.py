"""Layers whose cache has 8 bits: made, read back, run alike by all, and refused where they cannot be."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import VOCAB, only_line, relative
from transformers import AutoModelForCausalLM, DynamicCache

from qoq import layout, recipe, roofline, verify
from qoq.calibration import pipeline
from qoq.checkpoint import Checkpoint
from qoq.convert import TARGETS, convert, open_origin
from qoq.errors import CheckpointError, OutputError, QuantizationError
from qoq.evaluate import EngineModel, QuantizedModel
from qoq.models.source import open_source
from qoq.runtime import benchmark, model
from qoq.runtime.engine import LLMEngine
from qoq.runtime.sampler import SamplingParams

IDS = torch.randint(0, VOCAB, (1, 90), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def settings(tiny_recipe):
    """The tiny recipe with layer 1 in 8 bits."""
    whole = tiny_recipe()
    return dataclasses.replace(whole, kv_cache=dataclasses.replace(whole.kv_cache, layers_in_8_bits=(1,)))


@pytest.fixture(scope="module")
def run(llama, settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("kv8") / "made"
    return path, pipeline.quantize(open_source(str(llama)), path, settings)


@pytest.fixture
def made(run):
    return run[0]


def declare(folder, layers):
    """Say so in config.json, or nothing with None."""
    config = json.loads((folder / "config.json").read_text())
    kv_cache = config["quantization_config"]["kv_cache"]
    kv_cache.pop("layers_in_8_bits", None)
    if layers is not None:
        kv_cache["layers_in_8_bits"] = layers
    (folder / "config.json").write_text(json.dumps(config))


# The checkpoint


def test_it_is_whole_and_says_so(made, settings, checkpoint_folder):
    assert verify.problems(made) == []
    assert Checkpoint(made).kv_cache == settings.kv_cache == recipe.load(str(made / "qoq_recipe.yaml")).kv_cache
    declared = json.loads((made / "config.json").read_text())["quantization_config"]
    assert declared["kv_cache"].pop("layers_in_8_bits") == [1]
    usual = json.loads((checkpoint_folder() / "config.json").read_text())["quantization_config"]
    assert declared == usual  # which says nothing of layers
    assert "searched ranges; 8 bits in layers 1 |" in (made / "README.md").read_text()
    assert "8 bits" not in (checkpoint_folder() / "README.md").read_text().split("| KV cache |")[1].split("\n")[0]


def test_its_layer_loses_less(run, checkpoint_folder):
    usual = Checkpoint(checkpoint_folder()).report()
    before, after = ([layer["causes"] for layer in report["layers"]] for report in (usual, run[1]))
    assert after[0] == before[0]
    for cause in ("k4", "v4"):
        assert after[1][cause] < before[1][cause] / 50
        assert run[1]["kl"][cause] < usual["kl"][cause]


def test_a_run_goes_on_with_the_same_layers_alone(run, llama, settings, tiny_recipe, tmp_path):
    def stop(report):
        raise KeyboardInterrupt

    source, output = open_source(str(llama)), tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(source, output, settings, on_layer=lambda report: report["layer"] and stop(report))
    with pytest.raises(OutputError, match="left by a run with another recipe"):
        pipeline.quantize(source, output, tiny_recipe())
    again = pipeline.quantize(source, output, settings)
    assert again["kl"] == run[1]["kl"]
    shard = "model-00001-of-00001.safetensors"
    assert (output / shard).read_bytes() == (run[0] / shard).read_bytes()


# Who runs it


@pytest.mark.parametrize("backend", ["prefill", "decode"])
def test_the_engine_computes_what_the_decoder_does(made, copy_of, backend):
    found = EngineModel(Checkpoint(made), backend).logits(IDS)
    assert relative(found, QuantizedModel(Checkpoint(made), "runtime").logits(IDS)) < 1e-3
    other = copy_of(made)
    declare(other, None)
    assert relative(found, QuantizedModel(Checkpoint(other), "runtime").logits(IDS)) > 1e-2


def test_decode_is_prefill_and_both_are_what_was_simulated(made):
    decoder = model.load(made)
    whole = decoder(IDS, model.KVCache(2, decoder.kv_cache))
    cache = model.KVCache(2, decoder.kv_cache)
    parts = [decoder(part, cache, start=cache.length) for part in IDS.split([40, *[1] * 50], dim=1)]
    assert relative(torch.cat(parts, dim=1), whole) < 1e-3
    assert relative(QuantizedModel(Checkpoint(made), "simulate").logits(IDS), whole) < 0.1


@pytest.mark.parametrize("bits", [8, 16])
def test_other_caches_are_of_one_width(made, copy_of, bits):
    other = copy_of(made)
    declare(other, None)
    engines = [LLMEngine.from_checkpoint(path, kv_bits=bits, memory_bytes=1 << 20) for path in (made, other)]
    first, second = (engine.logits(IDS[0].tolist()) for engine in engines)
    assert torch.equal(first, second) and benchmark.kv_bits(engines[0]) == bits


def test_memory_holds_as_many_tokens_as_it_should(made):
    page = 64 * 2 * (72 + 136)  # tokens, KV heads, bytes of a row of K and of V and their grids in either layer
    engine = LLMEngine.from_checkpoint(made, memory_bytes=3 * page + page - 1)
    assert engine.scheduler.pages.count == 3 and benchmark.kv_bits(engine) == 6
    assert sum(layer.nbytes for layer in engine.plain.cache.layers) == 3 * page


def test_room_is_counted_in_pages_of_both_widths(made, monkeypatch):
    engine: Any = LLMEngine.from_checkpoint(made, memory_bytes=1 << 20)
    page = 64 * 2 * (72 + 136)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * page + 5, 10 * page + 5))
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), plain=engine.plain, scheduler=engine.scheduler)
    assert benchmark.cache_room(on_gpu, 1.0) == benchmark.cache_tokens(engine) + 10 * 64


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_transformers_computes_what_the_engine_does(source_folder, tiny_recipe, tmp_path, family):
    """Plain rounding takes less time; Mistral's cache has a window."""
    cache = recipe.KVCache(rotate=True, offset=True, clip_ratios=(1.0, 0.9), layers_in_8_bits=(0,))
    source = open_source(str(source_folder(family)))
    pipeline.quantize(source, tmp_path / "made", tiny_recipe("rtn", kv_cache=cache))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    expected = QuantizedModel(Checkpoint(tmp_path / "made"), "runtime").logits(IDS)
    held: Any = DynamicCache(config=loaded.config)
    assert relative(loaded(IDS, past_key_values=held).logits, expected) < 1e-5
    assert [layer.keys.shape[-1] for layer in held.layers] == [64 + 4, 32 + 4]
    engine = LLMEngine.from_checkpoint(tmp_path / "made", memory_bytes=1 << 20)
    (output,) = engine.generate([IDS[0].tolist()], SamplingParams(max_tokens=6, ignore_eos=True))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(IDS)
    for kind in ({}, {"cache_implementation": "static"}):
        assert loaded.generate(IDS, **options, **kind)[0, IDS.shape[1] :].tolist() == output.token_ids
    loaded.save_pretrained(tmp_path / "saved")
    assert Checkpoint(tmp_path / "saved").kv_cache == cache


# Who tells of it


def test_the_commands_tell(qoq, made, llama, settings_file, tmp_path):
    row = 2 * 2 * (32 + 4)  # K and V of two heads
    found = json.loads(qoq("inspect", made, "--json")[1])
    assert found["cache_layers_in_8_bits"] == [1] and found["kv_bytes_per_token"] == row + 2 * 2 * (64 + 4)
    assert "KV8 in layers           1\n" in qoq("inspect", made)[1]
    command = ["quantize", "--model", llama, "--recipe", settings_file, "--output", tmp_path / "out"]
    plans = [json.loads(qoq(*command, "--plan", "--json", *more)[1]) for more in ((), ("--kv8", "1,0"), ("--kv8", "1"))]
    assert [plan["kv_bytes_per_token"]["4"] for plan in plans] == [
        2 * row,
        4 * 2 * (64 + 4),
        found["kv_bytes_per_token"],
    ]
    assert plans[2]["kv_bytes_per_token"]["8"] == plans[0]["kv_bytes_per_token"]["8"]
    assert qoq(*command, "--kv8", "1")[0] == 0 and Checkpoint(tmp_path / "out").kv_cache.layers_in_8_bits == (1,)


def test_the_benchmark_tells(qoq, made):
    sizes = ["--input-len", "9", "--output-len", "4", "--batch-size", "2", "--rounds", "1", "--device", "cpu"]
    found = json.loads(qoq("bench", "throughput", made, *sizes, "--card", "h100", "--json")[1])
    model = benchmark.dimensions(Checkpoint(made).spec)
    assert found["kv_bits"] == 6
    work = roofline.Workload(2, 9, 4, kv_bits=6)
    assert work.cache_bytes(model) == 2 * 13 * layout.kv_bytes(Checkpoint(made).spec, Checkpoint(made).kv_cache)
    assert found["roofline_tokens_per_s"] == roofline.limit(model, roofline.CARDS["h100"].ideal, work).tokens_per_s
    assert "KV6 tokens held 128" in qoq("bench", "throughput", made, *sizes)[1]


def test_other_engines_have_caches_of_their_own(made, tmp_path):
    origin = open_origin(made)
    config: Any = TARGETS["qoq"].config(origin)
    assert config["kv_cache"]["layers_in_8_bits"] == [1]
    convert(origin, tmp_path / "out", "qserve")
    assert "layers_in_8_bits" not in (tmp_path / "out" / "config.json").read_text()


# What is refused


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2], "layers_in_8_bits: 2 is no layer of this model, expected 0 to 1"),
        ([10**30], "layers_in_8_bits: 1000000000000000000000000000000 is no layer"),
        ([1, 0], r"layers_in_8_bits: \[1, 0\], expected numbers of layers from 0 up, ascending, each once"),
        ([1, 1], r"layers_in_8_bits: \[1, 1\], expected"),
        ([-1], r"layers_in_8_bits: \[-1\], expected"),
        ([True], r"layers_in_8_bits: \[True\], expected"),
        ([1.0], r"layers_in_8_bits: \[1.0\], expected"),
        ([[1]], r"layers_in_8_bits: \[\[1\]\], expected"),
        ("1", "layers_in_8_bits: '1', expected a list"),
        ({"1": 1}, "layers_in_8_bits: {'1': 1}, expected a list"),
        (1, "layers_in_8_bits: 1, expected a list"),
    ],
)
def test_a_config_that_cannot_be(checkpoint_folder, copy_of, qoq, layers, message):
    folder = copy_of(checkpoint_folder())
    declare(folder, layers)
    with pytest.raises(CheckpointError, match=rf"config\.json: quantization_config\.kv_cache\.{message}"):
        Checkpoint(folder)
    (problem,) = verify.problems(folder)
    assert "kv_cache.layers_in_8_bits" in problem
    assert "kv_cache.layers_in_8_bits" in only_line(qoq("eval", folder, "--ppl", "x.txt"))


def test_layers_that_the_model_does_not_have(qoq, llama, settings_file, tiny_recipe, tmp_path):
    command = ["quantize", "--model", llama, "--recipe", settings_file, "--output", tmp_path / "out"]
    for more in ((), ("--plan",)):
        line = only_line(qoq(*command, "--kv8", "0,7", *more))
        assert "kv_cache.layers_in_8_bits: 7 is no layer of this model, expected 0 to 1" in line
    code, _, err = qoq(*command, "--kv8", "0,x")
    assert code == 2 and "'0,x', expected whole numbers from 0 to 9999, separated by commas" in err
    cache = recipe.KVCache(layers_in_8_bits=(2,))
    with pytest.raises(QuantizationError, match="2 is no layer"):
        pipeline.quantize(open_source(str(llama)), tmp_path / "out", tiny_recipe(kv_cache=cache))
    assert list(tmp_path.glob("out*")) == []
