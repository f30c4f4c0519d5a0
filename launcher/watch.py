"""What else happens on the machine while an experiment runs: other processes, sleep, throttling, power."""

import os
import platform
import subprocess
import time

import psutil

from backends.platforms import mac_state, output_of

OTHERS_CPU = 0.10       # share of all cores that other processes may use when the CPU is the device ...
OTHERS_CPU_HOST = 0.50  # ... and when it only feeds one
OTHERS_SECONDS = 2.0    # CPU seconds of others that are never called contention: a run of seconds has as much by chance
SLEPT = 2.0             # seconds that the wall clock may gain on the monotonic one
SAMPLE_EVERY = 5.0      # seconds


class Watch:
    """Samples the machine during a run. `marks` and `notes` say at the end what made it incomparable."""

    def __init__(self, backend):
        self.backend = backend
        self.gpu = backend in ("cuda", "mlx-cuda")
        self.strangers = self._gpu_processes()  # before our own process exists
        self.others_on_gpu, self.throttled, self.energy_j = bool(self.strangers), False, 0.0
        self.child, self._cpu, self._last = None, None, 0.0
        self.others_share, self._began = 0.0, None

    def begin(self, pid):
        """Training starts: what happened before does not count."""
        self.child, self._began = psutil.Process(pid), (time.time(), time.monotonic())
        self._cpu = self._busy(), self._own()
        self._last = time.monotonic()

    def sample(self):
        """Look around; call it often, it does little more than once in SAMPLE_EVERY seconds."""
        now = time.monotonic()
        if self._began is None or now - self._last < SAMPLE_EVERY:
            return
        if self.gpu:
            power, *reasons = self._gpu_state()
            self.energy_j += power * (now - self._last)
            self.throttled |= "Active" in reasons
            self.others_on_gpu |= len(self._gpu_processes() - self.strangers) > 1
        elif platform.system() == "Darwin":
            self.throttled |= mac_state()["thermal_speed_limit"] < 100
        self._last = now

    def end(self):
        """Training ended: settle the CPU's account."""
        if self._began is None or self._cpu is None:
            return
        wall, clock = time.time() - self._began[0], time.monotonic() - self._began[1]
        self.slept = wall - clock
        busy, own = self._busy() - self._cpu[0], self._own() - self._cpu[1]
        others = max(0.0, busy - own)
        self.others_share = others / max(clock * (os.cpu_count() or 1), 1e-9) if others > OTHERS_SECONDS else 0.0
        self._cpu = None

    def verdict(self):
        """(marks, notes): what the row must say."""
        found = []
        if getattr(self, "slept", 0.0) > SLEPT:
            found.append(("slept", f"the machine slept {self.slept:.0f} s"))
        if self.throttled:
            found.append(("throttled", "the device was throttled (heat or power)"))
        if self.others_on_gpu:
            found.append(("contended", "another process computed on the GPU"))
        allowed = OTHERS_CPU if self.backend in ("torch-cpu", "mlx-cpu") else OTHERS_CPU_HOST
        if self.others_share > allowed:
            found.append(("contended", f"other processes used {100 * self.others_share:.0f}% of the CPU"))
        return [mark for mark, _ in found], [note for _, note in found]

    def _busy(self):
        """CPU seconds spent by anyone since boot."""
        t = psutil.cpu_times()
        return t.user + t.system + getattr(t, "nice", 0.0)

    def _own(self):
        """CPU seconds spent by the launcher, the trainer and its children."""
        total = sum(os.times()[:4])
        try:
            for process in [self.child, *self.child.children(recursive=True)]:
                t = process.cpu_times()
                total += t.user + t.system + getattr(t, "children_user", 0) + getattr(t, "children_system", 0)
        except psutil.Error:
            pass
        return total

    def _gpu_processes(self):
        return set(output_of("nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader").split()) if self.gpu else set()

    def _gpu_state(self):
        """[power in watts, thermal slowdown, power brake]."""
        cells = output_of("nvidia-smi", "--query-gpu=power.draw,clocks_throttle_reasons.hw_thermal_slowdown,clocks_throttle_reasons.hw_power_brake_slowdown",
                          "--format=csv,noheader,nounits").split("\n")[0].split(",")
        try:
            return [float(cells[0])] + [cell.strip() for cell in cells[1:]]
        except ValueError:
            return [0.0]


class Awake:
    """Hold a Mac awake for the length of a run; nothing elsewhere."""

    def __enter__(self):
        self.process = None
        if platform.system() == "Darwin":
            self.process = subprocess.Popen(["caffeinate", "-dims", "-w", str(os.getpid())])

    def __exit__(self, *_):
        if self.process:
            self.process.terminate()
            self.process.wait()
