"""All that a report tells, gathered once: what the page, the card and the live page are made from."""

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from launcher.board import Boards, DeviceResult, compare_devices, gather
from launcher.harness import harness_hash
from launcher.ledger import Row, warn
from launcher.report.data import (
    MOST_SERIES,
    Counts,
    FailureGroup,
    FigureLine,
    Headline,
    Run,
    Series,
    all_rows,
    bests_of_agents,
    collect_series,
    count,
    gains_over_time,
    group_failures,
    unix_time,
    write_headline,
)
from launcher.report.files import (
    Diff,
    Entry,
    Folder,
    cut,
    diff_lines,
    read_folder,
    read_loop_log,
    trainers_by_source,
)
from launcher.report.timeline import AgentUse, Lane, Night, agent_use, last_night, make_lanes
from prepare import RULES, UserError

MOST_RUNS = 400  # of a series that a page holds; of a longer one the newest, and the best
CURVES = 4  # loss curves that are drawn at first


class CountLine(NamedTuple):
    """A line about what was done."""

    title: str  # of which runs, "" where it is all of them
    text: str

    def __str__(self) -> str:
        return f"{self.title}: {self.text}" if self.title else self.text


@dataclass(frozen=True)
class Report:
    """What is told of some ledgers."""

    series: list[Series]
    headline: Headline
    counts: list[CountLine]  # of the last night, and of all runs where there are more
    failures: list[FailureGroup]
    lanes: list[Lane]
    devices: list[DeviceResult]
    agents: list[
        tuple[str, list[FigureLine]]
    ]  # (title of a series, a line an agent), where several took part
    gains: list[FigureLine]
    folders: dict[str, Folder]  # by run id
    diffs: dict[str, Diff]
    lessons: dict[str, str]  # run id -> what the agent of the next turn said that it taught
    curves: list[str]  # ids of the runs whose loss curves are drawn at first
    made: dict[str, str]  # how the report was made
    offset: float  # of the local time, seconds east of UTC
    left_out: int  # runs that a page has no room for

    @property
    def runs(self) -> list[Run]:
        return [run for one in self.series for run in one.runs]


def make_report(
    paths: Sequence[Path],
    track: str | None = None,
    platform: str | None = None,
    runs: Sequence[str] = (),
    complain: Callable[[str], None] = warn,
) -> Report:
    """Read ledgers and what lies beside them, and return what is told of them.

    Args:
        paths: the ledgers.
        track: tell of this track only.
        platform: tell of this platform only.
        runs: ids of the runs whose loss curves are drawn at first; the best and the last ones when empty.
        complain: gets a line about every row that cannot be read.

    Raises:
        UserError: the ledgers hold no scored run, or not the runs named.
    """
    boards = gather(paths, track, platform, complain)
    whole = collect_series(boards)
    if not whole:
        raise UserError("no scored experiment to report: autoresearch run")
    rows = all_rows(boards)
    log = read_loop_log()
    night = last_night(log)
    offset = float(time.localtime().tm_gmtoff)
    whole = night_first(whole, night)
    series = [shorten(one, runs) for one in whole[:MOST_SERIES]]
    shown = [run for one in series for run in one.runs]
    folders = {run.id: read_folder(run.id) for run in shown}
    return Report(
        series=series,
        headline=write_headline(whole, boards.claims, offset),
        counts=count_lines(whole, rows, log, night, offset),
        failures=group_failures(rows),
        lanes=make_lanes(series, folders, log),
        devices=compare_devices(boards.boards) if len(boards.boards) > 1 else [],
        agents=[(one.title, lines) for one in series if len(lines := bests_of_agents(one)) > 1],
        gains=gains_over_time(series) if len(series) > 1 else [],
        folders=folders,
        diffs=make_diffs(series, folders),
        lessons=find_lessons(series, folders),
        curves=choose_curves(series, folders, runs),
        made=describe_making(boards, rows),
        offset=offset,
        left_out=sum(len(one.runs) for one in whole) - len(shown),
    )


def night_first(series: Sequence[Series], night: Night | None) -> list[Series]:
    """Return the series with that of the last night first: a run that was made since is no night."""
    runs = night.runs if night else set()
    return sorted(series, key=lambda one: not any(run.id in runs for run in one.runs))


def count_lines(
    series: Sequence[Series], rows: Sequence[Row], log: Sequence[Entry], night: Night | None, offset: float
) -> list[CountLine]:
    """Return lines about what was done and what it took: the last night apart from all runs."""
    everything = with_use(count(series, rows), agent_use(log))
    # The log is of this machine: rows of other ledgers are of no night of it.
    ledgers = {row.ledger for row in rows if night and row.run in night.runs}
    if night is None or not ledgers:
        return [CountLine("", everything)]

    def is_of_night(row: Row) -> bool:
        return row.ledger in ledgers and night.holds(unix_time(row.time))

    of_night = with_use(count(series, rows, is_of_night), agent_use(night.entries))
    line = CountLine(night.title(offset), of_night)
    if all(is_of_night(row) for row in rows):
        return [line]
    return [line, CountLine("All runs", everything)]


def with_use(counts: Counts, use: AgentUse) -> str:
    """Return what runs and agents took, in a line."""
    parts = [counts.line]
    if use.tokens:
        parts.append(f"{use.tokens / 1e6:.2f}M agent tokens")
    if use.dollars:
        parts.append(f"${use.dollars:.2f}")
    return ", ".join(parts)


def shorten(series: Series, wanted: Sequence[str]) -> Series:
    """Return a series with as many runs as a page holds: the first, the best, those wanted, the newest."""
    runs = series.runs
    if len(runs) <= MOST_RUNS:
        return series
    needed = {series.baseline.id, series.best.id, *wanted}
    head = [run for run in runs[:-MOST_RUNS] if run.id in needed]
    return replace(series, runs=[*head, *runs[-MOST_RUNS:]])


def make_diffs(series: Sequence[Series], folders: dict[str, Folder]) -> dict[str, Diff]:
    """Return how each run's trainer differs from the one that it was made from, as far as both are here.

    Without a parent on record, that is the one kept before it.
    """
    found = {}
    for one in series:
        known = trainers_by_source([run.row for run in one.runs], folders)
        kept: tuple[str, Path] | None = None
        for run in one.runs:
            ours = folders[run.id].trainer
            parent = known.get(run.row.parent) if run.row.parent else kept
            lines = diff_lines(parent[1], ours) if ours and parent and parent[1] != ours else None
            if parent and lines is not None:
                found[run.id] = cut(lines, parent[0])
            if ours and run.kind == "kept":
                kept = (run.id, ours)
    return found


def find_lessons(series: Sequence[Series], folders: dict[str, Folder]) -> dict[str, str]:
    """Return {run id: what it taught}: the agent of the turn after it said so."""
    lessons = {}
    for one in series:
        for run, after in pairwise(one.drawn):
            if folders[after.id].learned:
                lessons[run.id] = folders[after.id].learned
    return lessons


def choose_curves(series: Sequence[Series], folders: dict[str, Folder], wanted: Sequence[str]) -> list[str]:
    """Return the runs whose loss curves are drawn at first: those named, or the best, the first and the last.

    Raises:
        UserError: the ledgers hold no run of that name.
    """
    known = {run.id for one in series for run in one.runs}
    for run in wanted:
        if run not in known:
            raise UserError(f"the ledger has no run '{run}'", 2)
    chosen = list(wanted)
    for one in series if not wanted else []:
        newest = sorted(one.scored, key=lambda run: run.number)[-2:]
        chosen += [run.id for run in (one.best, one.baseline, *newest)]
    with_curves = [run for run in dict.fromkeys(chosen) if folders[run].trace.points]
    return with_curves[: max(CURVES, len(wanted))]


def describe_making(boards: Boards, rows: Sequence[Row]) -> dict[str, str]:
    """Return what a reader must know to judge the figures, by name."""
    made = {
        "autoresearch": own_version(),
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "RULES": listed(str(row.rules) for row in rows if row.rules) or f"{RULES}, of this version",
        "data (fingerprint)": listed(row.fingerprint for row in rows if row.fingerprint),
        "harness of the runs": listed(row.harness for row in rows if row.harness),
        "harness of this report": harness_hash(),
        "seeds": listed(str(row.seed) for row in rows if row.rules),
        "agents": listed(row.agent for row in rows if row.agent),
        "first run": min((row.time for row in rows if unix_time(row.time) is not None), default=""),
        "last run": max((row.time for row in rows if unix_time(row.time) is not None), default=""),
        "ledgers": listed(Path(row.ledger).name for row in rows),
        "scored again by verify": listed(f"{row.run} {row.status}" for row in boards.verifications.values()),
    }
    return {name: value for name, value in made.items() if value}


def own_version() -> str:
    """Return the installed version, "" where the code runs without being installed."""
    try:
        return importlib.metadata.version("autoresearch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def listed(values: Iterable[str], most: int = 6) -> str:
    """Return the different values in a line, the first few of them."""
    different = list(dict.fromkeys(values))
    more = f" and {len(different) - most} more" if len(different) > most else ""
    return ", ".join(different[:most]) + more
