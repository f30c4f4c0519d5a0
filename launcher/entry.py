"""
Where the command begins. Ctrl-C ends it at once until it is under way: an import cannot be cut off in order.
"""

import atexit
import os
import signal
from types import FrameType

from launcher.exit_codes import EXIT_INTERRUPTED


def leave(number: int, frame: FrameType | None) -> None:
    """End this process at once: the handler of SIGINT while nothing is under way."""
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def ignore_signals() -> None:
    """Let nothing change the exit code of a command that is done: Python's own end takes a moment."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def main() -> None:
    """Call the command line."""
    atexit.register(ignore_signals)  # the first to be registered runs last
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, leave)
    from launcher.cli import main as command

    command()


if __name__ == "__main__":
    main()
