"""What is imported when: the runtime needs no torch, and the packages depend on each other in one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ddpmx

ROOT = Path(__file__).parents[2]
SOURCES = {
    "ddpmx": ROOT / "runtime" / "ddpmx",
    "ddpm_export": ROOT / "ddpm_export",
    "ddpmx_cli": ROOT / "cli" / "ddpmx_cli",
}
HEAVY = ["torch", "onnx", "onnxruntime", "PIL", "typer", "rich", "safetensors", "diffusers"]


def python(code: str, *args: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_brings_in_nothing_heavy():
    loaded = python(f"import ddpmx, sys; print([name for name in {HEAVY} if name in sys.modules])")
    assert loaded == "[]"


def test_the_runtime_s_modules_bring_in_nothing_heavy():
    """Pictures and onnxruntime are for those who ask for them."""
    modules = ", ".join(
        f"ddpmx.{m}"
        for m in (
            "pipeline",
            "formats.model_file",
            "formats.spec",
            "formats.atomic",
            "sampling.chain",
            "images.writers",
            "images.gallery",
        )
    )
    loaded = python(f"import {modules}, sys; print([name for name in {HEAVY} if name in sys.modules])")
    assert loaded == "[]"


def test_what_is_promised_is_there():
    listed = python(
        "import ddpmx; [getattr(ddpmx, name) for name in ddpmx.__all__]; print(set(ddpmx.__all__) <= set(dir(ddpmx)))"
    )
    assert listed == "True"


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        _ = ddpmx.nothing


def test_images_are_drawn_without_torch_and_onnx(gaussian_onnx):
    pytest.importorskip("onnxruntime", reason="not verified here: drawing without torch (no onnxruntime)")
    code = """
import sys
for name in ("torch", "onnx", "diffusers", "safetensors", "ddpm_export", "ddpmx_cli"):
    sys.modules[name] = None  # importing it raises ImportError
import ddpmx
with ddpmx.load(sys.argv[1]) as pipeline:
    print(pipeline.generate(2, steps=5).shape)
"""
    assert python(code, str(gaussian_onnx)) == "(2, 8, 8, 3)"


def imported(path: Path) -> set[str]:
    """The first names of all modules that a source imports, at its top or anywhere below."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("ddpmx", {"ddpm_export", "ddpmx_cli", "torch", "onnx", "diffusers", "typer", "rich", "sklearn"}),
        ("ddpm_export", {"ddpmx_cli", "typer"}),
    ],
)
def test_packages_depend_in_one_direction(package, forbidden):
    sources = sorted(SOURCES[package].rglob("*.py"))
    assert sources, "nothing was checked"
    assert {str(path): names for path in sources if (names := imported(path) & forbidden)} == {}


def test_the_direction_can_be_broken(tmp_path):
    """The control: an import inside a function is seen too."""
    source = tmp_path / "a.py"
    source.write_text("def f():\n    from ddpm_export.networks.unet import UNet\n    import torch.nn as nn\n")
    assert imported(source) == {"ddpm_export", "torch"}
