"""What the cards of quantized and of converted folders share: the hub's metadata, tables, what opens our layout."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

# What transformers does without our plugin, and so the first thing that its users must know.
IMPORT_FIRST = (
    "Without `import qoq` transformers only warns of an unknown quantization type and goes on with random weights."
)
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # that go where a model goes
TAGS = ("qoq", "qserve", "w4a8", "w4a8kv4", "4-bit", "8-bit")  # of our own layout


def head(metadata: Mapping[str, Any]) -> str:
    """A card's YAML head."""
    return f"---\n{yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)}---\n"


def metadata(name: str, base: Mapping[str, Any], tags: Sequence[str]) -> dict[str, Any]:
    """The hub's own keys; licence and language are those of the base model's card. Only a hub id is linked."""
    found: dict[str, Any] = {}
    if is_hub_id(name):
        found |= {"base_model": name, "base_model_relation": "quantized"}
    found["pipeline_tag"] = "text-generation"
    keys = ("license", "license_name", "license_link", "language")
    return found | {key: base[key] for key in keys if key in base and is_plain(base[key])} | {"tags": list(tags)}


def is_plain(value: object) -> bool:
    """A short string, or some: nothing else of a stranger's card is carried over."""
    values = value if isinstance(value, list) else [value]
    return len(values) <= 100 and all(isinstance(v, str) and v.isprintable() and len(v) <= 200 for v in values)


def read_head(folder: Path) -> dict[str, Any]:
    """The YAML head of a folder's README.md, empty where there is none that can be read."""
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


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def engines(group_size: int, half_precision: bool, whole_zeros: bool) -> str:
    """What opens a folder of our layout, how, and what it runs, as a table.

    `whole_zeros`: zero points are whole codes in 0..15, as plain rounding makes them and other 4-bit formats need them.
    """
    transformers = ("no", "nothing") if half_precision else ("after `import qoq`", "W4A8KV4")
    rows = [("qoq", "as it is", "W4A8KV4"), ("transformers", *transformers)]
    convert = "after `qoq convert FOLDER --to {}`"
    if group_size == 64 or half_precision:
        what = "groups of 64" if group_size == 64 else "linears in 16 bits"
        rows.append(("QServe / OmniServe, SGLang", f"no: {what} are an extension of qoq", "nothing"))
    else:
        rows.append(("QServe / OmniServe", convert.format("qserve"), "W4A8KV4, a plain KV4; norms must be ones"))
        rows.append(("SGLang 0.4.7 to 0.5.15", convert.format("qserve"), "W4A8"))
    if whole_zeros:
        other = convert.format("compressed-tensors"), "W4A16: the same codes, 16-bit activations"
    elif group_size != -1:
        other = convert.format("compressed-tensors-w8a8"), "W8A8: the integers of the W4A8 GEMM, 8 bits a weight"
    else:
        other = convert.format("hf"), "W16A16: the same values in float16"
    rows.append(("vLLM", *other))
    return table(("engine", "opens this folder", "runs"), rows)
