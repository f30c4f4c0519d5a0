"""The agent's own folder."""

import os
import subprocess
import sys

import pytest

from launcher.harness import git_output
from launcher.runs import run_dir
from launcher.show import restore_trainer
from night import repo
from night.notes import notes_path
from night.repo import git_checked
from night.workspace import make_workspace, workspace_path
from prepare import UserError


def git_there(workspace, *arguments, **more):
    return subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        cwd=workspace.folder,
        env={**workspace.environment(), **more},
        capture_output=True,
        text=True,
    )


def test_an_agent_has_the_files_of_the_commit_in_a_repository_of_its_own(repository):
    (repository / "README.md").write_text("unsaved\n")
    workspace = make_workspace(repo.head(), "")
    assert workspace.folder == workspace.top / "inner"
    assert (workspace.folder / "README.md").read_text() == "read me\n"
    assert git_there(workspace, "status", "--porcelain").stdout == ""
    assert git_there(workspace, "log", "--format=%s").stdout == "start\n"
    assert git_there(workspace, "remote").stdout == "" and git_there(workspace, "fsck").returncode == 0
    assert git_there(workspace, "branch", "--show-current").stdout == "autoresearch\n"


def test_it_is_at_the_same_place_and_as_new_in_every_turn(repository):
    first = make_workspace(repo.head(), "")
    (first.folder / "README.md").unlink()
    (first.folder / "closed").mkdir()
    (first.folder / "closed" / "file").touch()
    (first.folder / "closed").chmod(0)
    os.mkfifo(first.folder / "pipe")
    (first.folder / "elsewhere").symlink_to("/usr")
    (first.top / ".git" / "index.lock").touch()
    assert make_workspace(repo.head(), "") == first
    assert git_there(first, "status", "--porcelain", "--ignored").stdout == ""
    assert not (first.folder / "pipe").exists()


def test_it_can_be_any_commit(repository):
    edited = repo.commit_alone("train_cuda.py", "an edit", b"SCORE = 1.0\n")
    workspace = make_workspace(edited, "")
    assert workspace.read_trainer("train_cuda.py") == b"SCORE = 1.0\n"
    assert git_there(workspace, "log", "-1", "--format=%s").stdout == "an edit\n"


def test_a_shallow_repository_has_a_folder_too(repository, monkeypatch, tmp_path_factory):
    git_checked("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "second")
    shallow = tmp_path_factory.mktemp("shallow") / "clone"
    git_checked("clone", "-q", "--depth", "1", f"file://{repository.parent}", str(shallow))
    monkeypatch.setattr("night.repo.ROOT", shallow / "inner")
    monkeypatch.setattr("launcher.harness.ROOT", shallow / "inner")
    workspace = make_workspace(repo.head(), "")
    assert git_there(workspace, "log", "--format=%s").stdout == "second\n"


def test_what_an_agent_does_in_git_stays_there(repository):
    workspace = make_workspace(repo.head(), "")
    before = sorted(path for path in (repository.parent / ".git").rglob("*"))
    (workspace.folder / "README.md").write_text("mine\n")
    for command in (
        "add -A",
        "commit -qm mine",
        "checkout -q -b agents",
        "branch -D autoresearch",
        "tag v1",
        "config core.bare true",
        "config core.bare false",
        "gc -q --prune=now",
        "stash",
        "reset -q --hard HEAD~1",
    ):
        done = git_there(workspace, *command.split())
        assert done.returncode == 0, (command, done.stderr)
    assert sorted(path for path in (repository.parent / ".git").rglob("*")) == before
    assert git_output("status", "--porcelain") == "" and git_output("fsck") == ""


def test_without_its_repository_git_finds_no_other(repository):
    git_checked("init", "-q", str(workspace_path().parent.parent))  # the cache may lie in one
    workspace = make_workspace(repo.head(), "")
    subprocess.run(["rm", "-rf", str(workspace.top / ".git")], check=True)
    done = git_there(workspace, "rev-parse", "--show-toplevel")
    assert done.returncode != 0 and "not a git repository" in done.stderr


def test_runs_that_the_prompt_names_can_be_read(repository):
    run_id = "20260101-000000-abcd"
    run = run_dir(run_id)
    run.path.mkdir(parents=True)
    run.log.write_bytes(b"x" * 2**19 + b"the end\n")
    run.record.write_text('{"trainer": "train_cuda.py"}')
    (run.path / "train_cuda.py").write_text("SCORE = 9\n")
    workspace = make_workspace(repo.head(), f"near misses: {run_id}, and 20260101-000000-9999")
    there = workspace.folder / "runs" / run_id
    assert (there / "train_cuda.py").read_text() == "SCORE = 9\n"
    assert (there / "train.log").read_bytes().endswith(b"xthe end\n")
    assert (there / "train.log").stat().st_size == 2**18
    assert os.listdir(workspace.folder / "runs") == [run_id]


def test_notes_come_and_go(repository):
    notes_path().parent.mkdir(parents=True)
    notes_path().write_text("width helps\n")
    workspace = make_workspace(repo.head(), "")
    notes = workspace.folder / "runs" / "notes.md"
    assert notes.read_text() == "width helps\n"
    notes.write_text("width hurts\n")
    workspace.save_notes()
    assert notes_path().read_text() == "width hurts\n"
    notes.unlink()
    workspace.save_notes()
    notes.symlink_to(repository / "prepare.py")
    workspace.save_notes()
    assert notes_path().read_text() == "width hurts\n"


@pytest.mark.parametrize("left", ["nothing", "a folder", "a pipe", "a link", "a device", "too much"])
def test_only_a_plain_trainer_is_read(repository, left):
    workspace = make_workspace(repo.head(), "")
    trainer = workspace.folder / "train_cuda.py"
    trainer.unlink()
    if left == "a folder":
        trainer.mkdir()
    elif left == "a pipe":
        os.mkfifo(trainer)
    elif left == "a link":
        trainer.symlink_to("train_mlx.py")
    elif left == "a device":
        trainer.symlink_to("/dev/zero")
    elif left == "too much":
        trainer.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(UserError):
        workspace.read_trainer("train_cuda.py")


def test_our_commands_are_found_there_and_restore_writes_there(repository, monkeypatch):
    workspace = make_workspace(repo.head(), "")
    there = workspace.environment()
    assert there["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)
    run_id = "20260101-000000-abcd"
    run = run_dir(run_id)
    run.path.mkdir(parents=True)
    run.record.write_text('{"trainer": "train_cuda.py"}')
    (run.path / "train_cuda.py").write_text("SCORE = 9\n")
    from conftest import row

    from launcher.runs import ledger

    ledger().append(row(run=run_id, platform="cpu"))
    monkeypatch.setenv("AUTORESEARCH_LOOP", there["AUTORESEARCH_LOOP"])
    restore_trainer(run_id, force=False)
    assert workspace.read_trainer("train_cuda.py") == b"SCORE = 9\n"
    assert (repository / "train_cuda.py").read_text() == "SCORE = 1.5\n"
