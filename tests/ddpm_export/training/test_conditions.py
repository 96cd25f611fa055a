"""One condition image for each image, of the same part of the scene, and every one that lacks a partner named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training.data import Dataset, Source, load_dataset, load_source
from ddpmx.errors import DataError, DdpmxError, FileFormatError

pytestmark = pytest.mark.torch
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (3, 16, 12, 3), np.uint8)
GREY = RNG.integers(0, 256, (3, 16, 12), np.uint8)


def put(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    images, conditions = tmp_path / "images", tmp_path / "conditions"
    for index, name in enumerate(("a", "sub/b", "c.d")):
        put(images / f"{name}.bmp", COLOUR[index])
        put(conditions / f"{name}.png", GREY[index])
    return images, conditions


def refusal(data: Path, condition: Path, **how) -> DdpmxError:
    with pytest.raises(DdpmxError) as caught:
        load_dataset(data, condition=condition, **how)
    return caught.value


def test_a_folder_is_paired_by_names(pair):
    dataset = load_dataset(pair[0], condition=pair[1])
    assert dataset.conditions is not None
    assert dataset.conditions.channels == 1
    assert np.array_equal(dataset.images, COLOUR[[0, 2, 1]]), "a, c.d, sub/b"
    indices = np.array([2, 0, 0])
    assert np.array_equal(dataset.take(indices), COLOUR[[1, 0, 0]])
    assert np.array_equal(dataset.conditions.take(indices), GREY[[1, 0, 0], ..., None])
    put(pair[1] / "a.png", COLOUR[0])
    dataset = load_dataset(pair[0], condition=pair[1])
    assert dataset.conditions is not None
    assert dataset.conditions.channels == 3, "one of them has colours"


def test_all_without_a_partner_are_named_at_once(pair):
    images, conditions = pair
    (conditions / "a.png").unlink()
    (conditions / "sub" / "b.png").rename(conditions / "b.png")
    put(conditions / "c.d.bmp", GREY[0])
    error = refusal(*pair)
    assert sorted(error.items) == [
        "a: no condition image",
        "b: no image",
        "c.d: 2 condition images of that name",
        "sub/b: no condition image",
    ]
    put(images / "a.png", COLOUR[0])
    assert "a: 2 images of that name" in refusal(*pair).items


def test_a_smaller_condition_is_enlarged_bicubic_over_the_same_part(tmp_path):
    """A linear ramp is what a cubic filter keeps: the enlarged condition lies on the image, cropping included."""
    x = np.arange(64, dtype=np.float64)[None] + 0.5
    wide = np.repeat(x / 64 * 240, 32, axis=0)  # 32×64, of which 32×32 in the middle are taken
    put(tmp_path / "images" / "a.png", wide.round().astype(np.uint8))
    put(tmp_path / "small" / "a.png", wide.reshape(8, 4, 16, 4).mean((1, 3)).round().astype(np.uint8))
    dataset = load_dataset(tmp_path / "images", condition=tmp_path / "small", size=(32, 32))
    assert dataset.conditions is not None
    image, condition = dataset.images[0, ..., 0], dataset.conditions.take(np.array([0]))[0, ..., 0]
    assert condition.shape == (32, 32)
    assert np.abs(image.astype(int) - condition).max() <= 1
    assert "condition images: 1 of 1 are smaller (8×16) and enlarged to 32×32, bicubic" in dataset.notes
    uneven = GREY[0][:6]  # no longer linear, so that the two filters differ
    put(tmp_path / "small" / "a.png", uneven)
    dataset = load_dataset(tmp_path / "images", condition=tmp_path / "small", size=(32, 32))
    assert dataset.conditions is not None
    condition = dataset.conditions.take(np.array([0]))[0, ..., 0]
    small, box = Image.fromarray(uneven), (3, 0, 9, 6)
    assert np.array_equal(condition, np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC, box)))
    assert not np.array_equal(condition, np.asarray(small.resize((32, 32), Image.Resampling.LANCZOS, box))), "control"


def test_a_condition_of_another_shape_is_refused(pair):
    put(pair[1] / "a.png", GREY[0][:8])
    error = refusal(*pair, size=(8, 8))
    assert error.items == ("a.png: 8×12 for an image of 16×12",)
    put(pair[1] / "a.png", GREY[0][::4, ::4])
    load_dataset(*pair[:1], condition=pair[1], size=(8, 8))


def test_damaged_conditions_are_named(pair):
    for name in ("a", "c.d"):
        file = pair[1] / f"{name}.png"
        file.write_bytes(file.read_bytes()[:60])
    assert [item.split(":")[0] for item in refusal(*pair).items] == ["a.png", "c.d.png"]


def test_folders_in_one_another_are_refused(pair):
    assert "lie in one another" in refusal(pair[0], pair[0] / "sub").fact
    assert "lie in one another" in refusal(pair[0] / "sub", pair[0]).fact
    assert "no folder" in refusal(pair[0], pair[0] / "a.bmp").fact


@pytest.mark.parametrize("within", [True, False])
def test_conditions_of_an_npz(tmp_path, within):
    arrays = {"images": COLOUR, "cond": GREY} if within else {"images": COLOUR}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", depth=GREY)
    dataset = load_dataset(tmp_path / "a.npz", condition=tmp_path / ("a.npz" if within else "b.npz"))
    assert np.array_equal(dataset.images, COLOUR)
    assert dataset.conditions is not None
    assert np.array_equal(dataset.conditions.take(np.array([2, 1])), GREY[[2, 1], ..., None])


def test_conditions_of_an_npz_may_be_smaller(tmp_path):
    np.savez(tmp_path / "a.npz", images=COLOUR, cond=COLOUR[:, ::4, ::4])
    dataset = load_dataset(tmp_path / "a.npz", condition=tmp_path / "a.npz")
    assert dataset.conditions is not None
    wanted = Image.fromarray(COLOUR[1, ::4, ::4]).resize((12, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(dataset.conditions.take(np.array([1]))[0], np.asarray(wanted))
    assert any("3 of 3 are smaller (4×3)" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("cond", "says"),
    [
        (GREY[:2], "2 condition images"),
        (np.dstack([COLOUR[0], GREY[0]])[None].repeat(3, 0), "of 4 channels"),
        (GREY[:, :8], "8×12 for images of 16×12"),
        (GREY / 255, "is float64"),
        (None, "no array 'cond'"),
    ],
)
def test_conditions_of_an_npz_that_do_not_fit(tmp_path, cond, says):
    np.savez(tmp_path / "a.npz", images=COLOUR, **({} if cond is None else {"cond": cond}))
    assert says in str(refusal(tmp_path / "a.npz", tmp_path / "a.npz"))


def test_an_npz_needs_an_npz(pair, tmp_path):
    np.savez(tmp_path / "a.npz", images=COLOUR)
    error = refusal(tmp_path / "a.npz", pair[1])
    assert isinstance(error, DataError)
    assert "are an array as well" in error.fact


@pytest.mark.parametrize("bits", [10, 16])
def test_a_run_remembers_conditions_and_their_white(pair, bits):
    """Depth has more than 8 bits, and photos have not: each has its own white."""
    depth = (GREY.astype(np.uint16) << 8 | GREY) >> (16 - bits)
    for index, name in enumerate(("a", "sub/b", "c.d")):
        put(pair[1] / f"{name}.png", depth[index])
    dataset = load_dataset(pair[0], condition=pair[1])
    assert dataset.conditions is not None
    taken = dataset.conditions.take(np.array([0]))[0, ..., 0]
    assert np.abs(taken.astype(int) - GREY[0]).max() <= 1
    assert (dataset.source.white, dataset.source.condition_white) == (None, 2**bits - 1)
    assert any(note.startswith("condition images: greys of more than 8 bits in 3 of 3") for note in dataset.notes)
    source = Source.from_json(json.loads(json.dumps(dataset.source.to_json())), "run")
    assert source == dataset.source
    assert load_source(source).fingerprint() == dataset.fingerprint() != load_dataset(pair[0]).fingerprint()
    halved = load_dataset(pair[0], condition=pair[1], white=2 * (2**bits - 1))
    assert halved.conditions is not None
    assert np.abs(halved.conditions.take(np.array([0]))[0, ..., 0] - taken / 2).max() <= 1
    assert load_source(halved.source).fingerprint() == halved.fingerprint()
    with pytest.raises(FileFormatError):
        Source.from_json(source.to_json() | {"condition": 3}, "run")


def test_the_fingerprint_is_of_conditions_too(tmp_path):
    def fingerprint(conditions: np.ndarray | None) -> str:
        return Dataset(COLOUR, Source(tmp_path), conditions=conditions).fingerprint()

    assert fingerprint(GREY[..., None]) == fingerprint(GREY[..., None].copy())
    assert len({fingerprint(None), fingerprint(GREY[..., None]), fingerprint(GREY[::-1, ..., None])}) == 3


def test_export_takes_images_alone(pair):
    """`ddpmx export --data FOLDER` needs neither labels nor conditions of it."""
    recorded = load_dataset(pair[0], condition=pair[1]).source
    assert recorded.images_alone() == Source(pair[0])
    assert dataclasses.replace(recorded, classes=True).images_alone() == Source(pair[0])
