"""
Keep, discard, repeat, or go back: from the rows of a board to the belief, and to a decision.

The belief itself, and the rule, are in launcher/belief.py; docs/search.md says them in words.
"""

from collections.abc import Iterable, Sequence

from launcher.belief import Decision, Observation, Survey, judge, survey
from launcher.ledger import SERIES, BoardKey, Flag, Row, refuted_runs


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
    return judge([*observe(runs), observation_of(row)], candidates=line_of(runs, row.parent))


def line_of(runs: Iterable[Row], head: str) -> set[str]:
    """Return the sources that the search may go back to from the trainer `head`.

    They are those that were run since a person last moved the branch: a person's choice of a trainer is not
    undone. A person moved it where a run was made on another trainer than the run before it said to build on.
    """
    line: set[str] = set()
    build_on = ""
    for row in runs:
        if row.flags & SERIES:
            continue
        if row.parent != build_on:
            line = {row.parent}
        line.add(row.source)
        build_on = row.build_on
    return line if head == build_on else {head}


def survey_board(rows: Sequence[Row], board: BoardKey) -> Survey | None:
    """Return what is believed of the trainers of a board, None without a run."""
    return survey(observe(board_runs(rows, board)))


def runs_of(rows: Sequence[Row], board: BoardKey, source: str) -> list[Row]:
    """Return the runs of a trainer on a board, oldest first."""
    return [row for row in board_runs(rows, board) if row.source == source]


def best_run(rows: Sequence[Row], board: BoardKey) -> Row | None:
    """Return the lowest run of the trainer that is believed to be the best of a board, None without one."""
    believed = survey_board(rows, board)
    if believed is None:
        return None
    return min(runs_of(rows, board, believed.best), key=lambda row: row.val_bpb, default=None)


def best_of_line(rows: Sequence[Row], board: BoardKey, head: str) -> Row | None:
    """Return the last run of the trainer that is believed best of those that the search may build on.

    head: content hash of the committed trainer. None: nothing was run.
    """
    believed = survey_board(rows, board)
    if believed is None:
        return None
    runs = board_runs(rows, board)
    line = line_of(runs, head) & believed.trainers.keys()
    if not line:
        return None
    best = min(line, key=lambda source: believed.trainers[source].mean)
    return runs_of(rows, board, best)[-1]


def fresh_seed(rows: Iterable[Row], sources: Iterable[str]) -> int:
    """Return a seed that none of the trainers was run with."""
    wanted = set(sources)
    return 1 + max((row.seed for row in rows if row.source in wanted), default=0)
