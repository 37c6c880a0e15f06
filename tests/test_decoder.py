"""The decoder in float against transformers, for every family."""

import pytest
import torch
from conftest import FAMILIES, SEQLEN, VOCAB, WINDOW, relative
from torch import Tensor
from transformers import LlamaConfig

from qoq.errors import ModelError
from qoq.models.decoder import Decoder, KVTransform, float_block, rotary_embedding
from qoq.models.source import Source, open_source


def decoder_of(source: Source) -> Decoder:
    spec = source.spec
    return Decoder(
        embedding=source.embedding(),
        blocks=[float_block(spec, index, source.layer(index)) for index in range(spec.num_layers)],
        norm=source.final_norm(),
        lm_head=source.lm_head(),
        rope=rotary_embedding(source.config),
    )


def some_ids(length: int = SEQLEN, batch: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def reference_logits(folder, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(ids, use_cache=False).logits


def test_logits_are_those_of_transformers(any_model):
    ids = some_ids()
    assert ids.shape[1] > WINDOW
    logits = decoder_of(open_source(str(any_model)))(ids)
    assert logits.dtype == torch.float32
    assert relative(logits, reference_logits(any_model, ids)) < 1e-4


def test_the_sliding_window_matters(source_folder):
    """Otherwise the comparison above would prove nothing about it."""
    decoder, ids = decoder_of(open_source(str(source_folder("mistral")))), some_ids()
    windowed = decoder(ids)
    for block in decoder.blocks:
        block.spec = open_source(str(source_folder("llama"))).spec
    full = decoder(ids)
    assert relative(full[:, :WINDOW], windowed[:, :WINDOW]) < 1e-6
    assert relative(full[:, WINDOW:], windowed[:, WINDOW:]) > 1e-2


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 5e5,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rope_scaling(tmp_path, scaling):
    from conftest import make_model
    from transformers import LlamaForCausalLM

    model = make_model("llama")
    plain = model(some_ids()).logits
    model.config.rope_parameters = scaling
    scaled = LlamaForCausalLM(model.config)
    scaled.load_state_dict(model.state_dict())
    scaled.save_pretrained(tmp_path)
    expected = reference_logits(tmp_path, some_ids())
    assert relative(plain, expected) > 1e-3
    assert relative(decoder_of(open_source(str(tmp_path)))(some_ids()), expected) < 1e-4


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [4.0] * 32, "factor": 4.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rope_that_depends_on_the_length_is_refused(scaling):
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        rope_parameters={"rope_theta": 1e4, **scaling},
        max_position_embeddings=64,
    )
    with pytest.raises(
        ModelError, match=f"rope_type is '{scaling['rope_type']}', expected default, linear, llama3, yarn"
    ):
        rotary_embedding(config)


@pytest.mark.parametrize("family", FAMILIES[:4])
def test_heads_are_those_after_rope(source_folder, family):
    source = open_source(str(source_folder(family)))
    block, spec, layer = decoder_of(source).blocks[0], source.spec, source.layer(0)
    x = torch.randn(2, SEQLEN, spec.hidden_size, generator=torch.Generator().manual_seed(2))
    q, k, v = block.heads(x, rotary_embedding(source.config)(torch.arange(SEQLEN)))
    for name, heads, found in (("q", spec.num_heads, q), ("k", spec.num_kv_heads, k), ("v", spec.num_kv_heads, v)):
        plain = x @ layer[f"self_attn.{name}_proj.weight"].T + layer.get(f"self_attn.{name}_proj.bias", 0.0)
        plain = plain.unflatten(-1, (heads, spec.head_dim)).transpose(1, 2)
        assert torch.allclose(found[:, :, 0], plain[:, :, 0], atol=1e-4)  # position 0 is not rotated
        lengths, expected = (rows.unflatten(-1, (2, -1)).norm(dim=3) for rows in (found, plain))  # of (i, i + D/2)
        assert torch.allclose(lengths, expected, atol=1e-3)
        assert torch.allclose(found, plain, atol=1e-4) == (name == "v")


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("with_offsets", [True, False])
def test_what_the_cache_quantizer_does_leaves_attention_as_it_is(any_model, rotate, with_offsets):
    source, ids = open_source(str(any_model)), some_ids()
    decoder, spec = decoder_of(source), source.spec
    original = decoder(ids)
    offsets = torch.randn(2, spec.num_kv_heads, spec.head_dim, generator=torch.Generator().manual_seed(3)) * 3
    for block in decoder.blocks:
        block.kv = KVTransform(rotate, *(offsets if with_offsets else ()))
    assert relative(decoder(ids), original) < 1e-4
    assert torch.equal(decoder(ids), original) == (not rotate and not with_offsets)


def test_the_last_token_does_not_change_the_others(any_model):
    decoder, ids = decoder_of(open_source(str(any_model))), some_ids(batch=1)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCAB
    before, after = decoder(ids), decoder(changed)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])
