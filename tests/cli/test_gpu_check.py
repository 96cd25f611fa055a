"""`make gpu-check` without a GPU: its refusals, how it continues when steps fail, and its report."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddpmx.device.discovery import Device, Gpus
from gpu import check, found, report, steps
from gpu.fakes.canned import DOCTOR, GPU
from gpu.steps import Result, Step

HERE = Gpus((Device("NVIDIA H200", "9.0", 141 << 30),), "13.0")
NO_GPU = Gpus(trouble="there is no NVIDIA driver: libcuda.so.1: no such file")


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def options(**changes: object) -> SimpleNamespace:
    values = {"quick": False, "no_peers": False, "onnx_dir": None, "engine_dir": None, "out": Path("gpu-report")}
    values["minutes"] = None
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture
def place(tmp_path):
    out = tmp_path / "gpu-report"
    (out / "logs").mkdir(parents=True)
    (out / "engines").mkdir()
    return check.Place(out, out / "engines", out)


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """``checked([Step(…)], "--quick")`` → (exit code, the report, its JSON)."""
    monkeypatch.chdir(tmp_path)

    def call(planned, *arguments):
        code = check.main(
            arguments,
            devices=HERE,
            plan=lambda options, place, doctor: [s(place) if callable(s) else s for s in planned],
            look=lambda place, runner: ([runner(Step("doctor", script("print(1)"), 60, "always"))], DOCTOR),
        )
        folder = Path("gpu-report")
        capsys.readouterr()
        return code, (folder / report.NAME).read_text(), json.loads((folder / report.JSON).read_text())

    return call


# --- no GPU ----------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_is_one_error_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check.main([], devices=NO_GPU) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Error", "Note", "Hint"]
    assert "no NVIDIA GPU" in lines[0]
    assert "libcuda.so.1" in lines[1]
    assert "nvidia-smi" in lines[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--onnx-dir", "--out"])
def test_folders_with_other_files_are_refused(tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("do not touch")
    with pytest.raises(SystemExit, match=r"Error: theirs: .*\nHint: "):
        check.main([flag, "theirs"], devices=HERE)
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "do not touch"


def test_model_files_in_the_folder_to_be_emptied_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "gpu-report" / "onnx"
    kept.mkdir(parents=True)
    for name in ("gpu-report.md", *(f"onnx/model{p}{e}" for p in ("", "-fp16") for e in (".onnx", ".parity.npz"))):
        (tmp_path / "gpu-report" / name).write_text("x")
    with pytest.raises(SystemExit, match="is emptied"):
        check.main(["--onnx-dir", "gpu-report/onnx"], devices=HERE)
    assert len(list(kept.iterdir())) == 4


# --- steps -----------------------------------------------------------------------------------------------------------


def do(place, step):
    return steps.run(step, place.out / "logs", cwd=place.out, environment={"MARK": "seen"})


def test_a_step_keeps_its_output_and_its_environment(place):
    result = do(
        place, Step("a b", script("import os, sys; print(os.environ['MARK'], flush=True); print('e', file=sys.stderr)"))
    )
    assert (result.status, result.code, result.why) == ("ok", 0, "")
    assert (place.out / "logs" / "a-b.log").read_text().split() == ["seen", "e"]


def test_a_step_that_fails_reports_its_error(place):
    text = "print('Error: no such thing\\nHint: another'); raise SystemExit(2)"
    result = do(place, Step("a", script(text)))
    assert (result.status, result.code, result.why) == ("failed", 2, "Error: no such thing")
    assert do(place, Step("b", ["/there/is/no/such/program"])).status == "failed"


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_ended_with_its_children(place):
    child = place.out / "child"
    text = (
        "import subprocess, sys, time\n"
        f"code = \"import time, pathlib; time.sleep(3); pathlib.Path({str(child)!r}).write_text('lives')\"\n"
        "subprocess.Popen([sys.executable, '-c', code]); print('begun', flush=True); time.sleep(60)"
    )
    begun = time.monotonic()
    result = do(place, Step("a", script(text), seconds=1.5))
    assert result.status == "timed out"
    assert "after 2 s" in result.why
    assert result.tail == "begun"
    assert time.monotonic() - begun < 20
    time.sleep(3)
    assert not child.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="not verified here: a crash by a signal (Windows has none)")
def test_a_step_that_crashes_names_the_signal(place):
    result = do(place, Step("a", script("import os; os.kill(os.getpid(), 11)")))
    assert (result.status, result.why) == ("crashed", "by signal 11 (SIGSEGV)")


def test_a_step_without_its_inputs_is_not_run(place):
    result = do(place, Step("a", script("raise SystemExit(9)"), needs=(place.out / "model.onnx",)))
    assert (result.status, result.code) == ("not run", None)
    assert "model.onnx" in result.why
    assert do(place, Step("b", not_run="there is no torch")).why == "there is no torch"


def test_a_step_without_its_output_has_failed(place):
    result = do(place, Step("a", script("pass"), makes=(place.out / "x.plan",)))
    assert (result.status, result.why) == ("failed", "it did not make x.plan")


# --- the whole of it -------------------------------------------------------------------------------------------------


def test_only_required_steps_decide_the_verdict(checked):
    code, text, values = checked([Step("a", script("pass"), must="always"), Step("b", script("raise SystemExit(1)"))])
    assert code == 0
    assert text.startswith("# ddpmx on NVIDIA H200: HOLDS: 2 steps")
    assert [step["status"] for step in values["steps"]] == ["ok", "ok", "failed"]


def test_a_failed_step_does_not_stop_the_rest(checked):
    code, text, values = checked(
        [
            Step("first", script("print('Error: a word of its own'); raise SystemExit(1)"), must="always"),
            Step("slow", script("import time; time.sleep(60)"), seconds=0.5),
            lambda place: Step("builds", script("pass"), needs=(place.out / "x.onnx",)),
            Step("last", script("pass"), must="always"),
        ]
    )
    assert code == 1
    assert values["verdict"] == "FAILED: first"
    assert [step["status"] for step in values["steps"]] == ["ok", "failed", "timed out", "not run", "ok"]
    for needed in ("a word of its own", "**timed out**", "x.onnx is not there", "## Not verified"):
        assert needed in text


@pytest.mark.parametrize(("must", "verdict"), [("always", "INCOMPLETE"), ("if run", "HOLDS"), ("", "HOLDS")])
def test_a_step_that_is_left_out(checked, must, verdict):
    code, _, values = checked([Step("a", must=must, not_run="there is no TensorRT here")], "--quick")
    assert values["verdict"].startswith(verdict)
    assert code == (verdict != "HOLDS")
    assert "a: there is no TensorRT here" in values["not_verified"]


def test_ctrl_c_leaves_a_report(checked, monkeypatch):
    def interrupted(ends, step, *arguments, **named):
        if step.name == "b":
            raise KeyboardInterrupt
        return Result(step.name, step.must, "ok")

    monkeypatch.setattr(check, "run_until", interrupted)
    code, text, values = checked([Step(name, script("pass"), must="always") for name in "abc"])
    assert code == 130
    assert "stopped by Ctrl-C" in text
    assert [step["status"] for step in values["steps"]] == ["ok", "ok", "not run", "not run"]


def test_a_report_is_replaced_by_the_next(checked):
    checked([Step("a", script("pass"), must="always")])
    Path("gpu-report", "run").mkdir()
    assert checked([Step("a", script("pass"), must="always")])[0] == 0
    assert not Path("gpu-report", "run").exists()


def test_a_failing_doctor_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "ddpmx", lambda *arguments: script("raise SystemExit('no such module')"))
    assert check.main([], devices=HERE) == 1
    text = Path("gpu-report", report.NAME).read_text()
    assert "FAILED: doctor" in text
    assert "no such module" in text


def test_the_doctor_s_json_is_found_in_its_output(place):
    found_here = json.dumps(DOCTOR, indent=2)
    (place.out / "logs" / "doctor.log").write_text(f"a library's remark\n{found_here}\n", encoding="utf-8")
    results, doctor = check.look_around(place, lambda step: Result(step.name, step.must, "ok"))
    assert ([r.status for r in results], doctor) == (["ok"], DOCTOR)


# --- the plan of steps ------------------------------------------------------------------------------------------------


def named(planned):
    return [step.name for step in planned if not step.not_run]


ON_TORCH = ("chain on torch", "peers on torch", "compiled on torch")
ALL = [
    *(f"tests of {name}" for name in ("kernels", "chains", "networks", "engines")),
    *("images", "network", "export fp32", "export fp16"),
    *("build fp32", "parity fp32", "build fp16", "parity fp16"),
    *("bench fp32", "bench fp16", "build for 1", "bench for 1", "build for 256", "many images", "serving", "peers"),
    *ON_TORCH,
    *("export int8", "build int8", "parity int8", "build fp16 for 64", "bench int8-64", "bench fp16-64", "training"),
]
EIGHT_BITS = ALL[-7:-1]


def doctored(**changes):
    return {**DOCTOR, "libraries": {**DOCTOR["libraries"], **changes}}


def test_a_large_gpu_with_everything(place):
    planned = check.make_steps(options(), place, DOCTOR)
    assert named(planned) == ALL
    commands = {step.name: " ".join(step.command) for step in planned}
    assert "train" in commands["network"]
    assert "--bf16" in commands["network"]
    assert "--batch 128" in commands["network"]
    assert "--batch 64,256,256" in commands["build for 256"]
    assert "--engine" in commands["peers"]


def test_quick(place):
    planned = check.make_steps(options(quick=True, no_peers=True), place, DOCTOR)
    left_out = ("images", "build for 256", "peers", *ON_TORCH[1:], "training", *EIGHT_BITS)
    assert named(planned) == [name for name in ALL if name not in left_out]
    assert all("--seconds 0.5" in " ".join(step.command) for step in planned if step.name.startswith("bench"))


WITHIN = [
    *("tests of kernels", "tests of chains", "tests of networks", "tests of engines"),
    *("network", "export fp32", "export fp16", "build fp16", "parity fp16", "build fp32", "parity fp32"),
    *(
        "large network",
        "export large",
        "build large",
        "bench fp16",
        "build for 1",
        "bench for 1",
        "many images",
        "serving",
    ),
    *("peers 1", "peers 64", "peers compiled", *ON_TORCH, *EIGHT_BITS, "training"),
]


def test_within_minutes_the_most_telling_comes_first(place):
    planned = check.within_minutes(options(minutes=8), place, DOCTOR)
    assert named(planned) == WITHIN
    made = {path for step in planned for path in step.makes} | {place.run / "checkpoints", place.run, place.large.run}
    made |= {place.record("int8"), check.ROOT / "examples" / "fashion_mnist" / "fashion_mnist_16x16_10k.npz"}
    assert not [path for step in planned for path in step.needs if path not in made]
    assert len({path for step in planned for path in step.makes}) == sum(len(step.makes) for step in planned)
    commands = {step.name: " ".join(step.command) for step in planned}
    assert "--batch 1,64,256" in commands["build large"]
    assert all(str(place.large.run) in commands[name] for name in ("large network", "export large", "peers 1"))
    bare = doctored(torch={"missing": "no"}, **{"TensorRT-RTX": {"missing": "no"}})
    rest = named(check.within_minutes(options(minutes=8), place, bare))
    assert rest == ["tests of kernels", "tests of chains", "tests of networks", "tests of engines"]


def test_within_minutes_what_torch_compiles_is_measured_in_steps_of_its_own(place):
    """A step that is cut off leaves no figures, and torch compiles for a minute or more."""
    planned = check.within_minutes(options(minutes=8), place, DOCTOR)
    commands = {step.name: step.command for step in planned if any("benchmarks" in word for word in step.command)}
    others = {
        name: [word for word in command if word in ("diffusers", "compile")] for name, command in commands.items()
    }
    assert others == {
        "peers 1": ["diffusers"],
        "peers 64": ["diffusers"],
        "peers compiled": ["compile"],
        "peers on torch": ["diffusers"],
        "compiled on torch": ["compile"],
        "training": ["diffusers"],
    }
    files = [step.makes[0] for step in planned if step.name in commands and step.name != "training"]
    for number, file in enumerate(files):  # each is in the report
        row = {"kind": "diffusers", "precision": "fp16", "batch": number, "ratio": 1.0}
        file.write_text(json.dumps({"rows": [row], "not_run": []}))
    facts = found.gather(place.out, [], engines=place.engines, quick=False, doctor=None)
    assert [row["batch"] for row in facts["peers"]["rows"]] == list(range(len(files)))


def test_torch_is_the_network_where_no_plan_was_built(place):
    """TensorRT is there, but does not know the GPU; or it is not there at all."""
    for changes in ({}, {"TensorRT-RTX": {"missing": "no"}}):
        planned = check.within_minutes(options(minutes=8), place, doctored(**changes))
        (chain,) = (step for step in planned if step.name == "chain on torch")
        (large,) = (step for step in planned if step.name == "large network")
        assert (chain.not_run, large.not_run) == ("", "")
        assert chain.needs == (place.large.run,)
        assert chain.unless == (place.out / "bench-fp16.json",)  # a plan may be built, and not run here
    chain = dataclasses.replace(chain, command=script("print('ran')"), needs=(), makes=())
    assert do(place, chain).status == "ok"
    chain.unless[0].write_text("{}")
    unneeded = do(place, chain)
    assert (unneeded.status, unneeded.why) == ("not needed", "bench-fp16.json is there")
    assert found.verdict([Result("a", "always", "ok"), unneeded], {}) == "HOLDS: 1 steps, all that has to hold"
    assert found.not_verified([unneeded], {}, {}) == []


def test_a_gpu_that_tensorrt_does_not_know_has_not_failed(place):
    def tests(skipped):
        return {"engines": {"tests": 3, "failed": [], "skipped": skipped, "measured": []}}

    steps = check.within_minutes(options(minutes=8), place, DOCTOR)
    by_engine = ("build fp16", "parity fp16", "build fp32", "parity fp32", "bench fp16", "build for 1", "bench for 1")
    by_engine += ("serving",)
    assert tuple(step.name for step in steps if step.engine) == by_engine
    assert do(place, Step("a", script("raise SystemExit(1)"), engine=True)).engine
    results = [Result("tests of engines", "always", "ok"), Result("bench", "if run", "failed", engine=True)]
    unknown = tests([["not verified here: TensorRT-RTX on SM 9.0, which it does not know", 3]])
    assert found.verdict(results, unknown) == (
        "INCOMPLETE: nothing failed, but not seen: bench, tests of engines (all were skipped)"
    )
    assert found.verdict(results, tests([["one of them", 1]])) == "FAILED: bench"
    none = {"engines": {"tests": 0, "failed": [], "skipped": [], "measured": []}}
    assert found.verdict(results, none) == "FAILED: bench"
    assert found.verdict([Result("network", "always", "failed")], unknown) == "FAILED: network"


def test_figures_on_torch_are_named_so(tmp_path):
    cells = [{"batch": 1, "executor": "while", "failed": None, "ratio": 1.01}]
    rows = [
        {"run": "ddpmx on torch, fp16", "kind": "ddpmx", "precision": "fp16", "batch": 1, "ratio": None},
        {"run": "diffusers", "kind": "diffusers", "precision": "fp16", "batch": 1, "ratio": 4.0},
    ]
    speed = {"plan": "torch", "images": 256, "steps": 1000, "seconds": [9.0]}
    (tmp_path / "bench-fp16-1.json").write_text(json.dumps({"cells": [{**cells[0], "ratio": 1.03}]}))
    for name, values in (("bench", {"cells": cells}), ("peers", {"rows": rows, "not_run": []}), ("speed", speed)):
        (tmp_path / f"{name}-torch.json").write_text(json.dumps(values))
    facts = found.gather(tmp_path, [], engines=tmp_path, quick=False, doctor=DOCTOR)
    goals = {goal["what"]: (goal["measured"], goal["state"]) for goal in facts["goals"]}
    assert goals["chain ÷ bare engine, while, batch 1, fp16 on torch"] == (1.01, "reached")
    assert goals["chain ÷ bare engine, while, batch 1, fp16, for single images alone"] == (1.03, "NOT")
    assert goals["chain ÷ bare engine, while, batch 1, fp16"] == (None, "not measured")
    assert goals["diffusers eager ÷ ddpmx on torch, fp16, batch 1"] == (4.0, "NOT")
    assert goals["256 CIFAR images of 1000 steps, fp16, on torch, seconds (on an H200)"] == (9.0, "NOT")


def test_a_step_ends_with_the_minutes(place):
    step, begun = Step("slow", script("import time; time.sleep(60)"), 50, "always"), time.monotonic()
    result = steps.run_until(begun + steps.LEAST + 0.3, step, place.out / "logs", cwd=place.out, environment={})
    assert time.monotonic() - begun < 30
    assert (result.status, result.must) == ("not run", "always")
    assert "cut off after 5 s (--minutes)" in result.why
    late = steps.run_until(begun, step, place.out / "logs", cwd=place.out, environment={})
    assert (late.status, late.why) == ("not run", "no time was left (--minutes)")
    hangs = {"cwd": place.out, "environment": {}, "longest": 0.3}
    part = steps.run_until(time.monotonic() + 60, step, place.out / "logs", **hangs)
    assert (part.status, part.why) == ("not run", "cut off after 0 s (--minutes)")
    own = steps.run_until(time.monotonic() + 60, step_of(0.2), place.out / "logs", cwd=place.out, environment={})
    assert own.status == "timed out"  # its own limit: a failure


def step_of(seconds):
    return Step("slow", script("import time; time.sleep(60)"), seconds)


def test_the_report_is_there_after_every_step(checked, tmp_path):
    """Each step finds in it what was before."""
    looks = f"print(open({str(tmp_path / 'gpu-report' / 'gpu-report.md')!r}).read())"
    code, _, values = checked(
        [Step("a", script("pass"), must="always"), Step("b", script(looks), 60)], "--minutes", "1"
    )
    assert code == 0
    assert Path("gpu-report/engines/large").is_dir()  # `ddpmx build` makes no folders
    log = Path("gpu-report/logs/b.log").read_text()
    assert "INCOMPLETE: not finished yet" in log
    assert "| a | ok |" in log
    assert values["verdict"].startswith("HOLDS")


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_minutes_are_more_than_none(minutes, capsys):
    with pytest.raises(SystemExit) as ended:
        check.main(["--minutes", minutes], devices=HERE)
    assert ended.value.code == 2
    assert "--minutes" in capsys.readouterr().err


def test_the_peers_of_two_runs_are_one_table(tmp_path):
    for batch in (1, 64):
        rows = [{"kind": "diffusers", "precision": "fp16", "batch": batch, "ratio": 5.0 + batch}]
        not_run = [{"run": "compiled", "why": "no"}]
        (tmp_path / f"peers-{batch}.json").write_text(json.dumps({"steps": 50, "rows": rows, "not_run": not_run}))
    facts = found.gather(tmp_path, [], engines=tmp_path, quick=False, doctor=None)
    assert [row["batch"] for row in facts["peers"]["rows"]] == [1, 64]
    assert len(facts["peers"]["not_run"]) == 1
    reached = {goal["what"]: goal["state"] for goal in facts["goals"]}
    assert reached["diffusers eager ÷ ddpmx, fp16, batch 1"] == "reached"


def test_8_bits_and_training_have_goals(tmp_path):
    for name, seconds in (("int8", 2.0), ("fp16", 3.0)):
        cells = [{"batch": 64, "executor": "while", "failed": None, "chain_s": seconds, "ratio": 1.0}]
        (tmp_path / f"bench-{name}-64.json").write_text(json.dumps({"cells": cells}))
    rows = [("ddpmx", None), ("ddpmx --compile", 0.9), ("diffusers", 1.25), ("other", 1.5)]
    training = {"rows": [{"run": run, "ratio": ratio} for run, ratio in rows]}
    (tmp_path / "training.json").write_text(json.dumps(training))
    facts = found.gather(tmp_path, [], engines=tmp_path, quick=False, doctor=None)
    goals = {goal["what"]: (goal["measured"], goal["state"]) for goal in facts["goals"]}
    assert goals["the chain in fp16 ÷ in int8, batch 64"] == (1.5, "reached")
    assert goals["a step of training, the fastest other ÷ ddpmx"] == (1.25, "NOT")


def test_a_jetson_without_torch(place, tmp_path):
    no_torch = doctored(torch={"missing": "no module named torch"})
    planned = check.make_steps(options(), place, no_torch)
    (network,) = (step for step in planned if step.name == "network")
    assert "--onnx-dir" in network.not_run
    assert network.must == "always"
    elsewhere = check.Place(place.out, place.engines, tmp_path / "files")
    planned = check.make_steps(options(onnx_dir=tmp_path / "files"), elsewhere, no_torch)
    left_out = ("images", "network", "export fp32", "export fp16", "peers", *ON_TORCH, "training", *EIGHT_BITS)
    wanted = [name for name in ALL if name not in left_out]
    assert named(planned) == wanted
    (build,) = (step for step in planned if step.name == "build fp16")
    assert build.needs == (tmp_path / "files" / "model-fp16.onnx",)


def test_a_small_gpu_has_small_batches(place):
    orin = {**DOCTOR, "machine": {**DOCTOR["machine"], "gpus": [{**GPU, "memory": 8 << 30}]}}
    commands = {step.name: " ".join(step.command) for step in check.make_steps(options(), place, orin)}
    assert "--batch 1,4,16 --workspace 512" in commands["build fp16"]
    assert "--batch 32" in commands["network"]
    assert "build for 256" not in commands


def test_without_tensorrt_no_plans_are_built_with_the_reason(place):
    planned = check.make_steps(options(), place, doctored(**{"TensorRT-RTX": {"missing": "not installed"}}))
    assert [step.name for step in planned if "no TensorRT" in step.not_run] == [
        name for name in ALL if name.startswith(("build", "parity", "bench", "many", "serving", "export int8"))
    ]


def test_torch_without_cuda_trains_nothing(place):
    planned = check.make_steps(options(), place, doctored(torch={"version": "2.13.0", "cuda": None, "gpu": False}))
    (network,) = (step for step in planned if step.name == "network")
    assert "random" in network.command
    assert "peers" not in named(planned)


@pytest.mark.slow
def test_every_planned_command_exists(place, ddpmx):
    """Flags are looked up in --help, scripts on the disk."""
    known = {}
    for step in (
        *check.make_steps(options(), place, DOCTOR),
        *check.make_steps(options(quick=True), place, DOCTOR),
        *check.within_minutes(options(minutes=8), place, DOCTOR),
    ):
        python, *command = map(str, step.command)
        assert python == sys.executable
        if command[:2] == ["-m", "ddpmx_cli.main"]:
            name = command[2]
            if name not in known:
                known[name] = ddpmx(name, "--help").out
            for flag in (word for word in command[3:] if word.startswith("--")):
                assert flag in known[name], f"ddpmx {name} has no {flag}"
        else:
            assert command[0] == "-m" or Path(command[0]).is_file()
