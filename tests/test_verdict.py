"""Keep, discard or go back: which runs of a ledger are evidence, and which trainers may be gone back to."""

from dataclasses import replace

import pytest
from conftest import row

from launcher.ledger import Flag
from launcher.verdict import (
    believed_runs,
    best_run,
    best_since_moved,
    board_runs,
    decide,
    fresh_seed,
    give_verdict,
    observe,
    runs_of,
    survey_board,
    tried_since_moved,
)

BOARD = row().board


def night(*steps):
    """Rows of a branch: (source, parent, build_on)."""
    return [
        row(run=str(i), source=source, parent=parent, build_on=build_on)
        for i, (source, parent, build_on) in enumerate(steps)
    ]


# --- Evidence -----------------------------------------------------------------------------------------------


def test_runs_of_other_boards_and_flagged_runs_do_not_count():
    rows = [
        row(val_bpb=0.5, rules=2),
        row(val_bpb=0.6, marks="short", budget=60.0),
        row(val_bpb=0.7, marks="contended"),
        row(val_bpb=0.0, status="crash"),
        row(val_bpb=0.9, run="good"),
    ]
    assert [row.run for row in board_runs(rows, BOARD)] == ["good"]


def test_short_runs_are_compared_with_short_runs():
    short = row(marks="short", budget=60.0)
    assert board_runs([row(), short], short.board) == [short]


def test_a_refuted_run_is_no_evidence():
    rows = [
        row(val_bpb=0.9, run="honest", source="a"),
        row(val_bpb=0.5, run="fake", source="b"),
        row(run="fake", status="refuted"),
    ]
    assert best_run(rows, BOARD).run == "honest"
    rows.append(row(run="fake", status="verified"))  # the last verification counts
    assert best_run(rows, BOARD).run == "fake"


def test_a_seed_that_ran_again_is_no_new_evidence():
    rows = [
        row(source="a", seed=1),
        row(source="a", seed=1),
        row(source="a", seed=2),
        row(source="b", seed=1),
    ]
    assert [(one.source, one.val_bpb) for one in observe(rows)] == [("a", 1.25), ("a", 1.25), ("b", 1.25)]


def test_what_removes_code_is_told_to_the_belief():
    [one] = observe([row(marks=Flag.SHORTER, parent="p")])
    assert one.removes_code and one.parent == "p" and one.kept


def test_the_best_is_the_trainer_that_is_believed_lowest_not_the_luckiest_run():
    many = [row(run=f"a{i}", source="a", seed=i, val_bpb=1.0 + 0.002 * (-1) ** i) for i in range(6)]
    lucky = row(run="b", source="b", parent="a", val_bpb=0.9979, status="discard")
    unlucky = row(run="b2", source="b", parent="a", val_bpb=1.0045, seed=2, status="discard")
    assert best_run([*many, lucky, unlucky], BOARD).run == "a1"
    assert [one.run for one in runs_of([*many, lucky, unlucky], BOARD, "b")] == ["b", "b2"]
    assert best_run([], BOARD) is None and survey_board([], BOARD) is None


def test_a_survey_knows_effects_now():
    rows = [
        row(run="1", source="a", val_bpb=1.0),
        row(run="2", source="b", parent="a", val_bpb=0.99),
        row(run="3", source="c", parent="b", val_bpb=1.01, status="discard"),
    ]
    believed = survey_board(rows, BOARD)
    assert list(believed.trainers) == ["a", "b", "c"] and believed.best == "b"
    assert believed.trainers["b"].effect == pytest.approx(-0.01, abs=0.002)
    assert believed.trainers["c"].effect == pytest.approx(0.02, abs=0.003)
    assert believed.trainers["c"].parent == "b" and believed.trainers["a"].parent == ""


# --- A long board -------------------------------------------------------------------------------------------


def long_board(runs):
    """Rows of a branch on which every fiftieth edit was kept, each a little lower."""
    rows = []
    parent = ""
    best = 1.3
    for i in range(runs):
        kept = i % 50 == 0
        score = best - 0.001 if kept else best + 0.002
        made = row(
            run=f"r{i}",
            source=f"s{i}",
            seed=i,
            parent=parent,
            val_bpb=score,
            status="keep" if kept else "discard",
            effect=score - best,
            effect_error=0.0005,
            belief_before=best,
            p_better=0.9 if kept else 0.1,
        )
        if kept:
            parent = made.source
            best = score
        made.build_on = parent
        rows.append(made)
    return rows


def test_a_belief_is_made_of_the_newest_runs_and_those_that_they_stand_on():
    rows = long_board(1010)
    believed = [row.source for row in believed_runs(rows)]
    assert believed == ["s0", "s650", *(f"s{i}" for i in range(700, 1010))]
    assert believed_runs(rows[:399]) == rows[:399]


def test_a_long_board_is_judged_as_a_short_one():
    rows = long_board(1010)
    new = row(run="new", source="new", parent="s1000", val_bpb=1.27, status="")
    decision = decide(rows, new)
    assert (decision.action, decision.build_on, decision.best) == ("keep", "new", "new")
    worse = decide(rows, replace(new, val_bpb=1.29))
    assert (worse.action, worse.build_on, worse.best) == ("discard", "s1000", "s1000")


def test_of_a_trainer_of_long_ago_it_is_said_what_was_believed_then():
    rows = long_board(1010)
    rows[101].val_bpb = 0.5  # lucky, and long ago
    believed = survey_board(rows, BOARD)
    assert list(believed.trainers) == [f"s{i}" for i in range(1010)]
    assert believed.best == "s1000" == best_since_moved(rows, BOARD, "s1000").source
    old = believed.trainers["s101"]
    assert (old.parent, old.effect, old.p_better, old.runs) == ("s100", rows[101].effect, 0.1, 1)
    assert old.mean == pytest.approx(rows[101].belief_before + rows[101].effect)
    assert best_since_moved(rows, BOARD, "s101").source == "s101"  # a person went back there


def test_a_run_that_diverged_is_a_bad_run_and_no_more():
    rows = [
        row(source="a", val_bpb=1.5),
        row(source="b", parent="a", val_bpb=1e300, status="discard", run="r2"),
    ]
    decision = decide(rows, row(source="c", parent="a", val_bpb=1.4, status="", run="r3"))
    assert decision.action == "keep" and decision.effect == pytest.approx(-0.1, abs=0.01)


# --- A person's move is not undone --------------------------------------------------------------------------


def test_what_was_run_since_a_person_moved_the_branch_may_be_gone_back_to():
    first_night = night(("a", "a", "a"), ("b", "a", "b"), ("c", "b", "b"))
    assert tried_since_moved(first_night, BOARD, "b") == {"a", "b", "c"}
    assert tried_since_moved(first_night, BOARD, "a") == {"a"}  # git reset: to begin anew from there
    second = [*first_night, *night(("d", "a", "a"), ("e", "a", "e"))]
    assert tried_since_moved(second, BOARD, "e") == {"a", "d", "e"}


def test_another_run_of_the_same_trainer_moves_nothing():
    rows = night(("a", "a", "a"), ("b", "a", "b"))
    noise = row(source="b", marks=Flag.NOISE)
    confirm = row(source="z", marks=Flag.CONFIRM)
    assert tried_since_moved([*rows, noise, confirm], BOARD, "b") == {"a", "b"}


def test_the_end_of_a_night_is_no_move_of_a_persons():
    rows = night(("a", "a", "a"), ("b", "a", "b"), ("c", "b", "c"))
    assert tried_since_moved(rows, BOARD, "b") == {"b"}
    rows.append(row(run="1", source="b", status="moved", build_on="b"))
    assert tried_since_moved(rows, BOARD, "b") == {"a", "b", "c"}


def test_a_run_outside_git_says_nothing_of_the_branch():
    rows = night(("a", "a", "a"), ("b", "a", "b"))
    assert tried_since_moved([*rows, row(source="x", build_on="x")], BOARD, "b") == {"a", "b"}


def test_an_edit_of_a_trainer_without_a_score_is_a_beginning():
    """It cannot be told whether it is better, and nothing of another line takes its place."""
    rows = night(("a", "a", "a"), ("b", "a", "b"))
    decision = decide(rows, row(run="new", source="e", parent="unknown", val_bpb=1.9, status=""))
    assert (decision.action, decision.build_on) == ("keep", "e") and decision.effect == 0.0


def test_a_night_ends_with_a_simplification_that_was_kept():
    rows = night(("a", "a", "a"))
    rows.append(row(run="s", source="s", parent="a", marks="shorter", val_bpb=1.25005, build_on="s"))
    assert best_since_moved(rows, BOARD, "s").source == "s"
    rows[-1].marks = ""
    assert best_since_moved(rows, BOARD, "s").source == "a"


def test_a_trainer_that_a_person_committed_is_kept_although_another_line_was_better():
    rows = night(("a", "a", "a"), ("b", "a", "b"))
    mine = row(run="mine", source="mine", parent="mine", val_bpb=1.9, status="", seed=1)
    decision = decide(rows, mine)
    assert (decision.action, decision.build_on) == ("keep", "mine")
    assert decision.reason == "first result of the trainer as committed"
    kept = row(run="mine", source="mine", parent="mine", val_bpb=1.9, build_on="mine")
    worse = decide([*rows, kept], row(run="next", source="next", parent="mine", val_bpb=1.95, status=""))
    assert (worse.action, worse.build_on) == ("discard", "mine")


def test_without_a_repository_the_trainer_kept_last_is_the_parent():
    rows = [row(run="1", source="a", val_bpb=1.3), row(run="2", source="b", val_bpb=1.2, build_on="b")]
    decision = decide(rows, row(run="3", source="c", val_bpb=1.25, status=""))
    assert (decision.action, decision.build_on) == ("discard", "b")
    assert decision.before == pytest.approx(1.2, abs=0.002)


def test_a_fresh_seed_was_had_by_none_of_the_trainers():
    rows = [row(source="a", seed=4), row(source="b", seed=2), row(source="c", seed=9)]
    assert fresh_seed(rows, ["a", "b"]) == 5 and fresh_seed([], ["a"]) == 1


# --- Runs that decide nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [Flag.NOISE, Flag.CONFIRM])
def test_a_run_that_decides_nothing_is_no_keep(flag):
    first = row(source="a", val_bpb=1.5)
    again = row(run="again", source="a", val_bpb=1.4, seed=2, marks=flag, status="")
    give_verdict([first], again, [])
    assert again.status == "discard" and again.build_on == "" and again.belief_after > 0


def test_the_best_is_named_by_a_run_that_decided():
    rows = [
        row(run="first", source="a", val_bpb=1.5, description="an edit"),
        row(run="again", source="a", val_bpb=1.4, seed=2, marks=Flag.CONFIRM, description="confirm, seed 2"),
    ]
    assert best_since_moved(rows, BOARD, "a").run == "first"
