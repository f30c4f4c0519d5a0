"""Experiment on MLX: the GPU of a Mac; on Linux the CPU, or an NVIDIA GPU with MLX's CUDA build."""

import time

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from backends import checks, experiment
from backends.platforms import current_platform  # noqa: F401  the trainer asks for its platform here

MEMORY_SHARE = 0.9      # of the device's recommended working set that a run may use: the rest is the desktop's
CACHE_SHARE = 0.25      # of it that MLX may keep for reuse
SCORE_CHUNK = 2**25     # logits normalised at a time: 128 MiB in float32


class Experiment(experiment.Experiment):
    """See backends.experiment."""

    def _open_device(self):
        on_cpu = self.platform.backend == "mlx-cpu"
        if not on_cpu and not mx.is_available(mx.gpu):
            raise SystemExit(f"platform {self.platform.name} needs a GPU and MLX {mx.__version__} sees none: "
                             "use --platform mlx-cpu (slow) or, on Linux, --platform cpu")
        mx.set_default_device(mx.cpu if on_cpu else mx.gpu)
        self.bf16 = self.platform.bf16
        # 0 where MLX names none (the CPU): then nothing is limited.
        self._memory_limit = int(MEMORY_SHARE * mx.device_info().get("max_recommended_working_set_size", 0))
        if self._memory_limit:
            mx.set_memory_limit(self._memory_limit)
            mx.set_cache_limit(int(CACHE_SHARE * self._memory_limit))
        mx.reset_peak_memory()
        mx.random.seed(self.seed)
        self._reseeded = False
        seed = mx.random.seed

        def watched(value):
            self._reseeded = True
            seed(value)

        mx.random.seed = watched

    def _seed_changed(self):
        return self._reseeded

    def check_memory(self, rows):
        """After a pass over one row: will `rows` of them fit? Ends the run, before the desktop freezes, when not."""
        held, peak = mx.get_active_memory(), mx.get_peak_memory()
        expected = held + rows * (peak - held)
        if self._memory_limit and expected > self._memory_limit:
            fit = int((self._memory_limit - held) // max(peak - held, 1))
            advice = f"lower DEVICE_BATCH_SIZE to {fit} or less" if fit > 0 else "lower N_LAYER or N_EMBD"
            message = (f"out of memory: {rows} rows need about {expected / 2**30:.1f} GiB, this machine gives {self._memory_limit / 2**30:.1f} GiB "
                       f"({100 * MEMORY_SHARE:.0f}% of its recommended working set): {advice}")
            self._emit("error", kind="oom", message=message)
            raise SystemExit(message)

    def _to_device(self, rows):
        rows = mx.array(rows.astype(np.int32))
        return rows[:, :-1], rows[:, 1:]

    def _arrived(self, batch):
        return batch

    def _read_later(self, loss):
        return loss.item

    def _nats(self, model, x, y):
        x, y = mx.array(x.astype(np.int32)), mx.array(y.astype(np.int32))
        logits = model(x)
        self._refuse(checks.proper(logits.shape, y.shape, self.track.vocab_size))
        logits, targets = logits.flatten(0, 1), y.flatten()
        rows, parts = max(1, SCORE_CHUNK // self.track.vocab_size), []
        for i in range(0, len(targets), rows):
            part, target = logits[i : i + rows].astype(mx.float32), targets[i : i + rows, None]
            nats = mx.logsumexp(part, axis=1) - mx.take_along_axis(part, target, axis=1)[:, 0]
            mx.eval(nats)  # one chunk in memory at a time
            parts.append(nats)
        return np.array(mx.concatenate(parts)).reshape(y.shape)

    def _num_params(self, model):
        return sum(p.size for _, p in tree_flatten(model.parameters()))

    def _save(self, model, path):
        mx.save_safetensors(str(path), dict(tree_flatten(model.parameters())))

    def _load(self, model, path):
        model.load_weights(str(path))

    def _synchronize(self):
        mx.synchronize()

    def _peak_memory_mb(self):
        return mx.get_peak_memory() / 2**20

    def _measured_tflops(self):
        return matmul_tflops(mx.bfloat16 if self.bf16 else mx.float32)

    def _out_of_memory(self, error):
        text = str(error)
        return isinstance(error, MemoryError) or "Insufficient Memory" in text or "[malloc" in text or "out of memory" in text.lower()


def matmul_tflops(dtype, n=None, seconds=0.5):
    """TFLOP/s of an n x n matrix product on random data: the best of the repeats that fit `seconds`."""
    n = n or (4096 if mx.default_device() == mx.gpu else 512)
    a, b = (mx.random.normal((n, n), key=mx.random.key(i)).astype(dtype) for i in (0, 1))
    mx.eval(a, b)
    best, began = 0.0, time.monotonic()
    while time.monotonic() - began < seconds or best == 0.0:
        t0 = time.perf_counter()
        mx.eval(a @ b)
        best = max(best, 2 * n**3 / (time.perf_counter() - t0) / 1e12)
    return best


def compute_dtype(platform):
    """What activations and embeddings are held in: bfloat16 unless the platform says that it has none."""
    return mx.bfloat16 if platform.bf16 else mx.float32
