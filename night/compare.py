"""
`autoresearch compare`: one trainer on every device of this machine and of others, for the choice of hardware.

The runs stand in the ledger as any others.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click

from launcher.console import print_object, say
from launcher.device import awake
from launcher.exit_codes import EXIT_DONE, EXIT_FAILED
from launcher.harness import read_trainer, source_hash
from launcher.ledger import STATUSES, Flag, Row
from launcher.processes import stop_on_signals
from launcher.runs import find_run, ledger, trainer_of
from launcher.setting import Setting, resolve
from night.devices import Device, parse_list
from night.job import Job, JobAnswer
from night.pool import find_lent
from night.state import loop_folder
from night.workers import WORKER_SECONDS, Future, Workers, result_of, take_run
from prepare import TIME_BUDGET, UserError

POLL_SECONDS = 0.5
COLUMNS = (
    "device",
    "name",
    "val_bpb",
    "tokens_per_second",
    "share",
    "mfu_percent",
    "kilojoules",
    "status",
    "marks",
    "run",
)


class DeviceScore(NamedTuple):
    """A device and its run. Numbers are 0 where there is none."""

    device: str  # gpu0
    name: str  # NVIDIA H100 80GB HBM3
    val_bpb: float
    tokens_per_second: float
    share: float  # of the fastest device's tokens a second
    mfu_percent: float
    kilojoules: float  # that the run took, where the device reports its power
    status: str
    marks: str  # what happened to the run: its flags
    run: str
    reason: str


def compare_devices(
    trainer: str,
    devices: str,
    hosts: Path | None,
    track: str,
    budget: float | None,
    seed: int,
    as_json: bool,
) -> int:
    """Run a trainer on devices, and print how they compare. Returns the exit code.

    GPUs train at once; a CPU, which they all need a little of, after them.

    Args:
        trainer: a file, or a run; "" for each platform's own.
        devices: of this machine, as parse_list takes it; "none" for none.
        hosts: a file of machines whose devices take part too.
        track: "" for each platform's own.
        budget: seconds of training, that of the rules if left out.
        seed: of every run.
        as_json: print one object.

    Raises:
        UserError: there is no such trainer or device, or dask is missing.
    """
    budget = budget or float(TIME_BUDGET)
    source = find_source(trainer)
    here = [] if devices == "none" else parse_list(devices)
    pool = find_lent(here, hosts, "", False, {"platform": "", "track": track, "budget": budget})
    chosen = pool.devices
    jobs = {}
    for device in pool.here:
        platform = "cpu" if device.kind == "cpu" else ""  # a GPU has its own, which its job finds
        setting = resolve(platform, track, budget)
        setting.data  # noqa: B018  prepares it, once for all devices
        jobs[device] = make_job(device, platform, setting, source, track, seed)
    for lent in pool.lent:
        setting = resolve(lent.platform, track, budget)
        for device in lent.devices:
            jobs[device] = make_job(device, lent.platform, setting, source, track, seed)
    if not chosen:
        raise UserError("no device takes part: --devices or --hosts", 2)
    answers: dict[Device, JobAnswer] = {}
    with stop_on_signals(), awake(), Workers(pool, loop_folder()) as workers:
        for kind in ("gpu", "cpu"):
            futures = {
                device: workers.submit(job, device.name)
                for device, job in jobs.items()
                if device.kind == kind
            }
            if futures:
                say("training on " + ", ".join(device.name for device in futures))
            answers |= {
                device: wait_for(future, jobs[device], device, workers) for device, future in futures.items()
            }
    scores = make_scores(chosen, [answers[device] for device in chosen], ledger().rows())
    if as_json:
        print_object({"devices": [score._asdict() for score in scores]})
    else:
        print_scores(scores)
    return EXIT_DONE if all(score.val_bpb for score in scores) else EXIT_FAILED


def find_source(trainer: str) -> bytes | None:
    """Return the source of a file or of a run, None where none is named. Raises UserError."""
    if not trainer:
        return None
    if Path(trainer).is_file():
        return read_trainer(Path(trainer))
    copy = trainer_of(find_run(trainer))
    if copy is None:
        raise UserError(f"no copy of the trainer of run {trainer} is left")
    return copy.read_bytes()


def make_job(
    device: Device, platform: str, setting: Setting, source: bytes | None, track: str, seed: int
) -> Job:
    """Return the run of a trainer on a device. source: the platform's own if left out"""
    trainer = source if source is not None else read_trainer(setting.trainer)
    text = f"compare: {device.name}"
    flags = (Flag.NOISE,)  # it is no experiment of a search: it decides nothing, and is not repeated
    return Job(platform, track, setting.budget, seed, text, trainer, commit="", flags=flags)


def wait_for(future: Future, job: Job, device: Device, workers: Workers) -> JobAnswer:
    """Return the answer of a job when it is done; an error where its worker does not come back.

    A run of another machine is then among those of this one.
    """
    seen = time.monotonic()
    while not future.done():
        time.sleep(POLL_SECONDS)
        for line in workers.tend():
            say(line)
        if device.name not in workers.missing():
            seen = time.monotonic()
        elif time.monotonic() - seen > WORKER_SECONDS:
            future.cancel()
    answer = result_of(future)
    if answer.files:
        return take_run(answer, {"source": source_hash(job.trainer), "seed": job.seed})
    return answer


def make_scores(
    devices: Sequence[Device], answers: Sequence[JobAnswer], rows: Sequence[Row]
) -> list[DeviceScore]:
    """Return a line for each device. rows: of the ledger"""
    by_run = {row.run: row for row in rows if row.status in STATUSES}
    made = [by_run.get(answer.run, Row(status=answer.status, reason=answer.reason)) for answer in answers]
    fastest = max((row.tokens_per_second for row in made), default=0.0) or 1.0
    return [
        DeviceScore(
            device.name,
            row.device,
            row.val_bpb if row.scored else 0.0,
            row.tokens_per_second,
            row.tokens_per_second / fastest,
            row.mfu_percent,
            row.energy_kj,
            row.status,
            row.marks,
            row.run,
            row.reason,
        )
        for device, row in zip(devices, made, strict=True)
    ]


def print_scores(scores: Sequence[DeviceScore]) -> None:
    """Print the lines as tab-separated values, and why a device has no score."""
    click.echo("\t".join(COLUMNS))
    for score in scores:
        cells = {**score._asdict(), "val_bpb": f"{score.val_bpb:.6f}", "share": f"{score.share:.3f}"}
        click.echo("\t".join(str(cells[name]) for name in COLUMNS))
    for score in scores:
        if not score.val_bpb:
            click.echo(f"autoresearch: {score.device}: {score.status}: {score.reason}", err=True)
