"""The settings that an import needs beside the weights, and where each value came from.

Two networks with the same tensors can be different functions: order of sin and cos, number of heads, schedule, what is
predicted. So every such setting is resolved in one place, from the first of: the user's options; what a file says; what
that project's code always does (an assumption, which is reported). Otherwise it is an open question, and nothing is
imported until the user answers it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import Tensor

from ddpm_export.networks.unet_config import UNetConfig
from ddpmx.diffusion.samplers import Prediction
from ddpmx.diffusion.schedule import Float64, schedule_params
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec

_T = TypeVar("_T")


@dataclass(frozen=True)
class Options:
    """The settings that the user chose.

    Attributes:
        values: by the setting's name, as text or a plain value: ``{"schedule": "linear", "heads": "4"}``.
        weights: which to take where a file has several: ``ema``, the average, if there is one; ``raw``, as trained; or the
            prefix of their names, where there are more.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    weights: str = "ema"

    def with_values(self, more: Mapping[str, object]) -> Options:
        """A copy with ``more`` values."""
        return Options({**self.values, **more}, self.weights)


@dataclass(frozen=True)
class Fact:
    """The value of a setting, and where it came from."""

    name: str
    value: object
    source: str
    assumed: bool = False


@dataclass(frozen=True)
class Question:
    """A setting whose value is unknown.

    Attributes:
        name: of the setting.
        candidates: what it may be.
        why: what is known about it, as text for the user.
        probed: whether the error of ε on real images can distinguish the candidates.
    """

    name: str
    candidates: tuple[object, ...]
    why: str = ""
    probed: bool = True


@dataclass(frozen=True)
class Imported:
    """An imported network with its settings.

    Attributes:
        source: the importer's name.
        config: of the network: ``UNetConfig`` or another network's.
        spec: of the model.
        tensors: the weights under our names, float32.
        facts: the settings and where each came from.
        questions: the settings still open; ``config`` and ``spec`` then hold the first candidate.
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


class SettingsResolver:
    """Resolves settings one by one, and records where each value came from."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.facts: list[Fact] = []
        self.questions: list[Question] = []
        self._used: set[str] = set()

    def resolve(
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
        """The value of a setting: the user's; else ``known``, from ``source``; else the first candidate.

        The first candidate is recorded as an assumption if ``assume`` says why it holds, and as an open question otherwise.

        Args:
            name: of the setting; the flag is ``--name``, or ``--set name=VALUE``.
            candidates: what it may be, the likeliest first. They also give the type.
            known: what the file says; None if it says nothing.
            none_is_known: whether ``known=None`` is what the file says.
            source: where it says so.
            assume: why the first candidate holds when neither the user nor the file gives a value. Empty: an open question.
            why: text for the question: what is known about the setting.
            closed: whether only the candidates are possible. Where not, the user may give any value of their type.
            probed: whether the error of ε on real images can distinguish the candidates.

        Raises:
            InputError: the user's value is not possible.
        """
        if name in self.options.values:
            self._used.add(name)
            value = _parse(name, self.options.values[name], candidates, closed)
            unknown = known is None and not none_is_known
            by_user = "set by the user" if unknown or known == value else f"set by the user; {source} says {known}"
            self.facts.append(Fact(name, value, by_user))
            return value
        if known is not None or none_is_known:
            self.facts.append(Fact(name, known, source))
            return cast(_T, known)
        if assume:
            self.facts.append(Fact(name, candidates[0], assume, assumed=True))
        else:
            self.questions.append(Question(name, tuple(candidates), why, probed))
        return candidates[0]

    def add_fact(self, name: str, value: object, source: str) -> None:
        """Record a fact that no option can change, such as the widths in the shapes of the weights."""
        self.facts.append(Fact(name, value, source))

    def published(
        self, models: Mapping[str, Mapping[str, Any]], *, known: str | None = None, source: str = ""
    ) -> Mapping[str, Any]:
        """The settings of a published model, if the user named one or the file is known to be one; otherwise none.

        Args:
            models: settings by the model's name.
            known: the model's name, where the file is known to be a published one.
            source: how that is known.
        """
        if known is None and "model" not in self.options.values:
            return {}
        return models[self.resolve("model", tuple(models), known=known, source=source)]

    def chain_spec(
        self,
        config: UNetConfig,
        known: Mapping[str, Any],
        source: str,
        *,
        schedules: Sequence[str],
        predictions: Sequence[Prediction],
        clip: float | None,
        clip_because: str,
    ) -> ModelSpec:
        """The spec of a project whose checkpoints store no chain: each setting from the user, ``known``, or a question.

        A sole candidate is all that the project's code can do, so it is assumed.

        Args:
            config: of the network.
            known: by name, any of ``timesteps``, ``schedule``, ``beta_start``, ``beta_end``, ``prediction``, ``variance``.
            source: where these are from.
            schedules: the schedules that the project's code has.
            predictions: what its networks may predict.
            clip: the bound of x̂_0 in the project's ancestral chain, None if it does not clip.
            clip_because: how that is known.
        """
        only = "the only one in its code"
        schedule = self.resolve(
            "schedule",
            schedules,
            known=known.get("schedule"),
            source=source,
            assume=only if len(schedules) == 1 else "",
        )
        params = {
            name: self.resolve(
                name, (usual,), known=known.get(name), source=source, assume="its code's default", closed=False
            )
            for name, usual in schedule_params(schedule).items()
            if name.startswith("beta_")
        }
        return ModelSpec(
            (config.in_channels, *config.size),
            self.resolve("timesteps", (1000,), known=known.get("timesteps"), source=source, closed=False, probed=False),
            schedule,
            params,
            self.resolve(
                "prediction",
                predictions,
                known=known.get("prediction"),
                source=source,
                assume=only if len(predictions) == 1 else "",
            ),
            self.resolve(
                "variance",
                ("fixed_large", "fixed_small"),
                known=known.get("variance"),
                source=source,
                why="only the chain uses it",
                probed=False,
            ),
            self.resolve("clip", (clip, 1.0 if clip is None else None), assume=clip_because, closed=False),
        )

    def finish(
        self,
        source: str,
        config: Any,
        spec: ModelSpec,
        tensors: dict[str, Tensor],
        *,
        raw: dict[str, Tensor] | None = None,
        betas: Float64 | None = None,
        latent_sign: str = "",
    ) -> Imported:
        """The import, with the recorded facts and questions.

        Whether x is an image is one of them where it may be the latent of an autoencoder: where it has neither one nor
        three channels, or where ``latent_sign`` says what else hints at it.

        Raises:
            InputError: an option of the user's is not a setting of this kind of checkpoint, or x is no image.
        """
        channels = spec.shape[0]
        sign = latent_sign or (f"x has {channels} channels" if channels not in (1, 3) else "")
        if sign or "space" in self.options.values:
            why = f"{sign}: other pixels than grey or RGB, or the latents of an autoencoder?"
            if self.resolve("space", ("pixels", "latents"), why=why, probed=False) == "latents":
                raise InputError(
                    "x is the latent of an autoencoder, and ddpmx runs networks of images only",
                    note="it has no decoder, and would write latents as PNG",
                )
        if unused := sorted(set(self.options.values) - self._used):
            names = sorted({fact.name for fact in self.facts} | {question.name for question in self.questions})
            raise InputError(
                f"{', '.join(unused)}: not a setting of a {source} checkpoint", hint=f"its settings: {', '.join(names)}"
            )
        return Imported(source, config, spec, tensors, tuple(self.facts), tuple(self.questions), raw, betas)


def _parse(name: str, raw: object, candidates: Sequence[_T], closed: bool) -> _T:
    """``raw``, which may be text, as one of ``candidates``, or as a value of their types."""
    value = raw
    if isinstance(raw, str) and raw not in candidates:
        try:
            value = json.loads(raw.lower() if raw.lower() in ("none", "true", "false") else raw)
        except ValueError:
            value = raw
        if isinstance(raw, str) and raw.lower() == "none":
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
        f"{name} cannot be {raw!r}",
        hint=f"one of: {', '.join(map(str, candidates))}" if closed else f"for example {candidates[0]}",
    )


def size_and_dropout(
    settings: SettingsResolver,
    widths: Sequence[int],
    blocks: int,
    known: Mapping[str, Any],
    source: str,
    *,
    size_source: str | None = None,
    attends: Sequence[bool] = (),
) -> tuple[tuple[int, int], float]:
    """Resolve the image size and the dropout of a U-Net, which no weight shows; record its widths as a fact.

    Args:
        settings: resolves both.
        widths, blocks: of the levels, for the recorded fact.
        known: ``size`` and ``dropout``, as far as they are known.
        source: where they are from.
        size_source: where the size is from, if from elsewhere.
        attends: which levels have attention, which in most of these networks is the one of 16 pixels.

    Returns:
        ((height, width), dropout).
    """
    guess = 16 << attends.index(True) if True in attends else 32
    size = settings.resolve(
        "size",
        ((guess, guess),),
        known=known.get("size"),
        source=size_source or source,
        why="the weights fit any size" + (f"; attention at 16 pixels means {guess}" if any(attends) else ""),
        closed=False,
        probed=False,
    )
    settings.add_fact("network", f"{list(widths)}, {blocks} blocks per level", "shapes of the weights")
    dropout = settings.resolve(
        "dropout",
        (0.0,),
        known=known.get("dropout"),
        source=source,
        assume="not in the file; only training uses it",
        closed=False,
    )
    return size, dropout
