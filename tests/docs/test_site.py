"""`make docs`: the site builds, a dead link stops it, and its pages load nothing from other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.reading import ROOT

pytest.importorskip("mkdocs", reason="not verified here: the site of the documentation (no mkdocs)")

pytestmark = pytest.mark.slow

SETTINGS = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def mkdocs(settings: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs. (With --quiet, mkdocs does not count warnings.)"""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(settings), "-d", str(site)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = mkdocs(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_site(site):
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert [str(page) for page in pages if not (site / page).exists()] == []


def test_a_link_that_leads_out_of_the_pages_is_text_with_the_path(site):
    assert "<code>tests/gpu/README.md</code>" in (site / "verification.html").read_text(encoding="utf-8")


def test_pages_load_nothing_from_other_hosts(site):
    found = []
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        found += re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*", text)
        found += re.findall(r"<link\b(?![^>]*rel=\"canonical\")[^>]*\bhref=[\"']?(?:https?:)?//[^>]*", text)
    for path in site.rglob("*.css"):
        found += re.findall(r"url\([\"']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*", path.read_text(encoding="utf-8"))
    assert found == []
    assert len(list(site.rglob("*.html"))) >= 20


def test_docstrings_have_become_links(site):
    text = (site / "api" / "ddpmx.html").read_text(encoding="utf-8")
    assert ":class:`" not in text
    assert ":meth:`" not in text
    assert 'href="sampling.html#ddpmx.sampling.request.Sampling"' in text


GOOD = ["[a](b.md)", "[a](../README.md)", "![a](../examples/fashion_mnist/grid.png)"]
DEAD = ["[a](nothing.md)", "[a](b.md#nowhere)", "[a](../no_readme.md)", "![a](../examples/no_grid.png)"]


@pytest.mark.parametrize(("links", "warnings"), [(GOOD, 0), (DEAD, len(DEAD))], ids=["good", "dead"])
def test_a_dead_link_stops_it(links, warnings, tmp_path):  # control
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A page\n\n" + "\n\n".join(links) + "\n")
    (tmp_path / "docs" / "b.md").write_text("# Another\n")
    settings = SETTINGS[: SETTINGS.index("\nnav:")] + "\nnav: [index.md, b.md]\n"
    (tmp_path / "mkdocs.yml").write_text(settings.replace("[.ci/", f"[{ROOT}/.ci/"))
    done = mkdocs(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert (done.returncode != 0) == (warnings > 0), done.stderr
    assert done.stderr.count("WARNING") == warnings, done.stderr
