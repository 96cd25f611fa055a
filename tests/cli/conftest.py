"""The command line, called in this process as the `ddpmx` script calls it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpmx.formats import onnx_file
from ddpmx_cli.main import run
from oracles import conditioning
from tracing import trace_once


@dataclasses.dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def ddpmx(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Done]:
    """``ddpmx("generate", "-n", 4)`` → exit code, standard output, standard error."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        if arguments[:1] == ("export",) and importlib.util.find_spec("torch") is not None:
            trace_once(tmp_path_factory, monkeypatch)
        monkeypatch.setattr("sys.argv", ["ddpmx", *map(str, arguments)])
        try:
            run()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1 if error.code else 0
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(ddpmx: Callable[..., Done]) -> Callable[..., str]:
    """Like ``ddpmx``, for bad input: asserts exit code 2 and one clear error, and returns standard error."""

    def call(*arguments: object) -> str:
        done = ddpmx(*arguments)
        assert done.code == 2, done
        assert "Traceback" not in done.err
        # click prints its own errors in a box; everything else is ours
        assert done.err.startswith(("Error: ", "Usage: ")), done.err
        return done.err

    return call


@pytest.fixture
def conditioned_onnx(tmp_path: Path) -> Callable[..., Path]:
    """``conditioned_onnx("classes")`` → an ONNX file of a toy network of that kind."""

    def make(kind: str, **changes: Any) -> Path:
        spec = conditioning.spec_of(kind, **changes)
        path = tmp_path / f"{kind}.onnx"
        path.write_bytes(conditioning.onnx(spec, metadata=onnx_file.metadata(spec)))
        return path

    return make
