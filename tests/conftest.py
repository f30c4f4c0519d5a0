"""A small house for tests: a tiny track and tiny platforms in a configuration, a cache and a home of their own."""

import os
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
