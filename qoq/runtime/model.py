"""A checkpoint as a `Decoder`, executed through the specification in `qoq.quant`: what the engine is measured against.

Linears are integer GEMMs, tensors between the steps are float16, attention is computed in float64 over the
quantized cache: one prefill, prefill in parts and decode are then the same function to the last bit or so.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qoq import recipe
from qoq.checkpoint import Checkpoint
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LM_HEAD
from qoq.models.decoder import Block, Decoder, packed_block, rotary_embedding, simulated_block
from qoq.paged import pack_codes, unpack_codes
from qoq.quant import QuantizedKV, quantize_kv


def load(folder: str | Path | Checkpoint, simulate: bool = False, device: str = "cpu") -> Decoder:
    """Load a whole checkpoint.

    With `simulate`, linears multiply dequantized floats (fake quantization) and everything is float32: what
    calibration computes with. Otherwise they multiply the packed integers.

    Raises:
        CheckpointError: see `Checkpoint`.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
    dtype = torch.float32 if simulate else torch.float16
    spec = checkpoint.spec

    def block(index: int) -> Block:
        layer = checkpoint.layer(index).to(device)
        return simulated_block(spec, index, layer, dtype) if simulate else packed_block(spec, index, layer)

    return Decoder(
        embedding=checkpoint.tensor(EMBEDDING).to(device, dtype),
        blocks=[block(index) for index in range(spec.num_layers)],
        norm=checkpoint.tensor(FINAL_NORM).to(device, torch.float32),
        lm_head=checkpoint.tensor(LM_HEAD).to(device, torch.float32),
        rope=rotary_embedding(checkpoint.config),
        kv_cache=checkpoint.kv_cache,
    )


def greedy(decoder: Decoder, token_ids: Sequence[int], max_tokens: int) -> Iterator[int]:
    """The most likely continuation of a prompt, token by token, with a KV4 cache."""
    cache, ids = KVCache(len(decoder.blocks), decoder.kv_cache), list(token_ids)
    for _ in range(max_tokens):
        token = int(
            decoder(torch.tensor([ids], device=decoder.embedding.device), cache, start=cache.length)[0, -1].argmax()
        )
        yield token
        ids = [token]


class KVCache:
    """The cache of one sequence, or of several alike: 4-bit codes, two to a byte, with a scale and a minimum a row.

    Layers that `quantizer` names have 8-bit codes. Called with the new keys and values of a layer, it stores them and
    returns all as attention sees them.
    """

    def __init__(self, num_layers: int, quantizer: recipe.KVCache):
        self.quantizer = quantizer
        self.keys: list[list[QuantizedKV]] = [[] for _ in range(num_layers)]
        self.values: list[list[QuantizedKV]] = [[] for _ in range(num_layers)]
        self.length = 0  # tokens in the last layer, hence in all

    def __call__(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, Hkv, T, D) of the new tokens -> the same for all tokens, (B, Hkv, Tall, D) float32."""
        bits = self.quantizer.bits(layer)
        for chunks, x in ((self.keys[layer], k), (self.values[layer], v)):
            chunks.append(pack_codes(quantize_kv(x, bits, self.quantizer.ratios(bits)), bits))
        if layer == len(self.keys) - 1:
            self.length += k.shape[2]
        return _all(self.keys[layer], bits), _all(self.values[layer], bits)


def _all(chunks: list[QuantizedKV], bits: int) -> Tensor:
    """Concatenate the chunks along tokens (once: they are replaced by their concatenation) and dequantize."""
    fields = (torch.cat([getattr(chunk, name) for chunk in chunks], dim=2) for name in ("codes", "scale", "minimum"))
    chunks[:] = [QuantizedKV(*fields)]
    return unpack_codes(chunks[0], bits).dequantize()
