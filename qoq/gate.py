"""A quality gate: limits on what a checkpoint may lose, a verdict, and the smallest change that would pass.

A budget is a YAML file of `Budget`; what it does not name is not limited. Estimates of a change start from what was
measured and take away shares by the report of the run (`calibration.insight`): KL divergence adds up over causes that
do not know of each other, the logarithm of the perplexity ratio and the tail follow the mean, and the share of tokens
whose best guess changes follows its root. They are estimates: the next run measures. Where calibration tokens were few,
weights fit them better than other text, and the report blames the cache for too much.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qoq import settings
from qoq.checkpoint import Checkpoint
from qoq.errors import CheckpointError, RecipeError
from qoq.layout import half_linears, kv_bytes, size_in_bytes
from qoq.models.architecture import LINEARS, ModelSpec
from qoq.settings import require

LEAST = ("same_top1", "tokens_per_second")  # limits from below; all others are from above
QUALITY = ("perplexity_ratio", "mean_kl", "p99_kl", "same_top1")
WEIGHT_CAUSES = ("w4", "a8")  # what leaving a layer in 16 bits takes away
CACHE_CAUSES = ("k4", "v4")  # what caching a layer in 8 bits takes away, but for CACHE_REST
CAUSES = (*WEIGHT_CAUSES, *CACHE_CAUSES)
CACHE_REST = (15 / 255) ** 2  # a 255th of the range for a step instead of a 15th; divergence goes with its square


@dataclass(frozen=True)
class Speed:
    """The batch that `tokens_per_second` is of; as `qoq bench throughput`."""

    batch_size: int = 64
    input_len: int = 1024
    output_len: int = 512
    rounds: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value >= 1, f"speed.{name}", value, "at least 1")


@dataclass(frozen=True)
class Budget:
    """Limits on a checkpoint, and what they are measured on."""

    text: str | None = None  # of the quality limits: as `qoq compare --text`
    seqlen: int = 2048
    windows: int | None = None  # of the text; all
    perplexity_ratio: float | None = None  # at most, of the original's perplexity
    mean_kl: float | None = None  # at most, nats
    p99_kl: float | None = None  # at most, nats
    same_top1: float | None = None  # at least, share of tokens
    size_bytes: int | None = None  # at most, of all tensors
    tokens_per_second: float | None = None  # at least, out of the engine
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self) -> None:
        require(bool(self.limits()), "budget", None, "at least one limit")
        require(self.text is not None or not self.measures_quality, "text", self.text, "a text, to measure quality on")
        require(self.seqlen >= 2, "seqlen", self.seqlen, "at least 2")
        require(self.windows is None or self.windows >= 1, "windows", self.windows, "at least 1")
        for name, limit in self.limits().items():
            require(0 < limit < math.inf, name, limit, "a number above 0")
        require(self.same_top1 is None or self.same_top1 <= 1, "same_top1", self.same_top1, "a share, up to 1")

    def limits(self) -> dict[str, float]:
        """Name -> limit, of those that are set."""
        names = (*QUALITY, "size_bytes", "tokens_per_second")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def measures_quality(self) -> bool:
        return any(name in QUALITY for name in self.limits())


def load(path: Path) -> Budget:
    """A budget from its file.

    Raises:
        RecipeError: no such file, or a fault in it.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such budget file")
    return settings.load(Budget, path)


@dataclass(frozen=True)
class Check:
    """One limit and what was measured."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """NaN never does."""
        return self.value >= self.limit if self.name in LEAST else self.value <= self.limit

    @property
    def bound(self) -> str:
        return "at least" if self.name in LEAST else "at most"


def check(budget: Budget, measured: Mapping[str, float]) -> list[Check]:
    """Each limit of a budget against what was measured, by the limits' names."""
    return [Check(name, float(measured[name]), limit) for name, limit in budget.limits().items()]


def accepted(checks: Sequence[Check]) -> bool:
    return all(one.passed for one in checks)


@dataclass(frozen=True)
class Change:
    """A change of the recipe that is estimated to pass, with what it would give."""

    recipe: dict[str, Any]  # keys to set
    why: str
    estimate: dict[str, float]  # by the limits' names


def smallest_change(checkpoint: Checkpoint, budget: Budget, checks: Sequence[Check]) -> Change | str:
    """What to change so that all limits are kept, or why nothing is known to be enough."""
    failed = {one.name for one in checks if not one.passed}
    if "tokens_per_second" in failed:
        return "no change of the recipe is known to make it faster"
    measured = {one.name: one.value for one in checks}
    if failed == {"size_bytes"}:
        return _smaller(checkpoint, measured["size_bytes"], budget.limits()["size_bytes"])
    if "size_bytes" in failed:
        return "quality asks for more bytes and the size for fewer; no change is known to give both"
    return _exceptions(checkpoint, budget, measured)


def _smaller(checkpoint: Checkpoint, size: float, limit: float) -> Change | str:
    """Another layout of the weights: its size is known, its quality is not."""
    group, half = checkpoint.group_size, checkpoint.half_precision
    quantized: dict[str, Any] = {"modules_to_not_convert": []} if half else {}
    channel: dict[str, Any] = {"group_size": -1} if group != -1 else {}
    if channel and _has_whole_zeros(checkpoint):
        channel["weights.whole_zeros"] = False  # of groups alone
    choices = (
        (quantized, "with no linear in 16 bits", group, frozenset[str]()),
        (channel, "with per-channel weights", -1, half),
        (quantized | channel, "with per-channel weights and no linear in 16 bits", -1, frozenset[str]()),
    )
    for recipe, what, group_size, left in choices:
        found = size_in_bytes(checkpoint.spec, group_size, checkpoint.kv_cache, left)
        if recipe and found <= limit:
            why = f"{what} it has {found} bytes instead of {size:.0f}; quality is to be measured"
            return Change(recipe, why, {"size_bytes": found})
    return "no layout of these weights is that small: the embeddings stay in 16 bits"


def _has_whole_zeros(checkpoint: Checkpoint) -> bool:
    """Whether its recipe asked for them, as far as its report says."""
    try:
        return bool(checkpoint.report()["recipe"]["weights"]["whole_zeros"])
    except (CheckpointError, LookupError, TypeError):
        return False


def _exceptions(checkpoint: Checkpoint, budget: Budget, measured: Mapping[str, float]) -> Change | str:
    """As few layers as are estimated to be enough, the worst ones first, and what to do to them.

    An 8-bit cache is tried first, since it makes no checkpoint larger; then their linears in 16 bits; then these beside
    an 8-bit cache of all layers.
    """
    try:
        losses = _losses(checkpoint)
    except CheckpointError as error:
        return str(error)
    wide, half = checkpoint.kv_cache.layers_in_8_bits, checkpoint.half_precision
    eight = [layer for layer in losses.worst(CACHE_CAUSES) if layer not in wide]
    sixteen = [
        layer
        for layer in losses.worst(WEIGHT_CAUSES)
        if not all(f"model.layers.{layer}.{name}" in half for name in LINEARS)
    ]
    some = [sixteen[:count] for count in range(1, len(sixteen))]  # one layer at least stays quantized
    choices: list[tuple[list[int], list[int]]] = [(eight[:count], []) for count in range(1, len(eight) + 1)]
    choices += [([], left) for left in some] + [(eight, left) for left in some]
    too_large = ""
    for cached, left in choices:
        saved = (1 - CACHE_REST) * losses.part(CACHE_CAUSES, cached) + losses.part(WEIGHT_CAUSES, left)
        estimate = {**measured, **_estimate(measured, max(0.0, 1 - saved))}
        if all(one.passed for one in check(budget, estimate) if one.name in QUALITY):
            found = _change(checkpoint, budget, sorted(cached), sorted(left), estimate)
            if isinstance(found, Change):
                return found
            too_large = too_large or found
    return too_large or "it is estimated to be too much with an 8-bit cache and all layers but one in 16 bits"


def _change(
    checkpoint: Checkpoint, budget: Budget, cached: list[int], left: list[int], estimate: dict[str, float]
) -> Change | str:
    """The change that gives layers an 8-bit cache, or leaves them in 16 bits, beside those that are so already.

    Or why its size is not allowed.
    """
    spec, kv_cache, recipe, why = checkpoint.spec, checkpoint.kv_cache, dict[str, Any](), []
    if cached:
        wide = replace(kv_cache, layers_in_8_bits=tuple(sorted({*cached, *kv_cache.layers_in_8_bits})))
        recipe["kv_cache.layers_in_8_bits"] = list(wide.layers_in_8_bits)
        sizes = f"{kv_bytes(spec, wide)} bytes a token instead of {kv_bytes(spec, kv_cache)}"
        why.append(f"cache {_listed(cached, spec)} in 8 bits: {sizes}")
    if left:
        names = [f"model.layers.{layer}" for layer in left]
        names += sorted(name for name in checkpoint.half_precision if int(name.split(".")[2]) not in left)
        size = size_in_bytes(spec, checkpoint.group_size, kv_cache, half_linears(spec, names))
        if budget.size_bytes is not None and size > budget.size_bytes:
            return (
                f"{_listed(left, spec)} in 16 bits are estimated to keep the quality, but make {size} bytes "
                f"of {budget.size_bytes} allowed"
            )
        recipe["modules_to_not_convert"] = names
        estimate = {name: size if name == "size_bytes" else value for name, value in estimate.items()}
        why.append(f"leave {_listed(left, spec)} in 16 bits: {size} bytes")
    if estimate.pop("tokens_per_second", None) is not None:
        why.append("slower by what is to be measured")
    return Change(recipe, "; ".join(why), estimate)


def _listed(layers: list[int], spec: ModelSpec) -> str:
    return "all layers" if len(layers) == spec.num_layers else f"layers {', '.join(map(str, layers))}"


def _estimate(measured: Mapping[str, float], part: float) -> dict[str, float]:
    """The quality figures when so large a part of the KL divergence remains."""
    found = {name: measured[name] * part for name in ("mean_kl", "p99_kl") if name in measured}
    if "perplexity_ratio" in measured:
        found["perplexity_ratio"] = measured["perplexity_ratio"] ** part
    if "same_top1" in measured:
        found["same_top1"] = 1 - (1 - measured["same_top1"]) * math.sqrt(part)
    return found


@dataclass(frozen=True)
class Losses:
    """What the report of a run says."""

    whole: Mapping[str, float]  # KL divergence by cause
    layers: Mapping[int, Mapping[str, float]]  # each layer's own error by cause

    def worst(self, causes: Sequence[str]) -> list[int]:
        """The layers, those of largest error by these causes first."""
        return sorted(self.layers, key=lambda layer: -self._own(layer, causes))

    def part(self, causes: Sequence[str], layers: Sequence[int]) -> float:
        """Of the whole divergence, what these causes make of it in these layers."""
        share = sum(self.whole[cause] for cause in causes) / sum(self.whole.values())
        every = sum(self._own(layer, causes) for layer in self.layers)
        return share * sum(self._own(layer, causes) for layer in layers) / every if every else 0.0

    def _own(self, layer: int, causes: Sequence[str]) -> float:
        return sum(self.layers[layer][cause] for cause in causes)


def _losses(checkpoint: Checkpoint) -> Losses:
    """Out of a checkpoint's report.

    Raises:
        CheckpointError: it does not say.
    """
    report = checkpoint.report()
    try:
        whole = {cause: float(report["kl"][cause]) for cause in CAUSES}
        layers = {
            int(layer["layer"]): {cause: float(layer["causes"][cause]) for cause in CAUSES}
            for layer in report["layers"]
        }
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"no qoq_report.json with the losses of each layer ({type(error).__name__})") from None
    values = [*whole.values(), *(value for causes in layers.values() for value in causes.values())]
    usable = all(math.isfinite(value) and value >= 0 for value in values) and sum(whole.values()) > 0
    if not usable or sorted(layers) != list(range(checkpoint.spec.num_layers)):
        raise CheckpointError("qoq_report.json has no usable losses")
    return Losses(whole, layers)


def measure_quality(found: Any) -> dict[str, float]:
    """The figures of a `compare.Divergence`, by the limits' names."""
    return {
        "perplexity_ratio": found.perplexity / found.reference_perplexity,
        "mean_kl": found.mean_kl,
        "p99_kl": found.p99_kl,
        "same_top1": found.same_top1,
    }
