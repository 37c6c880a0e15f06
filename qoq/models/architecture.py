"""What `qoq` knows of an architecture: a table, and the dimensions read from a config.

A supported model is a Llama-like decoder: pre-norm RMSNorm, rotary attention with grouped KV heads, SwiGLU.
What differs between families is a row of `ARCHITECTURES`; a new family is a new row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qoq.errors import ModelError

# The seven quantized linears of a decoder layer: HF name -> the norm (or activation) whose output feeds it.
LINEARS: Mapping[str, str] = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "attention",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "swiglu",
}
# Linears that read the same input: engines run each of these as one.
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Architecture:
    """One family, by its `model_type`."""

    qk_norm: bool = False  # per-head RMSNorm of q and k before RoPE
    biases: frozenset[str] | str = frozenset()  # linears that have one: always, or if this config key is true
    sliding_window: bool = False  # the config may ask for one


_QKV = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(biases="attention_bias"),
    "mistral": Architecture(sliding_window=True),
    "qwen2": Architecture(biases=_QKV, sliding_window=True),
    "qwen3": Architecture(qk_norm=True, biases="attention_bias", sliding_window=True),
}


@dataclass(frozen=True)
class ModelSpec:
    """The dimensions of one model. Features are counted, not bytes."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    tied_embeddings: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # sliding window of each layer, in tokens
    biases: frozenset[str]  # linears with a bias

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(N, K) of one of `LINEARS`."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }[name]

    def norm_shapes(self) -> dict[str, int]:
        """Norm weights of a layer: name -> length."""
        shapes = {"input_layernorm": self.hidden_size, "post_attention_layernorm": self.hidden_size}
        if self.qk_norm:
            shapes |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        return shapes

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a full-precision layer, by its name within the layer."""
        shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (n,) for norm, n in self.norm_shapes().items()}
        for name in LINEARS:
            shapes[f"{name}.weight"] = self.linear_shape(name)
            if name in self.biases:
                shapes[f"{name}.bias"] = self.linear_shape(name)[:1]
        return shapes

    def linear_parameters(self) -> int:
        """Weights in all quantized linears."""
        sizes = (self.linear_shape(name) for name in LINEARS)
        return self.num_layers * sum(n * k for n, k in sizes)


def model_spec(config: Any, where: str) -> ModelSpec:
    """Read the dimensions from a transformers config.

    Raises:
        ModelError: an architecture or an option that this program cannot compute. `where` names the model.
    """
    kind = str(getattr(config, "model_type", None))
    if kind not in ARCHITECTURES:
        raise ModelError(f"{where}: architecture {kind!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    row = ARCHITECTURES[kind]
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"{where}: hidden_act is {config.hidden_act!r}, expected 'silu'")
    if getattr(config, "mlp_bias", False):
        raise ModelError(f"{where}: mlp_bias is true; biases in the MLP are not supported")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ModelError(f"{where}: {heads} attention heads for {kv_heads} KV heads, expected a multiple")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_dim < 2 or head_dim % 2:
        raise ModelError(f"{where}: head_dim is {head_dim}, expected an even number: RoPE turns pairs")
    eps = config.rms_norm_eps
    if not isinstance(eps, float | int) or not 0 <= eps < 1:
        raise ModelError(f"{where}: rms_norm_eps is {eps!r}, expected a small number")
    biases = row.biases
    if isinstance(biases, str):  # HF gives all four projections a bias under this one key
        biases = _QKV | {"self_attn.o_proj"} if getattr(config, biases, False) else frozenset()
    return ModelSpec(
        model_type=kind,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=eps,
        tied_embeddings=bool(config.tie_word_embeddings),
        qk_norm=row.qk_norm,
        windows=_windows(config, row, where),
        biases=biases,
    )


def _windows(config: Any, row: Architecture, where: str) -> tuple[int | None, ...]:
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None) if row.sliding_window else None
    if not window:
        return (None,) * layers
    if type(window) is not int or window < 1:
        raise ModelError(f"{where}: sliding_window is {window!r}, expected a number of tokens")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * layers
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        raise ModelError(f"{where}: layer_types is no list of {layers} kinds, one for each layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
