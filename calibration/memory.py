"""How much memory a run needs, from dimensions alone, and how to stay within a budget.

Each phase of a run is counted as the tensors that are alive at its worst moment, in the names of the code that makes
them: P weights in a layer, K x K second moments, N x K weights of a stage (one of `FUSED`), activations of a batch.
What the counts leave out (allocator, libraries' workspaces, Python) is `BASE` and `MARGIN`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from qoq.calibration import data
from qoq.calibration.blocks import SEARCH_TOKENS, TOKENS_AT_ONCE
from qoq.calibration.insight import POSITIONS_AT_ONCE
from qoq.calibration.insight import TOKENS as DRIFT_TOKENS
from qoq.calibration.rotate import ROWS_AT_ONCE as ROTATED_ROWS
from qoq.calibration.weights import ROWS_AT_ONCE as SEARCHED_ROWS
from qoq.errors import QuantizationError
from qoq.layout import half_linears
from qoq.models.architecture import FUSED, LINEARS, ModelSpec
from qoq.recipe import Recipe

MARGIN = 0.15  # the error bar of every figure here
# Bytes of a process that has imported everything, on a GPU with its context; torch for CUDA brings larger libraries.
BASE = {"cpu": 520_000_000 if torch.version.cuda is None else 800_000_000, "cuda": 2_000_000_000}
WORKSPACE = 70_000_000  # of cuBLAS and cuSOLVER, on the GPU
PER_TOKEN_OF_VOCABULARY = 1000  # bytes of a tokenizer
GB = 1e9
Stages = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Placement:
    """Where the calibration samples lie between layers, and how many tokens of them a batch has."""

    streams: str = "device"  # or "host"
    tokens_at_once: int = TOKENS_AT_ONCE

    def home(self, device: str) -> str:
        """The device of the samples in a run on `device`."""
        return "cpu" if self.streams == "host" else device


@dataclass(frozen=True)
class Budgets:
    """Bytes that a run must stay below; None where there is no limit."""

    gpu: int | None = None
    host: int | None = None


@dataclass(frozen=True)
class Peak:
    """The largest of some phases."""

    phase: str
    bytes: int


@dataclass(frozen=True)
class Peaks:
    """Of a run: on the GPU (None on a CPU), and of the process in host memory."""

    gpu: Peak | None
    host: Peak

    def named(self) -> dict[str, Peak]:
        return {"host": self.host} if self.gpu is None else {"GPU": self.gpu, "host": self.host}


@dataclass(frozen=True)
class Job:
    """What is known of a run before it starts."""

    original: ModelSpec
    spec: ModelSpec  # of the checkpoint
    settings: Recipe
    device: str  # "cpu" or "cuda"
    source_itemsize: int = 2  # bytes of a weight in the source
    ranks: int = 1

    @cached_property
    def left(self) -> frozenset[str]:
        """Full names of the linears that stay in 16 bits."""
        return half_linears(self.spec, self.settings.modules_to_not_convert)

    @cached_property
    def kinds_of_layers(self) -> Counter[Stages]:
        """The stages that a layer quantizes -> how many layers there are of this kind."""
        return Counter(
            tuple(names for names in FUSED if f"model.layers.{index}.{names[0]}" not in self.left)
            for index in range(self.spec.num_layers)
        )

    @cached_property
    def samples(self) -> int:
        """Of all ranks."""
        calibration = self.settings.calibration
        return sum(count for _, count in data.mixture(calibration.dataset, calibration.nsamples))

    @property
    def tokens(self) -> int:
        """Of the samples of one rank."""
        return -(-self.samples // self.ranks) * self.settings.calibration.seqlen

    def placements(self) -> Iterator[Placement]:
        """From fast to small: large batches first, samples on the GPU first."""
        least = self.settings.calibration.seqlen  # one sample
        sizes = [size for size in (TOKENS_AT_ONCE, TOKENS_AT_ONCE // 2, TOKENS_AT_ONCE // 4, 512) if size > least]
        for home in ("device",) if self.device == "cpu" else ("device", "host"):
            for size in (*sizes, least):
                yield Placement(home, size)

    def peaks(self, placement: Placement) -> Peaks:
        """The memory that a run needs."""
        device, host = _worst(self._device_phases(placement)), _worst(self._host_phases())
        streams = 2 * self._itemsize * self.tokens * self.spec.hidden_size
        base = BASE[self.device] + PER_TOKEN_OF_VOCABULARY * self.spec.vocab_size
        if self.device == "cpu":  # phases of one name coincide
            host = {phase: device.get(phase, 0) + host.get(phase, 0) for phase in {**device, **host}}
            return Peaks(None, _largest(host, base + streams))
        held = {placement.streams: streams}
        return Peaks(
            _largest(device, WORKSPACE + held.get("device", 0)),
            _largest(host, base + held.get("host", 0)),
        )

    @property
    def _itemsize(self) -> int:
        """Of hidden states."""
        return 4 if self.device == "cpu" else 2

    def _device_phases(self, placement: Placement) -> Iterator[tuple[str, int]]:
        """Phase -> bytes beside the streams, on the device that computes."""
        spec, settings, e = self.spec, self.settings, self._itemsize
        d, inner, q = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
        kv, seqlen = spec.num_kv_heads * spec.head_dim, settings.calibration.seqlen
        batch = min(self.tokens, seqlen * max(1, placement.tokens_at_once // seqlen))
        some = min(self.tokens, seqlen * max(1, SEARCH_TOKENS // seqlen))
        parameters = spec.linear_parameters() // spec.num_layers
        largest = max(n * k for n, k in map(spec.linear_shape, LINEARS))
        always = 8 * d * self.original.hidden_size if settings.rotate else 0
        drift = 6 * 4 * d * min(self.tokens, DRIFT_TOKENS)
        yield "embedding", 2 * always + 12 * ROTATED_ROWS * d
        always += drift
        layer = 4 * parameters
        copies = 0 if e == 4 else e * parameters  # of the layer, in the dtype of the streams
        if settings.rotate:
            yield "rotate", always + layer + 20 * largest + always
        passing = max(20 * inner + 12 * d, 24 * q) * batch  # through a layer
        if settings.smooth_attention or settings.smooth_down or settings.reorder or settings.kv_cache.offset:
            group = spec.num_heads // spec.num_kv_heads
            centre = 10 * group * seqlen**2 + some * (4 * d + e * (q + 2 * kv))
            attention = 4 * some * (4 * q + 2 * d + 12 * kv)
            down = 4 * some * inner + max(16 * some * inner, 4 * some * inner + 20 * d * inner)
            held = always + layer + copies + e * some * d
            yield "smooth", held + max(passing, centre, attention, down)
        scales = 1 + (0 if settings.group_size == -1 else 8 / settings.group_size)  # bytes of a code, s2 and z with it
        moments = settings.weights.gptq or settings.weights.grid == "search" or settings.weights.asymmetric > 0
        of_drift = 24 * min(self.tokens, DRIFT_TOKENS) * inner
        for quantized in self.kinds_of_layers:
            finished = 0.0  # bytes: codes or float16, and what runs in their place
            for names in FUSED:
                n, k = self.stage_shape(names)
                held = always + layer + copies + int(finished)
                if names in quantized:
                    if moments:
                        yield f"moments of {names[-1]}", held + 8 * k * k + 20 * batch * max(k, d)
                    yield f"weights of {names[-1]}", held + int(self._stage(n, k, scales, moments))
                finished += ((scales if names in quantized else 2) + e) * n * k
            yield "propagate", always + layer + copies + int(finished) + passing
            stored = finished - e * parameters
            unpacked = max((n * k for names in quantized for n, k in map(spec.linear_shape, names)), default=0)
            yield "insight", always + 12 * parameters + int(stored) + 9 * unpacked + of_drift

    def stage_shape(self, names: Sequence[str]) -> tuple[int, int]:
        """(N, K) of linears that read one input, one below the other."""
        shapes = [self.spec.linear_shape(name) for name in names]
        return sum(n for n, _ in shapes), shapes[0][1]

    def _stage(self, n: int, k: int, scales: float, moments: bool) -> float:
        """`weights.quantize` of N x K weights."""
        settings, w, square = self.settings.weights, 4 * n * k, 4 * k * k
        rounding = 5 * w
        if not moments:
            return rounding
        steps: list[float] = [2 * square + rounding]
        held: float = w + scales * n * k  # the weights, and what plain rounding makes of them
        if settings.asymmetric > 0:
            in_factor = 5 if self.device == "cpu" else 4  # LAPACK's face makes one more copy
            steps += [in_factor * square + held, 4 * square + held + 2 * w]
            held += w  # the target
        if settings.grid == "search":
            steps.append(square + held + 6 * 4 * min(n, SEARCHED_ROWS) * k)
        if settings.gptq:
            steps += [4 * square + held, 2 * square + held + 2.25 * w]
        steps.append(square + held + scales * n * k + 3 * w)  # the losses
        return max(steps)

    def _host_phases(self) -> Iterator[tuple[str, int]]:
        """Phase -> bytes that lie in host memory whatever the device."""
        b, vocabulary = self.source_itemsize, self.spec.vocab_size
        read, made = b * vocabulary * self.original.hidden_size, 2 * vocabulary * self.spec.hidden_size
        yield "embedding", max(2 * read, read + made)  # a file is mapped while a tensor is copied from it
        logits = 4 * vocabulary * POSITIONS_AT_ONCE * 5
        yield "head", max(2 * read, read + made, made + logits)
        parameters = self.spec.linear_parameters() // self.spec.num_layers
        if self.device != "cpu":
            yield "pack", 2 * parameters


def _worst(phases: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Phase -> the most it takes in any layer."""
    most: dict[str, int] = {}
    for phase, size in phases:
        most[phase] = max(size, most.get(phase, 0))
    return most


def _largest(phases: dict[str, int], more: int) -> Peak:
    phase = max(phases, key=phases.__getitem__)
    return Peak(phase, phases[phase] + more)


def choose(job: Job, budgets: Budgets) -> Placement:
    """The fastest placement whose peaks stay within the budgets (bytes), error bar included.

    Raises:
        QuantizationError: there is none; names the least budget that would do.
    """
    found = [(placement, job.peaks(placement)) for placement in job.placements()]

    def gpu(peaks: Peaks) -> int:
        return 0 if peaks.gpu is None else with_margin(peaks.gpu.bytes)

    fits_host = [
        (placement, peaks)
        for placement, peaks in found
        if budgets.host is None or with_margin(peaks.host.bytes) <= budgets.host
    ]
    if not fits_host:
        least = min((peaks.host for _, peaks in found), key=lambda peak: peak.bytes)
        raise _too_little("--cpu-memory", budgets.host, least)
    for placement, peaks in fits_host:
        if budgets.gpu is None or gpu(peaks) <= budgets.gpu:
            return placement
    least = min((peaks.gpu for _, peaks in fits_host if peaks.gpu), key=lambda peak: peak.bytes)
    raise _too_little("--gpu-memory", budgets.gpu, least)


def with_margin(size: int) -> int:
    return round(size * (1 + MARGIN))


def _too_little(option: str, budget: int | None, least: Peak) -> QuantizationError:
    return QuantizationError(
        f"{option}: {(budget or 0) / GB:.2f} GB is too little, this run needs at least "
        f"{with_margin(least.bytes) / GB + 0.005:.2f} GB (most of it in: {least.phase})"
    )
