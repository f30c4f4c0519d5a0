"""
Keep, discard, repeat, or go back: from the rows of a board to the belief, and to a decision.

The belief itself, and the rule, are in launcher/belief.py; docs/search.md says them in words.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from launcher.belief import PATIENCE, Decision, Observation, Survey, judge, survey
from launcher.ledger import EVIDENCE, MOVED, BoardKey, Flag, Row, refuted_runs


def board_runs(rows: Sequence[Row], board: BoardKey) -> list[Row]:
    """Return the runs of a board that a verdict may rest on, oldest first. Refuted ones are left out."""
    refuted = refuted_runs(rows)
    return [row for row in rows if row.comparable and row.board == board and row.run not in refuted]


def observe(runs: Iterable[Row]) -> list[Observation]:
    """Return what the belief takes of the runs of one board.

    A trainer that ran again with the seed that it had is no new evidence: the first of such runs counts.
    """
    seen: set[tuple[str, int]] = set()
    observations = []
    for row in runs:
        if (row.source, row.seed) not in seen:
            seen.add((row.source, row.seed))
            observations.append(observation_of(row))
    return observations


def observation_of(row: Row) -> Observation:
    return Observation(
        source=row.source,
        val_bpb=row.val_bpb,
        kept=row.status == "keep",
        parent=row.parent or None,
        removes_code=Flag.SHORTER in row.flags,
    )


def decide(rows: Sequence[Row], row: Row) -> Decision:
    """Return what to do after a run. `row` is the newest, and not in `rows` yet."""
    runs = board_runs(rows, row.board)
    candidates = tried_since_moved(rows, row.board, row.parent)
    return judge([*observe(runs), observation_of(row)], candidates=candidates)


def tried_since_moved(rows: Sequence[Row], board: BoardKey, head: str) -> set[str]:
    """Return the sources that the search may go back to from the committed trainer `head`.

    They are those that were run since a person last moved the branch: a person's choice of a trainer is not
    undone. A person moved it where a run was made on another trainer than the row before it said to build on.
    Runs outside git (`autoresearch run`) have no parent, and say nothing of the branch.
    """
    refuted = refuted_runs(rows)
    sources: set[str] = set()
    build_on = ""
    for row in rows:
        if row.board != board or row.run in refuted:
            continue
        if row.status == MOVED:
            build_on = row.build_on
        if not row.comparable or not row.parent or row.flags & EVIDENCE:
            continue
        if row.parent != build_on:
            sources = {row.parent}
        sources.add(row.source)
        build_on = row.build_on
    return sources if head == build_on else {head}


def survey_board(rows: Sequence[Row], board: BoardKey) -> Survey | None:
    """Return what is believed of the trainers of a board, None without a run."""
    return _survey(tuple(observe(board_runs(rows, board))))


@lru_cache(maxsize=2)  # a turn asks some ten times
def _survey(observations: tuple[Observation, ...]) -> Survey | None:
    return survey(observations)


def runs_of(rows: Sequence[Row], board: BoardKey, source: str) -> list[Row]:
    """Return the runs of a trainer on a board, oldest first."""
    return [row for row in board_runs(rows, board) if row.source == source]


def best_run(rows: Sequence[Row], board: BoardKey) -> Row | None:
    """Return the lowest run of the trainer that is believed to be the best of a board, None without one."""
    believed = survey_board(rows, board)
    if believed is None:
        return None
    return min(runs_of(rows, board, believed.best), key=lambda row: row.val_bpb, default=None)


def best_since_moved(rows: Sequence[Row], board: BoardKey, head: str) -> Row | None:
    """Return the last run of the trainer that is believed best of those that the search may build on.

    Another than the committed one must be lower by a tenth of its error, as in the search.

    head: content hash of the committed trainer. None: nothing was run.
    """
    believed = survey_board(rows, board)
    if believed is None:
        return None
    sources = tried_since_moved(rows, board, head) & believed.trainers.keys()
    if not sources:
        return None
    best = min(sources, key=lambda source: believed.trainers[source].merit)
    current = believed.trainers.get(head)
    if current and believed.trainers[best].merit > current.merit - PATIENCE * current.error:
        best = head
    return runs_of(rows, board, best)[-1]


def fresh_seed(rows: Iterable[Row], sources: Iterable[str]) -> int:
    """Return a seed that none of the trainers was run with."""
    wanted = set(sources)
    return 1 + max((row.seed for row in rows if row.source in wanted), default=0)
