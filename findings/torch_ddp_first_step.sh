#!/bin/sh
# DistributedDataParallel with its defaults, torch 2.13, gloo, three processes. One would guess that a training that is stopped after a
# step and goes on from its weights and optimiser state is the same as one that was left alone: the sums over processes are of the
# same numbers. DDP packs the gradients into buckets in the order of the parameters for the first step and then, once it has seen in
# which order they become ready, packs them anew. Where a number lies in a bucket decides in which order gloo's ring adds it up over
# the processes, so that each process's *first* step has other last bits than the same step made later; and a resumed run has a
# first step of its own. With find_unused_parameters=True there is no such packing, and the two are the same, bit for bit.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
cat > "$folder/train.py" <<'PY'
import os, sys

import torch
import torch.distributed as dist
from torch import nn

path, begin, end, unused = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "unused"
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # without momentum, its only state is the weights
if begin:
    model.load_state_dict(torch.load(path, weights_only=True))
parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
for step in range(begin, end):
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    x, y = (torch.randn(5, n, generator=generator) for n in (7, 3))
    optimizer.zero_grad()
    (parallel(x) - y).square().mean().backward()
    optimizer.step()
dist.barrier()
if dist.get_rank() == 0:
    torch.save(model.state_dict(), path)
dist.destroy_process_group()
PY
cat > "$folder/compare.py" <<'PY'
import sys

import torch

a, b = (torch.load(path, weights_only=True) for path in sys.argv[1:])
apart = sum(int((a[name] != b[name]).sum()) for name in a)
largest = max(float((a[name] - b[name]).abs().max()) for name in a)
print(f"{apart} of {sum(value.numel() for value in a.values())} weights differ, by at most {largest:.1e}")
PY
train() {
  OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 3 "$folder/train.py" "$@" 2> /dev/null
}
for how in default unused; do
  train "$folder/$how-whole" 0 4 "$how"
  train "$folder/$how-again" 0 4 "$how"
  train "$folder/$how-resumed" 0 2 "$how"
  train "$folder/$how-resumed" 2 4 "$how"
  echo "torch 2.13.0, DDP, find_unused_parameters=$(test $how = unused && echo True || echo False):"
  for other in again resumed; do
    "$folder/venv/bin/python" "$folder/compare.py" "$folder/$how-whole" "$folder/$how-$other" > "$folder/$how-$other.seen"
    echo "  whole against $other: $(cat "$folder/$how-$other.seen")"
  done
done
grep -q "^0 of " "$folder/default-again.seen"
grep -q "^0 of " "$folder/unused-again.seen"
grep -q "^0 of " "$folder/unused-resumed.seen"
! grep -q "^0 of " "$folder/default-resumed.seen"
