"""Every trainer in tests/cheats/ is stopped, or gains nothing; every one in tests/honest/ is scored."""

import ast
import json
import os
import re
import shutil
import socket
from pathlib import Path

import psutil
import pytest

from backends.protocol import RunDir
from launcher import compiled
from launcher.ledger import Flag, Ledger, Row
from launcher.processes import processes_of, scoring_id

HERE = Path(__file__).parent
CHEATS = sorted((HERE / "cheats").glob("*.py"))
HONEST = sorted((HERE / "honest").glob("*.py"))
ACTS = sorted((HERE / "cheats" / "acts").glob("*.py"))
# A trainer that does every act when its clock has started, and says what became of each.
ACTOR = """
import ctypes, json, os, platform
from pathlib import Path
from types import SimpleNamespace
import psutil
import train_cuda

def call(x86, arm, *arguments):
    number = x86 if platform.machine() == "x86_64" else arm
    if ctypes.CDLL(None, use_errno=True).syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

home = Path(os.environ["AUTORESEARCH_HOME"])
places = SimpleNamespace(
    call=call, guard=os.getppid(), launcher=psutil.Process(os.getppid()).ppid(),
    runs=home / "runs", ledger=home / "results.tsv", daemon=home / "daemon",
    data=Path(os.environ["AUTORESEARCH_DATA_DIR"]), config=Path(os.environ["AUTORESEARCH_CONFIG"]),
    box=Path(os.environ.get("AUTORESEARCH_WEIGHTS", "/")).parent,
)

def act(name, source):
    act = {"__name__": name}
    try:
        exec(compile(source, name, "exec"), act)
        act["act"](places)
    except OSError as error:
        return f"{type(error).__name__} {error.errno}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"

class Experiment(train_cuda.Experiment):
    def start(self, *arguments, **more):
        super().start(*arguments, **more)
        for name, source in ACTS.items():
            print("act:", json.dumps([name, act(name, source)]))

train_cuda.Experiment = Experiment
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
"""
REFUSED = {
    "PermissionError 13",
    "PermissionError 1",
    "PermissionError None",
    "OSError 18",  # a move to a place that is none of its own: "invalid cross-device link"
}
WALLS = {
    "rows": "there is nothing to learn from before the clock starts",
    "box": "the kernel refuses it",
    "clock": "the launcher's clock, its kill, and what it alone can write",
    "scorer": "two processes that never trained must agree",
}
EXIT_CODES = {"crash": 1, "timeout": 4, "invalid": 5}
GUESSING = 2.0  # bits per byte: far better than the tiny model can be after two seconds


def constant(path, name):
    """A constant of a cheat, read without running it; None when it has none."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    return None


@pytest.fixture
def places(house, tiny_cache, monkeypatch):
    """What cheats look for: a configuration that they may spoil, and the weights of another run."""
    copy = house / "tiny"
    copy.mkdir()
    shutil.copy(tiny_cache / "platforms.yaml", copy / "platforms.yaml")
    monkeypatch.setenv("AUTORESEARCH_CONFIG", str(copy / "platforms.yaml"))
    best = house / "runs" / "best"
    best.mkdir(parents=True)
    (best / "model.safetensors").write_bytes(b"weights")
    (best / "train.log").write_text("a log")
    Ledger(house / "results.tsv").append(Row(run="best", status="crash"))


@pytest.mark.slow
@pytest.mark.parametrize("path", CHEATS, ids=lambda p: p.stem)
def test_is_stopped(path, autoresearch, house, places):
    status, says = constant(path, "EXPECT")
    for _ in range(2 if constant(path, "TWICE") else 1):
        done = autoresearch("run", "--budget", "1", "--platform", "cpu", "--trainer", path)
        row = Ledger(house / "results.tsv").rows()[-1]
        said = f"{row.status}: {row.reason}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, said
        if status == "scored":
            assert row.scored and row.val_bpb > GUESSING, said
        else:
            if row.disturbed_timeout:  # other processes computed: what took too long is stopped, not judged
                status = "timeout"
            assert (row.status, says in row.reason) == (status, True), said
            assert f"status: {status}" in done.stdout and says in done.stdout, said
            busy = 6 if row.disturbed_timeout else None  # this machine was
            assert done.returncode in (EXIT_CODES[status], busy)
            assert row.val_bpb == 0 and not row.ranked
        run = RunDir(house / "runs" / row.run)
        logs = "".join(log.read_text(errors="replace") for log in (run.log, run.score_log))
        pids = [int(pid) for pid in re.findall(r"^left: (\d+)$", logs, re.M)]
        assert bool(pids) == bool(constant(path, "LEAVES")), logs
        assert [pid for pid in pids if psutil.pid_exists(pid)] == []
        marks = [row.run, scoring_id(row.run, "first"), scoring_id(row.run, "second")]
        assert [process for mark in marks for process in processes_of(mark)] == []
        left = {entry.name for entry in os.scandir(run.path)}
        assert not left & {"box", "first", "second"}
    assert not [path for path in compiled.folder().rglob("*cheat*")]


@pytest.mark.slow
def test_no_act_gets_out_of_the_box(autoresearch, house, places):
    trainer = house / "actor.py"
    sources = {path.stem: path.read_text() for path in ACTS}
    trainer.write_text(f"ACTS = {sources!r}\n{ACTOR}")
    with socket.socket(socket.AF_UNIX) as daemon, socket.socket(socket.AF_UNIX) as nameless:
        for server, name in ((daemon, str(house / "daemon")), (nameless, "\0cheat")):
            server.bind(name)
            server.listen()
        done = autoresearch("run", "--budget", "2", "--platform", "cpu", "--trainer", trainer)
    row = Ledger(house / "results.tsv").rows()[-1]
    log = (house / "runs" / row.run / "train.log").read_text()
    said = [json.loads(line.removeprefix("act: ")) for line in log.splitlines() if line.startswith("act: ")]
    assert len(said) == len(ACTS), log + done.stdout
    assert [f"{name}: {what}" for name, what in said if what not in REFUSED] == []
    assert row.scored, row.reason


@pytest.mark.slow
@pytest.mark.parametrize("path", HONEST, ids=lambda p: p.stem)
def test_is_scored(path, autoresearch, house):
    done = autoresearch("run", "--budget", "2", "--platform", "cpu", "--trainer", path, "--keep-weights")
    assert done.returncode in (0, 6), done.stdout + done.stderr  # 6: this machine was busy
    [row] = Ledger(house / "results.tsv").rows()
    assert row.scored and not row.flags & {Flag.UNBOXED, Flag.OTHER_CORPUS} and row.val_bpb < 8
    if path.stem == "ensemble":
        again = autoresearch("verify", row.run)
        assert again.returncode == 0, again.stdout + again.stderr


def test_every_cheat_says_which_wall_stops_it():
    assert len(CHEATS) >= 25 and len(ACTS) >= 48
    for path in CHEATS:
        assert constant(path, "WALL") in WALLS and constant(path, "EXPECT"), path.name
