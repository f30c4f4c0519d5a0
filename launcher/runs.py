"""The runs on record: where they lie, which one a name means, what is kept of them."""

import importlib.metadata
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from backends.protocol import Log, RunDir
from launcher import compiled
from launcher.console import say
from launcher.harness import source_hash
from launcher.ledger import ABOUT_RUNS, BoardKey, Flag, Ledger, Row, refuted_runs, warn
from launcher.processes import alive, end_leftovers, remove_tree, scoring_id
from prepare import ROOT, UserError

# Packages whose version changes a run's speed or result; run.json lists them.
PACKAGES = ("torch", "triton", "mlx", "numpy", "tiktoken", "flash-attn-4", "quack-kernels", "kernels")

SCRATCH = "scratch"  # the folder of temporary files, in runs/


# ---------------------------------------------------------------------------
# Places and names
# ---------------------------------------------------------------------------


def home() -> Path:
    """Return where results.tsv and runs/ lie: the repository, or $AUTORESEARCH_HOME."""
    return Path(os.environ.get("AUTORESEARCH_HOME") or ROOT)


def ledger() -> Ledger:
    return Ledger(home() / "results.tsv")


def runs_dir() -> Path:
    return home() / "runs"


def run_dir(run_id: str) -> RunDir:
    return RunDir(runs_dir() / run_id)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty folder that is removed afterwards; after a kill, by the next command that runs."""
    parent = runs_dir() / SCRATCH
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
    try:
        yield path
    finally:
        remove_tree(path)


def remove_old_scratch() -> None:
    """Remove the scratch folders whose process is gone."""
    import psutil

    for path in (runs_dir() / SCRATCH).glob("*-*"):
        pid = path.name.partition("-")[0]
        if not (pid.isdecimal() and psutil.pid_exists(int(pid))):
            remove_tree(path)


def now_utc() -> str:
    """Return the time as the ledger writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def id_time() -> str:
    """Return the time (UTC) as ids of runs begin: they sort by it."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime())


def new_run_id() -> str:
    return f"{id_time()}-{secrets.token_hex(2)}"


def package_versions() -> dict[str, str]:
    """Return the installed versions of PACKAGES."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ---------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------


def find_run(name: str, complain: Callable[[str], None] = warn) -> Row:
    """Return the row of a run, by its id or an unambiguous beginning of it.

    "last" is the newest run, "best" the lowest val_bpb on the board of the newest ranked run.

    Raises:
        UserError: no run or several have that name.
    """
    everything = ledger().rows(complain)
    rows = [row for row in everything if row.status not in ABOUT_RUNS and row.run]
    if name == "last" and rows:
        return rows[-1]
    ranked = [row for row in rows if row.ranked]
    if name == "best" and ranked:
        return lowest_runs(everything)[ranked[-1].board]
    exact = [row for row in rows if row.run == name]
    found = exact or [row for row in rows if row.run.startswith(name)]
    if len(found) == 1 or exact:
        return found[0]
    if found:
        raise UserError(f"{len(found)} runs begin with '{name}': give more of the id", 2)
    raise UserError(
        f"the ledger has no run '{name}' (autoresearch leaderboard shows them; 'best' and 'last' work too)", 2
    )


def lowest_runs(rows: Sequence[Row]) -> dict[BoardKey, Row]:
    """Return the ranked run of each board with the lowest val_bpb, those left out that `verify` refuted."""
    refuted = refuted_runs(rows)
    lowest: dict[BoardKey, Row] = {}
    for row in rows:
        if not row.ranked or row.run in refuted:
            continue
        if row.board not in lowest or row.val_bpb < lowest[row.board].val_bpb:
            lowest[row.board] = row
    return lowest


def trainer_of(row: Row) -> Path | None:
    """Return the copy of the trainer that made a run, None when it is not here."""
    return run_dir(row.run).trainer() if row.run else None


def read_source(rows: Iterable[Row], source: str) -> bytes | None:
    """Return a trainer by its content hash, from the copy of a run that had it; None when none is here."""
    for row in rows:
        copy = trainer_of(row) if row.source == source else None
        if copy is not None:
            text = copy.read_bytes()
            if source_hash(text) == source:
                return text
    return None


def sealed_path(run_id: str) -> Path:
    """Return the file with a run's score on the sealed set, which `autoresearch confirm` writes."""
    return run_dir(run_id).path / "sealed.json"


def read_sealed(run_id: str) -> float | None:
    """Return a run's bits per byte on the sealed set, None when it is not on record."""
    try:
        return float(json.loads(sealed_path(run_id).read_text())["sealed_bpb"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def loss_curve(run_id: str) -> list[tuple[float, float]]:
    """Return [(seconds of training, smoothed loss)] of a run, [] when nothing is on record."""
    if not run_id:
        return []
    return [
        (event.elapsed, event.smooth) for _, event in run_dir(run_id).read_events() if isinstance(event, Log)
    ]


# ---------------------------------------------------------------------------
# All runs
# ---------------------------------------------------------------------------


def append_row(row: Row) -> None:
    """Write the row of a run, and mark the run as recorded."""
    ledger().append(row)
    folder = run_dir(row.run)
    if folder.path.is_dir():
        folder.recorded.touch()


def record_killed_runs() -> None:
    """Give runs whose launcher was killed their row: nothing that was started is missing from the ledger."""
    from filelock import FileLock

    remove_old_scratch()
    paths = [path for path in runs_dir().glob("*/run.json") if not RunDir(path.parent).recorded.exists()]
    if not paths:
        return
    with FileLock(runs_dir() / "recording.lock"):  # of two commands that start together, one records
        known = {row.run for row in ledger().rows()}
        for path in sorted(paths):
            run = RunDir(path.parent)
            if run.run_id in known:
                run.recorded.touch()
                continue
            row = killed_row(run)
            if row is None:
                continue
            end_leftovers(row.run)
            append_row(row)
            run.weights.unlink(missing_ok=True)
            compiled.remove_since(path.stat().st_mtime)
            remove_tree(run.box)
            for name in ("first", "second"):
                end_leftovers(scoring_id(row.run, name))
                remove_tree(run.path / name)
            say(f"run {row.run} was cut off when its launcher was killed; it is recorded as a crash")


def killed_row(run: RunDir) -> Row | None:
    """Return the row of a run whose launcher is gone, None when it still runs or its record is damaged."""
    import psutil

    record = run.read_record()
    try:
        owner = psutil.Process(record["pid"]) if psutil.pid_exists(record["pid"]) else None
        if owner and alive(owner) and owner.create_time() < run.record.stat().st_mtime:
            return None  # still running
        row = Row(**record["row"])
    except (ValueError, KeyError, TypeError, OverflowError, psutil.Error):
        return None
    row.status = "crash"
    row.reason = "the launcher was killed during the run"
    row.add_flags(Flag.CUT_OFF)
    return row


def record_of(row: Row, trainer: str, why: str, facts: dict, laptop: dict) -> dict:
    """Return the content of run.json: all that is known of a run before it starts."""
    return {
        "row": asdict(row),
        "pid": os.getpid(),
        "why": why,
        "facts": facts,
        "laptop": laptop,
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "trainer": trainer,
    }


def runs_to_keep(rows: Sequence[Row]) -> set[str]:
    """Return the runs whose weights are kept: the best of each board, and its first, which verify needs."""
    kept = {row.run for row in lowest_runs(rows).values()}
    boards = set()
    for row in rows:
        if row.comparable and row.board not in boards:
            boards.add(row.board)
            kept.add(row.run)
    return kept


def prune_weights(row: Row, asked_for: bool) -> None:
    """Drop the weights on a run's board that need not be kept. asked_for: the run's own stay for good."""
    run = run_dir(row.run)
    if asked_for and run.weights.exists():
        run.keep_weights.touch()
    rows = ledger().rows()
    kept = runs_to_keep(rows)
    for other in rows:
        folder = run_dir(other.run)
        if (
            other.run
            and other.board == row.board
            and other.run not in kept
            and not folder.keep_weights.exists()
        ):
            folder.weights.unlink(missing_ok=True)


def append_json_line(path: Path, data: dict) -> None:
    """Add a line to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(data) + "\n")
