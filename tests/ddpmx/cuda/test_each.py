"""The kernels of a batch whose images are at steps of their own: for every image NumPy's bits, as if it were alone."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

import ddpmx
from ddpmx.cuda import layout
from ddpmx.cuda.group import steps_of
from ddpmx.diffusion.samplers import make_table
from oracles import cuda_on_host, gaussian, ptx
from oracles.cuda_on_host import Device, Toy
from oracles.mixed import Image, Mixed

SOURCES = Path(ddpmx.__file__).parent / "cuda"
SCHEDULE = gaussian.SPEC.make_schedule()
ODD, EVEN, FAR = (3, 5, 7), (4, 4, 4), 2**32 - 1
ROWS = 10


def table_of(sampler="ancestral", steps=4, variance="fixed_small", **more):
    return make_table(SCHEDULE, "eps", variance, sampler=sampler, steps=steps, **more)


def ancestral(row=2, **more):
    return Image(table_of(), row, index=FAR, seed=2**64 - 3, **more)


def noisy_ddim(row=0, **more):
    return Image(table_of("ddim", 3, eta=0.5), row, seed=2**32 + 1, **more)


def unipc(row=5, steps=5, **more):
    return Image(table_of("unipc", steps, spacing="logsnr"), row, index=4, **more)


def learned(row=3, **more):
    return Image(table_of(variance="learned_range"), row, index=7, seed=9, **more)


def everyone():
    """Seven images of six samplers, which join at three times; row 8 is nobody's."""
    return [
        unipc(),
        ancestral(),
        learned(4, joins=1, without=7, guidance=-0.7),
        noisy_ddim(joins=1, keeps_x0=False),
        Image(table_of("dpmpp_2m", 4), 1, index=3, seed=2, without=6, guidance=2.3, joins=2),
        learned(),
        Image(table_of("ddim", 2), 9, index=1, own_x=True),
    ]


CASES = {
    "ancestral": (lambda: [ancestral()], {}),
    "ddim with noise": (lambda: [noisy_ddim()], {}),
    "two remembered": (lambda: [unipc()], {}),
    "learned": (lambda: [learned()], {}),
    "guided": (lambda: [ancestral(without=0, guidance=2.3)], {}),
    "guided, two remembered": (lambda: [unipc(without=0, guidance=2.3)], {}),
    "x0 is not wanted": (lambda: [unipc(without=0, guidance=2.3, keeps_x0=False)], {}),
    "x of its own": (lambda: [ancestral(own_x=True, without=0, guidance=2.3)], {}),
    "one step": (lambda: [unipc(steps=1), Image(table_of(steps=1), 0)], {}),
    "nobody": (list, {}),
    "everyone": (everyone, {}),
    "four at a time": (everyone, {"shape": EVEN}),
    "not aligned": (everyone, {"shape": EVEN, "offset": 1}),
    "the last array alone not aligned": (everyone, {"shape": EVEN, "ago_offset": 2}),
    "less than four elements": (everyone, {"shape": (3, 1, 1)}),
    "no clipping": (everyone, {"clip": None}),
    "tight clipping": (everyone, {"clip": 0.25}),
    "one thread": (everyone, {"grid": 1, "block": 1}),
    "more threads than elements": (everyone, {"grid": 9, "block": 256}),
    "uneven grid, threads in another order": (everyone, {"grid": 7, "block": 3, "order": 9**9}),
}


def compare(kernels, images, *, shape=ODD, **more):
    return Mixed(kernels, images(), shape, ROWS, **more).run()


@pytest.mark.parametrize("case", CASES)
def test_each_image_has_numpy_s_bits(kernels, case):
    images, more = CASES[case]
    assert compare(kernels, images, **more) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("row", "output"), [(2, "out"), (3, "var"), (7, "out"), (6, "out")])
def test_an_output_that_is_not_finite_is_one_image_s(kernels, row, output, value):
    """Rows 6 and 7 are those without a class of the images in rows 1 and 4."""
    images = everyone()
    at = 4 if row == 6 else 2  # when they have all joined that are meant
    mixed = Mixed(kernels, images, ODD, ROWS, poison=(at, row, output, value))
    whose = next(image for image in images if row in image.group.rows)
    for number in range(6):
        # an image that has none is not asked for another step
        now = [image for image in images if image.joins <= number and image.group.done < len(image.group)]
        mixed.step(now)
        bad = [image for image, found in zip(now, mixed.bad, strict=False) if found]
        assert bad == ([whose] if number + 1 == at else [])
        if bad:
            images.remove(whose)
    mine = [image.row for image in images]
    assert np.isfinite(mixed.have["x"]).all()  # of the one that failed as well
    for name in ("x", "x0", "one_ago", "two_ago"):
        assert mixed.have[name][mine].tobytes() == mixed.want[name][mine].tobytes()
    assert mixed.pixels[mine].tobytes() == mixed.want_pixels[mine].tobytes()


def test_a_table_s_steps_are_its_numbers():
    table = table_of(variance="learned_range")
    steps = steps_of(table)
    assert steps["t"].tolist() == table.timesteps.tolist()
    assert steps["sigma"].tolist() == table.rows[:, 4].astype(np.float32).tolist()
    assert steps["c"].tolist() == table.learned[:, 0].astype(np.float32).tolist()
    assert [layout.Each(flags) for flags in steps["flags"].tolist()] == [layout.Each.LEARNS] * 3 + [
        layout.Each.LEARNS | layout.Each.LAST
    ]


# --- controls --------------------------------------------------------------------------------------------------------

# (the right code, the mistake in its place): the comparison above has to notice each
MISTAKES = {
    "half the seed": ("(ddpmx_u64)each->seed_high << 32 | each->seed_low", "each->seed_low"),
    "the place instead of the image": ("each->image, (ddpmx_u32)each->t", "four.image, (ddpmx_u32)each->t"),
    "the initial noise again": ("DDPMX_PURPOSE_STEP", "DDPMX_PURPOSE_INITIAL"),
    "t of x_T": ("each->image, 0, DDPMX_PURPOSE_INITIAL", "each->image, 1, DDPMX_PURPOSE_INITIAL"),
    "the place instead of the row": ("(ddpmx_u64)row * elements + 4 * block", "(ddpmx_u64)(row & 1) * elements"),
    "everybody as the first": ("(const ddpmx_each *)call->each + four.image", "(const ddpmx_each *)call->each"),
    "everybody begins": ("if (!(flags & DDPMX_BEGINS)) continue;", ""),
    "x of its own is overwritten": ("if (flags & DDPMX_OWN_X) continue;", ""),
    "x0 of whoever was there": ("ddpmx_store(zero, four.count, wide, x0 + at);", ""),
    "nobody learns": ("if (flags & DDPMX_LEARNS) {", "if (0) {"),
    "one v for four": ("learned, v[k])", "learned, v[0])"),
    "nobody remembers": ("if (flags & DDPMX_REMEMBERS) {", "if (0) {"),
    "what is remembered, exchanged": ("one[k], two[k]", "two[k], one[k]"),
    "nothing handed on": ("ddpmx_store(one, four.count, wide, two_ago + at);", ""),
    "the two rows exchanged": ("output[k], other[k])", "other[k], output[k])"),
    "x of the first row alone": ("ddpmx_store(here, four.count, wide, x + other);", ""),
    "x0 of the first row alone": ("if (flags & DDPMX_KEEPS_X0) ddpmx_store(lead, four.count, wide, x0 + other);", ""),
    "x0 though it is not wanted": ("if (flags & DDPMX_KEEPS_X0) ", ""),
    "all images wanted at once": ("if (flags & DDPMX_LAST) {", "if (1) {"),
    "the image's place among the bytes": (
        "call->image_bytes + (ddpmx_u64)each->at",
        "call->image_bytes + (ddpmx_u64)1",
    ),
    "NCHW": ("pixel * channels + channel", "channel * pixels + pixel"),
    "a grid of the right size": ("index += ddpmx_threads()", "index = fours"),
}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """The kernels with each mistake, in one library."""
    folder, text = tmp_path_factory.mktemp("mistakes"), (SOURCES / "each.cu").read_text()
    text = text.replace('extern "C" ', "").replace('#include "each.h"', "").replace('#include "fours.h"', "")
    parts = ['#include "cuda_on_host.h"\n#include "each.h"\n#include "fours.h"\nstatic ddpmx_call *call;\n']
    for number, (right, wrong) in enumerate([("", ""), *MISTAKES.values()]):
        assert right in text, "the mistake cannot be made any more"
        parts.append(f"namespace made{number} {{\n{text.replace(right, wrong) if right else text}\n}}\n")
        for name in ("begin", "step"):
            launch = f"host::launch([] {{ made{number}::ddpmx_{name}_each(call); }}, grid, block, order)"
            parts.append(
                f'extern "C" bool {name}_{number}(ddpmx_call *what, unsigned grid, unsigned block, unsigned order) {{\n'
                f"  call = what;\n  return {launch};\n}}\n"
            )
    (folder / "mistakes.cpp").write_text("".join(parts))
    compiler = cuda_on_host.compiler()
    if compiler is None:
        pytest.skip("not verified here: that mistakes in the kernels are noticed (no C++ compiler)")
    command = [compiler, "-std=c++17", "-O0", "-ffp-contract=off", "-w", "-shared", "-fPIC", f"-I{SOURCES}"]
    command += [f"-I{cuda_on_host.HERE}", str(folder / "mistakes.cpp"), "-o", str(folder / "mistakes.so")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "mistakes.so"))

    class Kernels:
        def __init__(self, number):
            for name in ("begin", "step"):
                function = library[f"{name}_{number}"]
                function.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint]
                function.restype = ctypes.c_bool
                setattr(self, f"{name}_each", function)

    return Kernels


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=MISTAKES)
def test_the_comparison_notices_mistakes(mistaken, number):
    """The control."""
    assert compare(mistaken(number + 1), everyone) is not None


def test_without_a_mistake_there_is_none(mistaken):
    assert compare(mistaken(0), everyone) is None


# --- the PTX ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return (SOURCES / "each.ptx").read_text(encoding="ascii")


def few():
    """One of each kind, in two or three steps."""
    return [
        Image(table_of("unipc", 3), 2, index=4, without=0, guidance=2.3),
        Image(table_of(steps=2), 1, index=FAR, seed=2**64 - 3, joins=1),
        Image(table_of(steps=2, variance="learned_range"), 3, index=1, own_x=True),
    ]


EXECUTED = {
    "odd": {"shape": ODD},
    "four at a time": {"shape": EVEN},
    "the last array alone not aligned": {"shape": EVEN, "ago_offset": 1},
}


def executed(text, *, shape, **more):
    return Mixed(ptx.Kernels(text), few(), shape, 5, grid=2, block=3, **more).run()


@pytest.mark.slow
@pytest.mark.parametrize("case", EXECUTED)
def test_the_ptx_itself_has_numpy_s_bits(committed, case):
    assert executed(committed, **EXECUTED[case]) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong"), [("0f3FC90FDB", "0f3FC90FDC"), ("mul.hi.u32", "mul.lo.s32"), ("0f3E2AAAAA", "0f3E2AAA00")]
)
def test_one_wrong_instruction_is_noticed(committed, right, wrong):
    """The control: the last instruction of its kind; 1/6 is a coefficient of the exponential."""
    before, found, after = committed.rpartition(right)
    assert found, "the mistake cannot be made any more"
    assert executed(before + wrong + after, **EXECUTED["odd"]) is not None


@pytest.mark.slow
def test_a_misaligned_wide_load_is_noticed(committed):
    """The control: the check of the addresses' last four bits is taken out."""
    text, found = re.subn(r"(and\.b64\s+\S+, \S+), 15;", r"\1, 0;", committed)
    assert found == 2, "the mistake cannot be made any more"
    with pytest.raises(AssertionError, match="misaligned"):
        executed(text, **EXECUTED["the last array alone not aligned"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling", [{}, {"variance": "learned_range"}, {"sampler": "ddim"}, {"sampler": "unipc"}], ids=str
)
def test_a_step_of_its_own_takes_no_more_instructions_than_one_for_all(committed, sampling, figure):
    """For a batch at one step, beside ddpmx_step. What an instruction costs only a GPU knows."""
    table, seeds = table_of(**sampling), {"seed": 1, "images": [1, 2, 3]}
    uniform = Device(ptx.Kernels((SOURCES / "step.ptx").read_text()), table, EVEN, **seeds, grid=2, block=8)
    uniform.chain.x0 = 0 if table.memory is None else uniform.chain.x0  # as where nobody watches
    toy = Toy(EVEN)
    toy.bind(uniform.buffers)
    uniform.begin()
    toy.enqueue()
    uniform.step()
    assert uniform.control.step == 1
    images = [Image(table, row, index=row + 1, seed=1, keeps_x0=False) for row in range(3)]
    each = Mixed(ptx.Kernels(committed), images, EVEN, 3, grid=2, block=8)
    each.step(images)
    ratio = each.kernels.executed / uniform.kernels.executed
    figure(f"instructions of ddpmx_step_each ÷ ddpmx_step, {sampling or 'ancestral'}", ratio, at_most=1.01)
