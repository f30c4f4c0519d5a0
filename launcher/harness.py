"""The harness, all that no experiment changes: its content hash, and whether it is the committed one."""

import ast
import hashlib
import subprocess
from pathlib import Path

from prepare import ROOT, config_path

# What a run imports or reads, beside the trainer: its content hash goes into the row.
FOLDERS = ("backends", "launcher")
FILES = ("prepare.py", "train_cuda_kernels.py")
# What no trial may change, as git names paths: all code and configuration but the trainer.
PROTECTED = ("*.py", "*.yaml", "backends", "launcher", "night", "pyproject.toml", "uv.lock")


def harness_files() -> list[Path]:
    """Return the files that make up the harness, sorted by path."""
    code = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
    return sorted([*(ROOT / name for name in FILES), config_path(), *code])


def harness_hash() -> str:
    """Return the content hash of the harness, as the ledger writes it."""
    digest = hashlib.sha256()
    for path in harness_files():
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


def git_output(*arguments: str) -> str:
    """Return what a git command in the repository prints, "" when it fails (no git, no repository)."""
    # No optional locks: a status that is killed while it refreshes the index would leave one.
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
