"""Norm folding and rotation (QServe 4.3.1; QuaRot, arXiv 2404.00456): offline and exact, in float64.

The residual stream is rotated by R (hidden x hidden), the values of each head by H (head_dim x head_dim). With
unit norm gains RMSNorm commutes with R, so nothing is left to do at run time. Q and K are not touched.
"""

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from qoq.models.architecture import LINEARS, ModelSpec

Layer = dict[str, Tensor]
READERS = [name for name, producer in LINEARS.items() if producer.endswith("layernorm")]
WRITERS = ["self_attn.o_proj", "mlp.down_proj"]
ROWS_AT_ONCE = 2048  # of an embedding, in float64


def rotation(n: int, seed: int) -> Tensor:
    """Orthogonal (n, n) float64: a Hadamard matrix with random column signs where one is known, else random.

    Orders k * 2**p are known for k = 1 and for Paley's constructions, which covers the usual hidden sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    hadamard = hadamard_matrix(n)
    if hadamard is None:
        gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        return q * r.diagonal().sign()
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return hadamard * signs / math.sqrt(n)


def hadamard_matrix(n: int) -> Tensor | None:
    """A Hadamard matrix of order n, entries +-1 float64, or None where no construction here gives one."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    for power in range(n // odd):  # the smallest Paley factor odd * 2**power that divides n
        if (order := odd << power) > n:
            return None
        if (base := _paley(order)) is not None:
            break
    else:
        return None
    while len(base) < n:
        base = torch.cat((torch.cat((base, base), 1), torch.cat((base, -base), 1)))
    return base


def _paley(order: int) -> Tensor | None:
    """Order 1, 2, q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4), for a prime power q."""
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and (q := _jacobsthal(order - 1)) is not None:
        conference = torch.zeros(order, order, dtype=torch.float64)
        conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, -1, q
        return conference + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if (half - 1) % 4 == 1 and (q := _jacobsthal(half - 1)) is not None:
        conference = torch.zeros(half, half, dtype=torch.float64)
        conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, q
        sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        skew = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, sylvester) + torch.kron(torch.eye(half, dtype=torch.float64), skew)
    return None


def _jacobsthal(q: int) -> Tensor | None:
    """chi(a - b) over GF(q), (q, q) float64, chi the quadratic character; None if q is no odd prime power."""
    prime = next((p for p in range(2, q + 1) if q % p == 0), 0)
    degree = 0 if prime < 3 else round(math.log(q, prime))
    if not degree or prime**degree != q:
        return None
    elements = list(product(range(prime), repeat=degree))
    modulus = next(poly for poly in elements if _irreducible(poly, prime, degree))
    squares = {_multiply(x, x, modulus, prime) for x in elements if any(x)}
    chi = {x: 0 if not any(x) else 1 if x in squares else -1 for x in elements}
    rows = [[chi[tuple((a - b) % prime for a, b in zip(x, y, strict=True))] for y in elements] for x in elements]
    return torch.tensor(rows, dtype=torch.float64)


def _multiply(x: tuple[int, ...], y: tuple[int, ...], modulus: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """x * y in GF(prime)[t] / (t**d + modulus), coefficients lowest first."""
    degree = len(x)
    wide = [0] * (2 * degree - 1)
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            wide[i + j] += a * b
    for top in range(2 * degree - 2, degree - 1, -1):
        for i, m in enumerate(modulus):
            wide[top - degree + i] -= wide[top] * m
    return tuple(value % prime for value in wide[:degree])


def _irreducible(poly: tuple[int, ...], prime: int, degree: int) -> bool:
    """t**degree + poly has no root: enough for the degrees 1 to 3 that occur here."""
    roots = range(prime) if 1 < degree <= 3 else ()
    return degree <= 3 and all(
        (pow(t, degree, prime) + sum(c * t**i for i, c in enumerate(poly))) % prime for t in roots
    )


def fold_norms(layer: Layer) -> None:
    """Move the gains of both block norms into the linears that read them; the gains become 1."""
    for name in READERS:
        weight = layer[f"{name}.weight"]
        layer[f"{name}.weight"] = (weight.double() * layer[f"{LINEARS[name]}.weight"].double()).to(weight.dtype)
    for norm in {LINEARS[name] for name in READERS}:
        layer[f"{norm}.weight"] = torch.ones_like(layer[f"{norm}.weight"])


def rotate_residual(layer: Layer, r: Tensor) -> None:
    """Inputs W <- W R, outputs W <- R^T W and b <- R^T b, for an R (hidden, width). Norm gains must be 1."""
    for name in READERS:
        layer[f"{name}.weight"] = rotate_rows(layer[f"{name}.weight"], reading(r))
        layer[f"{LINEARS[name]}.weight"] = torch.ones(r.shape[1], device=r.device)
    for name in WRITERS:
        weight = layer[f"{name}.weight"]
        layer[f"{name}.weight"] = (r.T @ weight.double()).to(weight.dtype)
        if (bias := layer.get(f"{name}.bias")) is not None:
            layer[f"{name}.bias"] = (r.T @ bias.double()).to(bias.dtype)


def rotate_values(layer: Layer, spec: ModelSpec, h: Tensor) -> None:
    """Rotate the values of each head, v <- v H, and undo it in o_proj. Legal since attention mixes tokens only."""
    v, o = layer["self_attn.v_proj.weight"], layer["self_attn.o_proj.weight"]
    heads = v.double().unflatten(0, (spec.num_kv_heads, spec.head_dim))
    layer["self_attn.v_proj.weight"] = torch.einsum("hdk,de->hek", heads, h).flatten(0, 1).to(v.dtype)
    if (bias := layer.get("self_attn.v_proj.bias")) is not None:
        rows = bias.double().unflatten(0, (spec.num_kv_heads, spec.head_dim))
        layer["self_attn.v_proj.bias"] = (rows @ h).flatten().to(bias.dtype)
    columns = o.double().unflatten(1, (spec.num_heads, spec.head_dim))
    layer["self_attn.o_proj.weight"] = (columns @ h).flatten(1).to(o.dtype)


def reading(r: Tensor) -> Tensor:
    """What turns the input side of a linear that reads a norm: R (hidden, width), and RMS over width in R's stead.

    RMS over a width that only `hidden` orthogonal directions fill is sqrt(hidden / width) of RMS over hidden.
    """
    return r * math.sqrt(r.shape[0] / r.shape[1])


def rotate_rows(weight: Tensor, r: Tensor) -> Tensor:
    """W R, in the dtype of W."""
    return (weight.double() @ r).to(weight.dtype)


def rotated_slices(matrix: Tensor, r: Tensor, gain: Tensor | None = None) -> Iterator[Tensor]:
    """(W diag(gain)) R of an embedding or lm_head (vocab, hidden), in slices of rows; float32 on the CPU."""
    scaled = r if gain is None else gain.to(r)[:, None] * r
    for rows in matrix.split(ROWS_AT_ONCE):
        yield (rows.to(scaled) @ scaled).to("cpu", torch.float32)
