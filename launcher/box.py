"""
The box: what a child of the launcher may read, write and ask of the system. The kernel enforces it.

    python box.py POLICY COMMAND ...     restrict this process, then become the command

On Linux, Landlock (5.13 and newer; no privilege, works in containers) decides which files can be opened and,
from 6.12, that no signal leaves the box. A seccomp filter refuses the network, and calls that store something
outside of files which outlives the process. On macOS `sandbox-exec` does both. Nothing is copied and nothing
is mounted, so a boxed run is as fast as another. `missing_walls` says what a machine cannot enforce; the row
is then marked.

This file is also run by itself, before the command: it imports the standard library alone.
"""

import ctypes
import errno
import json
import os
import platform
import struct
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/opt", "/proc", "/sys", "/nix/store")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
GPUS = ("nvidia*", "dri", "kfd")  # below /dev
SHARED_MEMORY = "/dev/shm"
THREADS = "/proc/self/task"  # CUDA writes the names of its threads there, and gives up where it cannot

# Landlock: include/uapi/linux/landlock.h. The system calls have these numbers on every architecture.
CREATE_RULESET = 444
ADD_RULE = 445
RESTRICT_SELF = 446
RULE_PATH_BENEATH = 1
EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights an ABI knows; 16 from the fifth on
SCOPED_SOCKETS = 1 << 0  # abstract Unix sockets
SCOPED_SIGNALS = 1 << 1
SCOPES_FROM = 6  # ABI
PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2

# What is refused beside files: the network, and memory, queues and keys that outlive the process. io_uring
# would do the same past the filter. Numbers: asm/unistd.h of each architecture, by AUDIT_ARCH.
X86_64 = 0xC000003E
AARCH64 = 0xC00000B7
REFUSED = {
    "connect": (42, 203),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "io_uring_setup": (425, 425),
    "pidfd_getfd": (438, 438),
}
SOCKET = (41, 198)  # allowed for Unix streams: CUDA binds one, and without connect it reaches no one
PRLIMIT = (302, 261)  # allowed for the process itself
ARCHITECTURES = {"x86_64": (X86_64, 0), "aarch64": (AARCH64, 1), "arm64": (AARCH64, 1)}


@dataclass(frozen=True)
class Policy:
    """What a process may touch. Paths that are not there are passed over."""

    read: tuple[str, ...]  # and execute
    write: tuple[str, ...]
    hidden: tuple[str, ...] = ()  # below a path of `read`, and left out all the same
    files: tuple[str, ...] = ()  # read all the same, whatever is hidden
    names: tuple[str, ...] = ()  # folders that can be listed, with all below: an import lists its folder
    network: bool = False  # it may use the network, and what outlives it

    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` in the box; the command itself where there is no box."""
        if missing_walls():
            return list(command)
        if sys.platform == "darwin":
            return ["sandbox-exec", "-p", seatbelt_profile(self), *command]
        policy = json.dumps(asdict(self))
        return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), policy, *command]


@cache
def missing_walls() -> str:
    """Return what this machine cannot enforce, "" when a box holds."""
    if sys.platform == "darwin":
        return "" if os.path.exists("/usr/bin/sandbox-exec") else "there is no sandbox-exec"
    if not sys.platform.startswith("linux"):
        return f"there is no box for {platform.system()}"
    if platform.machine() not in ARCHITECTURES:
        return f"there is no list of system calls for {platform.machine()}"
    if landlock_version() < 1:
        return "the kernel has no Landlock (Linux 5.13 and newer, switched on with lsm=landlock)"
    return ""


# ---------------------------------------------------------------------------
# Linux: Landlock
# ---------------------------------------------------------------------------


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("descriptor", ctypes.c_int32)]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """Return the version of Landlock's interface, 0 where there is none."""
    return max(0, _libc().syscall(CREATE_RULESET, None, 0, 1))


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def restrict_files(policy: Policy) -> None:
    """Let this process and its children open what the policy names, and nothing else, for good."""
    libc = _libc()
    version = landlock_version()
    every = (1 << RIGHTS.get(version, 16)) - 1
    scoped = SCOPED_SIGNALS | SCOPED_SOCKETS if version >= SCOPES_FROM else 0
    rules = _Ruleset(every, 0, scoped)
    size = ctypes.sizeof(_Ruleset) if version >= SCOPES_FROM else 8
    ruleset = _checked(libc.syscall(CREATE_RULESET, ctypes.byref(rules), size, 0), "landlock")
    readable, opened = without(policy.read, policy.hidden)
    for paths, allowed in (
        ([*readable, *policy.files], EXECUTE | READ_FILE | READ_DIR),
        ([*opened, *policy.names], READ_DIR),
        (policy.write, every),
        ([THREADS], WRITE_FILE | TRUNCATE),
    ):
        for path in paths:
            _allow(libc, ruleset, path, allowed & every)
    _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _checked(libc.syscall(RESTRICT_SELF, ruleset, 0), "landlock")
    os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, allowed: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return
        raise
    if not os.path.isdir(path):
        allowed &= OF_FILES
    rule = _PathBeneath(allowed, descriptor)
    _checked(libc.syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0), path)
    os.close(descriptor)


def without(paths: Iterable[str], hidden: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return paths that together hold all of `paths` but nothing of `hidden`, and the folders taken apart.

    A rule of Landlock holds for all that is below its path, so a folder above something hidden is replaced
    by its entries. Links in it are left out: what they point to has a place of its own.
    """
    left_out = {os.path.realpath(path) for path in hidden}
    above = {parent for path in left_out for parent in parents(path)}
    kept: list[str] = []
    opened: list[str] = []

    def add(path: str) -> None:
        if path in left_out or any(parent in left_out for parent in parents(path)):
            return
        if path not in above:
            kept.append(path)
            return
        opened.append(path)
        with suppress(OSError), os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not entry.is_symlink():
                    add(entry.path)

    for path in paths:
        if os.path.exists(path):
            add(os.path.realpath(path))
    return kept, opened


def parents(path: str) -> list[str]:
    """Return the folders that a path lies in."""
    return [str(parent) for parent in Path(path).parents]


# ---------------------------------------------------------------------------
# Linux: seccomp
# ---------------------------------------------------------------------------


# Classic BPF, from linux/filter.h and linux/seccomp.h. A line is (operation, lines to skip if it is true,
# lines to skip if it is false, operand).
LOAD = 0x20
AND = 0x54
EQUAL = 0x15
AT_LEAST = 0x35
RETURN = 0x06
ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | errno.EPERM
KILL = 0x80000000
X32 = 0x40000000  # calls of the x32 interface, numbered from here: the same ones once more
AF_UNIX = 1
DATAGRAM = 2
KIND_OF_SOCKET = 0xF  # the bits of a socket's type that are no flags
ITSELF = 0  # the process that asks


def seccomp_program(architecture: int, column: int) -> bytes:
    """Return the filter, in classic BPF: what REFUSED, SOCKET and PRLIMIT name ends with EPERM.

    struct seccomp_data holds the number of the call at 0, the
    architecture at 4, and the lower halves of the first two arguments at 16 and 24.
    """
    refuse = (RETURN, 0, 0, REFUSE)
    allow = (RETURN, 0, 0, ALLOW)
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    program += [(LOAD, 0, 0, 0), (AT_LEAST, 0, 1, X32), refuse]
    for pair in REFUSED.values():
        program += [(EQUAL, 0, 1, pair[column]), refuse]
    program += [(EQUAL, 0, 4, PRLIMIT[column]), (LOAD, 0, 0, 16), (EQUAL, 0, 1, ITSELF), allow, refuse]
    program += [(EQUAL, 0, 7, SOCKET[column]), (LOAD, 0, 0, 16), (EQUAL, 1, 0, AF_UNIX), refuse]
    program += [(LOAD, 0, 0, 24), (AND, 0, 0, KIND_OF_SOCKET), (EQUAL, 0, 1, DATAGRAM), refuse]
    program += [allow]
    return b"".join(struct.pack("HBBI", *line) for line in program)


def restrict_calls() -> None:
    """Refuse this process and its children the network, and what outlives them. There is no way back."""

    class Program(ctypes.Structure):
        _fields_ = [("count", ctypes.c_ushort), ("lines", ctypes.c_char_p)]

    lines = seccomp_program(*ARCHITECTURES[platform.machine()])
    program = Program(len(lines) // 8, lines)
    result = _libc().prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
    _checked(result, "seccomp")


# ---------------------------------------------------------------------------
# macOS
# ---------------------------------------------------------------------------


def seatbelt_profile(policy: Policy) -> str:
    """Return the policy as a profile of sandbox-exec. Of the last rules that match, the last counts.

    macOS opens so many files of its own that reading is allowed but for users' folders and other volumes;
    what the policy names there is given back.
    """
    lines = ["(version 1)", "(allow default)"]
    lines += [] if policy.network else ["(deny network*)"]
    lines += ["(deny file-write*)"]
    lines += [f"(deny file-read-data {_below(['/Users', '/Volumes', '/tmp', '/private/tmp'])})"]
    lines += [f"(allow file-read* {_below(policy.read)})"]
    if policy.hidden:
        lines += [f"(deny file-read-data {_below(policy.hidden)})"]
        lines += [f"(allow file-read* {_below(policy.files)})"]
    lines += [f"(allow file-read* file-write* {_below([*policy.write, '/dev/null'])})"]
    lines += ["(deny signal (target others))", "(deny process-info* (target others))"]
    return "\n".join(lines)


def _below(paths: Iterable[str]) -> str:
    return " ".join(f"(subpath {json.dumps(os.path.realpath(path))})" for path in paths)


# ---------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------


def main(policy: str, command: list[str]) -> None:
    """Restrict this process and become the command."""
    values: dict[str, Any] = json.loads(policy)
    restrict_files(Policy(**values))
    if not values["network"]:
        restrict_calls()
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
