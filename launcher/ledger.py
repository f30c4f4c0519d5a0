"""
The ledger: results.tsv, one line a run, append-only, not in git.

The first five columns are those of the original autoresearch, so what people grep and plot still works. Its
own files, with five columns or those of its MLX fork, are read too. Standard library only: the leaderboard
answers in a blink.
"""

import errno
import gc
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import wraps
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, NamedTuple, ParamSpec, TypeVar

STATUSES = ("keep", "discard", "crash", "timeout", "invalid")
VERIFIED = "verified"  # the statuses of rows that `autoresearch verify` adds about an earlier run
REFUTED = "refuted"
UNVERIFIABLE = "unverifiable"
CONFIRMED = "confirmed"  # and those that `autoresearch confirm` adds
UNCONFIRMED = "unconfirmed"
MOVED = "moved"  # of a row that says which trainer a night put on the branch at its end
ABOUT_RUNS = {
    VERIFIED,
    REFUTED,
    UNVERIFIABLE,
    CONFIRMED,
    UNCONFIRMED,
    MOVED,
}  # rows of these statuses are no runs


class Flag(StrEnum):
    """What happened to a run, beside its status. The column `marks` lists them, separated by commas."""

    SHORT = "short"
    CONTENDED = "contended"
    BATTERY = "battery"
    LOW_POWER = "low-power"
    THROTTLED = "throttled"
    SLEPT = "slept"
    INTERRUPTED = "interrupted"  # Ctrl-C or SIGTERM ended the launcher: the run was not judged
    CUT_OFF = "cut-off"  # the launcher was killed: the run was not judged
    FAULT = "fault"  # the launcher failed: the run was not judged
    REPEAT = "repeat"  # undecided: a run with another seed decides
    NOISE = "noise"  # another run of the current trainer: evidence, no decision
    CONFIRM = "confirm"  # one of the runs of `autoresearch confirm`: evidence, no decision
    PARALLEL = "parallel"  # one of several edits at once: what it was made on may not be the best any more
    BY_HAND = "by-hand"  # of a row that says that the branch moved: a person moved it, not the search
    SHORTER = "shorter"  # the edit removes code, and so needs no gain
    DRY = "dry"  # a dry run of a few seconds
    HARNESS_MODIFIED = "harness-modified"
    OTHER_CORPUS = "other-corpus"
    UNBOXED = "unboxed"  # this machine cannot wall a trainer in: such rows have a board of their own


# A run with one of these flags is shown, never ranked.
UNRANKED = {
    Flag.SHORT: "a budget other than the rules'",
    Flag.CONTENDED: "something else used the device",
    Flag.BATTERY: "ran on battery",
    Flag.LOW_POWER: "ran in low-power mode",
    Flag.THROTTLED: "the device was throttled",
    Flag.SLEPT: "the machine slept",
    Flag.CONFIRM: "one of the runs of a claim: the luckiest of its seeds is no result",
}
NOT_JUDGED = {Flag.INTERRUPTED, Flag.CUT_OFF, Flag.FAULT}  # a run without a score then says nothing
EVIDENCE = {Flag.NOISE, Flag.CONFIRM}  # runs that tell of a trainer, and decide nothing
# A budget is part of the board, so equal ones compare.
INCOMPARABLE = UNRANKED.keys() - {Flag.SHORT, Flag.CONFIRM}


class BoardKey(NamedTuple):
    """What two runs must share to be ranked together."""

    track: str
    fingerprint: str
    rules: int
    budget: float
    val_tokens: int
    platform: str
    device: str
    boxed: bool = True  # the trainer ran behind walls


@dataclass(slots=True)
class Row:
    """One line. Numbers that do not apply are 0, as in the original's crash rows."""

    commit: str = ""
    val_bpb: float = 0.0
    memory_gb: float = 0.0
    status: str = ""
    description: str = ""
    run: str = ""
    time: str = ""  # ISO 8601, UTC
    platform: str = ""
    device: str = ""  # its name
    track: str = ""
    seed: int = 0
    rules: int = 0  # RULES of prepare.py
    fingerprint: str = ""  # of the track's prepared data
    harness: str = ""  # content hash of all that no experiment changes
    budget: float = 0.0  # seconds
    val_tokens: int = 0
    dtype: str = ""  # of activations and embeddings
    val_stderr: float = 0.0
    training_seconds: float = 0.0
    total_seconds: float = 0.0
    tokens_M: float = 0.0
    tokens_per_second: float = 0.0
    mfu_percent: float = 0.0
    num_steps: int = 0
    num_params_M: float = 0.0
    depth: int = 0
    petaflops: float = 0.0  # 1e15 operations spent on training
    energy_kj: float = 0.0  # where the device reports its power
    source: str = ""  # content hash of the trainer
    parent: str = ""  # and of the committed one that the edit was made on
    agent: str = ""  # that made the edit; "" for a person
    p_better: float = 0.0  # that the edit lowers val_bpb, as believed after the run (launcher/belief.py)
    effect: float = 0.0  # of the edit, bpb; negative is better
    effect_error: float = 0.0
    belief_before: float = 0.0  # val_bpb of the trainer that was built on, as believed before the run
    belief_before_error: float = 0.0
    belief_after: float = 0.0  # val_bpb of the trainer to build on, as believed after it
    belief_after_error: float = 0.0
    sigma: float = 0.0  # seed noise as believed after the run, bpb
    build_on: str = ""  # content hash of the trainer to build on after the run
    sealed_bpb: float = 0.0  # of a verified row
    marks: str = ""  # flags, separated by commas
    reason: str = ""  # what went wrong, or why the verdict
    ledger: str = field(default="", compare=False)  # file it was read from; not a column

    @property
    def flags(self) -> set[str]:
        return set(self.ordered_flags) if self.marks else set()

    @property
    def ordered_flags(self) -> list[str]:
        """The flags in the order in which they were added."""
        return [flag for flag in self.marks.split(",") if flag]

    def add_flags(self, *flags: str) -> None:
        """Add flags that the row does not have yet, in order."""
        self.marks = ",".join(dict.fromkeys([*self.ordered_flags, *flags]))

    @property
    def scored(self) -> bool:
        """The run has a verdict, and a score that can be one, whatever a damaged or foreign file says."""
        return self.status in ("keep", "discard") and 0 < self.val_bpb < math.inf

    @property
    def comparable(self) -> bool:
        """A verdict may rest on the run: nothing but its budget, which is part of `board`, sets it apart."""
        return self.scored and self.rules > 0 and not self.flags & INCOMPARABLE

    @property
    def ranked(self) -> bool:
        """The run may stand on a leaderboard: it had the rules' budget too."""
        return self.comparable and not self.flags & UNRANKED.keys()

    @property
    def practice(self) -> bool:
        """The run stands on a practice board: only its budget keeps it from a leaderboard."""
        return self.comparable and self.flags & UNRANKED.keys() == {Flag.SHORT}

    @property
    def on_a_board(self) -> bool:
        """The run stands on a leaderboard or on a practice board."""
        return self.ranked or self.practice

    @property
    def judged(self) -> bool:
        """The run decided keep, discard or failure.

        False for a run that was interrupted, does not compare, waits for a second seed, ended on a limit that
        the machine missed, or that the launcher failed in.
        """
        if self.scored:
            return self.comparable and Flag.REPEAT not in self.flags
        if self.disturbed_timeout:
            return False
        return bool(self.status) and not self.flags & NOT_JUDGED

    @property
    def disturbed_timeout(self) -> bool:
        """The run ended on a limit on a machine that was contended, asleep or slowed: no word about it."""
        return self.status == "timeout" and bool(self.flags & INCOMPARABLE)

    @property
    def is_of_committed(self) -> bool:
        """The run is of the committed trainer as it was: a baseline, and no edit."""
        return self.source != "" and self.source == self.parent

    @property
    def decides(self) -> bool:
        """The row is of a run that the search goes by: no test of a run, and none that is evidence alone."""
        return self.status in STATUSES and not self.flags & EVIDENCE

    @property
    def goes_back(self) -> bool:
        """The run made an earlier trainer look better than the one that it was made from.

        What was run beside others says nothing of that: another one may have been kept meanwhile.
        """
        is_alone = self.parent != "" and Flag.PARALLEL not in self.flags
        return is_alone and self.build_on not in ("", self.source, self.parent)

    @property
    def board(self) -> BoardKey:
        return BoardKey(
            track=self.track,
            fingerprint=self.fingerprint,
            rules=self.rules,
            budget=self.budget,
            val_tokens=self.val_tokens,
            platform=self.platform,
            device=self.device,
            boxed=Flag.UNBOXED not in self.flags,
        )


COLUMNS = [f.name for f in fields(Row) if f.name != "ledger"]
HEADER = "\t".join(COLUMNS)
TYPES: dict[str, type] = {
    f.name: f.type for f in fields(Row) if f.name != "ledger" and isinstance(f.type, type)
}
# Columns with six decimals.
EXACT = {
    "val_bpb",
    "val_stderr",
    "sealed_bpb",
    "effect",
    "effect_error",
    "belief_before",
    "belief_before_error",
    "belief_after",
    "belief_after_error",
    "sigma",
}
ALIASES = {
    "bpb": "val_bpb",
    "peak_vram_gb": "memory_gb",
    "peak_memory_gb": "memory_gb",
    "desc": "description",
}
# Version 0.1 had no flags for these: it had these reasons.
OLD_REASONS = {
    "interrupted": Flag.INTERRUPTED,
    "the launcher was killed during the run": Flag.CUT_OFF,
}
OLD_REPEAT = "repeat:"  # how its reason of a discard within the seed noise began

RUN_ID = re.compile(r"\w[\w.-]{0,99}")  # it names a folder
FEW_TEXTS = {
    "status",
    "platform",
    "device",
    "track",
    "fingerprint",
    "harness",
    "dtype",
    "agent",
    "marks",
}  # in a column
MOST_KNOWN = 10_000  # cells of a column that are remembered
BLANK = "\0 \t\r\n"  # what a line or a file consists of that holds nothing: NUL after a power cut

P = ParamSpec("P")
Answer = TypeVar("Answer")
Complain = Callable[[str], None]  # takes a line about what is set aside


def say_nothing(message: str) -> None:
    """Take a complaint, for callers that want none."""


# ---------------------------------------------------------------------------
# Row -> line
# ---------------------------------------------------------------------------


def single_line(text: object) -> str:
    """Return the text as one line of Unicode: control characters become spaces, half a character "?"."""
    whole = str(text).encode(errors="replace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", whole).strip()


def to_line(row: Row) -> str:
    """Return the row as a line of the ledger, without the newline. Whatever it holds, it can be read back."""
    return "\t".join(to_cell(name, getattr(row, name)) for name in COLUMNS)


def to_text(rows: Iterable[Row]) -> bytes:
    """Return a whole ledger with these rows."""
    return "".join(line + "\n" for line in chain([HEADER], map(to_line, rows))).encode()


def to_cell(name: str, value: object) -> str:
    """Return a value as the ledger writes it."""
    kind = TYPES[name]
    if kind is str:
        return single_line(value)
    number = to_number(kind, value)
    if kind is int:
        return str(number)
    if name in EXACT:
        return f"{number:.6f}"
    return f"{number:.10g}" if abs(number) < 1e5 else str(round(number, 3))


def to_number(kind: type, value: Any) -> Any:
    """Return a value as int or float; 0 where it is no number, or not finite."""
    try:
        number = kind(value)
        return number if math.isfinite(number) else kind()
    except (TypeError, ValueError, OverflowError):  # OverflowError: an int that is larger than any float
        return kind()


def row_from(values: Mapping[str, Any]) -> Row:
    """Return a row from values as JSON has them. What is unknown is left out, what is no number is 0."""
    row = Row()
    for name in TYPES.keys() & values.keys():
        kind = TYPES[name]
        value = values[name]
        setattr(row, name, single_line(value) if kind is str else to_number(kind, value))
    return row


def facts_of(row: Row) -> dict[str, Any]:
    """Return a row for a program: its columns, with its flags as a list, and no val_bpb where it has none."""
    facts = {name: getattr(row, name) for name in COLUMNS if name != "marks"}
    facts["flags"] = row.ordered_flags
    if not row.scored:
        facts["val_bpb"] = facts["val_stderr"] = None
    return facts


# ---------------------------------------------------------------------------
# Lines -> rows
# ---------------------------------------------------------------------------


class Cells(dict[str, Any]):
    """The values of a column by their text: equal ones are converted once, and kept once."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def __missing__(self, text: str) -> Any:
        """Convert a cell. Raises ValueError when it is no number, or not finite."""
        value = self.kind(text)
        if self.kind is float and not math.isfinite(value):
            raise ValueError(text)
        if len(self) < MOST_KNOWN:
            self[text] = value
        return value


class Column(NamedTuple):
    """A column that is read."""

    at: int  # its index
    name: str
    cells: Cells | None  # None: text that differs from row to row


class Header(NamedTuple):
    """The names of a ledger's columns."""

    names: list[str]
    is_damaged: bool = False
    is_gone: bool = False  # the first line is a row


def find_header(first: str, second: str) -> Header | None:
    """Return the header of a ledger from its first two lines, None when it is no ledger.

    A damaged one is known by the number of its cells, or of those of the row below it.
    """
    names = [ALIASES.get(cell.strip(), cell.strip()) for cell in first.removeprefix("\ufeff").split("\t")]
    if len(names) == len(COLUMNS):
        in_place = sum(name == column for name, column in zip(names, COLUMNS, strict=True))
        if in_place > len(COLUMNS) / 2:
            return Header(COLUMNS, is_damaged=in_place < len(COLUMNS))
        if "val_bpb" not in names:
            return Header(COLUMNS, is_damaged=True, is_gone=True)
    elif second.count("\t") + 1 == len(COLUMNS):
        return Header(COLUMNS, is_damaged=True)
    return Header(names) if "val_bpb" in names else None


class Table:
    """The rows of a ledger, from its lines. They may come in parts, as the ledger grows.

    Args:
        name: the file's, for rows and complaints.
        wanted: the columns to read; the others stay empty.

    Attributes:
        rows: all so far, oldest first.
        complaints: a line about everything that was set aside.
    """

    def __init__(self, name: str = "", wanted: Collection[str] = COLUMNS) -> None:
        self.name = name
        self.rows: list[Row] = []
        self.complaints: list[str] = []
        self._wanted = wanted
        self._columns: list[Column] | None = None  # None: no line came yet
        self._width = 0  # cells of a row
        self._lines = 0  # so far

    def read(self, lines: Iterable[str]) -> None:
        """Take further lines, with or without newlines. The first of all is the header."""
        lines = iter(lines)
        if self._columns is None:
            lines = chain(self._read_header(list(islice(lines, 2))), lines)
        for line in lines:
            self._lines += 1
            if line.strip(BLANK) and self._columns:
                self._read_row(line.rstrip("\r\n").split("\t"))

    def _read_header(self, first_lines: list[str]) -> list[str]:
        """Find the columns by the first two lines. Returns those of them that are rows."""
        if not first_lines:
            return []
        header = find_header(first_lines[0], first_lines[-1])
        if header is None:
            self.complaints.append(f"{self.name}: not a ledger: its first line names no val_bpb")
            self._columns = []
            return []
        if header.is_damaged:
            self.complaints.append(f"{self.name}: its header is damaged, and is taken for today's")
        self._columns = []
        self._width = len(header.names)
        for at, name in enumerate(header.names):
            if name in TYPES and name in self._wanted:
                kind = TYPES[name]
                cells = Cells(kind) if kind is not str or name in FEW_TEXTS else None
                self._columns.append(Column(at, name, cells))
        rows = first_lines if header.is_gone else first_lines[1:]
        self._lines = len(first_lines) - len(rows)
        return rows

    def _read_row(self, texts: list[str]) -> None:
        assert self._columns
        texts += [""] * (self._width - len(texts))
        values: dict[str, Any] = {}
        try:
            for at, name, cells in self._columns:
                text = texts[at]
                if text:
                    values[name] = text if cells is None else cells[text]
        except ValueError:
            self.complaints.append(f"{self.name}:{self._lines}: not counted, {name} is {text[:40]!r}")
            return
        row = Row(**values, ledger=self.name)
        if row.run and not RUN_ID.fullmatch(row.run):
            row.run = ""  # another tool's word
        flag_old_reason(row)
        self.rows.append(row)


def parse(text: str, name: str = "", complain: Complain = say_nothing) -> list[Row]:
    """Return the rows of a ledger's text. `complain` gets a line about everything that is set aside."""
    *lines, torn = text.split("\n")
    table = Table(name)
    table.read(lines)
    for message in [*table.complaints, *complaints_of_torn(name, torn)]:
        complain(message)
    return table.rows


def complaints_of_torn(name: str, line: str) -> list[str]:
    """Return what is said of the end of a ledger that has no newline."""
    if not line.strip(BLANK):
        return []
    return [f"{name}: the last line is torn (power cut?) and is not counted: {line[:60]!r}"]


def flag_old_reason(row: Row) -> None:
    """Give a row of version 0.1 the flag that its reason stands for."""
    if row.reason in OLD_REASONS:
        row.add_flags(OLD_REASONS[row.reason])
    elif row.status == "discard" and row.reason.startswith(OLD_REPEAT):
        row.add_flags(Flag.REPEAT)


class Rows(list[Row]):
    """The rows of a file as it was read. They do not change, so what is found of them can be remembered."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        super().__init__(rows)
        self.answers: dict[Any, Any] = {}


def remembered(
    function: Callable[Concatenate[Sequence[Row], P], Answer],
) -> Callable[Concatenate[Sequence[Row], P], Answer]:
    """Decorate a function of rows: its answer about those of a file is found once. A turn asks ten times."""

    @wraps(function)
    def answer(rows: Sequence[Row], *arguments: P.args, **more: P.kwargs) -> Answer:
        if not isinstance(rows, Rows) or more:
            return function(rows, *arguments, **more)
        question = (function, *arguments)
        if question not in rows.answers:
            rows.answers[question] = function(rows, *arguments, **more)
        return rows.answers[question]

    return answer


@remembered
def by_board(rows: Sequence[Row]) -> dict[BoardKey, list[Row]]:
    """Return the rows of each board, those about runs included, oldest first."""
    boards: dict[BoardKey, list[Row]] = {}
    for row in rows:
        boards.setdefault(row.board, []).append(row)
    return boards


@remembered
def refuted_runs(rows: Sequence[Row]) -> set[str]:
    """Return the ids of the runs that `verify` refuted and did not verify later."""
    word = {row.run: row.status for row in rows if row.status in (VERIFIED, REFUTED)}  # the last one counts
    return {run for run, status in word.items() if status == REFUTED}


def missing_runs(folder: Path, rows: Iterable[Row]) -> list[str]:
    """Return the ids of the runs in a folder of runs that are not among the rows, oldest first."""
    known = {row.run for row in rows if row.status not in ABOUT_RUNS}
    try:
        names = set(os.listdir(folder)) - known
    except OSError:
        return []
    return sorted(name for name in names if (folder / name / "run.json").is_file() and RUN_ID.fullmatch(name))


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


class Reading:
    """A file as far as it was read, up to its last whole line."""

    def __init__(self, path: Path, wanted: Collection[str] = COLUMNS) -> None:
        self.path = path
        self.rows = Rows()
        self._table = Table(str(path), wanted)
        self._stamp: tuple[int, ...] = ()  # of the file when it was read; () before
        self._end = 0  # bytes that were read
        self._last = b""  # line of them
        self._torn = ""

    def go_on(self) -> bool:
        """Read what was added. Returns False when the file is no continuation of what was read.

        Raises:
            OSError: it cannot be read.
        """
        with open(self.path, "rb") as f:
            found = os.fstat(f.fileno())
            stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if stamp == self._stamp:
                return True
            f.seek(self._end - len(self._last))
            if self._stamp and (stamp[:2] != self._stamp[:2] or f.read(len(self._last)) != self._last):
                return False
            self._stamp = stamp
            with no_garbage_collection():
                self._table.read(self._whole_lines(f))
        self.rows = Rows(self._table.rows)  # a list of its own: that of an earlier caller does not grow
        return True

    def _whole_lines(self, f: BinaryIO) -> Iterator[str]:
        self._torn = ""
        for line in f:
            if not line.endswith(b"\n"):
                self._torn = line.decode(errors="replace")
                break
            self._end += len(line)
            self._last = line
            yield line.decode(errors="replace")

    @property
    def complaints(self) -> list[str]:
        """Return a line about everything that was set aside."""
        return [*self._table.complaints, *complaints_of_torn(str(self.path), self._torn)]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Save the time to look for cycles among many new objects that form none: a quarter of a reader's."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


_readings: dict[Path, Reading] = {}  # the last file that was read whole


class Ledger:
    """The ledger of this repository, or a copied one."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def rows(self, complain: Complain = say_nothing, wanted: Collection[str] = COLUMNS) -> list[Row]:
        """Return all rows, oldest first; an absent file has none.

        Rows of all columns are remembered: the next call reads what was added, and returns the same list
        when nothing was. Do not change them.

        complain: as for parse. wanted: columns to read; the others stay empty.
        """
        reading = _readings.get(self.path) if wanted is COLUMNS else None
        try:
            if reading is None or not reading.go_on():
                reading = Reading(self.path, wanted)
                reading.go_on()
        except FileNotFoundError:
            return []
        if wanted is COLUMNS:
            _readings.clear()
            _readings[self.path] = reading
        for message in reading.complaints:
            complain(message)
        return reading.rows

    def append(self, row: Row) -> None:
        """Add a line, whole or not at all: locked and synced. What is damaged is mended first.

        Raises:
            UserError: the file is no ledger.
            OSError: it cannot be written.
        """
        with self._locked():
            self._mend()
            write_whole(self.path, to_line(row).encode() + b"\n")

    def insert(self, rows: Sequence[Row]) -> None:
        """Add rows in the order of their times. Where others are later, the file is copied and written anew.

        Raises:
            OSError: it cannot be written.
        """
        if not rows:
            return
        with self._locked():
            known = self.rows()
            newest = max((row.time for row in known), default="")
            if self._is_sound() and newest <= min(row.time for row in rows):
                write_whole(self.path, b"".join(to_line(row).encode() + b"\n" for row in rows))
                return
            self._copy_away(self.path.read_bytes() if self.path.exists() else b"")
            self._replace(to_text(sorted([*known, *rows], key=lambda row: row.time)))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            yield

    def _mend(self) -> None:
        """Give the file today's header, and a newline at its end."""
        if self._is_sound():
            return
        text = self.path.read_bytes() if self.path.exists() else b""
        whole, _, torn = text.rpartition(b"\n")
        rows = parse(text.decode(errors="replace"), str(self.path), warn)
        names = whole.partition(b"\n")[0].decode(errors="replace")
        if text.strip(BLANK.encode()) and not rows and find_header(names, "") is None:
            from prepare import UserError  # not at the top: it brings numpy, and the leaderboard is quick

            raise UserError(f"{self.path} is no ledger: its first line names no val_bpb; move it away")
        if torn.strip(BLANK.encode()):
            with open(f"{self.path}.torn", "ab") as f:
                f.write(torn + b"\n")
            warn(f"{self.path} ended in a torn line; it was moved to {self.path.name}.torn")
        if names == HEADER:
            self._replace(whole + b"\n")
        else:
            self._copy_away(text)
            self._replace(to_text(rows))

    def _is_sound(self) -> bool:
        """Return whether the file has today's header and ends in a newline. No more of it is read."""
        try:
            with open(self.path, "rb") as f:
                first = f.readline()
                f.seek(-1, os.SEEK_END)
                return first == HEADER.encode() + b"\n" and f.read() == b"\n"
        except OSError:  # absent or empty
            return False

    def _copy_away(self, text: bytes) -> None:
        """Keep what the file held, before it is written anew."""
        if not text.strip(BLANK.encode()):
            return
        old = Path(f"{self.path}.old-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        old.write_bytes(text)
        warn(f"{self.path} is written anew, with today's columns; it was copied to {old.name}")

    def _replace(self, text: bytes) -> None:
        scratch = Path(f"{self.path}.tmp")
        with open(scratch, "wb") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, self.path)


def write_whole(path: Path, line: bytes) -> None:
    """Add a line to a file and sync it. Where the disk is full, the file stays as it was."""
    with open(path, "ab", buffering=0) as f:
        size = f.seek(0, os.SEEK_END)
        try:
            if f.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(f.fileno())
        except OSError:
            f.truncate(size)
            raise
