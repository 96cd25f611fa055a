"""libddpmx computes the schedules and tables of ddpmx.diffusion, to the last bit of every float32."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpmx.diffusion import elementary
from ddpmx.diffusion.grids import SPACINGS
from ddpmx.diffusion.samplers import PREDICTIONS, VARIANCES, make_table
from ddpmx.diffusion.schedule import SCHEDULES
from ddpmx.errors import DdpmxError, InputError, SpecError
from ddpmx.formats.betas import checksum
from ddpmx.formats.spec import ModelSpec

pytestmark = pytest.mark.slow

LENGTHS = (1, 2, 10, 50, 100, 250, 256, 500, 777, 1000, 2000, 4000)
STATUS = {InputError: 1, SpecError: 3}

Reply = tuple[int, Any]
"""0 and the result, or a status and the error text."""


def native_results(native_build: Path, requests: list[dict[str, Any]]) -> list[Reply]:
    """The replies of ``dump_tables.cpp``."""
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    program = native_build / "tests" / "dump_tables"
    done = subprocess.run([program], input=lines.encode(), capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    raw, at, replies = done.stdout, 0, list[Reply]()
    for request in requests:
        end = raw.index(b"\n", at)
        status, size, columns = map(int, raw[at:end].split())
        at = end + 1
        if status:
            replies.append((status, raw[at : at + size].decode()))
            at += size
        elif "function" in request:
            replies.append((0, np.frombuffer(raw, "<f8", size, at)))
            at += 8 * size
        else:
            timesteps = np.frombuffer(raw, "<i4", size, at)
            rows = np.frombuffer(raw, "<f4", size * columns, at + 4 * size).reshape(size, columns)
            replies.append((0, (timesteps, rows)))
            at += 4 * size * (1 + columns)
    assert at == len(raw)
    return replies


def expected(request: dict[str, Any]) -> Reply:
    """Python's reply to the same request."""
    sampling = dict(request.get("sampling", {}))
    betas = request.get("betas")
    try:
        spec = ModelSpec.from_json(request["spec"], betas=None if betas is None else np.array(betas))
        variance = sampling.pop("variance", spec.variance)
        table = make_table(spec.make_schedule(), spec.prediction, variance, **sampling)
    except DdpmxError as error:
        return STATUS[type(error)], str(error)
    return 0, (table.timesteps, table.coefficients.astype(np.float32))


def differing(requests: list[dict[str, Any]], replies: list[Reply]) -> tuple[list[Any], int, int]:
    """The requests with different replies, the number of tables, and the number of requests that both refuse."""
    found, tables, refusals = [], 0, 0
    for request, (status, theirs) in zip(requests, replies, strict=True):
        wanted, ours = expected(request)
        if wanted or status:
            refusals += 1
            if status != wanted or theirs.splitlines()[0] != ours.splitlines()[0]:
                found.append(
                    (request, (wanted, ours if wanted else "a table"), (status, theirs if status else "a table"))
                )
            continue
        tables += 1
        same = np.array_equal(ours[0], theirs[0]) and ours[1].shape == theirs[1].shape
        if not same or np.any(ours[1].view(np.uint32) != theirs[1].view(np.uint32)):
            found.append(request)
    return found, tables, refusals


def some_params(name: str, rng: np.random.Generator) -> dict[str, float]:
    """Random plausible parameters."""
    rates = {"beta_start": 10 ** rng.uniform(-6, -3), "beta_end": 10 ** rng.uniform(-2.5, -0.5)}
    return {
        **dict.fromkeys(("linear", "quad", "warmup10", "warmup50"), rates),
        "const": {"beta_end": rates["beta_end"]},
        "jsd": {},
        "cosine": {"s": 10 ** rng.uniform(-4, -1), "beta_max": rng.uniform(0.9, 1)},
        "sigmoid_alpha_bar": {"start": -rng.uniform(0, 5), "end": rng.uniform(0.5, 5), "tau": rng.uniform(0.3, 2)},
        "sigmoid_beta": {**rates, "width": rng.uniform(1, 10)},
    }[name]


def a_model(name: str, T: int, params: dict[str, float], prediction: str, variance: str) -> dict[str, Any]:
    return {
        "shape": [1, 2, 2],
        "timesteps": T,
        "schedule": name,
        "schedule_params": params,
        "prediction": prediction,
        "variance": variance,
    }


def some_sampling(T: int, rng: np.random.Generator) -> dict[str, Any]:
    sampling: dict[str, Any] = {"spacing": str(rng.choice(SPACINGS))}
    steps = int(rng.integers(1, T + 1)) if rng.random() < 0.5 else int(rng.choice([1, 2, 10, 20, 25, 50, 100, T]))
    sampling["steps"] = steps
    if rng.random() < 0.4:
        sampling["sampler"] = str(rng.choice(["dpmpp_2m", "unipc"]))
        if rng.random() < 0.05:
            sampling["eta"] = 0.5
    elif rng.random() < 0.5:
        sampling |= {"sampler": "ddim", "eta": float(rng.choice([0.0, 1.0, 0.5, rng.random()]))}
    if rng.random() < 0.3:
        sampling["start"] = int(rng.integers(-2, T + T // 4 + 2)) if rng.random() < 0.7 else T - 1
    if rng.random() < 0.3:
        sampling["variance"] = str(rng.choice(VARIANCES))
    return sampling


@pytest.mark.parametrize("function", ["exp", "log", "cos"])
def test_the_functions_have_the_same_bits(native_build, figure, function):
    rng = np.random.default_rng(7)
    x = np.concatenate(
        [
            rng.uniform(-10, 10, 20_000),
            rng.uniform(-760, 720, 5_000),
            rng.uniform(-1, 1, 5_000) * 10.0 ** rng.uniform(-300, 300, 5_000),
            np.abs(rng.standard_normal(5_000)) * 10.0 ** rng.uniform(-320, 300, 5_000),
            1 - 10.0 ** rng.uniform(-16, -1, 5_000),
            np.arange(-40, 40) * (np.pi / 2),
            [0.0, -0.0, 1.0, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 2.0**20, 2.0**21, -746.0, 709.8],
        ]
    )
    ((_, theirs),) = native_results(native_build, [{"function": function, "x": x.tolist()}])
    with np.errstate(all="ignore"):
        ours = getattr(elementary, function)(x)
        reference = getattr(np, function)(x.astype(np.longdouble))
    np.testing.assert_array_equal(theirs, ours)
    np.testing.assert_array_equal(np.signbit(theirs), np.signbit(ours))
    real = np.isfinite(ours) & np.isfinite(reference) & (np.abs(ours) > 1e-300)
    assert real.mean() > 0.5
    ulp = np.abs(ours[real] - reference[real]) / np.spacing(np.abs(ours[real])).astype(np.longdouble)
    bits = np.finfo(np.longdouble).nmant  # 63 and more where there is something to measure by
    figure(
        f"elementary.{function}: ulp from long double's of {bits} bits", ulp.max(), at_most=0.502 if bits > 52 else 1.5
    )


def test_tables_have_the_same_bits(native_build, figure):
    """The whole chain of every schedule, prediction and variance, with default and with other parameters."""
    rng = np.random.default_rng(1)
    requests = [
        {"spec": a_model(name, T, params, str(rng.choice(PREDICTIONS)), variance)}
        for name in SCHEDULES
        for T in LENGTHS
        for params in ({}, some_params(name, rng), some_params(name, rng))
        for variance in VARIANCES
    ]
    found, tables, _ = differing(requests, native_results(native_build, requests))
    assert found == [], f"{len(found)} of {len(requests)} tables differ"
    figure("tables of whole chains compared bit for bit", tables, at_least=850)


def test_shorter_tables_have_the_same_bits(native_build, figure):
    """Random samplers, spacings, steps, η and starts; both refuse the same requests."""
    rng = np.random.default_rng(2)
    requests = []
    for _ in range(2500):
        name, T = str(rng.choice(list(SCHEDULES))), int(rng.choice(LENGTHS))
        params = some_params(name, rng) if rng.random() < 0.5 else {}
        model = a_model(name, T, params, str(rng.choice(PREDICTIONS)), str(rng.choice(VARIANCES)))
        requests.append({"spec": model, "sampling": some_sampling(T, rng)})
    found, tables, refusals = differing(requests, native_results(native_build, requests))
    assert found == [], f"{len(found)} of {len(requests)} tables differ"
    figure("shorter tables compared bit for bit", tables, at_least=1500)
    figure("refusals compared word for word", refusals, at_least=100)


def test_the_checksum_in_a_file_is_the_same(native_build):
    """A wrong checksum is refused, so the checksums of good files must be equal."""
    rng = np.random.default_rng(3)
    specs = [
        ModelSpec((3, 8, 8), T, name, params, "v", variance)
        for name in SCHEDULES
        for T in (10, 1000)
        for params in ({}, some_params(name, rng))
        for variance in VARIANCES
    ]
    good = [spec.to_json() for spec in specs]
    bad = [{**values, "coefficients": "0" + values["coefficients"]} for values in good[:20]]
    replies = native_results(native_build, [{"spec": values} for values in good + bad])
    assert [status for status, _ in replies[: len(good)]] == [0] * len(good)
    assert [status for status, _ in replies[len(good) :]] == [3] * len(bad)
    assert all("other coefficients" in text for _, text in replies[len(good) :])


def test_a_schedule_of_free_betas_has_the_same_bits(native_build):
    rng = np.random.default_rng(4)
    requests = []
    for T in (1, 2, 100, 1000, 16384):
        betas = (10 ** rng.uniform(-6, -2, T)).tolist()
        for variance in VARIANCES:
            model = {**a_model("betas", T, {}, "v", variance), "betas": checksum(np.array(betas))}
            requests += [
                {"spec": model, "betas": betas},
                {"spec": {**model, "betas": betas}},
                {"spec": model, "betas": [*betas[:-1], betas[-1] / 2]},
                {"spec": model, "betas": betas[1:]},
                {"spec": {**model, "timesteps": T + 1, "betas": betas}},
            ]
    found, tables, refusals = differing(requests, native_results(native_build, requests))
    assert found == []
    assert (tables, refusals) == (40, 60)


SMALL = {"shape": [1, 2, 2], "timesteps": 10}
CLASS_NAMES = ["b", "a b", "ü", "+", "1.5", "b" * 128, "b" * 129, "ü" * 64, "ü" * 65]
CLASS_NAMES += ["a", "", " b", "b ", "b\n", "b,c", "1", "-1", "+01", "\u00a0", 1, None, True]

SPECS: list[Any] = [
    {},
    [],
    "text",
    None,
    *({**SMALL, "shape": shape} for shape in ([1, 2], [1, 2, 2, 2], [1, 2, 0], [1, 2, -2], [1, 2, 2.0], [1, 2, True])),
    *(
        {**SMALL, "shape": shape}
        for shape in ([2**28, 1, 1], [2**28, 2, 1], [2**62, 2**62, 2**62], [2**32] * 3, {}, None)
    ),
    *(
        {**SMALL, "shape": shape}
        for shape in ([2**14, 2**14, 1], [2**14, 2**14, 2], [10**30, 1, 1], "123", [[1], 2, 2])
    ),
    *({**SMALL, "timesteps": T} for T in (0, -1, 1.0, "10", None, True, 1_000_000, 1_000_001, 2**63, 10**30)),
    *({**SMALL, "schedule": name} for name in ("cosine", "sigmoid", "", None, 3, "a\u202eb", "betas")),
    *(
        {**SMALL, "schedule_params": params}
        for params in ({}, None, [], {"s": 1}, {"beta_end": "x"}, {"beta_end": True})
    ),
    *({**SMALL, "schedule_params": {"beta_end": value}} for value in (1, 0.5, 0, -1, 1.5, 10**30, 10**400, None)),
    {**SMALL, "schedule": "sigmoid_alpha_bar", "schedule_params": {"tau": 0}},
    {**SMALL, "schedule": "sigmoid_alpha_bar", "schedule_params": {"tau": 1e-300}},
    {**SMALL, "schedule": "cosine", "schedule_params": {"s": -1}},
    {**SMALL, "schedule": "cosine", "schedule_params": {"s": -2}},
    {**SMALL, "schedule": "quad", "schedule_params": {"beta_start": -1}},
    {**SMALL, "schedule": "jsd"},
    {**SMALL, "schedule": "jsd", "prediction": "x0"},
    {**SMALL, "schedule": "jsd", "prediction": "v", "variance": "learned_range"},
    *({**SMALL, "prediction": name} for name in ("v", "score", None, 1, ["eps"])),
    *({**SMALL, "variance": name} for name in ("fixed_small", "learnt", None, False)),
    *({**SMALL, "precision": name} for name in ("bf16", "fp64", None)),
    *({**SMALL, "clip": clip} for clip in (None, 1, 0.5, 0, -1, True, "1", 1e308, 10**400, [])),
    *({**SMALL, "weights": weights} for weights in (None, "ab" * 32, "AB" * 32, "ab" * 31, 5, "")),
    *({**SMALL, "ddpmx": version} for version in ("0.1", "", None, 5, "a\nb", "\x7f", "\u00e9", "\u202e", "\x80")),
    *({**SMALL, "classes": n} for n in (None, 1, 2**20, 2**20 + 1, 0, -1, 1.0, True, "3", 2**64)),
    *({**SMALL, "condition": n} for n in (None, 1, 2**12, 2**12 + 1, 0, -1, 1.0, False)),
    *({"shape": [1, 2**9, side], "timesteps": 10, "condition": 2**12} for side in (2**7, 2**7 + 1, 2**19)),
    *({**SMALL, "self_condition": value} for value in (True, False, None, 1, "true")),
    *({**SMALL, "classes": 2, "null_class": value} for value in (True, False, None, 1, "true")),
    *({**SMALL, "classes": classes, "null_class": True} for classes in (None, 0, "2")),
    {**SMALL, "null_class": True},
    *({**SMALL, "classes": 2, "class_names": ["a", name]} for name in CLASS_NAMES),
    *({**SMALL, "classes": 2, "class_names": names} for names in (None, ["a"], ["a", "b", "c"], "ab", {"a": "b"}, [])),
    {**SMALL, "class_names": ["a"]},
    {**SMALL, "class_names": None},
    *({**SMALL, "betas": betas} for betas in (None, [0.1] * 10, "00000000", 5)),
    *({**SMALL, "schedule": "betas", "betas": b} for b in (None, [], {}, 5, True, "0", [0.1] * 9, [[0.1] * 10])),
    *({**SMALL, "schedule": "betas", "betas": [0.1] * 9 + [last]} for last in (0.1, 1, 0, 2, -1, None, "0.1", 10**30)),
    {**SMALL, "schedule": "betas", "betas": [0.1] * 10, "schedule_params": {"beta_end": 1}},
    {**SMALL, "schedule": "betas", "timesteps": 2**14 + 1, "betas": [1e-4] * (2**14 + 1)},
    *({**SMALL, name: 1} for name in ("thresholding", "_schedule", "_betas", "", "Shape", "a\nb")),
    *({**SMALL, "coefficients": value} for value in (None, 5, "", "00000000", True, [])),
]


def test_the_same_specs_are_refused(native_build):
    requests = [{"spec": values} for values in SPECS]
    for values, (status, theirs) in zip(SPECS, native_results(native_build, requests), strict=True):
        wanted, ours = expected({"spec": values})
        assert status == wanted, (values, ours if wanted else "Python takes it", theirs if status else "C++ takes it")
        if not wanted:
            np.testing.assert_array_equal(theirs[1], ours[1])
        else:
            assert theirs.isprintable() or "\n" in theirs
    taken = sum(expected({"spec": values})[0] == 0 for values in SPECS)
    assert 20 < taken < len(SPECS) - 60  # there is something of both
