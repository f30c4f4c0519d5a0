"""
Which dtype does a machine compute in: float32, or bfloat16 where that is clearly faster?

    python -m backends.dtype cpu 192    measures a layer of that width, and prints its times as JSON

An entry of platforms.yaml may state it. Otherwise it is measured once, in a process of its own, and kept in
the cache: the launcher, the trainer and the processes that score all read the same answer. Nothing here
imports a framework before the measurement.
"""

import functools
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from annotated_types import Gt

from backends.platforms import Facts, Platform
from backends.protocol import read_json, write_json
from prepare import ROOT, STRICT, cache_dir

FLOAT32 = "float32"
BFLOAT16 = "bfloat16"
MARGIN = 1.15  # times that bfloat16 must be as fast as float32: less is within what a machine's load changes
MEASURE_SECONDS = 0.6  # of the timing itself
MOST_SECONDS = 120.0  # that the measurement may take, with the import of the framework from a cold disk

Milliseconds = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class LayerTimes:
    """The time of a layer's work, forward and backward, in milliseconds."""

    float32_products: Milliseconds
    float32_elementwise: Milliseconds
    bfloat16_products: Milliseconds
    bfloat16_elementwise: Milliseconds
    __pydantic_config__ = STRICT

    @property
    def ratio(self) -> float:
        """How many times as fast as float32 bfloat16 is."""
        float32 = self.float32_products + self.float32_elementwise
        return float32 / (self.bfloat16_products + self.bfloat16_elementwise)

    def __str__(self) -> str:
        return (
            f"bfloat16 is {self.ratio:.2f} times as fast as float32, of a layer "
            f"{self.bfloat16_products:.2f} + {self.bfloat16_elementwise:.2f} ms "
            f"against {self.float32_products:.2f} + {self.float32_elementwise:.2f} ms "
            f"(products + element-wise); bfloat16 from {MARGIN} on"
        )


class Choice(NamedTuple):
    """A dtype, and why."""

    dtype: str
    why: str


def choose_dtype(platform: Platform, facts: Facts) -> Choice:
    """Return the dtype of activations and embeddings on a machine. The first answer can take seconds."""
    if platform.bf16 is not None:
        return Choice(name_of(platform.bf16), f"{platform.name} states it")
    if platform.framework == "mlx":
        return Choice(BFLOAT16, "MLX has it on every GPU")
    if not facts.bf16:
        return Choice(FLOAT32, "the device has no instructions for bfloat16")
    times = measured_times(platform, facts)
    if times is None:
        is_gpu = platform.device_kind == "gpu"
        return Choice(name_of(is_gpu), "the speed could not be measured")
    return Choice(name_of(times.ratio >= MARGIN), f"measured: {times}")


def name_of(bf16: bool) -> str:
    """Return the name of bfloat16 or of float32."""
    return BFLOAT16 if bf16 else FLOAT32


# ---------------------------------------------------------------------------
# The measurement
# ---------------------------------------------------------------------------


def measured_times(platform: Platform, facts: Facts) -> LayerTimes | None:
    """Return the times of this machine: those that are kept, else new ones. None: they cannot be measured."""
    path = times_path(platform, facts)
    kept = read_times(json.dumps(read_json(path)))
    if kept:
        return kept
    times = read_times(output_of_measurement(platform))
    if times:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(times))
    return times


def times_path(platform: Platform, facts: Facts) -> Path:
    """Return the file that keeps the times: of this device, this layer and this version of the framework."""
    try:
        version = importlib.metadata.version(platform.framework)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    about = f"{facts.device}\n{platform.framework} {version}\n{platform.start.n_embd}"
    return cache_dir() / "dtype" / f"{hashlib.sha256(about.encode()).hexdigest()[:12]}.json"


def read_times(text: str) -> LayerTimes | None:
    """Return times from JSON, None where it is something else."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(LayerTimes).validate_json(text)
    except ValidationError:
        return None


@functools.lru_cache
def output_of_measurement(platform: Platform) -> str:
    """Return what this module prints as a script, "" when it fails or hangs.

    A command that runs all night asks once: what failed does not cost it minutes again, or change its answer.
    """
    command = [sys.executable, "-m", "backends.dtype", platform.device_kind, str(platform.start.n_embd)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=MOST_SECONDS, check=True
        )
    except (OSError, ValueError, subprocess.SubprocessError):  # ValueError: what it prints is no text
        return ""
    return done.stdout


def main(device_kind: str, width: int) -> None:
    """Measure, and print the times as JSON."""
    from backends.cuda import layer_times

    print(json.dumps(asdict(layer_times("cuda" if device_kind == "gpu" else "cpu", width))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
