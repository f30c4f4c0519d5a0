"""
What size costs: the leaderboard of a long ledger, and the launcher's work in a turn of a night that has one.

    uv run python benchmarks/rows.py [--ranked 1000000] [--turns 100 20000] [--home DIR]

The rows are made up, of one board: each trainer was made from the one that was kept last. The leaderboard is
the real command, in a process of its own. The turns are those of a real night in a clone of the committed
repository, in which every earlier run has its folder; training, scoring and the dry run are made up and take
no time, and the agent adds a comment. CPU time and peak memory are those of the command's own process. The
last lines are for grep.
"""

import argparse
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = 12  # of a night; the first turns fill caches, and the last ones count
COUNTED = 8
AGENT = """sh -c 'echo "# $(date +%s%N)" >> train_cuda.py; echo "experiment: a comment"'"""
CONFIG = """
tracks:
  tiny: {packages: [mpmath, pygments], held_out: [pygments], vocab_size: 512, seq_len: 128, val_tokens: 16384}
platforms:
  cpu:
    framework: torch
    device_kind: cpu
    trainer: train_cuda.py
    track: tiny
    bf16: false
    start: {n_layer: 2, n_embd: 64, head_dim: 32, window_pattern: SL, short_window: 32,
            total_batch_size: 1024, device_batch_size: 8, eval_batch_size: 8}
"""


def main() -> None:
    """Measure what was asked for, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranked", type=int, nargs="*", default=[1_000_000], help="rows of a leaderboard")
    parser.add_argument("--turns", type=int, nargs="*", default=[100, 20_000], help="rows before a night")
    parser.add_argument("--home", type=Path, help="an empty folder to work in; a temporary one if left out")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside is not None:
        run_inside(asked.inside)
        return
    home = asked.home or Path(tempfile.mkdtemp(prefix="rows-"))
    for count in asked.ranked:
        measure_leaderboard(count, home)
    for count in asked.turns:
        measure_turn(count, home)
    if not asked.home:
        shutil.rmtree(home)


def measure_leaderboard(count: int, home: Path) -> None:
    """Rank so many rows."""
    sys.path.insert(0, str(ROOT))
    from launcher.ledger import COLUMNS, to_line

    path = home / "ranked.tsv"
    with open(path, "w") as f:
        f.write("\t".join(COLUMNS) + "\n")
        for row in made_up_rows(count):
            f.write(to_line(row) + "\n")
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "launcher.entry", "leaderboard", str(path)]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = after.ru_maxrss / 2**20  # Linux counts in KiB
    size = path.stat().st_size / 2**20
    print(
        f"leaderboard_{count}: {seconds:.2f} s ({cpu:.2f} of CPU), {peak:.2f} GiB, of {size:.0f} MiB",
        flush=True,
    )
    path.unlink()


def made_up_rows(count: int, **values: Any) -> Iterator[Any]:
    """Yield so many rows of one board, oldest first. `values` replace those of each row."""
    from launcher.ledger import Row

    chance = random.Random(1)
    parent = ""
    best = 1.2
    for i in range(count):
        source = f"{chance.getrandbits(48):012x}"
        is_kept = i == 0 or chance.random() < 0.1
        change = -0.01 * (best - 0.9) if is_kept else abs(chance.gauss(0.002, 0.002))
        score = round(best + change, 6)
        row = Row(
            commit=source[:7],
            val_bpb=score,
            memory_gb=1.62,
            status="keep" if is_kept else "discard",
            description=f"MATRIX_LR 0.04 -> {0.04 + i / 1e6:.6f}, WARMUP_RATIO 0.05 -> 0.1",
            run=f"{20000101 + i // 86400}-{i // 3600 % 24:02}{i // 60 % 60:02}{i % 60:02}-{i % 65536:04x}",
            time=f"2000-01-01T{i // 3600 % 24:02}:{i // 60 % 60:02}:{i % 60:02}Z",
            platform="cpu",
            device="a CPU, 2 cores",
            track="tiny",
            seed=1,
            rules=2,
            fingerprint="0123456789abcdef",
            harness="0123456789ab",
            budget=300.0,
            val_tokens=16384,
            val_stderr=round(abs(chance.gauss(0.02, 0.001)), 6),
            training_seconds=round(300 + chance.random(), 3),
            total_seconds=round(330 + chance.random(), 2),
            tokens_M=round(4 + chance.random(), 3),
            tokens_per_second=round(15000 + 100 * chance.random()),
            mfu_percent=round(59 + chance.random(), 2),
            num_steps=551,
            num_params_M=2.556,
            depth=4,
            petaflops=0.07,
            source=source,
            parent=parent,
            agent="builtin",
            p_better=round(chance.random(), 3),
            effect=score - best,
            effect_error=0.0005,
            belief_before=best,
            belief_before_error=0.0005,
            belief_after=min(score, best),
            belief_after_error=0.0005,
            sigma=0.0006,
            build_on=source if is_kept else parent,
            reason=f"probably better: effect {score - best:+.6f} +- 0.000500, P(better) 0.50",
        )
        for name, value in values.items():
            setattr(row, name, value)
        if is_kept:
            parent = source
            best = score
        yield row


def measure_turn(count: int, home: Path) -> None:
    """Take turns in a clone of the committed repository, with so many runs before them."""
    said = run_in_clone(home, "rows.py", "--inside", str(count))
    print(f"turn_after_{count}{said}", flush=True)


def run_in_clone(home: Path, benchmark: str, *arguments: str) -> str:
    """Run a benchmark's own part of a night in a clone of the committed repository.

    The benchmarks there are as they lie here. Returns what it prints after the word "measured".
    """
    clone = home / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    for name in (Path(__file__).name, benchmark):
        shutil.copy(ROOT / "benchmarks" / name, clone / "benchmarks" / name)
    (home / "platforms.yaml").write_text(CONFIG)
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AUTORESEARCH_")},
        "AUTORESEARCH_CONFIG": str(home / "platforms.yaml"),
        "AUTORESEARCH_CACHE": str(home / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(clone),
    }
    command = [sys.executable, f"benchmarks/{benchmark}", *arguments]
    done = subprocess.run(command, cwd=clone, env=variables, capture_output=True, text=True)
    found = re.search(r"^measured(.*)$", done.stdout, re.M)
    if found is None:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    shutil.rmtree(clone)
    return found[1]


def made_up_result(chance: random.Random, run_dir: Any) -> Any:
    """Return the outcome of a training that took no time, and write its result where it belongs."""
    from dataclasses import asdict

    from backends.protocol import Result, write_json
    from launcher.child import Outcome

    numbers = dict.fromkeys(Result.__dataclass_fields__, 1)
    words = {"dtype": "float32", "platform": "cpu", "device": "a CPU", "track": "tiny"}
    result = Result(**{**numbers, **words, "val_bpb": round(1.5 + chance.gauss(0, 0.002), 6)})
    write_json(run_dir.result, asdict(result))
    return Outcome(training_seconds=300.0, total_seconds=330.0, exit_code=0, result=result)


def run_inside(count: int) -> None:
    """Run a night in the clone that this process was started in, and print the seconds of a turn."""
    sys.path[0] = os.getcwd()  # it was benchmarks/, which has a night.py of its own
    from launcher import run as runner
    from launcher.child import Outcome
    from launcher.setting import resolve
    from night import loop
    from night.agents import parse_agent
    from night.plan import Night

    chance = random.Random(2)
    began: list[tuple[float, float]] = []  # of each run: the clock, and the CPU time of this process

    def supervise(trainer, run_dir, setting, seed, watch, on_event):  # type: ignore[no-untyped-def]
        began.append((time.monotonic(), time.process_time()))
        return made_up_result(chance, run_dir)

    prompts: list[float] = []  # CPU time that each took
    write_turn = loop.write_turn

    def timed_turn(*arguments: Any) -> str:
        before = time.process_time()
        prompt = write_turn(*arguments)
        prompts.append(time.process_time() - before)
        return prompt

    loop.write_turn = timed_turn
    runner.supervise = supervise
    loop.dry_run = lambda *_: (Outcome(), "")
    setting = resolve("cpu")
    write_runs(count, setting)
    night = Night(parse_agent(AGENT), setting, experiments=EXPERIMENTS, confirms=False)
    loop.run_night(night)
    pairs = list(pairwise(began))[-COUNTED:]
    seconds = [after[0] - before[0] for before, after in pairs]
    own = [after[1] - before[1] for before, after in pairs]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"measured: {median(own):.3f} s of CPU ({min(own):.3f} to {max(own):.3f}), "
        f"{median(prompts[-COUNTED:]):.3f} of them for the prompt; "
        f"{median(seconds):.3f} s with git and the agent, {peak:.2f} GiB"
    )


def write_runs(count: int, setting: Any) -> None:
    """Write the ledger of so many runs on the setting's board, and their folders."""
    from launcher.harness import source_hash
    from launcher.ledger import COLUMNS, to_line
    from launcher.runs import ledger, run_dir

    board = setting.board._asdict()
    del board["boxed"]  # a flag of the row
    rows = list(made_up_rows(count, **board))
    last_kept = [row for row in rows if row.status == "keep"][-1].source
    committed = source_hash(setting.trainer.read_bytes())
    for row in rows:  # the committed trainer is the one that was kept last
        for name in ("source", "parent", "build_on"):
            if getattr(row, name) == last_kept:
                setattr(row, name, committed)
        folder = run_dir(row.run)
        folder.path.mkdir(parents=True)
        (folder.path / setting.trainer.name).write_text(f"# {row.source}\n")
        folder.record.write_text(f'{{"trainer": "{setting.trainer.name}"}}')
        (folder.path / "recorded").touch()
    lines = ["\t".join(COLUMNS), *map(to_line, rows)]
    ledger().path.write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main()
