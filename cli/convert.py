"""qoq convert: folders of other engines in and out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qoq.cli.output import common_options, note, print_json

FORMATS = ("qoq", "qserve", "hf", "compressed-tensors", "compressed-tensors-w8a8", "humming")


@click.command()
@click.argument("source")
@click.option("--to", type=click.Choice(FORMATS), required=True, help="Format to write.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--base", help="The model SOURCE was made from; a deepcompressor dump needs it for its config.")
@click.option(
    "--level2-order",
    type=click.Choice(["kernel", "deepcompressor"]),
    help="Column order of s2_scales in a QServe folder.  [default: told from the weights]",
)
@click.option("--max-error", type=float, default=0.05, show_default=True, help="Change of a weight to put up with.")
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="Cut packed weights for N ranks.")
@common_options
def convert(
    source: str,
    to: str,
    output: Path,
    base: str | None,
    level2_order: str | None,
    max_error: float,
    tp: int,
    as_json: bool,
) -> None:
    """Convert SOURCE, a W4 folder, to another format.

    Read: checkpoints of qoq, QServe's folders (safetensors, .bin, .pt), deepcompressor's model.pt with scale.pt, and
    AWQ, GPTQ and compressed-tensors with 4-bit weights.
    """
    from tqdm import tqdm

    from qoq import convert as conversion
    from qoq.formats.card import changed
    from qoq.models.source import locate

    folder = Path(source) if Path(source).is_dir() else locate(source)
    origin = conversion.open_origin(folder, None if base is None else locate(base), level2_order)
    with tqdm(total=origin.spec.num_layers, unit="layer", disable=None) as bar:

        def on_layer(layer: Mapping[str, Any]) -> None:
            bar.set_postfix_str(f"error {layer['error']:.2g}")
            bar.update()

        report = conversion.convert(
            origin, output, to, max_error=max_error, tensor_parallel=tp, base_model=base, on_layer=on_layer
        )
    note(f"{output}: {origin.format} -> {to}. {changed(report)}")
    for layer in sorted(report["layers"], key=lambda layer: -layer["error"])[:3] if report["error"] else []:
        name = max(layer["linears"], key=layer["linears"].get)
        note(f"  layer {layer['layer']}: worst is {name}, {layer['linears'][name]:.2g}")
    for line in report["notes"]:
        note(f"note: {line}")
    if as_json:
        print_json({"output": str(output), **report})
