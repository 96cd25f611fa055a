"""What many processes draw together: what each has to know, what is there already, and the drawing.

Every process writes whole files of ranges that it alone draws, so none waits for another, and a process that is killed
costs the range it was at. The same command goes on from there: a file that is whole and of the same run is not drawn again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ddpmx
from ddpmx.errors import DdpmxError, InputError, OutputError
from ddpmx.formats.envelope import parse_json
from ddpmx.formats.spec import ModelSpec
from ddpmx.images import writers
from ddpmx.images.gallery import RUN
from ddpmx.images.origin import SOFTWARE, Origin
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.request import Sampling
from ddpmx.scale.forms import FORMS, Form
from ddpmx.scale.ranges import Range, Shard, cut
from ddpmx.scale.stores import LocalStore, Store

PER_FILE, FILE_BYTES = 1024, 1 << 28
"""Images of a file by default, and the bytes that fewer of larger images make."""


@dataclass(frozen=True, eq=False)
class Work:
    """A run: a model, and how its images are drawn and kept. The same in every process that draws a part of it.

    Attributes:
        model: what :func:`ddpmx.images.origin.model_hash` says of the model.
        spec: the model's.
        seed, sampling, guidance: as for ``generate``.
        steps: of the chain.
        batch: of the network.
        form: one of :data:`.FORMS`.
        per_file: images of a file, a multiple of ``batch``; of ``png`` the images of a task.
        turns: the classes, repeated in order of the images' index; None without.
        cond: float32 [k, K, H, W], the conditions, repeated in the same way; None without.
        cond_names: their names.
    """

    model: str
    spec: ModelSpec
    seed: int
    sampling: Sampling
    steps: int
    batch: int
    form: str
    per_file: int
    guidance: float = 1.0
    turns: tuple[int, ...] | None = None
    cond: NDArray[np.float32] | None = None
    cond_names: tuple[str, ...] = ()
    _cond_hash: str = field(init=False, default="")

    def __post_init__(self) -> None:
        """Check what depends on each other.

        Raises:
            InputError: a file would end within a batch.
        """
        if self.per_file < 1 or self.per_file % self.batch:
            fewer = self.per_file // self.batch * self.batch
            raise InputError(
                f"--per-file {self.per_file} is no multiple of the batch of {self.batch}",
                note="a file ends with a batch, so that every process runs the batches of a single one",
                hint=f"--per-file {fewer + self.batch}"
                + (f", or {fewer}" if fewer > 0 else "")
                + "; or another --batch",
            )
        if self.cond is not None:
            names = "\n".join(self.cond_names).encode(errors="replace")
            digest = hashlib.sha256(names + b"\0" + np.ascontiguousarray(self.cond).tobytes())
            object.__setattr__(self, "_cond_hash", digest.hexdigest())

    @property
    def kind(self) -> Form:
        """The form."""
        return FORMS[self.form]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the model's classes."""
        return self.spec.class_names

    @property
    def unit(self) -> int:
        """Images that one process draws together: those of a batch, or of a file."""
        return self.batch if self.kind.one_image else self.per_file

    def labels(self, images: Range) -> list[int] | None:
        """The class of each of these images."""
        if self.turns is None:
            return None
        return [self.turns[index % len(self.turns)] for index in range(images.first, images.end)]

    def conditions(self, images: Range) -> NDArray[np.float32] | None:
        """The condition of each, float32 [n, K, H, W]."""
        return None if self.cond is None else self.cond[np.arange(images.first, images.end) % len(self.cond)]

    def origin(self, images: Range) -> Origin:
        """What is written into the PNG of each."""
        names = self.cond_names
        return Origin(
            self.model,
            self.spec.precision,
            self.seed,
            self.sampling,
            self.steps,
            images.first,
            labels=self.labels(images),
            conditions=[names[index % len(names)] for index in range(images.first, images.end)] if names else None,
            guidance=self.guidance,
        )

    def identity(self) -> dict[str, Any]:
        """What has to be the same for two images to be of one run. It does not depend on how many there are, or where."""
        own = (SOFTWARE, "index", "label", "condition")  # of one image
        text = self.origin(Range(0, 0)).text(0)
        found: dict[str, Any] = {key: value for key, value in text.items() if key not in own}
        found |= {"shape": list(self.spec.shape), "batch": self.batch, "format": self.form}
        if not self.kind.one_image:
            found["per_file"] = self.per_file
        if self.turns is not None:
            found["labels"] = list(self.turns)
        if self.cond is not None:
            found["conditions"] = self._cond_hash
        return found

    # --- files ---------------------------------------------------------------------------------------------------------

    def check(self, whole: Range) -> None:
        """Check that files can be cut out of these images.

        Raises:
            InputError: the first image is within a file.
        """
        if not self.kind.one_image and whole.first % self.per_file:
            below = whole.first // self.per_file * self.per_file
            raise InputError(
                f"--first {whole.first} is within a file of {self.per_file} images",
                note=f"file 0 has the images from 0 on, file 1 those from {self.per_file} on",
                hint=f"--first {below} or {below + self.per_file}; or --format png, a file for each image",
            )

    def units(self, whole: Range) -> list[Range]:
        """What is drawn and written at once."""
        return cut(whole, self.unit)

    def names(self, images: Range) -> list[str]:
        """The files of a unit."""
        if self.kind.one_image:
            return [writers.image_path(_NO_FOLDER, index).name for index in range(images.first, images.end)]
        return [f"images-{images.first // self.per_file:06d}.{self.kind.suffix}"]

    def files(self, images: Range, pixels: NDArray[np.uint8]) -> dict[str, bytes]:
        """The files of a unit with their contents."""
        names = self.names(images)
        parts = cut(images, 1) if self.kind.one_image else [images]
        return {
            name: self.kind.encode(self, part, pixels[part.first - images.first : part.end - images.first])
            for name, part in zip(names, parts, strict=True)
        }

    def is_there(
        self, store: Store, images: Range, names: set[str], damaged: Callable[[str], object] = lambda _: None
    ) -> bool:
        """Whether a unit is there as a whole.

        Args:
            store: where.
            images: the unit.
            names: the files that are there.
            damaged: called with the name of each file that is not whole.

        Raises:
            OutputError: a file of its name is of another run, or ddpmx has not written it; or cannot be read.
        """
        # each that is there is looked at: one that is missing is no reason to write over another run's
        own = [
            name in names and self._is_whole(store, name, images, at, damaged)
            for at, name in enumerate(self.names(images))
        ]
        return all(own)

    def _is_whole(self, store: Store, name: str, images: Range, at: int, damaged: Callable[[str], object]) -> bool:
        if self.kind.one_image and not store.is_local:
            return True  # its name says that it is whole, and run.json of which run; to read each would take hours
        with store.open(name) as stream:
            try:
                about = self.kind.about(stream)
            except ValueError:
                damaged(name)
                return False
        if self.kind.one_image:
            mine: Mapping[str, Any] = self.origin(Range(images.first + at, 1)).text(0)
            other = _difference(dict(about) | {SOFTWARE: ""}, dict(mine) | {SOFTWARE: ""}) if about else "not ddpmx's"
        else:
            run = about.get("run")
            other = _difference(run, self.identity()) if isinstance(run, dict) else "not ddpmx's"
            if other is None and about.get("first") != images.first:
                other = f"it begins with image {about.get('first')}"
        if other is not None:
            raise _mixed(store, f"{name}: {other}")
        count = about.get("count")
        return self.kind.one_image or (isinstance(count, int) and count >= images.count)


_NO_FOLDER = Path()


def claim(work: Work, store: Store) -> set[str]:
    """Say in a folder of which run it is, or check that it is of this one; the files that are there.

    Processes that begin at the same time write the same bytes. Of two runs that do, one finds the other's here when it
    looks again, which it does before each file.

    Raises:
        OutputError: the folder holds another run, or cannot be read or written.
    """
    names = store.names()
    if RUN not in names:
        _refuse_strangers(work, store, names)
        text = json.dumps({"ddpmx": ddpmx.__version__, "run": work.identity()}, indent=1, sort_keys=True)
        store.write({RUN: text.encode() + b"\n"})
    check_claim(work, store)
    return names


def check_claim(work: Work, store: Store) -> None:
    """Check that a folder is still of this run.

    Raises:
        OutputError: it is of another one, or nobody can say.
    """
    with store.open(RUN) as stream:
        data = stream.read(1 << 24)
    try:
        values = parse_json(data)
    except DdpmxError:
        values = None
    run = values.get("run") if isinstance(values, dict) else None
    if not isinstance(run, dict):
        raise OutputError(
            f"{store}: its {RUN} is not ddpmx's, or damaged",
            hint=f"another --out, or remove {RUN} if the images are yours",
        )
    if other := _difference(run, work.identity()):
        raise _mixed(store, f"{RUN}: {other}")


def _refuse_strangers(work: Work, store: Store, names: set[str]) -> None:
    """A folder without run.json may hold this run's images by a plain ``generate``; anything else stays as it is."""
    from ddpmx.images import gallery

    if work.kind.one_image and isinstance(store, LocalStore):
        try:
            gallery.check_one_run(store.folder, work.origin(Range(0, 0)), 0)
        except OutputError as error:
            raise OutputError(error.fact, note=error.note, hint="another --out") from error
    elif strange := sorted(name for name in names if name.rpartition(".")[2] in FORMS):
        raise _mixed(store, f"{strange[0]} is there, and no {RUN}")


def pending(
    work: Work, store: Store, images: Range, names: set[str], damaged: Callable[[str], object] = lambda _: None
) -> list[Range]:
    """The units of ``images`` that are still to be drawn. ``damaged`` is called with the files of them that are not whole.

    Raises:
        OutputError: as :meth:`Work.is_there`.
    """
    return [unit for unit in work.units(images) if not work.is_there(store, unit, names, damaged)]


def draw(
    pipeline: Pipeline,
    work: Work,
    store: Store,
    units: Iterable[Range],
    *,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> int:
    """Draw units and write their files, one after the other; how many images that were.

    Args:
        pipeline: the model, opened.
        work: the run.
        store: where the files go.
        units: of :func:`pending`.
        progress: called repeatedly with (steps done, steps in all).
        cancel: called repeatedly; True ends the work. What is written stays.

    Raises:
        OutputError: a file could not be written, or another run has begun in the same folder.
        As :meth:`ddpmx.Pipeline.generate`.
    """
    units = list(units)
    total = work.steps * sum(-(-unit.count // work.batch) for unit in units)
    before = 0
    for unit in units:

        def shown(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        pixels = pipeline.generate(
            unit.count,
            seed=work.seed,
            first=unit.first,
            batch=work.batch,
            labels=work.labels(unit),
            cond=work.conditions(unit),
            guidance=work.guidance,
            sampling=work.sampling,
            progress=shown,
            cancel=cancel,
        )
        before += work.steps * -(-unit.count // work.batch)
        check_claim(work, store)
        store.write(work.files(unit, pixels))
    return sum(unit.count for unit in units)


def default_per_file(spec: ModelSpec, batch: int) -> int:
    """Images of a file: :data:`PER_FILE`, fewer of large images, and a multiple of the batch."""
    channels, height, width = spec.shape
    return max(1, min(PER_FILE, FILE_BYTES // (channels * height * width)) // batch) * batch


def part(work: Work, whole: Range, shard: Shard | None) -> Range:
    """The images of a shard: all of them without one.

    Raises:
        InputError: as :meth:`Work.check`.
    """
    work.check(whole)
    return whole if shard is None else shard.of(whole, work.unit)


def _difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str | None:
    """What tells two runs apart, in words; None if nothing does."""
    for key in dict.fromkeys((*mine, *theirs)):
        if theirs.get(key) != mine.get(key):
            shown = [str(values.get(key, "not stated"))[:64] for values in (theirs, mine)]
            return f"{key} {shown[0]}, and now {shown[1]}"
    return None


def _mixed(store: Store, note: str) -> OutputError:
    return OutputError(
        f"refusing to mix the images of two runs in {store}",
        note=note,
        hint="another --out; or remove what is there, if it is not needed",
    )
