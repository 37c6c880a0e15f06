"""Recipes: the settings of a quantization run, frozen and validated. A YAML file is exactly these dataclasses."""

import dataclasses
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
class SmoothAttention:
    """Divide post-RoPE keys by max|K| ** alpha and multiply queries by it (QServe 4.2)."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        _require(0 <= self.alpha <= 1, "smooth_attention.alpha", self.alpha, "between 0 and 1")


@dataclass(frozen=True)
class Recipe:
    """How to make a W4A8KV4 checkpoint."""

    name: str = "qoq-g128"
    group_size: int = 128
    rotate: bool = True
    smooth_attention: SmoothAttention | None = field(default_factory=SmoothAttention)
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
        return parse(path.read_text(encoding="utf-8"), str(path))
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
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)


def _build(cls: type, data: Any, prefix: str) -> Any:
    if not isinstance(data, dict):
        raise RecipeError(f"{prefix.rstrip('.') or 'recipe'}: {data!r}, expected a mapping")
    hints = typing.get_type_hints(cls)
    unknown = [str(key) for key in data if key not in hints]
    if unknown:
        raise RecipeError(f"unknown key {prefix}{unknown[0]}; known are {', '.join(hints)}")
    return cls(**{key: _value(hints[key], value, prefix + key) for key, value in data.items()})


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
