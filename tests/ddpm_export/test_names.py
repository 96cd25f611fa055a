"""The public names of ``ddpm_export``: imported on first use, and what they say they are."""

from __future__ import annotations

import ast
import importlib

import pytest

import ddpm_export
from docs.reading import ROOT


def test_every_name_is_in_a_module_and_typed_as_it_is_imported():
    tree = ast.parse((ROOT / "ddpm_export" / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddpm_export.")
        for alias in node.names
    }
    assert typed == {name: f"ddpm_export.{module}" for name, module in ddpm_export._MODULES.items()}
    assert sorted(typed) == ddpm_export.__all__


@pytest.mark.torch
@pytest.mark.parametrize("name", ddpm_export.__all__)
def test_a_name_is_what_its_module_has(name):
    pytest.importorskip("torch", reason="not verified here: training and export (no torch)")
    module = importlib.import_module(f"ddpm_export.{ddpm_export._MODULES[name]}")
    assert getattr(ddpm_export, name) is getattr(module, name)


def test_no_other_name():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        ddpm_export.trian  # noqa: B018
