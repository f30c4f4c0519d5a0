"""
How large a model does a machine start with? As large as what it computes in one run has room for.

An entry of platforms.yaml that says `start: measured` gets the size of the ladder below whose compute is
nearest to the machine's: the rate of a layer (backends/dtype.py) times the seconds of a run by the rules. A
practice run of ten seconds has the same size: it is there to find what breaks the real one. The steps of the
ladder are a factor of two or more apart, and the rate is measured once and kept: a machine that is a little
faster today starts as it did yesterday. It is only a start: an experiment writes other numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from backends.dtype import BFLOAT16, FLOAT32, choose_dtype, layer_rate
from backends.platforms import APPLE_CORE_TFLOPS, Facts, Platform, StartSizes, peak_tflops
from prepare import TIME_BUDGET, Track


class Rung(NamedTuple):
    """The size of the model for some compute."""

    tflop: float  # of training in one run
    n_layer: int
    n_embd: int
    batch: int  # tokens an optimizer step


# Measured with benchmarks/sizes.py up to 52 TFLOP, and by real runs at 144 (docs/benchmarks.md). The last one
# is the start of the platform h100, which was run; those between are those of platforms of such a speed:
# estimates. None has one head: PyTorch 2.14 fails to compile that.
LADDER = (
    Rung(6.5, 2, 128, 2048),
    Rung(13, 3, 128, 2048),
    Rung(26, 3, 128, 2048),
    Rung(52, 4, 128, 4096),
    Rung(144, 4, 192, 8192),
    Rung(600, 4, 256, 16384),
    Rung(2_400, 4, 384, 16384),
    Rung(9_600, 6, 384, 65536),
    Rung(30_000, 8, 384, 131072),
    Rung(115_000, 9, 512, 131072),
)
LONG_ROW = 1024  # tokens from which most layers see a short window
SHARE_OF_PEAK = 0.5  # that training reaches on a chip of Apple's, which is not measured
FEWEST_CORES = 7  # of the GPU of an M1; one of a generation that we do not know is taken for an M4's
# Bytes that a pass holds for each token, layer and channel, for each byte of the dtype. Of an H100: 13, with
# 9 layers of width 512; without fused kernels 22, with 8.
BYTES_HELD = 50
OWN_MEMORY = 0.5  # of a GPU's, that a pass may take
SHARED_MEMORY = 0.25  # of a memory that is the desktop's and everything else's too: a CPU's, a Mac's
UNKNOWN_MEMORY_GB = 8.0  # of a device that states none
EVAL_TOKENS = 8192  # of a forward pass when scoring, at least where they fit


class Sized(NamedTuple):
    """A size to start with, and why."""

    start: StartSizes
    why: str


def with_start(platform: Platform, track: Track, facts: Facts) -> Platform:
    """Return the platform with the size that a machine starts with on a track.

    The first answer on a machine can take seconds.
    """
    return replace(platform, start=choose_start(platform, track, facts).start)


def choose_start(platform: Platform, track: Track, facts: Facts) -> Sized:
    """Return the size that a machine starts with on a track. The first answer there can take seconds."""
    if not platform.measured:
        return Sized(platform.start, f"{platform.name} states it")
    if (facts.framework, facts.device_kind) != (platform.framework, platform.device_kind):
        start = sizes_of(LADDER[0], platform, track, facts, FLOAT32)
        return Sized(start, f"{facts.device} is no device of {platform.name}: the smallest size")
    dtype = choose_dtype(platform, facts).dtype
    rate = rate_of(platform, facts, dtype)
    tflop = rate * TIME_BUDGET / 1e3
    rung = nearest(tflop)
    start = sizes_of(rung, platform, track, facts, dtype)
    if not rate:
        return Sized(start, "the speed could not be measured: the smallest size")
    compute = float(f"{tflop:.3g}")  # rounded
    why = f"{rate:,.0f} GFLOP/s in {dtype} times {TIME_BUDGET} s are {compute:,g} TFLOP"
    return Sized(start, f"{why}, nearest to {rung.tflop:,g} of the ladder")


def rate_of(platform: Platform, facts: Facts, dtype: str) -> float:
    """Return the GFLOP/s that a machine trains with, 0 where they are unknown."""
    if platform.framework == "mlx":
        peak = peak_tflops(platform, facts) or APPLE_CORE_TFLOPS["M4"] * (facts.cores or FEWEST_CORES)
        return 1e3 * SHARE_OF_PEAK * peak
    return layer_rate(platform, facts, dtype)


def nearest(tflop: float, ladder: Sequence[Rung] = LADDER) -> Rung:
    """Return the rung of the nearest compute, by ratio. The first one where it is 0."""
    if tflop <= 0:
        return ladder[0]
    return min(ladder, key=lambda rung: abs(math.log(tflop / rung.tflop)))


def sizes_of(rung: Rung, platform: Platform, track: Track, facts: Facts, dtype: str) -> StartSizes:
    """Return the trainers' constants for a rung on a machine. A pass has as many rows as memory holds."""
    step_rows = power_of_two(rung.batch / track.seq_len)
    share = SHARED_MEMORY if is_shared(platform) else OWN_MEMORY
    memory = share * (facts.memory_gb or UNKNOWN_MEMORY_GB)
    token_bytes = BYTES_HELD * (2 if dtype == BFLOAT16 else 4) * rung.n_layer * rung.n_embd
    held_rows = power_of_two(memory * 2**30 / (token_bytes * track.seq_len))
    is_long = track.seq_len >= LONG_ROW
    return StartSizes(
        n_layer=rung.n_layer,
        n_embd=rung.n_embd,
        head_dim=128 if rung.n_embd >= 384 else 64,
        window_pattern="SSSL" if is_long else "L",
        short_window=256 if is_long else 128,
        total_batch_size=step_rows * track.seq_len,
        device_batch_size=min(step_rows, held_rows),
        eval_batch_size=min(max(step_rows, power_of_two(EVAL_TOKENS / track.seq_len)), held_rows),
    )


def is_shared(platform: Platform) -> bool:
    """Return whether the device's memory is the host's too."""
    return platform.device_kind == "cpu" or platform.framework == "mlx"


def power_of_two(number: float) -> int:
    """Return the largest power of two that is not above a number, at least 1."""
    return 2 ** max(0, math.floor(math.log2(max(number, 1))))
