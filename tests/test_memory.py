"""Memory by counting, held against what torch allocates; budgets that choose and refuse."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from conftest import TESTS, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from qoq import recipe
from qoq.calibration import memory, pipeline, plan
from qoq.calibration.memory import Budgets, Job, Placement
from qoq.checkpoint import Checkpoint
from qoq.errors import QuantizationError
from qoq.models.architecture import model_spec
from qoq.models.source import open_source
from qoq.recipe import Recipe

GIB = 2**30


def config(**changes):
    small = {
        "vocab_size": 2000,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**small | changes)


def settings(name, text_file, nsamples, seqlen, left=()) -> Recipe:
    calibration = recipe.Calibration(str(text_file), nsamples, seqlen)
    return dataclasses.replace(recipe.load(name), calibration=calibration, modules_to_not_convert=left)


def job(how, device="cpu", ranks=1, **changes) -> Job:
    original = model_spec(config(**changes), "model")
    return Job(original, pipeline.target_spec(original, how), how, device, ranks=ranks)


LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def llama_8b(ranks=1, nsamples=128) -> Job:
    how = dataclasses.replace(recipe.load("qoq-g128"), calibration=recipe.Calibration("c4", nsamples, 2048))
    return job(how, "cuda", ranks, **LLAMA_8B)


def counted(run) -> int:
    """The most bytes that torch's CPU allocator gave out at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@pytest.mark.parametrize(
    "name, samples, tokens_at_once, changes",
    [
        ("rtn-g128", (1, 64), 4096, {}),  # most in rounding
        ("rtn-g128", (1, 64, ("model.layers.0.mlp",)), 4096, {}),  # most in the float16 of the MLP
        ("qoq-g128", (8, 128), 4096, {}),  # most in a batch
        ("qoq-g128", (8, 128), 128, {}),  # most in a search
        ("qoq-g128", (1, 64), 64, {"intermediate_size": 1280, "num_attention_heads": 4}),  # most in second moments
    ],
)
def test_the_count_is_what_torch_allocates(text_file, tmp_path, name, samples, tokens_at_once, changes):
    how, model = settings(name, text_file, *samples), tmp_path / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(config(**changes)).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    planned, placement = job(how, **changes), Placement(tokens_at_once=tokens_at_once)
    found = counted(lambda: pipeline.quantize(open_source(str(model)), tmp_path / "out", how, placement=placement))
    base = memory.BASE["cpu"] + memory.PER_TOKEN_OF_VOCABULARY * 2000
    assert planned.peaks(placement).host.bytes - base == pytest.approx(found, rel=memory.MARGIN)


def test_layers_in_16_bits_take_less_time_and_no_second_moments():
    whole = llama_8b()
    names = tuple(f"model.layers.{index}" for index in range(8))
    left = dataclasses.replace(whole, settings=dataclasses.replace(whole.settings, modules_to_not_convert=names))
    assert whole.peaks(Placement()) == left.peaks(Placement())  # the others need what they need
    assert [(len(stages), count) for stages, count in left.kinds_of_layers.items()] == [(0, 8), (4, 24)]
    assert 0.75 < plan.seconds(left, "h100").total / plan.seconds(whole, "h100").total < 0.9


def test_smaller_batches_and_samples_on_the_host_need_less_of_a_gpu():
    planned = llama_8b()
    sizes = [planned.peaks(placement) for placement in planned.placements()]
    gpu = [peaks.gpu.bytes for peaks in sizes if peaks.gpu]
    assert gpu == sorted(gpu, reverse=True) and len(gpu) == 4
    streams = 2 * 2 * 128 * 2048 * 4096
    assert gpu[0] - gpu[2] == streams and sizes[2].host.bytes - sizes[0].host.bytes == streams
    assert [p.home("cuda:1") for p in planned.placements()] == ["cuda:1", "cuda:1", "cpu", "cpu"]


def test_ranks_share_the_samples():
    one, two = (llama_8b(ranks=ranks).peaks(Placement()) for ranks in (1, 2))
    assert one.gpu and two.gpu and one.gpu.bytes - two.gpu.bytes == 2 * 2 * 64 * 2048 * 4096


def test_the_samples_of_a_mixture_are_counted():
    whole = llama_8b(nsamples=1280)
    calibration = dataclasses.replace(whole.settings.calibration, dataset="a.jsonl:960,c4:320", nsamples=16)
    mixed = dataclasses.replace(whole, settings=dataclasses.replace(whole.settings, calibration=calibration))
    assert mixed.tokens == whole.tokens == 1280 * 2048
    assert mixed.peaks(Placement()) == whole.peaks(Placement())


def test_a_budget_chooses_the_fastest_placement_that_fits():
    planned = llama_8b()
    chosen = [memory.choose(planned, Budgets(gpu=gpu * GIB)) for gpu in (80, 24, 11, 8)]
    assert chosen == [Placement(), Placement(), *[Placement("host")] * 2]
    for gpu, placement in zip((80, 24, 11, 8), chosen, strict=True):
        peak = planned.peaks(placement).gpu
        assert peak and memory.with_margin(peak.bytes) <= gpu * GIB


def test_small_batches_come_before_the_host():
    planned = llama_8b(nsamples=8)
    wide, narrow = (planned.peaks(Placement(tokens_at_once=n)).gpu for n in (4096, 2048))
    assert wide and narrow
    if wide.bytes > narrow.bytes:
        budget = Budgets(gpu=memory.with_margin(narrow.bytes))
        assert memory.choose(planned, budget) == Placement(tokens_at_once=2048)


@pytest.mark.parametrize("option, budgets", [("--gpu-memory", Budgets(gpu=GIB)), ("--cpu-memory", Budgets(host=GIB))])
def test_too_little_names_the_least_that_would_do(option, budgets):
    with pytest.raises(QuantizationError, match=rf"{option}: 1.07 GB is too little, .* at least ([\d.]+) GB") as error:
        memory.choose(llama_8b(), budgets)
    least = round(float(re.search(r"least ([\d.]+)", str(error.value))[1]) * 1e9)  # type: ignore[index]
    enough = dataclasses.replace(budgets, **{"gpu" if budgets.gpu else "host": least})
    memory.choose(llama_8b(), enough)


def test_samples_go_to_the_host_only_where_it_has_room():
    with pytest.raises(QuantizationError, match="--gpu-memory: 9.66 GB is too little"):
        memory.choose(llama_8b(), Budgets(gpu=9 * GIB, host=8 * GIB))
    assert memory.choose(llama_8b(), Budgets(gpu=9 * GIB, host=16 * GIB)).streams == "host"


def test_samples_on_the_host_and_small_batches_change_nothing(checkpoint_folder, llama, tiny_recipe, tmp_path):
    """On a CPU both homes are one; of the batch only the order of sums depends."""
    source = open_source(str(llama))
    pipeline.quantize(source, tmp_path / "host", tiny_recipe(), placement=Placement("host"))
    shard = "model-00001-of-00001.safetensors"
    assert (tmp_path / "host" / shard).read_bytes() == (checkpoint_folder() / shard).read_bytes()
    small = pipeline.quantize(source, tmp_path / "small", tiny_recipe(), placement=Placement(tokens_at_once=32))
    for found, expected in zip(small["layers"], Checkpoint(checkpoint_folder()).report()["layers"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.1)


RESIDENT = """
import sys
from qoq.cli.main import main
sys.argv = ["qoq", *sys.argv[1:]]
try:
    main()
finally:
    print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1], file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_stays_below_its_budget(llama, settings_file, tmp_path):
    command = ["quantize", "--model", llama, "--recipe", settings_file, "--output", tmp_path / "out"]
    words = [sys.executable, "-c", RESIDENT, *map(str, command), "--cpu-memory"]
    mib = 650 if torch.version.cuda is None else 950
    ended = subprocess.run([*words, f"{mib}MiB"], cwd=TESTS.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stderr.splitlines()[-1]) * 1024 < mib * 2**20
