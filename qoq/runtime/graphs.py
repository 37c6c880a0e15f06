"""Decode steps as CUDA graphs: one launch instead of hundreds."""

from typing import Any

import torch
from torch import Tensor

from qoq.kernels.gemm import workspace
from qoq.runtime.batch import Batch, Batches
from qoq.runtime.executor import Executor


def batch_sizes(most: int) -> list[int]:
    """For which a graph is captured: 1, 2, 4, 8, then every eighth up to 256, then every 32nd, and `most`."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, most, 32)]
    return [size for size in sizes if size < most] + [most]


class GraphExecutor:
    """An `Executor` on a GPU, with its interface; steps of decodes alone replay a graph.

    The graph of a size takes batches of so many rows (`Batches`), which it reads from one place. All graphs share one
    pool of memory. To be made once the cache has its pages, whose addresses stay.
    """

    def __init__(self, executor: Executor, max_requests: int):
        self.executor = executor
        self.logits = executor.logits
        self.sizes = batch_sizes(max_requests)
        device, hidden = executor.device, executor.spec.hidden_size
        memory = self._nobody(max_requests).staged
        self.batches: dict[int, Batch] = {}
        self.out = torch.zeros(max_requests, hidden, dtype=torch.float16, device=device)
        workspace(device)
        pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        for size in reversed(self.sizes):  # the largest first: the others fit into its memory
            self.batches[size] = self._nobody(size).enter(memory)
            self.graphs[size] = self._capture(size, pool)

    def hidden(self, batch: Batch) -> Tensor:
        """As `Executor.hidden`; the result is overwritten by the next step."""
        if batch.prefills:
            return self.executor.hidden(batch)
        size = len(batch.ids)
        own = self.batches[size].staged
        own.copy_(batch.staged[: len(own)])  # what lies behind is not read by layers
        self.graphs[size].replay()
        return self.out[:size]

    def _nobody(self, size: int) -> Batch:
        return Batches(size, self.executor.max_pages, self.executor.device, [size]).of([])

    @torch.inference_mode()
    def _capture(self, size: int, pool: Any) -> torch.cuda.CUDAGraph:
        batch = self.batches[size]
        self.executor.logits(self.executor.hidden(batch))  # compiles and loads what they need, which a capture must not
        torch.cuda.synchronize(self.executor.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.out[:size].copy_(self.executor.hidden(batch))
        return graph
