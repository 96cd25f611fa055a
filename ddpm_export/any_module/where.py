"""Where in somebody else's module something happened: the module's path, the line of source, the last words."""

from __future__ import annotations

import linecache
import os
import re
import traceback
from collections.abc import Iterator
from types import FrameType

import onnxscript
import torch
from torch import nn

_NOT_THEIRS = tuple(os.path.dirname(os.path.abspath(part.__file__ or "")) + os.sep for part in (torch, onnxscript))
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_OWN = {
    os.path.join(_HERE, *name.split("/"))
    for name in (
        "any_module/adapter.py",
        "any_module/export.py",
        "any_module/half.py",
        "any_module/probes.py",
        "any_module/where.py",
        "graph/onnx_export.py",
        "networks/torch_backend.py",
    )
}

HINTS = (
    (r"data-dependent|GuardOnDataDependent|_local_scalar_dense|\.item\(\)|UserError.*bool",
     "a Python `if`, `int()` or `.item()` on a tensor's values cannot be exported: compute with torch.where instead"),
    (r"index out of range|IndexError", "a table that t indexes needs a row for each of the T timesteps"),
    (r"device", "make new tensors on the device of the input: torch.arange(…, device=x.device)"),
    (r"Input type .* and (weight|bias) type|must have the same dtype|expected .*scalar type|expected m1 and m2",
     "make new tensors of the input's dtype; the time may have to be float: Adapter(module, time=\"float\")"),
    (r"Constraints violated|specialized|not all values of .* are valid|ConstraintViolation",
     "the module fixes the size of the batch: use x.shape[0], never a number"),
    (r"size mismatch|must match|expected input.*channels|shapes cannot be multiplied|Sizes of tensors",
     "see the spec's shape, Adapter(channels=…, inputs=…) and time_dims"),
    (r"unexpected keyword|positional argument|missing .* required", "Adapter(inputs={…}, fixed={…}) says how it is called"),
    (r"No decompositions|No ONNX function|Unsupported|DispatchError|not.*implemented.*ONNX|ConversionError",
     "ONNX has no such operator: write it with others, for instance as a convolution or a matrix product"),
)  # fmt: skip
"""What is known to go wrong, by torch's words for it."""


def is_theirs(filename: str) -> bool:
    """Whether a file of source belongs neither to torch nor to the export."""
    return not filename.startswith(("<", *_NOT_THEIRS)) and os.path.abspath(filename) not in _OWN


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it came from, the first cause last."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        yield at
        at = at.__cause__ or at.__context__


def place(error: BaseException, root: nn.Module) -> str | None:
    """ "down.0.attention, net.py:12 in forward: `h = …`", of the innermost line that is the module's own."""
    paths = {id(module): name for name, module in root.named_modules()}
    for one in reversed(list(chain(error))):
        path, line = None, None
        for frame, number in traceback.walk_tb(one.__traceback__):
            if not is_theirs(frame.f_code.co_filename):
                continue
            first = next(iter(frame.f_code.co_varnames), "")  # "self", by whatever name
            if (known := paths.get(id(frame.f_locals.get(first)))) is not None:
                path, line = known, source(frame, number)
            elif path is not None:
                line = source(frame, number)
        if path is not None:
            return f"{_path(path)}, {line}"
    return None


def source(frame: FrameType, number: int) -> str:
    """ "net.py:12 in forward: `h = …`"."""
    return _line(frame.f_code.co_filename, number, frame.f_code.co_name)


def here() -> str:
    """The innermost running line that is neither torch's nor the export's."""
    for frame, number in traceback.walk_stack(None):
        if is_theirs(frame.f_code.co_filename):
            return source(frame, number)
    return "an unknown place"


def told_place(error: BaseException) -> str | None:
    """The last place that the messages themselves name, where the converter carries torch's stack as text."""
    text = "\n".join(str(one) for one in chain(error))
    found = [hit for hit in re.findall(r'File "([^"\n]+)", line (\d+), in (\w+)', text) if is_theirs(hit[0])]
    return _line(found[-1][0], int(found[-1][1]), found[-1][2]) if found else None


def operators(error: BaseException) -> set[str]:
    """The operators that the messages say have no form in ONNX: "aten.linalg_eig"."""
    text = "\n".join(str(one) for one in chain(error))
    return set(re.findall(r"found for <OpOverload\(op='([\w.]+)'", text))


def operator_place(names: set[str], graph: torch.fx.Graph) -> str | None:
    """The module that calls one of these operators, and the line of its ``forward``, by what the trace remembers."""
    for node in graph.nodes:
        if node.op != "call_function" or operator(node.target) not in names:
            continue
        lines = re.findall(r'File "([^"\n]+)", line (\d+), in (\w+)', node.meta.get("stack_trace") or "")
        theirs = [hit for hit in lines if is_theirs(hit[0])]
        stack = node.meta.get("nn_module_stack") or {}
        path = next((str(path) for path, _ in reversed(stack.values()) if path), "")
        if theirs:
            return f"{_path(path)}, {_line(theirs[-1][0], int(theirs[-1][1]), theirs[-1][2])}"
    return None


def operator(target: object) -> str:
    """Its name without the overload: "aten.linalg_eig"."""
    return ".".join(str(target).split(".")[:2])


def _path(name: str) -> str:
    """A path below the user's own module."""
    return "the module itself" if name in ("", "module") else name.removeprefix("module.")


def last_words(error: BaseException) -> str:
    """The first cause, by its type and the last line that says something."""
    for one in reversed(list(chain(error))):
        lines = [line.strip() for line in str(one).splitlines() if line.strip()]
        if lines:
            words = (
                lines[0] if len(lines) < 3 else next((x for x in lines if "Error" in x or "Could not" in x), lines[0])
            )
            return f"{type(one).__name__}: {words[:240]}"
    return type(error).__name__


def hint(error: BaseException) -> str | None:
    """What to do about it, if that is known."""
    text = "\n".join(f"{type(one).__name__}: {one}" for one in chain(error))
    return next((said for pattern, said in HINTS if re.search(pattern, text)), None)


def _line(filename: str, number: int, function: str) -> str:
    text = linecache.getline(filename, number).strip()
    return f"{os.path.basename(filename)}:{number} in {function}" + (f": `{text[:100]}`" if text else "")
