"""
A worker process for each device of a night, and the jobs that it does: dask.distributed.

It is an optional package: uv sync --extra fleet. A worker that is killed is started again, and the job that
it did has failed. Where this process ends, however it ends, the workers end, and with a worker its job.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from asyncio import CancelledError
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from backends.protocol import write_json
from launcher.processes import start_guarded
from launcher.runs import scratch_folder
from night.devices import Device
from night.job import Job, JobAnswer
from prepare import ROOT, UserError, first_line

NAME_VARIABLE = "AUTORESEARCH_WORKER"  # the name of a worker's device
WORKER_SECONDS = 60.0  # in which all workers must be there
START_TRIES = 3
POLL_SECONDS = 0.1  # between looks whether a job has ended


class Future(Protocol):
    """A job under way: the part of dask's Future that is used here."""

    def done(self) -> bool: ...

    def result(self) -> JobAnswer: ...

    def cancel(self) -> Any: ...


def start_workers(devices: Sequence[Device], stack: ExitStack) -> Any:
    """Return a client of workers, one for each device, which end when the stack is closed.

    Raises:
        RuntimeError, OSError, TimeoutError: a worker does not start.
    """
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")  # dask reads it when it is imported
    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster

    scratch = str(stack.enter_context(scratch_folder()))
    # A job that failed with its worker is the loop's to repeat: it knows whether there is time.
    dask.config.set({"temporary-directory": scratch, "distributed.scheduler.allowed-failures": 0})
    workers = {
        device.name: {
            "cls": Nanny,
            "options": {
                "nthreads": 1,
                "resources": {device.name: 1},
                "env": {
                    **device.environment(),
                    NAME_VARIABLE: device.name,
                    "DASK_TEMPORARY_DIRECTORY": scratch,
                },
                "memory_limit": 0,  # the trainer has its own limits
                "local_directory": scratch,
                "dashboard": False,
            },
        }
        for device in devices
    }
    options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": None}
    scheduler = {"cls": Scheduler, "options": options}
    cluster = stack.enter_context(SpecCluster(workers=workers, scheduler=scheduler, silence_logs=50))
    client = stack.enter_context(Client(cluster))
    client.wait_for_workers(len(devices), timeout=WORKER_SECONDS)
    return client


class Workers:
    """A worker for each device, while the `with` block runs."""

    def __init__(self, devices: Sequence[Device], folder: Path) -> None:
        """Take the devices. Raises UserError without dask.

        folder: for what the jobs print, a file for each device
        """
        if importlib.util.find_spec("distributed") is None:
            raise UserError("several devices need the extra fleet: uv sync --extra fleet", 2)
        self.devices = devices
        self.folder = folder
        self._stack = ExitStack()
        self._client: Any = None

    def __enter__(self) -> "Workers":
        """Start the workers. Raises UserError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tries = 0
        while True:
            tries += 1
            try:
                with ExitStack() as stack:
                    self._client = start_workers(self.devices, stack)
                    self._stack = stack.pop_all()
                return self
            except (RuntimeError, OSError, TimeoutError) as error:  # a worker died while it started
                if tries == START_TRIES:
                    raise UserError(f"the workers of the devices do not start: {first_line(error)}") from None

    def __exit__(self, *_: object) -> None:
        """End the workers, and with them what they do."""
        self._stack.close()

    def missing(self) -> set[str]:
        """Return the names of the devices that have no worker now."""
        there = {
            str(worker["name"]) for worker in self._client.scheduler_info(n_workers=-1)["workers"].values()
        }
        return {device.name for device in self.devices} - there

    def submit(self, job: Job, device: str) -> Future:
        """Have a job done by the worker of a device, given its name."""
        future: Future = self._client.submit(
            do_job, job.to_json(), str(self.folder), pure=False, resources={device: 1}
        )
        return future


def result_of(future: Future) -> JobAnswer:
    """Return the answer of a job that is done; of one that failed with its worker, an error."""
    try:
        return future.result()
    except (Exception, CancelledError) as error:
        return JobAnswer(status="error", reason=f"its worker ended: {type(error).__name__}")


def do_job(data: dict[str, Any], folder: str) -> JobAnswer:
    """Do a job in a process of its own, in a worker. folder: for what it prints, where there is one."""
    name = os.environ.get(NAME_VARIABLE, "device")
    place = Path(folder)
    with scratch_folder() as scratch:
        asked, answer = scratch / "job.json", scratch / "answer.json"
        write_json(asked, data)
        log = (place if place.is_dir() else scratch) / f"{name}.log"
        with open(log, "wb") as said:
            child = start_guarded(
                [sys.executable, "-m", "night.job", str(asked), str(answer)],
                cwd=ROOT,
                env=dict(os.environ),
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        try:
            while child.poll() is None:
                time.sleep(POLL_SECONDS)
        finally:
            child.end()
        try:
            return JobAnswer(**json.loads(answer.read_text()))
        except (OSError, ValueError, TypeError):
            reason = f"the job on {name} ended with exit code {child.returncode}: {log}"
            return JobAnswer(status="error", reason=reason)
