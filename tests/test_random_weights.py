"""Random weights: legal tensors of a checkpoint's kinds, the same whenever they are read, and a model that computes."""

import pytest
import torch
from conftest import GROUP_SIZES

from qoq.models.architecture import LINEARS
from qoq.quant import GroupedWeight
from qoq.roofline import MODELS, Dimensions
from qoq.runtime import model
from qoq.runtime.engine import LLMEngine
from qoq.runtime.linear import PackedLinear, joined_tensors
from qoq.runtime.random_weights import RandomCheckpoint
from qoq.runtime.sampler import SamplingParams
from qoq.runtime.scheduler import Chunk, Request

TINY = Dimensions("qwen2", 2, 128, 256, num_heads=4, num_kv_heads=2, vocab_size=104, head_dim=64, max_positions=128)


def tiny(group_size: int = 128, seed: int = 0, model: Dimensions = TINY) -> RandomCheckpoint:
    return RandomCheckpoint("tiny", model, group_size, seed, "cpu")


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_tensors_are_those_of_a_checkpoint(group_size):
    checkpoint = tiny(group_size)
    for name, (dtype, shape) in checkpoint.kinds.items():
        found = checkpoint.tensor(name)
        assert (found.dtype, tuple(found.shape)) == (dtype, shape) and torch.equal(found, checkpoint.tensor(name))
    assert checkpoint.kinds.keys() >= {"model.layers.1.self_attn.k_offset", "model.layers.0.self_attn.q_proj.bias"}
    assert checkpoint.kv_cache.rotate and len(checkpoint.kv_cache.clip_ratios) == 5


def test_seeds_and_names_differ():
    name = "model.layers.0.mlp.up_proj.qweight"
    drawn = [tiny().tensor(name), tiny(seed=1).tensor(name), tiny().tensor(name.replace("up", "gate"))]
    assert not any(torch.equal(x, y) for x, y in ((drawn[0], drawn[1]), (drawn[0], drawn[2])))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_weights_are_legal_and_use_their_range(group_size):
    """`Checkpoint.linear` and `PackedLinear.of` refuse what is not legal."""
    checkpoint = tiny(group_size)
    for name in LINEARS:
        weight = checkpoint.linear(0, name).weight
        assert not isinstance(weight, torch.Tensor)
        k = weight.codes.shape[1]
        assert weight.codes.unique().tolist() == list(range(16))
        assert float(weight.dequantize().std()) == pytest.approx(k**-0.5, rel=0.15)
        assert abs(float(weight.dequantize().mean())) < 0.1 * k**-0.5
        if isinstance(weight, GroupedWeight):
            assert 1 <= weight.s2.min() and weight.s2.max() <= 16 and len(weight.s2.unique()) > 12
    PackedLinear.of(joined_tensors(checkpoint, 1, [f"self_attn.{side}_proj" for side in "qkv"]), "qkv")


def test_the_engine_computes_what_the_decoder_does():
    checkpoint, prompt = tiny(), list(range(30))
    engine = LLMEngine.from_checkpoint(checkpoint, memory_bytes=1 << 20)
    output = engine.generate([prompt], SamplingParams(max_tokens=12, ignore_eos=True))[0]
    assert output.token_ids == list(model.greedy(model.load(checkpoint), prompt, 12))
    assert output.text == "".join(f" {token:x}" for token in output.token_ids)


def test_activations_stay_small_through_many_layers():
    deep = Dimensions("llama", 24, 128, 256, num_heads=2, num_kv_heads=1, vocab_size=96, head_dim=64, max_positions=64)
    engine = LLMEngine.from_checkpoint(tiny(model=deep), memory_bytes=1 << 20)
    request = Request("x", list(range(50)), 50, pages=engine.scheduler.pages.take(1) or [])
    hidden = engine.executor.hidden(engine._batches.of([Chunk(request, 0, 50, True)]))
    assert 1 < float(hidden.float().std()) < 10 and float(engine.executor.logits(hidden).std()) < 2


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_table_has_tensors(name):
    checkpoint = RandomCheckpoint(name, MODELS[name], 128, 0, "cpu")
    n, k = checkpoint.spec.linear_shape("mlp.down_proj")
    assert checkpoint.kinds["model.layers.0.mlp.down_proj.s2_scales"] == (torch.int8, (k // 128, n))
    assert checkpoint.spec.num_layers == MODELS[name].num_layers
