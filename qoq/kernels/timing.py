"""How long a GPU takes for a call.

A time is the median over replays of a CUDA graph that runs the call on one set of inputs after the other, so that
they come from device memory, as weights and caches do in a model.
"""

import math
import multiprocessing
import os
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from qoq.kernels import build
from qoq.kernels.build import Specialisation
from qoq.kernels.cards import Card, card_of
from qoq.roofline import DataSheet, sheet_of

GRAPH_US, REPLAYS = 1000, 9  # a graph's time, roughly, or more; measured replays of it, after one more
BEYOND_CACHE = 4  # times L2: even one that evicts at random then keeps but 2 % until it is read again
MOST_COPIES = 256
COPY_BYTES = 1 << 29


@dataclass(frozen=True)
class Machine:
    """A GPU, as far as measurements must know it."""

    device: torch.device
    card: Card
    cache_bytes: int  # of L2
    copy: float  # bytes/s that a large device copy reads and writes
    sheet: DataSheet | None

    @staticmethod
    def here() -> "Machine":
        """The current device, its copy measured.

        Raises:
            KernelError: no CUDA device, or one that is too old.
        """
        build.architecture(torch.device("cuda", 0))
        device = torch.device("cuda", torch.cuda.current_device())
        card = card_of(device)
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        return Machine(device, card, cache_bytes, copy_rate(device), sheet_of(card.name))

    def copies(self, size: int) -> int:
        """How many sets of inputs and outputs, `size` bytes each, L2 cannot hold; MOST_COPIES for small ones."""
        return min(-(-BEYOND_CACHE * self.cache_bytes // size), MOST_COPIES)


def copy_rate(device: torch.device) -> float:
    """bytes/s that a large device copy reads and writes."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e6 * COPY_BYTES / microseconds([partial(target.copy_, source)])


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one of `calls`, which a CUDA graph runs in turn; outputs live until their call comes again."""
    calls[0]()  # compiles, loads, allocates workspaces
    turns = math.ceil(GRAPH_US / (len(calls) * _between(calls[:1])[0]))
    outputs: deque[object] = deque(maxlen=len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for call in calls:
                outputs.append(call())
    graph.replay()
    return statistics.median(_between([graph.replay] * REPLAYS)) / (turns * len(calls))


def _between(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Microseconds of each, queued without a wait, so that the host's time hides behind the device's."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    events[0].record()
    for call, event in zip(calls, events[1:], strict=True):
        call()
        event.record()
    events[-1].synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in pairwise(events)]


def compile_all(wanted: Sequence[Specialisation], arch: str) -> None:
    """Fill the cache of cubins on all cores: NVRTC compiles one source at a time in a process.

    Raises:
        KernelError: as `build.compile_cubin`.
    """
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(build.compile_cubin, one.source, arch, dict(one.defines)) for one in wanted]
        for job in jobs:
            job.result()
