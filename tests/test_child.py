"""The launcher around a real child process: limits, signals, locks, crashes, kills, hostile events."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace

import psutil
import pytest
from conftest import wait_for_line

from backends.protocol import RunDir, Start
from launcher import child, guard
from launcher.child import supervise
from launcher.compiled import paths_below
from launcher.device import Watch
from launcher.ledger import Flag, Ledger, Row
from launcher.processes import processes_of, scoring_id
from launcher.score import NotScored
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
build_model = train_cuda.build_model
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
            [sys.executable, "-m", "launcher.entry", *map(str, arguments)],
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
def test_a_launcher_that_is_killed_early_leaves_no_process(start, house):
    """The trainer has not come to anything of ours by then, and the scorers are still starting."""
    early = house / "early.py"
    early.write_text("import time; print('up', flush=True); time.sleep(600)")
    process = start("run", "--budget", "600", "--trainer", early)
    wait_for_line(process, "s of training")
    [run_dir] = (house / "runs").iterdir()
    marks = [run_dir.name, scoring_id(run_dir.name, "first"), scoring_id(run_dir.name, "second")]
    while not all(processes_of(mark) for mark in marks) or "up" not in RunDir(run_dir).log.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    left = [found for mark in marks for found in processes_of(mark)]
    psutil.wait_procs(left, timeout=60)
    assert not [found for mark in marks for found in processes_of(mark)]


@pytest.mark.slow
def test_two_experiments_share_no_device(start, house):
    first = start("run", "--budget", "600", "--trainer", sleeper(house))
    wait_for_line(first, "training on")
    second = start("run", "--budget", "1", "--trainer", sleeper(house))
    line = wait_for_line(second, "waiting")
    [holder] = [path.name for path in (house / "runs").iterdir() if path.is_dir()]
    assert holder in line
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


EVENTS = """
import json, os, socket, sys, time
start = {"event": "start", "device": "d", "platform": "cpu", "track": "tiny", "seed": 1, "budget": 300.0,
         "num_params_M": 1.0, "depth": 2, "flops_per_token": 10, "peak_tflops": 1.0, "dtype": "float32",
         "startup": 1.0, "weights": {"w": [2]}}
EVAL_BATCH_SIZE = 8
def build_model(track, platform):
    import torch
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(2))
    model.forward = lambda x: torch.zeros(*x.shape, track.vocab_size)
    return model
def send(**event):
    launcher.sendall(json.dumps(event).encode() + b"\\n")
def main():
    global launcher
    launcher = socket.socket(fileno=int(os.environ["AUTORESEARCH_LAUNCHER_FD"]))
"""


def hostile(house, acts):
    """A trainer that speaks to the launcher itself. Scoring can build its model."""
    lines = [f"    {line}" for line in acts.strip().splitlines()]
    end = "\n\nif __name__ == '__main__':\n    main()\n"
    path = house / "hostile.py"
    path.write_text(EVENTS + "\n".join(lines) + end)
    return path


@pytest.mark.parametrize(
    "acts, says",
    [
        ("launcher.sendall(b'{]\\n')", "Invalid JSON"),
        ("send(event='log', step=1)", "log.loss: Field required"),
        ("send(event='stop', num_steps='many', tokens=1, peak_memory_mb=1.0)", "num_steps"),
        ("launcher.sendall(b'x' * 10**6)", "a line of over 262144 bytes"),
        ("send(**start | {'peak_tflops': float('nan')})", "peak_tflops: Input should be a finite number"),
        ("send(event='invalid', message=[1])", "invalid.message"),
    ],
)
def test_a_hostile_event_ends_the_run_as_invalid(autoresearch, house, acts, says):
    trainer = hostile(house, acts + "\ntime.sleep(100)")
    done = autoresearch("run", "--budget", "20", "--trainer", trainer)
    assert done.returncode == 5 and "Traceback" not in done.stderr, done.stderr
    [row] = Ledger(house / "results.tsv").rows()
    assert row.status == "invalid" and "sent something that is no event" in row.reason and says in row.reason
    assert row.total_seconds < 20


def test_events_out_of_order_change_nothing(autoresearch, house):
    acts = """
stop = {"event": "stop", "num_steps": 1, "tokens": 1, "peak_memory_mb": 1.0}
send(**stop); send(**start); send(**start)
"""
    done = autoresearch("run", "--budget", "20", "--trainer", hostile(house, acts))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "exited 0 without a result" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "acts, says",
    [
        ("", "wrote no weights"),
        ("os.symlink('/etc/passwd', os.environ['AUTORESEARCH_WEIGHTS'])", "are no file"),
        ("os.mkfifo(os.environ['AUTORESEARCH_WEIGHTS'])", "are no file"),
        ("open(os.environ['AUTORESEARCH_WEIGHTS'], 'w').write('nonsense')", "in a fresh process"),
    ],
)
def test_weights_that_are_none_are_not_scored(autoresearch, house, acts, says):
    end = "send(event='stop', num_steps=1, tokens=1, peak_memory_mb=1.0); time.sleep(60)"
    trainer = hostile(house, f"send(**start); launcher.recv(1)\n{acts}\n{end}")
    done = autoresearch("run", "--budget", "20", "--trainer", trainer)
    [row] = Ledger(house / "results.tsv").rows()
    assert not row.scored and says in row.reason and "Traceback" not in done.stderr, row.reason


def test_a_flood_of_events_does_not_hide_the_limits(house, monkeypatch):
    flood = "send(**start)\nlog = dict(event='log', step=1, loss=1.0, smooth=1.0, tokens=1, elapsed=1.0, "
    flood += "tokens_per_s=1.0, mfu=1.0)\nwhile True: send(**log)"
    monkeypatch.setattr(child, "GRACE", 0.5)
    monkeypatch.setattr(child, "ScoringPair", Scorers)
    setting = replace(resolve("cpu"), budget=0.5)
    outcome = supervise(hostile(house, flood), RunDir(house), setting, 1, Watch("cpu"), lambda event: None)
    assert outcome.status == "timeout" and "the loop does not end" in outcome.reason
    assert outcome.total_seconds < 30


@pytest.mark.parametrize("act", ["print('x' * 2**16)", "send(**start)"])
def test_what_a_trainer_prints_and_sends_has_a_limit(house, monkeypatch, act):
    monkeypatch.setattr(child, "LONGEST_LOG", 10**6)
    trainer = hostile(house, f"while True: {act}; time.sleep(0.001)")
    run = RunDir(house)
    outcome = supervise(trainer, run, resolve("cpu"), 1, Watch("cpu"), lambda event: None)
    assert (outcome.status, outcome.reason) == (
        "crash",
        "the trainer and its model printed more than 1,000,000 bytes",
    )


@pytest.mark.parametrize("event", ["event='error', kind='oom'", "event='invalid'"])
def test_a_trainer_that_says_what_failed_may_still_print_it(house, event):
    acts = f"send({event}, message='out of memory')\ntime.sleep(1.5)"
    acts += "\nprint('the traceback')\nsys.exit(3)"
    run = RunDir(house)
    outcome = supervise(hostile(house, acts), run, resolve("cpu"), 1, Watch("cpu"), lambda event: None)
    assert outcome.reason == "out of memory" and outcome.exit_code == 3
    assert "the traceback" in run.log.read_text()


@pytest.fixture
def small_disk(house, monkeypatch):
    """A disk of 100 MB, on which only files named fill* take space. Half of what is free must stay so."""

    def free(folder):
        files = [path for path in paths_below(house.parent) if path.name.startswith("fill")]
        return 100_000_000 - sum(path.stat().st_size for path in files)

    monkeypatch.setattr("launcher.disk_space.free_bytes", free)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(house / "code"))
    return house


@pytest.mark.parametrize("place", ["TMPDIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_a_trainer_that_fills_the_disk_is_ended(small_disk, place):
    acts = f"""
place = os.environ['{place}']
with open(place + '/part', 'wb') as file: file.write(b'x' * 60_000_000)
os.rename(place + '/part', place + '/fill')  # it takes space from here on, all of it at once
time.sleep(60)
"""
    trainer = hostile(small_disk, acts)
    run = RunDir(small_disk)
    outcome = supervise(trainer, run, resolve("cpu"), 1, Watch("cpu"), lambda event: None)
    assert outcome.status == "crash"
    assert re.match(r"the run wrote \d+ MB, and 40 MB are free on the disk: write no", outcome.reason)


def test_compiling_late_is_no_excuse_to_fill_the_disk(small_disk):
    """A start may take longer as long as new code is compiled. Here the files are that code."""
    setting = resolve("cpu")
    setting = replace(setting, platform=replace(setting.platform, startup_seconds=2.0))
    acts = "for n in range(60):\n    open(os.environ['TORCHINDUCTOR_CACHE_DIR'] + f'/fill{n}', 'wb')"
    acts += ".write(b'x' * 4_000_000)\n    time.sleep(0.4)"
    trainer = hostile(small_disk, acts)
    outcome = supervise(trainer, RunDir(small_disk), setting, 1, Watch("cpu"), lambda event: None)
    assert outcome.status == "crash" and outcome.reason.startswith("the run wrote")
    assert outcome.total_seconds > 2.0


def test_a_disk_that_others_fill_is_not_held_against_a_trainer(small_disk):
    trainer = hostile(small_disk, "time.sleep(4); sys.exit(7)")

    def fill(event):
        (small_disk.parent / "fill").write_bytes(b"x" * 60_000_000)

    outcome = supervise(trainer, RunDir(small_disk), resolve("cpu"), 1, Watch("cpu"), fill)
    assert "exited with code 7" in outcome.reason


def test_what_is_done_when_the_training_begins_gives_a_run_no_time(house, monkeypatch):
    """The loop starts an agent then. The longest step may be late, and this was taken for one."""
    acts = """
send(**start); launcher.recv(1)
end = time.time() + 0.5 + 2.6
while time.time() < end:
    send(event='log', step=1, loss=1.0, smooth=1.0, tokens=1, elapsed=1.0, tokens_per_s=1.0, mfu=1.0)
    time.sleep(0.05)
open(os.environ['AUTORESEARCH_WEIGHTS'], 'w').write('nonsense')
send(event='stop', num_steps=1, tokens=1, peak_memory_mb=1.0); time.sleep(60)
"""

    monkeypatch.setattr(child.Watch, "findings", lambda self: [])

    def slow(event):
        time.sleep(1.8 * isinstance(event, Start))

    setting = replace(resolve("cpu"), budget=0.5)
    outcome = supervise(hostile(house, acts), RunDir(house), setting, 1, Watch("cpu"), slow)
    assert outcome.status == "invalid" and "more than its budget" in outcome.reason


# --- Limits that know the machine ---------------------------------------------------------------------------


QUIET: list = []
BUSY = [(Flag.CONTENDED, "a browser computes")]


class Scorers(ExitStack):
    """Stand in for the processes that score: they are ready at once, and find no model."""

    def __init__(self, job):
        super().__init__()
        self.pids = (os.getpid(), os.getpid())

    def wait_until_ready(self, seconds, on_event):
        pass

    def compare_shapes(self, trained):
        pass

    def score(self, weights, num_rows, seconds, on_event):
        raise NotScored("crash", "there is no model")


@pytest.fixture
def limited(house, monkeypatch):
    """Run a trainer under small limits on a machine that does what `found` says; return the outcome."""
    monkeypatch.setattr(child, "ScoringPair", Scorers)

    def run(acts, found=QUIET, budget=1.0, **limits):
        monkeypatch.setattr(child.Watch, "findings", lambda self: found)
        setting = resolve("cpu", budget=budget)
        setting = replace(setting, platform=replace(setting.platform, **limits))
        trainer = hostile(house, acts)
        return supervise(trainer, RunDir(house), setting, 1, Watch("cpu"), lambda event: None)

    return run


COMPILES = """
for i in range({writes}):
    folder = os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "kernel" + str(i))
    os.makedirs(folder, exist_ok=True)
    open(os.path.join(folder, "main.so"), "w").close()
    time.sleep(0.25)
send(event="invalid", message="compiled")
"""


def test_a_start_goes_on_as_long_as_it_compiles(limited):
    outcome = limited(COMPILES.format(writes=28), startup_seconds=4.0)
    assert (outcome.status, outcome.reason) == ("invalid", "compiled") and outcome.total_seconds > 7


def test_a_start_that_makes_no_progress_has_a_limit(limited, monkeypatch):
    monkeypatch.setattr(child.compiled, "changed_since", lambda *asked: {})
    outcome = limited("time.sleep(60)", startup_seconds=1.0)
    assert outcome.status == "timeout" and "no exp.start within 1 s" in outcome.reason
    assert outcome.total_seconds < 20 and outcome.findings == []


def test_a_start_that_compiles_for_ever_is_ended_all_the_same(limited, monkeypatch):
    monkeypatch.setattr(child, "MOST_STARTUP", 2.0)
    outcome = limited(COMPILES.format(writes=400), startup_seconds=1.0)
    assert outcome.status == "timeout" and outcome.total_seconds < 20


def test_what_a_start_that_was_broken_off_wrote_in_part_is_not_loaded_later(limited, monkeypatch):
    """A compiler that was killed leaves half a library, and no later run could load it."""
    moments = []
    monkeypatch.setattr(child.compiled, "changed_since", lambda *asked: {})
    monkeypatch.setattr(child.compiled, "remove_since", moments.append)
    began = time.time()
    assert limited("time.sleep(60)", startup_seconds=1.0).status == "timeout"
    ended = time.time()
    limited(STEPS.format(steps=1, seconds=0.1))  # of what was compiled before the rows came, all stays
    assert began <= moments[0] + child.TORN_SECONDS <= ended <= moments[1]


def test_a_start_that_was_disturbed_says_by_what(limited, monkeypatch):
    monkeypatch.setattr(child.compiled, "changed_since", lambda *asked: {})
    outcome = limited("time.sleep(60)", found=BUSY, startup_seconds=1.0)
    assert outcome.status == "timeout" and outcome.findings == BUSY


STEPS = """
send(**start); launcher.recv(1)
began = time.monotonic()
log = dict(event="log", loss=1.0, smooth=1.0, tokens=1, elapsed=1.0, tokens_per_s=1.0, mfu=1.0)
for step in range({steps}):
    time.sleep({seconds}); send(step=step, **log)
open(os.environ["AUTORESEARCH_WEIGHTS"], "w").write("nonsense")
send(event="stop", num_steps={steps}, tokens=1, peak_memory_mb=1.0); time.sleep(60)
"""


def test_the_last_step_of_a_slow_machine_may_be_long(limited):
    """It takes 4 s and ends 3.5 s after the budget: the weights are scored."""
    outcome = limited(STEPS.format(steps=1, seconds=4.0), budget=0.5)
    assert outcome.training_seconds > 4 and outcome.reason == "there is no model"


def test_a_step_that_is_long_beside_those_of_the_first_run_is_not(limited, monkeypatch):
    first = Row(training_seconds=10.0, num_steps=100)
    monkeypatch.setattr(child, "first_run", lambda board: first)
    acts = STEPS.format(steps=1, seconds=4.0)
    outcome = limited(acts, budget=0.5)
    assert outcome.status == "invalid" and "more than its budget" in outcome.reason
    outcome = limited(acts, found=BUSY, budget=0.5)  # there it is the machine's
    assert outcome.status == "timeout" and outcome.findings == []  # the watch of the training has them


def test_a_slow_machine_is_not_excused_for_a_clock_that_was_turned_back(limited, monkeypatch):
    """Nine seconds more in steps of 0.1 s, while others compute."""
    outcome = limited(STEPS.format(steps=80, seconds=0.1), found=BUSY)
    assert outcome.status == "invalid" and "more than its budget" in outcome.reason


def test_the_grace_follows_the_steps(limited, monkeypatch):
    monkeypatch.setattr(child, "GRACE", 0.5)
    outcome = limited(STEPS.format(steps=2, seconds=2.0), budget=2.5)  # its end is 1.5 s late
    assert outcome.training_seconds > 4 and outcome.reason == "there is no model"


@pytest.mark.parametrize("found", [QUIET, BUSY])
def test_scoring_that_was_disturbed_says_by_what(limited, monkeypatch, found):
    def score(self, *asked):
        raise NotScored("timeout", "scoring took over 1 s")

    monkeypatch.setattr(Scorers, "score", score)
    outcome = limited(STEPS.format(steps=1, seconds=0.1), found=found)
    assert outcome.status == "timeout" and outcome.findings == found


def test_a_slow_machine_has_longer_to_score(house):
    setting = resolve("cpu")
    usual = setting.platform.score_seconds
    assert child.scoring_seconds(setting, 1e6) == usual
    assert child.scoring_seconds(setting, setting.val_tokens / usual) == 4 * usual
    assert child.scoring_seconds(setting, 0.001) == child.MOST_SCORING * usual
    assert child.scoring_seconds(setting, 0.0) == usual


@pytest.mark.skipif(not guard.LINUX, reason="this system has no parent-death signal")
def test_a_trainer_whose_guard_is_killed_dies_and_has_no_score(house):
    trainer = hostile(house, "print(os.getpid(), os.getppid(), flush=True); time.sleep(600)")
    run = RunDir(house)

    def kill_guard(event):
        pids = [int(word) for word in run.log.read_text().split()]
        if pids and psutil.pid_exists(pids[1]):
            os.kill(pids[1], signal.SIGKILL)

    outcome = supervise(trainer, run, resolve("cpu"), 1, Watch("cpu"), kill_guard)
    assert (outcome.status, outcome.exit_code) == ("invalid", -signal.SIGKILL)
    assert "could not be ended" in outcome.reason
    assert not processes_of(run.run_id)


def test_what_a_child_sends_last_is_read(house):
    """It ends while the launcher is busy elsewhere: the socket still holds its word."""
    trainer = hostile(house, "time.sleep(0.6); send(event='invalid', message='my last word')")

    def busy(event):
        time.sleep(0.4)

    outcome = supervise(trainer, RunDir(house), resolve("cpu"), 1, Watch("cpu"), busy)
    assert (outcome.status, outcome.reason) == ("invalid", "my last word")


def test_a_trainer_that_deletes_its_folder_is_a_crash(autoresearch, house):
    (house / "wipes.py").write_text(
        "import os, shutil, sys\n"
        "shutil.rmtree(os.path.dirname(os.environ['AUTORESEARCH_WEIGHTS']), ignore_errors=True)\n"
        "sys.exit(3)"
    )
    done = autoresearch("run", "--budget", "20", "--trainer", house / "wipes.py")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    [row] = Ledger(house / "results.tsv").rows()
    assert row.status == "crash" and row.reason == "the trainer exited with code 3: it printed nothing"
