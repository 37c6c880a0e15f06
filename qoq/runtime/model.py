"""A checkpoint as a `Decoder` on the CPU, executed through the specification in `qoq.quant`.

Linears are integer GEMMs, tensors between the steps are float16, attention is computed in float64 over the
quantized cache: one prefill, prefill in parts and decode are then the same function to the last bit or so.
"""

from pathlib import Path

import torch

from qoq.checkpoint import Checkpoint
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LM_HEAD
from qoq.models.decoder import Block, Decoder, packed_block, rotary_embedding, simulated_block


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
        clip_ratios=checkpoint.kv_cache.clip_ratios,
    )
