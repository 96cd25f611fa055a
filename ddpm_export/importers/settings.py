"""What an import has to find out beside the weights, and where each answer came from.

Two networks with the same tensors can be different functions: order of sin and cos, number of heads, schedule, what is
predicted. So every such setting is settled in one place, by the first of: what the user said; what a file says; what
that project's code always does (an assumption, which is told); otherwise it is an open question, and nothing is
imported until somebody answers it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from torch import Tensor

from ddpm_export.networks.unet_config import UNetConfig
from ddpmx.diffusion.samplers import Prediction
from ddpmx.diffusion.schedule import Float64, schedule_params
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec

_T = TypeVar("_T")


@dataclass(frozen=True)
class Options:
    """What the user said.

    Attributes:
        said: by the setting's name, text or a plain value: ``{"schedule": "linear", "heads": "4"}``.
        weights: which weights, where a file has several.
    """

    said: Mapping[str, object] = field(default_factory=dict)
    weights: Literal["ema", "raw"] = "ema"

    def also(self, more: Mapping[str, object]) -> Options:
        """The same with more said."""
        return Options({**self.said, **more}, self.weights)


@dataclass(frozen=True)
class Fact:
    """A setting, and where it was taken from."""

    name: str
    value: object
    source: str
    assumed: bool = False


@dataclass(frozen=True)
class Question:
    """A setting that nobody told.

    Attributes:
        name: of the setting.
        candidates: what it may be.
        why: what is known about it, for people.
        probed: whether ε on real images can tell the candidates apart.
    """

    name: str
    candidates: tuple[object, ...]
    why: str = ""
    probed: bool = True


@dataclass(frozen=True)
class Imported:
    """A network, understood.

    Attributes:
        source: the importer's name.
        config: of the network: ``UNetConfig`` or another network's.
        spec: the model.
        tensors: the weights under our names, float32.
        facts: what was taken from where.
        questions: what is still open; ``config`` and ``spec`` then have the first candidate.
        raw: the weights that were not averaged, where the file has both.
        betas: the array of β, float64 [T], where the schedule is ``betas``.
    """

    source: str
    config: Any
    spec: ModelSpec
    tensors: dict[str, Tensor]
    facts: tuple[Fact, ...] = ()
    questions: tuple[Question, ...] = ()
    raw: dict[str, Tensor] | None = None
    betas: Float64 | None = None


class Inquiry:
    """Settles settings one after the other, and keeps the minutes."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.facts: list[Fact] = []
        self.questions: list[Question] = []
        self._used: set[str] = set()

    def settle(
        self,
        name: str,
        candidates: Sequence[_T],
        *,
        known: _T | None = None,
        none_is_known: bool = False,
        source: str = "",
        assume: str = "",
        why: str = "",
        closed: bool = True,
        probed: bool = True,
    ) -> _T:
        """The value of a setting: what the user said; else ``known``, from ``source``; else an assumption; else open.

        Args:
            name: of the setting; the flag is ``--name``, or ``--set name=VALUE``.
            candidates: what it may be, the likeliest first. They also give the type.
            known: what the file says; None if it does not.
            none_is_known: whether ``known=None`` is what the file says.
            source: where it says so.
            assume: why the first candidate holds where nobody says anything. Empty: then it is a question.
            why: for the question, what makes it one.
            closed: whether only the candidates are possible. Where not, the user may say any value of their type.
            probed: whether ε on real images can tell the candidates apart.

        Raises:
            InputError: the user said what cannot be.
        """
        if name in self.options.said:
            self._used.add(name)
            said = self.options.said[name]
            value = _parse(name, said, candidates, closed)
            silent = known is None and not none_is_known
            told = "as said" if silent or known == value else f"as said; {source} says {known}"
            self.facts.append(Fact(name, value, told))
            return value
        if known is not None or none_is_known:
            self.facts.append(Fact(name, known, source))
            return cast(_T, known)
        if assume:
            self.facts.append(Fact(name, candidates[0], assume, assumed=True))
        else:
            self.questions.append(Question(name, tuple(candidates), why, probed))
        return candidates[0]

    def fact(self, name: str, value: object, source: str) -> None:
        """Note what was seen and nobody can say otherwise, as the widths in the shapes of the weights."""
        self.facts.append(Fact(name, value, source))

    def published(
        self, models: Mapping[str, Mapping[str, Any]], *, known: str | None = None, source: str = ""
    ) -> Mapping[str, Any]:
        """The settings of a published model, if the user named one or the file is known; otherwise none.

        Args:
            models: settings by the model's name.
            known: its name, where the file is known to be one.
            source: by what it is known.
        """
        if known is None and "model" not in self.options.said:
            return {}
        return models[self.settle("model", tuple(models), known=known, source=source)]

    def chain(
        self,
        config: UNetConfig,
        told: Mapping[str, Any],
        source: str,
        *,
        schedules: Sequence[str],
        predictions: Sequence[Prediction],
        clip: float | None,
        clip_because: str,
    ) -> ModelSpec:
        """The chain of a project that stores none: each setting said, ``told`` by ``source``, or asked for.

        A sole candidate is all that the project's code can do, so it is assumed.

        Args:
            config: of the network.
            told: what is known: ``timesteps``, ``schedule``, ``beta_start``, ``beta_end``, ``prediction``, ``variance``.
            source: by whom.
            schedules: what β may be.
            predictions: what the network may answer.
            clip: what the project's ancestral chain does …
            clip_because: … and how that is known.
        """
        only = "all that its code has"
        schedule = self.settle(
            "schedule", schedules, known=told.get("schedule"), source=source, assume=only if len(schedules) == 1 else ""
        )
        params = {
            name: self.settle(
                name, (usual,), known=told.get(name), source=source, assume="its code's default", closed=False
            )
            for name, usual in schedule_params(schedule).items()
            if name.startswith("beta_")
        }
        return ModelSpec(
            (config.in_channels, *config.size),
            self.settle("timesteps", (1000,), known=told.get("timesteps"), source=source, closed=False, probed=False),
            schedule,
            params,
            self.settle(
                "prediction",
                predictions,
                known=told.get("prediction"),
                source=source,
                assume=only if len(predictions) == 1 else "",
            ),
            self.settle(
                "variance",
                ("fixed_large", "fixed_small"),
                known=told.get("variance"),
                source=source,
                why="it acts in the chain only",
                probed=False,
            ),
            self.settle("clip", (clip, 1.0 if clip is None else None), assume=clip_because, closed=False),
        )

    def done(
        self,
        source: str,
        config: Any,
        spec: ModelSpec,
        tensors: dict[str, Tensor],
        *,
        raw: dict[str, Tensor] | None = None,
        betas: Float64 | None = None,
    ) -> Imported:
        """The import, with its minutes.

        Raises:
            InputError: the user said something that nobody asked for.
        """
        if unheard := sorted(set(self.options.said) - self._used):
            asked = sorted({fact.name for fact in self.facts} | {question.name for question in self.questions})
            raise InputError(
                f"{', '.join(unheard)}: no setting of a checkpoint of {source}", hint=f"it has: {', '.join(asked)}"
            )
        return Imported(source, config, spec, tensors, tuple(self.facts), tuple(self.questions), raw, betas)


def _parse(name: str, said: object, candidates: Sequence[_T], closed: bool) -> _T:
    """``said`` as one of ``candidates``, or as a value of their types."""
    value = said
    if isinstance(said, str) and said not in candidates:
        try:
            value = json.loads(said.lower() if said.lower() in ("none", "true", "false") else said)
        except ValueError:
            value = said
        if isinstance(said, str) and said.lower() == "none":
            value = None
    if isinstance(value, list):
        value = tuple(value)
    for candidate in candidates:
        if candidate == value and isinstance(candidate, bool) == isinstance(value, bool):
            return candidate
    types = {type(candidate) for candidate in candidates}
    if float in types and type(value) is int:
        value = float(value)
    shapes = {tuple(map(type, candidate)) for candidate in candidates if isinstance(candidate, tuple)}
    fits = type(value) in types and (not isinstance(value, tuple) or tuple(map(type, value)) in shapes)
    if not closed and fits:
        return value  # type: ignore[return-value]
    raise InputError(
        f"{name} cannot be {said!r}",
        hint=f"one of: {', '.join(map(str, candidates))}" if closed else f"for example {candidates[0]}",
    )


def size_and_dropout(
    ask: Inquiry,
    widths: Sequence[int],
    blocks: int,
    told: Mapping[str, Any],
    source: str,
    *,
    size_source: str | None = None,
    attends: Sequence[bool] = (),
) -> tuple[tuple[int, int], float]:
    """What no weight shows of a U-Net, while its levels and blocks are told as a fact.

    Args:
        ask: settles both.
        widths, blocks: of the levels, for people.
        told: ``size`` and ``dropout``, where somebody says them.
        source: who.
        size_source: who says the size, if somebody else.
        attends: which levels have attention, which in most of these networks is the one of 16 pixels.
    """
    guess = 16 << attends.index(True) if True in attends else 32
    size = ask.settle(
        "size",
        ((guess, guess),),
        known=told.get("size"),
        source=size_source or source,
        why="the network is as happy with any" + (f"; attention at 16 pixels means {guess}" if any(attends) else ""),
        closed=False,
        probed=False,
    )
    ask.fact("network", f"{list(widths)}, {blocks} blocks per level", "shapes of the weights")
    dropout = ask.settle(
        "dropout",
        (0.0,),
        known=told.get("dropout"),
        source=source,
        assume="not in the file; it acts in training only",
        closed=False,
    )
    return size, dropout
