"""What the boxed processes of a run may touch, and what they are told."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import bytecode, compiled, walls
from launcher.box import missing_walls
from launcher.walls import common_policy, scorer_policy, start_boxed, trainer_policy
from prepare import ROOT, load_track

NO_WALLS = pytest.mark.skipif(bool(missing_walls()), reason="this machine has no walls")


def outcome(policy, expression: str) -> str:
    """Return what a boxed process makes of an expression: its value, or the name of the error."""
    command = policy.command([sys.executable, "-I", "-S", "-c", f"print({expression})"])
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1].partition(":")[0]


@NO_WALLS
@pytest.mark.parametrize("gpus", ["", "GPU-1c2d-3e4f", "0,1"])
def test_bytecode_is_read_and_not_written_and_that_of_held_out_text_is_hidden(
    monkeypatch, tmp_path, gpus: str
) -> None:
    """What a boxed process could write there, the next run would execute."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(compiled.VARIABLE, raising=False)
    track = replace(load_track("pysource"), packages=["mpmath", "networkx"], held_out=["networkx"])
    data = SimpleNamespace(path=tmp_path / "cache" / "pysource-0123")
    shown, held_out = (bytecode.bytecode_path(Path(find_spec(name).origin)) for name in track.packages)
    for file in (data.path / "file", shown, held_out):
        file.parent.mkdir(parents=True)
        file.write_text("text")
    common = common_policy(ROOT / "train_cuda.py", track, data)
    scorers = [scorer_policy(common, tmp_path / "scorer", compiles) for compiles in (True, False)]
    for policy in (trainer_policy(common, tmp_path / "run"), *scorers):
        assert outcome(policy, f"open({str(shown)!r}).read()") == "text"
        assert outcome(policy, f"open({str(shown)!r}, 'a')") == "PermissionError"
        assert outcome(policy, f"open({str(shown.parent / 'new')!r}, 'w')") == "PermissionError"
        assert outcome(policy, f"open({str(held_out)!r}).read()") == "PermissionError"
        assert outcome(policy, f"open({str(data.path / 'file')!r}).read()") == "PermissionError"


def test_bytecode_beside_a_held_out_module_is_hidden(monkeypatch, tmp_path):
    """Python writes it there when anything outside a box imports the module."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    module = tmp_path / "module.py"
    files = [
        tmp_path / "__pycache__" / f"module.cpython-311{end}" for end in (".pyc", ".opt-1.pyc", ".pyc.1234")
    ]
    files[0].parent.mkdir()
    for file in (module, *files):
        file.touch()
    monkeypatch.setattr(walls, "held_out_files", lambda track: [module])
    paths = set(walls.hidden(load_track("pysource"), SimpleNamespace(path=tmp_path / "pysource-0123")))
    assert {module, bytecode.bytecode_path(module), *files} <= paths


@NO_WALLS
def test_pytorch_is_told_to_compile_by_forks(monkeypatch, tmp_path) -> None:
    """A process that it starts in the box by default cannot start CUDA."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    data = SimpleNamespace(path=tmp_path / "cache" / "pysource-0123")
    folder = tmp_path / "box"
    folder.mkdir()
    policy = trainer_policy(common_policy(ROOT / "train_cuda.py", load_track("pysource"), data), folder)
    command = [sys.executable, "-c", "from torch._inductor import config; print(config.worker_start_method)"]
    settings = SimpleNamespace(to_env=dict)
    ours, theirs = os.pipe()
    with open(tmp_path / "log", "w+b") as log:
        child = start_boxed(policy, command, settings, folder, log, theirs)
        child.wait(timeout=60)
        child.end()
    os.close(ours)
    os.close(theirs)
    assert (tmp_path / "log").read_text().splitlines()[-1] == "fork"
