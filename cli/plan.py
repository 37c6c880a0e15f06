"""qoq quantize --plan: what a run would make, need and take; and sizes of memory on the command line."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qoq.cli.output import note

if TYPE_CHECKING:
    from qoq.calibration.memory import Peak
    from qoq.calibration.plan import Plan, Seconds

UNITS = {"": 30, "g": 30, "gib": 30, "m": 20, "mib": 20, "t": 40, "tib": 40}


class Size(click.ParamType):
    """Bytes: 24 (GiB), 500MiB, 80GB."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([a-z]*)", value.strip().lower())
        number, unit = found.groups() if found else ("0", "")
        decimal = {"mb": 10**6, "gb": 10**9, "tb": 10**12}
        if unit not in UNITS and unit not in decimal or not float(number):
            self.fail(f"{value!r}, expected a size such as 24 (GiB), 500MiB or 80GB", parameter, context)
        return int(float(number) * (decimal[unit] if unit in decimal else 1 << UNITS[unit]))


def print_plan(plan: "Plan") -> None:
    """For people, on stderr."""
    from qoq.calibration.memory import MARGIN
    from qoq.calibration.plan import CONTEXTS

    kv = ", ".join(f"{size:,} ({bits} bits)" for bits, size in plan.kv_bytes.items())
    note(
        f"{plan.model}: {plan.layers} layers, {plan.parameters / 1e9:.2f} B parameters, "
        f"{plan.quantized_parameters / 1e9:.2f} B of them to quantize with {plan.recipe}"
    )
    note(f"weights          {gb(2 * plan.parameters)} in float16 -> {gb(plan.output_bytes)} packed")
    note(f"KV cache         bytes a token: {kv}")
    note(f"tensor parallel  degrees {', '.join(map(str, plan.tensor_parallel))}")
    made = f"{gb(plan.disk_bytes)} at the end of the run, then {gb(plan.output_bytes)}"
    note(f"disk             {gb(plan.source_bytes)} source, {made}")
    peaks = f"{_peak('host memory', plan.peaks.host)}"
    if plan.peaks.gpu is not None:
        peaks = f"{_peak('GPU memory', plan.peaks.gpu)}, {peaks}"
    note(
        f"this run         on {plan.device}, {plan.tokens:,} tokens: {_time(plan.seconds)}; {peaks}, "
        f"each +- {MARGIN:.0%}; {_placement(plan.placement.streams, plan.placement.tokens_at_once)}"
    )
    widths = "".join(f"{f'x {n}':>9}" for n in CONTEXTS)
    note(f"{'card':10}{'quantizes in':>16}{'GPU peak':>10}{'KV4 tokens':>12}{'KV8':>10}{'KV16':>10}   KV4:{widths}")
    for name, card in plan.cards.items():
        time, peak = "does not fit", "-"
        if card.seconds is not None and card.peaks is not None and card.peaks.gpu is not None:
            time, peak = _time(card.seconds), gb(card.peaks.gpu.bytes)
        tokens = card.tokens_held
        sequences = "".join(f"{tokens[4] // n:9,}" for n in CONTEXTS)
        note(f"{name:10}{time:>16}{peak:>10}{tokens[4]:12,}{tokens[8]:10,}{tokens[16]:10,}       {sequences}")
    note(f"times are scaled from one measurement: {plan.seconds.basis}")


def _peak(where: str, peak: "Peak") -> str:
    return f"{gb(peak.bytes)} of {where} ({peak.phase})"


def _placement(streams: str, tokens: int) -> str:
    where = "in host memory" if streams == "host" else "on the device"
    return f"samples {where}, {tokens} tokens at once"


def _time(seconds: "Seconds") -> str:
    low, high = seconds.total / seconds.factor, seconds.total * seconds.factor
    unit, name = next(
        ((unit, name) for unit, name in ((86400, "d"), (3600, "h"), (60, "min")) if low >= 2 * unit), (1, "s")
    )
    return f"{low / unit:.0f} - {high / unit:.0f} {name}"


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e11 else f"{size / 1e9:.0f} GB"


def summary(plan: "Plan", output: Path) -> str:
    """One line, before a run."""
    memory = [gb(peak.bytes) + f" of {where} memory" for where, peak in plan.peaks.named().items()]
    return (
        f"{plan.model}: {plan.layers} layers, {plan.quantized_parameters / 1e6:.0f} M weights to quantize, "
        f"{gb(plan.source_bytes)} -> {output} {gb(plan.output_bytes)}; about {' and '.join(memory)}, "
        f"{_time(plan.seconds)}, {plan.tokens} calibration tokens"
    )
