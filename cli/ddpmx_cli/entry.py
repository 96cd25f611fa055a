"""What the `ddpmx` script calls. It hears signals before anything of weight is imported."""

from __future__ import annotations

import os
import signal


def run() -> None:
    """Import the commands, and run one.

    Whoever presses Ctrl-C meanwhile gets exit code 130, as later; nothing has been written yet.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    from ddpmx_cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    main.run()
