"""Smoothing: keys and the input of down_proj get flatter by just the chosen scales. (Equality: test_rotate.py)"""

import itertools

import pytest
import torch
from conftest import relative
from test_decoder import some_ids

from qoq.calibration import smooth
from qoq.calibration.blocks import attended_mean, observe
from qoq.models.decoder import float_block, rotary_embedding
from qoq.models.source import open_source
from qoq.recipe import KVCache


def observed(source, layer):
    """Statistics of layer 0."""
    x = source.embedding()[some_ids()]
    return observe(float_block(source.spec, 0, layer), x, rotary_embedding(source.config)(torch.arange(x.shape[1])))


def test_spread_ratio():
    a, b = torch.tensor([4.0, 0.0, 9.0, 1e30]), torch.tensor([16.0, 1.0, 0.0, 1.0])
    assert torch.allclose(smooth.spread_ratio(a, b, 0.5, 0.5), torch.tensor([0.5, 1.0, 1.0, 1e4]))
    assert (smooth.spread_ratio(a, b, 0.0, 0.0) == 1).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_attention_scales_commute_with_rope(source_folder, family):
    """Equal inside each pair (i, i + D/2); with QK-norm, equal for all heads."""
    source = open_source(str(source_folder(family)))
    scales = smooth.attention_scales(source.spec, observed(source, source.layer(0)), 0.5, 0.25)
    first, second = scales.chunk(2, dim=1)
    assert scales.shape == (source.spec.num_kv_heads, source.spec.head_dim)
    assert torch.equal(first, second) and scales.std() > 0
    assert torch.equal(scales[0], scales[1]) == (family == "qwen3")


@pytest.mark.parametrize("family", ["llama", "llama-bias-tied", "mistral", "qwen2", "qwen3"])
def test_keys_are_divided_and_queries_multiplied(source_folder, family):
    source = open_source(str(source_folder(family)))
    spec, layer = source.spec, source.layer(0)
    before = observed(source, layer)
    scales = smooth.attention_scales(spec, before, 0.5, 0.0)
    smooth.smooth_attention(layer, spec, scales)
    after = observed(source, layer)
    assert relative(after.keys.absmax * scales, before.keys.absmax) < 1e-4
    per_query = scales.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=0)
    assert relative(after.queries.absmax, before.queries.absmax * per_query) < 1e-4
    assert torch.allclose(after.value_centre, before.value_centre, atol=1e-6)


def test_qk_norm_takes_the_scales_in_its_gains(source_folder):
    source = open_source(str(source_folder("qwen3")))
    original, layer = source.layer(0), source.layer(0)
    smooth.smooth_attention(layer, source.spec, smooth.attention_scales(source.spec, observed(source, layer), 0.5, 0.5))
    changed = {name for name in layer if not torch.equal(layer[name], original[name])}
    assert changed == {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}


@pytest.mark.parametrize("kv_cache", [KVCache(), KVCache(rotate=True, offset=True, clip_ratios=(1.0, 0.9))])
def test_the_attention_search_flattens_a_key_outlier(source_folder, kv_cache):
    """A channel that dwarfs the others makes plain KV4 useless; the search finds the scale that mends it."""
    source = open_source(str(source_folder("llama")))
    layer, x = source.layer(0), source.embedding()[some_ids()]
    layer["self_attn.k_proj.weight"][5] *= 100
    block, rope = float_block(source.spec, 0, layer), rotary_embedding(source.config)(torch.arange(x.shape[1]))
    scales, choice = smooth.search_attention(block, x, rope, observe(block, x, rope), kv_cache)
    assert choice.alpha > 0 and choice.after < choice.before / 2
    assert scales[0, 5] == scales[0, 5 + 32] > 3 * scales[0].median()


def test_the_down_search_flattens_an_activation_outlier():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 128, generator=generator), torch.randn(64, 128, generator=generator)
    x[:, 7] *= 300
    w[:, 7] /= 300
    found = smooth.ChannelStatistics()
    found.add(x)
    scale, choice = smooth.search_down(x, torch.ones(200), w, found, 128)
    assert choice.after < choice.before / 2
    assert scale.argmax() == 7 and scale.shape == (128,)


def test_the_down_search_heeds_the_weight_of_tokens():
    """Tokens of weight 0 are as good as absent, those of weight 2 as good as doubled."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 128, generator=generator), torch.randn(64, 128, generator=generator)
    x[::2, 7] *= 300
    found, counted = smooth.ChannelStatistics(), torch.ones(200)
    found.add(x)
    counted[::2], counted[1] = 0, 2
    weighed, choice = smooth.search_down(x, counted, w, found, 128)
    rows = torch.cat((x[1:2], x[1::2]))
    repeated, expected = smooth.search_down(rows, torch.ones(101), w, found, 128)
    assert torch.equal(weighed, repeated)
    assert choice.after == pytest.approx(expected.after, rel=1e-4)
    assert choice.before == pytest.approx(expected.before, rel=1e-4)


def test_a_dead_projection_is_left_alone(llama):
    """Blocks that do nothing, in models made deeper: o_proj and down_proj are zero."""
    source = open_source(str(llama))
    layer, x = source.layer(0), source.embedding()[some_ids()]
    layer["self_attn.o_proj.weight"] *= 0
    block, rope = float_block(source.spec, 0, layer), rotary_embedding(source.config)(torch.arange(x.shape[1]))
    found = observe(block, x, rope)
    scales, choice = smooth.search_attention(block, x, rope, found, KVCache())
    assert (scales == 1).all() and choice == smooth.Choice(0.0, 0.0, 0.0, 0.0)
    rows = torch.randn(20, source.spec.intermediate_size, generator=torch.Generator().manual_seed(0))
    dead = torch.zeros(source.spec.hidden_size, source.spec.intermediate_size)
    scale, choice = smooth.search_down(rows, torch.ones(20), dead, found.down, 128)
    assert (scale == 1).all() and choice == smooth.Choice(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("window", [None, 3])
def test_values_are_centred_by_the_attention_they_get(window):
    """Against the definition, written out token by token."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 8, generator=generator) * 2
    k, v = (torch.randn(2, 2, 6, 8, generator=generator) for _ in range(2))
    total, mass = torch.zeros(2, 8), torch.zeros(2)
    for sample, head, query in itertools.product(range(2), range(4), range(6)):
        seen = range(0 if window is None else max(0, query - window + 1), query + 1)
        scores = torch.stack([q[sample, head, query] @ k[sample, head // 2, t] / 8**0.5 for t in seen])
        for t, p in zip(seen, scores.softmax(0), strict=True):
            total[head // 2] += p**2 * v[sample, head // 2, t]
            mass[head // 2] += p**2
    assert torch.allclose(attended_mean(q, k, v, window), total / mass[:, None], atol=1e-5)


def test_down_smoothing_divides_the_input_of_down_proj(llama):
    source = open_source(str(llama))
    layer = source.layer(0)
    before = observed(source, layer)
    scale = torch.rand(384, generator=torch.Generator().manual_seed(0)) + 0.5
    smooth.smooth_down(layer, scale)
    assert torch.allclose(observed(source, layer).down.absmax, before.down.absmax / scale, rtol=1e-4)


def test_reordering_sorts_by_salience(llama):
    source = open_source(str(llama))
    layer = source.layer(0)
    before = observed(source, layer).down.absmax
    smooth.reorder_down(layer, before)
    assert torch.allclose(observed(source, layer).down.absmax, before.sort().values, rtol=1e-4)
