"""
What a board's runs say about its trainers: the belief behind keep, discard and repeat, and claims.

The trainers of a board form a tree: each was made from another by one edit. A score is its trainer's true
val_bpb plus seed noise, and a trainer is its parent plus the effect of the edit. So every run says something
about the trainer that was run, about the one it was made from, and so on: a best that was lucky is found out
by its challengers, without another run of its own. The belief is a mean and an error for every trainer, from
all runs together. The search builds on the trainer that is lowest or may well be, and goes back where it was
wrong.

An edit has no effect, gains or harms; gains and harms are exponential. The posterior is found by expectation
propagation (Minka, 2001) on the tree. Seed noise and size of the effects are estimated from the same runs, by
expectation maximization, so that a board needs no noise on record. docs/search.md says it in words, and
benchmarks/night.py measures it.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean, median, variance
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Nodes = NDArray[np.int64]

OPTIMISM = 0.5  # a trainer counts as its mean less so many of its errors: what may be good is tried further
PATIENCE = 0.1  # going back to an earlier trainer must promise more than so many errors of the current one
CLIP = 2.5  # a residual counts as at most so many sigma: seed noise has heavy tails
TIE = 1.25  # times the believed harm of a tie is the credit for removed code: one sweep is not exact
ENOUGH = 0.5  # runs that other evidence must be worth before it may outweigh a run
DIVERGED = 3.0  # an effect counts as at most so many mean ones: a run that diverged is no measure of edits
LARGE = 20.0  # times the usual size, that an effect has now and then,
LARGE_SHARE = 0.05  # and how often
REPEATS = 3  # runs of trainers that were run more than once, before they say how large the noise is
NOISIER = 3.0  # times the assumed noise, from which effects are assumed larger as well
ROBUST = 6  # such runs, from which their median distance says it
SURPRISING = 3.0  # times the assumed size of effects: beyond it, large noise would look the same
EXTRA = 4  # sweeps of propagation alone after each run: an edit that surprises moves its site by far
DAMPING = 0.8  # share of each update of a site that is taken
REPLAYED = 100  # the last runs of a board, at least so many, are taken one by one; the older ones together
MAX_REPEATS = 3  # runs of one trainer that the rule itself asks for
EXPERIMENT = 2.0  # a new experiment is worth so many times its expected gain, as it teaches too (measured)

# A claim is looked at after so many runs of each trainer; each look may spend an equal part of alpha.
LOOKS = (3, 4, 6, 8, 12, 16)
HOPELESS = 0.25  # p of a look, by ranks, above which further runs are not worth their time
RANKS_FROM = 6  # runs of each trainer from which ranks can reach the level; below it, Student's t


@dataclass(frozen=True)
class Prior:
    """What is believed of a board before its first run; its own runs soon outweigh it.

    Shares and sizes of the effects are those of the original's published night (karpathy/autoresearch,
    branch exp/H100/mar8, results.tsv). Of 124 edits 22 lowered val_bpb (18%), by 0.0008 on average without
    the largest. The 30% next to them count as without effect; the rest was worse by 0.002 on average, one
    diverged run apart. Seed noise was measured from 0.0002 (an H100) to 0.008 (a CPU).
    """

    better: float = 0.18
    equal: float = 0.30
    gain: float = 0.0008  # mean gain of an edit that helps, bpb
    harm: float = 0.0020  # mean harm of an edit that harms, bpb
    sigma: float = 0.0006  # standard deviation of val_bpb over seeds, bpb
    size: float = 1.0  # of all effects, in units of gain and harm
    effect_runs: float = 2.0  # edits that the sizes of gain and harm are worth
    sigma_runs: float = 0.2  # runs that sigma is worth


PRIOR = Prior()


@dataclass(frozen=True)
class Observation:
    """One scored run of a board. A run of a source that was run before is a repeat."""

    source: str  # content hash of the trainer
    val_bpb: float
    kept: bool  # the verdict at the time; of the run to judge, anything
    # Source that the edit was made on. None: the one kept last. The trainer itself, or one that was not run:
    # it counts as made from none.
    parent: str | None = None
    removes_code: bool = False  # the edit makes the trainer shorter, and so needs no gain


@dataclass(frozen=True)
class Decision:
    """What to do after a run, and the numbers behind it, in bpb. A negative effect is a gain."""

    action: str  # keep, discard or repeat
    build_on: str  # source to go on from: this one (keep), the one before it, or an earlier one (go back)
    best: str  # source with the lowest mean: what a night ends with, and what a claim is about
    p_better: float  # that the edit lowered val_bpb; no effect counts half
    effect: float  # of the edit on val_bpb
    effect_error: float
    before: float  # mean belief about the trainer that was built on, before this run
    before_error: float
    after: float  # mean belief about build_on, after it
    after_error: float
    sigma: float  # belief about the seed noise
    reason: str


class Effects(NamedTuple):
    """Posterior of the effects of edits, elementwise."""

    mean: Floats
    var: Floats
    p_gain: Floats
    p_harm: Floats
    gain: Floats  # mean gain if it is one
    harm: Floats  # mean harm if it is one


class Half(NamedTuple):
    """A normal cut off at zero, elementwise."""

    weight: Floats
    mean: Floats
    var: Floats


def _half(seen: Floats, error: Floats, size: Floats) -> Half:
    """Return the posterior of an exponential effect of mean `size` that was seen with a normal error.

    Its weight lacks the factor exp(-seen^2 / (2 error^2)), which all kinds of effect share.
    """
    from scipy.special import erfcx  # here, as it takes 50 ms to import

    x = np.maximum(seen / error - error / size, -1e3)
    tail = erfcx(
        -np.minimum(x, 30.0) / math.sqrt(2)
    )  # beyond 30 all is certain, and exp(x^2 / 2) still a number
    hazard = math.sqrt(2 / math.pi) / tail
    return Half(
        tail / (2 * size), error * (x + hazard), error**2 * np.maximum(1 - hazard * (x + hazard), 0.0)
    )


def _wide(seen: Floats, error: Floats, size: Floats) -> Half:
    """Return _half for an effect that is now and then far larger than `size`: few edits change everything."""
    usual, large = _half(seen, error, size), _half(seen, error, LARGE * size)
    w_usual, w_large = (1 - LARGE_SHARE) * usual.weight, LARGE_SHARE * large.weight
    total = w_usual + w_large
    mean = (w_usual * usual.mean + w_large * large.mean) / total
    square = (w_usual * (usual.var + usual.mean**2) + w_large * (large.var + large.mean**2)) / total
    return Half(total, mean, np.maximum(square - mean**2, 0.0))


def effects(seen: Floats, var: Floats, prior: Prior, scale: Floats) -> Effects:
    """Return the posterior of effects that were seen with error variance var, in units of prior.gain."""
    error = np.sqrt(var)
    gain, harm = _wide(-seen, error, scale), _wide(seen, error, scale * (prior.harm / prior.gain))
    w_gain, w_harm = gain.weight * prior.better, harm.weight * (1 - prior.better - prior.equal)
    total = w_gain + w_harm + prior.equal / (error * math.sqrt(2 * math.pi))
    p_gain, p_harm = w_gain / total, w_harm / total
    mean = p_harm * harm.mean - p_gain * gain.mean
    square = p_harm * (harm.var + harm.mean**2) + p_gain * (gain.var + gain.mean**2)
    return Effects(mean, np.maximum(square - mean**2, 1e-6 * var), p_gain, p_harm, gain.mean, harm.mean)


def _prior_moments(prior: Prior, scale: Floats) -> tuple[Floats, Floats]:
    """Return mean and variance of an edit's effect before its run, in units of prior.gain."""
    gain, harm = scale, scale * (prior.harm / prior.gain)
    p_harm = 1 - prior.better - prior.equal
    mean = p_harm * harm - prior.better * gain
    return mean, 2 * (p_harm * harm**2 + prior.better * gain**2) - mean**2


class Forest:
    """The belief about the trainers of one board, or of many boards side by side, as the simulator needs it.

    A node is a trainer. Arrays over nodes, runs and boards are flat; values are in units of `prior.gain`.
    """

    def __init__(self, boards: int, capacity: int, prior: Prior = PRIOR) -> None:
        """Make room for `capacity` trainers and as many runs, of all boards together."""
        self.prior, self.boards = prior, boards
        self.nodes = 0
        self.runs = 0
        self._parent = np.full(capacity, -1)
        self._board = np.zeros(capacity, np.int64)
        self._depth = np.zeros(capacity, np.int64)
        self._removes = np.zeros(capacity, bool)
        self._tau = np.zeros(capacity)  # the site of the edit that made a node: its precision,
        self._nu = np.zeros(capacity)  # and precision times mean
        self._node = np.zeros(capacity, np.int64)  # of each run
        self._value = np.zeros(capacity)
        self._weight = np.ones(capacity)
        self.sigma = np.full(boards, prior.sigma / prior.gain)
        self.scale = np.full(boards, prior.size)
        self.mean = np.zeros(0)
        self.var = np.zeros(0)

    def add(self, board: Nodes, parent: Nodes, removes_code: Any = False) -> Nodes:
        """Add a trainer to each of `board`, made from the node `parent` (-1: none). Return the new nodes."""
        new = np.arange(self.nodes, self.nodes + len(board))
        self.nodes += len(board)
        self._parent[new] = parent
        self._board[new] = board
        self._removes[new] = removes_code
        self._depth[new] = np.where(parent >= 0, self._depth[parent] + 1, 0)
        mean, var = _prior_moments(self.prior, self.scale[board])
        self._tau[new], self._nu[new] = 1 / var, mean / var
        return new

    def observe(self, node: Nodes, value: Floats) -> None:
        """Add one run of each of the trainers `node`."""
        new = slice(self.runs, self.runs + len(node))
        self.runs += len(node)
        self._node[new], self._value[new] = node, value

    def fit(self, sweeps: int = 1) -> None:
        """Update the belief by so many sweeps over all edits and runs."""
        self._start_sites()
        for _ in range(sweeps):
            self._weigh()
            self._propagate()
            self._estimate(self._update_sites())
        for _ in range(EXTRA):
            self._propagate()
            self._update_sites()
        self._propagate()

    def _start_sites(self) -> None:
        """Match the sites of new trainers at once: a run that diverged must not move its parent."""
        known = len(self.mean)
        new = np.arange(known, self.nodes)
        parent = self._parent[new]
        new, parent = new[(parent >= 0) & (parent < known)], parent[(parent >= 0) & (parent < known)]
        node, board = self._node[: self.runs], self._board[new]
        runs = np.bincount(node, minlength=self.nodes)[new]
        value = np.bincount(node, self._value[: self.runs], self.nodes)[new] / runs
        self._match(new, value - self.mean[parent], self.var[parent] + self.sigma[board] ** 2 / runs, 1.0)

    def _edits(self) -> Nodes:
        return np.flatnonzero(self._parent[: self.nodes] >= 0)

    def _levels(self) -> list[Nodes]:
        """Return the nodes by their depth in the tree, without the first trainers."""
        depth = self._depth[: self.nodes]
        order = np.argsort(depth, kind="stable")
        return np.split(order, np.searchsorted(depth[order], np.arange(1, depth.max() + 1)))[1:]

    def _propagate(self) -> None:
        """Pass normal messages up and down the tree: marginals of trainers, and cavities of edits."""
        n = self.nodes
        tau = self._tau
        nu = self._nu
        node = self._node[: self.runs]
        precision = self._weight[: self.runs] / self.sigma[self._board[node]] ** 2
        below = np.bincount(node, precision, n)  # from the trainer's own runs and its descendants'
        below_nu = np.bincount(node, precision * self._value[: self.runs], n)
        up, up_nu, above, above_nu = np.zeros((4, n))
        levels = self._levels()
        for at in reversed(levels):
            share = tau[at] / (below[at] + tau[at])
            up[at] = below[at] * share
            up_nu[at] = share * below_nu[at] - (1 - share) * nu[at]
            np.add.at(below, self._parent[at], up[at])
            np.add.at(below_nu, self._parent[at], up_nu[at])
        total, total_nu = below.copy(), below_nu.copy()
        for at in levels:
            above[at] = total[self._parent[at]] - up[at]
            above_nu[at] = total_nu[self._parent[at]] - up_nu[at]
            share = tau[at] / (above[at] + tau[at])
            total[at] = below[at] + above[at] * share
            total_nu[at] = below_nu[at] + share * above_nu[at] + (1 - share) * nu[at]
        self._below = below
        self._below_nu = below_nu
        self._above = above
        self._above_nu = above_nu
        self.mean, self.var = total_nu / total, 1 / total

    def _cavity(self, node: Nodes) -> tuple[Floats, Floats]:
        """Return what runs alone say of the effects of the edits that made `node`: mean and variance."""
        mean = self._below_nu[node] / self._below[node] - self._above_nu[node] / self._above[node]
        return mean, 1 / self._below[node] + 1 / self._above[node]

    def effects(self, node: Nodes) -> Effects:
        """Return the posterior of the effects of the edits that made `node`."""
        seen, var = self._cavity(node)
        return effects(seen, var, self.prior, self.scale[self._board[node]])

    def _update_sites(self) -> Effects:
        """Match the normal site of every edit to the posterior of its effect. Return these posteriors."""
        edit = self._edits()
        return self._match(edit, *self._cavity(edit), DAMPING)

    def _match(self, edit: Nodes, seen: Floats, var: Floats, damping: float) -> Effects:
        """Match sites to the posterior of effects that were seen with variance var. Return the posterior."""
        posterior = effects(seen, var, self.prior, self.scale[self._board[edit]])
        tau = np.maximum(1 / posterior.var - 1 / var, 1e-4 / var)
        nu = posterior.mean * (1 / var + tau) - seen / var
        self._tau[edit] += damping * (tau - self._tau[edit])
        self._nu[edit] += damping * (nu - self._nu[edit])
        return posterior

    def _weigh(self) -> None:
        """Give a run less weight where it is far worse than its trainer's other runs and children suggest."""
        n = self.nodes
        node = self._node[: self.runs]
        weight = self._weight[: self.runs]
        value = self._value[: self.runs]
        board = self._board[:n]
        edit = self._edits()
        own = np.bincount(node, weight, n)
        own_sum = np.bincount(node, weight * value, n)
        mean, var = _prior_moments(self.prior, self.scale[board[edit]])
        child = 1 / (1 / own[edit] + var / self.sigma[board[edit]] ** 2)  # a child's weight, in runs
        parent = self._parent[edit]
        rest = (own + np.bincount(parent, child, n))[node] - weight
        child_sum = np.bincount(parent, child * (own_sum[edit] / own[edit] - mean), n)
        rest_sum = (own_sum + child_sum)[node] - weight * value
        rest = np.maximum(rest, 1e-9)  # of a trainer that was run once and has no children: it says nothing
        worse = (value - rest_sum / rest) / (self.sigma[board[node]] * np.sqrt(1 + 1 / rest))
        weight = np.clip((CLIP / np.maximum(worse, 1e-9)) ** 2, 1e-3, 1.0)
        # One child is no reason to doubt its parent's run: it may be a gain of a size not seen yet.
        self._weight[: self.runs] = np.where(rest < ENOUGH, 1.0, weight)

    def _estimate(self, seen: Effects) -> None:
        """Estimate each board's seed noise and size of effects: one step of expectation maximization."""
        node = self._node[: self.runs]
        boards = self.boards
        prior = self.prior
        board, weight = self._board[node], self._weight[: self.runs]
        square = (self._value[: self.runs] - self.mean[node]) ** 2 + self.var[node]
        square = weight * np.minimum(square, (CLIP * self.sigma[board]) ** 2)
        total = prior.sigma_runs * (prior.sigma / prior.gain) ** 2 + np.bincount(board, square, boards)
        self.sigma = np.sqrt(total / (prior.sigma_runs + np.bincount(board, weight, boards)))
        board = self._board[self._edits()]
        most = DIVERGED * self.scale[board]
        gain = np.minimum(seen.gain, most)
        harm = np.minimum(seen.harm * (prior.gain / prior.harm), most)
        size = np.bincount(board, seen.p_gain * gain + seen.p_harm * harm, boards)
        edits = np.bincount(board, seen.p_gain + seen.p_harm, boards)
        self.scale = (prior.effect_runs * prior.size + size) / (prior.effect_runs + edits)

    def score(self) -> Floats:
        """Return what a trainer counts as: its mean less OPTIMISM errors, less the credit for removed code.

        The credit is what an edit that seems to change nothing is believed to harm: so that it needs no gain.
        """
        score = self.mean - OPTIMISM * np.sqrt(self.var)
        if not self._removes[: self.nodes].any():
            return score
        credit = np.zeros(self.nodes)
        for at in self._levels():
            tie = effects(
                np.zeros(len(at)), self._cavity(at)[1], self.prior, self.scale[self._board[at]]
            ).mean
            tie = TIE * np.maximum(tie, 0.0)
            credit[at] = credit[self._parent[at]] + np.where(self._removes[at], tie, 0.0)
        return score - credit

    def _lowest(self, score: Floats) -> Nodes:
        """Return the node of each board with the lowest score, the earliest of several."""
        board = self._board[: self.nodes]
        low = np.full(self.boards, np.inf)
        np.minimum.at(low, board, score)
        lowest = np.full(self.boards, self.nodes)
        at = np.flatnonzero(score == low[board])
        np.minimum.at(lowest, board[at], at)
        return lowest

    def best(self, barred: Nodes | None = None) -> Nodes:
        """Return the node of each board with the lowest mean, the barred ones left out."""
        mean = self.mean.copy()
        if barred is not None:
            mean[barred] = np.inf
        return self._lowest(mean)

    def choose(self, current: Nodes, new: Nodes, barred: Nodes | None = None) -> Nodes:
        """Return the node of each board to build on: `current`, the one that was run, or an earlier one.

        barred: nodes that are not gone back to
        """
        score = self.score()
        if barred is not None:
            score[barred] = np.inf
        best = self._lowest(score)
        back = score[best] < score[current] - PATIENCE * np.sqrt(self.var[current])
        return np.where((best == new) | back, best, np.where(score[new] < score[current], new, current))

    def repeat_pays(self, node: Nodes) -> NDArray[np.bool_]:
        """Say of `node`, one trainer of each board, whether another run of it beats a new experiment.

        A run is worth the expected fall of the lowest mean: the knowledge gradient (Frazier, Powell and
        Dayanik, 2008), with the correlation between trainers left out.
        """
        from scipy.special import ndtr

        others = self.mean.copy()
        others[node] = np.inf
        rival = others[self._lowest(others)]  # inf on a board of one trainer, where no run can pay
        board = self._board[node]
        change = self.var[node] / np.sqrt(self.var[node] + self.sigma[board] ** 2)
        z = np.maximum(-np.abs(self.mean[node] - rival) / change, -30.0)
        value = change * (np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) + z * ndtr(z))
        few = np.bincount(self._node[: self.runs], minlength=self.nodes)[node] < MAX_REPEATS
        return few & (value > EXPERIMENT * self.prior.better * self.scale[board])


class History(NamedTuple):
    """A board's runs as a tree of trainers."""

    sources: list[str]  # of each node
    parent: list[int]  # of each node; -1 of the first
    removes: list[bool]  # of each node
    node: list[int]  # of each run
    current: int  # node that was built on when the last run began


def history(observations: Sequence[Observation]) -> History:
    """Return the tree of the trainers of a board's runs, which come in time order."""
    index: dict[str, int] = {}
    parent: list[int] = []
    removes: list[bool] = []
    nodes: list[int] = []
    tip = current = -1
    for one in observations:
        is_new = one.source not in index
        node = index.setdefault(one.source, len(index))
        # A parent that was never scored tells nothing of the edit: the new trainer is a first one.
        current = index.get(one.parent, -1) if one.parent else tip
        if is_new:
            parent.append(-1 if current == node else current)
            removes.append(one.removes_code)
        nodes.append(node)
        current = node if current < 0 else current
        tip = node if one.kept else current
    return History(list(index), parent, removes, nodes, current)


def noise_of_repeats(observations: Sequence[Observation]) -> float | None:
    """Return the seed noise that repeats alone show, in bpb; None where there are fewer than REPEATS.

    From ROBUST runs on it is 1.4826 times the median distance from the median of a trainer's runs, which a
    run that went wrong does not move; below, the pooled standard deviation. Of three runs, two may be close
    by luck, and a noise that is taken for too small stays so: what would say so counts as gone wrong.
    """
    groups: dict[str, list[float]] = {}
    for one in observations:
        groups.setdefault(one.source, []).append(one.val_bpb)
    repeated = [values for values in groups.values() if len(values) > 1]
    runs = sum(len(values) for values in repeated)
    if runs < REPEATS:
        return None
    freedom = runs - len(repeated)
    if runs < ROBUST:
        return math.sqrt(sum(variance(values) * (len(values) - 1) for values in repeated) / freedom)
    distance = median(abs(value - median(values)) for values in repeated for value in values)
    return 1.4826 * distance * math.sqrt(runs / freedom)


class Belief:
    """The belief after all runs of one board, each taken as the simulator takes it.

    Attributes:
        forest: after the last run.
        mean, var: of its nodes, before the last run.
    """

    def __init__(self, prior: Prior, runs: int) -> None:
        self.forest = Forest(1, runs + 2 * REPLAYED, prior)  # room for the runs that may follow
        self.mean = self.forest.mean
        self.var = self.forest.var
        self._first = first_alone(runs)
        self._tree = History([], [], [], [], -1)
        self._values: list[float] = []

    def goes_on_with(self, prior: Prior, tree: History, values: Sequence[float]) -> bool:
        """Return whether these are the runs that were taken, and perhaps more that can be taken now."""
        nodes = len(self._tree.sources)
        runs = len(self._values)
        return (
            prior == self.forest.prior
            and first_alone(len(values)) == self._first
            and tree.parent[:nodes] == self._tree.parent
            and tree.removes[:nodes] == self._tree.removes
            and tree.node[:runs] == self._tree.node
            and values[:runs] == self._values
        )

    def take(self, tree: History, values: list[float]) -> None:
        """Take the runs that are new. values: of all runs, in units of prior.gain."""
        forest = self.forest
        for i in range(len(self._values), len(values)):
            self.mean, self.var = forest.mean, forest.var
            if tree.node[i] == forest.nodes:
                parent = tree.parent[tree.node[i]]
                forest.add(np.zeros(1, np.int64), np.array([parent]), tree.removes[tree.node[i]])
            forest.observe(np.array([tree.node[i]]), np.array([values[i]]))
            if i >= self._first:
                forest.fit(50 if i == self._first else 1)
        self._tree, self._values = tree, values


def first_alone(runs: int) -> int:
    """Return the index of the first run that is taken alone. It moves by REPLAYED runs at a time."""
    return max(0, (runs - REPLAYED - 1) // REPLAYED * REPLAYED)


_beliefs: list[Belief] = []  # the last one: the next is mostly of the same runs, or of one more


def _grow(observations: Sequence[Observation], tree: History, prior: Prior) -> Belief:
    """Return the belief after all runs. It is valid until the next call.

    What repeats show of the noise takes the place of the prior's: expectation maximization from that alone
    takes more than ten runs to find a noise that is thirty times as large. Where it is larger, effects are
    believed to be so too: it is a board of short runs or small models.
    """
    repeated = noise_of_repeats(observations)
    if repeated:
        size = max(1.0, repeated / prior.sigma / NOISIER)
        prior = replace(prior, sigma=repeated, sigma_runs=REPEATS, size=size)
    values = [(one.val_bpb - observations[0].val_bpb) / prior.gain for one in observations]
    belief = _beliefs.pop() if _beliefs else None
    if belief is None or not belief.goes_on_with(prior, tree, values):
        belief = Belief(prior, len(values))
    belief.take(tree, values)
    _beliefs.append(belief)
    return belief


class Edit(NamedTuple):
    """What is believed of an edit's effect, in bpb."""

    p_better: float
    effect: float
    error: float


def _edits(forest: Forest, parents: Sequence[int]) -> list[Edit]:
    """Return the belief about the edits that made the nodes. The parent of a first trainer is -1."""
    none = Edit(1.0 if forest.runs == 1 else 0.5, 0.0, 0.0)
    edits = [none] * len(parents)
    nodes = [node for node, parent in enumerate(parents) if parent >= 0]
    if not nodes:
        return edits
    unit = forest.prior.gain
    seen = forest.effects(np.array(nodes))
    p_better = np.clip((1 + seen.p_gain - seen.p_harm) / 2, 0.0, 1.0)
    numbers = zip(
        p_better.tolist(), (seen.mean * unit).tolist(), (np.sqrt(seen.var) * unit).tolist(), strict=True
    )
    for node, number in zip(nodes, numbers, strict=True):
        edits[node] = Edit(*number)
    return edits


def judge(
    observations: Sequence[Observation],
    prior: Prior = PRIOR,
    candidates: Collection[str] | None = None,
    built_on: str = "",
) -> Decision:
    """Return what to do after the last of a board's runs.

    observations: all scored runs of the board that compare, oldest first; the last is the one to judge
    candidates: sources that may be gone back to; None: all of them
    built_on: source that the search builds on, where it is not the one that the last was made from
    Raises ValueError without a run, or where a val_bpb is no finite number.
    """
    if not observations or not all(math.isfinite(one.val_bpb) for one in observations):
        raise ValueError("a decision needs at least one run, and of each a val_bpb that is a number")
    tree = history(observations)
    if built_on in tree.sources:
        tree = tree._replace(current=tree.sources.index(built_on))
    belief = _grow(observations, tree, prior)
    forest, mean, var = belief.forest, belief.mean, belief.var
    node, current = tree.node[-1], tree.current
    barred = None
    if candidates is not None:
        open_to = {*candidates, tree.sources[node], tree.sources[current]}
        barred = np.array([i for i, source in enumerate(tree.sources) if source not in open_to], np.int64)
    chosen = int(forest.choose(np.array([current]), np.array([node]), barred)[0])
    action = "keep" if chosen == node else "discard"
    if action == "discard" and forest.repeat_pays(np.array([node]))[0]:
        action, chosen = "repeat", current
    edit = _edits(forest, tree.parent)[node]
    if current >= len(mean):  # it was not there before the run
        mean, var = forest.mean, forest.var
    unit, origin = prior.gain, observations[0].val_bpb
    return Decision(
        action=action,
        build_on=tree.sources[chosen],
        best=tree.sources[int(forest.best(barred)[0])],
        p_better=edit.p_better,
        effect=edit.effect,
        effect_error=edit.error,
        before=origin + float(mean[current]) * unit,
        before_error=math.sqrt(var[current]) * unit,
        after=origin + float(forest.mean[chosen]) * unit,
        after_error=math.sqrt(forest.var[chosen]) * unit,
        sigma=float(forest.sigma[0]) * unit,
        reason=_reason(action, edit, tree, chosen != current),
    )


def _reason(action: str, edit: Edit, tree: History, moves: bool) -> str:
    """Return one plain line for the ledger."""
    node = tree.node[-1]
    runs = tree.node.count(node)
    if len(tree.node) == 1:
        return "first result on this board"
    if runs == 1 and tree.parent[node] < 0:
        return "first result of the trainer as committed"
    back = "; back to an earlier trainer, now probably better" if moves and action == "discard" else ""
    if node == tree.current:
        return f"another run of the current trainer{back or ', which stays'}"
    numbers = f"effect {edit.effect:+.6f} +- {edit.error:.6f}, P(better) {edit.p_better:.2f}"
    if action == "repeat":
        return f"worth another run: {numbers}"
    if action == "keep":
        return f"{'probably' if edit.effect < 0 else 'possibly'} better: {numbers}"
    if edit.effect < 0 and tree.parent[node] not in (-1, tree.current):
        return f"better than what it was made on, not than what is best by now: {numbers}{back}"
    return f"not better, as far as is known: {numbers}{back}"


class Standing(NamedTuple):
    """What is believed of a trainer now, in bpb."""

    mean: float
    error: float
    merit: float  # the mean, less the credit for removed code: the lowest is what a night ends with
    counts_as: float  # what the search compares: the merit less OPTIMISM errors
    parent: str  # "" of a first trainer
    p_better: float  # that the edit that made it lowered val_bpb
    effect: float  # of that edit
    effect_error: float
    runs: int


class Survey(NamedTuple):
    """What is believed of a board now."""

    trainers: dict[str, Standing]  # by source, oldest first
    best: str  # source with the lowest mean
    sigma: float  # seed noise, bpb
    noise_is_open: bool  # scores differ by far more than assumed, and no repeats say whether that is noise


def survey(observations: Sequence[Observation], prior: Prior = PRIOR) -> Survey | None:
    """Return what is believed of every trainer of a board, None without a run. See judge."""
    if not observations:
        return None
    tree = history(observations)
    forest = _grow(observations, tree, prior).forest
    unit, origin = prior.gain, observations[0].val_bpb
    score = forest.score()
    edits = _edits(forest, tree.parent)
    runs = Counter(tree.node)
    trainers = {}
    for node, source in enumerate(tree.sources):
        parent = tree.parent[node]
        edit = edits[node]
        trainers[source] = Standing(
            mean=origin + float(forest.mean[node]) * unit,
            error=math.sqrt(forest.var[node]) * unit,
            merit=origin + float(score[node] + OPTIMISM * math.sqrt(forest.var[node])) * unit,
            counts_as=origin + float(score[node]) * unit,
            parent=tree.sources[parent] if parent >= 0 else "",
            p_better=edit.p_better,
            effect=edit.effect,
            effect_error=edit.error,
            runs=runs[node],
        )
    best = tree.sources[int(forest.best()[0])]
    noise_is_open = forest.scale[0] > SURPRISING and noise_of_repeats(observations) is None
    return Survey(trainers, best, float(forest.sigma[0]) * unit, noise_is_open)


class Visible(NamedTuple):
    """The smallest change of val_bpb that can be seen, in bpb."""

    run: float  # in one run, against a best that was run once
    night: float  # in a night that does nothing else: half of its runs with the change and half without


def visible_change(sigma: float, experiments: int) -> Visible:
    """Return the smallest change that 19 of 20 comparisons tell from none, at a seed noise of sigma bpb."""
    half = max(experiments // 2, 1)
    return Visible(1.645 * sigma * math.sqrt(2), 1.645 * sigma * math.sqrt(2 / half))


@dataclass(frozen=True)
class Claim:
    """The answer of the test of a claim. A positive gain is an improvement, in bpb."""

    verdict: str  # claim, go on (another run of each, with a fresh seed) or stop (no claim)
    gain: float
    low: float  # interval of the gain, at the level of one look
    high: float
    p: float  # holds whenever one stops
    runs: int  # of each trainer
    reason: str


def claim(baseline_values: Sequence[float], best_values: Sequence[float], alpha: float = 0.01) -> Claim:
    """Test whether the best is better than the baseline, on runs of both with fresh seeds, in time order.

    The test is group-sequential: at each of LOOKS the claim is made where p is at most alpha over the number
    of looks, so that a false one has probability alpha at most, whenever one looks (Bonferroni). From six
    runs of each trainer p is the exact one of Wilcoxon's rank sum, which assumes nothing of the noise but
    that seeds are exchangeable; before, it is that of Student's t, as ranks of so few cannot reach the
    level. Runs that went wrong make both less sure, not more.
    """
    level = alpha / len(LOOKS)
    runs = min(len(baseline_values), len(best_values))
    p = 1.0
    here = 0.0
    for look in (n for n in LOOKS if n <= runs):
        here = _p_better(baseline_values[:look], best_values[:look])
        p = min(p, here * len(LOOKS))
        if here <= level:
            runs = look
            break
    if runs < 2:
        return Claim("go on", math.nan, -math.inf, math.inf, 1.0, runs, "too few runs to say anything")
    gain, low, high = _interval(baseline_values[:runs], best_values[:runs], level)
    numbers = f"gain {gain:+.6f} [{low:+.6f}, {high:+.6f}], p {p:.2g}, {runs} runs of each"
    if p <= alpha:
        return Claim("claim", gain, low, high, p, runs, f"better than the baseline: {numbers}")
    if runs >= LOOKS[-1] or (runs >= RANKS_FROM and here > HOPELESS):
        return Claim("stop", gain, low, high, p, runs, f"not shown to be better: {numbers}")
    return Claim("go on", gain, low, high, p, runs, f"not decided: {numbers}")


def _p_better(baseline: Sequence[float], best: Sequence[float]) -> float:
    """Return the one-sided p of as many runs of each trainer."""
    n = len(best)
    if n < RANKS_FROM:
        from scipy.special import stdtr

        gain = fmean(baseline) - fmean(best)
        error = math.sqrt((variance(baseline) + variance(best)) / n)
        return float(stdtr(2 * n - 2, -gain / error)) if error > 0 else float(gain <= 0)
    lower = sum(y < x for x in baseline for y in best)  # a tie counts for the baseline
    ways = _rank_sums(n)
    return sum(ways[lower:]) / sum(ways)


@cache
def _rank_sums(n: int) -> list[int]:
    """Return, for u to n^2, in how many orders of n and n values u of their pairs are one way round."""
    ways = [1] + [0] * n * n
    for i in range(1, n + 1):  # the Gaussian binomial: times 1 - x^(n + i), over 1 - x^i
        for u in range(n * n, n + i - 1, -1):
            ways[u] -= ways[u - n - i]
        for u in range(i, n * n + 1):
            ways[u] += ways[u - i]
    return ways


def _interval(baseline: Sequence[float], best: Sequence[float], level: float) -> tuple[float, float, float]:
    """Return the gain and its interval at a one-sided level: it is above 0 where p is below the level."""
    n = len(best)
    if n < RANKS_FROM:
        from scipy.special import stdtrit

        gain = fmean(baseline) - fmean(best)
        half = float(stdtrit(2 * n - 2, 1 - level)) * math.sqrt((variance(baseline) + variance(best)) / n)
        return gain, gain - half, gain + half
    differences = sorted(x - y for x in baseline for y in best)  # Hodges and Lehmann, 1963
    ways = _rank_sums(n)
    k = 0
    beyond = 0
    while (beyond + ways[k]) / sum(ways) <= level:
        beyond, k = beyond + ways[k], k + 1
    if k == 0:
        return median(differences), -math.inf, math.inf
    return median(differences), differences[k - 1], differences[-k]
