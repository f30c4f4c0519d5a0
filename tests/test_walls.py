"""What the boxed processes of a run may touch: the folders of the device that it is on."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from launcher import compiled
from launcher.box import missing_walls
from launcher.walls import common_policy, scorer_policy, start_boxed, trainer_policy
from prepare import ROOT, load_track


@pytest.mark.skipif(bool(missing_walls()), reason="this machine has no walls")
@pytest.mark.parametrize("gpus", ["", "GPU-1c2d-3e4f", "0,1"])
def test_a_scorer_reads_the_bytecode_of_its_device_and_no_prepared_data(
    monkeypatch, tmp_path, gpus: str
) -> None:
    """Else each process that scores would compile the sources of PyTorch, at every start."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(compiled.VARIABLE, raising=False)
    data = SimpleNamespace(path=tmp_path / "cache" / "pysource-0123")
    bytecode = compiled.bytecode_folder()
    for folder in (data.path, bytecode):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    common = common_policy(ROOT / "train_cuda.py", load_track("pysource"), data)
    for compiles in (True, False):
        policy = scorer_policy(common, tmp_path / "scorer", compiles)

        def read(path, policy=policy) -> str:
            script = f"print(open({str(path)!r}).read())"
            command = policy.command([sys.executable, "-I", "-S", "-c", script])
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
            return done.stdout.strip() or done.stderr.strip().splitlines()[-1].partition(":")[0]

        assert read(bytecode / "file") == bytecode.name
        assert read(data.path / "file") == "PermissionError"


@pytest.mark.skipif(bool(missing_walls()), reason="this machine has no walls")
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
