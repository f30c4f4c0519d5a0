"""A run that another machine made: its files there, and here its row, with the verdict of this ledger."""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from backends.protocol import RunDir, write_json
from launcher.ledger import RUN_ID, Flag, Row
from launcher.runs import (
    append_row,
    find_row,
    format_time,
    judging,
    ledger,
    read_row,
    record_killed_runs,
    run_dir,
    scratch_folder,
)
from launcher.verdict import give_verdict
from prepare import UserError

LARGEST_FILE = 2**25  # bytes of a file that are carried; the trainer's output is the only one without a bound


def pack_run(run_id: str) -> dict[str, bytes]:
    """Return the files of a run by name. Its weights stay where they are."""
    run = run_dir(run_id)
    weights = (run.weights.name, run.keep_weights.name)
    files = {}
    for path in sorted(run.path.iterdir()):
        if path.name not in weights and path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - LARGEST_FILE))  # of a log its end is wanted
                files[path.name] = file.read()
    return files


def unpack_run(run_id: str, files: Mapping[str, bytes], expected: Mapping[str, Any]) -> Row:
    """Add a run of another machine to the runs and to the ledger, once. Returns its row.

    What it counts for is decided here and now: that machine's ledger does not have the runs of the others.
    Its row gets a time by this machine's clock, so that the rows of several machines are in order.

    Args:
        run_id: its id there.
        files: as pack_run made them.
        expected: what was to be run, by the attributes of its row.

    Raises:
        UserError: it is no whole run, or another one than was asked for.
        OSError: it cannot be written.
    """
    if not RUN_ID.fullmatch(run_id) or any(Path(name).name != name for name in files):
        raise UserError(f"another machine sent no run: {run_id!r:.60}, {sorted(files)!r:.200}")
    record_killed_runs()  # this run may have come when the disk was full, or when this process was killed
    known = find_row(run_id)
    if known:
        return require_expected(known, expected)
    with scratch_folder() as scratch:
        arrived = RunDir(scratch / run_id)
        arrived.path.mkdir()
        for name, content in files.items():
            (arrived.path / name).write_bytes(content)
        row = read_row(arrived)
        if row is None:
            raise UserError(f"another machine sent run {run_id} without its row")
        require_expected(row, expected)
        row.time = format_time(time.time() - row.total_seconds)
        with judging():
            if row.comparable:
                row = undecided(row)
                give_verdict(ledger().rows(), row, [])
            write_json(arrived.row, asdict(row))
            os.rename(arrived.path, run_dir(run_id).path)
            append_row(row)
    return row


def require_expected(row: Row, expected: Mapping[str, Any]) -> Row:
    """Return a row as it is. Raises UserError where it is of another run than was asked for."""
    for name, value in expected.items():
        if getattr(row, name) != value:
            raise UserError(
                f"another machine sent run {row.run}, whose {name} is {getattr(row, name)}, not {value}"
            )
    return row


def undecided(row: Row) -> Row:
    """Return a scored row without the verdict that it has."""
    marks = [flag for flag in row.ordered_flags if flag != Flag.REPEAT]
    return replace(row, status="", build_on="", marks=",".join(marks))
