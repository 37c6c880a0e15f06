import dataclasses

import torch
from conftest import make_tokenizer, relative
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qoq import verify
from qoq.calibration import pad, pipeline, rotate
from qoq.checkpoint import Checkpoint
from qoq.models.architecture import model_spec
from qoq.models.decoder import float_block, rotary_embedding
from qoq.models.source import open_source
from qoq.runtime import model as runtime

ODD = LlamaConfig(  # 192 -> 256, six heads -> twelve
    hidden_size=192,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=32,
    vocab_size=300,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)


def test_dimensions_become_multiples_of_the_group():
    spec = model_spec(ODD, "odd")
    padded = pad.padded_spec(spec, 128)
    assert (padded.hidden_size, padded.num_heads, padded.num_kv_heads, padded.intermediate_size) == (256, 12, 3, 256)
    assert padded.rms_norm_eps == spec.rms_norm_eps * 192 / 256
    assert pad.padded_spec(padded, 128) == padded
    assert pad.padded_spec(spec, -1) == spec
    assert pad.padded_spec(spec, 64).hidden_size == 192


def test_a_width_that_an_eps_forbids_stays():
    spec = dataclasses.replace(model_spec(ODD, "odd"), qk_norm=True)
    assert pad.padded_spec(spec, 128) == spec


def test_a_padded_layer_computes_the_same_in_float64():
    torch.manual_seed(0)
    spec = model_spec(ODD, "odd")
    padded = pad.padded_spec(spec, 128)
    layer = {name: torch.randn(shape, dtype=torch.float64) * 0.1 + 1 for name, shape in spec.layer_shapes().items()}
    before = float_block(spec, 0, dict(layer), torch.float64)
    r = rotate.rotation(padded.hidden_size, 0)[: spec.hidden_size]
    rotate.fold_norms(layer)
    rotate.rotate_residual(layer, r)
    rotate.rotate_values(layer, spec, rotate.rotation(spec.head_dim, 0))
    pad.pad_layer(layer, spec, padded)
    after = float_block(padded, 0, layer, torch.float64)
    cos, sin = rotary_embedding(ODD)(torch.arange(20))
    rope, x = (cos.double(), sin.double()), torch.randn(2, 20, spec.hidden_size, dtype=torch.float64)
    assert relative(after(x @ r, rope), before(x, rope) @ r) < 1e-12


def test_a_padded_checkpoint_is_a_true_g128_one(tmp_path, tiny_recipe):
    torch.manual_seed(0)
    original = LlamaForCausalLM(ODD)
    original.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    report = pipeline.quantize(open_source(str(tmp_path / "m")), tmp_path / "out", tiny_recipe("qoq", 128))
    assert all(layer["transform_error"] < 1e-5 for layer in report["layers"])
    made = Checkpoint(tmp_path / "out")
    assert made.group_size == 128 and verify.problems(tmp_path / "out") == []
    assert made.config.model_type == "mistral"  # Llama's config class refuses 256 for 12 heads
    pipeline.quantize(open_source(str(tmp_path / "m")), tmp_path / "fitting", tiny_recipe("qoq", 64))
    ids = torch.randint(0, 256, (1, 40))
    with torch.inference_mode():
        expected = original(ids).logits
    errors = [relative(runtime.load(tmp_path / name)(ids), expected) for name in ("out", "fitting")]
    assert errors[0] < 1.3 * errors[1] < 0.5
    AutoModelForCausalLM.from_config(made.config)  # transformers knows these dimensions
