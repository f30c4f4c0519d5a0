"""Processes and signals: start a command behind a guard, end it with everything that it started itself."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from backends.protocol import RUN_ID_VARIABLE
from launcher import guard
from launcher.guard import KILL_SECONDS, LEFTOVER_SECONDS, STOP_SECONDS, TERM_SECONDS

GUARD_SECONDS = TERM_SECONDS + STOP_SECONDS + KILL_SECONDS + 10.0  # that a guard has at most
IMPORT_SECONDS = 0.1  # after which a signal that came during an import comes again
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """The launcher was asked to end: Ctrl-C, SIGTERM, or the terminal went away.

    It is no Exception: what handles failures does not take it for one.
    """


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise Stopped when a signal asks this process to end, once: further ones do not disturb the clean-up.

    Inside another such block it changes nothing.
    """
    if any(signal.getsignal(number) is _stop for number in STOP_SIGNALS):
        yield
        return
    wanted = [
        number
        for number in STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # nohup stays nohup
    ]
    with _handlers({number: _stop for number in wanted}):
        yield


def _stop(number: int, frame: FrameType | None) -> None:
    if _imports(frame):  # what is cut off there may come out as another exception, and leaves half a module
        threading.Timer(IMPORT_SECONDS, os.kill, (os.getpid(), number)).start()
        return
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


def _imports(frame: FrameType | None) -> bool:
    """Return whether a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextmanager
def defer_signals() -> Iterator[None]:
    """Let a signal wait until the block is over: what is begun there is not left half done."""
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    try:
        with _handlers({number: remember for number in wanted}):
            yield
    finally:
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


class Guarded:
    """A command behind a guard (launcher/guard.py), with what is used here of Popen's interface.

    run_id: what its processes have in their environment, "" when they have none
    """

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, run_id: str) -> None:
        self._guard = process
        self._control = control
        self._run_id = run_id
        self._is_gone = False

    @property
    def pid(self) -> int:
        """The guard's, from which the command and all that it started descend."""
        return self._guard.pid

    @property
    def returncode(self) -> int | None:
        """The command's, as Popen has it; None while anything of it runs."""
        return self._guard.returncode

    def poll(self) -> int | None:
        """Return the command's returncode, None while anything of it runs."""
        return self._guard.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until nothing of the command runs. Returns its returncode.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        """
        return self._guard.wait(timeout)

    def kill(self) -> None:
        """Have everything killed, and do not wait for it. Any thread may call this."""
        with suppress(OSError):  # it has ended
            self._control.shutdown(socket.SHUT_WR)

    def end(self, ask: bool = False) -> bool:
        """End the command with all that it started, and wait for it. A second call changes nothing.

        ask: the command gets SIGTERM, and time to end by itself.

        Returns whether nothing is left of it. Something may be when the guard was killed, or when a process
        hangs in the kernel.
        """
        if self._control.fileno() == -1:
            return self._is_gone
        if ask:
            with suppress(OSError):  # it has ended
                self._control.send(guard.ASK)
        else:
            self.kill()
        try:
            self._guard.wait(GUARD_SECONDS)
        except subprocess.TimeoutExpired:  # it was stopped
            self._guard.kill()
            self._guard.wait()
        with suppress(OSError):  # it was killed before it read everything
            self._is_gone = self._control.recv(1) == guard.GONE
        self._control.close()
        if self._run_id and not (self._is_gone and guard.LINUX):
            end_leftovers(self._run_id)
        return self._is_gone


def start_guarded(
    command: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = subprocess.STDOUT,
    pass_fds: Sequence[int] = (),
) -> Guarded:
    """Start a command behind a guard, in a session of its own. The arguments are those of Popen.

    Call it in defer_signals, together with what makes sure of its end: no signal may fall between the two.

    Raises:
        OSError: it cannot be started.
    """
    with ExitStack() as stack:
        ours, theirs = map(stack.enter_context, socket.socketpair())
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(theirs.fileno()), *command],
            cwd=cwd,
            env=env,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(theirs.fileno(), *pass_fds),
            start_new_session=True,
        )
        theirs.close()
        said = ours.recv(1)
        if said != guard.STARTED:
            process.wait()
            number = said[0] if said else errno.ECHILD
            raise OSError(number, os.strerror(number), command[0])
        stack.pop_all()
    return Guarded(process, ours, env.get(RUN_ID_VARIABLE, ""))


def remove_tree(path: Path) -> None:
    """Remove a file or folder with all that it holds, whatever permissions were set on it."""
    if not path.is_symlink() and path.is_dir():
        for folder, names, _ in os.walk(path):
            for name in (".", *names):
                with suppress(OSError, NotImplementedError):  # the latter for a link
                    os.chmod(os.path.join(folder, name), 0o700, follow_symlinks=name == ".")
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def alive(process: psutil.Process) -> bool:
    """Return whether the process runs: a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def is_alive_since(pid: int, moment: float) -> bool:
    """Return whether the process of a number runs that began before a moment, in Unix seconds.

    A later process may have got the same number.
    """
    try:
        process = psutil.Process(pid)
        return alive(process) and process.create_time() < moment
    except (psutil.Error, ValueError, OverflowError):
        return False


def scoring_id(run_id: str, name: str) -> str:
    """Return the run id of a process that scores the run. name: "first" or "second"."""
    return f"{run_id}.{name}"


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
    """Kill what carries the run's id in its environment. Returns a description of each.

    For what a guard could not end: it was killed itself, or this system has no subreaper.
    """
    left = processes_of(run_id)
    psutil.wait_procs(left, timeout=LEFTOVER_SECONDS)
    described = []
    for process in processes_of(run_id):
        described.append(describe(process))
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=LEFTOVER_SECONDS)
    return described
