"""Other people's checkpoints: recognised, understood, imported, and given back.

Every importer is a module with a ``NAME``, ``recognise(found)``, ``read(found, options)`` and, where the project's own
format can be written, ``write(imported, folder)``. They share :mod:`.found` (opens a file safely), :mod:`.keys` (tables
of names) and :mod:`.inquiry` (settings, and where each was taken from).
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import ddpmx
from ddpm_export.importers.reading.found import Found, open_found
from ddpm_export.importers.settings import Fact, Imported, Inquiry, Options, Question
from ddpm_export.training import checkpoint
from ddpmx.errors import FileFormatError, InputError, OutputError
from ddpmx.formats.atomic import write_error

__all__ = [
    "Fact",
    "Found",
    "Imported",
    "Importer",
    "Inquiry",
    "Options",
    "Question",
    "convert",
    "import_checkpoint",
    "importer",
    "open_found",
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
"""What ``--from`` says, and the module that reads it. ddim's files have pesser's keys."""

WRITERS = ("diffusers", "openai", "pesser")


class Importer(Protocol):
    """What an importer's module has."""

    NAME: str

    def recognise(self, found: Found) -> str | None:
        """What shows that the file is of this project, for people; or None."""
        ...

    def read(self, found: Found, options: Options) -> Imported:
        """The network in the file."""
        ...

    def write(self, imported: Imported, folder: Path) -> None:
        """The same in the project's own format, into an existing empty folder."""
        ...


def importer(name: str) -> Importer:
    """The importer of that name.

    Raises:
        InputError: there is none.
    """
    if name not in MODULES:
        raise InputError(f"there is no importer {name!r}", hint=f"one of: {', '.join(MODULES)}")
    return cast(Importer, _module(name))


def recognise(found: Found) -> tuple[str, str]:
    """Whose checkpoint it is, and what shows it.

    Raises:
        FileFormatError: nobody's that is known.
    """
    for name in MODULES:
        if name == "ddim":  # pesser's module has looked already
            continue
        if evidence := _module(name).recognise(found):
            return name, evidence
    some = ", ".join(list(found.tensors)[:4])
    raise FileFormatError(
        f"{found.path}: nobody's checkpoint that ddpmx knows",
        note=f"{len(found.tensors)} tensors, called {some}, …" if some else "there are no tensors in it",
        hint=f"--from {'|'.join(MODULES)}, if it is one of these; any torch module can be exported from Python: "
        "ddpm_export.export",
    )


def import_checkpoint(
    path: str | os.PathLike[str], options: Options | None = None, *, source: str = "auto", found: Found | None = None
) -> Imported:
    """Understand somebody's checkpoint.

    Args:
        path: file or folder, or ``hf:ORGANISATION/NAME``.
        options: what the user says about it.
        source: whose it is, a key of :data:`MODULES`, or ``auto``.
        found: what lies at ``path``, if it was opened already.

    Returns:
        The network; its ``questions`` are what still has to be said.

    Raises:
        FileFormatError, SpecError, InputError: it cannot be read, or is not what was said.
    """
    found = open_found(path) if found is None else found
    facts: tuple[Fact, ...]
    if source == "auto":
        name, evidence = recognise(found)
        facts = (Fact("checkpoint of", name, evidence),)
    else:
        if importer(source).recognise(found) is None:
            raise FileFormatError(
                f"{found.path}: no checkpoint of {source}", hint="--from auto tells whose it is, if ddpmx knows"
            )
        name, facts = source, (Fact("checkpoint of", source, "as said"),)
    read = importer(name).read(found, options or Options())
    return Imported(**{**vars(read), "facts": (*facts, *read.facts)})


def convert(imported: Imported, to: str, folder: str | os.PathLike[str]) -> None:
    """Write a network in another project's format, as a new folder.

    Raises:
        InputError: that project's code cannot compute such a network, or ``to`` is no known format.
        OutputError: the folder exists and is not empty, or cannot be written. Nothing half-written is left.
    """
    if to not in WRITERS:
        raise InputError(f"there is no exporter {to!r}", hint=f"one of: {', '.join(WRITERS)}")
    _new_folder(Path(folder), lambda inside: importer(to).write(imported, inside))


def save_run(imported: Imported, run: str | os.PathLike[str]) -> Path:
    """Write an import as a run with one checkpoint, which every command takes.

    Raises:
        InputError: there are open questions.
        SpecError: network and chain do not fit together.
        OutputError: ``run`` exists and is not empty, or cannot be written. Nothing half-written is left.
    """
    if imported.questions:
        raise InputError(f"nobody said: {', '.join(question.name for question in imported.questions)}")
    facts = [
        {"name": fact.name, "value": str(fact.value), "source": fact.source, "assumed": fact.assumed}
        for fact in imported.facts
    ]
    state = checkpoint.TrainingState(0, {"imported": {"from": imported.source, "facts": facts}}, {})
    weights = imported.tensors if imported.raw is None else imported.raw
    spec = imported.spec.replace(ddpmx=ddpmx.__version__)

    def fill(inside: Path) -> None:
        checkpoint.save(inside, spec, imported.config, weights, imported.tensors, state)
        checkpoint.load_network(inside)  # what no command could read is not left behind

    _new_folder(Path(run), fill)
    return checkpoint.resolve(run)


def _new_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Fill a folder under another name, and rename it once it is whole."""
    folder = Path(os.path.realpath(folder))
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(f"{folder}: exists already, and is not an empty folder", hint="another -o")
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        fill(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(folder, error) from error
        raise


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"ddpm_export.importers.{MODULES[name]}")
