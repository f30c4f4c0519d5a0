"""
Which machine is this, and which entry of platforms.yaml fits it?

The first entry that fits is used: framework and kind of device are the machine's, `match` is found in the
device's name, and the device has `min_memory_gb`. The file lists the most specific entries first. Nothing
here imports a framework: the launcher asks too.
"""

import functools
import importlib.util
import json
import math
import os
import platform as python_platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from backends.protocol import RunSettings
from prepare import (
    ROOT,
    STRICT,
    Complaint,
    Entry,
    Track,
    UserError,
    config_path,
    load_track,
    load_tracks,
    read_entries,
)

Framework = Literal["torch", "mlx"]
DeviceKind = Literal["gpu", "cpu"]

# What `backend` was called before framework and kind of device were two facts. Older files still say it.
BACKENDS: dict[str, tuple[Framework, DeviceKind]] = {
    "cuda": ("torch", "gpu"),
    "torch-cpu": ("torch", "cpu"),
    "mlx": ("mlx", "gpu"),
    "mlx-cuda": ("mlx", "gpu"),
    "mlx-cpu": ("mlx", "cpu"),
}


@dataclass(frozen=True)
class StartSizes:
    """A size for five minutes on some hardware. The trainers' constants have these names in capitals."""

    n_layer: int
    n_embd: int
    head_dim: int
    window_pattern: str
    short_window: int  # tokens
    total_batch_size: int  # tokens an optimizer step
    device_batch_size: int  # rows a forward and backward pass
    eval_batch_size: int  # rows a forward pass when scoring
    bigram_rows: int = 0  # of a layer's table of hashed bigrams, a power of two; 0: no such tables
    __pydantic_config__ = STRICT


MEASURED = "measured"  # the `start` of an entry whose size follows from the device's speed
SMALLEST = StartSizes(
    n_layer=2,
    n_embd=128,
    head_dim=64,
    window_pattern="L",
    short_window=128,
    total_batch_size=2048,
    device_batch_size=1,
    eval_batch_size=1,
)


@dataclass(frozen=True)
class Platform:
    """One kind of hardware, as platforms.yaml describes it."""

    name: str
    framework: Framework
    device_kind: DeviceKind
    trainer: str  # train_cuda.py or train_mlx.py
    track: str  # the track it starts on
    start: StartSizes
    measured: bool = False  # `start` is computed from the device's speed: see backends/sizes.py
    match: str = ""  # regular expression, found in the device's name; "" matches all
    min_memory_gb: float = 0.0  # device memory from which this entry applies
    bf16: bool | None = None  # compute in bfloat16, or in float32; None: the faster one (backends/dtype.py)
    needs_bf16: bool = False  # this entry applies only to a device that has bfloat16; so does bf16: true
    peak_bf16_tflops: float = 0.0  # dense, without sparsity; 0: measured at the start of a run
    val_tokens: int = 0  # tokens scored; 0: as many as the track says
    startup_seconds: float = 150.0  # from the command to exp.start: imports, compilation, warm-up
    score_seconds: float = 120.0  # from the end of training to the result
    auto: bool = True  # false: used only when --platform names it
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Facts:
    """What a machine says of itself."""

    framework: Framework  # what it would use by default
    device_kind: DeviceKind
    device: str  # its name, as the vendor writes it
    memory_gb: float  # of the device; unified memory on a Mac
    bf16: bool = True  # it has instructions for bfloat16; how fast they are is another question
    cores: int = 0  # CPU cores, or GPU cores on a Mac
    details: dict[str, str] = field(default_factory=dict)

    def known(self) -> dict[str, Any]:
        """Return the facts that are known."""
        return {key: value for key, value in asdict(self).items() if value not in (0, {}, "")}


# ---------------------------------------------------------------------------
# platforms.yaml
# ---------------------------------------------------------------------------


@functools.lru_cache
def load_platforms(path: Path | None = None) -> dict[str, Platform]:
    """Return all platforms of platforms.yaml, validated, in the file's order.

    Raises:
        UserError: the file is missing or wrong. The message names the line.
    """
    tracks = load_tracks(path)

    def check(platform: Platform) -> Complaint | None:
        return check_platform(platform, tracks)

    return read_entries(path or config_path(), "platforms", Platform, check, upgrade=translate)


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an entry as Platform has them.

    Where the file says `start: measured`, the smallest size stands until backends/sizes.py replaces it.
    """
    if values.get("start") == MEASURED:
        values = {**values, "start": asdict(SMALLEST), "measured": True}
    return split_backend(values)


def split_backend(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the `backend` of an older file by `framework` and `device_kind`."""
    backend = values.get("backend")
    if not isinstance(backend, str) or backend not in BACKENDS:
        return values
    framework, device_kind = BACKENDS[backend]
    rest = {key: value for key, value in values.items() if key != "backend"}
    return {"framework": framework, "device_kind": device_kind, **rest}


def check_platform(platform: Platform, tracks: dict[str, Track]) -> Complaint | None:
    """Return (key, what is wrong with it), None when the platform is sound."""
    if not (ROOT / platform.trainer).is_file():
        return "trainer", f"there is no trainer {platform.trainer}"
    if platform.track not in tracks:
        return "track", f"there is no track '{platform.track}' (tracks: {', '.join(tracks)})"
    try:
        re.compile(platform.match)
    except re.error as error:
        return "match", f"match is not a regular expression: {error}"
    rows = platform.start.bigram_rows
    if rows < 0 or rows & (rows - 1):
        return ("start", "bigram_rows"), f"bigram_rows {rows} is neither 0 nor a power of two"
    most = tracks[platform.track].val_tokens
    if platform.val_tokens > most:
        return "val_tokens", f"val_tokens is more than the {most} of track {platform.track}"
    return None


def match_platform(facts: Facts, platforms: dict[str, Platform]) -> tuple[Platform, str]:
    """Return the first automatic platform that fits the facts, and why it does.

    Raises:
        UserError: none fits.
    """
    for platform in platforms.values():
        if platform.auto and fits(platform, facts):
            return platform, reasons(platform, facts)
    raise UserError(
        f"no platform matches {facts.framework} on {facts.device_kind} '{facts.device}' "
        f"with {facts.memory_gb:.0f} GB: add an entry to {config_path().name}"
    )


def fits(platform: Platform, facts: Facts) -> bool:
    """Return whether the platform describes a machine with these facts."""
    return (
        platform.framework == facts.framework
        and platform.device_kind == facts.device_kind
        and facts.memory_gb >= platform.min_memory_gb
        and re.search(platform.match, facts.device) is not None
        and (facts.bf16 or not (platform.bf16 or platform.needs_bf16))
    )


def reasons(platform: Platform, facts: Facts) -> str:
    """Return why the platform fits, for people."""
    why = [f"{platform.framework} on {platform.device_kind}"]
    if platform.match:
        why.append(f"'{facts.device}' matches /{platform.match}/")
    if platform.min_memory_gb:
        why.append(f"{facts.memory_gb:.0f} GB is at least {platform.min_memory_gb:g}")
    if not (platform.bf16 or platform.needs_bf16):
        why.append("no bf16 needed")
    return ", ".join(why)


def choose_platform(name: str = "") -> tuple[Platform, str]:
    """Return the named platform, or the one that fits this machine, and why.

    Raises:
        UserError: the name is unknown, or nothing fits.
    """
    platforms = load_platforms()
    if not name:
        return match_platform(machine_facts(), platforms)
    if name not in platforms:
        raise UserError(f"unknown platform '{name}': {config_path().name} has {', '.join(platforms)}", 2)
    return platforms[name], "named with --platform"


def current_entries() -> tuple[Platform, Track]:
    """Return platform and track of this process: those that the launcher hands over, or the machine's own.

    Raises:
        UserError: a name is unknown, or no platform fits this machine.
    """
    settings = RunSettings.from_env()
    if settings.entries:
        try:
            values = json.loads(settings.entries)
            return from_json(Platform, values["platform"]), from_json(Track, values["track"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError("AUTORESEARCH_ENTRIES holds no entries: only the launcher sets it", 2) from None
    from backends.sizes import with_start  # it imports this module

    platform, _ = choose_platform(settings.platform)
    track = load_track(settings.track or platform.track)
    return with_start(platform, track, facts_for(platform)), track


def current_platform() -> Platform:
    """Return the platform of this process."""
    return current_entries()[0]


def entries_as_json(platform: Platform, track: Track) -> str:
    """Return what current_entries reads."""
    return json.dumps({"platform": asdict(platform), "track": asdict(track)})


def from_json(cls: type[Entry], values: dict[str, Any]) -> Entry:
    """Return an entry of platforms.yaml from its values."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls).validate_json(json.dumps(values))


def scored_tokens(platform: Platform, track: Track) -> int:
    """Return how many validation tokens are scored: whole rows, at least what the platform asks for."""
    wanted = min(platform.val_tokens or track.val_tokens, track.val_tokens)
    return -(-wanted // track.seq_len) * track.seq_len


# ---------------------------------------------------------------------------
# Facts
# ---------------------------------------------------------------------------


def output_of(*command: str) -> str:
    """Return what a program prints, "" when it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def visible_gpu() -> str:
    """Return the GPU that a run computes on: the first of $CUDA_VISIBLE_DEVICES, as nvidia-smi takes it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"


def facts_for(platform: Platform) -> Facts:
    """Return the facts of the device that a platform runs on: the CPU may be chosen where a GPU is."""
    return cpu_facts() if platform.device_kind == "cpu" else machine_facts()


@functools.lru_cache
def machine_facts() -> Facts:
    """Return the facts of this machine: of an NVIDIA GPU if one answers, else of a Mac, an AMD GPU, the CPU.

    An AMD GPU counts where PyTorch is built for it; a build for CUDA does not see it.
    """
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    csv = output_of("nvidia-smi", f"--id={visible_gpu()}", query, "--format=csv,noheader,nounits")
    nvidia = nvidia_facts(csv)
    if nvidia:
        return nvidia
    if python_platform.system() == "Darwin":
        sysctl = output_of("sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize")
        apple = apple_facts(sysctl, output_of("ioreg", "-rc", "AGXAccelerator", "-d1"))
        if apple:
            return apple
    amd = amd_gpu()
    if amd and hip_version():
        return amd
    if amd:
        return replace(cpu_facts(), details={"unused_gpu": f"{amd.device}: PyTorch is not built for ROCm"})
    return cpu_facts()


def nvidia_facts(csv: str) -> Facts | None:
    """Read a line of nvidia-smi: name, memory in MiB, compute capability, driver. None if it is empty."""
    cells = [cell.strip() for cell in csv.strip().split("\n")[0].split(",")]
    if len(cells) < 4:
        return None
    name, memory, capability, driver = cells[:4]
    return Facts(
        "torch",
        "gpu",
        name,
        round(to_number(memory) / 1024, 1),
        bf16=to_number(capability) >= 8.0,  # matrix units for bf16 came with Ampere
        details={"compute_capability": capability, "driver": driver},
    )


def to_number(cell: Any) -> float:
    """Return a number of a vendor's tool, 0 for "[N/A]": where memory is shared, it states none."""
    try:
        number = float(cell)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return number if 0 <= number < math.inf else 0.0


def apple_facts(sysctl: str, ioreg: str) -> Facts | None:
    """Read the chip, the memory and the GPU's cores. None if this is no Apple Silicon.

    sysctl: output of `sysctl -n machdep.cpu.brand_string hw.memsize`. ioreg: the GPU's entry.
    """
    lines = sysctl.strip().split("\n")
    if len(lines) < 2 or not lines[0].startswith("Apple"):
        return None
    gpu_cores = re.search(r'"gpu-core-count" = (\d+)', ioreg)
    memory_gb = round(int(lines[1]) / 2**30, 1)
    return Facts("mlx", "gpu", lines[0], memory_gb, cores=int(gpu_cores[1]) if gpu_cores else 0)


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process and what it starts may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@functools.lru_cache
def cpu_facts(cores: int | None = None) -> Facts:
    """Return the CPU's model and its cores.

    cores: that are used; all that this process may use if left out
    """
    import psutil

    model = python_platform.processor() or python_platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        info = ""
    found = re.search(r"model name\s*:\s*(.+)", info)
    if found:
        model = found[1].strip()
    if cores is None:
        cores = len(usable_cores())
    bf16 = bool(re.search(r"avx512_bf16|amx_bf16|\bbf16\b", info))
    memory_gb = round(psutil.virtual_memory().total / 2**30, 1)
    return Facts("torch", "cpu", f"{model}, {cores} cores", memory_gb, bf16=bf16, cores=cores)


# GPUs of AMD with matrix instructions for bfloat16: CDNA (MI100 and newer), RDNA 3 and newer.
AMD_WITH_BF16 = re.compile(r"gfx(908|90a|94\d|95\d|1[12]\d\d)")
AMD_NAMES = ("Card Series", "Card series", "Device Name", "market_name")  # keys, the best first
AMD_ARCHITECTURES = ("GFX Version", "target_graphics_version")


def hip_version() -> str:
    """Return the version of HIP that the installed PyTorch is built for, "" for none. It is not imported."""
    try:
        spec = importlib.util.find_spec("torch")
        text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    except (OSError, ValueError, ImportError):
        return ""
    found = re.search(r"^hip\b[^=\n]*=\s*['\"](.+?)['\"]", text, re.M)
    return found[1] if found else ""


def amd_gpu() -> Facts | None:
    """Return the facts of the AMD GPU that a run would use, None where there is none."""
    visible = os.environ.get("HIP_VISIBLE_DEVICES") or visible_gpu()
    number = int(visible) if visible.isdecimal() else 0
    said = output_of("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json")
    return amd_facts(said, number) or amd_facts(
        output_of("amd-smi", "static", "--asic", "--vram", "--json"), number
    )


def amd_facts(said: str, number: int = 0) -> Facts | None:
    """Read what `rocm-smi` or `amd-smi` says in JSON. None when it names no GPU.

    said: perhaps with lines of warnings around the JSON. number: of the GPU, from 0
    """
    cards = amd_cards(said)
    if not cards:
        return None
    card = cards[number] if number < len(cards) else cards[0]
    architecture = first_text(card, AMD_ARCHITECTURES)
    name = first_text(card, AMD_NAMES) or f"AMD {architecture or 'GPU'}"
    return Facts(
        "torch",
        "gpu",
        name,
        amd_memory_gb(card),
        bf16=AMD_WITH_BF16.match(architecture) is not None,
        details={"architecture": architecture} if architecture else {},
    )


def amd_cards(said: str) -> list[dict[str, Any]]:
    """Return the values of each GPU, in order, with those of `asic` and `vram` among the others.

    rocm-smi: {"card0": {...}, ...}; amd-smi: [{"gpu": 0, "asic": {...}, "vram": {...}}], bare or as gpu_data.
    """
    starts = [at for at in (said.find("{"), said.find("[")) if at >= 0]
    data: Any = None
    for start in sorted(starts):
        try:
            data, _ = json.JSONDecoder().raw_decode(said[start:])
            break
        except (ValueError, RecursionError):
            continue
    if isinstance(data, dict) and "gpu_data" in data:
        data = data["gpu_data"]
    if isinstance(data, dict):
        numbered = [(key, card) for key, card in data.items() if re.fullmatch(r"card:?\d+", key)]
        data = [card for _, card in sorted(numbered, key=lambda pair: int(re.sub(r"\D", "", pair[0])))]
    if not isinstance(data, list):
        return []
    cards = [card for card in data if isinstance(card, dict)]
    return [{**card, **section(card, "asic"), **section(card, "vram")} for card in cards]


def section(card: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a part of what amd-smi says of a GPU, {} without it."""
    part = card.get(name)
    return part if isinstance(part, dict) else {}


def first_text(card: dict[str, Any], keys: Iterable[str]) -> str:
    """Return the first of the values that is a name: no number, and not "N/A"."""
    for key in keys:
        value = card.get(key)
        if isinstance(value, str) and value.strip() not in ("", "N/A") and not value.startswith("0x"):
            return value.strip()
    return ""


def amd_memory_gb(card: dict[str, Any]) -> float:
    """Return the memory of a GPU in GiB, 0 where it is not stated. rocm-smi counts bytes, amd-smi MiB."""
    size = card.get("size")
    mebibytes = size.get("value") if isinstance(size, dict) else size
    if mebibytes is not None:
        return round(to_number(mebibytes) / 2**10, 1)
    return round(to_number(card.get("VRAM Total Memory (B)")) / 2**30, 1)


# Dense bf16 TFLOP/s of one Apple GPU core: 128 lanes, two operations a cycle, at the generation's clock. M1:
# 1.278 GHz (2.6 TFLOP/s from 8 cores, Apple's figure). M2: 1.398 GHz (3.6 from 10). M3: 1.38 GHz (28.3 from
# the Ultra's 80). M4: 1.578 GHz (as widely measured; Apple names no clock). M5 has matrix units in each core:
# 1024 operations a cycle at about 1.75 GHz (T. Zakharko, Investigating the GPU Neural Accelerators on Apple
# A19/M5, 2025).
APPLE_CORE_TFLOPS = {"M1": 0.327, "M2": 0.358, "M3": 0.353, "M4": 0.404, "M5": 1.79}


def peak_tflops(platform: Platform, facts: Facts) -> float:
    """Return the peak dense bf16 TFLOP/s of the device, 0 when none is stated and it must be measured."""
    generation = re.match(r"Apple (M\d+)", facts.device)
    if platform.framework == "mlx" and generation and not platform.peak_bf16_tflops:
        return round(APPLE_CORE_TFLOPS.get(generation[1], 0.0) * facts.cores, 2)
    return platform.peak_bf16_tflops


def mac_state() -> dict[str, Any]:
    """Return what changes a result on a Mac: see read_mac_state. {} on other systems."""
    if python_platform.system() != "Darwin":
        return {}
    battery = output_of("pmset", "-g", "batt")
    settings = output_of("pmset", "-g")
    thermal = output_of("pmset", "-g", "therm")
    return read_mac_state(battery, settings, thermal)


def read_mac_state(battery: str, settings: str, thermal: str) -> dict[str, Any]:
    """Parse `pmset -g batt`, `pmset -g` and `pmset -g therm`.

    Returns:
        on_battery, low_power_mode: bool. thermal_speed_limit: percent of the full clock, 100 when macOS
        states no limit. macos: the version.
    """
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", thermal)
    return {
        "on_battery": "'Battery Power'" in battery,
        "low_power_mode": bool(re.search(r"^\s*(lowpowermode|powermode)\s+1\b", settings, re.M)),
        "thermal_speed_limit": int(limit[1]) if limit else 100,
        "macos": python_platform.mac_ver()[0],
    }
