"""
The repository around the experiments: what changed, one file committed alone, edits put back.

Git's plumbing is called wherever it exists: no hook runs, no editor opens, and what a person has staged or
left uncommitted elsewhere stays as it is.
"""

import hashlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

from prepare import ROOT, UserError, config_path

REFS = "refs/autoresearch"  # REFS/<run id>: a trial that was taken back; REFS/stray/<time>: what an agent left elsewhere
LOCKED_SECONDS = 10.0       # how long another git command may hold the index
LARGE_FILE = 2**24          # bytes; an untracked file above this is somebody's data, and is not copied into the repository
# What a run imports or reads: a trial changes none of it but the trainer. Everything else may be edited at any time.
RUN_ON = ("*.py", "*.yaml", "backends", "launcher", "pyproject.toml", "uv.lock")


# ---------------------------------------------------------------------------
# The harness
# ---------------------------------------------------------------------------

def harness_files():
    return sorted([ROOT / "prepare.py", config_path(), *(ROOT / "backends").glob("*.py"), *(ROOT / "launcher").glob("*.py")])


def harness_hash():
    """Content hash of everything that an experiment must leave alone."""
    digest = hashlib.sha256()
    for path in harness_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def harness_modified():
    """The harness differs from the repository's last commit."""
    paths = ["prepare.py", "platforms.yaml", "backends", "launcher"]
    return bool(git("rev-parse", "--git-dir")) and bool(git("status", "--porcelain", "--", *paths))


def digest(source):
    """Of a trainer's bytes, as the ledger writes it."""
    return hashlib.sha256(source).hexdigest()[:12]


def source_hash(path):
    return digest(Path(path).read_bytes())


# ---------------------------------------------------------------------------
# Git
# ---------------------------------------------------------------------------

def git(*arguments):
    """Output of a git command in the repository, "" when it fails (no git, no repository)."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def change(*arguments, **environment):
    """A git command that must succeed. Waits while another one holds the index. Raises UserError."""
    deadline = time.monotonic() + LOCKED_SECONDS
    while True:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL,
                              env={**os.environ, **environment})
        if done.returncode == 0:
            return done.stdout.strip("\n")
        if ".lock" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    says = (done.stderr.strip() or "no message").splitlines()
    raise UserError(f"git {arguments[0]} failed: {says[0]}" + (": is another git command running? If not, remove that file" if ".lock" in says[0] else ""))


def require_repository():
    """Raises UserError unless trials can be committed here."""
    if not git("rev-parse", "--git-dir"):
        raise UserError(f"{ROOT} is not a git repository (or git is missing): git init, and commit; `autoresearch run` needs none")
    if not head():
        raise UserError("the repository has no commit yet: git add -A && git commit -m start")
    for name, what in (("MERGE_HEAD", "merge"), ("rebase-merge", "rebase"), ("rebase-apply", "rebase"), ("CHERRY_PICK_HEAD", "cherry-pick")):
        if git_path(name).exists():
            raise UserError(f"a {what} is under way: finish it or git {what} --abort")


def git_path(name):
    return ROOT / git("rev-parse", "--git-path", name)


def head():
    return git("rev-parse", "--verify", "HEAD")


def branch():
    """The branch that HEAD names, "" when it is detached."""
    return git("symbolic-ref", "-q", "HEAD")


def changed_beside(trainer):
    """Files that a run imports or reads and that differ from the last commit, the trainer left out."""
    lines = change("status", "--porcelain", "--no-renames", "-z", "--", *(f":(glob){p}" if "*" in p else p for p in RUN_ON)).split("\0")
    prefix = git("rev-parse", "--show-prefix")
    return sorted({line[3:].removeprefix(prefix) for line in lines if line} - {trainer})


def blob(trainer):
    """The object id of the trainer as it lies in the working tree, stored in the repository."""
    return change("hash-object", "-w", "--", str(ROOT / trainer))


def committed_blob(trainer, commit="HEAD"):
    return git("rev-parse", "--verify", "-q", f"{commit}:./{trainer}")


def edited(trainer):
    """The trainer differs from the last commit."""
    return blob(trainer) != committed_blob(trainer)


def commit_alone(trainer, message):
    """A commit on top of HEAD in which only the trainer differs; HEAD, index and working tree stay. Returns its id."""
    mode = mode_of("HEAD", trainer) or "100644"
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": f"{scratch}/index"}
        change("read-tree", "HEAD", **index)
        change("update-index", "--add", "--cacheinfo", f"{mode},{blob(trainer)},{git('rev-parse', '--show-prefix')}{trainer}", **index)
        tree = change("write-tree", **index)
    return commit_tree(tree, head(), message)


def content(tree, path):
    """The bytes of a file of a commit or tree, as a checkout would write them."""
    return subprocess.run(["git", "-C", str(ROOT), "cat-file", "--filters", f"{tree}:./{path}"], capture_output=True, check=True).stdout


def mode_of(tree, path):
    """The mode of a file of a commit or tree, "" where there is none."""
    return change("ls-tree", tree, "--", path).partition(" ")[0]


def commit_tree(tree, parent, message):
    known = git("config", "user.email") and git("config", "user.name")
    identity = [] if known else ["-c", "user.name=autoresearch", "-c", "user.email=autoresearch@localhost"]
    return change(*identity, "commit-tree", tree, "-p", parent, "-m", message)


def advance(commit, base, trainer):
    """Move the branch from base to the commit; the index follows for the trainer alone."""
    if head() != commit:
        change("update-ref", "-m", "autoresearch: keep", "HEAD", commit, base)
    change("reset", "-q", "HEAD", "--", trainer)


def put_back(trainer):
    """The trainer as in the last commit, in index and working tree."""
    change("checkout", "-q", "HEAD", "--", trainer)


def remember(name, commit):
    """Keep a commit reachable as refs/autoresearch/<name>."""
    change("update-ref", f"{REFS}/{name}", commit)


def snapshot():
    """The working tree as a tree object: tracked files, and untracked ones that are neither ignored nor large. The index stays."""
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": f"{scratch}/index"}
        change("read-tree", "HEAD", **index)
        change("add", "-u", "--", ".", **index)
        untracked = change("ls-files", "-o", "--exclude-standard", "-z").split("\0")
        small = [p for p in untracked if p and not p.endswith("/") and (ROOT / p).lstat().st_size <= LARGE_FILE]
        for i in range(0, len(small), 500):
            change("update-index", "--add", "--", *small[i : i + 500], **index)
        return change("write-tree", **index)


def differing(before, after):
    """Paths below the repository's root folder at which two trees differ."""
    return [p for p in change("diff-tree", "-r", "-z", "--no-renames", "--name-only", "--relative", before, after).split("\0") if p]


def bring_back(paths, tree):
    """The paths in the working tree as they are in the tree; those that it lacks are removed."""
    for path in paths:
        target = ROOT / path
        mode = mode_of(tree, path)
        if not mode:
            target.unlink(missing_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        data = content(tree, path)
        if mode == "120000":
            target.unlink(missing_ok=True)
            target.symlink_to(os.fsdecode(data))
            continue
        scratch = target.with_name(target.name + ".autoresearch-tmp")
        scratch.write_bytes(data)
        scratch.chmod(0o755 if mode == "100755" else 0o644)
        os.replace(scratch, target)
