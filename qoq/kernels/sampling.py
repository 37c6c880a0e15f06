"""Sampling without sorting: csrc/sample.cu, whose specification is qoq/sampling.py."""

import torch
from torch import Tensor

from qoq import sampling
from qoq.kernels.build import Specialisation, module
from qoq.kernels.library import expect, register

LOGIT_TYPES = {torch.float32: "float", torch.float16: "__half"}
THREADS = 1024  # kThreads

SPECIALISATIONS = tuple(Specialisation("sample.cu", {"LOGIT": name}) for name in LOGIT_TYPES.values())


def _sample_cuda(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    tokens: Tensor,
) -> None:
    batch, vocabulary = logits.shape
    kernels = module("sample.cu", logits.device, {"LOGIT": LOGIT_TYPES[logits.dtype]})
    args = (logits, temperature, top_k, top_p, min_p, seeds, positions, tokens, vocabulary)
    kernels.launch("sample", (batch, 1, 1), THREADS, args)


def _sample_cpu(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    tokens: Tensor,
) -> None:
    tokens.copy_(sampling.sample(logits, temperature, top_k, top_p, min_p, seeds, positions))


_sample = register(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds,"
    " Tensor positions, Tensor(a!) tokens) -> ()",
    cuda=_sample_cuda,
    cpu=_sample_cpu,
)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """logits (B, vocabulary) float16 or float32 -> token ids (B,) int64; -1 for a row that holds NaN.

    temperature, top_p, min_p (B,) float32; top_k (B,) int32; seeds, positions (B,) int64. What they mean is written
    in `qoq.sampling.sample`.
    """
    if logits.dtype not in LOGIT_TYPES:
        raise ValueError(f"logits: {logits.dtype}, expected float16 or float32")
    expect("logits", logits, logits.dtype, (None, None))
    batch = (logits.shape[0],)
    parameters = (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
    )
    for name, tensor, dtype in parameters:
        expect(name, tensor, dtype, batch, like=logits, alignment=dtype.itemsize)
    tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
    _sample(logits, temperature, top_k, top_p, min_p, seeds, positions, tokens)
    return tokens
