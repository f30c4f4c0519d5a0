"""Processes and signals: end what was started, with everything that it started itself."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil

from backends.protocol import RUN_ID_VARIABLE

TERM_SECONDS = 5.0  # between the request to end and the kill
LEFTOVER_SECONDS = 3.0  # that compile workers get to end by themselves
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


def end_group(child: subprocess.Popen[Any]) -> None:
    """Ask the child's process group to end, then kill what is left of it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        try:
            child.wait(timeout=TERM_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        if not group_alive(child.pid):
            return


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
        try:
            command = " ".join(process.cmdline()[:3])[:60]
            described.append(f"{process.pid} ({command})")
            process.kill()
        except psutil.Error:
            pass
    psutil.wait_procs(left, timeout=LEFTOVER_SECONDS)
    return described
