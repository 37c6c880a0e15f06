"""The architecture table against the models that transformers builds."""

import pytest
from conftest import WINDOW
from transformers import AutoConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from qoq.errors import ModelError
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LINEARS, LM_HEAD, model_spec
from qoq.models.source import open_source


def test_shapes_are_those_of_the_model(any_model):
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(any_model).state_dict()
    spec = open_source(str(any_model)).spec
    expected = {
        f"model.layers.{index}.{name}": shape
        for index in range(spec.num_layers)
        for name, shape in spec.layer_shapes().items()
    }
    top = (spec.vocab_size, spec.hidden_size)
    expected |= {EMBEDDING: top, FINAL_NORM: (spec.hidden_size,), LM_HEAD: top}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    weights = sum(state[f"model.layers.{i}.{name}.weight"].numel() for i in range(2) for name in LINEARS)
    assert spec.linear_parameters() == weights


def test_what_the_families_differ_in(source_folder):
    spec = {name: open_source(str(source_folder(name))).spec for name in ("llama", "llama-bias-tied", "qwen2", "qwen3")}
    qkv = {f"self_attn.{name}_proj" for name in "qkv"}
    assert spec["llama"].biases == set() and spec["qwen3"].biases == set()
    assert spec["qwen2"].biases == qkv
    assert spec["llama-bias-tied"].biases == qkv | {"self_attn.o_proj"}
    assert [name for name in spec if spec[name].qk_norm] == ["qwen3"]
    assert [name for name in spec if spec[name].tied_embeddings] == ["llama-bias-tied", "qwen2"]


def test_sliding_windows(source_folder):
    assert open_source(str(source_folder("mistral"))).spec.windows == (WINDOW, WINDOW)
    assert model_spec(MistralConfig(num_hidden_layers=2, sliding_window=None), "m").windows == (None, None)
    assert model_spec(LlamaConfig(num_hidden_layers=2), "m").windows == (None, None)
    mixed = Qwen2Config(num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert model_spec(mixed, "m").windows == (None, 8, 8)
    unused = Qwen2Config(num_hidden_layers=3, use_sliding_window=False, sliding_window=8, max_window_layers=1)
    assert model_spec(unused, "m").windows == (None, None, None)


def test_a_head_dim_may_be_left_out():
    config = LlamaConfig(hidden_size=192, num_attention_heads=3, num_key_value_heads=1)
    config.head_dim = None
    spec = model_spec(config, "m")
    assert spec.head_dim == 64
    assert spec.linear_shape("self_attn.k_proj") == (64, 192)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "here: architecture 'gpt2' is not supported; supported are llama, mistral, qwen2, qwen3"),
        (LlamaConfig(hidden_act="gelu"), "here: hidden_act is 'gelu', expected 'silu'"),
        (LlamaConfig(mlp_bias=True), "here: mlp_bias is true"),
    ],
)
def test_what_cannot_be_computed_is_refused(config, message):
    with pytest.raises(ModelError, match=message):
        model_spec(config, "here")


def test_the_spec_reads_the_saved_config(llama):
    spec = model_spec(AutoConfig.from_pretrained(llama), "m")
    assert (spec.num_layers, spec.hidden_size, spec.intermediate_size) == (2, 256, 384)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 64)
    assert spec.rms_norm_eps == 1e-5
