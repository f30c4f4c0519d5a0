"""
Time a training step of either trainer: tokens/s, model FLOP/s as a share of the measured matrix product, memory.

    python benchmarks/step.py                           # this machine's platform, its own trainer and size
    python benchmarks/step.py --platform mlx-cpu        # the other one
    python benchmarks/step.py --both --size tiny        # both trainers on one tiny model, on this machine
    python benchmarks/step.py --size reference          # the original's model on a CPU: 4 layers, width 256, vocab 8192

Each line states the median of `--steps` steps and their spread; the last step's loss keeps the work honest.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZES = {
    "tiny": dict(vocab_size=1024, seq_len=256, N_LAYER=2, N_EMBD=128, HEAD_DIM=64, WINDOW_PATTERN="L", TOTAL_BATCH_SIZE=2048, DEVICE_BATCH_SIZE=8),
    "reference": dict(vocab_size=8192, seq_len=512, N_LAYER=4, N_EMBD=256, HEAD_DIM=64, WINDOW_PATTERN="L", TOTAL_BATCH_SIZE=8192, DEVICE_BATCH_SIZE=16),
}


def measure(platform_name, size, steps):
    os.environ["AUTORESEARCH_PLATFORM"] = platform_name
    from backends.platforms import current_platform, current_track, machine_facts

    platform = current_platform()
    settings = dict(SIZES.get(size, {}))
    if not settings:
        track, _ = current_track(platform)
        settings = dict(vocab_size=track.vocab_size, seq_len=track.seq_len)
    track = SimpleNamespace(vocab_size=settings.pop("vocab_size"), seq_len=settings.pop("seq_len"))
    on_mlx = platform.backend.startswith("mlx")
    if on_mlx:
        import mlx.core as mx

        import train_mlx as trainer
        from backends.mlx import matmul_tflops

        mx.set_default_device(mx.cpu if platform.backend == "mlx-cpu" else mx.gpu)
    else:
        import torch

        import train_cuda as trainer
        from backends.cuda import keep_freed_memory, matmul_tflops

        if platform.backend == "torch-cpu":
            keep_freed_memory()
    for name, value in settings.items():
        setattr(trainer, name, value)
    rows = np.random.default_rng(0).integers(0, track.vocab_size, (trainer.DEVICE_BATCH_SIZE, track.seq_len + 1))
    model = trainer.build_model(track, platform)
    optimizer = trainer.Optimizer(model)
    if on_mlx:
        tokens = mx.array(rows.astype(np.int32))
        train_step = trainer.make_train_step(model, optimizer)
        step = lambda: train_step(lambda n: (tokens[:, :-1], tokens[:, 1:]), 0.5).item()
        tflops = matmul_tflops(trainer.compute_dtype(platform), seconds=2)
        memory = lambda: mx.get_peak_memory() / 2**30
    else:
        device = torch.device("cuda" if platform.backend == "cuda" else "cpu")
        torch.set_flush_denormal(True)
        tokens = torch.from_numpy(rows).to(device)
        trunk = trainer.compiled(model.trunk)
        step = lambda: float(trainer.train_step(model, trunk, optimizer, lambda n: (tokens[:, :-1], tokens[:, 1:]), 0.5))
        tflops = matmul_tflops(device, trainer.compute_dtype(platform), seconds=2)
        import resource

        memory = lambda: torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    began = time.perf_counter()
    step()
    compilation = time.perf_counter() - began
    step()
    times = []
    for _ in range(steps):
        t0 = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - t0)
    times.sort()
    rate = lambda seconds: trainer.TOTAL_BATCH_SIZE / seconds
    median = times[len(times) // 2]
    share = 100 * rate(median) * model.flops_per_token() / 1e12 / tflops
    print(f"{platform.trainer} on {platform_name} ({machine_facts().device}), {size}: {rate(median):,.0f} tokens/s "
          f"({rate(times[-1]):,.0f} to {rate(times[0]):,.0f} over {steps} steps), {share:.0f}% of a matrix product's {1000 * tflops:,.0f} GFLOP/s, "
          f"peak memory {memory():.2f} GiB, first step {compilation:.0f} s, loss {loss:.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform")
    parser.add_argument("--size", choices=["start", *SIZES], default="start")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--both", action="store_true", help="both trainers, each in a process of its own")
    options = parser.parse_args()
    if options.both:
        from backends.platforms import machine_facts

        pair = {"mlx": ["apple"], "cuda": ["cuda-small", "mlx-cuda"], "torch-cpu": ["cpu", "mlx-cpu"]}[machine_facts().backend]
        for name in pair:
            subprocess.run([sys.executable, __file__, "--platform", name, "--size", options.size, "--steps", str(options.steps)], check=True)
        return
    from launcher.run import choose_platform

    measure(choose_platform(options.platform)[0].name, options.size, options.steps)


if __name__ == "__main__":
    main()
