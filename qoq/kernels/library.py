"""The one torch library, `qoq`: how an op enters it, and how its face checks arguments."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes that kernels load at once

_library = torch.library.Library("qoq", "DEF")


def register(schema: str, cuda: Callable[..., None], cpu: Callable[..., None]) -> Callable[..., None]:
    """Define an op that writes into outputs its caller allocated, and give back what calls it.

    `schema` is torch's, such as "quant_rows(Tensor x, Tensor(a!) x8, Tensor(b!) sx, Tensor(c!) sums) -> ()";
    `cpu` is the specification, `cuda` launches the kernel. Neither allocates what it returns, so nothing has to be
    known of the op's outputs while a graph is traced.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, cuda, "CUDA")
    _library.impl(name, cpu, "CPU")
    torch.library.register_fake(f"qoq::{name}", lambda *args: None, lib=_library)
    op = getattr(torch.ops.qoq, name).default

    def call(*args: Any) -> None:
        first = args[0]
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        if type(first) is Tensor and first.is_cuda and not traced:
            cuda(*args)  # torch's dispatcher takes longer than a launch
        else:
            op(*args)

    return call


def expect(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int | None],
    like: Tensor | None = None,
    alignment: int = ALIGNMENT,
) -> None:
    """Check an argument: type, shape (None fits every size), the device of `like`, and that kernels can read it.

    Raises:
        ValueError: what is wrong, and what was expected.
    """
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    if fits:
        for size, want in zip(sizes, shape, strict=True):
            fits = fits and (want is None or want == size)
    if tensor.dtype is not dtype or not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: {tensor.dtype} {tuple(sizes)}, expected {dtype} ({wanted})")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: on {tensor.device}, expected on {like.device}")
    if not tensor.is_contiguous() or tensor.data_ptr() % alignment != 0:
        raise ValueError(f"{name}: expected contiguous, at a multiple of {alignment} bytes")
