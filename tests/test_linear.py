"""FP16 beside W4A8: the same weights, dequantized, in the same engine."""

import pytest
import torch
from conftest import GROUP_SIZES, VOCAB, relative

from qoq.checkpoint import Checkpoint
from qoq.errors import CheckpointError, QoqError
from qoq.quant import quantize_rows
from qoq.runtime import linear as linears
from qoq.runtime import model
from qoq.runtime.engine import LLMEngine
from qoq.runtime.linear import (
    PRECISIONS,
    FloatLinear,
    PackedLinear,
    Stage,
    SwigluLinear,
    fuse_swiglu,
    joined_tensors,
    load_linear,
)
from qoq.runtime.sampler import SamplingParams
from qoq.runtime.scheduler import Chunk, Request


@pytest.mark.parametrize(("family", "group_size"), [("llama", 128), ("llama", -1), ("qwen2", 64)])
def test_a_float_linear_multiplies_the_dequantized_weights(checkpoint_folder, family, group_size):
    checkpoint, names = Checkpoint(checkpoint_folder(family, group_size)), [f"self_attn.{x}_proj" for x in "qkv"]
    tensors = joined_tensors(checkpoint, 1, names)
    x = torch.randn(3, checkpoint.spec.hidden_size, generator=torch.Generator().manual_seed(0)).half()
    parts = []
    for linear in (checkpoint.linear(1, name) for name in names):
        y = x.double() @ linear.weight.dequantize().half().double().T
        parts.append(y if linear.bias is None else y + linear.bias.double())
    expected = torch.cat(parts, dim=1)
    found, residual = FloatLinear.of(tensors, "x")(x), expected.half().flip(0)
    assert found.dtype == torch.float16 and relative(found, expected) < 1e-3
    assert torch.equal(FloatLinear.of(tensors, "x")(x, residual), residual + found)
    if group_size != -1:
        tensors["s2_scales"][0, 0] = 0
        with pytest.raises(CheckpointError, match="model.layers.1.x"):
            FloatLinear.of(tensors, "model.layers.1.x")


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_swiglu_in_one_kernel_gives_down_the_same(checkpoint_folder, group_size, monkeypatch):
    checkpoint, w4a8 = Checkpoint(checkpoint_folder("llama", group_size)), PRECISIONS["w4a8"]
    packed = PackedLinear.of(joined_tensors(checkpoint, 1, ["mlp.gate_proj", "mlp.up_proj"]), "gate_up")
    down = load_linear(checkpoint, 1, ["mlp.down_proj"], torch.device("cpu"), w4a8)
    assert fuse_swiglu(Stage(packed, w4a8), down) == (Stage(packed, w4a8), down)
    monkeypatch.setattr(linears, "fuses_swiglu", lambda device: True)
    fused, behind = fuse_swiglu(Stage(packed, w4a8), down)
    assert isinstance(fused.linear, SwigluLinear) and behind.linear is down.linear
    rows = quantize_rows(torch.randn(3, checkpoint.spec.hidden_size, generator=torch.Generator().manual_seed(0)))
    found, expected = behind.to.silu_mul(fused.linear(rows, None)), down.to.silu_mul(packed(rows))
    assert all(torch.equal(x, y) for x, y in zip(vars(found).values(), vars(expected).values(), strict=True))
    half = Stage(FloatLinear(torch.ones(4, 4), None), PRECISIONS["fp16"])
    assert fuse_swiglu(half, down) == (half, down)


def test_passes_of_fp16_keep_values():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).half()
    fp16 = PRECISIONS["fp16"]
    gate, up = x.float().chunk(2, dim=1)
    assert relative(fp16.silu_mul(x), torch.nn.functional.silu(gate) * up) < 1e-3
    assert torch.equal(fp16.rows(x), x)
    norm = torch.rand(64).half()
    expected = x.float() / x.float().square().mean(dim=1, keepdim=True).sqrt() * norm.float()
    assert relative(fp16.norm(x, norm, 1e-6), expected) < 1e-3


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_the_engine_in_fp16_is_the_simulated_decoder_without_quantized_activations(checkpoint_folder, group_size):
    """Nearer to it than W4A8 is; a 16-bit cache."""
    folder = checkpoint_folder("llama", group_size)
    tokens = torch.randint(0, VOCAB, (70,), generator=torch.Generator().manual_seed(9)).tolist()
    blocks = model.load(folder, simulate=True)
    expected = blocks(torch.tensor([tokens]))[0]

    def logits(precision: str) -> torch.Tensor:
        engine = LLMEngine.from_checkpoint(folder, kv_bits=16, memory_bytes=1 << 20, precision=precision)
        request = Request("x", tokens, 70, pages=[0, 1])
        return engine.executor.logits(engine.executor.hidden(engine._batches.of([Chunk(request, 0, 70, False)])))

    found = logits("fp16")
    assert relative(found, expected) < 0.1 and relative(logits("w4a8"), found) < 0.1


def test_fp16_generates(checkpoint_folder):
    engine = LLMEngine.from_checkpoint(checkpoint_folder(), kv_bits=16, memory_bytes=1 << 20, precision="fp16")
    outputs = engine.generate(["One", "Nobody knows"], SamplingParams(max_tokens=5, ignore_eos=True))
    assert [len(output.token_ids) for output in outputs] == [5, 5]


def test_a_precision_that_is_none(checkpoint_folder):
    with pytest.raises(QoqError, match="precision is 'fp8', expected w4a8 or fp16"):
        LLMEngine.from_checkpoint(checkpoint_folder(), precision="fp8")
