"""Accounts of decode steps: kernels and gaps summed up by hand, and a batch that is watched and taken back."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest import approx

from qoq.cli import throughput
from qoq.errors import QoqError
from qoq.roofline import CARDS, Dimensions, decode_step
from qoq.runtime import account
from qoq.runtime.account import Account, Activity, short_name
from qoq.runtime.engine import LLMEngine
from qoq.runtime.random_weights import RandomCheckpoint

TINY = Dimensions("llama", 2, 128, 256, num_heads=4, num_kv_heads=2, vocab_size=104, head_dim=64, max_positions=128)
STEP = [("w4a8_gemm", 0, 10), ("kv_decode", 11, 31), ("w4a8_gemm", 30, 45)]  # 1 us without a kernel
ACTIVITIES = [Activity(name, 100 * step + start, 100 * step + end) for step in range(4) for name, start, end in STEP]


def test_times_are_summed_by_kernel():
    found = Account.of(ACTIVITIES[::-1], 4, 1000.0)
    assert found.kernels == {"w4a8_gemm": (8, 96), "kv_decode": (4, 80)}  # a us of each second GEMM is a wait
    assert (found.whole, found.idle, found.gap) == (345, 4 + 3 * 55, 55)
    record = found.record()
    assert (record["step_us"], record["gap_us"], record["context"]) == (86.2, 55, 1000)
    assert record["kernels"][0] == {"name": "w4a8_gemm", "launches": 2, "us": 24, "share": approx(96 / 345, abs=1e-4)}
    assert Account.of([Activity("x", 5, 6)], 1, 1.0).gap == 0
    nested = Account.of([Activity("long", 0, 10), Activity("short", 2, 5), Activity("late", 8, 13)], 1, 1.0)
    assert nested.kernels == {"long": (1, 10), "short": (1, 0), "late": (1, 3)}


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("w4a8_gemm", "w4a8_gemm"),
        ("void at::native::elementwise_kernel<4, at::f<x>(int)>(int)", "elementwise_kernel"),
        ("nvjet_hsh_128x64_64x12_2x1_v_bz_TNT", "nvjet_hsh_128x64_64x12_2x1_v_bz_TNT"),
        ("Memcpy DtoH (Device -> Pinned)", "Memcpy DtoH"),
    ],
)
def test_names_are_short(name, short):
    assert short_name(name) == short


def engine() -> LLMEngine:
    checkpoint = RandomCheckpoint("tiny", TINY, 128, 0, "cpu")
    return LLMEngine.from_checkpoint(checkpoint, memory_bytes=1 << 20, max_num_batched_tokens=16)


class Profiler:
    """Sees the activities above."""

    def __init__(self, activities):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def events(self):
        device = torch.autograd.DeviceType.CUDA
        for each in ACTIVITIES:
            span = SimpleNamespace(start=each.start, end=each.end)
            yield SimpleNamespace(name=each.name, time_range=span, device_type=device, is_user_annotation=False)
            yield SimpleNamespace(name="range", time_range=span, device_type=device, is_user_annotation=True)


@pytest.fixture(params=[False, True], ids=["", "ahead"])
def watched(monkeypatch, request) -> LLMEngine:
    """An engine that computes on the CPU and says that it does on a GPU."""
    made = engine()
    made.ahead = request.param
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    step, cpu = made.step, made.device

    def on_cpu():
        made.device = cpu
        try:
            return step()
        finally:
            made.device = torch.device("cuda")

    made.step = on_cpu  # type: ignore[method-assign]
    made.device = torch.device("cuda")
    return made


def test_a_batch_is_watched_and_taken_back(watched):
    found = account.watch(watched, 3, 9, 20, np.random.default_rng(0))
    assert 1 <= found.steps <= account.STEPS and 9 < found.context < 29
    assert found.kernels["kv_decode"] == (4, 80) and not watched.has_unfinished_requests()
    with pytest.raises(QoqError, match="output_len is 4, too few tokens"):
        account.watch(watched, 3, 9, 4, np.random.default_rng(0))
    assert not watched.has_unfinished_requests()


def test_the_account_beside_its_limits(watched):
    checkpoint = RandomCheckpoint("tiny", TINY, 128, 0, "cpu")
    record = {"batch_size": 2, "input_len": 9, "output_len": 20, "seed": 0, "kv_bits": 4, "precision": "w4a8"}
    found = throughput.watch(watched, checkpoint, record, CARDS["h100"])
    assert found is not None
    least = decode_step(TINY, CARDS["h100"].ideal, 2, found["context"])
    assert found["kernels"][0]["limit_us"] == approx(1e6 * least.linear, abs=0.06)
    lines = throughput.account_table(found).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["kernel", "w4a8_gemm", "kv_decode"]
    assert throughput.watch(watched, checkpoint, record | {"output_len": 3}, None) is None


def test_no_account_without_a_gpu(qoq):
    with pytest.raises(QoqError, match="expected device cuda"):
        account.watch(engine(), 1, 9, 20, np.random.default_rng(0))
    options = ["--model", "llama-3-8b", "--random-weights", "--device", "cpu", "--account"]
    code, out, err = qoq("bench", "throughput", *options)
    assert code == 2 and out == "" and "--account watches kernels on a GPU" in err
