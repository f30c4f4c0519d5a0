"""The runs on record: where they lie, which one a name means, what is kept of them."""

import importlib.metadata
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

from backends.platforms import StartSizes
from backends.protocol import Log, Result, RunDir, read_json, write_json
from launcher import compiled
from launcher.console import describe_os_error, say
from launcher.exit_codes import EXIT_USAGE
from launcher.harness import source_hash
from launcher.ledger import (
    ABOUT_RUNS,
    STATUSES,
    BoardKey,
    Flag,
    Ledger,
    Row,
    by_board,
    missing_runs,
    refuted_runs,
    remembered,
    row_from,
    to_number,
    warn,
)
from launcher.processes import end_leftovers, is_alive_since, remove_tree, scoring_id
from launcher.verdict import give_verdict
from prepare import ROOT, UserError

# Packages whose version changes a run's speed or result; run.json lists them.
PACKAGES = ("torch", "triton", "mlx", "numpy", "tiktoken", "flash-attn-4", "quack-kernels", "kernels")

SCRATCH = "scratch"  # the folder of temporary files, in runs/
HOME_VARIABLE = "AUTORESEARCH_HOME"  # where the ledger and the runs lie, in place of the repository


# ---------------------------------------------------------------------------
# Places and names
# ---------------------------------------------------------------------------


def home() -> Path:
    """Return where results.tsv and runs/ lie: the repository, or $AUTORESEARCH_HOME."""
    return Path(os.environ.get(HOME_VARIABLE) or ROOT)


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
    return format_time(time.time())


def format_time(moment: float) -> str:
    """Return a moment, given in Unix seconds, as the ledger writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


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

    "last" is the newest run, "best" the lowest val_bpb on the board of the newest ranked run, "baseline" the
    first run of that board. Where none is ranked, it is that of the newest practice run.

    Raises:
        UserError: no run or several have that name.
    """
    everything = ledger().rows(complain)
    rows = [row for row in everything if row.status not in ABOUT_RUNS and row.run]
    if name == "last" and rows:
        return rows[-1]
    refuted = refuted_runs(everything)
    counted = [row for row in rows if row.run not in refuted]
    ranked = [row for row in counted if row.ranked] or [row for row in counted if row.practice]
    if name == "best" and ranked:
        return lowest_runs(everything)[ranked[-1].board]
    if name == "baseline" and ranked:
        return next(row for row in rows if row.comparable and row.board == ranked[-1].board)
    if name in ("best", "baseline") and rows:
        raise UserError(
            f"none of the {len(rows)} runs is ranked, so there is no '{name}' (autoresearch leaderboard says "
            "why): autoresearch run makes one, with the budget of the rules on a quiet machine",
            EXIT_USAGE,
        )
    found = find_id(name, [row.run for row in rows])
    if found:
        return next(row for row in rows if row.run == found)
    raise UserError(
        f"the ledger has no run '{name}' (autoresearch leaderboard shows them; 'best', 'last' and 'baseline' "
        "work too; autoresearch run makes one)",
        EXIT_USAGE,
    )


def find_id(name: str, ids: Sequence[str]) -> str:
    """Return the id that a name is or begins, "" when none is. Raises UserError when it begins several."""
    found = [name] if name in ids else [known for known in ids if known.startswith(name)]
    if len(found) > 1:
        raise UserError(f"{len(found)} runs begin with '{name}': give more of the id", EXIT_USAGE)
    return found[0] if found else ""


@remembered
def lowest_runs(rows: Sequence[Row]) -> dict[BoardKey, Row]:
    """Return the run of each board with the lowest val_bpb, practice boards included.

    Left out are those that are not ranked, and those that `verify` refuted.
    """
    refuted = refuted_runs(rows)
    lowest = {}
    for board, of_board in by_board(rows).items():
        ranked = [row for row in of_board if row.on_a_board and row.run not in refuted]
        if ranked:
            lowest[board] = min(ranked, key=lambda row: row.val_bpb)
    return lowest


def find_row(run_id: str) -> Row | None:
    """Return the row of a run itself, None where the ledger has none."""
    if not run_id:
        return None
    rows = reversed(ledger().rows())
    return next((row for row in rows if row.run == run_id and row.status in STATUSES), None)


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
    score = to_number(float, read_json(sealed_path(run_id)).get("sealed_bpb"))
    return score if score > 0 else None


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


@contextmanager
def holding(name: str) -> Iterator[None]:
    """Hold a lock that all commands of this home know, given its name."""
    from filelock import FileLock

    runs_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(runs_dir() / f"{name}.lock"):
        yield


def recording() -> AbstractContextManager[None]:
    """Hold the lock under which rows are written: of commands that run together, one adds a row."""
    return holding("recording")


def judging() -> AbstractContextManager[None]:
    """Hold the lock from a verdict to its row: of runs that end together, the later one sees the earlier."""
    return holding("judging")


def append_row(row: Row) -> None:
    """Write the row of a run, once: into its folder first, so that a lost ledger can be written again.

    Where the disk is full or read-only, a line says so, and the next command adds the row.
    """
    run = run_dir(row.run)
    try:
        with recording():
            if run.path.is_dir():
                held = read_row(run)
                if held and find_row(row.run):
                    return
                row = held or row  # the first word about a run stands
                if not held:
                    write_json(run.row, asdict(row))
            ledger().append(row)
    except (OSError, UserError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else error
        say(f"run {row.run} is not in the ledger yet, the next command adds it: {reason}")


def read_row(run: RunDir) -> Row | None:
    """Return the row that a run's folder holds, None when it is absent or damaged."""
    row = row_from(read_json(run.row))
    return row if row.run == run.run_id and row.status in STATUSES else None


def record_killed_runs() -> None:
    """Give their rows to the runs that the ledger lacks: it lost them, or their launcher was killed.

    Raises:
        UserError: the ledger cannot be written.
    """
    remove_old_scratch()
    if not missing_runs(runs_dir(), ledger().rows()):
        return
    try:
        with recording():
            add_missing_rows()
    except OSError as error:
        raise UserError(f"a run's row could not be written: {describe_os_error(error)}") from None


def add_missing_rows() -> None:
    """Add the rows of the runs that the ledger lacks. Raises OSError, UserError."""
    rows = ledger().rows()
    found: list[Row] = []
    killed = []
    for run in map(run_dir, missing_runs(runs_dir(), rows)):
        row = read_row(run)
        if row is None:
            row = killed_row(run, [*rows, *found])
            if row is None:
                continue
            remove_leftovers(run)
            write_json(run.row, asdict(row))
            killed.append(row)
        found.append(row)
    ledger().insert(found)
    for row in killed:
        if row.scored:
            prune_weights(row, False)
            say(f"run {row.run} had its score when its launcher was killed; it is recorded: {row.status}")
        else:
            say(f"run {row.run} was cut off when its launcher was killed; it is recorded as a crash")
    lost = len(found) - len(killed)
    if lost:
        say(
            f"{ledger().path.name} had lost {lost} of the runs in {runs_dir()}; it has them again "
            "(to be rid of a run, remove its folder too)"
        )


def killed_row(run: RunDir, rows: Sequence[Row]) -> Row | None:
    """Return the row of a run whose launcher was killed: with a verdict, where it had its score.

    rows: those of the ledger

    Returns None when the launcher still works on it, or its record is damaged.
    """
    record = run.read_record()
    if is_under_way(run, record.get("pid")) or not isinstance(record.get("row"), dict):
        return None
    row = row_from(record["row"])
    if row.run != run.run_id:
        return None
    result = run.read_score()
    if result:
        add_result(row, result)
        give_verdict(rows, row, [])
    else:
        row.status = "crash"
        row.reason = "the launcher was killed during the run"
        row.add_flags(Flag.CUT_OFF)
    return row


def is_under_way(run: RunDir, pid: object) -> bool:
    """Return whether the launcher `pid` of a run without a row still works on it."""
    if not isinstance(pid, int) or pid == os.getpid():  # this launcher is done with its earlier runs
        return False
    try:
        recorded = run.record.stat().st_mtime
    except OSError:
        return False
    return is_alive_since(pid, recorded)


def remove_leftovers(run: RunDir) -> None:
    """End and remove what a run left whose launcher was killed; without a score, its weights too."""
    end_leftovers(run.run_id)
    if not run.result.exists():
        run.weights.unlink(missing_ok=True)
    with_code = run.read_record().get("compiled")
    place = Path(with_code) if isinstance(with_code, str) else None
    compiled.remove_since(run.record.stat().st_mtime, place)
    remove_tree(run.box)
    for name in ("first", "second"):
        end_leftovers(scoring_id(run.run_id, name))
        remove_tree(run.path / name)


def add_result(row: Row, result: Result) -> None:
    """Put the numbers of a scored run into its row."""
    row.training_seconds = result.training_seconds
    row.total_seconds = result.total_seconds
    row.val_bpb = result.val_bpb
    row.val_stderr = result.val_stderr
    row.memory_gb = round(result.peak_memory_mb / 1024, 2)
    row.tokens_M = result.total_tokens_M
    row.num_steps = result.num_steps
    row.num_params_M = result.num_params_M
    row.depth = result.depth
    row.mfu_percent = result.mfu_percent
    row.petaflops = round(1e6 * row.tokens_M * result.flops_per_token / 1e15, 3)
    if row.training_seconds:
        row.tokens_per_second = float(round(1e6 * row.tokens_M / row.training_seconds))


def record_of(row: Row, trainer: str, why: str, start: StartSizes, facts: dict, laptop: dict) -> dict:
    """Return the content of run.json: all that is known of a run before it starts."""
    return {
        "row": asdict(row),
        "pid": os.getpid(),
        "why": why,
        "start": asdict(start),
        "facts": facts,
        "laptop": laptop,
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "trainer": trainer,
        "compiled": str(compiled.folder()),
    }


def runs_to_keep(rows: Sequence[Row]) -> set[str]:
    """Return the runs whose weights are kept: the best of each board, and its first, which verify needs."""
    kept = {row.run for row in lowest_runs(rows).values()}
    kept.update(
        next((row.run for row in of_board if row.comparable), "") for of_board in by_board(rows).values()
    )
    return kept


def prune_weights(row: Row, asked_for: bool) -> None:
    """Drop the weights that a run made needless: its own, or those of the best before it.

    asked_for: its own stay for good
    """
    run = run_dir(row.run)
    if asked_for and run.weights.exists():
        run.keep_weights.touch()
    rows = ledger().rows()
    kept = runs_to_keep(rows)
    needless = run
    if row.run in kept:
        others = [
            other for other in by_board(rows).get(row.board, []) if other.on_a_board and other.run != row.run
        ]
        needless = run_dir(min(others, key=lambda other: other.val_bpb, default=row).run)
    if needless.run_id not in kept and not needless.keep_weights.exists():
        needless.weights.unlink(missing_ok=True)


def append_json_line(path: Path, data: dict) -> None:
    """Add a line to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(data) + "\n")
