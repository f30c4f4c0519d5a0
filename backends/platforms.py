"""
Which machine is this, and which entry of platforms.yaml is it? No torch, no mlx: the launcher asks too.

The first entry whose backend is the machine's, whose `match` is found in the device's name and whose
`min_memory_gb` the device has is the one; the file lists the most specific first.
"""

import functools
import os
import platform as python_platform
import re
import subprocess
from dataclasses import asdict, dataclass, field

from prepare import ROOT, UserError, config_path, load_track, load_tracks, read_entries

BACKENDS = ("cuda", "mlx", "mlx-cuda", "mlx-cpu", "torch-cpu")


@dataclass(frozen=True)
class Platform:
    """One kind of hardware, as platforms.yaml describes it."""

    name: str
    backend: str                    # one of BACKENDS
    trainer: str                    # train_cuda.py or train_mlx.py
    track: str                      # the track it starts on
    start: dict                     # starting size and batch: the trainer's constants read it
    match: str = ""                 # regular expression, found in the device's name; "" matches all
    min_memory_gb: float = 0.0      # device memory from which this entry applies
    bf16: bool = True               # matrix units compute in bfloat16
    peak_bf16_tflops: float = 0.0   # dense, without sparsity; 0: measured at the start of a run
    val_tokens: int = 0             # tokens scored; 0: as many as the track says
    startup_seconds: float = 150    # from the command to exp.start: imports, compilation, warm-up
    score_seconds: float = 120      # from the end of training to the result
    auto: bool = True               # false: used only when --platform names it


@dataclass(frozen=True)
class Facts:
    """What a machine says of itself."""

    backend: str                    # cuda, mlx or torch-cpu: what it would use by default
    device: str                     # as the vendor writes it
    memory_gb: float                # of the device; unified memory on a Mac
    bf16: bool = True
    cores: int = 0                  # CPU cores, or GPU cores on a Mac
    details: dict = field(default_factory=dict)


def check_platform(platform, tracks):
    if platform.backend not in BACKENDS:
        return "backend", f"backend must be one of {', '.join(BACKENDS)}"
    if not (ROOT / platform.trainer).is_file():
        return "trainer", f"there is no trainer {platform.trainer}"
    if platform.track not in tracks:
        return "track", f"there is no track '{platform.track}' (tracks: {', '.join(tracks)})"
    try:
        re.compile(platform.match)
    except re.error as e:
        return "match", f"match is not a regular expression: {e}"
    for key, value in platform.start.items():
        if key not in START_KEYS:
            return ("start", key), f"unknown key '{key}' in start (known: {', '.join(START_KEYS)})"
        if type(value) is not START_KEYS[key]:
            return ("start", key), f"'{key}' should be {START_KEYS[key].__name__}, not {value!r}"
    missing = START_KEYS.keys() - platform.start.keys()
    if missing:
        return "start", f"start lacks {', '.join(sorted(missing))}"
    if platform.val_tokens > tracks[platform.track].val_tokens:
        return "val_tokens", f"val_tokens is more than the {tracks[platform.track].val_tokens} of track {platform.track}"
    return None


# What `start` holds: a size for five minutes on this hardware. The trainers' constants have the same names in capitals.
START_KEYS = {
    "n_layer": int, "n_embd": int, "head_dim": int, "window_pattern": str, "short_window": int,
    "total_batch_size": int, "device_batch_size": int, "eval_batch_size": int,
}


@functools.lru_cache
def load_platforms(path=None):
    """All platforms of platforms.yaml, validated, in the file's order: {name: Platform}."""
    tracks = load_tracks(path)
    return read_entries(path or config_path(), "platforms", Platform, lambda p: check_platform(p, tracks))


def match_platform(facts, platforms):
    """The first automatic entry that fits the facts. Returns (Platform, why). Raises UserError."""
    for p in platforms.values():
        if not p.auto or p.backend != facts.backend or facts.memory_gb < p.min_memory_gb or not re.search(p.match, facts.device):
            continue
        if p.bf16 and not facts.bf16:
            continue
        why = [f"backend {p.backend}"]
        why += [f"'{facts.device}' matches /{p.match}/"] if p.match else []
        why += [f"{facts.memory_gb:.0f} GB is at least {p.min_memory_gb:g}"] if p.min_memory_gb else []
        why += [] if p.bf16 else ["no bf16 needed"]
        return p, ", ".join(why)
    raise UserError(f"no platform matches {facts.backend} device '{facts.device}' with {facts.memory_gb:.0f} GB: add an entry to {config_path().name}")


def current_platform():
    """The platform of this process: $AUTORESEARCH_PLATFORM, which the launcher sets, or the machine's own."""
    platforms = load_platforms()
    name = os.environ.get("AUTORESEARCH_PLATFORM")
    if not name:
        return match_platform(machine_facts(), platforms)[0]
    if name not in platforms:
        raise UserError(f"unknown platform '{name}': {config_path().name} has {', '.join(platforms)}", 2)
    return platforms[name]


def current_track(platform, name=None):
    """The named track, else that of this process, with the number of validation tokens that are scored: whole rows.

    That is what the platform says, or $AUTORESEARCH_VAL_TOKENS (a dry run: hardly any).
    """
    track = load_track(name or os.environ.get("AUTORESEARCH_TRACK") or platform.track)
    wanted = min(int(os.environ.get("AUTORESEARCH_VAL_TOKENS") or 0) or platform.val_tokens or track.val_tokens, track.val_tokens)
    return track, -(-wanted // track.seq_len) * track.seq_len


# ---------------------------------------------------------------------------
# Facts
# ---------------------------------------------------------------------------

def output_of(*command):
    """Standard output of a program, "" when it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.lru_cache
def machine_facts():
    """Facts of this machine: an NVIDIA GPU if one answers, else Apple Silicon, else the CPU."""
    return nvidia_facts(output_of(
        "nvidia-smi", f"--id={os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0] or 0}",
        "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits",
    )) or (python_platform.system() == "Darwin" and apple_facts(
        output_of("sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize"),
        output_of("ioreg", "-rc", "AGXAccelerator", "-d1"),
    )) or cpu_facts()


def nvidia_facts(csv):
    """Facts from one line of nvidia-smi's CSV: name, memory in MiB, compute capability, driver. None if empty."""
    cells = [cell.strip() for cell in csv.strip().split("\n")[0].split(",")]
    if len(cells) < 4:
        return None
    name, memory, capability, driver = cells[:4]
    # bf16 matrix units came with Ampere, compute capability 8.0.
    return Facts("cuda", name, round(float(memory) / 1024, 1), bf16=float(capability) >= 8.0,
                 details={"compute_capability": capability, "driver": driver})


def apple_facts(sysctl, ioreg):
    """Facts from `sysctl -n machdep.cpu.brand_string hw.memsize` and ioreg's GPU entry. None if not Apple Silicon."""
    lines = sysctl.strip().split("\n")
    if len(lines) < 2 or not lines[0].startswith("Apple"):
        return None
    gpu_cores = re.search(r'"gpu-core-count" = (\d+)', ioreg)
    return Facts("mlx", lines[0], round(int(lines[1]) / 2**30, 1), cores=int(gpu_cores[1]) if gpu_cores else 0)


def cpu_facts():
    """Facts of the CPU: its model and the cores that this process may use."""
    import psutil

    model = python_platform.processor() or python_platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            info = f.read()
        found = re.search(r"model name\s*:\s*(.+)", info)
        model = found[1].strip() if found else model
    except OSError:
        info = ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bf16 = bool(re.search(r"avx512_bf16|amx_bf16|\bbf16\b", info))
    return Facts("torch-cpu", f"{model}, {cores} cores", round(psutil.virtual_memory().total / 2**30, 1), bf16=bf16, cores=cores)


# Dense bf16 TFLOP/s of one Apple GPU core: 128 lanes, two operations a cycle, at the generation's clock. M1: 1.278 GHz
# (2.6 TFLOP/s from 8 cores, Apple's figure); M2: 1.398 GHz (3.6 from 10); M3: 1.38 GHz (28.3 from the Ultra's 80);
# M4: 1.578 GHz (clock as widely measured; Apple names none). M5 has matrix units in each core: 1024 operations a
# cycle at about 1.75 GHz (T. Zakharko, Investigating the GPU Neural Accelerators on Apple A19/M5, 2025).
APPLE_CORE_TFLOPS = {"M1": 0.327, "M2": 0.358, "M3": 0.353, "M4": 0.404, "M5": 1.79}


def peak_tflops(platform, facts):
    """Peak dense bf16 TFLOP/s of the device; 0 when nobody states it, and it must be measured."""
    generation = re.match(r"Apple (M\d+)", facts.device)
    if platform.backend == "mlx" and generation and not platform.peak_bf16_tflops:
        return round(APPLE_CORE_TFLOPS.get(generation[1], 0.0) * facts.cores, 2)
    return platform.peak_bf16_tflops


def mac_state():
    """Laptop facts that change a result: {on_battery, low_power_mode, thermal_pressure, macos}; {} elsewhere."""
    if python_platform.system() != "Darwin":
        return {}
    return read_mac_state(output_of("pmset", "-g", "batt"), output_of("pmset", "-g"), output_of("pmset", "-g", "therm"))


def read_mac_state(battery, settings, thermal):
    """Parse `pmset -g batt`, `pmset -g` and `pmset -g therm`."""
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", thermal)
    return {
        "on_battery": "'Battery Power'" in battery,
        "low_power_mode": bool(re.search(r"^\s*(lowpowermode|powermode)\s+1\b", settings, re.M)),
        "thermal_speed_limit": int(limit[1]) if limit else 100,  # percent
        "macos": python_platform.mac_ver()[0],
    }


def describe(facts):
    return {k: v for k, v in asdict(facts).items() if v not in (0, {}, "")}
