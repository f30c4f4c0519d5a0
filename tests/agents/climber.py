"""
A little optimizer in the place of a coding agent: it climbs over the constants at the top of the trainer.

    autoresearch loop --agent "python tests/agents/climber.py" --experiments 8

One constant a turn is multiplied or divided by its factor. What was kept is pushed on in the same direction; what
was not is tried the other way, then the next constant. Its only memory is the ledger's descriptions.
"""

import os
import re
import sys
from pathlib import Path

KNOBS = {"UNEMBEDDING_LR": 2.0, "MATRIX_LR": 2.0, "EMBEDDING_LR": 2.0, "WARMDOWN_RATIO": 1.4, "SCALAR_LR": 2.0, "WEIGHT_DECAY": 2.0}
MOST = {"WARMDOWN_RATIO": 1.0}


def constant(source, name):
    return float(re.search(rf"^{name} = ([\d.]+)", source, re.M)[1])


def history():
    """[(status, name, old, new)] of this agent's experiments, oldest first."""
    ledger = Path(os.environ.get("AUTORESEARCH_HOME", ".")) / "results.tsv"
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    moves = [(line.split("\t")[3], re.search(r"(\w+) ([\d.]+) -> ([\d.]+)", line.split("\t")[4])) for line in lines[1:]]
    return [(status, m[1], float(m[2]), float(m[3])) for status, m in moves if m and m[1] in KNOBS]


def candidates(source):
    """(name, old, new) to try, the most promising first."""
    past, names = history(), list(KNOBS)
    if past:
        status, name, old, new = past[-1]
        if status == "keep":
            yield name, new, new * (new / old)
        names = names[names.index(name):] + names[: names.index(name)]
    for name in names:
        value = constant(source, name)
        yield from ((name, value, value * KNOBS[name]), (name, value, value / KNOBS[name]))


def main():
    trainer = Path(re.search(r"^trainer: (\S+)", sys.stdin.read(), re.M)[1])
    source = trainer.read_text()
    tried = {(name, f"{new:.3g}") for _, name, _, new in history()}
    for name, old, new in candidates(source):
        new = min(new, MOST.get(name, new))
        if (name, f"{new:.3g}") not in tried and f"{new:.3g}" != f"{old:.3g}":
            trainer.write_text(re.sub(rf"^{name} = [\d.]+", f"{name} = {float(f'{new:.3g}')}", source, flags=re.M))
            print(f"experiment: {name} {old:g} -> {new:.3g}")
            return
    sys.exit("every neighbour was tried")


if __name__ == "__main__":
    main()
