"""CUDA sources, compiled on first use: NVRTC -> cubin -> a cache on disk -> launches on torch's current stream.

`csrc/*.cu` are sources, `csrc/common/*.cuh` what they include. A cubin is made for one architecture and one set of
defines, and is kept in the user's cache under a hash of all that shaped it. `qoq/kernels/check.py` compiles
every kernel for every architecture, without a GPU.
"""

import ctypes
import hashlib
import io
import json
import os
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq.errors import KernelError, first_line

CSRC = Path(__file__).parent / "csrc"
SUPPORTED = (8, 0)  # the lowest compute capability: cp.async and int8 mma.m16n8k32
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")  # what `check` compiles for
INSTALL = "install them with: pip install 'qoq[gpu]'"
PARAMETERS, PARAMETERS_SIZE = 1, 2  # the driver's marks before the address of all parameters and before their size
TENSOR_MAP_BYTES = 128  # of the driver's CUtensorMap
DEFAULT_SHARED_BYTES = 48 * 1024  # what a block may have without asking

Defines = Mapping[str, int | str]
Argument = Tensor | int | float | bytes | None


@dataclass(frozen=True)
class Specialisation:
    """One set of defines of a source. Each file of launches lists its own in SPECIALISATIONS, for `check`."""

    source: str
    defines: Defines
    architectures: tuple[str, ...] = ARCHITECTURES
    expected: tuple[str, ...] = ()  # regular expressions that the machine code of every kernel in it must match


# Compiling


@dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture and what the compiler said of it."""

    code: bytes
    log: str  # NVRTC's and ptxas's, with registers and spills of each kernel
    seconds: float


def architecture(device: torch.device) -> str:
    """The compiler's name of the device's architecture, such as "sm_90a".

    Raises:
        KernelError: no CUDA device, or one that is too old.
    """
    if not torch.cuda.is_available():
        raise KernelError("no CUDA device: torch finds no driver, no GPU, or was built without CUDA")
    capability = torch.cuda.get_device_capability(device)
    if capability < SUPPORTED:
        name = torch.cuda.get_device_name(device)
        raise KernelError(f"{name}: compute capability {capability[0]}.{capability[1]}, expected 8.0 or newer")
    return "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"


def compile_cubin(source: str, arch: str, defines: Defines) -> Cubin:
    """Compile a source of csrc/, or take it from the cache. Needs no GPU; safe from many processes at once.

    Raises:
        KernelError: no compiler, no headers, an unwritable cache, or a source that does not compile.
    """
    key = _key(source, arch, defines)
    folder = _cache_folder()
    path = folder / f"{Path(source).stem}-{arch}-{key}.cubin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        cubin = _read(path)
        if cubin is None:
            with _locked(path.with_suffix(".lock")):  # whoever comes second finds the cubin made
                cubin = _read(path)
                if cubin is None:
                    cubin = _compile(source, arch, defines)
                    _write(path, cubin)
        return cubin
    except OSError as error:
        raise KernelError(f"{folder}: cannot keep compiled kernels there ({error}); set XDG_CACHE_HOME") from None


def _key(source: str, arch: str, defines: Defines) -> str:
    """A hash of everything that shapes the cubin, this compiler's version included."""
    files = [CSRC / source, *sorted(CSRC.rglob("*.cuh"))]
    tree = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
    parts = [source, tree, sorted((name, str(value)) for name, value in defines.items()), arch, _nvrtc_version()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("qoq") / "cubins"


def _nvrtc_version() -> str:
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # the bindings find libnvrtc on their first call
        raise KernelError(f"the GPU kernels need cuda-core and NVRTC ({first_line(error)}); {INSTALL}") from None
    return f"{major}.{minor}"


def _compile(source: str, arch: str, defines: Defines) -> Cubin:
    try:
        import cuda.pathfinder
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise KernelError(f"the GPU kernels need cuda-core ({first_line(error)}); {INSTALL}") from None

    headers = cuda.pathfinder.find_nvidia_header_directory("cudart")
    if headers is None:
        raise KernelError(f"the GPU kernels need CUDA's headers (cuda_fp16.h); {INSTALL}")
    options = ProgramOptions(
        name=source,
        arch=arch,
        std="c++17",
        include_path=[str(CSRC), headers],
        define_macro=[(name, str(value)) for name, value in defines.items()] or None,
        ptxas_options=["-v"],
    )
    log, start = io.StringIO(), time.perf_counter()
    try:
        code = Program((CSRC / source).read_text(), "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # NVRTCError, which carries the compiler's log; older releases name it otherwise
        what = next((line for line in str(error).splitlines() if "error" in line), first_line(error))
        options_text = "".join(f" -D{name}={value}" for name, value in defines.items())
        message = f"{source}{options_text} does not compile for {arch} with NVRTC {_nvrtc_version()}: {what}"
        raise KernelError(message) from error
    assert isinstance(code, bytes)
    return Cubin(code, log.getvalue().rstrip("\0\n"), time.perf_counter() - start)


# The cache: one line of JSON (digest, log, seconds), then the cubin


def _read(path: Path) -> Cubin | None:
    """The cubin, or None if it is not there or not whole."""
    try:
        header, code = path.read_bytes().split(b"\n", 1)
        about = json.loads(header)
        if about["sha256"] != hashlib.sha256(code).hexdigest():
            return None
        return Cubin(code, about["log"], about["seconds"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, cubin: Cubin) -> None:
    about = {"sha256": hashlib.sha256(cubin.code).hexdigest(), "log": cubin.log, "seconds": cubin.seconds}
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".part", delete=False) as file:
        file.write(json.dumps(about).encode() + b"\n" + cubin.code)
    os.replace(file.name, path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when its process ends, however that happens."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Loading and launching


class _Thread(threading.local):
    """Whether the driver knows this thread's device: a thread that only launches never asked the runtime for it."""

    has_context = False


_thread = _Thread()
_loading = threading.Lock()
_modules: dict[tuple[str, torch.device, tuple[tuple[str, int | str], ...]], "Module"] = {}


def module(source: str, device: torch.device, defines: Mapping[str, int | str] = {}) -> "Module":
    """A source of csrc/ compiled for a CUDA device with index, loaded once in a process.

    Raises:
        KernelError: no GPU, compiler, headers or driver for it, or it does not compile.
    """
    key = (source, device, tuple(defines.items()))
    found = _modules.get(key)
    if found is None:
        with _loading:
            found = _modules.get(key)
            if found is None:
                found = _modules[key] = Module(source, device, defines)
    return found


def _kind(argument: Argument) -> str:
    """Of a parameter, as `struct` names it."""
    if isinstance(argument, bytes):
        return f"{len(argument)}s"
    return "Q" if argument is None or isinstance(argument, Tensor) else "f" if isinstance(argument, float) else "i"


class Module:
    """Loaded kernels of one source on one device."""

    architecture: str
    multiprocessors: int

    def __init__(self, source: str, device: torch.device, defines: Defines):
        self.architecture = architecture(device)
        self.device = device
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        cubin = compile_cubin(source, self.architecture, defines)

        # cuda is imported here and kept, so that importing this module starts nothing
        from cuda.bindings import driver
        from cuda.core import Device, ObjectCode

        self._driver, self._device_class = driver, Device
        self._overlap = torch.cuda.get_device_capability(device) >= (9, 0)  # see csrc/common/overlap.cuh
        self._source = source
        self._object = ObjectCode.from_cubin(cubin.code, name=source)
        self._kernels: dict[str, Any] = {}
        self._handles: dict[str, Any] = {}
        self._shared_limits: dict[str, int] = {}
        self._configs: dict[tuple[tuple[int, int, int], int, int, int], Any] = {}
        self._packers: dict[str, struct.Struct] = {}

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: int,
        args: Sequence[Argument],
        shared_bytes: int = 0,
    ) -> None:
        """Start the extern "C" kernel `name` on torch's current stream of this device; an empty grid does nothing.

        A tensor becomes its data pointer, None a null pointer, an int (or bool) an int32, a float a float32, bytes a
        struct of theirs. `shared_bytes` is dynamic shared memory. Nothing is allocated or synchronised, so graphs can
        capture it.

        Raises:
            KernelError: the driver refuses the code, or the device has too little shared memory.
        """
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self.launch(name, grid, block, args, shared_bytes)
        if 0 in grid:
            return None
        self._use_context()
        kernel = self._kernels.get(name) or self._kernel(name)
        if shared_bytes > self._shared_limits.get(name, DEFAULT_SHARED_BYTES):
            self._raise_shared_limit(name, shared_bytes)
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)  # torch.cuda.current_stream, 1 us cheaper
        key = grid, block, shared_bytes, stream
        config = self._configs.get(key) or self._config(*key)
        values = [x.data_ptr() if isinstance(x, Tensor) else 0 if x is None else x for x in args]
        packer = self._packers.get(name) or self._packer(name, args)
        # the parameters as the kernel has them in memory: cuda.core's own launch takes 20 us to put them there
        packed = ctypes.create_string_buffer(packer.pack(*values), packer.size)
        size = ctypes.c_size_t(packer.size)
        extra = (ctypes.c_void_p * 5)(
            PARAMETERS, ctypes.addressof(packed), PARAMETERS_SIZE, ctypes.addressof(size), None
        )
        (status,) = self._driver.cuLaunchKernelEx(config, kernel, None, ctypes.addressof(extra))
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise KernelError(f"{self._source}: {name} was not launched ({status.name})")
        return None

    def tensor_map(self, matrix: Tensor, box: tuple[int, int]) -> bytes:
        """TensorMap of csrc/common/barrier.cuh: a matrix of bytes (M, K), K % 16 == 0, copied in boxes.

        `box`: rows and columns. The 16-byte chunks of its rows, at most eight each, are swizzled; what lies beyond the
        matrix is zero.
        """
        self._use_context()
        return _tensor_map(matrix.data_ptr(), *matrix.shape, *box)

    def _use_context(self) -> None:
        if not _thread.has_context:
            self._device_class(self.device.index).set_current()
            _thread.has_context = True

    def _packer(self, name: str, args: Sequence[Argument]) -> struct.Struct:
        """How a kernel's parameters lie in memory, by what the compiler says of it. Their kinds are always the same."""
        parts, end = ["="], 0
        for index, argument in enumerate(args):
            status, offset, size = self._driver.cuKernelGetParamInfo(self._handles[name], index)
            kind = _kind(argument)
            assert struct.calcsize(f"={kind}") == size, f"{name}: parameter {index} has {size} bytes ({status.name})"
            parts += [f"{offset - end}x", kind]
            end = offset + size
        self._packers[name] = packer = struct.Struct("".join(parts))
        return packer

    def _kernel(self, name: str) -> Any:
        try:
            kernel = self._object.get_kernel(name)
        except Exception as error:  # cuda.core's CUDAError
            if "NOT_FOUND" in str(error):  # no such kernel in the source: a bug, not the driver
                raise
            raise KernelError(
                f"{self._source}: the driver cannot load {name} for {self.architecture} ({first_line(error)}); "
                f"it is probably older than NVRTC {_nvrtc_version()}: update the driver"
            ) from error
        self._handles[name] = kernel.handle
        self._kernels[name] = function = self._driver.CUfunction(int(kernel.handle))  # the driver takes either
        return function

    def _raise_shared_limit(self, name: str, shared_bytes: int) -> None:
        limit = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = self._driver.cuKernelSetAttribute(limit, shared_bytes, self._handles[name], self.device.index)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise KernelError(f"{name}: {shared_bytes} bytes of shared memory in a block refused ({status.name})")
        self._shared_limits[name] = shared_bytes

    def _config(self, grid: tuple[int, int, int], block: int, shared_bytes: int, stream: int) -> Any:
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, self._driver.CUstream(stream)
        if self._overlap:
            attribute = self._driver.CUlaunchAttribute()
            attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        self._configs[grid, block, shared_bytes, stream] = config
        return config


@lru_cache(maxsize=4096)  # it takes as long as some launches
def _tensor_map(address: int, rows: int, columns: int, box_rows: int, box_columns: int) -> bytes:
    from cuda.bindings import driver

    size, count = driver.cuuint64_t, driver.cuuint32_t
    status, found = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2,
        address,
        [size(columns), size(rows)],
        [size(columns)],
        [count(box_columns), count(box_rows)],
        [count(1), count(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise KernelError(
            f"no tensor map of {rows} x {columns} bytes in boxes of {box_rows} x {box_columns} ({status.name})"
        )
    return ctypes.string_at(found.getPtr(), TENSOR_MAP_BYTES)
