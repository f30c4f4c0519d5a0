"""
Keep or discard: is a result better than the best before it, by more than luck?

Runs of one trainer with other seeds differ. `autoresearch noise` measures by how much, and a difference of
means counts when it exceeds what that seed noise gives by chance in one of a hundred comparisons.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from launcher.ledger import BoardKey, Flag, Row, refuted_runs

CHANCE = 0.01  # one-sided probability that two equal trainers differ by more than the margin


@dataclass(frozen=True)
class SeedNoise:
    """How much val_bpb differs between seeds on one board: standard deviation and its degrees of freedom."""

    sigma: float
    freedom: int

    def margin(self, new: int = 1, best: int = 1) -> float:
        """Return how much lower the mean of `new` runs must lie than that of `best` runs to mean anything."""
        from scipy.special import stdtrit  # quantiles of Student's t

        return float(stdtrit(self.freedom, 1 - CHANCE)) * self.sigma * math.sqrt(1 / new + 1 / best)


def pooled_noise(groups: Iterable[Sequence[float]]) -> SeedNoise | None:
    """Return the noise pooled over groups of scores, each of one trainer with several seeds.

    None without a repetition.
    """
    repeated = [values for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in repeated)
    if not freedom:
        return None
    squares = sum(stdev(values) ** 2 * (len(values) - 1) for values in repeated)
    return SeedNoise(math.sqrt(squares / freedom), freedom)


def noise_on_record(rows: Iterable[Row], board: BoardKey) -> SeedNoise | None:
    """Return the noise of a board from what `autoresearch noise` repeated there. None without."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.comparable and row.board == board and Flag.NOISE in row.flags:
            groups.setdefault(row.source, []).append(row.val_bpb)
    return pooled_noise(groups.values())


def best_runs(rows: Sequence[Row], board: BoardKey) -> list[Row]:
    """Return the runs of the trainer that was kept last on a board, whatever their seed; [] without one.

    A run that `verify` refuted does not count.
    """
    refuted = refuted_runs(rows)
    fair = [row for row in rows if row.comparable and row.board == board and row.run not in refuted]
    kept = [row for row in fair if row.status == "keep"]
    return [row for row in fair if row.source == kept[-1].source] if kept else []


def best_run(rows: Sequence[Row], board: BoardKey) -> Row | None:
    """Return the lowest of best_runs, None without one."""
    return min(best_runs(rows, board), key=lambda row: row.val_bpb, default=None)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a trainer: "keep", "discard", or "repeat" with another seed; and why."""

    action: str
    reason: str


def decide(values: Sequence[float], best: Sequence[float], noise: SeedNoise | None) -> Verdict:
    """Compare the scores `values` of one trainer with those of the best one.

    An improvement within the noise is run once more with another seed, and then the means decide.
    """
    if not best:
        return Verdict("keep", "first result on this board")
    gain = mean(best) - mean(values)
    against = f"{mean(values):.6f} against {mean(best):.6f}"
    if gain <= 0:
        return Verdict("discard", f"no improvement: {against}")
    if noise is None:
        return Verdict(
            "keep",
            f"better by {gain:.6f}: {against}; no noise on record, so this may be luck (autoresearch noise)",
        )
    margin = noise.margin(len(values), len(best))
    if gain > margin:
        return Verdict("keep", f"better by {gain:.6f}, beyond the noise of {margin:.6f}: {against}")
    if len(values) == 1:
        return Verdict("repeat", f"better by {gain:.6f}, within the noise of {margin:.6f}: {against}")
    seeds = f"over {len(values)} seeds, within the noise of {margin:.6f}"
    return Verdict("discard", f"better by {gain:.6f} {seeds}: {against}")
