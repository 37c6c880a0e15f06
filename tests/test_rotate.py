"""Rotations are orthogonal, and no transform changes what a model computes."""

import json

import pytest
import torch
from conftest import relative
from test_decoder import decoder_of, some_ids

from qoq.calibration import pipeline, rotate, smooth
from qoq.calibration.rotate import hadamard_matrix, rotation
from qoq.errors import QuantizationError
from qoq.models.decoder import float_block
from qoq.models.source import open_source

HIDDEN_SIZES = (1, 2, 4, 8, 12, 20, 28, 36, 52, 60, 64, 96, 128, 320, 576, 640, 896, 960)
LARGE_SIZES = (1152, 1536, 2560, 3072, 3584, 7168)


@pytest.mark.parametrize("n", HIDDEN_SIZES)
def test_hadamard_matrices(n):
    matrix = hadamard_matrix(n)
    assert matrix is not None and matrix.shape == (n, n)
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", LARGE_SIZES)
def test_large_hadamard_matrices(n):
    """H^T H = n on random integer vectors, exactly: the whole product would take long."""
    matrix = hadamard_matrix(n)
    assert matrix is not None and matrix.amin() == -1 and matrix.amax() == 1 and (matrix[0] ** 2 == 1).all()
    x = torch.randint(-100, 101, (n, 4), generator=torch.Generator().manual_seed(n)).double()
    assert torch.equal(matrix.T @ (matrix @ x), n * x)


@pytest.mark.parametrize("n", [3, 6, 7, 10, 92])
def test_where_no_construction_is_known(n):
    assert hadamard_matrix(n) is None


@pytest.mark.parametrize("n", [1, 6, 64, 92, 128, 576])
def test_rotations_are_orthogonal_and_seeded(n):
    r = rotation(n, 0)
    assert r.dtype == torch.float64
    assert torch.allclose(r @ r.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.equal(r, rotation(n, 0))
    assert n == 1 or not torch.equal(r, rotation(n, 1))


def random_scales(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 3 + 0.1


def transformed(source, steps):
    """The decoder with the named transforms applied to every layer, and to embedding and head as they need."""
    decoder, spec = decoder_of(source), source.spec
    r = rotation(spec.hidden_size, 0)
    pairs = random_scales(spec.num_kv_heads, spec.head_dim // 2)
    keys = (pairs[:1].expand_as(pairs) if spec.qk_norm else pairs).repeat(1, 2)
    for index, block in enumerate(decoder.blocks):
        layer = source.layer(index)
        if "fold" in steps:
            rotate.fold_norms(layer)
            assert (layer["input_layernorm.weight"] == 1).all() and (
                layer["post_attention_layernorm.weight"] == 1
            ).all()
        if "residual" in steps:
            rotate.rotate_residual(layer, r)
        if "values" in steps:
            rotate.rotate_values(layer, spec, rotation(spec.head_dim, 1))
        if "attention" in steps:
            smooth.smooth_attention(layer, spec, keys)
        if "down" in steps:
            smooth.smooth_down(layer, random_scales(spec.intermediate_size))
        if "reorder" in steps:
            smooth.reorder_down(layer, random_scales(spec.intermediate_size))
        changed = float_block(spec, index, layer)
        block.norms, block.linears = changed.norms, changed.linears
    if "residual" in steps:
        decoder.lm_head = torch.cat(list(rotate.rotated_slices(decoder.lm_head, r, decoder.norm)))
        decoder.embedding = torch.cat(list(rotate.rotated_slices(decoder.embedding, r)))
        decoder.norm = torch.ones_like(decoder.norm)
    return decoder


ALL_STEPS = "fold residual values attention down reorder"


@pytest.mark.parametrize("steps", ["fold", "values", "attention", "down", "reorder", "fold residual", ALL_STEPS])
def test_transforms_keep_the_logits(any_model, steps):
    source = open_source(str(any_model))
    new, original = transformed(source, steps)(some_ids()), decoder_of(source)(some_ids())
    assert relative(new, original) < 1e-4
    assert not torch.equal(new, original)  # something was done


def test_residual_rotation_spreads_outliers(llama):
    """What rotation is for: a channel of the stream that dominates is spread over all."""
    source = open_source(str(llama))
    layer = source.layer(0)
    layer["mlp.down_proj.weight"][5] *= 100
    before = layer["mlp.down_proj.weight"].norm(dim=1)
    rotate.rotate_residual(layer, rotation(source.spec.hidden_size, 0))
    after = layer["mlp.down_proj.weight"].norm(dim=1)
    assert before.max() / before.median() > 50
    assert after.max() / after.median() < 2
    assert torch.isclose(before.norm(), after.norm())


def test_every_layer_of_a_run_passed_the_check(any_checkpoint):
    report = json.loads((any_checkpoint / "qoq_report.json").read_text())
    assert all(report["recipe"][name] for name in ("rotate", "smooth_attention", "smooth_down", "reorder"))
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    assert all(0 < layer["transform_error"] < 1e-4 for layer in report["layers"])


def drop_bias(layer, before):
    for name in ("self_attn.q_proj.bias", "self_attn.k_proj.bias"):
        layer[name] = before[name]


def drop_o_proj(layer, before):
    layer["self_attn.o_proj.weight"] = before["self_attn.o_proj.weight"]


def drop_gate(layer, before):
    layer["mlp.gate_proj.weight"] = before["mlp.gate_proj.weight"]


def drop_down(layer, before):
    layer["mlp.down_proj.weight"] = before["mlp.down_proj.weight"]


def drop_up(layer, before):
    layer["mlp.up_proj.weight"] = before["mlp.up_proj.weight"]


@pytest.mark.parametrize("first_wrong_layer", [0, 1])
@pytest.mark.parametrize(
    ("module", "function", "damage"),
    [
        (smooth, "smooth_attention", drop_bias),
        (rotate, "rotate_values", drop_o_proj),
        (rotate, "fold_norms", drop_gate),
        (rotate, "rotate_residual", drop_down),
        (smooth, "smooth_down", drop_up),
        (smooth, "reorder_down", drop_gate),
    ],
)
def test_a_wrong_transform_is_refused_before_its_layer_is_written(
    source_folder, tiny_recipe, tmp_path, monkeypatch, module, function, damage, first_wrong_layer
):
    right = getattr(module, function)
    calls: list[int] = []

    def wrong(layer, *args, **kwargs):
        before = dict(layer)
        right(layer, *args, **kwargs)
        if len(calls) >= first_wrong_layer:
            damage(layer, before)
        calls.append(1)

    monkeypatch.setattr(module, function, wrong)
    output = tmp_path / "out"
    with pytest.raises(QuantizationError, match=rf"layer {first_wrong_layer}: the transformed model differs"):
        pipeline.quantize(open_source(str(source_folder("qwen2"))), output, tiny_recipe())
    assert not output.exists()
    written = {path.name for path in (tmp_path / "out.work" / "parts").iterdir()}
    assert written == {"embed.safetensors"} | {f"layer-{i:05d}.safetensors" for i in range(first_wrong_layer)}
