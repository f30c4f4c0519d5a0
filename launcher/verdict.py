"""
Keep, discard, repeat, or go back: from the rows of a board to the belief, and to a decision.

The belief itself, and the rule, are in launcher/belief.py; docs/search.md says them in words.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from launcher.belief import OPTIMISM, PATIENCE, Decision, Observation, Standing, Survey, judge, survey
from launcher.ledger import (
    CONFIRMED,
    EVIDENCE,
    MOVED,
    UNCONFIRMED,
    BoardKey,
    Flag,
    Row,
    by_board,
    refuted_runs,
    remembered,
)

BELIEVED = 300  # runs of a board, the newest, at least so many, that its belief is made of,
BELIEVED_STEP = 100  # and how many older ones leave it together
WORST = (
    100.0  # bits per byte: a run that diverged counts as no more. By chance alone a token costs up to 16 bits
)


@remembered
def board_runs(rows: Sequence[Row], board: BoardKey) -> list[Row]:
    """Return the runs of a board that a verdict may rest on, oldest first. Refuted ones are left out."""
    refuted = refuted_runs(rows)
    return [row for row in by_board(rows).get(board, []) if row.comparable and row.run not in refuted]


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
        val_bpb=min(row.val_bpb, WORST),
        kept=row.status == "keep",
        parent=row.parent or None,
        removes_code=Flag.SHORTER in row.flags,
    )


def decide(rows: Sequence[Row], row: Row) -> Decision:
    """Return what to do after a run. `row` is the newest, and not in `rows` yet."""
    runs = believed_runs([*board_runs(rows, row.board), row])
    built_on = build_on_now(rows, row.board) if Flag.PARALLEL in row.flags else ""
    candidates = tried_since_moved(rows, row.board, built_on or row.parent)
    return judge([*observe(runs[:-1]), observation_of(row)], candidates=candidates, built_on=built_on)


def build_on_now(rows: Sequence[Row], board: BoardKey) -> str:
    """Return the source that is built on now on a board, "" before there is one."""
    return current_source(by_board(rows).get(board, []))


def current_source(rows: Sequence[Row]) -> str:
    """Return the source of the trainer that is built on after the last row, "" when there is none.

    Runs that decide nothing and tests of runs do not move it; the end of a night may, and a person.

    rows: of one board, oldest first
    """
    for row in reversed(rows):
        if not row.decides and row.status != MOVED:
            continue
        if row.build_on:
            return row.build_on
        if row.status == "keep":
            return row.source
    return ""


def believed_runs(runs: Sequence[Row]) -> list[Row]:
    """Return the runs of a board that its belief is made of, oldest first.

    They are the newest, and of the older ones those of the trainers that the newest were made from, of the
    first, and of the one kept last. What lies farther back says next to nothing of the trainers that the
    search may build on, and to weigh it anew after each run would take minutes.
    """
    start = max(0, (len(runs) - BELIEVED) // BELIEVED_STEP * BELIEVED_STEP)
    older = runs[:start]
    newest = runs[start:]
    sources = {row.parent for row in newest if row.parent}
    sources.update(row.source for row in older[:1])
    sources.update([row.source for row in older if row.status == "keep"][-1:])
    return [*(row for row in older if row.source in sources), *newest]


def give_verdict(rows: Sequence[Row], row: Row, findings: Sequence[str]) -> None:
    """Give a scored row its verdict: keep or discard, and why. A row that does not compare gets none.

    rows: those of the ledger, without this one. findings: what made the run incomparable, in words
    """
    row.status = "discard"
    if not row.comparable:
        power = [flag for flag in (Flag.BATTERY, Flag.LOW_POWER) if flag in row.flags]
        row.reason = "no verdict: " + "; ".join([*findings, *power])
        return
    decision = decide(rows, row)
    row.p_better = round(decision.p_better, 3)
    row.effect = decision.effect
    row.effect_error = decision.effect_error
    row.belief_before = decision.before
    row.belief_before_error = decision.before_error
    row.belief_after = decision.after
    row.belief_after_error = decision.after_error
    row.sigma = decision.sigma
    row.reason = decision.reason
    if row.flags & EVIDENCE:
        return  # it decides nothing
    if is_left_behind(rows, row):
        row.reason += "; the branch was moved by hand meanwhile"
        return
    if decision.build_on == row.source:
        row.status = "keep"
    row.build_on = decision.build_on
    if decision.action == "repeat":
        row.add_flags(Flag.REPEAT)
        row.reason += f"; once more with seed {row.seed + 1}"
    elif row.goes_back:
        earlier = runs_of(rows, row.board, row.build_on)[-1]
        row.reason += f" ({earlier.run}: {earlier.description})"
    if Flag.SHORT in row.flags:
        row.reason += f"; practice: a budget of {row.budget:g} s never ranks"


def is_left_behind(rows: Sequence[Row], row: Row) -> bool:
    """Return whether a person has moved the branch since the edit of a run was begun."""
    if Flag.PARALLEL not in row.flags:
        return False
    return row.parent not in tried_since_moved(rows, row.board, build_on_now(rows, row.board))


@remembered
def tried_since_moved(rows: Sequence[Row], board: BoardKey, head: str) -> set[str]:
    """Return the sources that the search may go back to from the committed trainer `head`.

    They are those that were run since a person last moved the branch: a person's choice of a trainer is not
    undone. A person moved it where a run was made on another trainer than the row before it said to build on.
    Runs outside git (`autoresearch run`) have no parent, and say nothing of the branch. An edit that was run
    beside others may have been made on what was the best earlier: of a night of such, a row says where a
    person moved the branch. An edit that was made on what lies before such a move counts for nothing.
    """
    refuted = refuted_runs(rows)
    sources: set[str] = set()
    build_on = ""
    for row in by_board(rows).get(board, []):
        if row.run in refuted:
            continue
        if row.status == MOVED:
            build_on = row.build_on
            if Flag.BY_HAND in row.flags:
                sources = {build_on}
        if not row.comparable or not row.parent or row.flags & EVIDENCE:
            continue
        if Flag.PARALLEL in row.flags and sources:
            if row.parent not in sources:
                continue
        elif row.parent != build_on:
            sources = {row.parent}
        sources.add(row.source)
        build_on = row.build_on
    return sources if head == build_on else {head}


@remembered
def survey_board(rows: Sequence[Row], board: BoardKey) -> Survey | None:
    """Return what is believed of the trainers of a board, None without a run.

    Of those whose runs lie too far back it is what was believed then, and none of them is the best.
    """
    runs = board_runs(rows, board)
    believed = survey(observe(believed_runs(runs)))
    if believed is None:
        return None
    count = Counter(row.source for row in runs)
    trainers = {}
    for row in runs:
        if row.source not in trainers:
            trainers[row.source] = believed.trainers.get(row.source) or old_standing(row, count)
    return believed._replace(trainers=trainers)


def old_standing(row: Row, count: Mapping[str, int]) -> Standing:
    """Return what was believed of a trainer right after its run. count: runs of each trainer."""
    mean = row.belief_before + row.effect if row.belief_before else row.val_bpb
    error = math.hypot(row.belief_before_error, row.effect_error)
    return Standing(
        mean=mean,
        error=error,
        merit=mean,
        counts_as=mean - OPTIMISM * error,
        parent=row.parent if row.parent in count and row.parent != row.source else "",
        p_better=row.p_better,
        effect=row.effect,
        effect_error=row.effect_error,
        runs=count[row.source],
    )


def lineage(believed: Survey, source: str) -> set[str]:
    """Return the sources of a trainer and of those that it was made from, as far as they were scored."""
    sources: set[str] = set()
    while source in believed.trainers and source not in sources:
        sources.add(source)
        source = believed.trainers[source].parent
    return sources


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
    """Return a run of the trainer that is believed best of those that the search may build on.

    It is the last one that decided something: what a run for a claim was called says nothing of the edit.
    Another than the committed one must be lower by a tenth of its error, as in the search.

    head: content hash of the committed trainer. None: nothing was run.
    """
    believed = survey_board(rows, board)
    if believed is None:
        return None
    recent = {row.source for row in believed_runs(board_runs(rows, board))}
    sources = tried_since_moved(rows, board, head) & {*recent, head} & believed.trainers.keys()
    if not sources:
        return None
    best = min(sources, key=lambda source: believed.trainers[source].merit)
    current = believed.trainers.get(head)
    if current and believed.trainers[best].merit > current.merit - PATIENCE * current.error:
        best = head
    runs = runs_of(rows, board, best)
    decided = [row for row in runs if not row.flags & EVIDENCE]
    return (decided or runs)[-1]


def claim_of(rows: Sequence[Row], board: BoardKey, source: str) -> Row | None:
    """Return the row of the claim that stands for a trainer, None without one.

    It does not stand where a later test did not show it, or where `verify` refuted a run of the trainer.
    """
    refuted = refuted_runs(rows)
    last = None
    for row in by_board(rows).get(board, []):
        if row.source != source:
            continue
        if row.run in refuted:
            return None
        if row.status in (CONFIRMED, UNCONFIRMED):
            last = row
    return last if last and last.status == CONFIRMED else None


def fresh_seed(rows: Iterable[Row], sources: Iterable[str]) -> int:
    """Return a seed that none of the trainers was run with."""
    wanted = set(sources)
    return 1 + max((row.seed for row in rows if row.source in wanted), default=0)
