"""Files of unknown origin, two thousand damaged ones on each run: read, or refused with a DdpmxError, and nothing else.

``python tests/mutations/run.py --count 100000 --seed N`` is the same at length.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mutations.mutants import KINDS, mutant

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "run.py"
WITHOUT_TORCH = any(importlib.util.find_spec(name) is None for name in ("torch", "safetensors"))

# Mutants that all fail at one check do not test the later ones.
LEAST_PLACES = {
    "onnx": 18,
    "plan": 15,
    "plan+sidecar": 10,
    "mnn": 8,
    "spec": 15,
    "images": 8,
    "parity": 22,
    "checkpoint": 12,
}


def run(*arguments: str) -> tuple[int, str]:
    """The exit code and the output."""
    done = subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_mutants_are_read_or_refused():
    code, output = run("--count", "2500", "--seed", "0", *(["--without-torch"] if WITHOUT_TORCH else []))
    assert code == 0, output
    table = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.split()[:1] and line[0] != " "}
    for kind in KINDS:
        mutants, read, refused, places, failed = map(int, table[kind][:5])
        assert (mutants, failed) == (250, 0)
        assert read > 0
        assert refused > 0
        assert places >= LEAST_PLACES.get(kind, 4), f"{kind}: its mutants are refused at {places} places only"


FAULTS = {
    "wrong": "ValueError: planted",
    "allocate": "MemoryError",
    "swallow": "requested too much memory",
    "grow": "MiB",
    "loop": "s of processor time",
    "sleep": "it does not end",
    "segfault": "SIGSEGV",
    "leave": "exit code 0",
    "silent": "empty text",
    "verbose": "refused in 3000 characters",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reader_that_fails_is_noticed(fault):
    limits = {"loop": ["--seconds", "0.5"], "sleep": ["--seconds", "0.5"], "grow": ["--memory", "100"]}
    code, output = run("--count", "5", "--without-torch", "--plant", fault, *limits.get(fault, []))
    assert code == 1, output
    failures = [line for line in output.splitlines() if line.startswith("FAIL")]
    assert len(failures) == 1, output
    assert "FAIL mutant 3 (spec)" in failures[0]
    assert FAULTS[fault] in failures[0]
    assert "--number 3" in output, "how to repeat it"


def test_without_a_fault_the_same_run_passes():
    code, output = run("--count", "5", "--without-torch", "--seconds", "0.5", "--memory", "100")
    assert code == 0, output


def test_a_mutant_follows_from_its_number():
    for number in range(32):
        assert mutant(5, number, torch_too=False) == mutant(5, number, torch_too=False)
    assert mutant(5, 0, torch_too=False) != mutant(6, 0, torch_too=False)
