"""What a run will make, need and take, and what its result will run on, from a model's config alone.

Bytes are counted (`layout.expected_tensors`, `roofline`, `memory`); seconds are those of a measured run, scaled.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qoq import layout, paged, roofline
from qoq.calibration import memory
from qoq.calibration.blocks import SEARCH_TOKENS
from qoq.calibration.pipeline import target_spec
from qoq.calibration.smooth import DOWN_EXPONENTS
from qoq.errors import QuantizationError
from qoq.formats import parallel
from qoq.models import source
from qoq.models.architecture import FUSED, ModelSpec, model_spec
from qoq.recipe import Recipe

CARDS = ("rtx-4090", "l40s", "a100", "h100", "h200")
CONTEXTS = (2048, 8192, 32768)  # tokens of a sequence
GB = 1e9


@dataclass(frozen=True)
class Seconds:
    """Of a run, and how far from it the truth may be: a factor, either way."""

    total: float
    factor: float
    basis: str


@dataclass(frozen=True)
class OnCard:
    """What a card holds of the result, and a run on it; None where the run does not fit."""

    tokens_held: Mapping[int, int]  # bits of the cache -> tokens that fit beside the weights
    placement: memory.Placement | None
    peaks: memory.Peaks | None
    seconds: Seconds | None

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        found: dict[str, Any] = {
            "kv": {
                str(bits): {"tokens": tokens, "sequences": {str(n): tokens // n for n in CONTEXTS}}
                for bits, tokens in self.tokens_held.items()
            },
            "quantize": None,
        }
        if self.placement and self.peaks and self.peaks.gpu and self.seconds:
            found["quantize"] = {
                **dataclasses.asdict(self.placement),
                "peak_gpu_bytes": self.peaks.gpu.bytes,
                "peak_host_bytes": self.peaks.host.bytes,
                "seconds": round(self.seconds.total),
                "seconds_factor": self.seconds.factor,
            }
        return found


@dataclass(frozen=True)
class Plan:
    """Of one run; bytes are bytes, tokens of the samples of all ranks."""

    model: str
    recipe: str
    device: str
    ranks: int
    layers: int
    parameters: int  # all of the source's
    quantized_parameters: int
    source_bytes: int
    output_bytes: int
    disk_bytes: int  # beside the source, at the run's end
    peaks: memory.Peaks
    placement: memory.Placement
    tokens: int
    seconds: Seconds
    kv_bytes: Mapping[int, int]  # bits that an engine is asked for -> of a cached token
    cards: Mapping[str, OnCard]
    tensor_parallel: Sequence[int]

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        peaks = self.peaks.named()
        return {
            "model": self.model,
            "recipe": self.recipe,
            "layers": self.layers,
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "weights_bytes": {"float16": 2 * self.parameters, "packed": self.output_bytes},
            "kv_bytes_per_token": {str(bits): size for bits, size in self.kv_bytes.items()},
            "cards": {name: card.record() for name, card in self.cards.items()},
            "tensor_parallel": list(self.tensor_parallel),
            "run": {
                "device": self.device,
                "ranks": self.ranks,
                "tokens": self.tokens,
                "samples_on": self.placement.streams,
                "tokens_at_once": self.placement.tokens_at_once,
                "seconds": round(self.seconds.total),
                "seconds_factor": self.seconds.factor,
                "seconds_basis": self.seconds.basis,
                "peak_bytes": {where: peak.bytes for where, peak in peaks.items()},
                "peak_phase": {where: peak.phase for where, peak in peaks.items()},
                "disk_bytes": {
                    "source": self.source_bytes,
                    "work": self.disk_bytes - self.output_bytes,
                    "output": self.output_bytes,
                },
                "error": memory.MARGIN,
            },
        }


def plan(
    name: str,
    original: ModelSpec,
    settings: Recipe,
    device: str,
    budgets: memory.Budgets,
    *,
    source_bytes: int | None = None,
    source_itemsize: int = 2,
    ranks: int = 1,
) -> Plan:
    """The plan of a run on `device` ("cpu" or "cuda"), and on each of `CARDS`.

    Raises:
        QuantizationError: the model does not fit the recipe, or the run does not fit the budgets.
        DataError: a mixture that is none.
    """
    spec = target_spec(original, settings)
    layout.check_group_size(spec, settings.group_size)
    layout.check_cache_layers(spec, settings.kv_cache)
    job = memory.Job(original, spec, settings, device, source_itemsize, ranks)
    placement = memory.choose(job, budgets)
    kv_bytes = {bits: layout.kv_bytes(spec, settings.kv_cache, bits) for bits in paged.BITS}
    output = layout.size_in_bytes(spec, settings.group_size, settings.kv_cache, job.left)
    parameters = source_parameters(original)
    cards = {card: _on_card(card, job, output, kv_bytes) for card in CARDS}
    return Plan(
        model=name,
        recipe=settings.name,
        device=device,
        ranks=ranks,
        layers=spec.num_layers,
        parameters=parameters,
        quantized_parameters=quantized_parameters(job),
        source_bytes=source_itemsize * parameters if source_bytes is None else source_bytes,
        output_bytes=output,
        disk_bytes=2 * output,  # the parts lie beside the shards until these are verified
        peaks=job.peaks(placement),
        placement=placement,
        tokens=job.samples * settings.calibration.seqlen,
        seconds=seconds(job, None if device == "cpu" else _card_here()),
        kv_bytes=kv_bytes,
        cards=cards,
        tensor_parallel=parallel.legal_degrees(spec, settings.group_size),
    )


def of_config(
    model: str,
    settings: Recipe,
    device: str,
    budgets: memory.Budgets = memory.Budgets(),  # noqa: B008 (frozen)
    trust_remote_code: bool = False,
) -> Plan:
    """From the config of a model, which may be a hub id whose weights stay there."""
    config = source.describe(model, trust_remote_code)
    dtype = getattr(config, "dtype", None)
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else 2
    return plan(
        model, model_spec(config, model), settings, torch.device(device).type, budgets, source_itemsize=itemsize
    )


def of_source(
    model: source.Source,
    settings: Recipe,
    device: str,
    budgets: memory.Budgets = memory.Budgets(),  # noqa: B008
    ranks: int = 1,
) -> Plan:
    """Of a model whose weights are here."""
    size = model.bytes()
    itemsize = max(1, round(size / source_parameters(model.spec)))
    return plan(
        model.name,
        model.spec,
        settings,
        torch.device(device).type,
        budgets,
        source_bytes=size,
        source_itemsize=itemsize,
        ranks=ranks,
    )


def source_parameters(spec: ModelSpec) -> int:
    """Of the full-precision model; a tied embedding counts once."""
    layer = sum(math.prod(shape) for shape in spec.layer_shapes().values())
    matrices = 1 if spec.tied_embeddings else 2
    return spec.num_layers * layer + spec.hidden_size * (1 + spec.vocab_size * matrices)


def quantized_parameters(job: memory.Job) -> int:
    """Weights in all linears but those that stay in 16 bits."""
    shapes = (job.spec.linear_shape(name.split(".", 3)[3]) for name in job.left)
    return job.spec.linear_parameters() - sum(n * k for n, k in shapes)


def _on_card(name: str, job: memory.Job, weights: int, kv_bytes: Mapping[int, int]) -> OnCard:
    room = int(roofline.USABLE * roofline.CARDS[name].memory)
    held = {bits: max(0, room - weights) // size for bits, size in kv_bytes.items()}
    job = dataclasses.replace(job, device="cuda")
    try:
        placement = memory.choose(job, memory.Budgets(gpu=room))
    except QuantizationError:
        return OnCard(held, None, None, None)
    return OnCard(held, placement, job.peaks(placement), seconds(job, name))


def _card_here() -> str:
    """The known card of this machine, an H100 where there is none."""
    if torch.cuda.is_available():
        sheet = roofline.sheet_of(torch.cuda.get_device_name())
        for name, known in roofline.CARDS.items():
            if known is sheet:
                return name
    return "h100"


# Time, from two measurements

H100_BASIS = "Llama-3-8B's shapes with qoq-g128 and 128 x 2048 tokens took 351 s on an H100 80 GB"
H100_TOKENS = 2.6e13  # tokens times weights and squares of widths, a second: 151 s of that run
H100_COLUMNS = 50e-6  # seconds of a column in GPTQ, whose launches nothing hides
H100_SQUARES = 2.0e12  # N K**2 + K**3, a second: with the columns 142 s
HOST_SECONDS = 3.6e-9  # for a byte of the source in float16: hashed, read, packed, written, verified: 58 s

CPU_BASIS = "two layers of 25 M weights with qoq-g128 took 138 s on one core, scaled by float32 products here"
CPU_SHARE = 0.22  # of the speed of large products
START_SECONDS = 10.0  # of imports, tokenizer and text


def seconds(job: memory.Job, card: str | None) -> Seconds:
    """Of a run on one of `roofline.CARDS`, or on this machine's CPU (None)."""
    layers = sum(
        count * (_on_cpu(job, quantized) if card is None else _on_gpu(job, quantized, roofline.CARDS[card]))
        for quantized, count in job.kinds_of_layers.items()
    )
    host = HOST_SECONDS * 2 * source_parameters(job.original)
    total = START_SECONDS * (card is None) + layers + host
    return Seconds(total, 1.3 if card == "h100" else 2.0, CPU_BASIS if card is None else H100_BASIS)


def _on_gpu(job: memory.Job, quantized: memory.Stages, sheet: roofline.DataSheet) -> float:
    """Seconds of a layer: tokens and factorisations at the speed of the card's tensor cores, columns one by one."""
    every = [job.stage_shape(names) for names in FUSED]
    factored = [job.stage_shape(names) for names in quantized] if job.settings.weights.gptq else []
    tokens = job.tokens * (sum(n * k for n, k in every) + sum(k * k for _, k in factored)) / H100_TOKENS
    squares = sum(k**3 + n * k * k for n, k in factored) / H100_SQUARES
    columns = sum(k for _, k in factored) * H100_COLUMNS
    return (tokens + squares) * roofline.CARDS["h100"].fp16 / sheet.fp16 + columns


def _on_cpu(job: memory.Job, quantized: memory.Stages) -> float:
    """Seconds of a layer: operations of forward passes, second moments, searches and factorisations."""
    every, settings = [job.stage_shape(names) for names in FUSED], job.settings
    factored = [job.stage_shape(names) for names in quantized] if settings.weights.gptq else []
    weights = sum(n * k for n, k in every)
    operations = job.tokens * (9.2 * weights + 4 * sum(k * k for _, k in factored))
    operations += sum(3 * k**3 + 14 * n * k * k for n, k in factored)
    if settings.smooth_down:
        some, (n, k) = min(job.tokens, SEARCH_TOKENS), every[-1]
        operations += 2 * (1 + len(DOWN_EXPONENTS)) * some * n * k
    if settings.rotate:
        operations += 4 * weights * job.spec.hidden_size  # in float64
    return operations / (CPU_SHARE * cpu_products())


@functools.cache
def cpu_products() -> float:
    """Float32 operations a second in a large matrix product, on this machine, now."""
    x = torch.ones(768, 768)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - started)
    return 2 * 768**3 / min(times)
