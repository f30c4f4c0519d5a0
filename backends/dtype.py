"""
How fast is a machine, and which dtype does it compute in: float32, or bfloat16 where that is clearly faster?

    python -m backends.dtype cpu 192 float32 bfloat16    times a layer of that width, and prints JSON

An entry of platforms.yaml may state the dtype. Otherwise it is measured once, in a process of its own, and
kept in the cache: the launcher, the trainer and the processes that score all read the same answer. The same
times say how large a model the machine starts with (backends/sizes.py). Nothing here imports a framework
before the measurement.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt

from backends.platforms import DeviceKind, Facts, Platform
from backends.protocol import read_json, write_json
from prepare import ROOT, STRICT, cache_dir

FLOAT32 = "float32"
BFLOAT16 = "bfloat16"
MARGIN = 1.15  # times that bfloat16 must be as fast as float32: less is within what a machine's load changes
MEASURE_SECONDS = 0.6  # of the timing itself
LAYER_ROWS = {"cpu": 2**9, "gpu": 2**14}  # tokens that the timed layer gets
MEASURED_WIDTH = {"cpu": 192, "gpu": 512}  # of the timed layer where the size itself follows from the speed
CLOCK = "by the time computed"  # what is measured: kept times that were measured otherwise are not read
MOST_SECONDS = 120.0  # that the measurement may take, with the import of the framework from a cold disk

Milliseconds = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class LayerTimes:
    """The time of a layer's work, forward and backward, in milliseconds.

    That in bfloat16 is 0 where it was not measured: the device has no instructions for it.
    """

    float32_products: Milliseconds
    float32_elementwise: Milliseconds
    bfloat16_products: Annotated[float, Ge(0)] = 0.0
    bfloat16_elementwise: Annotated[float, Ge(0)] = 0.0
    __pydantic_config__ = STRICT

    def of(self, dtype: str) -> float:
        """Return the time in one dtype, 0 where it was not measured."""
        if dtype == BFLOAT16:
            return self.bfloat16_products + self.bfloat16_elementwise
        return self.float32_products + self.float32_elementwise

    @property
    def ratio(self) -> float:
        """How many times as fast as float32 bfloat16 is."""
        bfloat16 = self.of(BFLOAT16)
        return self.of(FLOAT32) / bfloat16 if bfloat16 else 0.0

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


def layer_rate(platform: Platform, facts: Facts, dtype: str) -> float:
    """Return the GFLOP/s of a layer's training on a machine, 0 where they cannot be measured."""
    times = measured_times(platform, facts)
    milliseconds = times.of(dtype) if times else 0.0
    if not milliseconds:
        return 0.0
    return 1e3 * layer_gflop(platform.device_kind, width_of(platform)) / milliseconds


def layer_gflop(device_kind: DeviceKind, width: int) -> float:
    """Return the GFLOP of the timed layer: its matrix products, forward and backward."""
    return 6 * LAYER_ROWS[device_kind] * 12 * width**2 / 1e9


# ---------------------------------------------------------------------------
# The measurement
# ---------------------------------------------------------------------------


def width_of(platform: Platform) -> int:
    """Return the width of the layer that is timed."""
    return MEASURED_WIDTH[platform.device_kind] if platform.measured else platform.start.n_embd


def measured_times(platform: Platform, facts: Facts) -> LayerTimes | None:
    """Return the times of this machine: those that are kept, else new ones. None: they cannot be measured."""
    path = times_path(platform, facts)
    kept = read_times(json.dumps(read_json(path)))
    if kept and (kept.of(BFLOAT16) or not facts.bf16):
        return kept
    times = read_times(output_of_measurement(platform, facts.bf16))
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
    about = f"{CLOCK}\n{facts.device}\n{platform.framework} {version}\n{width_of(platform)}"
    return cache_dir() / "dtype" / f"{hashlib.sha256(about.encode()).hexdigest()[:12]}.json"


def read_times(text: str) -> LayerTimes | None:
    """Return times from JSON, None where it is something else."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(LayerTimes).validate_json(text)
    except ValidationError:
        return None


@functools.lru_cache
def output_of_measurement(platform: Platform, bf16: bool) -> str:
    """Return what this module prints as a script, "" when it fails or hangs.

    A command that runs all night asks once: what failed does not cost it minutes again, or change its answer.

    bf16: the device has instructions for it. Where it is emulated, one product takes a second.
    """
    dtypes = [FLOAT32, BFLOAT16] if bf16 else [FLOAT32]
    width = str(width_of(platform))
    command = [sys.executable, "-m", "backends.dtype", platform.device_kind, width, *dtypes]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
            check=True,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},  # a thread that waits computes nothing
        )
    except (OSError, ValueError, subprocess.SubprocessError):  # ValueError: what it prints is no text
        return ""
    return done.stdout


def main(device_kind: str, width: int, dtypes: list[str]) -> None:
    """Measure, and print the times as JSON."""
    from backends.cuda import layer_times

    print(json.dumps(asdict(layer_times(device_kind, width, dtypes))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
