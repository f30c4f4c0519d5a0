"""The launcher around a real child process: limits, signals, locks, crashes, kills, hostile events."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from conftest import wait_for_line

from backends.protocol import RunDir
from launcher.child import supervise
from launcher.device import Watch
from launcher.ledger import Flag, Ledger
from launcher.processes import processes_of
from launcher.setting import resolve
from prepare import ROOT

SLEEPER = """
import time
import torch
import train_cuda
def make_train_step(model, optimizer):
    def train_step(next_batch, progress):
        time.sleep(0.05)
        return torch.zeros(())
    return train_step
train_cuda.make_train_step = make_train_step
if __name__ == "__main__":
    train_cuda.main()
"""


@pytest.fixture
def start(house, autoresearch):
    """Start the command without waiting for it; it is ended with the test."""
    autoresearch("prepare", "--track", "tiny")
    running = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def sleeper(house):
    path = house / "sleeper.py"
    path.write_text(SLEEPER)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_child_and_writes_the_row(start, house, number):
    process = start("run", "--budget", "600", "--trainer", sleeper(house))
    wait_for_line(process, "training on")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    [row] = Ledger(house / "results.tsv").rows()
    assert (row.status, row.reason) == ("crash", "interrupted") and Flag.INTERRUPTED in row.flags
    assert not processes_of(row.run)


@pytest.mark.slow
def test_killing_the_launcher_leaves_no_process_and_the_next_command_records_it(start, house, autoresearch):
    process = start("run", "--budget", "600", "--trainer", sleeper(house))
    wait_for_line(process, "training on")
    [run_dir] = (house / "runs").iterdir()
    process.kill()
    process.wait()
    psutil.wait_procs(processes_of(run_dir.name), timeout=30)
    assert not processes_of(run_dir.name)
    done = autoresearch("run", "--budget", "1", "--trainer", house / "absent.py")
    assert (
        done.returncode == 2 and "there is no trainer" in done.stderr and "recorded as a crash" in done.stderr
    )
    [row] = Ledger(house / "results.tsv").rows()
    assert row.run == run_dir.name and row.reason == "the launcher was killed during the run"
    assert Flag.CUT_OFF in row.flags and not row.judged


@pytest.mark.slow
def test_two_experiments_share_no_device(start, house):
    first = start("run", "--budget", "600", "--trainer", sleeper(house))
    wait_for_line(first, "training on")
    second = start("run", "--budget", "1", "--trainer", sleeper(house))
    line = wait_for_line(second, "waiting")
    assert os.listdir(house / "runs")[0] in line
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    second.communicate(timeout=120)
    assert [r.reason for r in Ledger(house / "results.tsv").rows()][0] == "interrupted"
    assert len(Ledger(house / "results.tsv").rows()) == 2


@pytest.mark.parametrize(
    "source, code, says",
    [
        ("raise ValueError('my own mistake')", 1, "ValueError: my own mistake"),
        ("def broken(:", 1, "SyntaxError"),
        ("import os; os.abort()", 1, "SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 1, "out of memory?"),
        ("import sys; sys.exit(7)", 1, "code 7"),
    ],
)
def test_a_crash_shows_its_last_lines(autoresearch, house, source, code, says):
    (house / "bad.py").write_text(source)
    done = autoresearch("run", "--trainer", house / "bad.py")
    assert done.returncode == code and says in done.stdout and "status: crash" in done.stdout
    [row] = Ledger(house / "results.tsv").rows()
    assert row.status == "crash" and row.reason


def test_startup_has_a_limit(autoresearch, house, tiny_cache, monkeypatch):
    text = (tiny_cache / "platforms.yaml").read_text().replace("startup_seconds: 120", "startup_seconds: 2")
    (house / "quick.yaml").write_text(text)
    monkeypatch.setenv("AUTORESEARCH_CONFIG", str(house / "quick.yaml"))
    (house / "slow.py").write_text("import time; time.sleep(100)")
    done = autoresearch("run", "--trainer", house / "slow.py")
    assert done.returncode == 4 and "no exp.start within 2 s" in done.stdout


EVENTS = """
import json, os, sys, time
pipe = os.fdopen(int(os.environ["AUTORESEARCH_EVENTS_FD"]), "wb", buffering=0)
start = {"event": "start", "device": "d", "platform": "cpu", "track": "tiny", "seed": 1, "budget": 300.0,
         "num_params_M": 1.0, "startup": 1.0}
def send(**event):
    pipe.write(json.dumps(event).encode() + b"\\n")
"""


@pytest.mark.parametrize(
    "acts, says",
    [
        ("pipe.write(b'{]\\n')", "Invalid JSON"),
        ("send(**start); send(event='log', step=1)", "log.loss: Field required"),
        (
            "send(**start); send(event='stop', training_seconds='long', num_steps=1, tokens=1)",
            "training_seconds",
        ),
        ("pipe.write(b'x' * 10**6)", "a line of over 65536 bytes"),
        (
            "send(**start); send(event='result', val_bpb=float('nan'))",
            "val_bpb: Input should be a finite number",
        ),
        ("send(event='invalid', message=[1])", "invalid.message"),
    ],
)
def test_a_hostile_event_ends_the_run_as_invalid(autoresearch, house, acts, says):
    (house / "hostile.py").write_text(EVENTS + acts + "\ntime.sleep(100)\n")
    done = autoresearch("run", "--budget", "20", "--trainer", house / "hostile.py")
    assert done.returncode == 5 and "Traceback" not in done.stderr, done.stderr
    [row] = Ledger(house / "results.tsv").rows()
    assert row.status == "invalid" and "sent something that is no event" in row.reason and says in row.reason
    assert row.total_seconds < 20


def test_events_out_of_order_change_nothing(autoresearch, house):
    acts = """
stop = {"event": "stop", "training_seconds": 5.0, "num_steps": 1, "tokens": 1}
send(**stop); send(**start); send(**start); send(event="score", done=1, rows=2, seconds=1.0)
"""
    (house / "odd.py").write_text(EVENTS + acts)
    done = autoresearch("run", "--budget", "20", "--trainer", house / "odd.py")
    assert (
        done.returncode == 1 and "exited 0 without a result" in done.stdout and "Traceback" not in done.stderr
    )


def test_a_flood_of_events_does_not_hide_the_limits(house):
    flood = "while True: send(event='score', done=1, rows=2, seconds=1.0)\n"
    (house / "flood.py").write_text(EVENTS + "send(**start)\n" + flood)
    setting = resolve("cpu")
    platform = replace(setting.platform, startup_seconds=60.0)
    told = replace(setting.run_settings(1), budget=-9.0)  # with the grace, a second
    outcome = supervise(house / "flood.py", RunDir(house), told, platform, Watch("cpu"), lambda event: None)
    assert outcome.status == "timeout" and "the loop does not end" in outcome.reason
    assert outcome.total_seconds < 30


def test_what_a_child_sends_last_is_read(house):
    """It ends while the launcher is busy elsewhere: the pipe still holds its word."""
    (house / "late.py").write_text(
        EVENTS + "time.sleep(0.6); send(event='invalid', message='my last word')\n"
    )
    setting = resolve("cpu")
    run = RunDir(house)

    def busy(event):
        time.sleep(0.4)

    outcome = supervise(house / "late.py", run, setting.run_settings(1), setting.platform, Watch("cpu"), busy)
    assert (outcome.status, outcome.reason) == ("invalid", "my last word")


def test_a_trainer_that_deletes_its_folder_is_a_crash(autoresearch, house):
    (house / "wipes.py").write_text(
        "import os, shutil, sys; shutil.rmtree(os.environ['AUTORESEARCH_RUN_DIR']); sys.exit(3)"
    )
    done = autoresearch("run", "--budget", "20", "--trainer", house / "wipes.py")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    [row] = Ledger(house / "results.tsv").rows()
    assert row.status == "crash" and row.reason == "the trainer exited with code 3: it printed nothing"
