"""`show` and `restore`: one run, looked at and brought back."""

import difflib
import json
import shutil

from launcher.ledger import Row
from launcher.repo import git, source_hash
from launcher.run import choose_platform, ledger, runs_dir, say, trainer_of
from launcher.verify import find_run
from prepare import ROOT, UserError

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 72
DIFF_LINES = 120


def loss_curve(run):
    """[(seconds of training, smoothed loss)] of a run, from its events; [] when there are none."""
    points = []
    try:
        with open(runs_dir() / run / "events.jsonl") as f:
            for line in f:
                event = json.loads(line)
                if event.get("event") == "log":
                    points.append((event["elapsed"], event["smooth"]))
    except (OSError, ValueError, KeyError):
        pass
    return points


def sparkline(points, width=WIDTH):
    """The curve as one line of block characters."""
    if len(points) < 2:
        return ""
    last, values = points[-1][0], []
    at = 0
    for column in range(width):
        while at + 1 < len(points) and points[at][0] < last * (column + 1) / width:
            at += 1
        values.append(points[at][1])
    low, high = min(values), max(values)
    return "".join(BARS[round((v - low) / (high - low or 1) * (len(BARS) - 1))] for v in values)


def best_before(row):
    """The best comparable run of the same board that came before this one."""
    rows = [r for r in ledger().rows() if r.compares and r.board == row.board and r.time < row.time and r.source != row.source]
    return min(rows, key=lambda r: r.val_bpb) if rows else None


def show(name):
    """Print a run: its line, its loss curve, and how its trainer differs from the best before it."""
    row = find_run(name)
    for column in Row.__slots__:
        value = getattr(row, column)
        if value not in ("", 0, 0.0) and column != "ledger":
            print(f"{column}: {value}")
    points = loss_curve(row.run)
    if points:
        print(f"\nloss {points[0][1]:.3f} -> {points[-1][1]:.3f} over {points[-1][0]:.0f} s\n{sparkline(points)}")
    before, ours = best_before(row), trainer_of(row)
    theirs = before and trainer_of(before)
    if ours and theirs:
        diff = list(difflib.unified_diff(theirs.read_text().splitlines(), ours.read_text().splitlines(), f"{before.run} ({before.val_bpb:.6f})",
                                         f"{row.run} ({row.val_bpb:.6f})", lineterm="", n=1))
        print("\n" + "\n".join(diff[:DIFF_LINES]) + (f"\n... {len(diff) - DIFF_LINES} more lines" if len(diff) > DIFF_LINES else ""))
    elif ours and ours.suffix == ".py":
        committed = git("show", f"HEAD:{ours.name}").splitlines()
        diff = list(difflib.unified_diff(committed, ours.read_text().splitlines(), f"HEAD:{ours.name}", row.run, lineterm="", n=1)) if committed else []
        print("\n" + ("\n".join(diff[:DIFF_LINES]) or "its trainer is the committed one"))


def restore(name, force):
    """Put a run's trainer back in its place. Refuses to overwrite edits that no run and no commit holds."""
    row = find_run(name)
    source = trainer_of(row)
    if source is None:
        raise UserError(f"run {row.run} has no trainer in {runs_dir()}: it was made on another machine, or its folder was deleted")
    target = ROOT / choose_platform(row.platform)[0].trainer
    if target.exists() and not force:
        current = source_hash(target)
        known = {r.source for r in ledger().rows()}
        committed = git("hash-object", str(target)) == git("rev-parse", f"HEAD:{target.name}") != ""
        if current not in known and not committed:
            raise UserError(f"{target.name} has changes that no run and no commit holds: commit them, run them, or use --force", 2)
    shutil.copyfile(source, target)
    say(f"{target.name} is now that of run {row.run} ({row.val_bpb:.6f}: {row.description})")
