"""qoq gate: whether a checkpoint keeps within a budget; also the last step of `qoq quantize --gate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qoq.cli.output import check_device, common_options, print_json

if TYPE_CHECKING:
    from torch import Tensor

    from qoq.checkpoint import Checkpoint
    from qoq.gate import Budget, Change, Check
    from qoq.models.source import Source

REJECTED = 2  # exit code


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("budget", type=click.Path(path_type=Path))
@click.option("--reference", help="The original model.  [default: the one that the checkpoint was made from]")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option("--record", is_flag=True, help="Write the figures into the folder's model card.")
@click.option("--trust-remote-code", is_flag=True, help="Let the original model's own code run.")
@common_options
def gate(
    folder: Path,
    budget: Path,
    reference: str | None,
    device: str,
    record: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Hold checkpoint FOLDER against BUDGET, a YAML file of limits: ACCEPT, or REJECT and exit code 2.

    Limits: perplexity_ratio, mean_kl, p99_kl, same_top1 (on text, seqlen, windows), size_bytes, tokens_per_second (at
    speed.batch_size, speed.input_len, speed.output_len).
    """
    from qoq import gate as gates

    device = check_device(device)
    verdict = judge(folder, gates.load(budget), device, reference, record, trust_remote_code)
    if as_json:
        print_json(verdict)
    else:
        say(verdict)
    if verdict["verdict"] == "REJECT":
        raise SystemExit(REJECTED)


def check_inputs(budget: "Budget", source: "Source") -> None:
    """See to it that what a budget measures on can be used, before the checkpoint of `source` is made.

    Raises:
        QoqError: no such text, too little of it, or a `speed` that the model or the engine does not take.
    """
    from qoq.runtime.benchmark import check_length
    from qoq.runtime.engine import MAX_BATCH
    from qoq.runtime.loading import check_range

    if budget.tokens_per_second is not None:
        speed = budget.speed
        check_range("speed.batch_size", speed.batch_size, 1, MAX_BATCH)
        check_length(speed.input_len, speed.output_len, source.config.max_position_embeddings)
    if budget.measures_quality:
        _windows(budget, source.tokenizer())


def judge(
    folder: Path,
    budget: "Budget",
    device: str,
    reference: str | None = None,
    record: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure what a budget limits; the verdict as a JSON document.

    Raises:
        QoqError: the checkpoint or its original cannot be opened, or something cannot be measured.
    """
    from qoq import gate as gates
    from qoq.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    measured: dict[str, float] = {"size_bytes": float(sum(entry.bytes for entry in checkpoint.entries.values()))}
    if budget.tokens_per_second is not None:
        measured["tokens_per_second"] = _speed(checkpoint, budget, device)
    if budget.measures_quality:
        measured |= _quality(checkpoint, budget, device, reference, trust_remote_code)
    checks = gates.check(budget, measured)
    change = None if gates.accepted(checks) else gates.smallest_change(checkpoint, budget, checks)
    verdict = {
        "folder": str(folder),
        "verdict": "ACCEPT" if gates.accepted(checks) else "REJECT",
        "device": device,
        "text": None if budget.text is None else Path(budget.text).name,
        "seqlen": budget.seqlen,
        "checks": [
            {"name": one.name, "value": one.value, one.bound.replace(" ", "_"): one.limit, "passed": one.passed}
            for one in checks
        ],
        "change": _change(change),
    }
    if record:
        _record(folder, budget, checks, device)
    return verdict


def _change(change: "Change | str | None") -> dict[str, Any] | None:
    if change is None or isinstance(change, str):
        return None if change is None else {"recipe": None, "why": change}
    return {"recipe": change.recipe, "why": change.why, "estimate": change.estimate}


def _windows(budget: "Budget", tokenizer: Any) -> "Tensor":
    """What quality is measured on: (n, seqlen) int64."""
    from qoq import evaluate

    assert budget.text is not None
    return evaluate.windows(tokenizer, evaluate.evaluation_text(budget.text), budget.seqlen, budget.windows)


def _quality(
    checkpoint: "Checkpoint", budget: "Budget", device: str, reference: str | None, trust_remote_code: bool
) -> dict[str, float]:
    """KL and both perplexities, as `qoq compare` finds them."""
    from qoq import evaluate
    from qoq.cli.compare import check_vocabularies
    from qoq.cli.subject import Subject
    from qoq.compare import divergence, top_k
    from qoq.gate import measure_quality
    from qoq.models.source import open_source

    model = Subject(str(checkpoint.folder), trust_remote_code)
    original = model.original if reference is None else open_source(reference, trust_remote_code)
    first = Subject(original.name, trust_remote_code)
    check_vocabularies(first, model)
    ids = _windows(budget, model.tokenizer())
    kept = top_k(evaluate.OriginalModel(original, device), ids)  # gone before the other is loaded
    return measure_quality(divergence(kept, model.load("runtime", device), ids))


def _speed(checkpoint: "Checkpoint", budget: "Budget", device: str) -> float:
    """Tokens a second of the last round, as `qoq bench throughput` finds them."""
    import numpy as np

    from qoq.runtime import benchmark

    speed, generator = budget.speed, np.random.default_rng(0)
    engine = benchmark.load(checkpoint, device, speed.batch_size, speed.input_len, speed.output_len)
    found = 0.0
    for _ in range(speed.rounds):
        last = benchmark.run_round(engine, speed.batch_size, speed.input_len, speed.output_len, generator)
        found = last.tokens_per_second
    return found


def _record(folder: Path, budget: "Budget", checks: "list[Check]", device: str) -> None:
    """Put the figures into the model card, where it has a place for them."""
    from qoq.calibration import card
    from qoq.shards import write_bytes

    path = folder / "README.md"
    if not path.is_file():
        return
    rows = [[one.name, f"{one.value:.5g}", f"{one.bound} {one.limit:.5g}"] for one in checks]
    text = (
        f", {budget.windows or 'all'} windows of {budget.seqlen} tokens of {Path(budget.text).name}"
        if budget.text
        else ""
    )
    write_bytes(
        path, card.with_measurements(path.read_text(encoding="utf-8"), rows, f"By `qoq gate` on {device}{text}:")
    )


def say(verdict: dict[str, Any]) -> None:
    """The verdict for a person: what it rests on, what would change it, and last itself."""
    for one in verdict["checks"]:
        bound = "at_least" if "at_least" in one else "at_most"
        mark = "ok" if one["passed"] else "FAILED"
        click.echo(f"{one['name']:20}{one['value']:14.6g}   {bound.replace('_', ' ')} {one[bound]:<12.6g} {mark}")
    if verdict["change"] is not None:
        _say_change(verdict["change"])
    click.echo(verdict["verdict"])


def _say_change(change: dict[str, Any]) -> None:
    if not change["recipe"]:
        click.echo(f"no change is known: {change['why']}")
        return
    click.echo(f"smallest change: {change['why']}")
    for key, value in change["recipe"].items():
        click.echo(f"  in the recipe: {key}: {value}")
    estimate = ", ".join(f"{name} {value:.6g}" for name, value in change["estimate"].items())
    click.echo(f"  estimated: {estimate}")
