"""`qoq bench kernels`: floors against numbers made by hand, what is called, and how results are shown."""

import csv
import io
import json
import subprocess
import sys

import pytest
import torch
from conftest import only_line

from qoq.cli import bench as command
from qoq.errors import KernelError
from qoq.kernels import bench, build, tiling, timing
from qoq.kernels.bench import MEASUREMENTS, Pass, Plan, Product
from qoq.kernels.cards import Card
from qoq.kernels.tiling import Config
from qoq.kernels.timing import Machine
from qoq.roofline import CARDS, MODELS, DataSheet, Dimensions

H100 = Card("NVIDIA H100 80GB HBM3", "sm_90a", 132)
TINY = Dimensions("llama", 2, 128, 256, num_heads=4, num_kv_heads=2, vocab_size=104, head_dim=64)
CONFIG = Config("wgmma", 128, 64, 6, 2)
RIVALS = {"fp16": 88.0, "int8": None, "fp8": 48.1}


def product(linear: str = "gate_up", m: int = 64, n: int = 28672, k: int = 4096, us: float = 26.0) -> Product:
    return Product(linear, m, n, k, 128, CONFIG, us, RIVALS, CARDS["h100"])


def machine(sheet: DataSheet | None = CARDS["h100"]) -> Machine:
    """The H100 of the tests, which computes on the CPU."""
    return Machine(torch.device("cpu"), H100, 1 << 20, 3.0e12, sheet)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Timing calls everything once on the CPU, checks what it gives, and takes 2 us; how many calls each time."""
    counts = []

    def microseconds(calls):
        counts.append(len(calls))
        for call in calls:
            out = call()
            for tensor in vars(out).values() if hasattr(out, "x8") else out if isinstance(out, tuple) else (out,):
                assert not tensor.is_floating_point() or bool(tensor.isfinite().all())
        return 2.0

    monkeypatch.setattr(bench, "microseconds", microseconds)
    monkeypatch.setattr(timing, "MOST_COPIES", 3)
    monkeypatch.setattr(bench, "ROW_TOKENS", (1, 5))
    monkeypatch.setattr(bench, "HEAD_TOKENS", (1, 9))
    monkeypatch.setattr(bench, "SAMPLE_BATCHES", (1, 3))
    monkeypatch.setattr(bench, "PREFILL", 192)
    monkeypatch.setitem(MODELS, "llama-3-8b", TINY)
    monkeypatch.setattr(Machine, "here", staticmethod(machine))
    monkeypatch.setattr(timing, "compile_all", lambda wanted, arch: None)
    return counts


# Floors


def test_dimensions_of_the_models():
    assert MODELS["llama-3-8b"].linears() == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    }
    assert list(MODELS["llama-3-70b"].linears().values()) == [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)]
    assert list(MODELS["qwen2.5-7b"].linears().values()) == [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)]
    assert command.OPS == tuple(MEASUREMENTS)


@pytest.mark.parametrize("group_size", [128, 64, -1])
def test_the_bytes_of_a_weight_are_those_of_its_tensors(group_size):
    weight = bench.random_weight(96, 256, group_size, torch.device("cpu"))
    tensors = [tensor for tensor in vars(weight).values() if tensor is not None]
    assert bench.weight_bytes(96, 256, group_size) == sum(tensor.nbytes for tensor in tensors)
    weight.unpack()


def test_floor_of_few_tokens_is_memory():
    gate_up = product(m=1)
    # codes 58,720,256; s1 57,344; s2 and zeros of 32 groups 1,835,008; x8 4,096; sx, sums 8; out 57,344
    assert gate_up.bytes == 60674056
    assert gate_up.floor_us == pytest.approx(60674056 / 3.35e6, rel=1e-12) == pytest.approx(18.112, abs=1e-3)


def test_floor_of_many_tokens_is_arithmetic():
    gate_up = product(m=4096)
    assert gate_up.operations == 2 * 4096 * 28672 * 4096 == 962072674304
    assert gate_up.floor_us == pytest.approx(962072674304 / 1.979e9) == pytest.approx(486.14, abs=0.01)
    assert gate_up.intensity == pytest.approx(962072674304 / (60612608 + 4096 * (4096 + 8 + 57344)))


def test_a_record_says_what_was_measured():
    found = product().record()
    assert found["tops"] == pytest.approx(2 * 64 * 28672 * 4096 / 26e-6 / 1e12, rel=1e-4)
    assert found["gb_per_s"] == pytest.approx((60612608 + 64 * (4096 + 8 + 57344)) / 26e-6 / 1e9, rel=1e-4)
    assert found["floor_share"] == pytest.approx(found["floor_us"] / 26, rel=1e-3)
    assert (found["fp16_speedup"], found["int8_us"], found["int8_speedup"]) == (3.385, None, None)
    assert (found["kernel"], found["tile_rows"], found["tile_tokens"], found["splits"]) == ("wgmma", 128, 64, 2)
    unknown = Product("o", 1, 4096, 4096, 128, CONFIG, 5.0, RIVALS, None).record()
    assert unknown["floor_us"] is unknown["floor_share"] is None and unknown.keys() == found.keys()


def test_a_pass_is_compared_with_a_copy():
    found = Pass("quant_rows", {"tokens": 4096, "width": 4096}, 50364416, 20.0, 3.0e12).record()
    assert found["gb_per_s"] == 2518.22 and found["copy_share"] == 0.8394 and found["width"] == 4096


def test_inputs_leave_the_cache():
    gpu = Machine(torch.device("cpu"), H100, 50 << 20, 3e12, None)
    assert [gpu.copies(size) for size in (1 << 30, 200 << 20, 50 << 20, 1)] == [1, 1, 4, timing.MOST_COPIES]


# What is called


def plan(*ops: str, group_size: int = 128) -> Plan:
    return Plan(TINY, group_size, ops, (1, 17, 32), (1, 3), (64, 100))


@pytest.mark.parametrize("group_size", [128, 64, -1])
def test_gemms_are_called_as_the_ops_want(called, group_size):
    found = list(bench.products(plan("gemm", group_size=group_size), machine()))
    assert [(each.linear, each.M) for each in found[:4]] == [("qkv", 1), ("qkv", 17), ("qkv", 32), ("o", 1)]
    assert len(found) == 12 and all(each.us == 2 for each in found)
    assert all(each.rivals["fp16"] == each.rivals["int8"] == each.rivals["fp8"] == 2 for each in found)
    assert set(called) == {3}


def test_a_rival_that_fails_is_an_empty_cell(called, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("not on this card")

    monkeypatch.setattr(torch, "_scaled_mm", broken)
    monkeypatch.delattr(torch, "_int_mm")
    for each in bench.products(plan("gemm"), machine()):
        assert each.us == each.rivals["fp16"] == 2
        assert each.rivals["fp8"] is each.rivals["int8"] is None


def test_torchs_products_are_right():
    """Each against float64, rounded as its operands are."""
    torch.manual_seed(0)
    for dtype in bench.RIVALS.values():
        x, w = (bench.random_matrix(rows, 64, dtype, torch.device("cpu")) for rows in (32, 48))
        (out,) = [call() for call in bench.rival_calls(x, [w])]
        torch.testing.assert_close(out.double(), x.double() @ w.double().t(), rtol=2e-3, atol=2e-2)


def test_passes_are_called_as_the_ops_want(called):
    torch.manual_seed(0)
    found = {op: list(MEASUREMENTS[op](plan(op), machine())) for op in ("rows", "attention", "head", "sample")}
    assert {op: len(results) for op, results in found.items()} == {"rows": 6, "attention": 12, "head": 4, "sample": 4}
    sizes = [(each.op, *each.sizes.values()) for each in found["attention"] if isinstance(each, Pass)]
    assert sizes[:4] == [*(("rope_kv4_append", tokens) for tokens in (1, 3, 192)), ("kv4_gather", 192)]
    ops, cases = ("kv4_decode", "kv4_append_decode"), [(1, 64), (1, 100), (3, 64), (3, 100)]
    assert sizes[4:] == [(op, *case) for case in cases for op in ops]


def test_swiglu_both_ways(called):
    found = list(bench.swiglu_passes(plan("swiglu"), machine()))
    ways = ["w4a8_gemm, silu_mul_quant", "gate_up_silu, quant_rows"]
    assert [(each.op, each.sizes["tokens"]) for each in found] == [(way, m) for m in (1, 17, 32) for way in ways]
    behind, inside = found[2:4]
    assert behind.bytes - inside.bytes == 17 * 2 * 2 * TINY.intermediate_size  # half of gate and up, there and back
    assert inside.bytes == bench.weight_bytes(512, 128, 128) + 17 * (128 + 8 + 2 * 2 * 256 + 256 + 8)
    old = Machine(torch.device("cpu"), Card("A100", "sm_80", 108), 1 << 20, 3.0e12, None)
    assert {each.op for each in bench.swiglu_passes(plan("swiglu"), old)} == {ways[0]}


def test_bytes_of_passes(called):
    """Llama-3-8B's by hand: 1,088 bytes of cache for a token, rows of 6,144 and 4,096."""
    moved = {(each.op, *each.sizes.values()): each.bytes for each in bench.row_passes(plan("rows"), machine())}
    assert moved["quant_rows", 5, 128] == 5 * (2 * 128 + 128 + 8)
    assert moved["rmsnorm_quant + residual", 5, 128] == 5 * (3 * 2 * 128 + 128 + 8) + 2 * 128
    assert moved["silu_mul_quant", 5, 256] == 5 * (2 * 2 * 256 + 256 + 8)
    moved = {(each.op, each.sizes["tokens"]): each.bytes for each in bench.head_passes(plan("head"), machine())}
    assert moved["lm_head", 9] == 2 * 104 * 128 + 9 * (2 * 128 + 4 * 104)
    assert moved["lm_head, torch fp16", 9] == 2 * 104 * 128 + 9 * (2 * 128 + 2 * 104)
    token = 2 * 2 * (64 // 2 + 4)  # K and V of two heads: codes, scale and minimum
    moved = {
        (each.op, *each.sizes.values()): each.bytes for each in bench.attention_passes(plan("attention"), machine())
    }
    assert moved["kv4_decode", 3, 100] == 3 * 100 * token
    assert moved["kv4_append_decode", 3, 100] == 3 * (100 * token + 2 * (4 + 2 * 2) * 64)
    assert moved["kv4_gather", 192] == 192 * (token + 2 * 2 * 2 * 64)
    # qkv, q, what is stored, cos and sin of half a head in float32, position and slot
    assert moved["rope_kv4_append", 3] == 3 * (2 * (4 + 2 * 2) * 64 + 2 * 4 * 64 + token + 2 * 4 * 32 + 16)


def test_what_is_compiled_beforehand_is_what_runs():
    """Every choice of tiles, and one set of defines of each attention kernel."""
    full = Plan(MODELS["llama-3-8b"], 128, tuple(MEASUREMENTS), (1, 64, 4096), (1,), (512,))
    found = bench.specialisations(full, H100)
    assert len(found) == len({(one.source, *one.defines.items()) for one in found})
    sources = [one.source for one in found]
    of_attention = ("append.cu", "gather.cu", "decode.cu", "append_decode.cu")
    assert [sources.count(source) for source in (*of_attention, "sample.cu")] == [1, 1, 1, 1, 2]
    asked = [(one.source, dict(one.defines)) for one in found]
    for n, k in full.model.linears().values():
        for m in full.tokens:
            config = tiling.choose(H100, m, n, k, 128)
            kernel = tiling.KERNELS[config.kernel]
            assert all((kernel.source, kernel.defines(each, 128)) in asked for each in config.launched)
    (append,) = (one.defines for one in found if one.source == "append.cu")
    assert append == bench.kv_cache.append_defines(bench.Layout(128), tuple(map(float, bench.CLIP_RATIOS)))
    heads = [dict(one.defines) for one in found if one.source == "head.cu"]
    assert len(heads) == 4 and all(bench.head.tile(m, H100.limits) in heads for m in bench.HEAD_TOKENS)
    assert {one.source for one in bench.specialisations(plan("sample"), H100)} == {"sample.cu"}


def test_compiling_in_processes(tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason="compiling needs cuda-core and NVRTC")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = bench.specialisations(plan("sample"), H100)
    timing.compile_all(wanted, "sm_90a")
    assert len(list(tmp_path.rglob("sample-sm_90a-*.cubin"))) == len(wanted)
    with pytest.raises(KernelError, match=r"^sample.cu .*does not compile for sm_90a"):
        timing.compile_all([build.Specialisation("sample.cu", {"LOGIT": "nothing"})], "sm_90a")


# How it is shown


def test_tables():
    lines = command.table([product(m=1, us=20.04), product("o", 64, 4096, 4096, 5.5)]).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert lines[0].split()[:5] == ["GEMM", "N", "x", "K", "M"]
    assert " ".join(lines[1].split()) == (
        "gate_up 28672 x 4096 1 20.0 18.1 90 % 12 3028 4.39 - 2.40 wgmma 128 x 64, 6, 2, 1"
    )
    unknown = Product("o", 1, 4096, 4096, 128, CONFIG, 5.0, dict.fromkeys(RIVALS), None)
    assert command.table([unknown]).splitlines()[1].split().count("-") == 5
    passes = [Pass("kv4_decode", {"batch": 1, "context": 512}, 557056, 4.0, 3e12)]
    assert " ".join(command.table(passes).splitlines()[1].split()) == "kv4_decode batch 1, context 512 4.0 139 5 %"


def test_csv_has_a_column_for_every_key():
    records = [product().record(), Pass("sample", {"batch": 1, "vocabulary": 104}, 208, 2.0, 3e12).record()]
    first, second = csv.DictReader(io.StringIO(command.csv_text(records)))
    assert first["op"] == "w4a8_gemm" and first["us"] == "26.0" and first["int8_us"] == first["batch"] == ""
    assert second["vocabulary"] == "104" and second["us"] == "2.0" and second["M"] == ""


def options(*more: object) -> list[object]:
    return ["bench", "kernels", "--tokens", "32,1", "--batches", "2", "--contexts", "64,100", *more]


def test_the_command_prints_tables(qoq, called):
    code, out, err = qoq(*options())
    assert code == 0 and err == ""
    title, *tables = out.split("\n\n")
    assert title == (
        "NVIDIA H100 80GB HBM3 (sm_90a), llama-3-8b, groups of 128; device copy 3000 GB/s; "
        "data sheet 3350 GB/s and 1979 TOPS"
    )
    assert [table.split()[0] for table in tables] == ["GEMM", *["op"] * 5]
    assert [len(table.splitlines()) for table in tables] == [9, 7, 5, 8, 5, 5]
    assert "groups of 64" in qoq(*options("--ops", "rows", "--group-size", "64"))[1]


def test_the_command_gives_json_and_csv(qoq, called, tmp_path):
    path = tmp_path / "kernels.csv"
    code, out, err = qoq(*options("--ops", "sample,gemm", "--group-size", "-1", "--json", "--csv", path))
    assert code == 0 and err == ""
    document = json.loads(out)
    assert document["device"] == H100.name and document["group_size"] == -1 and document["model"] == "llama-3-8b"
    assert (document["copy_gb_per_s"], document["peak_gb_per_s"], document["peak_tops"]) == (3000, 3350, 1979)
    results = document["results"]
    assert [each["op"] for each in results] == 8 * ["w4a8_gemm"] + 2 * ["sample, greedy", "sample, top-k 50, top-p 0.9"]
    assert [each["M"] for each in results[:2]] == [1, 32]
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [float(row["us"]) for row in rows] == [2.0] * 12


def test_a_card_without_a_data_sheet(qoq, called, monkeypatch):
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: machine(None)))
    assert "data sheet not known" in qoq(*options("--ops", "gemm"))[1]
    document = json.loads(qoq(*options("--ops", "gemm", "--json"))[1])
    assert document["peak_tops"] is None and document["results"][0]["floor_us"] is None


def test_the_plot_is_written(qoq, called, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.png"
    for sheet in (CARDS["h100"], None):
        monkeypatch.setattr(Machine, "here", staticmethod(lambda sheet=sheet: machine(sheet)))
        code, _, err = qoq(*options("--ops", "gemm", "--plot", path))
        assert code == 0, err
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        path.unlink()


def test_the_plot_needs_matplotlib(qoq, called, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = only_line(qoq(*options("--plot", tmp_path / "roofline.png")))
    assert line == "qoq: --plot needs matplotlib; pip install 'qoq[plot]'\n" and called == []


def test_out_of_memory_is_one_line(qoq, called, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setitem(MEASUREMENTS, "attention", full)
    line = only_line(qoq(*options("--ops", "attention", "--json")))
    assert "attention: out of GPU memory; try fewer --tokens, --batches or --contexts" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1,0"], "'1,0', expected whole numbers from 1 to 32768, separated by commas"),
        (["--tokens", ""], "expected whole numbers"),
        (["--batches", "1024,1025"], "whole numbers from 1 to 1024"),
        (["--contexts", "-5"], "expected whole numbers"),
        (["--ops", "gemm,rowz"], "'gemm,rowz', expected some of gemm, rows, swiglu, attention, head, sample"),
        (["--model", "llama"], "llama-3-8b"),
        (["--group-size", "32"], "32"),
        (["--csv", "{tmp}/absent/x.csv"], "absent: no such folder"),
        (["--plot", "{tmp}/absent/x.png"], "absent: no such folder"),
        (["--plot", "{tmp}/x.png", "--ops", "rows"], "--ops leaves them out"),
    ],
)
def test_a_wrong_option_is_a_usage_error(qoq, called, tmp_path, arguments, message):
    code, out, err = qoq("bench", "kernels", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == 2 and out == "" and message in err and called == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_one_line(qoq):
    assert only_line(qoq("bench", "kernels")).startswith("qoq: no CUDA device: ")


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from click.testing import CliRunner; from qoq.cli.main import group\n"
        "assert CliRunner().invoke(group, ['bench', 'kernels', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_command_on_a_gpu(qoq):
    code, out, err = qoq(*options("--json"))
    assert code == 0, err
    document = json.loads(out)
    assert document["copy_gb_per_s"] > 50 and 0 < document["seconds"] < 300
    for each in document["results"]:
        assert each["us"] > 0.5 and each["gb_per_s"] > 0, each
        assert each["op"] != "w4a8_gemm" or each["fp16_us"] > 0.5, each
