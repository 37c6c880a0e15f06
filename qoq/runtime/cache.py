"""The KV cache of one sequence on the CPU: 4-bit codes, two to a byte, with a scale and a minimum a token and head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qoq.quant import QuantizedKV, quantize_kv


class KVCache:
    """Called with the new keys and values of a layer, stores them and returns all as attention sees them."""

    def __init__(self, num_layers: int, clip_ratios: Sequence[float] = (1.0,)):
        self.clip_ratios = clip_ratios
        self.keys: list[list[QuantizedKV]] = [[] for _ in range(num_layers)]
        self.values: list[list[QuantizedKV]] = [[] for _ in range(num_layers)]
        self.length = 0  # tokens in the last layer, hence in all

    def __call__(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, Hkv, T, D) of the new tokens -> the same for all tokens, (B, Hkv, Tall, D) float32."""
        self.keys[layer].append(pack_codes(quantize_kv(k, clip_ratios=self.clip_ratios)))
        self.values[layer].append(pack_codes(quantize_kv(v, clip_ratios=self.clip_ratios)))
        if layer == len(self.keys) - 1:
            self.length += k.shape[2]
        return _all(self.keys[layer]), _all(self.values[layer])


def pack_codes(rows: QuantizedKV) -> QuantizedKV:
    """Two codes to a byte, even dimension in the low nibble: (..., D) uint8 -> (..., D/2) uint8."""
    return QuantizedKV(rows.codes[..., ::2] | (rows.codes[..., 1::2] << 4), rows.scale, rows.minimum)


def unpack_codes(rows: QuantizedKV) -> QuantizedKV:
    """The inverse of `pack_codes`."""
    codes = torch.stack((rows.codes & 15, rows.codes >> 4), dim=-1).flatten(-2)
    return QuantizedKV(codes, rows.scale, rows.minimum)


def _all(chunks: list[QuantizedKV]) -> Tensor:
    """Concatenate the chunks along tokens (once: they are replaced by their concatenation) and dequantize."""
    fields = (torch.cat([getattr(chunk, name) for chunk in chunks], dim=2) for name in ("codes", "scale", "minimum"))
    chunks[:] = [QuantizedKV(*fields)]
    return unpack_codes(chunks[0]).dequantize()
