"""What a loop leaves to the next one."""

import json

import pytest

from launcher.runs import home
from night.agent import Answer, Turn
from night.state import Edit, LoopState, read_state, record, state_path, write_state


@pytest.mark.parametrize(
    "state",
    [
        LoopState(),
        LoopState(10, 3, turn=Turn("tree", "head", "refs/heads/main", "20260101-000000-abcd")),
        LoopState(None, 0, edit=Edit("blob", Answer("an idea", learned="much"))),
        LoopState(edit=Edit("blob", Answer("an idea", learned="much"))),
    ],
)
def test_a_state_is_read_as_it_was_written(repository, state):
    write_state(state)
    assert read_state() == state


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
