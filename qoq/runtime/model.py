"""A checkpoint as a `Decoder` on the CPU, executed through the specification in `qoq.quant`.

Linears are integer GEMMs, tensors between the steps are float16, attention is computed in float64 over the
quantized cache: one prefill, prefill in parts and decode are then the same function to the last bit or so.
"""

from pathlib import Path

import torch

from qoq.checkpoint import Checkpoint
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LINEARS, LM_HEAD
from qoq.models.decoder import Block, Decoder, rotary_embedding, simulated_block


def load(folder: str | Path | Checkpoint, simulate: bool = False) -> Decoder:
    """Load a whole checkpoint.

    With `simulate`, linears multiply dequantized floats (fake quantization) and everything is float32: what
    calibration computes with. Otherwise they multiply the packed integers.

    Raises:
        CheckpointError: see `Checkpoint`.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
    dtype = torch.float32 if simulate else torch.float16
    make_block = simulated_block if simulate else _packed_block
    spec = checkpoint.spec
    blocks = [
        make_block(spec, index, checkpoint.norms(index), {name: checkpoint.linear(index, name) for name in LINEARS})
        for index in range(spec.num_layers)
    ]
    return Decoder(
        embedding=checkpoint.tensor(EMBEDDING).to(dtype),
        blocks=blocks,
        norm=checkpoint.tensor(FINAL_NORM).float(),
        lm_head=checkpoint.tensor(LM_HEAD).float(),
        rope=rotary_embedding(checkpoint.config),
    )


def _packed_block(spec, index, norms, linears) -> Block:  # type: ignore[no-untyped-def]
    return Block(spec, index, {name: norm.float() for name, norm in norms.items()}, linears, torch.float64)
