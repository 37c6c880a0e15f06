"""scripts/l40s_setup on machines that are not ready: one line, nothing installed."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import TESTS

SCRIPT = TESTS.parent / "scripts" / "l40s_setup"


def set_up(tmp_path: Path, nvidia_smi: str, *arguments: str) -> tuple[int, str, str]:
    """Run the script where `nvidia-smi` says this, and nothing can be installed."""
    programs = {"nvidia-smi": nvidia_smi, "python3": "exit 1", "sudo": "exit 1", "apt-get": "exit 1"}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run([SCRIPT, *arguments], env={"PATH": path}, capture_output=True, text=True)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("nvidia_smi", "arguments", "message"),
    [
        ("exit 9", [], "nvidia-smi finds no GPU"),
        ("echo 'NVIDIA L40S, 535.104.05, 8.9'", [], "the driver is 535.104.05; CUDA 13 needs 580 or newer"),
        ("echo 'Tesla T4, 580.65.06, 7.5'", [], "Tesla T4 has compute capability 7.5"),
        ("echo 'NVIDIA L40S, 580.65.06, 8.9'", [], "python3 is missing or older than 3.10"),
        ("exit 9", ["--fast"], "--fast: expected nothing, or --bench"),
    ],
)
def test_a_machine_that_is_not_ready(tmp_path, nvidia_smi, arguments, message):
    code, out, err = set_up(tmp_path, nvidia_smi, *arguments)
    assert code == 1 and out == "" and err.splitlines()[-1].startswith(f"l40s_setup: {message}")
