"""A module in half precision or bfloat16 on a CPU, every operation rounded: what a GPU computes, and ONNX Runtime does not.

torch's own half-precision convolutions are slow where the processor has no such instructions (75 × for Ho's CIFAR network
with AVX2), and round once, at the end. So each operation whose tensors are all half is computed in float32 and rounded:
the same within one unit in the last place, at float32's speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ddpm_export.graph.onnx_export import to_precision
from ddpm_export.networks.torch_backend import TorchBackend
from ddpmx.errors import NumericError
from ddpmx.formats.spec import ModelSpec, Precision, beside
from ddpmx.parity.check import Check
from ddpmx.parity.ladder import ParityReport, not_finite, run_ladder
from ddpmx.parity.reduced import JUDGED, RANGE_BOUND, Reduced, range_check
from ddpmx.parity.reference import Reference

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_OF_THE_FILE = ("identical rows", "batch against")  # checks of a runtime, which say nothing of a module


def judge(
    network: nn.Module,
    spec: ModelSpec,
    reference: Reference,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ParityReport, Reduced]:
    """Run the ladder with a module in the spec's precision, every operation rounded, and note its largest numbers.

    Args:
        network: float32, with the layers marked that compute in the precision; see :func:`to_precision`.
        spec: of the file; its precision is not fp32. Of a file in 8 bits this is what is beside those: half precision.
        reference: the record.
        progress: called with (network calls done, network calls in all).

    Returns:
        The report, and what a record keeps of it.

    Raises:
        InputError: no layer of the network may compute in this precision.
        BackendError: it fails.
    """
    spec = spec.replace(precision=beside(spec.precision))
    backend = RoundedBackend(to_precision(network, spec.precision), spec.precision)
    judged = JUDGED[spec.precision]
    try:
        report = run_ladder(backend, spec, reference, judged=judged, progress=progress)
    except NumericError as error:
        report = not_finite(backend, spec, reference, error, judged=judged)
    finally:
        backend.close()
    checks: list[Check] = [check for check in report.checks if not check.name.startswith(_OF_THE_FILE)]
    largest = dict(sorted(backend.largest.items(), key=lambda item: -item[1]))
    if (kept := range_check(spec.precision, backend.largest)) is not None:
        checks.insert(0, kept)
    return report, Reduced(spec.precision, backend.description, tuple(checks), largest)


class RoundedBackend(TorchBackend):
    """Runs a module with layers in half precision or bfloat16, each of their operations rounded.

    Args:
        network: from :func:`to_precision`.
        precision: fp16 or bf16.

    Attributes:
        largest: the largest |activation| in this precision of each layer so far, by its path, in running order; infinity
            after an overflow.
    """

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        super().__init__(network)
        self._dtype = DTYPES[precision]
        self.largest: dict[str, float] = {}

    @property
    def description(self) -> str:
        """torch's version and the device, and that the file itself was not run."""
        name = str(self._dtype).removeprefix("torch.")
        return f"{super().description}: the module, NOT the file, every operation rounded to {name}"

    def enqueue(self) -> None:
        """Run the network once."""
        with _paths(self._network) as path, _Rounding(self._dtype, path, self.largest):
            super().enqueue()


@contextmanager
def _paths(network: nn.Module) -> Iterator[list[str]]:
    """A list whose last entry is the path of the module that runs."""
    running = [""]
    handles = []
    for name, module in network.named_modules():

        def enter(_module: nn.Module, _inputs: Any, name: str = name) -> None:
            running.append(name.removeprefix("module."))

        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            running.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


class _Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes each operation on tensors of one narrow type in float32 and rounds its result."""

    def __init__(self, dtype: torch.dtype, path: list[str], largest: dict[str, float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype, self._path, self._largest = dtype, path, largest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        floating = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.is_floating_point()]
        narrow = bool(floating) and all(one.dtype == self._dtype for one in floating)
        # a view must stay one, an operation in place must write where it should, and a conversion already rounds
        plain = all(one.alias_info is None for one in (*func._schema.arguments, *func._schema.returns))
        if narrow and plain and kwargs.get("dtype") is None:
            widened = tree_map(self._widened, (args, kwargs))
            out = tree_map(self._rounded, func(*widened[0], **widened[1]))
        else:
            out = func(*args, **kwargs)
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.dtype == self._dtype and one.numel():
                value = float(one.detach().abs().max())
                name = self._path[-1] or f"{func._schema.name.removeprefix('aten::')} of the module itself"
                value = math.inf if math.isnan(value) else value
                before = self._largest.get(name, 0.0)
                if before <= RANGE_BOUND < value:  # those beyond the bound stand in the order in which they exceeded it
                    self._largest.pop(name, None)
                self._largest[name] = max(value, before)
        return out

    def _widened(self, one: Any) -> Any:
        return one.float() if isinstance(one, Tensor) and one.dtype == self._dtype else one

    def _rounded(self, one: Any) -> Any:
        return one.to(self._dtype) if isinstance(one, Tensor) and one.dtype == torch.float32 else one
