"""The pictures of `qoq bench`: GEMMs under the roofline of a card, and throughput of whole batches beside it."""

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import inf
from typing import TYPE_CHECKING, Any

from qoq.errors import OutputError

if TYPE_CHECKING:
    from qoq.kernels.bench import Product
    from qoq.kernels.timing import Machine

STYLES = {"qkv": ("#0072b2", "o"), "o": ("#e69f00", "s"), "gate_up": ("#009e73", "D"), "down": ("#cc79a7", "^")}
PRECISION_STYLES = {"w4a8": ("#0072b2", "o"), "fp16": ("#e69f00", "s")}


def check_matplotlib() -> None:
    """Refuse a plot that cannot be drawn, before anything is measured.

    Raises:
        OutputError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise OutputError("--plot needs matplotlib; pip install 'qoq[plot]'")


def roofline(products: "Sequence[Product]", machine: "Machine") -> bytes:
    """A PNG: operations for each byte against operations in a second, both logarithmic; one curve for each linear."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel="operations / byte", ylabel="TOPS")
    groups = "per channel" if products[0].group_size == -1 else f"groups of {products[0].group_size}"
    axes.set_title(f"{machine.card.name}: W4A8 GEMMs, {groups}, each point with its number of tokens")
    axes.grid(True, which="both", linewidth=0.3)

    reach = [0.7 * min(each.intensity for each in products), 1.5 * max(each.intensity for each in products)]
    sheet = machine.sheet
    most = sheet.int8 if sheet else inf

    def ceiling(bandwidth: float, style: str, label: str) -> None:
        corners = sorted({*reach, min(max(most / bandwidth, reach[0]), reach[1])})
        axes.plot(corners, [1e-12 * min(bandwidth * x, most) for x in corners], style, color="0.4", label=label)

    ceiling(machine.copy, "--", f"device copy, {1e-9 * machine.copy:.0f} GB/s")
    if sheet is not None:
        label = f"data sheet, {1e-9 * sheet.bandwidth:.0f} GB/s and {1e-12 * sheet.int8:.0f} TOPS"
        ceiling(sheet.bandwidth, "-", label)

    for linear in dict.fromkeys(each.linear for each in products):
        of_linear = [each for each in products if each.linear == linear]
        color, marker = STYLES[linear]
        x, y = [each.intensity for each in of_linear], [each.tops for each in of_linear]
        axes.plot(
            x, y, marker=marker, color=color, linewidth=0.8, label=f"{linear} {of_linear[0].N} x {of_linear[0].K}"
        )
    for m in dict.fromkeys(each.M for each in products):
        lowest = min((each for each in products if each.M == m), key=lambda each: each.tops)
        place = (lowest.intensity, lowest.tops)
        axes.annotate(str(m), place, xytext=(0, -14), textcoords="offset points", ha="center", fontsize=8)
    axes.legend(loc="lower right", fontsize=8)
    return _png(figure)


def throughput(records: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of records of `qoq bench throughput`: tokens a second against batch size, measured and allowed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    first = records[0]
    lengths = f"{first['input_len']} tokens in, {first['output_len']} out"
    axes.set_title(f"{first['model']} on {first['device']}: {lengths}, prefill included")
    axes.set(xlabel="requests at a time", ylabel="generated tokens / second")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(True, which="both", linewidth=0.3)
    for precision in dict.fromkeys(record["precision"] for record in records):
        own = [record for record in records if record["precision"] == precision]
        sizes = [record["batch_size"] for record in own]
        color, marker = PRECISION_STYLES[precision]
        curves: list[tuple[str, dict[str, Any], str]] = [("throughput_tokens_per_s", {"marker": marker}, "")]
        if own[0]["card"] is not None:
            curves.append(("achievable_tokens_per_s", {"linestyle": "--"}, ": allowed with good kernels"))
            curves.append(("roofline_tokens_per_s", {"linestyle": ":"}, ": allowed by the data sheet"))
        for key, look, what in curves:
            label = f"{precision}, KV{own[0]['kv_bits']:.3g}{what}"
            axes.plot(sizes, [record[key] for record in own], color=color, label=label, **look)
        for record in own:
            place = (record["batch_size"], record["throughput_tokens_per_s"])
            style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
            axes.annotate(f"{place[1]:,.0f}", place, xytext=(0, -14), **style)
    low, high = axes.get_ylim()
    if high < 10 * low:  # else the labels of decades will do
        axes.yaxis.set_minor_formatter("{x:,.0f}")
    ticks = sorted({record["batch_size"] for record in records})
    axes.set_xticks(ticks, labels=[str(size) for size in ticks])
    axes.legend(fontsize=8)
    return _png(figure)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
