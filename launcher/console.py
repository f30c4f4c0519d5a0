"""What a command says while it works: on stderr, so that stdout holds results alone."""

import errno
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from launcher.ledger import warn

QUIET_VARIABLE = "AUTORESEARCH_QUIET"  # set where a command says little: prepare.py prints nothing then

Loudness = Literal["quiet", "usual", "verbose"]


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
