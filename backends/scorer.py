"""
Score weights in a process that never trained: python -m backends.scorer TRAINER FOLDER CHANNEL [--compile]

The trainer's file is loaded for its build_model and EVAL_BATCH_SIZE; its main() does not run. The launcher
holds the rows. It asks through CHANNEL, the file descriptor of a socket, a message of JSON at a time:

    {"do": "load"}                                     reads FOLDER/model.safetensors
    {"do": "nats", "shape": [B, T + 1]}                tokens follow: uint16. Answered by float32 [B, T]
    {"do": "logits", "shape": [B, T], "positions": K}  tokens follow, then int64 [B, K]. float32 [B, K, vocab]

Each answer is {"ok": ...}, then the numbers, or {"broken": what is wrong with the model}. The first answer
comes by itself, when the model is built and compiled: the shape of each of its tensors, a hash of what was
drawn at random for them, and EVAL_BATCH_SIZE.
"""

import importlib
import importlib.util
import json
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from backends.device import BrokenRule, Device
from backends.platforms import current_entries
from backends.protocol import RunDir, RunSettings
from prepare import Prepared


def load_trainer(path: Path) -> ModuleType:
    """Return a trainer's file as a module. Its main() does not run."""
    spec = importlib.util.spec_from_file_location("trainer_to_score", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Scorer:
    """The model of a trainer, and what the launcher may ask of it."""

    def __init__(self, trainer: Path, folder: Path, compile_it: bool) -> None:
        settings = RunSettings.from_env()
        platform, track = current_entries()
        data = Prepared(track, Path(settings.data_dir))
        backend = importlib.import_module(f"backends.{'mlx' if platform.framework == 'mlx' else 'cuda'}")
        self.device: Device = backend.Experiment.device_class(platform, data.vocab_size, settings.seed)
        module = load_trainer(trainer)
        self.weights = RunDir(folder).weights
        self.model = module.build_model(data, platform)
        self.batch = int(getattr(module, "EVAL_BATCH_SIZE", platform.start.eval_batch_size))
        self.shapes = self.device.shapes(self.model)
        self.drawn = self.device.drawn(self.model)
        self.device.ready_to_score(self.model)
        if compile_it:
            self._compile(module)
            self.device.nats(self.model, np.zeros((self.batch, data.seq_len + 1), np.int64))
            self.device.free_memory()

    def _compile(self, module: ModuleType) -> None:
        """Compile the model's forward pass, where the trainer says how."""
        compiled = getattr(module, "compiled", None)
        if compiled is not None:
            self.model.forward = compiled(self.model.forward)

    def answer(self, request: dict[str, Any], channel: Connection) -> tuple[Any, np.ndarray | None]:
        """Return what to say, and the numbers that follow it."""
        if request["do"] == "load":
            self.device.load(self.model, self.weights)
            return True, None
        rows = np.frombuffer(channel.recv_bytes(), np.uint16).reshape(request["shape"]).astype(np.int64)
        if request["do"] == "nats":
            return True, self.device.nats(self.model, rows)
        positions = np.frombuffer(channel.recv_bytes(), np.int64).reshape(len(rows), request["positions"])
        return True, self.device.logits(self.model, rows, positions)


def main(trainer: Path, folder: Path, descriptor: int, compile_it: bool) -> None:
    """Answer the launcher until it closes the channel."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    channel = Connection(descriptor)

    def say(message: dict[str, Any]) -> None:
        channel.send_bytes(json.dumps(message).encode())

    try:
        scorer = Scorer(trainer, folder, compile_it)
        say({"ok": {"weights": scorer.shapes, "drawn": scorer.drawn, "batch": scorer.batch}})
        while True:
            said, numbers = scorer.answer(json.loads(channel.recv_bytes()), channel)
            say({"ok": said})
            if numbers is not None:
                channel.send_bytes(np.ascontiguousarray(numbers, np.float32).tobytes())
    except BrokenRule as error:
        say({"broken": str(error)})
    except EOFError:
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["--compile"])
