"""
The guard: it starts one command, and nothing that the command starts outlives it.

    python -I -S guard.py CONTROL COMMAND ...

It stands between the launcher and each of its children: launcher -> guard -> box -> command. CONTROL is the
file descriptor of its end of a socket, and the launcher has the other end. What the guard reads there:

    end of file    the launcher is gone, or wants the end: everything is killed now
    ASK            SIGTERM goes to the command's process group; what is left after TERM_SECONDS is killed

What it writes there: a byte when the command was started (0, or the number of the error), and GONE when no
process is left. When the command ends, what it left running has LEFTOVER_SECONDS to end too. Then the guard
ends with the command's exit status, or by the signal that killed it.

On Linux the guard is a subreaper: a process whose parent ended becomes its child, whatever its session, group
or environment is. Only what a service of the system starts for the command is not found. macOS has no
subreaper: there `ps` shows what descends from the command, or is in a process group that was seen before. A
daemon in a session of its own is not found.

A guard that is killed (kill -9) cannot kill. On Linux the command then dies of its parent-death signal. What
it started lives on, and the launcher knows: GONE is missing.

This file is run by itself: it imports the standard library alone, and of that only what loads fast.
"""

import ctypes
import math
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

ASK = b"t"
STARTED = b"\0"
GONE = b"g"
TERM_SECONDS = 5.0  # between the request to end and the kill
LEFTOVER_SECONDS = 3.0  # that compile workers get to end by themselves
STOP_SECONDS = 10.0  # after which the kill does not wait any more until everything is stopped
KILL_SECONDS = 10.0  # after which a process is given up that does not die: it waits in the kernel
REAPED_AT_ONCE = 10_000  # processes; where they end faster than they are reaped, the launcher is heard too
LOOK_SECONDS = 0.05  # between two looks at what is left
KILLED_SECONDS = 0.01  # between two looks at what was killed
LINUX = sys.platform.startswith("linux")

PR_SET_PDEATHSIG = 1  # prctl
PR_SET_CHILD_SUBREAPER = 36
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOT_DEFAULT = (*IGNORED, signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores the last two


# ---------------------------------------------------------------------------
# The start
# ---------------------------------------------------------------------------


def start(command: list[str]) -> tuple[int, int]:
    """Start the command in a session of its own. Returns (its pid, the number of the error; 0: it runs)."""
    libc = ctypes.CDLL(None) if LINUX else None
    if libc:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    reading, writing = os.pipe()  # exec closes both
    guard = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            if libc:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == guard:
                become(command)
        except OSError as error:
            os.write(writing, bytes([error.errno or 0]))
        finally:
            os._exit(127)
    os.close(writing)
    failure = os.read(reading, 1)
    os.close(reading)
    return pid, failure[0] if failure else 0


def become(command: list[str]) -> None:
    """Turn this process into the command. Raises OSError when it cannot be started."""
    os.setsid()
    for number in NOT_DEFAULT:
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)


def close_all_but(kept: int) -> None:
    """Close the files that were inherited for the command alone: their readers wait until all are closed."""
    for name in os.listdir("/proc/self/fd" if LINUX else "/dev/fd"):
        descriptor = int(name)
        if descriptor > 2 and descriptor != kept:
            os.closerange(descriptor, descriptor + 1)  # the one of the list itself is closed by now


# ---------------------------------------------------------------------------
# The watch
# ---------------------------------------------------------------------------


class Process(NamedTuple):
    """A process of this system.

    Attributes:
        group: its process group.
        state: its letter in ps: T and t are stopped, Z and X have ended, D waits in the kernel.
    """

    pid: int
    parent: int
    group: int
    state: str

    @property
    def runs(self) -> bool:
        """Whether it can start others now. One in D cannot, and cannot be stopped either."""
        return self.state not in "TtZXD"


class Guard:
    """Watches a command that runs, until nothing of it is left.

    Attributes:
        status: of the command, as waitpid gives it; None while it runs.
    """

    def __init__(self, control: int, command: int) -> None:
        self.status: int | None = None
        self._control = control
        self._command = command  # its pid, and the id of its process group
        self._groups = {command}  # process groups of the command and of what it started
        self._wakeup, writing = os.pipe()
        for end in (self._wakeup, writing):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(self._wakeup, select.POLLIN)
        self._poll.register(control, select.POLLIN)

    def watch(self) -> bool:
        """Wait for the end of the command, or for the launcher's word, and end what is left.

        Returns whether nothing is left.
        """
        deadline = math.inf
        while self._something_is_left():
            now = time.monotonic()
            if self.status is not None:
                deadline = min(deadline, now + LEFTOVER_SECONDS)
            if now >= deadline:
                return self._kill_everything()
            if self._wait(deadline - now):
                deadline = min(deadline, now + self._hear())
        return True

    def _wait(self, seconds: float) -> bool:
        """Wait until a child ends, or for the launcher's word. Returns whether there is one."""
        if not LINUX and self.status is not None:
            seconds = min(seconds, LOOK_SECONDS)  # what is left is not a child: its end is no signal
        timeout = None if seconds == math.inf else math.ceil(1000 * seconds)
        ready = [descriptor for descriptor, _ in self._poll.poll(timeout)]
        if self._wakeup in ready:
            os.read(self._wakeup, 4096)
        return self._control in ready

    def _hear(self) -> float:
        """Read the launcher's word. Returns how many seconds are left until the kill."""
        try:
            word = os.read(self._control, 1)
        except OSError:  # it was killed before it read what this process wrote
            word = b""
        if word != ASK:
            return 0.0
        if self.status is None:
            send(signal.SIGTERM, -self._command)
        return TERM_SECONDS

    def _something_is_left(self) -> bool:
        """Take note of processes that ended. Returns whether there are others."""
        for _ in range(REAPED_AT_ONCE):
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return not LINUX and bool(self._descendants())
            if pid == 0:
                break
            if pid == self._command:
                self.status = status
        return True

    def _kill_everything(self) -> bool:
        """Kill all that descends from this process, until nothing is left. Returns whether nothing is.

        The command goes first. Of what it started all are stopped before one is killed: where many start
        others, each that dies makes room for another.
        """
        self._poll.unregister(self._control)
        began = time.monotonic()
        if not LINUX:
            self._descendants()  # while the command lives, its children lead to their groups
        self._kill_command()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to reap what ends from here on
        while self._something_is_left():
            found = self._descendants()
            seconds = time.monotonic() - began
            if seconds > STOP_SECONDS + KILL_SECONDS:
                return False
            if seconds < STOP_SECONDS and any(process.runs for process in found):
                for process in found:
                    stop(process.pid, process.group)
                self._stop_orphans(began + STOP_SECONDS)
                continue
            for process in found:
                send(signal.SIGKILL, process.pid)
            time.sleep(KILLED_SECONDS)
        return True

    def _kill_command(self) -> None:
        """Kill the command alone, and take note of its end."""
        began = time.monotonic()
        while self.status is None and time.monotonic() < began + KILL_SECONDS:
            send(signal.SIGKILL, self._command)
            pid, status = os.waitpid(self._command, os.WNOHANG)
            if pid:
                self.status = status
            else:
                self._wait(LOOK_SECONDS)

    def _stop_orphans(self, deadline: float) -> None:
        """Stop the children of this process, until no new one comes, or time.monotonic() is at the deadline.

        Some processes live only long enough to start the next one. A look at the whole system comes too late
        for those. But when one ends, its child becomes a child of this process, and these are found quickly.
        """
        known: set[int] = set()
        while self._something_is_left() and time.monotonic() < deadline:
            children = set(own_children())
            if children <= known:
                return
            for pid in children - known:
                stop(pid, group=pid)  # most of those that go on forking lead a session of their own
            known = children

    def _descendants(self) -> list[Process]:
        """Return all that the command started, as far as this system tells."""
        mine = os.getpgrp()
        members: dict[int, list[Process]] = {}  # by parent
        for process in processes():
            parent = process.parent
            if not LINUX and process.group in self._groups:
                parent = os.getpid()  # an orphan there is the child of the first process
            if process.group != mine:
                members.setdefault(parent, []).append(process)
        found = []
        parents = [os.getpid()]
        while parents:
            children = members.pop(parents.pop(), [])
            found += children
            parents += [child.pid for child in children]
        self._groups.update(process.group for process in found)
        return found


def processes() -> Iterator[Process]:
    """Yield every process of this system."""
    if not LINUX:
        import subprocess

        command = ["ps", "-axo", "pid=,ppid=,pgid=,stat="]
        listed = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
        for line in listed.splitlines():
            pid, parent, group, state = line.split()
            yield Process(int(pid), int(parent), int(group), state[0])
        return
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", errors="replace") as file:
                after_name = file.read().rpartition(")")[2]  # the name may hold anything
        except OSError:  # it has ended
            continue
        state, parent, group = after_name.split()[:3]
        yield Process(int(name), int(parent), int(group), state)


def own_children() -> list[int]:
    """Return the pids of this process's children; none on a system that does not list them."""
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return []


def stop(pid: int, group: int) -> None:
    """Stop a process, and its group: of one that is stopped at once, none can fork meanwhile."""
    if group > 1:  # to -1 it would go to all processes
        send(signal.SIGSTOP, -group)
    send(signal.SIGSTOP, pid)


def send(number: int, target: int) -> None:
    """Send a signal to a process, or to the group -target, where it is there and may be signalled."""
    try:
        os.kill(target, number)
    except (ProcessLookupError, PermissionError):
        return


# ---------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------


def say(control: int, word: bytes) -> None:
    """Tell the launcher. One that is gone is noticed where its word is read."""
    try:
        os.write(control, word)
    except OSError:
        return


def end_like(status: int | None) -> None:
    """End this process as the command ended. None: it could not be killed."""
    code = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main(control: int, command: list[str]) -> None:
    """Start the command, watch it, and end as it did."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # it wakes poll
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.set_inheritable(control, False)
    pid, error = start(command)
    say(control, bytes([error]))
    close_all_but(control)
    guard = Guard(control, pid)
    if guard.watch():
        say(control, GONE)
    end_like(guard.status)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
