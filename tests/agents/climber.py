"""
A little optimizer in the place of a coding agent: it climbs over the constants at the top of the trainer.

    autoresearch loop --agent "python tests/agents/climber.py" --experiments 8
    autoresearch loop --agent "python tests/agents/climber.py MATRIX_LR N_EMBD"    # only these

One constant a turn takes a step up or down. What was kept is pushed on in the same direction; what was not is tried
the other way, then the next constant. Its only memory is the ledger's descriptions.
"""

import os
import re
import sys
from pathlib import Path

STEPS = {"MATRIX_LR": "*2", "N_EMBD": "+64", "N_LAYER": "+1", "TOTAL_BATCH_SIZE": "*2", "EMBEDDING_LR": "*2", "WARMDOWN_RATIO": "*1.4",
         "UNEMBEDDING_LR": "*2", "SCALAR_LR": "*2", "WEIGHT_DECAY": "*2"}
MOST = {"WARMDOWN_RATIO": 1.0}


def constant(source, name):
    """Its value: a number in the source, or what platforms.yaml says for this machine."""
    text = re.search(rf"^{name} = (\S+)", source, re.M)[1]
    if not text.startswith("START"):
        return float(text)
    sys.path.insert(0, str(Path.cwd()))
    from backends.platforms import current_platform

    return float(current_platform().start[name.lower()])


def moved(name, value, up):
    kind, size = STEPS[name][0], float(STEPS[name][1:])
    new = value * size ** (1 if up else -1) if kind == "*" else value + (size if up else -size)
    return min(new, MOST.get(name, new))


def history():
    """[(status, name, old, new)] of this agent's experiments, oldest first."""
    ledger = Path(os.environ.get("AUTORESEARCH_HOME", ".")) / "results.tsv"
    lines = [line.split("\t") for line in ledger.read_text().splitlines()[1:]] if ledger.exists() else []
    moves = [(cells[3], re.fullmatch(r"(\w+) ([\d.]+) -> ([\d.]+)", cells[4])) for cells in lines]
    return [(status, m[1], float(m[2]), float(m[3])) for status, m in moves if m and m[1] in STEPS]


def candidates(source, names, past):
    """(name, old, new) to try, the most promising first."""
    if past and past[-1][1] in names:
        status, name, old, new = past[-1]
        if status == "keep":
            yield name, new, moved(name, new, up=new > old)
        names = names[names.index(name):] + names[: names.index(name)]
    for name in names:
        value = constant(source, name)
        yield from ((name, value, moved(name, value, up)) for up in (True, False))


def main():
    trainer = Path(re.search(r"^trainer: (\S+)", sys.stdin.read(), re.M)[1])
    source, past = trainer.read_text(), history()
    tried = {(name, f"{value:.6g}") for _, name, old, new in past for value in (old, new)}
    for name, old, new in candidates(source, sys.argv[1:] or list(STEPS), past):
        if new > 0 and (name, f"{new:.6g}") not in tried:
            trainer.write_text(re.sub(rf"^{name} = \S+", f"{name} = {new:.6g}", source, flags=re.M))
            print(f"experiment: {name} {old:.6g} -> {new:.6g}")
            return
    sys.exit("every neighbour was tried")


if __name__ == "__main__":
    main()
