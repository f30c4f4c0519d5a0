"""
Git around the experiments: what changed, one file committed alone, edits reverted or stashed under a ref.

Git's plumbing is called wherever it exists: no hook runs, no editor opens, and what a person has staged or
left uncommitted elsewhere stays as it is. A file is named by its path below ROOT.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from launcher.harness import PROTECTED, git_output, source_hash
from launcher.processes import defer_signals
from prepare import ROOT, UserError

# REFS/<run>: a trial that was reverted, or an edit that was stashed before a run of it counted.
# REFS/stray/<time>: what an agent left outside the trainer, or an edit that no run was made of.
# REFS/ahead: the edit that an agent made last while an experiment ran.
REFS = "refs/autoresearch"
LOCKED_SECONDS = 10.0  # that another git command may hold the index
LOCK_POLL_SECONDS = 0.2
LARGE_FILE = 2**24  # bytes; a larger untracked file is data, and is not copied into the repository
PATHS_A_CALL = 500  # of git update-index: a command line has a limit
NAMED_PATHS = 5  # that a message lists
UNFINISHED = {
    "MERGE_HEAD": "merge",
    "rebase-merge": "rebase",
    "rebase-apply": "rebase",
    "CHERRY_PICK_HEAD": "cherry-pick",
}
SYMLINK_MODE = "120000"
EXECUTABLE_MODE = "100755"
FILE_MODE = "100644"
FOLDER_MODE = "040000"


# ---------------------------------------------------------------------------
# Calling git
# ---------------------------------------------------------------------------


def git_bytes(
    *arguments: str,
    index: Path | None = None,
    given: bytes = b"",
    environment: Mapping[str, str] | None = None,
) -> bytes:
    """Return what a git command prints. While another command holds the repository's index, wait for it.

    index: the index file to use in place of the repository's own
    given: its standard input
    environment: variables beside this process's own

    Raises:
        UserError: the command failed.
    """
    variables = {**os.environ, **(environment or {})}
    if index:
        variables["GIT_INDEX_FILE"] = str(index)
    deadline = time.monotonic() + LOCKED_SECONDS
    while True:
        # A git that is killed in the middle leaves a lock, on which every later command fails.
        with defer_signals():
            done = subprocess.run(
                ["git", "-C", str(ROOT), *arguments],
                input=given,
                capture_output=True,
                env=variables,
                start_new_session=True,
            )
        if done.returncode == 0:
            return done.stdout
        if b".lock" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(LOCK_POLL_SECONDS)
    said = done.stderr.decode(errors="replace").strip() or "no message"
    message = f"git {arguments[0]} failed: {said.splitlines()[0]}"
    if ".lock" in message:
        message += ": is another git command running? If not, remove that file"
    raise UserError(message)


def git_checked(*arguments: str, index: Path | None = None) -> str:
    """Return what git_bytes returns as text. Paths that are not UTF-8 come through whole."""
    return os.fsdecode(git_bytes(*arguments, index=index)).strip("\n")


def git_paths(*arguments: str, index: Path | None = None) -> list[str]:
    """Return the entries that a git command with -z prints."""
    return [entry for entry in git_checked(*arguments, index=index).split("\0") if entry]


@contextmanager
def scratch_index() -> Iterator[Path]:
    """Yield an index of its own with the content of HEAD: the repository's index stays."""
    with tempfile.TemporaryDirectory() as scratch:
        index = Path(scratch) / "index"
        git_checked("read-tree", "HEAD", index=index)
        yield index


def list_paths(paths: Sequence[str]) -> str:
    """Return the first paths, for a message."""
    text = ", ".join(paths[:NAMED_PATHS])
    if len(paths) > NAMED_PATHS:
        text += " and more"
    return text.encode(errors="replace").decode()


# ---------------------------------------------------------------------------
# The repository as it is
# ---------------------------------------------------------------------------


def require_repository() -> None:
    """Raise UserError unless trials can be committed here."""
    if not git_output("rev-parse", "--git-dir"):
        raise UserError(
            f"{ROOT} is not a git repository (or git is missing): git init, and commit; "
            "`autoresearch run` needs none"
        )
    if not head():
        raise UserError("the repository has no commit yet: git add -A && git commit -m start")
    for name, command in UNFINISHED.items():
        if git_path(name).exists():
            raise UserError(f"a {command} is under way: finish it, or git {command} --abort")


def git_path(name: str) -> Path:
    """Return the path of a file in the git directory."""
    return ROOT / git_output("rev-parse", "--git-path", name)


def head() -> str:
    """Return the id of the last commit, "" when there is none."""
    return git_output("rev-parse", "--verify", "HEAD")


def branch() -> str:
    """Return the branch that HEAD names, "" when it is detached."""
    return git_output("symbolic-ref", "-q", "HEAD")


def path_prefix() -> str:
    """Return the path of ROOT below the repository's top folder: "", or with a slash at its end."""
    return git_checked("rev-parse", "--show-prefix")


def changed_besides(trainer: str) -> list[str]:
    """Return the PROTECTED files that differ from the last commit, but for the trainer."""
    # Without `glob`, git's * crosses slashes: *.py would be any Python file in any folder.
    protected = [f":(glob){path}" for path in PROTECTED]
    lines = git_paths("--no-optional-locks", "status", "--porcelain", "--no-renames", "-z", "--", *protected)
    prefix = path_prefix()
    paths = {line[3:].removeprefix(prefix) for line in lines}  # after two letters of status and a space
    return sorted(paths - {trainer})


def blob(trainer: str) -> str:
    """Return the object id of the trainer as it lies in the working tree. The repository then holds it."""
    return git_checked("hash-object", "-w", "--", str(ROOT / trainer))


def blob_of(source: bytes, trainer: str) -> str:
    """Return the object id that the trainer would have with this source. The repository then holds it."""
    return os.fsdecode(git_bytes("hash-object", "-w", "--stdin", f"--path={trainer}", given=source)).strip()


def committed_blob(trainer: str, commit: str = "HEAD") -> str:
    """Return the object id of the trainer in a commit, "" when it is not there."""
    return git_output("rev-parse", "--verify", "-q", f"{commit}:./{trainer}")


def committed_source(trainer: str) -> str:
    """Return the content hash of the trainer in the last commit, "" when it is not there."""
    return source_hash(content("HEAD", trainer)) if committed_blob(trainer) else ""


def is_edited(trainer: str) -> bool:
    """Return whether the trainer differs from the last commit."""
    return blob(trainer) != committed_blob(trainer)


def content(tree: str, path: str) -> bytes:
    """Return the bytes of a file of a commit or tree, as a checkout would write them."""
    return git_bytes("cat-file", "--filters", f"{tree}:./{path}")


def mode_of(tree: str, path: str) -> str:
    """Return the mode of a file of a commit or tree, "" where there is none or a folder."""
    mode = git_checked("ls-tree", tree, "--", path).partition(" ")[0]
    return "" if mode == FOLDER_MODE else mode


# ---------------------------------------------------------------------------
# The trainer: committed, kept, reverted, stashed
# ---------------------------------------------------------------------------


def commit_alone(trainer: str, message: str, source: bytes | None = None) -> str:
    """Make a commit on top of HEAD in which only the trainer differs. HEAD, index and working tree stay.

    source: of the trainer; as it lies in the working tree if left out

    Returns the commit's id. No branch points at it.
    """
    mode = mode_of("HEAD", trainer) or FILE_MODE
    held = blob(trainer) if source is None else blob_of(source, trainer)
    entry = f"{mode},{held},{path_prefix()}{trainer}"
    with scratch_index() as index:
        git_checked("update-index", "--add", "--cacheinfo", entry, index=index)
        tree = git_checked("write-tree", index=index)
    return commit_tree(tree, head(), message)


def commit_tree(tree: str, parent: str, message: str, dates: Mapping[str, str] | None = None) -> str:
    """Make a commit of a tree and return its id. Where git knows no author, autoresearch is the author.

    dates: git's variables for the dates of author and committer; now if left out
    """
    identity = []
    if not (git_output("config", "user.email") and git_output("config", "user.name")):
        identity = ["-c", "user.name=autoresearch", "-c", "user.email=autoresearch@localhost"]
    command = (*identity, "commit-tree", tree, "-p", parent, "-m", message)
    return os.fsdecode(git_bytes(*command, environment=dates)).strip("\n")


def merge(ours: bytes, base: bytes, theirs: bytes) -> bytes | None:
    """Return a text with two changes of its base, None where they conflict."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / name for name in ("ours", "base", "theirs")]
        for path, text in zip(paths, (ours, base, theirs), strict=True):
            path.write_bytes(text)
        command = ["git", "merge-file", "-p", "-q", *map(str, paths)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    return done.stdout if done.returncode == 0 else None


def reword(commit: str, message: str) -> str:
    """Return a commit that is as this one, with another message. The same call makes the same commit."""
    tree, parent, author, committer = git_checked("show", "-s", "--format=%T %P %at %ct", commit).split()
    dates = {"GIT_AUTHOR_DATE": f"@{author} +0000", "GIT_COMMITTER_DATE": f"@{committer} +0000"}
    return commit_tree(tree, parent, message, dates)


def advance_branch(commit: str, base: str, trainer: str) -> None:
    """Move the branch from base to the commit. The index follows for the trainer alone."""
    if head() != commit:
        git_checked("update-ref", "-m", "autoresearch: keep", "HEAD", commit, base)
    git_checked("reset", "-q", "HEAD", "--", trainer)


def revert(trainer: str) -> None:
    """Make the trainer what it is in the last commit, in index and working tree."""
    git_checked("checkout", "-q", "HEAD", "--", trainer)


class Stashed(NamedTuple):
    """An edit that was reverted, and is still reachable."""

    commit: str
    ref: str


def stash_edit(trainer: str, name: str, message: str) -> Stashed:
    """Revert the trainer's edit and keep it as save_ref does."""
    commit = commit_alone(trainer, message)
    ref = save_ref(name, commit)
    revert(trainer)
    return Stashed(commit, ref)


def set_ref(name: str, commit: str) -> None:
    """Let REFS/<name> name a commit, whatever it named before."""
    git_checked("update-ref", f"{REFS}/{name}", commit)


def save_ref(name: str, commit: str) -> str:
    """Keep a commit reachable as REFS/<name>, or REFS/<name>-2 when another commit has that name, and so on.

    Returns the ref.
    """
    ref = f"{REFS}/{name}"
    number = 1
    while git_output("rev-parse", "--verify", "-q", ref) not in ("", commit):
        number += 1
        ref = f"{REFS}/{name}-{number}"
    git_checked("update-ref", ref, commit)
    return ref


# ---------------------------------------------------------------------------
# The working tree: before an agent's turn and after it
# ---------------------------------------------------------------------------


def snapshot() -> str:
    """Return the working tree as a tree object. The repository's index stays.

    It holds the tracked files, and the untracked ones that are neither ignored nor large.
    """
    with scratch_index() as index:
        git_checked("add", "-u", "--", ".", index=index)
        untracked = git_paths("ls-files", "-o", "--exclude-standard", "-z", index=index)
        small = [path for path in untracked if is_small_file(path)]
        for first in range(0, len(small), PATHS_A_CALL):
            git_checked("update-index", "--add", "--", *small[first : first + PATHS_A_CALL], index=index)
        return git_checked("write-tree", index=index)


def is_small_file(path: str) -> bool:
    """Return whether an untracked entry goes into a snapshot: not a repository of its own, and not large."""
    return not path.endswith("/") and (ROOT / path).lstat().st_size <= LARGE_FILE


def differing_paths(before: str, after: str) -> list[str]:
    """Return the paths below ROOT at which two trees differ. Submodules are left alone."""
    how = ("-r", "-z", "--no-renames", "--name-only", "--relative", "--ignore-submodules")
    return git_paths("diff-tree", *how, before, after)


def restore_paths(paths: Iterable[str], tree: str) -> None:
    """Make the paths in the working tree what they are in the tree. Those that it lacks are removed.

    A file may have become a folder, a folder a file or a link. All that the tree lacks goes first, so that
    nothing is written through a link.
    """
    modes = {path: mode_of(tree, path) for path in paths}
    for path, mode in modes.items():
        if not mode:
            remove_added(ROOT / path)
    for path, mode in modes.items():
        if mode:
            write_path(ROOT / path, content(tree, path), mode)


def remove_added(target: Path) -> None:
    """Remove a file or link from the working tree, and the folders above it that are empty then."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    for folder in target.parents:
        if folder == ROOT:
            break
        with suppress(OSError):  # it holds something else, or is gone
            folder.rmdir()


def write_path(target: Path, data: bytes, mode: str) -> None:
    """Write a file or link of the working tree. What is in its way is removed. mode: as git has it."""
    for path in reversed(target.relative_to(ROOT).parents):  # the uppermost first: it may be a link
        folder = ROOT / path
        if folder != ROOT and (folder.is_symlink() or folder.is_file()):
            folder.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    if mode == SYMLINK_MODE:
        target.unlink(missing_ok=True)
        target.symlink_to(os.fsdecode(data))
        return
    scratch = target.with_name(target.name + ".autoresearch-tmp")
    scratch.write_bytes(data)
    scratch.chmod(0o755 if mode == EXECUTABLE_MODE else 0o644)
    os.replace(scratch, target)


def move_branch_back(branch_before: str, head_before: str) -> None:
    """Make HEAD name the branch and the commit that it named before.

    The index follows, the working tree stays. branch_before: "" when HEAD was detached.
    """
    if branch_before:
        git_checked("symbolic-ref", "HEAD", branch_before)
        git_checked("update-ref", "HEAD", head_before)
    else:
        git_checked("update-ref", "--no-deref", "HEAD", head_before)
    git_checked("reset", "-q")
