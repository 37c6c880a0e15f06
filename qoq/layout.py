"""Which tensors a checkpoint has, by name, dtype and shape, and what its config.json says of them.

Each linear is `qweight` (N, K/2) int8, `s1_scales` (N,) fp16 and, grouped, `s2_scales`, `s2_zeros` (K/g, N)
int8, or, per channel, `s1_szeros` (N,) fp16; `bias` (N,) fp16 if the model has one. Norms, embeddings and
lm_head are fp16, and so is `weight` (N, K), which a linear left in 16 bits has instead. docs/format.md describes the
bytes.
"""

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch

from qoq import packing
from qoq.errors import QuantizationError
from qoq.models.architecture import EMBEDDING, FINAL_NORM, FUSED, LINEARS, LM_HEAD, ModelSpec
from qoq.recipe import KVCache

OFFSETS = ("self_attn.k_offset", "self_attn.v_offset")  # of the cache quantizer, QServe has none
LEVEL2 = ("s2_scales", "s2_zeros")
Kinds = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape


def check_group_size(spec: ModelSpec, group_size: int) -> None:
    """Refuse shapes that the format cannot hold, before any work.

    Raises:
        QuantizationError: N % 32 != 0 or K % group != 0; says which tensor and which group sizes fit.
    """
    for name in LINEARS:
        n, k = spec.linear_shape(name)
        if n % packing.TILE or k % packing.TILE:
            raise QuantizationError(f"{name} is {n} x {k}; the format needs both to be multiples of {packing.TILE}")
        if group_size != -1 and k % group_size:
            fits = [str(size) for size in (128, 64) if all(spec.linear_shape(x)[1] % size == 0 for x in LINEARS)]
            raise QuantizationError(
                f"{name}: {k} input features are not a multiple of group size {group_size}; "
                f"fitting here: --group-size {' or '.join([*fits, '-1'])} (-1: per channel)"
            )


def check_cache_layers(spec: ModelSpec, kv_cache: KVCache) -> None:
    """Refuse a cache for layers that the model does not have.

    Raises:
        QuantizationError: says which there are.
    """
    last = max(kv_cache.layers_in_8_bits, default=0)
    if last >= spec.num_layers:
        raise QuantizationError(
            f"kv_cache.layers_in_8_bits: {last} is no layer of this model, expected 0 to {spec.num_layers - 1}"
        )


def linear_tensors(n: int, k: int, group_size: int, bias: bool, half: bool = False) -> Kinds:
    """Suffix -> dtype and shape of the tensors of an N x K linear; `half`: one that is left in 16 bits."""
    tensors: Kinds = {"qweight": (torch.int8, (n, k // 2)), "s1_scales": (torch.float16, (n,))}
    if half:
        tensors = {"weight": (torch.float16, (n, k))}
    elif group_size == -1:
        tensors["s1_szeros"] = (torch.float16, (n,))
    else:
        tensors |= {suffix: (torch.int8, (k // group_size, n)) for suffix in LEVEL2}
    if bias:
        tensors["bias"] = (torch.float16, (n,))
    return tensors


def half_linears(spec: ModelSpec, names: Iterable[str]) -> frozenset[str]:
    """The full names of the linears that `names` (full names of linears or of modules that hold some) stand for.

    Raises:
        QuantizationError: a name that is none, or one linear of several that engines run as one.
    """
    every = [f"model.layers.{index}.{name}" for index in range(spec.num_layers) for name in LINEARS]
    wanted, known = set(names) - {"lm_head"}, set()  # that one is in 16 bits anyway
    found = set()
    for linear in every:
        parts = linear.split(".")
        modules = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        known |= modules
        if modules & wanted:
            found.add(linear)
    unknown = sorted(wanted - known)
    if unknown:
        raise QuantizationError(
            f"modules_to_not_convert: {unknown[0]} is no linear or layer of this model; "
            f"names are like model.layers.0 and model.layers.{spec.num_layers - 1}.mlp.down_proj"
        )
    if len(found) == len(every):
        raise QuantizationError("modules_to_not_convert: names every linear, nothing is left to quantize")
    for name in sorted(found):
        own = _within_layer(name)
        prefix = name.removesuffix(own)
        absent = [prefix + other for group in FUSED if own in group for other in group if prefix + other not in found]
        if absent:
            raise QuantizationError(
                f"modules_to_not_convert: {name} without {absent[0]}; those that read one input run as one linear"
            )
    return frozenset(found)


def _within_layer(name: str) -> str:
    """model.layers.0.mlp.up_proj -> mlp.up_proj."""
    return name.split(".", 3)[3]


def expected_tensors(
    spec: ModelSpec, group_size: int, kv_cache: KVCache, half_precision: Collection[str] = ()
) -> Kinds:
    """Every tensor of a checkpoint -> dtype and shape; `half_precision` as `half_linears` gives it."""
    half, hidden = torch.float16, spec.hidden_size
    tensors: Kinds = {EMBEDDING: (half, (spec.vocab_size, hidden))}
    for index in range(spec.num_layers):
        prefix = f"model.layers.{index}."
        for norm, length in spec.norm_shapes().items():
            tensors[f"{prefix}{norm}.weight"] = (half, (length,))
        if kv_cache.offset:
            for name in OFFSETS:
                tensors[prefix + name] = (half, (spec.num_kv_heads, spec.head_dim))
        for name in LINEARS:
            left = prefix + name in half_precision
            parts = linear_tensors(*spec.linear_shape(name), group_size, name in spec.biases, left)
            tensors |= {f"{prefix}{name}.{suffix}": kind for suffix, kind in parts.items()}
    tensors[FINAL_NORM] = (half, (hidden,))
    tensors[LM_HEAD] = (half, (spec.vocab_size, hidden))
    return tensors


def size_in_bytes(spec: ModelSpec, group_size: int, kv_cache: KVCache, half_precision: Collection[str] = ()) -> int:
    """Bytes of all tensors of a checkpoint."""
    kinds = expected_tensors(spec, group_size, kv_cache, half_precision).values()
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds)


def kv_bytes(spec: ModelSpec, kv_cache: KVCache, kv_bits: int = 4) -> int:
    """Bytes of a cached token in all layers, where `kv_bits` are asked for: rows of codes and their grids."""
    every = [kv_cache.bits(layer, kv_bits) for layer in range(spec.num_layers)]
    return 2 * spec.num_kv_heads * sum(spec.head_dim * bits // 8 + (4 if bits < 16 else 0) for bits in every)


def quantization_config(group_size: int, kv_cache: KVCache, half_precision: Collection[str] = ()) -> dict[str, Any]:
    """What config.json says of the checkpoint; the first three keys are what QServe's users had to write by hand."""
    exceptions = {"layers_in_8_bits": list(kv_cache.layers_in_8_bits)} if kv_cache.layers_in_8_bits else {}
    return {
        "quant_method": "qoq",
        "wbits": 4,
        "group_size": group_size,
        "version": 1,
        "activation": {"bits": 8, "granularity": "token"},
        "kv_cache": {
            "bits": 4,
            "granularity": "token_head",
            "symmetric": False,
            "rotation": "hadamard" if kv_cache.rotate else None,
            "offset": kv_cache.offset,
            "clip_ratios": list(kv_cache.clip_ratios),
            **exceptions,
        },
        "modules_to_not_convert": ["lm_head", *sorted(half_precision)],
    }
