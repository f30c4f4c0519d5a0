"""
Damaged files, odd words and bad moments: no command answers with a traceback, and every run stands once.

    uv run python benchmarks/fuzz.py [--cases 2000] [--seed 1] [--kinds events ledger ...]

A case damages one thing, at random, and calls the command line on it in this process: each exception that is
neither click's nor a UserError counts, and so does what an assertion here finds wrong. Some cases are real
processes: commands in odd environments, Ctrl-C while they import, and four launchers that start together
after one was killed. No experiment is run and no track is prepared: what passes the door is done. Everything
happens in a temporary folder. Prints a table; exits 1 when a case failed, and says how to see it again.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in place of benchmarks/, which has a night.py of its own

from click.testing import CliRunner  # noqa: E402

from backends import platforms  # noqa: E402
from backends.protocol import (  # noqa: E402
    EventError,
    Failure,
    Invalid,
    Log,
    Start,
    Stop,
    format_event,
    parse_event,
)
from launcher import cli  # noqa: E402
from launcher.ledger import COLUMNS, TYPES, Ledger, Row, by_board, to_line  # noqa: E402
from launcher.runs import record_killed_runs, run_dir  # noqa: E402
from launcher.verdict import survey_board  # noqa: E402
from prepare import UserError  # noqa: E402

SHOWN = 3  # failures of a kind that are printed
LAUNCHERS = 4
STARTED_WITHIN = 1.5  # seconds
COMMAND = [sys.executable, "-c", "from launcher.entry import main; main()"]
INTERRUPTED_WITHIN = (0.1, 1.0)  # seconds after its start that a command gets Ctrl-C
PRINTED = re.compile(r"^(Traceback|Exception ignored)|Error: ", re.M)

# What is put in the place of a number, a word, a line.
ODD_NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "-0.0",
    "1e400",
    "1e-400",
    "9" * 5000,
    "2.5",
    "0x10",
    "1_0",
    "١",
]
ODD_TEXTS = [
    "",
    " ",
    "-",
    "--",
    "..",
    "../x",
    "/",
    "/dev/null",
    "~",
    "a b",
    "a\tb\nc",
    "\x1b[31m",
    "é",
    "\u2028",
    "\udce9",
    "𝕊" * 300,
    "x" * 5000,
    "{prompt}",
    "%s",
    "[/x]",
    "'",
    "best",
    "last",
]
ODD_JSON = [
    b"",
    b"[]",
    b"{}",
    b"null",
    b"3",
    b'"x"',
    b"{",
    b"\xff\xfe",
    b"\x00" * 40,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"row": []}',
    b'{"row": {}, "pid": 1e400}',
    b'{"pid": -1, "row": {"run": "../x"}}',
    b'{"val_bpb": NaN}',
    b'{"trainer": "../../x"}',
    b"9" * 5000,
    b'{"x": ' + b"9" * 5000 + b"}",
]
ODD_VALUES = [
    None,
    True,
    -1,
    2.5,
    math.nan,
    math.inf,
    1e308,
    10**400,
    "",
    "x",
    "\ud800",
    "\x00",
    [],
    {},
    [[]],
]

START = Start("a CPU", "cpu", "t", 1, 300.0, 2.5, 2, 1000, 1.0, "float32", 12.0, {"w": [2, 3]}, {"a": True})
LOG = Log(10, 3.5, 3.6, 1000, 1.5, 660.0, 12.5)
STOP = Stop(10, 1000, 99.5, {"attention": 0.5})
EVENTS = (START, LOG, STOP, Invalid("cheat"), Failure("oom", "m"))


class Wrong(Exception):
    """No traceback, and yet not what it should be. The message says what."""


class Fuzzer:
    """A house in a temporary folder, and one source of chance."""

    def __init__(self, seed: int, home: Path) -> None:
        self.chance = random.Random(seed)
        self.home = home
        self.yaml = (ROOT / "platforms.yaml").read_bytes()
        self.runs = [f"20260101-00000{i}-abcd" for i in range(6)]

    # --- The house ------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Write the house anew: six runs on a board, with their folders, a configuration, prepared data."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(parents=True)
        os.chdir(self.home)
        os.environ["AUTORESEARCH_HOME"] = str(self.home)
        os.environ["AUTORESEARCH_CACHE"] = str(self.home / "cache")
        os.environ["AUTORESEARCH_CONFIG"] = str(self.home / "platforms.yaml")
        (self.home / "platforms.yaml").write_bytes(self.yaml)
        platforms.load_platforms.cache_clear()
        rows = [self.row(run, 1.5 - i / 100) for i, run in enumerate(self.runs)]
        lines = ["\t".join(COLUMNS), *map(to_line, rows)]
        (self.home / "results.tsv").write_text("".join(line + "\n" for line in lines))
        for row in rows:
            self.write_run(row)
        data = self.home / "cache" / "pysource-0123456789ab"
        data.mkdir(parents=True)
        (data / "meta.json").write_text("{}")
        loop = self.home / "runs" / "loop"
        loop.mkdir()
        (loop / "step_shares.jsonl").write_text('{"source": "0123456789ab", "shares": {"attention": 0.5}}\n')

    def row(self, run: str, score: float) -> Row:
        return Row(
            commit="abc1234",
            val_bpb=score,
            status="keep",
            description="an idea",
            run=run,
            time="2026-01-01T00:00:00Z",
            platform="cpu",
            device="a CPU",
            track="pysource",
            seed=1,
            rules=2,
            fingerprint="0123456789abcdef",
            budget=300.0,
            val_tokens=16384,
            source="0123456789ab",
        )

    def write_run(self, row: Row) -> None:
        """Write the folder of a run as a launcher leaves it."""
        folder = run_dir(row.run)
        folder.path.mkdir(parents=True)
        (folder.path / "train_cuda.py").write_text("pass\n")
        record = {"row": asdict(row), "pid": 2**30, "trainer": "train_cuda.py"}
        folder.record.write_text(json.dumps(record))
        folder.result.write_text(json.dumps({"val_bpb": row.val_bpb, "dtype": "float32"}))
        folder.events.write_text(json.dumps({"at": 1.0, **asdict(LOG)}) + "\n")
        (folder.path / "answer.json").write_text('{"description": "an idea", "learned": "much"}')
        (folder.path / "sealed.json").write_text('{"sealed_bpb": 1.4}')
        (folder.path / "row.json").write_text(json.dumps(asdict(row)))

    def call(self, *arguments: str) -> None:
        """Call the command line. Raises what is neither click's nor a UserError, and Wrong."""
        done = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        if done.exit_code not in (0, 1, 2):
            raise Wrong(f"exit code {done.exit_code}")
        if done.exit_code and len(done.stderr.strip().splitlines()) == 0:
            raise Wrong("it failed and said nothing")

    def pick(self, choices: Any) -> Any:
        return self.chance.choice(list(choices))

    # --- The kinds ------------------------------------------------------------------------------------------

    def events(self) -> None:
        """A line of a trainer's is an event that can be written again, or an EventError."""
        event = self.pick(EVENTS)
        values = json.loads(format_event(event))
        name = self.pick(values)
        values[name] = self.pick([*ODD_VALUES, self.nest()])
        if self.chance.random() < 0.2:
            values[self.pick(ODD_TEXTS)] = self.pick(ODD_VALUES)
        line: bytes | str = json.dumps(values).encode()
        if self.chance.random() < 0.3:
            line = self.damage(line)
        if self.chance.random() < 0.1:
            line = json.dumps(values, ensure_ascii=False)
        try:
            read = parse_event(line)
        except EventError as error:
            if "\n" in str(error) or len(str(error)) > 300:
                raise Wrong(f"the error is no line: {error}") from None
            return
        again = parse_event(format_event(read))
        if again != read:
            raise Wrong(f"{read} became {again}")

    def nest(self) -> Any:
        value: Any = self.pick(ODD_VALUES)
        for _ in range(self.pick([1, 50, 190, 900])):
            value = {"a": value} if self.chance.random() < 0.5 else [value]
        return value

    def damage(self, data: bytes) -> bytes:
        """Return bytes with a part cut out, doubled, or replaced."""
        start = self.chance.randrange(len(data) + 1)
        end = min(len(data), start + self.pick([0, 1, 5, 40, 400]))
        junk = self.pick([b"", b"\xff", b"\x00", b"\n", b"\t", b"\r\n", b": &a", b"*a", data[start:end] * 2])
        if self.chance.random() < 0.1:
            return data[:start]
        return data[:start] + junk + data[end:]

    def ledger(self) -> None:
        """A damaged ledger is read, ranked, and grows."""
        path = self.home / "results.tsv"
        data = path.read_bytes()
        kind = self.chance.random()
        if kind < 0.4:
            data = self.damage(data)
        elif kind < 0.9:
            lines = [line.split(b"\t") for line in data.split(b"\n")]
            for _ in range(self.pick([1, 1, 5, 50])):
                cells = self.pick(lines)
                odd = self.pick([*ODD_NUMBERS, *ODD_TEXTS]).encode(errors="surrogateescape")
                cells[self.chance.randrange(len(cells))] = odd
            data = b"\n".join(b"\t".join(cells) for cells in lines)
        else:
            data = self.pick(
                [b"", b"\x00" * 500, b"\xff\xfe", b"notes\n", b"\n\n", b"val_bpb\n", b"\xef\xbb\xbf" + data]
            )
        path.write_bytes(data)
        rows = Ledger(path).rows()
        for row in rows:
            if row.ranked and not 0 < row.val_bpb < math.inf:
                raise Wrong(f"{row.val_bpb} is ranked")
        for board in by_board(rows):
            survey_board(rows, board)
        command = self.pick(
            ["leaderboard", "leaderboard --json", "leaderboard --tsv", "show best", "confirm"]
        )
        self.call(*command.split())
        if self.chance.random() < 0.5:
            self.appended(path)
        record_killed_runs()
        self.expect_runs(self.runs, before=Counter(row.run for row in rows))

    def expect_runs(self, wanted: Iterable[str], before: Mapping[str, int] | None = None) -> None:
        """Raise Wrong unless these runs stand in the ledger, and none twice that did not `before`."""
        found = Counter(row.run for row in Ledger(self.home / "results.tsv").rows() if row.run)
        twice = [run for run, count in found.items() if count > max(1, (before or {}).get(run, 0))]
        lost = [run for run in wanted if run not in found]
        if twice or lost:
            raise Wrong(f"twice in the ledger: {twice}; not in it: {lost}")

    def appended(self, path: Path) -> None:
        """Append a row with odd values. It is read back, and stands once."""
        values: dict[str, Any] = {"status": "discard", "val_bpb": 1.5, "run": "20270101-000000-abcd"}
        for name in self.chance.sample(COLUMNS, 3):
            if TYPES[name] is str and name not in ("run", "status"):
                values[name] = self.pick(ODD_TEXTS)
            elif TYPES[name] is float:
                values[name] = self.pick([math.nan, math.inf, -1.0, 0.0, 1e308, 5e-324, 2])
            elif TYPES[name] is int:
                values[name] = self.pick([-1, 0, 10**18, 2.5, True])
        try:
            Ledger(path).append(Row(**values))
        except UserError:
            return  # it is no ledger
        found = [row for row in Ledger(path).rows() if row.run == values["run"]]
        if len(found) != 1:
            raise Wrong(f"a row with {values} is read back {len(found)} times")

    def yaml_file(self) -> None:
        """A damaged platforms.yaml is a line that names the file."""
        path = self.home / "platforms.yaml"
        data = self.yaml
        for _ in range(self.pick([1, 1, 2, 6])):
            data = self.damage_yaml(data)
        path.write_bytes(data)
        platforms.load_platforms.cache_clear()
        command = self.pick(["platforms", "platforms --json --platform cpu", "clean", "loop --experiments 1"])
        self.call(*command.split())

    def damage_yaml(self, data: bytes) -> bytes:
        lines = data.split(b"\n")
        at = self.chance.randrange(len(lines))
        kind = self.chance.random()
        if kind < 0.3:
            return self.damage(data)
        if kind < 0.5:
            del lines[at : at + self.pick([1, 2, 10])]
        elif kind < 0.6:
            lines.insert(at, self.pick(lines))
        else:
            odd = self.pick(
                [*ODD_NUMBERS, *ODD_TEXTS, "[]", "{}", "null", ".nan", ".inf", "&a", "*a", "!!int x"]
            )
            key, colon, _ = lines[at].partition(b":")
            lines[at] = key + colon + b" " + odd.encode(errors="surrogateescape")
        return b"\n".join(lines)

    def state(self) -> None:
        """A damaged file of a run or of the cache ends no command."""
        folder = run_dir(self.pick(self.runs)).path
        names = [
            "run.json",
            "result.json",
            "row.json",
            "events.jsonl",
            "answer.json",
            "sealed.json",
            "train.log",
        ]
        files = [folder / name for name in names]
        files += [folder / "train_cuda.py", self.home / "cache" / "pysource-0123456789ab" / "meta.json"]
        files += [self.home / "runs" / "loop" / "step_shares.jsonl", self.home / "runs" / "notes.md"]
        for path in self.chance.sample(files, self.pick([1, 2, 3])):
            self.damage_file(path)
        if self.chance.random() < 0.3:
            (self.home / "results.tsv").unlink()
        run = folder.name
        command = self.pick(
            [
                "leaderboard",
                f"show {run}",
                "clean",
                f"verify {run}",
                "program",
                f"report --run {run}",
                "confirm",
            ]
        )
        record_killed_runs()
        self.call(*command.split())
        self.expect_runs(other for other in self.runs if other != run)

    def damage_file(self, path: Path) -> None:
        kind = self.chance.random()
        old = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        if kind < 0.5:
            path.write_bytes(self.pick(ODD_JSON))
        elif kind < 0.7:
            path.write_bytes(self.damage(old))
        elif kind < 0.85:
            with contextlib.suppress(ValueError, IndexError):
                values = json.loads(old)
                values[self.pick(values)] = self.pick(ODD_VALUES)
                if isinstance(values.get("row"), dict):
                    values["row"][self.pick(COLUMNS)] = self.pick(ODD_VALUES)
                path.write_text(json.dumps(values))
        elif kind < 0.95:
            path.mkdir()

    def environment(self) -> None:
        """An odd environment is a line."""
        with self.odd_environment() as _:
            self.call(*self.pick(ENVIRONMENT_COMMANDS).split())

    @contextlib.contextmanager
    def odd_environment(self) -> Iterator[dict[str, str]]:
        """Set one or two variables to something odd."""
        before = dict(os.environ)
        file = self.home / "a file"
        file.write_text("x")
        folder = self.home / "a folder"
        folder.mkdir()
        odd = [str(file), str(folder), str(file / "below"), "/proc/self/mem", "/nowhere/at/all", "relative"]
        odd += [*ODD_NUMBERS, *(text.replace("\x00", "") for text in ODD_TEXTS)]
        for name in self.chance.sample(VARIABLES, self.pick([1, 2])):
            os.environ[name] = self.pick(odd)
        platforms.load_platforms.cache_clear()
        try:
            yield dict(os.environ)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def commands(self) -> None:
        """Whatever is typed is a usage error, or passes the door."""
        name = self.pick(cli.main.commands)
        command = cli.main.commands[name]
        arguments = [name]
        for _ in range(self.pick([0, 1, 1, 2, 3])):
            parameter = self.pick(command.params) if command.params else None
            if parameter is None or not parameter.opts or not parameter.opts[0].startswith("-"):
                arguments.append(self.odd_word())
            else:
                arguments.append(self.pick(parameter.opts))
                if not getattr(parameter, "is_flag", False):
                    arguments.append(self.odd_word())
        if name in ("restore", "doctor", "watch") or {"--force", "--follow", "-f", "--wait"} & set(arguments):
            return  # it would write, measure, or wait for somebody
        self.call(*arguments)

    def odd_word(self) -> str:
        near = [*self.runs, "cpu", "pysource", "07:30", "25:00", "24:00", "1", "3", str(self.home), "true"]
        return str(self.pick([*ODD_NUMBERS, *ODD_TEXTS, *near]))

    # --- Real processes -------------------------------------------------------------------------------------

    def processes(self) -> None:
        """A command in an odd environment prints no traceback."""
        command = [*COMMAND, *self.pick(PROCESS_COMMANDS).split()]
        with self.odd_environment() as variables:
            variables["AUTORESEARCH_LOOP"] = "1"  # no experiment begins
            done = subprocess.run(
                command, cwd=ROOT, env=variables, capture_output=True, stdin=subprocess.DEVNULL
            )
        self.judge(done.returncode, (0, 1, 2), done.stdout + done.stderr)

    def interrupted(self) -> None:
        """Ctrl-C ends a command at once, whatever it imports at the moment."""
        command = [*COMMAND[:1], "-X", "importtime", *COMMAND[1:], *self.pick(INTERRUPTED_COMMANDS).split()]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stderr
        for line in child.stderr:  # what comes before is Python's own start
            if line.rstrip().endswith(b"launcher.entry"):
                break
        time.sleep(self.chance.random() * self.pick(INTERRUPTED_WITHIN))
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=60)
        told = [line for line in errors.split(b"\n") if not line.startswith(b"import time:")]
        self.judge(child.returncode, (0, 1, 2, 130), output + b"\n".join(told))

    def judge(self, code: int, allowed: tuple[int, ...], output: bytes) -> None:
        text = output.decode("utf-8", "replace")
        if PRINTED.search(text) or code not in allowed:
            raise Wrong(f"exit code {code}: {text[-3000:]}")

    def launchers(self) -> None:
        """Four launchers that start together after a killed one record its run once."""
        killed = [f"2026010{2 + number}-000000-dead" for number in range(3)]
        for run in killed:
            self.write_killed(run)
        code = (
            "import sys; from launcher.runs import record_killed_runs; sys.stdin.read(); record_killed_runs()"
        )
        children = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for _ in range(LAUNCHERS)
        ]
        time.sleep(STARTED_WITHIN)  # then all have imported what they need, and wait
        for child in children:
            assert child.stdin
            child.stdin.close()
        for child in children:
            assert child.stdout
            output = child.stdout.read()
            self.judge(child.wait(), (0,), output)
        self.expect_runs([*self.runs, *killed])

    def write_killed(self, run: str) -> None:
        """Write the folder of a run whose launcher was killed."""
        folder = run_dir(run)
        folder.path.mkdir(parents=True)
        row = Row(run=run, description="killed", rules=2)
        folder.record.write_text(json.dumps({"row": asdict(row), "pid": 2**30}))


VARIABLES = [
    "AUTORESEARCH_HOME",
    "AUTORESEARCH_CACHE",
    "AUTORESEARCH_CONFIG",
    "AUTORESEARCH_LOOP",
    "AUTORESEARCH_BUDGET",
    "AUTORESEARCH_SEED",
    "AUTORESEARCH_ENTRIES",
    "AUTORESEARCH_PLATFORM",
    "CUDA_VISIBLE_DEVICES",
    "COLUMNS",
    "TERM",
    "LANG",
    "HOME",
    "TMPDIR",
]
ENVIRONMENT_COMMANDS = [
    "leaderboard",
    "platforms",
    "platforms --json",
    "clean",
    "show best",
    "verify best",
    "program",
    "report",
    "run",
    "try",
    "noise",
    "prepare --track nothing",
    "loop --experiments 1",
    "--version",
]
PROCESS_COMMANDS = [name for name in ENVIRONMENT_COMMANDS if name not in ("program", "verify best")]
INTERRUPTED_COMMANDS = ["leaderboard", "platforms", "show best", "clean", "--version", "report"]

Case = Callable[[Fuzzer], None]
# The share of the cases that each kind gets; the slow ones get few.
KINDS: dict[str, tuple[Case, float]] = {
    "events": (Fuzzer.events, 0.30),
    "ledger": (Fuzzer.ledger, 0.20),
    "platforms.yaml": (Fuzzer.yaml_file, 0.15),
    "state files": (Fuzzer.state, 0.15),
    "command line": (Fuzzer.commands, 0.10),
    "environment": (Fuzzer.environment, 0.05),
    "processes": (Fuzzer.processes, 0.01),
    "Ctrl-C": (Fuzzer.interrupted, 0.02),
    "4 launchers": (Fuzzer.launchers, 0.02),
}


def begin_nothing(*_: Any, **__: Any) -> Any:
    raise UserError("it would begin now")


@contextlib.contextmanager
def nothing_begins() -> Iterator[None]:
    """Replace what takes minutes, or writes elsewhere, by an error."""
    import launcher.confirm
    import launcher.noise
    import launcher.run
    import launcher.show
    import launcher.verify
    import night.compare
    import night.fleet
    import night.loop
    import night.trial
    import prepare

    places = [
        (launcher.run, "run_experiment"),
        (launcher.noise, "run_once"),
        (launcher.confirm, "confirm"),
        (launcher.verify, "score_again"),
        (launcher.show, "restore_trainer"),
        (night.compare, "Workers"),
        (night.fleet, "run_night"),
        (night.loop, "run_night"),
        (night.trial, "try_edit"),
        (prepare, "build_directory"),
    ]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, begin_nothing)
    try:
        yield
    finally:
        for (module, name), function in zip(places, before, strict=True):
            setattr(module, name, function)


class Tally(NamedTuple):
    """What came of the cases of a kind."""

    cases: int
    failures: list[str]
    seconds: float


def run_kind(kind: str, cases: int, seed: int, home: Path) -> Tally:
    """Run so many cases of a kind. Each has a seed of its own, so that it can be run again alone."""
    case, _ = KINDS[kind]
    failures = []
    began = time.monotonic()
    for number in range(cases):
        fuzzer = Fuzzer(seed * 1_000_003 + number, home)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                fuzzer.build()
                case(fuzzer)
        except UserError:
            continue
        except Exception:
            failures.append(f"{kind}, case {number}:\n{traceback.format_exc()[-1500:]}")
    return Tally(cases, failures, time.monotonic() - began)


def fuzz(cases: int, seed: int, kinds: list[str], home: Path) -> dict[str, Tally]:
    """Run all kinds, and return what came of each."""
    before = dict(os.environ)
    folder = os.getcwd()
    for name in [name for name in os.environ if name.startswith("AUTORESEARCH_")]:
        del os.environ[name]
    try:
        with nothing_begins():
            return {kind: run_kind(kind, max(1, round(KINDS[kind][1] * cases)), seed, home) for kind in kinds}
    finally:
        os.environ.clear()
        os.environ.update(before)
        os.chdir(folder)
        platforms.load_platforms.cache_clear()


def main() -> int:
    """Run the cases and print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        tallies = fuzz(asked.cases, asked.seed, asked.kinds, Path(folder) / "house")
    for tally in tallies.values():
        for failure in tally.failures[:SHOWN]:
            print(failure)
    print(f"{'kind':16} {'cases':>6} {'tracebacks':>10} {'seconds':>8}")
    for kind, tally in tallies.items():
        print(f"{kind:16} {tally.cases:6} {len(tally.failures):10} {tally.seconds:8.1f}")
    failed = sum(len(tally.failures) for tally in tallies.values())
    print(f"{'all':16} {sum(tally.cases for tally in tallies.values()):6} {failed:10}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
