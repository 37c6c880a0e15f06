"""Benchmarks on a CPU: every token counted once, figures that add up, documents of the agreed form."""

import csv
import json
import math

import numpy as np
import pytest
from conftest import VOCAB, only_line

from qoq.runtime import benchmark
from qoq.runtime.benchmark import Timeline

SMALL = ["--device", "cpu", "--input-len", "9", "--output-len", "4"]


def test_a_round_counts_every_token(checkpoint_folder):
    engine = benchmark.load(checkpoint_folder(), "cpu", 3, 9, 4)
    done = benchmark.run_round(engine, 3, 9, 4, np.random.default_rng(0))
    assert done.output_tokens == 12 and 0 < done.prefill_seconds < done.seconds
    assert done.tokens_per_second == 12 / done.seconds and not engine.has_unfinished_requests()


def test_each_request_that_arrives_gets_its_tokens(checkpoint_folder):
    engine, generator = benchmark.load(checkpoint_folder(), "cpu", 2, 9, 4), np.random.default_rng(0)
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


def test_throughput(qoq, checkpoint_folder, tmp_path):
    path = tmp_path / "results.csv"
    command = ["bench", "throughput", checkpoint_folder(), *SMALL, "--rounds", "2", "--csv", path]
    code, out, err = qoq(*command, "--batch-size", "2")
    assert code == 0, err
    assert "Batch=2, Input=9, Output=4" in out and out.splitlines()[-1].startswith("Round 1 Throughput: ")
    found = json.loads(qoq(*command, "--batch-size", "2", "--json")[1])
    assert (found["device"], found["batch_size"], found["input_len"], found["output_len"]) == ("cpu", 2, 9, 4)
    assert found["throughput_tokens_per_s"] == pytest.approx(8 / found["seconds"])
    swept = json.loads(qoq(*command, "--sweep", "1,3", "--json")[1])["results"]
    assert [record["output_tokens"] for record in swept] == [4, 12]
    rows = list(csv.DictReader(path.open()))
    assert [row["batch_size"] for row in rows] == ["2", "2", "1", "3"] and set(rows[0]) == set(found)


def test_latency(qoq, checkpoint_folder):
    command = ["bench", "latency", checkpoint_folder(), *SMALL, "--num-prompts", "3"]
    found = json.loads(qoq(*command, "--request-rate", "50", "--json")[1])
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (3, 0, 12)
    assert found["request_rate"] == 50 and found["p99_ttft_ms"] >= found["median_ttft_ms"] > 0
    code, out, _ = qoq(*command)
    assert code == 0 and "p99_itl_ms" in out and "inf" in out


@pytest.mark.parametrize("verb", ["throughput", "latency"])
def test_more_than_the_model_takes(qoq, checkpoint_folder, verb):
    line = only_line(
        qoq("bench", verb, checkpoint_folder(), "--device", "cpu", "--input-len", "250", "--output-len", 7)
    )
    assert "input_len 250 and output_len 7: 257 tokens, the model takes 256" in line
