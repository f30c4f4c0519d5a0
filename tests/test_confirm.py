"""`autoresearch confirm`: fresh seeds, the sealed set, an answer that is recorded. Training is made up."""

import json
import random

import numpy as np
import pytest
from test_run import attempt, rows, scores  # noqa: F401  a fixture

from launcher import confirm as confirming
from launcher import run as runner
from launcher.belief import LOOKS
from launcher.board import gather, list_ranked
from launcher.confirm import confirm, confirm_run, find_contest
from launcher.ledger import CONFIRMED, UNCONFIRMED, Flag
from launcher.processes import Stopped
from launcher.run import EXIT_INTERRUPTED
from launcher.runs import read_sealed, run_dir
from launcher.score import Difference, Score
from launcher.setting import resolve
from prepare import UserError

SIGMA = 0.002


@pytest.fixture
def contest(scores, house, monkeypatch):  # noqa: F811
    """contest(gain) -> the two trainers; their runs with fresh seeds then differ by it."""
    rng = random.Random(1)
    sealed = {}

    def begin(gain):
        scores.extend([1.5, 1.45])
        attempt(house, "baseline", flags=(Flag.NOISE,))
        attempt(house, "best")

        def supervise(trainer, run, setting, seed, watch, on_event):
            score = 1.5 + rng.gauss(0, SIGMA) - (gain if trainer.read_text() == "best" else 0.0)
            sealed[run.run_id] = score + 0.3
            scores.append(score)
            return really(trainer, run, setting, seed, watch, on_event)

        really = runner.supervise
        monkeypatch.setattr(runner, "supervise", supervise)
        return find_contest("best", "baseline")

    def score_again(row, setting, trainer, weights, splits, progress):
        assert splits == ["sealed"]
        assert weights.exists() and trainer.read_text() in ("baseline", "best")
        nothing = np.empty(0)
        return [Score(sealed[row.run], 0.01, 1000, Difference(0.0, 0.0, 0.0), nothing, nothing)]

    monkeypatch.setattr(confirming, "score_again", score_again)
    return begin


def test_a_true_gain_is_claimed_on_the_sealed_set(contest, house, capsys):
    contest(0.05)
    assert confirm_run("best", "baseline") == 0
    out = capsys.readouterr().out
    assert out.startswith("claim: 0.0") and "better than the baseline, on text that no run was" in out
    assert f"runs_of_each: {LOOKS[0]}\n" in out and "verdict: claim\n" in out
    last = rows(house)[-1]
    assert last.status == CONFIRMED and last.effect == pytest.approx(-0.05, abs=0.005)
    assert last.sealed_bpb == pytest.approx(1.75, abs=0.005) and last.reason in out
    saved = json.loads((run_dir(last.run).path / "claim.json").read_text())
    assert len(saved["pairs"]) == LOOKS[0] and saved["verdict"] == "claim"


def test_both_are_run_with_the_same_fresh_seeds_and_their_weights_go(contest, house):
    contest(0.05)
    confirm_run("best", "baseline")
    made = [row for row in rows(house) if Flag.CONFIRM in row.flags and row.status != CONFIRMED]
    assert [row.seed for row in made] == [2, 2, 3, 3, 4, 4]
    assert [row.description.split(": ")[1] for row in made] == [
        "baseline", "best", "best", "baseline", "baseline", "best",
    ]  # fmt: skip
    for row in made:
        assert read_sealed(row.run) == pytest.approx(row.val_bpb + 0.3, abs=1e-6)
        assert not run_dir(row.run).weights.exists() and not run_dir(row.run).keep_weights.exists()


def test_the_mark_of_the_leaderboard_is_a_claim(contest, house):
    contest(0.05)
    path = house / "results.tsv"

    def verified():
        boards = gather([path])
        return {line.run for line in list_ranked(boards.boards[0], boards.claims) if line.verified}

    assert verified() == set()
    confirm_run("best", "baseline")
    assert verified() == {rows(house)[-1].run}


def test_what_is_no_better_is_not_claimed(contest, house, capsys):
    contest(0.0)
    assert confirm_run("best", "baseline") == 3
    out = capsys.readouterr().out
    assert out.startswith("claim: none: a gain of ") and "is not shown" in out
    assert rows(house)[-1].status == UNCONFIRMED


def test_asked_again_it_goes_on_with_what_is_on_record(contest, house, capsys):
    """Otherwise a person would ask until luck answers."""
    contested = contest(0.004)
    time = iter([True, True, False])
    best = contested.best.run
    short = confirm(resolve("cpu"), contested, fits=lambda seconds: next(time))
    assert short.stopped == "the time was over" and len(short.pairs) == 2
    confirm_run(best, "baseline")
    seeds = [row.seed for row in rows(house) if Flag.CONFIRM in row.flags and row.scored]
    assert seeds[:4] == [2, 2, 3, 3] and len(set(seeds)) == len(seeds) / 2
    before = len(rows(house))
    confirm_run(best, "baseline")  # decided: nothing is run again
    assert len(rows(house)) == before + 1


def test_an_interruption_keeps_what_was_run(contest, house, monkeypatch, capsys):
    contest(0.05)
    really = confirming.run_once
    left = iter([True, True, True])

    def run_once(request):
        if next(left, False):
            return really(request)
        raise Stopped("SIGINT")

    with monkeypatch.context() as patch:
        patch.setattr(confirming, "run_once", run_once)
        assert confirm_run("best", "baseline") == EXIT_INTERRUPTED
    assert "count when it is called again" in capsys.readouterr().err
    assert confirm_run("best", "baseline") == 0
    saved = json.loads((run_dir(rows(house)[-1].run).path / "claim.json").read_text())
    assert [pair["seed"] for pair in saved["pairs"]] == [2, 4, 5]  # the torn pair does not count


def test_a_trainer_that_fails_with_a_fresh_seed_is_no_claim(contest, house, monkeypatch, capsys):
    contest(0.05)
    with monkeypatch.context() as patch:
        really = runner.supervise

        def diverge(trainer, *arguments):
            outcome = really(trainer, *arguments)
            if trainer.read_text() == "best":
                outcome.fail("crash", "it diverged")
            return outcome

        patch.setattr(runner, "supervise", diverge)
        assert confirm_run("best", "baseline") == 3
    assert "claim: none: the trainer of" in capsys.readouterr().out
    assert confirm_run("best", "baseline") == 0  # asked again it is said, as those seeds are in no pair
    assert "; 1 more of its runs failed" in capsys.readouterr().out


def test_what_cannot_be_compared_is_said(scores, house):  # noqa: F811
    with pytest.raises(UserError, match="no scored run"):
        confirm_run("best", "baseline")
    scores += [1.5, 1.4]
    attempt(house, "baseline")
    with pytest.raises(UserError, match="nothing to claim"):
        confirm_run("best", "baseline")
    attempt(house, "short", budget=10.0)
    first, second = rows(house)
    with pytest.raises(UserError, match="not of one board"):
        confirm_run(first.run, second.run)
