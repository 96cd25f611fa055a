"""The flags of `ddpmx generate` for many images and many processes, and what they do."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ddpmx.errors import InputError
from ddpmx_cli.console import busy, counted, counting, say

if TYPE_CHECKING:
    from ddpmx.pipeline import Pipeline
    from ddpmx.sampling.request import Sampling
    from ddpmx.scale.ranges import Range
    from ddpmx.scale.stores import Store
    from ddpmx.scale.work import Work
    from ddpmx_cli.opened import Where

PANEL = "Many images, many processes"
FORMATS = ("png", "npz", "tar", "parquet")
MOST_WORKERS = 10_000
_RAY = re.compile(r"local|auto|(ray://)?[\w.:\[\]-]+:[0-9]{1,5}")

Shard = Annotated[
    str | None,
    Option(
        help="Draw part I of N, counted from 0. auto: by the variables of Slurm, MPI or torchrun; auto/N: Kubernetes too.",
        metavar="I/N|auto",
        rich_help_panel=PANEL,
    ),
]
Format = Annotated[
    str | None,
    Option(
        "--format",
        help="png; or files of many images: npz, tar (WebDataset), parquet (Hugging Face).  \\[default: png]",
        metavar="NAME",
        rich_help_panel=PANEL,
    ),
]
PerFile = Annotated[
    int | None,
    Option(
        help="Images of such a file, a multiple of the batch.  \\[default: about 1024, fewer of large images]",
        metavar="N",
        rich_help_panel=PANEL,
    ),
]
Ray = Annotated[
    str | None,
    Option(
        help="Draw by Ray's workers, and draw anew what a killed one was at. local: of this machine; auto: of the cluster "
        "that it is part of; or the address of one.",
        metavar="local|auto|ADDRESS",
        rich_help_panel=PANEL,
    ),
]
Workers = Annotated[
    int | None,
    Option(
        help="With --ray: workers, each with a model and --threads of its own.  \\[default: as many as there is room for]",
        metavar="N",
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True)
class Many:
    """These flags as they were passed.

    Attributes:
        shard, form, per_file, ray, workers: see the help.
        out: a folder or an address.
    """

    shard: str | None
    form: str | None
    per_file: int | None
    ray: str | None
    workers: int | None
    out: str

    @property
    def wanted(self) -> bool:
        """Whether any of them was passed. Otherwise all images are drawn here, and written at the end."""
        from ddpmx.scale.stores import is_address

        passed = (self.shard, self.form, self.per_file, self.ray, self.workers)
        return any(each is not None for each in passed) or is_address(self.out)

    def check(self, others: Mapping[str, bool]) -> None:
        """Check them, before a model is opened.

        Args:
            others: flags of `generate` that do not go with them, and whether they were passed.

        Raises:
            InputError: one is not what it should be, or goes with none of these.
            BackendError: what writes such files is not installed.
        """
        from ddpmx.scale.forms import check_usable
        from ddpmx.scale.stores import is_address
        from ddpmx.scale.which_shard import which_shard

        if self.shard is not None:
            which_shard(self.shard, os.environ)
        if self.workers is not None and self.ray is None:
            raise InputError("--workers is for --ray only", hint="--ray local")
        if self.workers is not None and not 1 <= self.workers <= MOST_WORKERS:
            raise InputError(f"--workers must be from 1 to {MOST_WORKERS}, not {self.workers}")
        if self.ray is not None and not _RAY.fullmatch(self.ray):
            raise InputError(
                f"--ray {self.ray[:60]!r} is no address", hint="--ray local, auto, HOST:6379 or ray://HOST:10001"
            )

        if self.form is not None and self.form not in FORMATS:
            raise InputError(f"there is no --format {self.form[:40]!r}", hint=f"--format {', '.join(FORMATS)}")
        for flag, passed in others.items():
            if passed:
                raise InputError(
                    f"{flag} is for images that are drawn in one go",
                    note="--shard, --format, --per-file, --ray and addresses are for ranges that are drawn one by one",
                    hint=f"leave {flag} out, or those",
                )
        if self.per_file is not None and (self.form or "png") == "png":
            raise InputError("--per-file is for files of many images", hint="--format tar, parquet or npz")
        if self.per_file is not None and self.per_file < 1:
            raise InputError(f"--per-file must be at least 1, not {self.per_file}")
        if not is_address(self.out) and Path(self.out).suffix.lower() == ".png" and not Path(self.out).is_dir():
            raise InputError(f"--out {self.out} is one file, and these flags need a folder", hint="a folder as --out")
        check_usable(self.form or "png")


def prepared(
    pipeline: Pipeline,
    path: Path,
    many: Many,
    *,
    n: int,
    first: int,
    seed: int,
    batch: int | None,
    sampling: Sampling,
    turns: Sequence[int] | None,
    guidance: float,
    cond: Path | None,
) -> tuple[Work, Range]:
    """The run, and the images of all shards.

    Raises:
        InputError: a number out of its range, or numbers that do not go with each other.
    """
    from ddpmx.images.origin import model_hash
    from ddpmx.scale.ranges import Range
    from ddpmx.scale.work import Work, default_per_file
    from ddpmx_cli.opened import conditions_of

    check: dict[str, Any] = {"seed": seed, "sampling": sampling, "guidance": guidance}
    # of one image, since all together need not fit into memory
    for label in sorted(set(turns)) if turns is not None else [None]:
        size = pipeline.check_request(1, first=first, batch=batch, labels=label, **check)
    if not 1 <= n <= 1 << 32:
        raise InputError(f"n must be a whole number from 1 to 2**32, not {n}")
    if first + n > 1 << 32:
        raise InputError(f"images are numbered 0…2**32 - 1, and {first} + {n} is beyond that")
    conditions, names = conditions_of(pipeline.spec, cond)
    work = Work(
        model_hash(pipeline.spec, path),
        pipeline.spec,
        seed,
        sampling,
        len(pipeline.table(sampling)),
        size,
        many.form or "png",
        default_per_file(pipeline.spec, size) if many.per_file is None else many.per_file,
        guidance=guidance,
        turns=None if turns is None else tuple(turns),
        cond=conditions,
        cond_names=tuple(names or ()),
    )
    whole = Range(first, n)
    work.check(whole)
    return work, whole


def draw(pipeline: Pipeline, work: Work, whole: Range, many: Many, chosen: str) -> None:
    """Draw this process's part of the images, and say so.

    Args:
        pipeline: the model.
        work, whole: by :func:`prepared`.
        many: the flags.
        chosen: what is said of the sampler.
    """
    from ddpmx.scale.work import draw as draw_units

    here, store, units = _left(work, whole, many)
    if not units:
        return
    begun = time.monotonic()
    with counting(counted(sum(unit.count for unit in units), "image"), unit="steps") as progress:
        drawn = draw_units(pipeline, work, store, units, progress=progress)
    _summary(work, store, here, drawn, time.monotonic() - begun, pipeline.backend, chosen)


def draw_on_ray(
    pipeline: Pipeline, path: Path, work: Work, whole: Range, many: Many, where: Where, executor: str, chosen: str
) -> None:
    """The same by Ray's workers. The pipeline is closed: its device may be one of theirs."""
    from ddpmx.formats import model_file
    from ddpmx.scale import on_ray
    from ddpmx.scale.ranges import joined
    from ddpmx.scale.stores import is_address

    here, store, units = _left(work, whole, many)
    if not units:
        return
    pipeline.close()
    on_gpu = where.provider in _ON_GPU or model_file.identify(path) == "plan"
    there = dataclasses.replace(where, spec=None if where.spec is None else where.spec.resolve())
    begun = time.monotonic()
    with counting(counted(sum(unit.count for unit in units), "image"), unit="images") as progress:
        done = on_ray.draw_on_ray(
            functools.partial(there.open, path.resolve(), executor=executor),
            work,
            many.out if is_address(many.out) else str(Path(many.out).resolve()),
            joined(units, work.per_file),
            address=many.ray or "local",
            workers=many.workers,
            threads=where.threads,
            gpus=int(on_gpu),
            progress=progress,
            note=lambda text: say(f"Note: {text}"),
        )
    backend = f"{counted(done.workers, 'worker')} by Ray, {done.backend}"
    _summary(work, store, here, done.drawn, time.monotonic() - begun, backend, chosen)


_ON_GPU = ("cuda", "tensorrt", "rtx")


def _left(work: Work, whole: Range, many: Many) -> tuple[Range, Store, list[Range]]:
    """The images of this process, where they go, and the units that are not there yet. Says so where none is."""
    from ddpmx.scale.stores import open_store
    from ddpmx.scale.which_shard import which_shard
    from ddpmx.scale.work import claim, part, pending

    shard = None if many.shard is None else which_shard(many.shard, os.environ)
    here = part(work, whole, shard)
    if shard is not None:
        by = f" (by {shard.source})" if shard.source else ""
        say(f"shard {shard.index} of {shard.count}{by}: {here} of {whole.first}…{whole.end - 1}")
    store = open_store(many.out)
    with busy("looking at what is there"):
        names = claim(work, store)
        damaged: list[str] = []
        units = pending(work, store, here, names, damaged.append)
    if damaged:
        shown = ", ".join(damaged[:5]) + (", …" if len(damaged) > 5 else "")
        say(f"Note: {counted(len(damaged), 'file')} not whole, drawn again: {shown}")
    there = here.count - sum(unit.count for unit in units)
    if there:
        say(f"{counted(there, 'image')} there already, {counted(here.count - there, 'image')} to draw")
    if not here.count:
        what = f"files of {work.per_file}" if not work.kind.one_image else f"batches of {work.batch}"
        say(f"Note: nothing to do: {whole.count} images are fewer {what} than there are shards")
    return here, store, units


def _summary(work: Work, store: Store, here: Range, drawn: int, seconds: float, backend: str, chosen: str) -> None:
    say(
        f"{counted(drawn, 'image')}, {work.steps} steps of {work.sampling.sampler}{chosen}, seed {work.seed}, "
        f"in {seconds:.1f} s on {backend}"
    )
    ends = [work.units(here)[0], work.units(here)[-1]]
    first, last = work.names(ends[0])[0], work.names(ends[1])[-1]
    say(f"{store}: {first}" + (f" … {last}" if last != first else ""))
