"""Compile every kernel for every architecture, without a GPU, and look at the machine code.

`python -m qoq.kernels.check` prints a table and exits with 1 if there is a fault. A kernel is at fault if it needs a
stack (spills or local memory), if ptxas serialised its wgmma instructions, or if its machine code lacks an
instruction that its file of launches expects. The disassembler comes from a CUDA toolkit on PATH or from triton's
wheel; without one that last part is left out, and the table says so.
"""

import importlib.util
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby, repeat
from pathlib import Path

from qoq.kernels import attention, build, gemm, head, kv_cache, rows, sampling
from qoq.kernels.build import ARCHITECTURES, Cubin, Specialisation

SPECIALISATIONS: tuple[Specialisation, ...] = (
    *rows.SPECIALISATIONS,
    *sampling.SPECIALISATIONS,
    *gemm.SPECIALISATIONS,
    *kv_cache.SPECIALISATIONS,
    *attention.SPECIALISATIONS,
    *head.SPECIALISATIONS,
)
SERIALISED = re.compile(r"C7510|wgmma\S* instructions are serialized")


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of one kernel for one architecture."""

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int  # stored and loaded
    shared_bytes: int  # static


@dataclass(frozen=True)
class Result:
    specialisation: Specialisation
    arch: str
    kernels: tuple[Kernel, ...]
    seconds: float
    faults: tuple[str, ...]


def read_log(log: str) -> tuple[Kernel, ...]:
    """The kernels of a ptxas log (`-v`), in its order."""
    kernels = []
    for block in log.split("Compiling entry function")[1:]:
        name = re.search(r"'(\S+)'", block)
        used = re.search(r"Used (\d+) registers", block)
        assert name and used, f"ptxas changed what it prints:\n{block}"
        shared = re.search(r"(\d+) bytes smem", block)
        kernels.append(
            Kernel(
                name[1],
                int(used[1]),
                _total(r"(\d+) bytes stack frame", block),
                _total(r"(\d+) bytes spill (?:stores|loads)", block),
                int(shared[1]) if shared else 0,
            )
        )
    return tuple(kernels)


def _total(pattern: str, text: str) -> int:
    return sum(int(number) for number in re.findall(pattern, text))


def disassembler() -> str | None:
    """Path of cuobjdump, or None."""
    found = shutil.which("cuobjdump")
    if found is None and (triton := importlib.util.find_spec("triton")) and triton.origin:
        inside = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(inside) if inside.is_file() else None
    return found


def disassemble(cubin: Cubin, tool: str) -> dict[str, str]:
    """Kernel name -> its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin.code)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : (\S+)", text)[1:]
    return dict(zip(functions[::2], functions[1::2], strict=True))


def check(specialisation: Specialisation, arch: str, tool: str | None) -> Result:
    """Compile one specialisation for one architecture and find its faults."""
    cubin = build.compile_cubin(specialisation.source, arch, specialisation.defines)
    kernels = read_log(cubin.log)
    faults = [f"{kernel.name}: stack of {kernel.stack_bytes} bytes" for kernel in kernels if kernel.stack_bytes > 0]
    faults += [f"{kernel.name}: spills" for kernel in kernels if kernel.spill_bytes > 0]
    if SERIALISED.search(cubin.log):
        faults.append("wgmma serialised (C7510)")
    if tool is not None:
        for name, code in disassemble(cubin, tool).items():
            faults += [f"{name}: no {wanted}" for wanted in specialisation.expected if not re.search(wanted, code)]
    return Result(specialisation, arch, kernels, cubin.seconds, tuple(faults))


def check_all(specialisations: Sequence[Specialisation] = SPECIALISATIONS) -> Iterator[Result]:
    """Check all of them for all their architectures, in order, on all cores."""
    jobs = [(one, arch) for one in specialisations for arch in one.architectures]
    # processes: NVRTC compiles one program at a time in each
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(check, *zip(*jobs, strict=True), repeat(disassembler()))


def title(specialisation: Specialisation) -> str:
    """Source and defines in at most 60 characters."""
    defines = " ".join(f"{name}={value}" for name, value in specialisation.defines.items())
    text = f"{specialisation.source} {defines}".strip()
    return text if len(text) <= 60 else f"{text[:57]}..."


def table(results: Sequence[Result]) -> str:
    """One line for each kernel of each specialisation, with the registers it takes on each architecture."""
    lines = [["source", "kernel", *ARCHITECTURES, "stack", "spills", "shared", "seconds", ""]]
    for specialisation, group in groupby(results, key=lambda result: result.specialisation):
        of_kernel: dict[str, dict[str, Kernel]] = {}
        compiled = list(group)
        for result in compiled:
            for kernel in result.kernels:
                of_kernel.setdefault(kernel.name, {})[result.arch] = kernel
        for name, on in of_kernel.items():
            registers = [str(on[arch].registers) if arch in on else "-" for arch in ARCHITECTURES]
            most = [max(column) for column in zip(*(sizes(kernel) for kernel in on.values()), strict=True)]
            seconds = sum(result.seconds for result in compiled)
            fault = "FAULT" if any(result.faults for result in compiled) else ""
            lines.append([title(specialisation), name, *registers, *map(str, most), f"{seconds:.1f}", fault])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(aligned(line, widths)).rstrip() for line in lines)


def sizes(kernel: Kernel) -> tuple[int, int, int]:
    return kernel.stack_bytes, kernel.spill_bytes, kernel.shared_bytes


def aligned(line: Sequence[str], widths: Sequence[int], names: int = 2) -> Iterator[str]:
    """The first columns, names, to the left; numbers to the right."""
    for i, (text, width) in enumerate(zip(line, widths, strict=True)):
        yield text.ljust(width) if i < names else text.rjust(width)


def main() -> int:
    results = list(check_all())
    print(table(results))
    if disassembler() is None:
        print("machine code not looked at: no cuobjdump on PATH and no triton")
    faults = [f"{title(result.specialisation)} {result.arch}: {fault}" for result in results for fault in result.faults]
    print("\n".join(faults) or f"{len(results)} cubins: no faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
