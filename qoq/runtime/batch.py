"""What one step computes, as tensors: the tokens of all its sequences, one behind the other."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qoq.paged import PAGE
from qoq.runtime.scheduler import Chunk, Request

GATHERED_TOKENS = 16384  # whose keys and values prefill attention unpacks at once, at least
ALIGNMENT = 16  # bytes
STAGED = ("ids", "positions", "slots", "block_tables", "context_lens")  # what a graph takes over of a batch


@dataclass(frozen=True)
class Prefill:
    """Neighbouring sequences of a batch whose attention is computed at once."""

    sequences: slice  # of the batch's block tables
    tokens: slice  # of the batch's tokens
    new: tuple[int, ...]  # tokens of each, on the host
    contexts: tuple[int, ...]  # tokens that the last of them sees, itself included
    new_starts: Tensor  # (sequences + 1,) int32: 0, and the sums of `new`
    context_starts: Tensor  # (sequences + 1,) int32


@dataclass(frozen=True)
class Batch:
    """The tokens of a step: one of each sequence in decode, then the chunks of those in prefill.

    A step of decodes alone may have rows beyond its sequences (`Batches`), which stand for nobody: they keep no K and
    V, and see no tokens.
    """

    ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    slots: Tensor  # (T,) int64
    block_tables: Tensor  # (S, max_pages) int32
    context_lens: Tensor  # (S,) int32: tokens that a sequence's last token sees, itself included
    staged: Tensor  # (bytes,) uint8, of which those above are views
    sampled: Tensor | slice  # the R tokens whose successors are wanted: (R,) int64 indices, or the first R
    sampled_positions: Tensor  # (R,) int64: of these successors
    decodes: int
    prefills: tuple[Prefill, ...]

    def enter(self, memory: Tensor) -> "Batch":
        """Copy what is staged to the beginning of `memory`, uint8 on the device; the batch that is there now."""
        memory = memory[: len(self.staged)]
        memory.copy_(self.staged)

        def there(x: Tensor) -> Tensor:
            first = x.storage_offset() * x.element_size()
            return memory[first : first + x.nbytes].view(x.dtype).view(x.shape)

        fields: dict[str, Any] = {name: there(getattr(self, name)) for name in STAGED}
        return replace(self, staged=memory, **fields)


class Batches:
    """Makes the batches of an executor; between steps it remembers the block tables.

    Args:
        max_requests: sequences of one step.
        max_pages: of a sequence.
        sizes: rows that a step of decodes alone may have, rising up to max_requests; empty: as many as it needs.
    """

    def __init__(self, max_requests: int, max_pages: int, device: torch.device, sizes: Sequence[int] = ()):
        self.device, self.sizes = device, sizes
        self.tables = np.zeros((max_requests, max_pages), dtype=np.int32)
        self.rows: list[tuple[list[int], int]] = [([], 0)] * max_requests  # the list in each row and its length then
        self.gathered = max(max_pages * PAGE, GATHERED_TOKENS)

    def of(self, chunks: Sequence[Chunk], sampled: Mapping[Request, int] = {}, tokens: Tensor | None = None) -> Batch:
        """The batch of chunks in this order, decodes first.

        Args:
            sampled: of each request whose last token nobody has read yet, where it is in `tokens`.
            tokens: (n,) int64 on the device.
        """
        decodes = sum(chunk.decodes for chunk in chunks)
        counts = np.array([chunk.count for chunk in chunks], dtype=np.int64)
        begins = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        contexts, ends = begins + counts, counts.cumsum()
        total = int(counts.sum())
        row = np.repeat(np.arange(len(chunks)), counts)  # of each token
        positions = np.arange(total) - (ends - counts - begins)[row]
        ids: list[int] = []
        unread: list[tuple[int, int]] = []
        for number, chunk in enumerate(chunks):
            request, start, count = chunk.request, chunk.start, chunk.count
            if self.rows[number] != (request.pages, len(request.pages)):
                self._write(number, request.pages)
            known = len(request.tokens)
            if start + count > known:  # the last one is unread
                unread.append((len(ids) + count - 1, sampled[request]))
                ids += request.tokens[start:known]
                ids.append(0)
            elif count == 1:
                ids.append(request.tokens[start])
            else:
                ids += request.tokens[start : start + count]
        slots = self.tables[row, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
        samples = np.array([chunk.samples for chunk in chunks], dtype=bool)
        groups = self._groups(contexts[decodes:].tolist(), decodes)
        starts = [_starts(values[group]) for group in groups for values in (counts, contexts)]
        beyond = self._beyond(len(chunks)) if decodes == len(chunks) else 0
        rows = np.zeros((3, total + beyond), dtype=np.int64)
        rows[2] = -1
        rows[0, :total], rows[1, :total], rows[2, :total] = ids, positions, slots
        seen = np.zeros(len(chunks) + beyond, dtype=np.int32)
        seen[: len(chunks)] = contexts
        staged, views = stage(
            [
                rows,
                self.tables[: len(seen)],
                seen,
                np.array(unread, dtype=np.int64).reshape(-1, 2).T,
                np.stack(((ends - 1)[samples], contexts[samples])),
                *starts,
            ],
            self.device,
        )
        own, tables, context_lens, links, wanted, *starts_there = views
        if unread:
            assert tokens is not None
            own[0].index_copy_(0, links[0], tokens.index_select(0, links[1]).clamp_min(0))  # -1: none could be chosen
        first = [0, *ends.tolist()]
        prefills = (
            Prefill(
                sequences=group,
                tokens=slice(first[group.start], first[group.stop]),
                new=tuple(counts[group].tolist()),
                contexts=tuple(contexts[group].tolist()),
                new_starts=starts_there[2 * number],
                context_starts=starts_there[2 * number + 1],
            )
            for number, group in enumerate(groups)
        )
        return Batch(
            ids=own[0],
            positions=own[1],
            slots=own[2],
            block_tables=tables,
            context_lens=context_lens,
            staged=staged,
            sampled=slice(total) if len(chunks) == total and samples.all() else wanted[0],
            sampled_positions=wanted[1],
            decodes=decodes + beyond,
            prefills=tuple(prefills),
        )

    def _beyond(self, decodes: int) -> int:
        """Rows that such a step has beyond its sequences."""
        return self.sizes[bisect_left(self.sizes, decodes)] - decodes if self.sizes else 0

    def _write(self, row: int, pages: list[int]) -> None:
        """A request's list of pages only grows while it is the same list."""
        known, count = self.rows[row]
        begin = count if known is pages else 0
        self.tables[row, begin : len(pages)] = pages[begin:]
        self.rows[row] = pages, len(pages)

    def _groups(self, contexts: list[int], first: int) -> list[slice]:
        """Sequences from `first` on, in groups whose contexts are not more than `gathered` together."""
        groups, begin, total = [], first, 0
        for row, context in enumerate(contexts, first):
            if total and total + context > self.gathered:
                groups.append(slice(begin, row))
                begin, total = row, 0
            total += context
        return [*groups, slice(begin, first + len(contexts))] if contexts else []


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], lengths.cumsum())).astype(np.int32)


def stage(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Arrays as tensors on a device, and the bytes they are views of: in one copy, for which the host does not wait."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]).tolist()
    places = [slice(begin, begin + array.nbytes) for begin, array in zip([0, *ends], arrays, strict=False)]
    pinned = device.type == "cuda"  # torch keeps such memory until it is copied
    host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=pinned)
    view = host.numpy()
    for place, array in zip(places, arrays, strict=True):
        view[place] = array.reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    dtypes = [torch.from_numpy(array[:0]).dtype for array in arrays]
    views = [there[p].view(dtype).view(array.shape) for p, dtype, array in zip(places, dtypes, arrays, strict=True)]
    return there, views


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The tensors of `stage`."""
    return stage(arrays, device)[1]
