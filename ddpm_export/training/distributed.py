"""One training in many processes, as ``torchrun`` starts them: each takes its share of every batch.

    torchrun --nproc-per-node 4 -m ddpmx_cli.main train --data photos/ --out runs/photos

Images, t and noise of a step belong to a position in the whole batch, so that N processes with B/N images each make the
step that one process makes with B (dropout aside: every process has its own). Weights, averages and moments are equal in
all of them, and the first one writes.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from ddpmx.errors import BackendError, InputError


@dataclass(frozen=True)
class Processes:
    """The processes of a training.

    Attributes:
        rank: the number of this one, 0…size−1.
        size: how many there are.
        local_rank: its number on this machine, which is that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """The positions of a batch that are this process's.

        Raises:
            InputError: the batch cannot be divided evenly.
        """
        if batch % self.size:
            raise InputError(
                f"a batch of {batch} cannot be divided among {self.size} processes", hint="--batch divisible by it"
            )
        each = batch // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            with _translated():
                dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The values [n] of all processes, in the order of the batch: [size·n]."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        with _translated():
            dist.all_gather(parts, values)
        return torch.cat(parts)

    def talking(self) -> AbstractContextManager[None]:
        """For a block in which torch lets the processes talk to each other: its errors become ours."""
        return contextlib.nullcontext() if self.size == 1 else _translated()

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            with _translated():
                dist.barrier()


ALONE = Processes()

WAIT = timedelta(minutes=30)
"""How long one waits for the others, whose images may take longer to read, or whose disk is full."""

_kept: list[object] = []
"""The last process group. Where DDP is the last to hold one, torch waits for its threads and keeps the interpreter's lock,
for which they may be waiting: the process would never end. A Python object that holds it is freed without the lock."""


@atexit.register
def _let_go() -> None:
    """Free it while there still is an interpreter, without which torch aborts the process."""
    gc.collect()  # DDP first
    _kept.clear()


_LOST = re.compile(r"gloo|nccl|peer|socket|connection|process group", re.IGNORECASE)
"""Words in what torch raises where processes cannot talk to each other."""


def restarts() -> int:
    """How often torchrun has started these processes again, after one of them had ended."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[tuple[Processes, str | None]]:
    """The processes that torchrun started, and this one's device; :data:`ALONE` where it did not.

    Args:
        device: as the user named it: "cpu", or None for a GPU if there is one.

    Raises:
        InputError: a GPU is named by its number, there are more processes than GPUs, or torch cannot use this one's.
        BackendError: the processes do not find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if size == 1 or "RANK" not in os.environ:
        yield ALONE, device
        return
    processes = Processes(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    gpus = torch.cuda.device_count()
    if device is None:
        device = "cuda" if gpus else "cpu"
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device {device!r}: each process has a GPU of its own", hint="--device cuda, or cpu")
    if device == "cuda":
        if processes.local_rank >= gpus:
            raise InputError(
                f"there is no GPU for process {processes.local_rank} of this machine",
                note=f"it has {gpus}",
                hint=f"at most {gpus} processes on it" if gpus else "--device cpu",
            )
        device = f"cuda:{processes.local_rank}"
        try:
            torch.cuda.set_device(device)
        except (RuntimeError, AssertionError) as error:  # GPUs are counted without the runtime, which may not start
            raise InputError(f"--device {device!r} cannot be used", note=str(error).splitlines()[0][:200]) from error
    # with its GPU a process joins at once, and no barrier has to guess which one it is
    own: dict[str, Any] = {"backend": "gloo"}
    if device != "cpu":
        own = {"backend": "nccl", "device_id": torch.device(device)}
    try:
        store, rank, count = next(rendezvous("env://"))
        # after a restart torchrun's store still has the addresses of processes that are gone: findings/torchrun_restart.sh
        store = dist.PrefixStore(f"ddpmx-{restarts()}", store)  # type: ignore[attr-defined]
        dist.init_process_group(store=store, rank=rank, world_size=count, timeout=WAIT, **own)
        _kept[:] = [dist.group.WORLD]
    except (RuntimeError, ValueError) as error:
        raise BackendError("the processes of this training did not find each other", note=str(error)[:200]) from error
    yield processes, device
    with contextlib.suppress(RuntimeError):  # after an error the others may be gone, and this would wait for them
        dist.destroy_process_group()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """What torch says of a process that is gone, as an error of ours.

    Raises:
        BackendError: a process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise BackendError(
            "another process of this training has ended",
            note=str(error).splitlines()[0][:200] if str(error) else None,
            hint="--resume continues from the last checkpoint; torchrun can restart by itself",
        ) from error
