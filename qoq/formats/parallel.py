"""Packed linears cut for tensor parallelism, as Megatron cuts: q, k, v, gate, up by rows; o and down by columns.

A column cut goes through the tiles: `qweight` is (N/32, K/32, 512) bytes, whatever its nominal shape (N, K/2), so
that a slice of its columns would mix inputs. Rows and groups are contiguous on their own.
"""

from collections.abc import Mapping

from torch import Tensor

from qoq.layout import LEVEL2
from qoq.models.architecture import LINEARS, ModelSpec
from qoq.packing import TILE

BY_INPUT = ("self_attn.o_proj", "mlp.down_proj")
TILE_BYTES = TILE * TILE // 2


def legal_degrees(spec: ModelSpec, group_size: int, most: int = 64) -> list[int]:
    """The degrees of tensor parallelism that cut between heads, tiles and groups; KV heads are whole on each card."""
    return [size for size in range(1, most + 1) if why_not(spec, group_size, size) is None]


def why_not(spec: ModelSpec, group_size: int, size: int) -> str | None:
    """What a degree would cut through, or None if it is legal."""
    for count, what in ((spec.num_heads, "attention heads"), (spec.num_kv_heads, "KV heads")):
        if count % size:
            return f"{count} {what}"
    for name in LINEARS:
        n, k = spec.linear_shape(name)
        features, unit = (k, TILE if group_size == -1 else group_size) if name in BY_INPUT else (n, TILE)
        if features % (size * unit):
            kind = "input" if name in BY_INPUT else "output"
            return f"{features} {kind} features of {name} in units of {unit}"
    return None


def cut(linear: str, tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """The part of a rank: suffix -> tensor of one of `LINEARS`, whole, to its slice. `size` is legal.

    The outputs of o and down of all ranks add up; their bias is with rank 0, zero elsewhere.
    """
    by_input = linear in BY_INPUT
    parts = {}
    for suffix, tensor in tensors.items():
        if suffix == "qweight" and by_input:
            n, half = tensor.shape
            tiles = tensor.view(n // TILE, half * 2 // TILE, TILE_BYTES).chunk(size, dim=1)[rank]
            part = tiles.reshape(n, half // size)
        elif suffix in LEVEL2:
            part = tensor.chunk(size, dim=0 if by_input else 1)[rank]
        elif suffix == "weight":  # of a linear in 16 bits
            part = tensor.chunk(size, dim=1 if by_input else 0)[rank]
        elif not by_input:
            part = tensor.chunk(size)[rank]
        else:
            part = tensor * 0 if suffix == "bias" and rank else tensor
        parts[suffix] = part.contiguous()
    return parts
