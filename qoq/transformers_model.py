"""transformers' own decoder, computing what the runtime computes.

The model keeps its modules, names and masks; its linears become `Linear`, and the forward passes of attention, MLP,
norms and head are replaced by those of `qoq.models.decoder`, which round less often than transformers' in float16. On a
CPU this gives the logits of `qoq.runtime.model` up to the order of float64 sums.

Keys and values enter the cache as bytes, so any cache of transformers (dynamic, static, offloaded, with a sliding
window) holds four bits a value, eight in the layers that the checkpoint names, and with or without a cache attention
sees the same numbers. Whatever is done to keys, values and queries is done outside cache and attention function: every
`attn_implementation` and its mask fit.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, QuantizedCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from qoq.checkpoint import Checkpoint
from qoq.errors import ModelError
from qoq.kernels import quant_rows, rmsnorm
from qoq.layout import OFFSETS, linear_tensors
from qoq.models.architecture import LINEARS
from qoq.models.decoder import KVTransform, apply_rope
from qoq.paged import pack_codes, unpack_codes
from qoq.quant import QuantizedKV, quantize_kv, silu_mul
from qoq.runtime.linear import PackedLinear, UnpackedLinear, w4a8_linear


def convert(model: Any, checkpoint: Checkpoint) -> None:
    """Make a model of transformers, on the meta device, one whose tensors and arithmetic are the checkpoint's.

    Raises:
        ModelError: see `models.architecture.model_spec`.
    """
    spec, decoder = checkpoint.spec, model.base_model
    if checkpoint.half_precision:
        name = min(checkpoint.half_precision)
        raise ModelError(
            f"{checkpoint.folder}: {name} is in 16 bits, which qoq's engine runs and transformers does not"
        )
    for index, layer in enumerate(decoder.layers):
        for name in LINEARS:
            block, _, leaf = name.partition(".")
            linear = Linear(
                f"layer {index} {name}", *spec.linear_shape(name), checkpoint.group_size, name in spec.biases
            )
            setattr(layer.get_submodule(block), leaf, linear)
        attention = layer.self_attn
        if checkpoint.kv_cache.offset:
            for name in OFFSETS:
                shape = spec.num_kv_heads, spec.head_dim
                attention.register_parameter(name.partition(".")[2], _parameter(shape, torch.float16))
        attention.rotate, attention.bits = checkpoint.kv_cache.rotate, checkpoint.kv_cache.bits(index)
        attention.clip_ratios = checkpoint.kv_cache.ratios(attention.bits)
        attention.window = spec.windows[index]
        _bind(attention, _attention)
        _bind(layer.mlp, _mlp)
    for module in decoder.modules():
        if type(module).__name__.endswith("RMSNorm"):
            _bind(module, _norm)
    decoder.rotary_emb.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))  # angles in float32
    if (head := model.get_output_embeddings()) is not None:
        _bind(head, _head)


def _bind(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class Linear(nn.Module):
    """A W4A8 linear whose parameters are the tensors of a checkpoint: (..., K) float16 -> (..., N) float16."""

    def __init__(self, name: str, n: int, k: int, group_size: int, bias: bool):
        super().__init__()
        self.name, self.in_features, self.out_features = name, k, n
        for suffix, (dtype, shape) in linear_tensors(n, k, group_size, bias).items():
            self.register_parameter(suffix, _parameter(shape, dtype))
        self.product: PackedLinear | UnpackedLinear | None = None

    def prepare(self) -> PackedLinear | UnpackedLinear:
        """The weight as its device multiplies it. Raises CheckpointError for an illegal group."""
        tensors = {suffix: parameter.data for suffix, parameter in self.named_parameters()}
        self.product = w4a8_linear(tensors, self.name)
        return self.product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear":
        """Moved to a device or cast: only the former is possible."""
        if (dtype := fn(torch.empty(0, dtype=torch.float16)).dtype) != torch.float16:
            name = str(dtype).removeprefix("torch.")
            raise ModelError(f"a qoq model computes in float16 and cannot be cast to {name}; load it again")
        self.product = None
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        product = self.product or self.prepare()
        return product(quant_rows(x.flatten(0, -2).contiguous())).unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


# Forward passes, bound to modules of transformers


def _norm(self: Any, x: Tensor) -> Tensor:
    return rmsnorm(x.flatten(0, -2).contiguous(), self.weight, self.variance_epsilon).view(x.shape)


def _mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


def _head(self: Any, x: Tensor) -> Tensor:
    """Logits: float32 on a CPU, where half precision is slow, float16 on a GPU."""
    return F.linear(x.float(), self.weight.float()) if x.device.type == "cpu" else F.linear(x, self.weight)


def _attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    cache: Cache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """hidden_states (B, T, hidden) float16, cos and sin (B, T, D) float32 -> (B, T, hidden); weights or None.

    `past_key_values` is the older name of `cache`; transformers 5.24 says the newer one.
    """
    q, k, v = (
        projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    cos, sin = (table[:, None] for table in position_embeddings)
    transform = KVTransform(self.rotate, getattr(self, "k_offset", None), getattr(self, "v_offset", None))
    q, k, v = transform.enter(apply_rope(q, (cos, sin)), apply_rope(k, (cos, sin)), v)

    k, v = (to_bytes(quantize_kv(x, self.bits, self.clip_ratios), self.bits) for x in (k, v))
    past = past_key_values if cache is None else cache
    if isinstance(past, QuantizedCache):
        raise ModelError("the cache of a qoq model is quantized already; leave cache_implementation='quantized' out")
    if past is not None:
        k, v = past.update(k, v, self.layer_idx)
    wide = torch.float64 if q.device.type == "cpu" else q.dtype  # as the runtime does
    k, v = (from_bytes(x, self.bits).dequantize().to(wide) for x in (k, v))

    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
    out, weights = function(
        self, q.to(wide), k, v, attention_mask, scaling=self.scaling, sliding_window=self.window, **kwargs
    )
    return self.o_proj(transform.leave(out.flatten(2)).to(q.dtype)), weights


# The cache


def to_bytes(rows: QuantizedKV, bits: int) -> Tensor:
    """(..., D) codes of 4 or 8 bits and their grids -> (..., D * bits/8 + 4) uint8: codes, scale, minimum (float16)."""
    grid = torch.stack((rows.scale, rows.minimum), dim=-1).view(torch.uint8)
    return torch.cat((pack_codes(rows, bits).codes, grid), dim=-1)


def from_bytes(x: Tensor, bits: int) -> QuantizedKV:
    """The inverse of `to_bytes`."""
    scale, minimum = x[..., -4:].contiguous().view(torch.float16).unbind(-1)
    return unpack_codes(QuantizedKV(x[..., :-4], scale, minimum), bits)
