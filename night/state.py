"""What outlives the process of a loop: the state that the next one goes on from, and the log of all loops."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from backends.protocol import write_json
from launcher.console import describe_os_error, say
from launcher.ledger import BoardKey, single_line
from launcher.runs import append_json_line, now_utc, runs_dir
from night import repo
from night.agent import Answer


@dataclass(frozen=True)
class Edit:
    """An edit of the trainer, until there is a verdict on it."""

    commit: str  # that holds it
    base: str  # the commit that it was made on
    answer: Answer
    agent: str = ""  # that made it, "" for a person


@dataclass(frozen=True)
class NightCounts:
    """What became of a night so far. Every edit that was run is kept, discarded or failed."""

    kept: int = 0
    discarded: int = 0
    failed: int = 0
    baselines: int = 0  # runs of a committed trainer: no edits
    refused: int = 0  # edits that were not run: they do not compile, were scored before, or fail a dry run
    turns_lost: int = 0  # turns without an edit

    @property
    def edits(self) -> int:
        """Return how many edits were run."""
        return self.kept + self.discarded + self.failed


@dataclass(frozen=True)
class LoopState:
    """What a loop leaves to the next one."""

    experiments: int | None = None  # that it was asked for
    done: int = 0  # experiments
    stamp: str = ""  # of the turns in which agents work, separated by spaces; "" when none does
    trainer: str = ""  # file name, of all edits
    board: BoardKey | None = None  # of its experiments
    edits: tuple[Edit, ...] = ()  # without a verdict, in the order in which they are tried
    counts: NightCounts = NightCounts()
    head: str = ""  # the commit that a loop of several devices left the branch on


def state_path() -> Path:
    return repo.git_path("autoresearch-loop.json")


def read_state() -> LoopState:
    """Return the state that an earlier loop left, an empty one when there is none or it is damaged."""
    try:
        data = json.loads(state_path().read_text())
        experiments = data["experiments"]
        return LoopState(
            experiments=None if experiments is None else int(experiments),
            done=int(data["done"]),
            stamp=str(data["stamp"]),
            trainer=str(data["trainer"]),
            board=BoardKey(*data["board"]) if data["board"] else None,
            edits=tuple(filter(None, map(read_edit, data["edits"]))),
            counts=read_counts(data.get("counts") or {}),
            head=str(data.get("head") or ""),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return LoopState()


def read_counts(data: dict[str, Any]) -> NightCounts:
    """Return the counts of the state file, 0 for what it has not."""
    return NightCounts(**{known.name: int(data.get(known.name) or 0) for known in fields(NightCounts)})


def read_edit(data: dict[str, Any]) -> Edit | None:
    """Return an edit from the state file, None where its commits are gone."""
    answer = Answer(**{name: single_line(text) for name, text in data["answer"].items()})
    edit = Edit(str(data["commit"]), str(data["base"]), answer, single_line(data["agent"]))
    known = all(repo.is_commit(commit) for commit in (edit.commit, edit.base))
    return edit if known else None


def write_state(state: LoopState) -> None:
    """Write the state file."""
    write_json(state_path(), asdict(state))


def loop_folder() -> Path:
    """Return where prompts, answers and the log of the loops lie."""
    return runs_dir() / "loop"


def record(event: str, **values: Any) -> None:
    """Add a line to runs/loop/loop.jsonl. A full disk ends no night: a line on the terminal says so."""
    try:
        append_json_line(loop_folder() / "loop.jsonl", {"time": now_utc(), "event": event, **values})
    except OSError as error:
        say(f"the log of the night lacks «{event}»: {describe_os_error(error)}")
