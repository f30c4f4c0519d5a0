"""`autoresearch diff`: two trainers, side by side."""

import json

import pytest
from click.testing import CliRunner
from test_show import add

from launcher import cli


@pytest.fixture
def call(repository, house):
    add(house, "2026-1", "a", "LR = 0.1\nWIDTH = 64\n", val_bpb=1.5)
    add(house, "2026-2", "b", "LR = 0.2\nWIDTH = 64\n", val_bpb=1.4)
    add(house, "2026-3", "c", "LR = 0.3\n", status="crash")

    def call(*arguments, **more):
        return CliRunner().invoke(cli.main, ["diff", *arguments], **more)

    return call


def test_what_a_run_has_that_another_has_not(call):
    text = call("baseline", "best").output
    assert text == (
        "--- 2026-1 (1.500000)\n+++ 2026-2 (1.400000)\n@@ -1,2 +1,2 @@\n-LR = 0.1\n+LR = 0.2\n WIDTH = 64\n"
    )
    assert "+++ 2026-3\n" in call("best", "last").output  # it has no score


def test_a_program_may_read_it(call):
    data = json.loads(call("2026-1", "2026-3", "--json").output)
    assert (data["old"], data["old_val_bpb"], data["new"], data["new_val_bpb"]) == (
        "2026-1",
        1.5,
        "2026-3",
        None,
    )
    assert "+LR = 0.3" in data["diff"]


def test_alone_a_run_is_compared_with_the_trainer_that_lies_here(call, repository, monkeypatch, tmp_path):
    assert "+++ train_cuda.py\n" in call("best").output and "+SCORE = 1.5" in call("best").output
    (repository / "train_cuda.py").write_text("LR = 0.2\nWIDTH = 64\n")
    done = call("best")
    assert done.stdout == "" and "have the same trainer" in done.stderr
    folder = tmp_path / "of the agent"
    folder.mkdir()
    (folder / "train_cuda.py").write_text("LR = 0.7\nWIDTH = 64\n")
    monkeypatch.setenv("AUTORESEARCH_LOOP", str(folder))
    assert "+LR = 0.7" in call("best").output


def test_colours_are_for_a_terminal_that_wants_them(call, house, monkeypatch):
    add(house, "2026-4", "d", "LR = 0.2 # \x1b[2J\n", val_bpb=1.6)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    coloured = call("baseline", "best", color=True).output
    assert "\x1b[31m-LR = 0.1" in coloured and "\x1b[32m+LR = 0.2" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in call("baseline", "best", color=True).output
    assert "\x1b" not in call("baseline", "2026-4").output  # what a trainer holds moves no cursor


def test_a_run_that_is_not_here_says_so(call, house):
    (house / "runs" / "2026-1" / "run.json").unlink()
    done = call("2026-1", "2026-2")
    assert done.exit_code == 1 and "its folder was deleted" in done.output
    assert call("nope").exit_code == 2
