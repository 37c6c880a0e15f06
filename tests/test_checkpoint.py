"""Checkpoint folders: writing, reading back, and a name for every fault."""

import contextlib
import dataclasses
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import GROUP_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qoq import checkpoint, layout, shards, verify
from qoq.checkpoint import Checkpoint
from qoq.errors import CheckpointError, OutputError, QoqError, QuantizationError
from qoq.models.architecture import LINEARS
from qoq.quant import QuantizedLinear, round_grouped, round_to_nearest

SHARD = "model-00001-of-00001.safetensors"
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def broken(copy_of, checkpoint_folder):
    return copy_of(checkpoint_folder())


def edit(folder, change):
    """Rewrite the shard after `change(tensors)`."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SHARD)


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# Linears


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linears_round_trip(group_size, with_bias):
    generator = torch.Generator().manual_seed(1)
    weight = round_to_nearest(torch.randn(96, 256, generator=generator).pow(3), group_size)
    bias = torch.randn(96, generator=generator).half() if with_bias else None
    tensors = checkpoint.pack_linear("x", QuantizedLinear(weight, bias))
    kinds = layout.linear_tensors(96, 256, group_size, with_bias)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {f"x.{k}": v for k, v in kinds.items()}
    read = checkpoint.unpack_linear("x", tensors)
    for field in dataclasses.fields(weight):
        assert torch.equal(getattr(read.weight, field.name), getattr(weight, field.name)), field.name
    assert (read.bias is None) == (bias is None)
    assert read.bias is None or bias is None or torch.equal(read.bias, bias)


def test_an_illegal_linear_is_not_packed():
    weight = round_grouped(torch.randn(32, 128, generator=torch.Generator().manual_seed(0)), 128)
    weight.s2[4, 0] = 18
    with pytest.raises(QuantizationError, match=r"x\.qweight: row 4, group 0 is illegal \(s2 above 17\)"):
        checkpoint.pack_linear("x", QuantizedLinear(weight, None))


def test_fp16_range_is_checked():
    assert checkpoint.to_fp16("x", torch.tensor([65504.0, -1.0])).dtype == torch.float16
    with pytest.raises(QuantizationError, match=r"x: \|value\| up to 7e\+04 exceeds float16"):
        checkpoint.to_fp16("x", torch.tensor([-7e4]))


# Writing


@pytest.mark.parametrize("max_bytes", [1, 20_000, 50_000, 10**9])
def test_shards_round_trip(checkpoint_folder, tmp_path, max_bytes):
    folder = checkpoint_folder()
    shards.write_shards(tmp_path, [folder / SHARD], max_bytes)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    index = json.loads((tmp_path / shards.INDEX).read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert (len(files) > 1) == (max_bytes < 10**9)
    original = load_file(folder / SHARD)
    found: dict[str, torch.Tensor] = {}
    for path in files:
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= max_bytes
        found |= tensors
    assert found.keys() == original.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], original[name]) for name in original)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in original.values())
    assert verify.problems(tmp_path, values=False) == []


def test_several_files_are_merged_in_order(tmp_path):
    for number in range(3):
        save_file({f"t{number}": torch.full((5,), number)}, tmp_path / f"{number}.part")
    (tmp_path / "out").mkdir()
    shards.write_shards(tmp_path / "out", [tmp_path / f"{number}.part" for number in (2, 0, 1)])
    header = shards.read_header(tmp_path / "out" / SHARD)
    assert list(header) == ["t2", "t0", "t1"]
    assert all((load_file(tmp_path / "out" / SHARD)[f"t{n}"] == n).all() for n in range(3))
    assert all(entry.start % 8 == 0 for entry in header.values())


def test_a_part_that_shrinks_meanwhile_is_named(tmp_path, monkeypatch):
    part, header = tmp_path / "0.part", shards._header
    shards.write_tensors(part, {"x": torch.ones(100)})

    def shrink(*arguments):
        part.write_bytes(part.read_bytes()[:-10])
        return header(*arguments)

    monkeypatch.setattr(shards, "_header", shrink)
    with pytest.raises(CheckpointError, match=r"0\.part: ends 10 bytes early"):
        shards.write_shards(tmp_path, [part])


def test_a_write_is_whole_or_absent(tmp_path):
    shards.write_bytes(tmp_path / "a.json", "old")
    shards.write_bytes(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(OutputError, match=r"b.json: cannot write \(No such file or directory\)"):
        shards.write_bytes(tmp_path / "absent" / "b.json", "x")
    shards.write_tensors(tmp_path / "c.safetensors", {"t": torch.arange(3.0)}, {"note": "hello"})
    assert torch.equal(shards.read_tensor(tmp_path / "c.safetensors", "t"), torch.arange(3.0))


# Faults


def test_a_folder_without_quantization_config_opens(broken):
    edit_config(broken, lambda config: config.pop("quantization_config"))
    made = Checkpoint(broken)
    assert made.group_size == 128
    assert all("_offset: no tensor of this model" in line for line in verify.problems(broken))


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name])})


def set_value(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


HEADER_FAULTS = {
    "missing weight": (drop(f"{UP}.qweight"), rf"tensor {UP}\.qweight is missing"),
    "missing scale": (drop(f"{UP}.s1_scales"), rf"tensor {UP}\.s1_scales is missing"),
    "missing zeros": (drop(f"{UP}.s2_zeros"), rf"tensor {UP}\.s2_zeros is missing"),
    "missing norm": (drop("model.norm.weight"), r"tensor model\.norm\.weight is missing"),
    "missing head": (drop("lm_head.weight"), r"tensor lm_head\.weight is missing"),
    "wrong shape": (
        put(f"{UP}.qweight", lambda t: t[:-1]),
        rf"{UP}\.qweight: shape \[383, 128\], expected \[384, 128\]",
    ),
    "wrong rank": (
        put(f"{UP}.s1_scales", lambda t: t[:, None]),
        rf"{UP}\.s1_scales: shape \[384, 1\], expected \[384\]",
    ),
    "no shape": (put(f"{UP}.s2_scales", lambda t: t[0, 0]), rf"{UP}\.s2_scales: shape \[\], expected \[2, 384\]"),
    "wrong dtype": (put(f"{UP}.s1_scales", lambda t: t.float()), rf"{UP}\.s1_scales: dtype F32, expected float16"),
    "unknown dtype": (put(f"{UP}.qweight", lambda t: t.view(torch.uint8)), rf"{UP}\.qweight: dtype U8, expected int8"),
}


@pytest.mark.parametrize(("change", "message"), HEADER_FAULTS.values(), ids=HEADER_FAULTS.keys())
def test_a_fault_in_the_headers_is_named_on_opening(broken, change, message):
    edit(broken, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(broken)
    listed = verify.problems(broken)
    assert len(listed) == 1 and re.search(message, listed[0]) and "\n" not in listed[0]


def test_many_faults_are_counted(broken):
    edit(broken, lambda tensors: [tensors.pop(f"{UP}.{suffix}") for suffix in ("qweight", "s1_scales", "s2_zeros")])
    with pytest.raises(
        CheckpointError, match=rf"{UP}\.qweight is missing, expected int8 \[384, 128\] \(and 2 more; see qoq"
    ):
        Checkpoint(broken)


def widest_group(tensors):
    """Codes 0 and 15 in every group, beside zeros that suit a narrower one."""
    tensors[f"{UP}.qweight"].fill_(0)[:, ::2] = -1
    tensors[f"{UP}.s2_scales"].fill_(16)
    tensors[f"{UP}.s2_zeros"].fill_(0)


CONTENT_FAULTS = {  # channel 8 stands in column 1
    "s2 of 0": (
        set_value(f"{UP}.s2_scales", (0, 1), 0),
        rf"{UP}\.s2_scales: row 8, group 0 is illegal: 0, expected 1..17$",
    ),
    "s2 of 18": (set_value(f"{UP}.s2_scales", (0, 1), 18), rf"{UP}\.s2_scales: row 8, .*: 18, expected 1..17$"),
    "negative s2": (set_value(f"{UP}.s2_scales", (0, 1), -3), rf"{UP}\.s2_scales: row 8, .*: -3, expected 1..17$"),
    "a span that its zero cannot hold": (
        widest_group,
        rf"{UP}\.s2_zeros: row 0, group 0 is illegal: codes \* s2 span 0\.\..*, expected int8 \(and 767 more\)",
    ),
    "NaN scale": (
        set_value(f"{UP}.s1_scales", 9, torch.nan),
        rf"{UP}\.s1_scales: NaN or Inf: \[9\] is nan, expected finite numbers$",
    ),
    "infinite norm": (set_value("model.norm.weight", 9, torch.inf), r"model\.norm\.weight: NaN or Inf: \[9\] is inf"),
    "NaN embedding": (
        set_value("model.embed_tokens.weight", 9, torch.nan),
        r"model\.embed_tokens\.weight: NaN or Inf: \[9, 0\] is nan, .* \(and 255 more\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), CONTENT_FAULTS.values(), ids=CONTENT_FAULTS.keys())
def test_a_fault_in_the_values_is_found_by_reading(broken, change, message):
    edit(broken, change)
    made = Checkpoint(broken)
    problems = verify.problems(broken)
    assert len(problems) == 1 and re.search(message, problems[0]), problems
    if UP in problems[0]:
        with pytest.raises(CheckpointError, match=rf"{UP}\."):
            made.linear(1, "mlp.up_proj")
        made.linear(0, "mlp.up_proj")


def test_a_bad_channel_checkpoint_is_named(copy_of, checkpoint_folder):
    folder = copy_of(checkpoint_folder("llama", -1))
    edit(folder, set_value(f"{UP}.s1_szeros", 3, torch.inf))
    assert any(f"{UP}.s1_szeros: NaN or Inf: [3] is inf" in line for line in verify.problems(folder))


@pytest.mark.parametrize("size", [0, 5, 8, 1000, -1])
def test_truncated_files_are_named(broken, size):
    content = (broken / SHARD).read_bytes()
    (broken / SHARD).write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=rf"{SHARD}: truncated or damaged safetensors"):
        Checkpoint(broken)


def test_a_file_truncated_after_opening(broken):
    made = Checkpoint(broken)
    content = (broken / SHARD).read_bytes()
    (broken / SHARD).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=SHARD):
        made.tensor("model.norm.weight")
    assert verify.problems(broken)


@pytest.mark.parametrize("declared", [64, -1, "128"])
def test_a_group_size_that_contradicts_the_tensors(broken, declared):
    edit_config(broken, lambda config: config["quantization_config"].update(group_size=declared))
    with pytest.raises(CheckpointError, match=rf"quantization_config.group_size is {declared!r}, .* group size 128"):
        Checkpoint(broken)


@pytest.mark.parametrize("value", ["qoq", 4, [1], {}])
def test_a_quantization_config_of_another_kind(broken, value):
    edit_config(broken, lambda config: config.update(quantization_config=value))
    try:
        assert Checkpoint(broken).group_size == 128
    except CheckpointError as error:
        assert "config.json" in str(error)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_bad_config_is_named(broken, content):
    (broken / "config.json").write_text(content)
    with pytest.raises(QoqError, match=str(broken)) as caught:
        Checkpoint(broken)
    assert "\n" not in str(caught.value)


def test_no_config(broken):
    (broken / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config.json; expected a checkpoint folder"):
        Checkpoint(broken)


def test_a_config_of_another_model(broken):
    edit_config(broken, lambda config: config.update(num_hidden_layers=3))
    with pytest.raises(
        CheckpointError, match=r"tensor model\.layers\.2\.\S+ is missing, expected \w+ \S+ \(and \d+ more"
    ):
        Checkpoint(broken)


def test_what_is_no_checkpoint(tmp_path, llama):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors; not a checkpoint"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a QoQ checkpoint"):
        Checkpoint(llama)


def test_a_checkpoint_is_known_even_when_damaged(broken, llama, tmp_path):
    assert checkpoint.is_checkpoint(broken)
    assert not checkpoint.is_checkpoint(llama)
    assert not checkpoint.is_checkpoint(tmp_path / "absent")
    (broken / SHARD).write_bytes(b"damaged")
    assert checkpoint.is_checkpoint(broken)


@pytest.mark.parametrize("content", ["", "[", "3"])
def test_a_damaged_report_is_named(broken, content):
    (broken / "qoq_report.json").write_text(content)
    with pytest.raises(CheckpointError, match="qoq_report.json"):
        Checkpoint(broken).report()


# Arbitrary files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def open_bytes(config: Path, content: bytes) -> None:
    """Open a folder with this file as its weights; only a QoqError may come of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_bytes(config.read_bytes())
        (folder / SHARD).write_bytes(content)
        assert all(line.isprintable() for line in verify.problems(folder))
        with contextlib.suppress(CheckpointError):
            Checkpoint(folder)


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@given(content=st.binary(max_size=300) | st.binary(max_size=100).map(with_header))
def test_random_bytes_raise_nothing_but_checkpoint_errors(checkpoint_folder, content):
    open_bytes(checkpoint_folder() / "config.json", content)


def test_a_deeply_nested_header_is_damaged(checkpoint_folder):
    open_bytes(checkpoint_folder() / "config.json", with_header(b"[" * 100_000))


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["I8", "F16", "F4", ""]),
        "shape": st.lists(st.integers(0, 300), max_size=3),
        "data_offsets": st.lists(st.integers(0, 200), min_size=2, max_size=2).map(sorted),
    }
)
BAD_ENTRY = st.tuples(ENTRY, st.sampled_from(["dtype", "shape", "data_offsets"]), JSON).map(
    lambda t: t[0] | {t[1]: t[2]}
)


@given(
    header=st.dictionaries(
        st.sampled_from([f"{UP}.s2_scales", f"{UP}.qweight", f"{UP}.s1_szeros", "lm_head.weight", "__metadata__"]),
        ENTRY | BAD_ENTRY | JSON,
        min_size=1,
    )
)
@settings(max_examples=200)
def test_random_headers_raise_nothing_but_checkpoint_errors(checkpoint_folder, header):
    open_bytes(checkpoint_folder() / "config.json", with_header(header, bytes(200)))


@given(data=st.data())
def test_a_changed_header_of_a_real_file_raises_nothing_but_checkpoint_errors(checkpoint_folder, data):
    content = (checkpoint_folder() / SHARD).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    if name != "__metadata__":
        header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(JSON)
    open_bytes(checkpoint_folder() / "config.json", with_header(header, content[8 + length :]))


def test_every_linear_of_every_family_is_read(any_checkpoint):
    made = Checkpoint(any_checkpoint)
    for index in range(made.spec.num_layers):
        for name in LINEARS:
            linear = made.linear(index, name)
            assert tuple(linear.matrix().shape) == made.spec.linear_shape(name)
            assert (linear.bias is not None) == (name in made.spec.biases)
