"""What a run's report says of its layers: which are worst, and one HTML page with a heat map of all.

The page is one file that loads nothing. Every number in the map is a relative squared error on one logarithmic colour
scale: of the layer's output by cause (see `calibration.insight`), of each linear's output by itself.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

CAUSES = {"w4": "W4", "a8": "A8", "k4": "K4", "v4": "V4", "all": "all"}
COLOURS = ((255, 250, 235), (253, 212, 158), (252, 141, 89), (215, 48, 31), (103, 0, 13))  # light to dark
Layers = Sequence[Mapping[str, Any]]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.5rem; margin: 0; }}
dt {{ color: #666; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
p {{ max-width: 46rem; margin: .5rem 0; }}
pre {{ background: #f6f6f6; padding: .75rem; overflow-x: auto; }}
.map {{ overflow-x: auto; }}
table {{ border-collapse: separate; border-spacing: 1px; font-size: 13px; font-variant-numeric: tabular-nums; }}
th {{ font-weight: 600; padding: .2rem .6rem; text-align: center; vertical-align: bottom; white-space: nowrap; }}
thead tr:first-child th {{ color: #666; font-weight: 400; border-bottom: 1px solid #ccc; }}
tbody th {{ text-align: right; font-weight: 400; color: #666; }}
td {{ padding: .1rem .6rem; text-align: right; min-width: 3.6rem; }}
td.gap {{ min-width: .5rem; padding: 0; }}
td.worst {{ font-weight: 700; text-decoration: underline; text-underline-offset: 2px; }}
.scale {{ width: min(32rem, 100%); margin: .75rem 0 1.25rem; font-size: 13px; }}
.bar {{ height: .9rem; background: linear-gradient(to right, {gradient}); border: 1px solid #ccc; }}
.ticks {{ position: relative; height: 1.3rem; }}
.ticks span {{ position: absolute; transform: translateX(-50%); white-space: nowrap; }}
</style>
</head>
<body>
<h1>{title}</h1>
<dl>
{facts}
</dl>
<h2>Error of each layer</h2>
<p>Relative squared error, from light (small) to dark (large) on a logarithmic scale. Under <b>layer output</b>: the
output of the layer, each token by its own size, with one quantizer on and everything else in float &ndash; weights
(W4), activations (A8), keys (K4), values (V4) &ndash; and with all four on. Underlined: the largest of the four. They
need not add up: weights may be chosen to undo the others' errors. Under <b>linear output</b>: what the
weights of each linear alone cost.</p>
<div class="scale"><div class="bar"></div><div class="ticks">{ticks}</div></div>
<div class="map">
<table>
<thead>
{head}
</thead>
<tbody>
{rows}
</tbody>
</table>
</div>
<h2>Recipe</h2>
<pre>{recipe}</pre>
</body>
</html>
"""


def worst_layers(layers: Layers, count: int = 5) -> list[Mapping[str, Any]]:
    """The layers of largest error with everything on, worst first."""
    return sorted(layers, key=lambda layer: -layer["causes"]["all"])[:count]


def worst_linear(layer: Mapping[str, Any]) -> tuple[str, float]:
    """The linear of largest loss in a layer, and that loss; those quantized together share one."""
    losses = {name: values["loss"] for name, values in layer["linears"].items()}
    largest = max(losses.values())
    return " ".join(_short(name) for name, loss in losses.items() if loss == largest), largest


def page(report: Mapping[str, Any]) -> str:
    """The HTML of the report of one run (`qoq_report.json`)."""
    columns = _linear_columns(report["layers"])
    values = [value for layer in report["layers"] for value in (*layer["causes"].values(), *_losses(layer, columns))]
    scale = Scale(values)
    return PAGE.format(
        title=escape(f"{report['model']} – {report['recipe']['name']}"),
        gradient=", ".join(_css(colour) for colour in COLOURS),
        facts="\n".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in _facts(report)),
        ticks="".join(f'<span style="left: {100 * at:.2f}%">{label}</span>' for at, label in scale.ticks()),
        head=_head(columns),
        rows="\n".join(_row(layer, columns, scale) for layer in report["layers"]),
        recipe=escape(json.dumps(report["recipe"], indent=2)),
    )


class Scale:
    """A logarithmic colour scale over whole decades that holds all positive values."""

    def __init__(self, values: Sequence[float]):
        positive = [value for value in values if 0 < value < math.inf] or [1.0]
        self.low = math.floor(math.log10(min(positive)))
        self.high = max(math.ceil(math.log10(max(positive))), self.low + 1)

    def position(self, value: float) -> float:
        """0 at the light end, 1 at the dark end."""
        if value <= 0:
            return 0.0
        return min(1.0, max(0.0, (math.log10(value) - self.low) / (self.high - self.low)))

    def colour(self, value: float) -> tuple[int, int, int]:
        place = self.position(value) * (len(COLOURS) - 1)
        left = min(int(place), len(COLOURS) - 2)
        red, green, blue = (
            round(a + (b - a) * (place - left)) for a, b in zip(COLOURS[left], COLOURS[left + 1], strict=True)
        )
        return red, green, blue

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Position and label of each decade."""
        for exponent in range(self.low, self.high + 1):
            yield self.position(10.0**exponent), f"10<sup>{exponent}</sup>".replace("-", "&minus;")


def _linear_columns(layers: Layers) -> dict[str, str]:
    """Label -> the linear it is read from; linears that share their loss in every layer share a column."""
    shared: dict[tuple[float, ...], list[str]] = {}
    for name in layers[0]["linears"]:
        shared.setdefault(tuple(layer["linears"][name]["loss"] for layer in layers), []).append(name)
    return {" ".join(_short(name) for name in names): names[0] for names in shared.values()}


def _short(name: str) -> str:
    return name.split(".")[-1].removesuffix("_proj")


def _losses(layer: Mapping[str, Any], columns: Mapping[str, str]) -> list[float]:
    return [layer["linears"][name]["loss"] for name in columns.values()]


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    recipe, calibration, layers = report["recipe"], report["calibration"], report["layers"]
    group = recipe["group_size"]
    yield "Model", report["model"]
    yield "Recipe", f"{recipe['name']}, {'per channel' if group == -1 else f'groups of {group}'}"
    yield "Calibration", f"{calibration['samples']} x {calibration['seqlen']} tokens of {calibration['dataset']}"
    yield "Layers", f"{len(layers)}; worst: {', '.join(str(layer['layer']) for layer in worst_layers(layers))}"
    yield "Error after the last layer", f"{_number(layers[-1]['loss'])}, of the hidden states, all layers together"
    yield "KL divergence", ", ".join(f"{CAUSES[cause]} {_number(value)}" for cause, value in report["kl"].items())
    yield "Time", f"{report['seconds']:.0f} s on {report['device']}, {report['date']}"
    memory = f"{report['peak_rss_bytes'] / 2**30:.2f} GiB"
    yield "Peak memory", memory + (f", GPU {gpu / 2**30:.2f} GiB" if (gpu := report["peak_gpu_bytes"]) else "")
    yield "Versions", f"qoq {report['version']}, torch {report['torch']}, Python {report['python']}"


def _head(columns: Mapping[str, str]) -> str:
    def names(labels: Iterator[str] | Sequence[str]) -> str:
        return "".join(f"<th>{escape(label)}</th>" for label in labels)

    return (
        f'<tr><th></th><th colspan="{len(CAUSES)}">layer output</th><td class="gap"></td>'
        f'<th colspan="{len(columns)}">linear output</th></tr>\n'
        f'<tr><th>layer</th>{names(list(CAUSES.values()))}<td class="gap"></td>{names(list(columns))}</tr>'
    )


def _row(layer: Mapping[str, Any], columns: Mapping[str, str], scale: Scale) -> str:
    causes = layer["causes"]
    largest = max((cause for cause in CAUSES if cause != "all"), key=lambda cause: causes[cause])
    left = "".join(_cell(causes[cause], scale, cause == largest) for cause in CAUSES)
    right = "".join(_cell(loss, scale) for loss in _losses(layer, columns))
    return f'<tr><th>{layer["layer"]}</th>{left}<td class="gap"></td>{right}</tr>'


def _cell(value: float, scale: Scale, worst: bool = False) -> str:
    text = "#fff" if scale.position(value) > 0.65 else "#222"
    style = f"background: {_css(scale.colour(value))}; color: {text}"
    return f'<td{" class=worst" if worst else ""} style="{style}" title="{value:.4g}">{_number(value)}</td>'


def _css(colour: tuple[int, int, int]) -> str:
    return f"rgb{colour}"


def _number(value: float) -> str:
    """Two digits: 1.2e-3."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value and exponent else "0"
