"""The GPU's kernels without a GPU: their source runs on the CPU and gives NumPy's bits, and their PTX is of that source.

Only a GPU can show that it computes IEEE + − × √ and integers as documented, and that its driver accepts the PTX.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ddpmx
from ddpmx.cuda import layout, make_ptx
from ddpmx.cuda.layout import EACH, Call, Chain, Control, Done, Each
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import NumericError
from ddpmx.sampling import chain
from ddpmx.sampling.guidance import Guidance
from oracles import cuda_on_host, gaussian, ptx
from oracles.cuda_on_host import Device, Toy, first_difference, same_bits

pytestmark = pytest.mark.slow  # nothing here depends on Python's version, so one run is enough

SOURCES = Path(ddpmx.__file__).parent / "cuda"
CACHE = Path(__file__).parents[3] / ".cache"
SCHEDULE = gaussian.SPEC.make_schedule()
ODD = (3, 5, 7)  # 105 elements: the last four of an image are one
EVEN = (4, 4, 4)


def kernels_of(folder, sources=SOURCES, flags=cuda_on_host.STRICT):
    try:
        return cuda_on_host.build(folder, sources, flags)
    except cuda_on_host.Unavailable as why:
        pytest.skip(f"not verified here: that the CUDA kernels give the bits of NumPy ({why})")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return kernels_of(tmp_path_factory.mktemp("kernels"))


def table_of(sampler="ancestral", steps=12, variance="fixed_small", **more):
    return make_table(SCHEDULE, "eps", variance, sampler=sampler, steps=steps, **more)


# --- the numbers -----------------------------------------------------------------------------------------------------

FAR = 2**32 - 1
LEARNED = {"variance": "learned_range"}
GUIDED = {"guidance": Guidance(2.3, 5), "labels": [1, 4, 0], "indices": [FAR, 0, 7]}
TWO_M, UNIPC = {"sampler": "dpmpp_2m"}, {"sampler": "unipc", "spacing": "logsnr"}
ONE_GUIDED = {"guidance": Guidance(-0.7, 5), "labels": [3], "indices": [3]}
CHAINS = {
    "one image": {},
    "three images": {"indices": [7, 0, 2]},
    "five images, far seeds and indices": {"indices": [FAR, 0, FAR - 1, 2**31, 12], "seed": 2**64 - 3},
    "seed above 2^32": {"indices": [1, 2], "seed": 2**32 + 1},
    "one thread": {"indices": [3, 4], "grid": 1, "block": 1},
    "more threads than elements": {"indices": [3, 4, 5], "grid": 5, "block": 256},
    "more blocks than work": {"indices": [3], "grid": 40, "block": 32},
    "uneven grid": {"indices": [3, 4, 5], "grid": 7, "block": 3},
    "four at a time": {"shape": EVEN, "indices": [3, 4, 5]},
    "four elements, not aligned": {"shape": EVEN, "indices": [3, 4, 5], "offset": 1},
    "less than four elements": {"shape": (3, 1, 1), "indices": [3, 4, 5]},
    "ddim": {"indices": [0, 1], "sampler": "ddim"},
    "ddim with noise": {"indices": [0, 1], "sampler": "ddim", "eta": 0.5},
    "no clipping": {"indices": [0, 1], "clip": None},
    "tight clipping": {"indices": [0, 1], "clip": 0.25},
    "one step": {"indices": [0, 1], "steps": 1},
    "without x0": {"indices": [0, 1], "with_x0": False},
    "threads in another order": {"indices": [0, 1, 2], "order": 1, "grid": 5, "block": 16},
    "threads in yet another order": {"indices": [0, 1, 2], "order": 9**9, "grid": 2, "block": 64},
    "all 1000 steps": {"indices": [5, 6], "steps": None, "shape": (3, 3, 3)},
    "learned": {**LEARNED, "indices": [FAR, 0, 7], "seed": 2**64 - 3},
    "learned, one image, one thread": {**LEARNED, "grid": 1, "block": 1},
    "learned, four at a time": {**LEARNED, "shape": EVEN, "indices": [3, 4, 5]},
    "learned, four elements, not aligned": {**LEARNED, "shape": EVEN, "indices": [3, 4], "offset": 1},
    "learned, v alone not aligned": {**LEARNED, "shape": EVEN, "indices": [3, 4], "var_offset": 2},
    "learned, less than four elements": {**LEARNED, "shape": (3, 1, 1), "indices": [3, 4, 5]},
    "learned, no clipping, without x0": {**LEARNED, "indices": [0, 1], "clip": None, "with_x0": False},
    "learned, threads in another order": {**LEARNED, "indices": [0, 1, 2], "order": 1, "grid": 5, "block": 16},
    "learned, one step": {**LEARNED, "indices": [0, 1], "steps": 1},
    "learned, all 1000 steps": {**LEARNED, "indices": [5, 6], "steps": None, "shape": (3, 3, 3)},
    "learned, not by ddim": {**LEARNED, "indices": [0, 1], "sampler": "ddim", "eta": 1.0},
    "guided": {**GUIDED, "seed": 2**64 - 3},
    "guided, one image, one thread": {**ONE_GUIDED, "grid": 1, "block": 1},
    "guided, four at a time": {**GUIDED, "shape": EVEN},
    "guided, four elements, not aligned": {**GUIDED, "shape": EVEN, "offset": 1},
    "guided, less than four elements": {**GUIDED, "shape": (3, 1, 1)},
    "guided, no clipping, without x0": {**GUIDED, "clip": None, "with_x0": False},
    "guided, threads in another order": {**GUIDED, "order": 1, "grid": 5, "block": 16},
    "guided, ddim": {**GUIDED, "sampler": "ddim"},
    "guided, learned": {**GUIDED, **LEARNED},
    "one x0 remembered": {**TWO_M, "indices": [FAR, 0, 7]},
    "two remembered": {**UNIPC, "indices": [FAR, 0, 7]},
    "two remembered, one image, one thread": {**UNIPC, "grid": 1, "block": 1},
    "one remembered, four at a time": {**TWO_M, "shape": EVEN, "indices": [3, 4, 5]},
    "two remembered, four at a time": {**UNIPC, "shape": EVEN, "indices": [3, 4, 5]},
    "two remembered, not aligned": {**UNIPC, "shape": EVEN, "indices": [3, 4], "offset": 1},
    "two remembered, the last alone not aligned": {**UNIPC, "shape": EVEN, "indices": [3, 4], "ago_offset": 2},
    "two remembered, less than four elements": {**UNIPC, "shape": (3, 1, 1), "indices": [3, 4, 5]},
    "two remembered, no clipping": {**UNIPC, "indices": [0, 1], "clip": None},
    "two remembered, tight clipping": {**UNIPC, "indices": [0, 1], "clip": 0.25},
    "two remembered, threads in another order": {**UNIPC, "indices": [0, 1, 2], "order": 1, "grid": 5, "block": 16},
    "two remembered, two steps": {**UNIPC, "indices": [0, 1], "steps": 2},
    "two remembered, one step": {**UNIPC, "indices": [0, 1], "steps": 1},
    "two remembered, all 1000 steps": {**UNIPC, "indices": [5, 6], "steps": None, "shape": (3, 3, 3)},
    "guided, one remembered": {**GUIDED, **TWO_M},
    "guided, two remembered": {**GUIDED, **UNIPC},
    "guided, two remembered, four at a time": {**GUIDED, **UNIPC, "shape": EVEN},
    "guided, learned, four at a time": {**GUIDED, **LEARNED, "shape": EVEN},
}


def compare(kernels, *, shape=ODD, indices=(5,), seed=0, clip=1.0, **more):
    sampling = {name: more.pop(name) for name in ("sampler", "steps", "spacing", "eta", "variance") if name in more}
    table, launch = table_of(**sampling), more
    guided = {name: more.pop(name) for name in ("guidance", "labels") if name in more}
    device = Device(kernels, table, shape, seed=seed, images=indices, clip=clip, **guided, **launch)
    return first_difference(device, table, shape, seed=seed, indices=indices, clip=clip, **guided)


@pytest.mark.parametrize("case", CHAINS)
def test_a_chain_has_numpy_s_bits(kernels, case):
    assert compare(kernels, **CHAINS[case]) is None


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_other_predictions_differ_in_the_table_s_numbers_alone(kernels, prediction):
    table = make_table(SCHEDULE, prediction, "fixed_large", steps=5)
    device = Device(kernels, table, ODD, seed=1, images=[2, 3])
    assert first_difference(device, table, ODD, seed=1, indices=[2, 3]) is None


def test_a_chain_may_start_from_the_caller_s_x(kernels):
    table = table_of()
    device = Device(kernels, table, ODD, seed=1, images=[2, 3])
    device.chain.flags = layout.KEEP_X
    device.x[...] = x = np.random.default_rng(0).standard_normal(device.x.shape).astype(np.float32)
    *_, step = chain.run(Toy(ODD), table, x, seed=1, images=np.array([2, 3]))
    counts = device.run(Toy(ODD))
    assert next(counts) == 0
    assert same_bits(device.x, x)
    assert list(counts)[-1] == len(table)
    assert same_bits(device.x, step.x_next)


# (file, the right code, the mistake in its place): the comparison above has to notice each
MISTAKES = {
    "fused": (
        "step.h",
        "DDPMX_ADD(DDPMX_MUL(row.a, *x0), DDPMX_MUL(row.b, x))",
        "fmaf(row.a, *x0, DDPMX_MUL(row.b, x))",
    ),
    "another order of the sum": (
        "step.h",
        "row.sigma != 0.0f ? DDPMX_ADD(mean, DDPMX_MUL(row.sigma, z)) : mean",
        "DDPMX_ADD(DDPMX_MUL(row.a, *x0), DDPMX_ADD(DDPMX_MUL(row.b, x), DDPMX_MUL(row.sigma, z)))",
    ),
    "half the seed": ("step.cu", "seed = chain->seed", "seed = (ddpmx_u32)chain->seed"),
    "the place instead of the image": ("step.cu", "images[four.image], (ddpmx_u32)now", "four.image, (ddpmx_u32)now"),
    "the step instead of the timestep": ("step.cu", "(ddpmx_u32)now", "(ddpmx_u32)step"),
    "the initial noise again": ("step.cu", "DDPMX_PURPOSE_STEP", "DDPMX_PURPOSE_INITIAL"),
    "all elements alike": ("step.cu", "output[k], z[k]", "output[k], z[0]"),
    "t stays": ("step.cu", "t[four.image] = next", "t[four.image] = now"),
    "NCHW": ("step.cu", "pixel * channels + channel", "channel * pixels + pixel"),
    "images too early": ("step.cu", "image_bytes = last ?", "image_bytes = 1 ?"),
    "beyond the end": ("fours.h", "      if (k < count) to[k]", "      to[k]"),
    "a grid of the right size": ("step.cu", "index += ddpmx_threads()", "index = fours"),
    "counters left as they are": ("step.cu", "chain->arrived = 0;\n  chain->step", "chain->step"),
    "no barrier": ("step.cu", "  __syncthreads();\n", ""),
    "the first block closes": ("step.cu", "+ 1 != gridDim.x", "!= 0"),
    "one v for four": ("step.cu", "learned, v[k]", "learned, v[0]"),
    "one range for all steps": ("step.cu", "chain->learned)[step]", "chain->learned)[0]"),
    "a fused exponent": ("step.h", "DDPMX_ADD(learned.c, DDPMX_MUL(learned.d, v))", "fmaf(learned.d, v, learned.c)"),
    "another exponential": ("step.h", "return DDPMX_MUL(y, ddpmx_float((ddpmx_i32)power))", "return expf(x)"),
    "no exponential": ("step.h", "row.sigma = ddpmx_exp(", "row.sigma = ("),
    "a fused guidance": (
        "step.h",
        "DDPMX_ADD(without, DDPMX_MUL(scale, DDPMX_ADD(with_class, -without)))",
        "fmaf(scale, DDPMX_ADD(with_class, -without), without)",
    ),
    "the two rows exchanged": (
        "step.cu",
        "ddpmx_guide(chain->guidance, output[k], without[k])",
        "ddpmx_guide(chain->guidance, without[k], output[k])",
    ),
    "the other row of another image": ("step.cu", "ddpmx_load(out + half + four.at", "ddpmx_load(out + half"),
    "x of the first row alone": ("step.cu", "ddpmx_store(here, four.count, wide, x + half + four.at);", ""),
    "x0 of the first row alone": ("step.cu", "if (x0) ddpmx_store(lead, four.count, wide, x0 + half + four.at);", ""),
    "t of the first row alone": ("step.cu", "t[chain->B + four.image] = next", "t[four.image] = next"),
    "nothing remembered": ("step.cu", "here[k] = ddpmx_recall(memory, here[k], one[k], two[k]);", "(void)memory;"),
    "one x0 for four": ("step.cu", "one[k], two[k]", "one[0], two[k]"),
    "what is remembered, exchanged": ("step.cu", "one[k], two[k]", "two[k], one[k]"),
    "nothing handed on": ("step.cu", "ddpmx_store(one, four.count, wide, two_ago + four.at);", ""),
    "one memory for all steps": ("step.cu", "chain->memory)[chain->step]", "chain->memory)[0]"),
    "the last x0 not kept": ("step.cu", "ddpmx_store(one, four.count, wide, one_ago + four.at);", ""),
    "x remembers in the first row alone": (
        "step.cu",
        "if (chain->guided) ddpmx_store(here,",
        "if (0) ddpmx_store(here,",
    ),
    "a fused memory": ("step.h", "DDPMX_ADD(x, DDPMX_MUL(memory.c, one_ago))", "fmaf(memory.c, one_ago, x)"),
    "another fused memory": ("step.h", "DDPMX_ADD(x, DDPMX_MUL(memory.d, two_ago))", "fmaf(memory.d, two_ago, x)"),
    "x_T of the first row alone": ("step.cu", "if (guided) ddpmx_store(z,", "if (0) ddpmx_store(z,"),
}
NOTICING = (
    *("five images, far seeds and indices", "threads in another order", "uneven grid", "learned", "guided"),
    *("two remembered", "guided, two remembered"),
)


def mistaken(folder, file, right, wrong):
    """The sources with one mistake, at every place where it applies."""
    for source in SOURCES.iterdir():
        if source.suffix in (".h", ".cu"):
            shutil.copy(source, folder)
    text = (folder / file).read_text()
    assert right in text, "the mistake cannot be made any more"
    (folder / file).write_text(text.replace(right, wrong))
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices_mistakes(tmp_path, mistake):
    """The control. Warnings are off, since some mistakes leave something unused."""
    kernels = kernels_of(tmp_path, mistaken(tmp_path, *MISTAKES[mistake]), ("-O1", "-ffp-contract=off", "-w"))
    assert any(compare(kernels, **CHAINS[case]) for case in NOTICING)


def test_the_comparison_notices_contraction(tmp_path):
    kernels = kernels_of(tmp_path, flags=("-O2", "-march=native", "-ffp-contract=fast"))
    if not kernels.has_fma():
        pytest.skip("not verified here: that a fused multiply-add is noticed (the processor has none)")
    assert compare(kernels) is not None


OUTPUTS = ("out", "var")


# --- how chains end --------------------------------------------------------------------------------------------------


def everything(device):
    return [
        bytes(device.chain),
        bytes(device.control),
        *(array.tobytes() for array in (device.x, device.x0, device.one_ago, device.two_ago, device.t, device.pixels)),
    ]


def assert_nothing_moves(device):
    assert device.chain.halted
    before = everything(device)
    for _ in range(3):
        device.step()
    assert everything(device) == before


@pytest.mark.parametrize("order", [0, 4])
def test_launches_after_the_end_change_nothing(kernels, order):
    device = Device(kernels, table_of(), ODD, seed=0, images=[1, 2], order=order)
    assert list(device.run(Toy(ODD))) == list(range(13))
    assert_nothing_moves(device)


POISONED = (
    ({"variance": "fixed_small"}, "out"),
    *(({"variance": "learned_range"}, output) for output in OUTPUTS),
    ({"sampler": "unipc"}, "out"),
)


@pytest.mark.parametrize(("sampling", "poisoned"), POISONED)
@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [-np.nan, 0.5], [np.inf, 1, 2, 3, 4]])
@pytest.mark.parametrize("k", [0, 5, 11])
def test_an_output_that_is_not_finite_ends_the_chain(kernels, k, values, sampling, poisoned):
    table = table_of(**sampling)
    device = Device(kernels, table, ODD, seed=0, images=[1, 2], order=3)
    toy = functools.partial(Toy, ODD, poison=(int(table.timesteps[k]), values), poisoned=poisoned)
    x = []
    for _ in device.run(toy()):
        x.append(device.x.copy())
    assert (device.control.done, device.control.bad_step, device.control.step) == (Done.NOT_FINITE, k, k)
    assert_nothing_moves(device)
    # NumPy stops at the same step
    steps, drawn = 0, np.array([1, 2])
    with pytest.raises(NumericError):  # noqa: PT012 - the loop counts the steps
        for _ in chain.run(toy(), table, chain.initial(0, drawn, ODD), seed=0, images=drawn):
            steps += 1
    assert steps == k
    # x kept its value where the output was not finite, and moved on elsewhere
    stayed = np.zeros(device.x.shape, bool)
    stayed[0].reshape(-1)[-len(values) :] = ~np.isfinite(values)
    healthy = Device(kernels, table, ODD, seed=0, images=[1, 2])
    for finished in healthy.run(Toy(ODD)):
        if finished == k + 1:
            break
    assert same_bits(device.x[stayed], x[k][stayed])
    others = ~stayed
    others[0].reshape(-1)[-len(values) :] = False
    if table.memory is None:  # else the threads that have seen it add no memory to the others
        assert same_bits(device.x[others], healthy.x[others])
    assert np.isfinite(device.x).all()


@pytest.mark.parametrize("row", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_either_row_of_a_guided_image_ends_the_chain(kernels, row, value):
    class Poisoned(Toy):
        def enqueue(self):
            super().enqueue()
            if self.buffers.t[0] == int(table.timesteps[5]):
                self.buffers.out[row, 0, 0, 0] = value

    table = table_of()
    device = Device(kernels, table, ODD, seed=0, images=[1, 2], guidance=Guidance(2.0, 5), labels=[0, 1])
    list(device.run(Poisoned(ODD)))
    assert (device.control.done, device.control.bad_step) == (Done.NOT_FINITE, 5)
    assert_nothing_moves(device)


@pytest.mark.parametrize(("variance", "poisoned"), [("fixed_small", "out"), *(("learned_range", a) for a in OUTPUTS)])
def test_large_numbers_are_finite(kernels, variance, poisoned):
    """A huge v makes x huge, so it comes in the last step here, which draws no noise."""
    table = table_of(variance=variance)
    device = Device(kernels, table, ODD, seed=0, images=[1])
    k = 3 if poisoned == "out" else 11
    poison = (int(table.timesteps[k]), [3.4028235e38, -3.4028235e38, 1e-45])
    assert list(device.run(Toy(ODD, poison=poison, poisoned=poisoned)))[-1] == len(table)
    assert device.control.done == Done.FINISHED
    assert np.isfinite(device.x).all()


@pytest.mark.parametrize("k", [1, 6, 11])
def test_a_stopped_chain_keeps_its_state(kernels, k):
    table = table_of()
    device = Device(kernels, table, ODD, seed=3, images=[1, 2])
    for finished in device.run(Toy(ODD)):
        if finished == k - 1:
            device.control.stop = 1
    assert (device.control.done, device.control.step, device.control.bad_step) == (Done.STOPPED, k, -1)
    assert_nothing_moves(device)
    steps = chain.run(Toy(ODD), table, chain.initial(3, np.array([1, 2]), ODD), seed=3, images=np.array([1, 2]))
    for _ in range(k):
        step = next(steps)
    assert same_bits(device.x, step.x_next)
    assert set(device.t) == {table.timesteps[k]}


def test_a_stop_in_the_last_step_has_no_effect(kernels):
    device = Device(kernels, table_of(), ODD, seed=3, images=[1])
    for finished in device.run(Toy(ODD)):
        if finished == 11:
            device.control.stop = 1
    assert (device.control.done, device.control.step) == (Done.FINISHED, 12)


def test_a_chain_stopped_before_it_begins_makes_no_step(kernels):
    device = Device(kernels, table_of(), ODD, seed=3, images=[1])
    device.control.stop = 1
    assert list(device.run(Toy(ODD))) == [0]
    assert device.control.done == Done.STOPPED
    assert_nothing_moves(device)


def test_a_chain_can_begin_again(kernels):
    device = Device(kernels, table_of(), ODD, seed=3, images=[1])
    poisoned = Toy(ODD, poison=(int(device.timesteps[4]), [np.nan]))
    assert list(device.run(poisoned))[-1] == 4
    device.control.done = Done.RUNNING
    device.pixels[...] = Device.GUARD
    assert first_difference(device, table_of(), ODD, seed=3, indices=[1]) is None


@pytest.mark.parametrize(
    "change",
    [
        {"B": 0},
        {"S": 0},
        {"channels": -1},
        {"pixels": 0},
        {"var": 16},
        {"learned": 16},
        {"one_ago": 16},
        {"two_ago": 16},
        {"memory": 16},
        {"memory": 16, "one_ago": 16, "x0": 0},
        {"memory": 16, "one_ago": 16, "var": 16, "learned": 16},
        {"channels": 2**16, "pixels": 2**16},
        {"B": 2**30, "channels": 4, "pixels": 4},
        {"B": 2**31 - 1, "channels": 2**31 - 1, "pixels": 2**31 - 1},
    ],
    ids=str,
)
def test_numbers_that_describe_no_chain_are_refused(kernels, change):
    device = Device(kernels, table_of(), ODD, seed=3, images=[1])
    for field, value in change.items():
        setattr(device.chain, field, value)
    before = everything(device)[2:]
    assert list(device.run(Toy(ODD))) == [0]
    assert device.control.done == Done.REFUSED
    assert everything(device)[2:] == before
    assert_nothing_moves(device)


def test_the_condition_of_a_graph_is_that_the_chain_goes_on(kernels):
    device = Device(kernels, table_of(), ODD, seed=3, images=[1])
    conditions = [device.go_on() for _ in device.run(Toy(ODD))]
    assert conditions == [1] * 12 + [0]


# --- the structs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_structs_have_c_s_layout(tmp_path, language):
    names = ("cc", "gcc", "clang") if language == "c" else ("c++", "g++", "clang++")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        pytest.skip(f"not verified here: that the structs have the layout of {language} (no compiler)")
    expected, lines = [], []
    for struct, name in ((Control, "ddpmx_control"), (Chain, "ddpmx_chain"), (Call, "ddpmx_call")):
        for field, kind in struct._fields_:
            lines.append(f'printf("%zu %zu ", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));')
            expected += [getattr(struct, field).offset, ctypes.sizeof(kind)]
        lines.append(f'printf("%zu ", sizeof({name}));')
        expected.append(ctypes.sizeof(struct))
        # no padding, so no field of C is missing here
        assert sum(ctypes.sizeof(kind) for _, kind in struct._fields_) == ctypes.sizeof(struct)
    for field in EACH.names:
        lines.append(f'printf("%zu %zu ", offsetof(ddpmx_each, {field}), sizeof(((ddpmx_each *)0)->{field}));')
        expected += [EACH.fields[field][1], EACH[field].itemsize]
    lines.append('printf("%zu ", sizeof(ddpmx_each));')
    expected.append(EACH.itemsize)
    assert sum(EACH[field].itemsize for field in EACH.names) == EACH.itemsize
    for value in (*Done, *Each):
        lines.append(f'printf("%d ", DDPMX_{value.name});')
        expected.append(value)
    lines.append('printf("%d %d", DDPMX_THREADS, DDPMX_KEEP_X);')
    expected += [layout.THREADS, layout.KEEP_X]
    source = tmp_path / ("layout.c" if language == "c" else "layout.cpp")
    source.write_text('#include <stdio.h>\n#include "each.h"\nint main(void) {\n' + "\n".join(lines) + "\n}\n")
    flags = ["-std=c11" if language == "c" else "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    command = [compiler, *flags, f"-I{SOURCES}", str(source), "-o", str(tmp_path / "layout"), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = subprocess.run([str(tmp_path / "layout")], capture_output=True, text=True, check=True, timeout=60).stdout
    assert [int(number) for number in printed.split()] == expected


def test_an_unsigned_int_is_read_as_one():
    assert Chain(flags=2**32 - 1, seed=2**64 - 1).flags == 2**32 - 1
    assert Chain(seed=2**64 - 1).seed == 2**64 - 1


# --- the PTX ---------------------------------------------------------------------------------------------------------

ENTRIES = {
    "step": {"ddpmx_begin", "ddpmx_step"},
    "each": {"ddpmx_begin_each", "ddpmx_step_each"},
    "while": {"ddpmx_condition"},
}


def committed(name):
    return (SOURCES / f"{name}.ptx").read_text(encoding="ascii")


def code_of(name):
    """The committed PTX without comments."""
    return re.sub(r"//.*", "", committed(name))


@pytest.mark.parametrize("name", make_ptx.NAMES)
def test_the_ptx_names_the_hash_of_these_sources(name):
    first = committed(name).splitlines()[0]
    assert f"sha256 {make_ptx.digest(name)};" in first, "run python -m ddpmx.cuda.make_ptx"


def make(*arguments):
    command = [sys.executable, "-m", "ddpmx.cuda.make_ptx", "--cache", str(CACHE / "nvrtc"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode == 3:
        pytest.skip(f"not verified here: that the PTX is compiled from its sources ({done.stderr.strip()})")
    return done


def test_the_ptx_is_compiled_from_its_sources():
    done = make("--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_changed_ptx_is_noticed(tmp_path):
    """The control: the same program, in a copy of the package whose PTX has one number changed."""
    make("--check")  # skips where there is no compiler
    copy = tmp_path / "copy"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / "step.ptx").read_text()
    (copy / "step.ptx").write_text(text.replace("0f3F000000", "0f3F000001", 1))
    assert (copy / "step.ptx").read_text() != text
    command = [sys.executable, str(copy / "make_ptx.py"), "--cache", str(CACHE / "nvrtc"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "step.ptx: stale: its sources have changed" in done.stderr
    assert "while.ptx" not in done.stderr


@pytest.mark.parametrize("name", make_ptx.NAMES)
def test_the_ptx_suits_old_drivers_and_gpus(name):
    code = code_of(name)
    (version,) = re.findall(r"^\.version (\d+)\.(\d+)$", code, re.M)
    assert tuple(map(int, version)) <= (7, 8)
    assert re.findall(r"^\.target (.+)$", code, re.M) == ["sm_75"]
    assert re.findall(r"^\.address_size (.+)$", code, re.M) == ["64"]
    assert set(re.findall(r"\.visible \.entry (\w+)", code)) == ENTRIES[name]
    assert layout.ptx(name) == committed(name).encode() + b"\0"


@pytest.mark.parametrize("name", make_ptx.NAMES)
def test_the_ptx_contains_no_paths(name):
    assert "/" not in code_of(name)
    assert ".file" not in code_of(name)
    comments = re.findall(r"//(.*)", committed(name))
    assert not [comment for comment in comments if "/" in comment]


FLOAT = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z0-9]+(?:\.[a-z0-9]+)*\.f(?:16|32|64)(?:\.[a-z0-9]+)*)\s", re.M)
ALLOWED = re.compile(
    r"(add|mul|sqrt)\.rn\.f32|(neg|max|mov|selp)\.f32|setp\.[a-z]+\.f32|cvt\.rn\.f32\.[us]32|cvt\.rzi\.[us]32\.f32"
    r"|(ld|st)(\.global)?(\.v[24])?\.f32"
)


def test_the_ptx_computes_with_ieee_operations_alone():
    for name in ("step", "each"):
        found = set(FLOAT.findall(code_of(name)))
        assert {"add.rn.f32", "mul.rn.f32", "sqrt.rn.f32"} <= found, "nothing was checked"
        assert [operation for operation in found if not ALLOWED.fullmatch(operation)] == []
    for name in make_ptx.NAMES:
        for forbidden in ("fma", "ex2", "lg2", "sin", "cos", "approx", "ftz", ".local", "mad.rn"):
            assert not re.search(rf"(?<![a-z]){re.escape(forbidden)}(?![a-z])", code_of(name)), forbidden
    assert not FLOAT.findall(code_of("while"))


def test_the_end_reaches_the_host():
    """The host's words are read and written in memory each time, and done is written after the others."""
    code = code_of("step")
    assert "membar.sys" in code or "fence.sc.sys" in code
    assert "ld.volatile" in code
    assert "st.volatile" in code


# cases small enough for an interpreter in Python
EXECUTED = {
    "ancestral": {"indices": [FAR, 2], "seed": 2**64 - 3, "steps": 4},
    "four at a time": {"indices": [1, 2, 3], "shape": EVEN, "steps": 3},
    "four elements, not aligned": {"indices": [1, 2], "shape": EVEN, "steps": 2, "offset": 3},
    "ddim, no clipping": {"indices": [1, 2], "sampler": "ddim", "steps": 4, "clip": None},
    "without x0": {"indices": [3], "steps": 2, "with_x0": False},
    "uneven grid": {"indices": [3], "steps": 3, "grid": 7, "block": 3},
    "learned": {**LEARNED, "indices": [FAR, 2], "seed": 2**64 - 3, "steps": 4},
    "learned, four at a time": {**LEARNED, "indices": [1, 2, 3], "shape": EVEN, "steps": 3},
    "learned, v alone not aligned": {**LEARNED, "indices": [1, 2], "shape": EVEN, "steps": 2, "var_offset": 1},
    "guided": {**GUIDED, "steps": 3},
    "guided, learned, four at a time": {**GUIDED, **LEARNED, "shape": EVEN, "steps": 2},
    "one x0 remembered": {**TWO_M, "indices": [FAR, 2], "steps": 4},
    "two remembered, four at a time": {**UNIPC, "indices": [1, 2, 3], "shape": EVEN, "steps": 5},
    "two remembered, the last alone not aligned": {
        **UNIPC,
        **{"indices": [1, 2], "shape": EVEN, "steps": 4, "ago_offset": 1},
    },
    "guided, two remembered": {**GUIDED, **UNIPC, "steps": 4},
}


@pytest.mark.parametrize("case", EXECUTED)
def test_the_ptx_itself_has_numpy_s_bits(case):
    assert compare(ptx.Kernels(committed("step")), **{"grid": 3, "block": 5, **EXECUTED[case]}) is None


@pytest.mark.parametrize("poisoned", OUTPUTS)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_the_ptx_itself_ends_the_chain(value, poisoned):
    table = table_of(steps=4, variance="learned_range" if poisoned == "var" else "fixed_small")
    device = Device(ptx.Kernels(committed("step")), table, ODD, seed=0, images=[1], grid=2, block=8)
    counts = list(device.run(Toy(ODD, poison=(int(table.timesteps[2]), [value]), poisoned=poisoned)))
    assert counts[-1] == 2
    assert (device.control.done, device.control.bad_step, device.control.step) == (Done.NOT_FINITE, 2, 2)
    assert np.isfinite(device.x).all()
    assert_nothing_moves(device)


@pytest.mark.parametrize(
    ("right", "wrong"), [("0f3FC90FDB", "0f3FC90FDC"), ("mul.hi.u32", "mul.lo.s32"), ("setp.gt.f32", "setp.lt.f32")]
)
def test_one_wrong_instruction_is_noticed(right, wrong):
    """The control: the last instruction of its kind."""
    before, found, after = committed("step").rpartition(right)
    assert found, "the mistake cannot be made any more"
    assert compare(ptx.Kernels(before + wrong + after), **EXECUTED["ancestral"], grid=3, block=5) is not None


def test_one_wrong_coefficient_of_the_exponential_is_noticed():
    """The control. It makes no difference to chains without a learned variance."""
    text = committed("step")
    assert "0f3E2AAAAA" in text, "the mistake cannot be made any more"  # 1/6
    wrong = ptx.Kernels(text.replace("0f3E2AAAAA", "0f3E2AAA00"))
    assert compare(wrong, **EXECUTED["learned"], grid=3, block=5) is not None
    assert compare(wrong, **EXECUTED["ddim, no clipping"], grid=3, block=5) is None


def test_a_misaligned_wide_load_is_noticed():
    """The control: the check of the addresses' last four bits is taken out."""
    text, found = re.subn(r"(and\.b64\s+\S+, \S+), 15;", r"\1, 0;", committed("step"))
    assert found == 3, "the mistake cannot be made any more"
    for case in ("learned, v alone not aligned", "two remembered, the last alone not aligned"):
        with pytest.raises(AssertionError, match="misaligned"):
            compare(ptx.Kernels(text), **EXECUTED[case], grid=3, block=5)


# --- the assembler ---------------------------------------------------------------------------------------------------

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 110, 120)
# the oldest that supports while.ptx, and the newest that was tested: the machine's own, if it is as new
ASSEMBLERS = {"12.4": "nvidia-cuda-nvcc-cu12==12.4.131", "13": "nvidia-cuda-nvcc==13.0.88"}


def installed():
    """The machine's own ptxas, if it is of CUDA 13 or later."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for folder in [*(f"{home}/bin" for home in homes if home), None, "/usr/local/cuda/bin"]:
        if found := shutil.which("ptxas", path=folder):
            printed = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60).stdout
            release = re.search(r"release (\d+)\.", printed)
            if release and int(release[1]) >= 13:
                return Path(found)
    return None


@functools.cache
def assembler(which):
    """The path of a ptxas, or the reason why there is none."""
    if which == "13" and (found := installed()):
        return found
    try:
        folder = make_ptx.fetch(ASSEMBLERS[which], CACHE / "nvcc")
    except make_ptx.Unavailable as why:
        return str(why)
    (ptxas,) = folder.rglob("bin/ptxas")
    ptxas.chmod(0o755)  # zipfile drops it
    return ptxas


def assemble(which, name, architecture, output):
    ptxas = assembler(which)
    if isinstance(ptxas, str):
        pytest.skip(f"not verified here: that ptxas {which} accepts the PTX ({ptxas})")
    command = [str(ptxas), "-v", "--warn-on-spills", f"-arch=sm_{architecture}"]
    command += [str(SOURCES / f"{name}.ptx"), "-o", str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", make_ptx.NAMES)
@pytest.mark.parametrize("which", ASSEMBLERS)
def test_it_assembles_for_every_gpu(which, name, tmp_path, figure):
    known, registers = [], {}
    for architecture in ARCHITECTURES:
        output = tmp_path / f"{architecture}.cubin"
        done = assemble(which, name, architecture, output)
        if "is not defined for option 'gpu-name'" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        assert output.stat().st_size > 0
        assert "warning" not in done.stderr, done.stderr
        known.append(architecture)
        for kernel, rest in re.findall(r"entry function '(\w+)' for[^\n]*\n(.*?registers)", done.stderr, re.S):
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in rest
            used = int(re.findall(r"Used (\d+) registers", rest)[0])
            registers[kernel] = max(registers.get(kernel, 0), used)
    assert {75, 80, 86, 87, 89, 90} <= set(known)
    assert registers.keys() == ENTRIES[name]
    for kernel, used in registers.items():
        # with 64 a multiprocessor can hold four blocks of 256 threads
        figure(f"registers of {kernel}, ptxas {which}, sm_{known[0]}…sm_{known[-1]}", used, at_most=64)


def test_the_assembler_refuses_an_older_architecture(tmp_path):
    """The control: an architecture older than the PTX's target."""
    done = assemble("12.4", "step", 70, tmp_path / "x.cubin")
    assert done.returncode != 0
