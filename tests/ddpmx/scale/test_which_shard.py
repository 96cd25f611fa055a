"""``--shard``: environments as Slurm, Kubernetes, MPI and torchrun make them, by their manuals."""

from __future__ import annotations

import pytest

from ddpmx.errors import InputError
from ddpmx.scale.which_shard import which_shard


def array(task: int, tasks: list[int], step: int = 1) -> dict[str, str]:
    """sbatch --array: what a task of it sees."""
    return {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_COUNT": str(len(tasks)),
        "SLURM_ARRAY_TASK_MIN": str(min(tasks)),
        "SLURM_ARRAY_TASK_MAX": str(max(tasks)),
        "SLURM_ARRAY_TASK_STEP": str(step),
    }


BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}
TORCH = BATCH_SCRIPT | {"SLURM_NTASKS": "4", "TORCHELASTIC_RUN_ID": "none"}


def srun(process: int, count: int) -> dict[str, str]:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count)}
    return BATCH_SCRIPT | step | {"SLURM_PROCID": str(process), "SLURM_NTASKS": str(count)}


def mpi(kind: str, rank: int, size: int) -> dict[str, str]:
    return {f"{kind}_RANK": str(rank), f"{kind}_SIZE": str(size)}


@pytest.mark.parametrize(
    ("text", "environment", "wanted"),
    [
        ("3/16", {}, (3, 16)),
        (" 0/1 ", mpi("PMI", 1, 2), (0, 1)),
        ("auto", srun(2, 8), (2, 8)),
        ("auto", BATCH_SCRIPT | array(5, list(range(16))), (5, 16)),
        ("auto", array(1, [1, 2, 3, 4]), (0, 4)),
        ("auto", array(40, [20, 30, 40], step=10), (2, 3)),
        ("auto", array(5, [5]), (0, 1)),
        ("auto", array(2, [0, 1, 2]) | srun(0, 1), (2, 3)),
        ("auto", array(2, [0, 1, 2]) | srun(3, 4), (11, 12)),
        ("auto/64", {"JOB_COMPLETION_INDEX": "63"}, (63, 64)),
        ("auto", mpi("OMPI_COMM_WORLD", 1, 3), (1, 3)),
        ("auto", mpi("PMI", 1, 3), (1, 3)),
        ("auto", srun(1, 3) | mpi("PMI", 1, 3), (1, 3)),
        ("auto/3", {"RANK": "2", "WORLD_SIZE": "3"}, (2, 3)),
        ("auto", TORCH | {"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),  # torchrun in a batch script
        ("auto", BATCH_SCRIPT | {"SLURM_NTASKS": "8", "RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ("auto", BATCH_SCRIPT | {"SLURM_NTASKS": "1", "RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ("auto", BATCH_SCRIPT | {"SLURM_NTASKS": "4"} | mpi("OMPI_COMM_WORLD", 1, 4), (1, 4)),
        ("auto", srun(1, 4) | {"RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
    ],
    ids=str,
)
def test_the_shard_of_an_environment(text, environment, wanted):
    found = which_shard(text, environment)
    assert (found.index, found.count) == wanted


def test_it_says_what_it_took():
    assert (
        which_shard("auto", srun(1, 3) | mpi("PMI", 1, 3)).source
        == "SLURM_PROCID and SLURM_NTASKS, PMI_RANK and PMI_SIZE"
    )
    assert which_shard("auto/9", {"JOB_COMPLETION_INDEX": "3"}).source == "JOB_COMPLETION_INDEX"
    assert which_shard("3/9", srun(1, 3)).source == ""


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("", {}, "neither i/n nor auto"),
        ("1", {}, "neither i/n nor auto"),
        ("-1/4", {}, "neither i/n nor auto"),
        ("a/b", {}, "neither i/n nor auto"),
        ("auto/", {}, "neither i/n nor auto"),
        ("4/4", {}, "there is no shard 4/4"),
        ("0/0", {}, "there is no shard 0/0"),
        ("auto", {}, "nothing says which shard"),
        ("auto/4", {}, "nothing says which shard"),
        ("auto", {"JOB_COMPLETION_INDEX": "3"}, "nothing says of how many"),
        ("auto/2", {"JOB_COMPLETION_INDEX": "2"}, "there is no shard 2/2"),
        ("auto", {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX is 'x'"),
        ("auto", mpi("PMI", 1, 3) | mpi("OMPI_COMM_WORLD", 2, 3), "not clear which shard"),
        ("auto", mpi("PMI", 1, 3) | srun(1, 4), "not clear which shard"),
        ("auto/5", mpi("PMI", 1, 3), "not clear which shard"),
        ("auto", mpi("PMI", 3, 3), "there is no shard 3/3"),
        ("auto", array(5, [3, 5, 11]), "an array with gaps"),
        ("auto", BATCH_SCRIPT | {"SLURM_NTASKS": "8"}, "is none of them"),
        ("auto", BATCH_SCRIPT | {"SLURM_NTASKS": "8", "RANK": "0", "WORLD_SIZE": "8"}, "is none of them"),
    ],
)
def test_what_is_unclear_is_refused(text, environment, message):
    with pytest.raises(InputError, match=message) as error:
        which_shard(text, environment)
    assert error.value.hint
