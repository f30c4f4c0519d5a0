"""
Keep or discard: is a result better than the best before it, by more than luck?

Runs of one trainer with other seeds differ. `autoresearch noise` measures by how much, and a difference of
means counts when it exceeds what that spread gives by chance in one of a hundred comparisons.
"""

import math
from dataclasses import dataclass
from statistics import mean, stdev

from launcher.ledger import REFUTED, VERIFIED

# One-sided 99% quantiles of Student's t by degrees of freedom (any statistics table); 2.326 from the normal beyond.
T_99 = {1: 31.821, 2: 6.965, 3: 4.541, 4: 3.747, 5: 3.365, 6: 3.143, 7: 2.998, 8: 2.896, 9: 2.821, 10: 2.764,
        12: 2.681, 15: 2.602, 20: 2.528, 30: 2.457, 60: 2.390}


@dataclass(frozen=True)
class Noise:
    """Spread of val_bpb over seeds on one board: standard deviation and its degrees of freedom."""

    sigma: float
    freedom: int

    def margin(self, new=1, best=1):
        """How much lower the mean of `new` runs must lie than that of `best` runs to mean anything (p < 0.01)."""
        quantile = T_99[max(k for k in T_99 if k <= self.freedom)] if self.freedom < 120 else 2.326
        return quantile * self.sigma * math.sqrt(1 / new + 1 / best)


def spread(groups):
    """Noise pooled over groups of scores, each of one trainer with several seeds. None without a repetition."""
    repeated = [values for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in repeated)
    if not freedom:
        return None
    return Noise(math.sqrt(sum(stdev(values) ** 2 * (len(values) - 1) for values in repeated) / freedom), freedom)


def noise_of(rows, board):
    """Noise on record for a board: what `autoresearch noise` repeated there. None without."""
    groups = {}
    for row in rows:
        if row.compares and row.board == board and "noise" in row.mark_list:
            groups.setdefault(row.source, []).append(row.val_bpb)
    return spread(groups.values())


def champion(rows, board):
    """The rows of the trainer that was kept last on a board, or []: all its runs that compare, whatever their seed.

    A run that `verify` refuted is nobody's best.
    """
    word = {row.run: row.status for row in rows if row.status in (VERIFIED, REFUTED)}  # the last one counts
    fair = [row for row in rows if row.compares and row.board == board and word.get(row.run) != REFUTED]
    kept = [row for row in fair if row.status == "keep"]
    return [row for row in fair if row.source == kept[-1].source] if kept else []


def decide(values, best, noise):
    """(verdict, reason) for the scores `values` of one trainer against those of the champion, `best`.

    The verdict is keep, discard or repeat: an improvement within the noise is run once more with another
    seed, and then the means decide.
    """
    if not best:
        return "keep", "first result on this board"
    gain = mean(best) - mean(values)
    against = f"{mean(values):.6f} against {mean(best):.6f}"
    if gain <= 0:
        return "discard", f"no improvement: {against}"
    if noise is None:
        return "keep", f"better by {gain:.6f}: {against}; no noise on record, so this may be luck (autoresearch noise)"
    margin = noise.margin(len(values), len(best))
    if gain > margin:
        return "keep", f"better by {gain:.6f}, beyond the noise of {margin:.6f}: {against}"
    if len(values) == 1:
        return "repeat", f"better by {gain:.6f}, within the noise of {margin:.6f}: {against}"
    return "discard", f"better by {gain:.6f} over {len(values)} seeds, within the noise of {margin:.6f}: {against}"
