"""
Three hosts for nights over SSH, on one machine: network namespaces, each with an sshd and a checkout.

benchmarks/hostile.py and the tests use it. It needs Linux, root, `ip` and `sshd` (Debian: openssh-server).
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from house import House

SSHD = "/usr/sbin/sshd"
START_SECONDS = 10.0
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))  # Debian: libfaketime
# A link that is cut: what waits for an answer through it hears nothing.
SSHD_CONFIG = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
PermitRootLogin yes
UsePAM no
ClientAliveInterval 5
SetEnv {environment}
"""


def why_not() -> str:
    """Return why this machine has no such hosts, "" when it has."""
    if os.geteuid() != 0:
        return "it needs root"
    for command in ("ip", SSHD, "ssh", "ssh-keygen"):
        if shutil.which(command) is None:
            return f"there is no {command}"
    return "" if call(["ip", "netns", "list"], check=False) == 0 else "there are no network namespaces"


def call(command: Sequence[str], check: bool = True) -> int:
    """Run a command, and return its exit code. What it prints goes nowhere."""
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.returncode


@dataclass(frozen=True)
class LabHost:
    """A machine of the lab."""

    name: str
    house: House  # with its checkout
    namespace: str
    wire: str  # the end of its network that is outside
    sshd: subprocess.Popen[bytes]

    @property
    def ledger(self) -> Path:
        """Of the runs that it made for others."""
        return self.house.project / "runs" / "lent" / "results.tsv"

    def cut(self) -> None:
        """Cut it off: nothing comes through, and nothing is said of that."""
        call(["ip", "link", "set", self.wire, "down"])

    def mend(self) -> None:
        """Undo cut."""
        call(["ip", "link", "set", self.wire, "up"])


@dataclass(frozen=True)
class Lab:
    """The hosts, and the file that names them."""

    folder: Path
    hosts: tuple[LabHost, ...]

    @property
    def file(self) -> Path:
        return self.folder / "hosts.yaml"


@contextmanager
def build_lab(house: House, folder: Path, count: int = 3, clocks: Sequence[str] = ()) -> Iterator[Lab]:
    """Yield hosts that have the checkout of a house.

    Args:
        house: where the night is.
        folder: a new one, for the hosts.
        count: of hosts.
        clocks: how far the clock of each is off, as faketime takes it: "+3h"; "" for not at all.
    """
    folder.mkdir(parents=True)
    for name in ("key", "host_key"):
        call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)])
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it
    hosts: list[LabHost] = []
    try:
        for number in range(count):
            clock = clocks[number] if number < len(clocks) else ""
            hosts.append(build_host(house, folder, number, clock))
        write_files(folder, hosts)
        yield Lab(folder, tuple(hosts))
    finally:
        for host in hosts:
            remove_host(host)


def build_host(house: House, folder: Path, number: int, clock: str) -> LabHost:
    """Build a host. number: from 0, of those of the lab"""
    name = f"h{number}"
    place = folder / name
    mine = House(place, place / "autoresearch")
    mine.temporary.mkdir(parents=True)
    mine.home.mkdir()
    house.git("clone", "-q", str(house.top), str(mine.project))
    if (house.folder / "cache").is_dir():
        shutil.copytree(house.folder / "cache", place / "cache")
    tag = f"{os.getpid() % 100_000}-{number}"
    namespace, outside, inside = f"lab-{tag}", f"lo{tag}", f"li{tag}"
    net = f"10.{200 + number}.{os.getpid() // 250 % 250}.{os.getpid() % 60 * 4}"
    first, _, last = net.rpartition(".")
    ours, theirs = (f"{first}.{int(last) + step}" for step in (1, 2))
    inward = ["ip", "-n", namespace]
    call(["ip", "netns", "add", namespace])
    call(["ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", namespace])
    call(["ip", "addr", "add", f"{ours}/30", "dev", outside])
    call(["ip", "link", "set", outside, "up"])
    call([*inward, "addr", "add", f"{theirs}/30", "dev", inside])
    call([*inward, "link", "set", inside, "up"])
    call([*inward, "link", "set", "lo", "up"])
    kept = ("AUTORESEARCH_CACHE", "CUDA_VISIBLE_DEVICES", "HOME", "MPLCONFIGDIR", "PYTHONPATH", "TMPDIR")
    environment = {key: value for key, value in mine.environment().items() if key in kept}
    environment["CUDA_VISIBLE_DEVICES"] = "-1"  # an empty value is none to sshd
    if clock:
        environment |= {"LD_PRELOAD": str(FAKETIME[0]), "FAKETIME": clock, "DONT_FAKE_MONOTONIC": "1"}
    words = " ".join(f"{key}={value}" for key, value in environment.items())
    config = place / "sshd_config"
    config.write_text(SSHD_CONFIG.format(address=theirs, folder=folder, environment=words))
    with open(place / "sshd.log", "ab") as log:
        sshd = subprocess.Popen(
            ["ip", "netns", "exec", namespace, SSHD, "-D", "-e", "-f", str(config)], stdout=log, stderr=log
        )
    (place / "address").write_text(theirs)
    return LabHost(name, mine, namespace, outside, sshd)


def write_files(folder: Path, hosts: Sequence[LabHost]) -> None:
    """Write the file of the hosts, and how ssh finds them; wait until they answer."""
    entries = {}
    for host in hosts:
        address = (host.house.folder / "address").read_text()
        options = [f"-oHostName={address}", "-oUser=root", f"-oIdentityFile={folder / 'key'}", "-F/dev/null"]
        options += ["-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null", "-oLogLevel=ERROR"]
        entries[host.name] = {
            "folder": str(host.house.project),
            "devices": "cpu",
            "python": sys.executable,
            "options": options,
        }
        deadline = time.monotonic() + START_SECONDS
        while call(["ssh", *options, host.name, "true"], check=False):
            if time.monotonic() > deadline:
                raise RuntimeError((host.house.folder / "sshd.log").read_text()[-500:])
            time.sleep(0.1)
    (folder / "hosts.yaml").write_text(yaml.safe_dump({"hosts": entries}))


def remove_host(host: LabHost) -> None:
    """End the host's sshd and its network."""
    with suppress(ProcessLookupError):
        host.sshd.send_signal(signal.SIGTERM)
    host.sshd.wait()
    call(["ip", "netns", "del", host.namespace], check=False)
    call(["ip", "link", "del", host.wire], check=False)
