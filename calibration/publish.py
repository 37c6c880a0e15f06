"""The finished folder: shards, config, tokenizer and card, verified before it gets its name."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq import checkpoint, layout, recipe, shards
from qoq.calibration import card, pad
from qoq.calibration.work import Work
from qoq.errors import CheckpointError, OutputError
from qoq.model_card import LICENCE_FILES
from qoq.models.architecture import LINEARS, ModelSpec
from qoq.models.source import Source
from qoq.quant import HalfLinear, StoredLinear
from qoq.recipe import Recipe

CARRIED_FILES = (*LICENCE_FILES, "chat_template.jinja", "generation_config.json")


def publish(
    source: Source, spec: ModelSpec, settings: Recipe, tokenizer: Any, report: Mapping[str, Any], work: Work
) -> None:
    """Make the folder from the parts of a run, verify it, and give it its final name."""
    _assemble(source, spec, settings, tokenizer, work)
    _describe(source, spec, settings, report, work)
    verify(work, spec)
    work.finish()


def _assemble(source: Source, spec: ModelSpec, settings: Recipe, tokenizer: Any, work: Work) -> None:
    """Merge the parts into shards and write config and tokenizer beside them."""
    if work.draft.exists():
        shutil.rmtree(work.draft)
    try:
        work.draft.mkdir()
        shards.write_shards(work.draft, [work.path(part) for part in _parts(spec)])
        tokenizer.save_pretrained(work.draft)
        for pattern in CARRIED_FILES:
            for path in filter(Path.is_file, source.folder.glob(pattern)):
                shutil.copyfile(path, work.draft / path.name)
    except OSError as error:
        raise work.keep(shards.cannot_write(work.draft, error)) from None
    except OutputError as error:
        raise work.keep(error) from None
    config = json.loads((source.folder / "config.json").read_text())
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        config.pop(key, None)
    config |= pad.config_changes(spec) | {
        "tie_word_embeddings": False,
        "dtype": "float16",
        "torch_dtype": "float16",
        "quantization_config": layout.quantization_config(
            settings.group_size, settings.kv_cache, layout.half_linears(spec, settings.modules_to_not_convert)
        ),
    }
    shards.write_bytes(work.draft / "config.json", json.dumps(config, indent=2) + "\n")


def _parts(spec: ModelSpec) -> list[str]:
    return ["embed", *(f"layer-{index:05d}" for index in range(spec.num_layers)), "head"]


def _describe(source: Source, spec: ModelSpec, settings: Recipe, report: Mapping[str, Any], work: Work) -> None:
    """Write recipe, report, with the hashes of the shards, and model card."""
    files = {path.name: shards.file_sha256(path) for path in shards.list_files(work.draft)}
    left = layout.half_linears(spec, settings.modules_to_not_convert)
    licences = sorted(path.name for pattern in LICENCE_FILES for path in work.draft.glob(pattern))
    shards.write_bytes(work.draft / "qoq_recipe.yaml", recipe.dump(settings))
    record = json.dumps({**report, "files": files}, indent=2, allow_nan=False)
    shards.write_bytes(work.draft / "qoq_report.json", record + "\n")
    shards.write_bytes(work.draft / "README.md", card.text(source, settings, report, left, licences))


def verify(work: Work, spec: ModelSpec) -> None:
    """Re-read the draft, unpack it, and compare it bit for bit with what calibration held.

    Raises:
        CheckpointError: names the first tensor that differs.
    """
    made = checkpoint.Checkpoint(work.draft)
    expected: dict[str, str] = {}
    for part in _parts(spec):
        expected |= work.report(part)["digests"]
    for index in range(spec.num_layers):
        for name in LINEARS:
            full = f"model.layers.{index}.{name}"
            _compare(full, linear_digest(made.linear(index, name)), expected.pop(full))
    for name, value in expected.items():
        _compare(name, digest(made.tensor(name)), value)


def _compare(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise CheckpointError(f"{name}: what was written differs from what was calibrated; the work folder is kept")


def linear_digest(linear: StoredLinear) -> str:
    """sha256 over integers, scales and bias of a linear, or over its 16-bit weights and bias."""
    parts = [linear.weight] if isinstance(linear, HalfLinear) else [*vars(linear.weight).values()]
    return digest(*parts, *([] if linear.bias is None else [linear.bias]))


def digest(*tensors: Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    value = hashlib.sha256()
    for tensor in tensors:
        value.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        value.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return value.hexdigest()
