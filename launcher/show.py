"""`autoresearch show` and `restore`: one run, looked at and brought back."""

import difflib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from backends.platforms import choose_platform
from backends.protocol import IN_LOOP_VARIABLE
from launcher.board import describe_board
from launcher.console import print_object, say, without_controls
from launcher.harness import git_output, source_hash
from launcher.ledger import COLUMNS, Row, facts_of
from launcher.runs import find_run, ledger, loss_curve, runs_dir, trainer_of
from prepare import ROOT, UserError

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 72
DIFF_LINES = 120


def show_run(name: str, as_json: bool = False) -> None:
    """Print a run: its row, its loss curve, and how its trainer differs from the one it was made from.

    as_json: print one object, with the whole curve and diff
    """
    row = find_run(name)
    if as_json:
        facts = {"row": facts_of(row), "loss": loss_curve(row.run), "diff": trainer_difference(row)}
        print_object({**facts, "board": describe_board(row.board)})
        return
    if name in ("best", "baseline"):
        print(f"board: {describe_board(row.board)}")
    for column in COLUMNS:
        value = getattr(row, column)
        if value not in ("", 0, 0.0):
            print(f"{column}: {value}")
    points = loss_curve(row.run)
    if points:
        seconds, last_loss = points[-1]
        print(f"\nloss {points[0][1]:.3f} -> {last_loss:.3f} over {seconds:.0f} s\n{sparkline(points)}")
    difference = trainer_difference(row)
    if difference:
        print("\n" + "\n".join(map(without_controls, difference[:DIFF_LINES])))
    if len(difference) > DIFF_LINES:
        print(f"... {len(difference) - DIFF_LINES} more lines")


def sparkline(points: Sequence[tuple[float, float]], width: int = WIDTH) -> str:
    """Return the curve as one line of block characters."""
    if len(points) < 2:
        return ""
    seconds = points[-1][0]
    values = []
    at = 0
    for column in range(width):
        while at + 1 < len(points) and points[at][0] < seconds * (column + 1) / width:
            at += 1
        values.append(points[at][1])
    low = min(values)
    height = max(values) - low or 1
    return "".join(BARS[round((value - low) / height * (len(BARS) - 1))] for value in values)


def trainer_difference(row: Row) -> list[str]:
    """Return the run's trainer as a diff against its parent, the best one before it, or the committed one."""
    ours = trainer_of(row)
    if ours is None:
        return []
    before = parent_of(row) or best_before(row)
    theirs = trainer_of(before) if before else None
    if before and theirs:
        return unified_diff(read_text(theirs), read_text(ours), title(before), title(row))
    committed = git_output("show", f"HEAD:{ours.name}")
    if not committed:
        return []
    lines = unified_diff(committed, read_text(ours), f"HEAD:{ours.name}", row.run)
    return lines or ["its trainer is the committed one"]


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def title(row: Row) -> str:
    return f"{row.run} ({row.val_bpb:.6f})"


def unified_diff(old: str, new: str, old_name: str, new_name: str, context: int = 1) -> list[str]:
    """Return how a text becomes another, with so many lines of context, and the names of both."""
    lines = (old.splitlines(), new.splitlines())
    return list(difflib.unified_diff(*lines, old_name, new_name, lineterm="", n=context))


def parent_of(row: Row) -> Row | None:
    """Return a run of the trainer that this one's was made from, whose copy is here. None without one."""
    if not row.parent or row.parent == row.source:
        return None
    runs = [other for other in ledger().rows() if other.source == row.parent and trainer_of(other)]
    return runs[-1] if runs else None


def best_before(row: Row) -> Row | None:
    """Return the best comparable run of another trainer on the same board that came before this one."""
    earlier = [
        other
        for other in ledger().rows()
        if other.comparable
        and other.board == row.board
        and other.time < row.time
        and other.source != row.source
    ]
    return min(earlier, key=lambda other: other.val_bpb, default=None)


def restore_trainer(name: str, force: bool) -> None:
    """Put a run's trainer back in its place. Refuses to overwrite an edit that no run and no commit holds."""
    row = find_run(name)
    source = trainer_of(row)
    if source is None:
        raise UserError(
            f"run {row.run} has no trainer in {runs_dir()}: it was made on another machine, "
            "or its folder was deleted"
        )
    folder = os.environ.get(IN_LOOP_VARIABLE)  # of the agent that asks
    target = Path(folder or ROOT) / choose_platform(row.platform)[0].trainer
    if not folder and target.exists() and not force and not is_on_record(target):
        raise UserError(
            f"{target.name} has changes that no run and no commit holds: "
            "commit them, run them, or use --force",
            2,
        )
    shutil.copyfile(source, target)
    say(f"{target.name} is now that of run {row.run} ({row.val_bpb:.6f}: {row.description})")


def is_on_record(trainer: Path) -> bool:
    """Return whether a run or the last commit holds the trainer as it lies there."""
    if source_hash(trainer.read_bytes()) in {row.source for row in ledger().rows()}:
        return True
    committed = git_output("rev-parse", f"HEAD:./{trainer.name}")
    return committed != "" and committed == git_output("hash-object", str(trainer))
