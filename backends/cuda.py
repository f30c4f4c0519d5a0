"""Experiment on PyTorch: an NVIDIA GPU, or the CPU where the platform's device is one."""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from backends import checks, experiment
from backends.platforms import Platform, current_platform, facts_for

# What the trainer imports from here.
__all__ = ["Experiment", "Platform", "compute_dtype", "current_platform"]

SCORE_CHUNK = 2**25  # logits normalised at a time: 128 MiB in float32


class Experiment(experiment.Experiment):
    """See backends.experiment. `torch_device` is where tensors go."""

    def _open_device(self) -> None:
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
        torch.manual_seed(self.seed)

    def _seed_changed(self) -> bool:
        return torch.initial_seed() != self.seed or (self._on_gpu and torch.cuda.initial_seed() != self.seed)

    @property
    def _on_gpu(self) -> bool:
        return self.torch_device.type == "cuda"

    def _to_device(self, rows: np.ndarray) -> torch.Tensor:
        """Return the rows on the device, int64 [B, T + 1]. The copy runs in a stream of its own."""
        tokens = torch.from_numpy(rows)
        if self._on_gpu:
            with torch.cuda.stream(self._copies):
                tokens = tokens.pin_memory().to(self.torch_device, non_blocking=True)
        return tokens

    def _arrived(self, copy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._on_gpu:
            torch.cuda.current_stream().wait_stream(self._copies)
            copy.record_stream(torch.cuda.current_stream())
        return copy[:, :-1].contiguous(), copy[:, 1:].contiguous()

    def _read_later(self, loss: torch.Tensor) -> Callable[[], float]:
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

    @torch.no_grad()
    def _nats(self, model: nn.Module, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(np.ascontiguousarray(x)).to(self.torch_device)
        targets = torch.from_numpy(np.ascontiguousarray(y)).to(self.torch_device)
        logits = model(tokens)
        self._refuse(checks.proper(logits.shape, targets.shape, self.track.vocab_size))
        chunk = max(1, SCORE_CHUNK // self.track.vocab_size)
        pairs = zip(logits.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
        nats = [F.cross_entropy(part.float(), target, reduction="none") for part, target in pairs]
        return torch.cat(nats).view(targets.shape).cpu().numpy()

    def _num_params(self, model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    def _save(self, model: nn.Module, path: Path) -> None:
        from safetensors.torch import save_model

        save_model(getattr(model, "_orig_mod", model), str(path))

    def _load(self, model: nn.Module, path: Path) -> None:
        from safetensors.torch import load_model

        load_model(model, str(path), device=str(self.torch_device))

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _peak_memory_mb(self) -> float:
        if self._on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def _measured_tflops(self) -> float:
        return matmul_tflops(self.torch_device, torch.bfloat16 if self.bf16 else torch.float32)

    def _out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(
            error
        )


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
