"""
`autoresearch confirm`: is a trainer better than another, by a test that a person may repeat to others?

Both are run with the same fresh seeds, pair after pair, and scored on the sealed set by a process that never
trained: no run was ever selected on that text. launcher/belief.py's claim says when there are enough. Runs
that an earlier `confirm` made of the same two trainers count, so that asking again is no second chance.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from backends.protocol import write_json
from launcher.belief import LOOKS, Claim, claim
from launcher.console import print_object, say
from launcher.exit_codes import EXIT_INTERRUPTED
from launcher.ledger import CONFIRMED, UNCONFIRMED, Flag, Row
from launcher.processes import Stopped
from launcher.progress import Progress
from launcher.run import Request, run_once
from launcher.runs import (
    find_run,
    ledger,
    now_utc,
    read_sealed,
    record_killed_runs,
    run_dir,
    sealed_path,
    trainer_of,
)
from launcher.score import NotScored
from launcher.setting import Setting, resolve
from launcher.verdict import best_run, board_runs, fresh_seed
from launcher.verify import score_again
from prepare import UserError

TRIES = 3  # runs of a seed that something else disturbed, before it is given up
SEALING = 1.2  # times a run is a run with its scoring on the sealed set


@dataclass(frozen=True)
class Contest:
    """Two trainers, each with a run that it is known by."""

    baseline: Row
    best: Row
    is_against_baseline: bool = True  # the first trainer of the board, not another that a person named

    @property
    def sources(self) -> tuple[str, str]:
        return self.baseline.source, self.best.source

    @property
    def seconds_a_pair(self) -> float:
        """What a run of each is expected to take, with their scoring on the sealed set."""
        return 2 * SEALING * max(self.baseline.total_seconds, self.best.total_seconds)


@dataclass(frozen=True)
class Pair:
    """A run of each trainer with one seed. Scores in bits per byte, sealed and val."""

    seed: int
    baseline_sealed: float
    best_sealed: float
    baseline_val: float
    best_val: float


@dataclass(frozen=True)
class Confirmation:
    """The answer, and what it rests on."""

    contest: Contest
    claim: Claim  # on the sealed set
    pairs: list[Pair]
    stopped: str = ""  # why there were no more runs although nothing was decided
    failed: int = 0  # runs of the best with a fresh seed that have no score: they are in no pair

    @property
    def sentence(self) -> str:
        """Return what a person may repeat."""
        answer = self.claim
        numbers = f"{answer.gain:.6f} [{answer.low:.6f}, {answer.high:.6f}] bits per byte"
        how = f"p {answer.p:.2g}, {answer.runs} runs of each"
        if self.failed:
            how += f"; {self.failed} more of its runs failed"
        if answer.verdict == "claim":
            than = "the baseline" if self.contest.is_against_baseline else f"run {self.contest.baseline.run}"
            return f"{numbers} better than {than}, on text that no run was selected on ({how})"
        if answer.runs < 2:
            return f"none: {self.stopped or answer.reason}"
        why = f"; {self.stopped}" if self.stopped else ""
        return f"none: a gain of {numbers} is not shown ({how}){why}"


def confirm_run(name: str, against: str, as_json: bool = False) -> int:
    """Test a run's trainer against another one's, print the answer and record it. Returns the exit code.

    as_json: print one object
    """
    record_killed_runs()
    contest = find_contest(name, against)
    row = contest.best
    setting = resolve(row.platform, row.track, row.budget)
    if setting.board != row.board:
        raise UserError(
            f"run {row.run} was made on {row.device} with data {row.fingerprint}: "
            "only there can it be confirmed"
        )
    try:
        confirmation = confirm(setting, contest)
    except Stopped as stop:
        say(f"interrupted ({stop}): the pairs so far count when it is called again")
        return EXIT_INTERRUPTED
    if as_json:
        print_object(facts_about(confirmation))
    else:
        print_confirmation(confirmation)
    return 0 if confirmation.claim.verdict == "claim" else 3


def find_contest(name: str, against: str) -> Contest:
    """Return the two trainers that the names mean.

    name: a run, or "best" for the trainer that is believed best. against: a run, or "baseline" for the first.

    Raises:
        UserError: there are no such runs, or they are not of one board, or of one trainer.
    """
    rows = ledger().rows()
    comparable = [row for row in rows if row.comparable]
    if not comparable:
        raise UserError("there is no scored run to confirm: autoresearch run")
    best = best_run(rows, comparable[-1].board) if name == "best" else find_run(name)
    assert best  # the board has a run
    first = board_runs(rows, best.board)[:1]
    baseline = first if against == "baseline" else [find_run(against)]
    if not best.comparable or not baseline or baseline[0].board != best.board:
        raise UserError(f"runs {best.run} and {against} are not of one board, or were not judged", 2)
    if baseline[0].source == best.source:
        raise UserError(f"run {best.run} has the trainer of {baseline[0].run}: there is nothing to claim", 2)
    return Contest(baseline[0], best, baseline[0].source == first[0].source)


def confirm(
    setting: Setting,
    contest: Contest,
    fits: Callable[[float], bool] = lambda seconds: True,
    show: Callable[[], Progress | None] = lambda: None,
) -> Confirmation:
    """Run pairs until the claim is decided, and record the answer.

    fits: says whether there is time for another pair, which takes so many seconds
    show: makes what shows the progress of a run; None: a line on the terminal

    Raises:
        UserError: a trainer's copy is gone.
        Stopped: it was interrupted. The pairs so far count when it is called again.
    """
    for row in (contest.baseline, contest.best):
        if trainer_of(row) is None:
            raise UserError(f"the trainer of run {row.run} is not here: runs/{row.run} was deleted")
    pairs = finished_pairs(contest)
    stopped = ""
    seconds = contest.seconds_a_pair
    say(
        f"confirm: {contest.best.run} ({contest.best.description}) against {contest.baseline.run} "
        f"({contest.baseline.description}), {len(pairs)} pairs of runs on record, {seconds:.0f} s a pair"
    )
    while (answer := test(pairs)).verdict == "go on":
        if not fits(seconds):
            stopped = "the time was over"
            break
        began = time.monotonic()
        try:
            pairs.append(run_pair(setting, contest, len(pairs), show))
        except PairFailed as failure:
            stopped = str(failure)
            break
        seconds = max(seconds, time.monotonic() - began)
        say(f"confirm: {len(pairs)} pairs: {test(pairs).reason}")
    confirmation = Confirmation(contest, answer, pairs, stopped, failed_runs(contest))
    record_confirmation(confirmation)
    return confirmation


def seconds_to_first_look(contest: Contest) -> float:
    """Return what the first answer still takes, 0 where there is one, or where none can be had."""
    if trainer_of(contest.baseline) is None or trainer_of(contest.best) is None:
        return 0.0
    pairs = finished_pairs(contest)
    if test(pairs).verdict != "go on":
        return 0.0
    return max(1, LOOKS[0] - len(pairs)) * contest.seconds_a_pair


def test(pairs: Sequence[Pair]) -> Claim:
    """Return the answer of the pairs so far, on the sealed set."""
    return claim([pair.baseline_sealed for pair in pairs], [pair.best_sealed for pair in pairs])


def finished_pairs(contest: Contest) -> list[Pair]:
    """Return the pairs that earlier calls ran, in the order of their seeds."""
    runs: dict[tuple[str, int], Row] = {}
    for row in board_runs(ledger().rows(), contest.best.board):
        if Flag.CONFIRM in row.flags and row.source in contest.sources:
            runs.setdefault((row.source, row.seed), row)
    baseline, best = contest.sources
    seeds = sorted(seed for source, seed in runs if source == baseline and (best, seed) in runs)
    return [pair for seed in seeds if (pair := pair_of(runs[baseline, seed], runs[best, seed]))]


def failed_runs(contest: Contest) -> int:
    """Return how many runs of the best with a fresh seed crashed, took too long, or were invalid."""
    return sum(
        row.source == contest.best.source and Flag.CONFIRM in row.flags and row.judged and not row.scored
        for row in ledger().rows()
        if row.board == contest.best.board
    )


def pair_of(baseline: Row, best: Row) -> Pair | None:
    """Return the scores of two runs of one seed, None where a sealed one is not on record."""
    baseline_sealed = read_sealed(baseline.run)
    best_sealed = read_sealed(best.run)
    if baseline_sealed is None or best_sealed is None:
        return None
    return Pair(baseline.seed, baseline_sealed, best_sealed, baseline.val_bpb, best.val_bpb)


class PairFailed(Exception):
    """A trainer has no score with a fresh seed. The message says which and why."""


def run_pair(setting: Setting, contest: Contest, number: int, show: Callable[[], Progress | None]) -> Pair:
    """Run both trainers with one fresh seed, in turns the one and the other first: a device may warm up.

    Raises:
        PairFailed: one of them has no score.
        Stopped: it was interrupted.
    """
    seed = fresh_seed(ledger().rows(), contest.sources)
    order = [contest.baseline, contest.best]
    if number % 2:
        order.reverse()
    made = {row.source: run_and_seal(setting, row, seed, show) for row in order}
    baseline, best = contest.sources
    pair = pair_of(made[baseline], made[best])
    if pair is None:
        raise PairFailed("a score on the sealed set was written and cannot be read: is the disk full?")
    return pair


def run_and_seal(setting: Setting, known: Row, seed: int, show: Callable[[], Progress | None]) -> Row:
    """Run a trainer with a fresh seed, score it on the sealed set, and drop its weights.

    Raises:
        PairFailed: it has no score.
        Stopped: it was interrupted.
    """
    request = Request(
        setting,
        f"confirm, seed {seed}: {known.description}",
        seed,
        trainer=trainer_of(known),
        commit=known.commit,
        keep_weights=True,
        flags=(Flag.CONFIRM,),
    )
    for _ in range(TRIES):
        row = run_once(replace(request, progress=show()))
        if Flag.INTERRUPTED in row.flags:
            raise Stopped("during a run")
        if row.comparable:
            break
        if not row.scored:
            raise PairFailed(
                f"the trainer of {known.run} ended as {row.status} with seed {seed}: {row.reason}"
            )
    else:
        raise PairFailed(f"the trainer of {known.run} was disturbed {TRIES} times: {row.reason}")
    run = run_dir(row.run)
    copy = run.trainer()
    assert copy  # it was just run
    try:
        [score] = score_again(row, setting, copy, run.weights, ["sealed"], show())
    except NotScored as error:
        raise PairFailed(f"run {row.run} could not be scored on the sealed set: {error.reason}") from None
    finally:
        run.weights.unlink(missing_ok=True)
        run.keep_weights.unlink(missing_ok=True)
    sealed = {"sealed_bpb": score.bpb, "sealed_stderr": score.stderr}
    write_json(sealed_path(row.run), sealed)
    return row


def record_confirmation(confirmation: Confirmation) -> None:
    """Write the answer beside the run, and a row about it into the ledger where it is about the baseline."""
    answer = confirmation.claim
    best = confirmation.contest.best
    if answer.runs < 2:
        return
    data = facts_about(confirmation)
    folder = run_dir(best.run).path
    if folder.is_dir():
        write_json(Path(folder) / "claim.json", data)
    if not confirmation.contest.is_against_baseline:
        return
    row = replace(
        best,
        status=CONFIRMED if answer.verdict == "claim" else UNCONFIRMED,
        sealed_bpb=fmean(pair.best_sealed for pair in confirmation.pairs),
        effect=-answer.gain,
        effect_error=(answer.high - answer.low) / 2,
        reason=confirmation.sentence,
        time=now_utc(),
    )
    ledger().append(row)


def facts_about(confirmation: Confirmation) -> dict[str, Any]:
    """Return the answer and what it rests on, for a program."""
    return {
        **asdict(confirmation.claim),
        "sentence": confirmation.sentence,
        "baseline": confirmation.contest.baseline.run,
        "best": confirmation.contest.best.run,
        "pairs": [asdict(pair) for pair in confirmation.pairs],
    }


def print_confirmation(confirmation: Confirmation) -> None:
    """Print the answer, greppable; the sentence that a person may repeat comes first."""
    answer = confirmation.claim
    print(f"claim: {confirmation.sentence}")
    for name in ("gain", "low", "high", "p"):
        print(f"{name}: {getattr(answer, name):.6g}")
    print(f"runs_of_each: {answer.runs}")
    if confirmation.pairs:
        val_gain = fmean(pair.baseline_val - pair.best_val for pair in confirmation.pairs)
        print(f"val_gain: {val_gain:.6f}")
    print(f"run: {confirmation.contest.best.run}")
    print(f"against: {confirmation.contest.baseline.run}")
    print(f"verdict: {answer.verdict}")
    if answer.verdict == "go on":
        print("not decided: call it again, and it goes on with further seeds")
