"""What a card allows a W4A8KV4 model, or the same in FP16: the least times of a decode step and of a prefill, from
counts alone.

Each part of a model takes as long as its bytes need to move or its operations to be computed, whichever is more; parts
do not overlap. `DataSheet.ideal` counts at the rates of the data sheet and leaves out elementwise passes and launches;
`DataSheet.achievable` counts at the rates that good kernels reach and pays for both. Norm weights and biases, which are
less than a thousandth of a model, are left out. Needs no GPU and no torch.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

# Models


@dataclass(frozen=True)
class Dimensions:
    """Of a Llama-like decoder whose embedding and lm_head are two matrices. Features are counted, not bytes."""

    model_type: str  # of transformers; qwen2 has biases in its qkv
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    head_dim: int = 128
    rope_theta: float = 10000.0
    max_positions: int = 4096
    rms_norm_eps: float = 1e-5

    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the products of a layer, those of one input being one."""
        q = self.num_heads * self.head_dim
        return {
            "qkv": (q + 2 * self.num_kv_heads * self.head_dim, self.hidden_size),
            "o": (self.hidden_size, q),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }

    def linear_parameters(self) -> int:
        """Weights in all quantized linears."""
        return self.num_layers * sum(n * k for n, k in self.linears().values())

    def config(self) -> dict[str, Any]:
        """What `transformers.AutoConfig.for_model` wants."""
        return {
            "model_type": self.model_type,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "sliding_window": None,
            "tie_word_embeddings": False,
        }


LLAMA_3: dict[str, Any] = {"vocab_size": 128256, "rope_theta": 5e5, "max_positions": 8192}
QWEN_2: dict[str, Any] = {"vocab_size": 152064, "rope_theta": 1e6, "max_positions": 131072}
MISTRAL: dict[str, Any] = {"vocab_size": 32768, "rope_theta": 1e6, "max_positions": 32768}  # v0.3: no sliding window
YI: dict[str, Any] = {"vocab_size": 64000, "rope_theta": 5e6}
MODELS = {  # layers, hidden, intermediate, heads, KV heads
    "llama-3-8b": Dimensions("llama", 32, 4096, 14336, 32, 8, **LLAMA_3),
    "llama-3-70b": Dimensions("llama", 80, 8192, 28672, 64, 8, **LLAMA_3),
    "llama-2-7b": Dimensions("llama", 32, 4096, 11008, 32, 32, vocab_size=32000),
    "qwen2.5-7b": Dimensions("qwen2", 28, 3584, 18944, 28, 4, **QWEN_2, rms_norm_eps=1e-6),
    "qwen2.5-72b": Dimensions("qwen2", 80, 8192, 29568, 64, 8, **QWEN_2),
    "mistral-7b": Dimensions("mistral", 32, 4096, 14336, 32, 8, **MISTRAL),
    "yi-34b": Dimensions("llama", 60, 7168, 20480, 56, 8, **YI),
}


# Cards


@dataclass(frozen=True)
class Rates:
    """What a card does in a second, and which overheads are counted."""

    bandwidth: float  # bytes of device memory
    int8: float  # operations of dense tensor cores
    fp16: float  # likewise, summed in float32
    dequantize: float  # weights, for a fragment of at most FRAGMENT tokens
    passes: bool = False  # whether elementwise passes take time
    launch: float = 0.0  # seconds, for each decode step

    def seconds(self, size: float, int8: float = 0, fp16: float = 0) -> float:
        """The least time for moving `size` bytes and computing meanwhile."""
        return max(size / self.bandwidth, int8 / self.int8 + fp16 / self.fp16)


@dataclass(frozen=True)
class Reach:
    """The share of a data sheet's rates that good kernels reach."""

    bandwidth: float
    int8: float
    fp16: float


@dataclass(frozen=True)
class DataSheet:
    """Of a card; its rates are those of `Rates`."""

    name: str  # as the driver calls it
    memory: int  # bytes, as the driver reports them
    bandwidth: float
    int8: float
    fp16: float
    multiprocessors: int
    clock: float  # Hz
    reach: Reach

    @property
    def ideal(self) -> Rates:
        return Rates(self.bandwidth, self.int8, self.fp16, self._dequantize())

    @property
    def achievable(self) -> Rates:
        return Rates(
            self.bandwidth * self.reach.bandwidth,
            self.int8 * self.reach.int8,
            self.fp16 * self.reach.fp16,
            self._dequantize(),
            passes=True,
            launch=GRAPH_LAUNCH,
        )

    def _dequantize(self) -> float:
        return 4 * self.multiprocessors * self.clock * 8 * 32 / DEQUANTIZE  # four schedulers, 32 lanes of 8 weights


MIB = 1 << 20
ADA, AMPERE, HOPPER = Reach(0.87, 0.70, 0.70), Reach(0.88, 0.75, 0.75), Reach(0.90, 0.65, 0.70)
CARDS = {  # name, memory, bytes/s, int8 and fp16 operations/s, multiprocessors, clock
    "l40s": DataSheet("NVIDIA L40S", 46068 * MIB, 8.64e11, 7.33e14, 3.62e14, 142, 2.52e9, ADA),
    "a100": DataSheet("NVIDIA A100-SXM4-80GB", 81920 * MIB, 2.039e12, 6.24e14, 3.12e14, 108, 1.41e9, AMPERE),
    "a100-pcie": DataSheet("NVIDIA A100 80GB PCIe", 81920 * MIB, 1.935e12, 6.24e14, 3.12e14, 108, 1.41e9, AMPERE),
    "h100": DataSheet("NVIDIA H100 80GB HBM3", 81559 * MIB, 3.35e12, 1.979e15, 9.89e14, 132, 1.755e9, HOPPER),
    "h200": DataSheet("NVIDIA H200", 143771 * MIB, 4.8e12, 1.979e15, 9.89e14, 132, 1.755e9, HOPPER),
    "rtx-4090": DataSheet(
        "NVIDIA GeForce RTX 4090", 24564 * MIB, 1.008e12, 6.606e14, 1.652e14, 128, 2.52e9, ADA
    ),  # sums in float32 go at half speed
}
GRAPH_LAUNCH = 0.3e-3  # a decode step as one CUDA graph
DEQUANTIZE = 6  # clocks of a scheduler for 8 weights in each lane of a warp
FRAGMENT = 128  # tokens that share a dequantized fragment
PADDED_HEADS = 8  # query heads of a KV head fill a tensor core's tile by eights
USABLE = 0.9  # of memory; the rest is for activations, graphs and the driver


def sheet_of(name: str) -> DataSheet | None:
    """Of the card that the driver calls `name`, if it is known."""
    return next((sheet for sheet in CARDS.values() if sheet.name == name), None)


# Bytes


def weight_bytes(n: int, k: int, group_size: int) -> int:
    """Of a packed weight: codes, s1, and s2 and zeros, or szero."""
    return n * k // 2 + 2 * n + (2 * n if group_size == -1 else 2 * n * (k // group_size))


def linear_bytes(model: Dimensions, group_size: int = 128, precision: str = "w4a8") -> int:
    """Of the weights of all layers: packed, or float16."""
    if precision == "fp16":
        return 2 * model.linear_parameters()
    return model.num_layers * sum(weight_bytes(n, k, group_size) for n, k in model.linears().values())


def head_bytes(model: Dimensions) -> int:
    """Of lm_head, float16; the embedding is as large."""
    return 2 * model.vocab_size * model.hidden_size


def kv_bytes(model: Dimensions, bits: float = 4) -> int:
    """Of a cached token in all layers: codes, and below 16 bits a float16 scale and minimum for each head's K and V.

    Where some layers have 4 bits and some 8, `bits` is their mean.
    """
    if not 4 <= bits <= 8 and bits != 16:
        raise ValueError(f"bits is {bits}, expected 4 to 8, or 16")
    row = model.head_dim * bits / 8 + (4 if bits < 16 else 0)
    return round(model.num_layers * 2 * model.num_kv_heads * row)


def pass_bytes(model: Dimensions, precision: str = "w4a8") -> int:
    """That a token's activations move through all layers when everything is fused that can be: residual sums in GEMMs,
    SwiGLU and A8 in gate_up, A8 in attention.

    For each feature of the hidden state 16 bytes: twice a norm (read float16, write and read int8) and a residual sum.
    Queries and what attention gives for them: 12; keys and values, which take the same passes before: 8 each; and what
    SwiGLU gives, as int8: 2. Where float16 stands for int8, the norms move 4 more, what attention and SwiGLU give 2
    more each.
    """
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    moved = 16 * model.hidden_size + 12 * q + 2 * 8 * kv + 2 * model.intermediate_size
    if precision == "fp16":
        moved += 4 * model.hidden_size + 2 * q + 2 * model.intermediate_size
    return model.num_layers * moved


# Times


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of a forward pass, one after the other."""

    linear: float
    head: float
    attention: float
    elementwise: float
    launch: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def decode_step(
    model: Dimensions,
    rates: Rates,
    batch: int,
    context: int,
    kv_bits: float = 4,
    group_size: int = 128,
    precision: str = "w4a8",
) -> Times:
    """One token for each of `batch` sequences, each attending to `context` tokens."""
    shared = model.num_heads // model.num_kv_heads
    padding = -(-shared // PADDED_HEADS) * PADDED_HEADS / shared
    moved = kv_bytes(model, kv_bits) * batch * context
    return Times(
        linear=_linear(model, rates, batch, group_size, precision),
        head=_head(model, rates, batch),
        attention=rates.seconds(moved, fp16=padding * _attention_operations(model) * batch * context),
        elementwise=_elementwise(model, rates, batch, precision) / 2,  # L2 keeps the other half
        launch=rates.launch,
    )


def prefill(
    model: Dimensions, rates: Rates, batch: int, length: int, group_size: int = 128, precision: str = "w4a8"
) -> Times:
    """`batch` prompts of `length` tokens; logits of the last token of each. Launches hide behind the work."""
    tokens = batch * length
    return Times(
        linear=_linear(model, rates, tokens, group_size, precision),
        head=_head(model, rates, batch),
        attention=rates.seconds(0, fp16=_attention_operations(model) * batch * length**2 / 2),  # a token sees half
        elementwise=_elementwise(model, rates, tokens, precision),
        launch=0.0,
    )


def _linear(model: Dimensions, rates: Rates, tokens: int, group_size: int, precision: str) -> float:
    weights = model.linear_parameters()
    if precision == "fp16":
        return rates.seconds(linear_bytes(model, precision=precision), fp16=2 * weights * tokens)
    dequantize = weights * -(-tokens // FRAGMENT) / rates.dequantize
    return max(rates.seconds(linear_bytes(model, group_size), int8=2 * weights * tokens), dequantize)


def _head(model: Dimensions, rates: Rates, tokens: int) -> float:
    return rates.seconds(head_bytes(model), fp16=head_bytes(model) * tokens)


def _attention_operations(model: Dimensions) -> int:
    """For a query token and a token that it attends to, in all layers."""
    return 4 * model.num_heads * model.head_dim * model.num_layers


def _elementwise(model: Dimensions, rates: Rates, tokens: int, precision: str) -> float:
    return rates.seconds(pass_bytes(model, precision) * tokens) if rates.passes else 0.0


# End to end


@dataclass(frozen=True)
class Workload:
    """`batch` sequences of one length that start and end together."""

    batch: int
    input_len: int = 1024
    output_len: int = 512
    kv_bits: float = 4
    group_size: int = 128
    precision: str = "w4a8"  # or "fp16", whose weights have no groups

    def cache_bytes(self, model: Dimensions) -> int:
        """When the last token is generated."""
        return kv_bytes(model, self.kv_bits) * self.batch * (self.input_len + self.output_len)

    def memory_bytes(self, model: Dimensions) -> int:
        """Of weights, embedding, lm_head and cache; without activations."""
        return linear_bytes(model, self.group_size, self.precision) + 2 * head_bytes(model) + self.cache_bytes(model)

    def fits(self, model: Dimensions, sheet: DataSheet) -> bool:
        return self.memory_bytes(model) <= USABLE * sheet.memory


@dataclass(frozen=True)
class Limit:
    """The least times of a workload; `step` is a decode step at the mean context."""

    work: Workload
    step: Times
    prefill: Times

    @property
    def decode_tokens_per_s(self) -> float:
        """Of decode steps alone."""
        return self.work.batch / self.step.total

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over all of the time, prefill included: it gives each sequence's first token."""
        seconds = self.prefill.total + (self.work.output_len - 1) * self.step.total
        return self.work.batch * self.work.output_len / seconds

    def record(self) -> Mapping[str, float]:
        """As JSON has it."""
        return {
            "step_ms": round(1e3 * self.step.total, 4),
            **{f"{part}_ms": round(1e3 * seconds, 4) for part, seconds in vars(self.step).items()},
            "prefill_s": round(self.prefill.total, 4),
            **{f"prefill_{part}_s": round(seconds, 4) for part, seconds in vars(self.prefill).items()},
            "decode_tokens_per_s": round(self.decode_tokens_per_s, 1),
            "tokens_per_s": round(self.tokens_per_s, 1),
        }


def limit(model: Dimensions, rates: Rates, work: Workload) -> Limit:
    """What `rates` allow a workload."""
    context = work.input_len + work.output_len // 2
    step = decode_step(model, rates, work.batch, context, work.kv_bits, work.group_size, work.precision)
    return Limit(work, step, prefill(model, rates, work.batch, work.input_len, work.group_size, work.precision))
