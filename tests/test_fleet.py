"""A night over several devices: what is judged late is judged right, and nothing of it is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from asyncio import CancelledError
from contextlib import contextmanager
from dataclasses import replace

import pytest
from conftest import RESULT, ROOT, row, wait_for_line
from rich.console import Console

from launcher import verdict
from launcher.carried import pack_run
from launcher.child import Outcome
from launcher.harness import git_output
from launcher.ledger import CONFIRMED, Flag, Ledger
from launcher.report.files import read_loop_log
from launcher.report.timeline import devices_now
from launcher.report.watch import tell_device
from launcher.runs import home
from launcher.setting import resolve
from launcher.verdict import build_on_now, give_verdict, tried_since_moved
from night import devices, fleet, loop, repo
from night.agent import TurnFailed
from night.agents import Agent
from night.devices import Device, parse_devices
from night.fleet import Fleet
from night.job import Job, JobAnswer, work
from night.loop import run_night
from night.plan import Night
from night.state import read_state, state_path
from night.workers import do_job
from night.workspace import make_workspace
from prepare import UserError

H100S = "0, GPU-aa, NVIDIA H100 80GB HBM3\n1, GPU-bb, NVIDIA H100 80GB HBM3\n"
MIXED = "0, GPU-aa, NVIDIA H100 80GB HBM3\n1, GPU-bb, NVIDIA A100-SXM4-40GB\n"
TWO = (Device("one", "cpu"), Device("two", "cpu"))
# Far apart, so that two edits do not touch.
TRAINER = "A = 0.0\n#\n#\n#\n#\nB = 0.0\n#\n#\n#\n#\nC = 0.0\n"


# --- Devices ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def have(csv):
        monkeypatch.setattr(devices, "output_of", lambda *command: csv)

    return have


def test_devices_are_named_by_number_and_bound_by_uuid(gpus):
    gpus(H100S)
    assert [(one.name, one.environment()) for one in parse_devices("all")] == [
        ("gpu0", {"CUDA_VISIBLE_DEVICES": "GPU-aa"}),
        ("gpu1", {"CUDA_VISIBLE_DEVICES": "GPU-bb"}),
    ]
    assert [one.name for one in parse_devices("1,1")] == ["gpu1"]
    with pytest.raises(UserError, match="there is no GPU '2'; this machine has: 0, 1"):
        parse_devices("0,2")


def test_a_night_is_on_one_kind_of_gpu(gpus):
    gpus(MIXED)
    with pytest.raises(UserError, match="one kind of device.*A100-SXM4-40GB, NVIDIA H100"):
        parse_devices("all")
    assert [one.name for one in parse_devices("1")] == ["gpu1"]


def test_a_machine_without_a_gpu_has_a_cpu(gpus):
    gpus("")
    [device] = parse_devices("all")
    assert device.environment() == {} and device.kind in ("cpu", "gpu")
    with pytest.raises(UserError, match="there is no GPU '0'; this machine has: none"):
        parse_devices("0")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core")
def test_parts_of_a_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr(devices, "usable_cores", lambda: [0, 1, 4, 5, 7])
    first, second = parse_devices("cpu:2")
    assert (first.cores, second.cores) == ((0, 1), (4, 5))
    assert first.environment() == {"AUTORESEARCH_CORES": "0,1"}
    with pytest.raises(UserError, match="6 parts of a CPU with 5 cores"):
        parse_devices("cpu:6")
    with pytest.raises(UserError, match="cpu:2,cpu: parts of the CPU that overlap"):
        parse_devices("cpu:2,cpu")


# --- Jobs ---------------------------------------------------------------------------------------------------


def test_a_job_travels_as_it_is():
    job = Job("cpu", "tiny", 5.0, 3, "«é»", b"# \xff\x00\n", "abc", None, "me", (Flag.PARALLEL,), True)
    assert Job.from_json(job.to_json()) == replace(job, flags=["parallel"])
    assert Job.from_json(replace(job, parent=b"\xfe").to_json()).parent == b"\xfe"


# --- Verdicts -----------------------------------------------------------------------------------------------


def judged(rows, source, parent, val_bpb, **more):
    new = row(source=source, parent=parent, val_bpb=val_bpb, status="", run=f"r{len(rows)}", **more)
    give_verdict(rows, new, [])
    rows.append(new)
    return new


def test_what_was_made_on_an_older_trainer_is_judged_against_the_best():
    rows = []
    judged(rows, "a", "a", 1.5)
    late = {"marks": "parallel"}
    assert judged(rows, "b", "a", 1.3, **late).build_on == "b"
    worse = judged(rows, "c", "a", 1.4, **late)  # better than a, which it was made on; not than b
    assert (worse.status, worse.build_on, worse.goes_back) == ("discard", "b", False)
    assert worse.effect < 0 and "back to" not in worse.reason
    better = judged(rows, "d", "a", 1.1, **late)
    assert (better.status, better.build_on, build_on_now(rows, rows[0].board)) == ("keep", "d", "d")
    # No person moved the branch: all of them may be gone back to.
    assert tried_since_moved(rows, rows[0].board, "d") == {"a", "b", "c", "d"}


def test_a_night_goes_on_from_a_run_that_was_made_outside_git():
    """`autoresearch run` made it, before the first night: its row names no parent."""
    rows = []
    judged(rows, "a", "", 1.5)
    late = {"marks": "parallel"}
    assert judged(rows, "b", "a", 1.3, **late).build_on == "b"
    assert judged(rows, "c", "a", 1.1, **late).build_on == "c"
    assert tried_since_moved(rows, rows[0].board, "c") == {"a", "b", "c"}


def test_a_claim_about_an_earlier_trainer_moves_nothing():
    rows = []
    judged(rows, "a", "a", 1.5)
    earlier = judged(rows, "b", "a", 1.3)
    judged(rows, "c", "b", 1.1)
    rows.append(replace(earlier, status=CONFIRMED))  # as `confirm` writes it, its build_on included
    assert earlier.build_on == "b" and build_on_now(rows, rows[0].board) == "c"


def test_an_edit_of_a_trainer_that_is_not_searched_counts_for_nothing():
    rows = []
    judged(rows, "a", "a", 1.5)
    judged(rows, "b", "a", 1.3)
    late = judged(rows, "y", "x", 1.1, marks="parallel")
    assert (late.status, late.build_on) == ("discard", "") and "moved by hand" in late.reason
    assert tried_since_moved(rows, rows[0].board, build_on_now(rows, rows[0].board)) == {"a", "b"}


# --- Nights -------------------------------------------------------------------------------------------------


class Given:
    """A job that was given to a device. It is done when the test says so."""

    def __init__(self, job, device):
        self.job = job
        self.device = device
        self.answer = None
        self.error = None

    def done(self):
        return bool(self.answer or self.error)

    def result(self):
        if self.error:
            raise self.error
        return self.answer

    def cancel(self):
        self.error = CancelledError()


class HereWorkers:
    """Does jobs in this process. order: takes the jobs under way, and returns the one to do next."""

    def __init__(self, devices, order=lambda jobs: jobs[0]):
        self.devices = devices
        self.order = order
        self.jobs = []
        self.most = 0  # at once
        self.dying = 0  # jobs that fail with their worker
        self.broken = ""  # a device whose jobs all crash
        self.shaky = set()  # whose jobs are lost with their connection
        self.gone = set()  # devices whose workers do not come back
        self.before_answer = lambda job: None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.jobs.clear()

    def tend(self):
        return []

    def is_shaky(self, device):
        return device in self.shaky

    def missing(self):
        return self.gone

    def submit(self, job, device):
        given = Given(job, device)
        self.jobs.append(given)
        self.most = max(self.most, len(self.jobs))
        return given

    def step(self):
        """Do one of the jobs under way."""
        ready = [job for job in self.jobs if job.device not in self.gone]
        if not ready:
            return
        given = self.order(ready)
        self.jobs.remove(given)
        if self.dying:
            self.dying -= 1
            given.error = RuntimeError("the worker died")
        elif given.device == self.broken:
            given.answer = JobAnswer(status="crash", reason="no GPU answers")
        else:
            given.answer = work(given.job)
            self.before_answer(given.job)


def supervise(trainer, run_dir, setting, seed, watch, on_event):
    """Stand in for launcher.child.supervise: the score is 1.5 less what the trainer's constants say."""
    values = [float(value) for value in re.findall(r"^[A-C] = ([\d.]+)", trainer.read_text(), re.M)]
    outcome = Outcome(training_seconds=300.0, total_seconds=310.0, exit_code=0)
    outcome.result = replace(
        RESULT,
        val_bpb=1.5 - sum(values),
        val_tokens=setting.val_tokens,
        platform=setting.platform.name,
        track=setting.track.name,
        seed=seed,
    )
    return outcome


@pytest.fixture
def night(repository, monkeypatch):
    """night(agent's Python, workers, experiments) -> exit code. Agents end before the next job is done."""
    (repository / "train_cuda.py").write_text(TRAINER)
    repo.advance_branch(repo.commit_alone("train_cuda.py", "constants"), "train_cuda.py")
    monkeypatch.setattr("launcher.run.supervise", supervise)
    monkeypatch.setattr("launcher.run.dry_run", lambda *asked: (Outcome(), "the tail"))
    monkeypatch.setattr("launcher.belief.SURPRISING", 1e9)
    monkeypatch.setattr(loop.Loop, "check_agent", lambda self: None)
    monkeypatch.setattr(fleet, "LOOK_SECONDS", 0.2)

    def night(agent, workers, experiments, agents=1, seed=1, pause=0.0):
        script = home() / "agent.py"
        script.write_text(
            "import re, sys\nfrom pathlib import Path\n"
            "trainer = Path('train_cuda.py')\nprompt = sys.stdin.read()\n" + agent
        )

        class Stepping(Fleet):
            def collect(self):
                is_busy = not self.free_devices() or not self.idle_edits() or self.is_full()
                if is_busy and not self.turns:
                    workers.step()
                return super().collect()

        what = Night(Agent("script", [sys.executable, str(script)]), resolve(), seed=seed, pause=pause)
        what.experiments = experiments

        def make(night, panel):
            workers.panel = panel
            return Stepping(night, panel, workers, agents)

        return run_night(what, make)

    return night


def rows():
    return Ledger(home() / "results.tsv").rows()


def decided():
    return [
        (one.description, one.status, round(one.val_bpb, 3)) for one in rows() if "noise" not in one.flags
    ]


def committed():
    return repo.content("HEAD", "train_cuda.py").decode()


# Each agent improves the first constant that is 0 and that nobody is working on.
IMPROVE = """
taken = [name for name in "ABC" if f"- improve {name}" in prompt or f"improve {name}»: failed" in prompt]
free = [name for name in "ABC" if f"{name} = 0.0" in trainer.read_text() and name not in taken]
name = free[0] if free else "C"
old = re.search(rf"^{name} = (.*)$", trainer.read_text(), re.M)[1]
trainer.write_text(trainer.read_text().replace(f"{name} = {old}", f"{name} = {float(old) + 0.1:.1f}"))
print(f"experiment: improve {name}")
"""


def test_two_edits_at_once_are_merged_and_tried_together(night):
    workers = HereWorkers(TWO)
    assert night(IMPROVE, workers, 3) == 0
    assert night("sys.exit(1)", workers, 1) == 0  # no other idea comes before it
    assert workers.most == 2
    assert [(what, score) for what, _, score in decided()] == [
        ("baseline: the trainer as committed", 1.5),
        ("improve A", 1.4),
        ("improve B", 1.4),
        ("merged: improve B", 1.3),
    ]
    assert "A = 0.1" in committed() and "B = 0.1" in committed()
    assert not state_path().exists()


def test_every_device_begins_with_the_committed_trainer(night, capsys):
    assert night(IMPROVE, HereWorkers(TWO), 1) == 0
    assert [(one.seed, "noise" in one.flags) for one in rows()] == [(1, False), (2, True)]
    assert "two against one: +0.000000 bpb, 1.00 of its speed" in capsys.readouterr().err


def test_two_devices_run_the_baseline_three_times(night, monkeypatch, capsys):
    """Of two runs that differ one may have gone wrong: two say nothing of the noise."""
    scores = iter([1.5, 1.6, 1.55])

    def noisy(trainer, run_dir, *more):
        outcome = supervise(trainer, run_dir, *more)
        if "A = 0.0" in trainer.read_text():
            outcome.result = replace(outcome.result, val_bpb=next(scores))
        return outcome

    monkeypatch.setattr("launcher.run.supervise", noisy)
    assert night(IMPROVE, HereWorkers(TWO), 2) == 0
    assert [one.description for one in rows()][:3] == [
        "baseline: the trainer as committed",
        "the committed trainer on two",
        "the committed trainer on one, once more",
    ]
    assert rows()[2].sigma > 0.01
    said = capsys.readouterr().err
    assert "two against one: +0.075000 bpb, 1.00 of its speed\n" in said and "errors apart" not in said


def test_who_watches_sees_what_each_device_does(night):
    """On the night's own screen, and by the log, from elsewhere."""
    workers = HereWorkers(TWO)
    seen = []

    def look(job):
        console = Console(width=200)
        with console.capture() as shown:
            console.print(workers.panel.table())
        seen.append((shown.get(), [tell_device(device) for device in devices_now(read_loop_log())]))

    assert night(IMPROVE, HereWorkers(TWO), 1) == 0
    workers.before_answer = look
    assert night(IMPROVE, workers, 2) == 0
    screen, lines = seen[-1]
    assert re.search(r"^one +free; last: keep 1\.400000 improve A *$", screen, re.M), screen
    assert re.search(r"^two +0:\d\d  improve B *$", screen, re.M), screen
    assert lines[0] == "one: free; last: keep 1.400000 improve A"
    assert lines[1].startswith("two: improve B, for ")
    assert devices_now(read_loop_log()) == []  # the night is over


def test_a_verdict_may_come_after_a_later_one(night):
    assert night(IMPROVE, HereWorkers(TWO), 1) == 0
    assert night(IMPROVE, HereWorkers(TWO, order=lambda jobs: jobs[-1]), 2) == 0
    assert night("sys.exit(1)", HereWorkers(TWO), 1) == 0
    assert [name for name, *_ in decided()][1:] == ["improve B", "improve A", "merged: improve A"]
    assert "A = 0.1" in committed() and "B = 0.1" in committed()


SAME = """
old = re.search(r"^A = (.*)$", trainer.read_text(), re.M)[1]
step = 0.2 if "- improve A by 0.1" in prompt else 0.1
told = "conflicts with what was kept" in prompt
trainer.write_text(trainer.read_text().replace(f"A = {old}", f"A = {float(old) + step:.1f}"))
print(f"experiment: {'told, ' if told else ''}improve A by {step}")
"""


def test_edits_that_conflict_go_to_an_agent(night):
    assert night(SAME, HereWorkers(TWO), 4) == 0
    assert decided()[1:3] == [("improve A by 0.1", "keep", 1.4), ("improve A by 0.2", "keep", 1.3)]
    assert decided()[3][0].startswith("told, ")


def test_a_night_makes_as_many_experiments_as_were_asked_for(night):
    for workers in (HereWorkers(TWO), HereWorkers([Device(str(n), "cpu") for n in range(5)])):
        before = len(decided())
        assert night(IMPROVE, workers, 3, agents=4) == 0
        assert len(decided()) - before == 3


def test_a_job_whose_worker_died_is_done_again(night):
    workers = HereWorkers(TWO)
    workers.dying = 3
    assert night(IMPROVE, workers, 3) == 0
    assert len(decided()) == 3


def test_where_no_worker_lives_the_night_ends(night, capsys):
    workers = HereWorkers(TWO)
    workers.dying = 100
    assert night(IMPROVE, workers, 3) == 1
    # The sixth is one too many. What runs then comes to its end.
    assert re.search("gave up after [67] runs without a verdict in a row", capsys.readouterr().out)


def test_a_device_that_can_do_nothing_gets_no_more_work(night, capsys):
    workers = HereWorkers(TWO)
    workers.broken = "two"
    assert night(IMPROVE, workers, 8) == 0
    said = capsys.readouterr().err
    why = "jobs in a row without a score, the last of the committed trainer: no GPU answers"
    assert re.search(rf"two gets no more work: \d {why}", said)
    assert len([score for _, _, score in decided() if score]) == 8


def test_bad_edits_take_no_device_out(night, monkeypatch, capsys):
    """After three of them it runs the committed trainer, which it can."""
    bad = Outcome()
    bad.fail("crash", "a typo")
    monkeypatch.setattr(
        "launcher.run.dry_run", lambda setting, source, seed: (bad if b"BAD" in source else Outcome(), "")
    )
    agent = """
count = Path(__file__).with_name("count")
number = int(count.read_text()) if count.exists() else 0
count.write_text(str(number + 1))
text = f"BAD = {number}" if number < 7 else f"GOOD = {number}"
trainer.write_text(trainer.read_text() + f"# {text}\\n")
print(f"experiment: {text}")
"""
    assert night(agent, HereWorkers(TWO), 2) == 0
    said = capsys.readouterr().err
    assert "gets no more work" not in said
    assert "is it " in "".join(one.description for one in rows())
    assert [one.description for one in rows() if one.scored][-1].startswith("GOOD")


def test_what_a_person_may_undo_is_waited_out(night, monkeypatch):
    """The agent's patience is not spent on it: pauses grow, as in a night on one device."""
    began = time.monotonic()
    tries = []

    def require_harness(self):
        tries.append(time.monotonic() - began)
        if tries[-1] < 4.0:
            raise TurnFailed("harness", "prepare.py was changed")

    monkeypatch.setattr(Fleet, "require_harness", require_harness)
    assert night(IMPROVE, HereWorkers(TWO), 2, pause=0.5) == 0
    assert len([at for at in tries if at < 4.0]) <= 5
    assert len(decided()) == 2


def test_an_edit_that_never_gets_a_verdict_is_stashed_while_others_get_theirs(night, capsys):
    class Workers(HereWorkers):
        def step(self):
            self.dying = int(any("A = 0.1" in given.job.trainer.decode() for given in self.jobs[:1]))
            super().step()

    agent = """
count = Path(__file__).with_name("count")
number = int(count.read_text()) if count.exists() else 0
count.write_text(str(number + 1))
old, new = ("C = ", f"C = 0.{number}  # ") if number else ("A = 0.0", "A = 0.1")
trainer.write_text(trainer.read_text().replace(old, new))
print(f"experiment: improve {new[0]}")
"""
    assert night(agent, Workers(TWO, lambda jobs: jobs[0]), 6) == 0
    assert "stashed «improve A»" in capsys.readouterr().err
    assert "A = 0.1" not in committed()


def test_an_edit_of_a_person_undoes_nothing_that_was_kept_before_its_run(night, repository):
    """It waits in the working tree, as a whole text, while another one is kept."""
    workers = HereWorkers(TWO, lambda jobs: jobs[0])

    def edit(job):
        if job.description == "improve A":  # the branch has it in a moment
            (repository / "train_cuda.py").write_text(TRAINER.replace("C = 0.0", "C = 0.3"))

    workers.before_answer = edit
    assert night(IMPROVE, workers, 4) == 0
    assert "A = 0.1" in committed() and "C = 0.3" in committed()
    assert git_output("status", "--porcelain", "--untracked-files=no") == ""


def test_a_device_whose_worker_does_not_come_back_gets_no_more_work(night, monkeypatch, capsys):
    monkeypatch.setattr(fleet, "WORKER_SECONDS", 0.5)
    workers = HereWorkers(TWO)
    workers.gone = {"two"}
    assert night(IMPROVE, workers, 3) == 0
    assert "two gets no more work: its worker was not started again" in capsys.readouterr().err
    assert len(decided()) == 3


class LentWorkers(HereWorkers):
    """Does jobs as another machine does: with a ledger of its own."""

    def step(self):
        if not self.jobs:
            return
        given = self.jobs.pop(0)
        with pytest.MonkeyPatch.context() as there:
            there.setenv("AUTORESEARCH_HOME", str(home() / "there"))
            answer = work(replace(given.job, is_lent=True))
            given.answer = replace(answer, files=pack_run(answer.run))


def test_what_a_connection_loses_counts_against_nothing(night, capsys):
    """A host that vanishes with its devices must not end a night, nor cost an edit."""
    workers = HereWorkers([Device("h/one", "cpu", host="h"), Device("h/two", "cpu", host="h")])
    workers.shaky = {"h/one", "h/two"}
    workers.dying = 20
    assert night(IMPROVE, workers, 2) == 0
    assert "h/one was lost with" in capsys.readouterr().err
    assert [one.status for one in rows() if "noise" not in one.flags] == ["keep", "keep"]


def test_a_host_that_joins_late_runs_the_baseline_too(night, capsys):
    workers = HereWorkers([Device("one", "cpu"), Device("h/two", "cpu", host="h")])
    workers.gone = {"h/two"}

    def join(job):
        workers.gone = set()

    workers.before_answer = join
    assert night("import time\ntime.sleep(1)\n" + IMPROVE, workers, 3) == 0
    assert "h/two against one: +0.000000 bpb" in capsys.readouterr().err


def test_a_device_whose_worker_comes_back_gets_work_again(night, monkeypatch, capsys):
    monkeypatch.setattr(fleet, "WORKER_SECONDS", 0.5)
    workers = HereWorkers([Device("one", "cpu"), Device("h/two", "cpu", host="h")])
    workers.gone = {"h/two"}
    take_out = Fleet.take_out

    def take_out_and_come_back(self, device, why):
        take_out(self, device, why)
        workers.gone = set()

    monkeypatch.setattr(Fleet, "take_out", take_out_and_come_back)
    slow = "import time\ntime.sleep(0.5)\n" + IMPROVE
    assert night(slow, workers, 6, agents=2) == 0
    said = capsys.readouterr().err
    assert "h/two gets no more work" in said and "h/two is back" in said
    assert workers.most == 2


def test_a_run_of_another_machine_is_judged_and_repeated_here(night, monkeypatch):
    """There a job runs once: whether it runs once more is decided where all runs are known."""
    decide = verdict.decide

    def undecided_at_first(known, new):
        decision = decide(known, new)
        is_first = new.description == "improve A" and new.seed == 1
        return replace(decision, action="repeat") if is_first else decision

    monkeypatch.setattr(verdict, "decide", undecided_at_first)
    workers = LentWorkers([Device("h/one", "cpu", host="h")])
    assert night(IMPROVE, workers, 2) == 0
    assert [(one.description, one.seed, "repeat" in one.flags) for one in rows()] == [
        ("baseline: the trainer as committed", 1, False),
        ("improve A", 1, True),
        ("improve A", 2, False),
    ]
    assert {one.run for one in rows()} == {path.name for path in (home() / "runs").glob("2*")}
    assert "A = 0.1" in committed()


def commit_by_hand(text):
    repo.advance_branch(repo.commit_alone("train_cuda.py", "by hand", text.encode()), "train_cuda.py")


def test_a_person_moves_the_branch_while_an_edit_runs(night):
    """The edit was made on what lies before that: it counts for nothing."""
    assert night(IMPROVE, HereWorkers(TWO), 1) == 0
    workers = HereWorkers(TWO)
    mine = TRAINER.replace("C = 0.0", "C = 0.5")

    def move(job):
        workers.before_answer = lambda job: None
        commit_by_hand(mine)

    workers.before_answer = move
    assert night(IMPROVE, workers, 1) == 0
    assert committed() == mine
    assert rows()[-1].status == "moved" and "by-hand" in rows()[-1].flags
    assert night(IMPROVE, HereWorkers(TWO), 3) == 0
    assert "C = 0.5" in committed() and "A = 0.1" in committed()


def test_a_person_goes_back_and_the_search_begins_there(night):
    assert night(IMPROVE, HereWorkers(TWO), 2) == 0
    assert "A = 0.1" in committed()
    commit_by_hand(TRAINER)
    other = IMPROVE.replace('"ABC"', '"BC"')
    assert night(other, HereWorkers(TWO), 1) == 0
    assert "A = 0.0" in committed() and "B = 0.1" in committed()


def test_an_edit_of_a_person_is_tried_and_reverted(night, repository):
    assert night(IMPROVE, HereWorkers(TWO), 1) == 0
    worse = TRAINER.replace("B = 0.0", "B = 0.0\nD = 1")
    trainer = repository / "train_cuda.py"
    trainer.write_text(worse.replace("A = 0.0", "A = 0.00"))
    assert night("sys.exit(1)", HereWorkers(TWO), 1) == 0
    assert decided()[-1][:2] == ("what lay in the trainer, uncommitted", "discard")
    assert trainer.read_text() == TRAINER


@contextmanager
def killed_in(name):
    """A night inside is over, without another word, where the fleet calls one of its methods."""

    def end(self, *asked):
        raise SystemExit(9)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Fleet, name, end)
        yield


def test_a_kill_between_the_branch_and_the_merge_loses_neither(night):
    with killed_in("merge"):
        night(IMPROVE, HereWorkers(TWO), 3)
    assert night("sys.exit(1)", HereWorkers(TWO), 2) == 0
    assert "A = 0.1" in committed() and "B = 0.1" in committed()


def test_a_verdict_that_a_killed_loop_did_not_follow_is_followed_by_the_next(night):
    assert night(IMPROVE, HereWorkers(TWO), 1) == 0
    with killed_in("follow_verdict"):
        night(IMPROVE, HereWorkers(TWO), 4)
    assert rows()[-1].status == "keep" and "A = 0.1" not in committed()
    assert len(read_state().edits) >= 2
    assert night(IMPROVE, HereWorkers(TWO), 2) == 0
    assert "A = 0.1" in committed()
    assert ("improve B", "keep", 1.3) in decided()  # it waited, and was put on the best


def test_an_edit_that_fails_its_dry_run_is_refused(night, monkeypatch):
    def dry_run(setting, source, seed):
        outcome = Outcome()
        if b"B = 0.1" in source:
            outcome.fail("crash", "bad")
        return outcome, "the tail"

    monkeypatch.setattr("launcher.run.dry_run", dry_run)
    assert night(IMPROVE, HereWorkers(TWO), 3) == 0
    refused = [one for one in rows() if Flag.DRY in one.flags]
    assert refused and {one.reason for one in refused} == {"dry run: bad"}


# --- Several agents -----------------------------------------------------------------------------------------


def test_agents_at_work_at_once_keep_each_others_notes(repository):
    first, second = (make_workspace(repo.head(), "", place) for place in (0, 1))
    assert first.top != second.top
    for workspace, text in ((first, "one\n"), (second, "two\n")):
        notes = workspace.folder / "runs" / "notes.md"
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text(text)
        workspace.save_notes()
    third = make_workspace(repo.head(), "", 2)
    assert set((third.folder / "runs" / "notes.md").read_text().split()) == {"one", "two"}


# --- The command --------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said_at_once(autoresearch):
    for options, says in (
        (("--agents", "2"), "--agents goes with --devices"),
        (("--devices", "7"), "there is no GPU '7'"),
        (("--devices", "cpu:4096"), "parts of a CPU with"),
    ):
        done = autoresearch("loop", *options, "--experiments", "1")
        assert (done.returncode, says in done.stderr) == (2, True), done.stderr


def test_a_job_without_an_answer_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("night.workers.ROOT", ROOT)
    answer = do_job({"no": "job"}, str(tmp_path))
    assert isinstance(answer, JobAnswer) and answer.status == "error" and "exit code 1" in answer.reason


@pytest.mark.alone
def test_ctrl_c_reaches_the_workers_too_and_nothing_speaks_of_it(house):
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.entry", "compare", "--devices", "cpu:2", "--budget", "100"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, as in a terminal
    )
    try:
        said = wait_for_line(process, "training on cpu0, cpu1")
        deadline = time.monotonic() + 120
        while not list((house / "runs").glob("2*/events.jsonl")):
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        said += process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said and "Error" not in said, said


@pytest.mark.alone
def test_one_trainer_is_compared_on_the_halves_of_a_cpu(autoresearch, house):
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core has no halves")
    done = autoresearch("compare", "--devices", "cpu:2", "--budget", "3", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)["devices"]
    assert [score["device"] for score in found] == ["cpu0", "cpu1"]
    assert all(0.5 < score["val_bpb"] < 8 and score["status"] in ("keep", "discard") for score in found)
    assert max(score["share"] for score in found) == 1.0
    assert {one.run for one in rows()} == {score["run"] for score in found}
