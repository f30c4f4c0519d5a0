"""Git around the experiments, in a real repository."""

import os
import shutil
import signal
import threading

import pytest

from launcher.harness import git_output
from launcher.setting import resolve
from night import repo, trial
from night.repo import git_checked
from prepare import UserError


def status():
    return git_checked("status", "--porcelain", "-z")


def test_what_protects_a_run_covers_all_that_it_reads(repository):
    named = ["prepare.py", "platforms.yaml", "uv.lock", "pyproject.toml"]
    inside = ["backends/deep/er.py", "launcher/run.py", "night/loop.py"]
    for name in (*named, *inside, "tests/test_x.py", "notes.txt", "docs/page.md"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("changed\n")
    git_checked("rm", "-q", "train_mlx.py")
    (repository / "train_cuda.py").write_text("SCORE = 1.0\n")
    assert repo.changed_besides("train_cuda.py") == sorted([*named, *inside, "train_mlx.py"])


def test_where_nothing_can_be_committed(repository, monkeypatch, tmp_path):
    repo.git_path("MERGE_HEAD").write_text(repo.head() + "\n")
    with pytest.raises(UserError, match="a merge is under way"):
        trial.try_edit(trial.Request(resolve()))
    for module in ("launcher.harness", "night.repo"):
        monkeypatch.setattr(f"{module}.ROOT", tmp_path)
    with pytest.raises(UserError, match="not a git repository"):
        trial.try_edit(trial.Request(resolve()))
    git_checked("init", "-q")
    with pytest.raises(UserError, match="has no commit yet"):
        repo.require_repository()


def test_a_failing_command_is_one_line_that_names_it(repository):
    with pytest.raises(UserError, match="^git rev-parse failed: fatal: Needed a single revision$"):
        git_checked("rev-parse", "--verify", "nothing")


def test_what_git_says_need_not_be_utf8(repository):
    with pytest.raises(UserError, match="git cat-file failed: "):
        git_checked("cat-file", "-e", os.fsdecode(b"HEAD:\xff"))


def test_a_stashed_edit_is_reachable_and_out_of_the_way(repository):
    (repository / "train_cuda.py").write_text("SCORE = 1.0\n")
    stashed = repo.stash_edit("train_cuda.py", "stray/x", "an edit")
    assert status() == "" and stashed.ref == "refs/autoresearch/stray/x"
    assert git_output("rev-parse", stashed.ref) == stashed.commit
    assert repo.content(stashed.commit, "train_cuda.py") == b"SCORE = 1.0\n"


def test_a_ref_is_never_overwritten(repository):
    first = repo.head()
    other = repo.commit_tree(repo.snapshot(), first, "another")
    assert repo.save_ref("x", first) == repo.save_ref("x", first) == "refs/autoresearch/x"
    assert repo.save_ref("x", other) == repo.save_ref("x", other) == "refs/autoresearch/x-2"
    assert git_output("rev-parse", "refs/autoresearch/x") == first


def test_a_snapshot_brings_everything_back(repository):
    """Content, modes, links, deleted files, file names in any encoding; and what was staged stays staged."""
    script = repository / "script.sh"
    script.write_text("echo\n")
    script.chmod(0o755)
    (repository / "link").symlink_to("README.md")
    odd = os.fsencode(repository) + b"/od\xff d\n"
    with open(odd, "wb") as f:
        f.write(b"\xfe")
    (repository / "README.md").write_text("staged\n")
    git_checked("add", "README.md")
    before = status()
    tree = repo.snapshot()
    assert status() == before

    script.write_text("rm\n")
    script.chmod(0o644)
    (repository / "link").unlink()
    (repository / "link").symlink_to("prepare.py")
    os.unlink(odd)
    (repository / "new.txt").write_text("new\n")
    (repository / "train_mlx.py").unlink()
    (repository / "README.md").write_text("else\n")
    differing = repo.differing_paths(tree, repo.snapshot())
    assert len(differing) == 6 and "train_mlx.py" in differing
    repo.restore_paths(differing, tree)

    assert script.read_text() == "echo\n" and os.access(script, os.X_OK)
    assert os.readlink(repository / "link") == "README.md"
    with open(odd, "rb") as f:
        assert f.read() == b"\xfe"
    assert status() == before and not (repository / "new.txt").exists()


def file_to_folder(root):
    (root / "README.md").unlink()
    (root / "README.md" / "deep").mkdir(parents=True)
    (root / "README.md" / "deep" / "new.txt").write_text("new\n")


def file_to_folder_of_ignored_files(root):
    (root / "README.md").unlink()
    (root / "README.md").mkdir()
    (root / "README.md" / "x.ignored").write_text("new\n")


def folder_to_file(root):
    shutil.rmtree(root / "backends")
    (root / "backends").write_text("a file\n")


def folder_to_link(root):
    (root / "backends").rename(root.parent / "elsewhere")
    (root / "backends").symlink_to("../elsewhere")
    (root.parent / "elsewhere" / "cuda.py").write_text("outside\n")


def folder_to_ignored_link(root):
    shutil.rmtree(root / "deep")
    repo.git_path("info/exclude").write_text("deep\n")
    (root.parent / "elsewhere").mkdir()
    (root.parent / "elsewhere" / "er").write_text("outside\n")
    (root / "deep").symlink_to("../elsewhere")


def link_to_folder(root):
    (root / "link").unlink()
    (root / "link").mkdir()
    (root / "link" / "new.txt").write_text("new\n")


def link_to_file(root):
    (root / "link").unlink()
    (root / "link").write_text("new\n")


def new_folders(root):
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "new.txt").write_text("new\n")


@pytest.mark.parametrize(
    "swap",
    [
        file_to_folder,
        file_to_folder_of_ignored_files,
        folder_to_file,
        folder_to_link,
        folder_to_ignored_link,
        link_to_folder,
        link_to_file,
        new_folders,
    ],
)
def test_files_folders_and_links_that_took_each_others_place_come_back(repository, swap):
    repo.git_path("info/exclude").write_text("*.ignored\n")
    (repository / "link").symlink_to("backends")
    (repository / "deep" / "er").mkdir(parents=True)
    (repository / "deep" / "er" / "page.md").write_text("a page\n")
    git_checked("add", "deep")
    git_checked("-c", "user.name=me", "-c", "user.email=me@here", "commit", "-qm", "a page")
    tree = repo.snapshot()
    swap(repository)
    repo.restore_paths(repo.differing_paths(tree, repo.snapshot()), tree)
    assert repo.snapshot() == tree and not (repository / "a").exists()
    assert (repository / "README.md").read_text() == "read me\n"
    assert (repository / "deep" / "er" / "page.md").read_text() == "a page\n"
    assert (repository / "backends" / "cuda.py").read_text() == "\n" and os.readlink(repository / "link")
    assert not (repository / "backends").is_symlink() and not (repository / "deep").is_symlink()
    elsewhere = repository.parent / "elsewhere"
    outside = [path.read_text() for path in elsewhere.glob("*")]
    assert outside == (["outside\n"] if elsewhere.exists() else [])  # nothing was done through a link


def test_submodules_are_left_alone(repository):
    git_checked("update-index", "--add", "--cacheinfo", f"160000,{repo.head()},inner/module")
    with_module = git_checked("write-tree")
    git_checked("update-index", "--cacheinfo", f"160000,{'1' * 40},inner/module")
    assert repo.differing_paths(with_module, git_checked("write-tree")) == []


def test_large_files_and_repositories_within_are_not_copied(repository, monkeypatch):
    monkeypatch.setattr(repo, "LARGE_FILE", 100)
    tree = repo.snapshot()
    (repository / "weights.bin").write_bytes(bytes(101))
    git_checked("init", "-q", "vendored")
    (repository / "vendored" / "file").write_text("x")
    assert repo.snapshot() == tree


def test_messages_name_a_few_paths():
    assert repo.list_paths(["a", "b"]) == "a, b"
    assert repo.list_paths([os.fsdecode(b"\xff"), *"bcdef"]) == "?, b, c, d, e and more"


def test_a_signal_waits_until_git_has_ended(repository):
    """Killed in the middle, git leaves a lock, and every later command fails."""
    marker = repository / "ended"
    alarm = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        git_checked("-c", f"alias.slow=!sleep 1; touch '{marker}'", "slow")
    assert marker.exists()


def test_a_signal_that_is_ignored_stays_ignored(repository):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        git_checked("-c", f"alias.hang-up=!kill -HUP {os.getpid()}", "hang-up")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
