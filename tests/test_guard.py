"""The guard around real processes: what a command starts, however it hides, does not outlive it."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from backends.protocol import RUN_ID_VARIABLE
from launcher import guard
from launcher.processes import (
    Stopped,
    alive,
    defer_signals,
    processes_of,
    start_guarded,
    stop_on_signals,
)
from prepare import ROOT

subreaper = pytest.mark.skipif(not guard.LINUX, reason="this system has no subreaper")

SLEEPS = "import time; time.sleep(600)"
# It says its pid, and so does a process twice removed, in a session of its own, whose environment is empty.
DAEMON = """
import os, sys
sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", sleeper], {})
    os._exit(0)
os.wait()
print(os.getpid(), flush=True)
"""
# It starts its command behind twenty guards, one after the other.
LAUNCHER = """
import os, sys, time
from pathlib import Path
from launcher.processes import start_guarded
print("ready", flush=True)
children = [start_guarded(sys.argv[1:], Path("/"), os.environ) for _ in range(20)]
time.sleep(600)
"""


def python(code):
    return [sys.executable, "-I", "-S", "-c", code]


@pytest.fixture
def run_id():
    """What all processes of a test carry in their environment, unless they drop it."""
    return f"test-{os.getpid()}-{random.getrandbits(32):08x}"


@pytest.fixture
def said(tmp_path):
    """The file that takes what commands print."""
    return tmp_path / "said"


@pytest.fixture
def start(said, run_id):
    """start(code) runs Python behind a guard, which is ended with the test."""
    started = []

    def start(code, **more):
        with open(said, "wb") as out:
            child = start_guarded(
                python(code), said.parent, {**os.environ, RUN_ID_VARIABLE: run_id}, stdout=out, **more
            )
        started.append(child)
        return child

    yield start
    for child in started:
        child.end()


@pytest.fixture
def launch(run_id):
    """launch(command) starts LAUNCHER as a process of its own, and waits until it begins."""
    started = []

    def launch(command):
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *command],
            cwd=ROOT,
            env={**os.environ, RUN_ID_VARIABLE: run_id},
            stdout=subprocess.PIPE,
        )
        started.append(launcher)
        assert launcher.stdout.readline() == b"ready\n"
        return launcher

    yield launch
    for launcher in started:
        launcher.kill()
        launcher.wait()
        launcher.stdout.close()


def wait_until(condition, seconds=60.0):
    """Wait until the condition holds. A test fails when it does not within a minute."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def numbers_in(path, count):
    """Wait until a file has that many lines, and return the numbers in them."""
    wait_until(lambda: path.read_text().count("\n") >= count)
    return [int(line) for line in path.read_text().split()]


def living(pids):
    return [pid for pid in pids if psutil.pid_exists(pid) and alive(psutil.Process(pid))]


# --- The command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, returncode",
    [
        ("", 0),
        ("import sys; sys.exit(7)", 7),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ],
)
def test_the_guard_ends_as_its_command_does(start, code, returncode):
    child = start(code)
    assert child.wait(60) == returncode and child.returncode == child.poll() == returncode
    assert child.end() and child.end()


def test_a_command_that_cannot_be_started_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-command"):
        start_guarded(["no-such-command"], tmp_path, os.environ)
    with pytest.raises(PermissionError):
        start_guarded([str(tmp_path)], tmp_path, os.environ)
    with pytest.raises(OSError, match="Argument list too long"):
        start_guarded(["x" * 2**22], tmp_path, os.environ)


def test_a_command_inherits_what_it_is_given_and_nothing_of_the_guard(start, said):
    code = """
import os, resource, signal
def is_open(number):
    try:
        return bool(os.fstat(number))
    except OSError:
        return False
print([number for number in range(3, 256) if is_open(number)])
print([signal.getsignal(number).name for number in (signal.SIGTERM, signal.SIGHUP)])
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
print(os.getsid(0) == os.getpgid(0) == os.getpid())
print(resource.getrlimit(resource.RLIMIT_CORE)[0])
"""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert start(code, pass_fds=(theirs.fileno(),)).wait(60) == 0
        expected = [[theirs.fileno()], ["SIG_DFL", "SIG_DFL"], True, True, 0]
    assert said.read_text().splitlines() == [str(value) for value in expected]


def test_a_socket_closes_when_the_command_closes_it(start):
    """The guard holds no copy: the launcher would wait for the end of a trainer that said all it had to."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        start(f"import os, time; os.close({theirs.fileno()}); time.sleep(600)", pass_fds=(theirs.fileno(),))
        theirs.close()
        ours.settimeout(60)
        assert ours.recv(1) == b""


# --- The end ------------------------------------------------------------------------------------------------


@subreaper
def test_the_end_comes_to_all_that_a_command_started(start, said):
    child = start(DAEMON + SLEEPS)
    pids = numbers_in(said, 2)
    assert living(pids) == pids
    assert child.end() and not living([*pids, child.pid]) and child.returncode == -signal.SIGKILL


@subreaper
def test_what_a_command_leaves_is_killed_when_it_does_not_end_by_itself(start, said):
    child = start(DAEMON)
    assert child.wait(60) == 0
    assert not living(numbers_in(said, 2)) and child.end()


def test_what_a_command_leaves_may_end_by_itself(start, said):
    child = start("import os, time\nif os.fork() == 0:\n    time.sleep(0.5)\n    print('worked', flush=True)")
    assert child.wait(60) == 0 and said.read_text() == "worked\n"


def test_a_command_that_is_asked_ends_in_its_own_way(start, said):
    code = """
import os, signal, sys, time
def stop(number, frame):
    os.write(1, b"bye\\n")  # a print within a print is an error
    sys.exit(4)
signal.signal(signal.SIGTERM, stop)
os.write(1, b"up\\n")
time.sleep(600)
"""
    child = start(code)
    wait_until(lambda: said.read_text() == "up\n")
    assert child.end(ask=True) and child.returncode == 4 and said.read_text() == "up\nbye\n"


def test_a_command_that_does_not_end_when_it_is_asked_is_killed(start, said):
    child = start(
        f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); {SLEEPS}"
    )
    numbers_in(said, 1)
    assert child.end(ask=True) and child.returncode == -signal.SIGKILL


def test_another_thread_can_kill(start):
    child = start(SLEEPS)
    thread = threading.Timer(0.1, child.kill)
    thread.start()
    assert child.wait(60) == -signal.SIGKILL
    thread.join()
    child.end()
    child.kill()  # of what has ended changes nothing


@subreaper
def test_processes_that_go_on_forking_do_not_escape(start, said):
    """Each lives for a moment: it forks, and its child goes on in a session of its own."""
    code = """
import os, time
end = time.monotonic() + 60
if os.fork():
    time.sleep(600)
for _ in range(5):
    os.fork()
print(os.getpid(), flush=True)
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
    os.setsid()
"""
    ours, theirs = socket.socketpair()  # it is open as long as one of them lives
    with ours:
        with theirs:
            child = start(code, pass_fds=(theirs.fileno(),))
        numbers_in(said, 2**5)
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
        assert child.end() and ours.recv(1) == b""


@subreaper
def test_a_command_dies_with_a_guard_that_is_killed(start, said):
    """What it started is found by its environment then. The launcher is told that there may be more."""
    code = """
import os, time
print(os.getpid(), flush=True)
if os.fork() == 0:
    os.setsid()
    print(os.getpid(), flush=True)
time.sleep(600)
"""
    child = start(code)
    command, other = numbers_in(said, 2)
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: not living([command]))
    assert living([other])
    assert not child.end() and not child.end()
    wait_until(lambda: not living([other]))


# --- The launcher -------------------------------------------------------------------------------------------


@subreaper
def test_nothing_outlives_a_launcher_that_is_killed(launch):
    launcher = launch(python(DAEMON + SLEEPS))
    pids = [int(launcher.stdout.readline()) for _ in range(2 * 20)]
    assert living(pids) == pids
    launcher.kill()
    wait_until(lambda: not living(pids))


def test_a_launcher_that_is_killed_while_it_starts_a_command_leaves_nothing(launch, run_id):
    draw = random.Random(1)
    for _ in range(6):
        launcher = launch(python(SLEEPS))
        time.sleep(draw.uniform(0.0, 0.3))
        launcher.kill()
        launcher.wait()
        wait_until(lambda: not processes_of(run_id))


def test_a_signal_at_the_start_of_a_command_does_not_lose_it(run_id):
    draw = random.Random(1)
    environment = {**os.environ, RUN_ID_VARIABLE: run_id}
    for _ in range(40):
        child = None
        alarm = threading.Timer(draw.uniform(0.0, 0.06), os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped), stop_on_signals():
            alarm.start()
            try:
                with defer_signals():
                    child = start_guarded(python(SLEEPS), Path("/"), environment)
                time.sleep(60)  # the signal comes now at the latest
            finally:
                with defer_signals():
                    alarm.join()
                    assert child and child.end()
        assert not processes_of(run_id)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_clean_up_ends_the_command_after_it(number):
    cleaned = []
    with pytest.raises(Stopped), stop_on_signals():
        with defer_signals():
            send(number)
            cleaned.append(True)
        cleaned.append(False)  # it is not forgotten
    assert cleaned == [True]


def test_after_a_signal_further_ones_do_not_disturb_the_clean_up():
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []
    with pytest.raises(Stopped, match="SIGINT"), stop_on_signals():
        try:
            with stop_on_signals():  # as that of a run in a night
                send(signal.SIGINT)
        finally:
            send(signal.SIGINT)
            send(signal.SIGTERM)
            with defer_signals():
                send(signal.SIGTERM)
            cleaned.append(True)
    assert cleaned and signal.getsignal(signal.SIGTERM) is before


def test_what_handles_failures_does_not_take_a_stop_for_one():
    with pytest.raises(Stopped), stop_on_signals():
        try:
            send(signal.SIGTERM)
        except Exception:
            raise AssertionError("a night would go on") from None
