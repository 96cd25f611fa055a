"""The function behind the `ddpmx` script. It handles signals before anything heavy is imported."""

from __future__ import annotations

import os
import signal


def run() -> None:
    """Import the commands, and run one.

    Ctrl-C during the imports gives exit code 130, as it does later; nothing has been written yet.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    from ddpmx_cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    main.run()
