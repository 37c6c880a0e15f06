"""The model card of a converted folder: which engine runs it, in which precision, and what the conversion changed.

What is said of engines was read in their sources, except for transformers and qoq itself, which the tests run.
"""

from collections.abc import Mapping
from typing import Any

from qoq.formats.origin import Origin

CARD = """---
{base}pipeline_tag: text-generation
tags: [{tags}]
---
# {title}

{model} in 4-bit QoQ integers, converted by `qoq convert` from {source} to {to}{layout}.

{engines}

Of other engines this says what their sources say; `qoq` tests its conversions with transformers and compressed-tensors.

{changed}
{notes}"""

TAGS = {
    "qoq": "qoq, qserve, w4a8, w4a8kv4",
    "qserve": "qoq, qserve, w4a8",
    "hf": "qoq, dequantized",
    "compressed-tensors": "compressed-tensors, vllm, w4a16, 4-bit",
    "compressed-tensors-w8a8": "compressed-tensors, vllm, w8a8, 8-bit",
    "humming": "humming, vllm, w4a8",
}

ENGINES = {
    "qoq": """| engine | weights, activations, KV cache | how |
| --- | --- | --- |
| qoq | W4A8KV4 | `qoq chat FOLDER` |
| transformers | W4A8KV4 | `import qoq` first, then `from_pretrained` |

Without `import qoq` transformers only warns of an unknown quantization type and goes on with random weights.""",
    "qserve": """| engine | weights, activations, KV cache | how |
| --- | --- | --- |
| QServe, OmniServe | W4A8KV4 | `--precision w4a8kv4 --group-size {group_size}`; attention heads of 128 |
| SGLang 0.4.7 to 0.5.15 | W4A8, KV of 16 or 8 bits | as it is, on one GPU (its tensor parallelism cuts through tiles) |

Other engines have no kernels for it; later versions of SGLang have none either.""",
    "hf": """Weights are dequantized to float16. Any engine that knows the architecture runs it as an ordinary 16-bit
model: W16A16, with the quality of 4-bit weights and no gain in speed or size.""",
    "compressed-tensors": """| engine | weights, activations, KV cache | how |
| --- | --- | --- |
| vLLM 0.26 and later | W4A16, KV as you choose | `vllm serve FOLDER --dtype half`, on any number of GPUs |
| SGLang | W4A16 | `--dtype half` |
| LMDeploy (groups of 128) | W4A16, KV of 4 bits with `quant_policy=4` | TurboMind |
| transformers | W16A16 after loading | `quantization_config=CompressedTensorsConfig(dequantize=True)` |

No engine runs this folder with 8-bit activations, and none should: vLLM 0.26 drops the zero points of asymmetric
weights with int8 activations. That is why the config asks for weights only.""",
    "compressed-tensors-w8a8": """| engine | weights, activations, KV cache | how |
| --- | --- | --- |
| vLLM | W8A8, KV as you choose | `vllm serve FOLDER --dtype half`, on any number of GPUs |
| transformers | W16A16 after loading | `quantization_config=CompressedTensorsConfig(dequantize=True)` |

The 8-bit weights are the integers that QoQ's W4A8 GEMM multiplies, activations are quantized as it quantizes them:
the function of W4A8, at 8 bits a weight.""",
    "humming": """| engine | weights, activations, KV cache | how |
| --- | --- | --- |
| vLLM 0.26 and later | W4A8, KV as you choose | `--quantization humming --dtype half --kv-cache-dtype fp8` |
| SGLang | W4A8 | `--quantization humming` |

Both need the package `humming-kernels`. Humming rounds group scales, when it loads them, to multiples of a 1024th of
the largest of a matrix (of q, k, v and of gate, up together where the engine joins them); the figure below counts that
for matrices on their own.""",
}


def card(origin: Origin, report: Mapping[str, Any]) -> str:
    """The README.md of a conversion. A base model is linked only if it is a hub id."""
    model = str(report["model"] or "").rstrip("/")
    hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    to, group = str(report["to"]), int(report["group_size"])
    ranks = int(report["tensor_parallel"])
    return CARD.format(
        base=f"base_model: {model}\nbase_model_relation: quantized\n" if hub_id else "",
        tags=TAGS[to],
        title=f"{model.split('/')[-1] or origin.spec.model_type} ({to})",
        model=(model if hub_id else model.split("/")[-1]) or "A model",
        source=origin.format,
        to=to,
        layout=(
            ""
            if to in ("hf", "compressed-tensors-w8a8")
            else ", per channel"
            if group == -1
            else f", groups of {group}"
        )
        + (f", cut for {ranks} ranks (`rank-0` to `rank-{ranks - 1}`)" if ranks > 1 else ""),
        engines=ENGINES[to].format(group_size=group),
        changed=changed(report),
        notes="".join(f"\nNote: {note}.\n" for note in report["notes"]),
    )


def changed(report: Mapping[str, Any]) -> str:
    """One sentence on what the conversion changed."""
    if report["error"] == 0:
        return "The conversion is exact: every integer and every scale is the source's."
    rounded = sum(layer["rounded"] for layer in report["layers"])
    groups = sum(layer["groups"] for layer in report["layers"])
    worst = f"the worst linear changed by {report['error']:.2g} of its norm"
    if rounded == 0:
        return f"Every 4-bit code is the source's; scales or weights are rounded to float16 ({worst})."
    share = f"{rounded} of {groups} groups ({rounded / groups:.1%})"
    return f"{share} did not fit the format exactly and got new scales or codes: {worst}."
