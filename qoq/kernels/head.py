"""The output head: logits whose bits do not depend on the batch (csrc/head.cu)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qoq.kernels.build import ARCHITECTURES, Specialisation, module
from qoq.kernels.cards import LIMITS, RESERVED, Limits, card_of
from qoq.kernels.library import expect, register

TILES = ((128, 8), (128, 16), (128, 32), (128, 64), (256, 128))  # ROWS, TOKENS
LINE_BYTES = 128  # of a row or a token in one stage
MOST_STAGES = 8  # more bring nothing: seven are 112 KB on their way
THREADS = 256


def tile(tokens: int, limits: Limits) -> dict[str, int]:
    """The defines of the smallest tile that holds all tokens, or of the largest, with as many stages as there is room.

    Every tile gives the same bits, so this is about time alone.
    """
    rows, width = next((each for each in TILES if each[1] >= tokens), TILES[-1])
    stages = min(MOST_STAGES, (limits.shared_bytes - RESERVED) // (LINE_BYTES * (rows + width)))
    return {"ROWS": rows, "TOKENS": width, "STAGES": stages}


def _specialisations() -> tuple[Specialisation, ...]:
    """Architectures with as much shared memory share their defines."""
    found: dict[tuple[int, ...], list[str]] = {}
    for _, tokens in TILES:
        for arch in ARCHITECTURES:
            found.setdefault(tuple(tile(tokens, LIMITS[arch]).values()), []).append(arch)
    code = (r"HMMA\.16816\.F32", r"LDSM\.16\.M88\.4", r"LDGSTS\.E\.BYPASS\.\S*128")
    return tuple(
        Specialisation("head.cu", dict(zip(("ROWS", "TOKENS", "STAGES"), values, strict=True)), tuple(archs), code)
        for values, archs in found.items()
    )


SPECIALISATIONS = _specialisations()


def _lm_head_cuda(x: Tensor, weight: Tensor, logits: Tensor) -> None:
    (m, k), v, card = x.shape, weight.shape[0], card_of(x.device)
    defines = tile(m, card.limits)
    rows, tokens, stages = defines.values()
    tiles = -(-m // tokens) * -(-v // rows)
    module("head.cu", x.device, defines).launch(
        "lm_head",
        (min(tiles, card.multiprocessors), 1, 1),
        THREADS,
        (x, weight, logits, m, v, k),
        LINE_BYTES * (rows + tokens) * stages,
    )


def _lm_head_cpu(x: Tensor, weight: Tensor, logits: Tensor) -> None:
    logits.copy_(F.linear(x.float(), weight.float()))


_lm_head = register(
    "lm_head(Tensor x, Tensor weight, Tensor(a!) logits) -> ()",
    cuda=_lm_head_cuda,
    cpu=_lm_head_cpu,
)


def lm_head(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K) float16 times W^T, weight (V, K) float16 -> logits (M, V) float32; K % 8 == 0.

    On a GPU a logit is the same sum in the same order for every M and at every place in the batch, so its bits depend
    on its row of x and of the weight alone. On a CPU the weight may be float32, which spares its conversion in every
    call; there torch chooses the order.

    Raises:
        ValueError: an argument of a wrong shape, type or device.
    """
    expect("x", x, torch.float16, (None, None))
    m, k = x.shape
    if k == 0 or k % 8 != 0:
        raise ValueError(f"x: rows of {k}, expected a multiple of 8")
    widened = weight.dtype == torch.float32 and not weight.is_cuda
    expect("weight", weight, torch.float32 if widened else torch.float16, (None, k), like=x)
    logits = torch.empty(m, weight.shape[0], dtype=torch.float32, device=x.device)
    if logits.numel() > 0:
        _lm_head(x, weight, logits)
    return logits
