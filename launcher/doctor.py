"""
`autoresearch doctor`: is this machine ready, and how far will a run come? Each fault with its remedy.

Here is what concerns the machine and the data. What concerns git and the agents stands in night/doctor.py.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from backends.platforms import StartSizes, mac_state, output_of, visible_gpu
from launcher.box import missing_walls
from launcher.console import describe_os_error, print_object
from launcher.device import (
    LOOK_SECONDS,
    DeviceLock,
    allowed_share,
    name_processes,
    others_at_work,
)
from launcher.ledger import Row, single_line
from launcher.run import POWER_FLAGS
from launcher.runs import home, ledger
from launcher.setting import Setting, resolve
from prepare import (
    ROOT,
    TIME_BUDGET,
    Prepared,
    Track,
    UserError,
    cache_dir,
    first_line,
    hub_errors,
    load_tracks,
    prepared_path,
)

State = Literal["ok", "warn", "fail"]
STYLES: dict[State, str] = {"ok": "green", "warn": "yellow", "fail": "red"}

EXPECTED_SHARE = 0.5  # of the speed of matrix products that a trainer reaches: 0.45 on an H100, 0.59 on a CPU
SPEED_SECONDS = 180.0  # that the measurement may take; importing the framework is most of it
HUB_SECONDS = 5.0
LEAST_DISK_GB = 1.0  # free, for runs and compiled code
LEAST_DISK_FETCH_GB = 6.0  # and where a corpus is yet to be fetched
LEAST_MEMORY_GB = 2.0  # of the host: the trainer and the processes that score
LEAST_FREE_SHARE = 0.9  # of a GPU's memory; the start sizes of a platform take it for granted


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State  # warn: an experiment runs, but not as it should; fail: it does not run
    found: str
    remedy: str = ""


class Speed(NamedTuple):
    """What a device does."""

    dtype: str
    tflops: float  # of matrix products


def make_check(name: str, look: Callable[[], Check]) -> Check:
    """Return what a look finds; where it is told what is wrong, that."""
    try:
        return look()
    except UserError as error:
        return Check(name, "fail", str(error))
    except OSError as error:
        return Check(name, "fail", describe_os_error(error))


def check_machine(platform: str = "", track: str = "") -> Iterator[Check]:
    """Look at the machine and the data, one thing after the other. The names are those of the options."""
    try:
        setting = resolve(platform, track)
        setting.require_device()
    except UserError as error:
        yield Check("device", "fail", str(error))
        setting = None
    if setting:
        yield check_device(setting)
        yield from check_speed(setting)
        yield make_check("memory", lambda: check_memory(setting))
        yield make_check("others", lambda: check_others(setting))
        yield check_power()
    yield check_walls()
    yield make_check("data", lambda: check_data(setting))
    yield make_check("disk", lambda: check_disk(setting))
    yield make_check("hub", lambda: check_hub(setting))


# ---------------------------------------------------------------------------
# The device
# ---------------------------------------------------------------------------


def check_device(setting: Setting) -> Check:
    platform = setting.platform
    memory = f", {setting.facts.memory_gb:g} GiB" if setting.facts.memory_gb else ""
    found = f"{setting.facts.device}{memory}: platform {platform.name} ({setting.why}), {platform.framework}"
    return Check("device", "ok", found)


def check_speed(setting: Setting) -> Iterator[Check]:
    """Look at the speed of matrix products, and at what may be expected of a run."""
    kind = setting.platform.device_kind
    speed: Speed | None = None
    if not DeviceLock(kind).is_free():
        yield Check(
            "speed",
            "warn",
            "an experiment holds the device: nothing is measured",
            "ask again when it is over, or end it (autoresearch stop)",
        )
    else:
        try:
            with DeviceLock(kind):
                speed = measure_speed(setting.platform.name)
            found = f"{speed.tflops:g} TFLOP/s of matrix products in {speed.dtype}"
            yield Check("speed", "ok", found)
        except UserError as error:
            yield Check("speed", "fail", str(error), "uv sync; on a GPU: does nvidia-smi answer?")
    yield check_size(setting, speed)


def measure_speed(platform: str) -> Speed:
    """Return what the device does, measured by a process of its own. Raises UserError."""
    command = [sys.executable, "-m", "backends.speed", "--platform", platform]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SPEED_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"the framework does not start: {first_line(error)}") from None
    try:
        data = json.loads(done.stdout)
        return Speed(str(data["dtype"]), float(data["tflops"]))
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"the framework does not compute: {last[:200]}") from None


def check_size(setting: Setting, speed: Speed | None) -> Check:
    """Look at how much a run will train: by the last run of this kind, else by the speed of the device."""
    start = setting.platform.start
    size = f"starts with {start.n_layer} layers, width {start.n_embd}"
    row = last_run(setting)
    if row:
        tokens = row.tokens_per_second
        found = (
            f"{tokens:,.0f} tokens/s ({tokens_in(tokens)} in {TIME_BUDGET} s), as run {row.run} had; {size}"
        )
        return Check("expected", "ok", found)
    if speed is None or speed.tflops <= 0:
        return Check("expected", "ok", size)
    tokens = EXPECTED_SHARE * speed.tflops * 1e12 / estimate_flops(start, setting.track)
    found = f"about {tokens:,.0f} tokens/s ({tokens_in(tokens)} in {TIME_BUDGET} s), an estimate; {size}"
    return Check("expected", "ok", found)


def tokens_in(tokens_per_second: float) -> str:
    """Return the tokens of a run in millions."""
    return f"{tokens_per_second * TIME_BUDGET / 1e6:.3g}M"


def last_run(setting: Setting) -> Row | None:
    """Return the last run of this platform and track on this device with a speed; None without one."""
    wanted = (setting.platform.name, setting.track.name, setting.facts.device)
    rows = [
        row
        for row in ledger().rows()
        if (row.platform, row.track, row.device) == wanted and row.comparable and row.tokens_per_second > 0
    ]
    return rows[-1] if rows else None


def estimate_flops(start: StartSizes, track: Track) -> int:
    """Return about the operations of a training step per token, of a trainer with the start sizes.

    6 for each weight of a matrix: 12 width^2 a layer, and the head. 12 times the width for each position that
    a layer attends to (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    """
    weights = 12 * start.n_layer * start.n_embd**2 + track.vocab_size * start.n_embd
    short = min(start.short_window, track.seq_len)
    pattern = start.window_pattern
    kinds = [pattern[layer % len(pattern)] for layer in range(start.n_layer - 1)]
    attended = sum(short if kind == "S" else track.seq_len for kind in kinds) + track.seq_len
    return 6 * weights + 12 * start.n_embd * attended


def check_memory(setting: Setting) -> Check:
    """Look at the memory that is free: of the host, and of a GPU."""
    free = psutil.virtual_memory().available / 2**30
    row = last_run(setting)
    on_gpu = setting.platform.device_kind == "gpu"
    needed = LEAST_MEMORY_GB
    if row and not on_gpu:
        needed = max(needed, row.memory_gb)
    found = f"{free:.1f} GiB free"
    if free < needed:
        return Check("memory", "warn", f"{found}, a run takes about {needed:.1f}", "close what takes it")
    if on_gpu:
        of_gpu = free_share_of_gpu()
        if of_gpu is not None and of_gpu < LEAST_FREE_SHARE:
            return Check(
                "memory",
                "warn",
                f"{100 * (1 - of_gpu):.0f}% of the GPU's memory is taken",
                "nvidia-smi names the processes: end them, or lower DEVICE_BATCH_SIZE",
            )
    return Check("memory", "ok", found)


def free_share_of_gpu() -> float | None:
    """Return the share of the GPU's memory that is free, None where nvidia-smi does not say."""
    query = "--query-gpu=memory.free,memory.total"
    csv = output_of("nvidia-smi", f"--id={visible_gpu()}", query, "--format=csv,noheader,nounits")
    try:
        free, total = map(float, csv.strip().split("\n")[0].split(","))
        return free / total
    except (ValueError, ZeroDivisionError):
        return None


def check_others(setting: Setting) -> Check:
    """Look at the other processes that compute."""
    kind = setting.platform.device_kind
    others = others_at_work(LOOK_SECONDS)
    share = sum(other.share for other in others)
    found = f"other processes use {100 * share:.0f}% of the CPU"
    if share <= allowed_share(kind):
        return Check("others", "ok", found)
    remedy = "end them, or loop --busy wait: a run beside them does not rank"
    return Check("others", "warn", f"{found}: {name_processes(others)}", remedy)


def check_power() -> Check:
    """Look at what makes a result of a Mac count or not."""
    laptop = mac_state()
    wrong = [flag.value for key, flag in POWER_FLAGS.items() if laptop.get(key)]
    if laptop.get("thermal_speed_limit", 100) < 100:
        wrong.append("throttled")
    if wrong:
        remedy = "plug this Mac in, leave low-power mode, let it cool down: runs do not rank else"
        return Check("power", "warn", ", ".join(wrong), remedy)
    return Check("power", "ok", "plugged in" if laptop else "nothing that this system tells of")


def check_walls() -> Check:
    """Look whether a trainer can be boxed."""
    missing = missing_walls()
    if missing:
        remedy = "runs have a board of their own; docs/integrity.md says what that means"
        return Check("box", "warn", f"a trainer cannot be boxed: {missing}", remedy)
    return Check("box", "ok", "trainers run behind walls")


# ---------------------------------------------------------------------------
# The data
# ---------------------------------------------------------------------------


def check_data(setting: Setting | None) -> Check:
    """Look which tracks are prepared, and whether the one that is wanted is whole."""
    tracks = load_tracks()
    prepared = [name for name, track in tracks.items() if prepared_path(track).is_dir()]
    found = (
        f"prepared: {', '.join(prepared) or 'none'}; not prepared: {names_but(tracks, prepared) or 'none'}"
    )
    if setting is None:
        return Check("data", "ok", found)
    wanted = setting.track
    if wanted.name not in prepared:
        remedy = f"autoresearch prepare --track {wanted.name}, or the first run does it"
        return Check("data", "warn", f"{wanted.name} is not prepared; {found}", remedy)
    Prepared(wanted)  # says what is damaged
    return Check("data", "ok", found)


def names_but(tracks: Iterable[str], others: Sequence[str]) -> str:
    return ", ".join(name for name in tracks if name not in others)


def check_disk(setting: Setting | None) -> Check:
    """Look at the room for runs and for prepared data."""
    fetches = setting is not None and not prepared_path(setting.track).is_dir()
    needed = LEAST_DISK_FETCH_GB if fetches and setting and setting.track.hub else LEAST_DISK_GB
    parts = []
    least = float("inf")
    for folder in (home(), cache_dir()):
        free = shutil.disk_usage(existing(folder)).free / 1e9
        least = min(least, free)
        parts.append(f"{free:.1f} GB free for {folder}")
    found = ", ".join(parts)
    if least < needed:
        remedy = "autoresearch clean --yes, or AUTORESEARCH_HOME and AUTORESEARCH_CACHE on a larger disk"
        return Check("disk", "warn", f"{found}; {needed:g} GB are needed", remedy)
    return Check("disk", "ok", found)


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def check_hub(setting: Setting | None) -> Check:
    """Look whether the hub answers, about the dataset that is wanted or the first that there is."""
    tracks = [setting.track] if setting and setting.track.hub else []
    tracks += [track for track in load_tracks().values() if track.hub]
    if not tracks:
        return Check("hub", "ok", "no track needs it")
    track = tracks[0]
    is_needed = setting is not None and setting.track == track and not prepared_path(track).is_dir()
    try:
        ask_hub(track)
    except UserError as error:
        found = str(error) if is_needed else f"{error} (what is prepared here needs none)"
        return Check("hub", "fail" if is_needed else "warn", found)
    return Check("hub", "ok", f"answers about {track.hub}")


def ask_hub(track: Track) -> None:
    """Ask the hub for a dataset. Raises UserError when it does not answer."""
    from huggingface_hub import HfApi

    with hub_errors(track):
        HfApi().dataset_info(track.hub, revision=track.revision, timeout=HUB_SECONDS)


# ---------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------


def print_checks(checks: Iterable[Check], echo: Callable[[str, State], None], as_json: bool) -> bool:
    """Print checks as they come, or all of them as JSON. Returns whether none failed.

    echo: prints a line in the style of a state
    """
    done: list[Check] = []
    for check in checks:
        done.append(check)
        if not as_json:
            echo(f"{check.state:4}  {check.name:8}  {single_line(check.found)}", check.state)
            if check.remedy and check.state != "ok":
                echo(f"{'':4}  {'':8}  -> {check.remedy}", check.state)
    ready = not any(check.state == "fail" for check in done)
    if as_json:
        print_object({"ready": ready, "checks": [asdict(check) for check in done]})
    return ready
