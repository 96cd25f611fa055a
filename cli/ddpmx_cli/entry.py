"""The function behind the `ddpmx` script. It handles signals before anything else is imported, be it ever so light."""

import os
from _signal import SIGINT, SIGTERM, signal  # type: ignore[import-not-found]  # signal's enumerations take their time

for _number in (SIGINT, SIGTERM):  # what `signals.end_at_once` does, before that is imported
    signal(_number, lambda number, _: os._exit(128 + number))

import sys  # noqa: E402

from ddpmx_cli import signals  # noqa: E402


def run() -> None:
    """Import the commands, and run one.

    A signal during the imports gives the exit code that it gives later; nothing has been written yet.
    """
    signals.end_at_once()
    from ddpmx_cli import main

    try:
        main.run()
    except KeyboardInterrupt:  # it had ended already
        sys.exit(130)
    finally:
        signals.end()
