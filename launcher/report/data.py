"""What the report tells: the runs of ledgers, what is believed of them now, and what they took.

Rows -> a series for each board, with a Run for each row -> headline, counts, failures, devices. Nothing here
reads a file or writes HTML.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from launcher.belief import Survey
from launcher.board import Boards, why_unranked
from launcher.ledger import CONFIRMED, EVIDENCE, BoardKey, Flag, Row
from launcher.report.text import plural, round_numbers
from launcher.verdict import lineage, survey_board

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
    number: int  # of the experiment in its series, from 1; 0: it decides nothing (noise, confirm)
    start: float | None  # Unix seconds
    effect: Effect | None  # of its edit, as believed now
    built_on: float | None  # val_bpb of the trainer that was built on after it
    belief: Estimate | None  # of that trainer's val_bpb, as believed then
    is_current: bool  # its edit is in the trainer that is built on at the end
    why: str  # it stands on no board, "" where it does

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
        return "kept" if self.row.status == "keep" else "discarded"

    @property
    def status(self) -> str:
        """Return the status, with what sets the run apart; of a run that decided nothing, that alone."""
        flags = [flag for flag in self.row.marks.split(",") if flag and flag != Flag.SHORTER]
        decided = self.kind != "evidence" or not self.has_value
        return ", ".join([self.row.status, *flags] if decided else flags)

    @property
    def has_value(self) -> bool:
        """Return whether val_bpb is a score."""
        return is_scored(self.row)


@dataclass(frozen=True)
class Series:
    """The runs of one figure, oldest first: those of a board, or of a ledger that another tool wrote."""

    title: str
    detail: str
    device: str
    is_ranked: bool
    runs: list[Run]
    survey: Survey | None

    @property
    def experiments(self) -> list[Run]:
        """Return the runs that decided something, failures included."""
        return [run for run in self.runs if run.number]

    @property
    def scored(self) -> list[Run]:
        return [run for run in self.experiments if run.has_value]

    @property
    def baseline(self) -> Run:
        return self.scored[0]

    @property
    def best(self) -> Run:
        """Return the lowest run of the trainer that is believed best; without one, the lowest kept."""
        runs = self.scored
        if self.survey:
            runs = [run for run in runs if run.row.source == self.survey.best] or runs
        else:
            runs = [run for run in runs if run.kind == "kept"] or runs
        return min(runs, key=lambda run: run.row.val_bpb)

    @property
    def kept(self) -> list[Run]:
        """Return the kept edits, the largest gains first. The first run is none."""
        kept = [run for run in self.scored[1:] if run.kind == "kept" or (run.is_current and run.effect)]
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
    """Return a series for each board, then one for each other group of scored runs, the largest first."""
    known = {board.key for board in boards.boards}
    groups: dict[BoardKey | str, list[Row]] = {board.key: [] for board in boards.boards}
    for row in sorted(all_rows(boards), key=lambda row: (row.time, row.run)):
        if Flag.DRY not in row.flags:
            groups.setdefault(row.board if row.rules else row.ledger, []).append(row)
    ranked: list[Series] = []
    others: list[Series] = []
    for number, (key, rows) in enumerate(groups.items()):
        if any(is_scored(row) and not row.flags & EVIDENCE for row in rows):
            series = make_series(key, rows, boards, key in known, number)
            (ranked if series.is_ranked else others).append(series)
    return ranked + sorted(others, key=lambda series: -len(series.runs))


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
    if all(row.source for row in rows if row.comparable):
        survey = survey_board([*rows, *boards.verifications.values()], key)
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
    runs = make_runs(rows, survey, boards, number)
    return Series(title, detail, key.device, is_ranked, runs, survey)


def make_runs(rows: Sequence[Row], survey: Survey | None, boards: Boards, series: int) -> list[Run]:
    """Return the runs of a series, of which `series` is the number. rows: in time order."""
    ranked = {id(row) for board in (*boards.boards, *boards.practice) for row in board.rows}
    values = follow(rows)
    beliefs = follow_beliefs(rows)
    effects = [believed_effect(survey, row) for row in rows] if survey else plain_effects(rows)
    current = lineage(survey, current_source(rows)) if survey else set()
    number = 0
    runs = []
    for at, row in enumerate(rows):
        is_experiment = not row.flags & EVIDENCE
        number += is_experiment
        why = "" if id(row) in ranked else why_unranked(row, boards.verifications)
        run = Run(
            row=row,
            id=row.run if PLAIN_NAME.fullmatch(row.run) else f"s{series}.{at + 1}",
            number=number if is_experiment else 0,
            start=unix_time(row.time),
            effect=effects[at] if is_experiment else None,
            built_on=values[at],
            belief=beliefs[at],
            is_current=row.source in current,
            why=why,
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


def follow(rows: Iterable[Row]) -> list[float | None]:
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


def follow_beliefs(rows: Iterable[Row]) -> list[Estimate | None]:
    """Return, after each row, what was believed then of the trainer that is built on; None: not on record."""
    current: Estimate | None = None
    followed = []
    for row in rows:
        if 0 < row.belief_after < LARGEST and 0 <= row.belief_after_error < LARGEST:
            current = Estimate(row.belief_after, row.belief_after_error)
        followed.append(current)
    return followed


def current_source(rows: Sequence[Row]) -> str:
    """Return the source of the trainer that is built on after the last row, "" when there is none."""
    for row in reversed(rows):
        if row.build_on:
            return row.build_on
        if row.status == "keep":
            return row.source
    return ""


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
    """What the runs took, and what became of them."""

    hours: float
    experiments: int
    kept: int
    interrupted: int
    failed: int
    refused: int  # edits that failed their dry run
    kwh: float

    @property
    def line(self) -> str:
        """Return the counts in a line."""
        parts = [plural(self.experiments, "experiment")]
        if self.hours >= 0.05:
            rate = self.experiments / self.hours
            parts = [f"{self.hours:.1f} hours", *parts, f"{rate:.1f} an hour"]
        parts += [f"{self.kept} kept", f"{self.failed} failed"]
        parts += [f"{self.interrupted} interrupted"] if self.interrupted else []
        parts += [f"{plural(self.refused, 'edit')} refused by a dry run"] if self.refused else []
        parts += [f"{self.kwh:.2f} kWh"] if self.kwh else []
        return ", ".join(parts)


def write_headline(series: Sequence[Series], claims: Mapping[str, Row]) -> Headline:
    """Return the claim, or without one the best value of the first series, and that it is not confirmed."""
    first = series[0]
    digits = first.decimals
    runs = {run.id for run in first.runs}
    about = sorted((row for run, row in claims.items() if run in runs), key=lambda row: row.time)
    shown = [row for row in about if row.status == CONFIRMED]
    if shown:
        row = shown[-1]
        large = f"{-row.effect:.{digits}f} bits per byte better than the baseline"
        return Headline(large, True, [f"«{row.description}»", f"Claim: {round_numbers(row.reason, digits)}."])
    best = first.best
    start = first.baseline.row.val_bpb
    gain = start - best.row.val_bpb
    large = f"val_bpb {best.row.val_bpb:.{digits}f}, not confirmed"
    if best is first.baseline:
        lines = ["Nothing is believed better than the baseline."]
    else:
        below = f"{gain:.{digits}f} ({100 * gain / start:.2f}%) below the baseline, {start:.{digits}f}"
        lines = [f"«{best.row.description}»: {below}."]
    if not first.is_ranked:
        lines.append(f"{first.detail[0].upper()}{first.detail[1:]}.")
    elif about:
        lines.append(f"The last test of a claim: {round_numbers(about[-1].reason, digits)}.")
    else:
        lines.append(
            "Not tested yet: autoresearch confirm runs it anew, on text that no run was selected on."
        )
    return Headline(large, False, lines)


def count(series: Iterable[Series], rows: Iterable[Row]) -> Counts:
    """Return the counts of all series. rows: every row of the ledgers, for what was refused."""
    series = list(series)
    runs = [run for one in series for run in one.runs]
    experiments = [run for run in runs if run.number]
    failed = [run for run in experiments if run.kind == "failed"]
    interrupted = [run for run in failed if run.row.flags & {Flag.INTERRUPTED, Flag.CUT_OFF}]
    return Counts(
        hours=hours_of(runs),
        experiments=len(experiments),
        kept=sum(len(one.kept) for one in series),
        interrupted=len(interrupted),
        failed=len(failed) - len(interrupted),
        refused=sum(Flag.DRY in row.flags for row in rows),
        kwh=sum(finite(run.row.energy_kj) for run in runs) / 3600,
    )


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
class Line:
    """A line of a figure."""

    label: str
    x: list[float]
    y: list[float]


def gains_over_time(series: Iterable[Series]) -> list[Line]:
    """Return a line a series: hours since its first run, percent below its baseline of what is built on."""
    lines = []
    for one in series:
        start = one.baseline.start
        first = one.baseline.row.val_bpb
        x = []
        y = []
        for run in one.experiments:
            if start is not None and run.start is not None and run.built_on is not None:
                x.append(round((run.start - start) / 3600, 3))
                y.append(round(100 * (first - run.built_on) / first, 3))
        if len(x) > 1:
            lines.append(Line(one.title, x, y))
    return lines


def agents_of(runs: Iterable[Run]) -> list[str]:
    """Return the agents that made edits, in the order of their first run; a person is none of them."""
    return list(dict.fromkeys(run.row.agent for run in runs if run.row.agent))


def bests_of_agents(series: Series) -> list[Line]:
    """Return a line an agent: number of its experiments, lowest val_bpb that it kept so far."""
    lines = []
    for agent in agents_of(series.runs):
        best = math.inf
        x: list[float] = []
        y: list[float] = []
        own = [run for run in series.experiments if run.row.agent == agent]
        for number, run in enumerate(own, 1):
            if run.kind == "kept" and run.has_value:
                best = min(best, run.row.val_bpb)
            if best < math.inf:
                x.append(number)
                y.append(best)
        lines.append(Line(agent, x, y))
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
