"""Contention, sleep and throttling are noticed and keep a row off the board."""

import subprocess
import sys
import time

import pytest

from launcher import watch
from launcher.ledger import Row

SPIN = "while True: pass"


def spinning(count):
    return [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]


@pytest.fixture
def busy():
    """The child under watch, and one more process that computes."""
    child, stranger = spinning(2)
    yield child, stranger
    for p in (child, stranger):
        p.kill()
        p.wait()


def test_a_busy_cpu_is_contention(busy, monkeypatch):
    child, _ = busy
    w = watch.Watch("torch-cpu")
    w.begin(child.pid)
    began = time.monotonic()
    while time.monotonic() - began < 4.0:
        w.sample()
        time.sleep(0.1)
    w.end()
    marks, notes = w.verdict()
    assert marks == ["contended"] and "other processes used" in notes[0]
    assert not Row(status="keep", rules=1, marks=",".join(marks)).ranks


def test_sleep_and_heat_on_a_mac(monkeypatch):
    monkeypatch.setattr(watch.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(watch, "mac_state", lambda: {"thermal_speed_limit": 60})
    monkeypatch.setattr(watch, "SAMPLE_EVERY", 0.0)
    w = watch.Watch("mlx")
    w.begin(subprocess.os.getpid())
    w._began = (w._began[0] - 30, w._began[1])  # the wall clock ran on while the other stood still
    w.sample()
    w.end()
    w.others_share = 0.0
    assert w.verdict()[0] == ["slept", "throttled"]


def test_a_stranger_on_the_gpu(monkeypatch):
    """Recorded answers of nvidia-smi: our own process appears, then another."""
    apps = iter(["", "101\n", "101\n202\n"])
    state = "350.0, Not Active, Not Active\n"
    monkeypatch.setattr(watch, "output_of", lambda *command: next(apps) if "--query-compute-apps=pid" in command else state)
    monkeypatch.setattr(watch, "SAMPLE_EVERY", 0.01)
    w = watch.Watch("cuda")
    w.begin(subprocess.os.getpid())
    time.sleep(0.02)
    w.sample()
    assert not w.others_on_gpu
    time.sleep(0.02)
    w.sample()
    w.end()
    w.others_share = 0.0
    assert w.verdict()[0] == ["contended"] and 350 * 0.02 < w.energy_j < 350


def test_a_slowed_gpu(monkeypatch):
    monkeypatch.setattr(watch, "output_of", lambda *command: "" if "--query-compute-apps=pid" in command else "300.0, Active, Not Active\n")
    monkeypatch.setattr(watch, "SAMPLE_EVERY", 0.0)
    w = watch.Watch("cuda")
    w.begin(subprocess.os.getpid())
    w.sample()
    w.end()
    w.others_share = 0.0
    assert w.verdict()[0] == ["throttled"]
