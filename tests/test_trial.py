"""`try` in a real repository: kept, taken back, refused, cut off anywhere. Only the training itself is made up."""

import os

import pytest
from conftest import calls, edit, supervise

from launcher import repo, trial
from launcher import run as runner
from launcher.child import Stopped
from launcher.ledger import Ledger
from launcher.run import Options
from prepare import UserError


def attempt(text, root, description="an idea"):
    edit(root, text)
    return trial.run_try(Options(description))


def files_of(commit):
    return repo.git("show", "--format=", "--name-only", commit).split()


def test_a_better_trainer_is_committed_alone_and_a_worse_one_is_taken_back(repository, capsys):
    assert trial.run_try(Options("baseline")) == 0  # nothing edited: nothing to commit
    start = repo.head()
    (repository / "README.md").write_text("staged\n")
    repo.change("add", "README.md")
    (repository / "README.md").write_text("and edited again\n")
    (repository / "notes.txt").write_text("mine\n")
    (repository / "program.md").write_text("my own\n")
    assert attempt("SCORE = 1.4\n", repository, "better") == 0
    kept = repo.head()
    assert repo.git("rev-parse", "HEAD~1") == start and repo.branch() == "refs/heads/main"
    assert files_of("HEAD") == ["inner/train_cuda.py"] and repo.git("log", "-1", "--format=%s") == "better"
    assert attempt("SCORE = 1.6\n", repository, "worse") == 3
    assert repo.head() == kept and (repository / "train_cuda.py").read_text() == "SCORE = 1.4\n"
    row = Ledger(runner.home() / "results.tsv").rows()[-1]
    assert repo.git("show", f"refs/autoresearch/{row.run}:inner/train_cuda.py") == "SCORE = 1.6"
    assert repo.git("rev-parse", f"refs/autoresearch/{row.run}").startswith(row.commit)
    assert attempt("CRASH\n", repository, "broken") == 1 and (repository / "train_cuda.py").read_text() == "SCORE = 1.4\n"
    # and nothing of the person's was touched
    assert (repository / "README.md").read_text() == "and edited again\n" and repo.git("show", ":inner/README.md") == "staged"
    assert set(repo.change("status", "--porcelain").split("\n")) == {"MM inner/README.md", " M inner/program.md", "?? inner/notes.txt"}
    assert "taken back (discard)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prepare.py", "train_mlx.py", "backends/new.py", "backends/cuda.py"])
def test_a_change_outside_the_trainer_is_refused_by_name(repository, name):
    (repository / name).write_text("changed = 1\n")
    edit(repository, "SCORE = 1.0\n")
    with pytest.raises(UserError, match=name) as caught:
        trial.run_try(Options("x"))
    assert caught.value.code == 2 and not calls and (repository / name).read_text() == "changed = 1\n"
    assert (repository / "train_cuda.py").read_text() == "SCORE = 1.0\n"


def test_identical_source_is_not_run_again(repository, capsys):
    trial.run_try(Options("baseline"))
    with pytest.raises(UserError, match="as in the last commit"):
        trial.run_try(Options("baseline"))
    assert attempt("SCORE = 1.7\n", repository) == 3 and len(calls) == 2
    assert attempt("SCORE = 1.7\n", repository) == 3 and len(calls) == 2
    assert "not run again" in capsys.readouterr().err and (repository / "train_cuda.py").read_text() == "SCORE = 1.5\n"
    assert attempt("CRASH\n", repository) == 1 and attempt("CRASH\n", repository) == 1 and len(calls) == 4  # never scored


def test_what_does_not_compile_is_not_run(repository):
    with pytest.raises(UserError, match="does not compile: line 1"):
        attempt("def broken(:\n", repository)
    assert not calls and not trial.journal().exists()


def test_without_a_verdict_the_edit_stays(repository, capsys):
    trial.run_try(Options("baseline"))
    assert attempt("SCORE = 1.0  # BUSY\n", repository) == 6
    assert "BUSY" in (repository / "train_cuda.py").read_text() and "no verdict" in capsys.readouterr().err
    assert attempt("SCORE = 1.0  # STOP\n", repository) == 130
    assert "STOP" in (repository / "train_cuda.py").read_text() and not trial.journal().exists()
    assert len(repo.git("for-each-ref", "refs/autoresearch/").splitlines()) == 2


def test_a_run_is_on_record_from_the_moment_it_is_announced(repository, monkeypatch):
    def say(message):
        if message.startswith("run "):
            raise Stopped("SIGTERM")
    monkeypatch.setattr(runner, "say", say)
    assert attempt("SCORE = 1.0\n", repository) == 130
    assert [row.reason for row in Ledger(runner.home() / "results.tsv").rows()] == ["interrupted"]


def test_what_somebody_does_during_the_run_is_left_alone(repository, monkeypatch, capsys):
    trial.run_try(Options("baseline"))

    def meanwhile(act):
        def run(*arguments):
            outcome = supervise(*arguments)
            act()
            return outcome
        monkeypatch.setattr(runner, "supervise", run)
    meanwhile(lambda: edit(repository, "SCORE = 1.1  # mine\n"))
    assert attempt("SCORE = 1.8\n", repository) == 3
    assert (repository / "train_cuda.py").read_text() == "SCORE = 1.1  # mine\n"
    assert calls[-1] == "SCORE = 1.8\n"
    meanwhile(lambda: repo.change("-c", "user.name=me", "-c", "user.email=me@here", "commit", "-q", "--allow-empty", "-m", "mine"))
    before = repo.head()
    assert attempt("SCORE = 1.2\n", repository) == 0
    assert repo.git("rev-parse", "HEAD~1") == before and repo.git("log", "-1", "--format=%s") == "mine"
    assert "the branch moved" in capsys.readouterr().err


def die_at(number, text, root):
    """Try in a process that is gone, without a word, before its `number`-th git command. Returns whether it came that far."""
    edit(root, text)
    child = os.fork()
    if child == 0:
        count, change = 0, repo.change

        def counted(*arguments, **environment):
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            return change(*arguments, **environment)
        repo.change = counted
        try:
            trial.run_try(Options("cut off"))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("text", ["SCORE = 1.4\n", "SCORE = 1.6\n", "CRASH\n"])
def test_cut_off_anywhere_the_next_command_repairs(repository, text, capsys):
    trial.run_try(Options("baseline"))
    start, number = repo.head(), 1
    (repository / "notes.txt").write_text("mine\n")
    while die_at(number, text, repository):
        with trial.the_repository():
            pass
        trainer, verdict = (repository / "train_cuda.py").read_text(), Ledger(runner.home() / "results.tsv").rows()[-1]
        judged = verdict.description == "cut off"
        kept = judged and verdict.status == "keep"
        assert repo.head() == start or (kept and files_of("HEAD") == ["inner/train_cuda.py"])
        assert trainer == ("SCORE = 1.5\n" if judged and not kept else text)
        assert repo.change("status", "--porcelain", "--", "train_cuda.py") == ("" if judged else " M inner/train_cuda.py")
        assert not trial.journal().exists() and (repository / "notes.txt").read_text() == "mine\n"
        if judged:  # begin again, with nothing on record
            (runner.home() / "results.tsv").unlink()
            repo.change("reset", "-q", "--hard", start)
            trial.run_try(Options("baseline"))
        number += 1
    assert number > 8


def test_killed_in_the_middle_of_training(repository, capsys):
    trial.run_try(Options("baseline"))
    start = repo.head()
    assert die_at(10**6, "DIE\n", repository)
    with trial.the_repository():
        pass
    said = capsys.readouterr().err
    assert "recorded as a crash" in said and "an earlier command was cut off while it tried «cut off»" in said
    row = Ledger(runner.home() / "results.tsv").rows()[-1]
    assert row.reason == "the launcher was killed during the run" and repo.git("rev-parse", f"refs/autoresearch/{row.run}")
    assert repo.head() == start and (repository / "train_cuda.py").read_text() == "DIE\n"


def test_where_nothing_can_be_committed(repository, monkeypatch, tmp_path):
    (repo.git_path("MERGE_HEAD")).write_text(repo.head() + "\n")
    with pytest.raises(UserError, match="a merge is under way"):
        trial.run_try(Options("x"))
    monkeypatch.setattr(repo, "ROOT", tmp_path)
    with pytest.raises(UserError, match="not a git repository"):
        trial.run_try(Options("x"))


def test_a_left_behind_index_lock_is_named(repository, monkeypatch):
    monkeypatch.setattr(repo, "LOCKED_SECONDS", 0.3)
    trial.run_try(Options("baseline"))
    lock = repo.git_path("index.lock")
    lock.touch()
    with pytest.raises(UserError, match="index.lock.*remove that file"):
        attempt("SCORE = 1.9\n", repository)
    lock.unlink()
    with trial.the_repository():  # the verdict was written; the rest is made up for
        pass
    assert (repository / "train_cuda.py").read_text() == "SCORE = 1.5\n"
