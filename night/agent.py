"""
A coding agent for one turn: call its command line, read its answer, undo what it did outside the trainer.

Nothing that an agent starts outlives its turn. What it writes outside the trainer is reverted, and stays
reachable under a ref.
"""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from backends.protocol import IN_LOOP_VARIABLE, RUN_ID_VARIABLE, write_json
from launcher.console import say
from launcher.ledger import single_line
from launcher.processes import end_group, end_leftovers, ignore_signals
from launcher.runs import new_run_id, run_dir
from night import repo
from prepare import ROOT

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


class TurnFailed(Exception):
    """A turn led to no experiment.

    kind: "agent" (it failed, hung or changed nothing), "edit" (its edit cannot be tried) or "repository".
    """

    def __init__(self, kind: Literal["agent", "edit", "repository"], reason: str) -> None:
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
    def log(self) -> Path:
        """Everything that the agent printed."""
        return self.folder / f"{self.stamp}.log"


def start_agent(
    command: Sequence[str], prompt: str, files: TurnFiles, settings: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start an agent in the repository. What it prints goes to files.log.

    command: {prompt} in an argument stands for the prompt; without one, the prompt is the standard input.
    settings: variables of its environment that say on what the experiments run (RunSettings.to_env).

    Raises:
        TurnFailed: it cannot be started.
    """
    prompt = prompt.replace("\0", " ")  # an argument cannot hold it
    files.folder.mkdir(parents=True, exist_ok=True)
    files.prompt.write_text(prompt, encoding="utf-8", errors="replace")
    prompt_is_argument = any(PROMPT in part for part in command)
    arguments = [part.replace(PROMPT, prompt) for part in command]
    stdin = os.devnull if prompt_is_argument else files.prompt
    with open(files.log, "wb") as log, open(stdin, "rb") as given:
        try:
            return subprocess.Popen(
                arguments,
                cwd=ROOT,
                env={**os.environ, **(settings or {}), IN_LOOP_VARIABLE: "1", RUN_ID_VARIABLE: files.stamp},
                stdin=given,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise TurnFailed("agent", f"{command[0]} cannot be started: {error.strerror}") from None


def call_agent(
    command: Sequence[str],
    prompt: str,
    seconds: float,
    files: TurnFiles,
    settings: Mapping[str, str] | None = None,
) -> int | None:
    """Run an agent and wait for it: see start_agent and wait_for_agent."""
    return wait_for_agent(start_agent(command, prompt, files, settings), seconds, files.stamp)


def wait_for_agent(child: subprocess.Popen[bytes], seconds: float, stamp: str) -> int | None:
    """Wait for an agent, and end what it leaves running.

    Returns its exit code, None when it took longer than `seconds` and was ended.
    """
    try:
        return child.wait(timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with ignore_signals():
            end_group(child)
            end_leftovers(stamp)


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


def read_answer(files: TurnFiles) -> Answer:
    """Return what the agent of a turn said."""
    said, prompt = (path.read_text(encoding="utf-8", errors="replace") for path in (files.log, files.prompt))
    return parse(said, prompt)


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


def read_saved_answer(run_id: str) -> Answer | None:
    """Return what the agent said of a run's edit, None when that is not on record."""
    try:
        data = json.loads(answer_path(run_id).read_text(encoding="utf-8"))
        return Answer(**{name: single_line(value) for name, value in data.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def answer_path(run_id: str) -> Path:
    return run_dir(run_id).path / "answer.json"


# ---------------------------------------------------------------------------
# What it did elsewhere
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What an agent began from. The loop's state file holds it while the agent works."""

    tree: str  # the working tree, as a git tree
    head: str  # the last commit
    branch: str  # that HEAD named, "" when detached
    stamp: str


def begin_turn() -> Turn:
    """Remember what the agent begins from."""
    return Turn(repo.snapshot(), repo.head(), repo.branch(), new_run_id())


def undo_turn(turn: Turn, keep: str = "") -> None:
    """Undo what an agent did in the repository. Nothing is lost: all of it stays reachable under a ref.

    Processes of the turn are ended first: an agent outlives a loop that was killed, and would go on editing.

    keep: the file whose edit stays, "" when none does.
    """
    with ignore_signals():
        ended = end_leftovers(turn.stamp)
    if ended:
        say(f"ended what the agent's turn left running: {single_line(', '.join(ended))}")
    if (repo.head(), repo.branch()) != (turn.head, turn.branch):
        ref = repo.save_ref(f"stray/{turn.stamp}-head", repo.head())
        repo.move_branch_back(turn.branch, turn.head)
        say(f"the agent moved the branch; it is back, and what it committed is {ref}")
    after = repo.snapshot()
    leftover = [path for path in repo.differing_paths(turn.tree, after) if path != keep]
    if leftover:
        commit = repo.commit_tree(after, turn.head, "what an agent left")
        ref = repo.save_ref(f"stray/{turn.stamp}", commit)
        repo.restore_paths(leftover, turn.tree)
        say(f"reverted what the agent left in {repo.list_paths(leftover)}; it stays reachable as {ref}")
