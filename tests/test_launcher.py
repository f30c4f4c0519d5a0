"""The launcher around a real child process: limits, signals, locks, crashes, power cuts."""

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from launcher.ledger import Ledger
from prepare import ROOT

SLEEPER = """
import time
from train_cuda import *
def train_step(model, trunk, optimizer, next_batch, progress):
    time.sleep(0.05)
    return torch.zeros(())
import train_cuda
train_cuda.train_step = train_step
if __name__ == "__main__":
    train_cuda.main()
"""


@pytest.fixture
def start(house, autoresearch):
    """Start the command without waiting for it; it is ended with the test."""
    autoresearch("prepare", "--track", "tiny")
    running = []

    def start(*arguments):
        process = subprocess.Popen([sys.executable, "-m", "launcher.cli", *map(str, arguments)], cwd=ROOT, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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


def wait_for_line(process, text, seconds=120):
    """Read the command's progress until a line with `text`; everything read so far. A process that never says it is killed."""
    seen, alarm = "", threading.Timer(seconds, process.kill)
    alarm.start()
    try:
        for line in process.stderr:
            seen += line
            if text in line:
                return seen
    finally:
        alarm.cancel()
    raise AssertionError(f"ended without {text!r}: {seen}")


def leftovers(run):
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("AUTORESEARCH_RUN_ID") == run and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_child_and_writes_the_row(start, house, number):
    process = start("run", "--budget", "600", "--trainer", sleeper(house))
    wait_for_line(process, "training on")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    [row] = Ledger(house / "results.tsv").rows()
    assert (row.status, row.reason) == ("crash", "interrupted")
    assert not leftovers(row.run)


@pytest.mark.slow
def test_killing_the_launcher_leaves_no_process_and_the_next_command_records_it(start, house, autoresearch):
    process = start("run", "--budget", "600", "--trainer", sleeper(house))
    wait_for_line(process, "training on")
    [run_dir] = (house / "runs").iterdir()
    process.kill()
    process.wait()
    psutil.wait_procs(leftovers(run_dir.name), timeout=30)
    assert not leftovers(run_dir.name)
    done = autoresearch("run", "--budget", "1", "--trainer", house / "absent.py")
    assert done.returncode == 2 and "there is no trainer" in done.stderr and "recorded as a crash" in done.stderr
    [row] = Ledger(house / "results.tsv").rows()
    assert row.run == run_dir.name and row.reason == "the launcher was killed during the run"


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


@pytest.mark.parametrize("source, code, says", [
    ("raise ValueError('my own mistake')", 1, "ValueError: my own mistake"),
    ("def broken(:", 1, "SyntaxError"),
    ("import os; os.abort()", 1, "SIGABRT"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 1, "out of memory?"),
    ("import sys; sys.exit(7)", 1, "code 7"),
])
def test_a_crash_shows_its_last_lines(autoresearch, house, source, code, says):
    (house / "bad.py").write_text(source)
    done = autoresearch("run", "--trainer", house / "bad.py")
    assert done.returncode == code and says in done.stdout and "status: crash" in done.stdout
    [row] = Ledger(house / "results.tsv").rows()
    assert row.status == "crash" and row.reason


def test_a_dry_run_says_what_is_wrong_and_leaves_nothing(house):
    from launcher.run import dry_run

    (house / "bad.py").write_text("from train_cuda import *\nprint('so far so good')\nraise ValueError('my own mistake')")
    outcome, tail = dry_run(house / "bad.py", "cpu")
    assert (outcome.status, outcome.reason) == ("crash", "the trainer exited with code 1: ValueError: my own mistake") and "so far so good" in tail
    (house / "deaf.py").write_text("print('val_bpb: 0.1')")
    assert "without a result" in dry_run(house / "deaf.py", "cpu")[0].reason
    outcome, _ = dry_run(ROOT / "train_cuda.py", "cpu")
    assert outcome.status == "" and outcome.result["val_tokens"] == 128 and 3 <= outcome.training_seconds < 8
    assert not (house / "results.tsv").exists() and not (house / "runs").exists()


def test_a_missing_framework_is_a_sentence(house, monkeypatch):
    from launcher import run as runner

    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    for platform, package in (("cpu", "torch"), ("mlx-cpu", "mlx")):
        with pytest.raises(runner.UserError, match=f"{platform} needs the package {package}"):
            runner.run(runner.Options(platform=platform))
    assert not (house / "results.tsv").exists()


def test_startup_has_a_limit(autoresearch, house, tiny_cache, monkeypatch):
    text = (tiny_cache / "platforms.yaml").read_text().replace("startup_seconds: 120", "startup_seconds: 2")
    (house / "quick.yaml").write_text(text)
    monkeypatch.setenv("AUTORESEARCH_CONFIG", str(house / "quick.yaml"))
    (house / "slow.py").write_text("import time; time.sleep(100)")
    done = autoresearch("run", "--trainer", house / "slow.py")
    assert done.returncode == 4 and "no exp.start within 2 s" in done.stdout


@pytest.mark.slow
def test_verify_matches_and_a_changed_model_does_not(autoresearch, house):
    done = autoresearch("run", "--budget", "3", "--keep-weights")
    assert done.returncode == 0, done.stdout + done.stderr
    run = Ledger(house / "results.tsv").rows()[0].run
    good = autoresearch("verify", run[:18])
    assert good.returncode == 0 and "status: verified" in good.stdout and "sealed minus val" in good.stdout, good.stdout + good.stderr
    weights = house / "runs" / run / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-40000:-20000] = bytes(20000)
    weights.write_bytes(data)
    bad = autoresearch("verify", "last")
    assert bad.returncode == 5 and "status: refuted" in bad.stdout
    weights.unlink()
    assert "has no weights" in autoresearch("verify", "last").stderr


@pytest.mark.slow
def test_mlx_runs_end_to_end_on_the_cpu(autoresearch, house):
    pytest.importorskip("mlx.core")
    done = autoresearch("run", "--budget", "4", "--platform", "mlx-cpu", "-m", "the twin", "--keep-weights")
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = Ledger(house / "results.tsv").rows()
    assert row.platform == "mlx-cpu" and 0.5 < row.val_bpb < 8 and (house / "runs" / row.run / "train_mlx.py").exists()
    verified = autoresearch("verify", "last")
    assert verified.returncode == 0, verified.stdout + verified.stderr
