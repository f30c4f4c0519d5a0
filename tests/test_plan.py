"""What the hours of a night allow."""

from datetime import datetime, timedelta

import pytest
from made_up import Night as MadeUpNight

from launcher.setting import resolve
from night.agents import Agent
from night.plan import Hours, Night


@pytest.fixture
def hours(repository):
    """hours(minutes left): those of a night on a board whose runs took 300 s and more."""

    def begin(minutes, **more):
        until = datetime.now() + timedelta(minutes=minutes)
        return Hours(Night(Agent("x", ["x"]), resolve(), until=until, **more))

    return begin


def test_a_run_that_hung_does_not_count_for_the_next_one(hours):
    nights = MadeUpNight()
    assert hours(60).of_a_run() == 1.3 * 300
    for _ in range(9):
        nights.run(1.5, "discard", total_seconds=320.0)
    nights.run(0.0, "timeout", total_seconds=900.0)
    nights.run(1.5, "discard", total_seconds=650.0)  # once it compiled anew
    assert hours(60).of_a_run() == 320.0
    assert hours(10).why_over(3) == "" and "would not end by" in hours(5).why_over(3)


def test_an_agent_is_called_where_it_has_time_to_think(hours):
    MadeUpNight().run(1.5, "keep", total_seconds=320.0)
    assert hours(60).to_think() == 900.0
    assert hours(60, agent_seconds=5.0).to_think() == 5.0
    assert hours(7).to_think() == pytest.approx(100.0, abs=5)
    assert hours(6).to_think() == hours(10).to_think(runs=2) == 0.0  # 40 s, and none
    late = hours(7)
    late.dry_seconds = 50.0
    assert late.to_think() == 0.0


def test_a_night_ends_after_its_experiments(hours):
    assert hours(60, experiments=2).why_over(2) == "2 experiments were asked for"
    assert hours(60, experiments=2).why_over(1) == ""
