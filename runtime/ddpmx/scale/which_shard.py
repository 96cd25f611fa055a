"""Which shard a process is: ``--shard 3/16``, or by the variables of what started it.

Sources: the manuals of Slurm (srun, sbatch: output environment variables), Kubernetes (indexed Jobs), Open MPI and MPICH's
Hydra, and torchrun.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ddpmx.errors import InputError
from ddpmx.scale.ranges import Shard

Environment = Mapping[str, str]

_AUTO = re.compile(r"auto(?:/([0-9]{1,10}))?")
_GIVEN = re.compile(r"([0-9]{1,10})/([0-9]{1,10})")
_HINT = "--shard 3/16, counted from 0; or auto, auto/16"

KUBERNETES = "JOB_COMPLETION_INDEX"


@dataclass(frozen=True)
class Found:
    """What one starter says: ``count`` is None where it does not say how many there are."""

    index: int
    count: int | None
    names: str


def which_shard(text: str, environment: Environment) -> Shard:
    """The shard of ``--shard``.

    Args:
        text: ``i/n``; ``auto`` for what the variables say; ``auto/n`` where they say the index only, or to check them.
        environment: ``os.environ``.

    Raises:
        InputError: it is neither; no variables, or variables that contradict each other or ``n``.
    """
    if given := _GIVEN.fullmatch(text.strip()):
        return Shard(int(given[1]), int(given[2]))
    auto = _AUTO.fullmatch(text.strip())
    if auto is None:
        raise InputError(f"--shard {text[:40]!r} is neither i/n nor auto", hint=_HINT)
    wanted = None if auto[1] is None else int(auto[1])
    found = [each for source in _SOURCES for each in source(environment)]
    if not found:
        _refuse_batch_script(environment)
        raise InputError(
            f"--shard {auto[0]}: nothing says which shard this is",
            note="neither Slurm, Kubernetes, MPI nor torchrun has started this process",
            hint=f"--shard 0/{wanted or 16}",
        )
    _refuse_copied(environment, found)
    counts = {each.count for each in found if each.count is not None} | ({wanted} - {None})
    if len(counts) > 1 or len({each.index for each in found}) > 1:
        said = [f"{each.names} {each.index}/{'?' if each.count is None else each.count}" for each in found]
        raise InputError(
            f"--shard {auto[0]}: it is not clear which shard this is",
            note="; ".join(said) + ("" if wanted is None else f"; --shard says {wanted}"),
            hint="name it yourself, such as --shard $SLURM_PROCID/$SLURM_NTASKS",
        )
    if not counts:
        raise InputError(
            f"--shard auto: {found[0].names} is shard {found[0].index}, but nothing says of how many",
            note="a pod does not know the completions of its Job" if found[0].names == KUBERNETES else None,
            hint="--shard auto/N, with the N of the Job's completions",
        )
    (count,) = counts
    assert count is not None
    return Shard(found[0].index, count, ", ".join(each.names for each in found))


def _number(environment: Environment, name: str) -> int | None:
    """The value of a variable, None if it is not set."""
    text = environment.get(name, "")
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise InputError(f"{name} is {text[:40]!r}, and no whole number", hint="name the shard: --shard 3/16")
    return int(text)


def _slurm(environment: Environment) -> Iterator[Found]:
    """An array's task, a step's process, or both: process p of P in task a of A is shard a·P + p of A·P."""
    array = _array(environment)
    process = None
    if "SLURM_STEP_ID" in environment:  # srun sets it; in a batch script SLURM_PROCID is 0 whatever SLURM_NTASKS says
        index, count = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
        count = _number(environment, "SLURM_NTASKS") if count is None else count
        if index is not None and count is not None:
            process = Found(index, count, "SLURM_PROCID and SLURM_NTASKS")
    if array is not None and (process is None or process.count == 1):
        yield array
    elif array is None and process is not None:
        yield process
    elif array is not None and process is not None:
        assert array.count is not None
        assert process.count is not None
        names = f"{array.names}, {process.names}"
        yield Found(array.index * process.count + process.index, array.count * process.count, names)


def _array(environment: Environment) -> Found | None:
    number, count = _number(environment, "SLURM_ARRAY_TASK_ID"), _number(environment, "SLURM_ARRAY_TASK_COUNT")
    if number is None or count is None:
        return None
    least = _number(environment, "SLURM_ARRAY_TASK_MIN") or 0
    most, step = _number(environment, "SLURM_ARRAY_TASK_MAX"), _number(environment, "SLURM_ARRAY_TASK_STEP") or 1
    # of --array=3,5,11 only the ends are known, so that nobody can say which of the three a task is
    even = count == 1 or most is None or least + step * (count - 1) == most
    if not even or (number - least) % step or not 0 <= (number - least) // step < count:
        raise InputError(
            f"--shard auto: task {number} of an array with gaps",
            note=f"{count} tasks from {least}" + ("" if most is None else f" to {most}"),
            hint="--array=0-15; to draw what single tasks have left, --array=5 alone, or name it: --shard 5/16",
        )
    return Found((number - least) // step, count, "SLURM_ARRAY_TASK_ID")


def _refuse_batch_script(environment: Environment) -> None:
    """``sbatch -n 8`` runs its script once. Without srun seven eighths of the images would be missing."""
    tasks = _number(environment, "SLURM_NTASKS") or 1
    if tasks > 1 and "SLURM_STEP_ID" not in environment:
        raise InputError(
            f"--shard auto: the job has {tasks} tasks, and this process is none of them",
            note="a batch script is run once; srun starts a process for each task",
            hint="srun ddpmx generate … --shard auto; or name it: --shard 3/8",
        )


def _refuse_copied(environment: Environment, found: list[Found]) -> None:
    """Scripts for torch set RANK and WORLD_SIZE to Slurm's numbers. Before srun that is 0 of all tasks, and one process."""
    if [each.names for each in found] != ["RANK and WORLD_SIZE"] or "TORCHELASTIC_RUN_ID" in environment:
        return
    if found[0].count == _number(environment, "SLURM_NTASKS"):
        _refuse_batch_script(environment)


def _pair(rank: str, size: str) -> Callable[[Environment], Iterator[Found]]:
    def look(environment: Environment) -> Iterator[Found]:
        index, count = _number(environment, rank), _number(environment, size)
        if index is not None and count is not None:
            yield Found(index, count, f"{rank} and {size}")

    return look


def _kubernetes(environment: Environment) -> Iterator[Found]:
    index = _number(environment, KUBERNETES)
    if index is not None:
        yield Found(index, None, KUBERNETES)


_SOURCES: tuple[Callable[[Environment], Iterator[Found]], ...] = (
    _slurm,
    _kubernetes,
    _pair("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    _pair("PMI_RANK", "PMI_SIZE"),
    _pair("RANK", "WORLD_SIZE"),
)
