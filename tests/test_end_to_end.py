"""The real command as a child process, and what it leaves behind."""

import json

import pytest

from launcher.ledger import COLUMNS, Ledger


@pytest.mark.slow
def test_run_leaves_a_complete_ledger_line(autoresearch, house):
    done = autoresearch("run", "-m", "a\tfirst\ntry", "--budget", "3", "--platform", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = Ledger(house / "results.tsv").rows()
    lines = (house / "results.tsv").read_text().splitlines()
    assert lines[0].split("\t")[:5] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert len(lines) == 2 and len(lines[1].split("\t")) == len(COLUMNS)
    assert row.description == "a first try" and row.marks.startswith("short") and not row.ranked
    assert 0.5 < row.val_bpb < 8 and row.val_stderr > 0
    assert 3 <= row.training_seconds < 6
    printed = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert float(printed["val_bpb"]) == row.val_bpb and printed["run"] == row.run
    assert "3 s never ranks" in printed["reason"]
    run_dir = house / "runs" / row.run
    files = {"run.json", "train_cuda.py", "train.log", "events.jsonl", "result.json"}
    assert files <= {path.name for path in run_dir.iterdir()}
    events = [json.loads(line)["event"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [e for e in events if e != "log"] == ["start", "stop"]
    assert json.loads((run_dir / "result.json").read_text())["val_bpb"] == row.val_bpb
