"""The ops of the runtime, on CUDA and on CPU tensors alike.

A CUDA tensor goes to a kernel, compiled on its first use; a CPU tensor to the specification (`qoq/quant.py`,
`qoq/paged.py`, `qoq/sampling.py`). Both give the same integers; where floats are summed they agree within a bound
that the tests state. A wrong argument raises ValueError. Importing this starts nothing: no CUDA, no compiler.
"""

from qoq.kernels.attention import kv4_append_decode, kv4_decode
from qoq.kernels.gemm import PackedWeight, gate_up_silu, w4a8_gemm
from qoq.kernels.head import lm_head
from qoq.kernels.kv_cache import kv4_gather, rope_kv4_append
from qoq.kernels.rows import quant_rows, rmsnorm, rmsnorm_quant, silu_mul_quant
from qoq.kernels.sampling import sample

__all__ = [
    "PackedWeight",
    "gate_up_silu",
    "kv4_append_decode",
    "kv4_decode",
    "kv4_gather",
    "lm_head",
    "quant_rows",
    "rmsnorm",
    "rmsnorm_quant",
    "rope_kv4_append",
    "sample",
    "silu_mul_quant",
    "w4a8_gemm",
]
