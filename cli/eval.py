"""qoq eval: perplexity and lm-eval tasks, of a checkpoint or of the original model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qoq.cli.output import check_device, common_options, note, print_json
from qoq.cli.subject import Subject

if TYPE_CHECKING:
    from qoq.evaluate import Model


@click.command("eval")
@click.argument("model")
@click.option("--ppl", "dataset", help="Perplexity on wikitext2 (hub), or a .raw, .txt, .jsonl or .parquet file.")
@click.option("--tasks", help="lm-eval tasks: names or .yaml files, separated by commas.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(["original", "simulate", "runtime", "prefill", "decode"]),
    help="May be repeated.  [default: of a checkpoint runtime, on a GPU prefill; else original]",
)
@click.option("--seqlen", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens in a window.")
@click.option("--limit", type=click.IntRange(min=1), help="Windows, or examples of each task.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option("--trust-remote-code", is_flag=True, help="Let the model's own code run.")
@common_options
def evaluate(
    model: str,
    dataset: str | None,
    tasks: str | None,
    backends: tuple[str, ...],
    seqlen: int,
    limit: int | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure MODEL: a checkpoint folder, or what `quantize` takes.

    A checkpoint runs through its packed integers (runtime), through float fake quantization (simulate), as the
    model it was made from (original), or through the engine that serves it: as it computes prompts (prefill), or token
    by token as it computes answers (decode).
    """
    from qoq import evaluate as ev
    from qoq.runtime import benchmark

    if dataset is None and tasks is None:
        raise click.UsageError("nothing to measure: give --ppl, --tasks or both")
    device = check_device(device)
    subject = Subject(model, trust_remote_code)
    if subject.checkpoint is None and set(backends) - {"original"}:
        raise click.UsageError(f"{model} is no checkpoint: only --backend original can run it")
    packed = "runtime" if device == "cpu" else "prefill"
    backends = backends or ("original" if subject.checkpoint is None else packed,)
    tokenizer, max_length = subject.tokenizer(), subject.folder.config.max_position_embeddings
    ids = None if dataset is None else ev.windows(tokenizer, ev.evaluation_text(dataset), seqlen, limit)

    results: list[dict[str, Any]] = []
    for backend in backends:
        runner = subject.load(backend, device)
        if ids is not None and dataset is not None:
            results.append(_perplexity(runner, ids, model, backend, dataset))
        if tasks is not None:
            scores = ev.tasks(runner, tokenizer, tasks.split(","), max_length, limit)
            results.append({"model": model, "backend": backend, "tasks": scores})
            _print_tasks(backend, scores)
        del runner  # gone before the next one is loaded
        benchmark.release()
    if as_json:
        print_json({"results": results})


def _perplexity(runner: "Model", ids: Any, model: str, backend: str, dataset: str) -> dict[str, Any]:
    from tqdm import tqdm

    from qoq import evaluate as ev

    with tqdm(total=len(ids), unit="window", desc=backend, disable=None) as bar:
        result = ev.perplexity(
            runner, ids, name=model, backend=backend, dataset=Path(dataset).name, on_window=bar.update
        )
    note(
        f"{backend:9} perplexity {result.perplexity:8.4f}   {result.windows} x {result.seqlen} tokens of "
        f"{result.dataset}, {result.seconds:.0f} s"
    )
    return asdict(result)


def _print_tasks(backend: str, scores: dict[str, dict[str, Any]]) -> None:
    for task, metrics in scores.items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "stderr" not in metric:
                note(f"{backend:9} {task} {metric.removesuffix(',none')} {value:.4f}")
