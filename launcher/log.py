"""`autoresearch log`: what the trainer of a run printed, also while it runs."""

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import click

from backends.protocol import RunDir
from launcher.console import print_object, without_controls
from launcher.exit_codes import EXIT_USAGE
from launcher.runs import find_id, find_run, is_under_way, run_dir, runs_dir
from prepare import UserError

POLL_SECONDS = 0.5
LONGEST_LINE = 2**16  # bytes; a longer one is printed in parts


def find_folder(name: str) -> RunDir:
    """Return the folder of a run, also of one under way, by its id, the beginning of it, or a word.

    "last" is the newest, "best" and "baseline" are as for runs.find_run.

    Raises:
        UserError: no run or several have that name.
    """
    if name in ("best", "baseline"):
        return run_dir(find_run(name).run)
    ids = sorted(path.parent.name for path in runs_dir().glob("*/run.json"))
    found = ids[-1] if name == "last" and ids else find_id(name, ids)
    if not found:
        raise UserError(f"{runs_dir()} has no run '{name}' (autoresearch leaderboard lists them)", EXIT_USAGE)
    return run_dir(found)


def print_log(name: str, most: int | None, follow: bool, of_scoring: bool, as_json: bool) -> None:
    """Print what a run printed.

    Args:
        name: of the run, as for find_folder.
        most: only so many lines at the end; None: all.
        follow: go on until the run is over.
        of_scoring: what the processes print which score, in place of the trainer.
        as_json: print one object.

    Raises:
        UserError: there is no such run, or it printed nothing yet.
    """
    run = find_folder(name)
    path = run.score_log if of_scoring else run.log
    if not path.is_file() and not follow:
        raise UserError(f"run {run.run_id} has no {path.name}: it ended before, or its folder was cleaned")
    if as_json:
        lines = list(last_lines(path, most))
        print_object({"run": run.run_id, "path": str(path), "lines": lines})
        return
    end = end_of_lines(path) if follow else None
    for line in last_lines(path, most, end):
        click.echo(without_controls(line))
    if end is not None:
        for line in new_lines(run, path, end):
            click.echo(without_controls(line))


def end_of_lines(path: Path) -> int:
    """Return the bytes of a log up to its last whole line, 0 where there is none."""
    if not path.is_file():
        return 0
    with open(path, "rb") as f:
        begin = max(0, f.seek(0, os.SEEK_END) - LONGEST_LINE)
        f.seek(begin)
        return begin + f.read().rfind(b"\n") + 1


def last_lines(path: Path, most: int | None, end: int | None = None) -> Iterator[str]:
    """Yield the lines of a log, or the last ones of them; none of an absent one. end: in bytes."""
    if not path.is_file():
        return
    with open(path, "rb") as f:
        limit = math.inf if end is None else end
        lines = iter(lambda: f.readline(LONGEST_LINE) if f.tell() < limit else b"", b"")
        for line in lines if most is None else deque(lines, most):
            yield line.decode(errors="replace").rstrip("\r\n")


def new_lines(run: RunDir, path: Path, at: int) -> Iterator[str]:
    """Yield the lines that are added to a log after its first `at` bytes, until the run is over."""
    rest = b""
    while True:
        is_over = run.row.exists() or not is_under_way(run, run.read_record().get("pid"))
        while path.is_file():
            with open(path, "rb") as f:
                f.seek(at)
                data = f.read(LONGEST_LINE)
            if not data:
                break
            at += len(data)
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace").rstrip("\r")
        if is_over:
            break
        time.sleep(POLL_SECONDS)
    if rest:
        yield rest.decode(errors="replace")
