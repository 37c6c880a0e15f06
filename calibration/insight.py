"""Where a layer's error comes from: its output with each quantizer switched on alone, and with all of them.

Each variant takes the same full-precision input, so the numbers are the layer's own and hold nothing of the layers
before it. They need not add up: with asymmetric targets the weights are chosen to undo part of what A8 and KV4 do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qoq.calibration.blocks import Streams
from qoq.models.architecture import ModelSpec
from qoq.models.decoder import Linear, QuantizedLayer, Rope, float_block, simulated_block, simulated_cache
from qoq.quant import quantize_rows

TOKENS = 1024  # of the samples


def sample(streams: Streams) -> tuple[Tensor, Rope]:
    """The first full-precision hidden states, at most `TOKENS`, and their rope: a float32 copy, before they move on."""
    length = min(streams.x_fp.shape[1], TOKENS)
    cos, sin = streams.rope
    return streams.x_fp[: TOKENS // length, :length].to(torch.float32, copy=True), (cos[:length], sin[:length])


@torch.inference_mode()
def causes(
    layer: Mapping[str, Tensor],
    quantized: QuantizedLayer,
    spec: ModelSpec,
    index: int,
    inputs: tuple[Tensor, Rope],
    clip_ratios: Sequence[float],
) -> dict[str, float]:
    """Relative squared error of the output of a layer: from weights, activations, keys, values, and all of them.

    `layer` holds the transformed full-precision tensors, `inputs` is what `sample` gave.
    """
    x, rope = inputs
    fp = float_block(spec, index, layer)
    reference = fp(x, rope)
    cached = replace(fp, kv=quantized.kv)
    cache = simulated_cache(clip_ratios)
    weights = {f"{name}.weight": linear.weight.dequantize() for name, linear in quantized.linears.items()}
    outputs = {
        "w4": float_block(spec, index, {**layer, **weights})(x, rope),
        "a8": replace(fp, linears={name: _on_rows(linear) for name, linear in fp.linears.items()})(x, rope),
        "k4": cached(x, rope, lambda i, k, v: (cache(i, k, v)[0], v)),
        "v4": cached(x, rope, lambda i, k, v: (k, cache(i, k, v)[1])),
        "all": simulated_block(spec, index, quantized, x.dtype)(x, rope, cache),
    }
    return {cause: token_error(output, reference) for cause, output in outputs.items()}


def _on_rows(linear: Linear) -> Linear:
    """The same linear on A8 inputs."""
    return lambda x: linear(quantize_rows(x.flatten(0, -2)).dequantize().unflatten(0, x.shape[:-1]))


def token_error(x: Tensor, reference: Tensor) -> float:
    """Squared error of each token by its own mean square, averaged over tokens.

    Over all tokens at once, the few with massive activations would hide what happens to the others.
    """
    error = (x.double() - reference.double()).square().mean(-1)
    return float((error / reference.double().square().mean(-1).clamp(min=1e-30)).mean())
