"""One experiment: its flags, its verdict, its row. Training is made up, but for the dry run."""

import json
import math
import os
import signal
from dataclasses import asdict, replace

import pytest
from conftest import RESULT

from backends.protocol import write_json
from launcher import run as runner
from launcher import setting as settings
from launcher import verdict
from launcher.child import Outcome
from launcher.ledger import Flag, Ledger
from launcher.processes import Stopped, stop_on_signals
from launcher.run import Request, dry_run, exit_code, run_experiment
from launcher.setting import resolve
from prepare import ROOT, RULES, UserError


@pytest.fixture
def scores(house, monkeypatch):
    """The scores that the next runs get; scores.seeds are those of the runs so far."""

    class Scores(list):
        seeds: list[int] = []

    waiting = Scores()
    waiting.seeds = []

    def supervise(trainer, run_dir, setting, seed, watch, on_event):
        waiting.seeds.append(seed)
        run_dir.weights.write_bytes(b"weights")
        result = replace(RESULT, val_bpb=waiting.pop(0), seed=seed, val_tokens=setting.val_tokens)
        write_json(run_dir.result, asdict(result))
        return Outcome(training_seconds=300.0, total_seconds=310.0, exit_code=0, result=result)

    monkeypatch.setattr(runner, "supervise", supervise)
    monkeypatch.setattr(runner, "harness_modified", lambda: False)
    return waiting


def rows(house):
    return Ledger(house / "results.tsv").rows()


def attempt(house, text, budget=300.0, **options):
    """Run a trainer with this text. Returns the row that decides."""
    path = house / "trainer.py"
    path.write_text(text)
    return run_experiment(Request(resolve(budget=budget), text, trainer=path, **options))


def test_a_night_of_verdicts(scores, house):
    scores += [1.500, 1.510, 1.490, 1.495]
    first = attempt(house, "baseline")
    assert first.dtype == "float32"  # as the platform of the tests states
    assert exit_code(first) == 0 and "first result" in first.reason
    assert exit_code(attempt(house, "worse")) == 3
    better = attempt(house, "better")
    assert exit_code(better) == 0 and better.reason.startswith("probably better: effect -0.0")
    again = attempt(house, "better")  # it stays the best
    assert exit_code(again) == 0 and "another run of the current trainer, which stays" in again.reason
    assert [row.val_bpb for row in rows(house)] == [1.5, 1.51, 1.49, 1.495]


def test_a_row_says_what_is_believed(scores, house):
    scores += [1.500, 1.490]
    attempt(house, "baseline")
    attempt(house, "better", parent=b"baseline")
    first, row = rows(house)
    assert (first.effect, first.parent, first.build_on) == (0.0, "", first.source)
    assert row.parent == first.source and row.build_on == row.source
    assert row.effect == pytest.approx(-0.01, abs=0.002) and 0 < row.effect_error < 0.002
    assert row.p_better > 0.99 and row.belief_before == pytest.approx(1.5, abs=0.001)
    assert row.belief_after == pytest.approx(1.49, abs=0.001) and row.belief_after_error > 0
    assert 0.0002 < row.sigma < 0.002


def test_an_edit_that_removes_code_is_marked(scores, house):
    scores += [1.500, 1.500, 1.500]
    long = "a = 1\nb = 2\n"
    attempt(house, long)
    shorter = attempt(house, "a = 1\n", parent=long.encode())
    assert shorter.marks == "shorter" and shorter.status == "keep" and shorter.ranked
    other = attempt(house, "a = 1\nb = 3\n", parent=long.encode())
    assert other.marks == "" and other.status == "discard"


def test_runs_of_a_series_are_evidence_and_decide_nothing(scores, house):
    scores += [1.500, 1.400, 1.501]
    attempt(house, "baseline")
    noise = attempt(house, "another", flags=(Flag.NOISE,))
    assert noise.build_on == "" and noise.judged and Flag.REPEAT not in noise.flags


@pytest.fixture
def undecided(monkeypatch):
    """Let a first run of a trainer be worth another one."""
    really = verdict.decide

    def decide(rows, row):
        decision = really(rows, row)
        if row.description == "small" and row.seed < 3:
            return replace(decision, action="repeat", build_on=row.parent, reason="worth another run")
        return decision

    monkeypatch.setattr(verdict, "decide", decide)


def test_a_result_that_is_undecided_is_repeated_with_other_seeds(scores, house, undecided):
    scores += [1.500, 1.499, 1.4985, 1.4990]
    attempt(house, "baseline")
    row = attempt(house, "small")
    *repeats, last = rows(house)[1:]
    assert [other.marks for other in repeats] == ["repeat", "repeat"] and not repeats[0].judged
    assert repeats[0].reason == "worth another run; once more with seed 2"
    assert last.judged and last.run == row.run and [other.seed for other in rows(house)] == [1, 1, 2, 3]


def test_the_repetition_runs_the_copy_not_the_file(scores, house, monkeypatch, undecided):
    """An agent may edit the file while the first seed runs."""
    scores.append(1.5)
    attempt(house, "baseline")
    ran = []
    supervise = runner.supervise

    def edited_meanwhile(trainer, *arguments):
        ran.append(trainer.read_text())
        (house / "trainer.py").write_text("something else")
        return supervise(trainer, *arguments)

    monkeypatch.setattr(runner, "supervise", edited_meanwhile)
    scores += [1.499, 1.4985, 1.498]
    attempt(house, "small")
    assert ran == ["small"] * 3 and len({row.source for row in rows(house)[-3:]}) == 1


def test_a_short_budget_is_judged_among_its_equals_and_never_ranks(scores, house):
    scores += [1.5, 1.6, 1.55]
    attempt(house, "five minutes")
    short = attempt(house, "ten seconds", budget=10.0)
    assert short.status == "keep" and "a budget of 10 s never ranks" in short.reason
    assert short.marks == "short" and short.comparable and not short.ranked
    assert attempt(house, "better in ten seconds", budget=10.0).status == "keep"


@pytest.mark.parametrize("state, flag", [("on_battery", Flag.BATTERY), ("low_power_mode", Flag.LOW_POWER)])
def test_a_laptop_without_power_gets_no_verdict(scores, house, monkeypatch, state, flag, capsys):
    scores.append(1.5)
    monkeypatch.setattr(runner, "mac_state", lambda: {state: True})
    row = attempt(house, "on the road")
    assert (
        exit_code(row) == 6 and row.marks == flag and not row.ranked and row.reason == f"no verdict: {flag}"
    )
    assert f"warning: {flag}" in capsys.readouterr().err
    assert json.loads((house / "runs" / row.run / "run.json").read_text())["laptop"] == {state: True}


def test_a_busy_device_gets_no_verdict(scores, house, monkeypatch):
    scores.append(1.5)
    monkeypatch.setattr(runner.Watch, "findings", lambda self: [(Flag.CONTENDED, "a browser computes")])
    row = attempt(house, "disturbed")
    assert exit_code(row) == 6 and row.marks == "contended" and row.reason == "no verdict: a browser computes"


@pytest.mark.parametrize("at", ["training", "start"])
def test_a_limit_that_a_busy_machine_missed_is_no_verdict(scores, house, monkeypatch, at):
    """As long as the machine was quiet it is one."""
    busy = [(Flag.CONTENDED, "a browser computes")]

    def supervise(trainer, run_dir, setting, seed, watch, on_event):
        outcome = Outcome(status="timeout", reason="too slow")
        outcome.findings = found if at == "start" else []
        return outcome

    monkeypatch.setattr(runner, "supervise", supervise)
    monkeypatch.setattr(runner.Watch, "findings", lambda self: found if at == "training" else [])
    found = busy
    row = attempt(house, "disturbed")
    assert (exit_code(row), row.status, row.judged) == (6, "timeout", False)
    assert row.marks == "contended" and row.reason == "no verdict: a browser computes; too slow"
    found = []
    row = attempt(house, "quiet")
    assert (exit_code(row), row.reason, row.judged) == (4, "too slow", True)


def test_a_dry_run_that_a_busy_machine_slowed_refutes_no_edit(house, monkeypatch):
    outcome = Outcome(status="timeout", reason="too slow", findings=[(Flag.THROTTLED, "hot")])
    monkeypatch.setattr(runner, "supervise", lambda *asked, **more: outcome)
    assert dry_run(resolve(), b"")[0].status == ""
    outcome = Outcome(status="timeout", reason="too slow")
    monkeypatch.setattr(runner.Watch, "findings", lambda self: [])
    assert dry_run(resolve(), b"")[0].status == "timeout"


def test_a_modified_harness_is_marked_but_ranks(scores, house, monkeypatch, capsys):
    scores.append(1.5)
    monkeypatch.setattr(runner, "harness_modified", lambda: True)
    row = attempt(house, "mine")
    assert row.marks == "harness-modified" and row.ranked and row.rules == RULES
    assert "differs from the last commit" in capsys.readouterr().err


def test_rows_that_change_during_the_run_are_noticed(scores, house, monkeypatch):
    """No trainer can reach them; an agent beside it might."""
    scores.append(1.5)
    monkeypatch.setattr("prepare.Prepared.current_fingerprint", lambda self: "another")
    row = attempt(house, "lies")
    assert exit_code(row) == 5 and "rows changed on disk" in row.reason and row.val_bpb == 0


def test_a_machine_without_walls_marks_its_rows(scores, house, monkeypatch, capsys):
    scores += [1.5, 1.6]
    boxed = attempt(house, "boxed")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "missing_walls", lambda: "no walls here")
        row = attempt(house, "open")
    assert row.marks == "unboxed" and "warning: unboxed: no walls here" in capsys.readouterr().err
    assert row.board != boxed.board and row.board._replace(boxed=True) == boxed.board


def test_a_missing_framework_is_a_sentence(house, monkeypatch):
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    for platform, package in (("cpu", "torch"), ("mlx-cpu", "mlx")):
        with pytest.raises(UserError, match=f"{platform} needs the package {package}"):
            run_experiment(Request(resolve(platform)))
    assert not (house / "results.tsv").exists()


@pytest.mark.slow
def test_a_dry_run_says_what_is_wrong_and_leaves_nothing(house):
    setting = resolve("cpu")
    bad = b"from train_cuda import *\nprint('so far so good')\nraise ValueError('my own mistake')"
    outcome, tail = dry_run(setting, bad)
    assert outcome.status == "crash" and "so far so good" in tail
    assert outcome.reason == "the trainer exited with code 1: ValueError: my own mistake"
    assert "without a result" in dry_run(setting, b"print('val_bpb: 0.1')")[0].reason
    outcome, _ = dry_run(setting, (ROOT / "train_cuda.py").read_bytes())
    assert outcome.status == "" and outcome.result.val_tokens == 2 * setting.track.seq_len
    # The launcher's clock starts when it reads the event: some milliseconds after the trainer's.
    assert 2.9 <= outcome.training_seconds < 8
    assert not (house / "results.tsv").exists() and not list((house / "runs").glob("*/*"))


def test_a_run_is_recorded_even_when_the_launcher_fails(scores, house, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(runner, "supervise", fail)
    with pytest.raises(RuntimeError):
        attempt(house, "whatever")
    [row] = rows(house)
    assert row.status == "crash" and row.reason == "the launcher failed: RuntimeError: a fault of ours"
    assert row.marks == "fault" and not row.judged  # it says nothing of the trainer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_score_leaves_the_run_its_verdict(scores, house, monkeypatch, number):
    """The data are read once more, the belief is computed, and the row is written: that takes seconds."""
    really = verdict.give_verdict

    def give_verdict(*arguments):
        os.kill(os.getpid(), number)
        really(*arguments)

    monkeypatch.setattr(verdict, "give_verdict", give_verdict)
    scores.append(1.4)
    with pytest.raises(Stopped), stop_on_signals():
        attempt(house, "finished")
    assert [(row.status, row.val_bpb, row.marks) for row in rows(house)] == [("keep", 1.4, "")]


def test_a_finished_run_is_in_the_ledger_again_when_that_was_lost(scores, house):
    scores += [1.5, 1.6]
    attempt(house, "one")
    before = rows(house)
    (house / "results.tsv").unlink()
    attempt(house, "two")
    assert rows(house)[:1] == before and [row.description for row in rows(house)] == ["one", "two"]


def test_a_run_has_one_row_whatever_fails_after_it(scores, house, monkeypatch):
    def fail(*arguments):
        raise OSError("the disk is gone")

    scores.append(1.5)
    monkeypatch.setattr(runner, "prune_weights", fail)
    with pytest.raises(OSError):
        attempt(house, "one")
    assert [row.status for row in rows(house)] == ["keep"]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, -1.0, 0.0])
def test_a_score_that_is_none_is_invalid(scores, house, score):
    scores += [score, 1.5]
    row = attempt(house, "cheat")
    assert row.status == "invalid" and row.reason == f"a score of {score} bits per byte is none"
    assert "first result on this board" in attempt(house, "honest").reason
    assert [row.status for row in rows(house)] == ["invalid", "keep"]


def test_a_run_that_diverged_ends_no_night(scores, house):
    scores += [1.5, 1e30, 1.7e308, 1.4]
    attempt(house, "baseline")
    assert attempt(house, "diverged").status == attempt(house, "diverged further").status == "discard"
    assert attempt(house, "better").status == "keep"


def test_a_run_shows_its_progress_where_it_is_told_to_and_nowhere_else(scores, house, monkeypatch):
    """A line of its own would be drawn over the panel of a loop."""

    class Recorder(runner.Progress):
        closed = 0

        def close(self):
            self.closed += 1

    recorder = Recorder(300.0)
    monkeypatch.setattr(runner, "Progress", None)
    scores.append(1.5)
    attempt(house, "shown", progress=recorder)
    assert recorder.closed == 1
