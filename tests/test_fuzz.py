"""Readers on anything: one printable line of a QoqError, never another exception, a hang, or memory out of proportion.

`pytest tests/test_fuzz.py --hypothesis-profile=long --hypothesis-show-statistics` looks for longer.
"""

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qoq import recipe, verify
from qoq.calibration.data import samples
from qoq.checkpoint import Checkpoint, is_checkpoint
from qoq.cli.inspect import describe, write_page
from qoq.errors import LONGEST_LINE, QoqError, printable
from qoq.models.decoder import rotary_embedding
from qoq.models.gguf_header import check_header
from qoq.models.source import open_source
from qoq.shards import INDEX

SHARD = "model-00001-of-00001.safetensors"
MEMORY = 256 << 20  # a file of a few KB must not cost more
TOKENIZER = make_tokenizer()

ODD = st.sampled_from(
    [None, True, -1, 0, 1, 2**63, 10**12, 10**30, 1.5, float("nan"), float("inf"), "", "x", "\ud800", "a\nb", "\x1b[2J"]
    + [[], [1], [[[]]], {}, {"a": 1}, "../x", "/dev/zero", "a" * 300, "128"]
).map(deepcopy)  # documents are changed in place


def attempt(read: Callable[[], object]) -> None:
    """Only a QoqError may come of it, and only in one line."""
    before = peak_memory()
    try:
        read()
    except QoqError as error:
        assert str(error).isprintable() and len(str(error)) < LONGEST_LINE + 50
    assert peak_memory() - before < MEMORY


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON document."""
    if not isinstance(node, dict | list):
        return []
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    return [(node, key) for key in keys] + [place for key in keys for place in places(node[key])]


@st.composite
def changed_json(draw: st.DrawFn, text: bytes) -> bytes:
    """A JSON document with up to three values replaced, removed or renamed."""
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        found = places(document)
        if not found:
            break
        node, key = found[draw(st.integers(0, len(found) - 1))]
        action = draw(st.integers(0, 9))
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            node[draw(st.sampled_from(["\ud800", "a\nb", "", "x" * 300]))] = node.pop(key)
        else:
            node[key] = draw(ODD)
    return json.dumps(document).encode()


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes, head: int | None = None) -> bytes:
    """A file cut off, or with bytes among its first `head` overwritten."""
    if draw(st.integers(0, 3)) == 0:
        return content[: draw(st.integers(0, len(content)))]
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(head or len(content), len(content)) - 1))
        new = draw(st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\xff"]) | st.binary(max_size=8))
        made[at : at + len(new)] = new
    return bytes(made)


def changed(content: bytes) -> st.SearchStrategy[bytes]:
    return changed_json(content) | changed_bytes(content) | st.binary(max_size=100)


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


EXAMPLES = settings.default.max_examples if settings.default else 50
fuzz = settings(  # of whole folders, which transformers reads too
    max_examples=EXAMPLES // 4,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A copy of a folder that later examples overwrite."""
    root = tmp_path_factory.mktemp("fuzz")

    def copy(folder: Path) -> Path:
        path = root / folder.name
        return path if path.exists() else Path(shutil.copytree(folder, path))

    return copy


def open_checkpoint(folder: Path) -> None:
    is_checkpoint(folder)
    assert all(line.isprintable() for line in describe(folder, verify=False)["problems"])
    made = Checkpoint(folder)
    made.report()
    made.layer(0)


@given(data=st.data())
@fuzz
def test_shards(checkpoint_folder, scratch, data):
    content = (checkpoint_folder() / SHARD).read_bytes()
    header, tensors = split(content)
    made = data.draw(changed_json(header).map(lambda h: struct.pack("<Q", len(h)) + h + tensors))
    if data.draw(st.integers(0, 2)) == 0:
        made = data.draw(changed_bytes(content, 8 + len(header)))
    folder = scratch(checkpoint_folder())
    (folder / SHARD).write_bytes(made)
    attempt(lambda: open_checkpoint(folder))
    (folder / SHARD).write_bytes(content)


@given(data=st.data())
@settings(fuzz, max_examples=EXAMPLES // 10)
def test_values(checkpoint_folder, scratch, data):
    """Whatever the data, the header being right: `verify` names faults, and says so where bytes merely changed."""
    content = (checkpoint_folder() / SHARD).read_bytes()
    header, tensors = split(content)
    made = bytearray(tensors)
    at = data.draw(st.integers(0, len(tensors) - 64))
    made[at : at + 64] = data.draw(st.binary(min_size=64, max_size=64))
    folder = scratch(checkpoint_folder())
    (folder / SHARD).write_bytes(content[: 8 + len(header)] + made)
    found = verify.problems(folder)
    (folder / SHARD).write_bytes(content)
    assert bool(found) == (bytes(made) != tensors)


@given(data=st.data())
@fuzz
def test_config(checkpoint_folder, scratch, data):
    content = (checkpoint_folder() / "config.json").read_bytes()
    folder = scratch(checkpoint_folder())
    (folder / "config.json").write_bytes(data.draw(changed(content)))
    attempt(lambda: open_checkpoint(folder))
    (folder / "config.json").write_bytes(content)


@given(data=st.data())
@fuzz
def test_source_config(llama, scratch, data):
    def read() -> None:
        source = open_source(str(folder))
        source.layer(0)
        source.embedding()
        rotary_embedding(source.config)(torch.arange(3))

    content = (llama / "config.json").read_bytes()
    folder = scratch(llama)
    (folder / "config.json").write_bytes(data.draw(changed(content)))
    attempt(read)
    (folder / "config.json").write_bytes(content)


@given(data=st.data())
@fuzz
def test_index(checkpoint_folder, scratch, llama, data):
    def read() -> None:
        source = open_source(str(model))
        source.layer(0)
        source.hashes()

    made, folder, model = checkpoint_folder(), scratch(checkpoint_folder()), scratch(llama)
    content = data.draw(changed((made / INDEX).read_bytes()))
    (folder / INDEX).write_bytes(content)
    assert all(line.isprintable() for line in verify.problems(folder, values=False))
    (folder / INDEX).write_bytes((made / INDEX).read_bytes())
    if (model / "model.safetensors").exists():  # it would come before an index
        (model / "model.safetensors").rename(model / SHARD)
    names = list(json.loads(split((model / SHARD).read_bytes())[0]))
    whole = json.dumps({"weight_map": dict.fromkeys(names, SHARD)}).encode()
    (model / INDEX).write_bytes(data.draw(changed(whole)))
    attempt(read)
    (model / INDEX).unlink()


@given(data=st.data())
@fuzz
def test_report(checkpoint_folder, scratch, data):
    def read() -> None:
        write_page(folder, folder.parent / "page.html")

    content = (checkpoint_folder() / "qoq_report.json").read_bytes()
    folder = scratch(checkpoint_folder())
    (folder / "qoq_report.json").write_bytes(data.draw(changed(content)))
    attempt(lambda: describe(folder, verify=False))
    attempt(read)
    (folder / "qoq_report.json").write_bytes(content)


WORDS = (
    "name: x\n~seed: ~1~group_size: ~calibration: ~kv_cache: ~clip_ratios: ~modules_to_not_convert: ~{~}~[~]~&a ~*a~- "
    "~layers_in_8_bits: "
    "~? ~!!int ~!!float ~!!timestamp ~!!python/object:os.system ~!!binary ~2001-99-99~0x~1:60~<<: ~\n~\t~ ~'~\"~nan"
    '~.inf~1e999~|~%YAML 9\n~---\n~#~name: "\\uD800"\n~seed: 99999999999999999999999\n~\x00~é'
).split("~")
YAML = st.lists(st.sampled_from(WORDS), max_size=12).map(lambda words: "".join(words).encode())


@given(content=YAML | st.binary(max_size=60))
@settings(max_examples=2 * EXAMPLES)
def test_recipes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    attempt(lambda: recipe.dump(recipe.load(str(path))).encode())


def test_a_recipe_of_laughs_and_one_of_depth(tmp_path):
    path = tmp_path / "bomb.yaml"
    laughs = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))]
    for content in ("\n".join([*laughs, "name: *a39"]), "\n".join([*laughs, "calibration: *a39"]), "[" * 50_000):
        path.write_text(content)
        attempt(lambda: recipe.load(str(path)))
    path.write_text("# " + "x" * 2_000_000)
    with pytest.raises(recipe.RecipeError, match="larger than"):
        recipe.load(str(path))


ROW = st.sampled_from([b'{"text": "abc def"}', b'{"messages": [{"role": "user", "content": "hi"}]}']).flatmap(changed)


@given(rows=st.lists(ROW, min_size=1, max_size=3))
@settings(max_examples=2 * EXAMPLES)
def test_jsonl(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(b"\n".join(rows))
    attempt(lambda: samples(TOKENIZER, str(path), 1, 2, 0))


@given(data=st.data())
def test_parquet(tmp_path_factory, data):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path_factory.getbasetemp() / "fuzz.parquet"
    columns = [["a", "b"] * 9, ["a", None], [1, 2], [b"\xff", b"a"], [["a"]], [{"x": "a"}], []]
    tables = [arrow.table({"text": column}) for column in columns] + [arrow.table([["a"]] * 2, names=["text"] * 2)]
    parquet.write_table(data.draw(st.sampled_from(tables)), path, compression="none")
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(changed_bytes(path.read_bytes())))
    attempt(lambda: samples(TOKENIZER, str(path), 1, 2, 0))


def gguf(metadata: dict[str, tuple[int, bytes]], tensors: dict[str, tuple[int, ...]]) -> bytes:
    """A GGUF file of float32 zeros."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [text(name) + struct.pack("<I", kind) + value for name, (kind, value) in metadata.items()]
    for name, shape in tensors.items():
        parts.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0))
    return b"".join(parts) + bytes(4096)


NUMBER, TEXT, LIST = 4, 8, 9
WHOLE = {
    "general.architecture": (TEXT, struct.pack("<Q", 5) + b"llama"),
    "llama.block_count": (NUMBER, struct.pack("<I", 1)),
    "llama.embedding_length": (NUMBER, struct.pack("<I", 32)),
    "llama.feed_forward_length": (NUMBER, struct.pack("<I", 32)),
    "llama.attention.head_count": (NUMBER, struct.pack("<I", 1)),
    "tokenizer.ggml.tokens": (LIST, struct.pack("<IQ", TEXT, 2) + (struct.pack("<Q", 1) + b"a") * 2),
    "tokenizer.ggml.scores": (LIST, struct.pack("<IQ", 6, 2) + bytes(8)),
}
SHAPES = {"token_embd.weight": (32, 8), "output_norm.weight": (32,)}


def read_gguf(path: Path) -> None:
    """As `open_source`, without the conversion behind it."""
    try:
        check_header(path)
    except ValueError as error:
        raise QoqError(str(error)) from None


@given(content=changed_bytes(gguf(WHOLE, SHAPES), 400) | st.binary(max_size=60).map(lambda tail: b"GGUF" + tail))
@settings(max_examples=2 * EXAMPLES)
def test_gguf(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(content)
    attempt(lambda: read_gguf(path))


@pytest.mark.parametrize(
    ("metadata", "shapes", "message"),
    [
        (
            {"llama.block_count": (NUMBER, struct.pack("<I", 10**9))},
            {},
            "llama.block_count is 1000000000, with 2 tensors",
        ),
        ({"llama.vocab_size": (NUMBER, struct.pack("<I", 10**9))}, {}, "1000000000, the widest tensor has 32"),
        ({"llama.block_count": (TEXT, struct.pack("<Q", 0))}, {}, "llama.block_count is ''"),
        ({"x": (LIST, struct.pack("<IQ", 4, 2**60))}, {}, f"{2**60} items in a file of"),
        ({"x": (LIST, struct.pack("<IQ", TEXT, 2**60))}, {}, f"{2**60} strings in a file of"),
        ({"x": (LIST, struct.pack("<IQ", LIST, 1))}, {}, "an array of type 9"),
        ({}, {"big": (2**31, 2**31)}, r"big: shape \[2147483648, 2147483648\] in a file of"),
        ({}, {"deep": (1,) * 5}, "deep: 5 dimensions"),
    ],
)
def test_a_gguf_that_promises_more_than_it_holds(tmp_path, metadata, shapes, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(WHOLE, SHAPES))
    check_header(path)
    path.write_bytes(gguf(WHOLE | metadata, SHAPES | shapes))
    with pytest.raises(QoqError, match=rf"x\.gguf: GGUF cannot be read \(.*{message}"):
        open_source(str(path))


# What no mutation finds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a number from 1 to 10000"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "4 attention heads for 3 KV heads"),
        ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
        ({"quantization_config": {"group_size": 128, "modules_to_not_convert": 3}}, "3, expected a list of names"),
        ({"quantization_config": {"modules_to_not_convert": ["model.layers.9"]}}, "model.layers.9 is no linear"),
    ],
)
def test_a_config_that_no_model_has(copy_of, checkpoint_folder, change, message):
    folder = copy_of(checkpoint_folder())
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QoqError, match=message):
        Checkpoint(folder)
    assert any(message in line for line in verify.problems(folder, values=False))


def test_remote_code_is_not_asked_for(copy_of, checkpoint_folder):
    """transformers would ask at the terminal, and wait."""
    folder = copy_of(checkpoint_folder())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QoqError, match="config.json cannot be read"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", SHARD, INDEX, "qoq_report.json", "qoq_recipe.yaml"])
@pytest.mark.parametrize("kind", ["pipe", "loop", "zero"])
def test_what_is_no_regular_file(copy_of, checkpoint_folder, name, kind):
    """A pipe would block, a device never end."""
    folder = copy_of(checkpoint_folder())
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    assert verify.problems(folder, values=False) or kind == "loop" or name.startswith("qoq_")
    attempt(lambda: open_checkpoint(folder))


def test_a_source_in_a_pipe(copy_of, llama):
    folder = copy_of(llama)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(QoqError, match="not a regular file"):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b", "~nobody-at-all/x", "\udcff", "a\nb"])
def test_odd_names(name):
    """Of folders and files, wherever a command takes one."""
    readers: list[Callable[[str], object]] = [open_source, Checkpoint, is_checkpoint, recipe.load]
    readers += [lambda path: verify.problems(Path(path)), lambda path: samples(TOKENIZER, path, 1, 2, 0)]
    for read in readers:
        for suffix in ("", ".gguf", ".yaml", ".jsonl", ".parquet"):
            if suffix or read is not readers[-1]:  # a name without suffix is a data set on the hub
                attempt(partial(read, name + suffix))


def test_a_folder_whose_name_is_no_text(qoq, checkpoint_folder, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n")
    shutil.copytree(checkpoint_folder(), folder)
    (Path(folder) / SHARD).unlink()
    code, out, err = qoq("inspect", folder)
    assert (code, err) == (1, "") and r"\udcff\n: no *.safetensors; not a checkpoint" in out


def test_a_huge_sparse_tensor_is_not_read(copy_of, llama):
    """Its shape is held against the config before its bytes are."""
    folder, huge = copy_of(llama), 1 << 40
    header = {"model.norm.weight": {"dtype": "I8", "shape": [huge], "data_offsets": [0, huge]}}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + huge)
        except OSError:
            pytest.skip("no sparse files here")
    with pytest.raises(QoqError, match=rf"has shape \[{huge}\], the config says \[256\]|unable to mmap"):
        open_source(str(folder)).final_norm()


def test_a_tensor_in_two_files(copy_of, checkpoint_folder):
    folder = copy_of(checkpoint_folder())
    shutil.copyfile(folder / SHARD, folder / "more.safetensors")
    with pytest.raises(QoqError, match=r"more\.safetensors: tensor \S+ is in model-00001-of-00001"):
        Checkpoint(folder)
    assert sum("is in" in line for line in verify.problems(folder, values=False)) > 10


@given(st.text())
def test_a_line_is_printable(text):
    assert printable(text).isprintable()
    assert printable(text) == text or not text.isprintable()
    assert len(printable(text * 2000)) < 10 * LONGEST_LINE + 50
