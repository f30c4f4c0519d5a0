"""
The leaderboard: who is best on each device, and how the devices compare.

Ledgers -> boards of runs that may be compared -> a table, TSV or JSON. The standard library reads and ranks;
rich, imported when a table is due, draws it.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TextIO

from launcher.ledger import (
    ABOUT_RUNS,
    COLUMNS,
    CONFIRMED,
    MOVED,
    REFUTED,
    UNCONFIRMED,
    UNRANKED,
    VERIFIED,
    BoardKey,
    Ledger,
    Row,
    missing_runs,
    single_line,
    warn,
)

if TYPE_CHECKING:
    from rich.console import Console

# The columns that boards and the report need. Without the others a long ledger takes half the memory.
NEEDED = {
    "val_bpb",
    "memory_gb",
    "status",
    "description",
    "run",
    "time",
    "platform",
    "device",
    "track",
    "rules",
    "fingerprint",
    "budget",
    "val_tokens",
    "val_stderr",
    "tokens_M",
    "tokens_per_second",
    "mfu_percent",
    "num_params_M",
    "petaflops",
    "energy_kj",
    "source",
    "agent",
    "belief_after",
    "belief_after_error",
    "marks",
    "reason",
}
MAX_ROWS = 20  # of a table, where the caller names no number
PIPE_WIDTH = 1_000_000  # characters; wide enough that nothing is cut or wrapped where no terminal shows it
NARROW_TERMINAL = 150  # characters; on a narrower terminal the tables have the few columns named below
NARROW_COLUMNS = {
    "rank",
    "val_bpb",
    "gain",
    "status",
    "run",
    "description",
    "why",
    "device",
    "runs",
    "best_val_bpb",
    "gap_closed_percent",
}
WRAPPED_COLUMNS = {"description", "why", "device"}  # on a terminal these give way first
DECIMALS = {"val_bpb": 6, "gain": 6, "best_val_bpb": 6, "baseline_val_bpb": 6, "stderr": 4}


# ---------------------------------------------------------------------------
# Ledgers -> boards
# ---------------------------------------------------------------------------


class RuleSet(NamedTuple):
    """What two boards must share for their devices to be compared."""

    track: str
    fingerprint: str
    rules: int


@dataclass
class Board:
    """The runs that are ranked together, best first."""

    key: BoardKey
    rows: list[Row] = field(default_factory=list)

    @property
    def rule_set(self) -> RuleSet:
        return RuleSet(self.key.track, self.key.fingerprint, self.key.rules)

    @property
    def best(self) -> Row:
        return self.rows[0]

    @property
    def baseline(self) -> Row:
        """The first ranked run on this board."""
        return min(self.rows, key=lambda row: (row.time, row.run))

    @property
    def title(self) -> str:
        key = self.key
        where = f"{key.track} on {key.device} ({key.platform})"
        how = f"{key.budget:g} s, {key.val_tokens:,} tokens scored, rules {key.rules}"
        return f"{where}: {len(self.rows)} runs, {how}, data {key.fingerprint[:8]}"


class Boards(NamedTuple):
    """Everything that the ledgers hold, each run once."""

    boards: list[Board]  # by track, then by their best val_bpb
    unranked: list[Row]
    verifications: dict[str, Row]  # run id -> the last row that `autoresearch verify` added about it
    # Run id -> the last row that `autoresearch confirm` added about it. Where `verify` refuted a run of the
    # trainer there is none.
    claims: dict[str, Row]
    moves: list[Row]  # which trainers nights put on the branch at their ends


def gather(
    paths: Iterable[Path],
    track: str | None = None,
    platform: str | None = None,
    complain: Callable[[str], None] = warn,
    wanted: Collection[str] = COLUMNS,
) -> Boards:
    """Read ledgers, merge them by run id, and rank what may be ranked.

    Args:
        paths: the ledgers.
        track: take rows of this track only.
        platform: take rows of this platform only.
        complain: gets a line about every row that cannot be read.
        wanted: the columns to read, which takes most of the time.
    """
    rows, about = read_runs(paths, track, platform, complain, wanted)
    verifications = {row.run: row for row in about if row.status in (VERIFIED, REFUTED)}
    boards: dict[BoardKey, Board] = {}
    unranked = []
    for row in rows:
        if not row.ranked or is_refuted(row, verifications):
            unranked.append(row)
            continue
        key = row.board
        if key not in boards:
            boards[key] = Board(key)
        boards[key].rows.append(row)
    current = current_rule_sets(boards.values())
    ranked = []
    for board in boards.values():
        if board.rule_set in current:
            board.rows.sort(key=lambda row: row.val_bpb)
            ranked.append(board)
        else:
            unranked += board.rows
    ranked.sort(key=lambda board: (board.key.track, board.best.val_bpb))
    moves = [row for row in about if row.status == MOVED]
    return Boards(ranked, unranked, verifications, standing_claims(about, verifications), moves)


def standing_claims(about: Iterable[Row], verifications: dict[str, Row]) -> dict[str, Row]:
    """Return the last test of each run by `confirm`, those left out whose trainer `verify` refuted."""
    refuted = {row.source for row in verifications.values() if row.status == REFUTED and row.source}
    return {
        row.run: row
        for row in about
        if row.status in (CONFIRMED, UNCONFIRMED)
        and row.source not in refuted
        and not is_refuted(row, verifications)
    }


def read_runs(
    paths: Iterable[Path],
    track: str | None,
    platform: str | None,
    complain: Callable[[str], None],
    wanted: Collection[str],
) -> tuple[list[Row], list[Row]]:
    """Return the runs of the ledgers, and the rows about runs. The arguments are those of gather."""
    rows = []
    about = []
    seen = set()
    for path in paths:
        for row in Ledger(path).rows(complain, wanted):
            if (track and row.track != track) or (platform and row.platform != platform):
                continue
            if row.status in ABOUT_RUNS:
                about.append(row)
            elif not row.run or row.run not in seen:
                seen.add(row.run)
                rows.append(row)
    return rows, about


def current_rule_sets(boards: Iterable[Board]) -> set[RuleSet]:
    """Return one rule set for each track: the highest rules, and of those the data with the most runs."""
    runs: Counter[RuleSet] = Counter()
    for board in boards:
        runs[board.rule_set] += len(board.rows)
    newest: dict[str, RuleSet] = {}
    for candidate in runs:
        chosen = newest.setdefault(candidate.track, candidate)
        if (candidate.rules, runs[candidate]) > (chosen.rules, runs[chosen]):
            newest[candidate.track] = candidate
    return set(newest.values())


def is_refuted(row: Row, verifications: dict[str, Row]) -> bool:
    verification = verifications.get(row.run) if row.run else None
    return verification is not None and verification.status == REFUTED


def why_unranked(row: Row, verifications: dict[str, Row]) -> str:
    """Return the reason for which a row of `Boards.unranked` is there."""
    if is_refuted(row, verifications):
        return f"refuted: {verifications[row.run].reason}"
    if not row.scored:
        return f"{row.status}: {row.reason}" if row.reason else row.status
    if not row.rules:
        return "from another tool: its rules are unknown"
    reasons = [text for flag, text in UNRANKED.items() if flag in row.flags]
    return ", ".join(reasons) or "other rules or other data"


# ---------------------------------------------------------------------------
# Boards -> lines of a table
# ---------------------------------------------------------------------------


class RankedRun(NamedTuple):
    """A line of a board."""

    rank: int
    val_bpb: float
    stderr: float
    gain: float  # how much lower its val_bpb is than the baseline's
    verified: bool  # `autoresearch confirm` showed that its trainer is better than the baseline
    status: str
    tokens_per_second: float
    mfu_percent: float
    memory_gb: float
    num_params_M: float
    run: str
    description: str


class UnrankedRun(NamedTuple):
    """A line about a run that is on no board."""

    val_bpb: float
    run: str
    device: str
    why: str
    description: str


class DeviceResult(NamedTuple):
    """A line of the comparison of devices: how far research came there, and what its best run cost."""

    track: str
    device: str
    platform: str
    runs: int
    best_val_bpb: float
    baseline_val_bpb: float
    gap_closed_percent: float | None  # of the way from its baseline to the best device's best
    val_tokens: int
    tokens_M: float
    petaflops: float
    energy_kj: float | None


TableLine = RankedRun | UnrankedRun | DeviceResult


def list_ranked(board: Board, claims: dict[str, Row], most: int | None = None) -> list[RankedRun]:
    """Return the lines of a board, best first; only the first `most` where it is given."""
    baseline = board.baseline.val_bpb
    lines = []
    for rank, row in enumerate(board.rows[:most], 1):
        claim = claims.get(row.run)
        line = RankedRun(
            rank=rank,
            val_bpb=row.val_bpb,
            stderr=row.val_stderr,
            gain=round(baseline - row.val_bpb, 6),
            verified=claim is not None and claim.status == CONFIRMED,
            status=row.status,
            tokens_per_second=row.tokens_per_second,
            mfu_percent=row.mfu_percent,
            memory_gb=row.memory_gb,
            num_params_M=row.num_params_M,
            run=row.run,
            description=row.description,
        )
        lines.append(line)
    return lines


def describe_result(board: Board, claims: dict[str, Row]) -> str:
    """Return a line about what may be said of a board: its claim, or what is believed and not confirmed.

    A value of the table is one run, and the lowest of many runs is lucky.
    """
    tests = [claims[row.run] for row in board.rows if row.run in claims]
    shown = [row for row in tests if row.status == CONFIRMED]
    if shown:
        claim = max(shown, key=lambda row: row.time)
        return f"claimed on {claim.time[:10]} (run {claim.run}): {claim.reason}"
    believed = [row for row in board.rows if row.belief_after > 0]
    if not believed:
        return "not confirmed: these are single runs"
    last = max(believed, key=lambda row: (row.time, row.run))
    return (
        f"believed of the trainer to build on: {last.belief_after:.6f} +- {last.belief_after_error:.6f}, "
        "not confirmed"
    )


def list_unranked(rows: Iterable[Row], verifications: dict[str, Row]) -> list[UnrankedRun]:
    """Return the lines about unranked rows, in the order of the rows."""
    return [
        UnrankedRun(row.val_bpb, row.run, row.device, why_unranked(row, verifications), row.description)
        for row in rows
    ]


def compare_devices(boards: Sequence[Board]) -> list[DeviceResult]:
    """Return a line for each board. Devices are compared with those of the same track."""
    targets: dict[str, float] = {}
    for board in boards:
        track = board.key.track
        targets[track] = min(board.best.val_bpb, targets.get(track, board.best.val_bpb))
    lines = []
    for board in boards:
        best = board.best
        start = board.baseline.val_bpb
        gap = start - targets[board.key.track]
        line = DeviceResult(
            track=board.key.track,
            device=board.key.device,
            platform=board.key.platform,
            runs=len(board.rows),
            best_val_bpb=best.val_bpb,
            baseline_val_bpb=start,
            gap_closed_percent=round(100 * (start - best.val_bpb) / gap, 1) if gap > 0 else None,
            val_tokens=best.val_tokens,
            tokens_M=best.tokens_M,
            petaflops=best.petaflops,
            energy_kj=best.energy_kj or None,
        )
        lines.append(line)
    return lines


def format_cell(column: str, value: object) -> str:
    """Return a value as tables show it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        if column in DECIMALS:
            return f"{value:.{DECIMALS[column]}f}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
    return single_line(value)


# ---------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------


def print_leaderboard(
    paths: Iterable[Path],
    track: str | None = None,
    platform: str | None = None,
    kind: str = "text",
    most: int = MAX_ROWS,
    out: TextIO | None = None,
    runs: Path | None = None,
) -> None:
    """Print the boards of one or more ledgers.

    Args:
        paths: the ledgers, merged by run id.
        track: show this track only.
        platform: show this platform only.
        kind: "text" (tables), "tsv" (all ranked runs) or "json" (everything).
        most: runs of a table at most.
        out: where to print; stdout if left out.
        runs: the folder of the runs that the ledgers should have; None: it is not known.
    """
    boards = gather(paths, track, platform, wanted=NEEDED)
    if runs and not (track or platform):
        warn_of_lost_runs(boards, runs)
    out = out or sys.stdout
    if kind == "json":
        print_json(boards, out)
    elif kind == "tsv":
        print_tsv(boards, out)
    else:
        print_text(boards, most, out)


def warn_of_lost_runs(boards: Boards, folder: Path) -> None:
    """Say how many runs in a folder of runs have a row, and the ledgers have it not."""
    rows = chain(boards.unranked, *(board.rows for board in boards.boards))
    lost = [run for run in missing_runs(folder, rows) if (folder / run / "row.json").is_file()]
    if lost:
        warn(f"the ledger lacks {len(lost)} of the runs in {folder}: the next run, try or loop adds them")


def print_json(boards: Boards, out: TextIO) -> None:
    """Print everything as one JSON object."""
    tables = []
    for board in boards.boards:
        lines = list_ranked(board, boards.claims)
        table = {
            "title": board.title,
            "result": describe_result(board, boards.claims),
            "rows": [line._asdict() for line in lines],
        }
        tables.append(table)
    unranked = list_unranked(boards.unranked, boards.verifications)
    data = {
        "boards": tables,
        "across": [line._asdict() for line in compare_devices(boards.boards)],
        "unranked": [line._asdict() for line in unranked],
    }
    json.dump(data, out, indent=1)
    out.write("\n")


def print_tsv(boards: Boards, out: TextIO) -> None:
    """Print the ranked runs, one a line, the numbers in full."""
    out.write("\t".join(("track", "device", *RankedRun._fields)) + "\n")
    for board in boards.boards:
        for line in list_ranked(board, boards.claims):
            cells = (board.key.track, board.key.device, *line)
            out.write("\t".join(single_line(cell) for cell in cells) + "\n")


def print_text(boards: Boards, most: int, out: TextIO) -> None:
    """Print a table for each board, the comparison of devices, and what is not ranked."""
    if not boards.boards and not boards.unranked:
        out.write("no experiments yet: autoresearch run\n")
        return
    console = open_console(out)
    for board in boards.boards:
        title = f"{board.title}\n{describe_result(board, boards.claims)}"
        print_table(console, title, list_ranked(board, boards.claims, most))
        if len(board.rows) > most:
            out.write(f"... {len(board.rows) - most} more (--json or --tsv has them)\n")
        out.write("\n")
    if len(boards.boards) > 1:
        print_table(console, "across devices", compare_devices(boards.boards))
        out.write("\n")
    if boards.unranked:
        title = f"not ranked: {len(boards.unranked)}"
        if len(boards.unranked) > most:
            title += f", the last {most} of them (--json has all)"
        print_table(console, title, list_unranked(boards.unranked[-most:], boards.verifications))


def open_console(out: TextIO) -> "Console":
    """Return a console that takes text as it is. On a terminal it has the terminal's width."""
    from rich.console import Console

    width = None if out.isatty() else PIPE_WIDTH
    return Console(file=out, width=width, markup=False, emoji=False, highlight=False)


def print_table(console: "Console", title: str, lines: Sequence[TableLine]) -> None:
    """Print a title, of a line or more, and a table of lines of one kind, numbers to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    narrow = console.width < NARROW_TERMINAL
    columns = [name for name in lines[0]._fields if not narrow or name in NARROW_COLUMNS]
    for name in columns:
        justify: Literal["left", "right"] = "left" if isinstance(getattr(lines[0], name), str) else "right"
        wrapped = name in WRAPPED_COLUMNS
        table.add_column(
            name, justify=justify, no_wrap=not wrapped, overflow="fold" if wrapped else "ellipsis"
        )
    for line in lines:
        table.add_row(*(format_cell(name, getattr(line, name)) or "-" for name in columns))
    with console.capture() as captured:
        for heading in title.split("\n"):
            console.print(single_line(heading))
        console.print(table)
    for text in captured.get().removesuffix("\n").split("\n"):
        console.file.write(text.rstrip() + "\n")
