#!/bin/sh
# ray.init replaces the process's own handler of SIGTERM, and does not say so; that of SIGINT stays. A program that drains its work
# on SIGTERM (a service under systemd, a job under Slurm or Kubernetes) no longer does, once it has called a library that uses Ray.
# ray.shutdown does not put the handler back. One would guess that a library that is called leaves a handler that the program set.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
cat > "$folder/check.py" <<'PY'
import signal
import sys

import ray


def mine(*_):
    raise SystemExit(0)


for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, mine)
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
during = [signal.getsignal(number) is mine for number in (signal.SIGTERM, signal.SIGINT)]
ray.shutdown()
after = [signal.getsignal(number) is mine for number in (signal.SIGTERM, signal.SIGINT)]
print("ray", ray.__version__)
print("the program's own handlers of SIGTERM and SIGINT: after ray.init", during, "after ray.shutdown", after)
sys.exit((during, after) != ([False, True], [False, True]))
PY
RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
