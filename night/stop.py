"""
`autoresearch stop`: the loop of this repository ends after the experiment at hand.

A loop names itself in a file of the git directory. What a killed one leaves there is known by the process: it
is gone, or began at another time, and does not hold the repository. A request names the loop that it is for,
so that it ends no later one.
"""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from backends.protocol import write_json
from launcher.processes import alive
from night import repo
from night.trial import repository_is_held
from prepare import UserError

POLL_SECONDS = 1.0
SAME_START = 2.0  # seconds by which two readings of the start of a process may differ
REASON = "autoresearch stop"  # why such a night ended


class RunningLoop(NamedTuple):
    """A loop as it names itself."""

    pid: int
    began: float  # Unix seconds at which its process was started
    token: str  # that no other loop has


def loop_path() -> Path:
    """Return the file in which a loop names itself."""
    return repo.git_path("autoresearch-running.json")


def request_path() -> Path:
    """Return the file that asks a loop to end."""
    return repo.git_path("autoresearch-stop.json")


@contextmanager
def announced() -> Iterator[Callable[[], bool]]:
    """Name this process as the loop of the repository, which it holds.

    Yields:
        A function that says whether this loop was asked to stop.
    """
    me = RunningLoop(os.getpid(), psutil.Process().create_time(), secrets.token_hex(8))
    request_path().unlink(missing_ok=True)
    write_json(loop_path(), me._asdict())
    path = request_path()  # the function is called often, and git takes its time
    try:
        yield lambda: read_token(path) == me.token
    finally:
        with suppress(OSError):
            loop_path().unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def read_token(path: Path) -> str:
    """Return the token of a request, "" when there is none."""
    try:
        return str(json.loads(path.read_text())["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def running_loop() -> RunningLoop | None:
    """Return the loop that works in this repository now, None when none does."""
    try:
        data = json.loads(loop_path().read_text())
        loop = RunningLoop(int(data["pid"]), float(data["began"]), str(data["token"]))
        process = psutil.Process(loop.pid)
        is_it = alive(process) and abs(process.create_time() - loop.began) < SAME_START
    except (OSError, ValueError, KeyError, TypeError, OverflowError, psutil.Error):
        return None
    return loop if is_it and repository_is_held() else None


def ask_to_stop() -> RunningLoop:
    """Ask the loop of this repository to end after the experiment at hand, and return it.

    Raises:
        UserError: there is none, or its agent asks.
    """
    loop = running_loop()
    if loop is None:
        raise UserError("no loop runs in this repository")
    if loop.pid in {process.pid for process in psutil.Process().parents()}:
        raise UserError("the agent of a loop may not stop it: say what you did, and end")
    write_json(request_path(), {"token": loop.token})
    return loop


def wait_for_end(loop: RunningLoop) -> None:
    """Wait until a loop is over."""
    while running_loop() == loop:
        time.sleep(POLL_SECONDS)


def rest(seconds: float, is_over: Callable[[], bool]) -> None:
    """Sleep, but no longer when `is_over` says so."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and not is_over():
        time.sleep(min(left, POLL_SECONDS))
