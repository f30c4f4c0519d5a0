"""`autoresearch diff`: how the trainers of two runs differ, or that of a run and the one that lies here."""

import os
from pathlib import Path
from typing import NamedTuple

import click

from backends.platforms import choose_platform
from backends.protocol import IN_LOOP_VARIABLE
from launcher.console import print_object, say, without_controls
from launcher.ledger import Row
from launcher.runs import find_run, runs_dir, trainer_of
from launcher.show import read_text, unified_diff
from prepare import ROOT, UserError

CONTEXT_LINES = 3
COLOURS = {"+": "green", "-": "red", "@": "cyan"}  # by the first character of a line


class Side(NamedTuple):
    """A trainer that is compared."""

    name: str  # the run's id, or the file's name
    path: Path
    row: Row | None = None  # None: no run had it as it lies there

    @property
    def title(self) -> str:
        return f"{self.name} ({self.row.val_bpb:.6f})" if self.row and self.row.scored else self.name


def print_difference(old: str, new: str, as_json: bool) -> None:
    """Print how the trainer of a run becomes that of another. new: a run, "" for the trainer that lies here.

    Raises:
        UserError: there is no such run, or no copy of its trainer.
    """
    before = side_of(find_run(old))
    after = side_of(find_run(new)) if new else lying_side(before)
    texts = (read_text(before.path), read_text(after.path))
    lines = unified_diff(*texts, before.title, after.title, CONTEXT_LINES)
    if as_json:
        sides = {"old": before.name, "new": after.name}
        values = {"old_val_bpb": value_of(before), "new_val_bpb": value_of(after)}
        print_object({**sides, **values, "diff": lines})
        return
    if not lines:
        say(f"{before.title} and {after.title} have the same trainer")
    for line in lines:
        click.secho(without_controls(line), fg=COLOURS.get(line[:1]))


def side_of(row: Row) -> Side:
    """Return the trainer of a run. Raises UserError when no copy of it is here."""
    copy = trainer_of(row)
    if copy is None:
        raise UserError(
            f"run {row.run} has no trainer in {runs_dir()}: it was made on another machine, "
            "or its folder was deleted"
        )
    return Side(row.run, copy, row)


def lying_side(other: Side) -> Side:
    """Return the trainer of the same kind as it lies here: for an agent of the loop, in its own folder."""
    assert other.row
    name = choose_platform(other.row.platform)[0].trainer
    path = Path(os.environ.get(IN_LOOP_VARIABLE) or ROOT) / name
    if not path.is_file():
        raise UserError(f"there is no {path}")
    return Side(name, path)


def value_of(side: Side) -> float | None:
    """Return the val_bpb of a run, None where there is none."""
    return side.row.val_bpb if side.row and side.row.scored else None
