"""Other projects' checkpoints: recognised, imported as runs, and converted back.

Every importer is a module with a ``NAME``, ``recognise(contents)``, ``read(contents, options)`` and, where the project's
own format can be written, ``write(imported, folder)``. They share :mod:`.reading.contents` (opens a file safely),
:mod:`.keys` (tables of names) and :mod:`.settings` (settings, and where each value came from).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import ddpmx
from ddpm_export.importers import unsupported
from ddpm_export.importers.reading.contents import CheckpointContents, open_checkpoint
from ddpm_export.importers.settings import Fact, Imported, Options, Question, SettingsResolver
from ddpm_export.networks.registry import check_spec
from ddpm_export.training import checkpoint
from ddpmx.errors import FileFormatError, InputError
from ddpmx.formats.atomic import atomic_folder

__all__ = [
    "CheckpointContents",
    "Fact",
    "Imported",
    "Importer",
    "Options",
    "Question",
    "SettingsResolver",
    "convert",
    "import_checkpoint",
    "importer",
    "open_checkpoint",
    "recognise",
    "save_run",
]

MODULES: Mapping[str, str] = {
    "diffusers": "diffusers",
    "lucidrains": "lucidrains",
    "openai": "openai",
    "ho-tf": "ho_tf",
    "pesser": "pesser",
    "ddim": "pesser",
    "pytorch-ddpm": "pytorch_ddpm",
    "ddpm-torch": "ddpm_torch",
    "score-sde": "score_sde",
}
"""The values of ``--from``, and the module that reads each. ddim's files have pesser's keys."""

WRITERS = ("diffusers", "openai", "pesser")


class Importer(Protocol):
    """The interface of an importer's module."""

    NAME: str

    def recognise(self, contents: CheckpointContents) -> str | None:
        """Text that says what shows that the file is of this project, or None if it is not."""
        ...

    def read(self, contents: CheckpointContents, options: Options) -> Imported:
        """The network in the file."""
        ...

    def write(self, imported: Imported, folder: Path) -> None:
        """Write the network in the project's own format, into an existing empty folder."""
        ...


def importer(name: str) -> Importer:
    """The importer of that name.

    Raises:
        InputError: there is no such importer.
    """
    if name not in MODULES:
        raise InputError(f"there is no importer {name!r}", hint=f"one of: {', '.join(MODULES)}")
    return cast(Importer, _module(name))


def recognise(contents: CheckpointContents) -> tuple[str, str]:
    """The name of the project whose checkpoint it is, and what shows it.

    Raises:
        FileFormatError: no importer recognises it, or it is something else than a DDPM.
    """
    unsupported.refuse(contents)
    for name in MODULES:
        if name == "ddim":  # the same module as pesser's
            continue
        if evidence := _module(name).recognise(contents):
            return name, evidence
    some = ", ".join(list(contents.tensors)[:4])
    raise FileFormatError(
        f"{contents.path}: a checkpoint of no project that ddpmx knows",
        note=f"{len(contents.tensors)} tensors, called {some}, …",
        hint="build the network with its own code, load these weights, and pass it to ddpm_export.export, from Python: "
        "that takes any torch module",
    )


def import_checkpoint(
    path: str | os.PathLike[str],
    options: Options | None = None,
    *,
    source: str = "auto",
    contents: CheckpointContents | None = None,
) -> Imported:
    """Read another project's checkpoint.

    Args:
        path: file or folder, or ``hf:ORGANISATION/NAME``.
        options: the settings that the user chose.
        source: the project, a key of :data:`MODULES`, or ``auto``.
        contents: of ``path``, if it was opened already.

    Returns:
        The network; its ``questions`` are the settings still open.

    Raises:
        FileFormatError, SpecError, InputError: it cannot be read, or it does not fit the options.
    """
    contents = open_checkpoint(path) if contents is None else contents
    facts: tuple[Fact, ...]
    if source == "auto":
        name, evidence = recognise(contents)
        facts = (Fact("checkpoint of", name, evidence),)
    else:
        unsupported.refuse(contents)
        if importer(source).recognise(contents) is None:
            found, evidence = recognise(contents)  # of no project at all: its own error says more
            raise FileFormatError(
                f"{contents.path}: not a checkpoint of {source}, but of {found}",
                note=evidence,
                hint=f"--from {found}, or leave out --from",
            )
        name, facts = source, (Fact("checkpoint of", source, "set by the user"),)
    read = importer(name).read(contents, options or Options())
    return Imported(**{**vars(read), "facts": (*facts, *read.facts)})


def convert(imported: Imported, to: str, folder: str | os.PathLike[str]) -> None:
    """Write a network in another project's format, as a new folder.

    Raises:
        InputError: that project's code cannot compute such a network, or ``to`` is no known format.
        SpecError: network and chain do not fit together.
        OutputError: the folder exists and is not empty, or cannot be written. Nothing half-written is left.
    """
    if to not in WRITERS:
        raise InputError(f"there is no exporter {to!r}", hint=f"one of: {', '.join(WRITERS)}")
    spec = imported.spec
    check_spec(imported.config, spec)
    if inputs := [name for name in spec.conditioning_shapes if name != "y"]:
        raise InputError(
            f"no network of {to} has the input{'s' if len(inputs) > 1 else ''} {' and '.join(inputs)}",
            note="of all conditioning, the formats that ddpmx writes have the class at most",
            hint="ddpmx export writes an ONNX file, which has all inputs",
        )
    with atomic_folder(folder) as inside:
        importer(to).write(imported, inside)


def save_run(imported: Imported, run: str | os.PathLike[str]) -> Path:
    """Write an import as a run with one checkpoint, which every command takes.

    Raises:
        InputError: there are open questions.
        SpecError: network and chain do not fit together.
        OutputError: ``run`` exists and is not empty, or cannot be written. Nothing half-written is left.
    """
    if imported.questions:
        raise InputError(f"unknown settings: {', '.join(question.name for question in imported.questions)}")
    facts = [
        {"name": fact.name, "value": str(fact.value), "source": fact.source, "assumed": fact.assumed}
        for fact in imported.facts
    ]
    state = checkpoint.TrainingState(0, {"imported": {"from": imported.source, "facts": facts}}, {})
    weights = imported.tensors if imported.raw is None else imported.raw
    spec = imported.spec.replace(ddpmx=ddpmx.__version__)
    with atomic_folder(run) as inside:
        checkpoint.save(inside, spec, imported.config, weights, imported.tensors, state)
        checkpoint.load_network(inside)  # a run that no command could read is not left behind
    return checkpoint.resolve(run)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"ddpm_export.importers.{MODULES[name]}")
