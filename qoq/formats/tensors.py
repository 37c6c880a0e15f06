"""The tensors of a foreign folder, by name, read one at a time: safetensors, or pickles without their code."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from qoq.errors import CheckpointError, first_line
from qoq.shards import DTYPES, read_header, read_tensor

# What trainers leave beside the weights; QServe's loader skips the same files.
NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}


class Tensors:
    """Names, shapes and dtypes of all tensors of a folder, and the tensors on demand.

    Safetensors if there are any, else every `.bin` and `.pt`: what QServe's loader takes. Pickles are read with
    `weights_only=True`, so that none of their code runs, and mapped, so that only what is used is in memory.

    Raises:
        CheckpointError: no weights, a damaged file, a pickle that holds more than tensors, or a name in two files.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | None] = {}
        self._files: dict[str, Path] = {}
        self._pickled: dict[str, Tensor] = {}
        for path in weight_files(folder) if files is None else files:
            if path.suffix == ".safetensors":
                for name, entry in read_header(path).items():
                    self._add(name, path, entry.shape, DTYPES.get(entry.dtype))
            else:
                for name, tensor in load_pickle(path).items():
                    self._add(name, path, tuple(tensor.shape), tensor.dtype)
                    self._pickled[name] = tensor

    def _add(self, name: str, path: Path, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        if name in self._files:
            raise CheckpointError(f"{path}: {name} is in {self._files[name].name} as well; which one is meant?")
        self.shapes[name], self.dtypes[name], self._files[name] = shape, dtype, path

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, name: str) -> Tensor:
        """One tensor, a copy of its own.

        Raises:
            CheckpointError: it is not there, or not of a dtype that is read.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        if self.dtypes[name] is None:
            raise CheckpointError(f"{self.folder}: {name} has a dtype that no 4-bit format uses")
        pickled = self._pickled.get(name)
        return read_tensor(self._files[name], name) if pickled is None else pickled.clone()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights.

    Raises:
        CheckpointError: there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickles = [path for pattern in ("*.bin", "*.pt") for path in sorted(folder.glob(pattern))]
        found = [path for path in pickles if path.name not in NOT_WEIGHTS]
    if not found:
        raise CheckpointError(f"{folder}: no *.safetensors, *.bin or *.pt; not a checkpoint")
    return found


def load_pickle(path: Path) -> Mapping[str, Tensor]:
    """A state dict that torch.save wrote; values that are no tensors are refused.

    Raises:
        CheckpointError: as above, or the file is damaged, or asks for code to be run.
    """
    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        try:
            content: Any = load(mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = load()  # torch's format before 1.6 cannot be mapped
    except UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, it holds more than tensors ({first_line(error)})") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path}: damaged or not a torch file ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    content = {name: value for name, value in content.items() if value is not None}  # deepcompressor: no zero
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise CheckpointError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor")
    return content
