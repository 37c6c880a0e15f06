"""Decode steps as CUDA graphs: one launch instead of hundreds."""

from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor

from qoq.kernels.gemm import workspace
from qoq.runtime.batch import Batch
from qoq.runtime.executor import Executor


def batch_sizes(most: int) -> list[int]:
    """For which a graph is captured: 1, 2, 4, 8, then every eighth up to 256, then every 32nd, and `most`."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, most, 32)]
    return [size for size in sizes if size < most] + [most]


class GraphExecutor:
    """An `Executor` on a GPU, with its interface; steps without prefill replay a graph.

    A graph reads its batch from fixed places, and rows beyond the batch stand for nobody: they keep no K and V, and see
    no tokens. All graphs share one pool of memory. To be made once the cache has its pages, whose addresses stay.
    """

    def __init__(self, executor: Executor, max_requests: int):
        self.executor = executor
        self.logits = executor.logits
        self.sizes = batch_sizes(max_requests)
        device, hidden = executor.device, executor.spec.hidden_size
        self.batch = Batch(
            ids=torch.zeros(max_requests, dtype=torch.int64, device=device),
            positions=torch.zeros(max_requests, dtype=torch.int64, device=device),
            slots=torch.full((max_requests,), -1, dtype=torch.int64, device=device),
            block_tables=torch.zeros(max_requests, executor.max_pages, dtype=torch.int32, device=device),
            context_lens=torch.zeros(max_requests, dtype=torch.int32, device=device),
            sampled=torch.arange(max_requests, device=device),
            sampled_positions=torch.zeros(max_requests, dtype=torch.int64, device=device),
            decodes=max_requests,
            prefills=(),
        )
        self.out = torch.zeros(max_requests, hidden, dtype=torch.float16, device=device)
        workspace(device)
        pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        for size in reversed(self.sizes):  # the largest first: the others fit into its memory
            self.graphs[size] = self._capture(size, pool)

    def hidden(self, batch: Batch) -> Tensor:
        """As `Executor.hidden`; the result is overwritten by the next step."""
        count = len(batch.ids)
        if batch.prefills or count > self.sizes[-1]:
            return self.executor.hidden(batch)
        size, own = self.sizes[bisect_left(self.sizes, count)], self.batch
        own.ids[:count].copy_(batch.ids)
        own.positions[:count].copy_(batch.positions)
        own.slots[:count].copy_(batch.slots)
        own.slots[count:size].fill_(-1)
        own.block_tables[:count].copy_(batch.block_tables)
        own.context_lens[:count].copy_(batch.context_lens)
        own.context_lens[count:size].zero_()
        self.graphs[size].replay()
        return self.out[:count]

    def _first(self, size: int) -> Batch:
        own = self.batch
        return Batch(
            own.ids[:size],
            own.positions[:size],
            own.slots[:size],
            own.block_tables[:size],
            own.context_lens[:size],
            own.sampled[:size],
            own.sampled_positions[:size],
            size,
            (),
        )

    @torch.inference_mode()
    def _capture(self, size: int, pool: Any) -> torch.cuda.CUDAGraph:
        batch = self._first(size)
        self.executor.logits(self.executor.hidden(batch))  # compiles and loads what they need, which a capture must not
        torch.cuda.synchronize(self.executor.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.out[:size].copy_(self.executor.hidden(batch))
        return graph
