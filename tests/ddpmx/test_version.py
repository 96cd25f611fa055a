"""The version stands in one place, ``ddpmx.__version__``: both packages and CMake read it there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import ddpmx

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "runtime" / "native"
PLACE = ROOT / "runtime" / "ddpmx" / "__init__.py"


def test_it_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", ddpmx.__version__)
    assert f'\n__version__ = "{ddpmx.__version__}"\n' in PLACE.read_text(encoding="utf-8")


@pytest.mark.parametrize("project", [ROOT, NATIVE], ids=["ddpmx", "ddpmx-native"])
def test_a_package_reads_it_there(project):
    text = (project / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in text
    assert not re.search(r"^version\s*=", text, re.MULTILINE)
    (path,) = re.findall(r'^(?:path|input) = "([^"]*__init__\.py)"', text, re.MULTILINE)
    assert (project / path).resolve() == PLACE.resolve()


def test_cmake_reads_it_there(tmp_path):
    text = (NATIVE / "CMakeLists.txt").read_text(encoding="utf-8")
    assert "project(ddpmx VERSION ${version} " in text
    if (cmake := shutil.which("cmake") or shutil.which(str(ROOT / ".venv" / "bin" / "cmake"))) is None:
        pytest.skip("not verified here: the version that CMake reads (no CMake)")
    part = text[text.index("set(version_file") : text.index("project(ddpmx")]
    (tmp_path / "version.cmake").write_text(f'{part}\nmessage("version ${{version}}")\n')
    done = subprocess.run([cmake, "-P", tmp_path / "version.cmake"], cwd=NATIVE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == ["version", ddpmx.__version__]
