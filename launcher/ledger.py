"""
The ledger: results.tsv, one line an experiment, append-only, not in git.

The first five columns are those of the original autoresearch, so what people grep and plot still works. Its
own files, with five columns or those of its MLX fork, are read too. Standard library only: the leaderboard
answers in a blink.
"""

import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

STATUSES = ("keep", "discard", "crash", "timeout", "invalid")
INTERRUPTED, CUT_OFF = "interrupted", "the launcher was killed during the run"  # reasons of a run that nobody judged
REPEAT = "repeat:"                         # begins the reason of a result within the noise, which a second seed decides
VERIFIED, REFUTED = "verified", "refuted"  # rows that `autoresearch verify` adds about an earlier run
# A row with one of these marks is shown, never ranked.
UNRANKED = {"short": "a budget other than the rules'", "contended": "something else used the device", "battery": "ran on battery",
            "low-power": "ran in low-power mode", "throttled": "the device was throttled", "slept": "the machine slept"}


@dataclass(slots=True)
class Row:
    """One line. Numbers that do not apply are 0, as in the original's crash rows."""

    commit: str = ""
    val_bpb: float = 0.0
    memory_gb: float = 0.0
    status: str = ""
    description: str = ""
    run: str = ""
    time: str = ""                  # ISO 8601, UTC
    platform: str = ""
    device: str = ""
    track: str = ""
    seed: int = 0
    rules: int = 0                  # RULES of prepare.py
    fingerprint: str = ""           # of the track's prepared data
    harness: str = ""               # content hash of prepare.py, backends/, launcher/, platforms.yaml
    budget: float = 0.0             # seconds
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
    petaflops: float = 0.0          # 1e15 operations spent on training
    energy_kj: float = 0.0          # where the device reports its power
    source: str = ""                # content hash of the trainer
    sealed_bpb: float = 0.0         # of a verified row
    marks: str = ""                 # comma-separated
    reason: str = ""                # what went wrong, or why the verdict
    ledger: str = field(default="", compare=False)  # file it was read from; not a column

    @property
    def mark_list(self):
        return [m for m in self.marks.split(",") if m]

    @property
    def scored(self):
        return self.status in ("keep", "discard")

    @property
    def compares(self):
        """A verdict may rest on it: scored, and nothing but its budget, which is part of `board`, sets it apart."""
        return self.scored and self.rules > 0 and not any(m in UNRANKED for m in self.mark_list if m != "short")

    @property
    def ranks(self):
        """It may stand on a leaderboard: of the rules' budget too."""
        return self.compares and "short" not in self.mark_list

    @property
    def decided(self):
        """Its trial is over: kept, or to be taken back. Not so when it was cut off, or waits for another run."""
        if self.scored:
            return self.compares and not self.reason.startswith(REPEAT)
        return bool(self.status) and self.reason not in (INTERRUPTED, CUT_OFF)

    @property
    def board(self):
        """What two rows must share to be ranked together."""
        return self.track, self.fingerprint, self.rules, self.budget, self.val_tokens, self.platform, self.device


COLUMNS = [f.name for f in fields(Row) if f.name != "ledger"]
TYPES = {f.name: f.type for f in fields(Row)}
ALIASES = {"bpb": "val_bpb", "peak_vram_gb": "memory_gb", "peak_memory_gb": "memory_gb", "desc": "description"}


def clean(text):
    """Tabs, newlines and control characters become spaces: they cannot break a line."""
    return re.sub(r"[\x00-\x1f\x7f\u2028\u2029]+", " ", str(text)).strip()


def to_line(row):
    cells = []
    for name in COLUMNS:
        value = getattr(row, name)
        cells.append(f"{value:.6f}" if name in ("val_bpb", "val_stderr", "sealed_bpb") else f"{value:g}" if TYPES[name] is float and abs(value) < 1e5
                     else str(round(value, 3)) if TYPES[name] is float else clean(value))
    return "\t".join(cells)


def parse(text, name="", complain=None):
    """Rows of a ledger's text. `complain` gets a line about everything that is set aside."""
    complain = complain or (lambda message: None)
    lines = text.split("\n")
    if lines and lines[-1]:
        complain(f"{name}: the last line is torn (no newline; power cut?) and is not counted: {lines[-1][:60]!r}")
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
        cells, row = line.rstrip("\r").split("\t"), Row(ledger=name)
        try:
            for i, column, kind in plan:
                if i < len(cells) and cells[i]:
                    setattr(row, column, cells[i] if kind is str else kind(cells[i]))
        except ValueError:
            complain(f"{name}:{number}: not counted, {column} is {cells[i][:40]!r}")
            continue
        rows.append(row)
    return rows


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


class Ledger:
    """The ledger of this repository, or a copied one."""

    def __init__(self, path):
        self.path = Path(path)

    def rows(self, complain=None):
        """All rows, oldest first; an absent file has none. `complain` as for parse."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        return parse(text, str(self.path), complain)

    def append(self, row):
        """Add a line: locked, flushed and synced. A torn last line is moved to results.tsv.torn first."""
        from filelock import FileLock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            text = self.path.read_bytes() if self.path.exists() else b""
            if text and not text.endswith(b"\n"):
                whole, _, torn = text.rpartition(b"\n")
                with open(f"{self.path}.torn", "ab") as f:
                    f.write(torn + b"\n")
                warn(f"{self.path} ended in a torn line; it was moved to {self.path.name}.torn")
                text = whole + b"\n" if whole else b""
                self._replace(text)
            header = "\t".join(COLUMNS).encode()
            if text.split(b"\n", 1)[0] != header:
                self._replace(self._with_header(text, header))
            with open(self.path, "ab") as f:
                f.write(to_line(row).encode() + b"\n")
                f.flush()
                os.fsync(f.fileno())

    def _with_header(self, text, header):
        """A ledger of other columns (the original's, an older one) with today's; its rows are kept."""
        lines = [header.decode()] + [to_line(row) for row in parse(text.decode("utf-8", "replace"), str(self.path), warn)]
        return "".join(line + "\n" for line in lines).encode()

    def _replace(self, text):
        scratch = Path(f"{self.path}.tmp")
        with open(scratch, "wb") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, self.path)
