"""The driver, and noise and update on the GPU: NumPy's bits, number for number, after every step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ddpmx.cuda.device_chain import DeviceChain
from ddpmx.errors import BackendError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling.pixels import to_nhwc
from gpu.stand_in import SEED, SPEC, StandIn, factors, scaled, table_of, walk

FAR, LARGEST_SEED = 2**32 - 1, 2**64 - 1
LEARNED = SPEC.replace(variance="learned_range")


def shaped(*shape: int, **more: object) -> ModelSpec:
    return SPEC.replace(shape=shape, **more)


# spec, images, and special options of the chain
CASES = {
    "an odd size": (SPEC, [7, 0, 2], {}),
    "one image": (SPEC, [5], {}),
    "seed 0, image 0": (SPEC, [0], {"seed": 0}),
    "the largest seed and index": (SPEC, [FAR, 0, FAR - 1], {"seed": LARGEST_SEED}),
    "a seed of its upper half alone": (SPEC, [1, 2], {"seed": 1 << 32}),
    "one pixel": (shaped(1, 1, 1), [0, 1, 2], {}),
    "fours": (shaped(3, 8, 8), [0, 1], {}),
    "grey": (shaped(1, 28, 28), [3], {}),
    "with transparency": (shaped(4, 9, 4), [0, 9], {}),
    "a row": (shaped(2, 1, 33), [0, 9, 4], {}),
    "fewer than the batch": (SPEC, [4, 3], {"batch": 8}),
    "a learned variance": (LEARNED, [7, 0, 2], {}),
    "a learned variance, fours": (shaped(3, 8, 8, variance="learned_range"), [FAR, 1], {"seed": LARGEST_SEED}),
    "the smaller variance": (SPEC.replace(variance="fixed_small"), [1, 2], {}),
    "no clipping": (SPEC.replace(clip=None), [1, 2], {}),
    "ddim": (SPEC, [1, 2], {"sampler": "ddim"}),
    "ddim with noise": (SPEC, [1, 2], {"sampler": "ddim", "eta": 0.7}),
    "one x0 remembered": (SPEC, [1, 2], {"sampler": "dpmpp_2m"}),
    "two remembered": (SPEC, [1, 2, 3], {"sampler": "unipc"}),
    "cosine": (ModelSpec(SPEC.shape, schedule="cosine", ddpmx="0.1.0"), [1, 2], {}),
    "x0 predicted": (SPEC.replace(prediction="x0"), [1, 2], {}),
    "v predicted": (SPEC.replace(prediction="v"), [1, 2], {}),
}


def chain_of(device: StandIn, kernels: object, batch: int, table: object, *, with_x0: bool = False) -> DeviceChain:
    spec = device.spec
    return DeviceChain(
        device.driver, kernels, spec.shape, batch, table, clip=spec.clip, with_x0=with_x0, description="the stand-in"
    )


def bound(chain: DeviceChain, device: StandIn, batch: int) -> object:
    return device.network(batch, x=chain.x, t=chain.t, out=chain.out, var=chain.var, stream=chain.stream).enqueue


def test_the_driver_compiles_the_kernels_for_this_gpu(driver, loaded):
    assert loaded.begin
    assert loaded.step
    major, minor = map(int, driver.cuda.split("."))
    if (major, minor) < (12, 4):
        pytest.skip(f"not verified here: the kernel of WHILE nodes (the driver is for CUDA {driver.cuda})")
    with driver.current():
        assert loaded.condition()


def test_invalid_ptx_is_refused_with_the_compiler_s_log(driver):
    with driver.current(), pytest.raises(BackendError, match="compiling nonsense for this GPU") as caught:
        driver.module(b".version 6.3\n.target sm_75\n.address_size 64\nnonsense;\n\0", "nonsense")
    assert "cuModuleLoadDataEx: " in caught.value.note


def test_the_error_for_exhausted_memory(driver):
    with driver.current():
        _, total = driver.free_memory()
        with pytest.raises(BackendError, match=r"CUDA_ERROR_OUT_OF_MEMORY.*for too much") as caught:
            driver.allocate(2 * total + (1 << 40), "too much")
    assert "smaller batch" in caught.value.hint


def test_copies_reach_memory_and_return(driver):
    values = np.random.default_rng(0).integers(0, 256, 100_003, np.uint8)
    back = np.zeros_like(values)
    with driver.current(), driver.stream() as stream:
        a, b = (driver.allocate(values.nbytes, "a copy") for _ in range(2))
        driver.copy_in(a.value, values, stream.value)
        driver.copy(b.value, a.value, values.nbytes, stream.value)
        driver.copy_out(back, b.value, stream.value)
        driver.wait_for_stream(stream.value)
    assert back.tobytes() == values.tobytes()


def test_the_stand_in_equals_its_twin(driver):
    """All other tests compare with the twin."""
    device, batch = StandIn(driver), 3
    x = np.random.default_rng(0).standard_normal((batch, *SPEC.shape)).astype(np.float32)
    t, out = np.array([0, 999, 500], np.int32), np.zeros_like(x)
    with driver.current(), driver.stream() as stream:
        at = [driver.allocate(array.nbytes, "an array") for array in (x, t, out)]
        for handle, array in zip(at, (x, t, out), strict=True):
            driver.copy_in(handle.value, array, stream.value)
        network = device.network(batch, x=at[0].value, t=at[1].value, out=at[2].value, stream=stream.value)
        network.enqueue(stream.value)
        driver.copy_out(out, at[2].value, stream.value)
        driver.wait_for_stream(stream.value)
    assert out.tobytes() == scaled(x, t, factors(SPEC)).tobytes()
    device.close()


@pytest.mark.parametrize("case", CASES)
def test_every_step_has_numpy_s_bits(driver, loaded, case):
    spec, indices, special = CASES[case]
    sampling = {name: special[name] for name in ("sampler", "eta") if name in special}
    seed, batch = special.get("seed", SEED), special.get("batch", len(indices))
    table = table_of(spec, **sampling)
    theirs = walk(indices, spec=spec, table=table, seed=seed)
    device = StandIn(driver, spec)
    with chain_of(device, loaded, batch, table, with_x0=True) as chain:
        chain.prepare(bound(chain, device, batch), "plain")
        for number, (step, expected) in enumerate(
            zip(chain.steps(seed=seed, images=indices), theirs, strict=True), start=1
        ):
            assert step.t == expected.t
            for name in ("x", "x0", "x_next"):
                mine, wanted = getattr(step, name), getattr(expected, name)
                differing = int(np.sum(mine.view(np.uint32) != wanted.view(np.uint32)))
                assert differing == 0, f"step {number}: {differing} of {wanted.size} numbers of {name} differ"
        pixels = chain.run(seed=seed, images=indices)
    wanted = to_nhwc(theirs[-1].x0)
    assert int(np.sum(pixels != wanted)) == 0, "the images differ"
    device.close()


def test_a_large_batch_has_numpy_s_bits(driver, loaded, many_images):
    """More blocks than fit on the GPU at once, so that each thread takes several fours."""
    spec, indices = shaped(3, 32, 32), list(range(many_images))
    device = StandIn(driver, spec, largest=many_images)
    with chain_of(device, loaded, many_images, table_of(spec)) as chain:
        chain.prepare(bound(chain, device, many_images), "plain")
        pixels = chain.run(seed=SEED, images=indices)
    assert int(np.sum(pixels != to_nhwc(walk(indices, spec=spec)[-1].x0))) == 0
    device.close()


def test_a_chain_may_start_from_the_caller_s_x(driver, loaded, noise):
    device, n = StandIn(driver), len(noise)
    with chain_of(device, loaded, n, table_of()) as chain:
        chain.prepare(bound(chain, device, n), "plain")
        pixels = chain.run(seed=SEED, images=range(n), x=noise)
    wanted = to_nhwc(walk(range(n), x=noise)[-1].x0)
    assert pixels.tobytes() == wanted.tobytes()
    device.close()


def test_all_256_levels_round_trip(driver, loaded):
    """uint8 = floor(127.5·x + 128) of the last x̂_0, which is x itself where p = 1 and q = 0."""
    spec = shaped(1, 16, 16)
    x = ((np.arange(256, dtype=np.float32) / np.float32(127.5)) - 1).reshape(1, 1, 16, 16)
    table = table_of(spec, steps=1)
    rows = np.array([[1, 0, 1, 0, 0]], np.float64)
    table = dataclasses.replace(table, rows=rows)
    device = StandIn(driver, spec)
    with chain_of(device, loaded, 1, table) as chain:
        chain.prepare(bound(chain, device, 1), "plain")
        pixels = chain.run(seed=0, images=[0], x=x)
    assert pixels.reshape(-1).tolist() == list(range(256))
    device.close()
