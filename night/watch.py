"""
`autoresearch watch --terminal`: the panel of a loop that runs elsewhere, from what it leaves on the disk.

The loop's log says which phase it is in and what came of its experiments, the ledger what is believed of
them, and the folder of the run under way how far it is.
"""

import os
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.live import Live

from backends.protocol import Event, EventError, Log, RunDir, Start, parse_event
from launcher.exit_codes import EXIT_DONE, EXIT_FAILED
from launcher.ledger import ABOUT_RUNS, Row, single_line
from launcher.report.files import Entry, read_loop_log
from launcher.report.timeline import devices_now
from launcher.runs import ledger, run_dir, runs_dir
from launcher.verdict import best_since_moved, survey_board
from night.agent import TurnFiles, last_words
from night.panel import OF_NO_EXPERIMENT, REFRESHES_A_SECOND, Panel, RunDetail
from night.plan import seconds_of_a_run
from night.state import loop_folder, read_counts, read_state
from night.stop import RunningLoop, read_token, request_path, running_loop
from prepare import UserError

POLL_SECONDS = 1.0
EVENTS_BYTES = 2**14  # at the end of a run's events, in which the last points lie
TRAINING = ("training", "noise", "confirm")  # phases in which a run is under way


def watch_loop() -> int:
    """Show the loop of this repository until it is over; without a terminal, print its state once.

    Returns the exit code: 1 when the loop was killed.

    Raises:
        UserError: no loop runs.
    """
    loop = running_loop()
    if loop is None:
        raise UserError("no loop runs in this repository: autoresearch loop")
    console = Console()
    if not console.is_terminal:
        console.print(read_panel(loop).table())
        return EXIT_DONE
    panel = read_panel(loop)
    with Live(panel.table(), console=console, refresh_per_second=REFRESHES_A_SECOND, transient=True) as live:
        while running_loop() == loop:
            panel = read_panel(loop)
            live.update(panel.table())
            time.sleep(POLL_SECONDS)
    panel = read_panel(loop)
    ended = reason_of_end(read_loop_log())
    panel.print_summary(ended or "the loop was killed: the same command goes on")
    return EXIT_DONE if ended else EXIT_FAILED


def read_panel(loop: RunningLoop) -> Panel:
    """Return the panel of a loop as it is now."""
    entries = of_last_loop(read_loop_log())
    panel = Panel(*limits_of(entries))
    rows = ledger().rows()
    runs = {row.run: row for row in rows if row.status not in ABOUT_RUNS}
    for entry in entries:
        take(panel, entry, runs)
    show_best(panel, rows)
    phases = [entry for entry in entries if entry.event == "phase"]
    if phases:
        show_phase(panel, phases[-1])
    panel.devices = lambda: devices_now(entries)
    token = loop.token
    panel.is_stopping = lambda: read_token(request_path()) == token
    return panel


# ---------------------------------------------------------------------------
# The log of the loop
# ---------------------------------------------------------------------------


def of_last_loop(entries: Sequence[Entry]) -> list[Entry]:
    """Return the lines of the last loop, from its first."""
    begins = [at for at, entry in enumerate(entries) if entry.event == "begin"]
    return list(entries[begins[-1] :]) if begins else []


def limits_of(entries: Sequence[Entry]) -> tuple[int | None, datetime | None]:
    """Return how many experiments a loop was asked for, and until when; None for no limit."""
    if not entries:
        return None, None
    begin = entries[0]
    try:
        until = datetime.fromisoformat(str(begin.data.get("until")))
    except ValueError:
        until = None
    return int(begin.number("experiments")) or None, until


def reason_of_end(entries: Sequence[Entry]) -> str:
    """Return why the last loop ended, "" when it did not come to its end."""
    last = of_last_loop(entries)
    return single_line(last[-1].data.get("why")) if last and last[-1].event == "end" else ""


def take(panel: Panel, entry: Entry, rows: dict[str, Row]) -> None:
    """Count what a line of the log tells of."""
    if entry.event == "begin":
        panel.done = int(entry.number("done"))
        counts = entry.data.get("counts")
        panel.counts = read_counts(counts if isinstance(counts, dict) else {})
    elif entry.event == "experiment":
        row = rows.get(str(entry.data.get("run")))
        if row:
            panel.count(row)
    elif entry.event == "failed":
        panel.add("refused" if entry.data.get("kind") == "edit" else "turns_lost")
    elif entry.event == "turn":
        panel.tokens += int(entry.number("tokens"))
        panel.cost += entry.number("cost")
    elif entry.event == "claim":
        panel.claim = single_line(entry.data.get("claim"))


def show_best(panel: Panel, rows: Sequence[Row]) -> None:
    """Show the trainer that the loop believes best, on the board of the last experiment."""
    if panel.results:
        last = panel.results[-1]
        board = last.board
        panel.seconds_a_run = seconds_of_a_run(rows, board)
        panel.best = best_since_moved(rows, board, last.build_on or last.parent)
        believed = survey_board(rows, board)
        panel.belief = believed.trainers[panel.best.source] if believed and panel.best else None


# ---------------------------------------------------------------------------
# What it does now
# ---------------------------------------------------------------------------


def show_phase(panel: Panel, entry: Entry) -> None:
    """Show the phase that a loop is in, since when, and how far it is."""
    kind = str(entry.data.get("phase"))
    panel.set_phase(
        single_line(entry.data.get("text") or kind),
        time.time() - entry.time,
        entry.number("limit"),
        kind not in OF_NO_EXPERIMENT,
    )
    if kind == "agent":
        files = TurnFiles(loop_folder(), read_state().stamp.partition(" ")[0])
        panel.words = lambda: last_words(files)
    elif kind in TRAINING:
        run = run_under_way()
        if run:
            show_run(panel, run)


def run_under_way() -> RunDir | None:
    """Return the newest run, None when it is over."""
    folders = sorted(path.parent.name for path in runs_dir().glob("*/run.json"))
    if not folders or run_dir(folders[-1]).row.exists():
        return None
    return run_dir(folders[-1])


def show_run(panel: Panel, run: RunDir) -> None:
    """Show how far a run is, by its last events."""
    row = run.read_record().get("row")
    budget = row.get("budget") if isinstance(row, dict) else None
    detail = RunDetail(float(budget) if isinstance(budget, int | float) and budget > 0 else 1.0, panel)
    for event in last_events(run.events):
        if not isinstance(event, Start):
            detail(event)
    detail.show()


def last_events(path: Path) -> list[Event]:
    """Return the events at the end of a file, of which the last line may be torn."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - EVENTS_BYTES))
            lines = f.read().splitlines()
    except OSError:
        return []
    events: list[Event] = []
    for line in lines:
        try:
            event = parse_event(line)
        except (EventError, ValueError, RecursionError):
            continue
        events = [event] if isinstance(event, Log) else [*events, event]
    return events
