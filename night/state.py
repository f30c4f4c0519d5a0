"""What outlives the process of a loop: the state that the next one goes on from, and the log of all loops."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backends.protocol import write_json
from launcher.runs import append_json_line, now_utc, runs_dir
from night import repo
from night.agent import Answer, Turn


@dataclass(frozen=True)
class Edit:
    """What an agent wrote into the trainer, until there is a verdict on it."""

    blob: str
    answer: Answer


@dataclass(frozen=True)
class LoopState:
    """What a loop that did not come to its end leaves to the next one."""

    experiments: int | None = None  # that it was asked for
    done: int | None = None  # experiments; None: it ended in order, only `edit` is left
    turn: Turn | None = None  # what an agent began from, while it works
    edit: Edit | None = None


def state_path() -> Path:
    return repo.git_path("autoresearch-loop.json")


def read_state() -> LoopState:
    """Return the state that an earlier loop left, an empty one when there is none or it is damaged."""
    try:
        data = json.loads(state_path().read_text())
        turn = data.get("turn")
        edit = data.get("edit")
        return LoopState(
            experiments=data.get("experiments"),
            done=data.get("done"),
            turn=Turn(**turn) if turn else None,
            edit=read_edit(edit) if edit else None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return LoopState()


def read_edit(data: dict[str, Any]) -> Edit:
    """Return an edit from the state file. Version 0.1 wrote its description alone."""
    answer = data.get("answer")
    return Edit(data["blob"], Answer(**answer) if answer else Answer(data["description"]))


def write_state(state: LoopState) -> None:
    write_json(state_path(), asdict(state))


def loop_folder() -> Path:
    """Return where prompts, answers and the log of the loops lie."""
    return runs_dir() / "loop"


def record(event: str, **values: Any) -> None:
    """Add a line to runs/loop/loop.jsonl."""
    append_json_line(loop_folder() / "loop.jsonl", {"time": now_utc(), "event": event, **values})
