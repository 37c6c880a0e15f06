"""qoq quantize: a checkpoint from a model."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qoq.cli.gate import REJECTED, check_inputs, judge, say
from qoq.cli.output import Numbers, check_device, common_options, html_option, note, print_json
from qoq.cli.plan import Size, print_plan, summary
from qoq.cli.report_page import CAUSES, page, worst_layers, worst_linear

if TYPE_CHECKING:
    from qoq.calibration.memory import Budgets
    from qoq.calibration.ranks import Ranks
    from qoq.gate import Budget
    from qoq.recipe import Recipe


@click.command()
@click.option("--model", required=True, help="Folder, hub id, .gguf file, or smollm2-135m.")
@click.option("--output", type=click.Path(path_type=Path), help="New folder.  [default: ./NAME-QoQ-gSIZE]")
@click.option("--recipe", "recipe_name", default="qoq-g128", show_default=True, help="Name or YAML file.")
@click.option(
    "--group-size", type=click.Choice(["128", "64", "-1"]), help="Instead of the recipe's; -1 is per channel."
)
@click.option("--calib-dataset", help="Name, .txt, .jsonl or .parquet, instead of the recipe's.")
@click.option("--nsamples", type=click.IntRange(min=1), help="Calibration samples.")
@click.option("--seqlen", type=click.IntRange(min=2), help="Tokens in a sample.")
@click.option("--seed", type=int, help="Of everything random.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an interrupted run stopped.")
@click.option("--plan", "only_plan", is_flag=True, help="Say what it would take, from the model's config alone.")
@click.option("--gpu-memory", type=Size(), help="Stay below it: 24 (GiB), 80GB.")
@click.option("--cpu-memory", type=Size(), help="Stay below it, on the host.")
@click.option("--trust-remote-code", is_flag=True, help="Let the model's own code run.")
@click.option("--leave", multiple=True, metavar="NAME", help="Layer or linear to leave in 16 bits; may be repeated.")
@click.option("--kv8", type=Numbers(9999, least=0), help="Layers whose KV cache has 8 bits: 3,7.")
@click.option("--gate", "budget", type=click.Path(path_type=Path), help="Budget to keep within, or exit code 2.")
@html_option
@common_options
def quantize(
    model: str,
    output: Path | None,
    recipe_name: str,
    device: str,
    resume: bool,
    only_plan: bool,
    gpu_memory: int | None,
    cpu_memory: int | None,
    trust_remote_code: bool,
    budget: Path | None,
    html: Path | None,
    as_json: bool,
    **overrides: Any,
) -> None:
    """Quantize a model to a W4A8KV4 checkpoint in QServe's layout."""
    if not only_plan:
        give_freed_memory_back()
    from qoq import gate as gates
    from qoq import recipe
    from qoq.calibration.memory import Budgets
    from qoq.calibration.plan import of_config
    from qoq.calibration.ranks import Ranks
    from qoq.shards import write_bytes

    device = check_device(device, here=False)  # a plan needs none, and each rank has its own
    if gpu_memory is not None and device == "cpu":
        raise click.BadParameter("is for a run on a GPU; expected --device cuda too", param_hint="--gpu-memory")
    limits = None if budget is None else gates.load(budget)  # before hours of work
    settings = override(recipe.load(recipe_name), **overrides)
    budgets = Budgets(gpu_memory, cpu_memory)
    if only_plan:
        plan = of_config(model, settings, device, budgets, trust_remote_code)
        if as_json:
            print_json(plan.record())
        else:
            print_plan(plan)
        return
    ranks = Ranks.of_environment()
    with ranks.together(), one_line_out_of_memory():
        report, output = _run(model, output, settings, ranks, device, resume, trust_remote_code, budgets, limits)
    if ranks.rank:
        return
    note(
        f"{output}: {report['seconds']:.0f} s, peak memory {report['peak_rss_bytes'] / 2**30:.2f} GiB, "
        f"verified bit for bit; loss after the last layer {report['layers'][-1]['loss']:.4f}"
    )
    _print_worst(report["layers"])
    divergences = ", ".join(f"{CAUSES[cause]} {value:.1e}" for cause, value in report["kl"].items())
    note(f"KL divergence from the original on {report['calibration']['dataset']}: {divergences}")
    if html is not None:
        write_bytes(html, page(report))
    keys = ("seconds", "peak_rss_bytes", "peak_gpu_bytes", "kl", "layers")
    document = {"output": str(output), "recipe": settings.name} | {key: report[key] for key in keys}
    try:
        if limits is not None:
            document["gate"] = judge(output, limits, device, model, True, trust_remote_code)
    finally:  # there is a checkpoint, also where there is no verdict
        if as_json:
            print_json(document)
    if limits is None:
        return
    if not as_json:
        say(document["gate"])
    if document["gate"]["verdict"] == "REJECT":
        raise SystemExit(REJECTED)


def _run(
    model: str,
    output: Path | None,
    settings: "Recipe",
    ranks: "Ranks",
    device: str,
    resume: bool,
    trust_remote_code: bool,
    budgets: "Budgets",
    limits: "Budget | None",
) -> tuple[dict[str, Any], Path]:
    """The report of a run, and where its checkpoint is; only rank 0 says how far it is."""
    from tqdm import tqdm

    from qoq.calibration import pipeline
    from qoq.calibration.plan import of_source
    from qoq.models.source import open_source

    device = check_device(ranks.device(device))
    source = open_source(model, trust_remote_code)
    output = output or Path(f"{model.rstrip('/').split('/')[-1]}-QoQ-{layout(settings.group_size)}")
    plan = of_source(source, settings, device, budgets, ranks.size)
    keep_below(budgets.gpu, device)
    first = ranks.rank == 0
    if first and limits is not None:
        check_inputs(limits, source)
    if first:
        note(summary(plan, output))
    with tqdm(total=plan.layers, unit="layer", disable=None if first else True) as bar:

        def on_layer(report: Mapping[str, Any]) -> None:
            bar.set_postfix_str(f"loss {report['loss']:.4f}")
            bar.update()
            if bar.disable and first:
                note(f"layer {report['layer']}: loss {report['loss']:.5f}, {report['seconds']:.1f} s")

        report = pipeline.quantize(
            source,
            output,
            settings,
            device=device,
            resume=resume,
            on_layer=on_layer,
            placement=plan.placement,
            ranks=ranks,
        )
    return report, output


def _print_worst(layers: Sequence[Mapping[str, Any]]) -> None:
    """The layers of largest error, what it is of, and the linear that lost most."""
    columns = sorted(CAUSES, key=lambda cause: cause != "all")
    note("worst layers" + "".join(f"{CAUSES[cause]:>10}" for cause in columns) + "   worst linear")
    for layer in worst_layers(layers):
        name, loss = worst_linear(layer)
        numbers = "".join(f"{layer['causes'][cause]:10.1e}" for cause in columns)
        note(f"{layer['layer']:12}{numbers}   {name} {loss:.1e}")


def override(
    settings: "Recipe",
    group_size: str | None,
    calib_dataset: str | None,
    leave: tuple[str, ...] = (),
    kv8: tuple[int, ...] | None = None,
    **numbers: int | None,
) -> "Recipe":
    """The recipe with what the command line says instead."""
    own = {
        "modules_to_not_convert": leave or None,
        "seed": numbers.pop("seed"),
        "group_size": None if group_size is None else int(group_size),
    }
    calibration, kv_cache = {"dataset": calib_dataset, **numbers}, {"layers_in_8_bits": kv8}
    return dataclasses.replace(
        settings,
        kv_cache=dataclasses.replace(settings.kv_cache, **_given(kv_cache)),
        calibration=dataclasses.replace(settings.calibration, **_given(calibration)),
        **_given(own),
    )


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def layout(group_size: int) -> str:
    return "channel" if group_size == -1 else f"g{group_size}"


def keep_below(gpu_memory: int | None, device: str) -> None:
    """Have torch's allocator give back what it caches before it goes beyond a budget."""
    import torch

    if gpu_memory is not None:
        index = torch.device(device).index
        index = torch.cuda.current_device() if index is None else index
        whole = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory / whole), index)


@contextlib.contextmanager
def one_line_out_of_memory() -> Iterator[None]:
    """Say that the GPU is full as an error of the user's: other programs may be on it."""
    import torch

    from qoq.errors import QuantizationError, first_sentence

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QuantizationError(
            f"out of GPU memory ({first_sentence(error)}); finished layers are kept, see --gpu-memory"
        ) from None


def give_freed_memory_back() -> None:
    """Have glibc map large blocks one by one, in huge pages where the system has them, before torch allocates any.

    Left to itself it keeps much of what the layers free. With blocks from 1 MiB on and small pages, the system spends
    a third of a run's time on clearing pages; with blocks from 16 MiB on, much more stays.
    """
    import ctypes
    import os

    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc here
        ctypes.CDLL(None).mallopt(mmap_threshold, 4 << 20)
