"""The checks of a foreign module before its export: one clear error for each way in which its file would be wrong.

A module that mixes the images of a batch, draws random numbers, or changes itself as it runs would become a file that
gives wrong images and no error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_export.any_module.adapter import Canonical
from ddpm_export.graph import where
from ddpmx.errors import BackendError, DdpmxError, InputError, NumericError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.ladder import SILENT
from ddpmx.sampling import chain
from ddpmx.sampling.conditioning import example

_PLAIN_LIST = "layers in a plain list do not belong to the module: use nn.ModuleList(…)"

ROWS = 3
SAME = 1e-4
"""Largest difference, in units of the output's RMS, that the order of float32 sums may make."""

UNUSED = 1e-6
"""A change by half of all timesteps that moves the output by less, in the same unit, is rounding: t does not count."""

_NARROW = (torch.float16, torch.bfloat16)
Inputs = dict[str, Tensor]


def probe(network: Canonical, spec: ModelSpec) -> None:
    """Check that a network can be exported.

    Args:
        network: on the CPU. It is not changed, unless it changes itself.
        spec: of the network, in units of [−1, 1].

    Raises:
        InputError: it is in training mode, random, changes itself, mixes the images of a batch, does not use one of
            its inputs, or its weights, its numbers inside or its output are of the wrong kind.
        NumericError: its weights or outputs are not finite.
        BackendError: it fails.
    """
    check_mode(network)
    check_weights(network)
    inputs = example_inputs(spec)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    watch = _Watch(network, inputs)
    out = run(network, inputs, watch)
    check_outputs(out, spec)
    if (fault := watch.fault()) is not None:
        raise fault
    _check_unchanged(network, before)
    again = run(network, inputs)
    if not torch.equal(again, out):
        raise InputError(
            "the module's output differs between two calls with the same inputs",
            note=watch.random and f"it draws random numbers: {watch.random}",
            hint="noise belongs to the chain; remove dropout that ignores eval()",
        )
    unit = float(out.square().mean().sqrt())
    if unit < SILENT:
        raise InputError(
            "the network's output is nearly zero, so a file cannot be checked against it",
            note=f"RMS of its output: {unit:.1g}; its last layer is as it was initialised",
            hint="train it first",
        )
    _check_rows(network, inputs, out, unit)
    _check_inputs_used(network, spec, inputs)


def example_inputs(spec: ModelSpec, rows: int = ROWS, seed: int = 0) -> Inputs:
    """Typical inputs: noise, t from 0 to T−1, and the spec's conditioning inputs."""
    x = chain.initial(seed, np.arange(rows), spec.shape)
    t = np.linspace(0, spec.timesteps - 1, rows).round().astype(np.int32)
    arrays: dict[str, Any] = {"x": x, "t": t, **example(spec, np.arange(rows), seed=seed)}
    if spec.self_condition:
        arrays["x0_prev"] = np.clip(x[::-1], -1, 1)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def run(network: nn.Module, inputs: Inputs, watch: _Watch | None = None) -> Any:
    """The output; two outputs of one shape are concatenated along the channels.

    Raises:
        BackendError: the module fails; the error says where.
    """
    try:
        with torch.no_grad():
            if watch is None:
                out = network(**inputs)
            else:
                with watch:
                    out = network(**inputs)
    except DdpmxError:
        raise
    except Exception as error:  # foreign code may raise anything
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        raise BackendError(
            f"the module fails at {where.place(error, network) or 'an unknown place'}",
            note=f"{where.last_words(error)}; its inputs were {shapes}",
            hint=where.hint(error),
        ) from error
    if isinstance(out, tuple) and len({part.shape for part in out}) == 1:
        return torch.cat(out, dim=1)
    return out


def first_call(network: nn.Module, inputs: Inputs, operators: set[str]) -> str | None:
    """The line that calls one of these operators, or None if no line does."""
    finder = _Finder(operators)
    with torch.no_grad(), finder:
        network(**inputs)
    return finder.line


def check_mode(network: Canonical) -> None:
    """Check that the whole module is in eval mode.

    Raises:
        InputError: it is not.
    """
    training = [module for module in network.module.modules() if module.training and not _has_no_modes(module)]
    if training:
        kinds = sorted({type(module).__name__ for module in training if not list(module.children())})
        kinds = kinds or sorted({type(module).__name__ for module in training})
        raise InputError(
            "the module is in training mode",
            note=f"{len(training)} parts of it: {', '.join(kinds)}"[:200],
            hint="module.eval(); and export the averaged weights, if there are any",
        )


def _has_no_modes(module: nn.Module) -> bool:
    """Whether it is torch's own and the same in both modes: a container; a parametrization, which begins in training."""
    kind = type(module)
    if kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict):
        return True
    return kind.__module__.startswith("torch.nn.utils.parametri") and kind.__name__ != "_SpectralNorm"


def check_weights(network: Canonical) -> None:
    """Check that there are weights, float32 and finite.

    Raises:
        InputError: there are none, or they have another type or no values.
        NumericError: NaN or an infinity.
    """
    if not list(network.module.parameters()):
        raise InputError("the module has no weights", hint=_PLAIN_LIST)
    for name, p in network.module.named_parameters():
        if p.device.type == "meta":
            raise InputError(f"{name} has no values", note="it is on the device meta", hint="load the weights first")
        if p.dtype != torch.float32:
            raise InputError(f"{name} is {str(p.dtype).removeprefix('torch.')}, not float32", hint="module.float()")
    for name, tensor in [*network.module.named_parameters(), *network.module.named_buffers()]:
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise NumericError(f"{name} has NaN in it", hint="use an earlier checkpoint")
    for name, p in network.module.named_parameters():
        if not bool(p.isfinite().all()):
            raise NumericError(f"{name} has infinities in it", hint="use an earlier checkpoint")


def check_outputs(out: Any, spec: ModelSpec) -> None:
    """Check that the output is float32, finite, and of the image's shape.

    Raises:
        InputError: another type or shape.
        NumericError: not finite.
    """
    if not isinstance(out, Tensor):
        raise InputError("the module gives two outputs of different shapes")
    c, height, width = spec.shape
    expected = [ROWS, c * len(spec.outputs), height, width]
    if list(out.shape) != expected:
        doubled = list(out.shape) == [ROWS, 2 * c, height, width]
        raise InputError(
            f"the module's output has the shape {list(out.shape)}, expected {expected}",
            hint='ModelSpec(…, variance="learned_range"), if the second half is its variance; else '
            "Adapter(…, output=lambda out: out[:, :C])"
            if doubled
            else "Adapter(…, output=…) selects the output",
        )
    if out.dtype != torch.float32:
        raise InputError(f"the module's output is {str(out.dtype).removeprefix('torch.')}, not float32")
    if not bool(out.isfinite().all()):
        raise NumericError(
            "the module's output for noise is not finite", hint="check that its time is as in its training"
        )


def _check_unchanged(network: Canonical, before: Inputs) -> None:
    changed = [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])]
    if changed:
        raise InputError(
            "the module changes itself when it runs",
            note=", ".join(name.removeprefix("module.") for name in changed)[:200],
            hint="running averages must not be updated: module.eval()",
        )


def _check_rows(network: Canonical, inputs: Inputs, out: Tensor, unit: float) -> None:
    """Check that row k of the output depends on row k alone: not on its neighbours, its place, or the batch size."""
    other = {name: tensor.clone() for name, tensor in inputs.items()}
    for tensor in other.values():
        tensor[1:] = tensor[:1] if tensor.dtype == torch.int32 else 3 * tensor[1:] - 1
    trials = {
        "its neighbours were others": (run(network, other)[:1], out[:1]),
        "it was alone": (run(network, {name: tensor[-1:] for name, tensor in inputs.items()}), out[-1:]),
    }
    for what, (mine, expected) in trials.items():
        if mine.shape != expected.shape:
            raise InputError(f"the module gives {len(mine)} outputs for {len(expected)} images")
        apart = float((mine - expected).abs().max()) / unit
        if not apart <= SAME:
            raise InputError(
                "an image's output depends on the other images of its batch",
                note=f"it changed by {apart:.2g} of the output's RMS when {what}",
                hint="causes are batch norm in training mode, t[0] in place of t, or a mean or softmax over the batch",
            )


def _check_inputs_used(network: Canonical, spec: ModelSpec, inputs: Inputs) -> None:
    """Check that what the module itself gives depends on every input.

    The module's own output counts, for x_t in its own range of images: what :class:`Canonical` adds for another range
    depends on x and t whatever the module does.
    """
    theirs, _ = network._in_range(inputs["x"], inputs["t"])
    own = {**inputs, "theirs": theirs}
    del own["x"]
    out = _module_output(network, own)
    low, high = network.data_range
    for name in [name for name in ("t", "x", *spec.conditioning_shapes) if name != "y" or spec.classes != 1]:
        where_it_is = "theirs" if name == "x" else name
        changed = own[where_it_is].clone()
        if name == "t" and spec.timesteps == 1:
            continue
        if name == "t":
            changed = (changed + spec.timesteps // 2) % spec.timesteps
        elif name == "y":
            changed = (changed + 1) % int(spec.classes or 1)
        elif name == "x":
            changed = low + high + 0.25 * (high - low) - changed
        else:
            changed = 0.5 - changed
        apart = (_module_output(network, {**own, where_it_is: changed.to(own[where_it_is].dtype)}) - out).abs().max()
        same = float(apart) <= (UNUSED * float(out.square().mean().sqrt()) if name == "t" else 0.0)
        if name == "t" and not network.uses_time:
            if not same:
                raise InputError(
                    "the module's output depends on t, and the adapter says that it does not",
                    hint="leave out Adapter(…, uses_time=False)",
                )
            continue
        if same:
            raise InputError(
                f"the module's output does not depend on {name}",
                hint='if it casts the time to a whole number, Adapter(…, time="index"); if t goes to another argument, '
                "Adapter(…, inputs={…}); if it ignores t on purpose, Adapter(…, uses_time=False)"
                if name == "t"
                else "it goes to another argument: Adapter(…, inputs={…}), or the spec should not have it",
            )


def _module_output(network: Canonical, inputs: Inputs) -> Tensor:
    """The module's own output for x_t in its own range, ``theirs``."""
    with torch.no_grad():
        out = network.module_output(**inputs)
    return torch.cat(list(out), dim=1) if isinstance(out, (tuple, list)) else out


class _Finder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the line that first calls one of some operators."""

    def __init__(self, operators: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operators = operators
        self.line: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        if self.line is None and where.operator(func) in self._operators:
            self.line = where.here()
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at every operation: where float64, half precision or randomness comes in, and where the time loses digits.

    Only numbers that depend on an input count: a table of constants may have been computed in float64.
    """

    def __init__(self, network: Canonical, inputs: Inputs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: list[Tensor] = list(inputs.values())  # kept alive, so that an id means one tensor
        self._tainted = {id(tensor) for tensor in self._kept}
        self._rows = len(inputs["t"])
        self._time = network._module_time(inputs["t"]).detach().flatten().to(torch.float64)
        self._owned = {id(p) for p in network.parameters()}
        self._foreign: str | None = None
        self.random: str | None = None
        self._typed: tuple[torch.dtype, str] | None = None
        self._lost: tuple[torch.dtype, str] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        out = func(*args, **(kwargs or {}))
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs))
        tensors = [one for one in flat if isinstance(one, Tensor)]
        results = [one for one in torch.utils._pytree.tree_flatten(out)[0] if isinstance(one, Tensor)]
        if torch.Tag.nondeterministic_seeded in func.tags and self.random is None:
            self.random = where.here()
        if self._foreign is None and any(isinstance(p, nn.Parameter) and id(p) not in self._owned for p in tensors):
            self._foreign = where.here()
        if any(id(one) in self._tainted for one in tensors):
            self._kept += results
            self._tainted |= {id(one) for one in results}
            for one in results:
                if self._typed is None and one.dtype in (torch.float64, torch.complex128, *_NARROW):
                    self._typed = one.dtype, where.here()
                if self._lost is None and func is torch.ops.aten._to_copy.default and tensors[0].numel() == self._rows:
                    before, after = tensors[0].flatten().to(torch.float64), one.flatten().to(torch.float64)
                    if torch.equal(before, self._time) and not torch.allclose(before, after, rtol=1e-6, atol=0):
                        self._lost = one.dtype, where.here()
        return out

    def fault(self) -> InputError | None:
        """The error for an operation that must not be there, None if all are fine."""
        if self._foreign is not None:
            return InputError(
                "the module uses weights that it does not own, which are in no checkpoint of it",
                note=self._foreign,
                hint=_PLAIN_LIST,
            )
        if self._lost is not None:
            dtype, at = self._lost
            whole = not dtype.is_floating_point
            return InputError(
                f"the module casts its time to {str(dtype).removeprefix('torch.')}, which cannot hold it",
                note=at,
                hint='Adapter(…, time="index") if it was trained on whole numbers'
                if whole
                else "keep the time float32",
            )
        if self._typed is not None:
            dtype, at = self._typed
            name = str(dtype).removeprefix("torch.")
            wide = dtype not in _NARROW
            return InputError(
                f"the module computes in {name} inside",
                note=at,
                hint="TensorRT has no float64: cast to float32, or compute constants beforehand"
                if wide
                else "export(…, precision=…) sets the file's precision; the module itself should be float32",
            )
        return None
