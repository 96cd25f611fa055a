"""What is asked of somebody else's module before it is exported: one clear error for each way in which it may mislead.

A module that mixes the images of a batch, draws random numbers, or changes itself as it runs would become a file that
gives wrong images and no error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_export.any_module import where
from ddpm_export.any_module.adapter import Canonical
from ddpmx.errors import BackendError, DdpmxError, InputError, NumericError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.ladder import SILENT
from ddpmx.sampling import chain
from ddpmx.sampling.conditioning import example

ROWS = 3
SAME = 1e-4
"""Largest difference, in units of the answers' RMS, that the order of float32 sums may make."""

_NARROW = (torch.float16, torch.bfloat16)
Told = dict[str, Tensor]


def probe(network: Canonical, spec: ModelSpec) -> None:
    """See that a network can become a file.

    Args:
        network: on the CPU. It is not changed, unless it changes itself.
        spec: what it is, in units of [−1, 1].

    Raises:
        InputError: it is in training mode, random, changes itself, mixes the images of a batch, does not look at one of
            its inputs, or its weights, its numbers inside or its answer are of the wrong kind.
        NumericError: its weights or answers are not finite.
        BackendError: it fails.
    """
    check_mode(network)
    check_weights(network)
    told = questions(spec)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    watch = _Watch(network, told)
    answer = ask(network, told, watch)
    check_answer(answer, spec)
    if (surprise := watch.surprise()) is not None:
        raise surprise
    _check_unchanged(network, before)
    again = ask(network, told)
    if not torch.equal(again, answer):
        raise InputError(
            "the module answers the same question differently",
            note=watch.random and f"it draws random numbers: {watch.random}",
            hint="noise belongs to the chain; dropout that ignores eval() has to be taken out",
        )
    unit = float(answer.square().mean().sqrt())
    if unit < SILENT:
        raise InputError(
            "the network answers nothing, so there is nothing to hold a file against",
            note=f"RMS of its answers: {unit:.1g}; its last layer is as it was initialised",
            hint="train it first",
        )
    _check_rows(network, told, answer, unit)
    _check_looks(network, spec, told, answer)


def questions(spec: ModelSpec, rows: int = ROWS, seed: int = 0) -> Told:
    """Typical inputs: noise, t from 0 to T−1, whatever the spec speaks of."""
    x = chain.initial(seed, np.arange(rows), spec.shape)
    t = np.linspace(0, spec.timesteps - 1, rows).round().astype(np.int32)
    told: dict[str, Any] = {"x": x, "t": t, **example(spec, np.arange(rows), seed=seed)}
    if spec.self_condition:
        told["x0_prev"] = np.clip(x[::-1], -1, 1)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in told.items()}


def ask(network: nn.Module, told: Told, watch: _Watch | None = None) -> Any:
    """The answer, both of them in one tensor if there are two; anything that goes wrong said with its place."""
    try:
        with torch.no_grad():
            if watch is None:
                out = network(**told)
            else:
                with watch:
                    out = network(**told)
    except DdpmxError:
        raise
    except Exception as error:  # foreign code may raise anything
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in told.items())
        raise BackendError(
            f"the module fails at {where.place(error, network) or 'an unknown place'}",
            note=f"{where.last_words(error)}; it was asked with {shapes}",
            hint=where.hint(error),
        ) from error
    if isinstance(out, tuple) and len({part.shape for part in out}) == 1:
        return torch.cat(out, dim=1)
    return out


def first_call(network: nn.Module, told: Told, operators: set[str]) -> str | None:
    """The line that calls one of these operators, or None if none does so by this name."""
    finder = _Finder(operators)
    with torch.no_grad(), finder:
        network(**told)
    return finder.found


def check_mode(network: Canonical) -> None:
    """In eval mode, all of it.

    Raises:
        InputError: it is not.
    """
    training = [(name, module) for name, module in network.module.named_modules() if module.training]
    if training:
        kinds = sorted({type(module).__name__ for _, module in training if not list(module.children())})
        raise InputError(
            "the module is in training mode",
            note=f"{len(training)} parts of it: {', '.join(kinds)}"[:200],
            hint="module.eval(); and export the averaged weights, if there are any",
        )


def check_weights(network: Canonical) -> None:
    """Weights are float32, finite, and there.

    Raises:
        InputError: another type, or no values at all.
        NumericError: NaN or an infinity.
    """
    if not list(network.module.parameters()):
        raise InputError("the module has no weights", hint="layers in a plain list are nobody's: nn.ModuleList(…)")
    for name, p in network.module.named_parameters():
        if p.device.type == "meta":
            raise InputError(f"{name} has no values", note="it lies on the device meta", hint="load the weights first")
        if p.dtype != torch.float32:
            raise InputError(f"{name} is {str(p.dtype).removeprefix('torch.')}, not float32", hint="module.float()")
    for name, tensor in [*network.module.named_parameters(), *network.module.named_buffers()]:
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise NumericError(f"{name} has NaN in it", hint="take an earlier checkpoint")
    for name, p in network.module.named_parameters():
        if not bool(p.isfinite().all()):
            raise NumericError(f"{name} has infinities in it", hint="take an earlier checkpoint")


def check_answer(answer: Any, spec: ModelSpec) -> None:
    """Float32, finite, of the image's shape.

    Raises:
        InputError: another type or shape.
        NumericError: not finite.
    """
    if not isinstance(answer, Tensor):
        raise InputError("the module gives two answers of different shapes")
    c, height, width = spec.shape
    wanted = [ROWS, c * len(spec.outputs), height, width]
    if list(answer.shape) != wanted:
        doubled = list(answer.shape) == [ROWS, 2 * c, height, width]
        raise InputError(
            f"the module's answer has the shape {list(answer.shape)}, and should have {wanted}",
            hint='ModelSpec(…, variance="learned_range"), if the second half is its variance; else '
            "Adapter(…, output=lambda out: out[:, :C])"
            if doubled
            else "Adapter(…, output=…) picks the answer",
        )
    if answer.dtype != torch.float32:
        raise InputError(f"the module's answer is {str(answer.dtype).removeprefix('torch.')}, not float32")
    if not bool(answer.isfinite().all()):
        raise NumericError("the module's answer to noise is not finite", hint="is its time what it was trained with?")


def _check_unchanged(network: Canonical, before: Told) -> None:
    changed = [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])]
    if changed:
        raise InputError(
            "the module changes itself when it answers",
            note=", ".join(name.removeprefix("module.") for name in changed)[:200],
            hint="running averages have to stand still: module.eval()",
        )


def _check_rows(network: Canonical, told: Told, answer: Tensor, unit: float) -> None:
    """Row k's answer depends on row k alone: not on its neighbours, its place, or how many there are."""
    other = {name: tensor.clone() for name, tensor in told.items()}
    for tensor in other.values():
        tensor[1:] = tensor[:1] if tensor.dtype == torch.int32 else 3 * tensor[1:] - 1
    trials = {
        "its neighbours were others": (ask(network, other)[:1], answer[:1]),
        "it was alone": (ask(network, {name: tensor[-1:] for name, tensor in told.items()}), answer[-1:]),
    }
    for what, (mine, wanted) in trials.items():
        if mine.shape != wanted.shape:
            raise InputError(f"the module gives {len(mine)} answers to {len(wanted)} questions")
        apart = float((mine - wanted).abs().max()) / unit
        if not apart <= SAME:
            raise InputError(
                "an image's answer depends on the other images of its batch",
                note=f"it changed by {apart:.2g} of the answers' RMS when {what}",
                hint="batch norm in training mode, t[0] in place of t, or a mean or softmax over the batch do that",
            )


def _check_looks(network: Canonical, spec: ModelSpec, told: Told, answer: Tensor) -> None:
    """Every input makes a difference."""
    for name in [name for name in ("t", "x", *spec.conditioning_shapes) if name != "y" or spec.classes != 1]:
        changed = told[name].clone()
        if name == "t" and spec.timesteps == 1:
            continue
        if name == "t":
            changed = (changed + spec.timesteps // 2) % spec.timesteps
        elif name == "y":
            changed = (changed + 1) % int(spec.classes or 1)
        else:
            changed = 0.5 - changed
        if torch.equal(ask(network, {**told, name: changed.to(told[name].dtype)}), answer):
            raise InputError(
                f"the module's answer does not depend on {name}",
                hint='if it casts the time to a whole number, Adapter(…, time="index"); '
                "else it goes to another argument: Adapter(…, inputs={…})"
                if name == "t"
                else "it goes to another argument: Adapter(…, inputs={…}), or the spec should not speak of it",
            )


class _Finder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Waits for an operator."""

    def __init__(self, operators: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operators = operators
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        if self.found is None and where.operator(func) in self._operators:
            self.found = where.here()
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at every operation: where float64, half precision or chance comes in, and where the time loses digits.

    Only numbers that depend on an input count: a table of constants may have been computed in float64.
    """

    def __init__(self, network: Canonical, told: Told) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: list[Tensor] = list(told.values())  # kept alive, so that an id means one tensor
        self._tainted = {id(tensor) for tensor in self._kept}
        self._rows = len(told["t"])
        self._time = network._told_time(told["t"]).detach().flatten().to(torch.float64)
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
                    given, got = tensors[0].flatten().to(torch.float64), one.flatten().to(torch.float64)
                    if torch.equal(given, self._time) and not torch.allclose(given, got, rtol=1e-6, atol=0):
                        self._lost = one.dtype, where.here()
        return out

    def surprise(self) -> InputError | None:
        """What was seen that must not be."""
        if self._foreign is not None:
            return InputError(
                "the module uses weights that it does not own, which are in no checkpoint of it",
                note=self._foreign,
                hint="layers in a plain list are nobody's: nn.ModuleList(…)",
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
                hint="TensorRT has no float64: cast to float32, or compute what is constant beforehand"
                if wide
                else "the file's precision is said by export(…, precision=…); the module itself should be float32",
            )
        return None
