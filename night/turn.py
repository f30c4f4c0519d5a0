"""
A turn: an agent begins from a commit and ends with an edit of the trainer.

What it does besides is not undone, as it is nowhere: the agent works in a folder of its own. A turn may be
begun while an experiment runs; its edit is then put on what the verdict leaves.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.console import say
from launcher.processes import Guarded
from night import repo
from night.agent import TurnFailed, TurnFiles, last_words, read_answer, start_agent, wait_for_agent
from night.agents import Agent
from night.state import Edit, loop_folder
from night.workspace import Workspace, make_workspace
from prepare import UserError

RUNNING = (
    "It runs now, and there is no result yet: {description}\n"
    "That edit lies in the trainer. Edit on top of it; where it is not kept, yours is merged into what was "
    "there before."
)

CHECK = (
    "trainer: {trainer}\n\n"  # as in every prompt: a script looks for it
    "This is a check before a night of experiments: can you edit here? Add the line `# checked` to the end "
    "of {trainer}. Change nothing else, run nothing, and end."
)
CHECK_SECONDS = 180.0


@dataclass(frozen=True)
class Turn:
    """An agent at work."""

    agent: Agent
    base: str  # the commit that it began from
    files: TurnFiles
    workspace: Workspace
    child: Guarded
    began: float  # of time.monotonic()
    deadline: float  # of the same clock


def begin_turn(
    agent: Agent,
    prompt: str,
    base: str,
    stamp: str,
    seconds: float,
    settings: Mapping[str, str],
    boxed: bool = False,
    place: int = 0,
) -> Turn:
    """Start an agent. The loop's state must hold the stamp by now.

    Call it in defer_signals, as start_guarded.

    Args:
        agent: who is called.
        prompt: what it is told.
        base: the commit that it begins from.
        stamp: of the turn, in the format of run ids.
        seconds: that it has.
        settings: variables of its environment (RunSettings.to_env).
        boxed: it works in a box.
        place: which of the folders it gets, where several agents work at once.

    Raises:
        TurnFailed: it cannot be started.
        UserError, OSError: its folder cannot be made.
    """
    workspace = make_workspace(base, prompt, place)
    files = TurnFiles(loop_folder(), stamp)
    child = start_agent(agent, prompt, files, workspace, settings, boxed)
    now = time.monotonic()
    return Turn(agent, base, files, workspace, child, now, now + seconds)


def end_turn(turn: Turn, trainer: str, at_once: bool = False) -> Edit:
    """Wait for an agent, and return its edit.

    at_once: do not wait, end it

    Raises:
        TurnFailed: it made none, or failed. An edit that it left is then kept under a ref.
    """
    deadline = turn.began if at_once else turn.deadline
    try:
        code = wait_for_agent(turn.child, deadline, turn.deadline - turn.began, turn.files)
        if code != 0:
            said = last_words(turn.files)
            raise TurnFailed("agent", f"the agent ended with exit code {code}: {said}")
    except TurnFailed:
        keep_unfinished(turn, trainer)
        raise
    finally:
        turn.workspace.save_notes()
    return read_edit(turn, trainer)


def read_edit(turn: Turn, trainer: str) -> Edit:
    """Return what the agent made of the trainer. Raises TurnFailed when that is nothing."""
    try:
        source = turn.workspace.read_trainer(trainer)
    except UserError as error:
        raise TurnFailed("agent", f"the agent left no plain file {trainer}: {error}") from None
    if repo.blob_of(source, trainer) == repo.committed_blob(trainer, turn.base):
        raise TurnFailed("agent", f"the agent changed nothing in {trainer}")
    answer = read_answer(turn.agent, turn.files)
    commit = repo.commit_alone(trainer, answer.description, source, turn.base)
    return Edit(commit, turn.base, answer, turn.agent.name)


def keep_unfinished(turn: Turn, trainer: str) -> None:
    """Keep what an agent that failed had written into the trainer."""
    try:
        edit = read_edit(turn, trainer)
    except (TurnFailed, UserError, OSError):
        return
    say(f"the agent's unfinished edit stays as {repo.save_ref(f'stash/{turn.files.stamp}', edit.commit)}")


def not_ready(agent: Agent, error: TurnFailed) -> UserError:
    """Return what to say of an agent that failed the check before the night."""
    what = f"--agent {agent.name} is not ready: {error}. What it printed: {loop_folder()}/. "
    if agent.is_known:
        what += f"Is it logged in ({agent.log_in})? A command of your own may stand in place of its name. "
    return UserError(f"{what}It must edit the file when it is asked to")
