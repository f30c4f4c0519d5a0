"""What the report tells: the runs of ledgers, what is believed of them now, and what they took.

Rows -> a series for each board, with a Run for each row -> headline, counts, failures, devices. Nothing here
reads a file or writes HTML.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from launcher.belief import Standing, Survey
from launcher.board import Boards, is_refuted, why_unranked
from launcher.ledger import CONFIRMED, EVIDENCE, STATUSES, BoardKey, Flag, Row, Rows
from launcher.report.text import clock, plural, round_numbers, with_error
from launcher.verdict import best_since_moved, current_source, lineage, survey_board

NEAR_MISSES = 10
MOST_SERIES = 6  # that are drawn
LARGEST = 1000.0  # bits per byte; a score beyond it is a mistake in the record
LAST_SECOND = 2.0**33  # Unix time, the year 2242; a later one likewise
PAUSE = 3600.0  # seconds without a run, from which they count as a break and not as part of the night
DECIMALS = 4  # of val_bpb where the noise is unknown
PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # a ledger of elsewhere may name any path as a run's id
SHOWN_SHARE = 0.85  # of the values, up to which a figure reaches; those above lie at its upper edge


@dataclass(frozen=True)
class Effect:
    """What an edit does to val_bpb, in bpb: negative is a gain. None: not known."""

    value: float
    error: float | None = None
    p_better: float | None = None


class Estimate(NamedTuple):
    """What is believed of a trainer's val_bpb."""

    mean: float
    error: float


@dataclass(frozen=True)
class Run:
    """One run, as the page tells it."""

    row: Row
    id: str  # the run's, or one made up where that can name no file; no other run of a report has it
    number: int  # its place in the figure, from 1; 0: it decides nothing (noise, confirm) and has none
    start: float | None  # Unix seconds
    effect: Effect | None  # of its edit, as believed now
    built_on: float | None  # val_bpb of the trainer that was built on after it
    belief: Estimate | None  # of that trainer's val_bpb, as believed then
    is_current: bool  # its edit is in the trainer that is built on at the end
    why: str  # it does not rank, "" where it does
    is_refuted: bool = False  # by `verify`

    @property
    def name(self) -> str:
        return self.row.run or self.row.commit or self.id

    @property
    def kind(self) -> str:
        """Return kept, discarded, failed or evidence: what the page colours by."""
        if self.row.flags & EVIDENCE:
            return "evidence"
        if not self.row.scored:
            return "failed"
        return "kept" if self.row.status == "keep" and not self.is_refuted else "discarded"

    @property
    def status(self) -> str:
        """Return the status, with what sets the run apart; of a run that decided nothing, that alone."""
        flags = [flag for flag in self.row.ordered_flags if flag != Flag.SHORTER]
        flags += ["refuted"] if self.is_refuted else []
        decided = self.kind != "evidence" or not self.has_value
        return ", ".join([self.row.status, *flags] if decided else flags)

    @property
    def has_value(self) -> bool:
        """Return whether val_bpb is a score."""
        return is_scored(self.row)

    @property
    def is_decided(self) -> bool:
        """Return whether the run has a verdict. What another tool wrote has the one that it says."""
        return self.row.judged or (self.row.scored and not self.row.rules)


@dataclass(frozen=True)
class Series:
    """The runs of one figure, oldest first: those of a board, or of a ledger that another tool wrote."""

    title: str
    detail: str
    device: str
    is_ranked: bool
    runs: list[Run]
    survey: Survey | None
    best_source: str = ""  # of the trainer that is believed best of those that the search may build on

    @cached_property
    def drawn(self) -> list[Run]:
        """Return the runs of the figure, failures included: all but those that decide nothing."""
        return [run for run in self.runs if run.number]

    @cached_property
    def scored(self) -> list[Run]:
        return [run for run in self.drawn if run.has_value]

    @cached_property
    def baseline(self) -> Run:
        """Return the first run that compares; where none does, the first that has a score."""
        comparable = [run for run in self.scored if run.row.comparable and not run.is_refuted]
        return (comparable or self.scored)[0]

    @property
    def best(self) -> Run:
        """Return the last run of the trainer that is believed best; without a belief, the lowest kept one."""
        believed = [run for run in self.scored if self.best_source and run.row.source == self.best_source]
        comparable = [run for run in believed if run.row.comparable and not run.is_refuted]
        if comparable:
            return comparable[-1]
        kept = [run for run in self.scored if run.kind == "kept"]
        return min(kept or self.scored, key=lambda run: run.row.val_bpb)

    def standing(self, run: Run) -> Standing | None:
        """Return what is believed of a run's trainer now, None without a belief."""
        standing = self.survey.trainers.get(run.row.source) if self.survey else None
        return standing if standing and 0 < standing.mean < LARGEST else None

    def is_of_baseline(self, run: Run) -> bool:
        """Return whether a run has the baseline's trainer."""
        baseline = self.baseline
        if not baseline.row.source:
            return run is baseline
        return run.row.source == baseline.row.source

    @property
    def edits(self) -> list[list[Run]]:
        """Return the runs of each edit: repeats, and runs without a verdict, are of one."""
        edits: dict[str, list[Run]] = {}
        for run in self.drawn:
            if not (self.is_of_baseline(run) or run.row.is_of_committed):
                edits.setdefault(run.row.source or run.id, []).append(run)
        return list(edits.values())

    @property
    def kept(self) -> list[Run]:
        """Return the kept edits, the largest gains first. The baseline is none."""
        kept = [
            run
            for run in self.scored
            if not self.is_of_baseline(run) and (run.kind == "kept" or (run.is_current and run.effect))
        ]
        return sorted(kept, key=lambda run: run.effect.value if run.effect else 0.0)

    @property
    def near_misses(self) -> list[Run]:
        """Return the discards that may well be gains, the best first."""
        kept = {run.id for run in self.kept}
        missed = [(run.effect.value, run) for run in self.scored if run.effect and run.id not in kept]
        return [run for _, run in sorted(missed, key=lambda pair: pair[0])[:NEAR_MISSES]]

    @property
    def decimals(self) -> int:
        """Return how many decimals of val_bpb say something: the seed noise then has one or two digits."""
        if not self.survey or not 0 < self.survey.sigma < 1:
            return DECIMALS
        return min(6, max(3, math.ceil(0.5 - math.log10(self.survey.sigma))))


# ---------------------------------------------------------------------------
# Rows -> series
# ---------------------------------------------------------------------------


def collect_series(boards: Boards) -> list[Series]:
    """Return a series for each board and other group of scored runs. That of the newest run is first."""
    known = {board.key for board in boards.boards}
    groups: dict[BoardKey | str, list[Row]] = {board.key: [] for board in boards.boards}
    for row in sorted(all_rows(boards), key=lambda row: (row.time, row.run)):
        if Flag.DRY not in row.flags:
            groups.setdefault(row.board if row.rules else row.ledger, []).append(row)
    found = [
        make_series(key, rows, boards, key in known, number)
        for number, (key, rows) in enumerate(groups.items())
        if any(is_scored(row) and not row.flags & EVIDENCE for row in rows)
    ]
    return sorted(found, key=lambda one: max(run.start or 0.0 for run in one.drawn), reverse=True)


def all_rows(boards: Boards) -> list[Row]:
    """Return every run of the ledgers, the rows of each file in their order."""
    return boards.runs


def make_series(
    key: BoardKey | str, rows: Sequence[Row], boards: Boards, is_ranked: bool, number: int
) -> Series:
    """Return the series of a board, or of a ledger of another tool, from its rows in time order.

    number: of the series in the report.
    """
    if isinstance(key, str):
        detail = "from another tool: its rules are unknown, and nothing of it is verified"
        runs = make_runs(rows, None, boards, number)
        return Series(Path(key).name, detail, Path(key).name, False, runs, None)
    survey = None
    best = ""
    moves = [row for row in boards.moves if row.board == key]
    if all(row.source for row in rows if row.comparable):
        known = Rows(sorted([*rows, *boards.verifications.values(), *moves], key=lambda row: row.time))
        survey = survey_board(known, key)
        best = best_source(known, key, survey)
    detail = (
        f"{key.platform}, {key.budget:g} s, {key.val_tokens:,} tokens scored, "
        f"rules {key.rules}, data {key.fingerprint[:8]}"
    )
    title = f"{key.track} on {key.device}"
    if any(board.key == key for board in boards.practice):
        title += ", practice"
        detail += f"; practice: a budget of {key.budget:g} s never ranks"
    elif not is_ranked:
        example = next(row for row in rows if row.scored)
        detail += f"; not ranked: {why_unranked(example, boards.verifications)}"
    runs = make_runs(rows, survey, boards, number, moves)
    return Series(title, detail, key.device, is_ranked, runs, survey, best)


def best_source(rows: Sequence[Row], board: BoardKey, survey: Survey | None) -> str:
    """Return the source of the trainer that a loop would call the best, "" without a belief.

    Where the rows are of several machines, no line of trainers is that of one branch: it is the best of all.
    """
    if survey is None:
        return ""
    if len({row.ledger for row in rows if row.board == board}) > 1:
        return survey.best
    best = best_since_moved(rows, board, current_source(rows))
    return best.source if best else survey.best


def make_runs(
    rows: Sequence[Row], survey: Survey | None, boards: Boards, series: int, moves: Sequence[Row] = ()
) -> list[Run]:
    """Return the runs of a series, of which `series` is the number. rows: in time order."""
    ranked = {id(row) for board in (*boards.boards, *boards.practice) for row in board.rows}
    values = values_built_on(rows)
    beliefs = beliefs_built_on(rows)
    effects = [believed_effect(survey, row) for row in rows] if survey else plain_effects(rows)
    everything = sorted([*rows, *moves], key=lambda row: row.time)
    current = lineage(survey, current_source(everything)) if survey else set()
    number = 0
    runs = []
    for at, row in enumerate(rows):
        decides = not row.flags & EVIDENCE
        number += decides
        why = "" if id(row) in ranked else why_unranked(row, boards.verifications)
        run = Run(
            row=row,
            id=row.run if PLAIN_NAME.fullmatch(row.run) else f"s{series}.{at + 1}",
            number=number if decides else 0,
            start=unix_time(row.time),
            effect=effects[at] if decides else None,
            built_on=values[at],
            belief=beliefs[at],
            is_current=row.source in current,
            why=why,
            is_refuted=is_refuted(row, boards.verifications),
        )
        runs.append(run)
    return runs


def believed_effect(survey: Survey, row: Row) -> Effect | None:
    """Return what is believed now of the edit that made a run's trainer; None where it was made by none."""
    standing = survey.trainers.get(row.source)
    if standing is None or not standing.parent or not row.scored or not math.isfinite(standing.effect):
        return None
    return Effect(standing.effect, standing.effect_error, standing.p_better)


def plain_effects(rows: Iterable[Row]) -> list[Effect | None]:
    """Return how far each scored run is from the one kept before it: all that is known without a belief."""
    kept: float | None = None
    effects: list[Effect | None] = []
    for row in rows:
        scored = is_scored(row)
        effects.append(Effect(row.val_bpb - kept) if scored and kept is not None else None)
        if scored and row.status == "keep" and not row.flags & EVIDENCE:
            kept = row.val_bpb
    return effects


def values_built_on(rows: Iterable[Row]) -> list[float | None]:
    """Return, after each row, the val_bpb of the trainer that is built on; None before the first kept one.

    It rises where the search goes back to an earlier trainer.
    """
    values: dict[str, float] = {}
    current: float | None = None
    followed = []
    for row in rows:
        if is_scored(row) and not row.flags & EVIDENCE:
            values[row.source] = row.val_bpb
            if row.status == "keep":
                current = row.val_bpb
            elif row.build_on and row.build_on in values:
                current = values[row.build_on]
        followed.append(current)
    return followed


def beliefs_built_on(rows: Iterable[Row]) -> list[Estimate | None]:
    """Return, after each row, what was believed then of the trainer that is built on; None: not on record."""
    current: Estimate | None = None
    followed = []
    for row in rows:
        if 0 < row.belief_after < LARGEST and 0 <= row.belief_after_error < LARGEST:
            current = Estimate(row.belief_after, row.belief_after_error)
        followed.append(current)
    return followed


def value_limits(values: Iterable[float], first: float) -> tuple[float, float]:
    """Return the range of val_bpb that a figure shows.

    It reaches from the lowest to most of the values, and to the baseline `first`. What failed far above does
    not flatten the rest.
    """
    ordered = sorted(values)
    low = ordered[0]
    high = ordered[min(len(ordered) - 1, int(SHOWN_SHARE * len(ordered)))]
    usual = ordered[len(ordered) // 2]
    high = max(min(high, low + 4 * (usual - low)), first, usual)
    margin = 0.08 * (high - low) or 0.01 * low
    return low - margin, high + margin


# ---------------------------------------------------------------------------
# The headline and the counts
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """What the page and the card begin with."""

    large: str
    is_claim: bool
    lines: list[str]  # what stands under it


@dataclass(frozen=True)
class Counts:
    """What runs took, and what became of the edits. Each edit that was run counts once."""

    hours: float
    experiments: int  # edits that were run
    kept: int
    discarded: int
    failed: int
    no_verdict: int  # interrupted, or something else used the device
    refused: int  # edits that failed their dry run: they are no experiments
    kwh: float

    @property
    def line(self) -> str:
        """Return the counts in a line."""
        parts = [plural(self.experiments, "experiment")]
        if self.hours >= 0.05:
            rate = self.experiments / self.hours
            parts = [f"{self.hours:.1f} hours", *parts, f"{rate:.1f} an hour"]
        parts += [f"{self.kept} kept", f"{self.discarded} discarded", f"{self.failed} failed"]
        parts += [f"{self.no_verdict} without a verdict"] if self.no_verdict else []
        parts += [f"{plural(self.refused, 'edit')} refused by a dry run"] if self.refused else []
        parts += [f"{self.kwh:.2f} kWh"] if self.kwh else []
        return ", ".join(parts)


def write_headline(series: Sequence[Series], claims: Mapping[str, Row], offset: float = 0.0) -> Headline:
    """Return what may be said of the first series: its claim, else what is believed and not confirmed.

    claims: Boards.claims. offset: of the local time, seconds east of UTC.
    """
    first = series[0]
    runs = {run.row.run for run in first.runs}
    about = sorted((row for run, row in claims.items() if run in runs), key=lambda row: row.time)
    tests = list({row.source or row.run: row for row in about}.values())  # the last one of each trainer
    shown = [row for row in tests if row.status == CONFIRMED]
    if not shown:
        return headline_of_belief(first, tests, offset)
    of_best = [row for row in shown if is_of_trainer(row, first.best)]
    return headline_of_claim(first, (of_best or shown)[-1], tests, offset)


def headline_of_claim(series: Series, claim: Row, tests: Sequence[Row], offset: float) -> Headline:
    """Return a claim with its date, and what is believed since. tests: of the series, the last one last."""
    digits = series.decimals
    best = series.best
    lines = [
        f"«{claim.description}», claimed on {date_of(claim, offset)}:",
        f"{round_numbers(claim.reason, digits)}.",
    ]
    if series.is_of_baseline(best):
        lines.append("By now no trainer is believed better than the baseline.")
    elif not is_of_trainer(claim, best):
        now = f"Believed better by now: «{best.row.description}», val_bpb {believed_value(series, best)}"
        lines += [f"{now}, not confirmed.", tell_test(best, tests, digits, offset)]
    large = f"{-claim.effect:.{digits}f} bits per byte better than the baseline"
    return Headline(large, True, lines)


def headline_of_belief(series: Series, tests: Sequence[Row], offset: float) -> Headline:
    """Return what is believed of the best trainer, and that it is not confirmed."""
    digits = series.decimals
    best = series.best
    large = f"val_bpb {believed_value(series, best)}, not confirmed"
    if series.is_of_baseline(best):
        lines = ["Nothing is believed better than the baseline."]
    else:
        lines = [f"«{best.row.description}»: {tell_gain(series, best)}."]
    if not series.is_ranked:
        lines.append(f"{series.detail[0].upper()}{series.detail[1:]}.")
    if tests or (series.is_ranked and not series.is_of_baseline(best)):
        lines.append(tell_test(best, tests, digits, offset))
    return Headline(large, False, lines)


def believed_value(series: Series, run: Run) -> str:
    """Return what is believed of a run's trainer, with its error; without a belief, the run's own score."""
    standing = series.standing(run)
    if standing is None:
        return f"{run.row.val_bpb:.{series.decimals}f}"
    return with_error(standing.mean, standing.error, series.decimals)


def tell_gain(series: Series, best: Run) -> str:
    """Return how far the best trainer is below the baseline, both as they are believed."""
    first = series.baseline
    here, there = series.standing(best), series.standing(first)
    value = here.mean if here and there else best.row.val_bpb
    start = there.mean if here and there else first.row.val_bpb
    gain = start - value
    numbers = f"{abs(gain):.{series.decimals}f} ({100 * abs(gain) / start:.2f}%)"
    return f"{numbers} {'below' if gain >= 0 else 'above'} the baseline, {believed_value(series, first)}"


def tell_test(best: Run, tests: Sequence[Row], digits: int, offset: float) -> str:
    """Return what the last test of the best trainer gave; without one, the last test, or how it is tested."""
    how = "Not tested yet: autoresearch confirm runs it anew, on text that no run was selected on."
    own = [row for row in tests if is_of_trainer(row, best)]
    if own:
        answer = round_numbers(own[-1].reason, digits)
        return f"The claim that was tested on {date_of(own[-1], offset)}: {answer}."
    failed = [row for row in tests if row.status != CONFIRMED]
    if not failed:
        return how
    last = failed[-1]
    answer = round_numbers(last.reason, digits)
    return f"Not tested yet. The claim of «{last.description}», tested on {date_of(last, offset)}: {answer}."


def is_of_trainer(row: Row, run: Run) -> bool:
    """Return whether a row about a run is about the trainer of another one."""
    return row.source == run.row.source if row.source else row.run == run.row.run


def date_of(row: Row, offset: float) -> str:
    """Return the day of a row, as the clock has it that is `offset` seconds ahead of UTC."""
    return clock(unix_time(row.time), offset, "%Y-%m-%d") or "an unknown day"


def count(
    series: Iterable[Series], rows: Iterable[Row], chosen: Callable[[Row], bool] = lambda row: True
) -> Counts:
    """Return the counts of all series.

    Args:
        series: all of a report.
        rows: every row of the ledgers: of what was refused, and of boards on which nothing was scored.
        chosen: says whether a row counts: those of one night.
    """
    series = list(series)
    rows = [row for row in rows if chosen(row)]
    runs = [run for one in series for run in one.runs if chosen(run.row)]
    edits = [[run for run in edit if chosen(run.row)] for one in series for edit in one.edits]
    ended = Counter(outcome_of(edit) for edit in edits if edit)
    told = {id(run.row) for run in runs}
    others = [row for row in rows if id(row) not in told and row.status in STATUSES]
    others = [row for row in others if not (row.flags & {*EVIDENCE, Flag.DRY} or row.is_of_committed)]
    ended.update("failed" if row.judged else "no verdict" for row in others)
    return Counts(
        hours=hours_of(runs),
        experiments=ended.total(),
        kept=ended["kept"],
        discarded=ended["discarded"],
        failed=ended["failed"],
        no_verdict=ended["no verdict"],
        refused=sum(Flag.DRY in row.flags for row in rows),
        kwh=sum(finite(run.row.energy_kj) for run in runs) / 3600,
    )


def outcome_of(edit: Sequence[Run]) -> str:
    """Return what became of an edit: kept, discarded, failed, or no verdict. Its last verdict counts."""
    decided = [run for run in edit if run.is_decided]
    return decided[-1].kind if decided else "no verdict"


def hours_of(runs: Iterable[Run]) -> float:
    """Return the hours in which runs were made; a gap longer than PAUSE is none of them."""
    spans = sorted(
        (run.start, run.start + finite(run.row.total_seconds)) for run in runs if run.start is not None
    )
    seconds = spans[0][1] - spans[0][0] if spans else 0.0
    end = spans[0][1] if spans else 0.0
    for begin, stop in spans[1:]:
        if stop > end:
            gap = begin - end
            seconds += stop - (end if gap <= PAUSE else begin)
            end = stop
    return seconds / 3600


@dataclass(frozen=True)
class FailureGroup:
    """Runs that failed alike."""

    status: str
    reason: str  # with N for its numbers
    rows: list[Row]


def group_failures(rows: Iterable[Row]) -> list[FailureGroup]:
    """Return the runs and dry runs without a score by their reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not row.scored:
            reason = re.sub(r"\d+(\.\d+)?", "N", row.reason or "no reason on record")
            status = f"dry run: {row.status}" if Flag.DRY in row.flags else row.status
            groups.setdefault((status, reason), []).append(row)
    found = [FailureGroup(status, reason, members) for (status, reason), members in groups.items()]
    return sorted(found, key=lambda group: -len(group.rows))


# ---------------------------------------------------------------------------
# Devices and agents against each other
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class FigureLine:
    """A line of a figure."""

    label: str
    x: list[float]
    y: list[float]


def gains_over_time(series: Iterable[Series]) -> list[FigureLine]:
    """Return a line a series: hours since its first run, percent below its baseline of what is built on."""
    lines = []
    for one in series:
        start = one.baseline.start
        first = one.baseline.row.val_bpb
        x = []
        y = []
        for run in one.drawn:
            if start is not None and run.start is not None and run.built_on is not None:
                x.append(round((run.start - start) / 3600, 3))
                y.append(round(100 * (first - run.built_on) / first, 3))
        if len(x) > 1:
            lines.append(FigureLine(one.title, x, y))
    return lines


def agents_of(runs: Iterable[Run]) -> list[str]:
    """Return the agents that made edits, in the order of their first run; a person is none of them."""
    return list(dict.fromkeys(run.row.agent for run in runs if run.row.agent))


def bests_of_agents(series: Series) -> list[FigureLine]:
    """Return a line an agent: number of its experiments, lowest val_bpb that it kept so far."""
    lines = []
    for agent in agents_of(series.runs):
        best = math.inf
        x: list[float] = []
        y: list[float] = []
        own = [edit for edit in series.edits if edit[0].row.agent == agent]
        for number, edit in enumerate(own, 1):
            kept = [run.row.val_bpb for run in edit if run.kind == "kept" and run.has_value]
            best = min([best, *kept])
            if best < math.inf:
                x.append(number)
                y.append(best)
        lines.append(FigureLine(agent, x, y))
    return lines


# ---------------------------------------------------------------------------
# Small things
# ---------------------------------------------------------------------------


def is_scored(row: Row) -> bool:
    """Return whether a row has a val_bpb that can be drawn."""
    return row.scored and 0 < row.val_bpb < LARGEST


def finite(value: float) -> float:
    """Return the number, 0 for one that is none: a ledger may hold nan and infinity."""
    return value if math.isfinite(value) else 0.0


def unix_time(text: str) -> float | None:
    """Return a time of the ledger in Unix seconds, None where it is none."""
    try:
        moment = datetime.fromisoformat(text)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
    return seconds if 0 <= seconds < LAST_SECOND else None
