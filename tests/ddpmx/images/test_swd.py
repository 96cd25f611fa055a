"""The sliced Wasserstein distance, against formulas and what it has to see."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx.errors import InputError
from ddpmx.images.swd import SCALE, Distance, _along, _patches, distance_bound, levels, sliced_wasserstein

RNG = np.random.default_rng(0)


def photos(n, side=32, channels=3, seed=0):
    """Blurred blobs: neighbours resemble each other, as in photos."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, side // 4, side // 4, channels)).astype(np.float64)
    return np.kron(coarse, np.ones((1, 4, 4, 1))).clip(0, 255).astype(np.uint8)


def test_the_distance_along_directions_is_that_of_sorted_values():
    """Of one direction in one dimension it is the Wasserstein distance, which for a shift is the shift."""
    x = RNG.standard_normal((500, 1)).astype(np.float32)
    assert _along(x, x + np.float32(0.3), 1, 0, 0) == pytest.approx(0.3, rel=1e-4)
    assert _along(x, x[::-1].copy(), 5, 0, 0) == 0
    # of N(0, 1) and N(0, σ²) it is |σ − 1|·E|z|; in d dimensions a shift v gives E|⟨u, v⟩|
    wide = _along(x, 2 * x, 1, 0, 0)
    assert wide == pytest.approx(np.abs(x).mean(), rel=1e-4)
    y, v = RNG.standard_normal((400, 3)).astype(np.float32), np.array([0.0, 2.0, 0.0], np.float32)
    assert _along(y, y + v, 4096, 0, 0) == pytest.approx(
        1.0, rel=0.03
    )  # E|u_i| = 1/2 on the sphere in three dimensions


def test_a_pyramid_adds_up_to_its_images():
    images = photos(2, 64)
    parts = list(levels(images))
    assert [part.shape[1] for part in parts] == [64, 32, 16]
    from ddpmx.images.swd import _enlarged

    now = parts[-1]
    for part in parts[-2::-1]:
        now = part + _enlarged(now, part.shape)
    np.testing.assert_allclose(now, images, atol=1e-3)
    flat = list(levels(np.full((1, 64, 64, 3), 77, np.uint8)))
    assert np.abs(flat[0]).max() < 1e-4
    np.testing.assert_allclose(flat[-1], 77, atol=1e-4)


def test_patches_lie_in_their_image_and_depend_on_its_index_alone():
    level = np.arange(3 * 9 * 8, dtype=np.float32).reshape(3, 9, 8, 1)
    cut = _patches(level, 200, 0, 0)
    tops_lefts = {(int(p[0, 0, 0]) % 72 // 8, int(p[0, 0, 0]) % 8) for p in cut}
    assert tops_lefts == {(top, left) for top in range(3) for left in range(2)}
    assert np.all(cut[:, 1, 0, 0] - cut[:, 0, 0, 0] == 8)
    assert np.all(cut[:, 0, 1, 0] - cut[:, 0, 0, 0] == 1)
    np.testing.assert_array_equal(_patches(level[:2], 200, 0, 0), cut[:400])


def test_images_of_one_kind_are_near_and_others_far():
    """Noise is seen at the finest level, another brightness at the coarsest."""
    how = {"patches": 32, "directions": 64}
    reference, same = photos(100, seed=1), photos(100, seed=2)
    floor = sliced_wasserstein(same, reference, **how)
    assert floor.sizes == (32, 16)
    assert floor.images == 100
    assert sliced_wasserstein(reference, reference, **how).distances == (0, 0)
    noisy = np.clip(same + RNG.normal(0, 30, same.shape), 0, 255).astype(np.uint8)
    far = sliced_wasserstein(noisy, reference, **how)
    assert far.distances[0] > 3 * floor.distances[0]
    bright = np.clip(same.astype(int) + 40, 0, 255).astype(np.uint8)
    assert sliced_wasserstein(bright, reference, **how).distances[1] > 3 * floor.distances[1]
    grey = np.repeat(same[..., :1], 3, axis=3)
    assert sliced_wasserstein(grey, reference, **how).mean > 2 * floor.mean
    mixed = sliced_wasserstein(np.concatenate([same[:50], noisy[:50]]), reference, **how)
    assert floor.distances[0] < mixed.distances[0] < far.distances[0]


@pytest.mark.parametrize("side", [7, 8, 16, 20, 64])
def test_no_errors_take_images_further_than_the_bound(side):
    """One brightness more is the worst for the coarsest level: along all directions the whole error counts."""
    rng = np.random.default_rng(side)  # of its own: which tests ran before must not matter
    reference = rng.integers(40, 200, (3, side, side, 3), np.uint8)
    brighter = (reference + 9).astype(np.uint8)
    bound = distance_bound(reference, 9)
    found = sliced_wasserstein(brighter, reference).distances
    assert len(found) == len(bound)
    density = max(1, side / max(side - 6, 7)) if side < 32 else 16 / 10
    assert found[-1] == pytest.approx(bound[-1] / density, rel=0.1)
    middle = reference.copy()
    middle[:, side // 4 : -(side // 4), side // 4 : -(side // 4)] += 20
    for other in (np.clip(reference + rng.normal(0, 15, reference.shape), 0, 255).astype(np.uint8), middle):
        error = np.sqrt(np.mean((other.astype(float) - reference) ** 2))
        most = 1.02 * np.array(distance_bound(reference, error))  # that of all directions, of which some are drawn
        assert np.all(sliced_wasserstein(other, reference).distances <= most)
    assert not np.all(found <= np.array(distance_bound(reference, 2)))  # control


def test_of_the_larger_set_as_many_are_taken():
    one, other = photos(20, seed=1), photos(50, seed=2)
    found = sliced_wasserstein(one, other, patches=8, directions=16)
    assert found == sliced_wasserstein(one, other[np.linspace(0, 49, 20).round().astype(int)], patches=8, directions=16)
    assert found != sliced_wasserstein(one, other, patches=8, directions=16, seed=1)
    assert Distance(1, (32, 16), (1.0, 2.0)).mean == 1.5
    assert SCALE == 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": photos(4)[:0]}, "1 to 16384"),
        ({"images": photos(4).astype(np.float32)}, "must be uint8"),
        ({"images": photos(4)[:, :6]}, "must be uint8"),
        ({"images": photos(4)[0]}, "must be uint8"),
        ({"images": photos(4, 64)}, "differ in size"),
        ({"images": photos(4, channels=1)}, "differ in size"),
        ({"patches": 0}, "patches must be"),
        ({"directions": True}, "directions must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_wrong_input_is_one_clear_error(change, message):
    with pytest.raises(InputError, match=message):
        sliced_wasserstein(**{"images": photos(4), "reference": photos(4, seed=1), **change})
