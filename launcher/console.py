"""What a command says while it works: on stderr, so that stdout holds results alone."""

import errno
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from backends.protocol import Event, Log, Start, Stop

STARTING = "starting: imports, compilation, warm-up"
LINE_EVERY = 30.0  # seconds between progress lines when there is no terminal


class Scored(NamedTuple):
    """Rows that are scored so far, and rows in all."""

    done: int
    rows: int


OnEvent = Callable[[Event | Scored | None], None]  # takes all of a run, and None about once a second


# What to do about an error of the system, by its number.
REMEDIES = {
    errno.ENOSPC: "free some disk",
    errno.EDQUOT: "free some disk",
    errno.EROFS: "set AUTORESEARCH_HOME to a folder that can be written",
    errno.EACCES: "give yourself the right to it, or set AUTORESEARCH_HOME to a folder of your own",
    errno.ENOTDIR: "a file is where a folder belongs: move it away, or set AUTORESEARCH_HOME",
    errno.EISDIR: "a folder is where a file belongs: move it away",
}


def describe_os_error(error: OSError) -> str:
    """Return a line about what the system refused, and what to do."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    remedy = REMEDIES.get(error.errno or 0, "")
    return f"{what}: {remedy}" if remedy else what


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Progress:
    """The progress of a run: one live line on a terminal, a line every LINE_EVERY seconds elsewhere."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.text = STARTING
        self._live = sys.stderr.isatty()
        self._began = time.monotonic()
        self._last_line = self._began

    def __call__(self, event: Event | Scored | None) -> None:
        """Show what an event of the run says; None: show that time passes."""
        if isinstance(event, Start):
            self.text = (
                f"training on {event.device} ({event.platform}), track {event.track}, seed {event.seed}"
            )
            self.show(always=True)
        elif isinstance(event, Log):
            left = max(0.0, self.budget - event.elapsed)
            self.text = (
                f"step {event.step} | loss {event.smooth:.4f} | {event.tokens_per_s:,.0f} tok/s | "
                f"mfu {event.mfu:.1f}% | {left:.0f} s left"
            )
        elif isinstance(event, Stop):
            self.text = "scoring"
        elif isinstance(event, Scored):
            self.text = f"scoring {event.done}/{event.rows} rows"
        if event is None or isinstance(event, Log | Scored):
            self.show()

    def show(self, always: bool = False) -> None:
        """Print the line when it is due."""
        now = time.monotonic()
        age = now - self._began
        if self._live:
            print(f"\r{self.text} [{age:.0f} s]\x1b[K", end="", file=sys.stderr, flush=True)
        elif always or now - self._last_line >= LINE_EVERY:
            self._last_line = now
            say(f"{age:4.0f} s  {self.text}")

    def close(self) -> None:
        """Remove the live line."""
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
