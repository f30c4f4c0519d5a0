"""What a loop leaves to the next one."""

import json
from dataclasses import replace

import pytest

from launcher.runs import home
from night import repo
from night.agent import Answer
from night.state import Edit, LoopState, NightCounts, read_state, record, state_path, write_state


@pytest.mark.parametrize(
    "state",
    [
        LoopState(),
        LoopState(10, 3, "20260101-000000-abcd"),
        LoopState(None, 0, counts=NightCounts(3, 4, 1, 1, 2, 5)),
    ],
)
def test_a_state_is_read_as_it_was_written(repository, state):
    edit = Edit(repo.head(), repo.head(), Answer("an idea", learned="much"), "claude")
    for written in (state, replace(state, edit=edit)):
        write_state(written)
        assert read_state() == written


def test_an_edit_whose_commit_is_gone_is_left_out(repository):
    write_state(LoopState(10, 3, edit=Edit("1" * 40, repo.head(), Answer("an idea"))))
    assert read_state() == LoopState(10, 3)


def test_a_damaged_state_is_no_state(repository):
    for text in ("", "[]", "null", '{"turn": {"tree": 1}}', '{"edit": [1]}', '{"experiments": 1', "\udcff"):
        state_path().write_bytes(text.encode(errors="surrogateescape"))
        assert read_state() == LoopState()
    state_path().unlink()
    assert read_state() == LoopState()


def test_the_log_has_a_line_an_event(house):
    record("begin", agent=["claude"], done=0)
    record("end", why="caf\udce9", done=1)
    lines = (home() / "runs" / "loop" / "loop.jsonl").read_text().splitlines()
    begin, end = map(json.loads, lines)
    assert begin["event"] == "begin" and begin["agent"] == ["claude"] and begin["time"].endswith("Z")
    assert (end["event"], end["done"]) == ("end", 1)
