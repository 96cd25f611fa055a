"""The readers of libddpmx against those of ddpmx: both open the same files, and report the same about them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpmx.errors import DdpmxError, FileFormatError, InputError, SpecError
from ddpmx.formats import model_file, onnx_file, plan_file
from ddpmx.formats.betas import to_text
from ddpmx.formats.envelope import wrap
from ddpmx.formats.plan_file import RECORD_PREFIX, PlanRecord, rebuild_command
from ddpmx.formats.sidecar import plan_stamp
from ddpmx.formats.spec import ModelSpec
from mutations.mutants import KINDS, SPEC, Files, good, mutant
from oracles import plans, protobuf

pytestmark = pytest.mark.slow

STATUS = {InputError: 1, FileFormatError: 2, SpecError: 3}
INT64 = 1 << 63
SHARED = ("onnx", "plan", "plan+sidecar", "spec")
"""The kinds of mutants that libddpmx reads."""

INPUTS = {"x": (protobuf.FLOAT, ("batch", 1, 8, 8)), "t": (protobuf.INT32, ("batch",))}
OUTPUTS = {"eps": (protobuf.FLOAT, ("batch", 1, 8, 8))}
BETAS = np.linspace(1e-4, 0.02, 20)
FREE = ModelSpec((1, 8, 8), timesteps=20, schedule="betas", betas=BETAS, ddpmx="0.1.0")


# --- by Python -------------------------------------------------------------------------------------------------------


def spec_facts(spec: ModelSpec) -> dict[str, Any]:
    names = ("timesteps", "schedule", "prediction", "variance", "clip", "precision", "weights", "ddpmx")
    facts = {name: getattr(spec, name) for name in (*names, "classes", "condition", "self_condition")}
    params = {name: float(value) for name, value in spec.schedule_params.items()}
    betas = [] if spec.betas is None else spec.betas.tolist()
    return facts | {"shape": list(spec.shape), "schedule_params": params, "betas": betas}


def engine_facts(path: Path, engine: PlanRecord) -> dict[str, Any]:
    facts = {name: getattr(engine, name) for name in ("flavour", "version", "platform", "source", "key")}
    stripped = engine.options.get("strip") is True
    facts |= {"targets": list(engine.targets), "batch": list(engine.batch), "stripped": stripped}
    return facts | {"rebuild": rebuild_command(path, engine)}


def tensor_facts(tensors: Mapping[str, onnx_file.TensorInfo]) -> dict[str, Any]:
    def dim(value: int | str | None) -> int | str | None:
        return min(value, INT64 - 1) if isinstance(value, int) else value or None

    return {
        name: [tensor.element_type, tensor.dims and list(map(dim, tensor.dims))] for name, tensor in tensors.items()
    }


def python_facts(path: Path) -> dict[str, Any]:
    """What ``read_model`` should print."""
    if path.name == "spec.txt":
        return {"spec": spec_facts(ModelSpec.from_text(path.read_bytes().decode("utf-8", errors="surrogateescape")))}
    if path.name == "spec.json":
        return {"spec": spec_facts(model_file.read_spec(path))}
    kind = model_file.identify(path)
    if kind == "checkpoint":
        raise FileFormatError(f"{path}: a ddpmx checkpoint, not a model file")
    if kind == "plan":
        plan = plan_file.read_plan(path)
        facts = {"flavour": plan.flavour, "version": plan.version, "spec": spec_facts(plan.spec)}
        return facts | {"engine": engine_facts(path, plan.engine)}
    info = onnx_file.read_onnx(path)
    onnx_file.check_external(path, info)
    facts = {"spec": spec_facts(onnx_file.onnx_spec(path, info)), "external": list(dict.fromkeys(info.external))}
    return facts | {"inputs": tensor_facts(info.inputs), "outputs": tensor_facts(info.outputs)}


def python_result(path: Path) -> dict[str, Any]:
    try:
        return {"ok": True, **python_facts(path)}
    except DdpmxError as error:
        return {"status": STATUS[type(error)], "fact": error.fact}


# --- by libddpmx -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library_results(native_build):
    """``library_results(paths)``: the results of the C++ readers."""

    def call(paths: list[Path]) -> list[dict[str, Any]]:
        run = subprocess.run(
            [native_build / "tests" / "read_model", *paths], capture_output=True, timeout=60, check=False
        )
        assert run.returncode == 0, run.stderr.decode(errors="replace")[-3000:]
        results = [json.loads(line) for line in run.stdout.splitlines()]
        assert len(results) == len(paths)
        for result in results:
            result.pop("name", None)
            if "text" in result:
                result["fact"] = result.pop("text").split("\n")[0]
        return results

    return call


@pytest.fixture(scope="module")
def compare(library_results):
    """``compare(paths)``: both readers have the same result for each. Returns how many both opened."""

    def call(paths: list[Path]) -> int:
        opened = 0
        wrong = []
        for path, theirs in zip(paths, library_results(paths), strict=True):
            ours = python_result(path)
            opened += ours.get("ok", False)
            if not alike(path, ours, theirs):
                wrong.append(f"{path}\n  Python: {str(ours)[:600]}\n  C++:    {str(theirs)[:600]}")
        assert not wrong, f"{len(wrong)} of {len(paths)} files:\n" + "\n".join(wrong[:8])
        return opened

    return call


def alike(path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether both opened the file and found the same in it, or both refused it for the same reason."""
    return plain(ours, path) == plain(theirs, path) or ("fact" in theirs and stricter(path, theirs))


def stricter(path: Path, theirs: dict[str, Any]) -> bool:
    """Where libddpmx may refuse what Python opens, or for another reason: there whole numbers beyond int64 are doubles,
    and numbers beyond double are not JSON."""
    texts = b"".join(file.read_bytes() for file in path.parent.iterdir() if file.is_file())
    return theirs["status"] == STATUS[SpecError] and re.search(rb"(?<![\w.])-?\d{19,}", texts) is not None


# What follows is a value, which C++ shows as JSON.
VALUE = r",? not (?=[\"'\[{\d-]|None|null|True|true|False|false|an array of shape)| is | know: | parameter "


def plain(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """A result without the name of the file and, in a fact, without values."""
    if "fact" not in result:
        return json.loads(re.sub(r"\\udc[89a-f][0-9a-f]", r"\\ufffd", json.dumps(result)))  # bytes that are not UTF-8
    fact = re.sub(r"^ddpmx_open_options\.spec: ", "", result["fact"].removeprefix(f"{path}: "))
    fact = fact.replace("of the given spec", "of spec.json")
    fact = fact.replace("betas must be an array of numbers", "betas must be 1…16384 numbers")
    return result | {"fact": re.split(VALUE, fact)[0].replace("'", "")[:150]}


def put(folder: Path, number: int, entry: str, files: Files) -> Path:
    """The files of one case in a folder of their own."""
    place = folder / str(number)
    place.mkdir()
    for name, data in files.items():
        (place / name).write_bytes(data)
    return place / entry


# --- good files, and files with one fault ----------------------------------------------------------------------------


def plan_with(record: dict[str, Any] | None = None, spec: object = None, **changes: Any) -> bytes:
    """A plan whose envelopes contain these objects."""
    values = plans.RECORD.to_json() | changes if record is None else record
    body = wrap("ddpmx1", SPEC.to_json() if spec is None else spec)
    return plans.make_plan(name=f"{body} {wrap(RECORD_PREFIX, values)}".encode())


def onnx_with(spec: str, extra: dict[str, str] | None = None, graph: bytes = b"", **inputs: Any) -> bytes:
    """An ONNX file with this metadata."""
    return protobuf.model({**INPUTS, **inputs}, OUTPUTS, metadata={"ddpmx": spec, **(extra or {})}, graph=graph)


def free_plan(**sidecar: Any) -> Files:
    data = plans.make_plan(spec=FREE)
    beside = plan_file.sidecar_json(len(data), FREE, plans.RECORD, {}) | sidecar
    return {"model.plan": data, "model.plan.json": json.dumps(beside).encode()}


def plan_file_stamp(data: bytes) -> str:
    return plan_stamp(io.BytesIO(data), len(data))


def big_sidecar(data: bytes) -> bytes:
    return json.dumps(plan_file.sidecar_json(len(data), SPEC, plans.RECORD, {}, stamp=plan_file_stamp(data))).encode()


def sidecar(**changes: Any) -> Files:
    data = plan_with()
    beside = plan_file.sidecar_json(len(data), SPEC, plans.RECORD, {"seconds": 1.5}) | changes
    return {"model.plan": data, "model.plan.json": json.dumps(beside).encode()}


def test_good_files_are_read_alike(tmp_path, compare):
    cases = [(case.entry, case.files) for case in good(torch_too=False) if case.kind in SHARED]
    variants: list[dict[str, Any]] = [
        {"prediction": "x0", "variance": "fixed_small", "clip": None},
        {"prediction": "v", "schedule": "cosine", "timesteps": 50, "clip": 2},
        {"schedule": "sigmoid_beta", "precision": "fp16", "weights": "a" * 64},
        {"schedule": "quad", "precision": "bf16", "variance": "learned_range"},
        {"classes": 10, "condition": 3, "self_condition": True, "schedule_params": {"beta_end": 0.03}},
    ]
    for change in variants:
        spec = ModelSpec((1, 8, 8), **{"timesteps": 20, "ddpmx": "0.1.0 é", **change})
        data = plans.make_plan(spec=spec)
        beside = json.dumps(plan_file.sidecar_json(len(data), spec, plans.RECORD, {})).encode()
        cases += [
            ("model.plan", {"model.plan": data, "model.plan.json": beside}),
            ("spec.txt", {"spec.txt": spec.to_text().encode()}),
            ("spec.json", {"spec.json": json.dumps(spec.to_json()).encode()}),
            ("spec.json", {"spec.json": b"\xef\xbb\xbf" + json.dumps({"model": spec.to_json()}).encode()}),
        ]
    record = dataclasses.replace(
        plans.TENSORRT,
        source="mein Modell's é.onnx",
        options={"workspace": 3 << 30, "level": 5, "strip": True, "tf32": False, "timing": None},
    )
    cases += [
        ("model.plan", {"model.plan": plans.make_plan(b"ftrt", (10, 3, 0, 26), record=record)}),
        ("model.plan", free_plan()),
        ("model.onnx", {"model.onnx": onnx_with(FREE.to_text(), {"ddpmx.betas": to_text(BETAS)})}),
        ("spec.json", {"spec.json": json.dumps(FREE.to_json(whole=True)).encode()}),
        ("spec.json", {"spec.json": json.dumps({"model": FREE.to_json(), "betas": BETAS.tolist()}).encode()}),
    ]
    paths = [put(tmp_path, number, *case) for number, case in enumerate(cases)]
    assert compare(paths) == len(paths)


RECORD_FAULTS: list[tuple[str, Any]] = [
    *(("flavour", value) for value in ("tensorrt", "", None, 1, ["TensorRT"], "TensorRT")),
    *(("version", value) for value in ("", "10", "10.x", "10.3\n", None, 10.3, "1.7.2.116", "1.7.1", "1.7.1.1.1")),
    *(("version", value) for value in ("00001.7", "1.7.1.1234567", ".7", "1..7", "1.7.")),
    *(("targets", value) for value in ([], None, "8.0", ["8"], [8.0], [None], ["8.0", "sm_86"], ["8.0++"], {})),
    *(("targets", value) for value in (["123.0"], ["8.00"], ["12.0", "8.7+"])),
    *(("platform", value) for value in (None, 1, "", "linux\n", "linux \u202e", "linux é", "\ud800")),
    *(("batch", value) for value in ([1, 2], [1, 2, 3, 4], [0, 1, 2], [3, 2, 4], [1, 2, 1 << 17], "123", None)),
    *(("batch", value) for value in ([1.0, 2, 3], [True, 2, 3], ["1", "2", "3"], {"0": 1}, [1, 1, 1 << 16])),
    *(("onnx", value) for value in ("", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "\n", None, 1)),
    *(("source", value) for value in (None, 1, "", "-x.onnx", "a/b", "a\\b", "a\nb", "é.onnx", "a b.onnx")),
    *(("options", value) for value in (None, [], "", {"level": 1.5}, {"level": "3"}, {"level": [3]}, {})),
    *(("options", value) for value in ({"": 1}, {"a b": 1}, {"1a": 1}, {"a-b": 1}, {"_a1": -5}, {"workspace": True})),
    *(("options", value) for value in ({"workspace": 0}, {"workspace": -1}, {"workspace": 1 << 20})),
    *(("key", value) for value in ("", "a" * 65, None, 1, [])),
    ("more", 1),
]

SPEC_FAULTS: list[dict[str, Any]] = [
    {"shape": [0, 8, 8]},
    {"shape": [1, 8]},
    {"shape": [1, 8.0, 8]},
    {"shape": None},
    {"timesteps": 0},
    {"timesteps": 1.5},
    {"timesteps": True},
    {"timesteps": 1 << 40},
    {"schedule": "none"},
    {"schedule": 3},
    {"schedule_params": {"beta_end": "x"}},
    {"schedule_params": {"nothing": 1}},
    {"schedule_params": []},
    {"prediction": "mu"},
    {"variance": None},
    {"clip": 0},
    {"clip": -1.0},
    {"clip": "1"},
    {"clip": True},
    {"precision": "int4"},
    {"weights": "b" * 63},
    {"ddpmx": "\n"},
    {"ddpmx": 1},
    {"classes": 0},
    {"classes": 1 << 21},
    {"condition": 1.5},
    {"self_condition": 1},
    {"more": 1},
    {"coefficients": "00000000"},
    {"betas": "00000000"},
    {"schedule": "betas"},
]


def test_each_fault_of_a_record_is_seen_by_both(tmp_path, compare):
    cases = [plan_with(**{name: value}) for name, value in RECORD_FAULTS]
    whole = plans.RECORD.to_json()
    cases += [plan_with(record={key: value for key, value in whole.items() if key != name}) for name in whole]
    paths = [put(tmp_path, number, "model.plan", {"model.plan": data}) for number, data in enumerate(cases)]
    assert 0 < compare(paths) < len(paths) / 2


def test_each_fault_of_a_spec_is_seen_by_both(tmp_path, compare):
    cases = []
    for change in SPEC_FAULTS:
        for values in (
            SPEC.to_json() | change,
            {k: v for k, v in SPEC.to_json().items() if k != "coefficients"} | change,
        ):
            cases.append(("spec.json", {"spec.json": json.dumps(values).encode()}))
            cases.append(("spec.txt", {"spec.txt": wrap("ddpmx1", values).encode()}))
            cases.append(("model.plan", {"model.plan": plan_with(spec=values)}))
            cases.append(("model.onnx", {"model.onnx": onnx_with(wrap("ddpmx1", values))}))
    cases += [
        ("spec.json", {"spec.json": text}) for text in (b"", b"[]", b"3", b"{}", b'{"model": 3}', b" " * (1 << 21))
    ]
    beside = ([], [2.0], [0.5], ["x"], [True], "text", 0.5, [[0.5]], None, [0.5] * 20, BETAS.tolist())
    for betas in beside:
        for spec in (FREE, SPEC):
            text = json.dumps({"model": spec.to_json(), "betas": betas}).encode()
            cases.append(("spec.json", {"spec.json": text}))
    paths = [put(tmp_path, number, *case) for number, case in enumerate(cases)]
    assert 0 < compare(paths) < len(paths) / 2


def test_each_fault_of_a_sidecar_is_seen_by_both(tmp_path, compare):
    spec, engine = SPEC.to_json(), plans.RECORD.to_json()
    mine = json.loads(sidecar()["model.plan.json"])
    cases = [
        *(
            sidecar(spec=value)
            for value in (None, {}, [], spec | {"timesteps": 21}, spec | {"clip": 1}, spec | {"more": 1})
        ),
        *(sidecar(spec=spec | {"clip": value}) for value in (True, 1.5, None, "1.0")),
        *(sidecar(engine=value) for value in (None, {}, engine | {"key": "c" * 64}, engine | {"batch": [1.0, 4, 8]})),
        *(sidecar(bytes=value) for value in (1, "many", None, float(len(plan_with())), True)),
        *(
            sidecar(betas=value)
            for value in (None, "", 3, "betas1 1 00000000 AAAA", to_text(BETAS), to_text(BETAS)[:-4])
        ),
        *(sidecar(build=value) for value in (None, [[1] * 50], {"a": "é"})),
        *(sidecar(stamp=value) for value in (plan_file_stamp(plan_with()), "00000000", None, 5)),
        *(sidecar(bytes=1, before=value) for value in (None, mine, mine | {"stamp": "00000000"}, {}, [], 5, "x")),
        *(sidecar(before=value) for value in (None, {}, 5, mine | {"bytes": 1})),
        free_plan(bytes=1, betas=to_text(BETAS * 0.5), before=json.loads(free_plan()["model.plan.json"])),
        {"model.plan": (big := plans.make_plan(tail=bytes(3 << 20))), "model.plan.json": big_sidecar(big)},
        {"model.plan": big[:-1] + b"\1", "model.plan.json": big_sidecar(big)},
        *(free_plan(betas=value) for value in (None, to_text(BETAS * 0.5), to_text(BETAS)[:-1], "betas1 0 00000000 ")),
        free_plan(spec=FREE.to_json(whole=True)),
        *(
            sidecar() | {"model.plan.json": text}
            for text in (b"", b"{", b"[]", b"3", b"\xff", b" " * (1 << 21), b"NaN")
        ),
        sidecar() | {"model.plan.json": sidecar()["model.plan.json"] + b" " * (1 << 20)},
        sidecar() | {"model.plan.json": b"\xef\xbb\xbf" + sidecar()["model.plan.json"]},
    ]
    paths = [put(tmp_path, number, "model.plan", files) for number, files in enumerate(cases)]
    folder = put(tmp_path, len(paths), "model.plan", {"model.plan": plan_with()})
    (folder.parent / "model.plan.json").mkdir()
    link = put(tmp_path, len(paths) + 1, "link.plan", sidecar(bytes=1))
    link.symlink_to("model.plan")
    dangling = put(tmp_path, len(paths) + 2, "model.plan", {"model.plan": plan_with()})
    (dangling.parent / "model.plan.json").symlink_to("nowhere")
    paths += [folder, link, dangling]
    assert 0 < compare(paths) < len(paths) / 2


def test_each_fault_of_a_plan_is_seen_by_both(tmp_path, compare):
    name, whole = plans.name_of(), plans.make_plan()
    cases = [
        *(whole[:length] for length in (4, 27, 28, 100, len(whole) - 1)),
        whole + b"x",
        *(
            plans.make_plan(b"ftrt", (10, 3, 0, 26), record=plans.TENSORRT, size=size)
            for size in (0, 5, 1 << 39, 1 << 60)
        ),
        plans.make_plan(size=0),
        plans.make_plan(name=b"Unnamed Network 0"),
        plans.make_plan(name=SPEC.to_text().encode()),
        plans.make_plan(name=b"ddpmx1 "),
        plans.make_plan(tail=name),
        plans.make_plan(tail=plans.name_of(spec=SPEC)),
        plans.make_plan(tail=plans.name_of(record=plans.TENSORRT)),
        plans.make_plan(tail=SPEC.to_text().encode()),
        plans.make_plan(
            name=SPEC.to_text().encode() + bytes(4000) + wrap(RECORD_PREFIX, plans.RECORD.to_json()).encode()
        ),
        plans.make_plan(
            name=SPEC.to_text().encode() + bytes(3000) + wrap(RECORD_PREFIX, plans.RECORD.to_json()).encode()
        ),
        plans.make_plan(name=b"ddpmx1 9999 00000000 " * 3000 + name),
        *(plans.make_plan(tail=plans.elf(machine)) for machine in (0, 3, 40, 62, 183, 190, 243, 999)),
        plans.make_plan(tail=plans.elf(62, bits=1)),
        plans.make_plan(tail=plans.elf(62, bits=3)),
        plans.make_plan(tail=plans.elf(190) * 50 + plans.elf(183)),
        *(plans.make_plan(tail=b"PE\0\0" + kind) for kind in (b"\x64\x86", b"\x64\xaa", b"\x4c\x01", b"\0\0")),
        plans.make_plan(tail=b"PE\0\0PE\0\0\x64\x86" + plans.elf(62)),
        plans.make_plan(b"ftrt"),
        plans.make_plan(version=(1, 8, 1, 116)),
        plans.make_plan(version=(1, 7, 1, 255)),
        *(b"", b"ftr", b"<html>", b"PK\x03\x04", b"\x08"),
    ]
    paths = [put(tmp_path, number, "model.plan", {"model.plan": data}) for number, data in enumerate(cases)]
    assert 0 < compare(paths) < len(paths)


def in_node(part: int, value: bytes) -> bytes:
    return protobuf.field(1, protobuf.node("Constant", [], ["c"], protobuf.attribute(part, value)))


def nested(depth: int, inner: bytes) -> bytes:
    for _ in range(depth):
        inner = in_node(6, inner)
    return inner


def test_each_fault_of_an_onnx_file_is_seen_by_both(tmp_path, compare):
    text = SPEC.to_text()
    places = ["weights.bin", "./weights.bin", "/etc/passwd", "../secret", "sub/../../secret", "sub/../weights.bin"]
    places += ["missing/../weights.bin", "weights.bin/../weights.bin", "", ".", "..", "..\\x", "a" * 300, "a" * 5000]
    places += ["*/_ORT_MEM_ADDR_/*", "a*.bin"]
    places += ["nul\0byte", "loop", "out", "dangling", "inside", "a\udcffb", "pipe", "é.bin"]
    tensor = protobuf.external_tensor("weights.bin")
    dims: list[tuple[Any, ...]] = [
        (),
        (4, 1, 8, 8),
        ("b", "c", "h", "w"),
        (None, None, 8, 8),
        ("b", 1, 8),
        ("b", 1, 8, 9),
    ]
    dims += [("b", 2**63 - 1, 8, 8), ("b", 2**63, 8, 8), ("b", 2**64 - 1, 8, 8), ("b", 1, 8, 8, 1)]
    graphs = [
        *(protobuf.field(5, protobuf.external_tensor(place)) for place in places),
        *(in_node(part, tensor) for part in (5, 10)),
        *(in_node(part, protobuf.field(5, tensor)) for part in (6, 11)),
        *(in_node(part, protobuf.field(1, tensor)) for part in (22, 23)),
        *(in_node(part, protobuf.field(1, protobuf.external_tensor("/x"))) for part in (5, 6, 22)),
        *(nested(depth, protobuf.field(5, protobuf.external_tensor("/x"))) for depth in (30, 31, 32, 33, 100, 500)),
        protobuf.field(5, protobuf.field(1, b"\x02\x83") + protobuf.field(2, 1)),
        protobuf.field(5, protobuf.field(2, b"text")),
        protobuf.field(5, protobuf.field(13, protobuf.field(1, 5))),
        protobuf.field(5, protobuf.field(13, protobuf.field(1, "location") + protobuf.field(2, 5))),
        protobuf.field(11, b""),
        protobuf.field(12, protobuf.field(1, 3)),
        protobuf.field(1, 3),
        protobuf.varint(1 << 64 | 5 << 3 | 2) + protobuf.varint(len(tensor)) + tensor,
        # hidden from readers that take all bits of a key, and visible to those that take 32 of them
        protobuf.varint(1 << 32 | 5 << 3 | 2) + protobuf.varint(len(tensor)) + tensor,
        protobuf.varint((1 << 29) - 1 << 3) + b"\x00",
        protobuf.varint(40 << 3 | 2) + protobuf.varint(1 << 64),
        protobuf.varint(40 << 3) + b"\xff" * 9 + b"\x7f",
        protobuf.varint(40 << 3) + b"\xff" * 10 + b"\x01",
    ]
    cases = [onnx_with(text, graph=graph) for graph in graphs]
    cases += [onnx_with(text, x=(protobuf.FLOAT, dim)) for dim in dims]
    cases += [onnx_with(text, t=(kind, ("b",))) for kind in (0, protobuf.INT32, protobuf.INT64, 2**64 - 1)]
    cases += [onnx_with(text, y=(protobuf.INT32, ("b",))), onnx_with(text, **{"\udcff": (1, ())})]
    cases += [onnx_with(text, w=(1, ()), graph=protobuf.field(5, protobuf.tensor("w", 1, [1], bytes(4))))]
    cases += [onnx_with(bad) for bad in ("", "ddpmx1", text[:-1], text.replace("eps", "epz"), "\udcff" + text)]
    cases += [onnx_with(text, {"ddpmx.betas": bad}) for bad in ("", "betas1 1 00000000 AAAA", to_text(BETAS))]
    cases += [onnx_with(FREE.to_text(), {"ddpmx.betas": bad}) for bad in (to_text(BETAS * 0.5), to_text(BETAS)[:-2])]
    cases += [
        onnx_with(FREE.to_text()),
        protobuf.model(INPUTS, OUTPUTS),
        b"\x08",
        b"\x08\x08",
        b"\x08\x08" + b"\xff" * 20,
    ]
    cases += [
        onnx_with(text) + rest
        for rest in (protobuf.field(7, b""), protobuf.field(0, 1), protobuf.field(14, 3), b"\x3b")
    ]
    cases += [
        onnx_with(text) + protobuf.field(8, protobuf.field(1, domain) + protobuf.field(2, b"x"))
        for domain in ("", "other")
    ]
    cases += [
        onnx_with(text) + protobuf.field(20, protobuf.field(2, protobuf.field(5, protobuf.external_tensor("../x"))))
    ]
    cases += [
        onnx_with(text)
        + protobuf.field(25, protobuf.field(11, protobuf.attribute(5, protobuf.external_tensor("../x"))))
    ]
    (tmp_path / "secret").write_bytes(bytes(4))
    paths = []
    for number, data in enumerate(cases):
        paths.append(put(tmp_path, number, "model.onnx", {"model.onnx": data, "weights.bin": bytes(4)}))
        for link, target in (
            ("loop", "loop"),
            ("out", "../secret"),
            ("dangling", "../nowhere"),
            ("inside", "weights.bin"),
        ):
            (paths[-1].parent / link).symlink_to(target)
        (paths[-1].parent / "sub").mkdir()
    assert 0 < compare(paths) < len(paths)


def test_what_is_no_file_is_refused_by_both(tmp_path, compare):
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "spec.json").write_text("{}")
    (tmp_path / "empty").touch()
    (tmp_path / "samples.parity.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "loop").symlink_to("loop")
    names = ("pipe.onnx", "run", "empty", "samples.parity.npz", "loop", "missing", "empty/below", "x" * 300, ".")
    assert compare([tmp_path / name for name in names]) == 0
    assert compare([Path("/dev/zero")]) == 0


# --- mutants ---------------------------------------------------------------------------------------------------------


def test_damaged_files_are_read_alike(tmp_path, compare):
    """Mutants of good files, as tests/mutations makes them."""
    numbers = [number for number in range(1800) if KINDS[number % len(KINDS)] in SHARED]
    cases = [mutant(6, number, torch_too=False) for number in numbers]
    paths = [put(tmp_path, number, case.entry, case.files) for number, case in zip(numbers, cases, strict=True)]
    opened = compare(paths)
    assert len(paths) / 20 < opened < len(paths) / 2
