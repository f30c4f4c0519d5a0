"""
Our trainer against the original's train.py: the same rows, the same seconds, the same kind of GPU.

    uv run --extra flash python benchmarks/versus.py --original CLONE [--seeds 1 2 3] [--budget 300]
    uv run --extra flash python benchmarks/versus.py --original CLONE --track debian --gpus 0 1

CLONE is a clone of karpathy/autoresearch. Its train.py runs as it is but for its imports, which are our
rows and our attention (benchmarks/original_shim.py), and its seed. Ours is `autoresearch run`. With several
GPUs as many runs go side by side, one a GPU. The last lines are for grep.
"""

import argparse
import os
import queue
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = "ours"
THEIRS = "original"
UNCOUNTED_STEPS = 11  # the original's clock begins after them
PRINTED = {  # our name of a figure: theirs
    "val_bpb": "val_bpb",
    "num_steps": "num_steps",
    "tokens_per_second": "",
    "peak_memory_mb": "peak_vram_mb",
    "training_seconds": "training_seconds",
}


def shimmed(train: Path, into: Path) -> Path:
    """Write a copy of the original's train.py whose data, evaluation and attention come from the shim."""
    text = train.read_text()
    changes = [
        (r"^from kernels import .*?^fa3 = [^\n]*$", "from original_shim import SEED, fa3"),
        (r"^from prepare import", "from original_shim import"),
        (r"torch\.manual_seed\(42\)", "torch.manual_seed(SEED)"),
        (r"torch\.cuda\.manual_seed\(42\)", "torch.cuda.manual_seed(SEED)"),
    ]
    for pattern, new in changes:
        text, count = re.subn(pattern, new, text, flags=re.M | re.S)
        if count != 1:
            raise SystemExit(f"versus: {train} is not the train.py that this was written for: no {pattern}")
    path = into / "train.py"
    path.write_text(text)
    return path


def command_of(who: str, seed: int, asked: argparse.Namespace, copy: Path) -> list[str]:
    """Return what runs one of the two."""
    if who == THEIRS:
        return [sys.executable, str(copy)]
    run = [sys.executable, "-m", "launcher.entry", "run", "-m", f"versus seed {seed}", "--seed", str(seed)]
    run += ["--budget", f"{asked.budget:g}", "--track", asked.track]
    run += ["--platform", asked.platform] if asked.platform else []
    return run + (["--trainer", str(asked.trainer)] if asked.trainer else [])


def figures(who: str, output: str) -> dict[str, float]:
    """Return what a run printed, by our names."""
    found = {}
    for ours, theirs in PRINTED.items():
        name = ours if who == OURS else theirs
        match = re.search(rf"^{name}:\s+([\d.]+)", output, re.M) if name else None
        if match:
            found[ours] = float(match[1])
    if who == THEIRS and (tokens := re.search(r"^total_tokens_M:\s+([\d.]+)", output, re.M)):
        counted = 1.0 - UNCOUNTED_STEPS / found["num_steps"]
        found["tokens_per_second"] = 1e6 * float(tokens[1]) * counted / found["training_seconds"]
    return found


def run_one(
    who: str, seed: int, asked: argparse.Namespace, copy: Path, gpus: queue.Queue
) -> dict[str, float]:
    """Run one of the two on a GPU that is free, and print its figures.

    Raises:
        SystemExit: it printed no score.
    """
    gpu = gpus.get()
    try:
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": gpu,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]),
            "VERSUS_TRACK": asked.track,
            "VERSUS_BUDGET": f"{asked.budget:g}",
            "VERSUS_SEED": str(seed),
        }
        done = subprocess.run(
            command_of(who, seed, asked, copy), cwd=ROOT, env=environment, capture_output=True, text=True
        )
    finally:
        gpus.put(gpu)
    found = figures(who, done.stdout)
    if "val_bpb" not in found:
        raise SystemExit(
            f"versus: {who}, seed {seed}: no score\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        )
    line = ", ".join(f"{name} {value:,.4f}".rstrip("0").rstrip(".") for name, value in found.items())
    print(f"{who} seed {seed} gpu {gpu}: {line}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--original", type=Path, required=True, help="a clone of karpathy/autoresearch")
    parser.add_argument("--track", default="climbmix")
    parser.add_argument("--platform", default="", help="of ours; the one that fits by default")
    parser.add_argument("--trainer", type=Path, help="of ours, in place of the platform's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--budget", type=float, default=300.0, help="seconds of training")
    parser.add_argument("--gpus", nargs="+", default=["0"])
    asked = parser.parse_args()
    gpus: queue.Queue = queue.Queue()
    for gpu in asked.gpus:
        gpus.put(gpu)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(asked.gpus)) as pool:
        copy = shimmed(asked.original / "train.py", Path(folder))
        # One of each in turn, so that whatever changes with time or with a GPU meets both.
        pairs = [(who, seed) for seed in asked.seeds for who in (THEIRS, OURS)]
        runs = {pair: pool.submit(run_one, *pair, asked, copy, gpus) for pair in pairs}
        results = {pair: run.result() for pair, run in runs.items()}
    for who in (THEIRS, OURS):
        scores = [results[who, seed]["val_bpb"] for seed in asked.seeds]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        rate = statistics.mean(results[who, seed]["tokens_per_second"] for seed in asked.seeds)
        print(f"{who}_val_bpb: {statistics.mean(scores):.4f} +- {spread:.4f}, {rate:,.0f} tokens/s")
    ratios = [results[OURS, s]["val_bpb"] / results[THEIRS, s]["val_bpb"] for s in asked.seeds]
    print(f"ratio_to_original: {statistics.mean(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})")


if __name__ == "__main__":
    main()
