"""
Other machines that lend their devices to a night, over SSH: hosts.yaml, and the connection to each.

    hosts:
      gpubox:                    # a name of yours; the one that ssh knows it by, unless `ssh` says another
        folder: autoresearch     # the checkout there, of the same version, with its extra fleet
        devices: all             # as --devices takes them

All goes through one ssh process for each host: the scheduler's port is forwarded to the host, and the
workers' ports to here. On the host it is night/lend.py that talks.
"""

import json
import os
import random
import shlex
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.protocol import last_line
from launcher.harness import harness_hash
from launcher.ledger import BoardKey
from launcher.processes import Guarded, defer_signals, start_guarded
from night.devices import Device
from prepare import ROOT, STRICT, UserError, read_entries

BEAT_SECONDS = 5.0  # between the lines that tell a host that this night goes on
SSH_OPTIONS = (
    "-oBatchMode=yes",  # nobody is there to type a password
    "-oConnectTimeout=10",
    "-oServerAliveInterval=5",  # after three without an answer ssh ends, and with it the host's workers here
    "-oExitOnForwardFailure=yes",
)
FIRST_PAUSE = 5.0  # seconds before a connection is made anew; they double
LONGEST_PAUSE = 60.0
STEADY_SECONDS = 60.0  # a connection that held for so long was a good one
PORTS = range(20_000, 32_000)  # below those that a system gives away by itself
CLOCK_SECONDS = 60.0  # by which a host's clock may be off without a word
DIFFERENCES = {  # parts of a board, and what to do where a host has another
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
        # The shell there replaces a ~ that no quotes keep from it.
        home, folder = ("~/", self.folder[2:]) if self.folder.startswith("~/") else ("", self.folder)
        there = f"cd {home}{shlex.quote(folder)} && exec {shlex.quote(self.python)} -m night.lend {do}"
        return ["ssh", *SSH_OPTIONS, *self.options, *forwards, self.ssh or self.name, there]


@dataclass(frozen=True)
class LentDevices:
    """What a host said of itself, and the devices that it lends. All are bound to the host by its name."""

    host: str
    devices: tuple[Device, ...]
    board: BoardKey  # that its runs stand on
    facts: dict[str, Any]  # of its machine: platforms.Facts
    platform: str


def read_hosts(path: Path) -> list[Host]:
    """Return the hosts of a file. Raises UserError, which names the line."""

    def check(host: Host) -> tuple[str, str] | None:
        if not host.name.replace("-", "").replace(".", "").isalnum():
            return "folder", "the name of a host has letters, digits, dots and hyphens"
        return None

    return list(read_entries(path, "hosts", Host, check).values())


def ask_host(host: Host, asked: dict[str, Any]) -> LentDevices:
    """Return what a host says of itself. It prepares the track, which can take minutes the first time.

    asked: platform, track, budget

    Raises:
        Unreachable: it does not answer.
        UserError: its checkout is not as this one.
    """
    question = json.dumps({**asked, "devices": host.devices})
    try:
        done = subprocess.run(
            host.command(do="describe"), cwd=ROOT, input=question, stdout=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise UserError(f"ssh: {error}") from None
    answer = done.stdout.strip().splitlines()[-1:]
    if done.returncode or not answer:
        raise Unreachable(
            f"host {host.name}: no answer (exit code {done.returncode}): does "
            f"`{shlex.join(['ssh', *host.options, host.ssh or host.name, 'ls', host.folder])}` work?"
        )
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
        if said["harness"] != harness_hash():
            raise UserError(
                f"host {name}: its harness is {said['harness']}, here it is {harness_hash()}: bring both to "
                "one commit, and platforms.yaml to one text"
            )
        devices = map(Device.from_json, said["devices"])
        return LentDevices(
            name,
            tuple(replace(one, name=f"{name}/{one.name}", host=name) for one in devices),
            BoardKey(**said["board"]),
            said["facts"],
            said["platform"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"host {name}: it speaks another language ({type(error).__name__}: {error})"
        ) from None


def require_same_board(lent: LentDevices, board: BoardKey) -> None:
    """Raise UserError where the runs of a host do not stand on the board of the night."""
    for name, theirs, ours in zip(BoardKey._fields, lent.board, board, strict=True):
        if theirs != ours:
            remedy = DIFFERENCES.get(name, "bring both to one commit")
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
        self.pause = FIRST_PAUSE

    def tend(self) -> str:
        """Connect where there is no connection. Returns why the last one ended, when it has just ended."""
        now = time.monotonic()
        if self.child and self.child.poll() is None:
            return ""
        why = ""
        if self.child:
            self.end()
            why = f"host {self.host.name}: the connection ended: {last_line(self.log, 'ssh said nothing')}"
            self.pause = FIRST_PAUSE if now - self.began > STEADY_SECONDS else self.pause * 2
            self.pause = min(self.pause, LONGEST_PAUSE)
            self.not_before = now + self.pause
        if now >= self.not_before:
            self.connect()
        return why

    def connect(self) -> None:
        """Start ssh, and tell the host what to lend to whom."""
        there = random.choice(PORTS)
        forwards = [f"-R127.0.0.1:{there}:127.0.0.1:{self.port}"]
        workers = []
        for device, listens, reached in zip(
            self.lent.devices,
            random.sample(PORTS, len(self.lent.devices)),
            random.sample(PORTS, len(self.lent.devices)),
            strict=True,
        ):
            forwards.append(f"-L127.0.0.1:{reached}:127.0.0.1:{listens}")
            workers.append({"name": device.name, "listens": listens, "reached": reached})
        order = {
            "scheduler": f"tls://127.0.0.1:{there}",
            "certificate": self.certificate,
            "devices": self.host.devices,
            "workers": workers,
        }
        reading, writing = os.pipe()
        self.began = time.monotonic()
        with defer_signals(), open(self.log, "ab") as said:
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


def end_links(links: Sequence[Link]) -> None:
    """End several connections."""
    for link in links:
        link.end()
