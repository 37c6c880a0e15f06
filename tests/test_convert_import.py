"""Foreign folders, written here from the descriptions of their formats, and read as QoQ's integers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import only_line, pack_awq, relative, tensors_of, weight_of
from safetensors.torch import save_file

from qoq import verify
from qoq.checkpoint import Checkpoint
from qoq.convert import convert, open_origin
from qoq.errors import CheckpointError, QoqError, QuantizationError
from qoq.formats import nibbles
from qoq.formats.affine import AffineWeight
from qoq.models.architecture import EMBEDDING, LINEARS, LM_HEAD
from qoq.models.source import open_source
from qoq.quant import ChannelWeight, GroupedWeight, QuantizedWeight, round_channel, round_grouped

UP = "model.layers.1.mlp.up_proj"
FIRST_S2 = "model.layers.0.self_attn.q_proj.s2_scales"
FULL_NAMES = [f"model.layers.{index}.{name}" for index in range(2) for name in LINEARS]


def describe(folder, source, quantization_config=None):
    """Config and tokenizer of a model into a new folder."""
    folder.mkdir()
    for path in Path(source).glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    for left_out in ("model.safetensors.index.json", "qoq_report.json"):
        (folder / left_out).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    if quantization_config:
        config["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def linear_weights(checkpoint):
    """Full name -> the weight of every linear."""
    return {full: weight_of(checkpoint, full) for full in FULL_NAMES}


def same(weight, other):
    return all(torch.equal(x, y) for x, y in zip(vars(weight).values(), vars(other).values(), strict=True))


# QServe


def in_other_order(level2):
    """s2 tensors of the kernels' column order as deepcompressor's converter writes them."""
    groups, n = level2.shape
    natural = level2.view(groups, n // 32, 8, 4).transpose(2, 3).reshape(groups, n)
    return natural.view(groups, n // 32, 2, 2, 8).transpose(3, 4).reshape(groups, n).contiguous()


@pytest.fixture
def qserve(tmp_path, checkpoint_folder):
    """A published QServe folder of a checkpoint of ours: one pickle, no quantization_config, another order at wish."""

    def make(group_size=128, file="quant_model.pt", wrong_order=False, change=None):
        source = checkpoint_folder("llama", group_size)
        folder = describe(tmp_path / "qserve", source)
        tensors = {name: tensor for name, tensor in tensors_of(source).items() if "_offset" not in name}
        if wrong_order:
            tensors = {n: in_other_order(t) if ".s2_" in n else t for n, t in tensors.items()}
        if change:
            change(tensors)
        save_file(tensors, folder / file) if file.endswith("safetensors") else torch.save(tensors, folder / file)
        return folder, Checkpoint(source)

    return make


@pytest.mark.parametrize("file", ["quant_model.pt", "pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("group_size", [128, -1])
def test_a_qserve_folder_comes_in_exactly(qserve, tmp_path, file, group_size):
    folder, source = qserve(group_size, file)
    report = convert(open_origin(folder), tmp_path / "out", "qoq", base_model="org/base")
    made = Checkpoint(tmp_path / "out")
    assert report["from"] == "qserve" and report["error"] == 0 and made.group_size == group_size
    assert verify.problems(tmp_path / "out") == []
    found = linear_weights(made)
    assert all(same(found[name], weight) for name, weight in linear_weights(source).items())
    assert torch.equal(made.tensor(EMBEDDING), source.tensor(EMBEDDING))
    assert made.kv_cache.rotate and not made.kv_cache.offset and made.report()["model"] == "org/base"


def test_the_wrong_order_of_level_2_is_told_from_the_weights(qserve, tmp_path):
    folder, source = qserve(wrong_order=True)
    report = convert(open_origin(folder), tmp_path / "out", "qoq")
    found = linear_weights(Checkpoint(tmp_path / "out"))
    assert all(same(found[name], weight) for name, weight in linear_weights(source).items())
    assert "deepcompressor's order" in report["notes"][0]


def test_the_order_can_be_given_and_must_be_where_nothing_tells_it(qserve, qoq, tmp_path):
    def alike(tensors):
        for name, tensor in tensors.items():
            if ".s2_" in name:
                tensor.fill_(4 if "scales" in name else -32)

    folder, _ = qserve(change=alike)
    refused = qoq("convert", folder, "--to", "qoq", "--output", tmp_path / "out")
    assert "--level2-order kernel or deepcompressor" in only_line(refused)
    assert qoq("convert", folder, "--to", "qoq", "--output", tmp_path / "out", "--level2-order", "kernel")[0] == 0


def test_a_damaged_group_does_not_change_the_order_but_is_named(qserve, tmp_path):
    def damage(tensors):
        tensors[f"{UP}.s2_scales"][0, 0] = 40

    folder, _ = qserve(change=damage)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.*row 0, group 0"):
        convert(open_origin(folder), tmp_path / "out", "qoq")
    assert not (tmp_path / "out").exists()


class Bomb:
    """Opens a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_pickles_run_no_code(qserve, tmp_path):
    folder, _ = qserve(change=lambda tensors: tensors.update({"bomb": Bomb(tmp_path / "crater")}))
    with pytest.raises(CheckpointError, match=r"quant_model.pt: refused, it holds more than tensors"):
        open_origin(folder)
    assert not (tmp_path / "crater").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LM_HEAD), "lm_head.weight is missing"),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:32]}), r"up_proj.qweight has shape \[32, 128\]"),
        (lambda t: t.update({FIRST_S2: torch.tensor(1)}), r"q_proj.s2_scales has shape \[\], expected \[K/g, N\]"),
        (lambda t: t.update({f"{UP}.dequant_scale": torch.ones(3)}), "W8A8"),
        (lambda t: t.update({f"{UP}.s1_scales": t[f"{UP}.s1_scales"].float()}), "s1_scales: dtype float32, expected"),
    ],
)
def test_what_is_wrong_with_a_qserve_folder_is_named(qserve, tmp_path, change, message):
    folder, _ = qserve(change=change)
    with pytest.raises(CheckpointError, match=message):
        convert(open_origin(folder), tmp_path / "out", "qoq")


def test_a_truncated_pickle_is_one_line(qserve):
    folder, _ = qserve()
    path = folder / "quant_model.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged or not a torch file"):
        open_origin(folder)


# deepcompressor


@pytest.fixture
def dump(tmp_path, llama):
    """model.pt and scale.pt of plain rounding, zeros as they were before or after scaling, codes signed or not."""

    def make(group_size=128, zero="scaled_zero", signed=False, level2="scale.1", change=None):
        source = open_source(str(llama))
        model = {name: tensor.half() for name, tensor in tensors_of(source.folder).items()}
        scales: dict[str, torch.Tensor] = {}
        weights: dict[str, QuantizedWeight] = {}
        for full in FULL_NAMES:
            w = model[f"{full}.weight"].float()
            shift = 8 if signed else 0  # codes and zeros 8 less
            if group_size == -1:
                channel = round_channel(w)
                s1 = channel.s1.float()[:, None]
                offset = channel.szero.float()[:, None] - shift * s1
                codes = (channel.szero.float()[:, None] / s1).round() - shift
                weights[full] = channel
                zeros = offset if zero == "scaled_zero" else codes
            else:
                grouped = round_grouped(w, group_size)
                weights[full], s1 = grouped, grouped.s1.float()[:, None]
                offset = grouped.z - shift * grouped.s2
                zeros = offset if zero == "scaled_zero" else offset // grouped.s2
                scales[f"{full}.weight.{level2}"] = grouped.s2.half()[:, None, :, None]
            model[f"{full}.weight"] = weights[full].dequantize().half()
            scales[f"{full}.weight.scale.0"] = s1.half()[:, :, None, None]
            scales[f"{full}.weight.{zero}"] = zeros.half()[:, None, :, None]
        folder = tmp_path / "dump"
        folder.mkdir()
        if change:
            change(model, scales)
        torch.save(model, folder / "model.pt")
        torch.save(scales, folder / "scale.pt")
        return folder, weights

    return make


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("zero", ["zero", "scaled_zero"])
@pytest.mark.parametrize("signed", [False, True])
def test_a_dump_comes_in_whatever_its_zeros_are(dump, llama, tmp_path, group_size, zero, signed):
    folder, weights = dump(group_size, zero, signed)
    report = convert(open_origin(folder, base=llama), tmp_path / "out", "qoq")
    made = Checkpoint(tmp_path / "out")
    assert report["error"] < 1e-3 and made.group_size == group_size
    for name, weight in linear_weights(made).items():
        assert torch.equal(weight.codes, weights[name].codes) and torch.equal(weight.s1, weights[name].s1)
        if isinstance(weight, GroupedWeight):
            assert same(weight, weights[name])
        else:
            torch.testing.assert_close(weight.szero, weights[name].szero, rtol=2e-3, atol=1e-4)


def test_a_dump_with_newer_key_names(dump, llama, tmp_path):
    folder, weights = dump(level2="scale.1.0")
    convert(open_origin(folder, base=llama), tmp_path / "out", "qoq")
    assert all(same(weight, weights[name]) for name, weight in linear_weights(Checkpoint(tmp_path / "out")).items())


def test_what_is_wrong_with_a_dump_is_named(dump, llama, tmp_path):
    folder, _ = dump(change=lambda model, scales: model[f"{UP}.weight"].mul_(1.003))
    with pytest.raises(CheckpointError, match="--base"):
        open_origin(folder)
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight\[\d+, \d+\] is .* steps of its scale, expected a whole number"
    ):
        convert(open_origin(folder, base=llama), tmp_path / "out", "qoq")
    shutil.rmtree(folder)
    folder, _ = dump(change=lambda model, scales: scales.pop(f"{UP}.weight.scale.1"))
    with pytest.raises(CheckpointError, match="up_proj and the first linear differ"):
        open_origin(folder, base=llama)


# AWQ, GPTQ, compressed-tensors


def one_level(w, group_size, symmetric):
    """Plain rounding of w (N, K) with one level of scales."""
    groups = w.unflatten(1, (1 if group_size == -1 else -1, w.shape[1] if group_size == -1 else group_size))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = (torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15).half()
    zero = torch.full_like(low, 8) if symmetric else (-low / scale.float()).round().clamp(0, 15)
    codes = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15)
    return AffineWeight(codes.flatten(1).to(torch.uint8), scale, zero.to(torch.uint8))


def gptq_linear(weight, version=1, g_idx=True):
    n, k = weight.codes.shape
    tensors = {
        "qweight": nibbles.pack_columns(weight.codes.T.contiguous()),
        "qzeros": nibbles.pack((weight.zero - (1 if version == 1 else 0)).T.contiguous() & 15),
        "scales": weight.scale.T,
    }
    return tensors | ({"g_idx": torch.arange(k, dtype=torch.int32) // (k // weight.groups)} if g_idx else {})


def awq_linear(weight):
    pack = {"qweight": weight.codes, "qzeros": weight.zero}
    return {name: pack_awq(x.T.contiguous()) for name, x in pack.items()} | {"scales": weight.scale.T}


def ct_linear(weight, symmetric):
    """By the real library where it is installed, so that its packing is what is read."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized", reason="needs compressed-tensors")
    signed, zero = weight.codes.to(torch.int8) - 8, weight.zero.to(torch.int8) - 8
    tensors = {"weight_packed": helpers.pack_to_int32(signed, 4), "weight_scale": weight.scale.bfloat16()}
    tensors["weight_shape"] = torch.tensor(weight.codes.shape)
    return tensors if symmetric else tensors | {"weight_zero_point": helpers.pack_to_int32(zero, 4, packed_dim=0)}


@pytest.fixture
def foreign(tmp_path, source_folder):
    """A folder in a format of one level."""

    def make(kind, group_size=128, family="llama", symmetric=False, change=None, **options):
        declared: dict[str, Any] = {"quant_method": kind, "bits": 4, "group_size": group_size}
        if kind == "awq":
            declared |= {"version": "gemm", "zero_point": True}
        if kind == "compressed-tensors":
            strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
            weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, **strategy}
            group = {"targets": ["Linear"], "weights": weights}
            declared = {"quant_method": kind, "format": "pack-quantized", "config_groups": {"group_0": group}}
        if options.get("version") == 2:
            declared["checkpoint_format"] = "gptq_v2"
        source = open_source(str(source_folder(family)))
        folder = describe(tmp_path / "foreign", source.folder, declared)
        tensors = {name: tensor.half() for name, tensor in tensors_of(source.folder).items()}
        weights = {}
        for full in FULL_NAMES:
            weight = weights[full] = one_level(tensors.pop(f"{full}.weight").float(), group_size, symmetric)
            writers: dict[str, Any] = {"gptq": gptq_linear, "awq": awq_linear, "compressed-tensors": ct_linear}
            extra = {"symmetric": symmetric} if kind == "compressed-tensors" else options
            tensors |= {f"{full}.{suffix}": x.contiguous() for suffix, x in writers[kind](weight, **extra).items()}
        if change:
            change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder, weights

    return make


@pytest.mark.parametrize("group_size", [128, 64, -1])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("awq", {}),
        ("gptq", {}),
        ("gptq", {"version": 2, "g_idx": False, "symmetric": True}),
        ("compressed-tensors", {}),
        ("compressed-tensors", {"symmetric": True}),
    ],
)
def test_one_level_comes_in_with_the_loss_it_reports(foreign, tmp_path, kind, options, group_size):
    folder, weights = foreign(kind, group_size, **options)
    report = convert(open_origin(folder), tmp_path / "out", "qoq")
    made = Checkpoint(tmp_path / "out")
    assert report["from"] == kind and made.group_size == group_size and verify.problems(tmp_path / "out") == []
    for name, weight in linear_weights(made).items():
        _, _, index, linear = name.split(".", 3)
        reported = report["layers"][int(index)]["linears"][linear]
        scales = 2**-9 if kind == "compressed-tensors" else 0  # stored in bfloat16
        error = relative(weight.dequantize(), weights[name].dequantize())
        assert error == pytest.approx(reported, abs=2e-4 + scales)
        assert error < (2e-3 + scales if group_size == -1 else 0.04)
        if isinstance(weight, ChannelWeight):
            assert torch.equal(weight.codes, weights[name].codes)


@pytest.mark.parametrize("family", ["llama-bias-tied", "qwen2"])
def test_tied_and_biased_models_come_in(foreign, tmp_path, family):
    def tie(tensors):
        tensors.pop(LM_HEAD, None)

    folder, _ = foreign("awq", family=family, change=tie)
    convert(open_origin(folder), tmp_path / "out", "qoq")
    made = Checkpoint(tmp_path / "out")
    assert torch.equal(made.tensor(LM_HEAD), made.tensor(EMBEDDING)) and not made.config.tie_word_embeddings
    assert made.linear(0, "self_attn.q_proj").bias is not None


def test_scales_without_a_level_of_their_own_are_refused(foreign, tmp_path):
    def scatter(tensors):
        tensors[f"{UP}.scales"][0] *= 300  # one group of each row far above the others

    folder, _ = foreign("awq", change=scatter)
    report = convert(open_origin(folder), tmp_path / "out", "qoq")  # lost in the large group, as any 8 bits would
    assert report["error"] < 0.05
    with pytest.raises(QuantizationError, match="group scales are no multiples"):
        convert(open_origin(folder), tmp_path / "other", "qoq", max_error=1e-3)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gptq", lambda t: t[f"{UP}.g_idx"].copy_(t[f"{UP}.g_idx"].flip(0)), "activation order"),
        ("gptq", lambda t: t[f"{UP}.scales"].fill_(-1), "scales from -1 to -1"),
        ("awq", lambda t: t[f"{UP}.scales"].fill_(torch.nan), "scales from nan"),
        ("awq", lambda t: t.pop(f"{UP}.qzeros"), "up_proj.qzeros is missing"),
        ("awq", lambda t: t.update({f"{UP}.weight": t.pop(f"{UP}.qweight")}), "up_proj.weight is there, unquantized"),
        ("compressed-tensors", lambda t: t.update({f"{UP}.weight_g_idx": torch.ones(1)}), "activation order"),
    ],
)
def test_what_is_wrong_with_a_foreign_folder_is_named(foreign, tmp_path, kind, change, message):
    folder, _ = foreign(kind, change=change)
    with pytest.raises(CheckpointError, match=message):
        convert(open_origin(folder), tmp_path / "out", "qoq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"quant_method": "awq", "bits": 3}, "bits 3"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "gptq", "bits": 8}, "bits is 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "group size 32, expected 128, 64 or -1"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "0 config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 8}}}}, "format"),
        ({"quant_method": "fp8"}, "quant_method is 'fp8'"),
        ({"quant_method": ["awq"]}, r"quant_method is \['awq'\]; read are"),
        ({"quant_method": "awq", "bits": 4, "group_size": torch.inf}, "quantization_config is not as awq has it"),
    ],
)
def test_other_schemes_are_refused(foreign, declared, message):
    folder, _ = foreign("awq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))
    with pytest.raises(QoqError, match=message):
        open_origin(folder)


def test_a_config_of_too_many_layers_costs_nothing(qserve):
    folder, _ = qserve()
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 9999, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QoqError, match="model.layers.2.* is missing"):
        open_origin(folder)


def test_folders_that_are_none_are_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        open_origin(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected an object"):
        open_origin(tmp_path)
