"""The header of a GGUF file, walked within the bytes that are there before the libraries believe its counts.

They make lists as long as a header says. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has the format.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qoq.models.config import MAX_LAYERS
from qoq.shards import regular_size

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
WEIGHTS_PER_BYTE = 8  # of the smallest quantization types, rounded up
# Where a count is not there, transformers takes that of a model of 7B; and it makes up tensors of any width.
NEEDED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
WIDTHS = ("embedding_length", "feed_forward_length", "vocab_size", "attention.head_count", "attention.key_length")


class Reader:
    """Little-endian numbers from a file, refusing what lies behind its end."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError(f"{count} bytes at {self.file.tell()} of {self.size}")
        return self.file.read(count)

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def count(self, least: int, what: str) -> int:
        """A number of items of at least so many bytes each."""
        found = self.number("Q")
        if found * least > self.size - self.file.tell():
            raise ValueError(f"{found} {what} in a file of {self.size} bytes")
        return found

    def text(self) -> str:
        return self.take(self.count(1, "characters")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A metadata value; of an array only its length."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"metadata of type {kind}")
        item = self.number("I")
        if item in SCALARS:
            size = struct.calcsize("<" + SCALARS[item])
            found = self.count(size, "items")
            self.take(found * size)
        elif item == STRING:
            found = self.count(8, "strings")
            for _ in range(found):
                self.text()
        else:
            raise ValueError(f"an array of type {item}")
        return found


def check_header(path: Path) -> None:
    """Raise ValueError where a GGUF file promises more than it holds; other faults are left to the libraries."""
    size = regular_size(path)
    with open(path, "rb") as file:
        reader = Reader(file, size)
        if reader.take(4) != b"GGUF":
            raise ValueError("does not start with GGUF")
        if reader.number("I") not in (2, 3):
            raise ValueError("version is not 2 or 3, little-endian")
        tensors, pairs = reader.count(24, "tensors"), reader.count(13, "metadata values")
        metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(pairs)}
        shapes = [_tensor_shape(reader) for _ in range(tensors)]
    _check_sizes(metadata, shapes)


def _tensor_shape(reader: Reader) -> tuple[int, ...]:
    name, dimensions = reader.text(), reader.number("I")
    if dimensions > 4:
        raise ValueError(f"{name}: {dimensions} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dimensions))
    reader.take(12)  # type, offset
    if math.prod(shape) > WEIGHTS_PER_BYTE * reader.size:
        raise ValueError(f"{name}: shape {list(shape)} in a file of {reader.size} bytes")
    return shape


def _check_sizes(metadata: Mapping[str, Any], shapes: list[tuple[int, ...]]) -> None:
    widest = max((n for shape in shapes for n in shape), default=0)
    family = metadata.get("general.architecture")
    for name in NEEDED:
        if not isinstance(metadata.get(f"{family}.{name}"), int):
            raise ValueError(f"{family}.{name} is {metadata.get(f'{family}.{name}')!r}, expected a number")
    layers = metadata[f"{family}.block_count"]
    if not 0 < layers <= min(MAX_LAYERS, len(shapes)):
        raise ValueError(f"{family}.block_count is {layers}, with {len(shapes)} tensors")
    for name in WIDTHS:
        value = metadata.get(f"{family}.{name}", 0)
        if isinstance(value, int) and value > widest:
            raise ValueError(f"{family}.{name} is {value}, the widest tensor has {widest}")
    heads, width = metadata[f"{family}.attention.head_count"], metadata.get(f"{family}.attention.key_length", 1)
    if not isinstance(width, int) or heads * width > widest:
        raise ValueError(f"{heads} heads of {width}, the widest tensor has {widest}")
