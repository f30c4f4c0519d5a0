"""`try` in a real repository: kept, reverted, refused, cut off anywhere. Only the training is made up."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from conftest import calls, edit, supervise
from filelock import FileLock

from launcher import verdict
from launcher.harness import git_output
from launcher.ledger import Flag, Ledger, Row
from launcher.processes import Stopped
from launcher.run import Request, run_experiment
from launcher.runs import home
from launcher.setting import resolve
from launcher.verdict import tried_since_moved
from night import repo, trial
from night.repo import git_checked
from prepare import UserError


def try_as_it_is(description="an idea"):
    return trial.try_edit(Request(resolve(), description))


def attempt(text, root, description="an idea"):
    edit(root, text)
    return try_as_it_is(description)


def rows():
    return Ledger(home() / "results.tsv").rows()


def files_of(commit):
    return git_output("show", "--format=", "--name-only", commit).split()


def trainer_text(root):
    return (root / "train_cuda.py").read_text()


# --- The verdict decides ------------------------------------------------------------------------------------


def test_a_better_trainer_is_committed_alone_and_a_worse_one_is_reverted(repository, capsys):
    assert try_as_it_is("baseline") == 0  # nothing edited: nothing to commit
    start = repo.head()
    (repository / "README.md").write_text("staged\n")
    git_checked("add", "README.md")
    (repository / "README.md").write_text("and edited again\n")
    (repository / "notes.txt").write_text("mine\n")
    (repository / "program.md").write_text("my own\n")

    assert attempt("SCORE = 1.4\n", repository, "better") == 0
    kept = repo.head()
    assert git_output("rev-parse", "HEAD~1") == start and repo.branch() == "refs/heads/main"
    assert files_of("HEAD") == ["inner/train_cuda.py"]
    message = git_output("log", "-1", "--format=%B").split("\n")
    assert message[0] == "better" and f"Run: {rows()[-1].run}" in message and "Val-bpb: 1.400000" in message
    assert git_output("log", "-1", "--format=%(trailers:key=P-better,valueonly)") == "1.00"
    trial_commit = git_output("rev-parse", f"refs/autoresearch/{rows()[-1].run}")
    assert trial_commit.startswith(rows()[-1].commit)

    assert attempt("SCORE = 1.6\n", repository, "worse") == 3
    assert repo.head() == kept and trainer_text(repository) == "SCORE = 1.4\n"
    row = rows()[-1]
    assert git_output("show", f"refs/autoresearch/{row.run}:inner/train_cuda.py") == "SCORE = 1.6"
    assert git_output("rev-parse", f"refs/autoresearch/{row.run}").startswith(row.commit)
    assert attempt("CRASH\n", repository, "broken") == 1
    assert trainer_text(repository) == "SCORE = 1.4\n"

    # and nothing of the person's was touched
    assert (repository / "README.md").read_text() == "and edited again\n"
    assert git_output("show", ":inner/README.md") == "staged"
    assert set(git_checked("status", "--porcelain").split("\n")) == {
        "MM inner/README.md",
        " M inner/program.md",
        "?? inner/notes.txt",
    }
    assert "reverted (discard)" in capsys.readouterr().err


def test_the_result_is_printed_last(repository, capsys):
    attempt("SCORE = 1.25\n", repository)
    out = capsys.readouterr().out
    assert "val_bpb: 1.25\n" in out and out.endswith(f"status: keep\nreason: {rows()[0].reason}\n")


def test_a_description_may_be_any_bytes(repository):
    assert attempt("SCORE = 1.3\n", repository, os.fsdecode(b"caf\xe9\twider")) == 0
    assert rows()[0].description == "caf? wider"
    assert git_output("log", "-1", "--format=%s").endswith("wider")


@pytest.mark.parametrize(
    "name", ["prepare.py", "train_mlx.py", "backends/new.py", "night/loop.py", "uv.lock"]
)
def test_a_change_outside_the_trainer_is_refused_by_name(repository, name):
    (repository / name).parent.mkdir(exist_ok=True)
    (repository / name).write_text("changed = 1\n")
    edit(repository, "SCORE = 1.0\n")
    with pytest.raises(UserError, match=name) as caught:
        try_as_it_is()
    assert caught.value.code == 2 and not calls
    assert (repository / name).read_text() == "changed = 1\n"
    assert trainer_text(repository) == "SCORE = 1.0\n"


def test_a_file_whose_name_is_not_utf8_is_refused_in_one_line(repository):
    name = os.fsencode(repository / "backends") + b"/\xff.py"
    with open(name, "w") as f:
        f.write("changed = 1\n")
    with pytest.raises(UserError, match=r"but backends/\?\.py differ from the last commit"):
        attempt("SCORE = 1.0\n", repository)


def test_identical_source_is_not_run_again(repository, capsys):
    try_as_it_is("baseline")
    with pytest.raises(UserError, match="nothing was edited: .* as in the last commit") as caught:
        try_as_it_is("baseline")
    assert caught.value.code == 2
    assert attempt("SCORE = 1.7\n", repository) == 3 and len(calls) == 2
    assert attempt("SCORE = 1.7\n", repository) == 3 and len(calls) == 2
    assert "not run again" in capsys.readouterr().err and trainer_text(repository) == "SCORE = 1.5\n"
    assert attempt("CRASH\n", repository) == 1
    assert attempt("CRASH\n", repository) == 1 and len(calls) == 4  # it was never scored


def test_a_program_may_read_the_verdict(repository, capsys):
    try_as_it_is("baseline")
    capsys.readouterr()
    edit(repository, "SCORE = 1.4\n")
    assert trial.try_edit(Request(resolve(), "better"), as_json=True) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["exit_code"] == 0 and data["row"]["status"] == "keep" and data["row"]["val_bpb"] == 1.4
    assert data["result"]["num_steps"] == 10
    edit(repository, "CRASH\n")
    assert trial.try_edit(Request(resolve(), "worse"), as_json=True) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["row"]["val_bpb"] is None and data["result"] is None and data["row"]["reason"] == "it crashed"


def test_an_old_trainer_that_was_kept_does_not_come_back_over_a_better_one(repository, capsys):
    try_as_it_is("baseline")
    attempt("SCORE = 1.4\n", repository, "better")
    kept = repo.head()
    capsys.readouterr()
    assert attempt("SCORE = 1.5\n", repository, "as it was before") == 3 and len(calls) == 2
    assert repo.head() == kept and trainer_text(repository) == "SCORE = 1.4\n"
    out = capsys.readouterr().out
    first = rows()[0].run
    assert out.endswith(
        f"run: {first}\nstatus: discard\n"
        f"reason: run {first} scored it (keep), and it is not believed better than the committed one now\n"
    )
    assert "val_bpb: 1.5\n" in out


def test_the_best_trainer_is_kept_again_where_the_branch_lacks_it(repository, capsys):
    try_as_it_is("baseline")
    start = repo.head()
    attempt("SCORE = 1.4\n", repository, "better")
    git_checked("reset", "-q", "--hard", start)
    assert attempt("SCORE = 1.4\n", repository, "better, again") == 0 and len(calls) == 2
    assert (
        git_output("log", "-1", "--format=%s") == "better, again" and repo.is_edited("train_cuda.py") is False
    )
    assert "status: keep\nreason: run " in capsys.readouterr().out


def test_a_second_try_of_a_reverted_source_keeps_the_ref_of_the_first(repository):
    try_as_it_is("baseline")
    attempt("SCORE = 1.7\n", repository, "first")
    ref = f"refs/autoresearch/{rows()[-1].run}"
    before = git_output("rev-parse", ref)
    attempt("SCORE = 1.7\n", repository, "second")
    assert git_output("rev-parse", ref) == before
    assert git_output("log", "-1", "--format=%s", f"{ref}-2") == "second"


def test_the_repository_is_released_even_after_an_error(repository, monkeypatch):
    locks = []

    def make_lock(path):
        locks.append(FileLock(path))
        return locks[-1]

    monkeypatch.setattr(trial, "FileLock", make_lock)
    next_command()
    with pytest.raises(ZeroDivisionError), trial.hold_repository():
        assert locks[-1].is_locked
        raise ZeroDivisionError
    assert len(locks) == 2 and not any(lock.is_locked for lock in locks)


def test_what_does_not_compile_is_not_run(repository):
    for text in ("def broken(:\n", "a = '\0'\n"):
        with pytest.raises(UserError, match="does not compile"):
            attempt(text, repository)
    with pytest.raises(UserError, match="does not compile: line 1"):
        attempt("def broken(:\n", repository)
    assert not calls and not trial.journal().exists()


def test_what_cannot_even_begin_leaves_no_journal(repository, monkeypatch):
    def refuse(request):
        raise UserError("platform cpu needs the package torch")

    monkeypatch.setattr(trial, "run_experiment", refuse)
    with pytest.raises(UserError, match="needs the package"):
        attempt("SCORE = 1.0\n", repository)
    assert not trial.journal().exists() and trainer_text(repository) == "SCORE = 1.0\n"


def test_without_a_verdict_the_edit_stays(repository, capsys):
    try_as_it_is("baseline")
    assert attempt("SCORE = 1.0  # BUSY\n", repository) == 6
    assert "BUSY" in trainer_text(repository) and "no verdict" in capsys.readouterr().err
    assert attempt("SCORE = 1.0  # LATE\n", repository) == 6
    assert "LATE" in trainer_text(repository) and rows()[-1].status == "timeout"
    assert attempt("SCORE = 1.0  # STOP\n", repository) == 130
    assert "STOP" in trainer_text(repository) and not trial.journal().exists()
    assert len(git_output("for-each-ref", "refs/autoresearch/").splitlines()) == 3


def test_a_run_is_on_record_from_the_moment_it_is_announced(repository, monkeypatch):
    def say(message):
        if message.startswith("run "):
            raise Stopped("SIGTERM")

    monkeypatch.setattr("launcher.run.say", say)
    assert attempt("SCORE = 1.0\n", repository) == 130
    assert [(row.reason, row.flags) for row in rows()] == [("interrupted", {Flag.INTERRUPTED})]


# --- What happens meanwhile ---------------------------------------------------------------------------------


@pytest.fixture
def meanwhile(monkeypatch):
    """meanwhile(act): call act() at the end of each run."""

    def install(act):
        def run(*arguments):
            outcome = supervise(*arguments)
            act()
            return outcome

        monkeypatch.setattr("launcher.run.supervise", run)

    return install


def test_an_edit_during_the_run_is_left_alone(repository, meanwhile, capsys):
    try_as_it_is("baseline")
    meanwhile(lambda: edit(repository, "SCORE = 1.1  # mine\n"))
    assert attempt("SCORE = 1.8\n", repository) == 3
    assert trainer_text(repository) == "SCORE = 1.1  # mine\n"
    assert calls[-1] == "SCORE = 1.8\n" and "was edited during the run" in capsys.readouterr().err


def commit_as_a_person(*options):
    git_checked("-c", "user.name=me", "-c", "user.email=me@here", "commit", "-q", "-m", "mine", *options)


def test_a_gain_goes_on_top_of_a_commit_of_other_files(repository, meanwhile):
    try_as_it_is("baseline")

    def commit_readme():
        with open(repository / "README.md", "a") as f:
            f.write("read me too\n")
        commit_as_a_person("--", "README.md")

    meanwhile(commit_readme)
    assert attempt("SCORE = 1.2\n", repository) == 0
    assert git_output("log", "--format=%s").splitlines() == ["an idea", "mine", "start"]
    assert files_of("HEAD") == ["inner/train_cuda.py"] and trainer_text(repository) == "SCORE = 1.2\n"
    assert git_checked("status", "--porcelain") == ""
    assert tried_since_moved(rows(), rows()[0].board, rows()[-1].source) == {row.source for row in rows()}
    assert attempt("SCORE = 1.4\n", repository) == 3
    assert trainer_text(repository) == "SCORE = 1.2\n" and git_checked("status", "--porcelain") == ""


def test_a_commit_of_another_trainer_during_the_run_is_left_alone(repository, meanwhile, capsys):
    try_as_it_is("baseline")

    def commit_trainer():
        edit(repository, "SCORE = 1.3\n")
        commit_as_a_person("--", "train_cuda.py")

    meanwhile(commit_trainer)
    before = repo.head()
    assert attempt("SCORE = 1.2\n", repository) == 0
    assert git_output("rev-parse", "HEAD~1") == before
    assert git_output("log", "-1", "--format=%s") == "mine"
    assert trainer_text(repository) == "SCORE = 1.3\n"
    assert "the branch moved" in capsys.readouterr().err


def test_a_commit_between_an_edit_and_its_run_is_not_lost(repository, meanwhile):
    """The loop makes a commit, and a dry run of it takes a while."""
    try_as_it_is("baseline")
    commit = repo.commit_alone("train_cuda.py", "an idea", b"SCORE = 1.2\n")
    commit_as_a_person("--allow-empty")
    with trial.hold_repository():
        trial.run_trial(Request(resolve(), "an idea"), commit)
    assert git_output("log", "--format=%s").splitlines() == ["an idea", "mine", "start"]


# --- Back to an earlier trainer -----------------------------------------------------------------------------


def decide_to_go_back(monkeypatch, to):
    """Let the next decision be that the trainer of an earlier run is better than the committed one."""
    really = verdict.decide

    def decide(rows, row):
        source = next(other.source for other in rows if other.val_bpb == to)
        return replace(really(rows, row), action="discard", build_on=source, reason="back")

    monkeypatch.setattr(verdict, "decide", decide)


def lucky_night(root):
    """A baseline, a discarded edit, and a kept one. Returns the commit of the kept one."""
    try_as_it_is("baseline")
    attempt("SCORE = 1.51\n", root, "nearly")
    attempt("SCORE = 1.4\n", root, "lucky")
    return repo.head()


def test_the_branch_goes_back_to_a_trainer_that_now_looks_better(repository, monkeypatch, capsys):
    lucky = lucky_night(repository)
    decide_to_go_back(monkeypatch, 1.51)
    assert attempt("SCORE = 1.6\n", repository) == 3
    assert git_output("rev-parse", "HEAD~1") == lucky and trainer_text(repository) == "SCORE = 1.51\n"
    nearly = rows()[1]
    assert git_output("log", "-1", "--format=%s") == f"Go back to run {nearly.run}"
    assert git_checked("status", "--porcelain") == "" and not trial.journal().exists()
    assert rows()[-1].goes_back and rows()[-1].reason == f"back ({nearly.run}: nearly)"
    assert f"back to the trainer of run {nearly.run} (nearly)" in capsys.readouterr().err


def test_a_run_of_the_committed_trainer_may_send_it_back_too(repository, monkeypatch):
    lucky_night(repository)
    parent = repo.content("HEAD", "train_cuda.py")
    decide_to_go_back(monkeypatch, 1.5)
    row = run_experiment(Request(resolve(), "once more", seed=2, parent=parent))
    assert row.goes_back
    commit = repo.head()
    trial.journal().write_text(
        json.dumps(vars(trial.Trial("train_cuda.py", commit, commit, repo.branch(), "", row.run)))
    )
    trial.finish_trial(row)
    assert trainer_text(repository) == "SCORE = 1.5\n" and git_checked("status", "--porcelain") == ""


def test_without_its_copy_an_earlier_trainer_comes_from_its_ref(repository, monkeypatch, capsys):
    lucky = lucky_night(repository)
    nearly = rows()[1]
    shutil.rmtree(home() / "runs" / nearly.run)
    decide_to_go_back(monkeypatch, 1.51)
    attempt("SCORE = 1.6\n", repository)
    assert trainer_text(repository) == "SCORE = 1.51\n"
    git_checked("reset", "-q", "--hard", lucky)
    git_checked("update-ref", "-d", f"refs/autoresearch/{nearly.run}")
    git_checked("reflog", "expire", "--expire=now", "--all")
    git_checked("gc", "-q", "--prune=now")
    assert attempt("SCORE = 1.7\n", repository) == 3
    assert repo.head() == lucky and trainer_text(repository) == "SCORE = 1.4\n"
    assert "no copy is left" in capsys.readouterr().err


def test_an_edit_during_the_run_is_not_gone_back_under(repository, monkeypatch, meanwhile, capsys):
    lucky = lucky_night(repository)
    decide_to_go_back(monkeypatch, 1.5)
    meanwhile(lambda: edit(repository, "SCORE = 1.1  # mine\n"))
    assert attempt("SCORE = 1.6\n", repository) == 3
    assert repo.head() == lucky and trainer_text(repository) == "SCORE = 1.1  # mine\n"
    assert "it does not go back" in capsys.readouterr().err


def test_cut_off_while_going_back_the_next_command_repairs(repository, monkeypatch, capsys):
    lucky = lucky_night(repository)
    decide_to_go_back(monkeypatch, 1.5)
    number = 1
    ledger = (home() / "results.tsv").read_bytes()
    kept_runs = set(os.listdir(home() / "runs"))
    while die_at(number, "SCORE = 1.6\n", repository):
        next_command()
        if rows()[-1].description == "cut off" and rows()[-1].judged:
            assert trainer_text(repository) == "SCORE = 1.5\n"
            assert git_output("rev-list", "--count", f"{lucky}..HEAD") == "1"
        else:
            assert repo.head() == lucky and trainer_text(repository) == "SCORE = 1.6\n"
        assert git_checked("status", "--porcelain", "--", "README.md") == "" and not trial.journal().exists()
        git_checked("reset", "-q", "--hard", lucky)
        (home() / "results.tsv").write_bytes(ledger)
        for run in set(os.listdir(home() / "runs")) - kept_runs:  # else it comes back into the ledger
            shutil.rmtree(home() / "runs" / run, ignore_errors=True)
        number += 1
    assert number > 15


# --- Cut off ------------------------------------------------------------------------------------------------


def die_at(number, text, root):
    """Try in a process that is gone, without a word, before its `number`-th git command.

    Returns whether it came that far.
    """
    edit(root, text)
    child = os.fork()
    if child == 0:
        count = 0
        git_bytes = repo.git_bytes

        def counted(*arguments, **more):
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            return git_bytes(*arguments, **more)

        repo.git_bytes = counted
        try:
            try_as_it_is("cut off")
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def next_command():
    """Do what every command that tries does first."""
    with trial.hold_repository():
        pass


@pytest.mark.parametrize("text", ["SCORE = 1.4\n", "SCORE = 1.6\n", "CRASH\n"])
def test_cut_off_anywhere_the_next_command_repairs(repository, text, capsys):
    try_as_it_is("baseline")
    start = repo.head()
    number = 1
    (repository / "notes.txt").write_text("mine\n")
    while die_at(number, text, repository):
        next_command()
        row = rows()[-1]
        judged = row.description == "cut off"
        kept = judged and row.status == "keep"
        assert repo.head() == start or (kept and files_of("HEAD") == ["inner/train_cuda.py"])
        assert trainer_text(repository) == ("SCORE = 1.5\n" if judged and not kept else text)
        status = git_checked("status", "--porcelain", "--", "train_cuda.py")
        assert status == ("" if judged else " M inner/train_cuda.py")
        assert not trial.journal().exists() and (repository / "notes.txt").read_text() == "mine\n"
        if judged:  # begin again, with nothing on record
            (home() / "results.tsv").unlink()
            shutil.rmtree(home() / "runs")  # what stands there comes back into the ledger
            git_checked("reset", "-q", "--hard", start)
            try_as_it_is("baseline")
        number += 1
    assert number > 8


def test_killed_in_the_middle_of_training(repository, capsys):
    try_as_it_is("baseline")
    start = repo.head()
    assert die_at(10**6, "DIE\n", repository)
    next_command()
    said = capsys.readouterr().err
    assert "recorded as a crash" in said and "the trial of «cut off» was cut off: run" in said
    row = rows()[-1]
    assert Flag.CUT_OFF in row.flags and git_output("rev-parse", f"refs/autoresearch/{row.run}")
    assert repo.head() == start and trainer_text(repository) == "DIE\n"


@pytest.mark.parametrize(
    "reason, stays", [("the launcher was killed during the run", True), ("it crashed", False)]
)
def test_a_trial_that_the_last_version_began_is_finished(repository, reason, stays, capsys):
    """Its journal has these fields, and its rows have no flags."""
    edit(repository, "SCORE = 1.0\n")
    commit = repo.commit_alone("train_cuda.py", "of the last version")
    began = {
        "trainer": "train_cuda.py",
        "commit": commit,
        "base": repo.head(),
        "branch": "refs/heads/main",
        "description": "of the last version",
        "began": "20260101-000000",
    }
    trial.journal().write_text(json.dumps(began, indent=1))
    run = "20260101-000001-abcd"
    Ledger(home() / "results.tsv").append(Row(commit=commit[:7], run=run, status="crash", reason=reason))
    next_command()
    assert trainer_text(repository) == ("SCORE = 1.0\n" if stays else "SCORE = 1.5\n")
    assert not trial.journal().exists() and git_output("rev-parse", f"refs/autoresearch/{run}") == commit


def test_a_damaged_journal_is_removed(repository):
    for text in ("", "[]", '{"trainer": "train_cuda.py"}', "\0"):
        trial.journal().write_text(text)
        next_command()
        assert not trial.journal().exists()


def test_a_left_behind_lock_is_named(repository, monkeypatch):
    monkeypatch.setattr(repo, "LOCKED_SECONDS", 0.3)
    monkeypatch.setattr(repo, "git_is_at_work", lambda: True)
    try_as_it_is("baseline")
    lock = repo.git_path("HEAD.lock")
    lock.touch()
    with pytest.raises(UserError, match="HEAD.lock.*remove that file"):
        attempt("SCORE = 1.4\n", repository)
    lock.unlink()
    next_command()  # the verdict was written; the rest is made up for
    assert repo.content("HEAD", "train_cuda.py") == b"SCORE = 1.4\n"
