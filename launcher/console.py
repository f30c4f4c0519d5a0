"""What a command says while it works: on stderr, so that stdout holds results alone."""

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from backends.protocol import Event, Log, Start, Stop
from launcher.ledger import single_line, warn

LINE_EVERY = 30.0  # seconds between progress lines when there is no terminal
FOLLOWED_BYTES = 2**14  # of a trainer's output that are shown at a time
QUIET_VARIABLE = "AUTORESEARCH_QUIET"  # set where a command says little: prepare.py prints nothing then

Loudness = Literal["quiet", "usual", "verbose"]


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


# ---------------------------------------------------------------------------
# How much is said
# ---------------------------------------------------------------------------

_loudness: Loudness = "usual"
_said: set[str] | None = None  # what say_once said in its block; None: there is no block


def set_loudness(loudness: Loudness) -> None:
    """Choose how much this process says: quiet leaves warnings, errors and results."""
    global _loudness
    _loudness = loudness
    if loudness == "quiet":
        os.environ[QUIET_VARIABLE] = "1"
    else:
        os.environ.pop(QUIET_VARIABLE, None)


def is_quiet() -> bool:
    return _loudness == "quiet"


def is_verbose() -> bool:
    return _loudness == "verbose"


def say(message: str) -> None:
    """Print a line on stderr, unless the person asked for quiet."""
    if not is_quiet():
        print(message, file=sys.stderr, flush=True)


@contextmanager
def saying_once() -> Iterator[None]:
    """Let say_once and warn_once say a line once in the block: what holds for many runs in a row."""
    global _said
    before, _said = _said, set()
    try:
        yield
    finally:
        _said = before


def say_once(message: str) -> None:
    """Say a line, unless it was said before in the block of saying_once."""
    if is_new(message):
        say(message)


def warn_once(message: str) -> None:
    """Print a warning, unless it was printed before in the block of saying_once."""
    if is_new(message):
        warn(message)


def is_new(message: str) -> bool:
    """Return whether the block of saying_once did not have the message yet, and note it there."""
    if _said is None:
        return True
    if message in _said:
        return False
    _said.add(message)
    return True


def print_object(data: Mapping[str, Any]) -> None:
    """Print a result on stdout as one JSON object, for a program."""
    print(json.dumps(data, indent=1), flush=True)


def without_controls(text: str) -> str:
    """Return text without what moves a terminal's cursor or colours it; tabs and all letters stay."""
    return re.sub(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]", "\N{REPLACEMENT CHARACTER}", text)


def can_draw(stream: TextIO) -> bool:
    """Return whether a stream is a terminal on which a line can be drawn over."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def wants_colour() -> bool:
    """Return whether colours may be printed where a terminal is: https://no-color.org."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# ---------------------------------------------------------------------------
# The progress of a run
# ---------------------------------------------------------------------------


class Progress:
    """The progress of a run: one live line on a terminal, a line every LINE_EVERY seconds elsewhere.

    Attributes:
        log: what the trainer prints; it is shown where the person asked for more. None: it is not known.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.log: Path | None = None
        self.text = "starting: imports, compilation, warm-up"
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
