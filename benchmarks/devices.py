"""
What many devices cost the process that decides: its work for each result of a night over 1 to 1,000 of them.

    uv run python benchmarks/devices.py [--devices 1 10 100 1000] [--results 100] [--home DIR] [--plot FILE]

Each night is the real one (night/fleet.py) in a clone of the committed repository, over a ledger of 400
made-up runs of its board. Made up are the devices: a job is done a second after it was given, and what the
launcher on its device does then (the verdict and the row, under the ledger's lock) is timed apart. Agents are
made up too: an edit is a commit of one comment, made without a process. Counted is the CPU time of this
process and of git, for the last --results of a night: as many others, and at least as many as there are
devices, come before them. The last lines are for grep.
"""

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEFORE = 400  # runs in the ledger: more than the belief looks at
JOB_SECONDS = 1.0


def main() -> None:
    """Measure a night for each number of devices, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 10, 100, 1000])
    parser.add_argument("--results", type=int, default=100, help="that count")
    parser.add_argument("--home", type=Path, help="an empty folder to work in; a temporary one if left out")
    parser.add_argument("--plot", type=Path, help="a new .svg of the cost over the number of devices")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside is not None:
        run_inside(asked.inside, asked.results)
        return
    home = asked.home or Path(tempfile.mkdtemp(prefix="devices-"))
    costs = [measure(count, asked.results, home) for count in asked.devices]
    if asked.plot:
        plot(asked.devices, costs, asked.plot)
    if not asked.home:
        shutil.rmtree(home)


def measure(count: int, results: int, home: Path) -> tuple[float, float]:
    """Run a night over so many devices. Returns the seconds a result of the driver, and of the device."""
    from rows import run_in_clone

    said = run_in_clone(home, "devices.py", "--inside", str(count), "--results", str(results))
    print(f"devices_{count}{said}", flush=True)
    driver, device = re.findall(r"([\d.]+) s of", said)
    return float(driver), float(device)


def plot(counts: Sequence[int], costs: Sequence[tuple[float, float]], path: Path) -> None:
    """Draw the cost of a result over the number of devices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for values, name in zip(zip(*costs, strict=True), ("the driver", "verdict and row"), strict=True):
        axes.plot(counts, values, marker="o", label=name)
    axes.set(xscale="log", xlabel="devices", ylabel="seconds a result", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path)


class MadeUpWorkers:
    """Devices that do nothing but wait.

    Attributes:
        seconds: of CPU, for each job what the launcher on its device did.
    """

    def __init__(self, count: int) -> None:
        from night.devices import Device

        self.devices = [Device(f"cpu{number}", "cpu") for number in range(count)]
        self.seconds: list[float] = []

    def __enter__(self) -> "MadeUpWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def tend(self) -> list[str]:
        return []

    def is_shaky(self, device: str) -> bool:
        return False

    def missing(self) -> set[str]:
        return set()

    def submit(self, job: Any, device: str) -> "MadeUpFuture":
        return MadeUpFuture(job, self.seconds)


class MadeUpFuture:
    """A job that is done a second after it was given. seconds: takes the CPU time of its device."""

    def __init__(self, job: Any, seconds: list[float]) -> None:
        self.job = job
        self.seconds = seconds
        self.began = time.monotonic()

    def done(self) -> bool:
        return time.monotonic() > self.began + JOB_SECONDS

    def result(self) -> Any:
        from night.job import work

        began = cpu_seconds()
        answer = work(self.job)
        self.seconds.append(cpu_seconds() - began)
        return answer

    def cancel(self) -> None:
        raise NotImplementedError


def cpu_seconds() -> float:
    """Return the CPU time of this process, and of its children that ended."""
    return sum(os.times()[:4])


def run_inside(count: int, results: int) -> None:
    """Run a night over so many devices in the clone that this process was started in."""
    benchmarks, sys.path[0] = sys.path[0], os.getcwd()  # benchmarks/ has a night.py of its own
    sys.path.append(benchmarks)
    from rows import made_up_result, write_runs

    from launcher import run as runner
    from launcher.child import Outcome
    from launcher.setting import resolve
    from night import repo
    from night.agent import Answer
    from night.agents import parse_agent
    from night.fleet import Fleet
    from night.loop import run_night
    from night.plan import Night
    from night.state import Edit

    chance = random.Random(3)
    ended: list[float] = []  # of each result: the CPU time so far

    class Timed(Fleet):
        """A night whose agents take no time."""

        def check_agent(self) -> None:
            return

        def ask_agents(self) -> None:
            if self.is_enough_asked():
                return
            for _ in range(len(self.free_devices()) - len(self.idle_edits())):
                text = f"comment {chance.getrandbits(64)}"
                source = repo.content("HEAD", self.trainer.name) + f"# {text}\n".encode()
                commit = repo.commit_alone(self.trainer.name, text, source)
                self.waiting.add(Edit(commit, repo.head(), Answer(text), "made up"))
            self.give_work()  # as after the end of an agent

        def record_experiment(self, row: Any) -> None:
            super().record_experiment(row)
            ended.append(cpu_seconds())

    runner.supervise = lambda trainer, run_dir, *_: made_up_result(chance, run_dir)
    runner.dry_run = lambda *_: (Outcome(), "")
    setting = resolve("cpu")
    write_runs(BEFORE, setting)
    workers = MadeUpWorkers(count)
    most = max(count, results) + results
    night = Night(parse_agent("true"), setting, experiments=most, confirms=False, pause=0.0)
    code = run_night(night, lambda night, panel: Timed(night, panel, workers, count))
    if code or len(ended) != most:
        raise SystemExit(f"exit code {code} after {len(ended)} results")
    device = sum(workers.seconds[-results:]) / results
    driver = (ended[-1] - ended[-results - 1]) / results - device
    print(f"measured: {driver:.3f} s of the driver; {device:.3f} s of the device for verdict and row")


if __name__ == "__main__":
    main()
