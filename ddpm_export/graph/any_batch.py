"""Tracing a network for batches of any size, although its code treats the size of the batch as a Python number.

torch.export carries the size as a symbol. ``len(x)``, ``x.chunk(2)`` and ``x.split(len(x) // 2)``, as people write them
for a batch that is doubled for classifier-free guidance, turn the symbol into a number, and with it the whole graph is
for that number alone. Here they are traced as slices whose bounds are symbols. What else fixes the size (a loop over
the images, above all) is found with its line.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from ddpmx.errors import BackendError

_SIZES = range(2, 10)
"""The batch sizes for which a condition is tried: one that fails for any of them fixes the size. Not 1, of which torch
likes to know whether it is 1, and which is checked by numbers."""

_SPLITS = {"chunk", "unsafe_chunk", "split", "unsafe_split", "tensor_split"}


class _Slices(TorchFunctionMode):
    """``chunk``, ``split`` and ``tensor_split`` of a symbolic size, as slices. All else, and all other sizes, as it is."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call one function of torch's."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _SPLITS and (parts := _split(name.removeprefix("unsafe_"), *args, **kwargs)) is not None:
            return parts
        return func(*args, **kwargs)


def _split(name: str, tensor: Any = None, *args: Any, dim: Any = None, **kwargs: Any) -> tuple[Tensor, ...] | None:
    """The parts, or None where torch's own function does it."""
    given = [*args, *kwargs.values()]
    tensor = tensor if tensor is not None else kwargs.get("input", kwargs.get("tensor"))
    given = [value for value in given if not isinstance(value, Tensor)]
    if dim is None:
        dim = given[1] if len(given) > 1 else 0
    if not isinstance(tensor, Tensor) or not given or not isinstance(dim, int):
        return None
    total, how = tensor.shape[dim], given[0]
    lengths = how if isinstance(how, (list, tuple)) else [how]
    if not any(isinstance(size, torch.SymInt) for size in (total, *lengths)):
        return None
    if isinstance(how, (list, tuple)):
        if name != "split":  # tensor_split by indices is made of slices already
            return None
        bounds: list[Any] = [0]
        for length in how[:-1]:
            bounds.append(bounds[-1] + length)
        bounds.append(total)
    else:
        if name == "tensor_split":
            return None
        size = (total + how - 1) // how if name == "chunk" else how
        # the number of parts, at the size that is traced; whether it is that for every size is checked by numbers
        parts = -(-_hint(total) // _hint(size))
        bounds = [i * size for i in range(parts)] + [total]
    return tuple(tensor.narrow(dim, start, end - start) for start, end in itertools.pairwise(bounds))


def _hint(size: Any) -> int:
    """The number behind a symbol in this trace, without a condition on the symbol."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


class Watch:
    """What fixed the size of the batch, found while torch traces.

    Attributes:
        places: for each condition that some batch does not meet, in the order of the trace, what ``where`` gave.
    """

    def __init__(self, where: Callable[[], str | None]) -> None:
        self._where = where
        self.places: list[str] = []

    def note(self, condition: Any) -> None:
        """Look at a condition on the sizes that torch has met and will rely on."""
        if _fixes(condition) and (place := self._where()) is not None:
            self.places.append(place)


def _fixes(condition: Any) -> bool:
    try:
        symbols = condition.free_symbols
        return any(condition.subs(dict.fromkeys(symbols, size)) == False for size in _SIZES)  # noqa: E712 - sympy's
    except Exception:  # an expression of torch's own that does not evaluate
        return False


@contextlib.contextmanager
def any_batch(network: nn.Module, watch: Watch | None = None) -> Iterator[None]:
    """Trace a network inside with symbolic sizes wherever that is possible.

    Python's ``len`` cannot return a symbol, so while it traces, the code of the network's classes, and what it calls from
    other files, sees another one, which is the same for everything but a traced tensor.
    """
    log = ShapeEnv._log_guard

    def log_guard(self: Any, prefix: str, condition: Any, *args: Any, **kwargs: Any) -> Any:
        if watch is not None:
            watch.note(condition)
        return log(self, prefix, condition, *args, **kwargs)

    replaced = [names for names in _namespaces(network) if "len" not in names]
    for names in replaced:
        names["len"] = _len
    ShapeEnv._log_guard = log_guard  # type: ignore[assignment, method-assign]
    try:
        with _Slices():
            yield
    finally:
        ShapeEnv._log_guard = log  # type: ignore[method-assign]
        for names in replaced:
            del names["len"]


def _len(value: Any, /) -> Any:
    if isinstance(value, Tensor) and value.ndim and isinstance(value.shape[0], torch.SymInt):
        return value.shape[0]
    return len(value)


def _namespaces(network: nn.Module) -> list[dict[str, Any]]:
    """The global names of the files that the network's code is in, and of those whose functions these have imported."""
    classes = {one for module in network.modules() for one in type(module).__mro__}
    found: dict[int, dict[str, Any]] = {}
    calls = [value for one in classes for value in vars(one).values()]
    calls += [getattr(module, "__dict__", {}).get("forward") for module in network.modules()]
    for _ in range(2):
        further = []
        for call in calls:
            try:
                function = inspect.unwrap(call) if callable(call) else call
            except ValueError:  # an object that answers to every name wraps itself
                continue
            if isinstance(function, types.FunctionType) and id(function.__globals__) not in found:
                names = function.__globals__
                if not str(names.get("__name__", "")).startswith(("torch.", "ddpm_export.graph.any_batch")):
                    found[id(names)] = names
                    further += list(names.values())
        calls = further
    return list(found.values())


class FixedBatchError(BackendError):
    """torch traced the network for one size of the batch alone."""


def fixed_batch(
    watch: Watch, fact: str = "torch can trace this network only for one size of the batch"
) -> FixedBatchError:
    """The error, with the line that fixed the size where it is known."""
    line = watch.places[0] if watch.places else None
    if line is None:
        hint = "compute with x.shape[0] as it is, or -1, and all images at once"
    elif re.search(r"\bfor\b|\brange\(|\bzip\(|\bmap\(", line):
        hint = "without a loop over the images: compute the whole batch at once"
    elif re.search(r"\bint\(|\.item\(|\.tolist\(|\brange\(", line):
        hint = "use x.shape[0] as it is, without int()"
    else:
        hint = "that line needs the batch size as a Python number: use slices such as h[: x.shape[0]], reshape, or -1"
    return FixedBatchError(fact, note=line and f"the size of the batch becomes a number at {line}", hint=hint)
