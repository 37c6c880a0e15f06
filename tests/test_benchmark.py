"""Benchmarks on a CPU: every token counted once, figures that add up, documents of the agreed form."""

import csv
import json
import math
import sys
import weakref

import numpy as np
import pytest
from conftest import VOCAB, only_line

from qoq import checkpoint, roofline
from qoq.checkpoint import Checkpoint
from qoq.errors import QoqError
from qoq.roofline import CARDS, MODELS, Dimensions, Workload, limit
from qoq.runtime import benchmark
from qoq.runtime.benchmark import Round, Timeline
from qoq.runtime.random_weights import RandomCheckpoint

SMALL = ["--device", "cpu", "--input-len", "9", "--output-len", "4"]
TINY = Dimensions("llama", 2, 128, 256, num_heads=4, num_kv_heads=2, vocab_size=104, head_dim=64, max_positions=128)
RANDOM = ["--model", "Llama-3-8B", "--random-weights", *SMALL]


@pytest.fixture
def tiny(monkeypatch):
    """A small model under a large one's name."""
    monkeypatch.setitem(MODELS, "llama-3-8b", TINY)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_round_counts_every_token(ahead):
    engine = benchmark.load(RandomCheckpoint("tiny", TINY, 128, 0, "cpu"), "cpu", 3, 9, 6)
    engine.ahead = ahead
    done = benchmark.run_round(engine, 3, 9, 6, np.random.default_rng(0))
    assert done.output_tokens == 18 and 0 < done.prefill_seconds < done.seconds
    assert done.tokens_per_second == 18 / done.seconds and not engine.has_unfinished_requests()
    assert len(done.steps) == 5 and sum(done.steps) < done.seconds - done.prefill_seconds and done.context == 15


def test_steps_that_read_prompts_are_left_out():
    """Prompts of 9 tokens enter one by one: when the third one is read, the first one has few tokens to go."""
    checkpoint = RandomCheckpoint("tiny", TINY, 128, 0, "cpu")
    engine = benchmark.load(checkpoint, "cpu", 3, 9, 6, max_num_batched_tokens=10)
    done = benchmark.run_round(engine, 3, 9, 6, np.random.default_rng(0))
    assert 0 < len(done.steps) < 5
    engine = benchmark.load(checkpoint, "cpu", 3, 9, 2, max_num_batched_tokens=9)
    found = benchmark.run_round(engine, 3, 9, 2, np.random.default_rng(0)).record()
    assert found["decode_steps"] == 0 and found["median_decode_step_ms"] is found["mean_decode_step_ms"] is None


def test_the_median_step_is_of_the_last_half():
    found = Round(100, 10.0, 2.0, [1.0, 9.0, 2.0, 4.0, 3.0], 105.0).record()
    assert (found["median_decode_step_ms"], found["mean_decode_step_ms"]) == (3000, 3800)
    assert found["median_decode_step_context"] == 104 and found["throughput_tokens_per_s"] == 10


@pytest.mark.parametrize("name", MODELS)
def test_dimensions_are_those_of_the_table(name):
    spec = RandomCheckpoint(name, MODELS[name], 128, 0, "cpu").spec
    found, expected = benchmark.dimensions(spec), MODELS[name]
    for rates in (CARDS["l40s"].ideal, CARDS["l40s"].achievable):
        assert limit(found, rates, Workload(8)) == limit(expected, rates, Workload(8))
    assert roofline.head_bytes(found) == roofline.head_bytes(expected)


def test_each_request_that_arrives_gets_its_tokens(checkpoint_folder):
    engine, generator = benchmark.load(Checkpoint(checkpoint_folder()), "cpu", 2, 9, 4), np.random.default_rng(0)
    prompts, times = benchmark.random_prompts(5, 9, VOCAB, generator), benchmark.arrivals(5, 100, generator)
    timelines = benchmark.run_arrivals(engine, prompts, times, 4)
    assert [timeline.arrival for timeline in timelines] == times == sorted(times)
    assert all(len(timeline.tokens) == 4 and timeline.first > 0 for timeline in timelines)
    assert not engine.has_unfinished_requests()


def test_arrivals():
    times = benchmark.arrivals(4000, 8, np.random.default_rng(1))
    assert times == benchmark.arrivals(4000, 8, np.random.default_rng(1))
    assert times[-1] == pytest.approx(4000 / 8, rel=0.1)
    assert benchmark.arrivals(3, math.inf, np.random.default_rng(1)) == [0, 0, 0]


def test_summary():
    timelines = [Timeline(1.0, [2.0, 2.5, 4.0]), Timeline(2.0, [5.0]), Timeline(0.0, [], "broken")]
    figures = benchmark.summary(timelines, 10)
    assert (figures["completed"], figures["failed"], figures["duration"]) == (2, 1, 5.0)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (20, 4)
    assert figures["output_throughput"] == pytest.approx(4 / 5)
    assert figures["mean_ttft_ms"] == figures["median_ttft_ms"] == 2000
    assert figures["mean_tpot_ms"] == figures["mean_itl_ms"] == 1000 and figures["p99_itl_ms"] == pytest.approx(1490)
    assert figures["mean_e2el_ms"] == 3000
    assert benchmark.summary([], 10)["mean_ttft_ms"] == 0


def test_throughput(qoq, checkpoint_folder, tmp_path, monkeypatch):
    opened = []
    read = checkpoint.read_entries

    def count(folder):
        opened.append(folder)
        return read(folder)

    monkeypatch.setattr(checkpoint, "read_entries", count)
    path = tmp_path / "results.csv"
    command = ["bench", "throughput", checkpoint_folder(), *SMALL, "--rounds", "2", "--csv", path]
    code, out, err = qoq(*command, "--batch-size", "2")
    assert code == 0, err
    assert len(opened) == 1
    title, first, last, summary = out.splitlines()
    assert title.endswith("Batch=2, Input=9, Output=4") and first.startswith("Round 0 Throughput: ")
    assert last.startswith("Round 1 Throughput: ") and last.endswith(" tokens / second")
    assert summary.endswith("KV4 tokens held 128, room for 128") and " ms at 12 tokens" in summary
    found = json.loads(qoq(*command, "--batch-size", "2", "--json")[1])
    assert (found["device"], found["batch_size"], found["input_len"], found["output_len"]) == ("cpu", 2, 9, 4)
    assert found["throughput_tokens_per_s"] == pytest.approx(8 / found["seconds"])
    assert (found["precision"], found["kv_bits"], found["group_size"]) == ("w4a8", 4, 128)
    assert found["card"] is found["roofline_tokens_per_s"] is None and not found["random_weights"]
    swept = json.loads(qoq(*command, "--sweep", "1,3", "--json")[1])["results"]
    assert [record["output_tokens"] for record in swept] == [4, 12]
    rows = list(csv.DictReader(path.open()))
    assert [row["batch_size"] for row in rows] == ["2", "2", "1", "3"] and set(rows[0]) == set(found)


def test_throughput_of_random_weights_beside_fp16(qoq, tiny, tmp_path):
    path = tmp_path / "results.csv"
    command = ["bench", "throughput", *RANDOM, "--batch-size", "2", "--rounds", "1", "--card", "h100", "--csv", path]
    found = json.loads(qoq(*command, "--baseline", "--json", "--max-num-batched-tokens", "16")[1])
    rival = found["baseline"]
    assert (found["model"], found["random_weights"], found["max_num_batched_tokens"]) == ("llama-3-8b", True, 16)
    assert (rival["precision"], rival["kv_bits"], rival["group_size"], rival["output_tokens"]) == ("fp16", 16, None, 8)
    assert found["speedup"] == found["throughput_tokens_per_s"] / rival["throughput_tokens_per_s"]
    for record, work in ((found, Workload(2, 9, 4)), (rival, Workload(2, 9, 4, 16, precision="fp16"))):
        ideal, real = (
            limit(TINY, rates, work).tokens_per_s for rates in (CARDS["h100"].ideal, CARDS["h100"].achievable)
        )
        assert (record["roofline_tokens_per_s"], record["achievable_tokens_per_s"]) == (ideal, real)
        assert record["roofline_share"] == pytest.approx(record["throughput_tokens_per_s"] / ideal)
    assert [row["precision"] for row in csv.DictReader(path.open())] == ["w4a8", "fp16"]
    code, out, _ = qoq(*command, "--roofline", "--precision", "fp16", "--kv-bits", "8")
    assert code == 0 and "llama-3-8b in fp16: Batch=2" in out and "KV8 tokens held" in out
    assert out.splitlines()[-1].startswith("NVIDIA H100 80GB HBM3 allows ")


def test_the_engine_is_gone_when_its_baseline_is_loaded(qoq, tiny, monkeypatch):
    load = benchmark.load
    engines: list[weakref.ref] = []

    def remember(*args, **options):
        assert all(engine() is None for engine in engines)
        made = load(*args, **options)
        engines.append(weakref.ref(made.executor))
        return made

    monkeypatch.setattr(benchmark, "load", remember)
    options = ["--sweep", "1,2", "--rounds", "1", "--baseline"]
    assert qoq("bench", "throughput", *RANDOM, *options)[0] == 0 and len(engines) == 2


def test_a_baseline_that_does_not_fit_loses_nothing(qoq, tiny, monkeypatch):
    load = benchmark.load

    def refuse(*args, precision, **options):
        if precision == "fp16":
            raise QoqError("out of GPU memory")
        return load(*args, precision=precision, **options)

    monkeypatch.setattr(benchmark, "load", refuse)
    code, out, err = qoq("bench", "throughput", *RANDOM, "--batch-size", "1", "--rounds", "1", "--baseline", "--json")
    assert code == 0 and "no baseline: out of GPU memory" in err
    assert json.loads(out)["output_tokens"] == 4 and "speedup" not in json.loads(out)


def test_the_picture_of_a_sweep(qoq, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    for name, extra in (("alone", []), ("limits", ["--card", "h100", "--baseline"])):
        command = ["bench", "throughput", *RANDOM, "--sweep", "1,2", "--rounds", "1", *extra]
        code, _, err = qoq(*command, "--plot", tmp_path / f"{name}.png")
        assert code == 0, err
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written_is_refused_before_anything_is_measured(qoq, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "load", None)
    path = tmp_path / "old.csv"
    path.write_text("device,model\n")
    assert "old.csv: a table with other columns" in only_line(qoq("bench", "throughput", *RANDOM, "--csv", path))
    assert path.read_text() == "device,model\n"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = only_line(qoq("bench", "throughput", *RANDOM, "--plot", tmp_path / "x.png"))
    assert line == "qoq: --plot needs matplotlib; pip install 'qoq[plot]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected CHECKPOINT, or --model NAME --random-weights"),
        (["--model", "llama-3-8b"], "expected CHECKPOINT, or --model NAME --random-weights"),
        (["--random-weights"], "expected CHECKPOINT, or --model NAME --random-weights"),
        (["folder", "--random-weights"], "CHECKPOINT has a model and weights"),
        (["folder", "--group-size", "128"], "CHECKPOINT has a group size"),
        (["--model", "gpt-2", "--random-weights"], "llama-3-8b"),
        ([*RANDOM, "--precision", "fp16", "--baseline"], "--precision fp16 measures that alone"),
        ([*RANDOM, "--roofline"], "data sheet of cpu not known; expected --card l40s or a100"),
        ([*RANDOM, "--kv-bits", "2"], "2"),
        ([*RANDOM, "--gpu-memory-utilization", "0"], "0"),
    ],
)
def test_options_that_do_not_go_together(qoq, arguments, message):
    code, out, err = qoq("bench", "throughput", "--device", "cpu", *arguments)
    assert code == 2 and out == "" and message in err


def test_latency(qoq, checkpoint_folder):
    command = ["bench", "latency", checkpoint_folder(), *SMALL, "--num-prompts", "3"]
    found = json.loads(qoq(*command, "--request-rate", "50", "--json")[1])
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (3, 0, 12)
    assert found["request_rate"] == 50 and found["p99_ttft_ms"] >= found["median_ttft_ms"] > 0
    code, out, _ = qoq(*command)
    assert code == 0 and "p99_itl_ms" in out and "inf" in out


def test_latency_of_random_weights(qoq, tiny):
    options = ["--num-prompts", "2", "--max-num-seqs", "2", "--kv-bits", "16", "--json"]
    found = json.loads(qoq("bench", "latency", *RANDOM, *options)[1])
    assert (found["model_id"], found["completed"], found["kv_cache_tokens"]) == ("llama-3-8b", 2, 128)


@pytest.mark.parametrize("verb", ["throughput", "latency"])
def test_more_than_the_model_takes(qoq, checkpoint_folder, verb):
    line = only_line(
        qoq("bench", verb, checkpoint_folder(), "--device", "cpu", "--input-len", "250", "--output-len", 7)
    )
    assert "input_len 250 and output_len 7: 257 tokens, the model takes 256" in line
