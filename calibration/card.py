"""The model card: what the folder is, and what can open it."""

from qoq.models.source import Source
from qoq.recipe import Recipe

CARD = """---
{base}library_name: qoq
pipeline_tag: text-generation
tags: [qoq, qserve, w4a8, w4a8kv4]
---
# {title}

{model}, quantized to W4A8KV4 (4-bit weights, 8-bit activations, 4-bit KV cache) by `qoq` with the recipe `{recipe}`.
Weights are in QServe's {layout} layout. Transformers alone cannot run it; with `qoq` installed:

    qoq inspect FOLDER --verify
    qoq eval FOLDER --ppl wikitext2
    qoq chat FOLDER --prompt "..."

In transformers, `import qoq` must come first. Without it `from_pretrained` only warns of an unknown quantization type
and goes on with random weights.

    import qoq
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("FOLDER")

`qoq_recipe.yaml` holds the settings, `qoq_report.json` what happened: sources, calibration text, losses.
"""


def text(source: Source, settings: Recipe) -> str:
    """The README.md of a checkpoint. A base model is named only if it is a hub id."""
    group = settings.group_size
    hub_id = source.name.count("/") == 1 and not source.name.startswith((".", "/", "~"))
    return CARD.format(
        base=f"base_model: {source.name}\nbase_model_relation: quantized\n" if hub_id else "",
        title=f"{source.name.rstrip('/').split('/')[-1]} W4A8KV4",
        model=source.name if hub_id else source.name.rstrip("/").split("/")[-1],
        recipe=settings.name,
        layout="per-channel" if group == -1 else f"g{group}",
    )
