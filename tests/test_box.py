"""The box around a real child process, without a framework; what a machine without walls says."""

import errno
import json
import os
import socket
import struct
import subprocess
import sys

import pytest

from launcher import box
from launcher.box import (
    ARCHITECTURES,
    PRLIMIT,
    REFUSED,
    SOCKET,
    Policy,
    seatbelt_profile,
    seccomp_program,
    without,
)

boxed = pytest.mark.skipif(bool(box.missing_walls()), reason="this machine has no walls")


def run(policy, code):
    """Run Python in a box. Returns what it printed."""
    done = subprocess.run(
        policy.command([sys.executable, "-I", "-S", "-c", code]), capture_output=True, text=True, timeout=30
    )
    return done.stdout + done.stderr


@pytest.fixture
def policy(tmp_path):
    """A policy that reads the system and Python, and tmp_path/open; it writes tmp_path/own."""
    for name in ("open", "own", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return Policy(
        read=(*box.SYSTEM, sys.prefix, sys.base_prefix, str(tmp_path / "open")),
        write=(str(tmp_path / "own"), *box.DEVICES),
    )


TRY = """
import sys
def attempt(what):
    try:
        what()
        print("done")
    except OSError as error:
        print(type(error).__name__)
"""


@boxed
def test_a_child_reads_and_writes_what_it_may(policy, tmp_path):
    code = (
        TRY
        + f"""
attempt(lambda: open({str(tmp_path / "open/file")!r}).read())
attempt(lambda: open({str(tmp_path / "own/new")!r}, "w").write("mine"))
attempt(lambda: open({str(tmp_path / "closed/file")!r}).read())
attempt(lambda: open({str(tmp_path / "open/file")!r}, "w"))
attempt(lambda: open("/dev/null", "w").write("x"))
"""
    )
    assert run(policy, code).split() == ["done", "done", "PermissionError", "PermissionError", "done"]
    assert (tmp_path / "own" / "new").read_text() == "mine" and (tmp_path / "open/file").read_text() == "open"


@boxed
@pytest.mark.skipif(sys.platform != "linux", reason="Linux names threads in /proc")
def test_it_names_its_threads_and_writes_nothing_else_in_proc(policy):
    """CUDA names the threads that it starts, and gives up where it cannot."""
    code = (
        TRY
        + f"""
import os, threading
stay = threading.Event()
thread = threading.Thread(target=stay.wait)
thread.start()
attempt(lambda: open(f"/proc/self/task/{{thread.native_id}}/comm", "w").write("worker"))
print(open(f"/proc/self/task/{{thread.native_id}}/comm").read())
stay.set()
attempt(lambda: open("/proc/{os.getpid()}/comm", "w"))
attempt(lambda: open("/proc/self/oom_score_adj", "w"))
attempt(lambda: open("/proc/sys/kernel/core_pattern", "w"))
"""
    )
    refused = ["PermissionError"] * 3
    assert run(policy, code).split() == ["done", "worker", *refused]


@boxed
def test_its_children_are_in_the_box_too(policy, tmp_path):
    code = f"import subprocess; print(subprocess.call(['cat', {str(tmp_path / 'closed/file')!r}]))"
    assert run(policy, code).startswith("1\n") and "Permission denied" in run(policy, code)


@boxed
def test_there_is_no_network_and_pairs_of_sockets_work(policy):
    code = (
        TRY
        + """
import socket
attempt(lambda: socket.socket(socket.AF_INET))
attempt(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
attempt(lambda: socket.socket(socket.AF_UNIX).connect("/run/any"))
a, b = socket.socketpair()
a.send(b"x")
attempt(lambda: b.recv(1))
"""
    )
    assert run(policy, code).split() == ["PermissionError"] * 3 + ["done"]


@boxed
def test_an_open_descriptor_crosses_the_wall(policy, tmp_path):
    """The launcher hands over the training rows that way."""
    ours, theirs = socket.socketpair()
    code = (
        "import os, socket; launcher = socket.socket(fileno=int(os.environ['FD']))\n"
        "_, [fd], _, _ = socket.recv_fds(launcher, 1, 1)\n"
        "print(os.read(fd, 99).decode())"
    )
    with theirs, open(tmp_path / "closed" / "file", "rb") as rows:
        child = subprocess.Popen(
            policy.command([sys.executable, "-I", "-S", "-c", code]),
            pass_fds=(theirs.fileno(),),
            env={"FD": str(theirs.fileno())},
            stdout=subprocess.PIPE,
            text=True,
        )
        socket.send_fds(ours, [b"r"], [rows.fileno()])
        out, _ = child.communicate(timeout=30)
    ours.close()
    assert out == "closed\n"


@boxed
def test_what_is_hidden_below_a_readable_folder_stays_hidden(policy, tmp_path):
    site = tmp_path / "open"
    for name in ("hidden", "shown"):
        (site / name).mkdir()
        (site / name / "file").write_text(name)
    single = site / "hidden" / "but-this"
    single.write_text("a file of its own")
    hiding = Policy(policy.read, policy.write, hidden=(str(site / "hidden"),), files=(str(single),))
    code = (
        TRY
        + f"""
import os
attempt(lambda: open({str(site / "shown/file")!r}).read())
attempt(lambda: open({str(site / "hidden/file")!r}).read())
attempt(lambda: open({str(single)!r}).read())
attempt(lambda: os.listdir({str(site)!r}))
attempt(lambda: os.listdir({str(site / "hidden")!r}))
"""
    )
    expected = [
        "done",
        "PermissionError",
        "done",
        "done",
        "done",
    ]  # a name is no text: an import lists folders
    assert run(hiding, code).split() == expected


def test_without_takes_folders_apart_only_where_it_must(tmp_path):
    for name in ("a/b/c", "a/d", "e"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "e")
    kept, opened = without(
        [str(tmp_path / "a"), str(tmp_path / "e"), "/not/there"], [str(tmp_path / "a/b/c")]
    )
    assert kept == [str(tmp_path / "a/d"), str(tmp_path / "e")]
    assert opened == [str(tmp_path / "a"), str(tmp_path / "a/b")]
    assert without([str(tmp_path)], [str(tmp_path)]) == ([], [])
    assert without([str(tmp_path / "a/b")], [str(tmp_path / "a")]) == ([], [])


def answer(program, number, architecture, *arguments):
    """What a seccomp filter returns for a call: its BPF, interpreted."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    lines = [struct.unpack("HBBI", program[i : i + 8]) for i in range(0, len(program), 8)]
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = lines[at]
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            [accumulator] = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        else:
            hit = accumulator == value if code == 0x15 else accumulator >= value
            at += if_true if hit else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_what_it_lists_and_nothing_else(machine):
    architecture, column = ARCHITECTURES[machine]
    program = seccomp_program(architecture, column)
    refuse, allow, kill = 0x00050000 | errno.EPERM, 0x7FFF0000, 0x80000000
    refused = {pair[column] for pair in REFUSED.values()}
    for number in range(600):
        if number not in (SOCKET[column], PRLIMIT[column]):
            assert answer(program, number, architecture) == (refuse if number in refused else allow), number
    for family in range(46):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
            for more in (0, socket.SOCK_CLOEXEC):
                fine = family == socket.AF_UNIX and kind != socket.SOCK_DGRAM
                said = answer(program, SOCKET[column], architecture, family, kind | more)
                assert said == (allow if fine else refuse)
    for pid, expected in ((0, allow), (1, refuse), (4711, refuse)):
        assert answer(program, PRLIMIT[column], architecture, pid) == expected
    assert answer(program, 0x40000000 + 41, architecture, socket.AF_INET) == refuse
    assert answer(program, 1, 0x40000003) == kill  # a 32-bit call


def test_a_machine_without_walls_runs_the_command_itself(monkeypatch):
    monkeypatch.setattr(box, "missing_walls", lambda: "no walls")
    assert Policy((), ()).command(["python", "x.py"]) == ["python", "x.py"]


@pytest.mark.parametrize(
    "system, machine, landlock, says",
    [
        ("linux", "x86_64", 0, "no Landlock"),
        ("linux", "x86_64", 1, ""),
        ("linux", "riscv64", 7, "riscv64"),
        ("sunos5", "x86_64", 0, "no box for"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, system, machine, landlock, says):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(box.platform, "machine", lambda: machine)
    monkeypatch.setattr(box, "landlock_version", lambda: landlock)
    missing = box.missing_walls.__wrapped__()
    assert says in missing if says else missing == ""


def test_the_profile_of_a_mac(tmp_path):
    """Its text alone: nobody here can run it. The last rule that matches counts."""
    policy = Policy(
        ("/usr",), (str(tmp_path),), hidden=("/Users/me/data",), files=("/Users/me/data/meta.json",)
    )
    lines = seatbelt_profile(policy).splitlines()
    assert lines[:4] == ["(version 1)", "(allow default)", "(deny network*)", "(deny file-write*)"]
    order = [
        next(i for i, line in enumerate(lines) if text in line and line.startswith(word))
        for word, text in (
            ("(deny file-read-data", '"/Users"'),
            ("(allow file-read*", '"/usr"'),
            ("(deny file-read-data", '"/Users/me/data"'),
            ("(allow file-read*", "meta.json"),
            ("(allow file-read* file-write*", json.dumps(str(tmp_path))),
        )
    ]
    assert order == sorted(order)
