"""The metadata of a plan, and whether it can run here: from its bytes, without TensorRT and without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from pathlib import Path

import pytest

from ddpmx import pipeline
from ddpmx.backends import trt
from ddpmx.device.discovery import Device, Gpus
from ddpmx.errors import BackendError, DdpmxError, FileFormatError, PlanMismatchError, SpecError
from ddpmx.formats import plan_file
from ddpmx.formats.envelope import wrap
from ddpmx.formats.plan_file import RECORD_PREFIX, PlanRecord
from ddpmx.trt import library as trt_library
from ddpmx.trt.compat import check_fits
from oracles.plans import RECORD, SPEC, TENSORRT, elf, make_plan, name_of

ADA = Gpus((Device("NVIDIA RTX 4090", "8.9", 24 << 30),), "13.0")
NO_GPU = Gpus(trouble="there is no NVIDIA driver")


@pytest.fixture
def plan(tmp_path):
    """``plan(data)`` puts a plan into a folder of its own."""

    def put(data: bytes, name: str = "model.plan") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return put


def gpu(sm: str) -> Gpus:
    return Gpus((Device("some GPU", sm, 1 << 33),), "13.0")


def check(path: Path, *, version: str | None = "1.7.1.116", platform: str = "linux x86_64", gpus: Gpus = ADA) -> None:
    check_fits(path, plan_file.read_plan(path), version=version, platform=platform, gpus=gpus)


# --- the header ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("magic", "flavour"), [(b"ftrt", "TensorRT"), (b"vtrt", "TensorRT-RTX")])
def test_a_plan_says_which_version_built_it(plan, magic, flavour):
    path = plan(make_plan(magic, (10, 3, 0, 26)))
    assert plan_file.plan_flavour(path) == (flavour, "10.3.0.26")


@pytest.mark.parametrize("content", [b"", b"ftrt", b"ftrt" + bytes(23), b"vtrt" + bytes(12), b"\x08\x08" + bytes(40)])
def test_cut_off_plans_are_refused(plan, content):
    with pytest.raises(FileFormatError, match="not a valid TensorRT plan"):
        plan_file.plan_flavour(plan(content))


@pytest.mark.parametrize("flavour", [b"ftrt", b"vtrt"])
def test_a_truncated_plan_reports_both_sizes(plan, flavour):
    whole = make_plan(flavour)
    with pytest.raises(FileFormatError, match="not a valid") as caught:
        plan_file.read_plan(plan(whole[:-1]))
    assert f"{len(whole) - 1} bytes, and its header declares {len(whole)}" in str(caught.value)


def test_a_plan_with_something_appended_is_refused(plan):
    with pytest.raises(FileFormatError, match="not a valid"):
        plan_file.plan_flavour(plan(make_plan() + b"x"))


def test_tensorrt_s_length_is_checked_only_if_it_can_be_one(plan):
    """Its format is not public: zero, or a number that cannot be a length, is no reason to refuse a plan."""
    for size in (0, 5, 1 << 60):
        assert plan_file.plan_flavour(plan(make_plan(b"ftrt", size=size)))
    with pytest.raises(FileFormatError):
        plan_file.plan_flavour(plan(make_plan(b"vtrt", size=0)))


def test_what_cannot_be_read_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "missing.plan"):
        with pytest.raises(FileFormatError, match="cannot be read"):
            plan_file.plan_flavour(path)


# --- the name --------------------------------------------------------------------------------------------------------


def test_the_metadata_of_a_plan(plan):
    path = plan(make_plan())
    info = plan_file.read_plan(path)
    assert (info.flavour, info.version, info.size) == ("TensorRT-RTX", "1.7.1.116", path.stat().st_size)
    assert (info.spec, info.engine, info.sidecar) == (SPEC, RECORD, None)
    path = plan(make_plan(b"ftrt", (10, 3, 0, 26), record=TENSORRT))
    assert plan_file.read_plan(path).engine == TENSORRT


def test_a_name_that_stands_twice_is_one_description(plan):
    assert plan_file.read_plan(plan(make_plan(tail=name_of()))).spec == SPEC


def test_a_dropped_name_is_an_error_that_names_the_library(plan):
    with pytest.raises(SpecError, match="does not say which diffusion model") as caught:
        plan_file.read_plan(plan(make_plan(name=b"Unnamed Network 0")))
    assert "TensorRT-RTX 1.7.1.116" in str(caught.value)
    assert "ddpmx build model.onnx" in str(caught.value)


@pytest.mark.parametrize("what", [b'"timesteps":20', b'"batch":[1,4,8]', b"ddpmx1 ", b"engine1 "])
def test_one_changed_byte_in_the_name_is_noticed(plan, what):
    data = bytearray(make_plan())
    data[data.index(what) + 3] ^= 1
    with pytest.raises(SpecError):
        plan_file.read_plan(plan(bytes(data)))


def test_a_damaged_name_is_not_called_a_missing_one(plan):
    data = bytearray(make_plan())
    data[data.index(b'"timesteps"') + 3] ^= 1
    with pytest.raises(SpecError, match="damaged"):
        plan_file.read_plan(plan(bytes(data)))


def test_a_spec_without_a_record_is_damaged(plan):
    with pytest.raises(SpecError, match="damaged"):
        plan_file.read_plan(plan(make_plan(name=SPEC.to_text().encode())))


@pytest.mark.parametrize(
    "other",
    [
        name_of(spec=SPEC.replace(timesteps=21)),
        name_of(record=dataclasses.replace(RECORD, batch=(1, 1, 1))),
    ],
)
def test_two_descriptions_are_refused(plan, other):
    with pytest.raises(FileFormatError, match="two descriptions"):
        plan_file.read_plan(plan(make_plan(tail=other)))


@pytest.mark.parametrize(
    ("flavour", "version"),
    [(b"ftrt", (1, 7, 1, 116)), (b"vtrt", (1, 7, 2, 116)), (b"vtrt", (1, 8, 1, 116)), (b"vtrt", (2, 7, 1, 116))],
)
def test_a_header_that_contradicts_the_record_is_refused(plan, flavour, version):
    with pytest.raises(FileFormatError, match="contradict each other") as caught:
        plan_file.read_plan(plan(make_plan(flavour, version)))
    for part in ("TensorRT-RTX 1.7.1.116", ".".join(map(str, version)), "ddpmx build model.onnx -o "):
        assert part in str(caught.value)


def test_a_build_number_does_not_fit_into_the_header_s_byte(plan):
    record = dataclasses.replace(RECORD, version="1.7.1.372")
    assert plan_file.read_plan(plan(make_plan(record=record))).version == "1.7.1.116"


def test_a_spec_that_no_ddpmx_writes_is_an_error_that_names_the_file(plan):
    spec = wrap("ddpmx1", SPEC.to_json() | {"timesteps": -1})
    name = f"{spec} {wrap(RECORD_PREFIX, RECORD.to_json())}".encode()
    with pytest.raises(SpecError, match=r"model\.plan"):
        plan_file.read_plan(plan(make_plan(name=name)))


def test_mutations_never_escape(plan):
    rng = random.Random(8)
    whole = make_plan(tail=elf(190))
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(DdpmxError):
            plan_file.read_plan(plan(bytes(data)))


# --- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [RECORD, TENSORRT])
def test_a_record_comes_back_from_json(record):
    assert PlanRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("flavour", value) for value in ("tensorrt", "", None, 1, ["TensorRT"], {})),
        *(("version", value) for value in ("", "10", "10.x", "10.3\n", None, 10.3, ["10.3"])),
        *(("targets", value) for value in ([], None, "8.0", ["8"], [8.0], [None], ["8.0", "sm_86"], ["8.0++"], {})),
        *(("platform", value) for value in (None, 1, [], {})),
        *(("batch", value) for value in ([1, 2], [1, 2, 3, 4], [0, 1, 2], [3, 2, 4], [1, 2, 1 << 17], "123", None)),
        *(("batch", value) for value in ([1.0, 2, 3], [True, 2, 3], ["1", "2", "3"], {"0": 1})),
        *(("onnx", value) for value in ("", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "\n", None, 1)),
        *(("source", value) for value in (None, 1, [])),
        *(("options", value) for value in (None, [], "", {"level": 1.5}, {"level": "3"}, {"level": [3]})),
        *(("key", value) for value in ("", "a" * 65, None, 1, [])),
    ],
)
def test_a_record_with_a_wrong_field_is_refused(field, value):
    with pytest.raises(SpecError, match="damaged"):
        PlanRecord.from_json(RECORD.to_json() | {field: value})


@pytest.mark.parametrize("values", [None, 3, [], "x", {}, RECORD.to_json() | {"more": 1}])
def test_a_record_with_other_fields_is_refused(values):
    with pytest.raises(SpecError, match="fields"):
        PlanRecord.from_json(values)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PlanRecord)])
def test_a_record_without_a_field_is_refused(field):
    values = RECORD.to_json()
    del values[field]
    with pytest.raises(SpecError, match="fields"):
        PlanRecord.from_json(values)


# --- the sidecar -----------------------------------------------------------------------------------------------------


def sidecar(path: Path, **changes: object) -> None:
    values = {"spec": SPEC.to_json(), "engine": RECORD.to_json(), "bytes": path.stat().st_size, "build": {"layers": 8}}
    plan_file.sidecar_path(path).write_text(json.dumps(values | changes))


def test_a_sidecar_adds_what_the_builder_knew(plan):
    path = plan(make_plan())
    sidecar(path)
    beside = plan_file.read_plan(path).sidecar
    assert beside is not None
    assert beside["build"] == {"layers": 8}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spec", SPEC.replace(timesteps=21).to_json()),
        ("spec", None),
        ("engine", dataclasses.replace(RECORD, key="c" * 64).to_json()),
        ("engine", {}),
        ("bytes", 1),
        ("bytes", "many"),
    ],
)
def test_a_sidecar_of_another_plan_is_refused(plan, field, value):
    path = plan(make_plan(), "my model.plan")
    sidecar(path, **{field: value})
    with pytest.raises(SpecError, match="contradicts its plan") as caught:
        plan_file.read_plan(path)
    assert f"Note: {field}: " in str(caught.value)
    assert f"ddpmx build model.onnx -o '{path}'" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b'{"bytes": NaN}', b"[" * 100_000, b" " * (plan_file.MAX_SIDECAR + 1)]
)
def test_a_sidecar_that_is_no_json_is_refused(plan, content):
    path = plan(make_plan())
    plan_file.sidecar_path(path).write_bytes(content)
    with pytest.raises(SpecError, match="sidecar cannot be read") as caught:
        plan_file.read_plan(path)
    assert str(plan_file.sidecar_path(path)) in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b"{}"])
def test_a_sidecar_that_says_nothing_is_refused(plan, content):
    path = plan(make_plan())
    plan_file.sidecar_path(path).write_bytes(content)
    with pytest.raises(SpecError, match="contradicts"):
        plan_file.read_plan(path)


def test_a_sidecar_that_is_no_file_is_refused(plan):
    path = plan(make_plan())
    plan_file.sidecar_path(path).mkdir()
    with pytest.raises(SpecError, match="cannot be read"):
        plan_file.read_plan(path)
    plan_file.sidecar_path(path).rmdir()
    plan_file.sidecar_path(path).symlink_to("nowhere")
    with pytest.raises(SpecError, match="cannot be read"):
        plan_file.read_plan(path)


# --- code for the CPU ------------------------------------------------------------------------------------------------

HOST_CODE = {
    "x86-64": elf(62),
    "AArch64": elf(183),
    "x86": elf(3, bits=1),
    "Windows": b"PE\x00\x00\x64\x86" + bytes(20),
    "x86-64 after a GPU's": elf(190) * 3 + b"odd" + elf(62),
}


@pytest.mark.parametrize("which", HOST_CODE)
def test_code_for_the_cpu_is_refused_unless_trusted(plan, which):
    path = plan(make_plan(tail=HOST_CODE[which]))
    with pytest.raises(FileFormatError, match="code for the CPU") as caught:
        plan_file.read_plan(path)
    assert which.split()[0] in str(caught.value)
    assert plan_file.read_plan(path, trust_host_code=True).spec == SPEC


@pytest.mark.parametrize("tail", [elf(190), elf(190) * 5, b"\x7fELF", b"PE\x00\x00\x01\x02", b"\x7fELF\x02\x01\x01"])
def test_code_for_the_gpu_is_no_code_for_the_cpu(plan, tail):
    assert plan_file.read_plan(plan(make_plan(tail=tail))).spec == SPEC


# --- does it fit -----------------------------------------------------------------------------------------------------


def test_a_plan_that_fits_is_accepted(plan):
    check(plan(make_plan()))
    check(plan(make_plan()), version="1.7.1.999")
    check(plan(make_plan()), version="1.7.1")


@pytest.mark.parametrize("version", ["2.7.1.116", "1.8.1.116", "1.7.2.116", "1.7", "11.7.1.116"])
def test_another_version_is_refused(plan, version):
    path = plan(make_plan())
    with pytest.raises(PlanMismatchError, match="cross versions") as caught:
        check(path, version=version)
    for part in (
        "TensorRT-RTX 1.7.1.116",
        f"TensorRT-RTX {version}",
        f"ddpmx build model.onnx -o {path} --batch 1,4,8",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "fits", "not_fits"),
    [
        (("8.0+",), ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0"), ("7.5", "5.3")),
        (("8.6",), ("8.6",), ("8.0", "8.9", "9.0", "12.0", "7.5")),
        (("8.6", "8.9"), ("8.6", "8.9"), ("8.7", "12.0")),
        (("7.5", "8.9+"), ("7.5", "8.9", "12.1"), ("8.6",)),
        (("12.0+",), ("12.1",), ("8.9", "9.0")),
    ],
)
def test_compute_capabilities_are_compared_as_numbers(plan, targets, fits, not_fits):
    path = plan(make_plan(record=dataclasses.replace(RECORD, targets=targets)))
    for sm in fits:
        check(path, gpus=gpu(sm))
    for sm in not_fits:
        with pytest.raises(PlanMismatchError, match="cross GPU architectures") as caught:
            check(path, gpus=gpu(sm))
        for part in (f"SM {', '.join(targets)}", f"some GPU, SM {sm}", "ddpmx build model.onnx -o "):
            assert part in str(caught.value)


def test_the_first_gpu_counts(plan):
    path = plan(make_plan())
    check(path, gpus=Gpus(gpu("8.9").devices + gpu("7.5").devices))
    with pytest.raises(BackendError):
        check(path, gpus=Gpus(gpu("7.5").devices + gpu("8.9").devices))


@pytest.mark.parametrize("platform", ["linux aarch64", "windows amd64"])
def test_another_platform_is_refused(plan, platform):
    path = plan(make_plan())
    with pytest.raises(PlanMismatchError, match="operating systems") as caught:
        check(path, platform=platform)
    for part in ("linux x86_64", platform, f"ddpmx build model.onnx -o {path}"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("data", "flavour", "install"),
    [
        (make_plan(), "TensorRT-RTX 1.7.1.116", "pip install tensorrt-rtx-cu13"),
        (make_plan(b"ftrt", (10, 3, 0, 26), record=TENSORRT), "TensorRT 10.3.0.26", "tensorrt-cu12"),
    ],
)
def test_a_missing_library_is_named_with_how_to_get_it(plan, data, flavour, install):
    """Even if the other flavour is installed: it cannot run this plan."""
    path = plan(data)
    with pytest.raises(BackendError, match="not installed") as caught:
        check(path, version=None)
    for part in (flavour, install, "NVIDIA RTX 4090, SM 8.9", f"ddpmx build model.onnx -o {path}"):
        assert part in str(caught.value)


def test_without_a_gpu_the_onnx_file_is_named(plan):
    record = dataclasses.replace(RECORD, source="my model.onnx")
    with pytest.raises(BackendError, match="there is none here") as caught:
        check(plan(make_plan(record=record)), gpus=NO_GPU)
    for part in (NO_GPU.trouble, "TensorRT-RTX 1.7.1.116", "SM 8.0+", "'my model.onnx' in its place"):
        assert part in str(caught.value)


def test_commands_can_be_pasted_into_a_shell(plan):
    path = plan(make_plan(record=dataclasses.replace(RECORD, source="it's; rm -rf.onnx")), "my model.plan")
    with pytest.raises(BackendError) as caught:
        check(path, version="9.9.9")
    assert f"""ddpmx build 'it'"'"'s; rm -rf.onnx' -o '{path}' --batch 1,4,8""" in str(caught.value)


def test_the_command_builds_the_same_plan(plan):
    options = {"workspace": 512 << 20, "level": 5, "tf32": True, "refit": True, "strip": False}
    record = dataclasses.replace(RECORD, options=options)
    command = plan_file.rebuild_command("model.plan", record)
    for flag in ("--tf32", "--level 5", "--workspace 512", "--refit"):
        assert flag in command
    assert "--strip" not in command


@pytest.mark.parametrize("source", ["\x1b[2J.onnx", "model.onnx\nHint: rm -rf ~", "--force"])
def test_a_hostile_name_neither_writes_on_the_terminal_nor_becomes_a_flag(plan, source):
    path = plan(make_plan(record=dataclasses.replace(RECORD, source=source)))
    with pytest.raises(DdpmxError) as caught:
        check(path, version="9.9.9")
    assert "\x1b" not in str(caught.value)
    assert "rm -rf" not in str(caught.value)
    assert "build --force" not in str(caught.value)


def test_the_difference_between_sidecar_and_plan_is_shown(plan):
    path = plan(make_plan())
    sidecar(path, engine=dataclasses.replace(RECORD, key="c" * 64).to_json())
    with pytest.raises(SpecError) as caught:
        plan_file.read_plan(path)
    assert "ccc" in str(caught.value)
    assert "bbb" in str(caught.value)


# --- opening a pipeline ----------------------------------------------------------------------------------------------


def test_loading_a_plan_without_a_gpu_names_the_onnx_file_to_use(plan, monkeypatch):
    monkeypatch.setattr(trt, "gpus", lambda: NO_GPU)
    with pytest.raises(BackendError, match="there is none here") as caught:
        pipeline.load(plan(make_plan()))
    assert "model.onnx in its place" in str(caught.value)


def test_loading_a_plan_without_its_library_says_what_to_install(plan, monkeypatch):
    def missing(flavour):
        raise BackendError(f"{flavour} is not installed here")

    monkeypatch.setattr(trt, "gpus", lambda: ADA)
    monkeypatch.setattr(trt_library, "load", missing)
    monkeypatch.setattr(trt_library, "host_platform", lambda: "linux x86_64")
    with pytest.raises(BackendError, match="needs TensorRT-RTX, which is not installed"):
        pipeline.load(plan(make_plan()))


def test_a_plan_with_code_for_the_cpu_is_not_loaded(plan, monkeypatch):
    monkeypatch.setattr(trt, "gpus", lambda: ADA)
    with pytest.raises(FileFormatError, match="code for the CPU"):
        pipeline.load(plan(make_plan(tail=elf(62))))


@pytest.mark.parametrize("change", [{"targets": ("٨.٦",)}, {"version": "١.٧.١.116"}])
def test_digits_of_other_scripts_are_no_numbers(plan, change):
    with pytest.raises(SpecError, match="the plan's record is damaged"):
        plan_file.read_plan(plan(make_plan(tail=b"", record=dataclasses.replace(RECORD, **change))))
