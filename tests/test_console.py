"""The progress of a run: a line at a time in a pipe, one live line on a terminal."""

import io
import sys

import pytest
from conftest import START

from backends.protocol import Log, Stop
from launcher import console
from launcher.console import Progress, Scored

LOG = Log(7, 3.5, 3.6, 8192, 60.0, 29463.0, 53.9)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: clock[0] is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_in_a_pipe_there_is_a_line_every_half_minute(clock, capsys):
    progress = Progress(300.0)
    progress(START)
    for _ in range(90):
        clock[0] += 1
        progress(LOG)
        progress(None)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "   0 s  training on a CPU (cpu), track tiny, seed 1"
    assert lines[1:] == [
        f"  {at} s  step 7 | loss 3.6000 | 29,463 tok/s | mfu 53.9% | 240 s left" for at in (30, 60, 90)
    ]


def test_on_a_terminal_one_line_is_drawn_over_itself(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(300.0)
    progress(None)
    progress(LOG)
    progress(Stop(10, 10, 1.0))
    progress(None)
    progress(Scored(16, 128))
    progress.close()
    drawn = terminal.getvalue().split("\r")
    assert "\n" not in terminal.getvalue()
    says = ("starting", "240 s left", "scoring", "scoring 16/128 rows")
    for text, line in zip(says, drawn[1:], strict=False):
        assert text in line
    assert drawn[-1] == "\x1b[K"  # the line is gone at the end


def test_what_holds_for_many_runs_is_said_once_in_their_block(capsys):
    for _ in range(2):
        console.say_once("platform cpu")
    assert capsys.readouterr().err == "platform cpu\n" * 2
    with console.saying_once():
        for _ in range(2):
            console.say_once("platform cpu")
            console.warn_once("unboxed")
    assert capsys.readouterr().err == "platform cpu\nwarning: unboxed\n"
    console.say_once("platform cpu")
    assert capsys.readouterr().err == "platform cpu\n"


def test_whoever_asks_for_more_sees_what_the_trainer_prints(tmp_path, capsys, monkeypatch):
    log = tmp_path / "train.log"
    log.write_bytes(b"compiling \x1b[2J\nhalf a li")
    progress = Progress(300.0)
    progress.log = log
    progress(None)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "_loudness", "verbose")
    progress(None)
    assert capsys.readouterr().err == "  compiling  [2J\n"
    with open(log, "ab") as f:
        f.write(b"ne\n")
    progress(None)
    assert capsys.readouterr().err == "  half a line\n"


def test_on_a_terminal_that_cannot_be_drawn_over_there_are_lines(monkeypatch, clock):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    progress = Progress(300.0)
    progress(START)
    progress.close()
    assert terminal.getvalue() == "   0 s  training on a CPU (cpu), track tiny, seed 1\n"
