"""What the pages tell a reader to type: every command is run, or listed below with the reason why not; so is all Python.

``ddpmx`` commands are run by the code behind them, in this process, in a folder that was prepared once. What would take
minutes is made cheap by :data:`CHEAP`. Of every ``ddpmx`` command, run or not, the flags have to exist.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from typer.main import get_command

from ddpmx_cli.main import app, run
from docs.reading import PAGES, ROOT, Block, all_blocks, blocks, commands, dead_links, name

pytestmark = pytest.mark.torch

CHEAP = {
    "train": {
        **{"--steps": "2", "--batch": "2", "--width": "8", "--groups": "4", "--mult": "1", "--blocks": "1"},
        **{"--attention": "", "--sample-every": "0", "--device": "cpu", "--threads": "1", "--warmup": "1"},
    },
    "train --from": {"--steps": "2", "--batch": "2", "--sample-every": "0", "--device": "cpu", "--threads": "1"},
    "train --dry-run": {
        "--width": "8",
        "--groups": "4",
        "--mult": "1",
        "--blocks": "1",
        "--attention": "",
        "--batch": "2",
    },
    "train --resume": {"--steps": "401"},  # the prepared run has 400
    "generate": {"-n": "2", "--steps": "4"},
    "inpaint": {"--steps": "10", "--resamplings": "2"},
    "eval": {"--images": "2", "--terms": "3"},
    "score draw": {"-n": "2", "--steps": "4"},
    "score draw --ode": {"-n": "2", "--tolerance": "0.1"},
    "score encode": {"--ddim": "4"},
    "score nll": {"--images": "1", "--tolerance": "0.1"},
    "compress": {"--book": "8", "--steps": "6"},
    "bench": {"--seconds": "0.05", "--batch": "1,2"},
}
"""Options that are replaced, or added, when a command is run."""

PLAN = "runs a plan, which needs a GPU; tests/cli/test_plan.py runs it on fakes"
BUILD = "takes seconds to minutes; tests/cli/test_build.py runs it"
SYSTEM = "changes the system"
INSTALL = "installs something"
NATIVE = "compiles for minutes; tests/native/test_package.py does it"
NOT_RUN = {
    "make demo*": "takes minutes; `make long` runs it with a tiny network",
    "python examples/emoji/emoji.py*": "takes an hour; tests/examples/test_emoji.py walks the way with a tiny network",
    "make test": "is what runs this test",
    "make long": "minutes; it runs tests",
    "make check": "runs tests",
    "make docs": "tests/docs/test_site.py runs it",
    "make bench": "takes minutes",
    "make gpu-check*": "needs a GPU; tests/cli/test_gpu_check.py runs it without",
    "pip install *": INSTALL,
    "pip uninstall *": INSTALL,
    "pre-commit install": INSTALL,
    "sh .ci/native-tools": INSTALL,
    "python3 -m venv *": INSTALL,
    ". .venv/bin/activate": "is of the shell",
    "sudo *": SYSTEM,
    "cmake *": NATIVE,
    "cc *": NATIVE,
    "export PKG_CONFIG_PATH=*": NATIVE,
    "python -m ddpmx_native*": NATIVE,
    "python -m ddpmx.cuda.make_ptx*": "needs a compiler from the network; tests/ddpmx/cuda/test_kernels.py runs it",
    "*pytest -q *": "is a run of other tests",
    "python tests/gpu/check.py *": "needs a GPU",
    "python tests/benchmarks/samplers.py *": "takes an hour",
    "python tests/benchmarks/quantization.py *": "is a measurement",
    "torchrun *": "starts processes; tests/ddpm_export/training/test_distributed.py does",
    "trtexec *": "is NVIDIA's, and needs a GPU",
    "ddpmx build *": BUILD,
    "ddpmx parity *.plan*": PLAN,
    "ddpmx parity *--polygraphy*": "takes long; tests/cli/test_parity.py runs it",
    "ddpmx bench *.plan*": PLAN,
    "ddpmx generate *.plan*": PLAN,
    "ddpmx generate *--provider cuda*": "needs a GPU; tests/ddpmx/backends/test_ort_device.py runs it on a fake",
    "ddpmx generate model.onnx *--guidance *": "needs a model with null_class; tests/cli/test_generate.py runs it",
    "ddpmx generate *--ray *": "needs Ray; tests/ddpmx/scale/test_on_ray.py runs it",
    "ddpmx eval fid *": "needs torch-fidelity and Inception; tests/ddpm_export/quality runs it",
    "ddpmx export runs/x *": "needs the images of the network at hand; other exports are run",
}
"""Commands (with wildcards) that are not run, and why. Every one of them stands in a page."""

ELSEWHERE = {
    "examples/autoregressive/README.md": "tests/examples/test_autoregressive.py",
    "examples/c/README.md": "tests/examples/test_native_examples.py",
    "examples/cpp/README.md": "tests/examples/test_native_examples.py",
    "examples/jetson/README.md": "tests/examples/test_jetson.py",
    "examples/python-embedding/README.md": "tests/examples/test_python_embedding.py",
}
"""Pages whose commands another test takes out of them and runs."""

HAS_MNN = importlib.util.find_spec("MNN") is not None

TYPED = [block for block in all_blocks("sh") if block.page not in ELSEWHERE]
PYTHON = [block for block in all_blocks("python") if block.page != "docs/extending.md"]  # test_extending.py runs that


def reason_not_to_run(command: str) -> str | None:
    if "--for mnn" in command or ".mnn" in command:  # takes no second
        return None if HAS_MNN else "not verified here: MNN is not installed"
    return next((why for pattern, why in NOT_RUN.items() if fnmatchcase(command, pattern)), None)


def parsed(words: list[str]) -> dict[str, object]:
    """The arguments of a ``ddpmx`` command, which is not run. A flag that does not exist is an AssertionError."""
    command, rest = get_command(app), words[1:]
    while hasattr(command, "commands"):  # a group: ddpmx eval nll
        name, *rest = rest
        assert name in command.commands, f"{shlex.join(words)}: there is no {name!r}"
        command = command.commands[name]
    try:
        return command.make_context(name, rest).params
    except Exception as error:  # click's, or that of the copy of click in typer
        raise AssertionError(f"{shlex.join(words)}: {error}") from error


def cheap(words: list[str]) -> list[str]:
    """The command with the options of :data:`CHEAP`."""
    kind = next((flag for flag in ("--resume", "--from", "--dry-run") if words[1] == "train" and flag in words), "")
    if words[1:3] == ["eval", "swd"]:
        return list(words)
    if words[1] == "score":
        kind = words[2] + " --ode" * ("--ode" in words)
    table = CHEAP.get(f"{words[1]} {kind}".rstrip(), {})
    words = list(words)
    for flag, value in table.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return words


class Shell:
    """Runs ``ddpmx`` commands in the working folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prepared: Path) -> None:
        self._monkeypatch, self._capsys, self._prepared = monkeypatch, capsys, prepared

    def __call__(self, words: list[str]) -> None:
        parsed(words)
        special: Callable[[list[str]], None] | None = getattr(self, f"_{words[1]}", None)
        (special or self._run)(words)

    def _run(self, words: list[str]) -> None:
        self._capsys.readouterr()
        self._monkeypatch.setattr("sys.argv", cheap(words))
        try:
            run()
            code: object = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = self._capsys.readouterr()
        assert code == 0, f"{shlex.join(words)}\n{out}{err}"
        assert "Traceback" not in err

    def _train(self, words: list[str]) -> None:
        """Train two steps; then the run is the prepared one, so that what follows has a trained network.

        Not where it takes classes or conditions, which the prepared one does not.
        """
        params = parsed(words)
        if params["resume"] or params["dry_run"]:
            return self._run(words)
        images = params["images"] or params["data"]
        out = Path("runs") / Path(str(images)).stem if params["out"] is None else Path(str(params["out"]))
        shutil.rmtree(out, ignore_errors=True)
        self._run(words)
        assert list(out.glob("checkpoints/*/ema.safetensors"))
        if params["classes"] or params["condition"]:
            return None
        shutil.rmtree(out)
        shutil.copytree(self._prepared / "runs" / "photos", out)
        return None

    def _export(self, words: list[str]) -> None:
        """The prepared files in place of an export, which takes ten seconds; tests/cli/test_train_export.py exports."""
        params = parsed(words)
        assert list(Path(params["run"]).glob("checkpoints/*/spec.json")), f"{shlex.join(words)}: there is no such run"
        assert params["data"] is None or Path(params["data"]).exists(), f"{shlex.join(words)}: there are no such images"
        stem = "model-fp16" if params["fp16"] else "model"
        shutil.copy(self._prepared / f"{stem}.onnx", params["output"])
        shutil.copy(self._prepared / f"{stem}.parity.npz", Path(params["output"]).with_suffix(".parity.npz"))

    def _parity(self, words: list[str]) -> None:
        """Without plots, which take most of the time; tests/ddpmx/parity/test_report.py draws them."""
        from ddpmx.parity import plots

        self._monkeypatch.setattr(plots, "draw", lambda *_: {})
        self._run(words)

    def _doctor(self, words: list[str]) -> None:
        """Without the processes that try each library; tests/ddpmx/system/test_doctor.py has them."""
        from ddpmx.system import doctor

        self._monkeypatch.setattr(doctor, "_probe", lambda code: {"missing": "not tried"})
        self._run(words)


@pytest.fixture
def shell(reader, prepared, monkeypatch, capsys):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Shell(monkeypatch, capsys, prepared)
    for number, handler in before.items():
        signal.signal(number, handler)


# --- commands ---------------------------------------------------------------------------------------------------------


def to_run(block: Block) -> list[list[str]]:
    """The commands of a block that have no reason not to run."""
    return [] if block.not_run else [shlex.split(line) for line in commands(block) if reason_not_to_run(line) is None]


@pytest.mark.parametrize("block", TYPED, ids=str)
def test_commands_can_be_run_or_have_a_reason_not_to(block):
    assert [words for words in to_run(block) if words[0] != "ddpmx" and words != ["make", "help"]] == [], (
        "neither a ddpmx command nor in NOT_RUN"
    )
    for command in commands(block):
        if (words := shlex.split(command))[0] == "ddpmx":
            parsed(words)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in TYPED if to_run(block)}))
def test_commands_run(page, shell):
    """In their order, since one may need what another has written."""
    for block in TYPED:
        for words in to_run(block) if block.page == page else []:
            if words[0] == "ddpmx":
                shell(words)


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {command.split()[1] for block in TYPED for command in commands(block) if command.startswith("make ")}
    targets |= set(re.findall(r"`make ([a-z-]+)", "".join(path.read_text(encoding="utf-8") for path in PAGES)))
    assert len(targets) >= 6
    assert [target for target in sorted(targets) if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_every_reason_is_for_a_command_of_a_page():
    typed = [command for block in TYPED for command in commands(block)]
    assert [pattern for pattern in NOT_RUN if not any(fnmatchcase(command, pattern) for command in typed)] == []


def test_tests_that_are_named_as_a_reason_exist():
    named = re.findall(r"tests/[\w/]+\.py", " ".join(NOT_RUN.values()))
    assert len(named) >= 6
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_pages_that_are_run_elsewhere_are_read_there():
    for page, test in ELSEWHERE.items():
        source = (ROOT / test).read_text(encoding="utf-8")
        assert "README.md" in source, test
        assert Path(page).parent.name in source, f"{test} does not name {page}"


def test_every_block_says_what_it_is_in():
    assert [str(block) for block in all_blocks() if not block.kind] == []


@pytest.mark.slow
def test_a_made_up_command_is_noticed(reader, shell):  # control
    page = (
        "```sh\nddpmx generate --engine model.onnx \\\n  --colour blue   # no such flag\n```\n```sh\nmagic wand\n```\n"
    )
    first, second = (commands(block) for block in blocks("page.md", page))
    assert first == ["ddpmx generate --engine model.onnx --colour blue"]
    for typed in (*first, "ddpmx dream model.onnx", "ddpmx info nothing.onnx", "ddpmx export runs/nothing"):
        with pytest.raises(AssertionError):
            shell(shlex.split(typed))
    assert [reason_not_to_run(command) for command in second] == [None]


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in PYTHON if block.not_run is None], ids=str)
def test_python_runs(block, reader):
    exec(compile(block.text, str(block), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("block", [block for block in PYTHON if block.not_run is not None], ids=str)
def test_python_that_is_not_run_is_python(block):
    compile(block.text, str(block), "exec")


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


def test_a_dead_link_is_noticed():  # control
    text = "[a](README.md) [b](docs/nothing.md#x) ![c](nothing.png) [`d`](LICENSE) `[e](gone)`\n```\n[f](gone)\n```\n"
    assert dead_links(ROOT / "README.md", text) == ["docs/nothing.md", "nothing.png"]


def test_nothing_was_left_to_be_filled_in():
    assert [name(path) for path in PAGES if re.search(r"@@|TODO|FIXME|XXX", path.read_text(encoding="utf-8"))] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
