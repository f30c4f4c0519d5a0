"""
Which size of train_cuda.py's model learns most from a given compute? What backends/sizes.py is fitted to.

    python benchmarks/sizes.py run --file sizes.jsonl                  # the grid below; hours on two cores
    python benchmarks/sizes.py run --file sizes.jsonl --compute 26 --sizes 3x128x4096 4x128x4096
    python benchmarks/sizes.py table --file sizes.jsonl                # what the file holds, as markdown

A size is LAYERSxWIDTHxBATCH, the batch in tokens. Compute is in TFLOP: the rate of a transformer layer
(backends/dtype.py) times the seconds of training. Each run is a process of its own: it times the steps of a
size, trains it for as many steps as fit in that compute, and scores it. The clock is virtual: a step counts
as long as the layer would take to compute what the step's time is worth, so what else the machine does costs
time alone. But it drives a step's data from the caches, and less those of the small layer: --quiet says what
share of its cost here a step has on a quiet machine. A result is saved at once, and what is in the file is
not run again.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TIMED_SECONDS = 2.0  # of steps, at least
TIMED_STEPS = 12
MOST_ROWS = 4  # of a forward and backward pass
GRID = {  # TFLOP: sizes that were run for backends/sizes.py
    6.5: ["2x128x2048", "2x128x4096", "3x128x2048", "3x128x4096", "4x64x2048"],
    13: ["3x128x2048", "4x64x2048", "4x128x2048"],
    26: ["2x128x2048", "2x128x4096", "3x128x2048", "3x128x4096", "3x192x4096"]
    + ["4x128x2048", "4x128x4096", "4x128x8192", "6x128x4096"],
    52: ["4x128x4096", "4x192x2048", "4x192x4096"],
}


class Size(NamedTuple):
    """A size of the model, and the tokens of an optimizer step."""

    layers: int
    width: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Return a size from LAYERSxWIDTHxBATCH."""
        layers, width, batch = map(int, text.split("x"))
        return cls(layers, width, batch)

    def __str__(self) -> str:
        return f"{self.layers}x{self.width}x{self.batch}"


# ---------------------------------------------------------------------------
# One run, in a process of its own
# ---------------------------------------------------------------------------


def run_inside(
    layers: int,
    width: int,
    tasks: list[list[float]],
    quiet: float,
    val_tokens: int,
    seed: int,
    track_name: str,
) -> None:
    """Train and score a model as often as asked, and print a line of JSON for each time.

    tasks: compute in TFLOP, batch in tokens. quiet: share of a step's cost here that counts. val_tokens:
    scored.
    """
    os.environ["AUTORESEARCH_TRACK"] = track_name
    bench = build_bench(layers, width, seed)
    for compute, tokens in tasks:
        result = {
            "size": str(Size(layers, width, int(tokens))),
            "compute": compute,
            "seed": seed,
            "track": track_name,
            "dtype": str(bench.model.config.dtype).removeprefix("torch."),
            "quiet": quiet,
            "val_tokens": val_tokens,
        }
        result |= train_and_score(bench, compute, int(tokens), quiet, val_tokens, seed)
        print(json.dumps(result), flush=True)


def build_bench(layers: int, width: int, seed: int) -> SimpleNamespace:
    """Return a model of train_cuda.py's with all that its training needs."""
    import torch

    from backends.cuda import TorchDevice
    from backends.platforms import current_entries
    from prepare import prepare_track

    platform, track = current_entries()
    data = prepare_track(track)
    device = TorchDevice(platform, data.vocab_size, seed)
    trainer: Any = importlib.import_module("train_cuda")
    trainer.N_LAYER, trainer.N_EMBD = layers, width
    trainer.HEAD_DIM = min(64, width // 2)  # with one head the compiler of PyTorch 2.14 fails
    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)
    model = trainer.build_model(data, platform)
    return SimpleNamespace(
        platform=platform,
        data=data,
        device=device,
        trainer=trainer,
        model=model,
        initial={name: tensor.clone() for name, tensor in model.state_dict().items()},
        optimizer=trainer.Optimizer(model),
    )


def train_and_score(
    bench: SimpleNamespace, compute: float, batch: int, quiet: float, val_tokens: int, seed: int
) -> dict[str, Any]:
    """Train the model anew for a compute, and return what came of it. Arguments as those of run_inside."""
    model = bench.model
    device = bench.device
    data = bench.data
    seq_len = model.config.seq_len
    bench.trainer.TOTAL_BATCH_SIZE = batch
    bench.trainer.DEVICE_BATCH_SIZE = min(MOST_ROWS, batch // seq_len)
    train_step = bench.trainer.make_train_step(model, bench.optimizer)
    cost = quiet * step_cost(train_step, device, model.config, bench.platform)
    model.load_state_dict(bench.initial)
    bench.optimizer.reset()
    steps = max(1, round(compute * 1e3 / cost))
    next_batch = BatchOrder(data.rows("train"), device, seed).next_batch
    began = time.monotonic()
    for step in range(steps):
        loss = train_step(next_batch, step / steps)
    took = time.monotonic() - began
    val_bpb, stderr = score(model, device, data, val_tokens // seq_len)
    return {
        "step_gflop": round(cost, 3),
        "steps": steps,
        "tokens": steps * batch,
        "flops_per_token": model.flops_per_token(),
        "train_loss": round(loss.item(), 4),
        "val_bpb": round(val_bpb, 5),
        "stderr": round(stderr, 5),
        "train_seconds": round(took, 1),
        "peak_mb": round(device.peak_memory_mb()),
    }


def step_cost(train_step: Callable, device: Any, config: Any, platform: Any) -> float:
    """Return what a training step costs in GFLOP of a layer: those that a layer does in the step's time.

    Steps and the layer are timed in turn, so that what disturbs one disturbs the other. On a CPU the time is
    that of this process alone, which has one thread.
    """
    from backends.cuda import layer_work
    from backends.dtype import LAYER_ROWS, MEASURED_WIDTH, layer_gflop

    kind = platform.device_kind
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (MOST_ROWS, config.seq_len + 1))
    width = MEASURED_WIDTH[kind]
    parts = layer_work(device.torch_device, config.dtype, LAYER_ROWS[kind], width)
    works = [work for kind_of_work in parts.values() for work in kind_of_work]

    def seconds(work: Callable[[], Any]) -> float:
        if kind == "cpu":
            t0 = time.process_time()
            work()
            return time.process_time() - t0
        device.synchronize()
        t0 = time.perf_counter()
        work()
        device.synchronize()
        return time.perf_counter() - t0

    def random_batch(rows: int) -> Any:
        return device.arrived(device.copy(tokens[:rows]))

    def step() -> None:
        train_step(random_batch, 0.5)

    for work in (step, step, step, *works):
        work()
    of_step: list[float] = []
    of_parts: list[list[float]] = [[] for _ in works]
    while len(of_step) < TIMED_STEPS or sum(of_step) < TIMED_SECONDS:
        of_step.append(seconds(step))
        for work, times in zip(works, of_parts, strict=True):
            work()  # what the step left in the caches is gone
            times.extend(seconds(work) for _ in range(3))
    layer = sum(float(np.median(times)) for times in of_parts)
    return layer_gflop(kind, width) * float(np.median(of_step)) / layer


class BatchOrder:
    """The batches of an experiment: rows shuffled by the seed, as in backends.experiment."""

    def __init__(self, rows: np.ndarray, device: Any, seed: int) -> None:
        from backends.experiment import RowOrder

        self._rows = rows
        self._device = device
        self._order = RowOrder(len(rows), seed)
        self._drawn = 0

    def next_batch(self, count: int) -> Any:
        """Return (x, y) of the next rows, [count, T] each."""
        picked = self._order.indices(self._drawn, count)
        self._drawn += count
        return self._device.arrived(self._device.copy(self._rows[picked].astype(np.int64)))


def score(model: Any, device: Any, data: Any, count: int) -> tuple[float, float]:
    """Return val_bpb and its standard error over the first `count` rows of validation."""
    from prepare import DocumentTotals, bits_per_byte

    rows = data.rows("val")[:count]
    totals = DocumentTotals(rows, data.documents("val"), data.bos, data.token_bytes())
    for start in range(0, count, MOST_ROWS):
        picked = np.arange(start, min(start + MOST_ROWS, count))
        totals.add(picked, device.nats(model, rows[picked].astype(np.int64)))
    return bits_per_byte(totals.nats, totals.num_bytes)


# ---------------------------------------------------------------------------
# Many runs
# ---------------------------------------------------------------------------


def read_results(path: Path) -> list[SimpleNamespace]:
    """Return the runs that a file holds."""
    if not path.exists():
        return []
    return [SimpleNamespace(**json.loads(line)) for line in path.read_text().splitlines()]


def run_all(options: argparse.Namespace) -> None:
    """Run what is asked for and not in the file, a process for each model."""
    wanted = [(compute, text) for compute, texts in GRID.items() for text in texts]
    if options.compute:
        wanted = [(compute, text) for compute in options.compute for text in options.sizes]
    models: dict[tuple[int, int], list[tuple[float, Size]]] = {}
    for compute, text in wanted:
        size = Size.parse(text)
        models.setdefault(size[:2], []).append((compute, size))
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda tasks: run_model(tasks, options), models.values()))


def run_model(tasks: list[tuple[float, Size]], options: argparse.Namespace) -> None:
    """Run the sizes of one model that the file does not have, and save each result."""
    have = {(r.size, r.compute, r.seed, r.track) for r in read_results(options.file)}
    asked = [
        (compute, size.batch)
        for compute, size in tasks
        if (str(size), compute, options.seed, options.track) not in have
    ]
    if not asked:
        return
    layers, width, _ = tasks[0][1]
    more = [options.quiet, options.val_tokens, options.seed, options.track]
    arguments = [layers, width, json.dumps(asked), *more]
    child = subprocess.Popen(
        [sys.executable, __file__, "inside", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout
    for line in child.stdout:
        if not line.startswith("{"):
            continue
        with options.file.open("a") as file:
            file.write(line)
        r = SimpleNamespace(**json.loads(line))
        print(
            f"{r.compute:g} TFLOP, {r.size}: val_bpb {r.val_bpb:.4f}, {r.steps} steps of {r.step_gflop:.1f} "
            f"GFLOP, {r.tokens / 1e6:.2f}M tokens, {r.train_seconds:.0f} s",
            flush=True,
        )
    if child.wait():
        print(f"{layers}x{width} failed", flush=True)


def print_table(results: list[SimpleNamespace]) -> None:
    """Print the sizes of each compute, the best one first."""
    print("| TFLOP | size | steps | tokens | val_bpb |\n|---|---|---|---|---|")
    for r in sorted(results, key=lambda r: (r.compute, r.val_bpb)):
        print(f"| {r.compute:g} | {r.size} | {r.steps:,} | {r.tokens / 1e6:.2f}M | {r.val_bpb:.3f} |")


def main() -> None:
    """Run, or print the table."""
    if sys.argv[1:2] == ["inside"]:
        layers, width, tasks, quiet, val_tokens, seed, track = sys.argv[2:]
        model = int(layers), int(width), json.loads(tasks)
        run_inside(*model, float(quiet), int(val_tokens), int(seed), track)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--file", type=Path, required=True, help="JSON lines, a run each")
    parser.add_argument("--compute", type=float, nargs="*", help="TFLOP")
    parser.add_argument("--sizes", nargs="*", default=[], help="LAYERSxWIDTHxBATCH")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--quiet", type=float, default=1.0, help="share of a step's cost that counts")
    parser.add_argument("--val-tokens", type=int, default=131072, help="scored")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--track", default="pysource")
    options = parser.parse_args()
    if options.what == "run":
        run_all(options)
    else:
        print_table(read_results(options.file))


if __name__ == "__main__":
    main()
