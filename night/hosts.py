"""
Other machines that lend their devices to a night, over SSH: hosts.yaml, and the connection to each.

    hosts:
      gpubox:                    # a name of yours; the one that ssh knows it by, unless `ssh` says another
        folder: autoresearch     # the checkout there, of the same version, with its extra fleet
        devices: all             # as --devices takes them

All goes through one ssh process for each host: the scheduler's port is forwarded to the host, and the
workers' ports to here. On the host night/lend.py answers.
"""

import json
import math
import os
import random
import re
import shlex
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backends.platforms import StartSizes
from backends.protocol import last_line
from launcher.console import say
from launcher.harness import harness_hash, hash_of_files
from launcher.ledger import BoardKey
from launcher.processes import Guarded, defer_signals, start_guarded
from night.devices import Device
from prepare import ROOT, STRICT, UserError, read_entries

BEAT_SECONDS = 5.0  # between the lines that tell a host that this night goes on
SSH_OPTIONS = (
    "-T",
    "-oBatchMode=yes",  # nobody is there to type a password
    "-oControlMaster=no",  # the ports of a shared connection would outlive the night
    "-oControlPath=none",
    "-oConnectTimeout=10",
    "-oServerAliveInterval=5",  # after three without an answer ssh ends, and with it the host's workers here
    "-oExitOnForwardFailure=yes",
)
FIRST_PAUSE = 5.0  # seconds before a connection is made anew; they double
LONGEST_PAUSE = 60.0
STEADY_SECONDS = 60.0  # a connection that held for so long was a good one
PORTS = range(20_000, 32_000)  # below those that a system gives away by itself
SSH_FAILED = 255  # the exit code that is ssh's own
NAME_RULE = "the name of a host has letters, digits, dots and hyphens"
REMEDIES = {  # parts of a board, and what to do where a host has another
    "fingerprint": "uv run autoresearch prepare --force there, or the same files",
    "boxed": "one of the two has no sandbox: autoresearch doctor",
    "device": "it is another device: give it a night of its own",
    "platform": "name one with --platform",
}


class Unreachable(UserError):
    """A host does not answer."""


@dataclass(frozen=True)
class Host:
    """A machine of hosts.yaml."""

    name: str
    folder: str  # of the checkout there
    ssh: str = ""  # user@host, as the command ssh takes it; the name if left out
    devices: str = "all"
    python: str = ".venv/bin/python"  # in the folder
    options: tuple[str, ...] = ()  # further ones of the command ssh
    __pydantic_config__ = STRICT

    def command(self, *forwards: str, do: str) -> list[str]:
        """Return the command that does something on the host. do: "describe" or "lend", see night/lend.py"""
        there = f"cd {quote_path(self.folder)} && exec {quote_path(self.python)} -m night.lend {do}"
        return ["ssh", *SSH_OPTIONS, *self.options, *forwards, self.ssh or self.name, there]


def quote_path(path: str) -> str:
    """Return a path as a shell takes it. A ~ at its beginning stays the home of the user there."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)


@dataclass(frozen=True)
class LentDevices:
    """What a host said of itself, and the devices that it lends. Their names begin with the host's."""

    host: str
    devices: tuple[Device, ...]
    board: BoardKey  # that its runs stand on
    facts: dict[str, Any]  # of its machine: platforms.Facts
    platform: str
    start: dict[str, Any]  # the size that its speed gives: platforms.StartSizes


def read_hosts(path: Path) -> list[Host]:
    """Return the hosts of a file. Raises UserError, which names the line."""

    def check(host: Host) -> tuple[tuple[str, ...], str] | None:
        return None if is_name(host.name) else ((), NAME_RULE)

    return list(read_entries(path, "hosts", Host, check).values())


def is_name(text: str) -> bool:
    """Return whether a text may be the name of a host."""
    return re.fullmatch(r"\w[\w.-]*", text) is not None


def ask_host(host: Host, asked: dict[str, Any]) -> LentDevices:
    """Return what a host says of itself. It prepares the track, which can take minutes the first time.

    asked: platform, track, budget

    Raises:
        Unreachable: it does not answer.
        UserError: its checkout is not as this one.
    """
    question = json.dumps({**asked, "devices": host.devices})
    said = ""
    try:
        with subprocess.Popen(
            host.command(do="describe"),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdin and child.stdout and child.stderr
            with suppress(BrokenPipeError):
                child.stdin.write(question)
                child.stdin.close()
            for line in child.stderr:
                said = line.strip() or said
                say(f"{host.name}: {said}")
            answer = child.stdout.read().strip().splitlines()[-1:]
    except OSError as error:
        raise UserError(f"ssh: {error}") from None
    if child.returncode == SSH_FAILED:
        try_it = shlex.join(["ssh", *host.options, host.ssh or host.name, "ls", host.folder])
        raise Unreachable(f"host {host.name} does not answer ({said}): does `{try_it}` work?")
    if child.returncode or not answer:
        raise UserError(f"host {host.name}: exit code {child.returncode}: {said or 'it said nothing'}")
    return read_answer(host.name, answer[0])


def read_answer(name: str, text: str) -> LentDevices:
    """Return what a host said, given as JSON: see lend.describe.

    Raises:
        UserError: it said what is wrong, or its harness is another.
    """
    try:
        said = json.loads(text)
        if said["error"]:
            raise UserError(f"host {name}: {said['error']}")
        for what, theirs, ours in (
            ("harness", said["harness"], harness_hash()),
            ("code of the night", said["night"], night_hash()),
        ):
            if theirs != ours:
                raise UserError(
                    f"host {name}: its {what} is {theirs}, here it is {ours}: bring both to one commit, and "
                    "platforms.yaml to one text"
                )
        devices = map(Device.from_json, said["devices"])
        return LentDevices(
            name,
            tuple(replace(one, name=f"{name}/{one.name.rpartition('/')[2]}", host=name) for one in devices),
            BoardKey(**said["board"]),
            said["facts"],
            said["platform"],
            said["start"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"host {name}: its answer is not understood ({type(error).__name__}: {error}): is its checkout "
            "of another version?"
        ) from None


def night_hash() -> str:
    """Return the content hash of the code that does what a night asks for."""
    return hash_of_files(sorted((ROOT / "night").glob("*.py")))


def require_same_board(lent: LentDevices, board: BoardKey, start: StartSizes) -> None:
    """Raise UserError where the runs of a host are not as those of the night.

    Args:
        lent: what the host said.
        board: that the night's runs stand on.
        start: the size that their trainer starts with.
    """
    if lent.start != asdict(start):
        raise UserError(
            f"host {lent.host}: there the platform {lent.platform} starts with {lent.start}, here with "
            f"{asdict(start)}, as its speed was measured: give it a night of its own, or state the size in "
            "both platforms.yaml"
        )
    for name, theirs, ours in zip(BoardKey._fields, lent.board, board, strict=True):
        if theirs != ours:
            remedy = REMEDIES.get(name, "bring both to one commit")
            raise UserError(f"host {lent.host}: {name} {theirs} there, {ours} here: {remedy}")


class Link:
    """The connection over which a host lends its devices. It is made anew when it breaks.

    Call `tend` every few seconds.
    """

    def __init__(
        self, host: Host, lent: LentDevices, port: int, certificate: dict[str, str], log: Path
    ) -> None:
        """
        Args:
            host: to connect to.
            lent: its devices.
            port: of the scheduler, on this machine.
            certificate: of the night: see night/tls.py.
            log: takes what ssh and the host print.
        """
        self.host = host
        self.lent = lent
        self.port = port
        self.certificate = certificate
        self.log = log
        self.child: Guarded | None = None
        self.began = 0.0  # of time.monotonic()
        self.not_before = 0.0  # likewise
        self.broke = -math.inf  # likewise: when a connection ended last
        self.pause = FIRST_PAUSE
        self.why = ""  # the last connection ended, as it was told

    @property
    def is_shaky(self) -> bool:
        """There is no connection, or it is a new one: what failed there may be its fault."""
        is_up = self.child is not None and self.child.poll() is None
        return not is_up or time.monotonic() - self.broke < STEADY_SECONDS

    def tend(self) -> str:
        """Connect where there is no connection. Returns why the last one ended, when that is new."""
        now = time.monotonic()
        if self.child and self.child.poll() is None:
            return ""
        news = ""
        if self.child:
            code = self.child.returncode
            self.end()
            why = f"host {self.host.name}: the connection ended ({code}): {last_line(self.log)}"
            was_steady = now - self.began > STEADY_SECONDS
            news = why if was_steady or why != self.why else ""
            self.why = why
            self.broke = now
            self.pause = FIRST_PAUSE if was_steady else min(2 * self.pause, LONGEST_PAUSE)
            self.not_before = now + self.pause
        if now >= self.not_before:
            self.connect()
        return news

    def connect(self) -> None:
        """Start ssh, and tell the host what to lend to whom."""
        count = len(self.lent.devices)
        scheduler_port, *ports_there = random.sample(PORTS, count + 1)
        ports_here = random.sample(PORTS, count)
        forwards = [f"-R127.0.0.1:{scheduler_port}:127.0.0.1:{self.port}"]
        workers = []
        for device, port_there, port_here in zip(self.lent.devices, ports_there, ports_here, strict=True):
            forwards.append(f"-L127.0.0.1:{port_here}:127.0.0.1:{port_there}")
            workers.append({"device": asdict(device), "port_there": port_there, "port_here": port_here})
        order = {
            "scheduler": f"tls://127.0.0.1:{scheduler_port}",
            "certificate": self.certificate,
            "workers": workers,
        }
        reading, writing = os.pipe()
        self.began = time.monotonic()
        with defer_signals(), open(self.log, "wb") as said:
            self.child = start_guarded(
                self.host.command(*forwards, do="lend"),
                cwd=ROOT,
                env=dict(os.environ),
                stdin=reading,
                stdout=said,
                stderr=said,
            )
        os.close(reading)
        threading.Thread(target=beat, args=(writing, json.dumps(order)), daemon=True).start()

    def end(self) -> None:
        """End the connection, and with it what the host does for this night."""
        if self.child:
            self.child.end()
            self.child = None


def beat(pipe: int, order: str) -> None:
    """Write an order, and then an empty line every few seconds until nothing reads them any more."""
    with suppress(OSError), open(pipe, "wb", buffering=0) as to_host:
        to_host.write(order.encode() + b"\n")
        while True:
            time.sleep(BEAT_SECONDS)
            to_host.write(b"\n")
