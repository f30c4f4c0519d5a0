"""The progress of a run, while it runs: one live line on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from backends.protocol import Event, Log, Start, Stop
from launcher.console import can_draw, is_quiet, is_verbose, say
from launcher.ledger import single_line

STARTING = "starting: imports, compilation, warm-up"
LINE_EVERY = 30.0  # seconds between progress lines when there is no terminal
FOLLOWED_BYTES = 2**14  # of a trainer's output that are shown at a time


class Scored(NamedTuple):
    """Rows that are scored so far, and rows in all."""

    done: int
    rows: int


OnEvent = Callable[[Event | Scored | None], None]  # takes all of a run, and None about once a second


class Progress:
    """The progress of a run: one live line on a terminal, a line every LINE_EVERY seconds elsewhere.

    Attributes:
        log: what the trainer prints; it is shown where the person asked for more. None: it is not known.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.log: Path | None = None
        self.text = STARTING
        self._shown = 0  # bytes of the log
        self._live = can_draw(sys.stderr) and not is_quiet()
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
        if is_verbose() and (event is None or isinstance(event, Stop)):
            self.follow_log()
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

    def follow_log(self) -> None:
        """Print what the trainer printed since the last call."""
        if self.log is None or not self.log.is_file():
            return
        with open(self.log, "rb") as f:
            f.seek(self._shown)
            data = f.read(FOLLOWED_BYTES)
        whole = data.rfind(b"\n") + 1 or (len(data) if len(data) == FOLLOWED_BYTES else 0)
        self._shown += whole
        if whole and self._live:
            print("\r\x1b[K", end="", file=sys.stderr)
        for line in data[:whole].decode(errors="replace").splitlines():
            say(f"  {single_line(line)}")

    def close(self) -> None:
        """Remove the live line."""
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
