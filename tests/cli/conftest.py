"""The command line, called in this process as its entry point is, and in another one where signals matter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from ddpmx_cli.main import run

PROGRAM = [sys.executable, "-c", "import sys; sys.argv[0] = 'ddpmx'; from ddpmx_cli.main import run; run()"]
"""`ddpmx` for a subprocess, wherever the script itself was installed."""


class Done(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in: what a command writes by default ends up here."""
    path = tmp_path / "work"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def ddpmx(workplace, monkeypatch, capfd) -> Command:
    """``ddpmx("generate", "-n", 3)``: exit code, standard output, standard error."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["ddpmx", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            run()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        return Done(code, *capfd.readouterr())

    return call


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with the content of files."""
    found = sorted(Path(where) / name for where, *names in os.walk(folder) for part in names for name in part)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


@pytest.fixture
def refuses(ddpmx, workplace) -> Command:
    """Call with something bad: one clear error, exit code 2, and the folder is as it was before. Gives the text."""

    def call(*arguments: object) -> str:
        before = tree(workplace)
        done = ddpmx(*arguments)
        assert done.code == 2, done
        assert done.err.startswith("Error: "), done.err
        assert "Traceback" not in done.err + done.out
        assert tree(workplace) == before, "nothing is left behind"
        return done.err

    return call
