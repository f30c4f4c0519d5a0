"""
Real nights in small: the built-in agent from one start, under three rules of keeping. Hours become minutes.

    uv run python benchmarks/real_night.py [--experiments 22] [--budget 10] [--seeds 6] [--home DIR]

Each rule gets a clone of the committed repository, a small model that is not compiled, and the whole loop
but for the dry run, which would take as long as the run: the agent, the trial in git, the verdict. `old`
measures the noise with three runs first and asks for p < 0.01 before each keep; `greedy` keeps what is below
the lowest score so far; `new` is launcher/belief.py. At the end the trainer that each night left is run with
seeds that no night used, beside the baseline, in turn. Leave the machine alone meanwhile. The last lines are
for grep.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
RULES = ("old", "greedy", "new")
FRESH_SEED = 1000
CHANCE = 0.01  # of the old rule
CONFIG = """
tracks:
  pysource:
    packages: [sympy, networkx, pandas, matplotlib, datasets, huggingface-hub, fonttools, pygments, mpmath]
    vocab_size: 1024
    seq_len: 256
    val_tokens: 131072
platforms:
  small:
    framework: torch
    device_kind: cpu
    trainer: train_cuda.py
    track: pysource
    bf16: false
    start: {n_layer: 2, n_embd: 128, head_dim: 64, window_pattern: L, short_window: 64,
            total_batch_size: 1024, device_batch_size: 4, eval_batch_size: 16}
"""


def main() -> None:
    """Run the nights, then their trainers with fresh seeds, and print what they gained."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", type=int, default=22, help="of each night, the baseline's included")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of training of a run")
    parser.add_argument("--seeds", type=int, default=6, help="fresh seeds of each final trainer")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES, help="of which nights are run")
    parser.add_argument("--home", type=Path, default=Path("/tmp/autoresearch-nights"))
    parser.add_argument("--inside", choices=RULES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        run_inside(asked.inside, asked.experiments, asked.budget)
        return
    if asked.home.exists():
        parser.error(f"{asked.home} is there already: remove it, or name another --home")
    asked.home.mkdir(parents=True)
    (asked.home / "platforms.yaml").write_text(CONFIG)
    show = ["git", "-C", str(ROOT), "show", "HEAD:./train_cuda.py"]
    started = subprocess.run(show, capture_output=True, check=True).stdout
    trainers = {"baseline": started}
    for rule in asked.rules:
        clone = asked.home / rule
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        began = time.monotonic()
        run_night_of(rule, asked)
        trainers[rule] = (clone / "train_cuda.py").read_bytes()
        print(f"{rule}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
        print_night(clone)
    compare(trainers, asked)


def environment(home: Path, rule: str) -> dict[str, str]:
    """Return the environment of a night: a model this small is not worth compiling."""
    return {
        **os.environ,
        "AUTORESEARCH_CONFIG": str(home / "platforms.yaml"),
        "AUTORESEARCH_HOME": str(home / rule),
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(home / rule),
    }


def run_night_of(rule: str, asked: argparse.Namespace) -> None:
    """Run a night in its clone, in a process of its own."""
    clone = asked.home / rule
    command = [sys.executable, "benchmarks/real_night.py", "--inside", rule]
    command += ["--experiments", str(asked.experiments), "--budget", str(asked.budget)]
    with open(asked.home / f"{rule}.log", "w") as log:
        subprocess.run(command, cwd=clone, env=environment(asked.home, rule), stderr=log, check=True)


def run_inside(rule: str, experiments: int, budget: float) -> None:
    """Run one night under a rule, in the clone that this process was started in."""
    sys.path.insert(0, os.getcwd())
    from launcher import verdict
    from launcher.child import Outcome
    from launcher.noise import measure_noise
    from launcher.setting import resolve
    from night import loop
    from night.agents import parse_agent
    from night.loop import run_night
    from night.plan import Night

    loop.dry_run = lambda *_: (Outcome(), "")

    setting = resolve("small", budget=budget)
    if rule == "old":
        verdict.decide = old_rule
        measure_noise(setting, 3)
        experiments -= 3
    if rule == "greedy":
        verdict.decide = greedy
    if rule != "new":
        loop.Loop.end_on_best = lambda self: None  # it would put the belief's choice on the branch
    run_night(Night(parse_agent("builtin"), setting, experiments=experiments, confirms=False))


def greedy(rows, row):
    """Keep what is below the lowest score so far, as the original does."""
    from launcher.verdict import board_runs

    scores = [other.val_bpb for other in board_runs(rows, row.board)]
    return decision(row, "keep" if not scores or row.val_bpb < min(scores) else "discard", "greedy")


def old_rule(rows, row):
    """Keep what is better by more than the noise gives by chance, after a second seed if need be."""
    from scipy.special import stdtrit

    from launcher.ledger import Flag
    from launcher.verdict import board_runs

    runs = board_runs(rows, row.board)
    noise = [other.val_bpb for other in runs if Flag.NOISE in other.flags and other.source == runs[0].source]
    kept = [other for other in runs if other.status == "keep"]
    if Flag.NOISE in row.flags or not kept or len(noise) < 2:
        return decision(row, "keep", "the baseline")
    best = [other.val_bpb for other in runs if other.source == kept[-1].source]
    values = [row.val_bpb] + [other.val_bpb for other in runs if other.source == row.source]
    gain = fmean(best) - fmean(values)
    margin = stdtrit(len(noise) - 1, 1 - CHANCE) * stdev(noise) * (1 / len(values) + 1 / len(best)) ** 0.5
    if gain > margin:
        return decision(row, "keep", f"better by {gain:.6f}, beyond {margin:.6f}")
    again = gain > 0 and len(values) == 1
    return decision(row, "repeat" if again else "discard", f"better by {gain:.6f}, within {margin:.6f}")


def decision(row, action: str, reason: str):
    """Return a decision of a rule that believes nothing."""
    from launcher.belief import Observation, judge

    empty = judge([Observation(row.source, row.val_bpb, kept=True)])
    return replace(
        empty, action=action, build_on=row.source if action == "keep" else row.parent, reason=reason
    )


def print_night(clone: Path) -> None:
    """Print the rows of a night, a line each."""
    sys.path.insert(0, str(ROOT))
    from launcher.ledger import Ledger

    for row in Ledger(clone / "results.tsv").rows():
        print(f"  {row.status:8} {row.val_bpb:.6f} {row.num_steps:5} {row.marks:14} {row.description}")
    sys.stdout.flush()


def compare(trainers: dict[str, bytes], asked: argparse.Namespace) -> None:
    """Run every trainer with fresh seeds, seed after seed, and print the mean gains over the baseline."""
    scores: dict[str, list[float]] = {name: [] for name in trainers}
    home = asked.home
    for seed in range(FRESH_SEED, FRESH_SEED + asked.seeds):
        for name, source in trainers.items():
            path = home / f"{name}.py"
            path.write_bytes(source)
            command = [sys.executable, "-m", "launcher.entry", "run", "--platform", "small"]
            command += ["--budget", str(asked.budget), "--seed", str(seed), "--trainer", str(path)]
            more = {"AUTORESEARCH_HOME": str(home / "fresh"), "PYTHONPATH": str(ROOT)}
            variables = {**environment(home, "fresh"), **more}
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
            scored = re.search(r"^val_bpb: (\S+)$", done.stdout, re.M)
            if scored is None:
                raise SystemExit(f"{name} has no score with seed {seed}: {done.stdout}{done.stderr}")
            scores[name].append(float(scored[1]))
            print(f"  fresh seed {seed}: {name} {scores[name][-1]:.6f}", flush=True)
    print(f"noise_baseline: {stdev(scores['baseline']):.6f}")
    for rule in asked.rules:
        gains = [before - after for before, after in zip(scores["baseline"], scores[rule], strict=True)]
        error = stdev(gains) / len(gains) ** 0.5
        print(f"gain_{rule}: {fmean(gains):.6f} +- {error:.6f}")


if __name__ == "__main__":
    main()
