"""
A coding agent for one turn: call its command line, read its answer, undo what it did outside the trainer.

Nothing that an agent starts outlives its turn. What it writes outside the trainer is reverted, and stays
reachable under a ref.
"""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from backends.protocol import IN_LOOP_VARIABLE, RUN_ID_VARIABLE
from launcher.console import say
from launcher.ledger import single_line
from launcher.processes import end_group, end_leftovers, ignore_signals
from launcher.runs import new_run_id
from night import repo
from prepare import ROOT

PROMPT = "{prompt}"  # in an argument of the agent's command, it stands for the prompt
ANSWER = "experiment:"  # begins the line in which an agent says what it changed
ANSWER_LENGTH = 200  # characters of that line that are kept
MARKDOWN = " `*#>"  # characters that an agent may put around the line
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


def call_agent(command: Sequence[str], prompt: str, seconds: float, files: TurnFiles) -> int | None:
    """Run an agent in the repository and wait for it. What it prints goes to files.log.

    command: {prompt} in an argument stands for the prompt; without one, the prompt is the standard input.

    Returns its exit code, None when it took longer than `seconds` and was ended.

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
            child = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env={**os.environ, IN_LOOP_VARIABLE: "1", RUN_ID_VARIABLE: files.stamp},
                stdin=given,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise TurnFailed("agent", f"{command[0]} cannot be started: {error.strerror}") from None
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with ignore_signals():
                end_group(child)
                end_leftovers(files.stamp)


def read_answer(log: Path) -> str:
    """Return what an agent says that it changed.

    It is the last `experiment:` line of its log, and without one the last line.
    """
    said = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip(MARKDOWN) for line in map(single_line, said.splitlines())]
    answers = [line[len(ANSWER) :].strip(MARKDOWN) for line in lines if line.lower().startswith(ANSWER)]
    others = [line for line in lines if line]
    last = (answers or others or [""])[-1]
    return last[:ANSWER_LENGTH] or NO_ANSWER


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
