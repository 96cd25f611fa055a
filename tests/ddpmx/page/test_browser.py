"""The whole page in Chromium with ONNX Runtime for browsers: the images of ``ddpmx generate``, offline as well."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpmx import load
from ddpmx.models.shipped import find
from ddpmx.page.site import ORT_VERSION, write_site
from ddpmx.sampling import chain
from ddpmx.sampling.request import Sampling
from oracles.browser import Page, served

pytestmark = pytest.mark.long

READY = "document.readyState === 'complete' && document.getElementById('draw')?.disabled === false"
DRAWN = "!document.getElementById('save').disabled"


@pytest.fixture(scope="module")
def ort(tmp_path_factory) -> Path:
    """The files of onnxruntime-web: those of DDPMX_ORT_WEB, or of the npm package."""
    if "DDPMX_ORT_WEB" in os.environ:
        return Path(os.environ["DDPMX_ORT_WEB"])
    folder = tmp_path_factory.mktemp("npm")
    npm = shutil.which("npm")
    package = f"onnxruntime-web@{ORT_VERSION}"
    done = npm and subprocess.run([npm, "pack", package], cwd=folder, capture_output=True, timeout=300, check=False)
    if not done or done.returncode:
        pytest.skip(f"not verified here: the page in a browser (npm pack {package} fails)")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package" / "dist"


def drawn(page: Page) -> np.ndarray:
    """The levels on the canvases."""
    urls = page.run("[...document.querySelectorAll('#field canvas')].map((each) => each.toDataURL())")
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("L")) for url in urls]
    )


def text(page: Page, place: str) -> str:
    return page.run(f"document.getElementById('{place}').textContent")


def test_the_page_draws_what_generate_draws(tmp_path, ort, figure):
    with load("garments") as pipeline:
        wanted = {
            steps: pipeline.generate(4, seed=7, sampling=Sampling.chosen(1000, steps=steps))[..., 0].astype(int)
            for steps in (8, 20)
        }
        x = chain.between(7, 2**63, 0.25, np.arange(4), pipeline.spec.shape)
        between = pipeline.generate(4, seed=7, x=x, sampling=Sampling.chosen(1000, steps=8))[..., 0].astype(int)
    write_site(find("garments"), tmp_path / "site", ort=ort)
    page = Page(tmp_path / "profile")
    try:
        with served(tmp_path / "site") as address:
            page.open(f"{address}#seed=7&n=4&steps=8")
            page.until(READY)
            page.run("document.getElementById('draw').click()")
            page.until(DRAWN)
            apart = np.abs(drawn(page) - wanted[8])
            figure("page against generate, levels apart", apart.max(), at_most=1)
            page.run(
                "(document.getElementById('towards').value = String(2n ** 63n),"
                " document.getElementById('share').value = '0.25',"
                " document.getElementById('share').dispatchEvent(new Event('change')))"
            )
            page.until(DRAWN)
            figure("between two seeds, levels apart", np.abs(drawn(page) - between).max(), at_most=1)
            page.run("(document.getElementById('seed').value = '-1', document.getElementById('draw').click())")
            assert text(page, "fault").startswith("The seed must be a whole number")
            page.until("navigator.serviceWorker.controller !== null")
        # the server is gone: only what the page has kept is left
        page.open(f"{address}?again#seed=7&n=4&steps=20")
        page.until(READY)
        assert page.run("crossOriginIsolated")
        page.run("document.getElementById('draw').click()")
        page.until(DRAWN)
        figure("the same offline, isolated", np.abs(drawn(page) - wanted[20]).max(), at_most=1)
        page.run("(document.getElementById('steps').value = '1000', document.getElementById('draw').click())")
        page.run("document.getElementById('cancel').click()")
        page.until("document.getElementById('status').textContent === 'Cancelled.'")
    finally:
        page.close()
