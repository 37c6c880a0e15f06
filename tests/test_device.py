"""Names of devices."""

import pytest
import torch

from qoq.device import device_name
from qoq.errors import QoqError
from qoq.runtime.loading import device_of


@pytest.mark.parametrize(("name", "expected"), [("cpu", "cpu"), ("cpu:0", "cpu"), ("cuda", "cuda"), ("cuda:11",) * 2])
def test_each_device_has_one_name(name, expected):
    assert device_name(name, here=False) == expected


@pytest.mark.parametrize("name", ["", "toaster", "meta", "mps", "cpu:1", "cuda:", "cuda:-1", "cuda:01", "cuda:1\n"])
def test_no_device(name):
    with pytest.raises(QoqError, match="expected cpu, cuda or cuda:N"):
        device_name(name, here=False)
    with pytest.raises(QoqError, match="expected cpu, cuda or cuda:N"):
        device_of(name)


def test_a_device_is_here(monkeypatch):
    """torch.device("cuda:257") is cuda:1."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(QoqError, match="'cuda': no CUDA device is available"):
        device_name("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_name("cuda") == "cuda" and device_name("cuda:1") == "cuda:1"
    for name in ("cuda:2", "cuda:257"):
        with pytest.raises(QoqError, match=f"'{name}': there are 2 CUDA devices"):
            device_name(name)


def test_the_runtime_takes_the_same_names():
    assert device_of("cpu:0") == torch.device("cpu")
