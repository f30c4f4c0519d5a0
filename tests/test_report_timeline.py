"""The time line of a night."""

import os
import platform
import time

from launcher.ledger import Row
from launcher.report.data import Run, Series
from launcher.report.files import Entry, Folder, Trace, loop_lives
from launcher.report.timeline import agent_use, by_hour, current_phase, last_night, make_lanes


def run_of(start=0.0, total=400.0, trained=300.0, name="r1"):
    row = Row(run=name, training_seconds=trained, total_seconds=total, description="an idea")
    return Run(row, name, 1, start, None, None, None, False, "")


def lanes_of(runs, folders=None, log=()):
    return make_lanes([Series("t", "", "a GPU", True, runs, None)], folders or {}, list(log))


def test_a_run_is_start_up_training_and_scoring():
    folder = Folder(trace=Trace(started=60.0, stopped=361.0))
    [lane] = lanes_of([run_of()], {"r1": folder})
    assert [(span.kind, span.start, span.end) for span in lane.spans] == [
        ("start-up", 0.0, 60.0),
        ("training", 60.0, 361.0),
        ("scoring", 361.0, 400.0),
    ]
    assert lane.seconds("training") == 301.0


def test_without_its_events_a_run_is_start_up_and_training():
    [lane] = lanes_of([run_of()])
    assert [(span.kind, span.end) for span in lane.spans] == [("start-up", 100.0), ("training", 400.0)]


def test_runs_without_times_have_no_lane():
    assert (
        lanes_of([run_of(start=None), run_of(total=0.0), run_of(total=1e18), run_of(total=float("nan"))])
        == []
    )


def test_a_run_that_trained_for_less_than_nothing_has_a_lane_of_its_length():
    [lane] = lanes_of([run_of(trained=-1e308)])
    assert [(span.kind, span.start, span.end) for span in lane.spans] == [("start-up", 0.0, 400.0)]


def test_the_log_adds_the_agent_dry_runs_and_pauses_to_the_lane_of_its_device():
    log = [
        Entry(10.0, "phase", {"phase": "agent"}),
        Entry(70.0, "turn", {"seconds": 60, "agent": "claude"}),
        Entry(70.0, "phase", {"phase": "dry run", "text": "dry run: an idea"}),
        Entry(100.0, "phase", {"phase": "training"}),
        Entry(500.0, "experiment", {"run": "r1"}),
        Entry(500.0, "phase", {"phase": "pause", "text": "pausing 30 s"}),
        Entry(530.0, "end", {}),
    ]
    [lane] = lanes_of([run_of(start=100.0)], log=log)
    assert [(span.start, span.end, span.text) for span in lane.agent] == [(10.0, 70.0, "claude thinks")]
    assert [span.kind for span in lane.spans] == ["dry run", "start-up", "training", "waiting"]
    assert lane.seconds("dry run") == 30 and lane.seconds("waiting") == 30


def test_the_log_of_other_runs_is_nobodys():
    log = [Entry(70.0, "turn", {"seconds": 60}), Entry(500.0, "experiment", {"run": "elsewhere"})]
    [lane] = lanes_of([run_of()], log=log)
    assert lane.agent == []


def test_a_phase_that_was_cut_off_has_no_known_end():
    log = [
        Entry(0.0, "phase", {"phase": "pause"}),
        Entry(9000.0, "begin", {}),
        Entry(9500.0, "experiment", {"run": "r1"}),
    ]
    [lane] = lanes_of([run_of()], log=log)
    assert lane.seconds("waiting") == 0


def test_a_span_is_split_at_the_hours_of_the_local_clock():
    [lane] = lanes_of([run_of(start=3500.0, total=3900.0, trained=3900.0)])
    pieces = {
        hour: [(piece.start, piece.end) for piece in found] for hour, found in by_hour(lane.spans, 0).items()
    }
    assert pieces == {0: [(3500.0, 3600.0)], 1: [(0.0, 3600.0)], 2: [(0.0, 200.0)]}
    assert set(by_hour(lane.spans, 1800.0)) == {1, 2}  # half an hour east
    assert set(by_hour(lane.spans, -3600.0)) == {-1, 0, 1}


def test_what_agents_took_is_added_up_and_odd_lines_count_nothing():
    log = [
        Entry(1.0, "turn", {"tokens": 100, "cost": 0.25}),
        Entry(2.0, "turn", {"tokens": "many", "cost": None}),
        Entry(3.0, "experiment", {"tokens": 7}),
    ]
    use = agent_use(log)
    assert (use.turns, use.tokens, use.dollars) == (2, 100, 0.25)


def test_a_night_that_went_on_is_one_night():
    log = [
        Entry(1.0, "begin", {"done": 0}),
        Entry(2.0, "end", {}),
        Entry(3.0, "begin", {"done": 0}),
        Entry(4.0, "experiment", {"run": "r1"}),
        Entry(5.0, "begin", {"done": 1}),
        Entry(6.0, "experiment", {"run": "r2"}),
    ]
    night = last_night(log)
    assert night.start == 3.0 and night.runs == {"r1", "r2"} and not night.has_ended
    assert night.holds(3.5) and night.holds(9.0) and not night.holds(2.5) and not night.holds(None)
    assert last_night(log[:2]).has_ended and last_night([]) is None


def test_a_loop_lives_while_its_process_does_and_not_a_later_one_of_its_number():
    here = {"pid": os.getpid(), "host": platform.node()}
    assert loop_lives(Entry(time.time(), "begin", here)) is True
    assert loop_lives(Entry(1.0, "begin", here)) is False
    assert loop_lives(Entry(1.0, "begin", {})) is None
    assert loop_lives(Entry(1.0, "begin", {**here, "host": "another"})) is None


def test_a_loop_is_in_its_last_phase_until_it_ends():
    phase = Entry(1.0, "phase", {"phase": "training"})
    assert current_phase([phase, Entry(2.0, "experiment", {})]) == phase
    assert current_phase([phase, Entry(2.0, "end", {})]) is None
    assert current_phase([]) is None
