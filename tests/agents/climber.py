"""
A little optimizer in the place of a coding agent: it climbs over the constants at the top of the trainer.

    autoresearch loop --agent "python tests/agents/climber.py" --experiments 8
    autoresearch loop --agent "python tests/agents/climber.py MATRIX_LR N_EMBD"    # only these

One constant a turn takes a step up or down. What was kept is pushed on in the same direction; what was not is
tried the other way, then the next constant. Its only memory is the ledger's descriptions.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# A step of each constant: by a factor, or by a number.
STEPS = {
    "MATRIX_LR": "*2",
    "N_EMBD": "+64",
    "N_LAYER": "+1",
    "TOTAL_BATCH_SIZE": "*2",
    "EMBEDDING_LR": "*2",
    "WARMDOWN_RATIO": "*1.4",
    "UNEMBEDDING_LR": "*2",
    "SCALAR_LR": "*2",
    "WEIGHT_DECAY": "*2",
}
HIGHEST = {"WARMDOWN_RATIO": 1.0}


class Move(NamedTuple):
    """A constant and its values before and after."""

    name: str
    old: float
    new: float


def read_constant(source: str, name: str) -> float:
    """Return a constant's value: a number in the source, or what platforms.yaml says for this machine."""
    text = re.search(rf"^{name} = (\S+)", source, re.M)[1]
    if not text.startswith("START"):
        return float(text)
    sys.path.insert(0, str(Path.cwd()))
    from backends.platforms import current_platform

    return float(getattr(current_platform().start, name.lower()))


def step(name: str, value: float, up: bool) -> Move:
    """Return the move of a constant one step up or down."""
    kind = STEPS[name][0]
    size = float(STEPS[name][1:])
    direction = 1 if up else -1
    new = value * size**direction if kind == "*" else value + direction * size
    return Move(name, value, min(new, HIGHEST.get(name, new)))


def read_history() -> list[tuple[str, Move]]:
    """Return (status, move) of this agent's experiments, oldest first."""
    ledger = Path(os.environ.get("AUTORESEARCH_HOME", ".")) / "results.tsv"
    history = []
    for line in ledger.read_text().splitlines()[1:] if ledger.exists() else []:
        status, description = line.split("\t")[3:5]
        found = re.fullmatch(r"(\w+) ([\d.]+) -> ([\d.]+)", description)
        if found and found[1] in STEPS:
            history.append((status, Move(found[1], float(found[2]), float(found[3]))))
    return history


def candidates(source: str, names: list[str], history: list[tuple[str, Move]]) -> Iterator[Move]:
    """Yield moves to try, the most promising first."""
    if history and history[-1][1].name in names:
        status, last = history[-1]
        if status == "keep":
            yield step(last.name, last.new, up=last.new > last.old)
        first = names.index(last.name)
        names = names[first:] + names[:first]
    for name in names:
        value = read_constant(source, name)
        yield step(name, value, up=True)
        yield step(name, value, up=False)


def main() -> None:
    trainer = Path(re.search(r"^trainer: (\S+)", sys.stdin.read(), re.M)[1])
    source = trainer.read_text()
    history = read_history()
    tried = {(move.name, f"{value:.6g}") for _, move in history for value in (move.old, move.new)}
    for move in candidates(source, sys.argv[1:] or list(STEPS), history):
        if move.new > 0 and (move.name, f"{move.new:.6g}") not in tried:
            line = f"{move.name} = {move.new:.6g}"
            trainer.write_text(re.sub(rf"^{move.name} = \S+", line, source, flags=re.M))
            print(f"experiment: {move.name} {move.old:.6g} -> {move.new:.6g}")
            return
    sys.exit("every neighbour was tried")


if __name__ == "__main__":
    main()
