"""Contention, sleep and heat are noticed and keep a run off the board; one experiment holds the device."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from launcher import device
from launcher.device import DeviceLock, Watch
from launcher.ledger import Flag, Row
from prepare import UserError

SPIN = "while True: pass"


@pytest.fixture
def spinning():
    """A child under watch, and one more process that computes."""
    child = subprocess.Popen([sys.executable, "-c", SPIN])
    # Not a child of ours: whatever we start is ours.
    spin = f"[sys.executable, '-c', {SPIN!r}], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"
    code = f"import subprocess, sys; print(subprocess.Popen({spin}).pid)"
    child.stranger = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    yield child
    child.kill()
    child.wait()
    os.kill(child.stranger, signal.SIGKILL)


def flags_of(watch):
    return [flag for flag, _ in watch.findings()]


def test_a_busy_cpu_is_contention(spinning, monkeypatch):
    monkeypatch.setattr(device, "NAMED_PROCESSES", 99)  # the machine may do other things
    watch = Watch("cpu")
    watch.begin(spinning.pid)
    stranger = psutil.Process(spinning.stranger)
    while stranger.cpu_times().user < device.OTHERS_SECONDS + 1.0:  # however little of a core it gets
        time.sleep(0.1)
    watch.end()
    [(flag, text)] = watch.findings()
    assert flag == Flag.CONTENDED and "other processes used" in text
    assert f"{SPIN} (process {spinning.stranger}, " in text
    row = Row(status="keep", rules=1)
    row.add_flags(flag)
    assert not row.ranked and not row.comparable


def test_what_others_did_before_and_after_the_training_does_not_count(spinning):
    watch = Watch("cpu")
    time.sleep(1.0)
    watch.begin(os.getpid())
    watch.end()
    time.sleep(1.0)
    watch.end()
    assert watch.findings() == []


def test_phases_are_told_apart(spinning, monkeypatch):
    """What disturbed the start is no finding of the training, and a process that is ours disturbs neither."""
    watch = Watch("cpu")
    watch.begin(spinning.pid)
    watch.throttled = True
    watch._wall -= 30
    watch.end()
    assert Flag.SLEPT in flags_of(watch) and Flag.THROTTLED in flags_of(watch)
    watch.begin(spinning.pid, os.getpid(), 2**22 + 1)  # the last is no process
    watch.end()
    assert flags_of(watch) == []


def test_sleep_and_heat_on_a_mac(monkeypatch):
    monkeypatch.setattr(device.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(device, "mac_state", lambda: {"thermal_speed_limit": 60})
    watch = Watch("gpu")
    watch.begin(os.getpid())
    watch._wall -= 30  # the wall clock ran on while the monotonic one stood still
    watch.sample()
    watch.end()
    watch.others_share = 0.0
    assert flags_of(watch) == [Flag.SLEPT, Flag.THROTTLED]


def test_another_process_on_the_gpu(monkeypatch):
    """Recorded answers of nvidia-smi: the trainer and two that will score appear, then another."""
    apps = iter(["", "101\n102\n103\n", "101\n102\n103\n202\n"])

    def output_of(*command):
        return next(apps) if "--query-compute-apps=pid" in command else "350.0, Not Active, Not Active\n"

    monkeypatch.setattr(device, "output_of", output_of)
    watch = Watch("gpu")
    watch.begin(os.getpid())
    time.sleep(0.02)
    watch.sample()
    assert not watch.others_on_gpu
    time.sleep(0.02)
    watch.sample()
    watch.end()
    watch.others_share = 0.0
    assert flags_of(watch) == [Flag.CONTENDED] and 350 * 0.04 < watch.energy_j < 350


def test_a_slow_answer_of_the_driver_holds_nobody_up(monkeypatch):
    """Sampling is in a thread: the launcher goes on reading events."""
    asked = threading.Event()

    def output_of(*command):
        if "--query-compute-apps=pid" not in command:
            asked.set()
            time.sleep(1.0)
        return ""

    monkeypatch.setattr(device, "output_of", output_of)
    monkeypatch.setattr(device, "SAMPLE_EVERY", 0.01)
    watch = Watch("gpu")
    began = time.monotonic()
    watch.begin(os.getpid())
    assert asked.wait(5) and time.monotonic() - began < 1.0
    watch.end()


def test_a_child_that_has_ended_is_not_watched():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    watch = Watch("cpu")
    watch.begin(process.pid)
    watch.end()
    assert watch.findings() == []


@pytest.mark.parametrize(
    "state, flags", [("300.0, Active, Not Active\n", [Flag.THROTTLED]), ("", []), ("[N/A], Active\n", [])]
)
def test_a_slowed_gpu(monkeypatch, state, flags):
    monkeypatch.setattr(
        device, "output_of", lambda *command: "" if "--query-compute-apps=pid" in command else state
    )
    watch = Watch("gpu")
    watch.begin(os.getpid())
    watch.sample()
    watch.end()
    watch.others_share = 0.0
    assert flags_of(watch) == flags


HOLD = """
import sys, time
from launcher.device import DeviceLock
with DeviceLock("cpu") as lock:
    lock.set_holder("20260101-000000-abcd")
    print("held", flush=True)
    time.sleep(1.5)
"""


def test_who_waits_is_told_for_which_run(house, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert holder.stdout.readline() == "held\n"
    with DeviceLock("cpu"):
        assert holder.wait(timeout=10) == 0  # it had ended before we got the device
    said = capsys.readouterr().err
    assert f"run 20260101-000000-abcd, launcher process {holder.pid}" in said


# --- Before a run -------------------------------------------------------------------------------------------


def test_who_computes_is_named_before_a_run(spinning, monkeypatch, capsys):
    monkeypatch.setattr(device, "NAMED_PROCESSES", 99)
    monkeypatch.setattr(device, "OTHERS_CPU", 0.05)
    device.require_quiet("cpu", "go-on", seconds=1.0)
    said = capsys.readouterr().err
    assert "warning: other processes use" in said and f"process {spinning.stranger}" in said
    assert f"process {spinning.pid}" not in said  # it is ours
    with pytest.raises(UserError, match=f"process {spinning.stranger}.*--busy wait") as refused:
        device.require_quiet("cpu", "refuse", seconds=1.0)
    assert refused.value.code == 6


def test_a_run_can_wait_until_the_device_is_free(spinning, monkeypatch, capsys):
    monkeypatch.setattr(device, "OTHERS_CPU", 0.05)
    waits = []

    def end_it(seconds):
        waits.append(seconds)
        if seconds == device.LOOK_AGAIN:
            monkeypatch.setattr(device, "OTHERS_CPU", 9.0)
        else:
            really_sleep(seconds)

    really_sleep = time.sleep
    monkeypatch.setattr(time, "sleep", end_it)
    device.require_quiet("cpu", "wait", seconds=1.0)
    assert (
        waits == [1.0, device.LOOK_AGAIN, 1.0] and "waiting: other processes use" in capsys.readouterr().err
    )


def test_a_run_that_goes_on_does_not_wait_for_the_look(monkeypatch):
    asked = []
    monkeypatch.setattr(device, "require_quiet", lambda *given: asked.append(threading.current_thread()))
    for when_busy in ("go-on", "wait"):
        device.look_around("cpu", when_busy)
    while len(asked) < 2:
        time.sleep(0.01)
    assert (threading.main_thread() in asked) and asked.count(threading.main_thread()) == 1


def test_a_quiet_machine_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(device, "OTHERS_CPU", 9.0)
    device.require_quiet("cpu", "refuse", seconds=0.1)
    assert capsys.readouterr().err == ""


def test_one_gpu_has_one_lock_however_it_is_named(monkeypatch, house):
    asked = []

    def output_of(*command):
        asked.append(command[1])
        return "GPU-8a56\n"

    monkeypatch.setattr(device, "output_of", output_of)
    for name in ("", "0", "0,1", "GPU-8a56"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
        with DeviceLock("gpu"):
            pass
    assert asked == ["--id=0", "--id=0", "--id=0", "--id=GPU-8a56"]
    assert [path.name for path in (device.cache_dir() / "locks").glob("GPU*.lock")] == ["GPU-8a56.lock"]
