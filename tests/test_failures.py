"""How long a night pauses after failed turns, and when it ends."""

import pytest

from night.agent import TurnFailed
from night.failures import FREE_EDITS, MOST, Failures, kind_of
from prepare import UserError


def fail(kind, count):
    """Return (pauses, failures) after so many failed turns."""
    failures = Failures(30.0)
    return [failures.add(kind) for _ in range(count)], failures


def test_pauses_double_up_to_half_an_hour():
    pauses, failures = fail("agent", 9)
    assert pauses == [30, 60, 120, 240, 480, 960, 1800, 1800, 1800]
    assert not failures.are_too_many


def test_some_bad_edits_in_a_row_go_back_at_once():
    pauses, _ = fail("edit", FREE_EDITS + 1)
    assert pauses[:FREE_EDITS] == [0.0] * FREE_EDITS and pauses[FREE_EDITS] > 0


@pytest.mark.parametrize(
    "kind, most",
    [("agent", MOST), ("edit", MOST), ("harness", MOST), ("repository", 3), ("launcher", 3), ("device", 1)],
)
def test_a_night_ends_after_so_many_in_a_row(kind, most):
    assert not fail(kind, most - 1)[1].are_too_many and fail(kind, most)[1].are_too_many


def test_what_waiting_does_not_mend_is_not_waited_for():
    assert sum(fail("repository", 3)[0]) < 60


def test_failures_of_several_kinds_are_not_alike():
    failures = Failures(1.0)
    for kind in ("repository", "launcher", "repository", "agent", "launcher"):
        failures.add(kind)
        assert not failures.are_too_many
    failures.clear()
    assert failures.in_a_row == failures.alike == 0


def test_an_error_says_whose_it_is():
    assert kind_of(TurnFailed("harness", "prepare.py")) == "harness"
    assert kind_of(UserError("git failed")) == kind_of(OSError("no space")) == "repository"
    assert kind_of(ZeroDivisionError()) == "launcher"
