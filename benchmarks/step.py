"""
Time a training step of either trainer: tokens/s, share of the measured matrix product's FLOP/s, memory.

    python benchmarks/step.py                      # this machine's platform, its own trainer and size
    python benchmarks/step.py --platform mlx-cpu   # the other one
    python benchmarks/step.py --both --size tiny   # both trainers on one tiny model, on this machine
    python benchmarks/step.py --size reference     # the original's model on a CPU: 4 layers, width 256

Each line states the median of `--steps` steps and their spread; the last step's loss keeps the work honest.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1024,
        "seq_len": 256,
        "N_LAYER": 2,
        "N_EMBD": 128,
        "HEAD_DIM": 64,
        "WINDOW_PATTERN": "L",
        "TOTAL_BATCH_SIZE": 2048,
        "DEVICE_BATCH_SIZE": 8,
    },
    "reference": {
        "vocab_size": 8192,
        "seq_len": 512,
        "N_LAYER": 4,
        "N_EMBD": 256,
        "HEAD_DIM": 64,
        "WINDOW_PATTERN": "L",
        "TOTAL_BATCH_SIZE": 8192,
        "DEVICE_BATCH_SIZE": 16,
    },
}
# (framework, kind of device) of a machine -> the platform of either trainer on it.
BOTH = {
    ("mlx", "gpu"): ["apple"],
    ("torch", "gpu"): ["cuda-small", "mlx-cuda"],
    ("torch", "cpu"): ["cpu", "mlx-cpu"],
}


class Machine(NamedTuple):
    """What differs between the frameworks."""

    to_device: Callable[[np.ndarray], Any]  # int64 tokens
    matmul_tflops: Callable[[], float]
    peak_memory: Callable[[], float]  # GiB


def torch_machine(platform: Any) -> Machine:
    """Set PyTorch up as train_cuda.py and the harness do."""
    import resource

    import torch

    from backends.cuda import compute_dtype, keep_freed_memory, matmul_tflops

    device = torch.device("cuda" if platform.device_kind == "gpu" else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)
    if device.type == "cpu":
        keep_freed_memory()

    def peak_memory() -> float:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    return Machine(
        to_device=lambda rows: torch.from_numpy(rows).to(device),
        matmul_tflops=lambda: matmul_tflops(device, compute_dtype(platform), seconds=2),
        peak_memory=peak_memory,
    )


def mlx_machine(platform: Any) -> Machine:
    """Set MLX up as the harness does."""
    import mlx.core as mx

    from backends.mlx import compute_dtype, matmul_tflops

    mx.set_default_device(mx.gpu if platform.device_kind == "gpu" else mx.cpu)
    return Machine(
        to_device=lambda rows: mx.array(rows.astype(np.int32)),
        matmul_tflops=lambda: matmul_tflops(compute_dtype(platform), seconds=2),
        peak_memory=lambda: mx.get_peak_memory() / 2**30,
    )


def measure(platform_name: str, size: str, steps: int) -> None:
    """Print the line of one trainer."""
    os.environ["AUTORESEARCH_PLATFORM"] = platform_name
    from backends.platforms import current_platform, machine_facts

    platform = current_platform()
    machine = (mlx_machine if platform.framework == "mlx" else torch_machine)(platform)
    trainer = importlib.import_module(Path(platform.trainer).stem)
    track = choose_size(trainer, platform, size)
    model = trainer.build_model(track, platform)
    train_step = trainer.make_train_step(model, trainer.Optimizer(model))
    shape = (trainer.DEVICE_BATCH_SIZE, track.seq_len + 1)
    tokens = machine.to_device(np.random.default_rng(0).integers(0, track.vocab_size, shape))
    step = partial(train_step, lambda rows: (tokens[:, :-1], tokens[:, 1:]), 0.5)
    tflops = machine.matmul_tflops()
    compilation, _ = timed(step)
    timed(step)
    times, losses = zip(*(timed(step) for _ in range(steps)), strict=True)
    rates = sorted(trainer.TOTAL_BATCH_SIZE / seconds for seconds in times)
    median = rates[len(rates) // 2]
    share = 100 * median * model.flops_per_token() / 1e12 / tflops
    print(
        f"{platform.trainer} on {platform_name} ({machine_facts().device}), {size}: {median:,.0f} tokens/s "
        f"({rates[0]:,.0f} to {rates[-1]:,.0f} over {steps} steps), "
        f"{share:.0f}% of a matrix product's {1000 * tflops:,.0f} GFLOP/s, "
        f"peak memory {machine.peak_memory():.2f} GiB, first step {compilation:.0f} s, loss {losses[-1]:.3f}",
        flush=True,
    )


def choose_size(trainer: Any, platform: Any, size: str) -> SimpleNamespace:
    """Set the trainer's constants to a size of SIZES, or leave the platform's. Returns a track of that size.

    It has vocab_size, seq_len and bos, which is all that build_model asks for.
    """
    from prepare import load_track

    settings = dict(SIZES.get(size, {}))
    if not settings:
        own = load_track(platform.track)
        return SimpleNamespace(vocab_size=own.vocab_size, seq_len=own.seq_len, bos=0)
    track = SimpleNamespace(vocab_size=settings.pop("vocab_size"), seq_len=settings.pop("seq_len"), bos=0)
    for name, value in settings.items():
        setattr(trainer, name, value)
    return track


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Return (seconds, loss) of a step."""
    t0 = time.perf_counter()
    loss = step().item()
    return time.perf_counter() - t0, loss


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--platform", default="")
    parser.add_argument("--size", choices=["start", *SIZES], default="start")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--both", action="store_true", help="both trainers, each in a process of its own")
    options = parser.parse_args()

    from backends.platforms import choose_platform, machine_facts

    if not options.both:
        measure(choose_platform(options.platform)[0].name, options.size, options.steps)
        return
    facts = machine_facts()
    for name in BOTH[facts.framework, facts.device_kind]:
        more = ["--size", options.size, "--steps", str(options.steps)]
        subprocess.run([sys.executable, __file__, "--platform", name, *more], check=True)


if __name__ == "__main__":
    main()
