"""`autoresearch clean`: it shows what goes, and frees it only when asked."""

import json
import subprocess
import sys

from backends.protocol import write_json
from launcher.clean import free_disk
from launcher.compiled import folder
from launcher.device import DeviceLock
from launcher.ledger import Ledger, Row
from launcher.runs import run_dir
from prepare import cache_dir, load_track, prepare_track


def test_it_frees_what_is_not_needed_and_nothing_else(house, monkeypatch, capsys):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(house / "cache"))
    prepared = prepare_track(load_track("tiny")).path
    old = cache_dir() / "tiny-0123456789ab"
    old.mkdir()
    (old / "train.bin").write_bytes(b"x" * 2**20)
    (old / "meta.json").touch()
    compiled = folder() / "fx" / "graph"
    compiled.parent.mkdir(parents=True)
    compiled.write_bytes(b"x" * 2**20)
    (cache_dir() / "a-strangers-data-0123456789ab").mkdir()
    for run, asked in (("best", False), ("asked", True), ("orphan", False)):
        run_dir(run).path.mkdir(parents=True)
        run_dir(run).weights.write_bytes(b"x" * 2**20)
        if asked:
            run_dir(run).keep_weights.touch()
    Ledger(house / "results.tsv").append(Row(run="best", status="keep", rules=1, val_bpb=1.5))

    free_disk(apply=False)
    assert run_dir("orphan").weights.exists() and old.exists()
    assert "would free (--yes does it): 3.0 MiB" in capsys.readouterr().out
    free_disk(apply=False, as_json=True)
    told = json.loads(capsys.readouterr().out)
    needed = {item["path"]: item["needed"] for item in told["items"]}
    assert told["bytes"] == 3 * 2**20 and not told["freed"]
    assert needed[str(run_dir("best").weights)] and not needed[str(run_dir("orphan").weights)]
    free_disk(apply=True)
    assert not run_dir("orphan").weights.exists() and not old.exists() and not compiled.exists()
    assert (cache_dir() / "a-strangers-data-0123456789ab").exists()
    assert run_dir("best").weights.exists() and run_dir("asked").weights.exists() and prepared.exists()
    assert "freed: 3.0 MiB" in capsys.readouterr().out


def test_it_leaves_a_run_under_way_what_it_needs(house, monkeypatch, capsys):
    """Its weights are scored, and its processes read compiled code."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(house / "cache"))
    compiled = folder() / "graph"
    compiled.parent.mkdir(parents=True)
    compiled.write_bytes(b"x" * 2**20)
    run = run_dir("20260101-000000-abcd")
    run.path.mkdir(parents=True)
    run.weights.write_bytes(b"x" * 2**20)
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        write_json(run.record, {"row": {"run": run.run_id}, "pid": launcher.pid})
        free_disk(apply=True)
        assert run.weights.exists() and compiled.exists()
        assert "freed: 0.0 MiB" in capsys.readouterr().out
    finally:
        launcher.kill()
        launcher.wait()
    with DeviceLock("cpu"):  # a dry run has no record
        free_disk(apply=True)  # it also ends what the killed run left, and removes what it compiled
        compiled.parent.mkdir(exist_ok=True)
        compiled.write_bytes(b"x" * 2**20)
        free_disk(apply=True)
        assert compiled.exists() and not run.weights.exists()
    free_disk(apply=True)
    assert not compiled.exists()
