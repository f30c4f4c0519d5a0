"""
A throwaway house for nights: where they run, what must be there afterwards as before, what may not be left.

benchmarks/hostile.py runs nights in it. The repository is a copy of this project, in which trainer and scorer
are stand-ins that take a second (stand_ins/).
"""

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from stand_ins.agent import MARKER

SOURCE = Path(__file__).resolve().parent.parent
STAND_INS = Path(__file__).resolve().parent / "stand_ins"
TRAINER = "train_cuda.py"
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
IGNORE = "__pycache__/\n/report/\n/runs/\n/results.tsv*\n/ignored/\n"
IDENTITY = "[user]\nname = me\nemail = me@here\n[init]\ndefaultBranch = main\n"
# Variables that are a house's own, or of whoever started the benchmark.
OWN_VARIABLES = ("AUTORESEARCH_", "GIT_", "HOSTILE_", "PYTHON", "XDG_")
NIGHT_SECONDS = 150.0  # after which a night is said to hang; an honest one takes ten
GIT_SECONDS = 60.0
TRUSTED = (
    "-c",
    "core.fsmonitor=false",
    "-c",
    "core.hooksPath=/dev/null",
)  # of a repository that is looked at
# What git rewrites in .git by itself. All else there is a person's.
VOLATILE = {"objects", "logs", "refs", "packed-refs", "index", "HEAD"}
VOLATILE |= {"ORIG_HEAD", "FETCH_HEAD", "COMMIT_EDITMSG"}
PR_SET_PDEATHSIG = 1  # prctl
PR_SET_CHILD_SUBREAPER = 36


@dataclass
class House:
    """A folder with all that a night may touch."""

    folder: Path
    project: Path  # where nights are started: a working tree, or a folder of one
    edit: bytes | None = None  # of the person's, in the trainer

    @property
    def top(self) -> Path:
        """The working tree that the project lies in. Raises FileNotFoundError."""
        for path in (self.project, *self.project.parents):
            if path == self.folder:
                break
            if os.path.lexists(path / ".git"):
                return path
        raise FileNotFoundError(f"{self.project.name} is in no repository")

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def temporary(self) -> Path:
        """The folder for temporary files."""
        return self.folder / "tmp"

    @property
    def launcher(self) -> Path:
        """The file that holds the process id of the launcher that was started last."""
        return self.folder / "launcher"

    @property
    def ledger(self) -> Path:
        return self.project / "results.tsv"

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of a command in the house."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}
        return {
            **kept,
            "AUTORESEARCH_CACHE": str(self.folder / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
            "GIT_CEILING_DIRECTORIES": str(self.folder),
            "GIT_CONFIG_NOSYSTEM": "1",
            "HOME": str(self.home),
            "HOUSE": str(self.folder),
            "MPLCONFIGDIR": str(self.folder / "matplotlib"),  # it keeps a list of fonts
            "PYTHONPATH": str(self.project),
            "TMPDIR": str(self.temporary),
            **more,
        }

    def git(self, *arguments: str, folder: Path | None = None, given: bytes = b"") -> str:
        """Return what git prints. Raises CalledProcessError, TimeoutExpired.

        folder: where it is called; the project if left out
        given: its standard input
        """
        command = ["git", "-C", str(folder or self.project), *TRUSTED, *arguments]
        done = subprocess.run(
            command,
            env=self.environment(),
            input=given,
            capture_output=True,
            check=True,
            timeout=GIT_SECONDS,
        )
        return os.fsdecode(done.stdout)

    def commit_all(self, message: str, folder: Path | None = None) -> None:
        self.git("add", "-A", folder=folder)
        self.git("commit", "-q", "-m", message, folder=folder)

    def start(self, *arguments: str, terminal: int | None = None, **more: str) -> subprocess.Popen[bytes]:
        """Start a command of autoresearch in the project. What it prints goes to the files out and err.

        terminal: file descriptor of its controlling terminal
        more: variables of its environment

        Raises:
            FileNotFoundError: the command is gone.
        """
        if not (self.project / "launcher" / "cli.py").is_file():  # Python would find another checkout's
            raise FileNotFoundError("the command is gone")
        self.launcher.write_text("")
        with open(self.folder / "out", "ab") as out, open(self.folder / "err", "ab") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "launcher.entry", *arguments],
                cwd=self.project,
                env=self.environment(**more),
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=None if terminal is None else control_terminal,
            )
        self.launcher.write_text(str(process.pid))
        return process

    def wait(self, process: subprocess.Popen[bytes], seconds: float = NIGHT_SECONDS) -> "Ended":
        """Wait for a command that was started here, and return how it ended. One that hangs is killed.

        seconds: after which it is said to hang
        """
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
            process.wait()
        said = [(self.folder / name).read_text(errors="replace") for name in ("out", "err")]
        for name in ("out", "err"):
            os.replace(self.folder / name, self.folder / f"{name}-{process.pid}")
        return Ended(code, *said)

    def call(self, *arguments: str, **more: str) -> "Ended":
        """Run a command of autoresearch to its end. See start."""
        return self.wait(self.start(*arguments, **more))


def control_terminal() -> None:
    """Make standard input the controlling terminal of this process, which leads a session."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None  # None: it did not
    out: str
    err: str

    @property
    def experiments(self) -> int:
        """The experiments that a night says it made, baselines included."""
        return sum(map(int, re.findall(r"^(?:experiments|baselines): (\d+)$", self.out, re.M)))

    @property
    def why(self) -> str:
        """The line that says why it ended, "" when there is none."""
        found = re.search(r"^(?:ended|autoresearch|Error): (.*)|^interrupted\b.*$", self.out + self.err, re.M)
        return (found[1] or "interrupted") if found else ""

    @property
    def last(self) -> str:
        lines = [line.strip() for line in (self.out + self.err).splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def fault(self, codes: Sequence[int]) -> str:
        """Return what is wrong with this end, "" when nothing is. codes: that it may end with."""
        if self.code is None:
            return "it hangs"
        if "Traceback (most recent call last)" in self.out + self.err:
            return f"traceback: {self.last}"
        if self.code not in codes:
            return f"exit code {self.code}: {self.why or self.last}"
        if self.code != 0 and not self.why:
            return f"exit code {self.code} without a word"
        return ""

    def __str__(self) -> str:
        if self.code is None:
            return "hangs"
        if self.code < 0:
            return signal.Signals(-self.code).name
        return f"{self.code}: {self.why or self.last}" if self.code else "0"


def build_house(folder: Path) -> House:
    """Build a house with a repository of two commits, two branches and a tag."""
    house = House(folder, folder / "repository")
    for path in (house.temporary, house.home, house.project):
        path.mkdir(parents=True)
    (folder / MARKER).touch()
    (house.home / ".gitconfig").write_text(IDENTITY)
    (house.home / "private.txt").write_text("private\n")
    copy_project(house.project)
    house.git("init", "-q")
    house.commit_all("start")
    house.git("branch", "other")
    append(house.project / "README.md", "a line more\n")
    house.commit_all("a line more")
    house.git("tag", "-a", "-m", "a tag", "v0")
    return house


def copy_project(target: Path) -> None:
    """Copy this project's files, with stand-ins for what takes long."""
    command = ["git", "-C", str(SOURCE), "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout
    for name in map(os.fsdecode, listed.split(b"\0")[:-1]):
        if not name.startswith(("tests/", "benchmarks/", ".")) and (SOURCE / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(SOURCE / name, target / name)
    shutil.copy(STAND_INS / "trainer.py", target / TRAINER)
    shutil.copy(STAND_INS / "scorer.py", target / "backends" / "scorer.py")
    (target / "platforms.yaml").write_text(CONFIG)
    (target / ".gitignore").write_text(IGNORE)


def copy_house(house: House, folder: Path) -> House:
    """Return a copy of a house."""
    subprocess.run(["cp", "-a", str(house.folder), str(folder)], check=True)
    return House(folder, folder / house.project.relative_to(house.folder))


def remove_house(folder: Path) -> None:
    """Remove a house, whatever was done to it."""
    subprocess.run(["chmod", "-R", "u+rwX", str(folder)], stderr=subprocess.DEVNULL)
    shutil.rmtree(folder, ignore_errors=True)


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


# ---------------------------------------------------------------------------
# What must be as it was
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What is the person's, at one moment."""

    head: str  # commit
    things: dict[str, str]  # name: what describes its content


def look(house: House) -> View:
    """Return all that must be there after a night as before it. Raises CalledProcessError, OSError."""
    things = {f"home: {name}": value for name, value in files_below(house.home)}
    things |= files_of(house)
    things |= index_of(house)
    things |= refs_of(house)
    for folder in git_folders(house):
        for name, value in files_below(folder):
            last = os.path.basename(name)
            ours = last.startswith("autoresearch") or last.endswith(".lock")
            if not ours and not VOLATILE & set(name.split("/")):
                things[f".git: {name}"] = value
    return View(house.git("rev-parse", "HEAD").strip(), things)


def files_of(house: House) -> dict[str, str]:
    """Return what lies in the working tree, but for the runs, and the trainer's content."""
    ours = ("report", "runs", "results.tsv", "results.tsv.lock", TRAINER)
    skipped = {house.project / name for name in ours}
    if (house.top / ".git").is_dir():
        skipped.add(house.top / ".git")
    things = dict(files_below(house.top, skipped))
    things[f"mode of {TRAINER}"] = f"{(house.project / TRAINER).lstat().st_mode:o}"
    return things


def files_below(folder: Path, skipped: Collection[Path] = ()) -> Iterator[tuple[str, str]]:
    """Yield (path below folder, what describes its content) of a folder and of all that lies in it."""
    yield ".", describe(folder)
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if path in skipped or entry.name == "__pycache__":
            continue
        if not entry.is_dir(follow_symlinks=False):
            yield entry.name, describe(path)
            continue
        for name, value in files_below(path, skipped):
            yield os.path.normpath(os.path.join(entry.name, name)), value


def describe(path: Path) -> str:
    """Return mode and content of a file, link or folder."""
    found = path.lstat()
    mode = f"{found.st_mode:o}"
    if stat.S_ISLNK(found.st_mode):
        return f"{mode} {os.readlink(path)}"
    if stat.S_ISREG(found.st_mode):
        return f"{mode} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return mode


def index_of(house: House) -> dict[str, str]:
    """Return the entries of the index, but for the trainer's."""
    trainer = f"{house.git('rev-parse', '--show-prefix').strip()}{TRAINER}"
    things = {}
    for entry in house.git("ls-files", "-s", "-v", "-z", folder=house.top).split("\0")[:-1]:
        content, _, path = entry.partition("\t")
        if path != trainer:
            things[f"index: {path} {content[-1]}"] = content  # the last letter is the stage
    return things


def refs_of(house: House) -> dict[str, str]:
    """Return HEAD and the refs, but for our own, and what the branch of HEAD names."""
    branch = branch_of(house)
    things = {"HEAD": branch}
    for line in house.git("for-each-ref", "--format=%(refname) %(objectname)").splitlines():
        ref, _, value = line.partition(" ")
        if ref != branch and not ref.startswith("refs/autoresearch/"):
            things[ref] = value
    return things


def branch_of(house: House) -> str:
    """Return the branch that HEAD names, "detached" where it names none."""
    with suppress(subprocess.CalledProcessError):
        return house.git("symbolic-ref", "-q", "HEAD").strip()
    return "detached"


def git_folders(house: House) -> set[Path]:
    """Return the folders of git's files: two where the project is a linked worktree."""
    names = ("--absolute-git-dir", "--git-common-dir")
    return {(house.project / house.git("rev-parse", name).strip()).resolve() for name in names}


def differences(before: View, house: House) -> list[str]:
    """Return what is not as it was, and not as a night may leave it."""
    try:
        after = look(house)
        found = [f"lost: {name}" for name in before.things if name not in after.things]
        found += [f"new: {name}" for name in after.things if name not in before.things]
        for name, value in before.things.items():
            if after.things.get(name, value) != value:
                found.append(f"changed: {name}")
        return found + branch_faults(before, after, house) + trainer_faults(house) + git_faults(house)
    except subprocess.CalledProcessError as error:
        said = os.fsdecode(error.stderr).strip().splitlines() or [f"git failed: {error.cmd[-1]}"]
        return [f"the repository is broken: {said[0]}"]
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"the repository is broken: {error}"]


def branch_faults(before: View, after: View, house: House) -> list[str]:
    """Return what is wrong with the branch: it may have more commits, each of the trainer alone."""
    base = house.git("merge-base", before.head, after.head).strip()
    if base != before.head:
        return ["branch: it lost commits"]
    found = []
    for commit in house.git("rev-list", f"{base}..{after.head}").split():
        names = house.git("diff-tree", "-r", "-z", "--name-only", "--relative", f"{commit}^", commit)
        if names != f"{TRAINER}\0":
            found.append(f"branch: a commit of {names!r}")
    return found


def trainer_faults(house: House) -> list[str]:
    """Return what is wrong with the trainer: it is HEAD's, or as the person edited it."""
    path = house.project / TRAINER
    if not path.is_file() or path.is_symlink():
        return ["trainer: it is no file"]
    found = []
    committed = house.git("rev-parse", f"HEAD:./{TRAINER}").strip()
    if house.git("ls-files", "-s", TRAINER).split()[1] != committed:
        found.append("trainer: its entry in the index is not HEAD's")
    text = path.read_bytes()
    if text != house.edit:
        if house.git("hash-object", TRAINER).strip() != committed:
            found.append("trainer: it is neither HEAD's nor the person's")
        if house.edit is not None and not reachable(house, house.edit):
            found.append("trainer: the person's edit is lost")
    return found


def reachable(house: House, text: bytes) -> bool:
    """Return whether a version of the trainer is in a commit that a ref leads to."""
    blob = house.git("hash-object", f"--path={TRAINER}", "--stdin", given=text).strip()
    return blob in house.git("rev-list", "--objects", "--all", "HEAD")


def git_faults(house: House) -> list[str]:
    """Return the locks that were left in .git, and what git fsck complains of."""
    locks = [path.name for folder in git_folders(house) for path in folder.rglob("*.lock")]
    found = [f"lock: {name}" for name in locks if not name.startswith("autoresearch")]
    try:
        house.git("fsck", "--no-progress", "--no-dangling")
    except subprocess.CalledProcessError as error:
        found.append(f"fsck: {os.fsdecode(error.stderr).strip().splitlines()[:1]}")
    return found


# ---------------------------------------------------------------------------
# The ledger and temporary files
# ---------------------------------------------------------------------------


def ledger_faults(house: House) -> list[str]:
    """Return what is wrong with the ledger: it parses, and each run that was started stands in it once."""
    try:
        header, *lines = house.ledger.read_text().splitlines()
    except (OSError, ValueError) as error:
        return [f"ledger: {error}"]
    columns = header.split("\t")
    rows = [line.split("\t") for line in lines]
    torn = [f"ledger: a line of {len(row)} fields" for row in rows if len(row) != len(columns)]
    if torn:
        return torn
    named = [dict(zip(columns, row, strict=True)) for row in rows]
    runs = Counter(row["run"] for row in named if row["status"] != "moved")
    found = [f"ledger: {run} stands in it {count} times" for run, count in runs.items() if count > 1]
    started = [path.parent.name for path in (house.project / "runs").glob("*/run.json")]
    return found + [f"ledger: {run} is missing" for run in started if run not in runs]


def temporary_faults(house: House) -> list[str]:
    """Return what is left among the temporary files."""
    left = [entry.name for entry in os.scandir(house.temporary)] if house.temporary.is_dir() else []
    return [f"temporary: {', '.join(left)}"] if left else []


# ---------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------


def adopt_orphans() -> None:
    """Have this process adopt what its descendants leave behind, and end with the process that started it."""

    def stop(*_: object) -> None:
        end_all()
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)  # were it ignored, launchers would ignore it too
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def living() -> list[psutil.Process]:
    """Return all that this process started, with what came of it, and that lives."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
            elif process.ppid() == os.getpid():
                process.wait(0)
    return found


def survivors(seconds: float) -> list[str]:
    """Return a description of what lives on after a night, but for the sshd of a lab.

    seconds: that it has to end
    """
    deadline = time.monotonic() + seconds
    while True:
        left = [process for process in living() if not is_sshd(process)]
        if not left or time.monotonic() > deadline:
            return [f"alive: {end_of_command(process)}" for process in left]
        time.sleep(0.05)


def is_sshd(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.name().startswith("sshd")
    return False


def end_of_command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())[-60:]
    return "gone"


def end_all() -> None:
    """Kill all that this process started, with what came of it."""
    for _ in range(100):
        left = living()
        if not left:
            return
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def descendants(pid: int) -> set[int]:
    """Return the ids of all processes below one. It takes no time."""
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                found |= {child} | descendants(child)
    return found
