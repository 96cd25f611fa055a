"""Feed damaged and hostile files to every reader in ddpmx: each is read, or refused with a DdpmxError.

    python tests/mutations/run.py --count 2000 --seed 0 [--only KIND] [--without-torch]
    python tests/mutations/run.py --seed 0 --number 1234     only this one; its files are kept

The readers run in a worker process, because a crashed test cannot report: a mutant fails if it kills the worker, raises
another exception than DdpmxError, takes too long, takes too much memory, requests more memory than there is (even if the
MemoryError is then turned into a DdpmxError), or is refused with a text that is empty or too long.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import importlib.util
import io
import itertools
import json
import os
import re
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutations.mutants import KINDS, Mutant, good, mutant

HEADROOM = 3 << 29
"""Address space that a reader may ask for beyond what the process has: 1.5 GiB."""

MAX_TEXT = 2000
PLANTED_AT = 3
"""The mutant at which a planted fault goes off."""


# --- the readers -----------------------------------------------------------------------------------------------------


def _readers(kind: str, torch_too: bool) -> dict[str, Callable[[Path], object]]:
    """The readers of a file of this kind in ddpmx, by name."""
    from ddpmx.formats import mnn_file, model_file, onnx_file, plan_file
    from ddpmx.formats.spec import ModelSpec
    from ddpmx.formats.widen import holds_half, read_widened, widen
    from ddpmx.parity.reference import Reference
    from ddpmx_cli.info import info

    def printed(as_json: bool) -> Callable[[Path], object]:
        """:func:`ddpmx.formats.describe.describe`, and that its result can be printed."""

        def read(path: Path) -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                info(path, as_json)

        return read

    def contract(path: Path) -> None:
        graph = onnx_file.read_onnx(path)
        onnx_file.onnx_spec(path, graph)

    def external(path: Path) -> None:
        onnx_file.check_external(path, onnx_file.read_onnx(path))

    def widened(path: Path) -> None:
        """A file that nothing else refuses; what is made of it has no half any more."""
        info = onnx_file.read_onnx(path)
        wide = read_widened(path, info)
        assert (wide is not None) == holds_half(path)
        assert wide is None or widen(memoryview(wide), {}) is None

    def spec(path: Path) -> None:
        if path.suffix == ".json":
            model_file.read_spec(path)
        else:
            ModelSpec.from_text(path.read_bytes().decode("utf-8", errors="surrogateescape")).to_text()

    def images(path: Path) -> None:
        from ddpm_export.training.data import load_dataset

        load_dataset(path).fingerprint()

    def images_on_disk(path: Path) -> None:
        import numpy as np

        from ddpm_export.training.data import load_dataset

        dataset = load_dataset(path, memory_limit=0)
        dataset.take(np.arange(len(dataset)))

    def record(path: Path) -> None:
        reference = Reference.load(path)
        reference.table()
        assert reference.scale >= 0

    def network(path: Path) -> None:
        from ddpm_export.training.checkpoint import load_network

        load_network(path)

    def training(path: Path) -> None:
        from ddpm_export.training.checkpoint import load_training
        from ddpm_export.training.data import Source

        Source.from_json(load_training(path).settings.get("data"), str(path))

    def decoded(path: Path) -> None:
        from ddpmx.formats.compressed import read_compressed
        from ddpmx.pipeline import Pipeline
        from ddpmx.tasks.codec import decompress
        from mutations.mutants import COMPRESSED_BY, SPEC, Silent

        with Pipeline(SPEC, Silent()) as pipeline:
            decompress(pipeline, read_compressed(path), model=COMPRESSED_BY)

    describing = {"identify": model_file.identify, "describe": printed(True), "info": printed(False)}
    checkpoint = describing | ({"load_network": network, "load_training": training} if torch_too else {})
    return {
        "onnx": {"read_onnx, onnx_spec": contract, "check_external": external, "read_widened": widened, **describing},
        "plan": {"plan_flavour": plan_file.plan_flavour, "read_plan": plan_file.read_plan, **describing},
        "plan+sidecar": {"read_plan": plan_file.read_plan, **describing},
        "mnn": {"read_mnn": mnn_file.read_mnn, **describing},
        "spec": {"spec": spec},
        "images": {"load_dataset": images, "load_dataset, on disk": images_on_disk},
        "parity": {"Reference.load": record},
        "safetensors": checkpoint,
        "checkpoint": checkpoint,
        "compressed": {"decompress": decoded, "describe": printed(True), "info": printed(False)},
    }[kind]


def _plants() -> dict[str, Callable[[Path], object]]:
    """Faults that the harness has to detect."""
    from ddpmx.errors import DdpmxError

    def wrong(path: Path) -> None:
        raise ValueError("planted")

    def allocate(path: Path) -> None:
        bytearray(3 << 30)

    def swallow(path: Path) -> None:
        try:
            bytearray(3 << 30)
        except MemoryError as error:
            raise DdpmxError("refused, but only because there was no more") from error

    def grow(path: Path) -> None:
        bytearray(b"x") * (200 << 20)

    def loop(path: Path) -> None:
        end = time.process_time() + 20
        while time.process_time() < end:
            pass

    def sleep(path: Path) -> None:
        time.sleep(600)

    def segfault(path: Path) -> None:
        ctypes.string_at(0)

    def leave(path: Path) -> None:
        os._exit(0)

    def silent(path: Path) -> None:
        raise DdpmxError("")

    class VerboseError(DdpmxError):
        def __str__(self) -> str:
            return "x" * 3000

    def verbose(path: Path) -> None:
        raise VerboseError("x")

    faults = (wrong, allocate, swallow, grow, loop, sleep, segfault, leave, silent, verbose)
    return {fault.__name__: fault for fault in faults}


# --- the worker ------------------------------------------------------------------------------------------------------


def _case(number: int, args: argparse.Namespace) -> Mutant:
    """A mutant; below 0 a good file."""
    torch_too = not args.without_torch
    return good(torch_too=torch_too)[-1 - number] if number < 0 else mutant(args.seed, number, torch_too=torch_too)


def _put(folder: Path, case: Mutant) -> Path:
    """Write a case's files. They are new files, since an earlier reader may still have the old ones mapped."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in case.files.items():
        (folder / name).write_bytes(data)
    return folder / case.entry


def _work(args: argparse.Namespace) -> None:
    """Read the mutants, and report line by line on the original standard output."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # all other output goes to standard error
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    readers = {kind: _readers(kind, not args.without_torch) for kind in KINDS}
    planted = _plants()[args.plant] if args.plant else None
    if not args.without_torch:
        import ddpm_export.training.checkpoint
    import ddpm_export.training.data  # noqa: F401 - imports must not count as a mutant's time or memory

    for number in _numbers(args):
        case = _case(number, args)
        path = _put(args.folder / "m", case)
        chosen = readers[case.kind] | ({"planted": planted} if planted and number == PLANTED_AT else {})
        print(json.dumps({"start": number, "kind": case.kind, "cpu": time.process_time()}), file=results)
        print(json.dumps(_read(path, chosen, args)), file=results)


def _read(path: Path, readers: dict[str, Callable[[Path], object]], args: argparse.Namespace) -> dict[str, Any]:
    from ddpmx.errors import DdpmxError

    at_first, limits = _memory(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (at_first["VmSize"] + HEADROOM, limits[1]))
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    refused, faults, begin = [], [], time.process_time()
    for name, reader in readers.items():
        reason = None
        try:
            reader(path)
        except DdpmxError as error:
            refused.append(_site(error))
            reason = _unfit(error)
            fault: BaseException | None = error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            fault = error
        if reason is not None:
            assert fault is not None
            faults.append({"reader": name, "reason": reason, "site": _site(fault), "traceback": _lines(fault)})
    took = time.process_time() - begin
    growth = _memory()["VmHWM"] - at_first["VmRSS"]
    resource.setrlimit(resource.RLIMIT_AS, limits)
    if took > args.seconds:
        reason = f"it takes {took:.1f} s of processor time"
        faults.append({"reader": " and ".join(readers), "reason": reason, "site": "too slow", "traceback": ""})
    if growth > args.memory << 20:
        reason = f"it takes {growth >> 20} MiB"
        faults.append({"reader": " or ".join(readers), "reason": reason, "site": "too large", "traceback": ""})
    return {"refused": refused, "faults": faults, "seconds": took, "memory": growth}


def _memory() -> dict[str, int]:
    """This process' sizes in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm"))
    return {name.rstrip(":"): int(size) << 10 for name, size, _ in lines}


def _lines(error: BaseException) -> str:
    """Its traceback, with shortened lines."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(line[:200] for line in lines[-40:])


def _unfit(error: BaseException) -> str | None:
    """What is wrong with the text of a refusal, or None."""
    text = str(error)
    if not text.strip():
        return "refused with an empty text"
    if len(text) > MAX_TEXT:
        return f"refused in {len(text)} characters: {text[:100]}"
    if "Traceback" in text:
        return "refused with a traceback"
    before: BaseException | None = error
    while before is not None:
        if isinstance(before, MemoryError):
            return f"refused only after it requested too much memory: {before}"
        before = before.__cause__ or before.__context__
    return None


def _site(error: BaseException) -> str:
    """Where an exception was raised; if ddpmx caught others before, where the first one was."""
    while (error.__cause__ or error.__context__) is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "ddpm" in frame.filename.rpartition("/tests/")[2]] or list(frames)
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else type(error).__name__


# --- the parent ------------------------------------------------------------------------------------------------------


def _numbers(args: argparse.Namespace) -> Iterator[int]:
    """Which cases, in order: the good files and then ``count`` mutants, from ``skip`` on."""
    if args.number is not None:
        cases: Iterator[int] = iter([args.number])
    else:
        every = (n for n in itertools.count() if args.only is None or KINDS[n % len(KINDS)] == args.only)
        goods = range(len(good(torch_too=False)))
        cases = itertools.chain((-1 - n for n in goods), itertools.islice(every, args.count))
    return itertools.islice(cases, args.skip, None)


@dataclass
class _Row:
    mutants: int = 0
    read: int = 0
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0
    memory: int = 0
    sites: Counter[str] = field(default_factory=Counter)


@dataclass
class _Finding:
    number: int
    kind: str
    fault: dict[str, str]
    count: int = 1


class _Worker:
    """The process that runs the readers; it is killed when it does not respond."""

    def __init__(self, args: argparse.Namespace, skip: int, folder: Path) -> None:
        self.args = args
        self.errors = (folder / "stderr").open("w+")
        command = [sys.executable, __file__, *args.argv, "--worker", "--skip", str(skip), "--folder", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.errors, env=environment)
        assert self.process.stdout is not None
        self.pipe = self.process.stdout
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.pipe, selectors.EVENT_READ)
        self.rest = b""

    def next_result(self, begun_cpu: float | None) -> dict[str, Any] | str | None:
        """The next result; or the reason why there is none; or None at the regular end."""
        begun = time.monotonic()
        while b"\n" not in self.rest:
            if not self.selector.select(0.25):
                reason = self._overdue(begun_cpu, time.monotonic() - begun)
                if reason is not None:
                    self.process.send_signal(signal.SIGUSR1)  # it prints its stack
                    time.sleep(0.3)
                    self.process.kill()
                    self.process.wait()
                    return reason
                continue
            chunk = os.read(self.pipe.fileno(), 1 << 16)
            if not chunk:
                code = self.process.wait()
                if code == 0 and begun_cpu is None:
                    return None
                if code < 0:
                    return f"the worker died of {signal.Signals(-code).name}"
                return f"the worker ended with exit code {code}"
            self.rest += chunk
        line, _, self.rest = self.rest.partition(b"\n")
        result: dict[str, Any] = json.loads(line)
        return result

    def _overdue(self, begun_cpu: float | None, wall: float) -> str | None:
        if begun_cpu is None:
            return "the worker does not make a mutant" if wall > 120 else None
        with contextlib.suppress(OSError):
            times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            cpu = sum(map(int, times)) / os.sysconf("SC_CLK_TCK") - begun_cpu
            if cpu > self.args.seconds + 1:  # shortly above the limit, the worker reports it better itself
                return f"it takes more than {cpu:.1f} s of processor time"
        if wall > self.args.seconds * 12:
            return f"it does not end in {wall:.0f} s"
        return None

    def stderr(self) -> str:
        """The end of its standard error."""
        self.errors.flush()
        return Path(self.errors.name).read_text(errors="replace")[-3000:]

    def close(self) -> None:
        """Kill it, and release its resources."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.selector.close()
        self.pipe.close()
        self.errors.close()


def _run(args: argparse.Namespace, folder: Path) -> tuple[dict[str, _Row], dict[tuple[str, str], _Finding]]:
    rows: dict[str, _Row] = {kind: _Row() for kind in KINDS}
    findings: dict[tuple[str, str], _Finding] = {}

    def note(number: int, kind: str, fault: dict[str, str]) -> None:
        key = (fault["site"], re.sub(r"\d+", "N", fault["reason"])[:24])
        if key in findings:
            findings[key].count += 1
        else:
            findings[key] = _Finding(number, kind, fault)
            print(f"FAIL mutant {number} ({kind}): {fault['reader']}: {fault['reason']}", flush=True)

    done, crashes = 0, 0
    while crashes < args.crashes:
        worker = _Worker(args, done, folder)
        try:
            number, kind = -999, "start"
            while isinstance(start := worker.next_result(None), dict):
                number, kind = start["start"], start["kind"]
                row = rows[kind]
                result = worker.next_result(start["cpu"])
                done += 1
                row.mutants += number >= 0
                if not isinstance(result, dict):
                    row.failed += 1
                    start = result or "the worker ended"
                    break
                row.seconds, row.memory = max(row.seconds, result["seconds"]), max(row.memory, result["memory"])
                if number < 0 and result["refused"] and not result["faults"]:
                    reason = f"a good file is refused at {result['refused'][0]}"
                    result["faults"] = [{"reader": "-", "reason": reason, "site": "good", "traceback": ""}]
                row.sites.update(result["refused"])
                if result["faults"]:
                    row.failed += 1
                elif number >= 0:
                    row.refused += bool(result["refused"])
                    row.read += not result["refused"]
                for fault in result["faults"]:
                    note(number, kind, fault)
            if start is None:
                return rows, findings
            crashes += 1
            words = worker.stderr()
            at = next((line for line in words.splitlines() if "ddpm" in line and "File" in line), words[-60:])
            note(number, kind, {"reader": "-", "reason": start, "site": at.strip(), "traceback": words})
            if number == -999:  # it does not start
                return rows, findings
        finally:
            worker.close()
    print(f"stopped after {crashes} crashes")
    return rows, findings


def _report(rows: dict[str, _Row], findings: dict[tuple[str, str], _Finding], args: argparse.Namespace) -> None:
    for finding in findings.values():
        print(f"\n--- mutant {finding.number} ({finding.kind}), and {finding.count - 1} more like it")
        print(f"{finding.fault['reader']}: {finding.fault['reason']}\n{finding.fault['traceback']}".rstrip())
        print(f"again: python tests/mutations/run.py {args.again} --number {finding.number}")
    print(f"\n{'kind':<14}{'mutants':>9}{'read':>8}{'refused':>9}{'places':>8}{'failed':>8}{'slowest':>12}{'peak':>10}")
    for kind, row in rows.items():
        if row.mutants:
            counts = f"{row.mutants:>9}{row.read:>8}{row.refused:>9}{len(row.sites):>8}{row.failed:>8}"
            print(f"{kind:<14}{counts}{row.seconds * 1e3:>9.0f} ms{row.memory / 2**20:>6.0f} MiB")
    if args.sites:
        for kind, row in rows.items():
            print(kind, *(f"{count}×{site}" for site, count in row.sites.most_common()), sep="\n  ")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="only mutants of this kind")
    parser.add_argument("--number", type=int, help="only this mutant, whose files are kept")
    parser.add_argument("--without-torch", action="store_true", help="leave out the readers that need torch")
    parser.add_argument("--seconds", type=float, default=5.0, help="processor time that one mutant may take")
    parser.add_argument("--memory", type=int, default=512, help="MiB that one mutant may take")
    parser.add_argument("--crashes", type=int, default=10, help="stop after so many")
    parser.add_argument("--sites", action="store_true", help="print where mutants were refused, and how often")
    for hidden, kind in (("--plant", str), ("--skip", int), ("--folder", Path)):
        parser.add_argument(hidden, type=kind, default=0 if kind is int else None, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.without_torch and any(importlib.util.find_spec(name) is None for name in ("torch", "safetensors")):
        parser.error("torch or safetensors is not installed: --without-torch leaves out the readers that need them")
    args.argv = argv
    args.again = f"--seed {args.seed}" + (" --without-torch" if args.without_torch else "")
    return args


def main(argv: list[str]) -> int:
    """0 if every mutant was read or refused, 1 if one failed."""
    args = _arguments(argv)
    if args.worker:
        _work(args)
        return 0
    if args.number is not None:
        kept = Path(tempfile.gettempdir()) / f"ddpmx-mutant-{args.seed}-{args.number}"
        print(f"its files: {_put(kept, _case(args.number, args))}")
    with tempfile.TemporaryDirectory(prefix="ddpmx-") as folder:
        rows, findings = _run(args, Path(folder))
    _report(rows, findings, args)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
