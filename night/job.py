"""
The unit of work of a fleet: one experiment, as a process that is bound to one device.

    python -m night.job JOB ANSWER    # two files, JSON

It is what `autoresearch run` does: the launcher in this process owns the limits, the end and the row of its
run. A job of an edit has a dry run before it.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from backends.protocol import write_json
from night.devices import keep_to_cores

LOST = "lost"  # of a job: its worker ended, or the connection to it


@dataclass(frozen=True)
class Job:
    """What a device is to run: a trainer, and what stands in its row."""

    platform: str
    track: str
    budget: float  # seconds of training
    seed: int
    description: str
    trainer: bytes  # the source
    commit: str
    parent: bytes | None = None  # the source that it was made from
    agent: str = ""
    flags: Sequence[str] = ()
    has_dry_run: bool = False
    is_lent: bool = False  # the night's ledger is on another machine: there its run is judged, and repeated

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON holds it: sources need not be UTF-8."""
        texts = {"trainer": as_text(self.trainer), "parent": self.parent and as_text(self.parent)}
        return {**asdict(self), **texts, "flags": list(self.flags)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Job":
        sources = {
            "trainer": as_bytes(data["trainer"]),
            "parent": data["parent"] and as_bytes(data["parent"]),
        }
        return cls(**{**data, **sources})


@dataclass(frozen=True)
class JobAnswer:
    """What became of a job. Without a run, status and reason say why: those of the dry run, or "error"."""

    run: str = ""  # id of the run that decides, "" when none was made
    status: str = ""  # of the dry run, "error" or LOST
    reason: str = ""
    log_tail: str = ""
    seconds: float = 0.0  # that the dry run took
    step_shares: Mapping[str, float] = field(default_factory=dict)  # that it measured
    files: Mapping[str, bytes] = field(default_factory=dict)  # of a run on another machine: carried.pack_run


def as_text(source: bytes) -> str:
    return source.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def work(job: Job) -> JobAnswer:
    """Do a job on the device that this process is bound to."""
    from launcher.harness import source_hash
    from launcher.ledger import Flag
    from launcher.run import Request, dry_run, run_experiment, run_once
    from launcher.runs import record_killed_runs
    from launcher.setting import resolve
    from night.lab_book import remember_shares
    from night.trial import run_source, scored_before
    from prepare import UserError

    try:
        setting = resolve(job.platform, job.track, job.budget)
        record_killed_runs()
        earlier = scored_before(job.trainer, setting) if job.has_dry_run else None
        if earlier and earlier.commit == job.commit[:7]:  # this very job, whose worker was killed then
            return JobAnswer(earlier.run)
        seconds = 0.0
        step_shares: Mapping[str, float] = {}
        if job.has_dry_run:
            outcome, log_tail = dry_run(setting, job.trainer, job.seed)
            seconds = outcome.total_seconds
            if outcome.status:
                return JobAnswer("", outcome.status, outcome.reason, log_tail, seconds)
            step_shares = outcome.step_shares
            remember_shares(source_hash(job.trainer), outcome.step_shares)
        request = Request(
            setting,
            job.description,
            job.seed,
            flags=tuple(map(Flag, job.flags)),
            parent=job.parent,
            agent=job.agent,
        )
        experiment = run_once if job.is_lent else run_experiment
        row = run_source(request, job.trainer, job.commit, experiment)
        return JobAnswer(row.run, seconds=seconds, step_shares=step_shares)
    except (UserError, OSError) as error:
        return JobAnswer(status="error", reason=str(error))


def main() -> None:
    """Do the job of the first file, and write its answer to the second."""
    keep_to_cores()  # before anything counts the cores
    from launcher.processes import stop_on_signals

    source, target = map(Path, sys.argv[1:])
    job = Job.from_json(json.loads(source.read_text()))
    with stop_on_signals():
        answer = work(job)
    write_json(target, asdict(answer))


if __name__ == "__main__":
    main()
