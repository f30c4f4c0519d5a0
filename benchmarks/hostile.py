"""
Nothing ends a night: real nights in throwaway repositories, under hostile agents, signals and kills.

    uv run python benchmarks/hostile.py [--part acts ...] [--count N] [--seed S] [--only WORDS] [--jobs 2]

A case copies a house: a repository of this project with a person's files in it, prepared data, a home, a
folder for temporary files. It runs the real command there (python -m launcher.cli loop --experiments 2), ends
it or lets it end, looks at what is left, starts the command again, and looks once more. All is real but the
training: trainer, scorer and agent are stand-ins that take a second (stand_ins/). The parts:

    acts      an agent does one of the things of stand_ins/agent.py and acts.sh, and the night goes on
    states    an honest night, started in the middle of a person's work
    kill      kill -9 of the launcher while an agent works, git works, or a trainer runs
    signal    SIGINT, SIGTERM or SIGHUP at any moment
    git       the same and kill -9, aimed at a call of git or at the start of a trainer
    twice     four launchers started together after a killed one
    absolute  acts of an agent that goes into the person's repository by its path; counted by itself

A case fails where
- a night hangs, prints a traceback, or ends with a code that is not documented;
- the same command, started again, does not end with 0 or makes no experiments;
- a process lives on;
- anything of the person's has changed, but for keeps: one commit each, of the trainer alone;
- a lock is left in .git, or git fsck complains;
- a run stands in the ledger twice, or not at all;
- a temporary file is left.

Linux only: it finds processes that hide by being their subreaper. The last lines are for grep, and the exit
code is 1 where a case failed.
"""

import argparse
import ctypes
import fcntl
import hashlib
import json
import multiprocessing
import os
import pty
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import termios
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from stand_ins.agent import ACTS, DAEMONIC, HONEST, MARKER, OVER, PROJECT, SLOW_VARIABLE, THERE

SOURCE = Path(__file__).resolve().parent.parent
STAND_INS = Path(__file__).resolve().parent / "stand_ins"
TRAINER = "train_cuda.py"
SLOW_TRAINING = "HOSTILE_TRAINING"
CONFIG = """
tracks:
  tiny: {packages: [mpmath, pygments], held_out: [pygments], vocab_size: 512, seq_len: 128, val_tokens: 16384}
platforms:
  cpu:
    framework: torch
    device_kind: cpu
    trainer: train_cuda.py
    track: tiny
    bf16: false
    startup_seconds: 15
    start: {n_layer: 2, n_embd: 64, head_dim: 32, window_pattern: SL, short_window: 32,
            total_batch_size: 1024, device_batch_size: 8, eval_batch_size: 8}
"""
EXPERIMENTS = 2  # of a night
NIGHT_SECONDS = 240.0  # after which a night is said to hang; an honest one takes 10 s
PHASE_SECONDS = 60.0  # until a phase of it is reached
LONG = "40"  # seconds that an agent thinks and a trainer starts, where they are to be killed meanwhile
CODES = (0, 1, 2, 130)  # that `loop` documents
SIGNALS = ("INT", "TERM", "HUP")
PHASES = ("agent", "git", "training")
SHOWN = 4  # differences in a row of the table
PR_SET_PDEATHSIG = 1  # prctl
PR_SET_CHILD_SUBREAPER = 36
# What git itself rewrites in .git; all else there is a person's.
VOLATILE = {
    "objects",
    "logs",
    "refs",
    "index",
    "HEAD",
    "ORIG_HEAD",
    "packed-refs",
    "COMMIT_EDITMSG",
    "FETCH_HEAD",
}


# ---------------------------------------------------------------------------
# The house of a case
# ---------------------------------------------------------------------------


@dataclass
class House:
    """A throwaway folder with all that a night may touch."""

    folder: Path
    project: Path  # where the night is started; a folder of a repository
    edit: bytes | None = None  # of the person's, in the trainer

    @property
    def top(self) -> Path:
        """The working tree that the project lies in."""
        for path in (self.project, *self.project.parents):
            if path == self.folder:
                break
            if os.path.lexists(path / ".git"):
                return path
        raise FileNotFoundError(f"{self.project.name} is in no repository")

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def launcher(self) -> Path:
        """The file that holds the process id of the launcher started last."""
        return self.folder / "launcher"

    @property
    def calls(self) -> Path:
        """The file that has a byte for each call of git, where they are counted."""
        return self.folder / "calls"

    @property
    def ledger(self) -> Path:
        return self.project / "results.tsv"

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of a command in the house."""
        ours = ("AUTORESEARCH_", "GIT_", "HOSTILE_", "PYTHON", "XDG_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return {
            **kept,
            "AUTORESEARCH_CACHE": str(self.folder / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
            "GIT_CEILING_DIRECTORIES": str(self.folder),
            "GIT_CONFIG_NOSYSTEM": "1",
            "HOME": str(self.home),
            "HOUSE": str(self.folder),
            "PYTHONPATH": str(self.project),
            "TMPDIR": str(self.temporary),
            **more,
        }

    def git(self, *arguments: str, folder: Path | None = None) -> str:
        """Return what git prints. Raises CalledProcessError."""
        command = ["git", "-C", str(folder or self.project), *arguments]
        done = subprocess.run(command, env=self.environment(), capture_output=True, check=True)
        return os.fsdecode(done.stdout)

    def start(self, *arguments: str, terminal: int | None = None, **more: str) -> subprocess.Popen[bytes]:
        """Start a command of autoresearch in the project. What it prints goes to the files out and err.

        terminal: file descriptor of its controlling terminal
        more: variables of its environment
        """
        if not (self.project / "launcher" / "cli.py").is_file():  # another checkout's would be found
            raise FileNotFoundError("the command is gone")
        self.launcher.write_text("")
        with open(self.folder / "out", "ab") as out, open(self.folder / "err", "ab") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "launcher.cli", *arguments],
                cwd=self.project,
                env=self.environment(**more),
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=None if terminal is None else lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
        self.launcher.write_text(str(process.pid))
        return process

    def loop(self, act: str = HONEST, experiments: int = EXPERIMENTS) -> list[str]:
        """Return the arguments of a night whose agent does an act."""
        doing = ACTS[act]
        agent = [sys.executable, str(STAND_INS / "agent.py"), str(self.folder), act, *doing.arguments]
        options = ["--experiments", str(experiments), "--pause", "0", "--agent-seconds", f"{doing.seconds:g}"]
        return ["loop", *options, "--agent", shlex.join(agent)]

    def wait(self, process: subprocess.Popen[bytes], seconds: float = NIGHT_SECONDS) -> "Ended":
        """Wait for a command that was started here, and return how it ended."""
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        said = [(self.folder / name).read_text(errors="replace") for name in ("out", "err")]
        for name in ("out", "err"):
            os.replace(self.folder / name, self.folder / f"{name}-{process.pid}")
        return Ended(process.returncode, *said)

    def call(self, *arguments: str, **more: str) -> "Ended":
        return self.wait(self.start(*arguments, **more))


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None  # None: it did not
    out: str
    err: str

    @property
    def experiments(self) -> int:
        """The experiments that a night says it made."""
        found = re.search(r"^experiments: (\d+)$", self.out, re.M)
        return int(found[1]) if found else 0

    @property
    def last(self) -> str:
        lines = [line for line in (self.err + self.out).splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""

    @property
    def explained(self) -> bool:
        """It says in one line why it ended with another code than 0."""
        says = re.search(r"^(ended: |autoresearch: |interrupted$|Error: )", self.out + self.err, re.M)
        return self.code == 0 or bool(says)

    def fault(self, codes: Sequence[int]) -> str:
        """Return what is wrong with this end, "" when nothing is. codes: that it may end with."""
        if self.code is None:
            return "it hangs"
        if "Traceback (most recent call last)" in self.out + self.err:
            return f"traceback: {self.last}"
        if self.code not in codes:
            return f"exit code {self.code}: {self.last}"
        return "" if self.explained else f"exit code {self.code} without a word"

    def __str__(self) -> str:
        if self.code in (0, None):
            return "hangs" if self.code is None else "0"
        why = re.search(r"^(?:ended: |autoresearch: )(.*)", self.out + self.err, re.M)
        return f"{self.code}: {why[1] if why else self.last}"


def build_template(folder: Path) -> House:
    """Build the house that every case begins with a copy of: one run was made there, the baseline's."""
    house = House(folder, folder / "repository")
    for path in (house.temporary, house.home, house.project):
        path.mkdir(parents=True)
    (folder / MARKER).touch()
    (house.home / ".gitconfig").write_text(
        "[user]\nname = me\nemail = me@here\n[init]\ndefaultBranch = main\n"
    )
    (house.home / "private.txt").write_text("private\n")
    copy_project(house.project)
    house.git("init", "-q")
    commit_all(house, "start")
    house.git("branch", "other")
    append(house.project / "README.md", "a line more\n")
    commit_all(house, "a line more")
    house.git("tag", "-a", "-m", "a tag", "v0")
    add_belongings(house)
    checked(house.call("prepare"))
    checked(house.call("run"))
    return house


def copy_project(target: Path) -> None:
    """Copy this project's files, with stand-ins for what takes long."""
    names = subprocess.run(
        ["git", "-C", str(SOURCE), "ls-files", "-z", "-co", "--exclude-standard"],
        capture_output=True,
        check=True,
    )
    for name in map(os.fsdecode, names.stdout.split(b"\0")[:-1]):
        if not name.startswith(("tests/", "benchmarks/", ".")) and (SOURCE / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(SOURCE / name, target / name)
    shutil.copy(STAND_INS / "trainer.py", target / TRAINER)
    shutil.copy(STAND_INS / "scorer.py", target / "backends" / "scorer.py")
    (target / "platforms.yaml").write_text(CONFIG)
    (target / ".gitignore").write_text("__pycache__/\n/runs/\n/results.tsv*\n/ignored/\n")


def add_belongings(house: House) -> None:
    """Add what a person may have lying about."""
    append(house.project / "docs" / "architecture.md", "stashed\n")
    house.git("stash", "-q")
    append(house.project / "docs" / "architecture.md", "edited\n")
    notes = house.project / "notes"
    notes.mkdir()
    (notes / "todo.txt").write_text("to do\n")
    (notes / "private.txt").write_text("mine alone\n")
    (notes / "private.txt").chmod(0o600)
    (notes / "go.sh").write_text("#!/bin/sh\n")
    (notes / "go.sh").chmod(0o755)
    (notes / "link").symlink_to("todo.txt")
    (notes / "dead link").symlink_to("nowhere")
    (notes / "two\nlines").write_text("odd\n")
    (notes / "large.bin").write_bytes(random.Random(1).randbytes(20 * 2**20))
    (notes / "empty").mkdir()
    (house.project / "ignored").mkdir()
    (house.project / "ignored" / "secret.txt").write_text("secret\n")
    (notes / "staged.txt").write_text("staged\n")
    house.git("add", "notes/staged.txt")


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def commit_all(house: House, message: str, folder: Path | None = None) -> None:
    house.git("add", "-A", folder=folder)
    house.git("commit", "-q", "-m", message, folder=folder)


def checked(ended: Ended) -> None:
    """Raise RuntimeError unless a command that no case is about ended well."""
    if ended.code != 0:
        raise RuntimeError(f"the house cannot be built: {ended.out}{ended.err}")


# ---------------------------------------------------------------------------
# What must be as it was
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What is the person's, as it was at one moment."""

    head: str  # commit
    things: dict[str, str]  # name: what describes its content


def look(house: House) -> View:
    """Return what must be there after a night as before it: all but the trainer and the branch."""
    things = {f"home: {name}": value for name, value in files_below(house.home)}
    skipped = {house.project / "runs", house.project / TRAINER, house.ledger}
    if (house.top / ".git").is_dir():
        skipped.add(house.top / ".git")
    for name, value in files_below(house.top, skipped):
        if not name.startswith(f"{house.ledger.relative_to(house.top)}."):  # its lock
            things[name] = value
    trainer = f"{house.git('rev-parse', '--show-prefix').strip()}{TRAINER}"
    for entry in house.git("ls-files", "-s", "-z", folder=house.top).split("\0")[:-1]:
        content, _, path = entry.partition("\t")
        if path != trainer:
            things[f"index: {path} {content[-1]}"] = content
    branch = current_branch(house)
    things["HEAD"] = branch
    for line in house.git("for-each-ref", "--format=%(refname) %(objectname)").splitlines():
        ref, _, value = line.partition(" ")
        if ref != branch and not ref.startswith("refs/autoresearch/"):
            things[ref] = value
    for folder in git_folders(house):
        for name, value in files_below(folder):
            last = os.path.basename(name)
            ours = last.startswith("autoresearch") or last.endswith(".lock")
            if not ours and not VOLATILE & set(name.split("/")):
                things[f".git: {name}"] = value
    return View(house.git("rev-parse", "HEAD").strip(), things)


def current_branch(house: House) -> str:
    """Return the branch that HEAD names, "detached" where it names none."""
    with suppress(subprocess.CalledProcessError):
        return house.git("symbolic-ref", "-q", "HEAD").strip()
    return "detached"


def git_folders(house: House) -> set[Path]:
    """Return the folders of git's files: two where the project is a linked worktree."""
    names = ("--absolute-git-dir", "--git-common-dir")
    return {(house.project / house.git("rev-parse", name).strip()).resolve() for name in names}


def files_below(folder: Path, skipped: set[Path] = frozenset()) -> Iterator[tuple[str, str]]:  # type: ignore[assignment]
    """Yield (path below folder, what describes its content) of all that lies in a folder, and of itself."""
    yield ".", describe(folder)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if path in skipped or entry.name == "__pycache__":
            continue
        if entry.is_dir(follow_symlinks=False):
            for name, value in files_below(path, skipped):
                yield os.path.normpath(os.path.join(entry.name, name)), value
        else:
            yield entry.name, describe(path)


def describe(path: Path) -> str:
    """Return mode and content of a file, link or folder."""
    found = path.lstat()
    mode = f"{found.st_mode:o}"
    if stat.S_ISLNK(found.st_mode):
        return f"{mode} {os.readlink(path)}"
    if stat.S_ISREG(found.st_mode):
        return f"{mode} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return mode


def differences(before: View, house: House) -> list[str]:
    """Return what is not as it was, or not as a night may leave it."""
    try:
        after = look(house)
        found = [f"lost: {name}" for name in before.things if name not in after.things]
        found += [f"new: {name}" for name in after.things if name not in before.things]
        for name, value in before.things.items():
            if after.things.get(name, value) != value:
                found.append(f"changed: {name}")
        found += branch_faults(before, after, house)
        found += lock_faults(house)
        return found
    except subprocess.CalledProcessError as error:
        said = os.fsdecode(error.stderr).strip().splitlines() or [f"git {error.cmd[3]} says nothing"]
        return [f"the repository is broken: {said[0]}"]
    except OSError as error:
        return [f"the repository is broken: {error}"]


def branch_faults(before: View, after: View, house: House) -> list[str]:
    """Return what is wrong with the branch, the trainer and the objects."""
    commits = house.git("rev-list", f"{before.head}..{after.head}").split()
    merged = house.git("merge-base", before.head, after.head).strip()
    found = [] if merged == before.head else ["the branch lost commits"]
    for commit in commits:
        names = house.git("diff-tree", "-r", "-z", "--name-only", "--relative", f"{commit}^", commit)
        if names != f"{TRAINER}\0":
            found.append(f"a commit of {names}")
    trainer = house.project / TRAINER
    if not trainer.is_file() or trainer.is_symlink():
        return [*found, "the trainer is no file"]
    committed = house.git("rev-parse", f"HEAD:./{TRAINER}").strip()
    lies = house.git("hash-object", TRAINER).strip()
    if house.git("ls-files", "-s", TRAINER).split()[1] != committed:
        found.append("the trainer's entry in the index is not HEAD's")
    if lies != committed and trainer.read_bytes() != house.edit:
        found.append("the trainer is neither HEAD's nor the person's")
    if house.edit is not None and trainer.read_bytes() != house.edit:
        command = ["git", "hash-object", f"--path={TRAINER}", "--stdin"]
        edited = subprocess.run(command, cwd=house.project, input=house.edit, capture_output=True, check=True)
        if edited.stdout.decode().strip() not in house.git("rev-list", "--objects", "--all", "HEAD"):
            found.append("the person's edit of the trainer is lost")
    checked = subprocess.run(
        ["git", "-C", str(house.project), "fsck", "--no-progress", "--no-dangling"],
        env=house.environment(),
        capture_output=True,
        text=True,
    )
    if checked.returncode != 0:
        found.append(f"git fsck: {checked.stderr.strip().splitlines()[:1]}")
    return found


def lock_faults(house: House) -> list[str]:
    """Return the locks of git that were left."""
    locks = {path for folder in git_folders(house) for path in folder.rglob("*.lock")}
    return [f"lock: {path.name}" for path in locks if not path.name.startswith("autoresearch")]


def ledger_faults(house: House) -> list[str]:
    """Return what is wrong with the ledger: each run that was started stands in it once."""
    try:
        header, *lines = house.ledger.read_text().splitlines()
    except (OSError, ValueError) as error:
        return [f"ledger: {error}"]
    columns = header.split("\t")
    rows = [line.split("\t") for line in lines]
    found = [f"ledger: a line of {len(row)} fields" for row in rows if len(row) != len(columns)]
    if found:
        return found
    read = [dict(zip(columns, row, strict=True)) for row in rows]
    runs = Counter(row["run"] for row in read if row["status"] != "moved")
    found = [f"ledger: {run} stands in it {count} times" for run, count in runs.items() if count > 1]
    started = [path.parent.name for path in (house.project / "runs").glob("*/run.json")]
    return found + [f"ledger: {run} is missing" for run in started if run not in runs]


def temporary_faults(house: House) -> list[str]:
    left = [entry.name for entry in os.scandir(house.temporary)]
    return [f"temporary: {', '.join(left)}"] if left else []


# ---------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------


def begin_worker() -> None:
    """Have this process adopt what its descendants leave behind, and end with its parent."""

    def stop(*_: object) -> None:
        end_all()
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)  # ignored, it would be ignored by the launcher too
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def living() -> list[psutil.Process]:
    """Return all that was started here and lives."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                process.wait(0) if process.ppid() == os.getpid() else None
            else:
                found.append(process)
    return found


def survivors(seconds: float) -> list[str]:
    """Return a description of what lives on after a night. seconds: that it has to end."""
    deadline = time.monotonic() + seconds
    while (left := living()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [f"alive: {command_of(process)}" for process in left]


def command_of(process: psutil.Process) -> str:
    """Return the end of a process's command."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())[-60:]
    return "gone"


def end_all() -> None:
    """Kill all that was started here."""
    for _ in range(100):
        left = living()
        if not left:
            return
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def wait_for_command(process: subprocess.Popen[bytes], text: str) -> None:
    """Wait until a process below the launcher has `text` in its command, or the launcher ends."""
    deadline = time.monotonic() + PHASE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if child.pid != process.pid and any(text in part for part in child.cmdline()):
                    return
        time.sleep(0.01)


def wait_for_start(house: House, process: subprocess.Popen[bytes], number: int) -> None:
    """Wait until a run has begun, and then until the launcher has started so many processes more."""
    before = set((house.project / "runs").glob("*/run.json"))
    while process.poll() is None and set((house.project / "runs").glob("*/run.json")) == before:
        time.sleep(0.0005)
    known = descendants(process.pid)
    while process.poll() is None and len(descendants(process.pid) - known) < number:
        pass


def descendants(pid: int) -> set[int]:
    """Return the ids of all below a process, fast."""
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                found |= {child} | descendants(child)
    return found


def send(process: subprocess.Popen[bytes], name: str, to_group: bool) -> None:
    """Send a signal to a launcher, or to its process group as a terminal does."""
    number = signal.Signals[f"SIG{name}"]
    with suppress(ProcessLookupError):
        (os.killpg if to_group else os.kill)(process.pid, number)


# ---------------------------------------------------------------------------
# The cases
# ---------------------------------------------------------------------------


@dataclass
class Result:
    """What became of a case."""

    part: str
    case: str
    ended: str = ""
    restart: str = ""
    faults: list[str] = field(default_factory=list)

    def add(self, faults: Sequence[str], when: str = "") -> None:
        for fault in faults:
            if fault not in self.faults and (text := f"{fault}{when}") not in self.faults:
                self.faults.append(text)


@dataclass(frozen=True)
class Task:
    """A case that is to be run, in any process."""

    part: str
    name: str
    seed: str
    template: House
    folder: Path
    patience: float  # seconds until a process must be gone
    calls: int  # of git, in a night
    seconds: float  # that a night takes


def check(result: Result, house: House, before: View, patience: float, when: str) -> None:
    """Look at what a night left: all but temporary files, for a killed one cannot remove them."""
    result.add(survivors(patience), when)
    result.add(differences(before, house), when)
    result.add(ledger_faults(house), when)


def restart(result: Result, house: House, before: View, patience: float, *command: str) -> None:
    """Start the command again, and look at what it leaves."""
    (house.folder / OVER).touch()
    try:
        again = house.call(*command)
    except OSError as error:
        result.restart = f"cannot be started: {error}"
        result.add([f"restart: {error}"])
        return
    result.restart = str(again)
    fault = again.fault((0,))
    if not fault and command[0] == "loop" and again.experiments < EXPERIMENTS:
        fault = f"{again.experiments} experiments"
    result.add([f"restart: {fault}"] if fault else [])
    check(result, house, before, patience, " (restart)")
    result.add(temporary_faults(house))


def run_act(task: Task, house: House, rng: random.Random) -> Result:
    """Run a night whose agent does an act."""
    result = Result(task.part, task.name)
    before = look(house)
    command = house.loop(task.name)
    terminal, slave = pty.openpty()
    attributes = termios.tcgetattr(slave)
    wants_terminal = task.name == "changes the terminal"
    process = house.start(*command, terminal=slave if wants_terminal else None)
    ended = house.wait(process)
    if termios.tcgetattr(slave) != attributes:
        result.add(["the terminal is changed"])
    os.close(slave)
    os.close(terminal)
    result.ended = str(ended)
    allowed = CODES if ACTS[task.name].always else (0,)
    fault = ended.fault(CODES)
    if not fault and ended.code not in allowed:
        fault = f"the night is lost: {ended}"
    result.add([f"ended: {fault}"] if fault else [])
    check(result, house, before, task.patience, "")
    restart(result, house, before, task.patience, *command)
    with suppress(OSError):
        os.unlink("/dev/shm/hostile-agent")
    return result


def run_state(task: Task, house: House, rng: random.Random) -> Result:
    """Run an honest night in a state that a person left."""
    result = Result(task.part, task.name)
    STATES[task.name](house)
    before = look(house)
    ended = house.call(*house.loop())
    result.ended = str(ended)
    fault = ended.fault((0,))
    result.add([f"ended: {fault}"] if fault else [])
    check(result, house, before, task.patience, "")
    restart(result, house, before, task.patience, *house.loop())
    return result


def edit_trainer(house: House, score: str = "2.90") -> None:
    """Edit the trainer as a person would."""
    text = re.sub("^SCORE = .*", f"SCORE = {score}", (house.project / TRAINER).read_text(), flags=re.M)
    (house.project / TRAINER).write_text(text)
    house.edit = text.encode()


def cut_off(
    task: Task, house: House, when: str, strike: Callable[[list[str]], tuple[Ended, str]], tries: bool
) -> Result:
    """Run a night, or `try`, that does not come to its end, and start a night after it.

    strike: starts the command, ends it, and returns (how it ended, what is wrong with that)
    """
    result = Result(task.part, f"{task.name} {when}")
    if tries:
        edit_trainer(house)
        result.case += " (try)"
    before = look(house)
    ended, fault = strike(["try", "-m", "mine"] if tries else house.loop(DAEMONIC))
    result.ended = str(ended)
    result.add([f"ended: {fault}"] if fault else [])
    check(result, house, before, task.patience, "")
    # A killed launcher has written no row. The next one does.
    result.faults = [fault for fault in result.faults if not fault.endswith("is missing")]
    restart(result, house, before, task.patience, *house.loop())
    return result


def fault_of_signal(ended: Ended, name: str) -> str:
    """Return what is wrong with the end of a night that got a signal."""
    untold = -signal.Signals[f"SIG{name}"]
    if ended.code == untold and not ended.err:  # before it could do anything
        return ""
    return ended.fault((0, 1, 3, 130))


def plan_git(house: House, call: int, when: str, name: str, to_group: bool) -> dict[str, str]:
    """Have the launcher signalled at a call of git. Returns variables of its environment."""
    real = shutil.which("git")
    (house.folder / "plan").write_text(f"{call} {when} {name} {'-' if to_group else '+'} {real}\n")
    house.calls.touch()
    return {"PATH": f"{STAND_INS}:{os.environ['PATH']}"}


def run_kill(task: Task, house: House, rng: random.Random) -> Result:
    """Kill the launcher while an agent works, git works, or a trainer runs."""
    phase = PHASES[int(task.name) % len(PHASES)]
    tries = phase != "agent" and rng.random() < 0.25

    def strike(command: list[str]) -> tuple[Ended, str]:
        more = {}
        if phase == "agent":
            more = {SLOW_VARIABLE: LONG} if rng.random() < 0.5 else {}
        if phase == "training":
            more = {SLOW_TRAINING: LONG}
        if phase == "git":
            when = rng.choice(("before", "while", "after"))
            more = plan_git(house, rng.randint(1, task.calls), when, "KILL", False)
        process = house.start(*command, **more)
        if phase != "git":
            wait_for_command(process, "agent.py" if phase == "agent" else TRAINER)
            time.sleep(rng.uniform(0, 0.7))
            send(process, "KILL", False)
        ended = house.wait(process)
        hit = ended.code in (-signal.SIGKILL, 0)  # 0: there were fewer calls of git
        return ended, "" if hit else ended.fault((0, 3))

    return cut_off(task, house, phase, strike, tries)


def run_signal(task: Task, house: House, rng: random.Random) -> Result:
    """Signal the launcher, or its process group, at any moment."""
    name = rng.choice(SIGNALS)
    to_group = rng.random() < 0.5
    moment = rng.uniform(0, task.seconds)
    tries = rng.random() < 0.25

    def strike(command: list[str]) -> tuple[Ended, str]:
        process = house.start(*command)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment / 2 if tries else moment)
        send(process, name, to_group)
        ended = house.wait(process)
        return ended, fault_of_signal(ended, name)

    where = "to the group " if to_group else ""
    return cut_off(task, house, f"SIG{name} {where}after {moment:.1f} s", strike, tries)


def run_git(task: Task, house: House, rng: random.Random) -> Result:
    """Signal the launcher at a call of git, or while it starts the processes of a run."""
    name = rng.choice((*SIGNALS, "KILL"))
    to_group = name != "KILL" and rng.random() < 0.5
    at_start = rng.random() < 0.3
    number = rng.randint(1, 4 if at_start else task.calls)
    when = rng.choice(("before", "while", "after"))
    tries = rng.random() < 0.25

    def strike(command: list[str]) -> tuple[Ended, str]:
        if at_start:
            process = house.start(*command)
            wait_for_start(house, process, number)
            send(process, name, to_group)
        else:
            process = house.start(*command, **plan_git(house, number, when, name, to_group))
        ended = house.wait(process)
        if name == "KILL" and ended.code == -signal.SIGKILL:
            return ended, ""
        return ended, fault_of_signal(ended, name)

    where = f"at start {number} of a run" if at_start else f"{when} call {number} of git"
    return cut_off(task, house, f"SIG{name}{' to the group' if to_group else ''} {where}", strike, tries)


def run_twice(task: Task, house: House, rng: random.Random) -> Result:
    """Start four launchers together after a killed one."""
    result = Result(task.part, task.name)
    before = look(house)
    process = house.start("run", **{SLOW_TRAINING: LONG})
    wait_for_command(process, TRAINER)
    time.sleep(rng.uniform(0, 0.5))
    send(process, "KILL", False)
    result.ended = str(house.wait(process))
    result.add(survivors(task.patience))
    commands = [["run"], ["run"], house.loop(experiments=1), house.loop(experiments=1)]
    rng.shuffle(commands)
    started = [house.start(*command) for command in commands]
    for one in started:
        with suppress(subprocess.TimeoutExpired):
            one.wait(NIGHT_SECONDS)
    codes = [one.returncode for one in started]
    result.restart = " ".join(map(str, codes))
    last = house.wait(started[-1])
    fault = last.fault((0, 3)) or ("" if set(codes) <= {0, 3} else f"exit codes {codes}")
    result.add([f"restart: {fault}"] if fault else [])
    check(result, house, before, task.patience, "")
    result.add(temporary_faults(house))
    return result


# ---------------------------------------------------------------------------
# What a person may be in the middle of
# ---------------------------------------------------------------------------


def stage_and_modify(house: House) -> None:
    append(house.project / "notes" / "staged.txt", "modified\n")


def stage_an_edit(house: House) -> None:
    append(house.project / "README.md", "staged\n")
    house.git("add", "README.md")
    append(house.project / "README.md", "and edited\n")


def stage_a_removal(house: House) -> None:
    house.git("rm", "-q", "--cached", "LICENSE")
    house.git("mv", "AGENTS.md", "docs/agents.md")


def intend_to_add(house: House) -> None:
    house.git("add", "-N", "notes/todo.txt")


def detach(house: House) -> None:
    house.git("checkout", "-q", "--detach")


def lock_the_index(house: House) -> None:
    """Leave what a git leaves that was killed long ago."""
    lock = house.project / ".git" / "index.lock"
    lock.touch()
    os.utime(lock, (1e9, 1e9))


def move_into_a_subfolder(house: House) -> None:
    """Make the project a folder of a larger repository."""
    inner = house.folder / "inner"
    house.project.rename(inner)
    top = house.folder / "repository"
    top.mkdir()
    (inner / ".git").rename(top / ".git")
    house.project = top / "deep er" / "project"
    house.project.parent.mkdir()
    inner.rename(house.project)
    (top / "beside.txt").write_text("beside\n")
    house.git("reset", "-q")
    commit_all(house, "moved", folder=top)
    (top / "untracked.txt").write_text("untracked\n")
    (top / "staged.txt").write_text("staged\n")
    house.git("add", "staged.txt", folder=top)


def add_a_submodule(house: House) -> None:
    """Let the project have a submodule, which is edited."""
    other = house.folder / "other"
    house.git("init", "-q", str(other))
    (other / "file.txt").write_text("file\n")
    commit_all(house, "other", folder=other)
    house.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(other), "sub")
    house.git("commit", "-q", "-m", "a submodule", "--", ".gitmodules", "sub")
    append(house.project / "sub" / "file.txt", "edited\n")


def make_it_a_submodule(house: House) -> None:
    """Make the project a submodule of another repository."""
    above = house.folder / "above"
    house.git("init", "-q", str(above))
    allowed = ("-c", "protocol.file.allow=always")
    house.git(*allowed, "submodule", "--quiet", "add", str(house.project), "project", folder=above)
    commit_all(house, "above", folder=above)
    move_to(house, above / "project")


def make_it_a_worktree(house: House) -> None:
    """Go on in a linked worktree of the repository."""
    worktree = house.folder / "worktree"
    house.git("worktree", "add", "-q", "-b", "mine", str(worktree))
    move_to(house, worktree)


def move_to(house: House, project: Path) -> None:
    """Go on in another working tree, with the ledger and something of the person's."""
    for name in ("results.tsv", "runs"):
        (house.project / name).rename(project / name)
    house.project = project
    (project / "untracked.txt").write_text("untracked\n")
    (project / "staged.txt").write_text("staged\n")
    house.git("add", "staged.txt")


def add_hooks(house: House) -> None:
    """Let every hook fail, and say that it was called."""
    for name in ("pre-commit", "post-checkout", "post-index-change", "reference-transaction", "post-commit"):
        hook = house.project / ".git" / "hooks" / name
        hook.write_text(f"#!/bin/sh\necho {name} >> '{house.home}/hooks-called'\nexit 1\n")
        hook.chmod(0o755)


def configure(**values: str) -> Callable[[House], None]:
    def change(house: House) -> None:
        for name, value in values.items():
            house.git("config", name.replace("__", "."), value)

    return change


STATES: dict[str, Callable[[House], None]] = {
    "nothing special": lambda house: None,
    "a new file, staged and then modified": stage_and_modify,
    "an edit, staged and then edited": stage_an_edit,
    "a removal and a move, staged": stage_a_removal,
    "a file that is to be added": intend_to_add,
    "an edit in README.md": lambda house: append(house.project / "README.md", "edited\n"),
    "an edit in the trainer": edit_trainer,
    "an edit in the trainer that is worse": lambda house: edit_trainer(house, "9.00"),
    "a detached HEAD": detach,
    "a stale index.lock": lock_the_index,
    "a project in a subfolder": move_into_a_subfolder,
    "a submodule in the project": add_a_submodule,
    "a project that is a submodule": make_it_a_submodule,
    "a linked worktree": make_it_a_worktree,
    "hooks that fail": add_hooks,
    "commits that are to be signed": configure(commit__gpgSign="true", gpg__program="false"),
    "core.autocrlf": configure(core__autocrlf="true"),
    "core.fsmonitor and the untracked cache": configure(core__fsmonitor="true", core__untrackedCache="true"),
    "core.fileMode off": configure(core__fileMode="false"),
}


# ---------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Cases of one kind."""

    run: Callable[[Task, House, random.Random], Result]
    names: list[str]


def numbered(count: int) -> list[str]:
    return [str(number) for number in range(count)]


PARTS = {
    "acts": Part(run_act, [name for name in ACTS if not name.startswith(THERE)]),
    "states": Part(run_state, list(STATES)),
    "kill": Part(run_kill, numbered(300)),
    "signal": Part(run_signal, numbered(150)),
    "git": Part(run_git, numbered(100)),
    "twice": Part(run_twice, numbered(100)),
    "absolute": Part(run_act, [name for name in ACTS if name.startswith(THERE)]),
}
APART = "absolute"  # is asked for by name


def run_task(task: Task) -> Result:
    """Run a case in a copy of the template."""
    subprocess.run(["cp", "-a", str(task.template.folder), str(task.folder)], check=True)
    house = House(task.folder, task.folder / task.template.project.name)
    (house.folder / PROJECT).write_text(str(house.project))
    try:
        return PARTS[task.part].run(task, house, random.Random(f"{task.seed} {task.part} {task.name}"))
    except Exception as error:  # of this benchmark: the other cases go on
        traceback.print_exc()
        return Result(task.part, task.name, faults=[f"the benchmark failed: {error!r}"])
    finally:
        end_all()


def measure(template: House, folder: Path) -> tuple[int, float]:
    """Return how often a night calls git, and how many seconds it takes."""
    subprocess.run(["cp", "-a", str(template.folder), str(folder)], check=True)
    house = House(folder, folder / template.project.name)
    began = time.monotonic()
    checked(house.call(*house.loop(), **plan_git(house, -1, "after", "INT", False)))
    return house.calls.stat().st_size, time.monotonic() - began


def print_result(result: Result) -> None:
    """Print a row of the table."""
    differs = "; ".join(fault[:150] for fault in result.faults[:SHOWN])
    if len(result.faults) > SHOWN:
        differs += f"; and {len(result.faults) - SHOWN} more"
    mark = "FAILED" if result.faults else "ok"
    columns = (mark, result.part, result.case, result.ended[:90], result.restart[:90], differs)
    print(" | ".join(json.dumps(text, ensure_ascii=False)[1:-1] for text in columns), flush=True)


def print_counts(results: Sequence[Result]) -> None:
    """Print how many cases of each part failed, and in what."""
    for part in PARTS:
        mine = [result for result in results if result.part == part]
        if not mine:
            continue
        kinds = Counter(
            kind for result in mine for kind in {fault.partition(":")[0] for fault in result.faults}
        )
        for kind, count in kinds.most_common():
            print(f"{part}: {count} cases with: {kind}")
        failed = sum(bool(result.faults) for result in mine)
        print(f"failed_{part}: {failed} of {len(mine)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = [name for name in PARTS if name != APART]
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=usual, help=f"all but {APART} if left out"
    )
    parser.add_argument("--count", type=int, help="cases of each part, drawn at random; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--patience", type=float, default=2.0, help="seconds until processes must be gone")
    parser.add_argument("--keep", type=Path, help="a new folder for the houses, which stay")
    return parser.parse_args()


def choose(asked: argparse.Namespace, template: House, folder: Path) -> Iterator[Task]:
    """Yield the cases that were asked for."""
    aimed = {"kill", "signal", "git"} & set(asked.part)
    calls, seconds = measure(template, folder / "measured") if aimed else (0, 0.0)
    for part in asked.part:
        names = [name for name in PARTS[part].names if asked.only in name]
        if asked.count is not None and asked.count < len(names):
            rng = random.Random(f"{asked.seed} {part}")
            names = [names[index] for index in sorted(rng.sample(range(len(names)), asked.count))]
        for number, name in enumerate(names):
            place = folder / f"{part}-{number}"
            yield Task(part, name, str(asked.seed), template, place, asked.patience, calls, seconds)


def main() -> None:
    """Run the cases, and print the table."""
    asked = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if asked.keep:
        asked.keep.mkdir(parents=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        folder = (asked.keep or Path(scratch)).resolve()
        tasks = list(choose(asked, build_template(folder / "template"), folder))
        print("result | part | case | ended | restart | what differs", flush=True)
        for task, result in run_tasks(tasks, asked.jobs):
            results.append(result)
            print_result(result)
            if not asked.keep:
                remove(task.folder)
    print_counts(results)
    sys.exit(any(result.faults for result in results if result.part != APART))


def run_tasks(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Result]]:
    """Run cases in processes of their own, and yield each with its result."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=begin_worker) as pool:
        try:
            futures = {pool.submit(run_task, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def remove(folder: Path) -> None:
    """Remove a house, whatever was done to it."""
    subprocess.run(["chmod", "-R", "u+rwX", str(folder)], stderr=subprocess.DEVNULL)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
