"""
`autoresearch try`: the trainer's edit, committed alone, run, and kept or reverted.

The branch moves only after the verdict. Until then the trial is a commit that nothing points at and a
journal in the git directory. A command that is cut off (Ctrl-C, kill -9, power) thus leaves branch and
working tree as they were. `finish_trial` completes from journal and ledger what was begun; it runs first in
every command that tries.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock

from backends.protocol import write_json
from launcher.console import say
from launcher.device import acquire
from launcher.harness import source_hash
from launcher.ledger import STATUSES, Row
from launcher.run import Request, exit_code, print_result, refuse_in_loop, run_experiment
from launcher.runs import id_time, ledger, record_killed_runs
from launcher.setting import Setting
from launcher.verdict import best_runs
from night import repo
from prepare import UserError


def try_edit(request: Request) -> int:
    """Try the trainer as it lies in the working tree, and print the result. Returns the exit code.

    Raises:
        UserError: as hold_repository and run_trial.
    """
    with hold_repository():
        return exit_code(run_trial(request, print_result))


@contextmanager
def hold_repository() -> Iterator[None]:
    """Hold the repository: one try or loop at a time. What an earlier command left is finished first.

    Raises:
        UserError: there is no repository to commit to, or the agent of a loop asks.
    """
    refuse_in_loop()
    repo.require_repository()
    lock = FileLock(repo.git_path("autoresearch.lock"))
    acquire(lock, lambda: "another try or loop works in this repository")
    try:
        record_killed_runs()
        finish_trial()
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------
# The trial
# ---------------------------------------------------------------------------


def run_trial(request: Request, on_row: Callable[[Row], None] = lambda row: None) -> Row:
    """Commit the trainer as it lies there, run it, keep or revert it. Returns the row that decides.

    A source that was scored before is not run again. The repository must be held. `on_row` gets the row
    before git is touched.

    Raises:
        UserError: there is nothing to try, or more than the trainer changed.
    """
    setting = request.setting
    trainer = setting.trainer.name
    check_edit(setting.trainer)
    base = repo.head()
    edited = repo.is_edited(trainer)
    commit = repo.commit_alone(trainer, request.description or "no description") if edited else base
    source = repo.content(commit, trainer)  # what is tried is the commit, whatever becomes of the file
    earlier = scored_before(source, setting)
    if earlier and not edited:
        raise UserError(
            f"{trainer} is as in the last commit, and run {earlier.run} scored it ({earlier.val_bpb:.6f}): "
            "edit it first"
        )
    trial = Trial(trainer, commit, base, repo.branch(), request.description, id_time())
    write_json(journal(), asdict(trial))
    if earlier:
        say(f"not run again: run {earlier.run} scored the identical {trainer}")
        row = judge_again(earlier)
    else:
        try:
            row = run_source(request, source, commit)
        except UserError:  # the run could not even begin: there is nothing to finish
            journal().unlink()
            raise
    on_row(row)
    finish_trial(row)
    return row


def run_source(request: Request, source: bytes, commit: str) -> Row:
    """Run the trainer of a commit, given its source. Returns the row that decides."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / request.setting.trainer.name
        copy.write_bytes(source)
        return run_experiment(replace(request, trainer=copy, commit=commit[:7]))


def check_edit(trainer: Path) -> None:
    """Raise UserError unless the trainer compiles and nothing else that a run reads was changed."""
    others = repo.changed_besides(trainer.name)
    if others:
        raise UserError(
            f"only {trainer.name} may change, but {repo.list_paths(others)} differ from the last commit: "
            "commit or undo that first",
            2,
        )
    try:
        compile(trainer.read_bytes(), trainer.name, "exec")
    except OSError as error:
        raise UserError(f"{trainer.name} cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        raise UserError(f"{trainer.name} does not compile: line {error.lineno or '?'}: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{trainer.name} does not compile: {error}") from None


def scored_before(source: bytes, setting: Setting) -> Row | None:
    """Return the last judged run of this very source on the setting's board, None when there is none."""
    digest = source_hash(source)
    board = setting.board
    rows = [
        row
        for row in ledger().rows()
        if row.source == digest and row.scored and row.judged and row.board == board
    ]
    return rows[-1] if rows else None


def judge_again(earlier: Row) -> Row:
    """Return a scored row with the verdict of today: "keep" only for the trainer that is the best one now."""
    best = best_runs(ledger().rows(), earlier.board)
    if any(row.source == earlier.source for row in best):
        return replace(earlier, status="keep", reason=f"run {earlier.run} scored it: the best trainer so far")
    reason = f"run {earlier.run} scored it ({earlier.status}), and it is not the best trainer now"
    return replace(earlier, status="discard", reason=reason)


# ---------------------------------------------------------------------------
# The journal
# ---------------------------------------------------------------------------


@dataclass
class Trial:
    """A trial under way, as the journal holds it."""

    trainer: str  # file name
    commit: str  # of the trial; equal to base when the trainer was not edited (a baseline)
    base: str  # HEAD when it began
    branch: str  # that HEAD named, "" when detached
    description: str
    began: str  # UTC, in the format of run ids


def journal() -> Path:
    """Return the file that names the trial under way."""
    return repo.git_path("autoresearch-trial.json")


def read_journal() -> Trial | None:
    """Return the trial that the journal holds, None when there is none or the journal is damaged."""
    try:
        return Trial(**json.loads(journal().read_text()))
    except (OSError, ValueError, TypeError):
        return None


def finish_trial(row: Row | None = None) -> Row | None:
    """Finish the trial that the journal holds: keep it, revert it, or leave an edit without a verdict alone.

    Every step may be repeated, and the journal goes last: if this is cut off, the next command completes it.

    row: the verdict. None: the trial was cut off, and the ledger may have its verdict.

    Returns the row of the trial, None when there was no trial or it was not run.
    """
    trial = read_journal()
    if trial is None:
        journal().unlink(missing_ok=True)
        return None
    if row is None:
        row = find_verdict(trial)
        found = f"run {row.run}: {row.status}" if row else "it was not run"
        say(f"the trial of «{trial.description or trial.trainer}» was cut off: {found}")
    if trial.commit != trial.base:
        keep_or_revert(trial, row)
    journal().unlink(missing_ok=True)
    return row


def find_verdict(trial: Trial) -> Row | None:
    """Return the last row that a trial got, None when its run did not begin."""
    commit = trial.commit[:7]
    rows = [
        row
        for row in ledger().rows()
        if row.commit == commit and row.run >= trial.began and row.status in STATUSES
    ]
    return rows[-1] if rows else None


def keep_or_revert(trial: Trial, row: Row | None) -> None:
    """Do with an edit what its row says. What is not kept stays reachable under a ref."""
    judged = row is not None and row.judged
    branch_stayed = repo.head() in (trial.base, trial.commit) and repo.branch() == trial.branch
    if row and judged and row.status == "keep" and branch_stayed:
        repo.advance_branch(trial.commit, trial.base, trial.trainer)
        say(f"kept: {trial.commit[:7]} {trial.description}")
        return
    ref = repo.save_ref(row.run if row else f"cut-off-{trial.began}", trial.commit)
    where = f"it stays reachable as {ref}"
    if not (row and judged):
        say(f"no verdict: the edit is still in {trial.trainer}, uncommitted; {where}")
    elif not branch_stayed:
        say(f"the branch moved meanwhile and was left alone; the trial ({row.status}): {where}")
    elif repo.blob(trial.trainer) != repo.committed_blob(trial.trainer, trial.commit):
        say(
            f"{trial.trainer} was edited during the run and was left alone; the trial ({row.status}): {where}"
        )
    else:
        repo.revert(trial.trainer)
        say(f"reverted ({row.status}): {trial.trainer} is as in the last commit; {where}")
