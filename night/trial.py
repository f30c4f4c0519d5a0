"""
`autoresearch try`: the trainer's edit, committed alone, run, and kept or reverted.

The branch moves only after the verdict: on to the edit, or back to an earlier trainer that now looks better.
Until then the trial is a commit that nothing points at and a journal in the git directory. A command that is
cut off (Ctrl-C, kill -9, power) thus leaves branch and working tree as they were. `finish_trial` completes
from journal and ledger what was begun; it runs first in every command that tries.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from backends.protocol import write_json
from launcher.console import say
from launcher.device import acquire
from launcher.exit_codes import EXIT_USAGE
from launcher.harness import read_trainer, source_hash
from launcher.ledger import BoardKey, Row
from launcher.processes import defer_signals, stop_on_signals
from launcher.run import Request, exit_code, print_result, run_experiment
from launcher.runs import id_time, ledger, read_source, record_killed_runs, scratch_folder
from launcher.setting import Setting
from launcher.verdict import board_runs, runs_of, survey_board
from night import repo
from prepare import UserError


def try_edit(request: Request, as_json: bool = False) -> int:
    """Try the trainer as it lies in the working tree, and print the result. Returns the exit code.

    as_json: print it as one object

    Raises:
        UserError: as hold_repository and run_trial.
    """
    request.setting.require_device()
    with stop_on_signals(), hold_repository():
        return exit_code(run_trial(request, before_git=partial(print_result, as_json=as_json)))


def repository_lock() -> FileLock:
    """Return the lock that a try or a loop holds."""
    return FileLock(repo.git_path("autoresearch.lock"))


def repository_is_held() -> bool:
    """Return whether a try or a loop works in this repository now."""
    try:
        with repository_lock().acquire(timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def hold_repository() -> Iterator[None]:
    """Hold the repository: one try or loop at a time. What an earlier command left is finished first.

    Raises:
        UserError: there is no repository to commit to.
    """
    repo.require_repository()
    lock = repository_lock()
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


def run_trial(
    request: Request, commit: str | None = None, before_git: Callable[[Row], None] = lambda row: None
) -> Row:
    """Run an edit of the trainer, and keep or revert it. Returns the row that decides.

    A source that was scored before is not run again. The repository must be held.

    Args:
        request: the experiment.
        commit: of the edit. If left out, the trainer as it lies there is tried.
        before_git: gets the row before git is touched.

    Raises:
        UserError: there is nothing to try, or more than the trainer changed.
    """
    setting = request.setting
    trainer = setting.trainer.name
    check_harness(trainer)
    base = repo.head()
    if commit is None:
        check_source(trainer, read_trainer(setting.trainer))
        commit = base
        if repo.is_edited(trainer):
            commit = repo.commit_alone(trainer, request.description or "no description")
    elif commit != base:
        base = repo.parent(commit)  # a person may have committed since
    source = repo.content(commit, trainer)  # what is tried is the commit, whatever becomes of the file
    parent = repo.content(base, trainer) if repo.committed_blob(trainer, base) else None
    earlier = scored_before(source, setting)
    if earlier and commit == base:
        raise nothing_edited(trainer, earlier)
    trial = Trial(trainer, commit, base, repo.branch(), request.description, id_time())
    write_json(journal(), asdict(trial))
    if earlier:
        say(f"not run again: run {earlier.run} scored the identical {trainer}")
        row = judge_again(earlier, parent)
    else:
        try:
            row = run_source(replace(request, parent=parent), source, commit)
        except UserError:  # the run could not even begin: there is nothing to finish
            journal().unlink()
            raise
    before_git(row)
    with defer_signals():  # half of it would be seen until the next command
        finish_trial(row)
    return row


def run_source(
    request: Request, source: bytes, commit: str, experiment: Callable[[Request], Row] | None = None
) -> Row:
    """Run the trainer of a commit, given its source. Returns the row that decides.

    experiment: what runs it; run_experiment if left out
    """
    with scratch_folder() as scratch:
        copy = scratch / request.setting.trainer.name
        copy.write_bytes(source)
        return (experiment or run_experiment)(replace(request, trainer=copy, commit=commit[:7]))


def check_harness(trainer: str) -> None:
    """Raise UserError when anything but the trainer was changed of what a run reads."""
    others = repo.changed_besides(trainer)
    if others:
        raise UserError(
            f"only {trainer} may change, but {repo.list_paths(others)} differ from the last commit: "
            "commit or undo that first",
            2,
        )


def check_source(trainer: str, source: bytes) -> None:
    """Raise UserError unless the source of a trainer compiles."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of the trainer's, on our screen
            compile(source, trainer, "exec")
    except SyntaxError as error:
        raise UserError(f"{trainer} does not compile: line {error.lineno or '?'}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{trainer} does not compile: {error or type(error).__name__}") from None


def require_edit(setting: Setting) -> None:
    """Raise UserError when the trainer is as in the last commit, and a run scored that already."""
    repo.require_repository()
    trainer = setting.trainer
    if not repo.is_edited(trainer.name) and any(row.comparable for row in ledger().rows()):
        earlier = scored_before(read_trainer(trainer), setting)
        if earlier:
            raise nothing_edited(trainer.name, earlier)


def nothing_edited(trainer: str, earlier: Row) -> UserError:
    """Return the error that there is nothing to try."""
    return UserError(
        f"nothing was edited: {trainer} is as in the last commit, and run {earlier.run} scored it "
        f"({earlier.val_bpb:.6f}): edit it first",
        EXIT_USAGE,
    )


def scored_before(source: bytes, setting: Setting) -> Row | None:
    """Return the last judged run of this very source on the setting's board, None when there is none."""
    digest = source_hash(source)
    rows = [row for row in board_runs(ledger().rows(), setting.board) if row.source == digest and row.judged]
    return rows[-1] if rows else None


def judge_again(earlier: Row, parent: bytes | None) -> Row:
    """Return a scored row with the verdict of today: "keep" where it is believed better than its parent."""
    believed = survey_board(ledger().rows(), earlier.board)
    assert believed  # the board has the earlier run
    head = source_hash(parent) if parent is not None else ""
    ours = believed.trainers[earlier.source]
    theirs = believed.trainers.get(head, believed.trainers[believed.best])
    row = replace(earlier, status="discard", build_on="")
    words = "believed better than the committed one"
    if ours.counts_as < theirs.counts_as or (head not in believed.trainers and believed.best == row.source):
        row.status = "keep"
    else:
        words = f"not {words} now"
    row.reason = f"run {earlier.run} scored it ({earlier.status}), and it is {words}"
    return row


# ---------------------------------------------------------------------------
# The journal
# ---------------------------------------------------------------------------


@dataclass
class Trial:
    """A trial under way, as the journal holds it."""

    trainer: str  # file name
    commit: str  # of the trial; equal to base when the trainer was not edited (a baseline)
    base: str  # that it was made on
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
    if row and row.judged and row.goes_back and repo.committed_source(trial.trainer) == row.build_on:
        finish_going_back(trial)
    else:
        if trial.commit != trial.base:
            keep_or_revert(trial, row)
        if row and row.judged and row.goes_back:
            go_back(trial, row)
    journal().unlink(missing_ok=True)
    return row


def find_verdict(trial: Trial) -> Row | None:
    """Return the last row that a trial got, None when its run did not begin."""
    commit = trial.commit[:7]
    rows = [row for row in ledger().rows() if row.commit == commit and row.run >= trial.began and row.decides]
    return rows[-1] if rows else None


def keep_or_revert(trial: Trial, row: Row | None) -> None:
    """Do with an edit what its row says. The trial's commit stays reachable under a ref."""
    trainer = trial.trainer
    ref = repo.save_ref(row.run if row else f"cut-off-{trial.began}", trial.commit)
    where = f"it stays reachable as {ref}"
    if row is None or not row.judged:
        lies = "the edit is still in the working tree; " if lies_there(trial) else ""
        say(f"no verdict: {lies}{where}")
        return
    if moved_by_a_person(trial, row):
        say(f"the branch moved meanwhile and was left alone; the trial ({row.status}): {where}")
        return
    edited = repo.committed_blob(trainer, trial.commit)
    if row.status == "keep":
        if repo.committed_blob(trainer) == edited:  # it was kept, and then cut off
            followed = repo.follow(trainer, {edited, repo.committed_blob(trainer, trial.base)})
        else:
            source = repo.content(trial.commit, trainer)
            kept = repo.commit_alone(trainer, lab_message(trial.description, row), source)
            followed = repo.advance_branch(kept, trainer)
        say(f"kept: {repo.head()[:7]} {trial.description}")
    else:
        followed = repo.follow(trainer, {edited})
        say(f"reverted ({row.status}): {trainer} is as in the last commit; {where}")
    if not followed:
        say(f"{trainer} was edited during the run and was left alone; the trial ({row.status}): {where}")


def moved_by_a_person(trial: Trial, row: Row) -> bool:
    """Return whether the branch is another one by now, or has another trainer. Other files do not count."""
    known = {repo.committed_blob(trial.trainer, trial.base)}
    if row.status == "keep":
        known.add(repo.committed_blob(trial.trainer, trial.commit))  # it was kept, and then cut off
    return repo.branch() != trial.branch or repo.committed_blob(trial.trainer) not in known


def lies_there(trial: Trial) -> bool:
    """Return whether the working tree has the trial's edit."""
    return repo.lying_blob(trial.trainer) == repo.committed_blob(trial.trainer, trial.commit)


def lab_message(description: str, row: Row) -> str:
    """Return the message of a commit that was kept: with its numbers, `git log` is the lab book."""
    trailers = [
        f"Run: {row.run}",
        f"Val-bpb: {row.val_bpb:.6f}",
        f"Effect: {row.effect:+.6f} +- {row.effect_error:.6f}",
        f"P-better: {row.p_better:.2f}",
        f"Tokens-per-second: {row.tokens_per_second:.0f}",
        f"Memory-GB: {row.memory_gb:g}",
        f"Trial: {row.commit}",
    ]
    if row.agent:
        trailers.append(f"Agent: {row.agent}")
    return f"{description or row.description}\n\n" + "\n".join(trailers)


# ---------------------------------------------------------------------------
# Back to an earlier trainer
# ---------------------------------------------------------------------------


def go_back(trial: Trial, row: Row) -> None:
    """Put the earlier trainer on the branch that the run made look better than the current one."""
    if moved_by_a_person(trial, row):
        say("the branch moved meanwhile: it does not go back to the earlier trainer")
        return
    put_on_branch(trial.trainer, row.board, row.build_on)


def finish_going_back(trial: Trial) -> None:
    """Bring the working tree along where it was cut off after the branch went back."""
    before = {repo.committed_blob(trial.trainer, commit) for commit in (trial.base, trial.commit)}
    repo.follow(trial.trainer, before)


def put_on_branch(trainer: str, board: BoardKey, source: str) -> bool:
    """Commit an earlier trainer, given its content hash, on top of the branch. Returns whether it did.

    It does not where the trainer is edited, or where no copy of the earlier one is left.
    """
    runs = runs_of(ledger().rows(), board, source)
    if not runs:
        return False
    name = f"the trainer of run {runs[-1].run} ({runs[-1].description})"
    if repo.is_edited(trainer):
        say(f"{trainer} was edited: it does not go back to {name}")
        return False
    text = read_source(runs, source) or saved_source(runs, trainer)
    if text is None:
        say(f"no copy is left of {name}: it is not gone back to")
        return False
    message = f"Go back to run {runs[-1].run}\n\n{runs[-1].description}\n\nRun: {runs[-1].run}"
    repo.advance_branch(repo.commit_alone(trainer, message, text), trainer)
    say(f"back to {name}: {repo.head()[:7]}")
    return True


def saved_source(runs: Iterable[Row], trainer: str) -> bytes | None:
    """Return the trainer of a run from the refs that trials are kept under, None when it is not there."""
    for row in runs:
        for tree in (f"{repo.REFS}/{row.run}", row.commit):
            if repo.committed_blob(trainer, tree):
                text = repo.content(tree, trainer)
                if source_hash(text) == row.source:
                    return text
    return None
