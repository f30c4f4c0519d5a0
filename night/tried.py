"""What was tried on a board, and what is believed of it now, after all runs and not after its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from launcher.belief import Standing, Survey
from launcher.ledger import EVIDENCE, STATUSES, BoardKey, Flag, Row, refuted_runs
from launcher.setting import Setting
from launcher.verdict import lineage, survey_board
from night.agent import read_saved_answer

NEAR_MISSES = 10  # discarded edits with the lowest expected effect, of which an agent is told all


@dataclass(frozen=True)
class Experiment:
    """A trainer that was scored, and the edit that made it."""

    row: Row  # of the run that decided
    standing: Standing

    @property
    def is_edit(self) -> bool:
        """It was made from another trainer of the board."""
        return bool(self.standing.parent)


@dataclass(frozen=True)
class Tried:
    """The experiments of a board."""

    rows: Sequence[Row]  # of the ledger
    decided: list[Row]  # the row of each that had a verdict, oldest first, failures included
    survey: Survey | None  # None: nothing was scored
    head: str = ""  # source of the committed trainer, "" where it is not known

    @cached_property
    def experiments(self) -> list[Experiment]:
        """Return those that were scored, oldest first."""
        trainers = self.survey.trainers if self.survey else {}
        return [Experiment(row, trainers[row.source]) for row in self.decided if row.source in trainers]

    @cached_property
    def current(self) -> str:
        """Return the source of the trainer to build on, "" when there is none.

        It is the committed one, or where that was not scored the one that the last run said to build on.
        """
        if self.survey and self.head in self.survey.trainers:
            return self.head
        for experiment in reversed(self.experiments):
            if experiment.row.build_on:
                return experiment.row.build_on
            if experiment.row.status == "keep":
                return experiment.row.source
        return ""

    @cached_property
    def stack(self) -> set[str]:
        """Return the sources of the current trainer and of those that it was made from."""
        return lineage(self.survey, self.current) if self.survey else set()

    @cached_property
    def kept(self) -> list[Experiment]:
        """Return those that were kept, and those that the search went back to later."""
        return [one for one in self.experiments if one.row.status == "keep" or one.row.source in self.stack]

    @cached_property
    def discarded(self) -> list[Experiment]:
        kept = {one.row.source for one in self.kept}
        return [one for one in self.experiments if one.row.source not in kept]

    @cached_property
    def near_misses(self) -> list[Experiment]:
        """Return the discarded edits that may well be gains, the best first."""
        edits = [one for one in self.discarded if one.is_edit]
        return sorted(edits, key=lambda one: one.standing.effect)[:NEAR_MISSES]

    @cached_property
    def by_source(self) -> dict[str, list[Row]]:
        """Return the rows of each trainer, by its content hash."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.source, []).append(row)
        return found

    @cached_property
    def lessons(self) -> dict[str, str]:
        """Return {run: what it taught}: the agent of the turn after it said so."""
        lessons = {}
        for row, after in pairwise(self.decided):
            answer = read_saved_answer(after.run)
            if answer and answer.learned:
                lessons[row.run] = answer.learned
        return lessons

    @property
    def stalled(self) -> int:
        """Return how many experiments were not kept since the last one that was."""
        for number, row in enumerate(reversed(self.decided)):
            if row.status == "keep":
                return number
        return len(self.decided)


def read_tried(rows: Sequence[Row], board: BoardKey, head: str = "") -> Tried:
    """Return what was tried on a board. rows: of the ledger. head: source of the committed trainer."""
    refuted = refuted_runs(rows)
    decided: dict[str, Row] = {}
    for row in rows:
        if row.board != board or not row.judged or row.run in refuted or row.flags & {*EVIDENCE, Flag.DRY}:
            continue
        key = row.source if row.scored else row.run
        decided.pop(key, None)  # a trainer that was run again is no new experiment, but its last run decides
        decided[key] = row
    return Tried(rows, list(decided.values()), survey_board(rows, board), head)


def failures(rows: Sequence[Row], setting: Setting) -> list[Row]:
    """Return the runs and dry runs of a setting that were not scored, oldest first."""
    return [
        row
        for row in rows
        if row.status in STATUSES
        and row.judged
        and not row.scored
        and row.platform == setting.platform.name
        and row.track == setting.track.name
        and (row.budget == setting.budget or Flag.DRY in row.flags)
    ]
