"""What a shell completes: names with a word about each. A name that cannot be looked up is none."""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from launcher.ledger import ABOUT_RUNS, Ledger

ROOT = Path(__file__).resolve().parent.parent
NEWEST = 50  # runs that are offered
Names = dict[str, str]


def quietly(function: Callable[[], Names]) -> Callable[[], Names]:
    """Decorate a function that lists names: where it fails, there are none, and nothing is printed."""

    @wraps(function)
    def names() -> Names:
        try:
            return function()
        except Exception:  # a shell that completes has no place for a message
            return {}

    return names


@quietly
def runs() -> Names:
    """Return the newest runs with what they changed, and the words that name one."""
    home = Path(os.environ.get("AUTORESEARCH_HOME") or ROOT)
    wanted = ("val_bpb", "status", "run", "description")
    rows = [row for row in Ledger(home / "results.tsv").rows(wanted=wanted) if row.run]
    newest = [row for row in rows if row.status not in ABOUT_RUNS][-NEWEST:]
    words = {
        "best": "the lowest val_bpb of the board of the newest run",
        "last": "the newest run",
        "baseline": "the first run of that board",
    }
    return words | {row.run: f"{row.status} {row.val_bpb:.4f} {row.description}" for row in newest[::-1]}


@quietly
def tracks() -> Names:
    """Return the tracks of platforms.yaml with where their text comes from."""
    entries = read_config()["tracks"]
    return {name: str(entry.get("hub") or entry.get("files") or "") for name, entry in entries.items()}


@quietly
def platforms() -> Names:
    """Return the platforms of platforms.yaml with the track that each starts on."""
    return {name: str(entry.get("track", "")) for name, entry in read_config()["platforms"].items()}


def read_config() -> dict[str, Any]:
    """Return platforms.yaml as it is written, not validated: that would take half a second."""
    import yaml

    path = Path(os.environ.get("AUTORESEARCH_CONFIG") or ROOT / "platforms.yaml")
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return data


@quietly
def columns() -> Names:
    """Return the columns of a leaderboard."""
    from launcher.board import RankedRun

    return dict.fromkeys(RankedRun._fields, "")


@quietly
def agents() -> Names:
    """Return the agents that `loop` knows by name."""
    import yaml

    entries = yaml.safe_load((ROOT / "night" / "agents.yaml").read_text(encoding="utf-8"))
    known = {name: str(entry["command"]).split()[0] for name, entry in entries.items()}
    return {"builtin": "searches the trainer's constants, without a language model", **known}


@quietly
def topics() -> Names:
    """Return the topics of the help."""
    from launcher.topics import TOPICS

    return {name: topic.summary for name, topic in TOPICS.items()}
