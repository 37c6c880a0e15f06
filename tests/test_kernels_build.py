"""Compiling without a GPU: the cache, its errors, and what the machine code of every kernel must show."""

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qoq.errors import KernelError
from qoq.kernels import build, check
from qoq.kernels.build import Cubin, Specialisation

pytest.importorskip("cuda.core", reason="compiling needs cuda-core and NVRTC")

SOURCE = """
#include <cuda_fp16.h>
#include "common/types.cuh"
extern "C" __global__ void half_of(const __half* x, float* y) {
    y[threadIdx.x] = __half2float(x[threadIdx.x]) / DIVISOR;
}
"""
LOCAL = """
extern "C" __global__ void counts(const int* x, int* y) {
    int row[64] = {};
    for (int i = 0; i < 64; ++i) row[x[i]] += i;  // an index at run time
    y[threadIdx.x] = row[threadIdx.x];
}
"""
DAMAGE = [b"", b"\x7fELF", b'{"log": 1}\n', b"{", b'{"sha256": "0", "log": "", "seconds": 1}\nX']


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources with one.cu and local.cu, and an empty cache."""
    folder = tmp_path / "csrc"
    (folder / "common").mkdir(parents=True)
    (folder / "common" / "types.cuh").write_text((build.CSRC / "common" / "types.cuh").read_text())
    (folder / "one.cu").write_text(SOURCE)
    (folder / "local.cu").write_text(LOCAL)
    monkeypatch.setattr(build, "CSRC", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(source, architecture) of each compilation that really happens."""
    happened = []
    original = build._compile

    def counted(source: str, arch: str, defines: build.Defines) -> Cubin:
        happened.append((source, arch))
        return original(source, arch, defines)

    monkeypatch.setattr(build, "_compile", counted)
    return happened


def cached(csrc: Path) -> list[Path]:
    return sorted((csrc.parent / "cache" / "qoq" / "cubins").glob("*.cubin"))


def test_a_cubin_is_compiled_once(csrc: Path, compilations: list[tuple[str, str]]):
    first = build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2})
    assert build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2}) == first
    assert compilations == [("one.cu", "sm_80")] and len(cached(csrc)) == 1
    assert first.code[:4] == b"\x7fELF" and "half_of" in first.log


def test_everything_that_shapes_a_cubin_is_in_its_name(csrc: Path, compilations: list[tuple[str, str]]):
    build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2})
    build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 3})
    build.compile_cubin("one.cu", "sm_90a", {"DIVISOR": 2})
    (csrc / "one.cu").write_text(SOURCE + "// changed")
    build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2})
    (csrc / "common" / "new.cuh").write_text("")
    build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2})
    assert len(compilations) == len(cached(csrc)) == 5
    (csrc / "other.cu").write_text("")  # no header: changes nothing
    build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2})
    assert len(compilations) == 5


@pytest.mark.parametrize(
    "damage", [b"", b"\x7fELF", b'{"log": 1}\n', b"{", b'{"sha256": "0", "log": "", "seconds": 1}\nX']
)
def test_a_damaged_entry_is_compiled_again(csrc: Path, compilations: list[tuple[str, str]], damage: bytes):
    first = build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2})
    (path,) = cached(csrc)
    whole = path.read_bytes()
    for content in (damage, whole[:-1]):
        path.write_bytes(content)
        assert build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2}).code == first.code
    assert len(compilations) == 3
    assert build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2}).code == first.code and len(compilations) == 3


def test_processes_at_once_compile_once(csrc: Path):
    program = (
        "import sys; from pathlib import Path; from qoq.kernels import build;"
        "build.CSRC = Path(sys.argv[1]); original = build._compile;"
        "build._compile = lambda *args: print('compiled') or original(*args);"
        "build.compile_cubin('one.cu', 'sm_80', {'DIVISOR': 2})"
    )

    def run(_: int) -> str:
        command = [sys.executable, "-c", program, str(csrc)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(run, range(2))) == ["", "compiled\n"]
    assert [path.suffix for path in cached(csrc)] == [".cubin"]


def test_a_source_that_does_not_compile_is_one_line(csrc: Path):
    (csrc / "one.cu").write_text('extern "C" __global__ void broken(int* x) { x[0] = nothing; }')
    with pytest.raises(KernelError) as error:
        build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2})
    message = str(error.value)
    assert message.startswith("one.cu -DDIVISOR=2 does not compile for sm_80 with NVRTC ")
    assert 'identifier "nothing" is undefined' in message and "\n" not in message
    assert "1 error detected" in str(error.value.__cause__)  # the whole log
    assert cached(csrc) == []


def test_a_cache_that_cannot_be_written_is_one_line(csrc: Path, monkeypatch: pytest.MonkeyPatch):
    (csrc.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(csrc.parent / "file"))
    with pytest.raises(KernelError, match="cannot keep compiled kernels there .* set XDG_CACHE_HOME$"):
        build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2})


def test_missing_packages_are_named(csrc: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(KernelError, match=r"need cuda-core .* pip install 'qoq\[gpu\]'$"):
        build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2})


def test_missing_headers_are_named(csrc: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cuda.pathfinder.find_nvidia_header_directory", lambda name: None)
    with pytest.raises(KernelError, match=r"need CUDA's headers .* pip install 'qoq\[gpu\]'$"):
        build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_one_line():
    with pytest.raises(KernelError, match="^no CUDA device: "):
        build.module("rows.cu", torch.device("cuda", 0), {"VECTORS": 1, "THREADS": 256})
    run = subprocess.run([sys.executable, "-m", "qoq.kernels.selftest"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("selftest: no CUDA device") and run.stdout == ""


def test_importing_starts_nothing():
    program = "import sys, torch, qoq.kernels; print(torch.cuda.is_initialized(), 'cuda.core' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


# The check


def test_the_log_of_ptxas_is_read(csrc: Path):
    (kernel,) = check.read_log(build.compile_cubin("one.cu", "sm_80", {"DIVISOR": 2}).log)
    assert kernel.name == "half_of" and 0 < kernel.registers < 64
    assert (kernel.stack_bytes, kernel.spill_bytes, kernel.shared_bytes) == (0, 0, 0)


def test_local_memory_is_a_fault(csrc: Path):
    result = check.check(Specialisation("local.cu", {}), "sm_80", None)
    assert result.faults == ("counts: stack of 256 bytes",)
    assert "FAULT" in check.table([result])


def test_serialised_wgmma_is_a_fault(csrc: Path, monkeypatch: pytest.MonkeyPatch):
    warning = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    )
    cubin = build.compile_cubin("one.cu", "sm_90a", {"DIVISOR": 2})
    monkeypatch.setattr(build, "compile_cubin", lambda *args: Cubin(cubin.code, f"{warning}\n{cubin.log}", 0.0))
    assert check.check(Specialisation("one.cu", {}), "sm_90a", None).faults == ("wgmma serialised (C7510)",)


@pytest.mark.skipif(check.disassembler() is None, reason="no cuobjdump")
def test_a_missing_instruction_is_a_fault(csrc: Path):
    def faults(*expected: str) -> Sequence[str]:
        one = Specialisation("one.cu", {"DIVISOR": 2}, expected=expected)
        return check.check(one, "sm_80", check.disassembler()).faults

    assert faults(r"LDG\.E\.U16", r"STG\.E") == ()
    assert faults(r"LDG\.E\.128") == (r"half_of: no LDG\.E\.128",)


def sources() -> list[str]:
    return list(dict.fromkeys(one.source for one in check.SPECIALISATIONS))


def test_every_source_is_checked():
    assert sorted(sources()) == sorted(path.name for path in build.CSRC.glob("*.cu"))


@pytest.mark.parametrize("source", sources())
def test_one_of_each_source_compiles_well(source: str):
    """For all architectures; the first time takes seconds, and then it comes from the user's cache."""
    one = next(one for one in check.SPECIALISATIONS if one.source == source)
    same = [other for other in check.SPECIALISATIONS if other.source == source and other.defines == one.defines]
    results = [check.check(other, arch, check.disassembler()) for other in same for arch in other.architectures]
    assert [(result.arch, fault) for result in results for fault in result.faults] == []


@pytest.mark.slow
def test_every_kernel_compiles_well_everywhere():
    results = list(check.check_all())
    faults = [(check.title(result.specialisation), result.arch, *result.faults) for result in results if result.faults]
    assert faults == [], check.table(results)
