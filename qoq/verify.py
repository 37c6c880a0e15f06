"""Every fault of a checkpoint folder, one line each: what it is in, what was found, what was expected."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qoq import packing, recipe, shards
from qoq.checkpoint import Checkpoint
from qoq.errors import CheckpointError, QoqError, printable
from qoq.layout import Kinds
from qoq.models.architecture import LINEARS
from qoq.models.decoder import rotary_embedding
from qoq.models.source import read_index
from qoq.quant import MAX_S2
from qoq.shards import Entry

BYTES_AT_ONCE = 1 << 26  # of a tensor
FOREIGN = ("rotary_emb.inv_freq", "kv_scale_quant_orig")  # in folders of others, and of no use


def problems(folder: Path, values: bool = True) -> list[str]:
    """Names, shapes, dtypes and the files beside them; with `values` also every tensor, and the tokenizer.

    Raises:
        CheckpointError: there is no such folder.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: no such folder")
    return [printable(line) for line in _problems(folder, values)]


def _problems(folder: Path, values: bool) -> Iterator[str]:
    found: list[str] = []
    entries, damaged = _read_entries(folder, found)
    yield from found
    if not entries:
        return
    try:
        checkpoint = Checkpoint(folder, check=False, entries=entries)
        found = list(_headers(checkpoint, damaged))
        yield from found
        rotary_embedding(checkpoint.config)
    except QoqError as error:
        yield str(error)
        return
    yield from _index(checkpoint, damaged)
    yield from _documents(checkpoint)
    if values:
        wrong = list(_values(checkpoint)) if _expected(checkpoint) else []
        yield from wrong
        if not (found or damaged or wrong):
            yield from _hashes(checkpoint)
        try:
            checkpoint.tokenizer()
        except QoqError as error:
            yield str(error)


def _read_entries(folder: Path, found: list[str]) -> tuple[dict[str, Entry], set[str]]:
    """The tensors of all files that can be read, and the names of those that cannot; faults go to `found`."""
    entries: dict[str, Entry] = {}
    damaged = set()
    try:
        for path in shards.list_files(folder):
            try:
                header = shards.read_header(path)
            except CheckpointError as error:
                damaged.add(path.name)
                found.append(str(error))
                continue
            for name in header.keys() & entries.keys():
                found.append(f"{path}: tensor {name} is in {entries[name].path.name} too")
            entries = header | entries
    except CheckpointError as error:
        found.append(str(error))
    return entries, damaged


def _headers(checkpoint: Checkpoint, damaged: set[str]) -> Iterator[str]:
    """As `Checkpoint.header_problems`, but what is lost with a damaged file is told once."""
    lines, expected = checkpoint.header_problems(), _expected(checkpoint)
    if not expected:
        yield from lines
        return
    if not damaged:
        yield from lines
    else:
        missing = {checkpoint.tensor_problem(name) for name in expected if name not in checkpoint.entries}
        yield from (line for line in lines if line not in missing)
        if missing:
            yield f"{checkpoint.folder}: {len(missing)} of {len(expected)} tensors are in no file that can be read"
    for name in checkpoint.entries:
        if name not in expected and not name.endswith(FOREIGN):
            yield f"{name}: no tensor of this model, expected none of this name"


def _expected(checkpoint: Checkpoint) -> Kinds:
    """The tensors that config.json promises, none where it is at fault."""
    try:
        return checkpoint.expected
    except CheckpointError:
        return {}


def _index(checkpoint: Checkpoint, damaged: set[str]) -> Iterator[str]:
    """Where the index and the files differ; other programs believe the index."""
    folder, entries = checkpoint.folder, checkpoint.entries
    path = folder / shards.INDEX
    if not path.exists():
        return
    try:
        weight_map = read_index(path)
    except ValueError as error:
        yield f"{path}: not a safetensors index ({error})"
        return
    for file in sorted(set(weight_map.values())):
        if not os.path.isfile(folder / file):
            yield f"{path}: names {file}, which is not there"
    wrong = [name for name, entry in entries.items() if weight_map.get(name) != entry.path.name]
    if wrong:
        said = weight_map.get(wrong[0], "no file")
        yield f"{path}: says that {wrong[0]} is in {said}, it is in {entries[wrong[0]].path.name}{_more(wrong)}"
    known = entries.keys() | _expected(checkpoint).keys()  # those that are missing have been told
    absent = [name for name, file in weight_map.items() if name not in known and file not in damaged]
    if absent:
        yield f"{path}: names tensor {absent[0]}, which no file has{_more(absent)}"


def _documents(checkpoint: Checkpoint) -> Iterator[str]:
    """The recipe and the report, where they are there."""
    path = checkpoint.folder / "qoq_recipe.yaml"
    try:
        checkpoint.report()
        if path.exists():
            made = recipe.load(str(path)).group_size
            if made != checkpoint.group_size:
                yield f"{path}: group_size is {made}, the tensors have group size {checkpoint.group_size}"
    except QoqError as error:
        yield str(error)


def _values(checkpoint: Checkpoint) -> Iterator[str]:
    """What is wrong inside tensors whose headers are right."""
    right = {name for name in checkpoint.expected if checkpoint.tensor_problem(name) is None}
    for name in checkpoint.expected:
        if name in right and checkpoint.entries[name].dtype == "F16":
            yield from _not_finite(checkpoint.entries[name].path, name)
    if checkpoint.group_size == -1:
        return
    for index in range(checkpoint.spec.num_layers):
        for linear in LINEARS:
            full = f"model.layers.{index}.{linear}"
            names = [f"{full}.{suffix}" for suffix in ("qweight", "s2_scales", "s2_zeros")]
            if right.issuperset(names):
                try:
                    yield from _groups(full, *(checkpoint.tensor(name) for name in names))
                except CheckpointError as error:
                    yield str(error)


def _not_finite(path: Path, name: str) -> Iterator[str]:
    """NaN and Inf in a float16 tensor, read in pieces."""
    bad, first = 0, ""
    try:
        with safe_open(path, framework="pt") as file:
            rows = file.get_slice(name)
            shape = rows.get_shape()
            step = max(1, BYTES_AT_ONCE // (2 * (shape[1] if len(shape) > 1 else 1)))
            for start in range(0, shape[0], step):
                part = rows[start : start + step]
                broken = ~torch.isfinite(part)
                if not first and broken.any():
                    row, *rest = (int(i) for i in broken.nonzero()[0])
                    first = f"{[start + row, *rest]} is {float(part[(row, *rest)])}"
                bad += int(broken.sum())
    except (SafetensorError, OSError) as error:
        yield f"{path}: {name} cannot be read ({error})"
    if bad:
        yield f"{name}: NaN or Inf: {first}, expected finite numbers{_and(bad - 1)}"


def _groups(full: str, qweight: Tensor, s2_scales: Tensor, s2_zeros: Tensor) -> Iterator[str]:
    """Groups that break the rules of `quant.check_legal`."""
    codes, s2 = packing.unpack_qweight(qweight), packing.unpack_level2(s2_scales)
    out = (s2 < 1) | (s2 > MAX_S2)
    if out.any():
        row, group = (int(i) for i in out.nonzero()[0])
        value = int(s2[row, group])
        yield (
            f"{full}.s2_scales: row {row}, group {group} is illegal: {value}, expected 1..{MAX_S2}"
            f"{_and(int(out.sum()) - 1)}"
        )
    broken = packing.find_zeros(s2_zeros, codes, s2)[1] & ~out
    if broken.any():
        what = packing.explain_zero(broken, s2_zeros, codes, s2)
        yield f"{full}.s2_zeros: {what}, expected int8{_and(int(broken.sum()) - 1)}"


def _hashes(checkpoint: Checkpoint) -> Iterator[str]:
    """Files that are legal but no longer those that were written."""
    for name, expected in checkpoint.report().get("files", {}).items():
        path = checkpoint.folder / str(name)
        if path.parent == checkpoint.folder and os.path.isfile(path):
            found = shards.file_sha256(path)
            if found != expected:
                yield f"{path}: sha256 {found[:16]}..., expected {str(expected)[:16]}...: changed since it was written"


def _more(names: list[str]) -> str:
    return _and(len(names) - 1)


def _and(others: int) -> str:
    return f" (and {others} more)" if others else ""
