"""
Stands in for an agent that is careless or hostile: python agent.py HOUSE ACT

In its first turn it does the act, before, after or instead of an honest edit. In later turns it makes the
honest edit alone. HOUSE is the throwaway folder of benchmarks/hostile.py that the night lives in. The agent
does nothing elsewhere: many of the acts destroy what they find.
"""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

TRAINER = Path("train_cuda.py")
SCRIPTS = Path(__file__).with_name("acts.sh")
MARKER = "throwaway"  # a file in HOUSE: what lies below may be destroyed
CHECK = "This is a check before a night"  # what the agent is told then; it is no turn
TURNS = "turns"  # a byte for each turn
OVER = "over"  # from now on the agent is honest
PROJECT = "project"  # holds the path of the folder in which the night was started
HONEST = "honest"
DAEMONIC = "a daemon with an empty environment goes on editing"
THERE = "there: "  # begins the name of an act in the person's repository
SLOW_VARIABLE = "HOSTILE_AGENT"  # seconds that the agent thinks first
STEP = 0.05  # of the score
Edit = Literal["first", "last", "none"]


@dataclass(frozen=True)
class Act:
    """One thing that an agent does, in its working directory."""

    perform: Callable[[], object]
    edit: Edit = "last"  # when the honest edit is made
    seconds: float = 30.0  # that the agent has
    always: bool = False  # in every turn of the first night
    arguments: tuple[str, ...] = ()  # of the agent's command


def main(house: Path, name: str) -> None:
    """Take a turn."""
    if not (house / MARKER).is_file() or house.resolve() not in Path.cwd().resolve().parents:
        sys.exit(f"{Path.cwd()} is not in a throwaway house: nothing is done here")
    if CHECK in sys.stdin.read() + " ".join(sys.argv):
        edit()
        return
    with open(house / TURNS, "ab") as turns:
        turns.write(b".")
    is_first = (house / TURNS).stat().st_size == 1
    time.sleep(float(os.environ.get(SLOW_VARIABLE, "0")))
    act = ACTS[name]
    if (house / OVER).exists() or not (is_first or act.always):
        edit()
        return
    if act.edit == "first":
        edit()
    act.perform()
    if act.edit == "last":
        edit()


def edit() -> None:
    """Lower the score by a step, where there is a trainer to edit, and say so."""
    if TRAINER.is_file():
        text = TRAINER.read_bytes()
        found = re.search(rb"^SCORE = ([\d.]+)[^\r\n]*", text, re.M)
        if found:
            line = b"SCORE = %.2f  # %d" % (float(found[1]) - STEP, time.time_ns())
            TRAINER.write_bytes(text.replace(found[0], line))
    print("\nexperiment: a little better", flush=True)


# ---------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------


def scripts() -> Iterator[tuple[str, Act]]:
    """Yield the acts of acts.sh: (name, act)."""
    for part in re.split(r"^#: ", SCRIPTS.read_text(), flags=re.M)[1:]:
        title, _, script = part.partition("\n")
        name, _, when = title.partition(" [")
        edit: Edit = "first" if when == "first]" else "none" if when == "none]" else "last"
        yield name, Act(run_script(script, name.startswith(THERE)), edit)


def run_script(script: str, there: bool) -> Callable[[], object]:
    """Return a function that runs a script. What fails in it is passed over."""

    def perform() -> None:
        house = Path(sys.argv[1])
        folder = (house / PROJECT).read_text() if there else None
        variables = {**os.environ, "PYTHON": sys.executable, "HOUSE": str(house)}
        subprocess.run(["sh", "-c", script], cwd=folder, env=variables, stdin=subprocess.DEVNULL)

    return perform


# ---------------------------------------------------------------------------
# Trainers
# ---------------------------------------------------------------------------

TRAINERS: dict[str, Callable[[bytes], bytes]] = {
    "an empty trainer": lambda text: b"",
    "a trainer of 50 MB": lambda text: text + b"# " + 50 * 2**20 * b"x" + b"\n",
    "a trainer that is not UTF-8": lambda text: text + b"# caf\xe9\n",
    "a trainer with a BOM": lambda text: b"\xef\xbb\xbf" + text,
    "a trainer with CRLF": lambda text: text.replace(b"\n", b"\r\n"),
    "a trainer with NUL bytes": lambda text: text + b"\0\0\n",
    "a trainer in UTF-16": lambda text: text.decode().encode("utf-16"),
    "a trainer of an unknown encoding": lambda text: b"# -*- coding: nonsense -*-\n" + text,
    "a trainer of 200,000 minus signs": lambda text: text + b"X = " + 200_000 * b"-" + b"1\n",
    "a trainer of 10,000 parentheses": lambda text: text + b"X = " + 10_000 * b"(" + 10_000 * b")" + b"\n",
    "a trainer with a number of 10,000 digits": lambda text: text + b"X = " + 10_000 * b"9" + b"\n",
    "a trainer that does not compile": lambda text: text + b"def\n",
    "a trainer with whitespace at its end": lambda text: text + b"\n   \n",
    "a trainer without an end of line": lambda text: text.rstrip(b"\n"),
}
# What a trainer does before anything else.
BEGINNINGS = {
    "a trainer that prints what is no text": r"os.write(1, b'\xed\xa0\x80 \0 \x1b[2J \xff'); sys.exit(3)",
    "a trainer that raises what is no text": r"raise ValueError('\ud800 \0 \x1b[2J')",
    "a trainer that prints a line of 1 MB": "print('x' * 2**20); sys.exit(3)",
    "a trainer that exits 0": "sys.exit(0)",
    "a trainer that dies of SIGSEGV": "os.kill(os.getpid(), 11)",
    "a trainer that kills its parent": "os.kill(os.getppid(), 9); time.sleep(1)",
    "a trainer that never starts": "time.sleep(600)",
    "a trainer that leaves a daemon": "if os.fork() == 0: os.setsid(); os.fork(); time.sleep(600)",
    "a trainer that sends what is no text": r"tell(b'\xff\0{'); time.sleep(600)",
    "a trainer that sends what is no event": "tell(b'[]'); tell(b'{}'); time.sleep(600)",
    "a trainer that is 2.5 deep": """tell(b'{"event": "start", "depth": 2.5}'); time.sleep(600)""",
    "a trainer that sends 10 MB in a line": "tell(10 * 2**20 * b'x'); time.sleep(600)",
}
IMPORTS = """\
import os, socket, sys, time
def tell(line):
    socket.socket(fileno=os.dup(int(os.environ["AUTORESEARCH_LAUNCHER_FD"]))).sendall(line + b"\\n")
"""


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[], object]:
    """Return a function that writes the trainer anew."""
    return lambda: TRAINER.write_bytes(change(TRAINER.read_bytes()))


def begin_with(code: str) -> Callable[[], object]:
    """Return a function that puts code before the trainer's own."""
    return rewrite(lambda text: f"{IMPORTS}{code}\n".encode() + text)


def bind_trainer() -> None:
    TRAINER.unlink()
    socket.socket(socket.AF_UNIX).bind(str(TRAINER))


# ---------------------------------------------------------------------------
# What it prints
# ---------------------------------------------------------------------------

PRINTED = {
    "prints lone surrogates": b"experiment: \xed\xa0\x80\xed\xb0\x80 caf\xe9\n",
    "prints NUL": b"experiment: a\0b\0\nlearned: \0\n",
    "prints escape sequences": b"experiment: \x1b[2J\x1b]0;title\x07 \x1b[31m\rred\x9b5n\n",
    "prints all 256 bytes": 10 * bytes(range(256)),
    "prints a line of 200 KB": b"experiment: " + 200_000 * b"x" + b"\n",
    "prints separators and tabs": "experiment: a\tb\u2028c\x85d\x0be\n".encode(),
    "prints braces and trailers": b"experiment: {prompt} %s {0}\n\nRun: 1\nVal-bpb: 0\n",
    "prints 50 MB": 2_000_000 * b"a line that says nothing\n",
    "prints no end of line": b"experiment: without an end",
}


def print_bytes(data: bytes) -> Callable[[], object]:
    """Return a function that prints the bytes."""

    def perform() -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    return perform


def fail_at_length() -> None:
    print_bytes(200_000 * b"x" + b"\n")()
    sys.exit(1)


# ---------------------------------------------------------------------------
# Processes and signals
# ---------------------------------------------------------------------------

DAEMON = """
import os, sys, time
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
end = time.monotonic() + 600
while time.monotonic() < end:
    try:
        with open(sys.argv[1], "a") as trainer:
            trainer.write("# the daemon was here\\n")
    except OSError:
        pass
    time.sleep(0.1)
"""


def start_daemon() -> None:
    """Start a process that nothing ties to this one, and that goes on editing the trainer."""
    command = [sys.executable, "-I", "-S", "-c", DAEMON, str(TRAINER.resolve())]
    nothing = subprocess.DEVNULL
    subprocess.run(command, env={}, stdin=nothing, stdout=nothing, stderr=nothing)


def hang(*ignored: signal.Signals) -> None:
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)


def hang_without_output() -> None:
    os.closerange(0, 3)
    hang()


def crash() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.SIGSEGV)


def signal_parent(number: signal.Signals) -> None:
    if os.getppid() > 1:
        os.kill(os.getppid(), number)
    time.sleep(1)


def interrupt_group() -> None:
    os.killpg(0, signal.SIGINT)
    time.sleep(1)


# ---------------------------------------------------------------------------
# All acts
# ---------------------------------------------------------------------------


def first(perform: Callable[[], object], seconds: float = 30.0) -> Act:
    """Return an act that comes after the honest edit."""
    return Act(perform, "first", seconds)


def none(perform: Callable[[], object], *arguments: str) -> Act:
    """Return an act without an honest edit."""
    return Act(perform, "none", arguments=arguments)


ACTS: dict[str, Act] = {
    HONEST: Act(lambda: None),
    **dict(scripts()),
    **{name: first(rewrite(change)) for name, change in TRAINERS.items()},
    **{name: first(begin_with(code)) for name, code in BEGINNINGS.items()},
    "a socket in the trainer's place": none(bind_trainer),
    **{name: first(print_bytes(data)) for name, data in PRINTED.items()},
    "prints nothing": none(lambda: TRAINER.write_bytes(TRAINER.read_bytes() + b"# silent\n")),
    "a line of 200 KB, then exit 1; the prompt is an argument": none(fail_at_length, "{prompt}"),
    DAEMONIC: Act(start_daemon),
    "exits 1": first(lambda: sys.exit(1)),
    "dies of SIGKILL": first(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "dies of SIGSEGV": first(crash),
    "hangs": first(hang, 2.0),
    "hangs and ignores signals": first(lambda: hang(signal.SIGTERM, signal.SIGINT, signal.SIGHUP), 2.0),
    "hangs and closes its output": first(hang_without_output, 2.0),
    "stops itself": first(lambda: os.kill(os.getpid(), signal.SIGSTOP), 2.0),
    "kills its parent": first(lambda: signal_parent(signal.SIGKILL)),
    "sends SIGTERM to its parent": first(lambda: signal_parent(signal.SIGTERM)),
    "sends SIGINT to its process group": first(interrupt_group),
}
ACTS |= {
    "in every turn: nothing": Act(lambda: None, "none", always=True),
    "in every turn: exits 1": replace(ACTS["exits 1"], always=True),
    "in every turn: the trainer deleted": replace(ACTS["the trainer deleted"], always=True),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
