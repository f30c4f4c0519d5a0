"""An agent for one turn: its command, its answer, and what it leaves behind."""

import os
import subprocess
import sys

import psutil
import pytest

from backends.protocol import RUN_ID_VARIABLE, RunSettings
from launcher.harness import git_output
from night import agent, repo
from night.agent import (
    EXAMPLES,
    Answer,
    TurnFailed,
    TurnFiles,
    begin_turn,
    call_agent,
    parse,
    read_answer,
    read_saved_answer,
    save_answer,
    undo_turn,
)
from night.lab_book import notes_path


@pytest.fixture
def files(house):
    return TurnFiles(house / "runs" / "loop", "20260101-000000-abcd")


def python(code, *arguments):
    return [sys.executable, "-c", code, *arguments]


def runs(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# --- The call -----------------------------------------------------------------------------------------------


def test_the_prompt_is_the_standard_input(repository, files):
    code = call_agent(python("import sys; print(sys.stdin.read()[::-1])"), "prompt", 60.0, files)
    assert code == 0 and files.log.read_text() == "tpmorp\n" and files.prompt.read_text() == "prompt"


def test_the_prompt_may_be_an_argument(repository, files):
    command = python("import sys; print(sys.argv[1:], repr(sys.stdin.read()))", "-p={prompt}", "{prompt}")
    call_agent(command, "a \0 b", 60.0, files)  # a NUL, which a trainer may print, cannot be in an argument
    assert files.log.read_text() == "['-p=a   b', 'a   b'] ''\n"


def test_an_agent_works_in_the_repository_and_knows_that_it_is_called(repository, files):
    call_agent(python("import os; print(os.getcwd(), os.environ['AUTORESEARCH_LOOP'])"), "", 60.0, files)
    assert files.log.read_text().split() == [os.path.realpath(repository), "1"]


def test_an_agent_is_told_on_what_the_experiments_run(repository, files):
    told = RunSettings(platform="mlx-cpu", budget=20.0, run_id="none yet").to_env()
    code = "import os; e = os.environ.get; print(e('AUTORESEARCH_PLATFORM'), e('AUTORESEARCH_BUDGET'))"
    code += f"; print(e({RUN_ID_VARIABLE!r}))"  # not the run's that is to come: it marks the turn's processes
    call_agent(python(code), "", 60.0, files, told)
    assert files.log.read_text().split() == ["mlx-cpu", "20.0", files.stamp]


def test_exit_code_and_time_limit(repository, files):
    assert call_agent(python("import sys; sys.exit(3)"), "", 60.0, files) == 3
    assert call_agent(python("import time; time.sleep(60)"), "", 0.5, files) is None


def test_an_agent_that_cannot_be_started_fails_its_turn(repository, files):
    with pytest.raises(TurnFailed, match="no-such-agent cannot be started: No such file") as caught:
        call_agent(["no-such-agent"], "", 60.0, files)
    assert caught.value.kind == "agent"
    with pytest.raises(TurnFailed, match="cannot be started: Argument list too long"):
        call_agent(python("", "{prompt}"), "x" * 2**22, 60.0, files)


def test_nothing_that_an_agent_starts_outlives_its_turn(repository, files):
    code = """
import subprocess, sys
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(sleeper, start_new_session=True, stdout=subprocess.DEVNULL).pid)
"""
    assert call_agent(python(code), "", 60.0, files) == 0
    assert not runs(int(files.log.read_text()))


# --- The answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, means",
    [
        (b"I thought.\n\n**experiment: wider** \n", "wider"),
        (b"experiment: one\nexperiment: two\nbye\n", "two"),
        (b"> `Experiment: deeper`\n", "deeper"),
        (b"only words\n\n", "only words"),
        (b"experiment:\n", agent.NO_ANSWER),
        (b"", agent.NO_ANSWER),
        (b"\n***\n", agent.NO_ANSWER),
        (b"experiment: tab\there, NUL\0there, \xff\n", "tab here, NUL there, \ufffd"),
        (b"experiment: " + b"x" * 999, "x" * 200),
        (b"- experiment: -0.1 dropout\n", "-0.1 dropout"),
        (b"I widened it.\nlearned: width helps\n---\n", "I widened it."),
    ],
)
def test_a_description_is_one_clean_line(files, said, means):
    files.folder.mkdir(parents=True)
    files.prompt.write_text("prompt\n")
    files.log.write_bytes(said)
    assert read_answer(files).description == means


def test_an_agent_says_what_it_learned_and_what_is_next():
    said = "experiment: wider\n**Learned: depth costs speed**\n- next: narrower heads\nidea: `width`\n"
    assert parse(said) == Answer("wider", "depth costs speed", "narrower heads", "width")
    assert parse("learned: " + "x" * 999).learned == "x" * 300


def test_the_examples_of_the_prompt_are_no_answer():
    examples = "\n".join(f"{name}: {text}" for name, text in EXAMPLES.items())
    assert parse(examples) == Answer(agent.NO_ANSWER)
    assert parse(f"experiment: wider\n{examples}\n") == Answer("wider")
    assert parse(f"> `{examples}`\nI made it wider\n") == Answer("I made it wider")


def test_an_agent_that_prints_its_prompt_first_says_nothing_by_that():
    """The prompt holds what earlier agents learned, and notes in which anything may stand."""
    prompt = "# Program\n    learned: width helps\nexperiment: of the notes\nEnd with a line\n"
    echoed = f"user\n> {prompt}\n"
    assert parse(echoed + "experiment: deeper\n", prompt) == Answer("deeper")
    assert parse(echoed + "made it deeper\n", prompt) == Answer("made it deeper")


def test_an_answer_is_kept_with_its_run(house):
    (house / "runs" / "r1").mkdir(parents=True)
    answer = Answer("wider", "depth costs speed", idea="width")
    save_answer("r1", answer)
    assert read_saved_answer("r1") == answer
    assert read_saved_answer("r2") is None
    for damaged in ("", "[]", "{}", '{"description": "x", "more": 1}'):
        (house / "runs" / "r1" / "answer.json").write_text(damaged)
        assert read_saved_answer("r1") is None


# --- What it did elsewhere ----------------------------------------------------------------------------------


def test_what_an_agent_leaves_elsewhere_is_reverted_but_not_lost(repository, capsys):
    (repository / "README.md").write_text("the person's own edit\n")
    turn = begin_turn()
    (repository / "train_cuda.py").write_text("SCORE = 1.3\n")
    (repository / "README.md").write_text("by the agent\n")
    (repository / "train_mlx.py").unlink()
    undo_turn(turn, keep="train_cuda.py")
    assert (repository / "train_cuda.py").read_text() == "SCORE = 1.3\n"
    assert (repository / "README.md").read_text() == "the person's own edit\n"
    assert (repository / "train_mlx.py").exists()
    ref = f"refs/autoresearch/stray/{turn.stamp}"
    assert git_output("show", f"{ref}:inner/README.md") == "by the agent"
    assert f"what the agent left in README.md, train_mlx.py; it stays reachable as {ref}" in (
        capsys.readouterr().err
    )
    undo_turn(turn)
    assert (repository / "train_cuda.py").read_text() == "SCORE = 1.5\n"


@pytest.mark.parametrize("detached", [False, True])
def test_a_moved_branch_is_moved_back(repository, detached, capsys):
    if detached:
        repo.git_checked("checkout", "-q", "--detach")
    turn = begin_turn()
    repo.git_checked("checkout", "-q", "-b", "agents")
    (repository / "train_cuda.py").write_text("SCORE = 1.3\n")
    person = ("-c", "user.name=a", "-c", "user.email=a@b")
    repo.git_checked(*person, "commit", "-qam", "mine")
    committed = repo.head()
    undo_turn(turn, keep="train_cuda.py")
    assert repo.branch() == ("" if detached else "refs/heads/main") and repo.head() == turn.head
    assert git_output("rev-parse", "agents") == committed
    assert git_output("rev-parse", f"refs/autoresearch/stray/{turn.stamp}-head") == committed
    assert repo.is_edited("train_cuda.py") and "the agent moved the branch" in capsys.readouterr().err


def test_an_agent_that_still_edits_is_ended_before_its_edits_are_undone(repository, capsys):
    """The loop that called it was killed."""
    turn = begin_turn()
    code = """
import time
from pathlib import Path
print("up", flush=True)
while True:
    Path("README.md").write_text("by the agent " + str(time.time()))
    time.sleep(0.01)
"""
    process = subprocess.Popen(
        python(code),
        cwd=repository,
        env={**os.environ, RUN_ID_VARIABLE: turn.stamp},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout and process.stdout.readline() == b"up\n"
        undo_turn(turn)
        assert not runs(process.pid)
    finally:
        process.kill()
        process.communicate()
    assert (repository / "README.md").read_text() == "read me\n"
    assert f"ended what the agent's turn left running: {process.pid} " in capsys.readouterr().err


def test_an_undo_that_failed_half_way_is_repeated_and_nothing_is_lost(repository, monkeypatch):
    turn = begin_turn()
    (repository / "README.md").write_text("by the agent\n")
    (repository / "train_cuda.py").write_text("SCORE = 1.3\n")
    write_path = repo.write_path

    def fail_at_the_trainer(target, data, mode):
        if target.name == "train_cuda.py":
            raise PermissionError
        write_path(target, data, mode)

    monkeypatch.setattr(repo, "write_path", fail_at_the_trainer)
    with pytest.raises(PermissionError):
        undo_turn(turn)
    monkeypatch.setattr(repo, "write_path", write_path)
    undo_turn(turn)
    assert repo.changed_besides("") == [] and (repository / "README.md").read_text() == "read me\n"
    ref = f"refs/autoresearch/stray/{turn.stamp}"
    assert git_output("show", f"{ref}:inner/README.md") == "by the agent"
    assert git_output("show", f"{ref}-2:inner/train_cuda.py") == "SCORE = 1.3"


def test_the_notes_of_an_agent_stay(repository, monkeypatch):
    """runs/ is not in git, so what lies there is not reverted."""
    monkeypatch.setenv("AUTORESEARCH_HOME", str(repository))
    turn = begin_turn()
    notes_path().parent.mkdir()
    notes_path().write_text("width helps\n")
    (repository / "train_cuda.py").write_text("SCORE = 1.3\n")
    undo_turn(turn)
    assert notes_path() == repository / "runs" / "notes.md" and notes_path().read_text() == "width helps\n"
    assert not repo.is_edited("train_cuda.py")


def test_a_turn_that_changed_nothing_leaves_no_ref(repository):
    undo_turn(begin_turn())
    assert git_output("for-each-ref", "refs/autoresearch/") == ""
