"""Processes and signals: end what was started, with everything that it started itself."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from backends.protocol import RUN_ID_VARIABLE

TERM_SECONDS = 5.0  # between the request to end and the kill
LEFTOVER_SECONDS = 3.0  # that compile workers get to end by themselves
PR_SET_CHILD_SUBREAPER = 36  # prctl
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """The launcher was asked to end: Ctrl-C, SIGTERM, or the terminal went away."""


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise Stopped when a signal asks this process to end."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    wanted = [
        number
        for number in STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # nohup stays nohup
    ]
    with _handlers({number: stop for number in wanted}):
        yield


@contextmanager
def ignore_signals() -> Iterator[None]:
    """Let no signal interrupt the clean-up: a second Ctrl-C changes nothing."""
    with _handlers({number: signal.SIG_IGN for number in STOP_SIGNALS}):
        yield


@contextmanager
def defer_signals() -> Iterator[None]:
    """Let a signal wait until the block is over: what is begun there is not left half done."""
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    with _handlers({number: remember for number in wanted}):
        yield
    if came:
        signal.raise_signal(came[0])


@contextmanager
def _handlers(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_group(child: subprocess.Popen[Any], ask: bool = True) -> None:
    """Ask the child's process group to end, then kill what is left of it. Without `ask`, kill it at once."""
    for number in (signal.SIGTERM, signal.SIGKILL) if ask else (signal.SIGKILL,):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        try:
            child.wait(timeout=TERM_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        if not group_alive(child.pid):
            return


def remove_tree(path: Path) -> None:
    """Remove a file or folder with all that it holds, whatever permissions were set on it."""
    if not path.is_symlink() and path.is_dir():
        for folder, names, _ in os.walk(path):
            for name in (".", *names):
                with suppress(OSError):
                    os.chmod(os.path.join(folder, name), 0o700, follow_symlinks=name == ".")
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def group_alive(group: int) -> bool:
    """Return whether a process group has a member that is no zombie."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return any(alive(process) and group_of(process) == group for process in psutil.process_iter())


def group_of(process: psutil.Process) -> int | None:
    """Return the process's group, None when it is gone or not ours to ask."""
    try:
        return os.getpgid(process.pid)
    except OSError:
        return None


def alive(process: psutil.Process) -> bool:
    """Return whether the process runs: a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def scoring_id(run_id: str, name: str) -> str:
    """Return the run id that a process carries which scores the run: `name` is first or second."""
    return f"{run_id}.{name}"


def adopt_orphans() -> None:
    """Have this process adopt what its descendants leave behind, where the system can: Linux."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_orphans(known: Iterable[int]) -> list[str]:
    """Kill what boxed processes left behind, and this one adopted. `known`: pids that it started itself.

    A process in a box has one filter of system calls more than this one, and cannot remove it. Returns a
    description of each.
    """
    mine = filters_of(os.getpid())
    described = []
    for child in psutil.Process().children():
        if child.pid in known or filters_of(child.pid) <= mine or not alive(child):
            continue
        for process in [child, *descendants_of(child)]:
            described.append(describe(process))
            with suppress(psutil.Error):
                process.kill()
        with suppress(psutil.Error):
            child.wait(timeout=LEFTOVER_SECONDS)
    return described


def descendants_of(process: psutil.Process) -> list[psutil.Process]:
    """Return all that a process started and that lives; [] when it is gone."""
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def filters_of(pid: int) -> int:
    """Return how many filters of system calls a process has, 0 where that is not told."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^Seccomp_filters:\s*(\d+)$", status, re.M)
    return int(found[1]) if found else 0


def describe(process: psutil.Process) -> str:
    """Return a process's id and the beginning of its command."""
    try:
        command = " ".join(process.cmdline()[:3])[:60]
    except psutil.Error:
        command = "gone"
    return f"{process.pid} ({command})"


def processes_of(run_id: str) -> list[psutil.Process]:
    """Return the processes that carry the run's id in their environment, however they were started."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and process.environ().get(RUN_ID_VARIABLE) == run_id
        except (psutil.Error, OSError):
            continue
        if ours and alive(process):
            found.append(process)
    return found


def end_leftovers(run_id: str) -> list[str]:
    """Kill whatever of the run escaped its process group. Returns a description of each."""
    left = processes_of(run_id)
    psutil.wait_procs(left, timeout=LEFTOVER_SECONDS)
    described = []
    for process in processes_of(run_id):
        described.append(describe(process))
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=LEFTOVER_SECONDS)
    return described
