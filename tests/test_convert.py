"""Conversions: what is written, what other programs read of it, and what a failed one leaves behind."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import only_line, pack_awq, relative, tensors_of, weight_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qoq import checkpoint, layout, verify
from qoq.calibration import pipeline
from qoq.checkpoint import Checkpoint
from qoq.convert import TARGETS, convert, open_origin
from qoq.errors import OutputError, QoqError, QuantizationError
from qoq.formats import nibbles, parallel
from qoq.formats.affine import AffineWeight, to_affine, to_qoq
from qoq.formats.humming import humming_weight
from qoq.models.architecture import EMBEDDING, LINEARS
from qoq.models.source import open_source
from qoq.quant import (
    ChannelWeight,
    GroupedWeight,
    QuantizedLinear,
    check_legal,
    int_gemm,
    quantize_rows,
    round_channel,
    round_grouped,
)

UP = "model.layers.1.mlp.up_proj"
FULL_NAMES = [f"model.layers.{index}.{name}" for index in range(2) for name in LINEARS]


@pytest.fixture(scope="session")
def rounded(source_folder, tiny_recipe, tmp_path_factory):
    """group size -> a folder of plain rounding, whose zeros are whole codes. Do not write into it."""
    root = tmp_path_factory.mktemp("rounded")

    def folder(group_size=128, family="llama"):
        path = root / f"{family}{group_size}"
        if not path.exists():
            pipeline.quantize(open_source(str(source_folder(family))), path, tiny_recipe("rtn", group_size))
        return path

    return folder


def converted(source, output, to, **options):
    report = convert(open_origin(source), output, to, **options)
    return tensors_of(output), report


# One level of scales


def random_affine(seed, group_size, spread):
    """A weight of RTN in one level, its group scales up to e**spread apart."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(8, 256, generator=generator).unflatten(1, (-1, group_size))
    w = w * (spread * torch.rand(8, 256 // group_size, 1, generator=generator)).exp() * 0.02
    low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    codes = ((w / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15)
    return AffineWeight(codes.flatten(1).to(torch.uint8), scale, zero.to(torch.uint8))


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([64, 128]), st.floats(0, 5))
def test_any_group_scales_become_legal_integers_and_the_loss_is_what_was_lost(seed, group_size, spread):
    affine = random_affine(seed, group_size, spread)
    weight, loss = to_qoq(affine, group_size)
    check_legal(weight, "weight")
    assert isinstance(weight, GroupedWeight) and weight.group_size == group_size
    assert loss.relative == pytest.approx(relative(weight.dequantize(), affine.dequantize()), rel=1e-3, abs=1e-6)
    assert loss.relative < 0.05


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([64, 128]))
def test_plain_rounding_goes_to_one_level_and_back_without_a_changed_integer(seed, group_size):
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight = round_grouped(w, group_size)
    affine, loss = to_affine(weight)
    assert loss.rounded == 0 and loss.relative < 3e-4  # of fp16(s1 * s2) alone
    torch.testing.assert_close(affine.dequantize(), weight.dequantize(), rtol=2**-11, atol=0)
    back, _ = to_qoq(affine, group_size)
    assert isinstance(back, GroupedWeight)
    # with few groups another s1 may fit as well; the product is what was stored
    assert torch.equal((back.s1.float()[:, None] * back.s2).half(), affine.scale)
    torch.testing.assert_close(back.dequantize(), affine.dequantize(), rtol=2**-11, atol=0)


def test_per_channel_goes_to_one_level_and_back():
    weight = round_channel(torch.randn(32, 128, generator=torch.Generator().manual_seed(0)))
    affine, loss = to_affine(weight)
    assert loss.rounded == 0 and loss.relative < 1e-3  # fp16(zero * scale) against zero * scale
    back, _ = to_qoq(affine, -1)
    assert isinstance(back, ChannelWeight)
    assert all(torch.equal(x, y) for x, y in zip(vars(back).values(), vars(weight).values(), strict=True))


@pytest.mark.parametrize(("s2", "z"), [(1, -30), (10, 83), (1, 25)])
def test_a_zero_between_codes_or_beyond_them_costs_at_most_half_a_step(s2, z):
    codes = torch.arange(128).remainder(16).to(torch.uint8)[None]
    level2 = (torch.tensor([[value]], dtype=torch.int32) for value in (s2, z))
    weight = GroupedWeight(codes, torch.tensor([0.5]).half(), *level2)
    check_legal(weight, "weight")
    affine, loss = to_affine(weight)
    assert loss.rounded == 1 and int(affine.codes.max()) <= 15 and int(affine.zero.max()) <= 15
    exact = weight.dequantize()
    step = (exact.amax().clamp(min=0) - exact.amin().clamp(max=0)) / 15  # of a grid that holds all values and 0
    assert (affine.dequantize() - exact).abs().max() <= 0.55 * step


@given(st.integers(0, 10**6))
def test_nibbles_come_back(seed):
    codes = torch.randint(0, 16, (16, 24), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(nibbles.unpack(nibbles.pack(codes)), codes)
    assert torch.equal(nibbles.unpack_columns(nibbles.pack_columns(codes)), codes)
    assert torch.equal(nibbles.unpack_awq(pack_awq(codes)), codes)


def test_the_order_of_nibbles_in_a_word():
    codes = torch.arange(8, dtype=torch.uint8)[None]
    assert int(nibbles.pack(codes)) == 0x76543210
    assert int(pack_awq(codes)) == 0x75316420


# Exports


def test_hf_holds_the_dequantized_weights(rounded, tmp_path):
    source = Checkpoint(rounded())
    tensors, report = converted(rounded(), tmp_path / "hf", "hf")
    for full in FULL_NAMES:
        exact = weight_of(source, full).dequantize()
        assert torch.equal(tensors[f"{full}.weight"], exact.half())
    assert torch.equal(tensors[EMBEDDING], source.tensor(EMBEDDING))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in config and config["tie_word_embeddings"] is False
    assert 0 < report["error"] < 2**-11


@pytest.mark.parametrize("group_size", [128, -1])
def test_qserve_is_our_tensors_without_our_own(checkpoint_folder, tmp_path, group_size):
    source = checkpoint_folder("llama", group_size)
    tensors, report = converted(source, tmp_path / "out", "qserve")
    ours = tensors_of(source)
    assert set(ours) - set(tensors) == {name for name in ours if name.endswith(layout.OFFSETS)} != set()
    assert all(torch.equal(tensors[name], ours[name]) for name in tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "qoq", "wbits": 4, "group_size": group_size}
    assert report["error"] == 0 and report["notes"] == []
    assert "exact" in (tmp_path / "out" / "README.md").read_text()
    convert(open_origin(tmp_path / "out"), tmp_path / "back", "qoq")
    assert verify.problems(tmp_path / "back") == []  # its report has the hashes of its own files
    assert Checkpoint(tmp_path / "back").report()["model"] == Checkpoint(source).report()["model"]


def test_qserve_says_that_norms_would_be_ignored(rounded, tmp_path):
    _, report = converted(rounded(), tmp_path / "out", "qserve")
    assert "norm weights are not 1" in report["notes"][0]
    assert "norm weights are not 1" in (tmp_path / "out" / "README.md").read_text()


def scheme_of(folder):
    """The scheme of a folder as the real library reads its config."""
    ct = pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    return ct.quantization.QuantizationConfig.model_validate(declared).config_groups["group_0"]


@pytest.mark.parametrize(
    ("kind", "group_size"), [("rounded", 128), ("rounded", 64), ("rounded", -1), ("searched", 128), ("searched", -1)]
)
def test_compressed_tensors_reads_its_format(rounded, checkpoint_folder, tmp_path, kind, group_size):
    source = rounded(group_size) if kind == "rounded" else checkpoint_folder("llama", group_size)
    tensors, report = converted(source, tmp_path / "ct", "compressed-tensors", max_error=0.2)
    scheme = scheme_of(tmp_path / "ct")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    assert scheme.format == "pack-quantized" and scheme.input_activations is None
    for full in FULL_NAMES:
        index, name = full.removeprefix("model.layers.").split(".", 1)
        exact = weight_of(Checkpoint(source), full).dequantize()
        own = {key.removeprefix(f"{full}."): x for key, x in tensors.items() if key.startswith(f"{full}.")}
        read = PackedQuantizationCompressor.decompress(own, scheme)["weight"].float()
        # float16 holds scale * (code - zero) to 2**-11; what else is lost is what was reported
        assert relative(read, exact) == pytest.approx(report["layers"][int(index)]["linears"][name], abs=4e-4)
    if kind == "rounded":
        assert report["error"] < (1e-3 if group_size == -1 else 4e-4)  # fp16(zero * scale) is rounded as well
        assert sum(layer["rounded"] for layer in report["layers"]) == 0
    else:
        assert sum(layer["rounded"] for layer in report["layers"]) > 0


def test_the_int8_form_holds_the_very_integers(checkpoint_folder, tmp_path):
    tensors, report = converted(checkpoint_folder(), tmp_path / "w8", "compressed-tensors-w8a8")
    weight = weight_of(Checkpoint(checkpoint_folder()), UP)
    assert isinstance(weight, GroupedWeight)
    assert torch.equal(tensors[f"{UP}.weight"], weight.integers())
    assert torch.equal(tensors[f"{UP}.weight_scale"][:, 0], weight.s1) and report["error"] == 0
    scheme = scheme_of(tmp_path / "w8")
    assert scheme.format == "int-quantized" and scheme.input_activations.dynamic
    from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor

    own = {key.removeprefix(f"{UP}."): x for key, x in tensors.items() if key.startswith(f"{UP}.")}
    read = IntQuantizationCompressor.decompress(own, scheme)["weight"]
    assert torch.equal(read.float(), weight.dequantize().half().float())


@pytest.mark.parametrize("to", ["compressed-tensors", "compressed-tensors-w8a8", "hf"])
def test_transformers_computes_the_same_from_every_export(rounded, tmp_path, to):
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = Checkpoint(rounded())
    converted(rounded(), tmp_path / to, to)
    options = {} if to == "hf" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / to, dtype=torch.float32, **options).eval()
    ids = torch.arange(40)[None] % 250
    with torch.no_grad():
        found = model(ids).logits
        for full in FULL_NAMES:
            exact = weight_of(source, full).dequantize()
            module = model.get_submodule(full)
            assert type(module) is torch.nn.Linear and module.weight.dtype == torch.float32
            module.weight.copy_(exact)
        assert relative(found, model(ids).logits) < 1e-3


def test_humming_holds_the_words_of_compressed_tensors(rounded, tmp_path):
    tensors, _ = converted(rounded(), tmp_path / "humming", "humming")
    weight = weight_of(Checkpoint(rounded()), UP)
    assert isinstance(weight, GroupedWeight)
    n, k = weight.codes.shape
    words, zeros = tensors[f"{UP}.weight"], tensors[f"{UP}.zero_point"]
    assert words.shape == (n, k // 8) and zeros.shape == (n // 8, k // 128)
    assert tensors[f"{UP}.weight_scale"].shape == (n, k // 128)
    assert torch.equal(nibbles.unpack(words), weight.codes)
    assert torch.equal(nibbles.unpack_columns(zeros) * weight.s2, weight.z)
    config = json.loads((tmp_path / "humming" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "humming" and config["a_dtype"] == "int8" and config["b_dtype"] == "uint4"
    assert config["weight_scale_group_size"] == 128 and config["has_zero_point"] is True


def test_rows_of_zeros_do_not_coarsen_what_humming_makes_of_scales():
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    w[5] = 0
    tensors, loss = humming_weight("x", round_grouped(w, 128))
    assert float(tensors["x.weight_scale"].amax()) < 0.1 and 1e-4 < loss.relative < 3e-3


def test_every_card_says_which_precision_runs_where(rounded, tmp_path):
    expected = {
        "qserve": "W4A8KV4",
        "hf": "W16A16",
        "compressed-tensors": "W4A16",
        "compressed-tensors-w8a8": "W8A8",
        "humming": "W4A8",
    }
    assert set(expected) | {"qoq"} == set(TARGETS)
    for to, precision in expected.items():
        converted(rounded(), tmp_path / to, to, base_model="org/model")
        card = (tmp_path / to / "README.md").read_text()
        assert precision in card and "base_model: org/model" in card
        assert (tmp_path / to / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("kind", "group_size", "to"),
    [
        ("rounded", 128, ["qserve", "qserve", "compressed-tensors"]),
        ("searched", 128, ["qserve", "qserve", "compressed-tensors-w8a8"]),
        ("searched", 64, ["compressed-tensors-w8a8"]),
        ("searched", -1, ["qserve", "qserve", "hf"]),
    ],
)
def test_conversions_that_a_card_names_succeed(rounded, checkpoint_folder, tmp_path, kind, group_size, to):
    source = rounded(group_size) if kind == "rounded" else checkpoint_folder("llama", group_size)
    named = re.findall(r"`qoq convert FOLDER --to (\S+)`", (source / "README.md").read_text())
    assert named == to
    for name in set(to):
        convert(open_origin(source), tmp_path / name, name)


@pytest.mark.parametrize("family", ["llama-bias-tied", "qwen3"])
def test_biases_and_head_norms_are_carried(rounded, tmp_path, family):
    tensors, _ = converted(rounded(family=family), tmp_path / "ct", "compressed-tensors")
    ours = tensors_of(rounded(family=family))
    carried = {name for name in ours if name.endswith((".bias", "norm.weight"))}
    assert len(carried) > 5 and all(torch.equal(tensors[name], ours[name]) for name in carried)


# Tensor parallelism


def test_legal_degrees_cut_between_heads_tiles_and_groups(llama):
    spec = open_source(str(llama)).spec  # 2 KV heads; 384 = 3 groups of 128, 6 of 64
    assert parallel.legal_degrees(spec, 128) == [1]
    assert parallel.legal_degrees(spec, 64) == [1, 2]
    assert "KV heads" in str(parallel.why_not(spec, 64, 4))
    assert "mlp.down_proj" in str(parallel.why_not(spec, 128, 2))


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("name", ["mlp.down_proj", "mlp.up_proj"])
def test_the_parts_of_a_linear_compute_the_whole(group_size, name):
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(128, 512, generator=generator)
    bias = torch.randn(128, generator=generator).half()
    weight = round_grouped(w, group_size) if group_size > 0 else round_channel(w)
    whole = {key.removeprefix("x."): t for key, t in checkpoint.pack_linear("x", QuantizedLinear(weight, bias)).items()}
    rows = quantize_rows(torch.randn(3, 512, generator=generator))
    parts = [parallel.cut(name, whole, rank, 4) for rank in range(4)]
    linears: list[Any] = [
        checkpoint.unpack_linear("x", {f"x.{suffix}": tensor for suffix, tensor in part.items()}) for part in parts
    ]
    product = int_gemm(rows.x8, weight.integers())
    if name in parallel.BY_INPUT:
        pieces = zip(rows.x8.chunk(4, dim=1), linears, strict=True)
        partial = [int_gemm(x8, linear.weight.integers()) for x8, linear in pieces]
        assert torch.equal(torch.stack(partial).sum(0, dtype=torch.int32), product)
        assert all(torch.equal(linear.weight.s1, weight.s1) for linear in linears)
        assert torch.equal(torch.stack([linear.bias for linear in linears if linear.bias is not None]).sum(0), bias)
    else:
        found = torch.cat([int_gemm(rows.x8, linear.weight.integers()) for linear in linears], dim=1)
        assert torch.equal(found, product)
        assert torch.equal(torch.cat([linear.weight.s1 for linear in linears]), weight.s1)
        assert torch.equal(torch.cat([linear.bias for linear in linears if linear.bias is not None]), bias)


def test_a_folder_is_cut_into_one_for_each_rank(rounded, tmp_path):
    report = convert(open_origin(rounded(64)), tmp_path / "tp", "qoq", tensor_parallel=2)
    ours, ranks = tensors_of(rounded(64)), [tensors_of(tmp_path / "tp" / f"rank-{rank}") for rank in range(2)]
    assert report["tensor_parallel"] == 2 and not list((tmp_path / "tp").glob("*.safetensors"))
    assert set(ranks[0]) == set(ranks[1]) == set(ours)
    assert torch.equal(torch.cat([rank[f"{UP}.qweight"] for rank in ranks]), ours[f"{UP}.qweight"])
    assert torch.equal(torch.cat([rank[f"{UP}.s2_scales"] for rank in ranks], dim=1), ours[f"{UP}.s2_scales"])
    assert torch.equal(ranks[1][EMBEDDING], ours[EMBEDDING])
    config = json.loads((tmp_path / "tp" / "rank-1" / "config.json").read_text())
    assert config["quantization_config"]["tensor_parallel"] == {"rank": 1, "size": 2}


# What a failed conversion leaves behind, and the command


def test_a_conversion_that_loses_too_much_leaves_nothing(checkpoint_folder, tmp_path):
    with pytest.raises(QuantizationError, match=r"q_proj: .* more than --max-error 0.001 .*whole_zeros.*w8a8"):
        convert(open_origin(checkpoint_folder()), tmp_path / "out", "compressed-tensors", max_error=0.001)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_source_leaves_nothing(copy_of, rounded, tmp_path):
    broken = copy_of(rounded())
    origin = open_origin(broken)
    next(broken.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(QoqError):
        convert(origin, tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == [broken.name]


def test_what_cannot_be_is_refused_before_any_work(rounded, tmp_path):
    cases: list[tuple[int, str, dict[str, Any], str]] = [
        (128, "qoq", {}, "already"),
        (64, "qserve", {}, "extension of qoq"),
        (-1, "compressed-tensors-w8a8", {}, "zero points"),
        (128, "hf", {"tensor_parallel": 2}, "--tp"),
        (128, "qserve", {"tensor_parallel": 3}, "attention heads; legal degrees here: 1"),
    ]
    for group_size, to, options, message in cases:
        with pytest.raises(QuantizationError, match=message):
            convert(open_origin(rounded(group_size)), tmp_path / "out", to, **options)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(OutputError, match="exists"):
        convert(open_origin(rounded()), tmp_path / "taken", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_command(qoq, rounded, checkpoint_folder, tmp_path):
    code, out, err = qoq("convert", rounded(), "--to", "compressed-tensors", "--output", tmp_path / "ct", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["from"] == "qoq" and document["to"] == "compressed-tensors" and len(document["layers"]) == 2
    assert "Every 4-bit code is the source's" in err
    stored = json.loads((tmp_path / "ct" / "qoq_conversion.json").read_text())
    assert {"output": str(tmp_path / "ct"), **stored} == document
    back = qoq("convert", tmp_path / "ct", "--to", "qoq", "--output", tmp_path / "back")
    assert back[0] == 0, back
    made, source = Checkpoint(tmp_path / "back"), Checkpoint(rounded())
    assert verify.problems(tmp_path / "back") == []
    for full in FULL_NAMES:
        assert torch.equal(weight_of(made, full).codes, weight_of(source, full).codes)
    refused = qoq("convert", checkpoint_folder(), "--to", "humming", "--output", tmp_path / "h", "--max-error", "1e-3")
    assert "--max-error 0.001" in only_line(refused)
    assert "no such" in only_line(qoq("convert", Path("/nowhere"), "--to", "hf", "--output", tmp_path / "n"))
