"""A small house for tests: a tiny track, tiny platforms, a cache and a home of their own."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from backends.protocol import Result, RunDir, Start, write_json
from launcher.ledger import Row

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
tracks:
  tiny:
    packages: [mpmath, pygments]
    held_out: [pygments]
    vocab_size: 512
    seq_len: 128
    val_tokens: 16384
platforms:
  cpu:
    framework: torch
    device_kind: cpu
    trainer: train_cuda.py
    track: tiny
    bf16: false
    startup_seconds: 120
    start: &size {n_layer: 2, n_embd: 64, head_dim: 32, window_pattern: SL, short_window: 32,
                  total_batch_size: 1024, device_batch_size: 8, eval_batch_size: 8}
  mlx-cpu:
    framework: mlx
    device_kind: cpu
    trainer: train_mlx.py
    track: tiny
    auto: false
    bf16: false
    startup_seconds: 120
    start: *size
"""


def pytest_configure(config):
    """Give each worker of pytest-xdist cores of its own: a run in one is not contended by the other's."""
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if number and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[int(number) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
        os.sched_setaffinity(0, mine or cores)


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory):
    """Configuration and prepared data of the tiny track, made once for all tests."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "platforms.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def house(tiny_cache, tmp_path, monkeypatch):
    """This process in the tiny house; its home is `house`, new for every test."""
    for name in [n for n in os.environ if n.startswith("AUTORESEARCH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AUTORESEARCH_CONFIG", str(tiny_cache / "platforms.yaml"))
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tiny_cache / "cache"))
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # PyTorch sets it in a process that compiles
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # what is compiled is tested where it says so
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    from backends import platforms

    platforms.load_platforms.cache_clear()
    yield tmp_path
    platforms.load_platforms.cache_clear()


@pytest.fixture
def autoresearch(house):
    """Call the real command as a child process: autoresearch("run", "--budget", "2") -> CompletedProcess."""

    def call(*arguments, timeout=240, **more):
        return subprocess.run(
            [sys.executable, "-m", "launcher.entry", *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            **more,
        )

    return call


def wait_for_line(process: subprocess.Popen, text: str, seconds: float = 120.0) -> str:
    """Read the stderr of a command until a line with `text`, and return all that was read.

    A command that does not say it in time is killed.
    """
    seen = ""
    alarm = threading.Timer(seconds, process.kill)
    alarm.start()
    try:
        for line in process.stderr:
            seen += line
            if text in line:
                return seen
    finally:
        alarm.cancel()
    raise AssertionError(f"ended without {text!r}: {seen}")


def row(**values) -> Row:
    """Return a ranked row of the ledger, with these values in place of its own."""
    defaults = {
        "commit": "abc1234",
        "val_bpb": 1.25,
        "status": "keep",
        "run": "r1",
        "rules": 1,
        "budget": 300.0,
        "track": "t",
        "source": "s",
    }
    return Row(**{**defaults, **values})


# --- A repository in which training is made up --------------------------------------------------------------

# Modules that find the repository by their ROOT.
ROOTED = (
    "launcher.diff",
    "launcher.harness",
    "launcher.runs",
    "launcher.setting",
    "launcher.show",
    "night.ideas",
    "night.program",
    "night.repo",
    "night.workspace",
)
FILES = {
    "train_cuda.py": "SCORE = 1.5\n",
    "train_cuda_kernels.py": "\n",
    "train_mlx.py": "SCORE = 1.5\n",
    "prepare.py": "RULES = 1\n",
    "README.md": "read me\n",
    "backends/cuda.py": "\n",
    ".gitignore": "/runs/\n/results.tsv*\n",
}
RESULT = Result(
    val_bpb=1.5,
    val_stderr=0.01,
    val_tokens=16384,
    difference_worst=1e-6,
    difference_spread=1e-7,
    difference_bias=1e-9,
    training_seconds=300.0,
    total_seconds=310.0,
    peak_memory_mb=100.0,
    tokens_per_second=3333,
    mfu_percent=10.0,
    total_tokens_M=1.0,
    epochs=0.5,
    num_steps=10,
    num_params_M=1.0,
    depth=2,
    flops_per_token=1000,
    peak_tflops=1.0,
    dtype="float32",
    platform="cpu",
    device="a CPU",
    track="tiny",
    seed=1,
)

START = Start(
    device="a CPU",
    platform="cpu",
    track="tiny",
    seed=1,
    budget=300.0,
    num_params_M=2.5,
    depth=2,
    flops_per_token=1000,
    peak_tflops=1.0,
    dtype="float32",
    startup=12.0,
    weights={"w": [2, 3]},
)


@pytest.fixture
def repository(house, monkeypatch):
    """A repository of its own for `try` and `loop`.

    Its trainers say what becomes of them: `SCORE = 1.5`, CRASH, DIE, STOP, BUSY, LATE, and NODRY for
    a dry run.
    """
    root = house / "project" / "inner"  # below the repository's top folder: paths must hold there too
    root.mkdir(parents=True)
    shutil.copy(ROOT / "program.md", root)
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    for name in ROOTED:
        monkeypatch.setattr(importlib.import_module(name), "ROOT", root)
    monkeypatch.setattr("launcher.run.harness_modified", lambda: False)
    monkeypatch.setattr("launcher.run.supervise", supervise)
    monkeypatch.setattr("night.loop.dry_run", dry_run)
    for name in ("require_quiet", "look_around"):
        monkeypatch.setattr(f"night.loop.{name}", lambda *asked, **more: None)
    monkeypatch.setattr("night.loop.write_report", lambda *asked, **more: None)  # it takes a second
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # no name, no hooks
    calls.clear()
    for command in ("init -q -b main", "add -A", "-c user.name=me -c user.email=me@here commit -qm start"):
        subprocess.run(["git", "-C", str(root.parent), *command.split()], check=True)
    return root


calls: list[str] = []  # the trainers that `supervise` was given


def supervise(trainer: Path, run_dir: RunDir, setting, seed, watch, on_event):
    """Stand in for launcher.child.supervise: training, made up from what the trainer's text says."""
    from launcher.child import Outcome
    from launcher.processes import Stopped

    text = trainer.read_text()
    calls.append(text)
    if "DIE" in text:
        os._exit(9)
    if "STOP" in text and calls.count(text) == 1:  # Ctrl-C, the first time that it is run
        raise Stopped("SIGINT")
    if "BUSY" in text:
        watch.others_share = 0.9
    outcome = Outcome(training_seconds=300.0, total_seconds=310.0, exit_code=0)
    if "LATE" in text:  # a limit was missed while others computed
        watch.others_share = 0.9
        outcome.fail("timeout", "no exp.start")
        return outcome
    if "CRASH" in text:
        outcome.fail("crash", "it crashed")
        outcome.exit_code = 1
        return outcome
    score = float(re.search(r"SCORE = ([\d.]+)", text)[1])
    outcome.result = replace(
        RESULT,
        val_bpb=score,
        val_tokens=setting.val_tokens,
        platform=setting.platform.name,
        track=setting.track.name,
        seed=seed,
    )
    write_json(run_dir.result, asdict(outcome.result))
    return outcome


def dry_run(setting, source: bytes, seed: int = 1):
    """Stand in for launcher.run.dry_run."""
    from launcher.child import Outcome

    outcome = Outcome()
    if b"NODRY" in source:
        outcome.fail("crash", "bad")
    return outcome, "the tail"


def edit(root: Path, text: str) -> None:
    """Write the trainer of the repository."""
    (root / "train_cuda.py").write_text(text)
