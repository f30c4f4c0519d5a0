"""What the next turn asks for."""

import pytest
from made_up import Night

from launcher.runs import ledger
from night.modes import ABLATION_EVERY, STALL, TURNS, mode_of
from night.tried import read_tried


@pytest.fixture
def night(house):
    night = Night()
    night.run(1.5, "keep")
    return night


def mode(night):
    return mode_of(read_tried(ledger().rows(), night.setting.board))


def test_without_a_stall_the_search_explores(night):
    for _ in range(STALL - 1):
        night.run(1.6, "discard")
    assert mode(night).line == "mode: explore"


def test_a_stalled_search_combines_its_near_misses(night):
    night.run(1.4999, "discard")
    night.run(1.4998, "discard")
    for _ in range(STALL - 3):
        night.run(1.6, "discard")
    assert mode(night).name == "explore"
    night.run(0.0, "crash")  # a failure is no keep either
    assert mode(night).line == f"mode: combine ({STALL} experiments in a row were not kept)"
    assert set(mode(night).runs) == {"r001", "r002"}
    assert mode(night) == mode(night)
    for _ in range(TURNS):
        night.run(1.6, "discard")
    assert mode(night).name == "explore"
    night.run(1.4, "keep")
    for _ in range(STALL - 1):
        night.run(1.6, "discard")
    assert mode(night).name == "explore"


def test_where_no_gain_is_expected_the_two_lowest_that_may_be_one_are_named(night):
    for number in range(STALL):
        night.run(1.5004 + number / 10_000, "discard")
    assert mode(night).name == "combine" and mode(night).runs == ["r001", "r002"]


def test_edits_that_clearly_harm_are_not_combined(night):
    for _ in range(STALL):
        night.run(1.6, "discard")
    assert mode(night).name == "explore"


def test_a_search_that_stalls_again_looks_for_what_can_be_taken_out(night):
    night.run(1.49, "keep")
    night.run(1.4899, "keep")
    for _ in range(2 * STALL):
        night.run(1.6, "discard")
    assert mode(night).name == "ablate"
    assert mode(night).runs == ["r002", "r001"]  # the weaker evidence first; the baseline is no edit


def test_without_an_edit_that_was_kept_a_second_stall_combines_again(night):
    for _ in range(2 * STALL):
        night.run(1.5004, "discard")
    assert mode(night).name == "combine"


def test_now_and_then_a_stack_of_kept_edits_is_looked_through(night):
    for number in range(ABLATION_EVERY - 1):
        kept = number % 5 == 0
        night.run(1.49 - number / 1000 if kept else 1.6, "keep" if kept else "discard")
    assert mode(night).line == f"mode: ablate (after every {ABLATION_EVERY} experiments)"
    assert len(mode(night).runs) == 5
    night.run(1.6, "discard")
    assert mode(night).name == "explore"


def test_a_short_stack_is_not_looked_through(night):
    for number in range(ABLATION_EVERY - 1):
        night.run(1.3 if number == 20 else 1.6, "keep" if number == 20 else "discard")
    assert mode(night).name == "explore"


def test_runs_that_decide_nothing_do_not_count(night):
    for _ in range(STALL):
        night.run(1.6, "discard", marks="repeat")
        night.run(1.6, "discard", marks="contended")
        night.run(1.5, "keep", marks="noise")
        night.run(0.0, "crash", marks="interrupted")
        night.run(0.0, "crash", marks="dry")
    assert mode(night).name == "explore"


def test_an_empty_ledger_is_explored(night):
    assert mode_of(read_tried([], night.setting.board)).name == "explore"
