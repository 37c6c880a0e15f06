"""The decoder's forward pass, once, for calibration, simulation and the CPU runtime.

They differ in what a linear is (float, fake-quantized, packed integers) and in what the attention sees of K and
V. Values are rounded to the dtype of x between the steps; norms, SwiGLU and RoPE compute in float32 or wider.
"""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qoq.errors import ModelError
from qoq.models.architecture import LINEARS, ModelSpec
from qoq.quant import HalfLinear, StoredLinear, hadamard, quantize_kv, quantize_rows, rms_norm, silu_mul
from qoq.recipe import KVCache

Linear = Callable[[Tensor], Tensor]
# (layer, k, v) of the new tokens -> all keys and values that attention may see, both (B, Hkv, T, D)
Cache = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
Rope = tuple[Tensor, Tensor]
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate pairs (i, i + D/2) of x (B, H, T, D) by the angles of rope: cos and sin, (T, D) each."""
    cos, sin = rope
    wide = _wide(x)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def rotary_embedding(config: Any) -> Callable[[Tensor], Rope]:
    """positions (T,) int64 -> cos, sin (T, D) float32, with the scaling the config asks for.

    Raises:
        ModelError: transformers knows no such scaling, or it depends on the length of the sequence.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        module = LlamaRotaryEmbedding(config)
    except Exception as error:  # it trusts the config and raises many kinds
        scaling = reprlib.repr(getattr(config, "rope_parameters", None))
        raise ModelError(
            f"config.json: RoPE cannot be computed from {scaling} ({type(error).__name__}: {error})"
        ) from None
    if module.rope_type not in ROPE_TYPES:
        raise ModelError(f"config.json: rope_type is {module.rope_type!r}, expected {', '.join(ROPE_TYPES)}")

    def rope(positions: Tensor) -> Rope:
        cos, sin = module.to(positions.device)(torch.empty(0, device=positions.device), positions[None])
        return cos[0], sin[0]

    return rope


def visible(tq: int, tk: int, window: int | None, device: torch.device) -> Tensor:
    """Which of Tk keys each of the last Tq positions may attend to, (Tq, Tk) bool."""
    query = torch.arange(tk - tq, tk, device=device)[:, None]
    key = torch.arange(tk, device=device)
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, dtype: torch.dtype | None = None) -> Tensor:
    """Causal attention of q (B, Hq, Tq, D) over k, v (B, Hkv, Tk, D) -> (B, Tq, Hq * D).

    The queries are the last Tq of Tk positions. `dtype` is what is computed in; the result has the dtype of q.
    """
    tq, tk = q.shape[2], k.shape[2]
    mask = None
    if tq != tk or (window is not None and tk > window):
        mask = visible(tq, tk, window, q.device)
    to = dtype or q.dtype
    out = F.scaled_dot_product_attention(
        q.to(to), k.to(to), v.to(to), attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2).to(q.dtype)


@dataclass(frozen=True)
class KVTransform:
    """What the cache quantizer may do to K and V without changing attention (QuaRot; softmax's symmetries).

    Subtracting one vector from all keys of a head adds a constant to all its scores; K and Q rotate alike; what
    is taken from all values comes back once, since probabilities sum to one.
    """

    rotate: bool
    k_offset: Tensor | None = None  # (Hkv, D)
    v_offset: Tensor | None = None  # (Hkv, D)

    def to(self, device: str | torch.device) -> "KVTransform":
        """The same transform on a device."""
        offsets = (None if x is None else x.to(device) for x in (self.k_offset, self.v_offset))
        return KVTransform(self.rotate, *offsets)

    def enter(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, Hq, T, D), k and v (B, Hkv, T, D) after RoPE -> what attention is computed with."""
        if self.k_offset is not None:
            k = k.float() - self.k_offset[:, None]
        if self.v_offset is not None:
            v = (v.float() - self.v_offset[:, None]).to(v.dtype)
        if self.rotate:
            q, k = hadamard(q), hadamard(k)
        return q, k.to(q.dtype), v

    def leave(self, out: Tensor) -> Tensor:
        """(B, T, Hq * D): give the value offset back."""
        if self.v_offset is None:
            return out
        repeats = out.shape[-1] // self.v_offset.numel()
        return (_wide(out) + self.v_offset.repeat_interleave(repeats, dim=0).flatten()).to(out.dtype)


@dataclass
class Block:
    """One decoder layer. `norms` and `linears` go by their HF names within the layer."""

    spec: ModelSpec
    index: int
    norms: Mapping[str, Tensor]
    linears: Mapping[str, Linear]
    kv: KVTransform | None = None
    attention_dtype: torch.dtype | None = None

    def norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.norms[name], self.spec.rms_norm_eps)

    def heads(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Normed input (B, T, hidden) -> queries (B, Hq, T, D), keys and values (B, Hkv, T, D), after RoPE."""
        q, k, v = (
            self.linears[f"self_attn.{name}_proj"](x).unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        if self.spec.qk_norm:
            q, k = self.norm("self_attn.q_norm", q), self.norm("self_attn.k_norm", k)
        return apply_rope(q, rope), apply_rope(k, rope), v

    def attend(self, x: Tensor, rope: Rope, cache: Cache | None) -> Tensor:
        """Normed input (B, T, hidden) -> the input of o_proj (B, T, Hq * D)."""
        q, k, v = self.heads(x, rope)
        if self.kv is not None:
            q, k, v = self.kv.enter(q, k, v)
        if cache is not None:
            k, v = cache(self.index, k, v)
        wide = q.to(self.attention_dtype or q.dtype)
        out = attention(wide, k, v, self.spec.windows[self.index], self.attention_dtype)
        return (out if self.kv is None else self.kv.leave(out)).to(q.dtype)

    def feed(self, x: Tensor) -> Tensor:
        """Normed input (B, T, hidden) -> the input of down_proj (B, T, intermediate)."""
        return silu_mul(self.linears["mlp.gate_proj"](x), self.linears["mlp.up_proj"](x))

    def attention_half(self, x: Tensor, rope: Rope, cache: Cache | None) -> Tensor:
        """x (B, T, hidden) plus what attention adds."""
        return x + self.linears["self_attn.o_proj"](self.attend(self.norm("input_layernorm", x), rope, cache))

    def mlp_half(self, x: Tensor) -> Tensor:
        """x (B, T, hidden) plus what the MLP adds."""
        return x + self.linears["mlp.down_proj"](self.feed(self.norm("post_attention_layernorm", x)))

    def __call__(self, x: Tensor, rope: Rope, cache: Cache | None = None) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        return self.mlp_half(self.attention_half(x, rope, cache))


@dataclass
class Decoder:
    """A whole model: (B, T) ids -> (B, T, vocab) float32 logits."""

    embedding: Tensor  # (vocab, hidden), the dtype the residual stream has
    blocks: Sequence[Block]
    norm: Tensor  # (hidden,)
    lm_head: Tensor  # (vocab, hidden) float32
    rope: Callable[[Tensor], Rope]
    kv_cache: KVCache = field(default_factory=KVCache)  # what its cache does

    @torch.inference_mode()
    def __call__(self, ids: Tensor, cache: Cache | None = None, start: int = 0) -> Tensor:
        """The tokens stand at positions start, start + 1, ...; earlier ones must be in the cache."""
        x = self.embedding[ids]
        rope = self.rope(torch.arange(start, start + ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x, rope, cache)
        return F.linear(rms_norm(x, self.norm, self.blocks[0].spec.rms_norm_eps).float(), self.lm_head)


def float_linears(layer: Mapping[str, Tensor]) -> dict[str, Linear]:
    """Plain linears over the weights of `layer` (`<name>.weight`, `<name>.bias`)."""

    def linear(name: str) -> Linear:
        weight, bias = layer[f"{name}.weight"], layer.get(f"{name}.bias")
        return lambda x: F.linear(x, weight, bias)

    return {name: linear(name) for name in LINEARS}


def float_block(spec: ModelSpec, index: int, layer: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Block:
    """The unquantized layer, computing in `dtype`."""
    norms = {name: layer[f"{name}.weight"] for name in spec.norm_shapes()}
    return Block(spec, index, norms, float_linears({name: tensor.to(dtype) for name, tensor in layer.items()}))


@dataclass(frozen=True)
class QuantizedLayer:
    """A decoder layer as a checkpoint holds it."""

    linears: Mapping[str, StoredLinear]
    norms: Mapping[str, Tensor]  # float16
    kv: KVTransform  # offsets float16

    def to(self, device: str | torch.device) -> "QuantizedLayer":
        """The same layer on a device."""
        return QuantizedLayer(
            {name: linear.to(device) for name, linear in self.linears.items()},
            {name: norm.to(device) for name, norm in self.norms.items()},
            self.kv.to(device),
        )


def simulated_block(spec: ModelSpec, index: int, layer: QuantizedLayer, dtype: torch.dtype) -> Block:
    """The layer in float arithmetic on quantized values."""
    linears = {name: simulated_linear(linear, dtype) for name, linear in layer.linears.items()}
    return Block(spec, index, {name: norm.float() for name, norm in layer.norms.items()}, linears, layer.kv)


def packed_block(spec: ModelSpec, index: int, layer: QuantizedLayer) -> Block:
    """The layer in integer arithmetic, attention in float64."""
    norms = {name: norm.float() for name, norm in layer.norms.items()}
    return Block(spec, index, norms, layer.linears, layer.kv, torch.float64)


def simulated_linear(linear: StoredLinear, dtype: torch.dtype) -> Linear:
    """Float arithmetic on quantized values: the weight, and the input (A8)."""
    weight = linear.matrix().to(dtype)
    bias = None if linear.bias is None else linear.bias.to(dtype)
    if isinstance(linear, HalfLinear):
        return lambda x: F.linear(x, weight, bias)

    def forward(x: Tensor) -> Tensor:
        rows = quantize_rows(x.flatten(0, -2)).dequantize().to(dtype)
        return F.linear(rows, weight, bias).unflatten(0, x.shape[:-1])

    return forward


def simulated_cache(kv_cache: KVCache) -> Cache:
    """A cache without memory: what quantization makes of the tokens at hand."""

    def cache(index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        bits = kv_cache.bits(index)
        ratios = kv_cache.ratios(bits)
        return tuple(quantize_kv(x, bits, ratios).dequantize().to(x.dtype) for x in (k, v))  # type: ignore

    return cache
