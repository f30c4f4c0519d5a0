"""A small house for tests: a tiny track and tiny platforms in a configuration, a cache and a home of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
tracks:
  tiny:
    packages: [mpmath]
    vocab_size: 512
    seq_len: 128
    val_tokens: 16384
platforms:
  cpu:
    backend: torch-cpu
    trainer: train_cuda.py
    track: tiny
    bf16: false
    startup_seconds: 120
    start: &size {n_layer: 2, n_embd: 64, head_dim: 32, window_pattern: SL, short_window: 32, total_batch_size: 1024, device_batch_size: 8, eval_batch_size: 8}
  mlx-cpu:
    backend: mlx-cpu
    trainer: train_mlx.py
    track: tiny
    auto: false
    bf16: false
    startup_seconds: 120
    start: *size
"""


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
        return subprocess.run([sys.executable, "-m", "launcher.cli", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                              timeout=timeout, stdin=subprocess.DEVNULL, **more)
    return call


# --- a repository in which training is made up ------------------------------------------------------------------

RESULT = {"val_stderr": 0.01, "peak_memory_mb": 100.0, "total_tokens_M": 1.0, "num_steps": 10, "num_params_M": 1.0, "depth": 2, "mfu_percent": 10.0,
          "flops_per_token": 1000, "track": "tiny", "platform": "cpu", "val_tokens": 16384, "seed": 1}


@pytest.fixture
def repository(house, monkeypatch):
    """A repository of its own for `try` and `loop`, whose trainers say what they score: `SCORE = 1.5`, or `CRASH`, or `HANG`."""
    from launcher import loop, program, repo, trial
    from launcher import run as runner
    from launcher.child import Outcome

    root = house / "project" / "inner"  # below the repository's top folder: paths must hold there too
    root.mkdir(parents=True)
    shutil.copy(runner.ROOT / "program.md", root)
    for name, text in (("train_cuda.py", "SCORE = 1.5\n"), ("train_mlx.py", "SCORE = 1.5\n"), ("prepare.py", "RULES = 1\n"), ("README.md", "read me\n"),
                       ("backends/cuda.py", "\n"), (".gitignore", "/runs/\n/results.tsv*\n")):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    for module in (loop, program, repo, trial, runner):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(runner, "harness_modified", lambda: False)
    monkeypatch.setattr(runner, "supervise", supervise)
    monkeypatch.setattr(loop, "dry_run", lambda trainer, *_: (Outcome(status="crash" if "NODRY" in trainer.read_text() else "", reason="bad"), "the tail"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # nobody's name, nobody's hooks
    calls.clear()
    for command in ("init -q -b main", "add -A", "-c user.name=me -c user.email=me@here commit -qm start"):
        subprocess.run(["git", "-C", str(root.parent), *command.split()], check=True)
    return root


calls = []


def supervise(copy, run_dir, settings, platform, budget, watch, show):
    """Training, made up: what the trainer's text says."""
    from launcher.child import Outcome, Stopped

    text = copy.read_text()
    calls.append(text)
    if "DIE" in text:
        os._exit(9)
    if "STOP" in text and calls.count(text) == 1:  # Ctrl-C, the first time that it is run
        raise Stopped("SIGINT")
    if "BUSY" in text:
        watch.others_share = 0.9
    outcome = Outcome(training_seconds=300.0, total_seconds=310.0, exit_code=0)
    if "CRASH" in text:
        outcome.status, outcome.reason, outcome.exit_code = "crash", "it crashed", 1
    else:
        outcome.result = {**RESULT, "val_bpb": float(re.search(r"SCORE = ([\d.]+)", text)[1])}
    return outcome


def edit(root, text):
    (root / "train_cuda.py").write_text(text)
