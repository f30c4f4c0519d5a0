"""What a framework does for an experiment and for its scoring. backends.cuda and backends.mlx define it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backends.platforms import Platform

DRAWN_SAMPLE = 2**16  # elements of a tensor that tell whether it was drawn with another seed
SCORE_CHUNK = 2**25  # logits normalised at a time: 128 MiB in float32


class BrokenRule(Exception):
    """The model breaks a rule. The message says which."""


def drawn_step(shape: Sequence[int]) -> int:
    """Return the step between the elements of a tensor that Device.drawn looks at.

    It has no factor in common with the number of columns. So no column is left out, where a tensor has fewer
    than DRAWN_SAMPLE of them.
    """
    columns = shape[-1] if shape else 1
    step = max(1, math.prod(shape) // DRAWN_SAMPLE)
    while math.gcd(step, columns) > 1:
        step += 1
    return step


class Device(ABC):
    """One device, opened: its memory is limited and its generator seeded.

    Attributes:
        platform: the entry of platforms.yaml.
        vocab_size: tokens that a model predicts.
        seed: of the framework's random numbers.
        bf16: it computes in bfloat16.
    """

    bf16: bool

    def __init__(self, platform: Platform, vocab_size: int, seed: int) -> None:
        self.platform = platform
        self.vocab_size = vocab_size
        self.seed = seed
        self.open()

    @abstractmethod
    def open(self) -> None:
        """Find the device, limit its memory, seed the framework. Raises SystemExit when there is none."""

    @abstractmethod
    def seed_changed(self) -> bool:
        """Return whether the trainer seeded the framework's generator itself."""

    # --- Batches and losses ---------------------------------------------------------------------------------

    @abstractmethod
    def copy(self, rows: np.ndarray) -> Any:
        """Start the copy of rows, int64 [B, T + 1], to the device. Returns what arrived() takes."""

    @abstractmethod
    def arrived(self, copy: Any) -> tuple[Any, Any]:
        """Return (x, y), each [B, T] on the device, when the copy is usable by the next operation."""

    @abstractmethod
    def read_later(self, loss: Any) -> Callable[[], float]:
        """Start the copy of a scalar to the host. Returns a function that waits for it and gives it."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""

    # --- Models ---------------------------------------------------------------------------------------------

    @abstractmethod
    def shapes(self, model: Any) -> dict[str, list[int]]:
        """Return the shape of each tensor that save() writes of a model, by its name."""

    @abstractmethod
    def drawn(self, model: Any) -> str:
        """Return a hash of the tensors of a new model that are not constant, "" when all are.

        Of a large tensor about DRAWN_SAMPLE elements are hashed: hashing a GB takes seconds.
        """

    @abstractmethod
    def num_params(self, model: Any) -> int:
        """Return the number of a model's parameters."""

    @abstractmethod
    def save(self, model: Any, path: Path) -> None:
        """Write a model's weights as safetensors."""

    @abstractmethod
    def load(self, model: Any, path: Path) -> None:
        """Read weights that save() wrote into a model."""

    @abstractmethod
    def ready_to_score(self, model: Any) -> None:
        """Put a model into the mode in which it predicts: no dropout."""

    @abstractmethod
    def nats(self, model: Any, rows: np.ndarray) -> np.ndarray:
        """Return the model's losses in nats, float32 [B, T]. rows: int64 [B, T + 1].

        Raises:
            BrokenRule: what the model returns are no logits.
        """

    @abstractmethod
    def logits(self, model: Any, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return the model's logits at some positions, float32 [B, K, vocab_size].

        x: int64 [B, T]. positions: int64 [B, K], of each row.

        Raises:
            BrokenRule: what the model returns are no logits.
        """

    @abstractmethod
    def free_memory(self) -> None:
        """Give back what is kept for reuse."""

    # --- Measures and failures ------------------------------------------------------------------------------

    @abstractmethod
    def peak_memory_mb(self) -> float:
        """Return the most memory that the process held, in MiB."""

    @abstractmethod
    def measured_tflops(self) -> float:
        """Return the TFLOP/s of a large matrix product in the compute dtype."""

    @abstractmethod
    def out_of_memory(self, error: BaseException) -> bool:
        """Return whether the error says that memory ran out."""

    def begin_profile(self) -> bool:
        """Begin to measure what takes the device's time. Returns whether it can."""
        return False

    def end_profile(self) -> dict[str, float]:
        """Return the share of each kind of work, the largest first: matrix products, attention, the rest."""
        return {}

    def too_large(self, rows: int) -> str:
        """Return why a pass over `rows` rows would not fit in memory, "" if it does or nothing is known.

        Asked after a pass over one row.
        """
        return ""


def check_logits(shape: Sequence[int], input_shape: Sequence[int], vocab_size: int) -> None:
    """Raise BrokenRule unless the logits of an input [B, T] are [B, T, vocab_size]."""
    expected = [*input_shape, vocab_size]
    if list(shape) != expected:
        raise BrokenRule(f"model(x) has shape {list(shape)}, it must return logits {expected}")
