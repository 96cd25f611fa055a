"""Where in a foreign module something happened: the submodule's path, the line of source, the error's message."""

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
        "graph/where.py",
        "graph/any_batch.py",
        "graph/tensorrt.py",
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
    (r"unexpected keyword|positional argument|missing .* required", "Adapter(inputs={…}, fixed={…}) sets how it is called"),
    (r"No decompositions|No ONNX function|Unsupported|DispatchError|not.*implemented.*ONNX|ConversionError",
     "ONNX has no such operator: write it with others, for instance as a convolution or a matrix product"),
)  # fmt: skip
"""Hints for known failures, by a pattern of torch's message."""


def is_theirs(filename: str) -> bool:
    """Whether a source file is neither torch's nor the export's own."""
    return not filename.startswith(("<", *_NOT_THEIRS)) and os.path.abspath(filename) not in _OWN


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes, the first cause last."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        yield at
        at = at.__cause__ or at.__context__


def place(error: BaseException, root: nn.Module) -> str | None:
    """Path and line of the innermost call in the module's own code: "down.0.attention, net.py:12 in forward: `h = …`"."""
    paths = {id(module): name for name, module in root.named_modules()}
    for one in reversed(list(chain(error))):
        path, line = None, None
        for frame, number in traceback.walk_tb(one.__traceback__):
            if not is_theirs(frame.f_code.co_filename):
                continue
            first = next(iter(frame.f_code.co_varnames), "")  # "self", under any name
            if (known := paths.get(id(frame.f_locals.get(first)))) is not None:
                path, line = known, source(frame, number)
            elif path is not None:
                line = source(frame, number)
        if path is not None:
            return f"{_path(path)}, {line}"
    return None


def running_place(root: nn.Module) -> str | None:
    """Path and line of the innermost call that is running in the module's own code, as :func:`place`; None outside it."""
    paths = {id(module): name for name, module in root.named_modules()}
    line = None
    for frame, number in traceback.walk_stack(None):
        if line is None and is_theirs(frame.f_code.co_filename):
            line = source(frame, number)
        first = next(iter(frame.f_code.co_varnames), "")
        if line is not None and (known := paths.get(id(frame.f_locals.get(first)))) is not None:
            return f"{_path(known)}, {line}"
    return None


def source(frame: FrameType, number: int) -> str:
    """The line of a frame: "net.py:12 in forward: `h = …`"."""
    return _line(frame.f_code.co_filename, number, frame.f_code.co_name)


def here() -> str:
    """The innermost running line that is neither torch's nor the export's."""
    for frame, number in traceback.walk_stack(None):
        if is_theirs(frame.f_code.co_filename):
            return source(frame, number)
    return "an unknown place"


def place_in_messages(error: BaseException) -> str | None:
    """The last place named in the error messages: the converter's hold torch's stack as text."""
    text = "\n".join(str(one) for one in chain(error))
    hits = [hit for hit in re.findall(r'File "([^"\n]+)", line (\d+), in (\w+)', text) if is_theirs(hit[0])]
    return _line(hits[-1][0], int(hits[-1][1]), hits[-1][2]) if hits else None


def place_in_trace(trace: str) -> str | None:
    """The innermost line of foreign code in one of torch's stack traces, which it writes into every node it traces."""
    lines = re.findall(r'File "([^"\n]+)", line (\d+), in (\w+)', trace)
    theirs = [hit for hit in lines if os.path.isabs(hit[0]) and is_theirs(hit[0])]
    return _line(theirs[-1][0], int(theirs[-1][1]), theirs[-1][2]) if theirs else None


def operators(error: BaseException) -> set[str]:
    """The operators for which the messages say that ONNX has none: "aten.linalg_eig"."""
    text = "\n".join(str(one) for one in chain(error))
    return set(re.findall(r"found for <OpOverload\(op='([\w.]+)'", text))


def operator_place(names: set[str], graph: torch.fx.Graph) -> str | None:
    """The module that calls one of these operators, and the line of its ``forward``, from the trace's stack traces."""
    for node in graph.nodes:
        if node.op != "call_function" or operator(node.target) not in names:
            continue
        line = place_in_trace(node.meta.get("stack_trace") or "")
        stack = node.meta.get("nn_module_stack") or {}
        path = next((str(path) for path, _ in reversed(stack.values()) if path), "")
        if line is not None:
            return f"{_path(path)}, {line}"
    return None


def operator(target: object) -> str:
    """The name of an operator without its overload: "aten.linalg_eig"."""
    return ".".join(str(target).split(".")[:2])


def _path(name: str) -> str:
    """A path below the user's own module."""
    return "the module itself" if name in ("", "module") else name.removeprefix("module.")


def last_words(error: BaseException) -> str:
    """Type and message of the first cause; of a long message, the line that names an error."""
    for one in reversed(list(chain(error))):
        lines = [line.strip() for line in str(one).splitlines() if line.strip()]
        if lines:
            words = (
                lines[0] if len(lines) < 3 else next((x for x in lines if "Error" in x or "Could not" in x), lines[0])
            )
            return f"{type(one).__name__}: {words[:240]}"
    return type(error).__name__


def hint(error: BaseException) -> str | None:
    """What to do about the error, None if that is not known."""
    text = "\n".join(f"{type(one).__name__}: {one}" for one in chain(error))
    return next((advice for pattern, advice in HINTS if re.search(pattern, text)), None)


def _line(filename: str, number: int, function: str) -> str:
    text = linecache.getline(filename, number).strip()
    return f"{os.path.basename(filename)}:{number} in {function}" + (f": `{text[:100]}`" if text else "")
