"""Settings from YAML: a file is exactly a frozen dataclass, an unknown key or a value of another type is an error."""

import dataclasses
import re
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qoq.errors import RecipeError

MAX_BYTES = 1 << 20  # of a file; PyYAML reads a megabyte in some seconds

Settings = TypeVar("Settings")


def require(ok: bool, key: str, value: object, expected: str) -> None:
    """Raise RecipeError for a setting that is out of range; what is shown of the value is short."""
    if not ok:  # aliases make a small file a value of any size
        raise RecipeError(f"{key}: {reprlib.repr(value)}, expected {expected}")


def load(cls: type[Settings], path: Path) -> Settings:
    """The settings in a YAML file.

    Raises:
        RecipeError: it cannot be read, is no mapping, has an unknown key, or a value of the wrong type or range.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: larger than {MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    return parse(cls, text, str(path))


def parse(cls: type[Settings], text: str, where: str) -> Settings:
    """The settings in YAML text; `where` starts every message."""
    try:
        data = yaml.safe_load(text)
    except Exception as error:  # PyYAML raises its own, and of odd dates, numbers and depths whatever comes
        raise RecipeError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
    try:
        return _build(cls, data, "")
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _build(cls: type, data: Any, prefix: str) -> Any:
    require(isinstance(data, dict), prefix.rstrip(".") or cls.__name__.lower(), data, "a mapping")
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
        require(isinstance(value, list), key, value, "a list")
        return tuple(_value(item, entry, f"{key}[{index}]") for index, entry in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 2**53, key, value, "a number below 2**53")
        return float(value)
    if kind is float and isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.IGNORECASE):
        return float(value)  # 1e-3, which YAML 1.1 takes for a string
    require(type(value) is kind, key, value, f"of type {kind.__name__}")
    return value
