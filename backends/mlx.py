"""MLX: the GPU of a Mac; on Linux the CPU, or an NVIDIA GPU with MLX's CUDA build."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from backends import experiment
from backends.device import SCORE_CHUNK, Device, check_logits, drawn_step
from backends.platforms import Platform, current_platform

# What the trainer imports from here.
__all__ = ["Experiment", "Platform", "compute_dtype", "current_platform"]

MEMORY_SHARE = 0.9  # of the device's recommended working set that a run may use: the rest is the desktop's
CACHE_SHARE = 0.25  # of it that MLX may keep for reuse


class MlxDevice(Device):
    """See backends.device."""

    def open(self) -> None:
        on_cpu = self.platform.device_kind == "cpu"
        if not on_cpu and not mx.is_available(mx.gpu):
            raise SystemExit(
                f"platform {self.platform.name} needs a GPU and MLX {mx.__version__} sees none: "
                "use --platform mlx-cpu (slow) or, on Linux, --platform cpu"
            )
        mx.set_default_device(mx.cpu if on_cpu else mx.gpu)
        self.bf16 = compute_dtype(self.platform) == mx.bfloat16
        # 0 where MLX names none (the CPU): then nothing is limited.
        self._memory_limit = int(MEMORY_SHARE * mx.device_info().get("max_recommended_working_set_size", 0))
        if self._memory_limit:
            mx.set_memory_limit(self._memory_limit)
            mx.set_cache_limit(int(CACHE_SHARE * self._memory_limit))
        mx.reset_peak_memory()
        mx.random.seed(self.seed)
        self._watch_seed()

    def _watch_seed(self) -> None:
        """Notice a trainer that seeds MLX's generator: unlike PyTorch, MLX does not tell its seed."""
        self._reseeded = False
        seed = mx.random.seed

        def watched(value: int) -> None:
            self._reseeded = True
            seed(value)

        mx.random.seed = watched

    def seed_changed(self) -> bool:
        return self._reseeded

    def copy(self, rows: np.ndarray) -> tuple[mx.array, mx.array]:
        """Return (x, y), int32 [B, T] each. MLX copies when they are first used."""
        tokens = mx.array(rows.astype(np.int32))
        return tokens[:, :-1], tokens[:, 1:]

    def arrived(self, copy: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
        return copy

    def read_later(self, loss: mx.array) -> Callable[[], float]:
        return loss.item

    def synchronize(self) -> None:
        mx.synchronize()

    def shapes(self, model: nn.Module) -> dict[str, list[int]]:
        return {name: list(array.shape) for name, array in tree_flatten(model.parameters())}

    def drawn(self, model: nn.Module) -> str:
        digest = hashlib.sha256()
        constant = True
        for _, array in tree_flatten(model.parameters()):
            flat = np.array(array.flatten()[:: drawn_step(array.shape)].astype(mx.float32))
            if len(flat) and (flat != flat[0]).any():
                constant = False
                digest.update(flat.tobytes())
        return "" if constant else digest.hexdigest()

    def num_params(self, model: nn.Module) -> int:
        return sum(p.size for _, p in tree_flatten(model.parameters()))

    def save(self, model: nn.Module, path: Path) -> None:
        mx.save_safetensors(str(path), dict(tree_flatten(model.parameters())))

    def load(self, model: nn.Module, path: Path) -> None:
        model.load_weights(str(path))

    def ready_to_score(self, model: nn.Module) -> None:
        model.eval()

    def nats(self, model: nn.Module, rows: np.ndarray) -> np.ndarray:
        tokens = mx.array(rows.astype(np.int32))
        logits = self._logits(model, tokens[:, :-1])
        shape = logits.shape[:2]
        logits = logits.flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        chunk = max(1, SCORE_CHUNK // logits.shape[1])
        parts = []
        for i in range(0, len(targets), chunk):
            part = logits[i : i + chunk].astype(mx.float32)
            target = targets[i : i + chunk, None]
            nats = mx.logsumexp(part, axis=1) - mx.take_along_axis(part, target, axis=1)[:, 0]
            mx.eval(nats)  # one chunk in memory at a time
            parts.append(nats)
        return np.array(mx.concatenate(parts)).reshape(shape)

    def logits(self, model: nn.Module, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        logits = self._logits(model, mx.array(x.astype(np.int32)))
        index = mx.array(positions.astype(np.int32))[:, :, None]
        return np.array(mx.take_along_axis(logits, index, axis=1).astype(mx.float32))

    def _logits(self, model: nn.Module, x: mx.array) -> mx.array:
        logits = model(x)
        check_logits(logits.shape, x.shape, self.vocab_size)
        return logits

    def free_memory(self) -> None:
        mx.clear_cache()

    def peak_memory_mb(self) -> float:
        return mx.get_peak_memory() / 2**20

    def measured_tflops(self) -> float:
        return matmul_tflops(mx.bfloat16 if self.bf16 else mx.float32)

    def out_of_memory(self, error: BaseException) -> bool:
        text = str(error)
        if isinstance(error, MemoryError) or "Insufficient Memory" in text or "[malloc" in text:
            return True
        return "out of memory" in text.lower()

    def too_large(self, rows: int) -> str:
        held = mx.get_active_memory()
        a_row = max(mx.get_peak_memory() - held, 1)
        expected = held + rows * a_row
        if not self._memory_limit or expected <= self._memory_limit:
            return ""
        fit = int((self._memory_limit - held) // a_row)
        advice = f"lower DEVICE_BATCH_SIZE to {fit} or less" if fit > 0 else "lower N_LAYER or N_EMBD"
        return (
            f"out of memory: {rows} rows need about {expected / 2**30:.1f} GiB, "
            f"this machine gives {self._memory_limit / 2**30:.1f} GiB "
            f"({100 * MEMORY_SHARE:.0f}% of its recommended working set): {advice}"
        )


class Experiment(experiment.Experiment):
    """See backends.experiment."""

    device_class = MlxDevice


def matmul_tflops(dtype: mx.Dtype, n: int = 0, seconds: float = 0.5) -> float:
    """Return the best TFLOP/s of n x n matrix products on random data, repeated for `seconds`."""
    n = n or (4096 if mx.default_device() == mx.gpu else 512)
    a = mx.random.normal((n, n), key=mx.random.key(0)).astype(dtype)
    b = mx.random.normal((n, n), key=mx.random.key(1)).astype(dtype)
    mx.eval(a, b)
    best = 0.0
    began = time.monotonic()
    while time.monotonic() - began < seconds or best == 0.0:
        t0 = time.perf_counter()
        mx.eval(a @ b)
        best = max(best, 2 * n**3 / (time.perf_counter() - t0) / 1e12)
    return best


def compute_dtype(platform: Platform) -> mx.Dtype:
    """Return the dtype of activations and embeddings: bfloat16 unless the platform says otherwise."""
    return mx.float32 if platform.bf16 is False else mx.bfloat16
