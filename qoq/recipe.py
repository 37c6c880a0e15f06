"""Recipes: the settings of a quantization run, frozen and validated. A YAML file is exactly these dataclasses."""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from qoq.errors import RecipeError

GROUP_SIZES = (128, 64, -1)


@dataclass(frozen=True)
class Calibration:
    """Which text the statistics come from."""

    dataset: str = "c4"
    nsamples: int = 16
    seqlen: int = 512

    def __post_init__(self) -> None:
        _require(self.nsamples >= 1, "calibration.nsamples", self.nsamples, "at least 1")
        _require(self.seqlen >= 2, "calibration.seqlen", self.seqlen, "at least 2")


@dataclass(frozen=True)
class KVCache:
    """What the 4-bit cache quantizer does; see `models.decoder.KVTransform` and `quant.quantize_kv`."""

    rotate: bool = False  # Hadamard of keys and queries after RoPE
    offset: bool = False  # calibrated key and value offsets
    clip_ratios: tuple[float, ...] = (1.0,)  # tried for each row

    def __post_init__(self) -> None:
        ok = bool(self.clip_ratios) and all(0 < ratio <= 1 for ratio in self.clip_ratios)
        _require(ok, "kv_cache.clip_ratios", list(self.clip_ratios), "numbers above 0 and up to 1")


@dataclass(frozen=True)
class Weights:
    """How weights get their codes; see `calibration.weights`."""

    grid: str = "round"  # or "search": the best legal (s2, z) of each group
    gptq: bool = False
    asymmetric: float = 0.0  # how far to aim at the full-precision model's output from the quantized model's input

    def __post_init__(self) -> None:
        _require(self.grid in ("round", "search"), "weights.grid", self.grid, "'round' or 'search'")
        _require(0 <= self.asymmetric <= 1, "weights.asymmetric", self.asymmetric, "between 0 and 1")


@dataclass(frozen=True)
class Recipe:
    """How to make a W4A8KV4 checkpoint."""

    name: str
    group_size: int = 128
    rotate: bool = False  # residual stream and value heads, by Hadamard matrices; norms folded
    smooth_attention: bool = False  # scale key channels down and queries up, exponents searched for each layer
    smooth_down: bool = False  # scale the input of down_proj, exponents searched for each layer
    reorder: bool = False  # sort the input channels of down_proj, so that like ones share a group
    kv_cache: KVCache = field(default_factory=KVCache)
    weights: Weights = field(default_factory=Weights)
    calibration: Calibration = field(default_factory=Calibration)
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.group_size in GROUP_SIZES, "group_size", self.group_size, "128, 64 or -1 (per channel)")


def _require(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise RecipeError(f"{key}: {value!r}, expected {expected}")


def load(name_or_path: str) -> Recipe:
    """A recipe by name (`qoq-g128`) or from a YAML file.

    Raises:
        RecipeError: no such recipe, no mapping, an unknown key, or a value of the wrong type or range.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise RecipeError(f"{name_or_path}: no such recipe file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        return parse(text, str(path))
    if name_or_path not in names():
        raise RecipeError(f"{name_or_path!r}: no such recipe; there are {', '.join(names())}, or a .yaml file")
    text = resources.files("qoq.recipes").joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
    return parse(text, name_or_path)


def names() -> list[str]:
    """The recipes that ship with the package."""
    files = (entry.name for entry in resources.files("qoq.recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def parse(text: str, where: str = "recipe") -> Recipe:
    """Read YAML text; `where` starts every error message."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
    try:
        return _build(Recipe, data, "")
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def dump(recipe: Recipe) -> str:
    """YAML text that `parse` reads back to an equal recipe."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The settings as JSON has them: no tuples."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _build(cls: type, data: Any, prefix: str) -> Any:
    if not isinstance(data, dict):
        raise RecipeError(f"{prefix.rstrip('.') or 'recipe'}: {data!r}, expected a mapping")
    hints = typing.get_type_hints(cls)
    unknown = [str(key) for key in data if key not in hints]
    if unknown:
        raise RecipeError(f"unknown key {prefix}{unknown[0]}; known are {', '.join(hints)}")
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in data and _has_no_default(f)]
    if missing:
        raise RecipeError(f"key {prefix}{missing[0]} is missing")
    return cls(**{key: _value(hints[key], value, prefix + key) for key, value in data.items()})


def _has_no_default(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, key: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, key + ".")
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        _require(isinstance(value, list), key, value, "a list")
        return tuple(_value(item, entry, f"{key}[{index}]") for index, entry in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(type(value) is kind, key, value, f"of type {kind.__name__}")
    return value
