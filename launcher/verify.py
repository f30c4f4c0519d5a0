"""
`autoresearch verify`: score a saved run again, on val and on the sealed set, and compare with the baseline.

No run was selected on the sealed set. Where a run gains less there than on val, compared with the baseline's
weights on the same rows, by more than chance gives, its gain is in the validation rows alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from backends.dtype import BFLOAT16
from backends.platforms import StartSizes, from_json
from launcher import bytecode
from launcher.console import print_object, say
from launcher.device import DeviceLock
from launcher.disk_space import DiskSpace
from launcher.exit_codes import EXIT_CODES, EXIT_INTERRUPTED, EXIT_NO_VERDICT
from launcher.harness import source_hash
from launcher.ledger import REFUTED, UNVERIFIABLE, VERIFIED, Row
from launcher.processes import Stopped, stop_on_signals
from launcher.progress import Progress
from launcher.runs import find_run, ledger, now_utc, run_dir
from launcher.score import Job, NotScored, Score, ScoringPair
from launcher.setting import Setting, resolve
from launcher.verdict import board_runs
from launcher.walls import common_policy
from prepare import UserError, bits_per_byte

MATCH_TOLERANCE = 1e-3  # bits per byte: the same weights and rows, but perhaps another kernel
REFUTING = 4.0  # standard errors by which the gain on the sealed set is smaller than the one on val
SPLITS = ("val", "sealed")


@dataclass(frozen=True)
class Scores:
    """Both scores of one run's weights."""

    val: Score
    sealed: Score


@dataclass(frozen=True)
class Gap:
    """How much less a run gains on the sealed set than on val, in bits per byte."""

    value: float
    error: float

    @property
    def refutes(self) -> bool:
        return self.value > REFUTING * self.error


def verify_run(name: str, as_json: bool = False) -> int:
    """Score a saved run in fresh processes, record the outcome and print it. Returns the exit code.

    as_json: print one object
    """
    row = find_run(name)
    setting = setting_of(row)
    trainer, weights = saved(row)
    if trainer is None or weights is None:
        raise UserError(
            f"run {row.run} has no weights: those of the best run and of the baseline are kept, "
            "and those run with --keep-weights"
        )
    found = setting.data.current_fingerprint()
    if found != row.fingerprint:
        raise UserError(
            f"the prepared data has fingerprint {found}, run {row.run} had {row.fingerprint}: no verdict"
        )
    say(f"verifying {row.run} in fresh processes: val, then the sealed set")
    try:
        status, reason, scores = examine(row, setting, trainer, weights)
    except Stopped as stop:
        say(f"interrupted ({stop}): nothing is recorded")
        return EXIT_INTERRUPTED
    record(row, status, reason, scores)
    print_outcome(row, status, reason, scores, as_json)
    if status == UNVERIFIABLE:
        return EXIT_NO_VERDICT
    return 0 if status == VERIFIED else EXIT_CODES["invalid"]


def setting_of(row: Row) -> Setting:
    """Return the setting in which a run was made, with its dtype and its start where they are recorded."""
    setting = replace(resolve(row.platform, row.track, row.budget), val_tokens=row.val_tokens)
    platform = replace(setting.platform, start=start_of(row) or setting.platform.start)
    if row.dtype:
        platform = replace(platform, bf16=row.dtype == BFLOAT16)
    return replace(setting, platform=platform)


def start_of(row: Row) -> StartSizes | None:
    """Return the size that the constants of a run's trainer stand for; None where it is not recorded.

    The machine may have been measured anew since, or the entry changed.
    """
    recorded = run_dir(row.run).read_record().get("start")
    if not isinstance(recorded, dict):
        return None
    try:
        return from_json(StartSizes, recorded)
    except ValueError:
        return None


def saved(row: Row) -> tuple[Path | None, Path | None]:
    """Return (trainer, weights) of a run as they lie here, None for what does not."""
    run = run_dir(row.run)
    return run.trainer(), run.weights if run.weights.is_file() else None


def examine(row: Row, setting: Setting, trainer: Path, weights: Path) -> tuple[str, str, Scores | None]:
    """Return (status, reason, scores) of a run."""
    if source_hash(trainer.read_bytes()) != row.source:
        return REFUTED, f"the trainer in runs/{row.run} is not the one that was run", None
    recorded = run_dir(row.run).read_result().get("val_bpb")
    if recorded is None:
        return UNVERIFIABLE, f"runs/{row.run}/result.json is gone", None
    if recorded != row.val_bpb:
        return REFUTED, f"the ledger says {row.val_bpb:.6f}, runs/{row.run}/result.json {recorded}", None
    try:
        scores = Scores(*score_again(row, setting, trainer, weights, SPLITS))
    except NotScored as error:
        word = REFUTED if error.status == "invalid" else UNVERIFIABLE
        return word, error.reason, None
    moved = abs(scores.val.bpb - row.val_bpb)
    if moved > MATCH_TOLERANCE:
        reason = f"val_bpb is {scores.val.bpb:.6f} in a fresh process, the ledger says {row.val_bpb:.6f}"
        return REFUTED, reason, scores
    status, judged = compare_with_baseline(row, setting, scores)
    return status, f"val_bpb matches to {moved:.1e}; {judged}", scores


def score_again(
    row: Row,
    setting: Setting,
    trainer: Path,
    weights: Path,
    splits: Sequence[str],
    progress: Progress | None = None,
) -> list[Score]:
    """Return the score of weights on each of the splits. Raises NotScored.

    progress: what shows it; None: a line on the terminal
    """
    settings = setting.boxed_settings(row.seed, row.run)
    bytecode.compile_packages()
    policy = common_policy(trainer, setting.track, setting.data)
    run = run_dir(row.run)
    job = Job(trainer, run, settings, policy, setting.data, setting.bf16, DiskSpace(run.path))
    num_rows = dict.fromkeys(splits, setting.val_tokens // setting.track.seq_len)
    seconds = len(splits) * setting.platform.score_seconds
    progress = progress or Progress(0)
    with DeviceLock(setting.platform.device_kind) as lock:
        lock.set_holder(f"{row.run} (verify)")
        try:
            with stop_on_signals(), ScoringPair(job) as scoring:
                scoring.wait_until_ready(setting.platform.startup_seconds, progress)
                return scoring.score(weights, num_rows, seconds, progress)
        finally:
            progress.close()


def compare_with_baseline(row: Row, setting: Setting, scores: Scores) -> tuple[str, str]:
    """Return (status, reason) of the gap between val and sealed, judged against the baseline's."""
    first = board_runs(ledger().rows(), row.board)[:1]
    trainer, weights = saved(first[0]) if first else (None, None)
    if not first or trainer is None or weights is None:
        difference = scores.sealed.bpb - scores.val.bpb
        error = math.hypot(scores.sealed.stderr, scores.val.stderr)
        return VERIFIED, (
            f"sealed minus val is {difference:+.4f} +- {error:.4f}; "
            "there are no weights of the baseline to judge that against"
        )
    if first[0].run == row.run:
        return VERIFIED, "it is the baseline"
    try:
        baseline = Scores(*score_again(first[0], setting, trainer, weights, SPLITS))
    except NotScored as error:
        return VERIFIED, f"the baseline {first[0].run} could not be scored again ({error.reason})"
    gap = gap_between(scores, baseline)
    numbers = (
        f"its gain over the baseline is smaller on the sealed set by {gap.value:+.4f} +- {gap.error:.4f}"
    )
    if gap.refutes:
        return REFUTED, f"{numbers}: it learned the validation text"
    return VERIFIED, f"{numbers}: no sign that val is overfitted"


def gap_between(scores: Scores, baseline: Scores) -> Gap:
    """Return how much smaller the gain over the baseline is on the sealed set than on val."""
    val, val_error = difference_of(scores.val, baseline.val)
    sealed, sealed_error = difference_of(scores.sealed, baseline.sealed)
    return Gap(sealed - val, math.hypot(val_error, sealed_error))


def difference_of(score: Score, baseline: Score) -> tuple[float, float]:
    """Return how much higher a score is than the baseline's on the same documents, with its error."""
    return bits_per_byte(score.nats - baseline.nats, score.num_bytes)


def record(row: Row, status: str, reason: str, scores: Scores | None) -> None:
    """Add the outcome to the ledger."""
    outcome = replace(row, status=status, reason=reason, time=now_utc())
    if scores:
        outcome.val_bpb = round(scores.val.bpb, 6)
        outcome.val_stderr = round(scores.val.stderr, 6)
        outcome.sealed_bpb = round(scores.sealed.bpb, 6)
    ledger().append(outcome)


def print_outcome(row: Row, status: str, reason: str, scores: Scores | None, as_json: bool) -> None:
    """Print the scores of both splits and the verdict, greppable or as one object."""
    facts: dict[str, str | float] = {}
    for split in SPLITS if scores else ():
        score: Score = getattr(scores, split)
        facts[f"{split}_bpb"] = score.bpb
        facts[f"{split}_stderr"] = score.stderr
        facts[f"{split}_tokens"] = score.tokens
    facts.update(run=row.run, status=status, reason=reason)
    if as_json:
        print_object(facts)
        return
    for name, value in facts.items():
        print(f"{name}: {value:.6f}" if isinstance(value, float) else f"{name}: {value}")
