"""The harness, all that no experiment changes: its content hash, and whether it is the committed one."""

import ast
import hashlib
import os
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

from prepare import ROOT, UserError, config_path

# What a run imports or reads, beside the trainer: its content hash goes into the row. Not launcher/report/.
FOLDERS = ("backends", "launcher")
FILES = ("prepare.py", "train_cuda_kernels.py")
# What no trial may change, as git names paths: all code and configuration but the trainer.
PROTECTED = ("*.py", "*.yaml", "backends", "launcher", "night", "pyproject.toml", "uv.lock")

LARGEST_TRAINER = 2**20  # bytes; source text needs a tenth of it
# What a git hook or an alias leaves in the environment: with it, git would work on another repository.
GIT_LOCAL = (
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_DIR",
    "GIT_GRAFT_FILE",
    "GIT_INDEX_FILE",
    "GIT_NAMESPACE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
)


def harness_files() -> list[Path]:
    """Return the files that make up the harness, sorted by path."""
    code = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
    return sorted([*(ROOT / name for name in FILES), config_path(), *code])


def harness_hash() -> str:
    """Return the content hash of the harness, as the ledger writes it."""
    return hash_of_files(harness_files())


def hash_of_files(paths: Iterable[Path]) -> str:
    """Return the content hash of files, their names included."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def harness_modified() -> bool:
    """Return whether the harness differs from the repository's last commit."""
    return bool(git_output("status", "--porcelain", "--", *FOLDERS, *FILES, "platforms.yaml"))


def source_hash(source: bytes) -> str:
    """Return the content hash of a trainer, as the ledger writes it."""
    return hashlib.sha256(source).hexdigest()[:12]


def removes_code(old: bytes, new: bytes) -> bool:
    """Return whether Python source became shorter: it has fewer statements, and fewer parts in all."""
    try:
        before, after = (list(ast.walk(ast.parse(source))) for source in (old, new))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    statements_before, statements_after = (
        sum(isinstance(node, ast.stmt) for node in nodes) for nodes in (before, after)
    )
    return statements_after < statements_before and len(after) < len(before)


def read_trainer(path: Path, follow: bool = True) -> bytes:
    """Return a trainer's source.

    Whatever lies there, this ends: a pipe or a device is not waited for.

    follow: a link is followed

    Raises:
        UserError: there is none, it is no plain file, or it is too large to be source text.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise UserError(f"there is no trainer {path} ({error.strerror})", 2) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path} is no plain file", 2)
        with open(descriptor, "rb", closefd=False) as f:
            source = f.read(LARGEST_TRAINER + 1)
    finally:
        os.close(descriptor)
    if len(source) > LARGEST_TRAINER:
        raise UserError(f"{path} is larger than {LARGEST_TRAINER:,} bytes: that is no source text", 2)
    return source


def without_git_variables() -> dict[str, str]:
    """Return this process's environment without what names a git repository."""
    return {name: value for name, value in os.environ.items() if name not in GIT_LOCAL}


def git_environment() -> dict[str, str]:
    """Return the environment for git: it finds its repository by the folder, speaks English, runs no hook.

    Each change of a ref calls a hook, however it is made: one that fails would end the night.
    """
    no_hooks = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.hooksPath",
        "GIT_CONFIG_VALUE_0": os.devnull,
    }
    return {**without_git_variables(), **no_hooks, "LC_ALL": "C.UTF-8"}


def git_output(*arguments: str) -> str:
    """Return what a git command in the repository prints, "" when it fails (no git, no repository)."""
    # No optional locks: a status that is killed while it refreshes the index would leave one. Its own
    # session: a Ctrl-C is not for it.
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            errors="replace",
            env=git_environment(),
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
