"""What commands that load an engine ask alike: which weights, and how much memory and work it may take."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from qoq.roofline import MODELS

if TYPE_CHECKING:
    from qoq.checkpoint import Checkpoint


def engine_options(batched_tokens: int = 2048) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add options of `LLMEngine.from_checkpoint`; the command gets them as its keyword arguments, in `engine`.

    `batched_tokens` is the default of a step: many for throughput, few where somebody waits for each token.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @click.option("--kv-bits", type=click.Choice(("4", "8", "16")), help="Of the KV cache.  [default: 4]")
        @click.option(
            "--max-num-batched-tokens",
            type=click.IntRange(1, 1 << 20),
            default=batched_tokens,
            show_default=True,
            help="Of a step.",
        )
        @click.option(
            "--gpu-memory-utilization",
            type=click.FloatRange(0, 1, min_open=True),
            default=0.9,
            show_default=True,
            help="The part of the GPU's memory that is taken, weights included.",
        )
        @functools.wraps(command)
        def wrapped(
            *args: Any, kv_bits: str | None, max_num_batched_tokens: int, gpu_memory_utilization: float, **kwargs: Any
        ) -> Any:
            engine = {
                "max_num_batched_tokens": max_num_batched_tokens,
                "gpu_memory_utilization": gpu_memory_utilization,
                **({"kv_bits": int(kv_bits)} if kv_bits else {}),
            }
            return command(*args, engine=engine, **kwargs)

        return wrapped

    return add


@dataclass(frozen=True)
class Weights:
    """What is to be loaded."""

    name: str  # a checkpoint folder, or one of MODELS
    random: bool
    group_size: int  # of random ones

    def open(self, device: str, seed: int) -> "Checkpoint":
        """Raises CheckpointError for a folder that is none."""
        from qoq.checkpoint import Checkpoint
        from qoq.runtime.random_weights import RandomCheckpoint

        if self.random:
            return RandomCheckpoint(self.name, MODELS[self.name], self.group_size, seed, device)
        return Checkpoint(self.name)


def weights_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add CHECKPOINT and what may stand in its place; the command gets `weights`."""

    @click.argument("checkpoint", required=False)
    @click.option(
        "--model",
        type=click.Choice(tuple(MODELS), case_sensitive=False),
        help="Shapes to measure without a CHECKPOINT.",
    )
    @click.option("--random-weights", is_flag=True, help="Weights of the --model, drawn from the seed.")
    @click.option(
        "--group-size",
        type=click.Choice(("128", "64", "-1")),
        help="Of random weights; -1: per channel.  [default: 128]",
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        checkpoint: str | None,
        model: str | None,
        random_weights: bool,
        group_size: str | None,
        **kwargs: Any,
    ) -> Any:
        if checkpoint is not None and (model is not None or random_weights):
            raise click.UsageError("CHECKPOINT has a model and weights; expected it, or --model NAME --random-weights")
        if checkpoint is not None and group_size is not None:
            raise click.UsageError("CHECKPOINT has a group size; --group-size is for --random-weights")
        if checkpoint is None and not (model is not None and random_weights):
            raise click.UsageError("expected CHECKPOINT, or --model NAME --random-weights")
        weights = Weights(checkpoint or model or "", checkpoint is None, int(group_size or 128))
        return command(*args, weights=weights, **kwargs)

    return wrapped
