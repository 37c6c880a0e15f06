"""What the choice of tiles must know of a GPU."""

from dataclasses import dataclass
from functools import cache

import torch

from qoq.kernels.build import architecture


@dataclass(frozen=True)
class Card:
    """A kind of GPU, or one that the code has never met."""

    name: str
    architecture: str  # as the compiler calls it
    multiprocessors: int

    @property
    def limits(self) -> "Limits":
        return LIMITS.get(self.architecture, LIMITS["sm_89"])


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor. Rates are for each clock, of what kernels reach rather than of data sheets."""

    shared_bytes: int
    memory: float  # bytes from device memory, the multiprocessor's share
    cache: float  # bytes from L2
    products: int  # int8 multiply-adds of mma.sync
    kernels: tuple[str, ...] = ("mma",)  # that run there, the fastest last


KB = 1024
LIMITS = {
    "sm_80": Limits(164 * KB, 11.8, 36, 2000),
    "sm_86": Limits(100 * KB, 5.5, 16, 1000),
    "sm_89": Limits(100 * KB, 2.3, 14, 1000),
    "sm_90a": Limits(228 * KB, 14.4, 24, 2700, ("mma", "wgmma")),
    "sm_120": Limits(100 * KB, 4.0, 14, 1000),
}
RESERVED = 1 * KB  # of shared memory, by the system, for each block


@cache
def card_of(device: torch.device) -> Card:
    """The card of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.name, architecture(device), properties.multi_processor_count)
