"""The model card: what the folder is, what was measured, and what can open it."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from qoq.calibration import data
from qoq.errors import printable
from qoq.model_card import IMPORT_FIRST, TAGS, engines, head, is_hub_id, is_plain, metadata, read_head, table
from qoq.models.source import Source
from qoq.recipe import Calibration, Recipe

MEASURED = "<!-- measured -->", "<!-- /measured -->"  # around what `with_measurements` replaces
CAUSES = {"w4": "weights (W4)", "a8": "activations (A8)", "k4": "keys (K4)", "v4": "values (V4)", "all": "all of them"}

IMPORTING = f"""In transformers, `import qoq` must come first. {IMPORT_FIRST}

    import qoq
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("FOLDER")

"""

CARD = """{head}# {title}

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

{engines}

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
    base, group, hub_id = read_head(source.folder), settings.group_size, is_hub_id(source.name)
    name = printable(source.name.rstrip("/").split("/")[-1])
    layout = "per-channel" if group == -1 else f"g{group}"
    calibration = report["calibration"]
    return CARD.format(
        head=head({"library_name": "qoq"} | metadata(source.name, base, TAGS)),
        title=f"{name} W4A8KV4 {layout}",
        model=source.name if hub_id else name,
        version=report["version"],
        recipe=settings.name,
        exceptions=_exceptions(half_precision),
        engines=engines(group, bool(half_precision), fits_int4(settings)),
        importing="" if half_precision else IMPORTING,
        base=f"[{source.name}](https://huggingface.co/{source.name})" if hub_id else name,
        layout=layout,
        passes=_passes(settings),
        cache=_cache(settings),
        calibration=(
            f"{calibration['samples']} x {calibration['seqlen']} tokens of {_text(settings.calibration)}, "
            f"sha256 {calibration['sha256'][:16]}"
        ),
        date=report["date"][:10],
        torch=report["torch"],
        device=report["device"],
        seed=settings.seed,
        kl=table(["quantizer", "mean KL"], [[CAUSES[cause], f"{value:.2e}"] for cause, value in report["kl"].items()]),
        measured="\n".join([*MEASURED, ""]),
        licence=_licence(base, files, hub_id),
    )


def with_measurements(card: str, rows: Sequence[Sequence[str]], how: str) -> str:
    """The card with this table of figures in its place; unchanged if the place is gone."""
    start, end = (card.find(mark) for mark in MEASURED)
    if start == -1 or end < start:
        return card
    figures = table(["figure", "value", "limit"], rows)
    return f"{card[:start]}{MEASURED[0]}\n{how}\n\n{figures}\n{card[end:]}"


def _exceptions(half_precision: Collection[str]) -> str:
    if not half_precision:
        return ""
    layers = sorted({int(name.split(".")[2]) for name in half_precision})
    return (
        f"Linears left in 16 bits: {len(half_precision)}, in layers {', '.join(map(str, layers))}; `config.json` lists "
        "them under `modules_to_not_convert`.\n"
    )


def fits_int4(settings: Recipe) -> bool:
    """Whether the zeros of this recipe's grids are 4-bit zero points."""
    return settings.weights.grid == "round" or settings.weights.whole_zeros


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


def _text(calibration: Calibration) -> str:
    """What the samples are of; of a mixture with the samples that each part was asked for."""
    parts = data.mixture(calibration.dataset, calibration.nsamples)
    if len(parts) == 1:
        return Path(parts[0][0]).name
    return ", ".join(f"{Path(name).name} ({count})" for name, count in parts)


def _cache(settings: Recipe) -> str:
    cache = settings.kv_cache
    used = {"rotated keys": cache.rotate, "offsets": cache.offset, "searched ranges": len(cache.clip_ratios) > 1}
    layers = ", ".join(map(str, cache.layers_in_8_bits))
    return "".join(f", {name}" for name, on in used.items() if on) + (f"; 8 bits in layers {layers}" if layers else "")


def _licence(base: Mapping[str, Any], files: Sequence[str], hub_id: bool) -> str:
    named = base.get("license") if is_plain(base.get("license")) else None
    lines = [f"The base model's: {named}." if named else "The base model's."]
    if files:
        lines.append(f"Its files are here: {', '.join(files)}.")
    elif not named:
        lines.append("It came with no licence file; see " + ("its page." if hub_id else "where it came from."))
    if "llama" in str(named).lower():
        lines.append("Built with Llama: its licence wants these words shown, and names that begin with Llama.")
    return " ".join(lines)
