"""`autoresearch watch --terminal`: the panel of a loop, from another process."""

import contextlib
import io
import json
import os
import signal
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from conftest import row
from rich.console import Console
from test_stop import (  # noqa: F401  fast and no_night_left are fixtures
    SLOW,
    exit_code_of,
    fast,
    no_night_left,
    rows,
    start_night,
    started,
    wait_until,
)

from launcher import cli
from launcher.ledger import Ledger
from launcher.runs import home, run_dir
from night.state import NightCounts, record
from night.stop import RunningLoop, ask_to_stop, request_path, running_loop, write_json
from night.watch import last_events, read_panel, watch_loop
from prepare import UserError

LOOP = RunningLoop(1, 1.0, "token")


def shown(panel):
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(panel.table())
    return console.export_text()


def log(step, elapsed):
    values = {"loss": 3.0, "smooth": 3.0, "tokens": 9, "tokens_per_s": 5000.0, "mfu": 40.0}
    return json.dumps({"event": "log", "at": elapsed, "step": step, "elapsed": elapsed, **values})


def test_the_log_the_ledger_and_the_run_make_the_panel(repository):
    ledger = Ledger(home() / "results.tsv")
    ledger.append(row(run="r1", description="baseline", val_bpb=1.5, source="a", build_on="a"))
    ledger.append(
        row(run="r2", description="[bold] wider", val_bpb=1.4, source="b", parent="a", build_on="b")
    )
    record("begin", agent=["x"], experiments=9, until="", done=0)
    record("experiment", run="r0")  # of another loop
    record("begin", agent=["x"], experiments=9, until="2999-01-01 07:30:00", done=3)
    for run in ("r1", "r2"):
        record("experiment", run=run)
    record("failed", kind="agent", reason="it did nothing")
    record("turn", agent="x", seconds=9.0, tokens=1000, cost=0.25)
    record("phase", phase="training", text="training: a larger batch")
    run = run_dir("20260101-000000-abcd")
    run.path.mkdir()
    run.record.write_text(json.dumps({"row": {"budget": 300.0}}))
    run.events.write_text(
        "\n".join([json.dumps({"at": 1}), *(log(i, 10.0 * i) for i in range(1, 11)), '{"torn'])
    )
    panel = read_panel(LOOP)
    text = shown(panel)
    for part in (
        "6 of 9: training: a larger batch",
        "step 10 | loss 3.0000 | 5,000 tok/s",
        "2 kept, 0 discarded, 0 failed, 0 refused, 1 turns without an edit",
        "[bold] wider",
        "until 07:30",
    ):
        assert part in text, text
    assert panel.share == 100 / 300 and (panel.tokens, panel.cost) == (1000, 0.25)
    record("device", device="gpu1", doing="a smaller one", last="keep 0.97 it")
    assert "a smaller one; last: keep 0.97 it" in shown(read_panel(LOOP))
    write_json(request_path(), {"token": "another"})
    assert "until 07:30" in shown(panel)
    write_json(request_path(), {"token": "token"})
    assert "it ends after this experiment" in shown(panel)


def test_a_phase_has_its_clock_and_its_limit(house, repository):
    record("begin", experiments=None, until="", done=0)
    record("phase", phase="agent", text="the agent thinks", limit=900.0)
    panel = read_panel(LOOP)
    panel._entered -= 72
    assert "1:1" in panel.clock() and panel.clock().endswith(" of 15:00")
    assert "1: the agent thinks" in shown(panel) and "until Ctrl-C" in shown(panel)


@pytest.mark.parametrize("text", ["", "\n", "[]\n", '{"event": "log"}\n', "\udcff" * 9, log(1, 1.0)[:-9]])
def test_events_that_are_none_are_passed_over(tmp_path, text):
    path = tmp_path / "events.jsonl"
    assert last_events(path) == []
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert last_events(path) == []


def test_without_a_loop_there_is_nothing_to_watch(repository):
    done = CliRunner().invoke(cli.main, ["watch", "--terminal"])
    assert done.exit_code == 1 and "no loop runs in this repository: autoresearch loop" in done.output
    with pytest.raises(UserError):
        watch_loop()


@pytest.mark.parametrize("how", ["it ends", "it is killed"])
def test_a_loop_is_watched_to_its_end(fast, how):  # noqa: F811
    night = start_night(SLOW)
    wait_until(lambda: len(rows()) >= 1 and running_loop())
    once = CliRunner().invoke(cli.main, ["watch", "--terminal"])
    assert once.exit_code == 0 and "experiment" in once.output and "so far" in once.output
    watcher, terminal = os.forkpty()
    if watcher == 0:
        os.environ["TERM"] = "xterm"
        sys.stdout = os.fdopen(1, "w", closefd=False)  # the terminal, not what pytest captures
        try:
            os._exit(watch_loop())
        finally:
            os._exit(99)
    started.append(watcher)
    seen = b""
    while b"kept, 0 discarded" not in seen:
        seen += os.read(terminal, 65536)
    if how == "it ends":
        ask_to_stop()
    else:
        os.kill(night, signal.SIGKILL)
    assert exit_code_of(night) == (0 if how == "it ends" else -signal.SIGKILL)
    with contextlib.suppress(OSError):  # the terminal closes when the watcher ends
        while True:
            seen += os.read(terminal, 65536)
    said = "ended: autoresearch stop" if how == "it ends" else "ended: the loop was killed"
    assert said in seen.decode() and exit_code_of(watcher) == (0 if how == "it ends" else 1)


def test_a_row_about_a_run_is_not_the_run(repository):
    """The claim at the end of a night names the run that it is about."""
    ledger = Ledger(home() / "results.tsv")
    kept = row(run="r1", description="wider", val_bpb=1.4, source="b", parent="a", build_on="b")
    ledger.append(kept)
    ledger.append(replace(kept, status="confirmed"))
    counts = {"kept": 2, "baselines": 1}
    record("begin", agent=["x"], experiments=9, until="", done=3, counts=counts)
    record("experiment", run="r1")
    record("failed", kind="edit", reason="it does not compile")
    panel = read_panel(LOOP)
    assert panel.counts == NightCounts(kept=3, baselines=1, refused=1) and panel.done == 4
