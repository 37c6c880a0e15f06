import numpy as np
import pytest
import torch

from qoq.runtime.batch import STAGED, Batches, stage
from qoq.runtime.scheduler import Chunk, Request

CPU = torch.device("cpu")


def decode(number, length):
    """The last token of an answer; pages of 64 tokens."""
    request = Request(str(number), [7], length + 1, pages=[10 * number + page for page in range(-(-length // 64))])
    request.tokens += [number + index for index in range(length - 1)]
    return Chunk(request, length - 1, 1, True)


def prefill(length, samples=True):
    request = Request("prompt", list(range(length)), length + 1, pages=list(range(-(-length // 64))))
    return Chunk(request, 0, length, samples)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)])
def test_rows_beyond_the_sequences_stand_for_nobody(count, rows):
    chunks = [decode(number, 60 + 3 * number) for number in range(count)]
    plain, padded = Batches(6, 4, CPU).of(chunks), Batches(6, 4, CPU, [1, 2, 4, 6]).of(chunks)
    assert padded.decodes == len(padded.ids) == rows and padded.prefills == ()
    for name in STAGED:
        own, expected = getattr(padded, name), getattr(plain, name)
        assert own.shape == (rows, *expected.shape[1:]) and torch.equal(own[:count], expected)
    assert (padded.slots[count:] == -1).all() and not padded.context_lens[count:].any()
    assert padded.sampled == plain.sampled == slice(count)
    assert torch.equal(padded.sampled_positions, plain.sampled_positions)


def test_only_steps_of_decodes_alone_have_them():
    batch = Batches(4, 4, CPU, [4]).of([decode(1, 70), prefill(30)])
    assert len(batch.ids) == 31 and batch.decodes == 1 and batch.context_lens.tolist() == [70, 30]


def test_batches_of_all_sizes_enter_one_memory():
    """As graphs take them over, whatever was there before."""
    sizes = [1, 2, 4]
    batches = Batches(4, 4, CPU, sizes)
    memory = torch.full((1000,), 255, dtype=torch.uint8)
    tokens = torch.tensor([40, 50])
    for chunks in ([decode(1, 70), decode(2, 200), decode(3, 2)], [decode(4, 130)], [decode(5, 9), decode(1, 66)]):
        unread = chunks[0].request
        unread.tokens.pop()
        batch = batches.of(chunks, {unread: 1}, tokens)
        assert batch.ids[0] == 50
        own = Batches(4, 4, CPU, [len(batch.ids)]).of([]).enter(memory)
        assert len(own.ids) == len(batch.ids) and (own.slots == -1).all() and not own.context_lens.any()
        own.staged.copy_(batch.staged[: len(own.staged)])
        for name in STAGED:
            assert torch.equal(getattr(own, name), getattr(batch, name))
            assert memory.data_ptr() <= getattr(own, name).data_ptr() < memory.data_ptr() + len(memory)


def test_sampled_tokens_are_all_or_some():
    batches = Batches(4, 4, CPU)
    assert batches.of([decode(1, 70), decode(2, 3)]).sampled == slice(2)
    for samples, expected in ((True, [0, 30]), (False, [0])):
        sampled = batches.of([decode(1, 70), prefill(30, samples)]).sampled
        assert isinstance(sampled, torch.Tensor) and sampled.tolist() == expected


def test_arrays_are_staged_as_they_are():
    arrays: list[np.ndarray] = [
        np.arange(7, dtype=np.int64).reshape(7, 1),
        np.zeros((2, 0), np.int64),
        np.array([3], np.float32),
    ]
    staged, views = stage(arrays, CPU)
    assert staged.dtype == torch.uint8
    for view, array in zip(views, arrays, strict=True):
        assert view.shape == array.shape and np.array_equal(view.numpy(), array)
    staged.zero_()
    assert not views[0].any() and not views[2].any()
