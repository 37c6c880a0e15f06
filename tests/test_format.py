"""A reader written from docs/format.md alone, in numpy, against the library."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GROUP_SIZES, TESTS
from safetensors.torch import load_file

from qoq.checkpoint import Checkpoint, pack_linear
from qoq.models.architecture import LINEARS
from qoq.models.decoder import simulated_cache
from qoq.quant import QuantizedLinear, quantize_rows, round_to_nearest
from qoq.recipe import KVCache

DTYPES = {"F16": "<f2", "I8": "<u1"}


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file; I8 as bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        tensors[name] = np.frombuffer(content[8 + length + begin : 8 + length + end], DTYPES[info["dtype"]])
        tensors[name] = tensors[name].reshape(info["shape"])
    return tensors


def codes(qweight: np.ndarray) -> np.ndarray:
    """(N, K), one by one as the page says."""
    rows, columns = qweight.shape[0], qweight.shape[1] * 2
    n, k = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    n0, a, b, c = n // 32, n % 32 // 16, n % 16 // 8, n % 8
    k0, d, e, f = k // 32, k % 32 // 16, k % 16 // 4, k % 4
    byte = qweight.reshape(-1)[(n0 * (columns // 32) + k0) * 512 + c * 64 + e * 16 + d * 8 + b * 4 + f]
    return np.where(a == 0, byte & 15, byte >> 4)


def level2(tensor: np.ndarray) -> np.ndarray:
    """(K/g, N) bytes -> (N, K/g) in natural order."""
    n = np.arange(tensor.shape[1])
    return tensor[:, 32 * (n // 32) + 4 * (n % 8) + (n % 32) // 8].T


def integers(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """w8 (N, K) of a grouped linear."""
    q, s2 = codes(tensors[f"{name}.qweight"]), level2(tensors[f"{name}.s2_scales"])
    group = q.shape[1] // s2.shape[1]
    wide = q.astype(np.int64) * s2.repeat(group, 1) + level2(tensors[f"{name}.s2_zeros"]).repeat(group, 1)
    return (wide % 256).astype(np.uint8).view(np.int8)


def weight(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """W (N, K) float32 of a linear of any kind."""
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"].astype(np.float32)
    s1 = tensors[f"{name}.s1_scales"].astype(np.float32)[:, None]
    if f"{name}.s1_szeros" in tensors:
        return codes(tensors[f"{name}.qweight"]) * s1 - tensors[f"{name}.s1_szeros"].astype(np.float32)[:, None]
    return integers(tensors, name) * s1


def product(tensors: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """y (M, N) float16 of rows x (M, K) float32."""
    amax = np.abs(x).max(1)
    x8 = np.rint(x * (np.float32(127) / amax)[:, None]).clip(-127, 127)
    sx = (amax / np.float32(127))[:, None]
    s1 = tensors[f"{name}.s1_scales"].astype(np.float32)
    bias = tensors.get(f"{name}.bias", np.zeros(len(s1), np.float16)).astype(np.float32)
    if f"{name}.s1_szeros" not in tensors:
        acc = (x8 @ integers(tensors, name).astype(np.float64).T).astype(np.float32)
        return (acc * (sx * s1) + bias).astype(np.float16)
    acc = (x8 @ codes(tensors[f"{name}.qweight"]).astype(np.float64).T).astype(np.float32)
    zero = tensors[f"{name}.s1_szeros"].astype(np.float32)
    return ((acc * s1 - x8.sum(1, dtype=np.float32)[:, None] * zero) * sx + bias).astype(np.float16)


def expected_shapes(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The tables of the page, from config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    found, extra = config["quantization_config"], config["model_type"] == "qwen3"
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, v, g = config["num_attention_heads"] * head, config["num_key_value_heads"] * head, found["group_size"]
    linears = {f"self_attn.{x}_proj": (q if x == "q" else v, hidden) for x in "qkv"}
    linears |= {"self_attn.o_proj": (hidden, q), "mlp.down_proj": (hidden, inner)}
    linears |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (config["vocab_size"], hidden))
    for i in range(config["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {f"{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
        if extra:
            layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        if found["kv_cache"]["offset"]:
            layer |= {f"self_attn.{x}_offset": (config["num_key_value_heads"], head) for x in "kv"}
        for name, (n, k) in linears.items():
            if f"model.layers.{i}.{name}" in found["modules_to_not_convert"]:
                layer[f"{name}.weight"] = (n, k)
            else:
                layer |= {f"{name}.qweight": (n, k // 2), f"{name}.s1_scales": (n,)}
                small = ("s1_szeros",) if g == -1 else ("s2_scales", "s2_zeros")
                layer |= {f"{name}.{x}": (n,) if g == -1 else (k // g, n) for x in small}
            if f"model.layers.{i}.{name}.bias" in tensors:
                layer[f"{name}.bias"] = (n,)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_checkpoint_is_what_the_page_says(checkpoint_folder, group_size):
    folder = checkpoint_folder("llama", group_size)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= read_file(folder / file)
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected_shapes(folder, tensors)
    made = Checkpoint(folder)
    x = torch.randn(3, 384, generator=torch.Generator().manual_seed(0))
    for layer in range(made.spec.num_layers):
        for name in LINEARS:
            full, linear = f"model.layers.{layer}.{name}", made.linear(layer, name)
            assert np.array_equal(weight(tensors, full), linear.matrix().numpy()), full
            rows = x[:, : linear.matrix().shape[1]]
            assert np.array_equal(product(tensors, full, rows.numpy()), linear(rows).numpy()), full


def test_biases_head_norms_and_names_of_every_family(any_checkpoint):
    tensors = read_file(any_checkpoint / "model-00001-of-00001.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected_shapes(any_checkpoint, tensors)
    linear = Checkpoint(any_checkpoint).linear(1, "self_attn.k_proj")
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(product(tensors, "model.layers.1.self_attn.k_proj", x.numpy()), linear(x).numpy())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_oblong_linears_of_many_tiles(group_size):
    linear = QuantizedLinear(
        round_to_nearest(torch.randn(160, 384, generator=torch.Generator().manual_seed(2)), group_size), None
    )
    tensors = {
        name: tensor.numpy().view(np.uint8) if tensor.dtype == torch.int8 else tensor.numpy()
        for name, tensor in pack_linear("x", linear).items()
    }
    assert np.array_equal(codes(tensors["x.qweight"]), linear.weight.codes.numpy())
    assert np.array_equal(weight(tensors, "x"), linear.matrix().numpy())


@pytest.mark.parametrize("kind", ["w4a8_g128", "w4a8_channel"])
def test_the_golden_vectors(kind):
    """Codes and packed bytes that were made elsewhere."""
    tensors = load_file(TESTS / "golden" / f"{kind}.safetensors")
    assert np.array_equal(codes(tensors["qweight"].numpy().view(np.uint8)), tensors["codes"].numpy())


@pytest.mark.parametrize(("bits", "ratios"), [(4, (1.0, 0.92, 0.84)), (8, (1.0,))])
def test_the_cache_rows(bits, ratios):
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(3)).half().float().numpy()
    steps, cache = 2**bits - 1, KVCache(clip_ratios=(1.0, 0.92, 0.84), layers_in_8_bits=(8,))  # layer 4 has 4
    best, least = np.zeros_like(x), np.full(len(x), np.inf)
    for r in ratios:
        low, width = x.min(1), x.max(1) - x.min(1)
        low = (low + width * np.float32((1 - r) / 2)).astype(np.float16).astype(np.float32)[:, None]
        step = (width * np.float32(r) / np.float32(steps)).astype(np.float16).astype(np.float32)[:, None]
        value = np.rint((x - low) / step).clip(0, steps) * step + low
        error = np.square(value - x).sum(1)
        best[error < least] = value[error < least]
        least = np.minimum(error, least)
    found = simulated_cache(cache)(bits, *[torch.from_numpy(x)] * 2)[0].numpy()
    assert np.isclose(best, found).all(1).mean() > 0.95  # near ties may fall either way
    assert math.isclose(np.square(found - x).sum(), least.sum(), rel_tol=1e-3)


def test_rows_are_quantized_as_the_page_says():
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(4))
    rows = quantize_rows(x)
    amax = np.abs(x.numpy()).max(1)
    assert np.array_equal(np.rint(x.numpy() * (np.float32(127) / amax)[:, None]), rows.x8.numpy())
    assert np.array_equal(amax / np.float32(127), rows.sx.numpy())
