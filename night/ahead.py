"""
The next edit, thought of while an experiment runs.

The agent edits on top of the edit that runs. When the verdict comes, its edit is taken out of the working
tree, and put back on what the branch then has: as it is where the running edit was kept, merged where it was
not.
"""

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.console import say
from night import repo
from night.agent import Answer, Turn, TurnFiles, read_answer, start_agent, undo_turn, wait_for_agent
from night.state import loop_folder

RUNNING = (
    "It runs now, and there is no result yet: {description}\n"
    "That edit lies in the trainer. Edit on top of it; where it is not kept, yours is merged into what was "
    "there before."
)


@dataclass(frozen=True)
class Thinking:
    """An agent at work while an experiment runs."""

    turn: Turn
    files: TurnFiles
    child: subprocess.Popen[bytes]
    deadline: float  # of time.monotonic()
    base: bytes  # the trainer that it began from


@dataclass(frozen=True)
class NextEdit:
    """What it made of the trainer."""

    base: bytes
    text: bytes
    answer: Answer


def think(
    trainer: Path,
    turn: Turn,
    command: Sequence[str],
    prompt: str,
    seconds: float,
    settings: Mapping[str, str],
) -> Thinking:
    """Start the agent. The state must hold its turn by now.

    Raises:
        TurnFailed: it cannot be started.
    """
    base = trainer.read_bytes()
    files = TurnFiles(loop_folder(), turn.stamp)
    child = start_agent(command, prompt, files, settings)
    return Thinking(turn, files, child, time.monotonic() + seconds, base)


def collect(thinking: Thinking, trainer: Path, at_once: bool = False) -> NextEdit | None:
    """Wait for the agent and take its edit out of the working tree, which is then as before its turn.

    at_once: end it instead. Returns None where it made no edit.
    """
    seconds = 0.0 if at_once else thinking.deadline - time.monotonic()
    code = wait_for_agent(thinking.child, seconds, thinking.turn.stamp)
    plain = trainer.is_file() and not trainer.is_symlink()
    text = trainer.read_bytes() if plain else b""
    edit = None
    if not at_once and code == 0 and plain and text != thinking.base:
        edit = NextEdit(thinking.base, text, read_answer(thinking.files))
        repo.set_ref("ahead", repo.commit_alone(trainer.name, edit.answer.description, text))
        trainer.write_bytes(thinking.base)
    undo_turn(thinking.turn)
    if edit is None and not at_once:
        how = "did not end in time" if code is None else f"ended with exit code {code}"
        say(f"the agent that thought ahead {how}, and made no edit")
    return edit


def rebase(edit: NextEdit, trainer: Path) -> bool:
    """Write the edit into the trainer as the branch has it. Returns whether it could; else it is stashed."""
    name = trainer.name
    merged = None if repo.is_edited(name) else repo.merge(trainer.read_bytes(), edit.base, edit.text)
    if merged is None or merged == trainer.read_bytes():
        commit = repo.commit_alone(name, edit.answer.description, edit.text)
        ref = repo.save_ref("stray/ahead", commit)
        say(f"«{edit.answer.description}» does not go together with what is there now; it stays as {ref}")
        return False
    trainer.write_bytes(merged)
    return True
