"""A checkpoint folder: QServe's tensors under Hugging Face names. Write, read, validate.

    config.json generation_config.json tokenizer files      as the source has them, plus quantization_config
    model-0000i-of-0000N.safetensors + index                shards of at most 5 GB
    qoq_recipe.yaml qoq_report.json README.md

`layout` says which tensors there are. The kind of a folder is read off them, so QServe's published folders, which have
no quantization_config, open too.
"""

import reprlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq import packing
from qoq.errors import CheckpointError, ModelError, QuantizationError, RecipeError
from qoq.layout import LEVEL2, OFFSETS, Kinds, check_cache_layers, expected_tensors, half_linears
from qoq.models.architecture import LINEARS, ModelSpec, model_spec
from qoq.models.config import load_config
from qoq.models.decoder import KVTransform, QuantizedLayer
from qoq.quant import (
    ChannelWeight,
    GroupedWeight,
    HalfLinear,
    QuantizedLinear,
    QuantizedWeight,
    StoredLinear,
    check_legal,
    is_finite,
)
from qoq.recipe import KVCache
from qoq.settings import require
from qoq.shards import DTYPES, Entry, read_entries, read_object, read_tensor

# Linears


def pack_linear(name: str, linear: StoredLinear) -> dict[str, Tensor]:
    """The tensors of one linear, checked for legality first (see `quant.check_legal`)."""
    weight = linear.weight
    if isinstance(weight, Tensor):
        tensors = {"weight": weight} if linear.bias is None else {"weight": weight, "bias": linear.bias}
        return {f"{name}.{suffix}": tensor.contiguous().cpu() for suffix, tensor in tensors.items()}
    check_legal(weight, f"{name}.qweight")
    tensors = {"qweight": packing.pack_qweight(weight.codes), "s1_scales": weight.s1}
    if isinstance(weight, ChannelWeight):
        tensors["s1_szeros"] = weight.szero
    else:
        tensors["s2_scales"] = packing.pack_level2(weight.s2)
        tensors["s2_zeros"] = packing.pack_zeros(weight.z)
    if linear.bias is not None:
        tensors["bias"] = linear.bias
    return {f"{name}.{suffix}": tensor.contiguous().cpu() for suffix, tensor in tensors.items()}


def unpack_linear(name: str, tensors: Mapping[str, Tensor]) -> StoredLinear:
    """The inverse of `pack_linear`.

    Raises:
        CheckpointError: an illegal group; names the tensor.
    """
    if f"{name}.weight" in tensors:
        return HalfLinear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))
    codes = packing.unpack_qweight(tensors[f"{name}.qweight"])
    s1 = tensors[f"{name}.s1_scales"]
    weight: QuantizedWeight
    if f"{name}.s1_szeros" in tensors:
        weight = ChannelWeight(codes, s1, tensors[f"{name}.s1_szeros"])
    else:
        s2 = packing.unpack_level2(tensors[f"{name}.s2_scales"])
        z = packing.unpack_zeros(tensors[f"{name}.s2_zeros"], codes, s2, f"{name}.s2_zeros")
        weight = GroupedWeight(codes, s1, s2, z)
    try:
        check_legal(weight, f"{name}.qweight")
    except QuantizationError as error:
        raise CheckpointError(str(error)) from None
    return QuantizedLinear(weight, tensors.get(f"{name}.bias"))


def to_fp16(name: str, tensor: Tensor) -> Tensor:
    """Cast to float16.

    Raises:
        QuantizationError: a value leaves the range of float16.
    """
    half = tensor.to(torch.float16)
    if not is_finite(half):
        raise QuantizationError(f"{name}: |value| up to {float(tensor.abs().max()):.4g} exceeds float16 (65504)")
    return half


# Reading


class Checkpoint:
    """An existing checkpoint folder; tensors are read on demand.

    `entries` are its tensors, where they are known already.

    Raises:
        CheckpointError: no config, no safetensors, not a QoQ folder, a config that contradicts the tensors,
            or, unless `check` is off, a tensor that is missing or has the wrong shape or dtype.
    """

    def __init__(self, folder: str | Path, check: bool = True, entries: Mapping[str, Entry] | None = None):
        self.folder = Path(folder)
        self.entries = read_entries(self.folder) if entries is None else entries
        found = detect_group_size(self.entries)
        if found is None:
            raise CheckpointError(f"{self.folder}: no *.s2_scales and no *.s1_szeros; not a QoQ checkpoint")
        self.group_size = found
        problems = self.header_problems() if check else []
        if problems:
            more = f" (and {len(problems) - 1} more; see qoq inspect)" if len(problems) > 1 else ""
            raise CheckpointError(problems[0] + more)

    @cached_property
    def config(self) -> Any:
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(f"{self.folder}: no config.json; expected a checkpoint folder")
        try:
            return load_config(self.folder, str(self.folder))
        except ModelError as error:
            raise CheckpointError(str(error)) from None

    @cached_property
    def spec(self) -> ModelSpec:
        return model_spec(self.config, str(self.folder))

    @cached_property
    def declared(self) -> dict[str, Any]:
        """quantization_config, empty where config.json has none."""
        found = getattr(self.config, "quantization_config", None) or {}
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{self.folder}/config.json: quantization_config is {reprlib.repr(found)}, expected an object"
            )
        return found

    @cached_property
    def kv_cache(self) -> KVCache:
        """What the cache quantizer does; a folder of QServe's says nothing and has the plain one."""
        declared = self.declared.get("kv_cache") or {}
        try:
            ratios = tuple(float(ratio) for ratio in declared.get("clip_ratios", [1.0]))
            known = declared.get("rotation") in (None, "hadamard") and declared.get("bits", 4) == 4
            if not known:
                raise ValueError("rotation must be null or 'hadamard', bits 4")
            layers = declared.get("layers_in_8_bits", [])
            require(isinstance(layers, list), "kv_cache.layers_in_8_bits", layers, "a list")
            rotate, offset = declared.get("rotation") == "hadamard", bool(declared.get("offset"))
            found = KVCache(rotate, offset, ratios, tuple(layers))
            check_cache_layers(self.spec, found)
            return found
        except (RecipeError, QuantizationError) as error:
            raise CheckpointError(f"{self.folder}/config.json: quantization_config.{error}") from None
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{self.folder}/config.json: quantization_config.kv_cache: {error}") from None

    @cached_property
    def half_precision(self) -> frozenset[str]:
        """Full names of the linears that are left in 16 bits."""
        names = self.declared.get("modules_to_not_convert") or []
        try:
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise QuantizationError(f"modules_to_not_convert: {reprlib.repr(names)}, expected a list of names")
            return half_linears(self.spec, names)
        except QuantizationError as error:
            raise CheckpointError(f"{self.folder}/config.json: quantization_config.{error}") from None

    def header_problems(self) -> list[str]:
        """What config, names, shapes and dtypes say is wrong, one line each."""
        problems = []
        declared = self.declared.get("group_size", self.group_size)
        if declared != self.group_size:
            problems.append(
                f"{self.folder}/config.json: quantization_config.group_size is {reprlib.repr(declared)}, "
                f"the tensors have group size {self.group_size}"
            )
        try:
            expected = self.expected
        except CheckpointError as error:
            return [*problems, str(error)]
        for name in expected:
            problem = self.tensor_problem(name)
            if problem:
                problems.append(problem)
        return problems

    @cached_property
    def expected(self) -> Kinds:
        """The tensors that config.json promises -> dtype and shape."""
        return expected_tensors(self.spec, self.group_size, self.kv_cache, self.half_precision)

    def tensor_problem(self, name: str) -> str | None:
        """What the headers say is wrong with one of the `expected` tensors."""
        entry, (dtype, shape) = self.entries.get(name), self.expected[name]
        if entry is None:
            return (
                f"{self.folder}: tensor {name} is missing, expected {str(dtype).removeprefix('torch.')} {list(shape)}"
            )
        if entry.shape != shape:
            return f"{name}: shape {list(entry.shape)}, expected {list(shape)}"
        if DTYPES.get(entry.dtype) != dtype:
            return f"{name}: dtype {entry.dtype}, expected {str(dtype).removeprefix('torch.')}"
        return None

    def tensor(self, name: str) -> Tensor:
        """One tensor, a copy of its own."""
        return read_tensor(self.entries[name].path, name)

    def linear_tensors(self, full: str) -> dict[str, Tensor]:
        """The tensors of the linear with this full name, by theirs."""
        names = (f"{full}.{suffix}" for suffix in ("weight", "qweight", "s1_scales", "s1_szeros", *LEVEL2, "bias"))
        return {name: self.tensor(name) for name in names if name in self.expected}

    def linear(self, index: int, name: str) -> StoredLinear:
        """One linear of layer `index`, unpacked and checked."""
        full = f"model.layers.{index}.{name}"
        return unpack_linear(full, self.linear_tensors(full))

    def layer(self, index: int) -> QuantizedLayer:
        """Layer `index`, unpacked and checked."""
        prefix = f"model.layers.{index}."
        offsets = [self.tensor(prefix + name) for name in OFFSETS] if self.kv_cache.offset else []
        return QuantizedLayer(
            {name: self.linear(index, name) for name in LINEARS},
            {name: self.tensor(f"{prefix}{name}.weight") for name in self.spec.norm_shapes()},
            KVTransform(self.kv_cache.rotate, *offsets),
        )

    def tokenizer(self) -> Any:
        from qoq.models.source import load_tokenizer

        return load_tokenizer(self.folder, str(self.folder))

    def report(self) -> dict[str, Any]:
        """qoq_report.json, empty where there is none.

        Raises:
            CheckpointError: it is none of ours.
        """
        path = self.folder / "qoq_report.json"
        if not path.is_file():
            return {}
        try:
            report = read_object(path)
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON ({error})") from None
        for key, kind in (("model", str), ("recipe", dict), ("layers", list), ("files", dict)):
            if not isinstance(report.get(key, kind()), kind):
                raise CheckpointError(f"{path}: {key} is {reprlib.repr(report[key])}, expected a {kind.__name__}")
        return report


def detect_group_size(entries: Mapping[str, Entry]) -> int | None:
    """128 or 64 from the rows of the first *.s2_scales, -1 for *.s1_szeros, None for neither."""
    for name, entry in entries.items():
        if name.endswith(".s1_szeros"):
            return -1
        codes = entries.get(name.replace("s2_scales", "qweight"))
        if name.endswith(".s2_scales") and codes and len(codes.shape) == len(entry.shape) == 2 and all(entry.shape):
            return max(1, codes.shape[1] * 2 // entry.shape[0])
    return None


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds QoQ tensors, or, damaged, has a config that says so."""
    folder = Path(folder)
    try:
        found = detect_group_size(read_entries(folder))
    except CheckpointError:
        found = None
    return found is not None or _declares_qoq(folder)


def _declares_qoq(folder: Path) -> bool:
    try:
        return read_object(folder / "config.json")["quantization_config"]["quant_method"] == "qoq"
    except (ValueError, KeyError, TypeError):
        return False
