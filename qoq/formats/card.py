"""The model card of a converted folder: which engine runs it, in which precision, and what the conversion changed.

What is said of engines was read in their sources, except for transformers and qoq itself, which the tests run.
"""

from collections.abc import Mapping
from typing import Any

from qoq import model_card
from qoq.errors import printable
from qoq.formats.origin import Origin

CARD = """{head}# {title}

{model} in 4-bit QoQ integers, converted by `qoq convert` from {source} to {to}{layout}.

{engines}

Of other engines this says what their sources say; `qoq` tests its conversions with transformers and compressed-tensors.

{changed}
{notes}"""

TAGS = {
    "qoq": model_card.TAGS,
    "qserve": ("qoq", "qserve", "w4a8"),
    "hf": ("qoq", "dequantized"),
    "compressed-tensors": ("compressed-tensors", "vllm", "w4a16", "4-bit"),
    "compressed-tensors-w8a8": ("compressed-tensors", "vllm", "w8a8", "8-bit"),
    "humming": ("humming", "vllm", "w4a8"),
}

ENGINES = {
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
    name = str(report["model"] or "").rstrip("/")
    to, group = str(report["to"]), int(report["group_size"])
    metadata = model_card.metadata(name, model_card.read_head(origin.described_by), TAGS[to])
    shown = printable(name.split("/")[-1])
    return CARD.format(
        head=model_card.head(metadata),
        title=f"{shown or origin.spec.model_type} ({to})",
        model=(name if "base_model" in metadata else shown) or "A model",
        source=origin.format,
        to=to,
        layout=_layout(to, group, int(report["tensor_parallel"])),
        engines=_own(origin) if to == "qoq" else ENGINES[to].format(group_size=group),
        changed=changed(report),
        notes="".join(f"\nNote: {note}.\n" for note in report["notes"]),
    )


def _layout(to: str, group_size: int, ranks: int) -> str:
    """Of the weights, where the format does not say it."""
    layout = ", per channel" if group_size == -1 else f", groups of {group_size}"
    layout = "" if to in ("hf", "compressed-tensors-w8a8") else layout
    return layout + (f", cut for {ranks} ranks (`rank-0` to `rank-{ranks - 1}`)" if ranks > 1 else "")


def _own(origin: Origin) -> str:
    """What opens a checkpoint of ours. Formats of one level have whole zeros; of others it is not known."""
    half = bool(origin.half_precision)
    whole = origin.format in ("awq", "gptq", "compressed-tensors")
    engines = model_card.engines(origin.group_size, half, whole)
    return engines if half else f"{engines}\n\n{model_card.IMPORT_FIRST}"


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
