"""Git around the experiments, in a real repository."""

import os
import signal
import subprocess
import threading
import time

import pytest
from conftest import FILES

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


def test_what_follows_the_branch_is_what_is_not_the_persons_own(repository):
    trainer = repository / "train_cuda.py"
    edited = repo.commit_alone("train_cuda.py", "an edit", b"SCORE = 1.0\n")
    assert status() == "" and trainer.read_text() == "SCORE = 1.5\n"  # a commit alone touches neither
    assert repo.advance_branch(edited, "train_cuda.py")
    assert repo.head() == edited and status() == "" and trainer.read_text() == "SCORE = 1.0\n"

    trainer.write_text("SCORE = 7\n")
    git_checked("add", "train_cuda.py")
    trainer.write_text("SCORE = 8\n")
    (repository / "README.md").write_text("staged\n")
    git_checked("add", "README.md")
    staged = git_checked("ls-files", "-s")
    again = repo.commit_alone("train_cuda.py", "another", b"SCORE = 0.9\n")
    assert not repo.advance_branch(again, "train_cuda.py")
    assert repo.head() == again and git_checked("ls-files", "-s") == staged
    assert trainer.read_text() == "SCORE = 8\n"


@pytest.mark.parametrize("lies", ["nothing", "a folder", "a pipe"])
def test_a_branch_advances_whatever_lies_in_the_trainers_place(repository, lies):
    trainer = repository / "train_cuda.py"
    edited = repo.commit_alone("train_cuda.py", "an edit", b"SCORE = 1.0\n")
    trainer.unlink()
    if lies == "a folder":
        trainer.mkdir()
    elif lies == "a pipe":
        os.mkfifo(trainer)
    assert not repo.advance_branch(edited, "train_cuda.py")
    assert repo.head() == edited
    with pytest.raises(UserError, match="there is no trainer" if lies == "nothing" else "is no plain file"):
        repo.is_edited("train_cuda.py")


def test_the_trainer_keeps_its_permissions_when_it_follows(repository):
    trainer = repository / "train_cuda.py"
    trainer.chmod(0o600)
    edited = repo.commit_alone("train_cuda.py", "an edit", b"SCORE = 1.0\n")
    repo.advance_branch(edited, "train_cuda.py")
    assert trainer.stat().st_mode & 0o777 == 0o600 and sorted(os.listdir(repository)) == sorted(
        {name.partition("/")[0] for name in FILES} | {"program.md"}
    )


def test_a_ref_is_never_overwritten(repository):
    first = repo.head()
    other = repo.commit_alone("train_cuda.py", "another", b"SCORE = 1.0\n")
    assert repo.save_ref("x", first) == repo.save_ref("x", first) == "refs/autoresearch/x"
    assert repo.save_ref("x", other) == repo.save_ref("x", other) == "refs/autoresearch/x-2"
    assert git_output("rev-parse", "refs/autoresearch/x") == first


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


def test_an_old_lock_whose_owner_is_gone_is_removed(repository, monkeypatch, capsys):
    monkeypatch.setattr(repo, "LOCKED_SECONDS", 0.3)
    for name in ("index.lock", "HEAD.lock", "refs/heads/main.lock"):
        lock = repo.git_path(name).resolve()
        lock.touch()
        os.utime(lock, (time.time() - 60, time.time() - 60))
        edited = repo.commit_alone("train_cuda.py", name, f"NAME = {name!r}\n".encode())
        assert repo.advance_branch(edited, "train_cuda.py")
        assert repo.head() == edited and not lock.exists()
        assert f"removed {lock}: a git command that was killed had left it" in capsys.readouterr().err
    assert status() == ""


def test_a_lock_of_a_git_that_works_is_waited_for_and_named(repository, monkeypatch):
    monkeypatch.setattr(repo, "LOCKED_SECONDS", 0.3)
    monkeypatch.setattr(repo, "git_is_at_work", lambda: True)
    lock = repo.git_path("HEAD.lock")
    lock.touch()
    os.utime(lock, (time.time() - 60, time.time() - 60))
    edited = repo.commit_alone("train_cuda.py", "an edit", b"SCORE = 1.0\n")
    with pytest.raises(UserError, match="HEAD.lock.*remove that file"):
        repo.advance_branch(edited, "train_cuda.py")
    assert lock.exists()


def test_git_at_work_is_seen_by_its_folder(repository, tmp_path_factory):
    assert not repo.git_is_at_work()
    for folder, seen in ((repository, True), (tmp_path_factory.mktemp("elsewhere"), False)):
        command = ["git", "-c", "alias.wait=!sleep 60", "wait"]
        process = subprocess.Popen(command, cwd=folder, start_new_session=True)
        try:
            assert repo.git_is_at_work() == seen
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_no_hook_runs(repository):
    """Git calls one for each change of a ref."""
    called = repository / "called"
    for name in ("reference-transaction", "post-index-change", "post-checkout"):
        hook = repo.git_path("HEAD").parent / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\necho {name} >> '{called}'\nexit 1\n")
        hook.chmod(0o755)
    ref = repo.save_ref("r1", repo.head())
    (repository / "train_cuda.py").write_text("SCORE = 1.0\n")
    repo.advance_branch(repo.commit_alone("train_cuda.py", "an edit"), "train_cuda.py")
    assert git_output("rev-parse", ref, "HEAD~1").split() == 2 * [git_output("rev-parse", ref)]
    assert not called.exists()


def test_variables_of_a_hook_do_not_send_git_elsewhere(repository, monkeypatch, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    git_checked("init", "-q", str(other))
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / "index"))
    assert git_checked("log", "-1", "--format=%s") == git_output("log", "-1", "--format=%s") == "start"


def test_a_signal_that_is_ignored_stays_ignored(repository):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        git_checked("-c", f"alias.hang-up=!kill -HUP {os.getpid()}", "hang-up")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
