#!/bin/sh
# torchrun --max-restarts with one machine, torch 2.13. After a worker has died, torchrun starts all of them again, and one would
# guess that they begin with an empty store, as they did at first. The store lives in torchrun's own process and is the same one,
# without a prefix for the restart: whatever the dead workers had written is still there. With the gloo backend that is where the
# workers' addresses are, so that init_process_group of a restarted worker may read the address of one that is gone and end with
# "Connection refused"; it is a race, which we lost more often than not. torch's source says "We create a new TCPStore for every
# retry so no need to add prefix for each attempt". A prefix of one's own for each restart (PrefixStore with
# TORCHELASTIC_RESTART_COUNT) is the cure. Shown here by a key of the first attempt that the second one reads.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
cat > "$folder/worker.py" <<'PY'
import os, sys
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
store, rank, size = next(rendezvous("env://"))
prefixed = dist.PrefixStore(attempt, store)
if rank == 0:
    print(f"attempt {attempt}: store {store.check(['mark'])}, with a prefix {prefixed.check(['mark'])}", flush=True)
    store.set("mark", attempt)
    prefixed.set("mark", attempt)
    prefixed.set("done", "")
prefixed.wait(["done"], timedelta(seconds=60))
if attempt == "0":
    sys.exit(1)
dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=size)
print(f"attempt {attempt}: the workers met", flush=True)
PY
for options in "" "--standalone"; do
  # shellcheck disable=SC2086
  OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run $options --nproc-per-node 2 --max-restarts 1 \
    "$folder/worker.py" > "$folder/seen" 2> /dev/null
  echo "torch 2.13.0, torchrun ${options:-by default}:"
  cat "$folder/seen"
  grep -qx "attempt 0: store False, with a prefix False" "$folder/seen"
  grep -qx "attempt 1: store True, with a prefix False" "$folder/seen"
  test "$(grep -cx "attempt 1: the workers met" "$folder/seen")" = 2
done
