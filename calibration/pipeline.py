"""The order of a quantization run, in one function. One decoder layer is in memory at a time.

Two streams of hidden states travel through the layers: `x_fp` through the transformed layers in full precision,
`x_q` through the quantized ones (A8 and KV4 on). A third pair, a few random tokens through the original and the
transformed layers, proves before each layer is quantized that the transforms left its function unchanged.
Interrupted runs replay the streams through the finished layers, so that the result has the same bits.
"""

import datetime
import hashlib
import json
import platform
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qoq
from qoq import checkpoint, recipe
from qoq.calibration import blocks, card, data, rotate, smooth
from qoq.calibration.work import Work
from qoq.errors import CheckpointError, OutputError, QuantizationError
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LINEARS, LM_HEAD, ModelSpec
from qoq.models.decoder import Rope, float_block, rms_norm, rotary_embedding, simulated_block, simulated_cache
from qoq.models.source import Source
from qoq.quant import QuantizedLinear, round_to_nearest
from qoq.recipe import Recipe

Layer = dict[str, Tensor]
PROBE_TOKENS = 16
MAX_TRANSFORM_ERROR = 1e-4  # of the logits, relative, in float32
CARRIED_FILES = ("LICENSE*", "NOTICE*", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Plan:
    """What a run will do and need, known before it starts."""

    source: str
    layers: int
    parameters: int  # in quantized linears
    source_bytes: int
    output_bytes: int
    memory_bytes: int  # estimated peak
    tokens: int

    def line(self, output: Path) -> str:
        gib = 2**30
        return (
            f"{self.source}: {self.layers} layers, {self.parameters / 1e6:.0f} M weights to quantize, "
            f"{self.source_bytes / gib:.2f} GiB -> {output} {self.output_bytes / gib:.2f} GiB; "
            f"about {self.memory_bytes / gib:.1f} GiB of memory, {self.tokens} calibration tokens"
        )


def plan(source: Source, settings: Recipe) -> Plan:
    """Sizes from config and headers alone.

    Raises:
        QuantizationError: the model does not fit the group size.
    """
    spec = source.spec
    checkpoint.check_group_size(spec, settings.group_size)
    per_layer = spec.linear_parameters() // spec.num_layers
    tokens = settings.calibration.nsamples * settings.calibration.seqlen
    working_set = 4 * 4 * per_layer  # float32: original, transformed, dequantized, and what is being packed
    streams = 2 * 4 * tokens * spec.hidden_size
    embedding = 10 * spec.vocab_size * spec.hidden_size
    return Plan(
        source=source.name,
        layers=spec.num_layers,
        parameters=spec.linear_parameters(),
        source_bytes=source.bytes(),
        output_bytes=checkpoint.size_in_bytes(spec, settings.group_size),
        memory_bytes=500 * 2**20 + max(working_set, embedding) + streams,
        tokens=tokens,
    )


@dataclass
class Streams:
    """The hidden states that travel, all (samples, T, hidden) float32, in the basis of their layers."""

    x_fp: Tensor
    x_q: Tensor
    probe: Tensor  # through the original layers
    probe_new: Tensor  # through the transformed layers
    rope: Rope
    probe_rope: Rope


@dataclass(frozen=True)
class Rotations:
    """float64 on the run's device; None where the recipe does not rotate."""

    residual: Tensor  # (hidden, hidden)
    values: Tensor  # (head_dim, head_dim)


def quantize(
    source: Source,
    output: Path,
    settings: Recipe,
    *,
    device: str = "cpu",
    resume: bool = True,
    on_layer: Callable[[Mapping[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Make a checkpoint of `source` in the new folder `output`; returns the report that is written with it.

    `on_layer` hears of each finished layer, those of an interrupted run included.

    Raises:
        QoqError: see the kinds in `qoq.errors`; whatever was finished stays in the work folder.
    """
    started = time.monotonic()
    plan(source, settings)
    tokenizer = source.tokenizer()
    calibration = settings.calibration
    tokens = data.samples(tokenizer, calibration.dataset, calibration.nsamples, calibration.seqlen, settings.seed)
    run = {
        "source files": source.hashes(),
        "recipe": asdict(settings),
        "calibration tokens": data.token_hash(tokens),
        "version": qoq.__version__,
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
    }
    work = Work(output, run, resume)
    rotations = _rotations(source.spec, settings, device)

    streams = _embed(source, rotations, tokens, work, device)
    reports = []
    for index in range(source.spec.num_layers):
        layer = _layer(source, index, settings, rotations, streams, work, device)
        reports.append(layer)
        on_layer(layer)
    _head(source, rotations, streams, work)

    report = {
        "model": source.name,
        "version": qoq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": run["device"],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source_files": run["source files"],
        "calibration": {
            "dataset": calibration.dataset,
            "samples": tokens.shape[0],
            "seqlen": tokens.shape[1],
            "sha256": run["calibration tokens"],
        },
        "recipe": run["recipe"],
        "layers": reports,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_bytes": 0 if device == "cpu" else torch.cuda.max_memory_allocated(device),
    }
    _assemble(source, settings, tokenizer, work)
    report["seconds"] = round(time.monotonic() - started, 1)
    _describe(source, settings, report, work)
    verify(work, source.spec)
    work.finish()
    return report


def _rotations(spec: ModelSpec, settings: Recipe, device: str) -> Rotations | None:
    if not settings.rotate:
        return None
    residual, values = rotate.rotation(spec.hidden_size, settings.seed), rotate.rotation(spec.head_dim, settings.seed)
    return Rotations(residual.to(device), values.to(device))


def _embed(source: Source, rotations: Rotations | None, tokens: Tensor, work: Work, device: str) -> Streams:
    """Write the embedding and start the streams from it."""
    original = source.embedding()
    generator = torch.Generator().manual_seed(0)
    probe_ids = torch.randint(0, source.spec.vocab_size, (1, PROBE_TOKENS), generator=generator)
    probe = original[probe_ids].to(device, torch.float32)
    rotated = original if rotations is None else _rotate_matrix(original, rotations.residual)
    probe_new = rotated[probe_ids].to(device, torch.float32)
    half = checkpoint.to_fp16(EMBEDDING, rotated)
    if not work.has("embed"):
        work.write("embed", {EMBEDDING: half}, {"digests": {EMBEDDING: digest(half)}})
    rope = rotary_embedding(source.config)
    return Streams(
        x_fp=rotated[tokens].to(device, torch.float32),
        x_q=half[tokens].to(device, torch.float32),
        probe=probe,
        probe_new=probe_new,
        rope=_to(rope(torch.arange(tokens.shape[1])), device),
        probe_rope=_to(rope(torch.arange(PROBE_TOKENS)), device),
    )


def _rotate_matrix(matrix: Tensor, r: Tensor, gain: Tensor | None = None) -> Tensor:
    """An embedding or lm_head (vocab, hidden), rotated, as float32 on the CPU."""
    return torch.cat(
        [
            rotate.rotate_rows(rows.to(r.device, torch.float32), r, gain).cpu()
            for rows in matrix.split(rotate.ROWS_AT_ONCE)
        ]
    )


def _to(rope: Rope, device: str) -> Rope:
    return rope[0].to(device), rope[1].to(device)


def _layer(
    source: Source,
    index: int,
    settings: Recipe,
    rotations: Rotations | None,
    streams: Streams,
    work: Work,
    device: str,
) -> dict[str, Any]:
    """Transform, check, quantize and write one layer, and move the streams past it."""
    started = time.monotonic()
    spec, part = source.spec, f"layer-{index:05d}"
    layer = source.layer(index, device)
    blocks.propagate(float_block(spec, index, dict(layer)), streams.probe, streams.probe_rope)
    if rotations is not None:
        rotate.fold_norms(layer)
        rotate.rotate_residual(layer, rotations.residual)
        rotate.rotate_values(layer, spec, rotations.values)

    key_absmax = blocks.AbsMax(blocks.key_channels)
    block = float_block(spec, index, dict(layer))
    block.taps["keys"] = key_absmax
    blocks.propagate(block, streams.x_fp, streams.rope)

    done = work.has(part)
    if not done and settings.smooth_attention is not None:
        smooth.smooth_attention(layer, spec, key_absmax.value, settings.smooth_attention.alpha)
    blocks.propagate(float_block(spec, index, layer), streams.probe_new, streams.probe_rope)
    error = transform_error(streams.probe, streams.probe_new, rotations)
    check_transform(error, f"layer {index}")

    linears, norms = _read_part(spec, index, work, part, device) if done else _quantize(layer, spec, index, settings)
    blocks.propagate(simulated_block(spec, index, norms, linears), streams.x_q, streams.rope, simulated_cache)
    if done:
        return work.report(part)
    report = {
        "layer": index,
        "loss": relative_error(streams.x_q, streams.x_fp),
        "transform_error": error,
        "weight_errors": {
            name: relative_error(linear.weight.dequantize(), layer[f"{name}.weight"])
            for name, linear in linears.items()
        },
        "seconds": round(time.monotonic() - started, 2),
    }
    _write_part(index, linears, norms, report, work, part)
    return report


def _quantize(
    layer: Layer, spec: ModelSpec, index: int, settings: Recipe
) -> tuple[dict[str, QuantizedLinear], dict[str, Tensor]]:
    """Round the linears of a transformed layer; norms and biases go to float16."""
    prefix = f"model.layers.{index}."
    linears = {}
    for name in LINEARS:
        bias = layer.get(f"{name}.bias")
        linears[name] = QuantizedLinear(
            round_to_nearest(layer[f"{name}.weight"], settings.group_size),
            None if bias is None else checkpoint.to_fp16(f"{prefix}{name}.bias", bias),
        )
    norms = {name: checkpoint.to_fp16(f"{prefix}{name}.weight", layer[f"{name}.weight"]) for name in spec.norm_shapes()}
    return linears, norms


def _write_part(
    index: int,
    linears: Mapping[str, QuantizedLinear],
    norms: Mapping[str, Tensor],
    report: Mapping[str, Any],
    work: Work,
    part: str,
) -> None:
    prefix = f"model.layers.{index}."
    tensors = {f"{prefix}{name}.weight": norm.cpu() for name, norm in norms.items()}
    digests = {name: digest(norm) for name, norm in tensors.items()}
    for name, linear in linears.items():
        tensors |= checkpoint.pack_linear(prefix + name, linear)
        digests[prefix + name] = linear_digest(linear)
    work.write(part, tensors, {**report, "digests": digests})


def _read_part(
    spec: ModelSpec, index: int, work: Work, part: str, device: str
) -> tuple[dict[str, QuantizedLinear], dict[str, Tensor]]:
    """The linears and norms of a layer that an interrupted run finished."""
    prefix, path = f"model.layers.{index}.", work.path(part)
    tensors = {name: checkpoint.read_tensor(path, name) for name in checkpoint.read_header(path)}
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    linears = {name: checkpoint.unpack_linear(prefix + name, tensors) for name in LINEARS}
    return linears, {name: tensors[f"{prefix}{name}.weight"] for name in spec.norm_shapes()}


def _head(source: Source, rotations: Rotations | None, streams: Streams, work: Work) -> None:
    """Compare the logits of the transformed model with the original's, and write the final norm and lm_head."""
    eps = source.spec.rms_norm_eps
    original, norm = source.lm_head(), source.final_norm()
    head, gain = original, norm
    if rotations is not None:
        head = _rotate_matrix(original, rotations.residual, norm.to(rotations.residual.device))
        gain = torch.ones_like(norm)
    logits = _logits(streams.probe, norm, original, eps)
    check_transform(relative_error(_logits(streams.probe_new, gain, head, eps), logits) ** 0.5, "the logits")
    if not work.has("head"):
        tensors = {
            FINAL_NORM: checkpoint.to_fp16(FINAL_NORM, gain),
            LM_HEAD: checkpoint.to_fp16(LM_HEAD, head).contiguous(),
        }
        work.write("head", tensors, {"digests": {name: digest(tensor) for name, tensor in tensors.items()}})


def _logits(x: Tensor, gain: Tensor, head: Tensor, eps: float) -> Tensor:
    """(1, T, hidden) -> (1, T, vocab) float32 on the CPU."""
    hidden = rms_norm(x.cpu(), gain.cpu(), eps)
    return torch.cat([F.linear(hidden, rows.float()) for rows in head.split(rotate.ROWS_AT_ONCE)], dim=-1)


def transform_error(probe: Tensor, probe_new: Tensor, rotations: Rotations | None) -> float:
    """Relative difference between the original stream and the transformed one, in one basis."""
    expected = probe if rotations is None else (probe.double() @ rotations.residual).float()
    return relative_error(probe_new, expected) ** 0.5


def check_transform(error: float, where: str) -> None:
    """Raise QuantizationError where a transform changed what the model computes."""
    if not error < MAX_TRANSFORM_ERROR:
        raise QuantizationError(
            f"{where}: the transformed model differs from the original by {error:.2e}, "
            f"expected less than {MAX_TRANSFORM_ERROR:.0e}; nothing was written from here on"
        )


def relative_error(x: Tensor, reference: Tensor) -> float:
    """|x - reference|**2 / |reference|**2."""
    squares = reference.double().square().sum()
    return float((x.double() - reference.double()).square().sum() / squares.clamp(min=torch.finfo(torch.float64).tiny))


# The finished folder


def _assemble(source: Source, settings: Recipe, tokenizer: Any, work: Work) -> None:
    """Merge the parts into shards and write config and tokenizer beside them."""
    if work.draft.exists():
        shutil.rmtree(work.draft)
    try:
        work.draft.mkdir()
        checkpoint.write_shards(work.draft, [work.path(part) for part in _parts(source.spec)])
        tokenizer.save_pretrained(work.draft)
        for pattern in CARRIED_FILES:
            for path in source.folder.glob(pattern):
                shutil.copyfile(path, work.draft / path.name)
    except OSError as error:
        raise work.keep(checkpoint.cannot_write(work.draft, error)) from None
    except OutputError as error:
        raise work.keep(error) from None
    config = json.loads((source.folder / "config.json").read_text())
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        config.pop(key, None)
    config |= {
        "tie_word_embeddings": False,
        "dtype": "float16",
        "torch_dtype": "float16",
        "quantization_config": checkpoint.quantization_config(settings.group_size),
    }
    checkpoint.write_bytes(work.draft / "config.json", json.dumps(config, indent=2) + "\n")


def _parts(spec: ModelSpec) -> list[str]:
    return ["embed", *(f"layer-{index:05d}" for index in range(spec.num_layers)), "head"]


def _describe(source: Source, settings: Recipe, report: Mapping[str, Any], work: Work) -> None:
    """Write recipe, report and model card."""
    layers = [{key: value for key, value in layer.items() if key != "digests"} for layer in report["layers"]]
    checkpoint.write_bytes(work.draft / "qoq_recipe.yaml", recipe.dump(settings))
    checkpoint.write_bytes(work.draft / "qoq_report.json", json.dumps({**report, "layers": layers}, indent=2) + "\n")
    checkpoint.write_bytes(work.draft / "README.md", card.text(source, settings))


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


def linear_digest(linear: QuantizedLinear) -> str:
    """sha256 over integers, scales and bias of a linear."""
    values = [value for value in vars(linear.weight).values()]
    return digest(*values, *([] if linear.bias is None else [linear.bias]))


def digest(*tensors: Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    value = hashlib.sha256()
    for tensor in tensors:
        value.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        value.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return value.hexdigest()
