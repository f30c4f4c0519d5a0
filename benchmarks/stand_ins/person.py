"""Stands in for a person: what lies about in a repository before a night, and what it is in the middle of."""

import os
import random
import re
from collections.abc import Callable
from pathlib import Path

from house import TRAINER, House, append

UNSIGNED = {"commit.gpgSign": "true", "gpg.program": "false"}
CACHED = {"core.fsmonitor": "true", "core.untrackedCache": "true"}
HOOKS = ("pre-commit", "post-commit", "post-checkout", "post-index-change", "reference-transaction")


def add_belongings(house: House) -> None:
    """Add what every night must leave alone: untracked, ignored, staged and edited files, and a stash."""
    append(house.project / "docs" / "architecture.md", "stashed\n")
    house.git("stash", "-q")
    append(house.project / "docs" / "architecture.md", "edited\n")
    notes = house.project / "notes"
    notes.mkdir()
    (notes / "todo.txt").write_text("to do\n")
    (notes / "private.txt").write_text("mine alone\n")
    (notes / "private.txt").chmod(0o600)
    (notes / "go.sh").write_text("#!/bin/sh\n")
    (notes / "go.sh").chmod(0o755)
    (notes / "link").symlink_to("todo.txt")
    (notes / "dead link").symlink_to("nowhere")
    (notes / "two\nlines").write_text("odd\n")
    (notes / "large.bin").write_bytes(random.Random(1).randbytes(17 * 2**20))
    (notes / "empty").mkdir()
    (house.project / "ignored").mkdir()
    (house.project / "ignored" / "secret.txt").write_text("secret\n")
    (notes / "staged.txt").write_text("staged\n")
    house.git("add", "notes/staged.txt")


def edit_trainer(house: House, score: str = "2.90") -> None:
    """Edit the trainer. A lower score is better than the committed one's."""
    path = house.project / TRAINER
    house.edit = re.sub("^SCORE = .*", f"SCORE = {score}", path.read_text(), flags=re.M).encode()
    path.write_bytes(house.edit)


def stage_and_modify(house: House) -> None:
    append(house.project / "notes" / "staged.txt", "modified\n")


def stage_an_edit(house: House) -> None:
    append(house.project / "README.md", "staged\n")
    house.git("add", "README.md")
    append(house.project / "README.md", "and edited\n")


def stage_removals(house: House) -> None:
    house.git("rm", "-q", "--cached", "LICENSE")
    house.git("mv", "AGENTS.md", "docs/moved.md")


def intend_to_add(house: House) -> None:
    house.git("add", "-N", "notes/todo.txt")


def detach(house: House) -> None:
    house.git("checkout", "-q", "--detach")


def lock_the_index(house: House) -> None:
    """Leave what a git leaves that was killed long ago."""
    lock = house.project / ".git" / "index.lock"
    lock.touch()
    os.utime(lock, (1e9, 1e9))


def move_into_a_subfolder(house: House) -> None:
    """Make the project a folder of a larger repository."""
    inner = house.project.rename(house.folder / "inner")
    top = house.folder / "repository"
    house.project = top / "deep er" / "project"
    house.project.parent.mkdir(parents=True)
    (inner / ".git").rename(top / ".git")
    inner.rename(house.project)
    (top / "beside.txt").write_text("beside\n")
    house.git("reset", "-q")
    house.commit_all("moved", folder=top)
    add_belongings_to(house, top)


def add_a_submodule(house: House) -> None:
    """Give the project a submodule, and edit it."""
    other = house.folder / "other"
    house.git("init", "-q", str(other))
    (other / "file.txt").write_text("file\n")
    house.commit_all("other", folder=other)
    house.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(other), "sub")
    house.git("commit", "-q", "-m", "a submodule", "--", ".gitmodules", "sub")
    append(house.project / "sub" / "file.txt", "edited\n")


def make_it_a_submodule(house: House) -> None:
    """Go on where the project is a submodule of another repository."""
    above = house.folder / "above"
    house.git("init", "-q", str(above))
    command = ("-c", "protocol.file.allow=always", "submodule", "--quiet", "add")
    house.git(*command, str(house.project), "project", folder=above)
    house.commit_all("above", folder=above)
    move_to(house, above / "project")


def make_it_a_worktree(house: House) -> None:
    """Go on in a linked worktree of the repository."""
    worktree = house.folder / "worktree"
    house.git("worktree", "add", "-q", "-b", "mine", str(worktree))
    move_to(house, worktree)


def move_to(house: House, project: Path) -> None:
    """Go on in another working tree, with the ledger."""
    for name in ("results.tsv", "runs"):
        (house.project / name).rename(project / name)
    house.project = project
    add_belongings_to(house, project)


def add_belongings_to(house: House, folder: Path) -> None:
    (folder / "untracked.txt").write_text("untracked\n")
    (folder / "staged.txt").write_text("staged\n")
    house.git("add", "staged.txt", folder=folder)


def add_hooks(house: House) -> None:
    """Let hooks fail, and leave word that they were called."""
    for name in HOOKS:
        hook = house.project / ".git" / "hooks" / name
        hook.write_text(f"#!/bin/sh\necho {name} >> '{house.home}/hooks'\nexit 1\n")
        hook.chmod(0o755)


def add_odd_files(house: House) -> None:
    """Add what is neither text nor a plain file."""
    folder = os.fsencode(house.project / "notes")
    for name in (b"caf\xe9.txt", b"-rf", 255 * b"n"):
        with open(os.path.join(folder, name), "w") as file:
            file.write("odd\n")
    os.mkfifo(house.project / "notes" / "pipe")
    house.git("init", "-q", str(house.project / "notes" / "nested"))


def write_in_latin1(house: House) -> None:
    for name in ("program.md", "ideas.md"):
        with open(house.project / name, "ab") as f:
            f.write(b"- caf\xe9\n")


def configure(values: dict[str, str]) -> Callable[[House], None]:
    """Return a function that sets values of git's configuration."""

    def change(house: House) -> None:
        for name, value in values.items():
            house.git("config", name, value)

    return change


STATES: dict[str, Callable[[House], None]] = {
    "nothing special": lambda house: None,
    "a new file, staged and then modified": stage_and_modify,
    "an edit, staged and then edited": stage_an_edit,
    "a removal and a move, staged": stage_removals,
    "a file that is to be added": intend_to_add,
    "an edit in README.md": lambda house: append(house.project / "README.md", "edited\n"),
    "program.md and ideas.md are not UTF-8": write_in_latin1,
    "files that are odd": add_odd_files,
    "an edit in the trainer": edit_trainer,
    "an edit in the trainer that is worse": lambda house: edit_trainer(house, "9.00"),
    "a detached HEAD": detach,
    "a stale index.lock": lock_the_index,
    "a project in a subfolder": move_into_a_subfolder,
    "a submodule in the project": add_a_submodule,
    "a project that is a submodule": make_it_a_submodule,
    "a linked worktree": make_it_a_worktree,
    "hooks that fail": add_hooks,
    "commits that are to be signed": configure(UNSIGNED),
    "core.autocrlf": configure({"core.autocrlf": "true"}),
    "core.fsmonitor and the untracked cache": configure(CACHED),
    "core.fileMode off": configure({"core.fileMode": "false"}),
}
