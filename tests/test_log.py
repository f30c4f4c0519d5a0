"""`autoresearch log`: what a run printed, to its end."""

import json
import os
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from launcher import cli
from launcher.ledger import Ledger, Row
from launcher.runs import run_dir
from prepare import ROOT


def add(run_id, text, pid=0, row=True):
    run = run_dir(run_id)
    run.path.mkdir(parents=True)
    run.record.write_text(json.dumps({"trainer": "train_cuda.py", "pid": pid}))
    run.log.write_bytes(text)
    if row:
        run.row.write_text("{}")
    return run


def call(*arguments):
    return CliRunner().invoke(cli.main, ["log", *arguments])


def test_the_log_of_a_run_is_printed_without_what_moves_a_cursor(house):
    add("20260101-000000-aaaa", b"one\n\x1b[2Jtwo\r\n\tthree \xff\nfour")
    done = call("2026")
    assert done.output == "one\n\N{REPLACEMENT CHARACTER}[2Jtwo\n\tthree \N{REPLACEMENT CHARACTER}\nfour\n"
    assert (
        call("last", "-n", "2").output.splitlines()[-1] == "four"
        and len(call("-n", "2").output.splitlines()) == 2
    )
    data = json.loads(call("--json", "-n", "1").output)
    assert data["lines"] == ["four"] and data["run"] == "20260101-000000-aaaa"


def test_a_run_is_named_as_everywhere(house):
    add("20260101-000000-aaaa", b"first\n")
    add("20260102-000000-bbbb", b"second\n")
    for number, run in enumerate(("20260101-000000-aaaa", "20260102-000000-bbbb")):
        Ledger(house / "results.tsv").append(
            Row(run=run, status="keep", val_bpb=1.0 + number, rules=1, time=run)
        )
    assert call("best").output == call("baseline").output == "first\n"
    assert call("last").output == "second\n"
    done = call("2026")
    assert done.exit_code == 2 and "2 runs begin with" in done.output
    done = call("nope")
    assert done.exit_code == 2 and "has no run 'nope'" in done.output


def test_what_scored_the_run_has_a_log_of_its_own(house):
    run = add("20260101-000000-aaaa", b"trained\n")
    done = call("last", "--score")
    assert done.exit_code == 1 and "has no score.log" in done.output
    run.score_log.write_text("scored\n")
    assert call("last", "--score").output == "scored\n"


@pytest.mark.parametrize("how", ["it ends", "its launcher is killed"])
def test_a_run_under_way_is_followed_to_its_end(house, how):
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(0.2)
    run = add("20260101-000000-aaaa", b"start\nhalf ", launcher.pid, row=False)
    follower = subprocess.Popen(
        [sys.executable, "-m", "launcher.entry", "log", "-f"],
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert follower.stdout.readline() == "start\n"
        with open(run.log, "a") as f:
            f.write("a line\nthe end")
        assert follower.stdout.readline() == "half a line\n"
        if how == "it ends":
            run.row.write_text("{}")
        else:
            launcher.kill()
            launcher.wait()
        assert follower.communicate(timeout=30)[0] == "the end\n" and follower.returncode == 0
    finally:
        launcher.kill()
        launcher.wait()
        follower.kill()
