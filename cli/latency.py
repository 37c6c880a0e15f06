"""qoq bench latency: what single requests wait for while others come, in the figures of `vllm bench serve`."""

import math
from typing import Any

import click

from qoq.cli.engine import Weights, engine_options, weights_options
from qoq.cli.output import check_device, common_options, print_json


@click.command()
@weights_options
@click.option("--num-prompts", type=click.IntRange(min=1), default=200, show_default=True, help="Requests in all.")
@click.option(
    "--request-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=math.inf,
    show_default=True,
    help="Requests a second, on average (a Poisson process); inf: all at once.",
)
@click.option("--input-len", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens of a prompt.")
@click.option("--output-len", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of an answer.")
@click.option("--max-num-seqs", type=click.IntRange(1, 1024), default=256, show_default=True, help="Run at a time.")
@engine_options()
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of prompts, arrivals, random weights."
)
@click.option("--device", default="cuda", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@common_options
def latency(
    weights: Weights,
    num_prompts: int,
    request_rate: float,
    input_len: int,
    output_len: int,
    max_num_seqs: int,
    engine: dict[str, Any],
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Time requests to CHECKPOINT as they arrive, in this process: no server is between.

    Or, with --model NAME --random-weights, the shapes of a model that is not at hand.
    """
    import numpy as np

    from qoq.runtime import benchmark

    device = check_device(device)
    if math.isnan(request_rate):
        raise click.BadParameter("nan, expected a number above 0, or inf", param_hint="--request-rate")
    loaded = benchmark.load(weights.open(device, seed), device, max_num_seqs, input_len, output_len, **engine)
    generator = np.random.default_rng(seed)
    benchmark.run_round(loaded, 1, input_len, output_len, generator)  # compiles and loads what the first request needs
    prompts = benchmark.random_prompts(num_prompts, input_len, loaded.vocab_size, generator)
    times = benchmark.arrivals(num_prompts, request_rate, generator)
    figures = benchmark.summary(benchmark.run_arrivals(loaded, prompts, times, output_len), input_len)
    about = {
        "backend": "qoq",
        "device": benchmark.device_name(loaded),
        "model_id": weights.name,
        "num_prompts": num_prompts,
        "request_rate": "inf" if math.isinf(request_rate) else request_rate,
        "kv_cache_tokens": benchmark.cache_tokens(loaded),
    }
    if as_json:
        print_json({**about, **figures})
        return
    for name, value in {**about, **figures}.items():
        click.echo(f"{name:24}{value:.2f}" if isinstance(value, float) else f"{name:24}{value}")
