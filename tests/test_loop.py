"""The night: real agents that are scripts, in a real repository; only the training is made up."""

import contextlib
import json
import os
import platform
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest
from conftest import edit, wait_for_line

from backends.protocol import IN_LOOP_VARIABLE
from launcher import run as runner
from launcher import verdict
from launcher.harness import git_output
from launcher.ledger import EVIDENCE, Flag, Ledger
from launcher.runs import home
from launcher.setting import resolve
from launcher.verdict import tried_since_moved
from night import failures, loop, plan, repo, trial
from night.agent import Answer
from night.agents import Agent
from night.loop import run_night
from night.panel import RunDetail
from night.plan import Night, parse_until
from night.repo import git_checked
from night.state import Edit, LoopState, read_state, state_path, write_state
from prepare import ROOT, UserError

SCRIPT = """
import os, re, subprocess, sys, time
from pathlib import Path

trainer = Path("train_cuda.py")
"""
PAUSE = 7.0  # seconds; no other sleep is that long
CHECK_AGENT = loop.Loop.check_agent  # before a fixture replaces it


@pytest.fixture
def night(repository, monkeypatch):
    """night(agent's Python, ...) -> exit code. Pauses are collected in night.pauses instead of waited for."""
    pauses = []
    really_sleep = time.sleep

    def sleep(seconds):
        if seconds >= PAUSE:
            pauses.append(round(seconds))
        else:
            really_sleep(seconds)

    def rest(seconds, is_over):
        if not is_over():
            pauses.append(round(seconds))

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(loop, "rest", rest)
    monkeypatch.setattr(loop.Loop, "check_agent", lambda self: None)
    monkeypatch.setattr(
        "launcher.belief.SURPRISING", 1e9
    )  # made-up scores differ by a hundred times too much

    def night(agent, experiments=2, arguments=(), **more):
        monkeypatch.setenv("LOOP", str(os.getpid()))
        script = home() / "agent.py"
        script.write_text(SCRIPT + agent)
        agent = Agent(Path(sys.executable).name, [sys.executable, str(script), *arguments])
        return run_night(Night(agent, resolve(), experiments=experiments, pause=PAUSE, **more))

    night.pauses = pauses
    return night


def rows():
    return Ledger(home() / "results.tsv").rows()


def recorded(event):
    lines = (home() / "runs" / "loop" / "loop.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def last_prompt():
    prompts = (home() / "runs" / "loop").glob("*.prompt.md")
    return max(prompts, key=lambda path: path.stat().st_mtime_ns).read_text()


def subjects():
    return git_output("log", "--format=%s").splitlines()


def leftover_refs():
    return git_output("for-each-ref", "--format=%(refname)", "refs/autoresearch/stash/").splitlines()


def trainer_text(root):
    return (root / "train_cuda.py").read_text()


BETTER = """
prompt = sys.stdin.read()
score = float(re.search(r"SCORE = ([\\d.]+)", trainer.read_text())[1])
trainer.write_text(f"SCORE = {score - 0.1:.1f}\\n")
print("I thought about it.\\n\\n**experiment: a tenth better than " + str(score) + "**")
"""


# --- The turns ----------------------------------------------------------------------------------------------


def test_every_turn_is_an_experiment(night, repository, capsys):
    assert night(BETTER, 4) == 0
    assert [(row.description, row.status, row.val_bpb) for row in rows()] == [
        ("baseline: the trainer as committed", "keep", 1.5),
        ("a tenth better than 1.5", "keep", 1.4),
        ("a tenth better than 1.4", "keep", 1.3),
        ("a tenth better than 1.3", "keep", 1.2),
    ]
    better = ["a tenth better than 1.3", "a tenth better than 1.4", "a tenth better than 1.5"]
    assert subjects() == [*better, "start"]
    out = capsys.readouterr().out
    assert (
        "experiments: 3\nkept: 3\ndiscarded: 0\nfailed: 0\nbaselines: 1\n" in out
        and "best_val_bpb: 1.200000" in out
    )
    assert "ended: 4 experiments were asked for, the baseline included\n" in out
    assert f"branch: {git_output('branch', '--show-current')} at {repo.head()[:7]}\n" in out
    prompt = last_prompt()
    assert "trainer: train_cuda.py" in prompt and "a tenth better than 1.4" in prompt
    assert "## Last result" in prompt and "val_bpb: 1.300000" in prompt
    assert not state_path().exists() and git_checked("status", "--porcelain") == ""


def test_what_holds_for_all_experiments_is_said_once(night, repository, capsys):
    assert night(BETTER, 3) == 0
    said = capsys.readouterr().err.splitlines()
    settings = [line for line in said if line.startswith("platform cpu (")]
    assert len(settings) == 1 and "track tiny, 300 s of training" in settings[0]
    assert len([line for line in said if re.fullmatch(r"run \S+: seed 1", line)]) == 3
    warnings = [line for line in said if line.startswith("warning: ")]
    assert len(warnings) == len(set(warnings))


def test_worse_ideas_are_reverted_and_the_agent_hears_of_it(night, repository):
    agent = """
result = sys.stdin.read().split("## Last result")[1]
again = result.startswith("\\n\\nworse\\nstatus: discard")
trainer.write_text("SCORE = 1.9  # " + ("again" if again else "first"))
print("experiment: worse")
"""
    assert night(agent, 3) == 0
    assert [row.status for row in rows()] == ["keep", "discard", "discard"]
    assert trainer_text(repository) == "SCORE = 1.5\n" and subjects() == ["start"]


def test_the_prompt_may_be_an_argument(night, repository):
    agent = """
assert sys.stdin.read() == "" and "## This turn" in sys.argv[1]
trainer.write_text("SCORE = 1.2\\n")
print("did it")
"""
    assert night(agent, 2, ["{prompt}"]) == 0
    assert rows()[-1].description == "did it"


def test_what_a_crash_prints_reaches_the_agent_whatever_it_is(night, repository, monkeypatch):
    """A NUL cannot be in an argument, and braces must not be taken for fields of the prompt."""
    monkeypatch.setattr("backends.protocol.RunDir.log_tail", lambda run: "a \0 b {braces}")
    agent = """
result = sys.argv[1].split("## Last result")[1]
crashed = "status: crash" in result
assert not crashed or "a   b {braces}" in result
trainer.write_text("SCORE = 1.4" if crashed else "CRASH")
print("experiment: crash, then better")
"""
    assert night(agent, 3, ["{prompt}"]) == 0
    assert [row.status for row in rows()] == ["keep", "crash", "keep"]


def test_what_lay_in_the_trainer_is_tried_first(night, repository):
    edit(repository, "SCORE = 1.45\n")
    assert night(BETTER, 2) == 0
    descriptions = [row.description for row in rows()]
    assert descriptions == [
        "baseline: the trainer as committed",
        "what lay in the trainer, uncommitted",
    ]
    assert trainer_text(repository) == "SCORE = 1.45\n"


# --- Turns that fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "agent, says",
    [
        ("trainer.write_text('half an edit'); sys.exit('no network')", "exit code 1: no network"),
        ("trainer.write_text('half an edit'); time.sleep(60)", "did not end within 2 s"),
        ("print('I only looked')", "changed nothing in train_cuda.py"),
        ("trainer.unlink()", "left no plain file train_cuda.py"),
        ("trainer.unlink(); trainer.mkdir(); (trainer / 'x').touch()", "left no plain file train_cuda.py"),
        ("trainer.unlink(); trainer.symlink_to('train_mlx.py')", "left no plain file train_cuda.py"),
    ],
)
def test_an_agent_that_fails_is_retried_with_growing_pauses(
    night, repository, monkeypatch, agent, says, capsys
):
    monkeypatch.setattr(failures, "MOST", 4)
    assert night(agent, 2, agent_seconds=2.0) == 1
    failed = recorded("failed")
    assert night.pauses == [7, 14, 28] and len(failed) == 4
    assert all(says in entry["reason"] and entry["kind"] == "agent" for entry in failed)
    assert "gave up after 4 turns" in capsys.readouterr().out
    assert trainer_text(repository) == "SCORE = 1.5\n" and len(rows()) == 1


def test_after_the_network_came_back_the_night_goes_on(night, repository):
    agent = f"""
counter = Path({str(home())!r}) / "tries"
tries = int(counter.read_text()) if counter.exists() else 0
counter.write_text(str(tries + 1))
if tries < 3:
    sys.exit("no network")
"""
    assert night(agent + BETTER, 3) == 0
    assert len(rows()) == 3 and night.pauses == [7, 14, 28]


def test_bad_edits_come_back_at_once_and_are_recorded(night, repository):
    agent = """
prompt = sys.stdin.read()
if "No experiment came" not in prompt:
    trainer.write_text("def broken(:")
elif "does not compile: line" in prompt:
    trainer.write_text("SCORE = 1  # NODRY")
elif "the tail" in prompt:
    trainer.write_text("SCORE = 1.4")
print("experiment: an edit")
"""
    assert night(agent, 2) == 0
    assert not night.pauses and [entry["kind"] for entry in recorded("failed")] == ["edit", "edit"]
    dry = rows()[1]
    assert (dry.status, dry.reason, dry.flags) == ("crash", "dry run: bad", {Flag.DRY})
    assert git_output("show", f"refs/autoresearch/{dry.run}:inner/train_cuda.py") == "SCORE = 1  # NODRY"
    assert rows()[-1].val_bpb == 1.4


def test_an_idea_that_was_scored_is_not_run_again(night, repository, monkeypatch):
    monkeypatch.setattr(failures, "MOST", 2)
    assert night("trainer.write_text('SCORE = 1.8')\nprint('experiment: the same')", 9) == 1
    assert len(rows()) == 2 and "the same source was scored by run" in recorded("failed")[0]["reason"]


def test_an_edit_of_a_person_that_fails_is_stashed_under_a_ref_that_is_named(night, repository, capsys):
    assert night(BETTER, 1) == 0
    edit(repository, "def broken(:\n")
    assert night(BETTER, 1) == 0
    [ref] = leftover_refs()
    said = capsys.readouterr().err
    assert (
        f"stashed «what lay in the trainer, uncommitted»: it stays in train_cuda.py, and as {ref}\n" in said
    )
    assert git_output("show", f"{ref}:inner/train_cuda.py") == "def broken(:"
    assert trainer_text(repository) == "def broken(:\n"


def test_an_edit_keeps_its_description_when_an_error_comes_between(night, repository, monkeypatch):
    """Then its turn starts again without the agent."""
    fails = iter([OSError("no space"), UserError("git is busy"), None, None])
    really_run = loop.dry_run

    def dry_run(*arguments):
        error = next(fails)
        if error:
            raise error
        return really_run(*arguments)

    monkeypatch.setattr(loop, "dry_run", dry_run)
    assert night(BETTER, 2) == 0
    assert [row.description for row in rows()][1:] == ["a tenth better than 1.5"]
    assert len(recorded("failed")) == 2


@pytest.mark.parametrize("where", ["before the run", "after the run"])
def test_a_trial_that_an_error_left_open_is_finished_by_the_next_turn(
    night, repository, monkeypatch, capsys, where
):
    """A full disk, or a lock of git that stays: with a verdict, the trial is the next experiment."""
    assert night(BETTER, 1) == 0
    start = repo.head()
    name = "run_source" if where == "before the run" else "advance_branch"
    where_it_lies = trial if where == "before the run" else repo
    really = getattr(where_it_lies, name)
    fails = iter([True])

    def failing(*arguments):
        if next(fails, False):
            raise OSError("no space left on device")
        return really(*arguments)

    monkeypatch.setattr(where_it_lies, name, failing)
    assert night(BETTER, 1) == 0
    assert [row.val_bpb for row in rows()] == [1.5, 1.4] and rows()[
        1
    ].description == "a tenth better than 1.5"
    assert night.pauses == [7] and git_output("rev-parse", "HEAD~1") == start
    assert "the trial of «a tenth better than 1.5» was cut off" in capsys.readouterr().err
    assert [entry["description"] for entry in recorded("experiment")][1:] == ["a tenth better than 1.5"]
    assert not trial.journal().exists() and git_checked("status", "--porcelain") == ""


def test_a_busy_device_is_waited_for_and_after_three_runs_the_night_ends(
    night, repository, monkeypatch, capsys
):
    waited = []
    monkeypatch.setattr(loop, "require_quiet", lambda kind, when, **more: waited.append(when))
    agent = "trainer.write_text('SCORE = 1.0  # BUSY')\nprint('experiment: while others compute')"
    assert night(agent, 2) == 1
    assert [row.marks for row in rows()] == ["", "contended", "contended", "contended"]
    assert trainer_text(repository) == "SCORE = 1.5\n"
    stashed = git_output("show", f"refs/autoresearch/{rows()[-1].run}:inner/train_cuda.py")
    assert stashed == "SCORE = 1.0  # BUSY" and waited == ["wait", "wait"]
    assert "3 times without a verdict: no verdict: other processes used 90%" in capsys.readouterr().out


def test_a_change_to_what_a_run_reads_is_told_before_an_agent_is_called(night, repository, monkeypatch):
    assert night(BETTER, 1) == 0
    (repository / "prepare.py").write_text("RULES = 2\n")
    with pytest.raises(UserError, match=r"only train_cuda.py may change, but prepare.py"):
        night("Path('called').touch()", 2)
    assert not (repository / "called").exists() and len(rows()) == 1


def test_a_change_to_what_a_run_reads_is_waited_out(night, repository, monkeypatch):
    """A person saves a file, and undoes it an hour later."""
    really = loop.check_harness
    calls = []

    def check_harness(trainer):
        calls.append(trainer)
        (repository / "prepare.py").write_text("RULES = 2\n" if 1 < len(calls) < 8 else "RULES = 1\n")
        really(trainer)

    monkeypatch.setattr(loop, "check_harness", check_harness)
    assert night(BETTER, 2) == 0
    assert [entry["kind"] for entry in recorded("failed")] == ["harness"] * 6 and len(rows()) == 2
    assert night.pauses == [7, 14, 28, 56, 112, 224]


# --- What an agent does elsewhere ---------------------------------------------------------------------------


def test_what_an_agent_does_elsewhere_happens_in_its_own_folder(night, repository):
    """The person's files stay as they are, the unsaved and the staged ones too."""
    (repository / "README.md").write_text("the person's own edit\n")
    (repository / "new.txt").write_text("staged\n")
    git_checked("add", "new.txt")
    before = git_checked("status", "--porcelain")
    agent = """
trainer.write_text("SCORE = 1.3\\n")
Path("prepare.py").write_text("RULES = 0\\n")
Path("README.md").write_text("by the agent\\n")
Path("launcher").mkdir(exist_ok=True)
Path("launcher/helper.py").write_text("1\\n")
Path("train_mlx.py").unlink()
subprocess.run(["git", "add", "-A"], check=True)
subprocess.run(["git", "config", "core.bare", "true"], check=True)
print("experiment: elsewhere too")
"""
    assert night(agent, 2) == 0
    assert (repository / "prepare.py").read_text() == "RULES = 1\n"
    assert (repository / "README.md").read_text() == "the person's own edit\n"
    assert (repository / "train_mlx.py").exists()
    assert not (repository / "launcher" / "helper.py").exists()
    assert rows()[-1].val_bpb == 1.3
    assert git_output("show", "--format=", "--name-only", "HEAD").split() == ["inner/train_cuda.py"]
    assert git_checked("status", "--porcelain") == before


def test_what_an_agent_commits_stays_in_its_own_folder(night, repository):
    agent = """
trainer.write_text("SCORE = 1.3\\n")
git = lambda *a: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *a], check=True)
git("checkout", "-q", "-b", "agents")
git("commit", "-qam", "mine")
print("experiment: committed it myself")
"""
    assert night(agent, 2) == 0
    assert repo.branch() == "refs/heads/main" and subjects() == ["committed it myself", "start"]
    assert git_output("for-each-ref", "--format=%(refname)", "refs/heads") == "refs/heads/main"
    assert git_checked("status", "--porcelain") == ""


def test_a_fault_of_ours_ends_the_night_after_three_turns_with_its_traceback_on_record(
    night, repository, monkeypatch, capsys
):
    def fail(*arguments):
        raise ZeroDivisionError("ours")

    assert night(BETTER, 1) == 0
    monkeypatch.setattr(loop, "write_turn", fail)
    assert night(BETTER, 9) == 1
    assert "gave up after 3 turns without an experiment in a row: ours" in capsys.readouterr().out
    failed = recorded("failed")
    assert [entry["kind"] for entry in failed] == ["launcher"] * 3
    assert "ZeroDivisionError" in failed[0]["traceback"][-1] and sum(night.pauses) < 60


def test_what_waiting_does_not_mend_ends_the_night_within_a_minute(night, repository, monkeypatch, capsys):
    """A full disk, a lock: not the agent's fault."""
    assert night(BETTER, 1) == 0

    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(loop, "write_turn", fail)
    assert night(BETTER, 9) == 1
    assert sum(night.pauses) < 60 and len(recorded("failed")) == 3
    assert "gave up after 3 turns" in capsys.readouterr().out


def test_nothing_that_an_agent_starts_outlives_its_turn(night, repository):
    agent = """
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleeper, start_new_session=True)
Path(os.environ["AUTORESEARCH_HOME"], "pid").write_text(str(child.pid))
trainer.write_text("SCORE = 1.3\\n")
print("experiment: with a helper")
"""
    assert night(agent, 2) == 0
    pid = int((home() / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- Cut off, interrupted, limited --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["agent", "training"])
def test_a_loop_that_was_killed_goes_on(night, repository, where, capsys):
    """Killed while the agent was writing, or in the middle of a run: the same command goes on."""
    deadly = """
trainer.write_text("half an ed")
Path("prepare.py").write_text("torn")
os.kill(int(os.environ["LOOP"]), 9)
time.sleep(60)
"""
    if where == "training":
        deadly = "trainer.write_text('SCORE = 1.0  # DIE')\nprint('experiment: the fatal one')\n"
    child = os.fork()
    if child == 0:
        night(deadly, 3)
        os._exit(0)
    os.waitpid(child, 0)
    assert state_path().exists() and len(rows()) == 1
    if where == "training":
        edit(repository, "SCORE = 1.05\n")
    assert night(BETTER, 3) == 0
    said = capsys.readouterr().err
    assert "going on with a loop that was cut off after 1 experiments" in said
    scored = [row.val_bpb for row in rows() if row.scored]
    assert scored == ([1.5, 1.4, 1.3] if where == "agent" else [1.5, 1.05, 1.0])
    assert (repository / "prepare.py").read_text() == "RULES = 1\n"


def test_an_agent_that_outlived_a_killed_loop_edits_no_further(night, repository):
    """Its guard was killed with the loop."""
    deadly = """
guard = os.getppid()
if os.fork():
    time.sleep(60)
Path(os.environ["AUTORESEARCH_HOME"], "pid").write_text(str(os.getpid()))
os.kill(guard, 9)
os.kill(int(os.environ["LOOP"]), 9)
while True:
    Path("prepare.py").write_text(str(time.time()))
    time.sleep(0.01)
"""
    child = os.fork()
    if child == 0:
        night(deadly, 3)
        os._exit(0)
    os.waitpid(child, 0)
    pid = int((home() / "pid").read_text())
    try:
        assert psutil.pid_exists(pid)
        assert night(BETTER, 3) == 0
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert (repository / "prepare.py").read_text() == "RULES = 1\n"
    assert [row.val_bpb for row in rows()] == [1.5, 1.4, 1.3]


def test_a_row_of_verify_is_no_last_result(night, repository):
    assert night(BETTER, 1) == 0
    Ledger(home() / "results.tsv").append(replace(rows()[0], status="verified", description="verified it"))
    assert night(BETTER, 1) == 0
    result = last_prompt().split("## Last result")[1]
    assert result.strip().startswith("baseline: the trainer as committed") and "val_bpb: 1.500000" in result


def test_only_the_agent_is_told_that_it_is_in_a_loop(night, repository, monkeypatch):
    really_run = trial.run_experiment

    def run_experiment(request):
        assert IN_LOOP_VARIABLE not in os.environ
        return really_run(request)

    monkeypatch.setattr(trial, "run_experiment", run_experiment)
    knows = f"assert os.environ[{IN_LOOP_VARIABLE!r}] and os.environ['AUTORESEARCH_TRACK'] == 'tiny'"
    assert night(knows + BETTER, 2) == 0
    assert len(rows()) == 2


def test_ctrl_c_during_a_run_leaves_order(night, repository, capsys):
    agent = "trainer.write_text('SCORE = 1.0  # STOP')\nprint('experiment: stopped')"
    assert night(agent, 5) == 130
    assert Flag.INTERRUPTED in rows()[-1].flags and not trial.journal().exists()
    captured = capsys.readouterr()
    assert "ended: interrupted" in captured.out and "the next loop tries it first" in captured.err
    assert git_output("for-each-ref", "refs/autoresearch/")
    assert night("sys.exit('not asked')", 1) == 0  # the edit without a verdict comes first, under its name
    last = rows()[-1]
    assert (last.description, last.status, last.val_bpb) == ("stopped", "keep", 1.0)
    assert not state_path().exists()


@pytest.mark.parametrize(
    "damaged", ["", "[]", "null", '{"edit": 1}', '{"done": "x"}', '{"edit": {"commit": "HEAD"}}', "[" * 99999]
)
def test_a_damaged_state_is_no_state(night, repository, damaged):
    state_path().write_text(damaged)
    assert night(BETTER, 1) == 0
    assert not state_path().exists()


def test_an_edit_without_a_verdict_is_put_on_what_the_branch_has_then(night, repository, capsys):
    """The loop was killed, and a person committed meanwhile."""
    text = "FIRST = 1\n# far\n# from\n# it\nSCORE = 1.5\n"
    commit_trainer(repository, text)
    agent = "trainer.write_text(trainer.read_text().replace('1.5', '1.2  # STOP'))\nprint('experiment: mine')"
    assert night(agent, 2) == 130
    commit_trainer(repository, text.replace("FIRST = 1", "FIRST = 2"))
    assert night("sys.exit('not asked')", 3) == 130  # the merged source is stopped once, too
    assert night("sys.exit('not asked')", 1) == 0
    assert rows()[-1].description == "mine" and rows()[-1].val_bpb == 1.2
    assert trainer_text(repository) == text.replace("FIRST = 1", "FIRST = 2").replace("1.5", "1.2  # STOP")


def commit_trainer(root, text):
    edit(root, text)
    git_checked("-c", "user.name=me", "-c", "user.email=me@here", "commit", "-qam", "by a person")


def test_until(night, repository, capsys):
    assert parse_until("00:00") > datetime.now()
    assert parse_until("23:59") - datetime.now() < timedelta(days=1)
    for text in ("25:00", "soon", "7"):
        with pytest.raises(UserError, match="is not a time of day"):
            parse_until(text)
    assert night(BETTER, None, until=datetime.now() + timedelta(seconds=60)) == 0  # five minutes do not fit
    assert not rows() and "another experiment would not end by" in capsys.readouterr().out


@pytest.fixture
def clock(monkeypatch):
    """clock.left: the seconds until the night ends. A pause takes its time."""

    class Clock:
        left = 1000.0

    def wait(self, seconds):
        Clock.left -= seconds

    monkeypatch.setattr(Night, "seconds_left", lambda self: Clock.left)
    monkeypatch.setattr(loop.Loop, "wait", wait)
    return Clock


def test_the_agent_has_the_time_that_its_experiment_leaves(night, repository, monkeypatch, clock):
    given = []
    really_begin = loop.begin_turn

    def begin_turn(agent, prompt, base, stamp, seconds, *more):
        given.append(seconds)
        clock.left = 0.0
        return really_begin(agent, prompt, base, stamp, 60.0, *more)

    monkeypatch.setattr(loop, "begin_turn", begin_turn)
    assert night(BETTER, 9, until=datetime.now()) == 0
    assert given == [1000.0 - 310.0]  # as the baseline took


@pytest.mark.parametrize("when", ["the dry run", "a pause"])
def test_no_run_begins_that_would_not_end_in_time(night, repository, monkeypatch, clock, capsys, when):
    if when == "the dry run":
        really_run = loop.dry_run

        def dry_run(*arguments):
            clock.left = 300.0 if rows() else clock.left  # of the edit, not of the baseline
            return really_run(*arguments)

        monkeypatch.setattr(loop, "dry_run", dry_run)
    else:
        clock.left = 316.0  # a run takes 310 s, and a pause 7 s
        monkeypatch.setattr(plan, "SHORTEST_TURN", 5.0)
        assert night(BETTER, 1) == 0
    text = "SCORE = 1.0" if when == "the dry run" else "SCORE = 1.0  # BUSY"
    agent = f"trainer.write_text({text!r})\nprint('experiment: too late')"
    assert night(agent, 9, until=datetime.now()) == 0
    said = capsys.readouterr()
    assert len(rows()) == (1 if when == "the dry run" else 2)
    assert "ended: another experiment would not end by" in said.out
    assert "no verdict yet on «too late»" in said.err and trainer_text(repository) == "SCORE = 1.5\n"
    assert repo.content(read_state().edits[0].commit, "train_cuda.py").decode() == text


def test_a_laptop_on_battery_is_told_before_the_night(night, repository, monkeypatch):
    for state, says in (("on_battery", "battery"), ("low_power_mode", "low-power")):
        monkeypatch.setattr("night.plan.mac_state", lambda state=state: {state: True})
        with pytest.raises(UserError, match=rf"no result of the night would count \({says}\)"):
            night(BETTER)
    assert not rows()


# --- Faults and signals at the bad moment -------------------------------------------------------------------


def send(number):
    os.kill(os.getpid(), number)


def test_a_signal_while_the_page_is_written_ends_the_night(night, repository, monkeypatch, capsys):
    monkeypatch.setattr(loop, "write_report", lambda *asked, **more: send(signal.SIGTERM))
    assert night(BETTER, 9) == 130
    out = capsys.readouterr().out
    assert "ended: interrupted (SIGTERM)" in out and "baselines: 1\n" in out and len(rows()) == 1


@pytest.mark.parametrize("where", ["look_around", "check_agent"])
def test_a_signal_before_the_first_turn_ends_the_night(night, repository, monkeypatch, capsys, where):
    if where == "look_around":
        monkeypatch.setattr(loop, "look_around", lambda *asked: send(signal.SIGINT))
    else:
        monkeypatch.setattr(loop.Loop, "check_agent", CHECK_AGENT)
    assert night("import signal\nos.kill(int(os.environ['LOOP']), signal.SIGINT)\ntime.sleep(60)", 9) == 130
    assert "ended: interrupted (SIGINT)" in capsys.readouterr().out and not rows()
    assert not processes_of_agents()


def processes_of_agents():
    script = str(home() / "agent.py")
    return [p for p in psutil.process_iter(["cmdline"]) if script in (p.info["cmdline"] or [])]


def test_a_signal_after_the_score_leaves_the_experiment_its_verdict(night, repository, monkeypatch, capsys):
    """The belief is computed and the row is written then, which takes seconds."""
    really = verdict.give_verdict

    def give_verdict(rows, row, findings):
        if row.val_bpb == 1.4:
            send(signal.SIGINT)
        really(rows, row, findings)

    monkeypatch.setattr(verdict, "give_verdict", give_verdict)
    assert night(BETTER, 9) == 130
    assert [(row.status, row.val_bpb, row.marks) for row in rows()] == [("keep", 1.5, ""), ("keep", 1.4, "")]
    assert trainer_text(repository) == "SCORE = 1.4\n"
    captured = capsys.readouterr()
    assert "experiments: 1\nkept: 1\n" in captured.out and "no verdict yet" not in captured.err
    assert [entry["val_bpb"] for entry in recorded("experiment")] == [1.5, 1.4]


def test_a_fault_of_ours_in_the_run_is_not_the_edits(night, repository, monkeypatch, capsys):
    assert night(BETTER, 1) == 0
    supervise = runner.supervise

    def fail(*arguments):
        raise RuntimeError("ours")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "supervise", fail)
        assert night(BETTER, 9) == 1
    assert "gave up after 3 turns without an experiment in a row: ours" in capsys.readouterr().out
    assert [row.marks for row in rows()] == ["", "fault", "fault", "fault"]
    assert len(recorded("experiment")) == 1 and trainer_text(repository) == "SCORE = 1.5\n"
    assert runner.supervise is supervise and night("sys.exit('not asked')", 1) == 0
    assert (rows()[-1].description, rows()[-1].status) == ("a tenth better than 1.5", "keep")


def test_a_baseline_that_a_fault_of_ours_cut_off_is_run_again(night, repository, monkeypatch):
    really = runner.supervise
    faults = iter([RuntimeError("ours")])

    def supervise(*arguments):
        fault = next(faults, None)
        if fault:
            raise fault
        return really(*arguments)

    monkeypatch.setattr(runner, "supervise", supervise)
    assert night(BETTER, 2) == 0
    assert [(row.description[:8], row.status) for row in rows()] == [
        ("baseline", "crash"),
        ("baseline", "keep"),
        ("a tenth ", "keep"),
    ]


@pytest.mark.parametrize("what", ["the log", "the state", "the outlook"])
def test_a_fault_at_the_end_of_an_experiment_costs_no_summary(night, repository, monkeypatch, capsys, what):
    """A full disk, or a fault of ours, where an experiment is over."""
    where = {
        "the log": "night.state.append_json_line",
        "the state": "night.loop.write_state",
        "the outlook": "night.loop.visible_change",
    }[what]

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        if what == "the state":
            patch.setattr(loop.Loop, "resume", lambda self: None)
        code = night(BETTER, 2)
    captured = capsys.readouterr()
    assert "ended: " in captured.out and "claim: " in captured.out
    if what == "the log":
        assert code == 0 and [row.val_bpb for row in rows()] == [1.5, 1.4]
        assert "the log of the night lacks «experiment»: " in captured.err
        return
    assert code == 1 and recorded("end") and not trial.journal().exists()
    assert ("gave up after 3" if what == "the state" else "a fault of autoresearch: ") in captured.out


def test_a_git_that_fails_costs_no_edit(night, repository, monkeypatch):
    """It was said that the next loop tries it first."""
    agent = "trainer.write_text('SCORE = 1.2  # STOP')\nprint('experiment: mine')"
    assert night(agent, 9) == 130
    fails = iter([UserError("git is busy")])

    def rebase(edit, name):
        error = next(fails, None)
        if error:
            raise error
        return edit

    monkeypatch.setattr("night.waiting.rebase", rebase)
    assert night("sys.exit('not asked')", 1) == 0
    assert (rows()[-1].description, rows()[-1].val_bpb) == ("mine", 1.2) and len(recorded("failed")) == 1


def test_an_edit_of_a_person_without_a_verdict_stays_in_the_file(night, repository, capsys):
    assert night(BETTER, 1) == 0
    edit(repository, "SCORE = 1.0  # BUSY\n")
    assert night(BETTER, 9) == 1
    assert trainer_text(repository) == "SCORE = 1.0  # BUSY\n"
    assert "it stays in train_cuda.py, and as refs/autoresearch/stash/" in capsys.readouterr().err


def test_the_count_goes_on_after_an_interruption_on_the_same_board_alone(night, repository, capsys):
    agent = "trainer.write_text('SCORE = 1.2  # STOP')\nprint('experiment: mine')"
    assert night(agent, 3) == 130
    assert read_state().done == 1 and read_state().board == resolve().board
    assert night("sys.exit('not asked')", 1) == 0  # another number: another night
    assert [row.val_bpb for row in rows() if row.scored] == [1.5, 1.2] and not state_path().exists()
    capsys.readouterr()
    write_state(replace(LoopState(3, 1), board=resolve(budget=60).board))
    assert night(BETTER, 1) == 0 and "going on" not in capsys.readouterr().err
    write_state(LoopState(None, 57, board=resolve().board))
    assert night(BETTER, None, until=datetime.now() + timedelta(seconds=60)) == 0
    assert "going on" not in capsys.readouterr().err


def test_an_edit_of_another_trainer_is_stashed(night, repository, capsys):
    commit = repo.commit_alone("train_mlx.py", "mine", b"SCORE = 1.0\n")
    edit_of_it = Edit(commit, repo.head(), Answer("mine"))
    write_state(LoopState(trainer="train_mlx.py", edits=(edit_of_it,)))
    assert night(BETTER, 1) == 0
    [ref] = leftover_refs()
    assert f"«mine» is an edit of train_mlx.py: it stays as {ref}" in capsys.readouterr().err


def test_the_last_result_is_of_the_same_board(night, repository):
    assert night(BETTER, 1) == 0
    Ledger(home() / "results.tsv").append(replace(rows()[0], budget=60.0, description="of another night"))
    assert night(BETTER, 1) == 0
    assert last_prompt().split("## Last result")[1].strip().startswith("baseline: the trainer as committed")


def test_before_a_night_any_agent_is_asked_for_a_trivial_edit(night, repository, monkeypatch, capsys):
    monkeypatch.setattr(loop.Loop, "check_agent", CHECK_AGENT)
    with pytest.raises(
        UserError, match=r"--agent python\S* is not ready: the agent ended with exit code 1: no"
    ):
        night("sys.exit('no network')")
    assert not rows() and read_state() == LoopState(2, 0, "", "train_cuda.py", resolve().board)
    assert night(BETTER, 2) == 0
    assert len(rows()) == 2 and len(recorded("turn")) == 3  # its tokens count, too


# --- The real thing -----------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, tiny_cache):
    """This checkout's files in a repository of their own, with the tiny track."""
    root = tmp_path / "checkout"
    for name in files_of_this_checkout():
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes((ROOT / name).read_bytes())
    (root / "platforms.yaml").write_text((tiny_cache / "platforms.yaml").read_text())
    set_constant(root / "train_cuda.py", "UNEMBEDDING_LR", "0.0001")  # there is something to find
    set_constant(root / "launcher" / "device.py", "OTHERS_CPU", "2.0")  # the machine may do other things
    for arguments in ("init -q", "add -A", "-c user.name=me -c user.email=me@here commit -qm start"):
        subprocess.run(["git", "-C", str(root), *arguments.split()], check=True)
    return root


def set_constant(path, name, value):
    text, found = re.subn(rf"^{name} = [\d.]+", f"{name} = {value}", path.read_text(), flags=re.M)
    assert found == 1
    path.write_text(text)


def files_of_this_checkout():
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def command(root, tiny_cache, *arguments):
    """Return the arguments of subprocess.Popen for a command in the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTORESEARCH_")}
    environment["AUTORESEARCH_CACHE"] = str(tiny_cache / "cache")
    environment["TORCHDYNAMO_DISABLE"] = "1"
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return {
        "args": [sys.executable, "-m", "launcher.entry", *map(str, arguments)],
        "cwd": root,
        "env": environment,
        "text": True,
        "stdin": subprocess.DEVNULL,
    }


def climber(*names):
    return " ".join([sys.executable, "tests/agents/climber.py", *names])


@pytest.mark.slow
def test_an_optimizer_over_the_constants_lowers_val_bpb(checkout, tiny_cache):
    options = ("--experiments", 5, "--budget", 3, "--pause", 1)
    call = command(checkout, tiny_cache, "loop", "--agent", climber("UNEMBEDDING_LR"), *options)
    done = subprocess.run(**call, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [row for row in Ledger(checkout / "results.tsv").rows() if row.comparable]
    scored = [row for row in runs if row.judged and not row.flags & EVIDENCE]
    assert len(scored) == 5 and scored[0].description.startswith("baseline")
    best = min(row.val_bpb for row in scored if row.status == "keep")
    assert best < scored[0].val_bpb - 0.01, [(row.description, row.val_bpb) for row in scored]
    log = subprocess.run(["git", "log", "--format=%s"], cwd=checkout, capture_output=True, text=True)
    kept = log.stdout.splitlines()
    expected = [row.description for row in reversed(scored[1:]) if row.status == "keep"]
    assert kept[: kept.index("start")] == expected


@pytest.mark.slow
def test_a_signal_ends_a_real_loop_in_order(checkout, tiny_cache):
    call = command(checkout, tiny_cache, "loop", "--agent", climber(), "--budget", 600)
    process = subprocess.Popen(**call, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for_line(process, "training: baseline")
        wait_for_line(process, "run 2")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and "Traceback" not in err and "ended: interrupted" in out
    [row] = Ledger(checkout / "results.tsv").rows()
    assert Flag.INTERRUPTED in row.flags
    status = subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, text=True)
    assert status.stdout == ""


@pytest.mark.slow
def test_a_terminal_shows_the_night_live(checkout, tiny_cache):
    screen, slave = pty.openpty()
    options = ("--budget", 600, "--experiments", 7)
    call = command(checkout, tiny_cache, "loop", "--agent", climber(), *options)
    process = subprocess.Popen(**call, stdout=subprocess.PIPE, stderr=slave)
    deadline = time.monotonic() + 100

    def read(seconds):  # a terminal that is not read would block the command
        return os.read(screen, 65536) if select.select([screen], [], [], seconds)[0] else b""

    shown = b""
    try:
        while b"tok/s" not in shown and time.monotonic() < deadline:
            shown += read(1.0)
        process.send_signal(signal.SIGINT)
        while process.poll() is None and time.monotonic() < deadline:
            shown += read(0.2)
    finally:
        process.kill()
        out, _ = process.communicate()
        os.close(screen)
        os.close(slave)  # not before: a terminal without an owner answers with an error
    assert process.returncode == 130 and "ended: interrupted" in out
    for part in (
        b"1 of 7: training: baseline",
        b"none yet",
        b"0 kept, 0 discarded",
        b"7 experiments",
        b"step ",
    ):
        assert part in shown, shown[-2000:]


# --- What a night can find, and what may be said of it ------------------------------------------------------


def test_before_a_night_a_line_says_what_it_can_find(night, repository, capsys):
    assert night(BETTER, 3) == 0
    said = capsys.readouterr().err
    assert "noise between seeds 0.000600 (assumed, none is known); a run shows a change of 0.001396" in said
    assert "3 experiments one of 0.001396" in said
    assert night(BETTER, 4) == 0
    assert "(as believed from 3 trainers)" in capsys.readouterr().err


def test_after_each_experiment_the_page_is_written_and_its_faults_touch_nothing(
    night, repository, monkeypatch, capsys
):
    written = []

    def write_report(paths, folder, complain):
        written.append((paths, folder))
        if len(written) == 2:
            raise ZeroDivisionError("a fault of the page")

    monkeypatch.setattr(loop, "write_report", write_report)
    assert night(BETTER, 3) == 0
    assert written == [([home() / "results.tsv"], home() / "report")] * 4  # and at the end
    assert "the report is not written: a fault of the page" in capsys.readouterr().err
    assert len(rows()) == 3 and not recorded("failed")


def test_a_page_that_takes_long_is_not_written_after_each_short_experiment(night, repository, monkeypatch):
    written = []
    monkeypatch.setattr(loop, "write_report", lambda *_, **__: written.append(len(rows())))
    monkeypatch.setattr(loop, "PAGE_SHARE", 1e-9)
    assert night(BETTER, 4) == 0
    assert written == [1, 4]  # and at the end


def test_rows_and_commits_say_who_made_the_edit(night, repository):
    edit(repository, "SCORE = 1.45\n")
    assert night(BETTER, 3) == 0
    name = Path(sys.executable).name
    assert [row.agent for row in rows()] == ["", "", name]
    assert git_output("log", "-1", "--format=%(trailers:key=Agent,valueonly)") == name


def test_a_night_ends_with_the_trainer_that_is_believed_best(night, repository, monkeypatch, capsys):
    """The search may stand on another one, which is less sure."""
    assert night(BETTER, 3) == 0
    start = git_output("rev-list", "--max-parents=0", "HEAD")
    best = rows()[1]
    monkeypatch.setattr(loop, "best_since_moved", lambda rows, board, head: best)
    assert night(BETTER, 1) == 0
    assert trainer_text(repository) == "SCORE = 1.4\n" and git_checked("status", "--porcelain") == ""
    assert git_output("log", "-1", "--format=%s") == f"Go back to run {best.run}"
    assert git_output("rev-list", "--count", f"{start}..HEAD") == "4"


@pytest.fixture
def confirmations(monkeypatch):
    """The contests that a night confirms; the answer is made up."""
    contests = []

    class Answer:
        sentence = "0.1 better"

    def confirm(setting, contest, fits, show):
        contests.append(contest)
        assert isinstance(show(), RunDetail)  # a line of its own would be drawn over the panel
        assert fits(1.0) and not fits(1e9)
        return Answer

    monkeypatch.setattr(loop, "confirm", confirm)
    return contests


def test_the_end_of_a_night_is_for_the_claim(night, repository, monkeypatch, confirmations, capsys):
    monkeypatch.setattr(plan, "RUN_SECONDS", 1.0)
    until = datetime.now() + timedelta(hours=8)
    taken = iter(range(3))
    really = plan.Hours.why_over

    def why_over(self, done, baselines=0):
        if next(taken, None) is None:  # much later
            monkeypatch.setattr(Night, "seconds_left", lambda self: 2400.0)
        return really(self, done, baselines)

    monkeypatch.setattr(plan.Hours, "why_over", why_over)
    assert night(BETTER, 99, until=until) == 0
    [contest] = confirmations
    assert contest.baseline.val_bpb == 1.5 and contest.best.val_bpb < 1.5
    out = capsys.readouterr().out
    assert out.startswith("claim: 0.1 better\n") and "and leave time to confirm the best" in out
    assert recorded("claim")[0]["claim"] == "0.1 better"


def test_the_page_is_written_once_more_when_the_claim_is_known(
    night, repository, monkeypatch, confirmations, capsys
):
    told = []
    monkeypatch.setattr(
        loop, "write_report", lambda *_, **__: told.append([len(recorded("claim")), len(recorded("end"))])
    )
    assert night(BETTER, 2) == 0
    assert told == [[0, 0], [0, 0], [1, 1]]
    begin = recorded("begin")[0]
    assert begin["pid"] == os.getpid() and begin["host"] == platform.node()


def test_a_claim_that_stands_is_said_again(night, repository, capsys):
    assert night(BETTER, 2) == 0
    shown = replace(rows()[-1], status="confirmed", reason="0.1 better", time="2026-01-02T03:04:05Z")
    Ledger(home() / "results.tsv").append(shown)
    worse = "trainer.write_text(f'SCORE = 1.9  # {time.time()}')\nprint('experiment: worse')"
    assert night(worse, 1) == 0
    assert "claim: 0.1 better (claimed on 2026-01-02)\n" in capsys.readouterr().out
    Ledger(home() / "results.tsv").append(replace(shown, status="refuted"))
    assert night(worse, 1) == 0
    assert "claim: 0.1 better" not in capsys.readouterr().out


def test_a_night_that_is_too_short_for_a_claim_says_so(night, repository, monkeypatch, confirmations, capsys):
    until = datetime.now() + timedelta(minutes=20)
    assert night(BETTER, 2, until=until) == 0
    assert capsys.readouterr().out.startswith("claim: none was tested, the night was too short: autoresearch")
    assert night(BETTER, 1) == 0
    assert capsys.readouterr().out.startswith("claim: none was tested: autoresearch confirm")
    assert not confirmations


def test_a_night_without_a_gain_claims_nothing(night, repository, capsys):
    assert night("trainer.write_text(f'SCORE = 1.9  # {time.time()}')\nprint('experiment: worse')", 3) == 0
    assert capsys.readouterr().out.startswith("claim: none: nothing is believed better than the baseline\n")


def test_a_long_pause_measures_the_noise(night, repository, monkeypatch):
    """While an agent fails, another run of the committed trainer costs nothing; a few are enough."""
    monkeypatch.setattr(failures, "MOST", 10)
    monkeypatch.setattr(loop, "MOST_NOISE_RUNS", 2)
    assert night(BETTER, 2) == 0
    assert night("sys.exit('no network')", 9) == 1
    free = [row for row in rows() if Flag.NOISE in row.flags]
    assert [row.seed for row in free] == [2, 3] and free[0].val_bpb == 1.4
    assert free[0].description == "the committed trainer once more: in a pause"
    assert night.pauses[:6] == [7, 14, 28, 56, 112, 224] and len(subjects()) == 2


def test_a_baseline_that_fails_is_told_to_the_agent_and_not_run_again(night, repository):
    edit(repository, "CRASH\n")
    git_checked("-c", "user.name=me", "-c", "user.email=me@here", "commit", "-qam", "broken")
    agent = """
assert "status: crash" in sys.stdin.read()
trainer.write_text("SCORE = 1.4\\n")
print("experiment: mended")
"""
    assert night(agent, 2) == 0
    assert [(row.description, row.status) for row in rows()] == [
        ("baseline: the trainer as committed", "crash"),
        ("mended", "keep"),
    ]
    assert trainer_text(repository) == "SCORE = 1.4\n"


def test_where_a_night_ended_is_known_to_the_next_one(night, repository, monkeypatch):
    assert night(BETTER, 3) == 0
    best = rows()[1]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "best_since_moved", lambda rows, board, head: best)
        assert night(BETTER, 1) == 0
    assert rows()[-1].status == "moved" and rows()[-1].build_on == best.source
    board = best.board
    assert len(tried_since_moved(rows(), board, best.source)) == 4


def test_the_agent_does_not_think_into_the_time_of_the_claim(night, repository, monkeypatch, confirmations):
    monkeypatch.setattr(plan, "RUN_SECONDS", 1.0)
    asked = []
    really = loop.begin_turn

    def begin_turn(agent, prompt, base, stamp, seconds, *more):
        asked.append(seconds)
        return really(agent, prompt, base, stamp, seconds, *more)

    monkeypatch.setattr(loop, "begin_turn", begin_turn)
    monkeypatch.setattr(Night, "seconds_left", lambda self: 8 * 3600.0)
    until = datetime.now() + timedelta(hours=8)
    assert night(BETTER, 3, until=until, agent_seconds=1e6) == 0
    first, second = asked
    assert first == 8 * 3600 - 310  # nothing to claim yet
    assert second == pytest.approx(8 * 3600 - 310 - 6 * 1.2 * 310)


def test_where_scores_differ_much_the_noise_is_asked_for_once(night, repository, monkeypatch):
    """Otherwise a large noise would be taken for large effects all night."""
    monkeypatch.setattr("launcher.belief.SURPRISING", 3.0)
    assert night(BETTER, 5) == 0
    asked = [row for row in rows() if Flag.NOISE in row.flags]
    assert [(row.seed, row.val_bpb) for row in asked] == [(2, 1.2), (3, 1.2)]  # effects have a wide tail
    assert asked[0].description == "the committed trainer once more: is it noise?"
    assert [row.val_bpb for row in rows() if row not in asked] == [1.5, 1.4, 1.3, 1.2, 1.1]


def test_where_scores_differ_as_assumed_it_is_not(night, repository, monkeypatch):
    monkeypatch.setattr("launcher.belief.SURPRISING", 3.0)
    agent = """
score = float(re.search(r"SCORE = ([\\d.]+)", trainer.read_text())[1])
trainer.write_text(f"SCORE = {score - 0.001:.4f}\\n")
print("experiment: a little better")
"""
    assert night(agent, 5) == 0
    assert not [row for row in rows() if Flag.NOISE in row.flags]
