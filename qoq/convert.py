"""Other formats in and out, layer by layer: every folder becomes QoQ's integers, and those any of `TARGETS`.

Names and shapes of all tensors are checked before anything is written, each weight before its layer is, and the
output gets its name once everything is in it: nothing is left behind by a conversion that fails.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qoq import checkpoint, layout, shards
from qoq.errors import CheckpointError, OutputError, QuantizationError
from qoq.formats import compressed_tensors, humming, parallel
from qoq.formats.affine import Loss, loss_between
from qoq.formats.card import card
from qoq.formats.deepcompressor import Dump, is_dump
from qoq.formats.gptq import AWQFolder, GPTQFolder
from qoq.formats.origin import Origin, OwnFolder, read_config
from qoq.formats.qserve import QServeFolder
from qoq.model_card import LICENCE_FILES
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LINEARS, LM_HEAD
from qoq.quant import HalfLinear, QuantizedLinear, QuantizedWeight

MAX_ERROR = 0.05  # of a weight; rounding to 4 bits itself costs about 0.1
CARRIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*"),
    *("generation_config.json", "qoq_recipe.yaml", *LICENCE_FILES),
)
Made = tuple[dict[str, Tensor], Loss]


@dataclass(frozen=True)
class Target:
    """A format to write: the tensors of a linear's weight, and what config.json says of them."""

    weight: Callable[[str, QuantizedWeight], Made]
    config: Callable[[Origin], dict[str, Any] | None]
    packed: bool = False  # in QServe's tiles
    mixed: bool = True  # linears in 16 bits may stand beside


def _half_weight(name: str, weight: QuantizedWeight) -> Made:
    exact = weight.dequantize()
    half = checkpoint.to_fp16(f"{name}.weight", exact)
    return {f"{name}.weight": half}, loss_between(half.float(), exact, 0, 0)


def _packed_weight(name: str, weight: QuantizedWeight) -> Made:
    return checkpoint.pack_linear(name, QuantizedLinear(weight, None)), Loss(0, 0, 0, 0)


def _own_config(origin: Origin) -> dict[str, Any]:
    return layout.quantization_config(origin.group_size, origin.kv_cache, origin.half_precision)


def _qserve_config(origin: Origin) -> dict[str, Any]:
    """What SGLang reads; QServe takes it from its command line."""
    return {"quant_method": "qoq", "wbits": 4, "group_size": origin.group_size}


TARGETS: Mapping[str, Target] = {
    "qoq": Target(_packed_weight, _own_config, packed=True),
    "qserve": Target(_packed_weight, _qserve_config, packed=True, mixed=False),
    "hf": Target(_half_weight, lambda origin: None),
    "compressed-tensors": Target(
        compressed_tensors.pack_weight,
        lambda origin: compressed_tensors.pack_config(origin.group_size, origin.half_precision),
    ),
    "compressed-tensors-w8a8": Target(
        compressed_tensors.int8_weight, lambda origin: compressed_tensors.int8_config(origin.half_precision)
    ),
    "humming": Target(humming.humming_weight, lambda origin: humming.humming_config(origin.group_size), mixed=False),
}


def open_origin(folder: Path, base: Path | None = None, level2_order: str | None = None) -> Origin:
    """The folder as what it is. `base` is the folder of the model a dump was made from.

    Raises:
        CheckpointError: an unknown format, or a folder that is not whole.
    """
    if is_dump(folder):
        if base is None:
            raise CheckpointError(f"{folder}: a deepcompressor dump has no config; name its model with --base")
        return Dump(folder, base)
    declared = read_config(folder).get("quantization_config") or {}
    method = declared.get("quant_method") if isinstance(declared, dict) else None
    readers: dict[str, Callable[[Path], Origin]] = {
        "awq": AWQFolder,
        "gptq": GPTQFolder,
        "compressed-tensors": compressed_tensors.CompressedTensorsFolder,
    }
    if method == "qoq" and "version" in declared:
        return OwnFolder(folder)
    if isinstance(method, str) and method in readers:
        return readers[method](folder)
    if method not in (None, "qoq"):
        known = ", ".join(("qoq", *readers))
        raise CheckpointError(f"{folder}: quant_method is {method!r}; read are {known}, and QServe's folders")
    return QServeFolder(folder, level2_order)


def convert(
    origin: Origin,
    output: Path,
    to: str,
    *,
    max_error: float = MAX_ERROR,
    tensor_parallel: int = 1,
    base_model: str | None = None,
    on_layer: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Write `origin` as a folder of format `to`; with `tensor_parallel` > 1 as one folder for each rank in it.

    `max_error` bounds |W' - W| / |W| of every linear. `base_model` is named in the card. Returns what is also in
    the folder's qoq_conversion.json: formats, notes, and by layer what the conversion changed.

    Raises:
        CheckpointError, QuantizationError: the source is damaged, or the format cannot hold it.
        OutputError: the output exists or cannot be written.
    """
    target = TARGETS[to]
    _check(origin, output, to, tensor_parallel)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise shards.cannot_write(output, error) from None
    try:
        writer = _Writer(draft, origin, target, tensor_parallel)
        layers = []
        for index in range(origin.spec.num_layers):
            layers.append(writer.layer(index, max_error))
            if on_layer is not None:
                on_layer(layers[-1])
        writer.rest()
        report = {
            "model": base_model or origin.model,
            "from": origin.format,
            "to": to,
            "group_size": origin.group_size,
            "tensor_parallel": tensor_parallel,
            "notes": _notes(origin, to, writer.norms_are_ones),
            "error": max(layer["error"] for layer in layers),
            "layers": layers,
        }
        made = writer.assemble(report, card(origin, report))
        if to == "qoq" and tensor_parallel == 1:
            checkpoint.Checkpoint(made)
        if output.is_dir():
            output.rmdir()
        made.rename(output)
    except OSError as error:
        raise shards.cannot_write(output, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return report


def _check(origin: Origin, output: Path, to: str, size: int) -> None:
    """Refuse what cannot succeed, before any work."""
    target, spec, group = TARGETS[to], origin.spec, origin.group_size
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputError(f"{output}: exists; remove it or name another --output")
    if to == origin.format == "qoq" and size == 1:
        raise QuantizationError("the folder is a checkpoint of qoq already; choose another --to")
    layout.check_group_size(spec, group)
    if to == "qserve" and group == 64:
        raise QuantizationError("groups of 64 are an extension of qoq; QServe's kernels know 128 and per channel")
    if origin.half_precision and not target.mixed:
        known = ", ".join(name for name, other in TARGETS.items() if other.mixed and name != "qoq")
        raise QuantizationError(
            f"--to {to} has no linears in 16 bits, {min(origin.half_precision)} is one; formats that have: {known}"
        )
    if to == "qserve":
        for name in LINEARS:
            n, k = spec.linear_shape(name)
            if n % 64 or k % 128:
                raise QuantizationError(f"{name} is {n} x {k}; QServe's kernels need multiples of 64 and 128")
    if to == "compressed-tensors-w8a8" and group == -1:
        raise QuantizationError("per-channel weights have zero points, which W8A8 has not; use --to compressed-tensors")
    if size > 1 and not target.packed:
        raise QuantizationError(f"--tp cuts packed weights (--to qoq or qserve); engines cut {to} folders themselves")
    reason = parallel.why_not(spec, group, size)
    if reason is not None:
        legal = ", ".join(map(str, parallel.legal_degrees(spec, group)))
        raise QuantizationError(f"--tp {size} cuts through {reason}; legal degrees here: {legal}")


def _notes(origin: Origin, to: str, norms_are_ones: bool) -> list[str]:
    notes = []
    if to == "qserve" and not norms_are_ones:
        notes.append(
            "norm weights are not 1: QServe and OmniServe ignore them and compute another model; SGLang reads them"
        )
    if isinstance(origin, QServeFolder) and origin.order == "deepcompressor":
        notes.append("level-2 scales stood in deepcompressor's order and were put into the kernels' order")
    if origin.half_precision and to != "hf":
        notes.append(f"{len(origin.half_precision)} linears were in 16 bits and are")
    return notes


class _Writer:
    """The draft of an output: parts as they are made, then folders of shards."""

    def __init__(self, draft: Path, origin: Origin, target: Target, ranks: int):
        self.draft, self.origin, self.target, self.ranks = draft, origin, target, ranks
        self.norms_are_ones = True
        self._parts: list[list[Path]] = [[] for _ in range(ranks)]

    def layer(self, index: int, max_error: float) -> dict[str, Any]:
        """Convert and write a layer; returns its errors."""
        per_rank: list[dict[str, Tensor]] = [{} for _ in range(self.ranks)]
        errors, rounded, groups = {}, 0, 0
        for name in LINEARS:
            full = f"model.layers.{index}.{name}"
            linear, imported = self.origin.linear(index, name)
            if isinstance(linear, HalfLinear):
                tensors, exported = {f"{full}.weight": linear.weight}, Loss(0, 0, 0, 0)
            else:
                tensors, exported = self.target.weight(full, linear.weight)
            errors[name] = imported.relative + exported.relative
            rounded += imported.rounded + exported.rounded
            groups += max(imported.groups, exported.groups)
            if not errors[name] <= max_error:
                raise QuantizationError(_too_much(full, errors[name], max_error, imported, exported))
            if linear.bias is not None:
                tensors[f"{full}.bias"] = linear.bias
            self._add_linear(full, name, tensors, per_rank)
        for full in self.origin.other_tensors(index):
            if self._is_kept(full):
                for part in per_rank:
                    part[full] = self._other(full)
        self._write(f"layer-{index:05d}", per_rank)
        return {"layer": index, "error": max(errors.values()), "rounded": rounded, "groups": groups, "linears": errors}

    def _add_linear(self, full: str, name: str, tensors: dict[str, Tensor], per_rank: list[dict[str, Tensor]]) -> None:
        if self.ranks == 1:
            per_rank[0] |= tensors
            return
        suffixes = {key.removeprefix(f"{full}."): tensor for key, tensor in tensors.items()}
        for rank, part in enumerate(per_rank):
            cut = parallel.cut(name, suffixes, rank, self.ranks)
            part |= {f"{full}.{suffix}": tensor for suffix, tensor in cut.items()}

    def _is_kept(self, name: str) -> bool:
        """Offsets belong to our cache quantizer: attention without it is the same function."""
        return self.target is TARGETS["qoq"] or not name.endswith(layout.OFFSETS)

    def _other(self, name: str) -> Tensor:
        tensor = self.origin.tensor(name)
        if "norm" in name:
            self.norms_are_ones &= bool((tensor == 1).all())
        return tensor

    def rest(self) -> None:
        """Embedding, final norm and lm_head, whole on every rank."""
        self._write("embed", [{EMBEDDING: self._other(EMBEDDING)}] * self.ranks, first=True)
        head = {FINAL_NORM: self._other(FINAL_NORM), LM_HEAD: self._other(LM_HEAD)}
        self._write("head", [head] * self.ranks)

    def _write(self, part: str, per_rank: list[dict[str, Tensor]], first: bool = False) -> None:
        for rank, tensors in enumerate(per_rank):
            path = self.draft / f"{part}-{rank}.safetensors"
            shards.write_tensors(path, tensors)
            self._parts[rank].insert(0 if first else len(self._parts[rank]), path)

    def assemble(self, report: Mapping[str, Any], readme: str) -> Path:
        """The finished folder, still under a name of its own."""
        made = self.draft / "folder"
        made.mkdir()
        for rank, parts in enumerate(self._parts):
            folder = made if self.ranks == 1 else made / f"rank-{rank}"
            folder.mkdir(exist_ok=True)
            shards.write_shards(folder, parts)
            for path in parts:
                path.unlink()
            self._describe(folder, rank)
            self._tell_origin(folder, report["model"])
        shards.write_bytes(made / "qoq_conversion.json", json.dumps(report, indent=2) + "\n")
        shards.write_bytes(made / "README.md", readme)
        return made

    def _describe(self, folder: Path, rank: int) -> None:
        """Config and tokenizer beside the weights."""
        config = {
            key: value
            for key, value in self.origin.config.items()
            if key not in ("_name_or_path", "quantization_config")
        }
        config |= {"tie_word_embeddings": False, "dtype": "float16", "torch_dtype": "float16"}
        quantization = self.target.config(self.origin)
        if quantization is not None:
            if self.ranks > 1:
                quantization |= {"tensor_parallel": {"rank": rank, "size": self.ranks}}
            config["quantization_config"] = quantization
        shards.write_bytes(folder / "config.json", json.dumps(config, indent=2) + "\n")
        for pattern in CARRIED:
            for path in self.origin.described_by.glob(pattern):
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)

    def _tell_origin(self, folder: Path, model: str | None) -> None:
        """How the source was made, as its qoq_report.json says, with the hashes of these files."""
        path = self.origin.described_by / "qoq_report.json"
        try:
            found = shards.read_object(path) if path.is_file() else {}
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON ({error})") from None
        if model and self.target is TARGETS["qoq"]:
            found = {"model": model} | found
        if found:
            found |= {"files": {path.name: shards.file_sha256(path) for path in shards.list_files(folder)}}
            shards.write_bytes(folder / "qoq_report.json", json.dumps(found, indent=2) + "\n")


def _too_much(name: str, error: float, bound: float, imported: Loss, exported: Loss) -> str:
    """Why a weight is refused, and what to do instead."""
    said = f"{name}: the conversion would change the weight by {error:.1%}, more than --max-error {bound:g} allows"
    if exported.relative > imported.relative:
        share = exported.rounded / max(exported.groups, 1)
        return (
            f"{said}: {share:.0%} of its groups have zeros that no 4-bit zero point holds. A recipe with weights."
            "whole_zeros (qoq-g128-int4) makes zeros that fit; --to compressed-tensors-w8a8 and --to hf take any"
        )
    return f"{said}: its group scales are no multiples, 1 to 17 times, of one scale a row"
