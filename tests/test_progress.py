"""The progress of a run: a line at a time in a pipe, one live line on a terminal."""

import io
import sys

import pytest
from conftest import START

from backends.protocol import Log, Stop
from launcher import console, progress
from launcher.progress import Progress, Scored

LOG = Log(7, 3.5, 3.6, 8192, 60.0, 29463.0, 53.9)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: clock[0] is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_in_a_pipe_there_is_a_line_every_half_minute(clock, capsys):
    shown = Progress(300.0)
    shown(START)
    for _ in range(90):
        clock[0] += 1
        shown(LOG)
        shown(None)
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "   0 s  training on a CPU (cpu), track tiny, seed 1"
    assert lines[1:] == [
        f"  {at} s  step 7 | loss 3.6000 | 29,463 tok/s | mfu 53.9% | 240 s left" for at in (30, 60, 90)
    ]


def test_on_a_terminal_one_line_is_drawn_over_itself(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Progress(300.0)
    shown(None)
    shown(LOG)
    shown(Stop(10, 10, 1.0))
    shown(None)
    shown(Scored(16, 128))
    shown.close()
    drawn = terminal.getvalue().split("\r")
    assert "\n" not in terminal.getvalue()
    says = ("starting", "240 s left", "scoring", "scoring 16/128 rows")
    for text, line in zip(says, drawn[1:], strict=False):
        assert text in line
    assert drawn[-1] == "\x1b[K"  # the line is gone at the end


def test_whoever_asks_for_more_sees_what_the_trainer_prints(tmp_path, capsys, monkeypatch):
    log = tmp_path / "train.log"
    log.write_bytes(b"compiling \x1b[2J\nhalf a li")
    shown = Progress(300.0)
    shown.log = log
    shown(None)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "_loudness", "verbose")
    shown(None)
    assert capsys.readouterr().err == "  compiling  [2J\n"
    with open(log, "ab") as f:
        f.write(b"ne\n")
    shown(None)
    assert capsys.readouterr().err == "  half a line\n"


def test_on_a_terminal_that_cannot_be_drawn_over_there_are_lines(monkeypatch, clock):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    shown = Progress(300.0)
    shown(START)
    shown.close()
    assert terminal.getvalue() == "   0 s  training on a CPU (cpu), track tiny, seed 1\n"
