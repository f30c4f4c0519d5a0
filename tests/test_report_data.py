"""What the report tells of rows: series, effects, headline, counts, failures."""

import math
from dataclasses import replace

import pytest
from conftest import row

from launcher.board import gather
from launcher.ledger import CONFIRMED, MOVED, REFUTED, UNCONFIRMED, VERIFIED, Flag, Ledger, Row
from launcher.report.data import (
    Effect,
    all_rows,
    beliefs_built_on,
    bests_of_agents,
    collect_series,
    count,
    gains_over_time,
    group_failures,
    plain_effects,
    unix_time,
    value_limits,
    values_built_on,
    write_headline,
)
from launcher.report.text import round_numbers, with_error


def ledger_of(tmp_path, *rows, name="results.tsv"):
    """Write rows as a ledger, an hour apart and with ids r0, r1, ..., and return its path."""
    ledger = Ledger(tmp_path / name)
    for number, each in enumerate(rows):
        each = replace(each, run=each.run if each.run != "r1" else f"r{number}")
        ledger.append(replace(each, time=each.time or f"2026-01-01T{number:02}:00:00Z"))
    return ledger.path


def series_of(tmp_path, *rows):
    return collect_series(gather([ledger_of(tmp_path, *rows)]))


def a_night(tmp_path, **first):
    """Three edits, each on the one kept before: a gain, a loss, a crash."""
    return series_of(
        tmp_path,
        row(source="a", val_bpb=1.5, description="baseline", build_on="a", **first),
        row(source="b", parent="a", val_bpb=1.4, description="a gain", build_on="b"),
        row(source="c", parent="b", val_bpb=1.6, status="discard", description="a loss", build_on="b"),
        row(source="d", parent="b", val_bpb=0.0, status="crash", reason="boom", description="a crash"),
    )


# --- Series -------------------------------------------------------------------------------------------------


def test_every_run_of_a_board_is_in_its_series_in_time_order(tmp_path):
    [series] = a_night(tmp_path)
    assert [run.kind for run in series.runs] == ["kept", "kept", "discarded", "failed"]
    assert [run.number for run in series.runs] == [1, 2, 3, 4]
    assert series.baseline.name == "r0" and series.best.name == "r1" and series.is_ranked
    assert [run.row.description for run in series.kept] == ["a gain"]
    assert [run.row.description for run in series.near_misses] == ["a loss"]


def test_effects_are_those_believed_now_with_error_and_chance(tmp_path):
    [series] = a_night(tmp_path)
    first, gain, loss, crash = [run.effect for run in series.runs]
    assert first is None and crash is None
    assert gain.value < 0 < loss.value and gain.error > 0 and gain.p_better > 0.5 > loss.p_better


def test_an_edit_that_the_search_left_again_is_not_in_the_current_trainer(tmp_path):
    [series] = series_of(
        tmp_path,
        row(source="a", val_bpb=1.5, build_on="a"),
        row(source="b", parent="a", val_bpb=1.45, build_on="b"),
        row(source="c", parent="b", val_bpb=1.7, status="discard", build_on="a"),
    )
    assert [run.is_current for run in series.runs] == [True, False, False]
    assert [run.built_on for run in series.runs] == [1.5, 1.45, 1.5]


def test_a_lucky_run_of_the_baseline_for_a_claim_takes_no_edit_back(tmp_path):
    [series] = series_of(
        tmp_path,
        row(source="a", val_bpb=1.5, build_on="a"),
        row(source="b", parent="a", val_bpb=1.4, build_on="b"),
        row(source="b", val_bpb=1.4, seed=2, marks=Flag.CONFIRM),
        row(source="a", val_bpb=1.1, seed=2, marks=Flag.CONFIRM, status="keep"),
    )
    assert [run.row.description for run in series.kept if not run.is_current] == []
    assert series.kept[0].is_current


def test_the_trainer_that_a_night_ended_on_is_the_current_one(tmp_path):
    best = row(run="rb", source="b", parent="a", val_bpb=1.2, build_on="b")
    [series] = series_of(
        tmp_path,
        row(source="a", val_bpb=1.5, build_on="a"),
        best,
        row(source="c", parent="b", val_bpb=1.35, build_on="c"),
        replace(best, status=MOVED, time="2026-01-01T09:00:00Z"),
    )
    assert [run.is_current for run in series.runs] == [True, True, False]


def test_a_test_of_an_old_run_does_not_move_what_is_built_on(tmp_path):
    """The best is sought among the trainers since a person moved the branch: here to that of x."""
    old = row(run="ra", source="a", val_bpb=1.2, build_on="a")
    [series] = series_of(
        tmp_path,
        old,
        row(source="x", parent="x", val_bpb=1.5, build_on="x"),
        row(source="y", parent="x", val_bpb=1.4, build_on="y"),
        replace(old, status=VERIFIED, time="2026-01-01T09:00:00Z"),
    )
    assert series.best.row.source == "y" and series.baseline.row.source == "a"


def test_runs_that_decide_nothing_are_no_experiments(tmp_path):
    [series] = series_of(
        tmp_path,
        row(source="a", val_bpb=1.5),
        row(source="a", val_bpb=1.2, seed=2, marks=Flag.NOISE),
        row(source="a", val_bpb=1.3, seed=3, marks=Flag.CONFIRM),
        row(source="b", val_bpb=1.4, status="discard"),
    )
    assert [run.number for run in series.runs] == [1, 0, 0, 2]
    assert [run.kind for run in series.runs][1:3] == ["evidence", "evidence"]
    assert series.runs[2].status == "confirm"


def test_runs_that_measure_noise_alone_are_no_series(tmp_path):
    assert series_of(tmp_path, row(val_bpb=1.5, marks=Flag.NOISE), row(val_bpb=0.0)) == []


def test_a_ledger_of_the_original_is_a_series_without_belief(tmp_path):
    old = tmp_path / "old.tsv"
    old.write_text(
        "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
        "a1\t0.9979\t44.0\tkeep\tbaseline\n"
        "b2\t0.9932\t44.0\tkeep\tlarger step\n"
        "c3\t0.0\t0.0\tcrash\tdouble width\n"
        "d4\t0.9950\t44.0\tdiscard\tsmaller step\n"
    )
    [series] = collect_series(gather([old]))
    assert series.title == "old.tsv" and not series.is_ranked and series.survey is None
    assert [run.name for run in series.runs] == ["a1", "b2", "c3", "d4"]
    assert series.runs[1].effect.value == pytest.approx(-0.0047) and series.runs[1].effect.error is None
    assert series.near_misses[0].effect.value == pytest.approx(0.0018)
    assert len({run.id for run in series.runs}) == 4


def test_ledgers_of_two_machines_are_two_series_with_the_board_first(tmp_path):
    here = ledger_of(tmp_path, row(val_bpb=1.5, device="A"), row(val_bpb=1.4, device="A", source="t"))
    there = ledger_of(tmp_path, row(run="x1", val_bpb=1.3, device="B"), name="mac.tsv")
    devices = [series.device for series in collect_series(gather([here, there]))]
    assert devices == ["A", "B"]  # the one with the newest run first


def test_a_night_with_a_short_budget_comes_before_an_older_ranked_run(tmp_path):
    short = [row(val_bpb=1.5, budget=60.0, marks=Flag.SHORT, source=f"s{i}") for i in range(3)]
    series = series_of(tmp_path, row(val_bpb=1.1), *short)
    assert [one.is_ranked for one in series] == [False, True]


def test_runs_with_a_short_budget_are_told_as_not_ranked(tmp_path):
    rows = [row(val_bpb=1.5 - i / 10, budget=8.0, marks=Flag.SHORT, source=f"s{i}") for i in range(3)]
    [series] = series_of(tmp_path, *rows)
    assert not series.is_ranked and "a budget other than the rules'" in series.detail


def test_a_refuted_run_is_told_and_says_why(tmp_path):
    refuted = row(run="bad", val_bpb=1.1, source="x")
    [series] = series_of(
        tmp_path, row(val_bpb=1.5), refuted, replace(refuted, status=REFUTED, reason="scored 2.0")
    )
    assert [run.why for run in series.runs] == ["", "refuted: scored 2.0"]
    assert series.best.row.val_bpb == 1.5 and series.kept == []
    assert series.runs[1].kind == "discarded" and series.runs[1].status == "keep, refuted"


def test_a_run_id_that_is_a_path_names_no_folder(tmp_path):
    [series] = series_of(tmp_path, row(run="../../etc", val_bpb=1.5), row(run="a b", val_bpb=1.4))
    assert [run.id for run in series.runs] == ["s0.1", "s0.2"]


def test_decimals_follow_the_noise(tmp_path):
    [series] = a_night(tmp_path)
    for sigma, decimals in ((0.008, 3), (0.0015, 4), (0.0006, 4), (0.0002, 5), (1e-9, 6), (math.nan, 4)):
        assert replace(series, survey=series.survey._replace(sigma=sigma)).decimals == decimals


# --- Rows ---------------------------------------------------------------------------------------------------


def test_what_is_built_on_follows_keeps_and_returns():
    rows = [
        Row(source="a", val_bpb=1.5, status="keep", build_on="a"),
        Row(source="b", val_bpb=1.6, status="discard", build_on="a"),
        Row(source="c", val_bpb=1.4, status="keep", build_on="c"),
        Row(source="c", val_bpb=1.1, status="discard", marks=Flag.NOISE),
        Row(status="crash"),
        Row(source="d", val_bpb=1.7, status="discard", build_on="a"),
    ]
    assert values_built_on(rows) == [1.5, 1.5, 1.4, 1.4, 1.4, 1.5]
    assert values_built_on([Row(val_bpb=1.5, status="discard")]) == [None]


def test_without_sources_what_is_built_on_is_the_last_keep():
    rows = [Row(val_bpb=value, status=status) for value, status in ((1.5, "keep"), (1.6, "discard"))]
    assert values_built_on(rows) == [1.5, 1.5]
    assert plain_effects(rows)[1] == Effect(pytest.approx(0.1))


def test_a_belief_holds_until_the_next_one():
    rows = [
        Row(),
        Row(belief_after=1.5, belief_after_error=0.1),
        Row(status="crash"),
        Row(belief_after=math.inf),
    ]
    assert beliefs_built_on(rows) == [None, (1.5, 0.1), (1.5, 0.1), (1.5, 0.1)]


def test_a_failure_far_above_does_not_flatten_the_rest():
    low, high = value_limits([1.5 - i / 100 for i in range(20)] + [9.0], first=1.5)
    assert 1.2 < low < 1.31 and 1.5 < high < 1.6


def test_the_baseline_and_equal_values_are_in_sight():
    low, high = value_limits([1.0, 1.01, 1.02], first=1.4)
    assert low < 1.0 and high > 1.4
    low, high = value_limits([1.0, 1.0], first=1.0)
    assert low < 1.0 < high


def test_failures_are_grouped_by_reason_whatever_their_numbers():
    rows = [
        Row(status="crash", reason="out of memory: 3.5 GiB", description="wide"),
        Row(status="crash", reason="out of memory: 12 GiB", description="wider"),
        Row(status="timeout", reason="no step within 60 s"),
        Row(status="crash", marks=Flag.DRY),
        Row(status="keep", val_bpb=1.5),
    ]
    groups = [(group.status, group.reason, len(group.rows)) for group in group_failures(rows)]
    assert groups == [
        ("crash", "out of memory: N GiB", 2),
        ("timeout", "no step within N s", 1),
        ("dry run: crash", "no reason on record", 1),
    ]


# --- Headline and counts ------------------------------------------------------------------------------------


def test_without_a_claim_the_best_value_is_told_as_not_confirmed(tmp_path):
    path = tmp_path / "results.tsv"
    series = a_night(tmp_path)
    head = write_headline(series, gather([path]).claims)
    believed = series[0].survey.trainers["b"]
    assert f"{believed.mean:.{series[0].decimals}f} \u00b1 " in head.large
    assert head.large.endswith("not confirmed") and not head.is_claim
    assert "a gain" in head.lines[0] and "below the baseline" in head.lines[0]
    assert "autoresearch confirm" in head.lines[1]


def test_a_claim_is_the_headline_and_a_failed_test_is_told(tmp_path):
    series = a_night(tmp_path)
    tested = replace(series[0].best.row, effect=-0.0987654, reason="0.098765 [0.09, 0.11] better, p 0.001")
    head = write_headline(series, {"r1": replace(tested, status=CONFIRMED)})
    assert head.is_claim and head.large.startswith("0.098") and "better than the baseline" in head.large
    assert head.lines[0] == "\u00aba gain\u00bb, claimed on 2026-01-01:" and "p 0.001" in head.lines[1]
    assert len(head.lines) == 2  # it is the one that is believed best
    head = write_headline(series, {"r1": replace(tested, status=UNCONFIRMED, reason="none: p 0.4")})
    assert not head.is_claim and head.lines[1] == "The claim that was tested on 2026-01-01: none: p 0.4."


def test_an_older_claim_hides_no_newer_belief_and_no_newer_test(tmp_path):
    series = series_of(
        tmp_path,
        row(source="a", val_bpb=1.5, build_on="a"),
        row(source="b", parent="a", val_bpb=1.4, build_on="b", description="claimed"),
        row(source="c", parent="b", val_bpb=1.2, build_on="c", description="newer"),
    )
    old = replace(series[0].runs[1].row, status=CONFIRMED, effect=-0.1, reason="0.1 better")
    new = replace(
        series[0].runs[2].row, status=UNCONFIRMED, reason="none: p 0.4", time="2026-01-02T00:00:00Z"
    )
    head = write_headline(series, {"r1": old, "r2": new})
    assert head.is_claim and head.lines[0] == "\u00abclaimed\u00bb, claimed on 2026-01-01:"
    assert head.lines[2].startswith("Believed better by now: \u00abnewer\u00bb, val_bpb 1.2")
    assert head.lines[2].endswith(", not confirmed.")
    assert head.lines[3] == "The claim that was tested on 2026-01-02: none: p 0.4."


def test_a_claim_of_a_trainer_that_verify_refuted_is_dropped(tmp_path):
    claimed = row(run="good", source="b", parent="s", val_bpb=1.2)
    rows = [
        row(val_bpb=1.5),
        claimed,
        replace(claimed, status=CONFIRMED, effect=-0.3, reason="0.3 better"),
        replace(claimed, status=REFUTED, reason="it learned the validation text"),
    ]
    boards = gather([ledger_of(tmp_path, *rows[:3])])
    assert write_headline(collect_series(boards), boards.claims).is_claim
    Ledger(tmp_path / "results.tsv").append(rows[3])
    boards = gather([tmp_path / "results.tsv"])
    head = write_headline(collect_series(boards), boards.claims)
    assert not head.is_claim and head.lines[0] == "Nothing is believed better than the baseline."


def test_nothing_better_than_the_baseline_is_said(tmp_path):
    series = series_of(tmp_path, row(val_bpb=1.5), row(val_bpb=1.7, status="discard", source="t", parent="s"))
    assert write_headline(series, {}).lines == ["Nothing is believed better than the baseline."]


def test_a_luckier_seed_of_the_baseline_is_no_gain(tmp_path):
    series = series_of(tmp_path, row(val_bpb=1.5), row(val_bpb=1.45, seed=2, status="discard"))
    assert write_headline(series, {}).lines == ["Nothing is believed better than the baseline."]


def test_an_edit_is_one_experiment_however_often_it_was_run(tmp_path):
    """The baseline is none. Repeats and runs without a verdict are no further ones. The parts add up."""
    rows = [
        row(source="a", val_bpb=1.5, build_on="a"),
        row(source="b", parent="a", val_bpb=1.45, status="discard", marks=Flag.REPEAT, build_on="a"),
        row(source="b", parent="a", val_bpb=1.4, seed=2, build_on="b"),
        row(source="c", parent="b", val_bpb=1.3, status="discard", marks=Flag.CONTENDED),
        row(source="c", parent="b", val_bpb=1.6, status="discard", build_on="b"),
        row(source="d", parent="b", val_bpb=0.0, status="crash"),
        row(source="e", parent="b", val_bpb=1.3, status="discard", marks=Flag.CONTENDED),
        row(source="b", val_bpb=1.4, seed=3, marks=Flag.NOISE),
        row(source="x", val_bpb=0.0, status="crash", track="another one, on which nothing was scored"),
        row(source="y", parent="y", val_bpb=0.0, status="crash", track="another one"),
        row(source="y", val_bpb=1.5, marks=Flag.NOISE, track="another one"),
        row(source="f", parent="f", val_bpb=1.7, status="discard", description="another baseline"),
    ]
    boards = gather([ledger_of(tmp_path, *rows)])
    series = collect_series(boards)
    counts = count(series, all_rows(boards))
    parts = (counts.kept, counts.discarded, counts.failed, counts.no_verdict)
    assert (counts.experiments, parts) == (5, (1, 1, 2, 1)) and sum(parts) == counts.experiments
    at_six = count(series, all_rows(boards), lambda row: row.time >= "2026-01-01T06")
    assert (at_six.experiments, at_six.no_verdict, at_six.failed) == (2, 1, 1)


def test_counts_tell_hours_kept_failed_and_energy(tmp_path):
    rows = [
        row(val_bpb=1.5, time="2026-01-01T00:00:00Z", total_seconds=1800, energy_kj=1800),
        row(
            val_bpb=1.4,
            source="b",
            parent="s",
            time="2026-01-01T00:45:00Z",
            total_seconds=900,
            energy_kj=1800,
        ),
        row(status="crash", val_bpb=0, source="c", time="2026-01-02T00:00:00Z", total_seconds=3600),
        row(status="crash", val_bpb=0, source="d", marks=Flag.INTERRUPTED, time="2026-01-02T01:00:00Z"),
        row(status="crash", val_bpb=0, rules=0, marks=Flag.DRY, time="2026-01-02T01:00:00Z"),
    ]
    boards = gather([ledger_of(tmp_path, *rows)])
    counts = count(collect_series(boards), all_rows(boards))
    assert counts.hours == pytest.approx(2.0)  # the day between them is no part of the night
    assert (counts.experiments, counts.kept, counts.failed) == (3, 1, 1)
    assert (counts.no_verdict, counts.refused, counts.kwh) == (1, 1, 1.0)
    assert counts.line == (
        "2.0 hours, 3 experiments, 1.5 an hour, 1 kept, 0 discarded, 1 failed, 1 without a verdict, "
        "1 edit refused by a dry run, 1.00 kWh"
    )


# --- Devices and agents -------------------------------------------------------------------------------------


def test_gains_are_percent_below_each_ones_baseline(tmp_path):
    [series] = a_night(tmp_path)
    [line] = gains_over_time([series])
    assert line.x == [0, 1, 2, 3] and line.y == pytest.approx([0, 6.667, 6.667, 6.667])


def test_agents_are_compared_by_the_number_of_their_experiments(tmp_path):
    agents = ["", "builtin", "claude", "builtin", "claude", "claude"]
    values = [1.5, 1.45, 1.4, 1.44, 1.6, 1.3]
    rows = [
        row(agent=agent, val_bpb=value, source=f"s{value}", status="keep" if value != 1.6 else "discard")
        for agent, value in zip(agents, values, strict=True)
    ]
    builtin, claude = bests_of_agents(series_of(tmp_path, *rows)[0])
    assert (builtin.label, builtin.x, builtin.y) == ("builtin", [1, 2], [1.45, 1.44])
    assert (claude.label, claude.x, claude.y) == ("claude", [1, 2, 3], [1.4, 1.4, 1.3])


# --- Small things -------------------------------------------------------------------------------------------


def test_times_that_are_none_are_none():
    assert unix_time("1970-01-01T00:01:00Z") == unix_time("1970-01-01 00:01:00") == 60
    for text in ("", "yesterday", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00"):
        assert unix_time(text) is None


def test_numbers_have_no_more_digits_than_they_mean():
    assert with_error(-0.00004, 0.0006, 4, "+") == "0.0000 \u00b1 0.0006"
    assert with_error(-0.0123, None, 3, "+") == "-0.012"
    text = "effect -0.001234 +- 0.000567, P(better) 0.98, run 20260611-0.123456x"
    assert round_numbers(text, 4) == "effect -0.0012 +- 0.0006, P(better) 0.98, run 20260611-0.123456x"


def test_a_ledger_of_the_original_is_drawn_in_the_order_of_its_file(tmp_path):
    """It names neither runs nor times, and its failures stand between its scores."""
    scores = [1.2, 0.0, 1.1, 1.15, 1.0]
    lines = ["commit\tval_bpb\tmemory_gb\tstatus\tdescription"]
    for number, score in enumerate(scores):
        status = "crash" if not score else "discard" if score == 1.15 else "keep"
        lines.append(f"abc{number}\t{score:.6f}\t44.0\t{status}\tidea {number}")
    path = tmp_path / "theirs.tsv"
    path.write_text("\n".join([*lines, ""]))
    [series] = collect_series(gather([path]))
    assert [run.row.val_bpb for run in series.runs] == scores and not series.is_ranked
    assert [run.built_on for run in series.runs] == [1.2, 1.2, 1.1, 1.1, 1.0]
    assert "nothing of it is verified" in series.detail and series.baseline.name == "abc0"
