"""Experiment on PyTorch: an NVIDIA GPU, or the CPU where the platform's backend is torch-cpu."""

import time

import numpy as np
import torch
import torch.nn.functional as F

from backends import checks, experiment
from backends.platforms import current_platform, machine_facts  # noqa: F401  the trainer asks for its platform here

SCORE_CHUNK = 2**25  # logits normalised at a time: 128 MiB in float32


class Experiment(experiment.Experiment):
    """See backends.experiment. `torch_device` is where tensors go."""

    def _open_device(self):
        wants_gpu = self.platform.backend == "cuda"
        if wants_gpu and not torch.cuda.is_available():
            raise SystemExit(f"platform {self.platform.name} needs a CUDA device and PyTorch {torch.__version__} sees none: "
                             "check nvidia-smi and the driver, or use --platform cpu")
        self.torch_device = torch.device("cuda" if wants_gpu else "cpu")
        if wants_gpu:
            self._copies = torch.cuda.Stream()
            torch.cuda.reset_peak_memory_stats()
            self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            keep_freed_memory()
        torch.manual_seed(self.seed)

    def _seed_changed(self):
        return torch.initial_seed() != self.seed or (self._on_gpu and torch.cuda.initial_seed() != self.seed)

    @property
    def _on_gpu(self):
        return self.torch_device.type == "cuda"

    def _to_device(self, rows):
        rows = torch.from_numpy(rows)
        if self._on_gpu:
            with torch.cuda.stream(self._copies):
                rows = rows.pin_memory().to(self.torch_device, non_blocking=True)
        return rows

    def _arrived(self, rows):
        if self._on_gpu:
            torch.cuda.current_stream().wait_stream(self._copies)
            rows.record_stream(torch.cuda.current_stream())
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _read_later(self, loss):
        loss = loss.detach()
        if not self._on_gpu:
            return loss.item
        value = torch.empty((), dtype=loss.dtype, pin_memory=True)
        value.copy_(loss, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return lambda: (copied.synchronize(), value.item())[1]

    @torch.no_grad()
    def _nats(self, model, x, y):
        x, y = (torch.from_numpy(np.ascontiguousarray(t)).to(self.torch_device) for t in (x, y))
        logits = model(x)
        self._refuse(checks.proper(logits.shape, y.shape, self.track.vocab_size))
        rows = max(1, SCORE_CHUNK // self.track.vocab_size)
        pairs = zip(logits.flatten(0, 1).split(rows), y.flatten().split(rows))
        nats = torch.cat([F.cross_entropy(part.float(), target, reduction="none") for part, target in pairs])
        return nats.view(y.shape).cpu().numpy()

    def _num_params(self, model):
        return sum(p.numel() for p in model.parameters())

    def _save(self, model, path):
        from safetensors.torch import save_model

        save_model(getattr(model, "_orig_mod", model), str(path))

    def _load(self, model, path):
        from safetensors.torch import load_model

        load_model(model, str(path), device=str(self.torch_device))

    def _synchronize(self):
        if self._on_gpu:
            torch.cuda.synchronize()

    def _peak_memory_mb(self):
        if self._on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def _measured_tflops(self):
        return matmul_tflops(self.torch_device, torch.bfloat16 if self.bf16 else torch.float32)

    def _out_of_memory(self, error):
        return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def matmul_tflops(device, dtype, n=None, seconds=0.5):
    """TFLOP/s of an n x n matrix product on random data: the best of the repeats that fit `seconds`."""
    n = n or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, generator=torch.Generator(device).manual_seed(i)).to(dtype) for i in (0, 1))
    out, best, began = torch.empty_like(a), 0.0, time.monotonic()
    while time.monotonic() - began < seconds or best == 0.0:
        t0 = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - t0) / 1e12)
    return best


def compute_dtype(platform):
    """What activations and embeddings are held in: bfloat16 where the device computes in it, else float32."""
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if platform.backend == "cuda" else machine_facts().bf16
    return torch.bfloat16 if bf16 else torch.float32


def keep_freed_memory():
    """Have glibc keep large freed blocks: returning them to the kernel costs a page fault for every 4 KiB of every activation."""
    import ctypes

    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
