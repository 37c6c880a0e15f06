"""Safetensors files: headers, single tensors, and atomic writing without a copy of any tensor.

https://github.com/huggingface/safetensors describes the format.
"""

import json
import operator
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qoq.errors import CheckpointError, OutputError

MAX_SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class Entry:
    """A tensor as the header of its file describes it."""

    path: Path
    dtype: str  # safetensors' name: F16, I8, ...
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    bytes: int


def read_entries(folder: Path) -> dict[str, Entry]:
    """Tensor name -> entry, over all safetensors files of a folder.

    Raises:
        CheckpointError: no such folder, no files, or a file that is truncated or not safetensors.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors; not a checkpoint")
    return {name: entry for path in files for name, entry in read_header(path).items()}


def read_header(path: Path) -> dict[str, Entry]:
    """The entries of one safetensors file."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, info in header.items():
            begin, end = info["data_offsets"]
            shape = tuple(operator.index(n) for n in info["shape"])
            entries[name] = Entry(path, str(info["dtype"]), shape, 8 + length + begin, end - begin)
            if not 0 <= begin <= end or 8 + length + end > size:
                raise ValueError(f"{name} ends at byte {8 + length + end} of {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path}: truncated or damaged safetensors ({error})") from None
    return entries


def read_tensor(path: Path, name: str) -> Tensor:
    """A copy of one tensor; the file is mapped only meanwhile."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).clone()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error})") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, then rename it: the file is whole or absent.

    Tensors lie on the CPU; no copy of them is made.

    Raises:
        OutputError: the disk is full or not writable.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    kinds = {name: (names[tensor.dtype], tensor.shape, tensor.nbytes) for name, tensor in tensors.items()}
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            file.write(_header(kinds, metadata or {}))
            for tensor in tensors.values():
                flat = tensor.contiguous().flatten()  # a dimension of 1 may have any stride
                file.write(flat.view(torch.uint8).numpy().data)
        os.replace(draft, path)
    except OSError as error:
        raise cannot_write(path, error) from None


def _header(kinds: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file: name -> dtype, shape and bytes, in the order of the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, (dtype, shape, size) in kinds.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_bytes(path: Path, content: bytes | str) -> None:
    """Atomic write of a small file; raises as `write_tensors`."""
    draft = path.with_name(path.name + ".tmp")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(draft, path)
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: cannot write ({error.strerror or error})")


def write_shards(folder: Path, files: Iterable[Path], max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Merge safetensors files into numbered shards with an index, copying bytes: no tensor is loaded.

    Tensors keep the order of `files` and their order within a file.
    """
    shards: list[dict[str, Entry]] = [{}]
    for path in files:
        for name, entry in read_header(path).items():
            if shards[-1] and sum(e.bytes for e in shards[-1].values()) + entry.bytes > max_bytes:
                shards.append({})
            shards[-1][name] = entry
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(entry.bytes for shard in shards for entry in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_bytes(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, entries: Mapping[str, Entry]) -> None:
    try:
        with open(path, "wb") as shard:
            shard.write(_header({name: (e.dtype, e.shape, e.bytes) for name, e in entries.items()}, {}))
            for entry in entries.values():
                with open(entry.path, "rb") as part:
                    part.seek(entry.start)
                    _copy(part, shard, entry.bytes)
    except OSError as error:
        raise cannot_write(path, error) from None


def _copy(source: Any, target: Any, count: int, chunk: int = 1 << 22) -> None:
    while count:
        block = source.read(min(chunk, count))
        target.write(block)
        count -= len(block)
