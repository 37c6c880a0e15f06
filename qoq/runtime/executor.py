"""One step of a model over a flat batch of tokens: the same code on a GPU and on a CPU, through `qoq.kernels`.

Attention always sees the quantized cache: a token's K and V are stored before its query looks at them. So one prefill,
prefill in chunks, decode and the reuse of another request's pages compute one function.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from qoq import paged
from qoq.checkpoint import Checkpoint
from qoq.errors import QoqError
from qoq.kernels import kv4_append_decode, kv4_decode, kv4_gather, lm_head, rmsnorm, rope_kv4_append
from qoq.kernels.attention import Workspace
from qoq.layout import OFFSETS
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LM_HEAD, ModelSpec
from qoq.models.decoder import KVTransform, Rope, rotary_embedding, visible
from qoq.paged import PAGE, HeadNorms, Layout, rope_tables
from qoq.runtime.batch import Batch, Prefill
from qoq.runtime.cache import PagedCache, layouts_of
from qoq.runtime.linear import PRECISIONS, Precision, Stage, fuse_swiglu, load_linear


@dataclass(frozen=True)
class Layer:
    """A decoder layer as the step runs it; norms are float16."""

    input_norm: Tensor
    qkv: Stage
    kv: KVTransform
    cache_layout: Layout
    clip_ratios: tuple[float, ...]
    head_norms: HeadNorms | None
    window: int | None
    o: Stage
    post_norm: Tensor
    gate_up: Stage
    down: Stage


class Executor:
    """A loaded model with its cache.

    Args:
        max_model_len: positions that a sequence may have.
        max_requests: sequences of one step.
        bits: of the cache's values; with 4, layers that the checkpoint names have 8.
        precision: of linears and their inputs, one of PRECISIONS.

    Raises:
        QoqError: no such precision.
    """

    sizes: Sequence[int] = ()  # of steps of decodes alone (`Batches`)

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        max_model_len: int,
        max_requests: int,
        bits: int,
        precision: str = "w4a8",
    ):
        if precision not in PRECISIONS:
            raise QoqError(f"precision is {precision!r}, expected {' or '.join(PRECISIONS)}")
        self.spec, self.device = checkpoint.spec, device
        self.max_pages = -(-max_model_len // PAGE)
        layouts = layouts_of(self.spec, checkpoint.kv_cache, bits)
        self.cache = PagedCache.allocate(self.spec, layouts, 0, device)
        self.embedding = checkpoint.tensor(EMBEDDING).to(device)
        self.layers = [
            load_layer(checkpoint, index, device, PRECISIONS[precision], layout) for index, layout in enumerate(layouts)
        ]
        self.norm = checkpoint.tensor(FINAL_NORM).to(device)
        # half precision has no fast product on a CPU
        self.lm_head = checkpoint.tensor(LM_HEAD).to(device, torch.float32 if device.type == "cpu" else torch.float16)
        cos, sin = rope_tables(rotary_embedding(checkpoint.config), max_model_len)
        self.rope: Rope = cos.to(device), sin.to(device)
        heads = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        self.workspace = Workspace.of(max_requests, *heads, self.max_pages, device)

    def allocate(self, pages: int) -> None:
        """Give the cache so many pages, all empty."""
        self.cache = PagedCache.allocate(self.spec, self.cache.layouts, pages, self.device)

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> Tensor:
        """Store the tokens' K and V; the residual stream behind the last layer, (T, hidden) float16."""
        x, eps = self.embedding[batch.ids], self.spec.rms_norm_eps
        for layer, cache in zip(self.layers, self.cache.layers, strict=True):
            qkv = layer.qkv.linear(layer.qkv.to.norm(x, layer.input_norm, eps), None)
            x = layer.o.linear(layer.o.to.rows(*self._attend(layer, cache, qkv, batch)), x)
            gate_up = layer.gate_up.linear(layer.gate_up.to.norm(x, layer.post_norm, eps), None)
            x = layer.down.linear(layer.down.to.silu_mul(gate_up), x)
        return x

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """(M, hidden) float16 of `hidden` -> (M, vocabulary) float32."""
        return lm_head(rmsnorm(x, self.norm, self.spec.rms_norm_eps), self.lm_head)

    def _attend(self, layer: Layer, cache: Tensor, qkv: Tensor, batch: Batch) -> list[Tensor]:
        """qkv (T, (Hq + 2 Hkv) * D) float16 -> what o_proj takes, T rows of Hq * D in parts, float16."""
        layout, decodes, v_offset = layer.cache_layout, batch.decodes, layer.kv.v_offset
        how, scale = (layer.clip_ratios, layer.head_norms), layout.head_dim**-0.5
        if not batch.prefills:
            seen = batch.block_tables, batch.context_lens
            out = kv4_append_decode(
                qkv, self.rope, cache, layout, layer.kv, *seen, scale, *how, layer.window, self.workspace, settled=True
            )
            return [out.flatten(1)]
        q = rope_kv4_append(qkv, self.rope, batch.positions, batch.slots, cache, layout, layer.kv, *how)
        parts = []
        if decodes > 0:
            where = cache, layout, batch.block_tables[:decodes], batch.context_lens[:decodes]
            parts.append(kv4_decode(q[:decodes], *where, scale, layer.window, v_offset, self.workspace, settled=True))
        for prefill in batch.prefills:
            tables, starts, own = batch.block_tables[prefill.sequences], prefill.context_starts, q[prefill.tokens]
            if q.is_cuda:
                k, v = kv4_gather(cache, layout, tables, starts, sum(prefill.contexts), v_offset)
                parts.append(flash_attention(own, k, v, prefill, layer.window))
            else:  # not rounded, as decode attention there
                k, v = paged.gather(cache, layout, tables, starts, v_offset)
                parts.append(attention(own, k, v, prefill, layer.window))
        return [part.flatten(1) for part in parts]


def attention(q: Tensor, k: Tensor, v: Tensor, prefill: Prefill, window: int | None) -> Tensor:
    """Causal attention of each sequence's new tokens, the last ones of its context, in float64.

    q (new tokens, Hq, D), k and v (tokens of all contexts, Hkv, D) -> (new tokens, Hq, D) float16.
    """
    outs = []
    for parts in zip(q.split(prefill.new), k.split(prefill.contexts), v.split(prefill.contexts), strict=True):
        own, keys, values = (x.double().transpose(0, 1)[None] for x in parts)
        n, m = own.shape[2], keys.shape[2]
        mask = causal_lower_right(n, m) if window is None or m <= window else visible(n, m, window, q.device)
        out = F.scaled_dot_product_attention(own, keys, values, attn_mask=mask, enable_gqa=True)
        outs.append(out[0].transpose(0, 1).to(torch.float16))
    return torch.cat(outs)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, prefill: Prefill, window: int | None) -> Tensor:
    """As `attention`, in float16 on a GPU. A token's result does not depend on the chunk that it is in.

    That is so because the kernel for sequences of various lengths takes a token's keys in an order of their own
    places, and never in parts, as the one for decode does, which it would call for chunks of one token.
    """
    out = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        prefill.new_starts,
        prefill.context_starts,
        max(*prefill.new, 2),
        max(prefill.contexts),
        0.0,
        True,
        False,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return out[0]


def load_layer(
    checkpoint: Checkpoint, index: int, device: torch.device, precision: Precision, cache_layout: Layout
) -> Layer:
    """Layer `index` of a checkpoint.

    Raises:
        CheckpointError: see `load_linear`.
    """
    spec, prefix = checkpoint.spec, f"model.layers.{index}."
    norms = {name: checkpoint.tensor(f"{prefix}{name}.weight").to(device) for name in spec.norm_shapes()}
    offsets = [checkpoint.tensor(prefix + name) for name in OFFSETS] if checkpoint.kv_cache.offset else []

    def linear(block: str, *names: str) -> Stage:
        return load_linear(checkpoint, index, [f"{block}.{name}_proj" for name in names], device, precision)

    gate_up, down = fuse_swiglu(linear("mlp", "gate", "up"), linear("mlp", "down"))
    return Layer(
        input_norm=norms["input_layernorm"],
        qkv=linear("self_attn", "q", "k", "v"),
        kv=KVTransform(checkpoint.kv_cache.rotate, *offsets).to(device),
        cache_layout=cache_layout,
        clip_ratios=checkpoint.kv_cache.ratios(cache_layout.bits),
        head_norms=_head_norms(spec, norms),
        window=spec.windows[index],
        o=linear("self_attn", "o"),
        post_norm=norms["post_attention_layernorm"],
        gate_up=gate_up,
        down=down,
    )


def _head_norms(spec: ModelSpec, norms: dict[str, Tensor]) -> HeadNorms | None:
    if not spec.qk_norm:
        return None
    return HeadNorms(norms["self_attn.q_norm"], norms["self_attn.k_norm"], spec.rms_norm_eps)
