"""
A coding agent for one turn: call its command line in its folder, read its answer.

Nothing that an agent starts outlives its turn.
"""

import json
import os
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from backends.protocol import RUN_ID_VARIABLE, last_line, write_json
from launcher.ledger import single_line
from launcher.processes import Guarded, defer_signals, start_guarded
from launcher.runs import HOME_VARIABLE, run_dir
from night.agent_box import agent_policy
from night.agents import Agent, Said, read_output
from night.workspace import Workspace

PROMPT = "{prompt}"  # in an argument of the agent's command, it stands for the prompt
# The lines that end an answer: `name: text`, and the text that stands for it in the prompt.
EXAMPLES = {
    "experiment": "<the idea in a line>",
    "learned": "<what the last result taught you, in a line>",
    "next": "<what you would try next, in a line>",
    "idea": "<its id, if it is one of the ideas above>",
}
# Characters of each line that are kept.
LENGTHS = {"experiment": 200, "learned": 300, "next": 300, "idea": 60}
MARKDOWN = " `*#>"  # characters that an agent may put around a line
NO_ANSWER = "the agent did not say"
ANSWER_BYTES = 2**20  # of what it printed, in whose end the answer is looked for
LONGEST_LOG = 2**28  # bytes; an agent that prints more is ended
LONGEST_ARGUMENT = 120_000  # bytes; Linux takes 131,072
POLL_SECONDS = 1.0  # between looks at the log's size
answers_read: dict[tuple[str | None, str], "Answer | None"] = {}  # by home and run: see read_saved_answer


# What a turn fails by: the agent (it failed, hung or changed nothing), its edit (it cannot be tried), a
# changed harness, git or a file of the person's, a device that something else uses, or a fault of ours.
FailureKind = Literal["agent", "edit", "harness", "repository", "device", "launcher"]


class TurnFailed(Exception):
    """A turn led to no experiment."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


# ---------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TurnFiles:
    """The files of a turn in runs/loop/."""

    folder: Path
    stamp: str  # in the format of run ids

    @property
    def prompt(self) -> Path:
        return self.folder / f"{self.stamp}.prompt.md"

    @property
    def out(self) -> Path:
        """What the agent printed on standard output: its answer."""
        return self.folder / f"{self.stamp}.out"

    @property
    def log(self) -> Path:
        """What it printed on standard error."""
        return self.folder / f"{self.stamp}.log"


def start_agent(
    agent: Agent,
    prompt: str,
    files: TurnFiles,
    workspace: Workspace,
    settings: Mapping[str, str] | None = None,
    boxed: bool = False,
) -> Guarded:
    """Start an agent in its folder. What it prints goes to files.out and files.log.

    Args:
        agent: {prompt} in its command stands for the prompt; without one, the prompt is the standard input.
        prompt: what it is told.
        files: where prompt and output are kept.
        workspace: where it works.
        settings: variables of its environment that say on what the experiments run (RunSettings.to_env).
        boxed: it touches only what night/agent_box.py names.

    Raises:
        TurnFailed: it cannot be started.
    """
    prompt = prompt.replace("\0", " ")  # an argument cannot hold it
    files.folder.mkdir(parents=True, exist_ok=True)
    files.prompt.write_text(prompt, encoding="utf-8", errors="replace")
    given_command = agent.boxed_command if boxed else agent.command
    prompt_is_argument = any(PROMPT in part for part in given_command)
    argument = fit_argument(prompt)
    arguments = [part.replace(PROMPT, argument) for part in given_command]
    variables = {**workspace.environment(), **(settings or {}), RUN_ID_VARIABLE: files.stamp}
    if boxed:
        arguments = agent_policy(agent, workspace).command(arguments)
        variables["TMPDIR"] = str(workspace.temporary)
    stdin = os.devnull if prompt_is_argument else files.prompt
    with open(files.out, "wb") as out, open(files.log, "wb") as log, open(stdin, "rb") as given:
        try:
            return start_guarded(
                arguments,
                cwd=workspace.folder,
                env=variables,
                stdin=given,
                stdout=out,
                stderr=log,
            )
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise TurnFailed("agent", f"{agent.command[0]} cannot be started: {why}") from None


def fit_argument(text: str) -> str:
    """Return a text as an argument of a command can hold it: of a longer one, the beginning and the end."""
    data = text.encode("utf-8", "replace")
    if len(data) > LONGEST_ARGUMENT:
        left_out = b"\n[... the middle is left out: it is too long for an argument ...]\n"
        half = (LONGEST_ARGUMENT - len(left_out)) // 2
        data = data[:half] + left_out + data[-half:]
    return data.decode("utf-8", "replace")


def wait_for_agent(child: Guarded, deadline: float, limit: float, files: TurnFiles) -> int:
    """Wait for an agent, and end what it leaves running. Returns its exit code.

    deadline: of time.monotonic(). limit: the seconds that it had in all, for the message

    Raises:
        TurnFailed: it did not end by the deadline, or printed without end. It was ended.
    """
    try:
        while True:
            left = deadline - time.monotonic()
            with suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=max(0.0, min(left, POLL_SECONDS)))
            if left <= 0:
                raise TurnFailed("agent", f"the agent did not end within {limit:.0f} s")
            if prints_without_end(files):
                raise TurnFailed("agent", f"the agent printed more than {LONGEST_LOG:,} bytes")
    finally:
        with defer_signals():
            child.end(ask=True)


def prints_without_end(files: TurnFiles) -> bool:
    """Return whether an agent has printed more than is kept."""
    return files.out.stat().st_size + files.log.stat().st_size > LONGEST_LOG


# ---------------------------------------------------------------------------
# Its answer
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What an agent says at the end of its turn. All but the description may be empty."""

    description: str  # of the edit
    learned: str = ""  # from the results before
    next: str = ""  # what it would try next
    idea: str = ""  # the id of the line of ideas.md that the edit is about


def read_said(agent: Agent, files: TurnFiles) -> Said:
    """Return what the agent of a turn printed: its answer, its tokens, what they cost."""
    return read_output(agent, read_end(files.out), read_end(files.log))


def read_end(path: Path) -> str:
    """Return the end of a text, "" when there is none."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - ANSWER_BYTES))
            return f.read().decode("utf-8", "replace")
    except OSError:
        return ""


def last_words(files: TurnFiles) -> str:
    """Return the last line that an agent printed, for a message: on standard error, or on standard output."""
    return last_line(files.log, "") or last_line(files.out)


def read_answer(agent: Agent, files: TurnFiles) -> Answer:
    """Return what the agent of a turn said of its edit."""
    prompt = files.prompt.read_text(encoding="utf-8", errors="replace")
    return parse(read_said(agent, files).text, prompt)


def parse(said: str, prompt: str = "") -> Answer:
    """Return the answer in what an agent printed: of each kind of line the last one.

    Without an `experiment:` line, the last line that is of no kind describes the edit.

    prompt: what the agent was given. Its lines are no answer: some agents print the prompt first.
    """
    told = set(plain_lines(prompt))
    told.update(plain(f"{name}: {text}") for name, text in EXAMPLES.items())
    found: dict[str, str] = {}
    last = ""
    for line in plain_lines(said):
        if not line or line in told:
            continue
        name, _, text = line.partition(":")
        name = name.strip(MARKDOWN).lower()
        text = text.strip(MARKDOWN)
        if name not in EXAMPLES:
            last = line
        elif text:
            found[name] = text
    values = {name: found.get(name, "")[:length] for name, length in LENGTHS.items()}
    description = values.pop("experiment") or last[: LENGTHS["experiment"]] or NO_ANSWER
    return Answer(description, **values)


def plain(line: str) -> str:
    """Return a line without control characters, and without Markdown around it."""
    return single_line(line).lstrip(MARKDOWN + "-").rstrip(MARKDOWN)


def plain_lines(text: str) -> list[str]:
    return [plain(line) for line in text.splitlines()]


def save_answer(run_id: str, answer: Answer) -> None:
    """Write what the agent said of an edit to the folder of its run."""
    write_json(answer_path(run_id), asdict(answer))
    answers_read.pop((os.environ.get(HOME_VARIABLE), run_id), None)


def read_saved_answer(run_id: str) -> Answer | None:
    """Return what the agent said of a run's edit, None when that is not on record.

    Each is read once: every turn asks for those of all runs.
    """
    key = (os.environ.get(HOME_VARIABLE), run_id)
    if key not in answers_read:
        answers_read[key] = load_answer(answer_path(run_id))
    return answers_read[key]


def load_answer(path: Path) -> Answer | None:
    """Return the answer in a file, None where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Answer(**{name: single_line(value) for name, value in data.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def answer_path(run_id: str) -> Path:
    return run_dir(run_id).path / "answer.json"
