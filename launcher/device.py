"""
The device during a run: one experiment at a time on it, and what else happens on the machine.

Other processes, sleep, throttling and power make a run incomparable. They are noticed and become flags.
"""

import json
import math
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, NamedTuple

import psutil
from filelock import FileLock, Timeout

from backends.platforms import DeviceKind, mac_state, output_of, usable_cores, visible_gpu
from launcher.console import say
from launcher.exit_codes import EXIT_NO_VERDICT
from launcher.ledger import Flag, single_line, warn
from prepare import UserError, cache_dir

OTHERS_CPU = 0.10  # share of all cores that other processes may use when the CPU is the device ...
OTHERS_CPU_HOST = 0.50  # ... and when the device is a GPU
LEAST_SHARE = 0.01  # of all cores; a process that used less is not named
OTHERS_SECONDS = 2.0  # CPU seconds of others that are never called contention: a run has as much by chance
SLEPT_SECONDS = 2.0  # that the wall clock may gain on the monotonic one
OURS_ON_GPU = 3  # processes of a run: the trainer, and two that wait to score
SAMPLE_EVERY = 5.0  # seconds
LOOK_SECONDS = 5.0  # that a look for other processes takes
LOOK_AGAIN = 20.0  # seconds between looks while a run waits
NAMED_PROCESSES = 3  # that a message names
COMMAND_CHARS = 40
GPU_STATE = (
    "power.draw",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown",
)


# ---------------------------------------------------------------------------
# One experiment on a device
# ---------------------------------------------------------------------------


def acquire(lock: FileLock, why: Callable[[], str]) -> None:
    """Take a file lock. While another process has it, say what for (`why`) and wait."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting: {why()}")
        lock.acquire()


class DeviceLock:
    """Only one experiment on a device at a time, whoever starts it. The next one waits."""

    def __init__(self, device_kind: DeviceKind) -> None:
        folder = cache_dir() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        device = cpu_name() if device_kind == "cpu" else gpu_name()
        self._lock = FileLock(folder / f"{device}.lock")
        self._holder = folder / f"{device}.json"

    def __enter__(self) -> "DeviceLock":
        acquire(self._lock, lambda: f"another experiment holds the device ({self._held_by()})")
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def is_free(self) -> bool:
        """Return whether no experiment holds the device now."""
        try:
            with self._lock.acquire(timeout=0):
                return True
        except Timeout:
            return False

    def set_holder(self, run_id: str) -> None:
        """Tell those who wait which run holds the device."""
        self._holder.write_text(json.dumps({"run": run_id, "pid": os.getpid()}))

    def _held_by(self) -> str:
        try:
            data = json.loads(self._holder.read_text())
            return f"run {data['run']}, launcher process {data['pid']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "just starting"


def gpu_name() -> str:
    """Return a name of the GPU that a run computes on: its UUID, however CUDA_VISIBLE_DEVICES names it."""
    uuid = output_of("nvidia-smi", f"--id={visible_gpu()}", "--query-gpu=uuid", "--format=csv,noheader")
    return uuid.strip().partition("\n")[0] or "gpu"


def cpu_name() -> str:
    """Return a name of the cores that a run computes on: "cpu" where they are all of the machine's."""
    return "-".join(["cpu", *map(str, cores_if_some())])


def cores_if_some() -> list[int]:
    """Return the numbers of the cores that a run may use; [] where they are all of the machine's."""
    cores = usable_cores()
    return cores if len(cores) < (os.cpu_count() or 1) else []


@contextmanager
def awake() -> Iterator[None]:
    """Hold a Mac awake. Does nothing on other systems."""
    if platform.system() != "Darwin":
        yield
        return
    caffeinate = subprocess.Popen(["caffeinate", "-dims", "-w", str(os.getpid())])
    try:
        yield
    finally:
        caffeinate.terminate()
        caffeinate.wait()


# ---------------------------------------------------------------------------
# What else happens on the machine
# ---------------------------------------------------------------------------


class Other(NamedTuple):
    """A process that is not ours and computes."""

    pid: int
    command: str
    share: float  # of all cores

    def __str__(self) -> str:
        return f"{self.command} (process {self.pid}, {100 * self.share:.0f}%)"


WhenBusy = Literal["go-on", "wait", "refuse"]


def allowed_share(device_kind: DeviceKind) -> float:
    """Return the share of all cores that other processes may use during a run."""
    return OTHERS_CPU if device_kind == "cpu" else OTHERS_CPU_HOST


def require_quiet(
    device_kind: DeviceKind,
    when_busy: WhenBusy,
    seconds: float = LOOK_SECONDS,
    patience: float = math.inf,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Look whether other processes compute, before a run begins, and name them.

    Args:
        device_kind: what the run computes on.
        when_busy: what to do where they do.
        seconds: that a look takes.
        patience: seconds after which a run waits no longer.
        is_over: says whether no run will begin any more.

    Raises:
        UserError: they do, and the user said "refuse".
    """
    began = time.monotonic()
    while True:
        others = others_at_work(seconds)
        share = sum(other.share for other in others)
        if share <= allowed_share(device_kind) or is_over():
            return
        busy = f"other processes use {100 * share:.0f}% of the CPU: {name_processes(others)}"
        if when_busy == "refuse":
            raise UserError(f"{busy}: end them, or use --busy wait or --busy go-on", EXIT_NO_VERDICT)
        if when_busy == "go-on" or time.monotonic() - began > patience:
            warn(f"{busy}; a run beside them does not rank (--busy wait waits for them)")
            return
        say(f"waiting: {busy}")
        time.sleep(LOOK_AGAIN)


def look_around(device_kind: DeviceKind, when_busy: WhenBusy) -> None:
    """Do what require_quiet does. Where the run goes on in any case, it does not wait for the look."""
    if when_busy == "go-on":
        threading.Thread(target=require_quiet, args=(device_kind, when_busy), daemon=True).start()
    else:
        require_quiet(device_kind, when_busy)


def others_at_work(seconds: float) -> list[Other]:
    """Return the processes that are not ours and computed during the next seconds, the busiest first."""
    before = cpu_seconds()
    began = time.monotonic()
    time.sleep(seconds)
    return busiest(before, cpu_seconds(), time.monotonic() - began, own_tree(os.getpid()))


def cpu_seconds() -> dict[tuple[int, float], float]:
    """Return the CPU seconds that each process has used: {(pid, time of its start): seconds}."""
    found = {}
    for process in psutil.process_iter(["cpu_times", "create_time"]):
        times = process.info["cpu_times"]
        if times is not None:
            found[process.pid, process.info["create_time"]] = times.user + times.system
    return found


def busiest(
    before: Mapping[tuple[int, float], float],
    after: Mapping[tuple[int, float], float],
    seconds: float,
    own: Collection[int],
) -> list[Other]:
    """Return who computed between two looks, but for the processes `own`, the busiest first."""
    cores = len(usable_cores())
    shares = {
        key: (used - before.get(key, 0.0)) / (seconds * cores)
        for key, used in after.items()
        if key[0] not in own
    }
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return [Other(pid, command_of(pid), share) for (pid, _), share in ranked if share >= LEAST_SHARE]


def own_tree(pid: int) -> set[int]:
    """Return a process and all that it started."""
    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.Error:
        return {pid}


def command_of(pid: int) -> str:
    """Return the beginning of a process's command, in one line."""
    try:
        process = psutil.Process(pid)
        program, *arguments = process.cmdline() or [process.name()]
        command = " ".join([os.path.basename(program), *arguments])
    except psutil.Error:
        return "a process that has ended"
    return single_line(command)[:COMMAND_CHARS]


def name_processes(others: Sequence[Other]) -> str:
    """Return the busiest processes, for a message."""
    named = ", ".join(map(str, others[:NAMED_PROCESSES]))
    return f"{named} and more" if len(others) > NAMED_PROCESSES else named


class Watch:
    """Samples the machine during a phase of a run, in a thread: nvidia-smi can take seconds.

    `findings` says at its end what made it incomparable. Another phase can begin then.
    """

    def __init__(self, device_kind: DeviceKind) -> None:
        self.energy_j = 0.0
        self.throttled = False
        self.slept_seconds = 0.0
        self.others_share = 0.0  # of all cores, used by processes that are not ours
        self._on_gpu = device_kind == "gpu" and platform.system() != "Darwin"  # one that nvidia-smi knows
        self._allowed_share = allowed_share(device_kind)
        self._there_before = gpu_processes() if self._on_gpu else set()
        self.others_on_gpu = bool(self._there_before)
        self._processes: list[psutil.Process] = []  # under watch, with what they start
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._sampled = 0.0
        self._wall = 0.0
        self._clock = 0.0
        self._others_cpu = 0.0
        self._before: dict[tuple[int, float], float] = {}  # what each process had used
        self._others: list[Other] = []

    def begin(self, *pids: int) -> None:
        """Begin with a phase of the processes `pids`: what happened before does not count.

        One that has ended already is not watched.
        """
        self.end()
        self._processes = []
        for pid in pids:
            with suppress(psutil.Error):
                self._processes.append(psutil.Process(pid))
        if not self._processes:
            return
        self.throttled = False
        self.slept_seconds = self.others_share = 0.0
        self._others = []
        self._over = threading.Event()
        self._wall = time.time()
        self._clock = self._sampled = time.monotonic()
        self._others_cpu = busy_seconds() - self._own_seconds()
        self._before = cpu_seconds()
        self._thread = threading.Thread(target=self._sample_until_over, daemon=True)
        self._thread.start()

    def _sample_until_over(self) -> None:
        while not self._over.wait(SAMPLE_EVERY):
            self.sample()

    def sample(self) -> None:
        """Look at power, heat and the other processes on the GPU."""
        now = time.monotonic()
        if self._on_gpu:
            watts, slowed = gpu_state()
            self.energy_j += watts * (now - self._sampled)
            self.throttled |= slowed
            self.others_on_gpu |= len(gpu_processes() - self._there_before) > OURS_ON_GPU
        elif platform.system() == "Darwin":
            self.throttled |= mac_state()["thermal_speed_limit"] < 100
        self._sampled = now

    def end(self) -> None:
        """End with the training: add up what others used. A second call changes nothing."""
        if not self._processes or self._thread is None:
            return
        elapsed = time.monotonic() - self._clock
        self.slept_seconds = time.time() - self._wall - elapsed
        others = busy_seconds() - self._own_seconds() - self._others_cpu
        if others > OTHERS_SECONDS:
            self.others_share = others / max(elapsed * len(usable_cores()), 1e-9)
            own = own_tree(os.getpid())
            self._others = busiest(self._before, cpu_seconds(), max(elapsed, 1e-9), own)
        self._processes = []
        self._over.set()
        self._thread.join()

    def findings(self) -> list[tuple[Flag, str]]:
        """Return (flag, what happened) for everything that sets the run apart."""
        found = []
        if self.slept_seconds > SLEPT_SECONDS:
            found.append((Flag.SLEPT, f"the machine slept {self.slept_seconds:.0f} s"))
        if self.throttled:
            found.append((Flag.THROTTLED, "the device was throttled (heat or power)"))
        if self.others_on_gpu:
            found.append((Flag.CONTENDED, "another process computed on the GPU"))
        if self.others_share > self._allowed_share:
            used = f"other processes used {100 * self.others_share:.0f}% of the CPU"
            named = f": {name_processes(self._others)}" if self._others else ""
            found.append((Flag.CONTENDED, used + named))
        return found

    def _own_seconds(self) -> float:
        """Return the CPU seconds of the launcher, the processes under watch and their children."""
        total = sum(os.times()[:4])
        for watched in self._processes:
            with suppress(psutil.Error):
                for process in [watched, *watched.children(recursive=True)]:
                    times = process.cpu_times()
                    total += times.user + times.system
                    total += getattr(times, "children_user", 0) + getattr(times, "children_system", 0)
        return total


def busy_seconds() -> float:
    """Return the CPU seconds spent by all processes since boot, on the cores that this one may use."""
    cores = set(usable_cores())
    each = [times for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in cores]
    return sum(times.user + times.system + getattr(times, "nice", 0.0) for times in each)


def gpu_processes() -> set[str]:
    """Return the ids of the processes that compute on the GPU."""
    query = "--query-compute-apps=pid"
    return set(output_of("nvidia-smi", f"--id={visible_gpu()}", query, "--format=csv,noheader").split())


def gpu_state() -> tuple[float, bool]:
    """Return (power in watts, whether heat or the power supply slows the GPU down)."""
    query = f"--query-gpu={','.join(GPU_STATE)}"
    csv = output_of("nvidia-smi", f"--id={visible_gpu()}", query, "--format=csv,noheader,nounits")
    line = csv.split("\n")[0]
    watts, *reasons = [cell.strip() for cell in line.split(",")]
    try:
        return float(watts), "Active" in reasons
    except ValueError:
        return 0.0, False
