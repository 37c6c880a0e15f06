"""QServe's tile order for W4 weights: each `pack_x` beside its `unpack_x`.

`qweight` is [N, K/2] bytes, made of 32 x 32 tiles of 512 bytes, tiles row by row over (N/32, K/32). With
n = 32*n0 + 16*a + 8*b + c and k = 32*k0 + 16*d + 4*e + f, the code of (n, k) lies at

    byte (n0 * K/32 + k0) * 512 + c*64 + e*16 + d*8 + b*4 + f      low nibble if a == 0, high if a == 1

    one tile    c: 8 x 64 B   |  e: 4 x 16 B   |  d: 2 x 8 B  |  b: 2 x 4 B  |  f: 4 x 1 B  |  a: nibbles

so that lane 4*c + e of a warp loads its 16 bytes at once. `s2_scales` and `s2_zeros` are [G, N]; inside each
block of 32 columns the channels stand in the order 0, 8, 16, 24, 1, 9, 17, 25, ... `s2_zeros` holds -z mod 256.

Concatenating packed tensors of N % 32 == 0 (along N; s2 tensors along columns) packs the concatenation.

`interleave_x` puts the rows of such a concatenation of a gate and an up, of F rows each, into the order in which a
kernel makes silu(gate) * up of them: rows 0..7 of the gate, rows 0..7 of the up, rows 8..15 of the gate, and so on.
"""

import torch
from torch import Tensor

from qoq.errors import CheckpointError

TILE = 32
INTERLEAVED = 8  # rows of a gate, then of an up


def pack_qweight(codes: Tensor) -> Tensor:
    """(N, K) uint8 codes in 0..15, N % 32 == K % 32 == 0 -> (N, K/2) int8."""
    n, k = codes.shape
    tiles = codes.view(n // TILE, 2, 2, 8, k // TILE, 2, 4, 4)  # n0 a b c k0 d e f
    planes = tiles.permute(1, 0, 4, 3, 6, 5, 2, 7)  # a n0 k0 c e d b f
    packed = planes[0] | (planes[1] << 4)
    return packed.reshape(n, k // 2).view(torch.int8)


def unpack_qweight(qweight: Tensor) -> Tensor:
    """(N, K/2) int8 -> (N, K) uint8 codes."""
    n, k = qweight.shape[0], qweight.shape[1] * 2
    packed = qweight.contiguous().view(torch.uint8).view(n // TILE, k // TILE, 8, 4, 2, 2, 4)  # n0 k0 c e d b f
    planes = torch.stack((packed & 15, packed >> 4))  # a n0 k0 c e d b f
    return planes.permute(1, 0, 6, 3, 2, 5, 4, 7).reshape(n, k)  # n0 a b c k0 d e f


def pack_level2(values: Tensor) -> Tensor:
    """(N, G) int32, taken mod 256 -> (G, N) int8 in the kernels' column order."""
    n, groups = values.shape
    wrapped = (values & 255).to(torch.uint8).view(torch.int8)
    return wrapped.T.reshape(groups, n // TILE, 4, 8).transpose(2, 3).reshape(groups, n).contiguous()


def unpack_level2(packed: Tensor) -> Tensor:
    """(G, N) int8 -> (N, G) int32 in natural order, values in [-128, 127]."""
    groups, n = packed.shape
    natural = packed.view(groups, n // TILE, 8, 4).transpose(2, 3).reshape(groups, n)
    return natural.T.to(torch.int32, memory_format=torch.contiguous_format)


def interleave_rows(values: Tensor) -> Tensor:
    """(2F,), F % 32 == 0, a value for each row of gate and up -> the same, interleaved."""
    return values.view(2, -1, INTERLEAVED).transpose(0, 1).flatten()


def interleave_qweight(qweight: Tensor) -> Tensor:
    """`pack_qweight` of gate and up (2F, K) -> that of their interleaved rows."""
    n, half_k = qweight.shape
    sides = qweight.view(torch.uint8).view(2, n // 2 // TILE, -1, 2, 4)  # gate or up, n0, k0 c e d, b, f
    first, second = sides.unbind(3)
    strips = torch.stack((first & 15 | second << 4, first >> 4 | second & 240))  # a; b is the nibble now
    return strips.permute(2, 0, 3, 1, 4).reshape(n, half_k).view(torch.int8)  # n0 a, k0 c e d, gate or up, f


def interleave_level2(packed: Tensor) -> Tensor:
    """`pack_level2` or `pack_zeros` of gate and up, (G, 2F) -> that of their interleaved rows."""
    columns = packed.view(packed.shape[0], 2, -1, 8, 2, 2)  # group, gate or up, strip, then 8 c + 16 a + 8 b as stored
    return columns.permute(0, 2, 4, 3, 5, 1).reshape(packed.shape)


def pack_zeros(z: Tensor) -> Tensor:
    """(N, G) int32 zero points -> s2_zeros (G, N) int8: -z mod 256."""
    return pack_level2(-z)


def find_zeros(s2_zeros: Tensor, codes: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
    """The zero points of s2_zeros (G, N) int8, whose low bytes it holds, for codes (N, K) and s2 (N, G) int32.

    z (N, G) int32 is the one value that keeps codes * s2 - z in [-128, 127]; the second result, (N, G) bool, says
    where there is none because the group spans more than int8 holds.
    """
    grouped = codes.unflatten(1, (s2.shape[1], -1))
    low = grouped.amin(dim=2).to(torch.int32) * s2
    high = grouped.amax(dim=2).to(torch.int32) * s2
    residue = -unpack_level2(s2_zeros)
    z = low + 128 - torch.remainder(low + 128 - residue, 256)  # the largest z <= low + 128 of that residue
    return z, high - z > 127


def unpack_zeros(s2_zeros: Tensor, codes: Tensor, s2: Tensor, name: str = "s2_zeros") -> Tensor:
    """`find_zeros`, where all groups are legal.

    Raises:
        CheckpointError: a group spans more than int8 holds, so no such z exists.
    """
    z, broken = find_zeros(s2_zeros, codes, s2)
    if broken.any():
        raise CheckpointError(f"{name}: {explain_zero(broken, s2_zeros, codes, s2)}")
    return z


def explain_zero(broken: Tensor, s2_zeros: Tensor, codes: Tensor, s2: Tensor) -> str:
    """What is wrong with the first of the `broken` groups of `find_zeros`."""
    row, group = (int(i) for i in broken.nonzero()[0])
    span = codes.unflatten(1, (s2.shape[1], -1))[row, group].to(torch.int32) * s2[row, group]
    zero = int(-unpack_level2(s2_zeros)[row, group])
    return (
        f"row {row}, group {group} is illegal: codes * s2 span {int(span.min())}..{int(span.max())} "
        f"and zero {zero} mod 256 leave [-128, 127]"
    )
