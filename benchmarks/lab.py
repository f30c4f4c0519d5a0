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

import psutil
import yaml
from house import House

SSHD = "/usr/sbin/sshd"
START_SECONDS = 10.0
# Debian's libfaketime needs shared memory, which a boxed trainer has not.
CLOCK = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static time_t by(void) { const char *seconds = getenv("LAB_CLOCK"); return seconds ? atol(seconds) : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += by();
    return failed;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}
"""
DISK_BYTES = 2**22  # of a small disk
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

    def kill_sessions(self) -> None:
        """Kill what sshd started for those who are connected."""
        for process in psutil.Process(self.sshd.pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.name().startswith("sshd"):  # OpenSSH 9.8 has sshd-session
                    process.kill()

    @property
    def disk(self) -> Path:
        """Where its runs lie."""
        return self.house.project / "runs"

    def limit_disk(self) -> None:
        """Give it a small disk for its runs."""
        self.disk.mkdir()
        call(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "lab", str(self.disk)])

    def fill_disk(self) -> None:
        """Leave no space on its disk."""
        with suppress(OSError), open(self.disk / "full", "wb") as file:
            file.write(bytes(2 * DISK_BYTES))

    def heal(self) -> None:
        """Undo what was done to it."""
        self.mend()
        (self.disk / "full").unlink(missing_ok=True)


@dataclass(frozen=True)
class Lab:
    """The hosts, and the file that names them."""

    folder: Path
    hosts: tuple[LabHost, ...]

    @property
    def file(self) -> Path:
        return self.folder / "hosts.yaml"


@contextmanager
def build_lab(house: House, folder: Path, count: int = 3, clocks: Sequence[int] = ()) -> Iterator[Lab]:
    """Yield hosts that have the checkout of a house.

    Args:
        house: where the night is.
        folder: a new one, for the hosts.
        count: of hosts.
        clocks: seconds by which the clock of each is off. It needs a C compiler.
    """
    folder.mkdir(parents=True)
    for name in ("key", "host_key"):
        call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)])
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it
    hosts: list[LabHost] = []
    try:
        for number in range(count):
            clock = clocks[number] if number < len(clocks) else 0
            hosts.append(build_host(house, folder, number, clock))
        write_files(folder, hosts)
        yield Lab(folder, tuple(hosts))
    finally:
        for host in hosts:
            remove_host(host)


def build_host(house: House, folder: Path, number: int, clock: int) -> LabHost:
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
    namespace = f"lab-{tag}"
    outside = f"lo{tag}"
    inside = f"li{tag}"
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
        environment |= {"LD_PRELOAD": str(build_clock(mine.project)), "LAB_CLOCK": str(clock)}
    words = " ".join(f"{key}={value}" for key, value in environment.items())
    config = place / "sshd_config"
    config.write_text(SSHD_CONFIG.format(address=theirs, folder=folder, environment=words))
    with open(place / "sshd.log", "ab") as log:
        sshd = subprocess.Popen(
            ["ip", "netns", "exec", namespace, SSHD, "-D", "-e", "-f", str(config)], stdout=log, stderr=log
        )
    (place / "address").write_text(theirs)
    return LabHost(name, mine, namespace, outside, sshd)


def build_clock(folder: Path) -> Path:
    """Build the library that shifts the time of day of a process, in a folder that a trainer may read."""
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(CLOCK)
    call(["cc", "-shared", "-fPIC", "-o", str(library), str(source)])
    return library


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
    if host.disk.is_mount():
        call(["umount", "-l", str(host.disk)], check=False)
    call(["ip", "netns", "del", host.namespace], check=False)
    call(["ip", "link", "del", host.wire], check=False)
