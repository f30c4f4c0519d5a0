"""`autoresearch stop`: a loop ends in order, and only the loop that was meant, and not by its own agent."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from click.testing import CliRunner
from conftest import ROOTED

from launcher import cli
from launcher.ledger import Ledger
from launcher.runs import home
from launcher.setting import resolve
from night import stop
from night.agents import Agent
from night.loop import Loop, run_night
from night.plan import Night
from night.stop import announced, ask_to_stop, rest, running_loop
from night.trial import hold_repository
from prepare import ROOT, UserError

SLOW = """
import re, time
from pathlib import Path
trainer = Path("train_cuda.py")
score = float(re.search(r"SCORE = ([\\d.]+)", trainer.read_text())[1])
time.sleep(0.5)
trainer.write_text(f"SCORE = {score - 0.01:.2f}\\n")
print("experiment: a bit better")
"""


def call(*arguments):
    return CliRunner().invoke(cli.main, arguments)


started: list[int] = []  # nights whose end no test has seen


def start_night(agent, arguments=(), **more):
    """Run a night without an end in a process of its own. Returns its id."""
    script = home() / "agent.py"
    script.write_text(agent)
    child = os.fork()
    if child == 0:
        try:
            agent = Agent("python", [sys.executable, str(script), *arguments])
            os._exit(run_night(Night(agent, resolve(), **more)))
        finally:
            os._exit(99)
    started.append(child)
    return child


def one_more_night(experiments):
    """Run a night with the agent of the last one. Returns its exit code."""
    agent = Agent("python", [sys.executable, str(home() / "agent.py")])
    return run_night(Night(agent, resolve(), experiments=experiments))


def exit_code_of(child, seconds=60):
    """Wait for the end of a night, and return its exit code: -9 where it was killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            started.remove(child)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    raise AssertionError("the night does not end")


@pytest.fixture(autouse=True)
def no_night_left():
    """Kill the nights that a test that failed left behind."""
    yield
    while started:
        child = started.pop()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rows():
    return Ledger(home() / "results.tsv").rows()


def end_of_log():
    return json.loads((home() / "runs" / "loop" / "loop.jsonl").read_text().splitlines()[-1])


@pytest.fixture
def fast(repository, monkeypatch):
    monkeypatch.setattr("launcher.belief.SURPRISING", 1e9)  # made-up scores differ much
    monkeypatch.setattr(Loop, "check_agent", lambda self: None)
    return repository


def test_a_loop_ends_after_the_experiment_at_hand(fast):
    child = start_night(SLOW)
    wait_until(lambda: len(rows()) >= 2)
    assert running_loop().pid == child
    done = call("stop", "--wait")
    assert done.exit_code == 0 and f"the loop, process {child}, ends after" in done.output
    assert exit_code_of(child) == 0
    assert end_of_log()["event"] == "end" and end_of_log()["why"] == "autoresearch stop"
    assert all(row.status == "keep" for row in rows())  # nothing was cut off
    assert running_loop() is None and not stop.request_path().exists()
    before = len(rows())
    assert one_more_night(1) == 0
    assert len(rows()) == before + 1  # the edit that waited, or the agent's next one


def test_an_edit_that_waits_for_its_dry_run_is_left_to_the_next_loop(fast, monkeypatch):
    child = start_night(SLOW.replace("sleep(0.5)", "sleep(3.0)"))
    log = home() / "runs" / "loop" / "loop.jsonl"
    wait_until(lambda: log.exists() and "the agent thinks" in log.read_text())
    ask_to_stop()
    assert exit_code_of(child) == 0 and len(rows()) == 1
    assert "a bit better" not in log.read_text()  # no dry run began
    assert one_more_night(1) == 0
    assert rows()[-1].description == "a bit better"


def test_a_pause_is_cut_short(fast):
    child = start_night("import sys; sys.exit(1)", pause=3600.0)
    log = home() / "runs" / "loop" / "loop.jsonl"
    wait_until(lambda: log.exists() and '"pause"' in log.read_text())
    ask_to_stop()
    assert exit_code_of(child, 20) == 0


def test_without_a_loop_there_is_nothing_to_stop(repository):
    done = call("stop")
    assert done.exit_code == 1 and done.output == "autoresearch: no loop runs in this repository\n"


def test_a_loop_that_was_killed_is_no_loop(fast):
    child = start_night(SLOW)
    wait_until(lambda: len(rows()) >= 1)
    loop = running_loop()
    stop.write_json(stop.request_path(), {"token": loop.token})  # it was asked, and then killed
    os.kill(child, signal.SIGKILL)
    assert exit_code_of(child) == -signal.SIGKILL
    assert stop.loop_path().exists() and running_loop() is None
    with pytest.raises(UserError, match="no loop runs"):
        ask_to_stop()
    before = len(rows())
    assert one_more_night(2) == 0
    assert len(rows()) >= before + 1  # the old request is not for the new loop


@pytest.mark.parametrize("field, value", [("began", 12345.0), ("pid", 2**40), ("pid", "x"), ("token", None)])
def test_a_number_that_another_process_got_is_no_loop(repository, field, value):
    """A process of that number lives, and somebody holds the repository."""
    with hold_repository(), announced() as is_stopping:
        data = json.loads(stop.loop_path().read_text())
        assert running_loop() and not is_stopping()
        data[field] = value
        if value is None:
            del data[field]
        stop.loop_path().write_text(json.dumps(data))
        assert running_loop() is None
    stop.write_json(
        stop.loop_path(), {"pid": os.getpid(), "began": psutil.Process().create_time(), "token": "t"}
    )
    assert running_loop() is None  # nobody holds the repository


def test_a_request_is_for_one_loop(repository):
    with hold_repository(), announced() as is_stopping:
        ask_to_stop()
        assert is_stopping()
        with announced() as is_stopping_too:
            assert not is_stopping_too() and not is_stopping()
            stop.request_path().write_text("[" * 10)
            assert not is_stopping_too()


def test_a_rest_ends_when_it_is_told(monkeypatch):
    answers = [False, False, True]
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    rest(3600.0, lambda: answers.pop(0))
    assert len(slept) == 2 and max(slept) <= stop.POLL_SECONDS


# --- Not by its agent ---------------------------------------------------------------------------------------

TRAITOR = """
import importlib, os, sys
from pathlib import Path
root, sources, *rooted = sys.argv[1:]
sys.path.insert(0, sources)
for name in rooted:
    importlib.import_module(name).ROOT = Path(root)
from night.stop import ask_to_stop
from prepare import UserError
if os.fork() == 0:
    os.setsid()  # its parent is gone, and the guard has it
    try:
        ask_to_stop()
        said = "stopped"
    except UserError as error:
        said = str(error)
    Path(os.environ["AUTORESEARCH_HOME"], "said").write_text(said)
    os._exit(0)
os.wait()
Path("train_cuda.py").write_text("SCORE = 1.4\\n")
print("experiment: treason")
"""


def test_the_agent_of_a_loop_may_not_stop_it(fast):
    """Not by the command, nor past it: whoever descends from the loop is refused."""
    arguments = [str(fast), str(ROOT), *ROOTED]
    child = start_night(TRAITOR, arguments, experiments=2)
    assert exit_code_of(child) == 0 and len(rows()) == 2
    assert "may not stop it" in (home() / "said").read_text()
    variables = {**os.environ, "AUTORESEARCH_LOOP": str(fast)}
    command = [sys.executable, "-m", "launcher.entry", "stop"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "an agent of the loop may call" in done.stderr
