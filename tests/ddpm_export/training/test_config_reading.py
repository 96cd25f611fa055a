"""How images are read is in a run's config.toml, and read from there again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: training (no torch)")

from ddpm_export.training.api import reading_of, train
from ddpm_export.training.config import read_config
from ddpm_export.training.images.source import Source
from ddpm_export.training.train import recorded_source
from ddpmx.errors import InputError

pytestmark = pytest.mark.torch

SMALL = {"width": 8, "groups": 4, "mult": (1,), "blocks": 1, "attention": (), "batch": 2, "timesteps": 20, "steps": 1}


def test_a_run_with_conditions_is_begun_again_by_its_file(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("images", "marks"):
        (tmp_path / folder).mkdir()
        for i in range(4):
            mode = "RGBA" if folder == "images" else "L"
            shape = (8, 8, 4) if folder == "images" else (8, 8)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"none")
    (tmp_path / "marks" / "broken.png").write_bytes(b"none")
    how = {"condition": tmp_path / "marks", "background": (1, 2, 3), "skip_broken": True, "max_pixels": 12345}
    first = train(tmp_path / "images", tmp_path / "a", preset="tiny", channels=3, device="cpu", reading=how, **SMALL)
    again = train(tmp_path / "images", tmp_path / "b", config=first.path / "config.toml", device="cpu")
    assert recorded_source(again.path) == recorded_source(first.path)
    assert recorded_source(again.path).condition == (tmp_path / "marks").resolve()
    assert (again.checkpoint / "ema.safetensors").read_bytes() == (first.checkpoint / "ema.safetensors").read_bytes()


def test_every_argument_of_reading_survives_the_file(tmp_path):
    source = Source(tmp_path, background=(0, 128, 255), white=4095, max_pixels=178_000_001, skip_broken=True)
    lines = [
        f"{name.replace('_', '-')} = {str(value).lower() if value is True else repr(value)}"
        for name, value in source.to_config().items()
    ]
    (tmp_path / "c.toml").write_text("\n".join(lines).replace("'", '"'))
    assert dataclasses.replace(Source(tmp_path), **reading_of(read_config(tmp_path / "c.toml"))) == source
    assert Source(tmp_path).to_config() == reading_of({}) == {}


@pytest.mark.parametrize("line", ['background = "no colour"', 'background = "#11223344"', "max-megapixels = 0"])
def test_what_cannot_be_is_refused_with_the_file_s_name(tmp_path, line):
    (tmp_path / "c.toml").write_text(line)
    with pytest.raises(InputError, match=r"c\.toml: (background|max_megapixels) must be"):
        reading_of(read_config(tmp_path / "c.toml"))


def test_a_path_is_relative_to_the_file(tmp_path):
    (tmp_path / "c.toml").write_text('condition = "marks"')
    assert reading_of(read_config(tmp_path / "c.toml")) == {"condition": str(tmp_path / "marks")}
