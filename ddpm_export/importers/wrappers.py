"""Finds a network in a file, whatever a program put around it: containers, prefixes, wrapper modules, averages.

A project's network is known by the names of a few of its tensors, its *marks*. Whatever stands before them, the same for
all, is a prefix: the keys of containers (``state_dict.``, ``model.``, ``ema.``), the attributes that hold the module
(``diffusion.model.``), and wrapper modules such as torch.compile's ``_orig_mod.``, which may stand anywhere in a name. So
every nesting of these is read in one place, for every importer.

A file may hold a network twice, as it was trained and averaged. Which is which follows from the prefix; three programs
store the average under other names, see :func:`_lit_ema`, :func:`_shadow_params` and :func:`_is_average`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ddpm_export.importers.reading.contents import EMA_FOLDER, CheckpointContents
from ddpm_export.importers.settings import Options, SettingsResolver
from ddpmx.errors import FileFormatError, InputError

_T = TypeVar("_T")

WRAPPERS: Mapping[str, str] = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel, DistributedDataParallel or AveragedModel",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
"""Names that a wrapper module puts into the names of its tensors, and what puts it there."""

_AVERAGE = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|shadow)(?![a-z])")
_SHADOW = ".shadow_params.0"
_SHOWN = 4


@dataclass(frozen=True)
class Network:
    """One set of a network's tensors in a file.

    Attributes:
        prefix: what stands before each name, without wrapper modules: ``state_dict.model.``.
        stored: the same as the file has it, to be shown.
        averaged: whether it is a moving average of the trained weights.
        tensors: by the names that the project gives them.
    """

    prefix: str
    stored: str
    averaged: bool
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """The network that was chosen, and the trained one where that is another.

    Attributes:
        chosen: what to import.
        raw: the trained network, where ``chosen`` is its average; otherwise None.
    """

    chosen: Network
    raw: Network | None

    @property
    def trained(self) -> Network:
        """The network that was trained, or its average where the file has nothing else."""
        return self.raw or self.chosen

    def each(self) -> list[Network]:
        """``chosen``, and ``raw`` if there is one."""
        return [self.chosen] if self.raw is None else [self.chosen, self.raw]


# --- names without wrappers ------------------------------------------------------------------------------------------


def plain_names(contents: CheckpointContents) -> dict[str, str]:
    """The name of each tensor without wrapper modules, and its name in the file.

    Where two tensors would have one name, both keep the one they have.
    """
    stored = list(contents.tensors)
    plain = [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in stored]
    count: dict[str, int] = {}
    for name in plain:
        count[name] = count.get(name, 0) + 1
    return {(name if count[name] == 1 else written): written for name, written in zip(plain, stored, strict=True)}


def beside(values: Mapping[str, _T], prefix: str, name: str) -> _T | None:
    """The value called ``name`` in the container of a network, or in one around it; the nearest one, or None."""
    for parent in _parents(prefix):
        if parent + name in values:
            return values[parent + name]
    return None


def _parents(prefix: str) -> Iterator[str]:
    """``a.b.`` → ``a.b.``, ``a.``, ```` (nothing)."""
    parts = prefix.split(".")[:-1]
    for length in range(len(parts), -1, -1):
        yield "".join(f"{part}." for part in parts[:length])


# --- finding ---------------------------------------------------------------------------------------------------------


def prefixes(contents: CheckpointContents, marks: Sequence[str]) -> list[str]:
    """The prefixes under which all ``marks`` stand, in the order of the file; a mark that ends in a dot begins a name."""
    if contents.kind == "tensor-bundle":  # TensorFlow's names are no dotted ones, and reading one is slow
        return []
    return _prefixes(plain_names(contents), marks)


def _prefixes(names: Mapping[str, str], marks: Sequence[str]) -> list[str]:
    first, *others = marks
    ends = [name[: -len(first)] for name in names if name == first or name.endswith(f".{first}")]
    return [
        prefix
        for prefix in ends
        if all(
            any(name.startswith(prefix + mark) for name in names) if mark.endswith(".") else prefix + mark in names
            for mark in others
        )
    ]


def find(contents: CheckpointContents, marks: Sequence[str], *, averages: Sequence[str] = ()) -> list[Network]:
    """Every set of tensors with these marks, each once: first the averaged ones, then the others.

    Args:
        contents: of the file.
        marks: names that all such networks have, the first one in full.
        averages: further prefixes of averages, where a project's container does not name them.
    """
    names = plain_names(contents)
    found = _prefixes(names, marks)
    averaging = any(prefix.startswith("current_model_state.") for prefix in found)  # Lightning's WeightAveraging
    networks: list[Network] = []
    for prefix in found:
        inside = [other for other in found if other != prefix and other.startswith(prefix)]
        first = names[prefix + marks[0]]
        written = first.removesuffix(marks[0]) if first.endswith(marks[0]) else prefix
        own = {
            name[len(prefix) :]: stored
            for name, stored in names.items()
            if name.startswith(prefix)
            and stored.startswith(written)
            and not name.startswith(tuple(inside))
            and name != f"{prefix}n_averaged"
        }
        averaged = prefix in averages or _is_average(prefix, names)
        averaged = averaged or (averaging and prefix.startswith("state_dict."))
        tensors = {name: contents.tensors[stored] for name, stored in own.items()}
        networks.append(Network(prefix, written, averaged, tensors))
    for raw in [network for network in networks if not network.averaged]:
        networks += _lit_ema(raw, contents) + _shadow_params(raw, contents)
    return _each_once(sorted(networks, key=lambda network: not network.averaged))


def _is_average(prefix: str, names: Mapping[str, str]) -> bool:
    """Whether a prefix names an average: ``ema.``, ``model_ema.``, ``ema.ema_model.``; and not ``ema.online_model.``.

    torch's AveragedModel is known by its count ``n_averaged``.
    """
    for part in reversed(prefix.split(".")):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", part).lower()
        if "online" in words.split("_"):
            return False
        if _AVERAGE.search(words):
            return True
    return any(f"{parent}n_averaged" in names for parent in _parents(prefix))


def _lit_ema(raw: Network, contents: CheckpointContents) -> list[Network]:
    """The averages of CompVis' LitEma: ``model_ema.`` and each name without its dots, with decay and num_updates."""
    names = plain_names(contents)
    made = []
    for container in [name.removesuffix("num_updates") for name in names if name.endswith(".num_updates")]:
        inside = raw.prefix.split(".")
        for start in range(len(inside)):
            ends = {name: container + ".".join([*inside[start:-1], name]).replace(".", "") for name in raw.tensors}
            if all(end in names for end in ends.values()):
                tensors = {name: contents.tensors[names[end]] for name, end in ends.items()}
                made.append(Network(container, container, True, tensors))
                break
    return made


def _shadow_params(raw: Network, contents: CheckpointContents) -> list[Network]:
    """The averages of diffusers' EMAModel and torch_ema: a list without names, in the order of ``model.parameters()``.

    A state dict has that order too. It is taken only where number and shapes are those of the network.
    """
    names = plain_names(contents)
    made = []
    for first in [name for name in names if f".{name}".endswith(_SHADOW)]:
        container = first.removesuffix("0")
        count = sum(name.startswith(container) for name in names)
        ends = {name: f"{container}{i}" for i, name in enumerate(raw.tensors)}
        if count == len(ends) and all(
            end in names and contents.tensors[names[end]].shape == raw.tensors[name].shape for name, end in ends.items()
        ):
            tensors = {name: contents.tensors[names[end]] for name, end in ends.items()}
            made.append(Network(container, container, True, tensors))
    return made


def _each_once(networks: Iterable[Network]) -> list[Network]:
    """The networks without those that repeat an earlier one: a module that two attributes hold is saved twice.

    Of two names for the same the longer prefix stays, as more is said around it (a diffusion's schedule).
    """
    kept: list[Network] = []
    for network in sorted(networks, key=lambda network: -network.prefix.count(".")):
        if not any(network.averaged == other.averaged and _equal(network, other) for other in kept):
            kept.append(network)
    order = list(networks)
    return sorted(kept, key=order.index)


def _equal(one: Network, other: Network) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        tensor.shape == other.tensors[name].shape and torch.equal(tensor, other.tensors[name])
        for name, tensor in one.tensors.items()
    )


# --- choosing --------------------------------------------------------------------------------------------------------


def choose(
    networks: Sequence[Network], options: Options, settings: SettingsResolver, contents: CheckpointContents
) -> Weights:
    """The network that the user wants, by default the average where there is one; said in one line.

    Args:
        networks: those in the file, at least one.
        options: ``weights`` is ``ema``, ``raw`` or a prefix.
        settings: where the line is recorded.
        contents: of the file.

    Raises:
        InputError: there are several, and the user has to choose; or the one that the user chose is not there.
    """
    averaged = [network for network in networks if network.averaged]
    trained = [network for network in networks if not network.averaged]
    wanted = options.weights
    if wanted not in ("ema", "raw"):
        asked = {wanted, wanted.removesuffix("*"), f"{wanted}."}
        chosen = next((network for network in networks if asked & {network.prefix, network.stored}), None)
        if chosen is None:
            raise InputError(
                f"--weights {wanted!r}: neither ema and raw, nor where a network is in this file",
                note=f"networks are at {_listed(networks)}",
                hint="--weights ema takes the average where there is one, --weights raw the others",
            )
        candidates = [chosen]
    elif wanted == "raw":
        if not trained:
            raise InputError(
                f"{contents.path}: holds averaged weights only", note=_listed(networks), hint="--weights ema takes them"
            )
        candidates = trained
    else:
        candidates = averaged or trained
    if len(candidates) > 1:
        raise InputError(
            f"{contents.path}: holds {len(candidates)} networks of this kind",
            note=f"at {_listed(candidates)}",
            hint=f"--weights {next(filter(None, (network.stored for network in candidates)))} takes that one",
        )
    (chosen,) = candidates
    raw = trained[0] if chosen.averaged and len(trained) == 1 else None
    settings.add_fact("weights", _kind(chosen, networks), _where(chosen, raw, averaged, contents))
    return Weights(chosen, raw)


def _kind(chosen: Network, networks: Sequence[Network]) -> str:
    if chosen.averaged:
        return "ema"
    return "raw" if any(network.averaged for network in networks) else "as stored"


def _where(chosen: Network, raw: Network | None, averaged: Sequence[Network], contents: CheckpointContents) -> str:
    """Where the weights were, what was taken from their names, and what else there is."""
    inside = contents.file.is_relative_to(contents.path) and contents.file != contents.path
    file = str(contents.file.relative_to(contents.path)) if inside else contents.file.name
    if inside and any(name.startswith(f"{EMA_FOLDER}.") for name in contents.tensors):
        file = contents.path.name  # which has the average and the weights in a folder each
    parts = [f"{len(chosen.tensors)} tensors of {file}" + (f" at {_place(chosen)}" if chosen.stored else "")]
    wrappers = [name for name in WRAPPERS if any(name in stored.split(".") for stored in _stored(chosen, contents))]
    parts += [f"without {name} of {WRAPPERS[name]}" for name in wrappers]
    if raw is not None:
        parts.append(f"--weights raw takes {_place(raw)}")
    elif averaged and not chosen.averaged:
        parts.append(f"the average is at {_listed(averaged)}")
    elif lists := [name for name in plain_names(contents) if f".{name}".endswith(_SHADOW)]:
        container = lists[0].removesuffix(".0")
        count = sum(name.startswith(f"{container}.") for name in contents.tensors)
        parts.append(f"{container} is no average of it: {count} tensors, not {len(chosen.tensors)}, or of other shapes")
    return "; ".join(parts)


def _stored(network: Network, contents: CheckpointContents) -> list[str]:
    names = plain_names(contents)
    return [names.get(network.prefix + name, "") for name in network.tensors]


def _place(network: Network) -> str:
    return network.stored or network.prefix or "the top level"


def _listed(networks: Sequence[Network]) -> str:
    return ", ".join(map(_place, networks[:_SHOWN])) + (", …" if len(networks) > _SHOWN else "")


def take(
    contents: CheckpointContents,
    marks: Sequence[str],
    options: Options,
    settings: SettingsResolver,
    *,
    averages: Sequence[str] = (),
) -> Weights:
    """:func:`find`, then :func:`choose`.

    Raises:
        FileFormatError: there is no such network.
        InputError: as :func:`choose`.
    """
    networks = find(contents, marks, averages=averages)
    if not networks:
        raise FileFormatError(f"{contents.path}: no network of this project", note=f"no tensor is called {marks[0]}")
    return choose(networks, options, settings, contents)
