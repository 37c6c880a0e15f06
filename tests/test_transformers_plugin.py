"""transformers computes what the runtime computes, from the same bytes, and says what it cannot do."""

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCAB, WINDOW, relative
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import QuantizedCache
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from qoq import registration, verify
from qoq.calibration import pipeline
from qoq.checkpoint import Checkpoint
from qoq.errors import CheckpointError, ModelError
from qoq.models.source import open_source
from qoq.quant import quantize_kv
from qoq.recipe import KVCache
from qoq.runtime import model as runtime
from qoq.runtime.engine import LLMEngine
from qoq.runtime.sampler import SamplingParams
from qoq.transformers_model import from_bytes, to_bytes

NEW = 8


def some_ids(length, seed=9):
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


PROMPTS = [some_ids(length, length)[0].tolist() for length in (40, 7, 23)]  # longer and shorter than the window


def greedy(model, prompts, **changes):
    """New tokens of a batch, padded on the left."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | changes
    return model.generate(ids, attention_mask=mask, **settings)[:, longest:].tolist()


@pytest.fixture(scope="module")
def loaded(checkpoint_folder):
    """family -> its g128 checkpoint as a transformers model, loaded once. Do not change it."""
    models = {}

    def load(family="llama"):
        if family not in models:
            models[family] = AutoModelForCausalLM.from_pretrained(checkpoint_folder(family))
        return models[family]

    return load


def assert_logits_are_the_runtimes(folder):
    ids, decoder = torch.cat((some_ids(3 * WINDOW), some_ids(3 * WINDOW, 1))), runtime.load(folder)
    expected = decoder(ids, runtime.KVCache(2, decoder.kv_cache))
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = model(ids).logits
    assert found.dtype == torch.float32 and not found.requires_grad
    assert relative(found, expected) < 1e-5
    assert torch.equal(model(ids, use_cache=False).logits, found)


# Registration


def test_importing_qoq_imports_neither_torch_nor_transformers_and_registers_when_they_come():
    program = (
        "import sys, qoq; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])\n"
        "import transformers\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers\n"
        "print(quantizers['qoq'].__name__, 'qoq.transformers_model' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["[]", "QoqQuantizer False"]


def test_registers_at_once_where_transformers_is_imported(monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "qoq")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "qoq")
    for _ in range(2):
        registration.install()
        assert AUTO_QUANTIZER_MAPPING["qoq"].__name__ == "QoqQuantizer"
        assert AUTO_QUANTIZATION_CONFIG_MAPPING["qoq"].__name__ == "QoqConfig"


def test_a_folder_says_how_transformers_opens_it(checkpoint_folder):
    card = (checkpoint_folder() / "README.md").read_text()
    assert "    import qoq\n    from transformers import AutoModelForCausalLM\n" in card and "random weights" in card


# The model


def test_logits_are_the_runtimes(any_checkpoint):
    assert Checkpoint(any_checkpoint).kv_cache.offset and Checkpoint(any_checkpoint).kv_cache.rotate
    assert_logits_are_the_runtimes(any_checkpoint)


WHOLE, PLAIN = KVCache(rotate=True, offset=True, clip_ratios=(1.0, 0.9)), KVCache()


@pytest.mark.parametrize(
    ("family", "group_size", "cache"), [("llama-bias-tied", -1, WHOLE), ("mistral", -1, WHOLE), ("qwen2", 64, PLAIN)]
)
def test_logits_of_rounded_weights_are_the_runtimes(source_folder, tiny_recipe, tmp_path, family, group_size, cache):
    """Plain rounding takes less time: per channel with the whole cache quantizer, and groups with a plain one."""
    settings = tiny_recipe("rtn", group_size, kv_cache=cache)
    pipeline.quantize(open_source(str(source_folder(family))), tmp_path / "made", settings)
    assert Checkpoint(tmp_path / "made").kv_cache == cache
    assert_logits_are_the_runtimes(tmp_path / "made")


def test_a_model_without_a_head(checkpoint_folder, loaded):
    ids = some_ids(20)
    hidden = AutoModel.from_pretrained(checkpoint_folder())(ids).last_hidden_state
    assert torch.equal(loaded().lm_head(hidden), loaded()(ids).logits)


def test_a_copy_is_a_model_of_its_own(loaded):
    ids, model = some_ids(20), copy.deepcopy(loaded())
    expected = loaded()(ids).logits
    assert torch.equal(model(ids).logits, expected)
    model.model.layers[0].self_attn.v_offset.zero_()
    assert not torch.equal(model(ids).logits, expected) and torch.equal(loaded()(ids).logits, expected)


# Generation


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_generates_what_the_engine_does(checkpoint_folder, loaded, family):
    engine = LLMEngine.from_checkpoint(checkpoint_folder(family), memory_bytes=1 << 20)
    outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=NEW, ignore_eos=True))
    expected = [output.token_ids for output in outputs]
    assert greedy(loaded(family), PROMPTS) == expected
    assert [greedy(loaded(family), [prompt])[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_masks_of_padded_rows(loaded, family):
    """What stands in the padding changes no bit, and there is no NaN even where a row sees nothing."""
    mask = torch.tensor([[1] * 30, [0] * 20 + [1] * 10])
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    ids = some_ids(60).view(2, 30)
    other = torch.where(mask == 1, ids, 5)
    first, second = (loaded(family)(x, attention_mask=mask, position_ids=positions).logits for x in (ids, other))
    assert torch.isfinite(first).all() and torch.equal(first[mask == 1], second[mask == 1])
    assert relative(first[1, 20:], loaded(family)(ids[1:, 20:]).logits[0]) < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_every_way_to_generate(loaded, family):
    model = loaded(family)
    expected = greedy(model, PROMPTS)
    assert greedy(model, PROMPTS, cache_implementation="static") == expected
    assert greedy(model, PROMPTS, use_cache=False) == expected
    assert greedy(model, PROMPTS[:1], prompt_lookup_num_tokens=3) == expected[:1]
    beams = greedy(model, PROMPTS, num_beams=2, max_new_tokens=3)
    assert beams == [greedy(model, [prompt], num_beams=2, max_new_tokens=3)[0] for prompt in PROMPTS]


def test_every_attention_sees_the_same(loaded):
    model, ids = copy.deepcopy(loaded()), some_ids(30)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    found = model(ids, output_attentions=True)
    assert relative(found.logits, expected) < 1e-2  # eager rounds its softmax to float32
    assert [tuple(weights.shape) for weights in found.attentions] == [(1, 4, 30, 30)] * 2


@pytest.mark.parametrize(("family", "tokens"), [("llama", 30), ("mistral", WINDOW - 1)])
def test_the_cache_holds_four_bits(loaded, family, tokens):
    model = loaded(family)
    layers: Any = model(some_ids(30), past_key_values=DynamicCache(config=model.config)).past_key_values.layers
    for stored in (tensor for layer in layers for tensor in (layer.keys, layer.values)):
        assert stored.dtype == torch.uint8 and stored.shape == (1, 2, tokens, 64 // 2 + 4)


@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 96, 128, 256]), st.sampled_from([4, 8]))
def test_bytes_of_the_cache_come_back(seed, dim, bits):
    rows = quantize_kv(torch.randn(2, 3, 4, dim, generator=torch.Generator().manual_seed(seed)), bits)
    stored = to_bytes(rows, bits)
    assert stored.shape == (2, 3, 4, dim * bits // 8 + 4)
    found = from_bytes(torch.cat((stored, stored), dim=2)[:, :, 3:-1], bits)
    for name in ("codes", "scale", "minimum"):
        expected = getattr(rows, name)
        assert torch.equal(getattr(found, name), torch.cat((expected[:, :, 3:], expected[:, :, :-1]), dim=2))


# Saving


@pytest.mark.parametrize(("family", "group_size"), [("qwen3", 128), ("llama", -1)])
def test_saved_is_what_was_loaded(checkpoint_folder, tmp_path, family, group_size):
    folder = checkpoint_folder(family, group_size)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    read, saved = Checkpoint(folder), Checkpoint(tmp_path)
    assert read.entries.keys() == saved.entries.keys()
    assert [line for line in verify.problems(tmp_path) if "tokenizer" not in line] == []  # which is saved apart
    for name in read.entries:
        expected, found = read.tensor(name), saved.tensor(name)
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(some_ids(20)).logits, model(some_ids(20)).logits)


# What is refused


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float32"])
def test_other_dtypes_are_refused(checkpoint_folder, dtype):
    with pytest.raises(ModelError, match="^dtype is (bfloat16|float32); a qoq checkpoint computes in float16"):
        AutoModelForCausalLM.from_pretrained(checkpoint_folder(), dtype=dtype)


def test_casts_are_refused(loaded):
    model = copy.deepcopy(loaded())
    assert model.to("cpu", torch.float16) is model
    with pytest.raises(ModelError, match="computes in float16 and cannot be cast to bfloat16; load it again"):
        model.to(torch.bfloat16)


def test_devices(checkpoint_folder, tmp_path):
    pytest.importorskip("accelerate")
    for device_map in ("cpu", "auto", {"": "cpu"}):
        assert AutoModelForCausalLM.from_pretrained(checkpoint_folder(), device_map=device_map).device.type == "cpu"
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    spread = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    with pytest.raises(ModelError, match="spreads the model over cpu, disk; packed weights cannot be offloaded"):
        AutoModelForCausalLM.from_pretrained(checkpoint_folder(), device_map=spread, offload_folder=tmp_path)


@pytest.mark.filterwarnings("ignore:Passing `tp_plan`:FutureWarning")
def test_tensor_parallel_plans_are_refused(checkpoint_folder):
    with pytest.raises(ModelError, match="tensor parallel plans cannot slice packed weights"):
        AutoModelForCausalLM.from_pretrained(checkpoint_folder(), tp_plan="auto")


def test_quantized_caches_are_refused(loaded):
    try:
        cache = QuantizedCache("fp8", loaded().config)
    except ValueError:
        pytest.skip("this transformers has no quantized cache that needs no other package")
    with pytest.raises(ModelError, match="the cache of a qoq model is quantized already"):
        loaded()(some_ids(4), past_key_values=cache)


def test_a_damaged_folder_is_refused(checkpoint_folder, copy_of):
    """transformers by itself would fill what is missing with random numbers, and multiply any integers."""
    folder = copy_of(checkpoint_folder())
    path, name = folder / "model-00001-of-00001.safetensors", "model.layers.1.mlp.up_proj.s2_scales"
    tensors = load_file(path)
    save_file(tensors | {name: torch.full_like(tensors[name], 100)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="layer 1 mlp.up_proj"):
        AutoModelForCausalLM.from_pretrained(folder)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_state_dict_alone_is_refused(checkpoint_folder, loaded):
    config = AutoConfig.from_pretrained(checkpoint_folder())
    with pytest.raises(ModelError, match="loaded from its folder"):
        type(loaded()).from_pretrained(None, config=config, state_dict={})
