"""PyTorch: an NVIDIA GPU, or the CPU where the platform's device is one."""

import hashlib
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from backends import experiment
from backends.device import SCORE_CHUNK, Device, check_logits
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
                "check nvidia-smi and the driver, or use --platform cpu"
            )
        self.torch_device = torch.device("cuda" if wants_gpu else "cpu")
        if wants_gpu:
            self._copies = torch.cuda.Stream()
            torch.cuda.reset_peak_memory_stats()
            self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            keep_freed_memory()
            self.bf16 = facts_for(self.platform).bf16
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
            flat = tensor.detach().flatten()
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
    """Return the dtype of activations and embeddings: bfloat16 where the device has it, else float32."""
    if platform.device_kind == "gpu":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = facts_for(platform).bf16
    return torch.bfloat16 if bf16 else torch.float32


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
