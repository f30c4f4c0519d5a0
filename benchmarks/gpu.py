"""
Everything that we claim about speed on an NVIDIA GPU, in one table.

    python benchmarks/gpu.py                                         # about eight minutes
    python benchmarks/gpu.py --parts compare --budget 60 --seed 1 2

Parts, of which the first run is ceilings, attention, fused, profile and train:
    ceilings   a large bf16 matrix product, a large copy
    attention  each path that is present, at the trainer's shapes, against float64 and for time
    fused      loss and gradients of the model with the fused kernels and of the plain one, against float32
    tiles      each fused product with every candidate of its tile; several minutes
    profile    one training step by kernel family
    train      a run through the real launcher, of `--budget` seconds
    compare    the original's settings against the published findings, in turn, for each `--seed`
    kill       a killed launcher leaves nothing on the GPU
    mlx        train_mlx.py on the same device, with MLX's CUDA build

It needs no network: the corpus is the Python source of the packages that happen to be installed, so val_bpb
compares between runs of one machine only. On a machine without a GPU it runs the same code at a toy size on
the CPU.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("AUTORESEARCH_HOME", "/tmp/autoresearch-gpu")
HOME = Path(os.environ["AUTORESEARCH_HOME"])

REFERENCE = {
    "n_layer": 8,
    "n_embd": 512,
    "head_dim": 128,
    "window_pattern": "SSSL",
    "short_window": 1024,
    "total_batch_size": 524288,
    "device_batch_size": 256,
    "eval_batch_size": 128,
}
TOY = {
    "n_layer": 2,
    "n_embd": 128,
    "head_dim": 32,
    "window_pattern": "SL",
    "short_window": 64,
    "total_batch_size": 2048,
    "device_batch_size": 8,
    "eval_batch_size": 8,
}
# Constants of the original's first trainer. The trainers here have those of its agents' whole night.
FIRST = {
    "EMBEDDING_LR": "0.6",
    "UNEMBEDDING_LR": "0.004",
    "EMBEDDING_DECAY": "0.0",
    "VALUE_DECAY": "0.0",
    "UNEMBEDDING_DECAY": "0.0",
    "X0_START": "0.1",
    "INIT_SCALE": "1.0",
    "FINAL_LR_FRAC": "0.0",
    "MOMENTUM_RATIO": "0.3",
}
# The original's others, beside the sizes of REFERENCE.
ORIGINAL = {**FIRST, "ROPE_BASE": "10_000", "WARMUP_RATIO": "0.0", "WARMDOWN_RATIO": "0.5"}
# What its agents found in half a night: half the tokens a step, a layer more, short windows, a long warmdown,
# some warmup.
FINDINGS = {
    **FIRST,
    "N_LAYER": "9",
    "TOTAL_BATCH_SIZE": "262144",
    "DEVICE_BATCH_SIZE": "128",
    "SHORT_WINDOW": "256",
    "WARMDOWN_RATIO": "0.7",
    "WARMUP_RATIO": "0.05",
}
TOY_FINDINGS = {
    **FIRST,
    "N_LAYER": "3",
    "SHORT_WINDOW": "32",
    "WARMDOWN_RATIO": "0.7",
    "WARMUP_RATIO": "0.05",
}
FAMILIES = [  # kernel name -> family, the first that matches
    ("fused", r"GemmMod|norm_rotary|gated|row_sums"),
    ("attention", r"flash|fmha|flex|attention|sdpa|FlashAttn|cute_dsl|kernel_cutlass"),
    ("matmul", r"nvjet|gemm|cutlass|xmma|cublas|addmm|aten::mm|aten::bmm"),
    ("copy", r"memcpy|memset|copy|CatArray"),
    ("embedding", r"embedding|index|sort|Radix|thrust|cub"),
    ("compiled", r"triton|CompiledFx"),
]
PRINTED = (  # of what a run prints
    "val_bpb",
    "training_seconds",
    "total_seconds",
    "peak_memory_mb",
    "tokens_per_second",
    "mfu_percent",
    "num_steps",
    "status",
    "reason",
    "marks",
)


# ---------------------------------------------------------------------------
# The machine and what is measured on it
# ---------------------------------------------------------------------------


def write_config(gpu: bool, start: dict[str, Any]) -> None:
    """Write a configuration with one track of everything installed and the platform under test."""
    track = {
        "packages": large_packages() if gpu else ["mpmath", "networkx"],
        "vocab_size": 8192 if gpu else 1024,
        "seq_len": 2048 if gpu else 256,
        "val_tokens": 2**21 if gpu else 2**15,
    }
    both = {
        "track": "local",
        "device_kind": "gpu" if gpu else "cpu",
        "bf16": gpu,
        "peak_bf16_tflops": 989.5 if gpu else 0.0,
        "startup_seconds": 280.0,
    }
    smaller = {name: min(start[name], 32) for name in ("device_batch_size", "eval_batch_size")}
    torch_platform = {**both, "framework": "torch", "trainer": "train_cuda.py", "start": start}
    mlx_platform = {
        **both,
        "framework": "mlx",
        "trainer": "train_mlx.py",
        "auto": False,
        "start": {**start, **smaller},
    }
    platforms = {"bench": torch_platform, "bench-mlx": mlx_platform}
    path = HOME / "bench.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"tracks": {"local": track}, "platforms": platforms}))
    os.environ["AUTORESEARCH_CONFIG"] = str(path)


def large_packages() -> list[str]:
    """Return the installed packages that have more than 20 Python files."""

    def size(package: importlib.metadata.Distribution) -> int:
        return sum(file.suffix == ".py" for file in package.files or [])

    return sorted({d.metadata["Name"] for d in importlib.metadata.distributions() if size(d) > 20})


def timed(function: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Return the median seconds of a call, after three."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        synchronize(device)
        t0 = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - t0)
    return sorted(times)[repeats // 2]


def synchronize(device: str) -> None:
    """Wait for the GPU, if it is one."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def relative_error(ours: Any, expected: Any) -> float:
    """Return the norm of the difference of two tensors over the norm of the second."""
    return float((ours.double() - expected).norm() / expected.norm())


def ceilings(device: str) -> float:
    """Print what the device can do at most. Returns TFLOP/s of a matrix product."""
    import torch

    from backends.cuda import matmul_tflops

    tflops = matmul_tflops(torch.device(device), torch.bfloat16, seconds=2)
    a = torch.randn(2**30 if device == "cuda" else 2**24, device=device)
    b = torch.empty_like(a)
    seconds = timed(lambda: b.copy_(a), device)
    rate = f"{tflops:.1f} TFLOP/s" if tflops > 1 else f"{1e3 * tflops:.0f} GFLOP/s"
    print(f"bf16 matrix product: {rate}")
    print(f"copy: {2 * 4 * a.numel() / seconds / 1e9:.0f} GB/s read and written")
    return tflops


# ---------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------


def attention(device: str, start: dict[str, Any], seq_len: int) -> None:
    """Print every path at the trainer's shapes: error of the gradients against float64, and time."""
    B = start["device_batch_size"]
    D = start["head_dim"]
    H = start["n_embd"] // D
    print(f"attention [B {B}, T {seq_len}, H {H}, D {D}], forward and backward")
    for window in dict.fromkeys((seq_len, start["short_window"], 256 if seq_len > 256 else 32)):
        for name, call in attention_paths(device, seq_len, window).items():
            try:
                line = measure_attention(name, call, device, (B, seq_len, H, D), window)
            except Exception as error:
                line = "failed: " + f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:170]
            print(f"  window {window:5}  {name:7} {line}", flush=True)


def attention_paths(device: str, seq_len: int, window: int) -> dict[str, Callable]:
    """Return the paths that are present, by name, as f(q, k, v)."""
    import torch

    import train_cuda as trainer
    import train_cuda_kernels as kernels

    paths = {"blocks": torch.compile(partial(trainer.block_attention, window=window), dynamic=False)}
    if device == "cpu":
        return paths
    if window >= seq_len:
        paths["sdpa"] = trainer.sdpa_attention
    flex = trainer.flex_attention(window, seq_len, torch.device(device))
    paths["flex"] = torch.compile(flex, dynamic=False)
    for name, kernel in (("flash3", kernels.flash3()), ("flash4", kernels.flash4())):
        if kernel:
            paths[name] = partial(kernel, window=window)
    return paths


def measure_attention(
    name: str, call: Callable, device: str, shape: tuple[int, int, int, int], window: int
) -> str:
    """Return a line about one path. shape: (B, T, H, D)."""
    import torch

    import train_cuda as trainer

    torch.manual_seed(0)
    two_rows = (2, *shape[1:])
    small = [torch.randn(two_rows, device=device).bfloat16().requires_grad_() for _ in range(3)]
    exact = [t.detach().double().requires_grad_() for t in small]
    upstream = torch.randn(two_rows, device=device)
    trainer.block_attention(exact[0], exact[1], exact[2], window).backward(upstream.double())
    y = call(*small)
    y.backward(upstream.to(y.dtype))
    error = max(relative_error(a.grad, b.grad) for a, b in zip(small, exact, strict=True))
    if name == "blocks" and device == "cuda":
        return f"gradient error {error:.1e}  (not timed)"
    large = [torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(3)]
    upstream = torch.randn_like(large[0])
    forward = timed(lambda: call(*large), device)
    both = timed(lambda: torch.autograd.grad(call(*large), large, upstream), device)
    return f"gradient error {error:.1e}  forward {1e3 * forward:7.2f} ms  both {1e3 * both:7.2f} ms"


# ---------------------------------------------------------------------------
# Fused kernels
# ---------------------------------------------------------------------------


def fused(device: str) -> None:
    """Print loss and gradients of a small model in bfloat16, fused and plain, against float32."""
    import torch

    loss, gradients, _ = run_small_model(device, torch.float32, fuse=False)
    for name in ("plain", "fused"):
        ours, our_gradients, is_fused = run_small_model(device, torch.bfloat16, fuse=name == "fused")
        errors = {key: relative_error(g, gradients[key]) for key, g in our_gradients.items()}
        worst = max(errors, key=lambda key: errors[key])
        median = sorted(errors.values())[len(errors) // 2]
        missing = " (no fused kernels here)" if name == "fused" and not is_fused else ""
        print(
            f"{name}{missing}: loss differs by {ours - loss:+.1e}, "
            f"gradients by {median:.1e} (median), {errors[worst]:.1e} ({worst})",
            flush=True,
        )


def run_small_model(device: str, dtype: Any, fuse: bool) -> tuple[float, dict[str, Any], bool]:
    """Return (loss, gradients in float64, whether the blocks are fused) of a small model on random tokens."""
    import torch

    import train_cuda as trainer
    import train_cuda_kernels as kernels

    T, D = (2048, 512) if device == "cuda" else (256, 128)
    config = trainer.Config(
        vocab_size=8192,
        seq_len=T,
        n_layer=4,
        n_embd=D,
        head_dim=D // 4,
        window_pattern="SSSL",
        short_window=T // 8,
        value_pattern="BT",
        bigram_rows=16384 if device == "cuda" else 512,
        bos=0,
        dtype=dtype,
    )
    with torch.device(device):
        model = trainer.GPT(config)
    fill(model, device)
    fuse_loss = kernels.fuse_loss
    is_fused = fuse and kernels.fuse_blocks(model.blocks, model.wte, model.rotary)
    if not fuse:
        kernels.fuse_loss = lambda plain, w, softcap: plain
        for block in model.blocks:
            block.attn.attend = partial(trainer.block_attention, window=block.attn.window)
    generator = torch.Generator(device).manual_seed(1)
    x, y = torch.randint(0, 8192, (2, 2, T), device=device, generator=generator)
    try:
        loss = trainer.linear_cross_entropy(trainer.compiled(model.trunk)(x), model.lm_head, y)
    finally:
        kernels.fuse_loss = fuse_loss
    loss.backward()
    return loss.item(), {key: p.grad.double() for key, p in model.named_parameters()}, is_fused


def fill(model: Any, device: str) -> None:
    """Draw every weight at random, so that none is zero; the matrices small."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            is_matrix = (p.ndim > 1 and "block" in key) or key == "lm_head"
            p.copy_(torch.randn(p.shape, device=device, generator=generator) * (0.05 if is_matrix else 1))


def tiles() -> None:
    """Print every fused product's time with each candidate of its tile; TILES has the best of an H100."""
    import torch

    import train_cuda_kernels as kernels

    if not kernels.available(torch.device("cuda"), torch.bfloat16):
        print("tiles: no fused kernels here")
        return

    def random(*shape: int) -> Any:
        return torch.rand(*shape, device="cuda").bfloat16()

    for name, operands in kernels.product_cases(random).items():
        chosen = kernels.TILES[name]
        reads_more = "c" in operands or "x" in operands
        times = {}
        for tile in candidates(chosen, (4, 12) if reads_more else (4,)):
            kernels.TILES[name] = tile
            times[tile] = 1e3 * timed(partial(kernels.product, name, **operands), "cuda")
        kernels.TILES[name] = chosen
        flops = 2 * operands["a"].numel() * len(operands["b"])
        best = min(times, key=lambda tile: times[tile])
        print(
            f"tiles {name:22} {times[chosen]:.3f} ms {flops / times[chosen] / 1e9:.0f} TFLOP/s; "
            f"best {times[best]:.3f} {best}; worst {max(times.values()):.3f}",
            flush=True,
        )


def candidates(chosen: Any, loads: Iterable[int]) -> list[Any]:
    """Return the tiles to try for a product, the chosen one first."""
    from train_cuda_kernels import Tile

    shapes = [(128, 256, False), (256, 128, False), (128, 128, True), (192, 128, True)]
    clusters = [(2, 1), (1, 2)]
    tried = [Tile(*shape, *cluster, n) for shape, cluster, n in itertools.product(shapes, clusters, loads)]
    return list(dict.fromkeys([chosen, *tried]))


# ---------------------------------------------------------------------------
# A training step
# ---------------------------------------------------------------------------


def profile(device: str, tflops: float) -> None:
    """Print one training step of the trainer by kernel family. tflops: of a large matrix product."""
    import torch

    import train_cuda as trainer
    from backends.cuda import Experiment

    exp = Experiment()
    torch.set_float32_matmul_precision("high")
    model = trainer.build_model(exp.track, exp.platform)
    train_step = trainer.make_train_step(model, trainer.Optimizer(model))
    step = partial(train_step, exp.dummy_batch, 0.5)
    t0 = time.perf_counter()
    step()
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    print(f"compilation: {time.perf_counter() - t0:.0f} s, {breaks} graph breaks")
    rate = trainer.TOTAL_BATCH_SIZE / timed(step, device, 5)
    flops = model.flops_per_token() * rate / 1e12
    print(
        f"step: {1e3 * trainer.TOTAL_BATCH_SIZE / rate:.1f} ms, {rate:,.0f} tokens/s, {flops:.1f} TFLOP/s, "
        f"{100 * flops / tflops:.0f}% of the measured matrix product"
    )
    print_kernels(profiled(step, device), device)
    if device == "cuda":
        print(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def profiled(function: Callable[[], Any], device: str) -> Any:
    """Return the profiler's averages of one call."""
    import torch

    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device == "cuda" else activity.CPU]) as profiler:
        function()
        synchronize(device)
    return profiler.key_averages()


def print_kernels(events: Any, device: str, most: int = 22) -> None:
    """Print the time by family, then the slowest kernels."""
    totals: dict[str, float] = {}
    kernels = []
    for event in events:
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        family = next((name for name, pattern in FAMILIES if re.search(pattern, event.key, re.I)), "other")
        totals[family] = totals.get(family, 0) + spent
        kernels.append((spent, event.count, event.key))
    whole = sum(totals.values())
    for family, spent in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"  {family:10} {spent / 1e3:8.2f} ms  {100 * spent / whole:4.1f}%")
    for spent, count, key in sorted(kernels, reverse=True)[:most]:
        print(f"    {spent / 1e3:7.2f} ms {count:4} x {key[:100]}")


# ---------------------------------------------------------------------------
# Runs through the launcher
# ---------------------------------------------------------------------------


def run_command(platform: str, label: str, budget: float, seed: int = 1) -> list[str]:
    command = [sys.executable, "-m", "launcher.entry", "run", "--platform", platform, "-m", label]
    return [*command, "--budget", f"{budget:g}", "--seed", str(seed)]


def train(
    budget: float, trainer: Path | None, label: str, seed: int, platform: str = "bench"
) -> float | None:
    """Run a trainer through the launcher and print its result. Returns val_bpb, None without."""
    began = time.monotonic()
    command = run_command(platform, label, budget, seed) + (["--trainer", str(trainer)] if trainer else [])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - began
    lines = [line for line in done.stdout.splitlines() if line.split(":")[0] in PRINTED]
    print(f"train {label}: " + ", ".join(lines))
    run = re.search(r"^run: (\S+)", done.stdout, re.M)
    if run:
        print_phases(run[1], seconds)
    if done.returncode not in (0, 3):
        print(done.stdout[-1500:], done.stderr[-1500:])
    score = re.search(r"^val_bpb: (\S+)", done.stdout, re.M)
    return float(score[1]) if score else None


def print_phases(run_id: str, seconds: float) -> None:
    """Print when a run's clock started and how long it was scored. seconds: of the whole command."""
    from backends.protocol import RunDir

    at = {event.event: seconds for seconds, event in RunDir(HOME / "runs" / run_id).read_events()}
    scoring = at.get("result", 0) - at.get("stop", 0)
    print(
        f"  {at.get('start', 0):.1f} s from the command to the first counted step, "
        f"{scoring:.1f} s of checks and scoring, {seconds:.0f} s in all"
    )


def compare(budget: float, seeds: list[int], findings: dict[str, str]) -> None:
    """Run the original's settings and the findings, in turn, for each seed."""
    original = variant(ORIGINAL, "original")
    found = variant(findings, "findings")
    wins = 0
    for seed in seeds:
        before = train(budget, original, f"original-{budget:g}s-seed{seed}", seed)
        after = train(budget, found, f"findings-{budget:g}s-seed{seed}", seed)
        if before is None or after is None:
            return
        wins += after < before
        print(
            f"compare {budget:g} s, seed {seed}: original {before:.4f}, findings {after:.4f}, "
            f"difference {after - before:+.4f}",
            flush=True,
        )
    print(f"compare {budget:g} s: the findings are better in {wins} of {len(seeds)} seeds")


def kill(gpu: bool) -> None:
    """Kill a launcher in the middle of training; print how long its processes live on, and on the GPU."""
    import psutil

    from launcher.processes import processes_of

    runs = HOME / "runs"
    before = set(runs.glob("*"))
    launcher = subprocess.Popen(
        run_command("bench", "to be killed", 300),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert launcher.stderr
    for line in launcher.stderr:
        if "training on" in line:
            break
    [run] = set(runs.glob("*")) - before
    trainers = processes_of(run.name)
    held = held_by(gpu)
    launcher.kill()  # this process alone: the guards must notice
    launcher.wait()
    began = time.monotonic()
    _, left = psutil.wait_procs(trainers, timeout=60)
    print(
        f"kill: {len(trainers)} processes before, {len(left)} left after {time.monotonic() - began:.1f} s; "
        f"on the GPU before: {held or 'nothing'}, after: {held_by(gpu) or 'nothing'}"
    )


def held_by(gpu: bool) -> list[str]:
    """Return a line for each process on the GPU, with its memory."""
    from backends.platforms import output_of

    query = ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader")
    return [line for line in output_of(*query).split("\n") if line] if gpu else []


def variant(settings: dict[str, str], label: str) -> Path:
    """Return a copy of the trainer with constants replaced: {"MATRIX_LR": "0.05"}."""
    text = (ROOT / "train_cuda.py").read_text()
    for name, value in settings.items():
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.M)
        assert count == 1, f"the trainer has no constant {name}"
    path = HOME / "variants" / label / "train_cuda.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run_parts(options: argparse.Namespace, gpu: bool, start: dict[str, Any], seq_len: int) -> None:
    """Run the parts that were asked for, the short ones first."""
    device = "cuda" if gpu else "cpu"
    parts = set(options.parts.split(","))
    tflops = ceilings(device) if {"ceilings", "profile"} & parts else 0.0
    if "attention" in parts:
        attention(device, start, seq_len)
    if "fused" in parts:
        fused(device)
    if "tiles" in parts:
        tiles()
    if "profile" in parts:
        profile(device, tflops)
    if gpu:
        import torch

        torch.cuda.empty_cache()
    if "train" in parts:
        settings = dict(item.split("=", 1) for item in options.set)
        trainer = variant(settings, options.label) if settings else None
        for budget, seed in itertools.product(options.budget, options.seed):
            train(budget, trainer, f"{options.label}-{budget:g}s-seed{seed}", seed)
    for budget in options.budget:
        if "compare" in parts:
            compare(budget, options.seed, FINDINGS if gpu else TOY_FINDINGS)
        if "mlx" in parts:
            train(budget, None, f"mlx-{budget:g}s", options.seed[0], "bench-mlx")
    if "kill" in parts:
        kill(gpu)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--parts", default="ceilings,attention,fused,profile,train")
    parser.add_argument("--budget", type=float, nargs="*", default=[60, 300])
    parser.add_argument("--seed", type=int, nargs="*", default=[1])
    parser.add_argument(
        "--set", nargs="*", default=[], help="NAME=VALUE constants of the trainer for the train part"
    )
    parser.add_argument("--label", default="reference")
    options = parser.parse_args()

    import torch

    gpu = torch.cuda.is_available()
    start = REFERENCE if gpu else TOY
    write_config(gpu, start)
    os.environ["AUTORESEARCH_PLATFORM"] = "bench"
    import prepare

    prepared = prepare.prepare_track(prepare.load_track("local"))
    name = torch.cuda.get_device_name() if gpu else "cpu"
    tokens = prepared.num_train_rows * prepared.seq_len
    print(f"device: {name}, torch {torch.__version__}; corpus: {tokens / 1e6:.0f}M tokens")
    run_parts(options, gpu, start, prepared.seq_len)


if __name__ == "__main__":
    main()
