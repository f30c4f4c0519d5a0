"""
Everything that we claim about speed on an NVIDIA GPU, in one table.

    python benchmarks/gpu.py                          # ceilings, attention, fused, profile, train: about eight minutes
    python benchmarks/gpu.py --parts compare --budget 60 --seed 1 2

Parts: ceilings (a large bf16 matrix product, a large copy); attention (each path that is present, at the trainer's
shapes, against float64 and for time); fused (loss and gradients of the model with the fused kernels and of the plain
one against float32); tiles (each fused product with every candidate of its tile, several minutes); profile (one
training step by kernel family); train (through the real launcher, `--budget` seconds); compare (the original's
settings against the published findings, in turn, for each `--seed`); kill (a killed launcher leaves nothing on the
GPU); mlx (train_mlx.py on the same device, with MLX's CUDA build). It needs no network: the corpus is the Python
source of the packages that happen to be installed, so val_bpb compares between runs of one machine only. On a
machine without a GPU it runs the same code at a toy size on the CPU.
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
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("AUTORESEARCH_HOME", "/tmp/autoresearch-gpu")

REFERENCE = dict(n_layer=8, n_embd=512, head_dim=128, window_pattern="SSSL", short_window=1024,
                 total_batch_size=524288, device_batch_size=256, eval_batch_size=128)
TOY = dict(n_layer=2, n_embd=128, head_dim=32, window_pattern="SL", short_window=64,
           total_batch_size=2048, device_batch_size=8, eval_batch_size=8)
ORIGINAL = dict(ROPE_BASE=10_000, WARMUP_RATIO=0.0, WARMDOWN_RATIO=0.5)  # its constants, beside the sizes of REFERENCE
# What the original's agents found: half the tokens a step, a layer more, short windows, a long warmdown, a little warmup.
FINDINGS = dict(N_LAYER=9, TOTAL_BATCH_SIZE=262144, DEVICE_BATCH_SIZE=128, SHORT_WINDOW=256, WARMDOWN_RATIO=0.7, WARMUP_RATIO=0.05)
TOY_FINDINGS = dict(N_LAYER=3, SHORT_WINDOW=32, WARMDOWN_RATIO=0.7, WARMUP_RATIO=0.05)
FAMILIES = [  # kernel name -> family, the first that matches
    ("fused", r"GemmMod|norm_rotary|gated|row_sums"),
    ("attention", r"flash|fmha|flex|attention|sdpa|FlashAttn|cute_dsl|kernel_cutlass"),
    ("matmul", r"nvjet|gemm|cutlass|xmma|cublas|addmm|aten::mm|aten::bmm"),
    ("copy", r"memcpy|memset|copy|CatArray"),
    ("embedding", r"embedding|index|sort|Radix|thrust|cub"),
    ("compiled", r"triton|CompiledFx"),
]


def write_config(gpu, start):
    """A configuration with one track of everything installed and the platform under test."""
    packages = sorted({d.metadata["Name"] for d in importlib.metadata.distributions()
                       if sum(f.suffix == ".py" for f in d.files or []) > 20}) if gpu else ["mpmath", "networkx"]
    both = {"track": "local", "bf16": gpu, "peak_bf16_tflops": 989.5 if gpu else 0.0, "startup_seconds": 280, "start": start}
    config = {
        "tracks": {"local": {"packages": packages, "vocab_size": 8192 if gpu else 1024, "seq_len": 2048 if gpu else 256, "val_tokens": 2**21 if gpu else 2**15}},
        "platforms": {
            "bench": {**both, "backend": "cuda" if gpu else "torch-cpu", "trainer": "train_cuda.py"},
            "bench-mlx": {**both, "backend": "mlx-cuda" if gpu else "mlx-cpu", "trainer": "train_mlx.py", "auto": False,
                          "start": {**start, "device_batch_size": min(start["device_batch_size"], 32), "eval_batch_size": min(start["eval_batch_size"], 32)}},
        },
    }
    path = Path(os.environ["AUTORESEARCH_HOME"]) / "bench.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    os.environ["AUTORESEARCH_CONFIG"] = str(path)


def timed(function, device, repeats=10):
    """Median seconds of a call, after three."""
    import torch

    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        t0 = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - t0)
    return sorted(times)[repeats // 2]


def ceilings(device):
    import torch

    from backends.cuda import matmul_tflops

    tflops = matmul_tflops(torch.device(device), torch.bfloat16, seconds=2)
    a = torch.randn(2**30 if device == "cuda" else 2**24, device=device)
    b = torch.empty_like(a)
    seconds = timed(lambda: b.copy_(a), device)
    print(f"bf16 matrix product: {tflops:.1f} TFLOP/s" if tflops > 1 else f"bf16 matrix product: {1e3 * tflops:.0f} GFLOP/s")
    print(f"copy: {2 * 4 * a.numel() / seconds / 1e9:.0f} GB/s read and written")
    return tflops


def attention(device, start, seq_len):
    """Every path at the trainer's shapes: error of output and gradients against float64, time of forward and backward."""
    import torch

    import train_cuda as trainer
    from backends import kernels

    B, H, D = start["device_batch_size"], start["n_embd"] // start["head_dim"], start["head_dim"]
    full, paths = seq_len, {}
    paths["blocks"] = trainer.block_attention
    if device == "cuda":
        paths["sdpa"] = lambda q, k, v, window: trainer.sdpa_attention(q, k, v) if window >= full else None
        paths["flex"] = None  # made for each window
        for name, make in (("flash3", kernels.flash3), ("flash4", kernels.flash4)):
            kernel = make()
            if kernel:
                paths[name] = kernel
    print(f"attention [B {B}, T {seq_len}, H {H}, D {D}], forward and backward")
    for window in dict.fromkeys((full, start["short_window"], 256 if full > 256 else 32)):
        torch.manual_seed(0)
        small = [torch.randn(2, seq_len, H, D, device=device).bfloat16().requires_grad_() for _ in range(3)]
        exact = [t.detach().double().requires_grad_() for t in small]
        large = [torch.randn(B, seq_len, H, D, device=device).bfloat16().requires_grad_() for _ in range(3)]
        g = torch.randn(2, seq_len, H, D, device=device)
        trainer.block_attention(*exact, window).backward(g.double())
        for name, path in paths.items():
            call = torch.compile(trainer.flex_attention(window, full, device), dynamic=False) if name == "flex" else partial(path, window=window)
            call = torch.compile(call, dynamic=False) if name == "blocks" else call
            try:
                y = call(*small)
                if y is None:
                    continue
                for t in small:
                    t.grad = None
                y.backward(g.to(y.dtype))
                errors = [float((a.grad.double() - b.grad).norm() / b.grad.norm()) for a, b in zip(small, exact)]
                if name == "blocks" and device == "cuda":
                    print(f"  window {window:5}  {name:7} gradient error {max(errors):.1e}  (not timed)")
                    continue
                upstream = torch.randn_like(large[0])
                forward = timed(lambda: call(*large), device)
                both = timed(lambda: torch.autograd.grad(call(*large), large, upstream), device)
                print(f"  window {window:5}  {name:7} gradient error {max(errors):.1e}  forward {1e3 * forward:7.2f} ms  both {1e3 * both:7.2f} ms", flush=True)
            except Exception as e:
                print(f"  window {window:5}  {name:7} failed: " + f"{type(e).__name__}: {str(e).strip()}".splitlines()[0][:170], flush=True)


def fused(device):
    """Loss and gradients of a small model, fused and plain in bfloat16, against the plain one in float32."""
    import torch

    import train_cuda as trainer

    T, D = (2048, 512) if device == "cuda" else (256, 128)
    config = trainer.Config(vocab_size=8192, seq_len=T, n_layer=4, n_embd=D, head_dim=D // 4, window_pattern="SSSL", short_window=T // 8)
    tokens = torch.randint(0, 8192, (2, 2, T), device=device, generator=torch.Generator(device).manual_seed(1))
    expected, attention_kernel = None, trainer.attention_kernel
    for name in ("float32", "plain", "fused"):
        trainer.attention_kernel = attention_kernel if name == "fused" else lambda window, *rest: partial(trainer.block_attention, window=window)
        with torch.device(device):
            model = trainer.GPT(config, device, torch.float32 if name == "float32" else torch.bfloat16)
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for key, p in model.named_parameters():
                p.copy_(torch.randn(p.shape, device=device, generator=generator) * (0.05 if p.ndim > 1 and "block" in key or key == "lm_head" else 1))
        if name == "fused":
            trainer.fuse(model)
        loss = trainer.linear_cross_entropy(trainer.compiled(model.trunk)(tokens[0]), model.lm_head, tokens[1])
        loss.backward()
        gradients = {key: p.grad.double() for key, p in model.named_parameters()}
        if name == "float32":
            expected = loss.item(), gradients
            continue
        errors = {key: float((g - expected[1][key]).norm() / expected[1][key].norm()) for key, g in gradients.items()}
        worst = max(errors, key=errors.get)
        missing = " (no fused kernels here)" if name == "fused" and not model.blocks[0].fused else ""
        print(f"{name}{missing}: loss differs by {loss.item() - expected[0]:+.1e}, gradients by {sorted(errors.values())[len(errors) // 2]:.1e} "
              f"(median), {errors[worst]:.1e} ({worst})", flush=True)


def product_cases(bf16, fp32):
    """Operands of every fused product at the shapes of the trainer. bf16 and fp32 make a tensor of a shape."""
    N, D, V, C = 2**18, 512, 8192, 2**15
    x, hidden, scale = bf16(N, D), bf16(N, 4 * D), fp32(N)
    wide, narrow, head, logits = bf16(4 * D, D), bf16(D, 4 * D), bf16(V, D), bf16(C, V)
    return {
        "add": (hidden, narrow, x), "add_value": (x, bf16(D, D), x), "add_squares": (x, bf16(D, D), x), "relu_squared": (x, wide, None, scale),
        "relu_squared_backward": (x, narrow.T, None, scale, hidden), "add_norm_backward": (hidden, wide.T, x, scale, x),
        "norm_rotary": (x, bf16(2 * D, D), None, None, fp32(N, 128).half()), "softcap_exp": (x[:C], head),
        "scale": (logits, head.T, None, scale[:C]), "accumulate": (logits.T, x[:C].T, fp32(V, D), None, None, fp32(V, D)),
    }


def tiles():
    """Every fused product with each candidate of its tile; those of backends/kernels.py are the best of an H100."""
    import torch

    from backends import kernels

    if not kernels.available(torch.device("cuda"), torch.bfloat16):
        return print("tiles: no fused kernels here")
    cases = product_cases(lambda *shape: torch.rand(*shape, device="cuda").bfloat16(), lambda *shape: torch.rand(*shape, device="cuda"))
    for name, operands in cases.items():
        times, chosen = {}, kernels.TILES[name]
        loads = (4, 12) if any(t is not None for t in operands[2:3] + operands[4:5]) else (4,)  # c and x
        shapes = (128, 256, False), (256, 128, False), (128, 128, True), (192, 128, True)
        for candidate in dict.fromkeys([chosen, *((*shape, *cluster, n) for shape, cluster, n in itertools.product(shapes, ((2, 1), (1, 2)), loads))]):
            kernels.TILES[name] = candidate
            times[candidate] = 1e3 * timed(lambda: kernels.product(name, *operands, softcap=15.0), "cuda")
        kernels.TILES[name] = chosen
        flops = 2 * len(operands[0]) * operands[0].shape[1] * len(operands[1])
        best = min(times, key=times.get)
        print(f"tiles {name:22} {times[chosen]:.3f} ms {flops / times[chosen] / 1e9:.0f} TFLOP/s; best {times[best]:.3f} {best}; worst {max(times.values()):.3f}", flush=True)


def profile(device, tflops):
    """One training step of the trainer by kernel family."""
    import torch

    import train_cuda as trainer
    from backends.cuda import Experiment

    exp = Experiment()
    torch.set_float32_matmul_precision("high")
    model = trainer.build_model(exp.track, exp.platform)
    trunk, optimizer = trainer.compiled(model.trunk), trainer.Optimizer(model)
    step = lambda: trainer.train_step(model, trunk, optimizer, exp.dummy_batch, 0.5)
    t0 = time.perf_counter()
    step()
    print(f"compilation: {time.perf_counter() - t0:.0f} s, {sum(torch._dynamo.utils.counters['graph_break'].values())} graph breaks")
    seconds = timed(step, device, 5)
    tokens = trainer.TOTAL_BATCH_SIZE
    rate, flops = tokens / seconds, model.flops_per_token() * tokens / seconds / 1e12
    print(f"step: {1e3 * seconds:.1f} ms, {rate:,.0f} tokens/s, {flops:.1f} TFLOP/s, {100 * flops / tflops:.0f}% of the measured matrix product")
    kinds = [torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as p:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    totals, kernels = {}, []
    for event in p.key_averages():
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        family = next((name for name, pattern in FAMILIES if re.search(pattern, event.key, re.I)), "other")
        totals[family] = totals.get(family, 0) + spent
        kernels.append((spent, event.count, event.key))
    whole = sum(totals.values())
    for family, spent in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"  {family:10} {spent / 1e3:8.2f} ms  {100 * spent / whole:4.1f}%")
    for spent, count, key in sorted(kernels, reverse=True)[:22]:
        print(f"    {spent / 1e3:7.2f} ms {count:4} x {key[:100]}")
    if device == "cuda":
        print(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def train(budget, trainer, label, seed, platform="bench"):
    """A run through the launcher. Prints its result and when the first step was counted. Returns val_bpb, None without."""
    began = time.time()
    command = [sys.executable, "-m", "launcher.cli", "run", "--platform", platform, "-m", label, "--budget", str(budget), "--seed", str(seed)]
    done = subprocess.run(command + (["--trainer", str(trainer)] if trainer else []), cwd=ROOT, capture_output=True, text=True)
    wanted = ("val_bpb", "training_seconds", "total_seconds", "peak_memory_mb", "tokens_per_second", "mfu_percent", "num_steps", "status", "reason", "marks")
    print(f"train {label}: " + ", ".join(line for line in done.stdout.splitlines() if line.split(":")[0] in wanted))
    run = re.search(r"^run: (\S+)", done.stdout, re.M)
    if run:
        events = [json.loads(line) for line in (Path(os.environ["AUTORESEARCH_HOME"]) / "runs" / run[1] / "events.jsonl").read_text().splitlines()]
        at = {e["event"]: e["at"] for e in events}
        print(f"  {at.get('start', 0):.1f} s from the command to the first counted step, {at.get('result', 0) - at.get('stop', 0):.1f} s of checks and scoring, "
              f"{time.time() - began:.0f} s in all")
    if done.returncode not in (0, 3):
        print(done.stdout[-1500:], done.stderr[-1500:])
    score = re.search(r"^val_bpb: (\S+)", done.stdout, re.M)
    return float(score[1]) if score else None


def compare(budget, seeds, findings):
    """The original's settings and the findings, in turn, for each seed."""
    trainers, wins = {"original": variant(ORIGINAL, "original"), "findings": variant(findings, "findings")}, 0
    for seed in seeds:
        scores = [train(budget, path, f"{name}-{budget:g}s-seed{seed}", seed) for name, path in trainers.items()]
        if None in scores:
            return
        wins += scores[1] < scores[0]
        print(f"compare {budget:g} s, seed {seed}: original {scores[0]:.4f}, findings {scores[1]:.4f}, difference {scores[1] - scores[0]:+.4f}", flush=True)
    print(f"compare {budget:g} s: the findings are better in {wins} of {len(seeds)} seeds")


def kill(gpu):
    """Kill a launcher in the middle of training: how long until nothing of the run is left, on the machine and on the GPU?"""
    import psutil

    from backends.platforms import output_of
    from launcher.child import marked

    runs = Path(os.environ["AUTORESEARCH_HOME"]) / "runs"
    before = set(runs.glob("*"))
    launcher = subprocess.Popen([sys.executable, "-m", "launcher.cli", "run", "--platform", "bench", "-m", "to be killed", "--budget", "300"], cwd=ROOT,
                                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in launcher.stderr:
        if "training on" in line:
            break
    [run] = set(runs.glob("*")) - before
    trainers = marked(run.name)
    used = lambda: output_of("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader").split("\n") if gpu else []
    held = [line for line in used() if line]
    launcher.kill()  # this process alone: the trainer must notice by itself
    launcher.wait()
    began = time.monotonic()
    _, left = psutil.wait_procs(trainers, timeout=60)
    print(f"kill: {len(trainers)} processes before, {len(left)} left after {time.monotonic() - began:.1f} s; "
          f"on the GPU before: {held or 'nothing'}, after: {[line for line in used() if line] or 'nothing'}")


def variant(settings, label):
    """A copy of the trainer with constants replaced: {"MATRIX_LR": "0.05"}."""
    text = (ROOT / "train_cuda.py").read_text()
    for name, value in settings.items():
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.M)
        assert count == 1, f"the trainer has no constant {name}"
    path = Path(os.environ["AUTORESEARCH_HOME"]) / "variants" / label / "train_cuda.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="ceilings,attention,fused,profile,train")
    parser.add_argument("--budget", type=float, nargs="*", default=[60, 300])
    parser.add_argument("--seed", type=int, nargs="*", default=[1])
    parser.add_argument("--set", nargs="*", default=[], help="NAME=VALUE constants of the trainer for the train part")
    parser.add_argument("--label", default="reference")
    options = parser.parse_args()

    import torch

    gpu = torch.cuda.is_available()
    device, start = ("cuda", REFERENCE) if gpu else ("cpu", TOY)
    write_config(gpu, start)
    os.environ["AUTORESEARCH_PLATFORM"] = "bench"
    import prepare

    prepared = prepare.prepare(prepare.load_track("local"))
    name = torch.cuda.get_device_name() if gpu else "cpu"
    print(f"device: {name}, torch {torch.__version__}; corpus: {prepared.num_train_rows * prepared.seq_len / 1e6:.0f}M tokens")
    parts = options.parts.split(",")
    tflops = ceilings(device) if {"ceilings", "profile"} & set(parts) else 0
    if "attention" in parts:
        attention(device, start, prepared.seq_len)
    if "fused" in parts:
        fused(device)
    if "tiles" in parts:
        tiles()
    if "profile" in parts:
        profile(device, tflops)
        if gpu:
            torch.cuda.empty_cache()
    if "train" in parts:
        settings = dict(item.split("=", 1) for item in options.set)
        for budget in options.budget:
            for seed in options.seed:
                train(budget, variant(settings, options.label) if settings else None, f"{options.label}-{budget:g}s-seed{seed}", seed)
    for budget in options.budget:
        if "compare" in parts:
            compare(budget, options.seed, FINDINGS if gpu else TOY_FINDINGS)
        if "mlx" in parts:
            train(budget, None, f"mlx-{budget:g}s", options.seed[0], "bench-mlx")
    if "kill" in parts:
        kill(gpu)


if __name__ == "__main__":
    main()
