"""What a person sees of a night."""

import io
from datetime import datetime, timedelta

from rich.console import Console

from backends.protocol import Log, Stop
from launcher import console
from launcher.belief import Standing
from launcher.ledger import Row
from night.panel import Panel, RunDetail
from night.state import NightCounts

BELIEF = Standing(1.251, 0.0005, 1.251, 1.2508, "", 0.9, -0.01, 0.001, 1)


def shown(panel):
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(panel.table())
    return console.export_text()


def test_the_panel_tells_what_a_person_wants_to_know():
    panel = Panel(10, datetime.now() + timedelta(hours=2))
    panel.best = Row(status="keep", val_bpb=1.25, description="[/a] smaller [bold] window")
    panel.belief = BELIEF
    panel.count(panel.best)
    panel.count(Row(status="discard", val_bpb=1.30))
    panel.enter("training: a larger batch")
    panel.detail = "step 12 | loss 3.1"
    text = shown(panel)
    for part in (
        "3 of 10: training: a larger batch",
        "step 12 | loss 3.1",
        "1.251000 +- 0.000500  [/a] smaller [bold] window",
        "1 kept, 1 discarded, 0 failed, 0 refused, 0 turns without an edit",
        "8 experiments",
        "1:59:",
    ):
        assert part in text


def test_a_phase_has_a_clock_a_limit_and_the_agents_words(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    panel = Panel(None, None)
    panel.enter("the agent thinks", 900.0)
    panel.words = lambda: "I look at the\x1b[31m optimizer"
    now[0] += 72.4
    text = shown(panel)
    assert "1:12 of 15:00  I look at the" in text and "\x1b" not in text
    panel.enter("a dry run")
    now[0] += 5
    assert "0:05 \n" in "\n".join(line.rstrip() + " " for line in shown(panel).splitlines()) + "\n"


def test_the_last_results_stand_there_against_the_best():
    panel = Panel(None, None)
    panel.best = Row(status="keep", val_bpb=1.25, description="smaller")
    for number in range(7):
        panel.count(Row(status="discard", val_bpb=1.26, description=f"idea {number}"))
    panel.count(Row(status="crash", description="too large", reason="out of memory"))
    text = shown(panel)
    assert "idea 2" not in text and "discard  1.2600 (+0.0100) idea 6" in text
    assert "crash    too large (out of memory)" in text


def test_until_is_told_in_experiments_too():
    panel = Panel(None, datetime.now() + timedelta(hours=2))
    panel.seconds_a_run = 400.0
    assert panel.left().endswith(", about 18 experiments")


def test_without_limits_it_names_none():
    text = shown(Panel(None, None))
    assert "1: starting" in text and "none yet" in text and "until Ctrl-C" in text


def test_experiments_are_counted_by_how_they_ended():
    panel = Panel(None, None)
    for status, val_bpb in (("keep", 1.3), ("keep", 1.2), ("discard", 1.1), ("keep", 1.25), ("crash", 0.0)):
        panel.count(Row(status=status, val_bpb=val_bpb))
    assert panel.done == panel.counts.edits == 5
    assert panel.counts == NightCounts(kept=3, discarded=1, failed=1)


def test_a_run_of_the_committed_trainer_is_no_edit():
    panel = Panel(None, None)
    panel.count(Row(status="keep", val_bpb=1.3, source="a", parent="a"))
    panel.count(Row(status="keep", val_bpb=1.2, source="b", parent="a"))
    panel.add("refused")
    assert panel.counts == NightCounts(kept=1, baselines=1, refused=1) and panel.done == 2


def test_what_is_no_part_of_an_experiment_has_no_number():
    panel = Panel(20, None)
    for _ in range(20):
        panel.count(Row(status="discard", val_bpb=1.3))
    panel.enter("confirming: a larger batch", is_numbered=False)
    assert "confirming: a larger batch" in shown(panel) and "of 20" not in shown(panel)


def test_elsewhere_a_phase_is_a_line(capsys):
    with Panel(None, None) as panel:
        panel.enter("the agent thinks")
    captured = capsys.readouterr()
    assert captured.err.endswith(" the agent thinks\n") and captured.out == ""


def test_quiet_draws_no_panel_and_says_no_phase(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    with Panel(None, None) as panel:
        panel.enter("the agent thinks")
    assert "the agent thinks" in capsys.readouterr().err
    monkeypatch.setattr(console, "_loudness", "quiet")
    with Panel(None, None) as panel:
        panel.enter("the agent thinks")
    assert capsys.readouterr().err == ""


def test_the_summary_is_greppable(capsys):
    panel = Panel(3, None)
    panel.best = Row(status="keep", val_bpb=1.25, run="r1", description="wider")
    panel.belief = BELIEF
    panel.claim = "0.012 better"
    panel.branch = "main at 1234567"
    panel.count(panel.best)
    panel.print_summary("3 experiments were asked for")
    assert capsys.readouterr().out == (
        "claim: 0.012 better\nexperiments: 1\nkept: 1\ndiscarded: 0\nfailed: 0\n"
        "baselines: 0\nrefused: 0\nturns_lost: 0\n"
        "best_val_bpb: 1.250000\nbest_believed: 1.251000 +- 0.000500\nbest_run: r1\nbest: wider\n"
        "branch: main at 1234567\n"
        "ended: 3 experiments were asked for\n"
    )


def test_a_runs_progress_is_a_line_of_the_panel(capsys):
    panel = Panel(None, None)
    detail = RunDetail(300.0, panel)
    detail(Log(12, 3.2, 3.1, 1000, 100.0, 5000.0, 40.0))
    assert panel.detail == "step 12 | loss 3.1000 | 5,000 tok/s | mfu 40.0% | 200 s left"
    assert panel.share == 100 / 300 and "━" in shown(panel)
    detail.close()
    assert panel.detail == "" and panel.share is None and capsys.readouterr().err == ""


def test_the_next_run_does_not_begin_where_the_last_one_ended():
    panel = Panel(None, None)
    detail = RunDetail(300.0, panel)
    detail(Stop(10, 1000, 1.0, {}))
    detail.close()
    detail(None)
    assert panel.detail.startswith("starting")
