"""What cards allow: the formulas against figures worked out elsewhere, and against the bytes that the code stores."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from pytest import approx

from qoq import roofline
from qoq.models.architecture import model_spec
from qoq.paged import PAGE, Layout
from qoq.roofline import CARDS, MODELS, Dimensions, Limit, Times, Workload, decode_step, limit, prefill

LLAMA = MODELS["llama-3-8b"]
FOUR = ("l40s", "a100", "h100", "h200")
# Llama-3-8B, groups of 128, KV4, 1024 tokens in and 512 out. For a card and batch, in ms, s and tokens/s: ideal linear,
# head and attention; then step, decode tokens/s, prefill and tokens/s, each ideal and achievable.
FIGURES = """
l40s  64 4.17 1.22  3.30  8.69 10.5   7369  6095 1.30 2.30  5713  4275
l40s 128 4.17 1.22  6.60 11.99 14.5  10679  8820 2.59 4.60  7516  5455
l40s 256 4.88 1.22 13.20 19.30 24.7  13267 10360 5.19 9.19  8710  6007
a100  64 1.77 0.52  1.40  3.68  4.57 17390 13994 1.52 2.22  9628  7195
a100 128 2.86 0.52  2.80  6.18  8.06 20725 15872 3.05 4.43 10568  7661
a100 256 5.73 0.86  5.60 12.18 15.8  21011 16195 6.09 8.87 10642  7735
h100  64 1.08 0.31  0.85  2.24  2.84 28570 22510 0.48 0.85 20165 14241
h100 128 1.08 0.31  1.70  3.09  4.04 41404 31699 0.96 1.70 25800 17434
h100 256 1.81 0.31  3.41  5.52  7.47 46336 34282 1.92 3.39 27631 18187
h200  64 0.75 0.22  0.59  1.56  2.07 40937 30844 0.48 0.81 25617 17479
h200 128 0.90 0.22  1.19  2.31  3.33 55409 38458 0.96 1.63 30613 19685
h200 256 1.81 0.27  2.38  4.45  6.26 57471 40902 1.92 3.26 31233 20305
"""


def limits(card: str, batch: int, model: Dimensions = LLAMA, **lengths: Any) -> tuple[Limit, Limit]:
    """Ideal and achievable."""
    work = Workload(batch, **lengths)
    return limit(model, CARDS[card].ideal, work), limit(model, CARDS[card].achievable, work)


# Bytes


def test_parameters_and_bytes():
    models = [MODELS[name] for name in ("llama-3-8b", "llama-2-7b", "llama-3-70b")]
    assert [model.linear_parameters() for model in models] == [6979321856, 6476005376, 68451041280]
    assert [roofline.linear_bytes(model) for model in models] == [
        approx(x, rel=2e-4) for x in (3.601e9, 3.342e9, 35.31e9)
    ]
    assert [roofline.head_bytes(model) for model in models] == [approx(x, rel=2e-3) for x in (1.051e9, 0.262e9, 2.10e9)]
    assert [roofline.kv_bytes(model) for model in models] == [34816, 139264, 87040]
    assert [roofline.kv_bytes(model, 16) for model in models] == [131072, 524288, 327680]


def test_weights_per_channel_and_in_small_groups():
    """Codes; s1 and szero, or s1, s2 and zeros, by hand."""
    outputs = 32 * (6144 + 4096 + 28672 + 4096)
    assert roofline.linear_bytes(LLAMA, -1) == 6979321856 // 2 + 4 * outputs
    assert roofline.linear_bytes(LLAMA, 64) == 6979321856 // 2 + 2 * 6979321856 // 64 + 2 * outputs


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_is_as_large_as_its_pages(name, bits):
    model = MODELS[name]
    page = model.num_layers * model.num_kv_heads * Layout(model.head_dim, bits).record_bytes
    assert PAGE * roofline.kv_bytes(model, bits) == page


def test_a_cache_of_other_bits_is_refused():
    with pytest.raises(ValueError, match="^bits is 2, expected 4 to 8, or 16$"):
        roofline.kv_bytes(LLAMA, 2)


def test_memory():
    """Batch 256 at 1536 tokens: cache 13.7, weights 3.6, lm_head and embedding 2.1 GB."""
    work = Workload(256)
    assert work.cache_bytes(LLAMA) == 256 * 1536 * 34816
    assert work.memory_bytes(LLAMA) == approx(19.4e9, rel=2e-3)
    big = MODELS["llama-3-70b"]
    assert [Workload(batch).memory_bytes(big) for batch in (64, 128, 256)] == [
        approx(x, rel=0.01) for x in (48e9, 57e9, 74e9)
    ]
    assert work.fits(LLAMA, CARDS["rtx-4090"]) and not Workload(512).fits(LLAMA, CARDS["rtx-4090"])
    assert not Workload(1).fits(big, CARDS["rtx-4090"]) and Workload(128).fits(big, CARDS["h100"])


# Times


@pytest.mark.parametrize("figures", FIGURES.split("\n")[1:-1])
def test_limits_of_llama_3_8b(figures):
    card, batch, *texts = figures.split()
    ideal, real = limits(card, int(batch))
    step = ideal.step
    found = [1e3 * seconds for seconds in (step.linear, step.head, step.attention, step.total, real.step.total)]
    found += [ideal.decode_tokens_per_s, real.decode_tokens_per_s, ideal.prefill.total, real.prefill.total]
    found += [ideal.tokens_per_s, real.tokens_per_s]
    for value, text in zip(found, texts, strict=True):
        last_digit = 10.0 ** -len(text.partition(".")[2])
        assert value == approx(float(text), rel=5e-4, abs=0.51 * last_digit)


@pytest.mark.parametrize(
    ("name", "card", "batch", "ideal", "achievable"),
    [
        ("llama-2-7b", "l40s", 128, 3633, 2853),
        ("llama-2-7b", "a100", 128, 6570, 5078),
        ("llama-2-7b", "h100", 128, 13310, 10167),
        ("llama-2-7b", "h200", 128, 17344, 12706),
        ("llama-3-70b", "a100", 64, 1269, 978),
        ("llama-3-70b", "h100", 128, 3826, 2579),
        ("llama-3-70b", "h200", 256, 4248, 2725),
    ],
)
def test_limits_of_other_models(name, card, batch, ideal, achievable):
    assert [each.tokens_per_s for each in limits(card, batch, MODELS[name])] == approx([ideal, achievable], rel=5e-4)


@pytest.mark.parametrize(
    ("context", *FOUR),
    [
        (1280, (6.6, 7.0, 8.5), (2.9, 3.1, 3.7), (1.9, 2.0, 2.3), (1.4, 1.5, 1.7)),
        (8192, (6.9, 9.6, 18.7), (3.1, 4.2, 8.0), (1.9, 2.6, 4.9), (1.4, 1.9, 3.5)),
        (32768, (8.0, 18.7, 55), (3.5, 8.0, 23.3), (2.2, 4.9, 14.0), (1.6, 3.5, 9.9)),
    ],
)
def test_small_batches_and_long_contexts(context, l40s, a100, h100, h200):
    for card, steps in zip(FOUR, (l40s, a100, h100, h200), strict=True):
        found = [decode_step(LLAMA, CARDS[card].achievable, batch, context).total for batch in (1, 8, 32)]
        assert [1e3 * seconds for seconds in found] == approx(list(steps), abs=0.055, rel=5e-3)


@pytest.mark.parametrize(
    ("length", "achievable"),
    [(1024, (28.5, 29.6, 77, 80)), (8192, (23.5, 23.9, 64, 66)), (32768, (14.7, 14.4, 40, 41))],
)
def test_prefill_of_long_prompts(length, achievable):
    """Thousands of tokens a second."""
    for card, expected in zip(FOUR, achievable, strict=True):
        seconds = prefill(LLAMA, CARDS[card].achievable, 64, length).total
        assert 64e-3 * length / seconds == approx(expected, rel=7.5e-3)


def test_weights_are_read_until_products_take_longer():
    """The number of tokens from which int8 products take longer than the weights' bytes."""
    for card, tokens in (("l40s", 219), ("a100", 79), ("h100", 152), ("h200", 106)):
        rates = CARDS[card].ideal
        few, many = (decode_step(LLAMA, rates, batch, 1).linear for batch in (tokens - 2, tokens + 2))
        assert few == roofline.linear_bytes(LLAMA) / rates.bandwidth < many


def test_dequantizing_never_takes_longest():
    """6.1 times as fast as an H100's memory; for 128 tokens and more about a fifth of the time of the products."""
    rates = CARDS["h100"].ideal
    assert rates.dequantize * roofline.linear_bytes(LLAMA) / LLAMA.linear_parameters() / rates.bandwidth == approx(
        6.1, abs=0.1
    )
    assert 2 * roofline.FRAGMENT / rates.int8 * rates.dequantize == approx(1 / 0.19, rel=0.1)


def test_padding_of_query_heads():
    """Tiles hold eight query heads of a KV head: products of 32 / 8 heads take twice their time."""
    rates = roofline.Rates(1e30, 1e30, 1e12, 1e30)
    for name, padding in (
        ("llama-3-8b", 2),
        ("llama-3-70b", 1),
        ("llama-2-7b", 8),
        ("qwen2.5-7b", 8 / 7),
        ("yi-34b", 8 / 7),
    ):
        model = MODELS[name]
        operations = 4 * model.num_heads * model.head_dim * model.num_layers * 3 * 100
        assert decode_step(model, rates, 3, 100).attention == approx(padding * operations / 1e12)


def test_passes_of_llama_3_8b():
    """160 KB for a token and layer."""
    assert roofline.pass_bytes(LLAMA) / 32 == approx(160e3, rel=2e-3)


def test_ideal_leaves_out_passes_and_launches():
    ideal, real = limits("h100", 64)
    assert ideal.step.elementwise == ideal.step.launch == ideal.prefill.elementwise == ideal.prefill.launch == 0
    assert real.step.launch == 3e-4 and real.step.elementwise > 0 and real.prefill.launch == 0
    assert Times(1, 2, 4, 8, 16).total == 31


def test_limits_in_fp16():
    """Llama-3-8B on an H100, 128 sequences, by hand: two bytes a weight, products at the rate of float16."""
    work = Workload(128, kv_bits=16, precision="fp16")
    ideal, real = (limit(LLAMA, rates, work) for rates in (CARDS["h100"].ideal, CARDS["h100"].achievable))
    assert ideal.step.linear == approx(2 * 6979321856 / 3.35e12)
    assert ideal.step.attention == approx(128 * 1280 * 131072 / 3.35e12)
    assert ideal.prefill.linear == approx(2 * 6979321856 * 128 * 1024 / 9.89e14)
    assert 1e3 * ideal.step.total == approx(10.89, abs=0.01) and ideal.tokens_per_s == approx(8796, rel=1e-3)
    assert real.step.elementwise > limits("h100", 128)[1].step.elementwise
    assert roofline.pass_bytes(LLAMA, "fp16") / 32 == approx(160e3 + 4 * 4096 + 2 * 4096 + 2 * 14336, rel=2e-3)
    assert work.memory_bytes(LLAMA) == 2 * 6979321856 + 2 * roofline.head_bytes(LLAMA) + 131072 * 128 * 1536
    assert work.fits(LLAMA, CARDS["h100"]) and not Workload(512, precision="fp16").fits(LLAMA, CARDS["rtx-4090"])


def test_one_token_is_of_the_prefill():
    ideal, _ = limits("h100", 8, output_len=1)
    assert ideal.tokens_per_s == approx(8 / ideal.prefill.total)


def test_a_wider_cache_takes_longer():
    steps = [decode_step(LLAMA, CARDS["l40s"].ideal, 64, 1280, bits).attention for bits in (4, 8, 16)]
    assert [step / steps[0] for step in steps] == approx([1, 132 / 68, 256 / 68])


# Tables


@pytest.mark.parametrize("name", MODELS)
def test_models_are_what_transformers_makes_of_them(name):
    from transformers import AutoConfig

    model = MODELS[name]
    config = AutoConfig.for_model(**model.config())
    spec = model_spec(config, name)
    assert spec.linear_parameters() == model.linear_parameters()
    assert (spec.vocab_size, spec.num_kv_heads, spec.head_dim) == (model.vocab_size, model.num_kv_heads, 128)
    assert spec.windows == (None,) * model.num_layers and not spec.tied_embeddings and not spec.qk_norm
    assert bool(spec.biases) == name.startswith("qwen") and spec.rms_norm_eps == model.rms_norm_eps
    assert config.rope_parameters["rope_theta"] == model.rope_theta
    assert config.max_position_embeddings == model.max_positions
    q, k, v = (spec.linear_shape(f"self_attn.{side}_proj") for side in "qkv")
    assert model.linears()["qkv"] == (q[0] + k[0] + v[0], model.hidden_size)


def test_parameters_of_the_models():
    """With embedding and lm_head, as their names and cards have them."""
    found = {name: (model.linear_parameters() + roofline.head_bytes(model)) / 1e9 for name, model in MODELS.items()}
    assert found == approx(
        {
            "llama-3-8b": 8.03,
            "llama-3-70b": 70.55,
            "llama-2-7b": 6.74,
            "qwen2.5-7b": 7.62,
            "qwen2.5-72b": 72.7,
            "mistral-7b": 7.25,
            "yi-34b": 34.39,
        },
        rel=1e-3,
    )


def test_cards_by_the_drivers_name():
    for sheet in CARDS.values():
        assert roofline.sheet_of(sheet.name) is sheet
        assert 2 * sheet.fp16 <= sheet.int8 * 1.02 and 0 < sheet.reach.int8 < 1
    assert roofline.sheet_of("NVIDIA T4") is None


def test_nothing_heavy_is_imported():
    program = "import sys, qoq.roofline; print([m for m in ('torch', 'numpy', 'qoq.kernels') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


# The command


def test_the_command_prints_a_table(qoq):
    code, out, err = qoq("bench", "roofline", "--card", "l40s", "--batch-size", "128,64")
    assert code == 0 and err == ""
    title, memory, blank, head, *lines = out.splitlines()
    assert title == "NVIDIA L40S, llama-3-8b, W4A8 in groups of 128, KV4; 1024 tokens in, 512 out"
    assert memory == (
        "weights 3.60 GB, embedding and lm_head 2.10 GB, cache 34816 bytes a token; "
        "the card has 48.31 GB, 90 % of it for these"
    )
    assert blank == "" and head.split()[0] == "batch" and len({len(line) for line in (head, *lines)}) == 1
    assert [" ".join(line.split()) for line in lines] == [
        "64 8.69 -> 10.50 4.17 -> 4.79 1.22 -> 1.40 3.30 -> 3.79 0.22 0.30 1.30 -> 2.30 "
        "7,369 -> 6,095 5,713 -> 4,275 3.42 GB yes",
        "128 11.99 -> 14.51 4.17 -> 4.79 1.22 -> 1.40 6.60 -> 7.59 0.44 0.30 2.59 -> 4.60 "
        "10,679 -> 8,820 7,516 -> 5,455 6.85 GB yes",
    ]


def test_the_command_gives_json(qoq):
    options = "--card rtx-4090 --model llama-3-70b --kv-bits 16 --input-len 100 --output-len 20 --batch-size 4 --json"
    code, out, err = qoq("bench", "roofline", *options.split())
    assert code == 0 and err == ""
    document = json.loads(out)
    (result,) = document.pop("results")
    assert document == {
        "card": "NVIDIA GeForce RTX 4090",
        "memory_bytes": 24564 << 20,
        "model": "llama-3-70b",
        "group_size": 128,
        "kv_bits": 16,
        "input_len": 100,
        "output_len": 20,
        "weight_bytes": 35308503040,
        "embedding_and_head_bytes": 4202692608,
        "kv_bytes_per_token": 327680,
    }
    assert result["batch_size"] == 4 and result["fits"] is False
    assert result["kv_bytes"] == 4 * 120 * 327680
    assert result["needed_bytes"] == 35308503040 + 4202692608 + result["kv_bytes"]
    ideal, real = result["ideal"], result["achievable"]
    assert ideal.keys() == real.keys() and ideal["step_ms"] < real["step_ms"]
    parts = ("linear", "head", "attention", "elementwise", "launch")
    for found in (ideal, real):
        assert sum(found[f"{part}_ms"] for part in parts) == approx(found["step_ms"], abs=1e-3)
        assert sum(found[f"prefill_{part}_s"] for part in parts) == approx(found["prefill_s"], abs=1e-3)
        total = found["prefill_s"] + 19e-3 * found["step_ms"]
        assert found["tokens_per_s"] == approx(4 * 20 / total, rel=1e-3)


def test_the_card_here_is_the_default(qoq, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert qoq("bench", "roofline")[1].startswith("NVIDIA H200, ")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    code, out, err = qoq("bench", "roofline")
    assert code == 0 and out.startswith("NVIDIA L40S, ")
    assert err == (
        "NVIDIA T4: data sheet not known; this is an L40S's, --card takes l40s, a100, a100-pcie, h100, h200, rtx-4090\n"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert qoq("bench", "roofline")[1].startswith("NVIDIA L40S, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--card", "t4"], "l40s"),
        (["--model", "gpt-2"], "llama-3-8b"),
        (["--batch-size", "0"], "whole numbers from 1 to 4096"),
        (["--input-len", "0"], "0"),
        (["--output-len", "-1"], "-1"),
        (["--kv-bits", "2"], "2"),
    ],
)
def test_a_wrong_option_is_a_usage_error(qoq, arguments, message):
    code, out, err = qoq("bench", "roofline", *arguments)
    assert code == 2 and out == "" and message in err
