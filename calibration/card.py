"""The model card: what the folder is, what was measured, and what can open it."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qoq.errors import printable
from qoq.models.source import Source
from qoq.recipe import Recipe

MEASURED = "<!-- measured -->", "<!-- /measured -->"  # around what `with_measurements` replaces
CAUSES = {"w4": "weights (W4)", "a8": "activations (A8)", "k4": "keys (K4)", "v4": "values (V4)", "all": "all of them"}

IMPORTING = """In transformers, `import qoq` must come first. Without it `from_pretrained` only warns of an unknown
quantization type and goes on with random weights.

    import qoq
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("FOLDER")

"""

CARD = """---
{metadata}---
# {title}

{model}, quantized to W4A8KV4 (4-bit weights, 8-bit activations, 4-bit KV cache) by `qoq` {version} with the recipe
`{recipe}`.
{exceptions}
## Run it

```
qoq inspect FOLDER --verify         # every tensor read, every group legal
qoq eval FOLDER --ppl wikitext2
qoq chat FOLDER                     # --device cuda on a GPU
qoq serve FOLDER --device cuda      # OpenAI's API
```

| engine | opens this folder | runs |
| --- | --- | --- |
| qoq | as it is | W4A8KV4 |
| transformers | {transformers} |
| vLLM, and others that read compressed-tensors | after `qoq convert FOLDER --to compressed-tensors` | {vllm} |
{qserve}

{importing}## How it was made

| | |
| --- | --- |
| base model | {base} |
| recipe | `{recipe}`: {layout} weights{passes} |
| KV cache | 4 bits, one scale and minimum for each token and head{cache} |
| calibration | {calibration} |
| made | {date} with qoq {version}, torch {torch}, on {device}, seed {seed} |

`qoq_recipe.yaml` holds all settings, `qoq_report.json` what happened: hashes of the sources and of these files,
calibration text, losses of every layer. `docs/format.md` of qoq describes the bytes.

## Measured

KL divergence from the base model on calibration tokens, in nats, each quantizer alone:

{kl}

{measured}
## Licence

{licence}
"""


def text(
    source: Source, settings: Recipe, report: Mapping[str, Any], half_precision: Collection[str], files: Sequence[str]
) -> str:
    """The README.md of a checkpoint with these licence `files`. A base model is linked only if it is a hub id."""
    base = source_card(source.folder)
    group, hub_id = settings.group_size, is_hub_id(source.name)
    name = printable(source.name.rstrip("/").split("/")[-1])
    layout = "per-channel" if group == -1 else f"g{group}"
    calibration = report["calibration"]
    return CARD.format(
        metadata=yaml.safe_dump(metadata(source.name, base, hub_id), sort_keys=False, allow_unicode=True),
        title=f"{name} W4A8KV4 {layout}",
        model=source.name if hub_id else name,
        version=report["version"],
        recipe=settings.name,
        exceptions=_exceptions(half_precision),
        transformers="no | nothing" if half_precision else "after `import qoq`, which registers the format | W4A8KV4",
        importing="" if half_precision else IMPORTING,
        vllm="the same 4-bit weights, 16-bit activations",
        qserve=_qserve(group, half_precision),
        base=f"[{source.name}](https://huggingface.co/{source.name})" if hub_id else name,
        layout=layout,
        passes=_passes(settings),
        cache=_cache(settings),
        calibration=(
            f"{calibration['samples']} x {calibration['seqlen']} tokens of {Path(calibration['dataset']).name}, "
            f"sha256 {calibration['sha256'][:16]}"
        ),
        date=report["date"][:10],
        torch=report["torch"],
        device=report["device"],
        seed=settings.seed,
        kl=_table(["quantizer", "mean KL"], [[CAUSES[cause], f"{value:.2e}"] for cause, value in report["kl"].items()]),
        measured="\n".join([*MEASURED, ""]),
        licence=_licence(base, files, hub_id),
    )


def metadata(name: str, base: Mapping[str, Any], hub_id: bool) -> dict[str, Any]:
    """The card's YAML head: the hub's own keys, what the base model's card says of licence and language included."""
    found: dict[str, Any] = {}
    if hub_id:
        found |= {"base_model": name, "base_model_relation": "quantized"}
    found |= {"library_name": "qoq", "pipeline_tag": "text-generation"}
    keys = ("license", "license_name", "license_link", "language")
    found |= {key: base[key] for key in keys if key in base and _is_plain(base[key])}
    return found | {"tags": ["qoq", "qserve", "w4a8", "w4a8kv4", "4-bit", "8-bit"]}


def _is_plain(value: object) -> bool:
    """A short string, or some: nothing else of a stranger's card is carried over."""
    values = value if isinstance(value, list) else [value]
    return len(values) <= 100 and all(isinstance(v, str) and v.isprintable() and len(v) <= 200 for v in values)


def source_card(folder: Path) -> dict[str, Any]:
    """The YAML head of the base model's README.md, empty where there is none that can be read."""
    try:
        with open(folder / "README.md", encoding="utf-8") as file:
            content = file.read(1 << 20)
        found = yaml.safe_load(content.split("---", 2)[1]) if content.startswith("---") else {}
    except Exception:  # someone's file; a card is worth no failed run
        return {}
    return found if isinstance(found, dict) else {}


def is_hub_id(name: str) -> bool:
    """Whether a model's name is OWNER/NAME rather than a path."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None and not Path(name).exists()


def with_measurements(card: str, rows: Sequence[Sequence[str]], how: str) -> str:
    """The card with this table of figures in its place; unchanged if the place is gone."""
    start, end = (card.find(mark) for mark in MEASURED)
    if start == -1 or end < start:
        return card
    table = _table(["figure", "value", "limit"], rows)
    return f"{card[:start]}{MEASURED[0]}\n{how}\n\n{table}\n{card[end:]}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _exceptions(half_precision: Collection[str]) -> str:
    if not half_precision:
        return ""
    layers = sorted({int(name.split(".")[2]) for name in half_precision})
    return (
        f"Linears left in 16 bits: {len(half_precision)}, in layers {', '.join(map(str, layers))}; `config.json` lists "
        "them under `modules_to_not_convert`.\n"
    )


def _qserve(group: int, half_precision: Collection[str]) -> str:
    if group == 64 or half_precision:
        what = "groups of 64" if group == 64 else "linears in 16 bits"
        return f"| QServe / OmniServe, SGLang | no: {what} are an extension of qoq | nothing |"
    return (
        "| SGLang 0.4.7 to 0.5.15 | as it is | W4A8 |\n"
        "| QServe / OmniServe | after `qoq convert FOLDER --to qserve` | W4A8KV4, with a plain KV4 |"
    )


def _passes(settings: Recipe) -> str:
    names = {
        "rotation": settings.rotate,
        "SmoothAttention": settings.smooth_attention,
        "smoothing": settings.smooth_down,
        "reordering": settings.reorder,
        "searched grids": settings.weights.grid == "search",
        "GPTQ": settings.weights.gptq,
    }
    used = [name for name, on in names.items() if on]
    return f"; {', '.join(used)}" if used else "; plain rounding"


def _cache(settings: Recipe) -> str:
    cache = settings.kv_cache
    used = {"rotated keys": cache.rotate, "offsets": cache.offset, "searched ranges": len(cache.clip_ratios) > 1}
    return "".join(f", {name}" for name, on in used.items() if on)


def _licence(base: Mapping[str, Any], files: Sequence[str], hub_id: bool) -> str:
    named = base.get("license") if _is_plain(base.get("license")) else None
    lines = [f"The base model's: {named}." if named else "The base model's."]
    if files:
        lines.append(f"Its files are here: {', '.join(files)}.")
    elif not named:
        lines.append("It came with no licence file; see " + ("its page." if hub_id else "where it came from."))
    if "llama" in str(named).lower():
        lines.append("Built with Llama: its licence wants these words shown, and names that begin with Llama.")
    return " ".join(lines)
