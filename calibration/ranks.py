"""The processes of one run, each with a share of the samples. Alone, every method does nothing.

Statistics are summed over ranks; decisions are made by rank 0 and shared, so that all ranks hold the same bits. Every
exchange begins with a word from each rank, so that a rank that fails is heard of by those that wait for it, wherever
they are: all of them end.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qoq.errors import QoqError, first_line

Key = TypeVar("Key")
PATIENCE = timedelta(hours=2)  # others may wait for rank 0 to hash, quantize or verify


class RankError(QoqError):
    """Another rank failed."""


class RankGone(QoqError):
    """Another rank does not answer."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def of_environment() -> "Ranks":
        """As torchrun says; alone where nobody says anything."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        return Ranks.start(int(os.environ.get("RANK", "0")), size) if size > 1 else Ranks()

    def device(self, asked: str) -> str:
        """The device of this rank where "cuda" is asked for: one for each rank of a host."""
        if asked != "cuda" or self.size == 1:
            return asked
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        if local >= torch.cuda.device_count():
            raise RankError(f"{torch.cuda.device_count()} CUDA devices here, expected one for each rank of this host")
        torch.cuda.set_device(local)
        return f"cuda:{local}"

    @staticmethod
    def start(rank: int, size: int) -> "Ranks":
        """Meet the others where the environment says (torchrun's MASTER_ADDR and MASTER_PORT)."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        try:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise RankError(f"rank {rank} of {size} did not meet the others ({first_line(error)})") from None
        return Ranks(rank, size)

    def share_of(self, samples: int) -> slice:
        """Which samples are this rank's: a row of neighbours, as even as can be."""
        return slice(self.rank * samples // self.size, (self.rank + 1) * samples // self.size)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in here on one rank ends all of them.

        Rank 0 raises what failed, its own error or RankError with that of another; the others, which it speaks for, end
        with exit code 1.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
            self._hear(None)
        except RankGone:
            raise
        except RankError:
            if self.rank:
                raise SystemExit(1) from None
            raise
        except QoqError as error:
            self._tell(str(error))
            if self.rank:
                raise SystemExit(1) from None
            raise
        except BaseException as error:
            self._tell(f"{type(error).__name__}: {error}")
            raise
        finally:
            dist.destroy_process_group()

    def _tell(self, trouble: str) -> None:
        with suppress(RankError, RankGone):
            self._hear(trouble)

    def sum(self, *tensors: Tensor) -> None:
        """Add up over ranks, in place."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def max(self, *tensors: Tensor) -> None:
        """The largest over ranks, in place."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def first(self, x: Tensor, count: int) -> Tensor:
        """The first `count` of the samples x (samples, ...) of all ranks, fewer where there are no more."""
        if self.size == 1:
            return x[:count]
        held = torch.zeros(self.size, dtype=torch.int64)
        held[self.rank] = len(x)
        self.sum(held)
        parts: list[Tensor] = []
        for rank, samples in enumerate(held.tolist()):
            wanted = min(samples, count - sum(len(part) for part in parts))
            part = x[:wanted].contiguous() if rank == self.rank else x.new_empty(wanted, *x.shape[1:])
            self._exchange(partial(dist.broadcast, part, rank))
            parts.append(part)
        return torch.cat(parts)

    def share(
        self, tensors: Mapping[Key, Tensor], facts: Any, device: torch.device | str
    ) -> tuple[dict[Key, Tensor], Any]:
        """What rank 0 gives, on every rank: its tensors, on `device`, and plain Python values."""
        if self.size == 1:
            return dict(tensors), facts
        kinds = [(key, tensor.dtype, tensor.shape) for key, tensor in tensors.items()]
        box = [(kinds, facts)]
        self._exchange(lambda: dist.broadcast_object_list(box, 0, device=torch.device("cpu")))
        shared = {  # between exchanges, where others hear of a rank that has no memory for it
            key: tensors[key].contiguous() if self.rank == 0 else torch.empty(shape, dtype=dtype, device=device)
            for key, dtype, shape in box[0][0]
        }
        self._exchange(lambda: [dist.broadcast(own, 0) for own in shared.values()])
        return shared, box[0][1]

    def _reduce(self, tensors: tuple[Tensor, ...], operation: Any) -> None:
        if self.size > 1:
            self._exchange(lambda: [dist.all_reduce(tensor, operation) for tensor in tensors])

    def _exchange(self, work: Callable[[], Any]) -> None:
        self._hear(None)
        self._with_others(work)

    def _hear(self, trouble: str | None) -> None:
        """Tell all ranks what is wrong here; raise RankError for what is wrong anywhere."""
        words: list[str | None] = [None] * self.size
        self._with_others(lambda: dist.all_gather_object(words, trouble))
        found = [f"rank {rank}: {word}" if rank else word for rank, word in enumerate(words) if word is not None]
        if found:
            raise RankError(found[0])

    def _with_others(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except RuntimeError as error:
            raise RankGone(f"rank {self.rank}: another rank is gone ({first_line(error)})") from None
