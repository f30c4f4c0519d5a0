"""One experiment: take the device, run the trainer, judge the result, write the row."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.platforms import mac_state
from backends.protocol import RunDir, write_json
from launcher import compiled, verdict
from launcher.box import missing_walls
from launcher.child import Outcome, supervise
from launcher.console import print_object, say, say_once, warn_once
from launcher.device import DeviceLock, Watch, WhenBusy, awake, look_around
from launcher.exit_codes import EXIT_CODES, EXIT_INTERRUPTED, EXIT_NO_VERDICT
from launcher.harness import (
    git_output,
    harness_hash,
    harness_modified,
    read_trainer,
    removes_code,
    source_hash,
)
from launcher.ledger import Flag, Row, facts_of, single_line, warn
from launcher.processes import Stopped, defer_signals
from launcher.progress import Progress
from launcher.runs import (
    add_result,
    append_row,
    judging,
    ledger,
    new_run_id,
    now_utc,
    prune_weights,
    record_killed_runs,
    record_of,
    run_dir,
    scratch_folder,
    trainer_of,
)
from launcher.setting import Setting
from prepare import RULES

DRY_BUDGET = 3.0  # seconds of training in a dry run
POWER_FLAGS = {"on_battery": Flag.BATTERY, "low_power_mode": Flag.LOW_POWER}  # by the keys of mac_state()


@dataclass(frozen=True)
class Request:
    """One experiment as it was asked for."""

    setting: Setting
    description: str = ""
    seed: int = 1
    trainer: Path | None = None  # None: the platform's own
    keep_weights: bool = False
    flags: tuple[Flag, ...] = ()
    commit: str = ""  # the trial's, where `try` made one
    parent: bytes | None = None  # source of the committed trainer that a trial's edit was made on
    agent: str = ""  # that made the edit; "" for a person
    progress: Progress | None = None  # None: a line on the terminal
    when_busy: WhenBusy | None = None  # what to do where other processes compute; None: do not look


def run_experiment(request: Request) -> Row:
    """Run one experiment, and repeat it with other seeds where another run is worth its time.

    Every path through here leaves a complete row. Returns the row that decides.
    """
    record_killed_runs()
    row = run_once(request)
    while Flag.REPEAT in row.flags:
        say(row.reason)
        # The copy that was run, not the file: it may be edited meanwhile.
        row = run_once(replace(request, seed=row.seed + 1, trainer=trainer_of(row)))
    return row


def exit_code(row: Row) -> int:
    """Return the exit code that says how a run ended."""
    if Flag.INTERRUPTED in row.flags:
        return EXIT_INTERRUPTED
    if (row.scored and not row.comparable) or row.disturbed_timeout:
        return EXIT_NO_VERDICT
    return EXIT_CODES[row.status]


def run_once(request: Request) -> Row:
    """Run a trainer once and return its row.

    Raises:
        UserError: nothing was started: no trainer, or not the machine for it.
    """
    setting = request.setting
    setting.require_device()
    trainer = (request.trainer or setting.trainer).resolve()
    source = read_trainer(trainer)  # before any waiting: what runs is what lay there when it was asked for
    row = new_row(request, source)
    laptop = mac_state()
    row.add_flags(*initial_flags(request, laptop))
    if request.parent is not None and removes_code(request.parent, source):
        row.add_flags(Flag.SHORTER)

    with DeviceLock(setting.platform.device_kind) as lock, awake():
        if request.when_busy:
            look_around(setting.platform.device_kind, request.when_busy)
        row.run = new_run_id()
        row.time = now_utc()
        lock.set_holder(row.run)
        compiled.trim()
        row.dtype = setting.dtype.dtype  # in the lock: where it is measured, no other run computes
        run = run_dir(row.run)
        run.path.mkdir(parents=True)
        copy = run.path / trainer.name
        copy.write_bytes(source)
        start = setting.platform.start
        known = record_of(row, trainer.name, setting.why, start, setting.facts.known(), laptop)
        write_json(run.record, known)
        try:
            run_copy(request, row, run, copy)
        except Exception as error:  # of ours, not the trainer's: the run is on record all the same
            row.status = "crash"
            row.add_flags(Flag.FAULT)
            row.reason = f"the launcher failed: {type(error).__name__}: {error}"
            append_row(row)
            raise
    return row


def run_copy(request: Request, row: Row, run: RunDir, copy: Path) -> None:
    """Run the copy of the trainer, judge it, and write the row."""
    watch = Watch(request.setting.platform.device_kind)
    outcome = train_and_score(request, copy, run, watch)
    with defer_signals():  # a run that is over gets its row
        if outcome is None:
            record_interruption(row, run)
        else:
            record_outcome(request, row, outcome, watch)


def record_outcome(request: Request, row: Row, outcome: Outcome, watch: Watch) -> None:
    """Judge a run that came to its end, and write the row."""
    findings = [*watch.findings(), *outcome.findings]
    for flag, text in findings:
        warn(f"{flag}: {text}; the row does not rank")
    row.add_flags(*[flag for flag, _ in findings])
    row.energy_kj = round(watch.energy_j / 1000, 3)
    fill(row, outcome, request.setting)
    if row.disturbed_timeout:
        row.reason = f"no verdict: {'; '.join(text for _, text in findings)}; {row.reason}"
    with judging():
        judge(row, [text for _, text in findings])
        append_row(row)
    prune_weights(row, request.keep_weights)


def new_row(request: Request, source: bytes) -> Row:
    """Return the row of a run that has not started: all that is known of it."""
    setting = request.setting
    return Row(
        commit=request.commit or git_output("rev-parse", "--short=7", "HEAD") or "none",
        description=single_line(request.description) or "no description",
        platform=setting.platform.name,
        device=setting.facts.device,
        track=setting.track.name,
        seed=request.seed,
        rules=RULES,
        fingerprint=setting.data.fingerprint,
        harness=harness_hash(),
        budget=setting.budget,
        val_tokens=setting.val_tokens,
        source=source_hash(source),
        parent=source_hash(request.parent) if request.parent is not None else "",
        agent=request.agent,
    )


def initial_flags(request: Request, laptop: dict) -> list[Flag]:
    """Return the flags that a run has before it starts, and warn about those that a person can mend."""
    setting = request.setting
    flags = list(request.flags)
    if setting.short:
        flags.append(Flag.SHORT)
    if harness_modified():
        warn_once("the harness differs from the last commit (git status); the row is marked")
        flags.append(Flag.HARNESS_MODIFIED)
    missing = missing_walls()
    if missing:
        warn_once(f"unboxed: {missing}: the trainer can touch what you can; such rows have their own board")
        flags.append(Flag.UNBOXED)
    if setting.track.fingerprint and setting.data.fingerprint != setting.track.fingerprint:
        flags.append(Flag.OTHER_CORPUS)
    for key, flag in POWER_FLAGS.items():
        if laptop.get(key):
            warn_once(f"{flag}: the result does not compare with others and will not rank")
            flags.append(flag)
    return flags


def train_and_score(request: Request, copy: Path, run: RunDir, watch: Watch) -> Outcome | None:
    """Run the copy of the trainer. Returns None when the launcher was asked to end."""
    setting = request.setting
    progress = request.progress or Progress(setting.budget)
    progress.log = run.log
    try:
        say_once(
            f"platform {setting.platform.name} ({setting.why}), track {setting.track.name}, "
            f"{setting.budget:g} s of training in {setting.dtype.dtype}"
        )
        say(f"run {run.run_id}: seed {request.seed}")
        outcome = supervise(copy, run, setting, request.seed, watch, progress)
    except Stopped as stop:
        progress.close()
        say(f"interrupted ({stop}): run {run.run_id} was ended and recorded")
        return None
    progress.close()
    return outcome


def record_interruption(row: Row, run: RunDir) -> None:
    """Write the row of a run that the user stopped."""
    row.status = "crash"
    row.reason = "interrupted"
    row.add_flags(Flag.INTERRUPTED)
    append_row(row)
    run.weights.unlink(missing_ok=True)


def fill(row: Row, outcome: Outcome, setting: Setting) -> None:
    """Put the result into the row."""
    row.training_seconds = outcome.training_seconds
    row.total_seconds = outcome.total_seconds
    result = outcome.result
    if not outcome.status and setting.data.current_fingerprint() != row.fingerprint:
        outcome.fail(
            "invalid", "tokenizer or rows changed on disk during the run: autoresearch prepare --force"
        )
    if outcome.status:
        row.status = outcome.status
        row.reason = outcome.reason
        return
    assert result
    add_result(row, result)
    if not 0 < result.val_bpb < math.inf:
        row.status = "invalid"
        row.reason = f"a score of {result.val_bpb} bits per byte is none"


def judge(row: Row, findings: Sequence[str]) -> None:
    """Give a scored row its verdict."""
    if not row.status:
        verdict.give_verdict(ledger().rows(), row, findings)


def print_result(row: Row, as_json: bool = False) -> None:
    """Print the last lines of a run, greppable, on stdout; for a crash the end of its log comes first.

    as_json: print one object instead
    """
    run = run_dir(row.run)
    if as_json:
        facts: dict[str, Any] = {"exit_code": exit_code(row), "row": facts_of(row)}
        facts["result"] = run.read_result() if row.scored else None
        facts["log_tail"] = "" if row.scored else run.log_tail()
        print_object(facts)
        return
    if row.status == "crash" and Flag.INTERRUPTED not in row.flags:
        print(run.log_tail())
    if row.scored:
        for key, value in run.read_result().items():
            print(f"{key}: {value}")
    print(f"run: {row.run}\nstatus: {row.status}\nreason: {row.reason}")
    if row.marks:
        print(f"marks: {row.marks}")
    sys.stdout.flush()


def dry_run(setting: Setting, source: bytes, seed: int = 1) -> tuple[Outcome, str]:
    """Train for a few seconds and score two rows: does a trainer run at all, given its source?

    Returns (outcome, end of the log). Nothing is recorded, and nothing of it stays. A limit that was missed
    while the machine did other things refutes no edit: the run itself will tell.
    """
    # Two rows: the score of one has no standard error.
    short = replace(setting, budget=DRY_BUDGET, val_tokens=2 * setting.track.seq_len)
    setting.data  # noqa: B018  prepares it
    kind = setting.platform.device_kind
    with DeviceLock(kind) as lock, scratch_folder() as scratch:
        lock.set_holder("dry run")
        copy = scratch / setting.trainer.name
        copy.write_bytes(source)
        run = RunDir(scratch)
        watch = Watch(kind)
        outcome = supervise(copy, run, short, seed, watch, lambda event: None, profiled=True)
        if outcome.status == "timeout" and (watch.findings() or outcome.findings):
            outcome.status = ""
        return outcome, run.log_tail()
