#!/bin/sh
# torchrun --max-restarts 2 with the gloo backend. When one of three workers is killed, torchrun starts all of them again, and
# one would guess that they find each other as they did at first. They seldom do: the store lives in torchrun's own process, and
# still has the addresses of the workers that are gone, which a new one reads unless the others have replaced them already.
# Then init_process_group("gloo") fails with "Connection refused", or waits until a timeout, and the restarts are used up. It
# is so by default, with --standalone and with --rdzv-backend c10d, each of which wins this race now and then. With a prefix of
# one's own in the store for each restart (PrefixStore with TORCHELASTIC_RESTART_COUNT) the first restart works.
# Takes a minute, and seven at most.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
cat > "$folder/worker.py" <<'PY'
import os, signal, sys

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

restart, ones = os.environ["TORCHELASTIC_RESTART_COUNT"], torch.ones(1)
try:
    if sys.argv[1] == "prefix":
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group("gloo", store=dist.PrefixStore(restart, store), rank=rank, world_size=size)
    else:
        dist.init_process_group("gloo")
    dist.all_reduce(ones)
except RuntimeError as error:
    print(f"restart {restart}: {str(error)[:400]}", flush=True)
    sys.exit(3)
print(f"restart {restart}: sum {ones.item():g}", flush=True)
if restart == "0":
    if os.environ["RANK"] == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # until torchrun ends it, to start all again
PY
cat > "$folder/check.py" <<'PY'
import os, signal, subprocess, sys

import torch

SECONDS = 120  # those that work take a few
command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--max-restarts", "2"]
ways = {
    "by default": ([], "plain"),
    "--standalone": (["--standalone"], "plain"),
    "--rdzv-backend c10d": (["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"], "plain"),
    "by default, PrefixStore": ([], "prefix"),
}
seen = {}
for name, (options, how) in ways.items():
    job = subprocess.Popen(
        [*command, *options, f"{sys.argv[1]}/worker.py", how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        out, _ = job.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGINT)  # it ends its workers
        out, _ = job.communicate()
    said = {number: [line for line in out.splitlines() if line.startswith(f"restart {number}: ")] for number in (0, 1, 2)}
    met = [number for number, lines in said.items() if lines.count(f"restart {number}: sum 3") == 3]
    seen[name] = met, job.returncode == 0
    print(f"torch {torch.__version__}, {name}: ended with {job.returncode}; the workers met in restarts {met}")
    for line in sorted({line for line in (*said[1], *said[2]) if "sum" not in line}):
        print("   ", line)
lost = [name for name, (met, _) in seen.items() if 1 not in met]
sys.exit(not lost or seen["by default, PrefixStore"] != ([0, 1], True) or any(0 not in met for met, _ in seen.values()))
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
