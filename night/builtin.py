"""
`autoresearch loop --agent builtin`: a search over the trainer's constants, in the place of a coding agent.

    uv run autoresearch loop --experiments 20        # it is the agent where --agent names none
    python -m night.builtin                          # one edit of this machine's trainer

It needs no language model, no key and no network. It is the bar that a language model must clear.

A turn: read the constants of the trainer as it lies there, choose one to three of them, let Optuna propose
new values from all that the ledger and the runs' copies of the trainer say, and write these and nothing else.
Every turn is a process of its own, and rebuilds the study.

Why few constants: what was kept is good already, so that a step in all of them at once is nearly always
worse, while a gain of one to three still shows in a single noisy score. Runs that differ in the others too
are told all the same: a night has few scores, and in simulated nights leaving them out cost more.

Why TPE (Bergstra et al. 2011): it is told any finished run, whoever made the edit, takes a failed one as bad,
and needs no state from turn to turn. CMA-ES moves all constants at once in generations of a dozen that must
come from itself; a Gaussian process would need PyTorch, which a Mac does not have.
"""

import ast
import math
import random
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from backends.platforms import StartSizes
from backends.protocol import RunSettings
from launcher.harness import source_hash
from launcher.ledger import STATUSES, Flag, Row, refuted_runs
from launcher.runs import ledger, trainer_of
from launcher.setting import Setting, resolve
from night import repo
from prepare import UserError

CHANGED = (1, 2, 3)  # constants that an edit changes,
SHARES = (0.5, 0.3, 0.2)  # and the share of the edits that change so many
LARGEST = 1e15  # number that is read as a constant
TRIES = 100  # proposals, until one is new
SEEDS = 1_000_000  # agents at work at once have other seeds, and must not draw the same


# ---------------------------------------------------------------------------
# What is searched
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Knob:
    """How a constant is searched: on a grid of steps from the value that it has now.

    A step adds `step` (linear), or is `step` octaves of the value (log) or of its distance from 1
    (complement: 0.95 -> 0.975 is an octave).
    """

    scale: Literal["linear", "log", "complement"]
    step: float
    reach: int  # steps to either side
    low: float  # the constant is never set lower
    high: float  # or higher
    unit: int = 0  # it stays a multiple of this whole number; 0: any number

    def allows(self, value: float) -> bool:
        return self.low <= value <= self.high and (not self.unit or value % self.unit == 0)

    def move(self, value: float, steps: int) -> float:
        """Return the value so many steps higher, rounded as it is to be written."""
        if self.scale == "linear":
            return round(value + steps * self.step, 6)
        octaves = steps * self.step
        if self.scale == "log":
            new = value * 2**octaves
            return new if self.unit else rounded(new, 3)
        return round(1 - rounded((1 - value) * 2**-octaves, 2), 6)

    def steps(self, value: float, other: float) -> float:
        """Return how many steps higher than `value` the other value lies, infinite where none lead there."""
        if self.scale == "linear":
            return (other - value) / self.step
        ratio = other / value if self.scale == "log" else (1 - value) / (1 - other) if other < 1 else 0.0
        return math.log2(ratio) / self.step if ratio > 0 else math.inf

    def span(self, value: float) -> tuple[int, int]:
        """Return the fewest and the most steps from `value` that are allowed. (0, 0): it stays as it is."""
        if not self.allows(value):
            return 0, 0
        lowest = highest = 0
        while lowest > -self.reach and self.allows(self.move(value, lowest - 1)):
            lowest -= 1
        while highest < self.reach and self.allows(self.move(value, highest + 1)):
            highest += 1
        return lowest, highest


def rounded(value: float, digits: int) -> float:
    """Return the value with so many significant digits."""
    return float(f"{value:.{digits}g}")


RATE = Knob("log", step=0.25, reach=6, low=1e-6, high=100.0)  # a third to three times as much
BETA1 = Knob("complement", step=0.5, reach=4, low=0.5, high=0.99)
BETA2 = Knob("complement", step=0.5, reach=4, low=0.8, high=0.999)

# Everything else in the trainer stays: seed, scoring, what only changes memory or compilation.
KNOBS = {
    "N_LAYER": Knob("linear", step=1, reach=2, low=1, high=64, unit=1),
    "N_EMBD": Knob("linear", step=1, reach=2, low=1, high=8192),  # in heads: see searched_constants
    "TOTAL_BATCH_SIZE": Knob("log", step=1, reach=2, low=1, high=2**23),  # in rows of the track: see there
    "SHORT_WINDOW": Knob("log", step=1, reach=2, low=16, high=4096, unit=1),
    "MATRIX_LR": RATE,
    "EMBEDDING_LR": RATE,
    "UNEMBEDDING_LR": RATE,
    "SCALAR_LR": RATE,
    "ADAM_BETAS[0]": BETA1,
    "ADAM_BETAS[1]": BETA2,
    "MUON_BETA2": BETA2,
    "WEIGHT_DECAY": Knob("log", step=0.5, reach=4, low=1e-4, high=2.0),
    "EMBEDDING_DECAY": Knob("linear", step=0.001, reach=5, low=0.0, high=0.3),
    "VALUE_DECAY": Knob("linear", step=0.001, reach=5, low=0.0, high=0.3),
    "UNEMBEDDING_DECAY": Knob("linear", step=0.01, reach=5, low=0.0, high=0.3),
    "INIT_SCALE": Knob("log", step=0.25, reach=4, low=0.1, high=4.0),
    "X0_START": Knob("linear", step=0.05, reach=4, low=0.0, high=1.0),
    "WARMUP_RATIO": Knob("linear", step=0.02, reach=5, low=0.0, high=0.3),
    "WARMDOWN_RATIO": Knob("linear", step=0.05, reach=6, low=0.1, high=1.0),
    "FINAL_LR_FRAC": Knob("linear", step=0.02, reach=5, low=0.0, high=0.5),
    "MOMENTUM_RATIO": Knob("linear", step=0.1, reach=5, low=0.1, high=1.0),
    "SOFTCAP": Knob("log", step=0.25, reach=4, low=5.0, high=60.0),
    "ROPE_BASE": Knob("log", step=0.5, reach=5, low=1e3, high=1e7),
}


def searched_constants(values: dict[str, float], start: StartSizes, seq_len: int) -> dict[str, Knob]:
    """Return those of KNOBS that the trainer has and that can move.

    values: the trainer's constants. start: the platform's sizes. seq_len: tokens in a row of the track.
    """
    head_dim = int(values.get("HEAD_DIM", start.head_dim))
    left_out = set()
    if head_dim < 1:
        left_out.add("N_EMBD")
    if values.get("DEVICE_BATCH_SIZE", 0) < 1:
        left_out.add("TOTAL_BATCH_SIZE")  # DEVICE_BATCH_SIZE could not follow
    if "S" not in start.window_pattern:
        left_out.add("SHORT_WINDOW")  # no layer uses it
    knobs = {name: knob for name, knob in KNOBS.items() if name in values.keys() - left_out}
    if "N_EMBD" in knobs:
        knobs["N_EMBD"] = replace(knobs["N_EMBD"], step=head_dim, unit=head_dim)
    if "TOTAL_BATCH_SIZE" in knobs:
        knobs["TOTAL_BATCH_SIZE"] = replace(knobs["TOTAL_BATCH_SIZE"], unit=seq_len)
    return {name: knob for name, knob in knobs.items() if knob.span(values[name]) != (0, 0)}


# ---------------------------------------------------------------------------
# The trainer's constants
# ---------------------------------------------------------------------------


class Constant(NamedTuple):
    """A number that the trainer assigns at module level: its value, and where the source has it, in bytes."""

    value: float
    begin: int
    end: int


def read_constants(source: bytes, start: StartSizes) -> dict[str, Constant]:
    """Return the constants in capitals that are numbers, START.<size>, or tuples of these (NAME[0], ...).

    They are looked for above the first function or class.

    Raises:
        SyntaxError, ValueError: the source is no Python.
    """
    line_begins = [0]
    for line in source.splitlines(keepends=True):
        line_begins.append(line_begins[-1] + len(line))
    constants = {}
    for name, node in assigned(parse_head(source)):
        value = number(node, start)
        if value is not None:
            assert node.end_lineno is not None and node.end_col_offset is not None
            begin = line_begins[node.lineno - 1] + node.col_offset
            end = line_begins[node.end_lineno - 1] + node.end_col_offset
            constants[name] = Constant(value, begin, end)
    return constants


def parse_head(source: bytes) -> ast.Module:
    """Return the syntax tree of what lies above the first function or class: a night's trainers are many."""
    head = re.split(rb"^(?:def |class |async def |@)", source, maxsplit=1, flags=re.M)[0]
    try:
        return ast.parse(head)
    except SyntaxError:  # it was a line of a string
        return ast.parse(source)


def assigned(module: ast.Module) -> Iterable[tuple[str, ast.expr]]:
    """Yield (name, right-hand side) of the module's plain assignments to names in capitals."""
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        target = targets[0]
        if len(targets) > 1 or not isinstance(target, ast.Name) or not target.id.isupper():
            continue
        if isinstance(statement.value, ast.Tuple):
            for i, element in enumerate(statement.value.elts):
                yield f"{target.id}[{i}]", element
        elif statement.value:
            yield target.id, statement.value


def number(node: ast.expr, start: StartSizes) -> float | None:
    """Return the number that an expression is: a literal or START.<size>. None for anything else."""
    value: object = None
    if isinstance(node, ast.Constant):
        value = node.value
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "START":
        value = getattr(start, node.attr, None)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
        return None
    return float(value)


def replace_constants(source: bytes, constants: dict[str, Constant], new: dict[str, float]) -> bytes:
    """Return the source with new values of some constants. Every other byte stays."""
    for name in sorted(new, key=lambda name: constants[name].begin, reverse=True):
        constant = constants[name]
        source = source[: constant.begin] + plain(new[name]).encode() + source[constant.end :]
    return source


def plain(value: float) -> str:
    """Return a number as a person would write it: whole ones without a point, others with six digits."""
    return str(int(value)) if value == int(value) and value >= 1 else f"{value:.6g}"


# ---------------------------------------------------------------------------
# What was tried
# ---------------------------------------------------------------------------


class Tried(NamedTuple):
    """A trainer that was run: its constants, and its mean val_bpb. None: it failed."""

    values: dict[str, float]
    score: float | None


class History(NamedTuple):
    tried: list[Tried]
    sources: set[str]  # content hashes of all trainers that were run


def read_history(rows: Sequence[Row], setting: Setting) -> History:
    """Return what the ledger's rows say about this setting. Runs whose trainer is not on record are left out.

    An edit that failed its dry run counts as one that failed: a size that does not fit into memory does.
    """
    name = setting.trainer.name
    history = History([], set())
    scores: dict[str, list[float]] = {}
    kept: dict[str, bytes] = {}
    for row in relevant_rows(rows, setting):
        source = source_of(row, name)
        if source is None:
            if row.source:
                history.sources.add(row.source)
            continue
        digest = source_hash(source)
        history.sources.add(digest)
        kept[digest] = source
        scores.setdefault(digest, []).extend([row.val_bpb] if row.scored else [])
    for digest, source in kept.items():
        values = values_of(source, setting.platform.start)
        if values:
            score = sum(scores[digest]) / len(scores[digest]) if scores[digest] else None
            history.tried.append(Tried(values, score))
    return history


def relevant_rows(rows: Sequence[Row], setting: Setting) -> list[Row]:
    """Return the comparable runs of the setting's board, its failed runs, and edits that failed a dry run."""
    if not any(row.comparable for row in rows):
        return []  # and no data are prepared, as the board would need
    refuted = refuted_runs(rows)
    board = setting.board
    here = (setting.platform.name, setting.track.name)
    relevant = []
    for row in rows:
        if Flag.DRY in row.flags:
            is_here = (row.platform, row.track) == here
        else:
            is_here = row.board == board and row.run not in refuted
        failed = row.status in STATUSES and not row.scored and row.judged
        if is_here and (row.comparable or failed):
            relevant.append(row)
    return relevant


def source_of(row: Row, trainer: str) -> bytes | None:
    """Return the trainer of a run: its copy, or what its commit holds. None when neither is here."""
    copy = trainer_of(row)
    if copy is not None:
        return copy.read_bytes() if copy.name == trainer else None
    try:
        source = repo.content(row.commit, trainer) if row.commit else b""
    except UserError:
        return None
    return source if row.source in ("", source_hash(source)) else None


def values_of(source: bytes, start: StartSizes) -> dict[str, float]:
    """Return the constants of a trainer by name, {} when it is no Python."""
    try:
        return {name: constant.value for name, constant in read_constants(source, start).items()}
    except (SyntaxError, ValueError):
        return {}


# ---------------------------------------------------------------------------
# The proposal
# ---------------------------------------------------------------------------


class Proposal(NamedTuple):
    source: bytes  # of the edited trainer
    description: str  # MATRIX_LR 0.04 -> 0.0476, N_LAYER 4 -> 5


def propose(source: bytes, history: History, setting: Setting, seed: int) -> Proposal:
    """Return an edit of a trainer that was not run yet. Equal arguments give an equal edit.

    Raises:
        UserError: the trainer has no constant to search, or nothing new was found.
    """
    start = setting.platform.start
    name = setting.trainer.name
    try:
        constants = read_constants(source, start)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{name} does not compile: {error}") from None
    values = {key: constant.value for key, constant in constants.items()}
    knobs = searched_constants(values, start, setting.track.seq_len)
    if not knobs:
        raise UserError(f"{name} has none of the constants that builtin searches: {', '.join(KNOBS)}")
    rng = random.Random(seed)
    for _ in range(TRIES):
        count = min(len(knobs), rng.choices(CHANGED, SHARES)[0])
        chosen = {key: knobs[key] for key in rng.sample(list(knobs), count)}
        steps = ask(chosen, values, history.tried, rng.randrange(2**31))
        new = {key: chosen[key].move(values[key], n) for key, n in steps.items() if n}
        if "TOTAL_BATCH_SIZE" in new:
            new |= fit_device_batch(new["TOTAL_BATCH_SIZE"], values, setting.track.seq_len)
        edited = replace_constants(source, constants, new)
        if new and source_hash(edited) not in history.sources:
            changes = [f"{key} {plain(values[key])} -> {plain(value)}" for key, value in new.items()]
            return Proposal(edited, ", ".join(changes))
    raise UserError(f"{TRIES} proposals led to nothing that was not run before: {', '.join(knobs)}")


def ask(
    knobs: dict[str, Knob], values: dict[str, float], tried: Sequence[Tried], seed: int
) -> dict[str, int]:
    """Return how many steps Optuna would move each constant from its value now.

    tried: runs out of reach, and those without one of the constants, are left out.
    """
    import optuna  # here, as it takes half a second to import
    from optuna.distributions import BaseDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spans = {name: knob.span(values[name]) for name, knob in knobs.items()}
    space: dict[str, BaseDistribution] = {name: IntDistribution(*span) for name, span in spans.items()}
    # No trials at random first: the trainer as it lies there is known to be good.
    sampler = optuna.samplers.TPESampler(n_startup_trials=0, multivariate=True, seed=seed)
    study = optuna.create_study(sampler=sampler)
    for run in tried:
        steps = {
            name: knob.steps(values[name], run.values.get(name, math.nan)) for name, knob in knobs.items()
        }
        if not all(in_span(n, spans[name]) for name, n in steps.items()):
            continue
        params = {name: round(n) for name, n in steps.items()}
        state = TrialState.PRUNED if run.score is None else TrialState.COMPLETE  # TPE: worse than all scores
        study.add_trial(create_trial(params=params, distributions=space, value=run.score, state=state))
    return dict(study.ask(space).params)


def in_span(steps: float, span: tuple[int, int]) -> bool:
    """Return whether so many steps, rounded, lie in a span. NaN and infinity do not."""
    return math.isfinite(steps) and span[0] <= round(steps) <= span[1]


def fit_device_batch(total: float, values: dict[str, float], seq_len: int) -> dict[str, float]:
    """Return the DEVICE_BATCH_SIZE that a new TOTAL_BATCH_SIZE needs, {} when the present one divides it."""
    rows = int(total) // seq_len
    device = int(values["DEVICE_BATCH_SIZE"])
    return {} if rows % device == 0 else {"DEVICE_BATCH_SIZE": math.gcd(rows, device)}


# ---------------------------------------------------------------------------
# A turn
# ---------------------------------------------------------------------------


def main() -> None:
    """Edit the trainer in the current folder. RunSettings in the environment say on what experiments run."""
    try:
        told = RunSettings.from_env()
        setting = resolve(told.platform, told.track, told.budget)
        trainer = Path(setting.trainer.name)
        rows = ledger().rows()
        history = read_history(rows, setting)
        seed = len(rows) + SEEDS * told.seed
        proposal = propose(trainer.read_bytes(), history, setting, seed)
        trainer.write_bytes(proposal.source)
    except (UserError, OSError) as error:
        sys.exit(f"builtin: {error}")
    print(f"experiment: {proposal.description}")


if __name__ == "__main__":
    main()
