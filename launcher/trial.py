"""
`autoresearch try`: the trainer's edit, committed alone, run, and kept or taken back.

The branch moves only after the verdict. Until then the trial is a commit that nothing points at and a journal
in the git directory, so that whoever is cut off (Ctrl-C, kill -9, power) finds branch and working tree as they
were. `settle` finishes from the journal and the ledger what was begun; it runs first in every command that tries.
"""

import json
import os
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock

from backends.platforms import current_track, machine_facts
from launcher import repo
from launcher.ledger import STATUSES, Row
from launcher.run import acquire, choose_platform, exit_code, experiment, ledger, recover, say, stamp, write_json
from prepare import ROOT, RULES, UserError, prepare

IN_LOOP = "AUTORESEARCH_LOOP"  # set for the agent that the loop calls: it must not start experiments of its own


@dataclass
class Begun:
    """A trial under way, as the journal holds it."""

    trainer: str        # file name
    commit: str         # of the trial; equal to base when the trainer was not edited (a baseline)
    base: str           # HEAD when it began
    branch: str         # that HEAD named, "" when detached
    description: str
    began: str          # UTC, in the format of run ids


def journal():
    return repo.git_path("autoresearch-trial.json")


def begun():
    """The trial that the journal holds, or None."""
    try:
        return Begun(**json.loads(journal().read_text()))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def the_repository():
    """Hold the repository: one try or loop at a time. Waits, and says so. What an earlier command left is settled first."""
    if os.environ.get(IN_LOOP):
        raise UserError("`autoresearch loop` runs the experiments: edit the trainer, say what you did, and end")
    repo.require_repository()
    lock = FileLock(repo.git_path("autoresearch.lock"))
    acquire(lock, lambda: "another try or loop works in this repository")
    with lock:
        recover()
        settle()
        yield


def run_try(options):
    """`autoresearch try`. Returns the exit code."""
    with the_repository():
        return exit_code(trial(options))


def trial(options):
    """Commit the trainer as it lies there, run it, keep or take back. Returns the ledger row that decides.

    The repository must be held. Raises UserError when there is nothing to try, or when more than the trainer changed.
    """
    platform, _ = choose_platform(options.platform)
    trainer = platform.trainer
    check_edit(trainer)
    base, edited = repo.head(), repo.edited(trainer)
    commit = repo.commit_alone(trainer, options.description or "no description") if edited else base
    source = repo.content(commit, trainer)  # from here on it is the commit that is tried, whatever somebody does to the file
    earlier = scored_before(source, options)
    if earlier and not edited:
        raise UserError(f"{trainer} is as in the last commit, and run {earlier.run} scored it ({earlier.val_bpb:.6f}): edit it first")
    write_json(journal(), asdict(Begun(trainer, commit, base, repo.branch(), options.description, stamp())))
    if earlier:
        say(f"not run again: run {earlier.run} scored the identical {trainer}: {earlier.val_bpb:.6f}, {earlier.status}")
        settle(earlier)
        return earlier
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / trainer
        copy.write_bytes(source)
        try:
            row = experiment(replace(options, trainer=copy, commit=commit[:7]))
        except UserError:  # it could not even begin: nothing is to be settled
            journal().unlink()
            raise
    settle(row)
    return row


def check_edit(trainer):
    """Raises UserError unless the trainer compiles and nothing else that a run reads was changed."""
    others = repo.changed_beside(trainer)
    if others:
        raise UserError(f"only {trainer} may change, but {', '.join(others[:5])}{' and more' * (len(others) > 5)} differ from the last commit: "
                        "commit or undo that first", 2)
    path = ROOT / trainer
    try:
        compile(path.read_bytes(), trainer, "exec")
    except OSError as e:
        raise UserError(f"{trainer} cannot be read: {e.strerror}") from None
    except (SyntaxError, ValueError) as e:
        raise UserError(f"{trainer} does not compile: line {getattr(e, 'lineno', '?')}: {getattr(e, 'msg', e)}") from None


def scored_before(source, options):
    """The last row that a verdict may rest on of this very source (bytes), under the conditions at hand; None if there is none."""
    platform, _ = choose_platform(options.platform)
    track, val_tokens = current_track(platform, options.track or platform.track)
    board = Row(track=track.name, fingerprint=prepare(track).fingerprint, rules=RULES, budget=options.budget, val_tokens=val_tokens, platform=platform.name,
                device=machine_facts().device).board
    rows = [row for row in ledger().rows() if row.source == repo.digest(source) and row.compares and row.decided and row.board == board]
    return rows[-1] if rows else None


def settle(row=None):
    """Finish the trial that the journal holds: keep it, take it back, or leave the edit where it is when nobody judged it.

    row: its verdict; looked up in the ledger when an earlier command was cut off. Every step may be repeated, and
    the journal goes last.
    """
    trial = begun()
    if trial is None:
        journal().unlink(missing_ok=True)
        return
    if row is None:
        rows = [r for r in ledger().rows() if r.commit == trial.commit[:7] and r.run >= trial.began and r.status in STATUSES]
        row = rows[-1] if rows else None
        say(f"an earlier command was cut off while it tried «{trial.description or trial.trainer}»: " + (f"run {row.run}: {row.status}" if row else "it was not run"))
    if trial.commit != trial.base:
        conclude(trial, row)
    journal().unlink(missing_ok=True)


def conclude(trial, row):
    """What becomes of an edit."""
    here = repo.head() in (trial.base, trial.commit) and repo.branch() == trial.branch
    if row and row.decided and row.status == "keep" and here:
        repo.advance(trial.commit, trial.base, trial.trainer)
        say(f"kept: {trial.commit[:7]} {trial.description}")
        return
    ref = row.run if row else f"cut-off-{trial.began}"
    repo.remember(ref, trial.commit)
    where = f"it stays reachable as {repo.REFS}/{ref}"
    if not (row and row.decided):
        say(f"no verdict: the edit is still in {trial.trainer}, uncommitted; {where}")
    elif not here:
        say(f"the branch moved meanwhile and was left alone; the trial ({row.status}): {where}")
    elif repo.blob(trial.trainer) != repo.committed_blob(trial.trainer, trial.commit):
        say(f"{trial.trainer} was edited during the run and was left alone; the trial ({row.status}): {where}")
    else:
        repo.put_back(trial.trainer)
        say(f"taken back ({row.status}): {trial.trainer} is as in the last commit; {where}")
