"""What the report reads beside the ledgers: folders of runs and the loop's log. All of it may be absent."""

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from backends.protocol import Event, EventError, Log, RunDir, Start, Stop, parse_event, read_json
from launcher.ledger import Row
from launcher.processes import is_alive_since
from launcher.report.data import unix_time
from launcher.runs import runs_dir
from launcher.show import unified_diff

EVENTS_BYTES = 2**25  # of an events.jsonl that are read
LOG_BYTES = 2**26  # at the end of the loop's log that are read
# A longer trainer is not compared: a hostile one would take the comparison minutes.
TRAINER_BYTES = 2**18
TRAINER_LINES = 5000
POINTS = 100  # of a loss curve that are read
DIFF_LINES = 150  # a longer diff is cut
DIFF_CHARS = 8000
HEADING = 2  # lines of a unified diff that name the files
CACHED = 4096  # runs whose files are kept in memory: what was read of a finished run does not change


@dataclass(frozen=True)
class Trace:
    """What a run's events say. Times in seconds since its child was started; None: not on record."""

    started: float | None = None  # the training began
    stopped: float | None = None  # and ended
    points: list[tuple[float, float]] = field(default_factory=list)  # (seconds of training, smoothed loss)


@dataclass(frozen=True)
class Folder:
    """What the folder of a run holds. Everything is empty where there is none."""

    trainer: Path | None = None
    trace: Trace = field(default_factory=Trace)
    learned: str = ""  # what the agent said that the run before had taught
    next: str = ""  # what it would try next


def read_folder(run_id: str) -> Folder:
    """Return what is on record of a run here. run_id: a plain name, as Run.id is."""
    run = RunDir(runs_dir() / run_id)
    if not run.path.is_dir():
        return Folder()
    answer = read_json(run.path / "answer.json")
    return Folder(
        trainer=run.trainer(),
        trace=read_trace(run.events),
        learned=str(answer.get("learned") or ""),
        next=str(answer.get("next") or ""),
    )


# ---------------------------------------------------------------------------
# The events of a run
# ---------------------------------------------------------------------------


def read_trace(path: Path) -> Trace:
    """Return what the events of a run say; an empty trace when there are none."""
    try:
        stat = path.stat()
    except OSError:
        return Trace()
    return read_trace_of(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=CACHED)
def read_trace_of(path: Path, size: int, changed: int) -> Trace:
    """Return read_trace of a file as it is at this size and time of change."""
    try:
        with open(path, "rb") as f:
            lines = f.read(EVENTS_BYTES).splitlines()
    except OSError:
        return Trace()
    # Start is the first event and Stop the last; of the points between, as many as a figure can show.
    step = max(1, len(lines) // POINTS)
    chosen = dict.fromkeys([*range(0, len(lines), step), len(lines) - 2, len(lines) - 1])
    started = stopped = None
    points = []
    for at, event in read_events(lines[i] for i in sorted(chosen) if 0 <= i < len(lines)):
        if isinstance(event, Start):
            started = at
        elif isinstance(event, Stop):
            stopped = at
        elif isinstance(event, Log):
            points.append((event.elapsed, event.smooth))
    return Trace(started, stopped, points)


def read_events(lines: Iterable[bytes]) -> Iterable[tuple[float, Event]]:
    """Yield (seconds since the child was started, event). Lines that are no events are left out."""
    for line in lines:
        try:
            yield float(json.loads(line)["at"]), parse_event(line)
        except (EventError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
            continue


# ---------------------------------------------------------------------------
# Diffs
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Diff:
    """How a run's trainer differs from the one that it was made from."""

    lines: list[str]  # of a unified diff, without its heading
    against: str = ""  # id of a run that had the other trainer
    missing: int = 0  # lines that were cut


@lru_cache(maxsize=CACHED)
def diff_lines(old: Path, new: Path) -> list[str] | None:
    """Return the unified diff of two copies of trainers, None without one. Copies do not change."""
    before = read_trainer_text(old)
    after = read_trainer_text(new)
    if before is None or after is None:
        return None
    return unified_diff(before, after, "", "")[HEADING:]


def read_trainer_text(path: Path) -> str | None:
    """Return a copy of a trainer, None when it is gone or too long to be compared."""
    try:
        with open(path, "rb") as f:
            data = f.read(TRAINER_BYTES + 1)
    except OSError:
        return None
    text = data.decode("utf-8", "replace")
    return None if len(data) > TRAINER_BYTES or text.count("\n") > TRAINER_LINES else text


def cut(lines: list[str], against: str) -> Diff:
    """Return a diff, cut where it is too long for a page."""
    shown = []
    chars = 0
    for line in lines[:DIFF_LINES]:
        chars += len(line) + 1
        if chars > DIFF_CHARS:
            break
        shown.append(line)
    return Diff(shown, against, len(lines) - len(shown))


def trainers_by_source(rows: Iterable[Row], folders: dict[str, Folder]) -> dict[str, tuple[str, Path]]:
    """Return {source: (id of a run that had it, its copy of the trainer)}, as far as copies are here."""
    found = {}
    for row in rows:
        trainer = folders[row.run].trainer if row.run in folders else None
        if row.source and trainer:
            found[row.source] = (row.run, trainer)
    return found


# ---------------------------------------------------------------------------
# The log of the loop
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A line of the loop's log."""

    time: float  # Unix seconds
    event: str
    data: dict[str, Any]

    def number(self, name: str) -> float:
        """Return a number of the line, 0 where it has none."""
        value = self.data.get(name)
        return float(value) if isinstance(value, int | float) and abs(value) < 1e15 else 0.0


def loop_log_path() -> Path:
    return runs_dir() / "loop" / "loop.jsonl"


def read_loop_log() -> list[Entry]:
    """Return the lines of the loop's log, oldest first; torn and foreign ones are left out."""
    path = loop_log_path()
    try:
        stat = path.stat()
    except OSError:
        return []
    return read_log_of(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)
def read_log_of(path: Path, size: int, changed: int) -> list[Entry]:
    """Return read_loop_log of a file as it is at this size and time of change."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, size - LOG_BYTES))
            lines = f.read().splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            data = json.loads(line)
            time = unix_time(data["time"])
            if time is not None:
                entries.append(Entry(time, str(data["event"]), data))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return entries


def loop_lives(begin: Entry) -> bool | None:
    """Return whether the loop that wrote a begin still runs.

    None: it is not known, as the line is another machine's, or of an older version.
    """
    pid = begin.data.get("pid")
    if not isinstance(pid, int) or begin.data.get("host") != platform.node():
        return None
    return is_alive_since(pid, begin.time + 1)  # the time of a line is a whole second
