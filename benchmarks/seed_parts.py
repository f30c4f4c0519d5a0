"""
Where does the noise between seeds come from? The first weights, the order of the rows, the number of steps.

    python benchmarks/seed_parts.py run --file noise.jsonl   # 4 starts x 4 orders of 200 steps
    python benchmarks/seed_parts.py run --file noise.jsonl --starts 1 --orders 1 --steps 180 220
    python benchmarks/seed_parts.py table --file noise.jsonl # what the file holds

Runs of a trainer differ in all three, as they end after some seconds. Here each is set by itself: the model
is that of the platform, trained for so many steps by PyTorch, and scored as it is and with its weights
averaged over the last tenth of them. A result is saved at once, and what is in the file is not run again but
with --again. A file holds one problem: a corpus, a trainer, its size, and how many tokens are scored.
"""

import argparse
import importlib
import json
import sys
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.sizes import BatchOrder, read_results, score  # noqa: E402
from launcher.harness import source_hash  # noqa: E402

AVERAGED = 0.1  # share of the steps, the last ones, over which weights are averaged


class Trainer:
    """The model of this machine's platform and all that its training needs, compiled once."""

    def __init__(self) -> None:
        import torch

        from backends.cuda import TorchDevice
        from backends.platforms import current_entries, machine_facts
        from prepare import prepare_track

        self.platform, track = current_entries()
        self.data = prepare_track(track)
        self.device = TorchDevice(self.platform, self.data.vocab_size, 0)
        torch.set_float32_matmul_precision("high")
        torch.set_flush_denormal(True)
        self.module: Any = importlib.import_module("train_cuda")
        self.model = self.module.build_model(self.data, self.platform)
        self.optimizer = self.module.Optimizer(self.model)
        self.train_step = self.module.make_train_step(self.model, self.optimizer)
        self.problem = {
            "track": track.name,
            "fingerprint": self.data.fingerprint,
            "platform": self.platform.name,
            "device": machine_facts().device,
            "dtype": "bfloat16" if self.device.bf16 else "float32",
            "model": f"{self.module.N_LAYER}x{self.module.N_EMBD}x{self.module.TOTAL_BATCH_SIZE}",
            "source": source_hash(Path(self.module.__file__).read_bytes()),
        }

    def compile(self) -> None:
        """Make a step, so that none of a run compiles. Each run begins with new weights."""
        self.train_step(self.batches(order=0), 0.5)

    def batches(self, order: int) -> Any:
        """Return the function that gives the next batch, on rows in the order of a seed."""
        return BatchOrder(self.data.rows("train"), self.device, order).next_batch

    def run(self, start: int, order: int, steps: int, val_tokens: int) -> dict[str, Any]:
        """Train from the weights that seed `start` gives, on rows in the order of seed `order`, and score."""
        import torch

        torch.manual_seed(start)
        self.model.load_state_dict(self.module.build_model(self.data, self.platform).state_dict())
        self.optimizer.reset()
        next_batch = self.batches(order)
        params = [p.detach() for p in self.model.parameters()]
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        first = steps - max(1, round(AVERAGED * steps))
        self.device.synchronize()
        began = time.monotonic()
        for step in range(steps):
            loss = self.train_step(next_batch, step / steps)
            if step >= first:
                torch._foreach_add_(sums, [p.float() for p in params])
        self.device.synchronize()
        took = time.monotonic() - began
        rows = val_tokens // self.data.seq_len
        val_bpb, stderr = score(self.model, self.device, self.data, rows)
        torch._foreach_copy_(params, torch._foreach_div(sums, steps - first))
        averaged, _ = score(self.model, self.device, self.data, rows)
        return {
            "start": start,
            "order": order,
            "steps": steps,
            "val_bpb": round(val_bpb, 5),
            "averaged_bpb": round(averaged, 5),
            "stderr": round(stderr, 5),
            "train_loss": round(loss.item(), 4),
            "train_seconds": round(took, 1),
        }


def run_all(options: argparse.Namespace, trainer: Trainer) -> None:
    """Run every start with every order and number of steps.

    Raises:
        SystemExit: the file holds runs of another problem.
    """
    val_tokens = options.val_tokens // trainer.data.seq_len * trainer.data.seq_len  # whole rows
    problem = {**trainer.problem, "val_tokens": val_tokens}
    have = set()
    for r in read_results(options.file):
        other = {key: getattr(r, key, None) for key in problem}
        if other != problem:
            raise SystemExit(
                f"{options.file} holds runs of {other}, and this is {problem}: name another file"
            )
        have.add((r.start, r.order, r.steps))
    wanted = list(product(options.starts, options.orders, options.steps))
    missing = wanted if options.again else [seeds for seeds in wanted if seeds not in have]
    if missing:
        trainer.compile()
    for start, order, steps in missing:
        line = json.dumps({**problem, **trainer.run(start, order, steps, val_tokens)})
        with options.file.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


class Components(NamedTuple):
    """Standard deviations of what the noise consists of."""

    start: float
    order: float
    rest: float  # of the pair, and of the same run twice


def components(runs: list[SimpleNamespace], name: str) -> Components:
    """Return what the noise of an attribute consists of.

    runs: one of each start with each order. name: of the attribute. The estimate is that of the two-way
    analysis of variance without repeats. A negative variance counts as none.
    """
    table = {(r.start, r.order): getattr(r, name) for r in runs}
    starts = sorted({start for start, _ in table})
    orders = sorted({order for _, order in table})
    num_starts = len(starts)
    num_orders = len(orders)
    total = mean(table.values())
    by_start = {s: mean(table[s, o] for o in orders) for s in starts}
    by_order = {o: mean(table[s, o] for s in starts) for o in orders}
    squares = [(table[s, o] - by_start[s] - by_order[o] + total) ** 2 for s in starts for o in orders]
    rest = sum(squares) / ((num_starts - 1) * (num_orders - 1))
    of_start = num_orders * sum((value - total) ** 2 for value in by_start.values()) / (num_starts - 1)
    of_order = num_starts * sum((value - total) ** 2 for value in by_order.values()) / (num_orders - 1)
    variances = (of_start - rest) / num_orders, (of_order - rest) / num_starts, rest
    return Components(*(max(0.0, variance) ** 0.5 for variance in variances))


def print_table(results: list[SimpleNamespace]) -> None:
    """Print each number of steps: its runs, and what their noise consists of."""
    by_steps = defaultdict(list)
    for r in results:
        by_steps[r.steps].append(r)
    for steps, runs in sorted(by_steps.items()):
        starts = sorted({r.start for r in runs})
        orders = sorted({r.order for r in runs})
        newest = {(r.start, r.order): r for r in runs}
        print(f"{steps} steps; rows are starts, columns are orders {orders}; the newest run of each")
        for start in starts:
            cells = [newest.get((start, order)) for order in orders]
            values = [f"{r.val_bpb:.4f} ({r.averaged_bpb:.4f})" if r else "-" for r in cells]
            print(f"  {start}: {'  '.join(values)}")
        if min(len(starts), len(orders)) > 1 and len(newest) == len(starts) * len(orders):
            for name in ("val_bpb", "averaged_bpb"):
                sigma = components(list(newest.values()), name)
                print(f"  {name}: sigma by start {sigma.start:.4f}, by order {sigma.order:.4f}, ", end="")
                print(f"of the pair {sigma.rest:.4f}")


def main() -> None:
    """Run, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--file", type=Path, required=True, help="JSON lines, a run each")
    parser.add_argument("--starts", type=int, nargs="+", default=[1, 2, 3, 4], help="seeds of the weights")
    parser.add_argument(
        "--orders", type=int, nargs="+", default=[1, 2, 3, 4], help="seeds of the rows' order"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[200])
    parser.add_argument("--val-tokens", type=int, default=524288, help="scored")
    parser.add_argument("--again", action="store_true", help="run what is in the file once more")
    options = parser.parse_args()
    if options.what == "run":
        run_all(options, Trainer())
    else:
        print_table(read_results(options.file))


if __name__ == "__main__":
    main()
