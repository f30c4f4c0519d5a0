"""Keep or discard: luck is told from improvement, and the runs of one board are compared."""

import math
import random

import pytest
from conftest import row

from launcher.verdict import SeedNoise, Verdict, best_runs, decide, noise_on_record, pooled_noise

NOISE = SeedNoise(sigma=0.001, freedom=2)


BOARD = row().board


# --- The decision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, best, noise, action, reason",
    [
        ([1.0], [], None, "keep", "first result on this board"),
        ([1.01], [1.0], NOISE, "discard", "no improvement"),
        ([1.0], [1.0], NOISE, "discard", "no improvement"),
        ([0.999], [1.0], None, "keep", "no noise on record"),
        ([0.9], [1.0], NOISE, "keep", "beyond the noise"),
        ([0.999], [1.0], NOISE, "repeat", "within the noise"),
        ([0.999, 0.998], [1.0], NOISE, "discard", "over 2 seeds, within the noise"),
        ([0.991, 0.992], [1.0, 1.0], NOISE, "keep", "beyond the noise"),
    ],
)
def test_decisions(values, best, noise, action, reason):
    verdict = decide(values, best, noise)
    assert isinstance(verdict, Verdict) and verdict.action == action
    assert reason in verdict.reason


# --- The noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom, quantile", [(1, 31.821), (2, 6.965), (10, 2.764)])
@pytest.mark.parametrize("new, best", [(1, 1), (2, 1), (2, 3)])
def test_the_margin_is_that_of_the_tables(freedom, quantile, new, best):
    """One-sided 99% quantiles of Student's t, as statistics books print them."""
    margin = SeedNoise(0.004, freedom).margin(new, best)
    assert margin == pytest.approx(quantile * 0.004 * math.sqrt(1 / new + 1 / best), rel=2e-4)


def test_noise_is_pooled_over_trainers():
    noise = pooled_noise([[1.0, 1.2], [2.0, 2.1, 2.2], [7.0]])
    assert noise.freedom == 3
    assert noise.sigma == pytest.approx(math.sqrt((0.02 + 0.02) / 3))
    assert pooled_noise([[1.0], [2.0]]) is None and pooled_noise([]) is None


def test_only_repetitions_on_purpose_are_noise_on_record():
    rows = [
        row(val_bpb=1.0, marks="noise"),
        row(val_bpb=1.2, marks="noise"),
        row(val_bpb=5.0),
        row(val_bpb=5.0, marks="noise,contended"),
        row(val_bpb=5.0, marks="noise", track="another"),
        row(val_bpb=0.0, marks="noise", status="crash"),
    ]
    noise = noise_on_record(rows, BOARD)
    assert noise.freedom == 1 and noise.sigma == pytest.approx(0.2 / math.sqrt(2))


def test_luck_rarely_passes_the_margin():
    """Of comparisons of two equal trainers, about one in a hundred does."""
    rng = random.Random(0)
    lucky = 0
    for _ in range(3000):
        noise = pooled_noise([[rng.gauss(1.0, 0.01) for _ in range(4)]])
        lucky += rng.gauss(1.0, 0.01) - rng.gauss(1.0, 0.01) > noise.margin()
    assert 0.003 < lucky / 3000 < 0.025


# --- The best so far ----------------------------------------------------------------------------------------


def test_runs_of_other_boards_and_flagged_runs_do_not_count():
    rows = [
        row(val_bpb=0.5, rules=2),
        row(val_bpb=0.6, marks="short", budget=60.0),
        row(val_bpb=0.7, marks="contended"),
        row(val_bpb=0.9, run="good"),
    ]
    assert [row.run for row in best_runs(rows, BOARD)] == ["good"]
    assert noise_on_record(rows, BOARD) is None


def test_short_runs_are_compared_with_short_runs():
    short = row(marks="short", budget=60.0)
    assert best_runs([row(), short], short.board) == [short]


def test_the_best_is_the_trainer_kept_last_with_all_its_seeds():
    rows = [
        row(run="old", source="a"),
        row(run="seed 1", source="b"),
        row(run="seed 2", source="b", status="discard"),
        row(run="worse", source="c", status="discard"),
    ]
    assert [row.run for row in best_runs(rows, BOARD)] == ["seed 1", "seed 2"]
    assert best_runs([], BOARD) == []


def test_a_refuted_run_is_not_the_best():
    rows = [
        row(val_bpb=0.9, run="honest", source="a"),
        row(val_bpb=0.5, run="fake", source="b"),
        row(run="fake", status="refuted"),
    ]
    assert [row.run for row in best_runs(rows, BOARD)] == ["honest"]
    rows.append(row(run="fake", status="verified"))  # the last verification counts
    assert [row.run for row in best_runs(rows, BOARD)] == ["fake"]
