"""The command line, called in this process as the `ddpmx` script calls it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from ddpmx_cli.main import run


@dataclasses.dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def ddpmx(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """``ddpmx("generate", "-n", 4)`` → exit code, standard output, standard error."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
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
    """Like ``ddpmx``, for bad input: demands exit code 2 and one clear error, and gives what was said."""

    def call(*arguments: object) -> str:
        done = ddpmx(*arguments)
        assert done.code == 2, done
        assert "Traceback" not in done.err
        # flags that click itself refuses come in its own box; everything else is ours
        assert done.err.startswith(("Error: ", "Usage: ")), done.err
        return done.err

    return call
