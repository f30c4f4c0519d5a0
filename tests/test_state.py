"""What a loop leaves to the next one."""

import json
from dataclasses import replace

import pytest

from launcher.runs import home
from launcher.setting import resolve
from night import repo
from night.agent import Answer
from night.state import Edit, LoopState, NightCounts, read_state, record, state_path, write_state


@pytest.mark.parametrize(
    "state",
    [
        LoopState(),
        LoopState(10, 3, "20260101-000000-abcd"),
        LoopState(None, 0, counts=NightCounts(3, 4, 1, 1, 2, 5)),
        LoopState(None, 0, trainer="train_cuda.py"),
    ],
)
def test_a_state_is_read_as_it_was_written(repository, state):
    edit = Edit(repo.head(), repo.head(), Answer("an idea", learned="much"), "claude")
    other = replace(edit, agent="")
    board = resolve().board
    for written in (state, replace(state, edits=(edit, other), board=board)):
        write_state(written)
        assert read_state() == written


def test_an_edit_whose_commit_is_gone_is_left_out(repository):
    edit = Edit(repo.head(), repo.head(), Answer("an idea"))
    write_state(LoopState(10, 3, edits=(edit, edit)))
    text = state_path().read_text()
    state_path().write_text(text.replace(repo.head(), "1" * 40, 1))
    assert read_state() == LoopState(10, 3, edits=(edit,))


def test_a_full_disk_costs_a_line_of_the_log(house, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("night.state.append_json_line", fail)
    record("phase", text="the agent thinks")
    assert "the log of the night lacks «phase»" in capsys.readouterr().err


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
