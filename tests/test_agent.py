"""An agent for one turn: its command, its answer, and what it leaves behind."""

import sys
import time

import psutil
import pytest

from backends.protocol import RUN_ID_VARIABLE, RunSettings
from night import agent
from night.agent import (
    EXAMPLES,
    Answer,
    TurnFailed,
    TurnFiles,
    answers_read,
    parse,
    read_answer,
    read_saved_answer,
    save_answer,
    start_agent,
    wait_for_agent,
)
from night.agents import Agent
from night.workspace import Workspace


@pytest.fixture
def files(house):
    return TurnFiles(house / "runs" / "loop", "20260101-000000-abcd")


@pytest.fixture
def call(house, files):
    """call(command, prompt, seconds, settings) -> exit code, of an agent in an empty folder."""
    folder = house / "folder"
    folder.mkdir()

    def call(command, prompt="", seconds=60.0, settings=None):
        child = start_agent(Agent("test", command), prompt, files, Workspace(folder, folder), settings)
        return wait_for_agent(child, time.monotonic() + seconds, seconds, files)

    return call


def python(code, *arguments):
    return [sys.executable, "-c", code, *arguments]


def runs(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# --- The call -----------------------------------------------------------------------------------------------


def test_the_prompt_is_the_standard_input(call, files):
    code = call(python("import sys; print(sys.stdin.read()[::-1])"), "prompt")
    assert code == 0 and files.out.read_text() == "tpmorp\n" and files.prompt.read_text() == "prompt"


def test_the_prompt_may_be_an_argument(call, files):
    command = python("import sys; print(sys.argv[1:], repr(sys.stdin.read()))", "-p={prompt}", "{prompt}")
    call(command, "a \0 b")  # a NUL, which a trainer may print, cannot be in an argument
    assert files.out.read_text() == "['-p=a   b', 'a   b'] ''\n"


def test_a_prompt_that_is_too_long_for_an_argument_keeps_beginning_and_end(call, files):
    prompt = "begin " + "\u00e4" * 2**20 + " end"
    call(python("import sys; print(sys.argv[1])", "{prompt}"), prompt)
    said = files.out.read_text()
    assert said.startswith("begin ") and said.endswith(" end\n") and "the middle is left out" in said
    assert len(said.encode()) < 2**17 and files.prompt.read_text() == prompt


def test_a_prompt_may_hold_half_a_character(call, files):
    assert call(python("import sys; print(sys.argv[1])", "{prompt}"), "a \udcff b") == 0
    assert files.out.read_text() == "a ? b\n"


def test_an_agent_works_in_its_folder_and_is_told_where(call, files, house):
    call(python("import os; print(os.getcwd(), os.environ['AUTORESEARCH_LOOP'])"))
    assert files.out.read_text().split() == [str(house / "folder")] * 2


def test_an_agent_is_told_on_what_the_experiments_run(call, files):
    told = RunSettings(platform="mlx-cpu", budget=20.0, run_id="none yet").to_env()
    code = "import os; e = os.environ.get; print(e('AUTORESEARCH_PLATFORM'), e('AUTORESEARCH_BUDGET'))"
    code += f"; print(e({RUN_ID_VARIABLE!r}))"  # not the run's that is to come: it marks the turn's processes
    call(python(code), settings=told)
    assert files.out.read_text().split() == ["mlx-cpu", "20.0", files.stamp]


def test_exit_code_and_time_limit(call):
    assert call(python("import sys; sys.exit(3)")) == 3
    with pytest.raises(TurnFailed, match="did not end within 0 s"):
        call(python("import time; time.sleep(60)"), seconds=0.4)


def test_an_agent_that_prints_without_end_is_ended(call, monkeypatch):
    monkeypatch.setattr(agent, "LONGEST_LOG", 1000)
    monkeypatch.setattr(agent, "POLL_SECONDS", 0.1)
    with pytest.raises(TurnFailed, match="printed more than 1,000 bytes"):
        call(python("while True: print('x' * 100, flush=True)"))


def test_an_agent_that_cannot_be_started_fails_its_turn(call):
    with pytest.raises(TurnFailed, match="no-such-agent cannot be started: No such file") as caught:
        call(["no-such-agent"])
    assert caught.value.kind == "agent"
    with pytest.raises(TurnFailed, match="cannot be started: Argument list too long"):
        call(python("", "x" * 2**22))


def test_nothing_that_an_agent_starts_outlives_its_turn(call, files):
    code = """
import subprocess, sys
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(sleeper, start_new_session=True, stdout=subprocess.DEVNULL).pid)
"""
    assert call(python(code)) == 0
    assert not runs(int(files.out.read_text()))


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
    files.out.write_bytes(said)
    assert read_answer(Agent("test", []), files).description == means


def test_an_agent_says_what_it_learned_and_what_is_next():
    said = "experiment: wider\n**Learned: depth costs speed**\n- next: narrower heads\nidea: `width`\n"
    assert parse(said) == Answer("wider", "depth costs speed", "narrower heads", "width")
    assert parse("learned: " + "x" * 999).learned == "x" * 300


def test_of_a_long_output_the_end_is_read(files, monkeypatch):
    monkeypatch.setattr(agent, "ANSWER_BYTES", 100)
    files.folder.mkdir(parents=True)
    files.prompt.write_text("prompt\n")
    files.out.write_bytes(b"experiment: early\n" + b"\xff" * 1000 + b"\nexperiment: late\n")
    assert read_answer(Agent("test", []), files).description == "late"


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
    save_answer("r1", Answer("narrower"))
    assert read_saved_answer("r1") == Answer("narrower")
    for damaged in ("", "[]", "{}", '{"description": "x", "more": 1}'):
        (house / "runs" / "r1" / "answer.json").write_text(damaged)
        answers_read.clear()
        assert read_saved_answer("r1") is None
