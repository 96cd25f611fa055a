"""Every hint in the code can be followed: its commands, flags and names exist, and the commands that it shows work."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer

from ddpmx_cli.main import app

ROOT = Path(__file__).parents[2]
TREES = ("runtime/ddpmx", "ddpm_export", "cli/ddpmx_cli")
PLACEHOLDER = "…"


def flags(command: Any) -> set[str]:
    """Those of a command, or of all commands of a group."""
    own = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    return own.union(*map(flags, getattr(command, "commands", {}).values()))


COMMANDS: dict[str, set[str]] = {
    name: flags(command)
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}

FOR: dict[str, tuple[str, ...]] = {
    "cli/ddpmx_cli/import_.py": ("import",),
    "cli/ddpmx_cli/nll.py": ("eval",),
    "cli/ddpmx_cli/fid.py": ("eval",),
    "cli/ddpmx_cli/data.py": ("eval",),
    "runtime/ddpmx/tasks": ("eval",),
    "ddpm_export/quality": ("eval",),
    "ddpm_export/importers": ("import", "convert"),
    "ddpm_export/training": ("train", "import", "export", "parity"),
    "runtime/ddpmx/trt": ("build", "export", "generate"),
    "runtime/ddpmx/bench": ("bench",),
    "ddpm_export/graph": ("export",),
}
"""Whose hints are seen in which commands, by the beginning of the path, where it is not every command."""

OTHERS = {"--image_size", "--num_heads", "--array", "--head"}
"""Flags of other programs: those of OpenAI's scripts, which openai_flags.txt holds, and those of sbatch and ray."""
PROGRAMS = re.compile(r"\b(pip|apt|git|tar|trtexec|python|gunzip|zstd) [^;,`]*")


class Hint(NamedTuple):
    file: str
    line: int
    text: str

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands in which it is seen."""
        own = Path(self.file).stem
        if self.file.startswith("cli/") and own in COMMANDS:
            return (own,)
        return next((commands for start, commands in FOR.items() if self.file.startswith(start)), tuple(COMMANDS))


@dataclasses.dataclass
class File:
    """What names mean in one source file: the values that they are given, and what its functions return."""

    values: dict[str, list[ast.expr]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, tree: ast.Module) -> File:
        file = cls()
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                pairs = [(target, node.value) for target in node.targets]
            elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                pairs = [(node.target, node.value)]
            elif isinstance(node, ast.FunctionDef):
                returned = [
                    inside.value for inside in ast.walk(node) if isinstance(inside, ast.Return) and inside.value
                ]
                pairs = [(ast.Name(node.name), value) for value in returned]
            else:
                continue
            for target, value in pairs:
                if isinstance(target, ast.Name):
                    file.values.setdefault(target.id, []).append(value)
        return file


def texts(node: ast.expr, file: File, depth: int = 4) -> Iterator[str]:
    """The texts that an expression can be: each branch of a choice, with a placeholder for what is put in."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body, file, depth)
        yield from texts(node.orelse, file, depth)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from texts(value, file, depth)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield " ".join((*texts(node.left, file, depth), *texts(node.right, file, depth)))
    elif isinstance(node, ast.Dict):
        for value in node.values:
            yield from texts(value, file, depth)
    elif isinstance(node, (ast.Tuple, ast.List)):
        for value in node.elts:
            yield from texts(value, file, depth)
    elif depth:
        name = node.func if isinstance(node, ast.Call) else node
        if (isinstance(name, ast.Attribute) and name.attr == "get") or isinstance(name, ast.Subscript):
            name = name.value  # of a table of hints
        if isinstance(name, ast.Name):
            for value in file.values.get(name.id, []):
                yield from texts(value, file, depth - 1)


def hints() -> tuple[list[Hint], set[str]]:
    """All hints of the code, and the expressions of which no text is found."""
    found, unknown = [], set()
    for tree in TREES:
        for path in sorted((ROOT / tree).rglob("*.py")):
            parsed = ast.parse(path.read_text(encoding="utf-8"))
            file = File.of(parsed)
            for node in ast.walk(parsed):
                if not isinstance(node, ast.Call):
                    continue
                for keyword in node.keywords:
                    if keyword.arg == "hint":
                        said = [text for text in texts(keyword.value, file) if text]
                        found += [Hint(str(path.relative_to(ROOT)), node.lineno, text) for text in said]
                        if not said and ast.unparse(keyword.value) != "None":
                            unknown.add(f"{path.relative_to(ROOT)}: {ast.unparse(keyword.value)}")
    return found, unknown


HINTS, UNKNOWN = hints()

COMPUTED = {
    "cli/ddpmx_cli/begin.py: hint": "another error's, with the flag's name",
    "ddpm_export/any_module/adapter.py: _spec_hint(name)": "one for each input",
    "ddpm_export/any_module/probes.py: where.hint(error)": "of a table of torch's errors",
    "ddpm_export/importers/reading/foreign.py: hint": "of a table of what files are",
    "ddpm_export/importers/reading/tensor_bundle.py: hint": "the caller's",
    "ddpm_export/training/images/folder.py: '; '.join(hints)": "those of all problems",
    "runtime/ddpmx/backends/mnn.py: rebuild_command(path, self._record)": "a command; tests/ddpmx/formats has it",
    "runtime/ddpmx/formats/mnn_file.py: rebuild_command(path, record)": "the same",
    "runtime/ddpmx/backends/trt.py: plan_file.rebuild_command(path, self.info.engine)": "a command; tests/ddpmx/trt has it",
    "runtime/ddpmx/formats/plan_file.py: rebuild_command(path, engine)": "the same",
    "runtime/ddpmx/trt/compat.py: again": "the same",
    "runtime/ddpmx/scale/on_ray.py: hint or None": "of a worker's error",
}
"""Hints of which no text stands in the code, and where they come from."""


def test_every_hint_is_read_or_its_origin_is_named():
    assert {name for name in UNKNOWN if not name.endswith(": error.hint")} == set(COMPUTED)


def faults(hint: Hint) -> list[str]:
    """What in a hint does not exist."""
    wrong = []
    text = PROGRAMS.sub("", hint.text)
    named = [name for name in re.findall(r"\bddpmx ([a-z]+)", text) if name not in ("that", "is", "to", "again", "may")]
    wrong += [f"there is no `ddpmx {name}`" for name in named if name not in COMMANDS]
    named = [name for name in named if name in COMMANDS]
    for flag in re.findall(r"(?<![\w-])(--[a-z][\w-]*|-[a-zT](?![\w-]))", text):
        possible = {other for name in (*named, *hint.commands) for other in COMMANDS[name]}
        if flag not in possible and flag not in OTHERS:
            wrong.append(f"{flag} is no flag of {', '.join(dict.fromkeys((*named, *hint.commands)))}")
    for name in re.findall(r"\b((?:ddpmx|ddpm_export)(?:\.[A-Za-z_]\w*)+)", text):
        if not exists(name) and not name.endswith((".onnx", ".plan")):
            wrong.append(f"there is no {name} in Python")
    return wrong


def exists(name: str) -> bool:
    """Whether a dotted name is a module or in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[length:])
    return False


def test_there_are_hints_to_check():
    assert len(HINTS) > 250
    assert {hint.file.split("/")[0] for hint in HINTS} == {"runtime", "ddpm_export", "cli"}


def test_commands_flags_and_names_in_hints_exist():
    pytest.importorskip("torch", reason="not verified here: names of ddpm_export in hints (no torch)")
    wrong = [f"{hint.file}:{hint.line}: {fault}: {hint.text}" for hint in HINTS for fault in faults(hint)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("runtime/ddpmx/trt/build.py", "pass it with --specification FILE"),
        ("cli/ddpmx_cli/parity.py", "another --target"),
        ("ddpm_export/importers/x.py", "`ddpmx imports FILE`"),
        ("ddpm_export/importers/x.py", "from Python: ddpm_export.exports"),
        ("ddpm_export/importers/x.py", "--grid shows it"),
    ],
)
def test_a_hint_that_cannot_be_followed_is_found(file, text):  # control
    assert faults(Hint(file, 1, text))


# --- what is put into a command is one word of it --------------------------------------------------------------------

TAKES_A_PATH = "-o|--output|--out|--from|--report|--against|--spec|--cond|--data|--like|--checkpoint"
SHOWN = rf"(?<!from )\bddpmx ({'|'.join(COMMANDS)})\b[^;,`]*"
SHOWN_IN_HINTS = rf"{SHOWN}|(?<![\w-])({TAKES_A_PATH}) \x00\d+\x00"
NO_PATHS = {"found", "batch", "next(iter(SHIPPED))", "raw", "steps"}
"""Expressions in commands that are never a path: names of ours and numbers."""


def unquoted(source: str) -> list[str]:
    """What is put into a command of an f-string, and not quoted for a shell: a path may hold spaces."""
    wrong = []
    parsed = ast.parse(source)
    file = File.of(parsed)
    calls = [node for node in ast.walk(parsed) if isinstance(node, ast.Call)]
    hints = [keyword for call in calls for keyword in call.keywords if keyword.arg == "hint"]
    in_hints = {node for hint in hints for node in ast.walk(hint)}
    for node in ast.walk(parsed):
        if isinstance(node, ast.JoinedStr):
            parts = list(enumerate(node.values))
            text = "".join(str(p.value) if isinstance(p, ast.Constant) else f"\0{i}\0" for i, p in parts)
            for shown in re.finditer(SHOWN_IN_HINTS if node in in_hints else SHOWN, text):
                for index in re.findall(r"\0(\d+)\0", shown[0]):
                    value = node.values[int(index)]
                    assert isinstance(value, ast.FormattedValue)
                    given = file.values.get(ast.unparse(value.value), [value.value])
                    words = {ast.unparse(each) for each in (value.value, *given)}
                    if not (words & NO_PATHS or all(ast.unparse(each).startswith("shlex.quote(") for each in given)):
                        wrong.append(f"line {node.lineno}: {ast.unparse(value.value)}")
    return wrong


def test_paths_in_the_commands_that_are_shown_are_quoted():
    found = {
        f"{path.relative_to(ROOT)}: {fault}"
        for tree in TREES
        for path in (ROOT / tree).rglob("*.py")
        for fault in unquoted(path.read_text(encoding="utf-8"))
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize(
    "source",
    [
        'f"{path}: no; ddpmx export {path} -o model.onnx"',
        'f"ddpmx build model.onnx --batch {n} -o {str(path)}"',
        'InputError(fact, hint=f"another, or -o {output / 1}")',
        'name = str(path); f"`ddpmx build {name}` builds it"',
    ],
)
def test_a_path_that_is_not_quoted_is_found(source):  # control
    assert unquoted(source)
    assert not unquoted('name = shlex.quote(x); f"{path}: ddpmx build {name} -o {shlex.quote(str(path))}; {path}"')


# --- hints that show a command are run -------------------------------------------------------------------------------


def hint_of(error: str) -> str:
    _, found, hint = error.rpartition("Hint: ")
    assert found, error
    return hint.strip()


def nameless(path: Path, t_type: int | None = None) -> Path:
    """x − 0·t as an ONNX file that another exporter might have written: without ddpmx's metadata."""
    onnx = pytest.importorskip("onnx", reason="not verified here: hints for ONNX files (no onnx)")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["t"], ["tf"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["tf", "shape"], ["column"]),
        helper.make_node("Mul", ["column", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["eps"]),
    ]
    constants = [
        helper.make_tensor("shape", TensorProto.INT64, [4], [-1, 1, 1, 1]),
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
    ]
    dims = ["batch", 3, 8, 8]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, dims),
        helper.make_tensor_value_info("t", t_type or TensorProto.INT32, ["batch"]),
    ]
    outputs = [helper.make_tensor_value_info("eps", TensorProto.FLOAT, dims)]
    graph = helper.make_graph(nodes, "net", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("command", ["build", "parity", "generate", "bench"])
def test_the_spec_that_an_undescribed_file_needs_can_be_given_to_every_command(command, ddpmx, refused, tmp_path):
    pytest.importorskip("onnxruntime", reason="not verified here: hints for ONNX files (no onnxruntime)")
    if command == "build":
        pytest.importorskip("tensorrt_rtx", reason="not verified here: the hint of build (no TensorRT-RTX)")
    file = nameless(tmp_path / "net.onnx")
    more = {
        "build": ["--batch", "1,1,1"],
        "parity": ["--self-test"],
        "generate": ["-n", 1, "--steps", 2, "--out", tmp_path / "out"],
        "bench": ["--steps", 4, "--batch", 1],
    }[command]
    error = refused(command, file, *more)
    (flag,) = re.findall(r"--spec spec\.json", hint_of(error))
    (tmp_path / "spec.json").write_text('{"shape": [3, 8, 8]}')
    done = ddpmx(command, file, *more, *flag.replace("spec.json", str(tmp_path / "spec.json")).split())
    assert done.code == 0, done


def test_types_are_called_by_their_names(refused, tmp_path):
    pytest.importorskip("onnx", reason="not verified here: hints for ONNX files (no onnx)")
    (tmp_path / "spec.json").write_text('{"shape": [3, 8, 8]}')
    error = refused("generate", nameless(tmp_path / "net.onnx", 7), "--spec", tmp_path / "spec.json", "-n", 1)
    assert "'t' is int64, not int32" in error
    assert "t int32 [batch]" in hint_of(error)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "parity", "info", "build", "export"])
def test_another_project_s_weights_lead_to_import_and_not_in_a_circle(command, ddpmx, refused, tmp_path):
    pytest.importorskip("torch", reason="not verified here: importers (no torch)")
    from ddpm_export.importers.registry import Imported, convert
    from ddpm_export.networks.unet import UNet, UNetConfig
    from ddpmx.formats.spec import ModelSpec

    config = UNetConfig(3, 3, (8, 8), 32, (1, 2), 1, (4,), 0.0, 32)
    imported = Imported("ddpmx", config, ModelSpec((3, 8, 8)), dict(UNet(config).state_dict()))
    convert(imported, "pesser", tmp_path / "theirs")
    error = refused(command, tmp_path / "theirs" / "model.ckpt")
    (shown,) = re.findall(r"ddpmx import \S+ -o runs/NAME", hint_of(error))
    words = shlex.split(shown.replace("runs/NAME", str(tmp_path / "run")))[1:]
    open_settings = refused(*words)
    assert "set them, or" in hint_of(open_settings)
    flags = ("--size", 8, "-T", 1000, "--schedule", "linear", "--variance", "fixed_large")
    assert ddpmx(*words, *flags).code == 0


def test_images_of_an_npz_are_not_told_to_use_a_flag_that_refuses_them(refused, tmp_path):
    pytest.importorskip("torch", reason="not verified here: training (no torch)")
    np.savez(tmp_path / "odd.npz", images=np.zeros((4, 9, 9, 1), np.uint8))
    hint = hint_of(refused("train", "--data", tmp_path / "odd.npz", "--out", tmp_path / "run", "--mult", "1,2"))
    assert "--size" not in hint or "folder" in hint
