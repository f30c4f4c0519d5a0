"""
The ledger: results.tsv, one line a run, append-only, not in git.

The first five columns are those of the original autoresearch, so what people grep and plot still works. Its
own files, with five columns or those of its MLX fork, are read too. Standard library only: the leaderboard
answers in a blink.
"""

import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

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
    REPEAT = "repeat"  # undecided: a run with another seed decides
    NOISE = "noise"  # another run of the current trainer: evidence, no decision
    CONFIRM = "confirm"  # one of the runs of `autoresearch confirm`: evidence, no decision
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
        return {flag for flag in self.marks.split(",") if flag}

    def add_flags(self, *flags: str) -> None:
        """Add flags that the row does not have yet, in order."""
        known = [flag for flag in self.marks.split(",") if flag]
        self.marks = ",".join(dict.fromkeys([*known, *flags]))

    @property
    def scored(self) -> bool:
        return self.status in ("keep", "discard")

    @property
    def comparable(self) -> bool:
        """A verdict may rest on the run: nothing but its budget, which is part of `board`, sets it apart."""
        return self.scored and self.rules > 0 and not self.flags & INCOMPARABLE

    @property
    def ranked(self) -> bool:
        """The run may stand on a leaderboard: it had the rules' budget too."""
        return self.comparable and not self.flags & UNRANKED.keys()

    @property
    def judged(self) -> bool:
        """The run decided keep, discard or failure.

        False for a run that was interrupted, does not compare, or waits for a second seed.
        """
        if self.scored:
            return self.comparable and Flag.REPEAT not in self.flags
        return bool(self.status) and not self.flags & {Flag.INTERRUPTED, Flag.CUT_OFF}

    @property
    def goes_back(self) -> bool:
        """The run made an earlier trainer look better than the one that it was made from."""
        return self.parent != "" and self.build_on not in ("", self.source, self.parent)

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
TYPES: dict[str, type] = {f.name: f.type for f in fields(Row) if isinstance(f.type, type)}
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

Complain = Callable[[str], None]  # takes a line about what is set aside


def single_line(text: object) -> str:
    """Return the text with tabs, newlines and control characters as spaces: they cannot break a line."""
    return re.sub(r"[\x00-\x1f\x7f\u2028\u2029]+", " ", str(text)).strip()


def to_line(row: Row) -> str:
    """Return the row as a line of the ledger, without the newline."""
    return "\t".join(to_cell(name, getattr(row, name)) for name in COLUMNS)


def to_cell(name: str, value: object) -> str:
    """Return a value as the ledger writes it."""
    if not isinstance(value, float):
        return single_line(value)
    if name in EXACT:
        return f"{value:.6f}"
    return f"{value:g}" if abs(value) < 1e5 else str(round(value, 3))


def parse(text: str, name: str = "", complain: Complain = lambda message: None) -> list[Row]:
    """Return the rows of a ledger's text. `complain` gets a line about everything that is set aside."""
    lines = text.split("\n")
    if lines[-1]:
        complain(f"{name}: the last line is torn (power cut?) and is not counted: {lines[-1][:60]!r}")
    lines.pop()
    if not lines:
        return []
    header = [ALIASES.get(cell.strip(), cell.strip()) for cell in lines[0].split("\t")]
    if "val_bpb" not in header:
        complain(f"{name}: not a ledger: its first line names no val_bpb")
        return []
    plan = [(i, column, TYPES[column]) for i, column in enumerate(header) if column in TYPES]
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        row = Row(ledger=name)
        cells = line.rstrip("\r").split("\t")
        try:
            for i, column, kind in plan:
                if i < len(cells) and cells[i]:
                    setattr(row, column, cells[i] if kind is str else kind(cells[i]))
            column = "val_bpb"
            if not math.isfinite(row.val_bpb):
                raise ValueError
        except ValueError:
            complain(f"{name}:{number}: not counted, {column} is {cells[i][:40]!r}")
            continue
        flag_old_reason(row)
        rows.append(row)
    return rows


def flag_old_reason(row: Row) -> None:
    """Give a row of version 0.1 the flag that its reason stands for."""
    if row.reason in OLD_REASONS:
        row.add_flags(OLD_REASONS[row.reason])
    elif row.status == "discard" and row.reason.startswith(OLD_REPEAT):
        row.add_flags(Flag.REPEAT)


def refuted_runs(rows: Iterable[Row]) -> set[str]:
    """Return the ids of the runs that `verify` refuted and did not verify later."""
    word = {row.run: row.status for row in rows if row.status in (VERIFIED, REFUTED)}  # the last one counts
    return {run for run, status in word.items() if status == REFUTED}


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


class Ledger:
    """The ledger of this repository, or a copied one."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def rows(self, complain: Complain = lambda message: None) -> list[Row]:
        """Return all rows, oldest first; an absent file has none. `complain` as for parse."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        return parse(text, str(self.path), complain)

    def append(self, row: Row) -> None:
        """Add a line: locked, flushed and synced. A torn last line is moved to results.tsv.torn first."""
        from filelock import FileLock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            self._repair()
            with open(self.path, "ab") as f:
                f.write(to_line(row).encode(errors="replace") + b"\n")
                f.flush()
                os.fsync(f.fileno())

    def _repair(self) -> None:
        """Move a torn last line away and bring the header to today's columns."""
        text = self.path.read_bytes() if self.path.exists() else b""
        if text and not text.endswith(b"\n"):
            whole, _, torn = text.rpartition(b"\n")
            with open(f"{self.path}.torn", "ab") as f:
                f.write(torn + b"\n")
            warn(f"{self.path} ended in a torn line; it was moved to {self.path.name}.torn")
            text = whole + b"\n" if whole else b""
            self._replace(text)
        header = "\t".join(COLUMNS).encode()
        first = text.split(b"\n", 1)[0]
        if first == header:
            return
        if text and b"val_bpb" not in first and b"bpb" not in first.split(b"\t"):
            from prepare import UserError

            raise UserError(f"{self.path} is no ledger: its first line names no val_bpb; move it away")
        if text:
            old = Path(f"{self.path}.old-{time.strftime('%Y%m%d-%H%M%S')}")
            old.write_bytes(text)
            warn(f"{self.path} had other columns; it was copied to {old.name} before it got today's")
        self._replace(self._with_header(text, header))

    def _with_header(self, text: bytes, header: bytes) -> bytes:
        """Return a ledger of other columns (the original's, an older one) with today's; its rows are kept."""
        rows = parse(text.decode("utf-8", "replace"), str(self.path), warn)
        lines = [header.decode(), *(to_line(row) for row in rows)]
        return "".join(line + "\n" for line in lines).encode(errors="replace")

    def _replace(self, text: bytes) -> None:
        scratch = Path(f"{self.path}.tmp")
        with open(scratch, "wb") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, self.path)
