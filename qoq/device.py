"""Where to compute, by the one name that each place has: `cpu`, `cuda` (the current GPU) or `cuda:N`."""

import re

from qoq.errors import QoqError


def device_name(name: str, here: bool = True) -> str:
    """`name` in the form that names are compared in: `cpu:0` is `cpu`.

    Raises:
        QoqError: no such device; unless `here` is false, also where this machine has none.
    """
    found = re.fullmatch(r"(cpu)(?::0)?|cuda(?::(0|[1-9][0-9]*))?", name)
    if found is None:
        raise QoqError(f"device {name!r}, expected cpu, cuda or cuda:N")
    cpu, index = found.groups()
    if here and not cpu:
        import torch

        if not torch.cuda.is_available():
            raise QoqError(f"device {name!r}: no CUDA device is available")
        if int(index or 0) >= torch.cuda.device_count():
            raise QoqError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return cpu or name
