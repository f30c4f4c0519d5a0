"""
The leaderboard: who is best on each device, and how the devices compare.

Ledgers -> boards of runs that may be compared -> a table (launcher/table.py), TSV or JSON. A ledger of
another tool has a board of its own, which is compared with nothing. The standard library reads and ranks.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

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
    "commit",
    "seed",
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
    def is_practice(self) -> bool:
        """Its runs had another budget than that of the rules."""
        return self.rows[0].practice

    @property
    def best(self) -> Row:
        return self.rows[0]

    @property
    def baseline(self) -> Row:
        """The first ranked run on this board."""
        return min(self.rows, key=lambda row: (row.time, row.run))

    @property
    def title(self) -> str:
        title = describe_board(self.key, f"{len(self.rows)} runs, ")
        return f"practice, a budget that never ranks: {title}" if self.is_practice else title


def describe_board(key: BoardKey, runs: str = "") -> str:
    """Return what the runs of a board share, in a line. runs: words about them, with a comma at their end."""
    where = f"{key.track} on {key.device} ({key.platform})"
    how = f"{key.budget:g} s, {key.val_tokens:,} tokens scored, rules {key.rules}"
    return f"{where}: {runs}{how}, data {key.fingerprint[:8]}"


@dataclass
class ForeignBoard:
    """The scored runs of a ledger that another tool wrote, best first. Its rules are unknown."""

    ledger: str  # the file
    baseline: Row  # the first of them
    rows: list[Row] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"unverified: {self.ledger}, {len(self.rows)} runs of another tool, by rules that are unknown"


class Boards(NamedTuple):
    """Everything that the ledgers hold, each run once."""

    runs: list[Row]  # all of them, those of a file in its order
    boards: list[Board]  # by track, then by their best val_bpb
    practice: list[Board]  # those of other budgets, in the same order
    foreign: list[ForeignBoard]  # one for each file
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
    foreign: dict[str, ForeignBoard] = {}
    unranked = []
    for row in rows:
        if row.scored and not row.rules:
            foreign.setdefault(row.ledger, ForeignBoard(row.ledger, row)).rows.append(row)
            continue
        if not row.on_a_board or is_refuted(row, verifications):
            unranked.append(row)
            continue
        key = row.board
        if key not in boards:
            boards[key] = Board(key)
        boards[key].rows.append(row)
    ranked, older = split_boards([board for board in boards.values() if not board.is_practice])
    practice, older_practice = split_boards([board for board in boards.values() if board.is_practice])
    for board in (*older, *older_practice):
        unranked += board.rows
    for other in foreign.values():
        other.rows.sort(key=lambda row: row.val_bpb)
    claims = standing_claims(about, verifications)
    moves = [row for row in about if row.status == MOVED]
    return Boards(rows, ranked, practice, list(foreign.values()), unranked, verifications, claims, moves)


def split_boards(boards: Sequence[Board]) -> tuple[list[Board], list[Board]]:
    """Return the boards of the rules and the data in force, sorted with their runs, and all others."""
    current = current_rule_sets(boards)
    kept = [board for board in boards if board.rule_set in current]
    for board in kept:
        board.rows.sort(key=lambda row: row.val_bpb)
    kept.sort(key=lambda board: (board.key.track, board.best.val_bpb))
    return kept, [board for board in boards if board.rule_set not in current]


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
    """A line of a board. None: there is no such number."""

    rank: int
    val_bpb: float
    stderr: float | None
    gain: float  # how much lower its val_bpb is than the baseline's
    verified: bool  # `autoresearch confirm` showed that its trainer is better than the baseline
    status: str
    tokens_per_second: float | None
    mfu_percent: float | None
    memory_gb: float | None
    num_params_M: float | None
    run: str  # of another tool's, the commit
    description: str
    time: str
    seed: int | None
    flags: list[str]
    reason: str


class UnrankedRun(NamedTuple):
    """A line about a run that is on no board."""

    val_bpb: float | None
    run: str
    device: str
    why: str
    description: str
    status: str
    time: str
    seed: int | None
    flags: list[str]
    reason: str


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


def list_ranked(
    board: Board | ForeignBoard, claims: dict[str, Row], most: int | None = None, sort: str = ""
) -> list[RankedRun]:
    """Return the lines of a board, best first.

    Args:
        board: whose lines.
        claims: by the run that they are about.
        most: the first so many lines alone.
        sort: a column to sort by, in place of val_bpb; with a "-" before it, the largest first.
    """
    baseline = board.baseline.val_bpb
    rows = board.rows if sort else board.rows[:most]
    lines = []
    for rank, row in enumerate(rows, 1):
        claim = claims.get(row.run)
        line = RankedRun(
            rank=rank,
            val_bpb=row.val_bpb,
            stderr=row.val_stderr or None,
            gain=round(baseline - row.val_bpb, 6),
            verified=claim is not None and claim.status == CONFIRMED,
            status=row.status,
            tokens_per_second=row.tokens_per_second or None,
            mfu_percent=row.mfu_percent or None,
            memory_gb=row.memory_gb or None,
            num_params_M=row.num_params_M or None,
            run=row.run or row.commit,
            description=row.description,
            time=row.time,
            seed=row.seed if row.rules else None,
            flags=row.ordered_flags,
            reason=row.reason,
        )
        lines.append(line)
    return sort_lines(lines, sort)[:most]


def sort_lines(lines: list[RankedRun], sort: str) -> list[RankedRun]:
    """Return lines sorted by a column, "-" before it: the largest first. What has no value comes last."""
    column = sort.removeprefix("-")
    if not column:
        return lines
    with_value = [line for line in lines if getattr(line, column) not in (None, "", [])]
    without = [line for line in lines if getattr(line, column) in (None, "", [])]
    return sorted(with_value, key=lambda line: getattr(line, column), reverse=sort[0] == "-") + without


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
        UnrankedRun(
            val_bpb=row.val_bpb if row.scored else None,
            run=row.run or row.commit,
            device=row.device,
            why=why_unranked(row, verifications),
            description=row.description,
            status=row.status,
            time=row.time,
            seed=row.seed if row.rules else None,
            flags=row.ordered_flags,
            reason=row.reason,
        )
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
    if isinstance(value, list):
        return ",".join(value)
    if isinstance(value, float):
        if column in DECIMALS:
            return f"{value:.{DECIMALS[column]}f}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
    return single_line(value)


# ---------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What of a leaderboard a person wants to see."""

    columns: tuple[str, ...] = ()  # of RankedRun; empty: those that fit
    sort: str = ""  # as for list_ranked
    most: int = MAX_ROWS  # runs of a table


def print_leaderboard(
    paths: Sequence[Path],
    track: str | None = None,
    platform: str | None = None,
    kind: str = "text",
    wanted: Wanted = Wanted(),  # noqa: B008  it is frozen
    out: TextIO | None = None,
    runs: Path | None = None,
) -> None:
    """Print the boards of one or more ledgers.

    Args:
        paths: the ledgers, merged by run id.
        track: show this track only.
        platform: show this platform only.
        kind: "text" (tables), "tsv" (all ranked runs) or "json" (everything).
        wanted: which columns and lines.
        out: where to print; stdout if left out.
        runs: the folder of the runs that the ledgers should have; None: it is not known.

    Raises:
        UserError: there is no such track or platform.
    """
    boards = gather(paths, track, platform, wanted=NEEDED)
    if not boards.runs:
        require_names(paths, track, platform)
    if runs and not (track or platform):
        warn_of_lost_runs(boards, runs)
    out = out or sys.stdout
    if kind == "json":
        print_json(boards, wanted, out)
    elif kind == "tsv":
        print_tsv(boards, wanted, out)
    else:
        print_text(boards, wanted, out)


def require_names(paths: Iterable[Path], track: str | None, platform: str | None) -> None:
    """Raise UserError when neither the ledgers nor platforms.yaml have a track or platform of that name."""
    if not (track or platform):
        return
    # Not at the top: they bring numpy, and the leaderboard is quick.
    from backends.platforms import load_platforms
    from launcher.exit_codes import EXIT_USAGE
    from prepare import UserError, load_tracks

    asked = {"track": track, "platform": platform}
    known = {"track": set(load_tracks()), "platform": set(load_platforms())}
    for path in paths:
        for row in Ledger(path).rows(wanted=("val_bpb", "track", "platform")):
            known["track"].add(row.track)
            known["platform"].add(row.platform)
    for kind, name in asked.items():
        if name and name not in known[kind]:
            listed = ", ".join(sorted(known[kind] - {""}))
            raise UserError(f"there is no {kind} '{name}': the {kind}s are {listed}", EXIT_USAGE)


def warn_of_lost_runs(boards: Boards, folder: Path) -> None:
    """Say how many runs in a folder of runs have a row, and the ledgers have it not."""
    lost = [run for run in missing_runs(folder, boards.runs) if (folder / run / "row.json").is_file()]
    if lost:
        warn(f"the ledger lacks {len(lost)} of the runs in {folder}: the next run, try or loop adds them")


def print_json(boards: Boards, wanted: Wanted, out: TextIO) -> None:
    """Print everything as one JSON object."""

    def rows_of(board: Board | ForeignBoard) -> list[dict[str, Any]]:
        return [line._asdict() for line in list_ranked(board, boards.claims, sort=wanted.sort)]

    def table_of(board: Board) -> dict[str, Any]:
        result = describe_result(board, boards.claims)
        return {"title": board.title, **board.key._asdict(), "result": result, "rows": rows_of(board)}

    unranked = list_unranked(boards.unranked, boards.verifications)
    data = {
        "boards": [table_of(board) for board in boards.boards],
        "practice": [table_of(board) for board in boards.practice],
        "foreign": [
            {"title": board.title, "ledger": board.ledger, "rows": rows_of(board)} for board in boards.foreign
        ],
        "across": [line._asdict() for line in compare_devices(boards.boards)],
        "unranked": [line._asdict() for line in unranked],
    }
    json.dump(data, out, indent=1)
    out.write("\n")


def print_tsv(boards: Boards, wanted: Wanted, out: TextIO) -> None:
    """Print the ranked runs, one a line, the numbers in full. What is missing is empty."""
    columns = wanted.columns or RankedRun._fields
    out.write("\t".join(("track", "device", *columns)) + "\n")
    for board in boards.boards:
        for line in list_ranked(board, boards.claims, sort=wanted.sort):
            values = [getattr(line, column) for column in columns]
            cells = [board.key.track, board.key.device, *map(tsv_cell, values)]
            out.write("\t".join(single_line(cell) for cell in cells) + "\n")


def tsv_cell(value: object) -> object:
    """Return a value as the TSV has it."""
    if value is None:
        return ""
    return ",".join(value) if isinstance(value, list) else value


def print_text(boards: Boards, wanted: Wanted, out: TextIO) -> None:
    """Print a table for each board, the comparison of devices, and what is not ranked.

    Practice boards come last, so that what ranks is seen first.
    """
    if not boards.runs:
        out.write("no experiments yet: autoresearch run\n")
        return
    from launcher.table import open_console, print_table

    console = open_console(out)
    shown: list[Board | ForeignBoard] = [*boards.boards, *boards.foreign]
    for board in shown:
        print_board(console, board, boards.claims, wanted)
    if len(boards.boards) > 1:
        print_table(console, "across devices", compare_devices(boards.boards))
        out.write("\n")
    for board in boards.practice:
        print_board(console, board, boards.claims, wanted)
    if boards.practice and not boards.boards:
        out.write("nothing ranks yet: a run without --budget does (autoresearch run)\n\n")
    if boards.unranked:
        title = f"not ranked: {len(boards.unranked)}"
        if len(boards.unranked) > wanted.most:
            title += f", the last {wanted.most} of them (--json has all)"
        lines_about = list_unranked(boards.unranked[-wanted.most :], boards.verifications)
        columns = [name for name in wanted.columns if name in UnrankedRun._fields]
        print_table(console, title, lines_about, columns)


def print_board(
    console: "Console", board: Board | ForeignBoard, claims: dict[str, Row], wanted: Wanted
) -> None:
    """Print a board's title, its best runs, how many more there are, and an empty line."""
    from launcher.table import print_table

    lines = list_ranked(board, claims, wanted.most, wanted.sort)
    title = board.title
    if isinstance(board, Board):
        title += f"\n{describe_result(board, claims)}"
    print_table(console, title, lines, wanted.columns)
    if len(board.rows) > wanted.most:
        console.file.write(f"... {len(board.rows) - wanted.most} more (--rows or --json has them)\n")
    console.file.write("\n")
