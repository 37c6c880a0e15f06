"""Safetensors files: headers, single tensors, and atomic writing without a copy of any tensor.

https://github.com/huggingface/safetensors describes the format.
"""

import hashlib
import json
import math
import os
import reprlib
import stat
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
MAX_JSON_BYTES = 1 << 26
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
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
        CheckpointError: no such folder, no files, a file that is truncated or not safetensors, or a tensor in two.
    """
    entries: dict[str, Entry] = {}
    for path in list_files(folder):
        for name, entry in read_header(path).items():
            if name in entries:
                raise CheckpointError(f"{path}: tensor {name} is in {entries[name].path.name} too")
            entries[name] = entry
    return entries


def list_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
        CheckpointError: no such folder, or there are none.
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, it takes any name
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors; not a checkpoint")
    return files


def read_header(path: Path) -> dict[str, Entry]:
    """The entries of one safetensors file, held against its size: nothing is allocated on the header's word.

    Raises:
        CheckpointError: the file is not whole, or its header is not what the format says.
    """
    try:
        size = regular_size(path)
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, info, 8 + length) for name, info in header.items()}
        _check_layout(entries, 8 + length, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path}: truncated or damaged safetensors ({error})") from None
    return entries


def regular_size(path: Path) -> int:
    """Bytes of a file; refuses what could block or never end.

    Raises:
        OSError, ValueError: it is not there, or a folder, a pipe or a device.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    return status.st_size


def _entry(path: Path, name: str, info: Any, data: int) -> Entry:
    """One tensor of a header whose data starts at byte `data`."""
    dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
    if not name.isprintable():
        raise ValueError(f"tensor name {name!r}")
    if dtype not in BITS:
        raise ValueError(f"{name}: dtype {dtype!r}")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise ValueError(f"{name}: shape {reprlib.repr(shape)}, bytes {begin!r} to {end!r}")
    if math.prod(shape) * BITS[dtype] != 8 * (end - begin):
        raise ValueError(f"{name}: {dtype} of shape {reprlib.repr(shape)} in {end - begin} bytes")
    return Entry(path, dtype, tuple(shape), data + begin, end - begin)


def _check_layout(entries: Mapping[str, Entry], data: int, size: int) -> None:
    """Raise ValueError unless the tensors fill the file from byte `data` on, without gaps and overlaps."""
    at = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if entry.start + entry.bytes > size:
            raise ValueError(f"{name} ends at byte {entry.start + entry.bytes} of {size}")
        if entry.start != at:
            raise ValueError(f"{name} starts at byte {entry.start}, the tensor before it ends at {at}")
        at += entry.bytes
    if at != size:
        raise ValueError(f"{size - at} bytes behind the last tensor")


def read_object(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: it is no such file, or larger than `most` bytes; says which, without the path.
    """
    try:
        size = regular_size(path)
        if size > most:
            raise ValueError(f"{size} bytes, expected at most {most}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError) as error:
        raise ValueError(getattr(error, "strerror", None) or str(error)) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    if not isinstance(found, dict):
        raise ValueError("expected an object")
    return found


def read_tensor(path: Path, name: str) -> Tensor:
    """A copy of one tensor; the file is mapped only meanwhile."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).clone()
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error})") from None


def file_sha256(path: Path) -> str:
    """Of the content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


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


def cannot_write(path: Path, error: OSError | SafetensorError) -> OutputError:
    return OutputError(f"{path}: cannot write ({getattr(error, 'strerror', None) or error})")


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
        if not block:
            raise CheckpointError(f"{source.name}: ends {count} bytes early; it became shorter while it was read")
        target.write(block)
        count -= len(block)
