"""qoq compare: how far a model is from another, token by token."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qoq.cli.output import check_device, common_options, print_json
from qoq.cli.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from qoq.compare import Divergence, TopK

NOISE_WINDOWS = 4  # the noise of a token does not need the whole text


@click.command()
@click.argument("reference")
@click.argument("model")
@click.option("--text", required=True, help="wikitext2 (hub), or a .raw, .txt, .jsonl or .parquet file.")
@click.option("--seqlen", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens in a window.")
@click.option("--limit", type=click.IntRange(min=1), help="Windows.")
@click.option(
    "--backend", type=click.Choice(["runtime", "simulate"]), help="Of checkpoints.  [default: runtime]", default=None
)
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option("--trust-remote-code", is_flag=True, help="Let the models' own code run.")
@common_options
def compare(
    reference: str,
    model: str,
    text: str,
    seqlen: int,
    limit: int | None,
    backend: str | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """KL divergence of MODEL from REFERENCE: checkpoint folders, or what `quantize` takes.

    Both see the tokens of REFERENCE's tokenizer. KL is over its most likely tokens, all others being one outcome. The
    noise floor is the KL of REFERENCE with itself, run again: 0 where the same input always gives the same bits.
    """
    from qoq import evaluate

    device = check_device(device)
    a, b = Subject(reference, trust_remote_code), Subject(model, trust_remote_code)
    if backend and a.checkpoint is None and b.checkpoint is None:
        raise click.UsageError("--backend is for checkpoints, and neither model is one")
    check_vocabularies(a, b)
    ids = evaluate.windows(a.tokenizer(), evaluate.evaluation_text(text), seqlen, limit)
    backends = ["original" if subject.checkpoint is None else backend or "runtime" for subject in (a, b)]
    started = time.monotonic()
    # each holds its model for as long as it runs: one at a time
    kept, noise_floor = _reduce(a, backends[0], ids, device)
    found = _measure(b, backends[1], kept, ids, device)
    document = {
        "reference": a.name,
        "reference_backend": backends[0],
        "model": b.name,
        "backend": backends[1],
        "dataset": Path(text).name,
        "seqlen": seqlen,
        "windows": len(ids),
        **asdict(found),
        "top_k": kept.tokens.shape[1],
        "noise_floor": noise_floor,
        "seconds": round(time.monotonic() - started, 2),
    }
    if as_json:
        print_json(document)
    else:
        _print(document)


def check_vocabularies(reference: Subject, model: Subject) -> None:
    """Raise ModelError where logits of the two cannot be compared."""
    from qoq.errors import ModelError

    expected, found = reference.spec.vocab_size, model.spec.vocab_size
    if found != expected:
        raise ModelError(f"{model.name}: a vocabulary of {found} tokens, expected {expected} as in {reference.name}")


def _reduce(subject: Subject, backend: str, ids: "Tensor", device: str) -> "tuple[TopK, float]":
    """The reference's predictions, and its mean KL with itself over the first windows."""
    from tqdm import tqdm

    from qoq.compare import divergence, top_k

    runner, again = subject.load(backend, device), ids[:NOISE_WINDOWS]
    with tqdm(total=len(ids) + len(again), unit="window", desc="reference", disable=None) as bar:
        kept = top_k(runner, ids, on_window=bar.update)
        return kept, divergence(kept, runner, again, on_window=bar.update).mean_kl


def _measure(subject: Subject, backend: str, kept: "TopK", ids: "Tensor", device: str) -> "Divergence":
    from tqdm import tqdm

    from qoq.compare import divergence

    with tqdm(total=len(ids), unit="window", desc=backend, disable=None) as bar:
        return divergence(kept, subject.load(backend, device), ids, on_window=bar.update)


def _print(found: dict[str, Any]) -> None:
    rows = {
        "reference": f"{found['reference']} ({found['reference_backend']})",
        "model": f"{found['model']} ({found['backend']})",
        "text": f"{found['windows']} x {found['seqlen']} tokens of {found['dataset']}",
        "mean KL": f"{found['mean_kl']:.5f} nats, noise floor {found['noise_floor']:.1e}",
        "99th percentile of KL": f"{found['p99_kl']:.5f} nats",
        "same top-1": f"{100 * found['same_top1']:.2f} % of {found['tokens']} tokens",
        "perplexity": f"{found['reference_perplexity']:.4f} -> {found['perplexity']:.4f}",
        "tail": f"{found['tail_mass']:.2e} of the probability is beyond the {found['top_k']} most likely tokens",
    }
    for key, value in rows.items():
        click.echo(f"{key:24}{value}")
