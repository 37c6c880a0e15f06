"""What a conversion reads: a model's linears as QoQ's integers, and its other tensors, one at a time.

`Origin` is the common face; a format is a subclass that says which tensors a linear has and how they become
integers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq.checkpoint import Checkpoint, to_fp16
from qoq.errors import CheckpointError, ModelError, first_line
from qoq.formats.affine import Loss
from qoq.formats.tensors import Tensors
from qoq.layout import OFFSETS
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LINEARS, LM_HEAD, ModelSpec, model_spec
from qoq.models.config import load_config
from qoq.quant import QuantizedLinear, QuantizedWeight, StoredLinear
from qoq.recipe import KVCache
from qoq.shards import read_object

# The cache of a foreign model: everything that needs no calibration, since it costs nothing and helps any model.
FOREIGN_CACHE = KVCache(rotate=True, offset=False, clip_ratios=(1.0, 0.96, 0.92, 0.88, 0.84))
Shapes = Mapping[str, tuple[int, ...]]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        return read_object(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def spec_of(folder: Path) -> ModelSpec:
    """The dimensions that a folder's config.json gives.

    Raises:
        CheckpointError: it cannot be read.
        ModelError: an architecture that is not supported.
    """
    try:
        config = load_config(folder, str(folder))
    except ModelError as error:
        raise CheckpointError(str(error)) from None
    return model_spec(config, str(folder))


class Origin(ABC):
    """A folder that can be converted. `described_by` has config and tokenizer: itself, or the base model's folder."""

    format: str
    kv_cache: KVCache = FOREIGN_CACHE
    half_precision: frozenset[str] = frozenset()  # full names of the linears in 16 bits
    group_size: int
    spec: ModelSpec
    described_by: Path
    model: str | None = None  # the unquantized model, where the folder names it

    @abstractmethod
    def linear(self, index: int, name: str) -> tuple[StoredLinear, Loss]:
        """A linear of `LINEARS` in layer `index`, checked, and what importing it changed."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Any other tensor, float16."""

    def other_tensors(self, index: int) -> list[str]:
        """Names of what layer `index` has beside its linears."""
        return [f"model.layers.{index}.{norm}.weight" for norm in self.spec.norm_shapes()]

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.described_by)


class OwnFolder(Origin):
    """A checkpoint of ours."""

    format = "qoq"

    def __init__(self, folder: Path):
        self._checkpoint = Checkpoint(folder)
        self.described_by = folder
        self.spec, self.group_size = self._checkpoint.spec, self._checkpoint.group_size
        self.kv_cache, self.half_precision = self._checkpoint.kv_cache, self._checkpoint.half_precision
        self.model = self._checkpoint.report().get("model")

    def linear(self, index: int, name: str) -> tuple[StoredLinear, Loss]:
        return self._checkpoint.linear(index, name), Loss(0, 0, 0, 0)

    def tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name)

    def other_tensors(self, index: int) -> list[str]:
        offsets = OFFSETS if self.kv_cache.offset else ()
        return [*super().other_tensors(index), *(f"model.layers.{index}.{name}" for name in offsets)]


class ForeignFolder(Origin):
    """A folder of another program's: a Hugging Face config, and tensors under Hugging Face names.

    Raises:
        CheckpointError: any tensor is missing or of the wrong shape; a linear is not quantized.
    """

    def __init__(self, folder: Path, described_by: Path | None = None):
        self.folder = folder
        self.described_by = described_by or folder
        self.spec = spec_of(self.described_by)
        self.tensors = self.open()
        try:
            self.group_size = self.find_group_size()
        # anything may stand in someone's config
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            where = f"{self.described_by}/config.json: quantization_config"
            raise CheckpointError(f"{where} is not as {self.format} has it ({first_line(error)})") from None
        if self.group_size not in (128, 64, -1):
            raise CheckpointError(f"{folder}: group size {self.group_size}, expected 128, 64 or -1 (per channel)")
        self._check_headers()

    def open(self) -> Tensors:
        return Tensors(self.folder)

    @abstractmethod
    def find_group_size(self) -> int:
        """128, 64, or -1 for per channel."""

    @abstractmethod
    def weight_shapes(self, n: int, k: int) -> Shapes:
        """Suffix -> shape of the tensors that hold the weight of an N x K linear."""

    @abstractmethod
    def weight(self, name: str) -> tuple[QuantizedWeight, Loss]:
        """The weight of the linear of this full name."""

    def linear(self, index: int, name: str) -> tuple[QuantizedLinear, Loss]:
        full = f"model.layers.{index}.{name}"
        weight, loss = self.weight(full)
        return QuantizedLinear(weight, self.tensor(f"{full}.bias") if name in self.spec.biases else None), loss

    def tensor(self, name: str) -> Tensor:
        return to_fp16(name, self.tensors.read(self.stored_name(name)))

    def stored_name(self, name: str) -> str:
        """Tied models store one matrix for both."""
        tied = name == LM_HEAD and name not in self.tensors and self.spec.tied_embeddings
        return EMBEDDING if tied else name

    def expected_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor a conversion will read, and its shape."""
        spec = self.spec
        matrix = (spec.vocab_size, spec.hidden_size)
        yield from ((EMBEDDING, matrix), (FINAL_NORM, (spec.hidden_size,)), (LM_HEAD, matrix))
        for index in range(spec.num_layers):
            prefix = f"model.layers.{index}."
            yield from ((f"{prefix}{norm}.weight", (n,)) for norm, n in spec.norm_shapes().items())
            for name in LINEARS:
                n, k = spec.linear_shape(name)
                yield from ((f"{prefix}{name}.{key}", shape) for key, shape in self.weight_shapes(n, k).items())
                if name in spec.biases:
                    yield f"{prefix}{name}.bias", (n,)

    def _check_headers(self) -> None:
        """Stops at the first fault, so that a config of any number of layers costs nothing."""
        for name, shape in self.expected_shapes():
            stored = self.stored_name(name)
            if stored not in self.tensors:
                plain = name.rsplit(".", 1)[0] + ".weight"
                found = f"; {plain} is there, unquantized" if plain in self.tensors else ""
                raise CheckpointError(f"{self.folder}: tensor {name} is missing{found}")
            if self.tensors.shapes[stored] != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {list(self.tensors.shapes[stored])}, expected {list(shape)}"
                )

    def read_all(self, name: str, *suffixes: str) -> list[Tensor]:
        return [self.tensors.read(f"{name}.{suffix}") for suffix in suffixes]


def require_dtype(name: str, tensor: Tensor, *expected: torch.dtype) -> Tensor:
    """The tensor itself.

    Raises:
        CheckpointError: it has another dtype; names it.
    """
    if tensor.dtype not in expected:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        raise CheckpointError(f"{name}: dtype {str(tensor.dtype).removeprefix('torch.')}, expected {known}")
    return tensor
