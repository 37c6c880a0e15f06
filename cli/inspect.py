"""qoq inspect: what a checkpoint folder is, and what is wrong with it."""

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qoq.cli.output import common_options, html_option, print_json
from qoq.cli.report_page import page
from qoq.errors import CheckpointError, QoqError

if TYPE_CHECKING:
    from qoq.checkpoint import Checkpoint
    from qoq.shards import Entry


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every tensor and check every group.")
@html_option
@common_options
def inspect(folder: Path, verify: bool, html: Path | None, as_json: bool) -> None:
    """Say what FOLDER is; exit code 1 if something is wrong with it."""
    found = describe(folder, verify)
    if html is not None:
        write_page(folder, html)
    if as_json:
        print_json(found)
    else:
        _print(found)
    if found["problems"]:
        raise SystemExit(1)


def write_page(folder: Path, html: Path) -> None:
    """Write the page of the run that made a checkpoint.

    Raises:
        CheckpointError: the folder has no report of its layers.
    """
    from qoq.checkpoint import Checkpoint
    from qoq.shards import write_bytes

    report = Checkpoint(folder, check=False).report()
    try:
        write_bytes(html, page(report))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: --html needs a qoq_report.json with the causes of each layer's error "
            f"({type(error).__name__}: {error})"
        ) from None


def describe(folder: Path, verify: bool) -> dict[str, Any]:
    """Everything that can be said of a folder, faults included.

    Raises:
        CheckpointError: there is no such folder.
    """
    from qoq.checkpoint import Checkpoint
    from qoq.shards import read_header
    from qoq.verify import problems

    faults = problems(folder, verify)
    entries: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(CheckpointError):
            entries |= read_header(path)
    found: dict[str, Any] = {"folder": str(folder), "tensors": _classes(entries)}
    with suppress(QoqError):  # among the problems
        checkpoint = Checkpoint(folder, check=False, entries=entries)
        found |= _identity(checkpoint)
        found["scales"] = _scales(checkpoint)
    return found | {"verified": verify, "problems": faults}


def _classes(entries: "dict[str, Entry]") -> list[dict[str, Any]]:
    """Tensors by class: how many, bytes."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for name, entry in entries.items():
        kind = _class_of(name)
        count[kind] += 1
        size[kind] += entry.bytes
    return [{"class": kind, "tensors": count[kind], "bytes": size[kind]} for kind in size]


def _class_of(name: str) -> str:
    if "norm" in name:
        return "norms"
    if "embed_tokens" in name or "lm_head" in name:
        return name.removesuffix(".weight").split(".")[-1]
    return name.rsplit(".", 1)[-1]


def _identity(checkpoint: "Checkpoint") -> dict[str, Any]:
    from qoq.layout import kv_bytes, size_in_bytes

    spec, group = checkpoint.spec, checkpoint.group_size
    report = checkpoint.report()
    embeddings = 2 * 2 * spec.vocab_size * spec.hidden_size
    linear_bytes = size_in_bytes(spec, group, checkpoint.kv_cache, checkpoint.half_precision) - embeddings
    return {
        "format": "QServe W4A8, " + ("per channel" if group == -1 else f"groups of {group}"),
        "group_size": group,
        "model": report.get("model"),
        "recipe": report.get("recipe", {}).get("name"),
        "model_type": spec.model_type,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "bits_per_linear_weight": round(8 * linear_bytes / spec.linear_parameters(), 3),
        "kv_bytes_per_token": kv_bytes(spec, checkpoint.kv_cache),
        "cache_layers_in_8_bits": list(checkpoint.kv_cache.layers_in_8_bits),
        "linears_in_16_bits": sorted(checkpoint.half_precision),
        "loads_in": _loads_in(group, bool(checkpoint.half_precision)),
    }


def _loads_in(group_size: int, exceptions: bool) -> list[str]:
    """Engines that read this layout. Groups of 64 and linears in 16 bits are extensions that only qoq knows."""
    others = ["QServe / OmniServe and SGLang 0.4.7 to 0.5.15 (after qoq convert --to qserve)"]
    return ["qoq"] if group_size == 64 or exceptions else ["qoq", *others]


def _scales(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Ranges over all linears, read from the small tensors only."""
    from qoq.packing import unpack_level2

    ranges: dict[str, list[float]] = {}
    steps: Counter[int] = Counter()
    for name in checkpoint.expected:
        if checkpoint.tensor_problem(name):
            continue
        suffix = name.rsplit(".", 1)[-1]
        if suffix in ("s1_scales", "s1_szeros"):
            tensor = checkpoint.tensor(name).float()
            low, high = ranges.get(suffix, [float("inf"), float("-inf")])
            ranges[suffix] = [min(low, float(tensor.min())), max(high, float(tensor.max()))]
        elif suffix == "s2_scales":
            values, counts = unpack_level2(checkpoint.tensor(name)).unique(return_counts=True)
            steps.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return {**ranges, "s2_scales": dict(sorted(steps.items()))} if steps else dict(ranges)


def _print(found: dict[str, Any]) -> None:
    for key in ("format", "model", "recipe", "model_type", "layers", "hidden_size"):
        if found.get(key) is not None:
            click.echo(f"{key:24}{found[key]}")
    if "group_size" in found:
        click.echo(f"{'bits per linear weight':24}{found['bits_per_linear_weight']}")
        click.echo(f"{'KV bytes per token':24}{found['kv_bytes_per_token']}")
        if found["cache_layers_in_8_bits"]:
            click.echo(f"{'KV8 in layers':24}{', '.join(map(str, found['cache_layers_in_8_bits']))}")
        if found["linears_in_16_bits"]:
            click.echo(f"{'in 16 bits':24}{', '.join(found['linears_in_16_bits'])}")
        click.echo(f"{'loads in':24}{', '.join(found['loads_in'])}")
    for row in found["tensors"]:
        click.echo(f"  {row['class']:22}{row['tensors']:6} tensors {row['bytes'] / 2**20:12.2f} MiB")
    for name, value in found.get("scales", {}).items():
        if name == "s2_scales":
            total = sum(value.values())
            shares = ", ".join(f"{step}: {100 * count / total:.1f} %" for step, count in value.items())
            click.echo(f"  {name:22}{shares}")
        else:
            click.echo(f"  {name:22}{value[0]:.3g} .. {value[1]:.3g}")
    for problem in found["problems"]:
        click.echo(f"problem: {problem}")
    if not found["problems"]:
        click.echo(
            "every tensor read, every group legal" if found["verified"] else "names, shapes and dtypes are right"
        )
