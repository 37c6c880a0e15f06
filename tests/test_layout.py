"""Names, shapes and sizes of a checkpoint's tensors."""

import dataclasses

import pytest
from conftest import GROUP_SIZES, tensors_of

from qoq import layout
from qoq.checkpoint import Checkpoint
from qoq.errors import QuantizationError
from qoq.models.source import open_source


def test_a_group_size_must_divide_every_input(llama):
    spec = open_source(str(llama)).spec
    for group_size in GROUP_SIZES:
        layout.check_group_size(spec, group_size)
    narrow = dataclasses.replace(spec, intermediate_size=192)
    message = (
        r"mlp.down_proj: 192 input features are not a multiple of group size 128; fitting here: --group-size 64 or -1"
    )
    with pytest.raises(QuantizationError, match=message):
        layout.check_group_size(narrow, 128)
    layout.check_group_size(narrow, 64)
    odd = dataclasses.replace(spec, intermediate_size=160)
    with pytest.raises(QuantizationError, match=r"fitting here: --group-size -1 \(-1: per channel\)"):
        layout.check_group_size(odd, 64)
    layout.check_group_size(odd, -1)
    with pytest.raises(
        QuantizationError, match=r"mlp.gate_proj is 144 x 256; the format needs both .* multiples of 32"
    ):
        layout.check_group_size(dataclasses.replace(spec, intermediate_size=144), -1)


def test_expected_tensors_are_those_written(any_checkpoint):
    made = Checkpoint(any_checkpoint)
    expected = layout.expected_tensors(made.spec, 128, made.kv_cache)
    assert {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors_of(any_checkpoint).items()
    } == expected
    assert layout.size_in_bytes(made.spec, 128, made.kv_cache) == sum(entry.bytes for entry in made.entries.values())
