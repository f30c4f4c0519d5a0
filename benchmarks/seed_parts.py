"""
Where does the noise between seeds come from? The first weights, the order of the rows, the number of steps.

    python benchmarks/seed_parts.py run --file noise.jsonl   # 4 starts x 4 orders of 200 steps
    python benchmarks/seed_parts.py run --file noise.jsonl --starts 1 --orders 1 --steps 180 220
    python benchmarks/seed_parts.py table --file noise.jsonl # what the file holds

Runs of a trainer differ in all three, as they end after some seconds. Here each is set by itself: the model
is that of the platform, trained for so many steps, and scored as it is and with its weights averaged over the
last tenth of them. A result is saved at once, and what is in the file is not run again but with --again.
"""

import argparse
import importlib
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.sizes import BatchOrder, read_results, score  # noqa: E402

AVERAGED = 0.1  # share of the steps over whose end weights are averaged


class Trainer:
    """The model of this machine's platform and all that its training needs, compiled once."""

    def __init__(self) -> None:
        import torch

        from backends.cuda import TorchDevice
        from backends.platforms import current_entries
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

    def run(self, start: int, order: int, steps: int, val_tokens: int) -> dict[str, Any]:
        """Train from the weights that seed `start` gives, on rows in the order of seed `order`, and score."""
        import torch

        torch.manual_seed(start)
        self.model.load_state_dict(self.module.build_model(self.data, self.platform).state_dict())
        self.optimizer.reset()
        next_batch = BatchOrder(self.data.rows("train"), self.device, order).next_batch
        params = [p.detach() for p in self.model.parameters()]
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        first = steps - max(1, round(AVERAGED * steps))
        began = time.monotonic()
        for step in range(steps):
            loss = self.train_step(next_batch, step / steps)
            if step >= first:
                torch._foreach_add_(sums, [p.float() for p in params])
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


def run_all(options: argparse.Namespace) -> None:
    """Run every start with every order and number of steps."""
    have = set()
    if not options.again:
        have = {(r.start, r.order, r.steps) for r in read_results(options.file)}
    trainer = Trainer()
    for steps in options.steps:
        for start in options.starts:
            for order in options.orders:
                if (start, order, steps) in have:
                    continue
                result = trainer.run(start, order, steps, options.val_tokens)
                line = json.dumps(result)
                with options.file.open("a") as file:
                    file.write(line + "\n")
                print(line, flush=True)


def components(runs: list[SimpleNamespace], name: str) -> tuple[float, float, float]:
    """Return the standard deviations of val_bpb by start, by order and by what is left of both.

    runs: one of each start with each order. name: the attribute that is taken apart. The estimate is that of
    the two-way analysis of variance without repeats; a negative variance counts as none.
    """
    table = {(r.start, r.order): getattr(r, name) for r in runs}
    starts = sorted({start for start, _ in table})
    orders = sorted({order for _, order in table})
    a, b = len(starts), len(orders)
    total = mean(table.values())
    by_start = {s: mean(table[s, o] for o in orders) for s in starts}
    by_order = {o: mean(table[s, o] for s in starts) for o in orders}
    rest = sum((table[s, o] - by_start[s] - by_order[o] + total) ** 2 for s in starts for o in orders)
    within = rest / ((a - 1) * (b - 1))
    of_start = b * sum((value - total) ** 2 for value in by_start.values()) / (a - 1)
    of_order = a * sum((value - total) ** 2 for value in by_order.values()) / (b - 1)
    variances = (of_start - within) / b, (of_order - within) / a, within
    return tuple(max(0.0, value) ** 0.5 for value in variances)  # type: ignore[return-value]


def print_table(results: list[SimpleNamespace]) -> None:
    """Print each number of steps: its runs, and what their noise consists of."""
    by_steps = defaultdict(list)
    for r in results:
        by_steps[r.steps].append(r)
    for steps, runs in sorted(by_steps.items()):
        starts = sorted({r.start for r in runs})
        orders = sorted({r.order for r in runs})
        newest = {(r.start, r.order): r for r in runs}
        print(f"{steps} steps, {len(runs)} runs; rows are starts, columns are orders {orders}")
        for start in starts:
            cells = [newest.get((start, order)) for order in orders]
            values = [f"{r.val_bpb:.4f} ({r.averaged_bpb:.4f})" if r else "-" for r in cells]
            print(f"  {start}: {'  '.join(values)}")
        if min(len(starts), len(orders)) > 1 and len(newest) == len(starts) * len(orders):
            for name in ("val_bpb", "averaged_bpb"):
                start, order, both = components(list(newest.values()), name)
                print(
                    f"  {name}: sigma by start {start:.4f}, by order {order:.4f}, of both together {both:.4f}"
                )


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
        run_all(options)
    else:
        print_table(read_results(options.file))


if __name__ == "__main__":
    main()
