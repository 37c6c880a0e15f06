"""Where error comes from: each quantizer switched on alone, and all of them together.

A layer's own part is the error of its output when every variant takes the same full-precision input. They need not
add up: with asymmetric targets the weights are chosen to undo part of what A8 and KV4 do. What becomes of it at the
end of the model is told by hidden states that go through all layers under one cause each.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qoq.calibration.blocks import Streams
from qoq.models.architecture import ModelSpec
from qoq.models.decoder import Linear, QuantizedLayer, Rope, float_block, simulated_block, simulated_cache
from qoq.quant import HalfLinear, quantize_rows
from qoq.recipe import KVCache

CAUSES = ("w4", "a8", "k4", "v4", "all")
TOKENS = 512  # of the samples
POSITIONS_AT_ONCE = 128  # whose logits are in memory

Variant = Callable[[Tensor], Tensor]


def sample(streams: Streams) -> tuple[Tensor, Rope]:
    """The first full-precision hidden states, at most `TOKENS`, and their rope: a float32 copy, before they move on."""
    length = min(streams.x_fp.shape[1], TOKENS)
    cos, sin = streams.rope
    return streams.x_fp[: TOKENS // length, :length].to(streams.device, torch.float32, copy=True), (
        cos[:length],
        sin[:length],
    )


def variants(
    layer: Mapping[str, Tensor],
    quantized: QuantizedLayer,
    spec: ModelSpec,
    index: int,
    rope: Rope,
    kv_cache: KVCache,
) -> dict[str, Variant]:
    """The layer in full precision (""), and under each of `CAUSES`; `layer` holds its transformed tensors.

    "k4" and "v4" are of the cache that `kv_cache` gives this layer, be it of 8 bits.
    """
    fp = float_block(spec, index, layer)
    weights = {f"{name}.weight": linear.matrix() for name, linear in quantized.linears.items()}
    w4 = float_block(spec, index, {**layer, **weights})
    left = {name for name, linear in quantized.linears.items() if isinstance(linear, HalfLinear)}
    rows = {name: linear if name in left else on_rows(linear) for name, linear in fp.linears.items()}
    a8 = replace(fp, linears=rows)
    cached, everything = replace(fp, kv=quantized.kv), simulated_block(spec, index, quantized, torch.float32)
    cache = simulated_cache(kv_cache)
    return {
        "": lambda x: fp(x, rope),
        "w4": lambda x: w4(x, rope),
        "a8": lambda x: a8(x, rope),
        "k4": lambda x: cached(x, rope, lambda i, k, v: (cache(i, k, v)[0], v)),
        "v4": lambda x: cached(x, rope, lambda i, k, v: (k, cache(i, k, v)[1])),
        "all": lambda x: everything(x, rope, cache),
    }


class Drift:
    """A few tokens on their way through the model, in full precision and once under each of `CAUSES`."""

    def __init__(self, streams: Streams):
        x, self.rope = sample(streams)
        self.hidden = dict.fromkeys(("", *CAUSES), x)  # (samples, T, hidden) float32

    @torch.inference_mode()
    def advance(self, through: Mapping[str, Variant]) -> dict[str, float]:
        """Move on by one layer, given its `variants`; returns the layer's own error from each cause, `token_error`."""
        shared, reference = self.hidden[""], through[""](self.hidden[""])
        own = {cause: token_error(through[cause](shared), reference) for cause in CAUSES}
        self.hidden = {name: variant(self.hidden[name]) for name, variant in through.items()}
        return own

    @torch.inference_mode()
    def divergence(self, logits: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean KL divergence in nats from the full-precision model, by cause.

        `logits` (1, T, hidden) -> (1, T, vocab).
        """
        total = dict.fromkeys(CAUSES, 0.0)
        flat = {name: x.flatten(0, 1).split(POSITIONS_AT_ONCE) for name, x in self.hidden.items()}
        for i, part in enumerate(flat[""]):
            expected = logits(part[None])[0].log_softmax(-1)
            for cause in CAUSES:
                found = logits(flat[cause][i][None])[0].log_softmax(-1)
                total[cause] += float(F.kl_div(found, expected, log_target=True, reduction="sum"))
        return {cause: value / self.hidden[""][..., 0].numel() for cause, value in total.items()}


def on_rows(linear: Linear) -> Linear:
    """The same linear on A8 inputs."""
    return lambda x: linear(quantize_rows(x.flatten(0, -2)).dequantize().unflatten(0, x.shape[:-1]))


def token_error(x: Tensor, reference: Tensor) -> float:
    """Squared error of each token by its own mean square, averaged over tokens.

    Over all tokens at once, the few with massive activations would hide what happens to the others.
    """
    error = (x.double() - reference.double()).square().mean(-1)
    return float((error / reference.double().square().mean(-1).clamp(min=1e-30)).mean())
