"""
Simulate nights of 100 runs: rules of keeping against each other, on the same proposals and seed noise.

    uv run python benchmarks/night.py [--nights 1000] [--fast]

What counts is the true gain of the trainer that a night ends with; a rule sees scores only. `greedy` is the
original's: keep what is below the lowest score so far. `old, 3` and `old, 10` are this repository's rule
before launcher/belief.py: run the baseline 3 or 10 times for the noise, and keep what is better by more than
that (p < 0.01), after a second seed where it is better by less. `new` is launcher/belief.py itself, `best`
the same nights ended on the trainer of the lowest mean instead of the last. `told` is no rule: it is told
the noise and the true val_bpb of the trainer that it builds on, and so bounds what a rule can find that runs
each proposal once and forgets it.

Then the claims: after a night the best is tested against the baseline on fresh seeds, and so are trainers
that are as good as the baseline, or worse. The last lines are for grep: `ratio_to_greedy_<noise>` is the
smaller of the ratios without and with heavy tails, `false_claims_percent` the larger of the share of false
claims after nights and the shares of claims for trainers that are no better.
"""

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.belief import LOOKS, PRIOR, Forest, claim, effects

RUNS = 100
SIGMAS = (0.22, 0.6, 1.2, 2.4, 4.8, 8.4)  # seed noise measured on H100s (0.22) to CPUs (8.4), 0.001 bpb
RATIO_SIGMAS = SIGMAS[:4]  # beyond, greedy gains nothing or less, and a ratio says nothing
TAIL_SHARE, TAIL = 0.08, (3.0, 20.0)  # runs that are worse by so many sigma more
ALPHA = 0.01
RATIO_FROM = 0.5  # mean gain of greedy, 0.001 bpb, below which a ratio says nothing


@dataclass(frozen=True)
class Kind:
    """A kind of proposals: shares, and mean sizes in 0.001 bpb. The rest of the edits harms."""

    name: str
    better: float = PRIOR.better  # the original's published night: see launcher.belief.Prior for the source
    equal: float = PRIOR.equal
    gain: float = 1000 * PRIOR.gain
    harm: float = 1000 * PRIOR.harm
    fading: float = 0.0  # gains shrink by exp(-fading * proposals so far)
    fail: float = 0.0  # share of the runs that end without a score


PUBLISHED = Kind("as published")
KINDS = (
    Kind("a weak agent: 6% gains", better=0.06),
    Kind("bold: effects four times as large", gain=3.2, harm=8.0),
    Kind("timid: effects a third as large", gain=0.27, harm=0.67),
    Kind("fading: gains halve every 35 runs", fading=0.02),
    Kind("10% of the runs fail", fail=0.10),
)


@dataclass
class Nights:
    """Proposals and noise of simulated nights, in 0.001 bpb; the same for every rule."""

    sigma: float
    effect: NDArray[np.float64]  # [nights, RUNS], of each proposal on val_bpb
    noise: NDArray[np.float64]  # [nights, 1 + RUNS], of each run; the first is the baseline's
    failed: NDArray[np.bool_]  # [nights, RUNS]

    def __len__(self) -> int:
        return len(self.effect)


@dataclass
class Outcome:
    """What nights ended with: true gains in 0.001 bpb, and means over nights."""

    gain: NDArray[np.float64]
    best_gain: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # of the lowest mean
    kept: float = 0.0
    right: float = 0.0  # share of the kept that are truly better than what they were made from
    back: float = 0.0  # times that the rule went back to an earlier trainer
    repeats: float = 0.0
    sigma: float = 0.0  # median estimate at the end


def draw_noise(rng: np.random.Generator, sigma: float, shape: Any, tails: bool) -> NDArray[np.float64]:
    """Return seed noise: normal, and with tails some runs far worse."""
    noise = rng.standard_normal(shape) * sigma
    worse = rng.random(shape) < TAIL_SHARE
    size = rng.uniform(*TAIL, shape) * sigma
    return noise + np.where(worse & tails, size, 0.0)


def draw(kind: Kind, sigma: float, tails: bool, nights: int, seed: int = 1) -> Nights:
    """Return nights of one kind of proposals at one noise."""
    rng = np.random.default_rng([seed, round(1000 * sigma), tails])
    which = rng.random((nights, RUNS))
    gain = rng.exponential(kind.gain, (nights, RUNS)) * np.exp(-kind.fading * np.arange(RUNS))
    harm = rng.exponential(kind.harm, (nights, RUNS))
    effect = np.where(which < kind.better, -gain, np.where(which < kind.better + kind.equal, 0.0, harm))
    noise = draw_noise(rng, sigma, (nights, RUNS + 1), tails)
    return Nights(sigma, effect, noise, rng.random((nights, RUNS)) < kind.fail)


def greedy(nights: Nights) -> Outcome:
    """Keep whatever is below the lowest score so far."""
    true = np.zeros(len(nights))
    lowest = nights.noise[:, 0].copy()
    kept = 0
    for run in range(RUNS):
        new = true + nights.effect[:, run]
        score = new + nights.noise[:, run + 1]
        keep = (score < lowest) & ~nights.failed[:, run]
        true = np.where(keep, new, true)
        lowest = np.where(keep, score, lowest)
        kept += keep.sum()
    return Outcome(-true, kept=kept / len(nights))


def old_rule(nights: Nights, repeats: int) -> Outcome:
    """Run the baseline `repeats` times for the noise, then keep what is better by more than it (p < 0.01)."""
    from scipy.special import stdtrit

    n, every = len(nights), np.arange(len(nights))
    seen = nights.noise[:, :repeats]
    margin = stdtrit(repeats - 1, 0.99) * seen.std(axis=1, ddof=1)
    best, best_runs = seen.mean(axis=1), np.full(n, float(repeats))
    true = np.zeros(n)
    proposal = np.zeros(n, int)
    waiting = np.zeros(n)
    total = np.zeros(n, int)
    for run in range(repeats - 1, RUNS):
        new = true + nights.effect[every, proposal]
        score = new + nights.noise[:, run + 1]
        ok = ~nights.failed[:, run]
        second = total == 1
        mean = np.where(second, (waiting + score) / 2, score)
        gain = best - mean
        keep = ok & (gain > margin * np.sqrt(1 / (1 + second) + 1 / best_runs))
        again = ok & ~keep & ~second & (gain > 0)
        waiting, total = np.where(again, score, 0.0), again.astype(int)
        true, best = np.where(keep, new, true), np.where(keep, mean, best)
        best_runs = np.where(keep, 1.0 + second, best_runs)
        proposal = np.minimum(proposal + ~again, RUNS - 1)
    return Outcome(-true)


def told(nights: Nights) -> Outcome:
    """Keep on the expected effect, told the noise and the true val_bpb of the current trainer."""
    true, var = np.zeros(len(nights)), np.full(len(nights), (nights.sigma / 1000 / PRIOR.gain) ** 2)
    for run in range(RUNS):
        seen = (nights.effect[:, run] + nights.noise[:, run + 1]) / 1000 / PRIOR.gain
        keep = (effects(seen, var, PRIOR, np.ones(len(nights))).mean < 0) & ~nights.failed[:, run]
        true = np.where(keep, true + nights.effect[:, run], true)
    return Outcome(-true)


def new_rule(nights: Nights) -> Outcome:
    """Let launcher/belief.py decide, from the scores alone."""
    n, every = len(nights), np.arange(len(nights))
    forest, true = Forest(n, n * (RUNS + 1)), np.zeros(n * (RUNS + 1))  # true val_bpb of each trainer
    current = forest.add(every, np.full(n, -1))
    forest.observe(current, nights.noise[:, 0] / 1000 / PRIOR.gain)
    forest.fit()
    proposal = np.zeros(n, int)
    again = np.zeros(n, bool)
    node = current.copy()
    kept = right = back = repeats = 0
    for run in range(RUNS):
        ok = ~nights.failed[:, run]
        fresh = every[ok & ~again]
        node = np.where(again, node, current)
        node[fresh] = forest.add(fresh, current[fresh])
        true[node[fresh]] = true[current[fresh]] + nights.effect[fresh, proposal[fresh]]
        proposal += ~again
        repeats += (again & ok).sum()
        score = true[node] + nights.noise[:, run + 1]
        forest.observe(node[ok], score[ok] / 1000 / PRIOR.gain)
        forest.fit()
        chosen = forest.choose(current, node)
        again = ok & (chosen != node) & forest.repeat_pays(node)
        chosen = np.where(ok & ~again, chosen, current)
        keep = (chosen == node) & (chosen != current)
        kept, right = kept + keep.sum(), right + (keep & (true[node] < true[current])).sum()
        back += ((chosen != node) & (chosen != current)).sum()
        current = chosen
    sigma = float(np.median(forest.sigma)) * PRIOR.gain * 1000
    best = -true[forest.best()]
    return Outcome(-true[current], best, kept / n, right / max(kept, 1), back / n, repeats / n, sigma)


def spread(values: NDArray[np.float64]) -> float:
    """Return the standard error of a mean over nights."""
    return float(values.std() / np.sqrt(len(values)))


def ratio(new: Outcome, base: Outcome) -> tuple[float, float]:
    """Return the ratio of the mean gains, and its standard error over nights."""
    value = float(new.gain.mean() / base.gain.mean())
    return value, spread(new.gain - value * base.gain) / abs(float(base.gain.mean()))


def run_claim(rng: np.random.Generator, sigma: float, tails: bool, gain: float) -> tuple[bool, int]:
    """Run both on fresh seeds until the test ends. Return whether it claims, and the runs of each."""
    baseline = draw_noise(rng, sigma, (LOOKS[-1],), tails).tolist()
    best = (draw_noise(rng, sigma, (LOOKS[-1],), tails) - gain).tolist()
    for runs in LOOKS:
        answer = claim(baseline[:runs], best[:runs], ALPHA)
        if answer.verdict != "go on":
            break
    return answer.verdict == "claim", answer.runs


@dataclass
class Claims:
    """Claims that were tested."""

    tested: int = 0
    made: int = 0
    false: int = 0
    runs: int = 0

    def add(self, rng: np.random.Generator, sigma: float, tails: bool, gain: float) -> None:
        """Test one more."""
        made, runs = run_claim(rng, sigma, tails, gain)
        self.tested += 1
        self.made += made
        self.false += made and gain <= 0
        self.runs += runs


def claims_of_no_gain(tests: int, tails: bool) -> dict[str, Claims]:
    """Test trainers that are as good as the baseline, and trainers that are a little worse."""
    rng = np.random.default_rng([7, tails])
    claims = {"as good as the baseline": Claims(), "worse": Claims()}
    for i in range(tests):
        claims["as good as the baseline"].add(rng, 1.0, tails, 0.0)
        if i % 4 == 0:
            claims["worse"].add(rng, 1.0, tails, -rng.exponential(0.5))
    return claims


COLUMNS = {
    "noise": 5, "tails": 5, "greedy": 14, "old, 3": 6, "old, 10": 7, "told": 6, "new": 14, "best": 6,
    "ratio": 12, "kept": 5, "right": 5, "back": 5, "repeats": 7, "sigma": 5, "claimed": 7, "runs": 4,
}  # fmt: skip


def line(cells: Iterable[object]) -> str:
    """Return a line of the table."""
    return "  ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))


def compare(kind: Kind, sigma: float, tails: bool, nights: int, tested: int) -> tuple[float, Claims]:
    """Print one line. Return the ratio to greedy, and the claims after the first `tested` nights."""
    drawn = draw(kind, sigma, tails, nights)
    base, new = greedy(drawn), new_rule(drawn)
    value, error = ratio(new, base)
    claims, rng = Claims(), np.random.default_rng([8, round(1000 * sigma), tails])
    for gain in new.best_gain[:tested]:
        claims.add(rng, sigma, tails, float(gain))
    cells = [sigma, "yes" if tails else "no", f"{base.gain.mean():.2f} +- {spread(base.gain):.2f}"]
    cells += [f"{other.gain.mean():.2f}" for other in (old_rule(drawn, 3), old_rule(drawn, 10))]
    cells += [f"{told(drawn).gain.mean():.2f}" if kind is PUBLISHED else "-"]
    cells += [f"{new.gain.mean():.2f} +- {spread(new.gain):.2f}", f"{new.best_gain.mean():.2f}"]
    cells += [f"{value:.2f} +- {error:.2f}" if base.gain.mean() > RATIO_FROM else "-"]
    cells += [
        f"{new.kept:.1f}",
        f"{new.right:.0%}",
        f"{new.back:.1f}",
        f"{new.repeats:.1f}",
        f"{new.sigma:.2f}",
    ]
    cells += [f"{claims.made / tested:.0%}", f"{claims.runs / tested:.1f}"] if tested else ["-", "-"]
    print(line(cells), flush=True)
    return value, claims


def compare_rules(nights: int, sigmas: tuple[float, ...], tested: int) -> tuple[dict[float, float], Claims]:
    """Print the table of the published kind. Return the lower ratio of each noise, and all claims."""
    print(f"Proposals as published: {nights} nights of {RUNS} runs; true gains in 0.001 bpb")
    print(line(COLUMNS))
    ratios: dict[float, float] = {}
    after = Claims()
    for sigma in sigmas:
        for tails in (False, True):
            value, claims = compare(PUBLISHED, sigma, tails, nights, tested)
            ratios[sigma] = min(value, ratios.get(sigma, value))
            after.made += claims.made
            after.false += claims.false
    return ratios, after


def compare_claims(after: Claims, tests: int) -> float:
    """Print how often claims are false. Return the largest percentage."""
    print(f"Claims at a nominal {ALPHA:.0%}: after the nights {after.made}, of which {after.false} are false")
    percent = 100 * after.false / max(after.made, 1)
    for tails in (False, True):
        for what, claims in claims_of_no_gain(tests, tails).items():
            with_tails = "with" if tails else "without"
            print(f"  of {claims.tested} trainers {what}, {with_tails} tails: {claims.made}")
            percent = max(percent, 100 * claims.made / claims.tested)
    return percent


def main() -> None:
    """Print the tables, and the lines for grep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nights", type=int, default=1000, help="nights of each line (default 1000)")
    parser.add_argument("--fast", action="store_true", help="seconds: 100 nights, two noise levels")
    asked = parser.parse_args()
    began = time.perf_counter()
    if asked.fast:
        ratios, after = compare_rules(100, (0.6, 2.4), 20)
        percent = compare_claims(after, 400)
    else:
        ratios, after = compare_rules(asked.nights, SIGMAS, min(200, asked.nights))
        for kind in KINDS:
            print(f"Proposals of another kind: {kind.name}")
            for sigma in (0.6, 2.4):
                compare(kind, sigma, True, asked.nights // 2, 0)
        percent = compare_claims(after, 6000)
    print(f"seconds: {time.perf_counter() - began:.0f}")
    for sigma in ratios:
        if sigma in RATIO_SIGMAS:
            print(f"ratio_to_greedy_{sigma}: {ratios[sigma]:.2f}")
    print(f"false_claims_percent: {percent:.2f}")


if __name__ == "__main__":
    main()
