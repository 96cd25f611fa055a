"""The function behind the `ddpmx` script. It handles signals before anything heavy is imported."""

from __future__ import annotations

import sys

from ddpmx_cli import signals


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
