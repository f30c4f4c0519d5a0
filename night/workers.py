"""
A worker process for each device of a night, and the jobs that it does: dask.distributed.

It is an optional package: uv sync --extra fleet. A worker that is killed is started again, and the job that
it did has failed. Where this process ends, however it ends, the workers end, and with a worker its job.

Devices of other machines are lent: hosts have them over SSH (night/hosts.py), or they have joined a scheduler
that exists already (`autoresearch lend`). What such a worker runs comes back with its job's answer.
"""

import importlib.util
import ipaddress
import json
import os
import socket
import subprocess
import sys
import time
from asyncio import CancelledError
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from backends.protocol import last_line, write_json
from launcher.carried import pack_run, unpack_run
from launcher.processes import start_guarded
from launcher.runs import scratch_folder
from night.devices import Device
from night.hosts import Host, LentDevices, Link, read_answer
from night.job import LOST, Job, JobAnswer
from night.tls import make_certificate, make_security
from prepare import ROOT, UserError, first_line

NAME_VARIABLE = "AUTORESEARCH_WORKER"  # the name of a worker's device
WORKER_SECONDS = 60.0  # in which all workers must be there
CERTIFICATES = ("ca-file", "client.cert", "client.key", "worker.cert", "worker.key")
JOIN_SECONDS = 15.0  # in which a scheduler that exists answers
ASK_SECONDS = 1800.0  # in which a lent machine says what it is: it may have to prepare the track
DEVICE_VARIABLE = "AUTORESEARCH_DEVICE"  # a worker's device, as JSON
LONGEST_ERROR = 300  # characters of what a program printed
START_TRIES = 3
POLL_SECONDS = 0.1  # between looks whether a job has ended


class Future(Protocol):
    """A job under way: the part of dask's Future that is used here."""

    def done(self) -> bool: ...

    def result(self) -> JobAnswer: ...

    def cancel(self) -> Any: ...


@dataclass(frozen=True)
class Pool:
    """The devices that a night or a comparison has, here and elsewhere."""

    here: Sequence[Device] = ()
    hosts: Sequence[tuple[Host, LentDevices]] = ()  # over SSH
    scheduler: str = ""  # the address of one that exists, in place of one of our own
    joined: Sequence[LentDevices] = ()  # to it

    @property
    def lent(self) -> list[LentDevices]:
        """What other machines lend."""
        return [*(lent for _, lent in self.hosts), *self.joined]

    @property
    def devices(self) -> list[Device]:
        """All devices, those of this machine first."""
        return [*self.here, *(device for lent in self.lent for device in lent.devices)]


def prepare_dask() -> None:
    """Have dask print nothing of its own. It must come before dask is imported.

    Raises:
        UserError: what several devices need is not installed.
    """
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")
    for package in ("distributed", "cryptography"):
        if importlib.util.find_spec(package) is None:
            raise UserError("several devices need the extra fleet: uv sync --extra fleet", 2)


# Ctrl-C in a terminal reaches every process of the night. Who runs the night ends the workers, which would
# print a traceback each. A handler rather than SIG_IGN: a worker's jobs would inherit SIG_IGN.
IGNORE_SIGINT = "import signal; signal.signal(signal.SIGINT, lambda *_: None)"


def nanny_options(device: Device, scratch: str, security: Any) -> dict[str, Any]:
    """Return the options of dask's Nanny for the worker of a device. scratch: a folder"""
    return {
        "nthreads": 1,
        "resources": {device.name: 1},
        "env": {
            **device.environment(),
            NAME_VARIABLE: device.name,
            DEVICE_VARIABLE: json.dumps(asdict(device)),
            "DASK_TEMPORARY_DIRECTORY": scratch,
        },
        "memory_limit": 0,  # the trainer has its own limits
        "preload": [IGNORE_SIGINT],
        "dashboard": False,
        "local_directory": scratch,
        "security": security,
    }


def start_cluster(devices: Sequence[Device], security: Any, stack: ExitStack) -> Any:
    """Return a cluster with a worker for each device, which ends when the stack is closed.

    Raises:
        RuntimeError, OSError, TimeoutError: a worker does not start.
    """
    import dask
    from distributed import Nanny, Scheduler, SpecCluster

    scratch = str(stack.enter_context(scratch_folder()))
    # A job that failed with its worker is the loop's to repeat: it knows whether there is time.
    dask.config.set({"temporary-directory": scratch, "distributed.scheduler.allowed-failures": 0})
    workers = {
        device.name: {"cls": Nanny, "options": nanny_options(device, scratch, security)} for device in devices
    }
    options = {
        "host": "127.0.0.1",
        "port": 0,
        "protocol": "tls",
        "dashboard": False,
        "dashboard_address": "127.0.0.1:0",  # it opens one all the same
        "security": security,
    }
    scheduler = {"cls": Scheduler, "options": options}
    return stack.enter_context(
        SpecCluster(workers=workers, scheduler=scheduler, security=security, silence_logs=50)
    )


class Workers:
    """A worker for each device, while the `with` block runs."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        """Take the devices. Raises UserError without dask.

        folder: for what the jobs print, a file for each device
        """
        prepare_dask()
        self.pool = pool
        self.devices = pool.devices
        self.folder = folder
        self._stack = ExitStack()
        self._client: Any = None
        self._links: list[Link] = []

    def __enter__(self) -> "Workers":
        """Start the workers. Raises UserError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tries = 0
        while True:
            tries += 1
            try:
                with ExitStack() as stack:
                    self._start(stack)
                    self._stack = stack.pop_all()
                return self
            except (RuntimeError, OSError, TimeoutError) as error:  # a worker died while it started
                if tries == START_TRIES:
                    raise UserError(f"the workers of the devices do not start: {first_line(error)}") from None

    def _start(self, stack: ExitStack) -> None:
        """Start a scheduler and the workers, or join the scheduler that exists."""
        from distributed import Client

        if self.pool.scheduler:
            security = security_for(self.pool.scheduler, is_open=True)  # that was asked at the door
            self._client = stack.enter_context(join_scheduler(self.pool.scheduler, security))
            return
        certificate = make_certificate()
        security = make_security(certificate)
        cluster = start_cluster(self.pool.here, security, stack)
        self._client = stack.enter_context(Client(cluster, security=security))
        port = urlsplit(cluster.scheduler_address).port
        self._links = [
            Link(host, lent, port, certificate, self.folder / f"{host.name}.log")
            for host, lent in self.pool.hosts
        ]
        for link in self._links:
            stack.callback(link.end)
        self.tend()

    def __exit__(self, *_: object) -> None:
        """End the workers, and with them what they do."""
        self._stack.close()

    def tend(self) -> list[str]:
        """Connect to hosts whose connection ended. Returns a line for each that did since the last call.

        Raises:
            UserError: the scheduler has ended.
        """
        if self._client.status in ("closed", "closing"):
            raise UserError(f"the scheduler {self.pool.scheduler} has ended")
        return [why for why in (link.tend() for link in self._links) if why]

    def missing(self) -> set[str]:
        """Return the names of the devices that have no worker now."""
        return {device.name for device in self.devices} - names_of_workers(self._client)

    def is_shaky(self, device: str) -> bool:
        """Return whether what failed on a device may be the fault of the connection to its host."""
        host = device.partition("/")[0]
        return any(link.is_shaky for link in self._links if link.host.name == host)

    def submit(self, job: Job, device: str) -> Future:
        """Have a job done by the worker of a device, given its name."""
        is_lent = device not in [one.name for one in self.pool.here]
        data = replace(job, is_lent=is_lent).to_json()
        folder = "" if is_lent else str(self.folder)
        future: Future = self._client.submit(do_job, data, folder, pure=False, resources={device: 1})
        return future


def names_of_workers(client: Any) -> set[str]:
    """Return the names of the devices that have a worker now. A scheduler may have other workers too."""
    found = client.scheduler_info(n_workers=-1)["workers"].values()
    return {str(worker["name"]) for worker in found if worker["name"] in worker["resources"]}


# ---------------------------------------------------------------------------
# A scheduler that exists
# ---------------------------------------------------------------------------


def security_for(address: str, is_open: bool) -> Any:
    """Return how to talk to a scheduler. The certificates for tls:// are those of dask's own configuration.

    is_open: to talk without encryption was asked for by name

    Raises:
        UserError: there are none, or the address is not of this machine and has no encryption.
    """
    prepare_dask()
    from distributed.security import Security

    try:
        parts = urlsplit(address)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("tcp", "tls") or not parts.hostname:
        raise UserError(f"{address!r} is no address of a scheduler: tls://HOST:PORT, as dask prints it", 2)
    if parts.scheme == "tls":
        import dask

        if not all(dask.config.get(f"distributed.comm.tls.{name}") for name in CERTIFICATES):
            raise UserError(
                f"tls:// needs certificates in dask's configuration, below distributed.comm.tls: "
                f"{', '.join(CERTIFICATES)} (docs/fleet.md)",
                2,
            )
        return Security(require_encryption=True)
    if not is_open and not is_loopback(parts.hostname):
        raise UserError(
            f"{address} has neither encryption nor a password, and whoever reaches it runs code as you: "
            "tls://, or --open where nobody else reaches that network",
            2,
        )
    return Security()


def is_loopback(host: str) -> bool:
    """Return whether a host's name or address is this machine itself."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(each[4][0])).is_loopback for each in found)


def join_scheduler(address: str, security: Any) -> Any:
    """Return a client of a scheduler that exists. Raises OSError, TimeoutError."""
    from distributed import Client

    return Client(address, security=security, timeout=JOIN_SECONDS)


def ask_scheduler(address: str, security: Any, asked: dict[str, Any]) -> list[LentDevices]:
    """Return what the machines say of themselves that have joined a scheduler.

    Args:
        address: of the scheduler.
        security: dask's.
        asked: as lend.describe takes it.

    Raises:
        UserError: it cannot be reached, none has joined, or one is not as this checkout.
    """
    try:
        with join_scheduler(address, security) as client:
            names = sorted(names_of_workers(client))
            if not names:
                raise UserError(f"no device has joined {address}: autoresearch lend {address}")
            futures = [client.submit(describe_here, asked, pure=False, resources={name: 1}) for name in names]
            told = [future.result(timeout=ASK_SECONDS) for future in futures]
    except UserError:
        raise
    except Exception as error:  # of dask's, or of a worker that died
        raise UserError(f"the scheduler {address} or a device of it fails: {first_line(error)}") from None
    return [read_answer(name.partition("/")[0], text) for name, text in zip(names, told, strict=True)]


def describe_here(asked: dict[str, Any]) -> str:
    """Return what this worker's machine says of itself and of its one device, as JSON: see night/lend.py."""
    question = {**asked, "devices": [json.loads(os.environ[DEVICE_VARIABLE])]}
    done = subprocess.run(
        [sys.executable, "-m", "night.lend", "describe"],
        cwd=ROOT,
        input=json.dumps(question),
        capture_output=True,
        text=True,
    )
    said = done.stdout.strip().splitlines()
    return said[-1] if said else json.dumps({"error": done.stderr.strip()[-LONGEST_ERROR:] or "no answer"})


# ---------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------


def result_of(future: Future) -> JobAnswer:
    """Return the answer of a job that is done, LOST where its worker ended before."""
    try:
        return future.result()
    except (Exception, CancelledError) as error:
        return JobAnswer(status=LOST, reason=f"its worker ended: {type(error).__name__}")


def take_run(answer: JobAnswer, expected: Mapping[str, Any]) -> JobAnswer:
    """Add the run of another machine to those of this one, and return the answer.

    Where the run is not the expected one, or cannot be written, an answer that says so is returned.

    expected: see carried.unpack_run
    """
    try:
        unpack_run(answer.run, answer.files, expected)
    except (UserError, OSError, TypeError, ValueError) as error:
        return JobAnswer(status="error", reason=first_line(error))
    return answer


def is_wanted() -> bool:
    """Return whether the night still waits for what this worker does.

    Over a scheduler that exists a worker outlives the night.
    """
    from distributed import get_worker

    try:
        worker = get_worker()
        task = worker.state.tasks.get(worker.get_current_task())
    except ValueError:  # it is no worker
        return True
    return task is not None and task.state == "executing"


def do_job(data: dict[str, Any], folder: str) -> JobAnswer:
    """Do a job in a process of its own, in a worker. folder: for what it prints, "" for none."""
    name = os.environ.get(NAME_VARIABLE, "device")
    with scratch_folder() as scratch:
        asked, answer = scratch / "job.json", scratch / "answer.json"
        write_json(asked, data)
        log = Path(folder or scratch) / f"{name.replace('/', '-')}.log"
        with open(log, "wb") as said:
            child = start_guarded(
                [sys.executable, "-m", "night.job", str(asked), str(answer)],
                cwd=ROOT,
                env=dict(os.environ),
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        try:
            while child.poll() is None and is_wanted():
                time.sleep(POLL_SECONDS)
        finally:
            child.end()
        try:
            told = JobAnswer(**json.loads(answer.read_text()))
        except (OSError, ValueError, TypeError):
            where = "" if data.get("is_lent") else f": {log}"
            last = last_line(log)
            reason = f"the job on {name} ended with exit code {child.returncode}: {last}{where}"
            return JobAnswer(status="error", reason=reason)
    return replace(told, files=pack_run(told.run)) if data.get("is_lent") and told.run else told
