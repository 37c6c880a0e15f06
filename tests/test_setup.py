"""scripts/l40s_setup, with programs that only say how they were called: nothing is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import TESTS

from qoq.cli.main import group

L40S = "echo 'NVIDIA L40S, 580.65.06, 8.9'"


@pytest.fixture
def set_up(tmp_path):
    """Run the script where `nvidia-smi` and the other programs are these; gives exit code, stdout, stderr."""
    scripts, programs = tmp_path / "scripts", tmp_path / "programs"
    scripts.mkdir()
    programs.mkdir()
    shutil.copy(TESTS.parent / "scripts" / "l40s_setup", scripts)
    (scripts / "environment").write_text("echo environment >&2\n")

    def run(nvidia_smi: str, *arguments: str, **bodies: str) -> tuple[int, str, str]:
        says = {name: f'echo {name} "$@" >&2' for name in ("python", "python3", "pip", "qoq", "sudo", "apt-get", "id")}
        for name, body in (says | {"nvidia-smi": nvidia_smi} | bodies).items():
            program = Path(programs / name)
            program.write_text(f"#!/bin/sh\n{body}\n")
            program.chmod(0o755)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        script = [str(scripts / "l40s_setup"), *arguments]
        ended = subprocess.run(script, env={"PATH": path}, capture_output=True, text=True)
        return ended.returncode, ended.stdout, ended.stderr

    return run


@pytest.mark.parametrize(
    ("nvidia_smi", "arguments", "message"),
    [
        ("exit 9", [], "nvidia-smi finds no GPU"),
        ("echo 'NVIDIA L40S, 535.104.05, 8.9'", [], "the driver is 535.104.05; CUDA 13 needs 580 or newer"),
        ("echo 'Tesla T4, 580.65.06, 7.5'", [], "Tesla T4 has compute capability 7.5"),
        ("exit 9", ["--fast"], "--fast: expected nothing, or --bench"),
    ],
)
def test_a_machine_that_is_not_ready(set_up, nvidia_smi, arguments, message):
    code, out, err = set_up(nvidia_smi, *arguments)
    assert code == 1 and out == "" and err.splitlines()[-1].startswith(f"l40s_setup: {message}")
    assert "environment" not in err


def test_python_must_be_there(set_up):
    assert set_up(L40S, python3="exit 1")[2].endswith("l40s_setup: python3 is missing or older than 3.10\n")


def test_it_installs_checks_and_says_what_to_type(set_up):
    code, out, err = set_up(L40S, python='echo python "$@" >&2; [ "$1" = -m ]')
    assert code == 0 and "no L40S" not in err and "apt-get" not in err
    assert [line.split()[0] for line in err.splitlines()[-3:]] == ["environment", "pip", "python"]
    assert err.splitlines()[-1] == "python -m qoq.kernels.selftest"
    commands = [line.split() for line in out.splitlines() if line.startswith("    qoq ")]
    for command in commands:  # options are parsed before anything is done
        result = CliRunner().invoke(group, [*command[1:], "--help"])
        known = result.output.split()
        assert result.exit_code == 0 and all(word in known for word in command[1:] if word.startswith("--"))
    assert len(commands) == 5


def test_a_failed_selftest_ends_it(set_up):
    code, out, err = set_up(L40S, python='echo python "$@" >&2; [ "$1" = -c ]')
    assert code == 1 and out == ""


def test_it_types_the_benchmark(set_up):
    code, _, err = set_up("echo 'NVIDIA H100 80GB HBM3, 580.65.06, 9.0'", "--bench")
    assert code == 0 and "this is no L40S" in err
    assert err.splitlines()[-1] == "qoq bench throughput --model llama-3-8b --random-weights --roofline"


def test_ubuntu_keeps_venv_in_a_package(set_up):
    only_version = 'case "$2" in *ensurepip*) exit 1;; esac'
    code, _, err = set_up(L40S, python3=only_version, id="echo 1000")
    assert code == 0 and "sudo apt-get install -qq -y python3-venv" in err
    code, _, err = set_up(L40S, python3=only_version, id="echo 0")
    assert code == 0 and "\napt-get install -qq -y python3-venv" in err
