"""
The agent's own folder: a git repository with the tracked files of one commit, made anew for every turn.

An agent edits, commits, breaks and deletes there what it likes. Only two files are read back, the trainer and
the notes. The person's files, index, branches and configuration lie elsewhere: the folder borrows their
repository's objects, and nothing else of it. Where it is, it stays: a tool asks once whether it is trusted.
"""

import hashlib
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from backends.protocol import IN_LOOP_VARIABLE
from launcher.harness import read_trainer, without_git_variables
from launcher.processes import remove_tree
from launcher.runs import HOME_VARIABLE, home, run_dir
from night import repo
from night.notes import NOTES, notes_path
from prepare import ROOT, UserError, cache_dir

BRANCH = "autoresearch"
RUN_ID = re.compile(r"\b\d{8}-\d{6}-[0-9a-f]{4}\b")
LONGEST_COPY = 2**18  # bytes of a run's log, and of the notes: their end


@dataclass(frozen=True)
class Workspace:
    """Where an agent works."""

    top: Path  # of its repository
    folder: Path  # that it starts in: what ROOT is in the person's repository
    notes: bytes = b""  # as it got them

    @property
    def temporary(self) -> Path:
        """The folder of its temporary files, in a box."""
        return self.top.with_name(f"{self.top.name}.tmp")

    def environment(self) -> dict[str, str]:
        """Return an agent's environment: our commands run there as they do for the person."""
        variables = without_git_variables()
        programs = os.path.dirname(sys.executable)
        return {
            **variables,
            HOME_VARIABLE: str(home()),
            IN_LOOP_VARIABLE: str(self.folder),
            # A git command finds no repository above, should an agent remove its own.
            "GIT_CEILING_DIRECTORIES": str(self.top.parent),
            "PATH": os.pathsep.join([programs, variables.get("PATH", os.defpath)]),
            "PWD": str(self.folder),
            # `uv run autoresearch` takes what is installed, and installs nothing from the folder.
            "UV_NO_SYNC": "1",
            "UV_PROJECT_ENVIRONMENT": sys.prefix,
        }

    def read_trainer(self, name: str) -> bytes:
        """Return the trainer as the agent left it. Raises UserError when that is no plain file."""
        return read_trainer(self.folder / name, follow=False)

    def save_notes(self) -> None:
        """Keep the notes as the agent left them. Those that it removed stay as they were.

        Where another agent has written some meanwhile, the lines of both are kept.
        """
        with suppress(UserError, OSError):
            notes = read_trainer(self.folder / NOTES, follow=False)
            there = read_end(notes_path()) if notes_path().exists() else b""
            if there != self.notes:
                notes = repo.merge(there, self.notes, notes, both=True) or there
            notes_path().parent.mkdir(parents=True, exist_ok=True)
            scratch = notes_path().with_suffix(".tmp")
            scratch.write_bytes(notes[-LONGEST_COPY:])
            os.replace(scratch, notes_path())


def make_workspace(commit: str, prompt: str, place: int = 0) -> Workspace:
    """Make the agent's folder anew.

    Args:
        commit: whose files it gets.
        prompt: what the agent is told; trainer and log of the runs that it names are copied to runs/<id>/.
        place: which of the folders it is, where several agents work at once.

    Raises:
        UserError: it cannot be made.
    """
    top = workspace_path(place)
    workspace = Workspace(top, top / repo.path_prefix())
    for folder in (workspace.temporary, top):
        remove_tree(folder)
        if os.path.lexists(folder):
            raise UserError(f"the agent's folder {folder} cannot be removed: remove it, and start again")
        folder.mkdir(parents=True)
    kind = repo.git_checked("rev-parse", "--show-object-format")
    repo.git_checked("init", "-q", "--template=", "-b", BRANCH, f"--object-format={kind}", folder=top)
    objects = repo.git_path("objects").resolve()
    (top / ".git" / "objects" / "info" / "alternates").write_bytes(os.fsencode(objects) + b"\n")
    if repo.git_path("shallow").exists():
        shutil.copyfile(repo.git_path("shallow"), top / ".git" / "shallow")
    repo.git_checked("reset", "-q", "--hard", commit, folder=top)
    copy_runs(workspace.folder, prompt)
    copied = workspace.folder / NOTES
    return replace(workspace, notes=copied.read_bytes()) if copied.exists() else workspace


def workspace_path(place: int = 0) -> Path:
    """Return where an agent's folder of this repository lies."""
    digest = hashlib.sha256(os.fsencode(ROOT)).hexdigest()[:8]
    return cache_dir() / "workspaces" / f"{ROOT.name}-{digest}{f'-{place + 1}' if place else ''}"


def copy_runs(folder: Path, prompt: str) -> None:
    """Copy the notes, and of the runs that a prompt names trainer and log."""
    copy_end(notes_path(), folder / NOTES)
    for run_id in set(RUN_ID.findall(prompt)):
        run = run_dir(run_id)
        trainer = run.trainer()
        for source in (run.log, *([trainer] if trainer else [])):
            copy_end(source, folder / "runs" / run_id / source.name)


def copy_end(source: Path, target: Path) -> None:
    """Copy a file; of a long one, the end. What is not there is passed over."""
    with suppress(OSError):
        data = read_end(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def read_end(path: Path) -> bytes:
    """Return a file; of a long one, the end. Raises OSError."""
    with open(path, "rb") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - LONGEST_COPY))
        return f.read()
