"""Recipes: the settings of a quantization run, frozen and validated. A YAML file is exactly these dataclasses."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from qoq import settings
from qoq.errors import RecipeError
from qoq.settings import require

GROUP_SIZES = (128, 64, -1)


@dataclass(frozen=True)
class Calibration:
    """Which text the statistics come from."""

    dataset: str = "c4"
    nsamples: int = 16
    seqlen: int = 512

    def __post_init__(self) -> None:
        require(self.nsamples >= 1, "calibration.nsamples", self.nsamples, "at least 1")
        require(self.seqlen >= 2, "calibration.seqlen", self.seqlen, "at least 2")


@dataclass(frozen=True)
class KVCache:
    """What the cache quantizer does; see `models.decoder.KVTransform` and `quant.quantize_kv`."""

    rotate: bool = False  # Hadamard of keys and queries after RoPE
    offset: bool = False  # calibrated key and value offsets
    clip_ratios: tuple[float, ...] = (1.0,)  # tried for each row of 4 bits
    layers_in_8_bits: tuple[int, ...] = ()  # whose keys and values, of all heads, have 8 bits

    def __post_init__(self) -> None:
        ok = bool(self.clip_ratios) and all(0 < ratio <= 1 for ratio in self.clip_ratios)
        require(ok, "kv_cache.clip_ratios", list(self.clip_ratios), "numbers above 0 and up to 1")
        layers = list(self.layers_in_8_bits)
        ok = all(type(layer) is int and layer >= 0 for layer in layers) and layers == sorted(set(layers))
        require(ok, "kv_cache.layers_in_8_bits", layers, "numbers of layers from 0 up, ascending, each once")

    def bits(self, layer: int, kv_bits: int = 4) -> int:
        """Of a layer's cache where `kv_bits` are asked for: a cache of 4 bits alone has exceptions."""
        return 8 if kv_bits == 4 and layer in self.layers_in_8_bits else kv_bits

    def ratios(self, bits: int) -> tuple[float, ...]:
        """That are tried for each row of so many bits: beyond 4 a search finds nothing worth its time."""
        return self.clip_ratios if bits == 4 else (1.0,)


@dataclass(frozen=True)
class Weights:
    """How weights get their codes; see `calibration.weights`."""

    grid: str = "round"  # or "search": the best legal (s2, z) of each group
    whole_zeros: bool = False  # of groups: a zero is a code, as in the 4-bit formats of other engines
    gptq: bool = False
    asymmetric: float = 0.0  # how far to aim at the full-precision model's output from the quantized model's input

    def __post_init__(self) -> None:
        require(self.grid in ("round", "search"), "weights.grid", self.grid, "'round' or 'search'")
        require(0 <= self.asymmetric <= 1, "weights.asymmetric", self.asymmetric, "between 0 and 1")


@dataclass(frozen=True)
class Recipe:
    """How to make a W4A8KV4 checkpoint."""

    name: str
    group_size: int = 128
    rotate: bool = False  # residual stream and value heads, by Hadamard matrices; norms folded
    smooth_attention: bool = False  # scale key channels down and queries up, exponents searched for each layer
    smooth_down: bool = False  # scale the input of down_proj, exponents searched for each layer
    reorder: bool = False  # sort the input channels of down_proj, so that like ones share a group
    modules_to_not_convert: tuple[str, ...] = ()  # full names of linears, or of layers, to leave in 16 bits
    kv_cache: KVCache = field(default_factory=KVCache)
    weights: Weights = field(default_factory=Weights)
    calibration: Calibration = field(default_factory=Calibration)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.name.isprintable(), "name", self.name, "printable text")
        require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2**63")
        require(self.group_size in GROUP_SIZES, "group_size", self.group_size, "128, 64 or -1 (per channel)")
        whole = self.weights.whole_zeros
        require(not whole or self.group_size > 0, "weights.whole_zeros", whole, "false where group_size is -1")


def load(name_or_path: str) -> Recipe:
    """A recipe by name (`qoq-g128`) or from a YAML file.

    Raises:
        RecipeError: no such recipe, no mapping, an unknown key, or a value of the wrong type or range.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not os.path.isfile(path):
            raise RecipeError(f"{name_or_path}: no such recipe file")
        return settings.load(Recipe, path)
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
    return settings.parse(Recipe, text, where)


def dump(recipe: Recipe) -> str:
    """YAML text that `parse` reads back to an equal recipe."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The settings as JSON has them: no tuples."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))
