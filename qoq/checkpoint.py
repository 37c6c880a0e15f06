"""A checkpoint folder: QServe's tensors under Hugging Face names. Write, read, validate.

    config.json generation_config.json tokenizer files      as the source has them, plus quantization_config
    model-0000i-of-0000N.safetensors + index                shards of at most 5 GB
    qoq_recipe.yaml qoq_report.json README.md

Each linear is `qweight` (N, K/2) int8, `s1_scales` (N,) fp16 and, grouped, `s2_scales`, `s2_zeros` (K/g, N)
int8, or, per channel, `s1_szeros` (N,) fp16; `bias` (N,) fp16 if the model has one. Norms, embeddings and
lm_head are fp16. The kind of a folder is read off its tensors, so QServe's published folders, which have no
quantization_config, open too.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq import packing
from qoq.errors import CheckpointError, QuantizationError, RecipeError
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LINEARS, LM_HEAD, ModelSpec, model_spec
from qoq.models.decoder import KVTransform, QuantizedLayer
from qoq.quant import ChannelWeight, GroupedWeight, QuantizedLinear, QuantizedWeight, check_legal, is_finite
from qoq.recipe import KVCache
from qoq.shards import DTYPES, Entry, read_entries, read_tensor

OFFSETS = ("self_attn.k_offset", "self_attn.v_offset")  # of the cache quantizer, QServe has none


# Names and shapes


def check_group_size(spec: ModelSpec, group_size: int) -> None:
    """Refuse shapes that the format cannot hold, before any work.

    Raises:
        QuantizationError: N % 32 != 0 or K % group != 0; says which tensor and which group sizes fit.
    """
    for name in LINEARS:
        n, k = spec.linear_shape(name)
        if n % packing.TILE or k % packing.TILE:
            raise QuantizationError(f"{name} is {n} x {k}; the format needs both to be multiples of {packing.TILE}")
        if group_size != -1 and k % group_size:
            fits = [str(size) for size in (128, 64) if all(spec.linear_shape(x)[1] % size == 0 for x in LINEARS)]
            raise QuantizationError(
                f"{name}: {k} input features are not a multiple of group size {group_size}; "
                f"fitting here: --group-size {' or '.join([*fits, '-1'])} (-1: per channel)"
            )


def linear_tensors(n: int, k: int, group_size: int, bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> dtype and shape of the tensors of an N x K linear."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "qweight": (torch.int8, (n, k // 2)),
        "s1_scales": (torch.float16, (n,)),
    }
    if group_size == -1:
        tensors["s1_szeros"] = (torch.float16, (n,))
    else:
        tensors |= {suffix: (torch.int8, (k // group_size, n)) for suffix in ("s2_scales", "s2_zeros")}
    if bias:
        tensors["bias"] = (torch.float16, (n,))
    return tensors


def expected_tensors(
    spec: ModelSpec, group_size: int, kv_cache: KVCache
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Every tensor of a checkpoint -> dtype and shape."""
    half, hidden = torch.float16, spec.hidden_size
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {EMBEDDING: (half, (spec.vocab_size, hidden))}
    for index in range(spec.num_layers):
        prefix = f"model.layers.{index}."
        for norm, length in spec.norm_shapes().items():
            tensors[f"{prefix}{norm}.weight"] = (half, (length,))
        if kv_cache.offset:
            for name in OFFSETS:
                tensors[prefix + name] = (half, (spec.num_kv_heads, spec.head_dim))
        for name in LINEARS:
            parts = linear_tensors(*spec.linear_shape(name), group_size, name in spec.biases)
            tensors |= {f"{prefix}{name}.{suffix}": kind for suffix, kind in parts.items()}
    tensors[FINAL_NORM] = (half, (hidden,))
    tensors[LM_HEAD] = (half, (spec.vocab_size, hidden))
    return tensors


def size_in_bytes(spec: ModelSpec, group_size: int, kv_cache: KVCache) -> int:
    """Bytes of all tensors of a checkpoint."""
    kinds = expected_tensors(spec, group_size, kv_cache).values()
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in kinds)


def pack_linear(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one linear, checked for legality first (see `quant.check_legal`)."""
    weight = linear.weight
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


def unpack_linear(name: str, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """The inverse of `pack_linear`.

    Raises:
        CheckpointError: an illegal group; names the tensor.
    """
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


def quantization_config(group_size: int, kv_cache: KVCache) -> dict[str, Any]:
    """What config.json says of the checkpoint; the first three keys are what QServe's users had to write by hand."""
    return {
        "quant_method": "qoq",
        "wbits": 4,
        "group_size": group_size,
        "version": 1,
        "activation": {"bits": 8, "granularity": "token"},
        "kv_cache": {
            "bits": 4,
            "granularity": "token_head",
            "symmetric": False,
            "rotation": "hadamard" if kv_cache.rotate else None,
            "offset": kv_cache.offset,
            "clip_ratios": list(kv_cache.clip_ratios),
        },
        "modules_to_not_convert": ["lm_head"],
    }


# Reading


class Checkpoint:
    """An existing checkpoint folder; tensors are read on demand.

    Raises:
        CheckpointError: no config, no safetensors, not a QoQ folder, a config that contradicts the tensors,
            or, unless `check` is off, a tensor that is missing or has the wrong shape or dtype.
    """

    def __init__(self, folder: str | Path, check: bool = True):
        self.folder = Path(folder)
        self.entries = read_entries(self.folder)
        self.group_size = self._detect_group_size()
        problems = self.header_problems() if check else []
        if problems:
            more = f" (and {len(problems) - 1} more; see qoq inspect)" if len(problems) > 1 else ""
            raise CheckpointError(problems[0] + more)

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        path = self.folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{self.folder}: no config.json; expected a checkpoint folder")
        try:
            return AutoConfig.from_pretrained(self.folder)
        except Exception as error:  # transformers raises many kinds here
            raise CheckpointError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None

    @cached_property
    def spec(self) -> ModelSpec:
        return model_spec(self.config, str(self.folder))

    def _detect_group_size(self) -> int:
        found = detect_group_size(self.entries)
        if found is None:
            raise CheckpointError(f"{self.folder}: no *.s2_scales and no *.s1_szeros; not a QoQ checkpoint")
        declared = (getattr(self.config, "quantization_config", None) or {}).get("group_size", found)
        if declared != found:
            raise CheckpointError(
                f"{self.folder}/config.json: quantization_config.group_size is {declared}, "
                f"the tensors have group size {found}"
            )
        return found

    @cached_property
    def kv_cache(self) -> KVCache:
        """What the cache quantizer does; a folder of QServe's says nothing and has the plain one."""
        declared = (getattr(self.config, "quantization_config", None) or {}).get("kv_cache") or {}
        try:
            ratios = tuple(float(ratio) for ratio in declared.get("clip_ratios", [1.0]))
            known = declared.get("rotation") in (None, "hadamard") and declared.get("bits", 4) == 4
            if not known:
                raise ValueError("rotation must be null or 'hadamard', bits 4")
            return KVCache(declared.get("rotation") == "hadamard", bool(declared.get("offset")), ratios)
        except (ValueError, TypeError, AttributeError, RecipeError) as error:
            raise CheckpointError(f"{self.folder}/config.json: quantization_config.kv_cache: {error}") from None

    def header_problems(self) -> list[str]:
        """What names, shapes and dtypes say is wrong, one line each."""
        problems = []
        for name, (dtype, shape) in expected_tensors(self.spec, self.group_size, self.kv_cache).items():
            entry = self.entries.get(name)
            if entry is None:
                problems.append(f"{self.folder}: tensor {name} is missing")
            elif entry.shape != shape:
                problems.append(f"{name}: shape {list(entry.shape)}, expected {list(shape)}")
            elif DTYPES.get(entry.dtype) != dtype:
                problems.append(f"{name}: dtype {entry.dtype}, expected {str(dtype).removeprefix('torch.')}")
        return problems

    def tensor(self, name: str) -> Tensor:
        """One tensor, a copy of its own."""
        return read_tensor(self.entries[name].path, name)

    def linear(self, index: int, name: str) -> QuantizedLinear:
        """One linear of layer `index`, unpacked and checked."""
        full = f"model.layers.{index}.{name}"
        suffixes = linear_tensors(*self.spec.linear_shape(name), self.group_size, name in self.spec.biases)
        return unpack_linear(full, {f"{full}.{suffix}": self.tensor(f"{full}.{suffix}") for suffix in suffixes})

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
        """qoq_report.json, empty where there is none."""
        path = self.folder / "qoq_report.json"
        try:
            report = json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON ({error})") from None
        if not isinstance(report, dict):
            raise CheckpointError(f"{path}: expected an object")
        return report

    def problems(self) -> Iterable[str]:
        """Read everything and yield one line for each fault: headers, finite values, legal groups."""
        yield from self.header_problems()
        for index in range(self.spec.num_layers):
            for name in LINEARS:
                try:
                    self.linear(index, name)
                except CheckpointError as error:
                    yield str(error)
                except (KeyError, RuntimeError, ValueError):
                    continue  # missing or misshapen: named above
        for name in (name for name, entry in self.entries.items() if entry.dtype == "F16"):
            try:
                if not torch.isfinite(self.tensor(name)).all():
                    yield f"{name}: NaN or Inf"
            except CheckpointError as error:
                yield str(error)


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
        return json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "qoq"
    except (OSError, ValueError, KeyError, TypeError):
        return False
