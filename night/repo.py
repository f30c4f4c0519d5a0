"""
Git around the experiments: what changed, one file committed alone, edits reverted or stashed under a ref.

Git's plumbing is called wherever it exists: no hook runs, no editor opens, and what a person has staged or
left uncommitted elsewhere stays as it is. A file is named by its path below ROOT.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from launcher.console import say
from launcher.harness import PROTECTED, git_environment, git_output, read_trainer, source_hash
from launcher.processes import defer_signals
from launcher.runs import scratch_folder
from prepare import ROOT, UserError

# REFS/<run>: a trial that was reverted, or an edit that was stashed before a run of it counted.
# REFS/stash/<time>: an edit that no run was made of.
# REFS/untried-<commit>: an edit that waits for its run.
REFS = "refs/autoresearch"
LOCKED_SECONDS = 10.0  # that another git command may hold a lock
LOCK_POLL_SECONDS = 0.2
LOCK = re.compile(rb"'([^'\n]+\.lock)'")  # in what git says when it cannot lock
NAMED_PATHS = 5  # that a message lists
UNFINISHED = {
    "MERGE_HEAD": "merge",
    "rebase-merge": "rebase",
    "rebase-apply": "rebase",
    "CHERRY_PICK_HEAD": "cherry-pick",
}
FILE_MODE = "100644"
FOLDER_MODE = "040000"


# ---------------------------------------------------------------------------
# Calling git
# ---------------------------------------------------------------------------


def git_bytes(
    *arguments: str,
    index: Path | None = None,
    given: bytes = b"",
    folder: Path | None = None,
) -> bytes:
    """Return what a git command prints. While another command holds a lock, wait for it.

    A lock that stays, and whose owner is gone, is removed.

    index: the index file to use in place of the repository's own
    given: its standard input
    folder: where it runs, ROOT if left out

    Raises:
        UserError: the command failed.
    """
    variables = git_environment()
    if index:
        variables["GIT_INDEX_FILE"] = str(index)
    command = ["git", "-C", str(folder or ROOT), *arguments]
    deadline = time.monotonic() + LOCKED_SECONDS
    while True:
        done = run_whole(command, given, variables)
        if done.returncode == 0:
            return done.stdout
        lock = find_lock(done.stderr)
        if lock is None:
            break
        if time.monotonic() < deadline:
            time.sleep(LOCK_POLL_SECONDS)
        elif not remove_stale_lock(lock):
            break
    said = done.stderr.decode(errors="replace").strip() or "no message"
    message = f"git {arguments[0]} failed: {said.splitlines()[0]}"
    if ".lock" in message:
        message += ": is another git command running? If not, remove that file"
    raise UserError(message)


def run_whole(
    command: Sequence[str], given: bytes, variables: Mapping[str, str]
) -> subprocess.CompletedProcess[bytes]:
    """Run a git command to its end, whatever signal comes: one that is killed leaves a lock.

    Raises:
        UserError: there is no git, or it does not end.
    """
    try:
        with defer_signals():
            return subprocess.run(
                command, input=given, capture_output=True, env=variables, start_new_session=True
            )
    except OSError as error:
        raise UserError(f"git cannot be started: {error.strerror}") from None


def find_lock(said: bytes) -> Path | None:
    """Return the lock on which git says that it failed, None when it failed on something else."""
    found = LOCK.search(said)
    return Path(os.fsdecode(found[1])) if found else None


def remove_stale_lock(lock: Path) -> bool:
    """Remove a lock of git that is old and has no owner. Returns whether it is gone."""
    try:
        age = time.time() - lock.lstat().st_mtime
    except OSError:
        return True
    if age < LOCKED_SECONDS or git_is_at_work():
        return False
    lock.unlink(missing_ok=True)
    say(f"removed {lock}: a git command that was killed had left it")
    return True


def git_is_at_work() -> bool:
    """Return whether a git command, or something named like one, runs in this repository's folders."""
    top = os.path.realpath(git_output("rev-parse", "--show-toplevel") or ROOT)
    for process in psutil.process_iter():
        try:
            if process.name().startswith("git") and os.path.commonpath([process.cwd(), top]) == top:
                return True
        except (psutil.Error, OSError, ValueError):
            continue
    return False


def git_checked(*arguments: str, index: Path | None = None, folder: Path | None = None) -> str:
    """Return what git_bytes returns as text. Paths that are not UTF-8 come through whole."""
    return os.fsdecode(git_bytes(*arguments, index=index, folder=folder)).strip("\n")


def git_paths(*arguments: str, index: Path | None = None) -> list[str]:
    """Return the entries that a git command with -z prints."""
    return [entry for entry in git_checked(*arguments, index=index).split("\0") if entry]


@contextmanager
def scratch_index(tree: str) -> Iterator[Path]:
    """Yield an index of its own with the content of a tree: the repository's index stays."""
    with scratch_folder() as scratch:
        index = scratch / "index"
        git_checked("read-tree", tree, index=index)
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


def is_commit(commit: str) -> bool:
    """Return whether the repository has a commit of this id."""
    return bool(commit) and git_output("cat-file", "-t", commit) == "commit"


def parent(commit: str) -> str:
    """Return the id of the commit that a commit was made on."""
    return git_checked("rev-parse", "--verify", f"{commit}^")


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
    return blob_of(read_trainer(ROOT / trainer), trainer)


def lying_blob(trainer: str) -> str:
    """Return what blob returns, "" where no plain file lies there."""
    try:
        return blob(trainer)
    except UserError:
        return ""


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


def commit_alone(trainer: str, message: str, source: bytes | None = None, parent: str = "") -> str:
    """Make a commit in which only the trainer differs from its parent. HEAD, index and working tree stay.

    source: of the trainer; as it lies in the working tree if left out
    parent: a commit, the last one if left out

    Returns the commit's id. No branch points at it.
    """
    parent = parent or head()
    mode = mode_of(parent, trainer) or FILE_MODE
    held = blob(trainer) if source is None else blob_of(source, trainer)
    entry = f"{mode},{held},{path_prefix()}{trainer}"
    with scratch_index(parent) as index:
        git_checked("update-index", "--add", "--cacheinfo", entry, index=index)
        tree = git_checked("write-tree", index=index)
    return commit_tree(tree, parent, message)


def commit_tree(tree: str, parent: str, message: str) -> str:
    """Make a commit of a tree and return its id. Where git knows no author, autoresearch is the author."""
    identity = []
    if not (git_output("config", "user.email") and git_output("config", "user.name")):
        identity = ["-c", "user.name=autoresearch", "-c", "user.email=autoresearch@localhost"]
    return git_checked(*identity, "commit-tree", tree, "-p", parent, "-m", message)


def merge(ours: bytes, base: bytes, theirs: bytes, both: bool = False) -> bytes | None:
    """Return a text with two changes of its base, None where they conflict.

    both: where they conflict, take the lines of both
    """
    with scratch_folder() as scratch:
        paths = [scratch / name for name in ("ours", "base", "theirs")]
        for path, text in zip(paths, (ours, base, theirs), strict=True):
            path.write_bytes(text)
        options = ["-p", "-q", *(["--union"] if both else [])]
        done = run_whole(["git", "merge-file", *options, *map(str, paths)], b"", git_environment())
    return done.stdout if done.returncode == 0 else None


def advance_branch(commit: str, trainer: str) -> bool:
    """Move the branch from a commit's parent to it. Index and working tree follow for the trainer alone.

    Returns whether the working tree followed: see follow.

    Raises:
        UserError: the branch is elsewhere.
    """
    base = parent(commit)
    git_checked("update-ref", "-m", "autoresearch: keep", "HEAD", commit, base)
    return follow(trainer, {committed_blob(trainer, base), committed_blob(trainer, commit)})


def follow(trainer: str, blobs: Collection[str]) -> bool:
    """Make the trainer in index and working tree what it is in the last commit.

    Each of the two follows where it holds one of `blobs`: what a person staged or wrote meanwhile stays.

    Returns whether the working tree has the committed trainer now.
    """
    wanted = committed_blob(trainer)
    mode = mode_of("HEAD", trainer)
    target = (ROOT / trainer).resolve()
    lies = lying_blob(trainer)
    ours = {blob for blob in blobs if blob}
    if lies != wanted and lies in ours:
        # Beside it, as a rename does not cross file systems. A dot: it is no Python file of the repository's.
        scratch = target.with_name(f".{target.name}.autoresearch-tmp")
        scratch.write_bytes(content("HEAD", trainer))
        shutil.copymode(target, scratch)
        os.replace(scratch, target)
        lies = wanted
    staged = staged_blob(trainer)
    if staged != wanted and staged in ours:
        git_checked("update-index", "--cacheinfo", f"{mode},{wanted},{path_prefix()}{trainer}")
        git_output("update-index", "-q", "--refresh", "--", trainer)
    return lies == wanted


def staged_blob(trainer: str) -> str:
    """Return the object id of the trainer in the index, "" when it is not there."""
    entry = git_checked("ls-files", "-s", "--", trainer)  # mode, id, stage, and after a tab the path
    return entry.split()[1] if entry else ""


def set_ref(name: str, commit: str) -> None:
    """Let REFS/<name> name a commit, whatever it named before."""
    git_checked("update-ref", f"{REFS}/{name}", commit)


def remove_ref(name: str) -> None:
    """Let no REFS/<name> be there. Git keeps the commit for some weeks."""
    git_checked("update-ref", "-d", f"{REFS}/{name}")


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
