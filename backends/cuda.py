"""PyTorch: an NVIDIA GPU, or the CPU where the platform's device is one."""

import hashlib
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from backends import experiment
from backends.device import SCORE_CHUNK, Device, check_logits, drawn_step
from backends.dtype import BFLOAT16, LAYER_ROWS, MEASURE_SECONDS, LayerTimes, choose_dtype
from backends.platforms import Platform, current_platform, facts_for

# What the trainer imports from here.
__all__ = ["Experiment", "Platform", "compute_dtype", "current_platform"]


# The first kind counts of which a part is found in an operation's name.
KINDS_OF_WORK = {
    "attention": ("flash", "fmha", "attention", "softmax"),
    "matrix products": ("gemm", "nvjet", "addmm", "::mm", "bmm", "matmul", "cutlass", "mkldnn_linear"),
    "copies": ("memcpy", "memset", "copy_", "::cat"),
    "element-wise": ("triton", "fused", "elementwise", "reduce", "aten::"),
}


class TorchDevice(Device):
    """See backends.device. `torch_device` is where tensors go."""

    def open(self) -> None:
        wants_gpu = self.platform.device_kind == "gpu"
        if wants_gpu and not torch.cuda.is_available():
            raise SystemExit(
                f"platform {self.platform.name} needs a GPU and PyTorch {torch.__version__} sees none: "
                f"check {'rocm-smi' if torch.version.hip else 'nvidia-smi'} and the driver, "
                "or use --platform cpu"
            )
        self.torch_device = torch.device("cuda" if wants_gpu else "cpu")
        if wants_gpu:
            self._copies = torch.cuda.Stream()
            torch.cuda.reset_peak_memory_stats()
        else:
            keep_freed_memory()
        self.bf16 = compute_dtype(self.platform) == torch.bfloat16
        torch.manual_seed(self.seed)

    def seed_changed(self) -> bool:
        return torch.initial_seed() != self.seed or (self._on_gpu and torch.cuda.initial_seed() != self.seed)

    @property
    def _on_gpu(self) -> bool:
        return self.torch_device.type == "cuda"

    def copy(self, rows: np.ndarray) -> torch.Tensor:
        """Return the rows on the device, int64 [B, T + 1]. The copy runs in a stream of its own."""
        tokens = torch.from_numpy(rows)
        if self._on_gpu:
            with torch.cuda.stream(self._copies):
                tokens = tokens.pin_memory().to(self.torch_device, non_blocking=True)
        return tokens

    def arrived(self, copy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._on_gpu:
            torch.cuda.current_stream().wait_stream(self._copies)
            copy.record_stream(torch.cuda.current_stream())
        return copy[:, :-1].contiguous(), copy[:, 1:].contiguous()

    def read_later(self, loss: torch.Tensor) -> Callable[[], float]:
        loss = loss.detach()
        if not self._on_gpu:
            return loss.item
        value = torch.empty((), dtype=loss.dtype, pin_memory=True)
        value.copy_(loss, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> float:
            copied.synchronize()
            return value.item()

        return read

    def synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def shapes(self, model: nn.Module) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in plain(model).state_dict().items()}

    def drawn(self, model: nn.Module) -> str:
        digest = hashlib.sha256()
        constant = True
        for tensor in plain(model).state_dict().values():
            flat = tensor.detach().flatten()[:: drawn_step(tensor.shape)]
            if len(flat) and bool((flat != flat[0]).any()):
                constant = False
                digest.update(flat.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return "" if constant else digest.hexdigest()

    def num_params(self, model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    def save(self, model: nn.Module, path: Path) -> None:
        from safetensors.torch import save_model

        save_model(plain(model), str(path))

    def load(self, model: nn.Module, path: Path) -> None:
        from safetensors.torch import load_model

        load_model(plain(model), str(path), device=str(self.torch_device))

    def ready_to_score(self, model: nn.Module) -> None:
        model.eval()

    @torch.no_grad()
    def nats(self, model: nn.Module, rows: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(rows).to(self.torch_device)
        logits = self._logits(model, tokens[:, :-1].contiguous())
        targets = tokens[:, 1:].flatten()
        chunk = max(1, SCORE_CHUNK // logits.shape[2])
        pairs = zip(logits.flatten(0, 1).split(chunk), targets.split(chunk), strict=True)
        nats = [F.cross_entropy(part.float(), target, reduction="none") for part, target in pairs]
        return torch.cat(nats).view(logits.shape[:2]).cpu().numpy()

    @torch.no_grad()
    def logits(self, model: nn.Module, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        logits = self._logits(model, torch.from_numpy(x).to(self.torch_device))
        index = torch.from_numpy(positions).to(self.torch_device)
        return logits[torch.arange(len(x))[:, None], index].float().cpu().numpy()

    def _logits(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        logits = model(x)
        check_logits(logits.shape, x.shape, self.vocab_size)
        return logits

    def free_memory(self) -> None:
        if self._on_gpu:
            torch.cuda.empty_cache()

    def peak_memory_mb(self) -> float:
        if self._on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def measured_tflops(self) -> float:
        return matmul_tflops(self.torch_device, torch.bfloat16 if self.bf16 else torch.float32)

    def begin_profile(self) -> bool:
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU])
        self._profile.start()
        return True

    def end_profile(self) -> dict[str, float]:
        self.synchronize()
        self._profile.stop()
        seconds: Counter[str] = Counter()
        for event in self._profile.key_averages():
            spent = event.self_device_time_total if self._on_gpu else event.self_cpu_time_total
            seconds[kind_of_work(event.key)] += spent
        total = sum(seconds.values())
        return {kind: round(spent / total, 3) for kind, spent in seconds.most_common() if spent > 0}

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(
            error
        )


class Experiment(experiment.Experiment):
    """See backends.experiment."""

    device_class = TorchDevice


def plain(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)


def kind_of_work(operation: str) -> str:
    """Return the kind of work of an operation or kernel, by its name."""
    name = operation.lower()
    for kind, parts in KINDS_OF_WORK.items():
        if any(part in name for part in parts):
            return kind
    return "other"


def matmul_tflops(device: torch.device, dtype: torch.dtype, n: int = 0, seconds: float = 0.5) -> float:
    """Return the best TFLOP/s of n x n matrix products on random data, repeated for `seconds`."""
    n = n or (8192 if device.type == "cuda" else 2048)

    def random_matrix(seed: int) -> Any:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(n, n, device=device, generator=generator).to(dtype)

    a = random_matrix(0)
    b = random_matrix(1)
    out = torch.empty_like(a)
    best = 0.0
    began = time.monotonic()
    while time.monotonic() - began < seconds or best == 0.0:
        t0 = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - t0) / 1e12)
    return best


def compute_dtype(platform: Platform) -> torch.dtype:
    """Return the dtype of activations and embeddings.

    The launcher hands it over with the platform. A trainer that runs alone chooses as the launcher would.
    """
    if platform.bf16 is None:
        bf16 = choose_dtype(platform, facts_for(platform)).dtype == BFLOAT16
    else:
        bf16 = platform.bf16
    return torch.bfloat16 if bf16 else torch.float32


def layer_times(device_kind: str, width: int, dtypes: Sequence[str]) -> LayerTimes:
    """Return how long a layer's work takes in each dtype, in turn, at best, each of its parts for itself.

    On a CPU that is the time that the process computed, by its threads: what else the machine does costs the
    measurement time, and changes little. Two threads that wait for each other beside another load took a
    hundred times as long by the clock (docs/benchmarks.md).
    """
    torch.set_float32_matmul_precision("high")  # as in the trainer
    device = torch.device("cuda" if device_kind == "gpu" else "cpu")
    rows = LAYER_ROWS[device_kind]
    works = {
        (dtype, kind, i): work
        for dtype in dtypes
        for kind, parts in layer_work(device, getattr(torch, dtype), rows, width).items()
        for i, work in enumerate(parts)
    }
    best = dict.fromkeys(works, float("inf"))
    for work in works.values():
        work()  # the first call chooses kernels
    on_cpu = device.type == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    clock = time.process_time if on_cpu else time.perf_counter
    began = clock()
    while clock() - began < MEASURE_SECONDS * threads or float("inf") in best.values():
        for key, work in works.items():
            t0 = clock()
            work()
            if not on_cpu:
                torch.cuda.synchronize()
            best[key] = min(best[key], 1e3 * (clock() - t0) / threads)
    sums: dict[str, float] = defaultdict(float)
    for (dtype, kind, _), milliseconds in best.items():
        sums[f"{dtype}_{kind}"] += milliseconds
    return LayerTimes(**sums)


Work = Callable[[], None]


def layer_work(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> dict[str, list[Work]]:
    """Return the work of a transformer layer but for attention, forward and backward, in parts of two kinds.

    rows: tokens. width: of the hidden states.
    """

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def product(into: int, out: int) -> Work:
        inputs = random(rows, into)
        weight = random(into, out)
        gradient = random(rows, out)

        def multiply() -> None:
            inputs @ weight
            gradient @ weight.T
            inputs.T @ gradient

        return multiply

    x = random(rows, width).requires_grad_()
    hidden = random(rows, 4 * width).requires_grad_()
    gradients = random(rows, width), random(rows, 4 * width)

    def elementwise() -> None:
        residual = 0.9 * x + F.rms_norm(x, (width,))
        torch.autograd.backward([residual, F.relu(hidden).square()], list(gradients))
        x.grad = hidden.grad = None

    shapes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    return {"products": [product(*shape) for shape in shapes], "elementwise": [elementwise]}


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks.

    Returning them to the kernel costs a page fault for every 4 KiB of every activation.
    """
    import ctypes

    M_TRIM_THRESHOLD = -1  # malloc.h
    M_MMAP_MAX = -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
