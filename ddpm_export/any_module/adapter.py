"""Any network, called by its own conventions for time, range of images, inputs and output.

The rest of ddpmx knows one contract: x float32 in units where images are −1…1, t int32 = 0…T−1, an output in the same
units. :class:`Adapter` describes how a module differs from it, and :class:`Canonical` wraps the module so that it follows
the contract, exactly.

Images in another range. Let x_0 be an image in [−1, 1] and y_0 = a·x_0 + b the same image in theirs. If noise was added
in their range, y_t = √ᾱ'·y_0 + √(1−ᾱ')·ε, then with c² = a²·ᾱ' + 1 − ᾱ'

    x_t := (y_t − b·√ᾱ') / c = √ᾱ·x_0 + √(1−ᾱ)·ε,    ᾱ = a²·ᾱ'/c²,    β_t = β'_t/c_t²

is a diffusion too, Markov chain and all, of the same ε, with a signal a times as strong beside the noise. So such a
network becomes one of [−1, 1] by another schedule, an array of β:

    input      y_t = c·x_t + b·√ᾱ'
    ε̂          as it is
    x̂_0        (ŷ_0 − b)/a
    v          (c/a)·v' + √ᾱ'·√(1−ᾱ')·(a − 1/a)/c · y_t + √(1−ᾱ')·b/(a·c)

σ² = β̃ (``fixed_small``) is the same chain as theirs; σ² = β_t (``fixed_large``) is β of the new schedule, which is theirs
up to a factor (c_{t−1}/c_t)². A learned variance is between these two, and is refused.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpmx.diffusion.schedule import Schedule
from ddpmx.errors import InputError
from ddpmx.formats.spec import BETAS, ModelSpec

TimeName = Literal["index", "float", "fraction", "index1", "float1", "fraction1"]
TIMES: tuple[TimeName, ...] = ("index", "float", "fraction", "index1", "float1", "fraction1")
Time = TimeName | tuple[float, float] | Callable[[Tensor], Tensor] | Sequence[float] | NDArray[Any]
IMAGES = ("x", "x0_prev", "cond")
INPUTS = ("x", "t", "y", "x0_prev", "cond")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A module and its conventions. By default it is called as module(x, t), with t int64, images in [−1, 1].

    Attributes:
        module: forward gives ε, x_0 or v, whichever the spec says.
        time: what the module takes as t, [B], where t = 0…T−1. ``index``: t int64; ``float``: t float32; ``fraction``:
            t/T float32. ``index1``, ``float1``, ``fraction1``: the same of t + 1, for a module that was trained with
            t = 1…T as in the paper. (scale, offset): scale·t + offset; a function of t float32 [T] that gives
            float32 [T]; or T numbers, one for each t. The function is called once, at export, for all t.
        uses_time: False for a network that ignores t on purpose (it tells the noise by the image alone), which the report
            then states; t is passed only where ``inputs`` says so. A network whose output depends on t is refused.
        time_dims: how many dimensions t has: 1 for [B], 2 for [B, 1], and so on.
        data_range: the smallest and the largest value of an image in the module's range.
        diffused_in_range: whether noise was added to images of that range, so that the schedule holds in that range.
            False: noise was added in [−1, 1], and the module only takes a·x_t + b.
        inputs: where x, t, y, x0_prev and cond go: a position (int) or a keyword (str). By default x and t are the first
            and the second, the others keywords of these names.
        channels: the inputs concatenated along the channels and passed as x: ("x", "cond") or ("x0_prev", "x").
        fixed: further keywords, passed unchanged in every call.
        fixed_per_image: further keywords, tensors of one image, repeated for each image of a batch.
        output: which part of the module's return value is the output: a key or an attribute (str), a position (int), or
            a function. By default a tensor itself, or ``sample`` of an object. With a learned variance it is a tensor of
            2·C channels, or two tensors.

    ``cond`` is passed unchanged, in any range.

    Raises:
        InputError: the attributes contradict each other, or one is out of its range.
    """

    module: nn.Module
    time: Time = "index"
    time_dims: int = 1
    data_range: tuple[float, float] = (-1.0, 1.0)
    diffused_in_range: bool = True
    inputs: Mapping[str, int | str] = field(default_factory=dict)
    channels: tuple[str, ...] = ("x",)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    fixed_per_image: Mapping[str, Tensor] = field(default_factory=dict)
    output: str | int | Callable[[Any], Any] | None = None
    uses_time: bool = True

    def __post_init__(self) -> None:
        """Check all that does not depend on the spec."""
        if not isinstance(self.module, nn.Module):
            raise InputError(f"the network must be a torch.nn.Module, not {type(self.module).__name__}")
        if isinstance(self.time, str) and self.time not in TIMES:
            raise InputError(
                f"there is no time {self.time!r}", hint=f"{', '.join(TIMES)}, (scale, offset), or T numbers"
            )
        if not 1 <= self.time_dims <= 4:
            raise InputError(f"time_dims is 1…4, not {self.time_dims!r}")
        try:
            low, high = (float(value) for value in self.data_range)
        except (TypeError, ValueError) as error:
            raise InputError(f"data_range is two numbers, not {self.data_range!r}") from error
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise InputError(f"data_range must rise, and ({low:g}, {high:g}) does not")
        if unknown := sorted(set(self.inputs) - set(INPUTS)):
            raise InputError(f"inputs: there is no {', '.join(unknown)}", hint=f"there are {', '.join(INPUTS)}")
        if (
            "x" not in self.channels
            or not set(self.channels) <= set(IMAGES)
            or len(set(self.channels)) < len(self.channels)
        ):
            raise InputError(f"channels must hold x, and may hold x0_prev and cond, each once, not {self.channels!r}")
        if twice := sorted(set(self.channels) - {"x"} & set(self.inputs)):
            raise InputError(f"{', '.join(twice)} cannot be both concatenated and a separate input")
        places: list[int | str] = [*self._places(INPUTS).values(), *self.fixed, *self.fixed_per_image]
        if shared := sorted({str(place) for place in places if places.count(place) > 1}):
            raise InputError(f"two inputs go to the same place: {', '.join(shared)}")
        positions = sorted(place for place in places if isinstance(place, int))
        if positions != list(range(len(positions))):
            raise InputError(
                f"positions of inputs must be 0, 1, …, not {positions}", hint="x and t are 0 and 1 by default"
            )

    @property
    def scale(self) -> tuple[float, float]:
        """(a, b) of y = a·x + b."""
        low, high = self.data_range
        return (float(high) - float(low)) / 2, (float(high) + float(low)) / 2

    def spec_of(self, spec: ModelSpec) -> ModelSpec:
        """The spec in units of [−1, 1] of a network whose spec, schedule above all, is ``spec`` in its own range.

        Raises:
            InputError: this combination has no exact counterpart in [−1, 1].
        """
        a, b = self.scale
        if (a, b) == (1.0, 0.0):
            return spec
        declared = f"data_range is ({self.data_range[0]:g}, {self.data_range[1]:g})"
        if spec.self_condition and b != 0:
            raise InputError(
                f"{declared}, and the network takes its own x̂_0: this is not supported",
                note="x0_prev is 0 at first, which is another image in that range than in [−1, 1]",
            )
        if spec.prediction == "mu":
            raise InputError(f"{declared}, and the network predicts μ, which has no such range: this is not supported")
        if not self.diffused_in_range:
            if spec.prediction == "v":
                raise InputError(
                    f"{declared}, noise was added in [−1, 1], and v could be in either range: this is not supported"
                )
            return spec
        if spec.learns_variance:
            raise InputError(f"{declared}, and a learned variance depends on the range: this is not supported")
        if a == 1.0:
            return spec
        theirs = spec.make_schedule()
        betas = theirs.betas / _c(theirs, a) ** 2
        return spec.replace(schedule=BETAS, schedule_params={}, betas=np.minimum(betas, 1.0))

    def network(self, spec: ModelSpec) -> Canonical:
        """The module with ddpmx's contract. It shares its weights with :attr:`module`.

        Args:
            spec: of the module, its schedule in its own range. The spec of the file is :meth:`spec_of`.

        Raises:
            InputError: the spec and the adapter do not fit together.
        """
        for name in self.channels:
            if name != "x" and name not in spec.conditioning_shapes:
                raise InputError(f"channels name {name}, but the spec has no such input", hint=_spec_hint(name))
        for name in set(self.inputs) - {"x", "t"}:
            if name not in spec.conditioning_shapes:
                raise InputError(f"inputs name {name}, but the spec has no such input", hint=_spec_hint(name))
        self.spec_of(spec)
        return Canonical(self, spec)

    def _places(self, names: Sequence[str]) -> dict[str, int | str]:
        usual: dict[str, int | str] = {"x": 0, "t": 1}
        return {
            name: self.inputs.get(name, usual.get(name, name))
            for name in names
            if (name == "x" or name not in self.channels) and (name != "t" or self._passes_time(names))
        }

    def _passes_time(self, names: Sequence[str]) -> bool:
        """Whether the module is given its time. One that ignores it on purpose may have to get it all the same."""
        if self.uses_time or "t" in self.inputs:
            return True
        try:
            second = list(inspect.signature(self.module.forward).parameters.values())[1]
        except (IndexError, TypeError, ValueError):  # a forward without a signature is called with x alone
            return False
        required = second.default is second.empty and second.kind in (
            second.POSITIONAL_ONLY,
            second.POSITIONAL_OR_KEYWORD,
        )
        return required and 1 not in self.inputs.values() and second.name not in set(names) - {"t"}


class Canonical(nn.Module):
    """forward(x, t, y, x0_prev, cond) by ddpmx's contract → the prediction, or (prediction, var). See :class:`Adapter`."""

    def __init__(self, adapter: Adapter, spec: ModelSpec) -> None:
        super().__init__()
        self.module = adapter.module
        self._places, self._channels = adapter._places(list(spec.inputs)), adapter.channels
        self._time, self._time_dims = adapter.time, adapter.time_dims
        self._output, self._learned = adapter.output, spec.learns_variance
        self._prediction, (self._a, self._b) = spec.prediction, adapter.scale
        self._fixed = {name: value for name, value in adapter.fixed.items() if not isinstance(value, Tensor)}
        self._whole, self._each = _Tensors(adapter.fixed), _Tensors(adapter.fixed_per_image)
        # not self.train(…), which would go down into the user's module
        self.training = self._whole.training = self._each.training = adapter.module.training
        self.times: Tensor | None
        self.register_buffer(
            "times",
            None if isinstance(self._time, str) and not self._time.startswith("fraction") else self._table(spec),
        )
        self._ranged = adapter.scale != (1.0, 0.0)
        self._diffused = self._ranged and adapter.diffused_in_range
        self.ranges: Tensor | None
        self.register_buffer("ranges", self._range_table(spec.make_schedule()) if self._diffused else None)
        self.uses_time, self.data_range = adapter.uses_time, adapter.data_range

    def _table(self, spec: ModelSpec) -> Tensor:
        """The module's time for each t, float32 [T, 1]."""
        t, time = torch.arange(spec.timesteps, dtype=torch.float32), self._time
        try:
            if isinstance(time, str):
                values: Any = (t + time.endswith("1")) / spec.timesteps
            elif callable(time):
                with torch.no_grad():
                    values = time(t)
            elif isinstance(time, tuple) and len(time) == 2 and spec.timesteps != 2:
                values = time[0] * t + time[1]
            else:
                values = time
            table = torch.as_tensor(values).detach().to("cpu", torch.float32).clone()
        except Exception as error:  # a function of the user's may raise anything
            raise InputError("time: not numbers", note=f"{type(error).__name__}: {str(error)[:200]}") from error
        if table.shape != t.shape or not bool(table.isfinite().all()):
            raise InputError(
                f"time must give one finite number for each of {len(t)} t",
                note=f"its shape is {list(table.shape)}, its least {float(table.min()) if table.numel() else math.nan:g}",
            )
        return table[:, None]

    def _range_table(self, theirs: Schedule) -> Tensor:
        """c, b·√ᾱ', and the factors of v', y and 1 in v; float32 [T, 5]."""
        a, b, c = self._a, self._b, _c(theirs, self._a)
        signal, noise = np.sqrt(theirs.alpha_bar), np.sqrt(theirs.one_minus_alpha_bar)
        columns = [c, b * signal, c / a, signal * noise * (a - 1 / a) / c, noise * b / (a * c)]
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        x0_prev: Tensor | None = None,
        cond: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """For x float32 [B, C, H, W] and t int [B]."""
        theirs, row = self._in_range(x, t)
        out = self.module_output(theirs, t, y, x0_prev, cond)
        if self._learned:
            prediction, var = out if isinstance(out, (tuple, list)) else out.chunk(2, dim=1)
            return (self._in_our_units(prediction, theirs, row), var)
        prediction = self._in_our_units(out, theirs, row)
        return prediction

    def _in_range(self, x: Tensor, t: Tensor) -> tuple[Tensor, Sequence[Tensor] | None]:
        """x_t in the module's range, and the factors that belong to t, or None."""
        row = None
        theirs = x
        if self.ranges is not None:
            row = F.embedding(t, self.ranges)[:, :, None, None, None].unbind(1)
            theirs = row[0] * x + row[1]
        elif self._ranged:
            theirs = self._a * x + self._b
        return theirs, row

    def module_output(
        self,
        theirs: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        x0_prev: Tensor | None = None,
        cond: Tensor | None = None,
    ) -> Any:
        """What the module gives, in its own units, for x_t in its own range; t int [B] as for :meth:`forward`."""
        if x0_prev is not None and self._a != 1:
            x0_prev = self._a * x0_prev
        inputs = {"x": theirs, "t": self._module_time(t), "x0_prev": x0_prev, "cond": cond}
        inputs["y"] = None if y is None else y.to(torch.int64)
        if self._channels != ("x",):
            inputs["x"] = torch.cat([part for name in self._channels if (part := inputs[name]) is not None], dim=1)
        places = {place: inputs[name] for name, place in self._places.items()}
        positions = [places[place] for place in sorted(place for place in places if isinstance(place, int))]
        keywords = {place: value for place, value in places.items() if isinstance(place, str)}
        each = {name: value.expand(t.shape[0], *value.shape[1:]) for name, value in self._each.items()}
        return self._picked(self.module(*positions, **keywords, **self._fixed, **self._whole.items_of(), **each))

    def _module_time(self, t: Tensor) -> Tensor:
        if self.times is not None:
            time = F.embedding(t, self.times)[:, 0]
        else:
            time = t.to(torch.int64 if str(self._time).startswith("index") else torch.float32)
            if str(self._time).endswith("1"):
                time = time + 1
        return time.reshape(-1, *[1] * (self._time_dims - 1)) if self._time_dims > 1 else time

    def _in_our_units(self, out: Tensor, theirs: Tensor, row: Sequence[Tensor] | None) -> Tensor:
        if not self._ranged or self._prediction == "eps":
            return out
        if self._prediction == "x0":
            return (out - self._b) / self._a
        assert row is not None
        return row[2] * out + row[3] * theirs + row[4]

    @property
    def converts(self) -> bool:
        """Whether the output is converted from another range of images by a sum, whose terms may be far larger."""
        return self._ranged and self._prediction != "eps"

    @torch.no_grad()
    def magnitude(self, x: NDArray[Any], t: NDArray[Any], out: NDArray[Any]) -> float:
        """The RMS of the largest term that an output of :meth:`forward` is a sum of, in its unit; see :attr:`converts`.

        Args:
            x: float32 [n, C, H, W], x_t.
            t: int32 [n].
            out: float32 [n, C, H, W], the output for them.
        """
        theirs, row = self._in_range(torch.from_numpy(x), torch.from_numpy(t))
        converted = torch.from_numpy(out)
        if row is None:
            others = [torch.full_like(converted, -self._b / self._a)]
        else:
            others = [row[3] * theirs, row[4].expand_as(converted)]
            if self._prediction == "x0":
                others = [torch.full_like(converted, -self._b / self._a)]
        terms = [converted - sum(others), *others]
        return max(float(term.double().square().mean().sqrt()) for term in terms)

    def _picked(self, out: Any) -> Any:
        """The tensor, or with a learned variance the two, in the module's return value."""
        which = self._output
        try:
            if isinstance(which, str):
                out = out[which] if isinstance(out, Mapping) else getattr(out, which)
            elif isinstance(which, int):
                out = out[which]
            elif which is not None:
                out = which(out)
            elif isinstance(out, Mapping) and "sample" in out:
                out = out["sample"]
            elif isinstance(getattr(out, "sample", None), Tensor):
                out = out.sample
            elif isinstance(out, (tuple, list)) and len(out) == 1:
                out = out[0]
        except (LookupError, AttributeError, TypeError) as error:
            raise InputError(f"the module's output has no {which!r}", note=f"it is {_kind(out)}") from error
        pair = self._learned and isinstance(out, (tuple, list)) and len(out) == 2
        if not all(isinstance(part, Tensor) for part in (out if pair else [out])):
            raise InputError(
                f"the module returns {_kind(out)}, not a tensor",
                hint='choose the part that is the output: Adapter(…, output=0), or "sample", or a function',
            )
        return out


class _Tensors(nn.Module):
    """Named tensors as buffers, so that they move, and are hashed, with the module."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self._names = [name for name, value in values.items() if isinstance(value, Tensor)]
        for i, name in enumerate(self._names):
            self.register_buffer(f"of{i}", values[name].detach())

    def items_of(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: self.get_buffer(f"of{i}") for i, name in enumerate(self._names)}

    def items(self) -> list[tuple[str, Tensor]]:
        """The tensors by name, each with a batch dimension in front."""
        return [(name, value[None]) for name, value in self.items_of().items()]


def _c(theirs: Schedule, a: float) -> NDArray[np.float64]:
    """√(a²·ᾱ' + 1 − ᾱ')."""
    c: NDArray[np.float64] = np.sqrt(a**2 * theirs.alpha_bar + theirs.one_minus_alpha_bar)
    return c


def _kind(out: object) -> str:
    if isinstance(out, Mapping):
        return f"{type(out).__name__} with {', '.join(map(str, out))}"[:200]
    if isinstance(out, (tuple, list)):
        return f"{len(out)} items ({', '.join(type(part).__name__ for part in out)})"[:200]
    return f"a {type(out).__name__}"


def _spec_hint(name: str) -> str:
    return {
        "y": "ModelSpec(…, classes=K)",
        "x0_prev": "ModelSpec(…, self_condition=True)",
        "cond": "ModelSpec(…, condition=K), K being its channels",
    }[name]
