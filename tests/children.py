"""Processes for tests that need several or kill them: forked from a server that has no threads, not from the tests' own.

What ran before in that one leaves pools and locks behind. A fork inherits them without the threads that would release them,
and may wait for ever.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

AVAILABLE = "forkserver" in multiprocessing.get_all_start_methods()
"""Whether this system has such servers."""

ROOT = Path(__file__).parents[1]
_IMPORTED = ("tests.ddpm_export.training.test_distributed", "tests.ddpm_export.training.test_kills", "children_warm")


@functools.cache
def server() -> ForkServerContext:
    """The server's context: its processes have imported torch, and what a training imports on its way."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # Python 3.11 gives it no sys.path
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context
