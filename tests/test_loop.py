"""The night: real agents that are scripts, in a real repository; only the training is made up, but for the last tests."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta

import psutil
import pytest
from conftest import edit
from rich.console import Console
from test_launcher import wait_for_line

from launcher import loop, repo, trial
from launcher import run as runner
from launcher.ledger import Ledger, Row
from launcher.loop import Night, parse_agent, parse_until
from launcher.run import Options
from prepare import ROOT, UserError


@pytest.fixture
def night(repository, monkeypatch):
    """night(agent's Python, ...) -> exit code. Pauses are collected in night.pauses instead of waited for."""
    pauses, real = [], time.sleep
    monkeypatch.setattr(loop.time, "sleep", lambda seconds: pauses.append(seconds) if seconds >= 7 else real(seconds))

    def night(agent, experiments=2, arguments=(), **more):
        script = runner.home() / "agent.py"
        script.write_text("import os, re, subprocess, sys, time\nfrom pathlib import Path\ntrainer = Path('train_cuda.py')\n" + agent)
        return loop.loop(Night([sys.executable, str(script), *arguments], Options(), experiments, pause=7.0, **more))
    night.pauses = pauses
    return night


def rows():
    return Ledger(runner.home() / "results.tsv").rows()


def recorded(event):
    lines = (runner.home() / "runs" / "loop" / "loop.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == event]


BETTER = """
prompt = sys.stdin.read()
score = float(re.search(r"SCORE = ([\\d.]+)", trainer.read_text())[1])
trainer.write_text(f"SCORE = {score - 0.1:.1f}\\n")
print("I thought about it.\\n\\n**experiment: a tenth better than " + str(score) + "**")
"""


def test_every_turn_is_an_experiment(night, repository, capsys):
    assert night(BETTER, 4) == 0
    assert [(r.description, r.status, r.val_bpb) for r in rows()] == [
        ("baseline: the trainer as committed", "keep", 1.5), ("a tenth better than 1.5", "keep", 1.4),
        ("a tenth better than 1.4", "keep", 1.3), ("a tenth better than 1.3", "keep", 1.2)]
    assert repo.git("log", "--format=%s").splitlines() == ["a tenth better than 1.3", "a tenth better than 1.4", "a tenth better than 1.5", "start"]
    out = capsys.readouterr().out
    assert "experiments: 4\nkept: 4\n" in out and "best_val_bpb: 1.200000" in out and "ended: 4 experiments were asked for" in out
    prompt = max((runner.home() / "runs" / "loop").glob("*.prompt.md"), key=lambda p: p.stat().st_mtime_ns).read_text()
    assert "trainer: train_cuda.py" in prompt and "a tenth better than 1.4" in prompt and "## Last result" in prompt and "val_bpb: 1.300000" in prompt
    assert not loop.state_path().exists() and repo.change("status", "--porcelain") == ""


def test_worse_ideas_are_taken_back_and_the_agent_hears_of_it(night, repository):
    assert night("""
prompt = sys.stdin.read()
trainer.write_text("SCORE = 1.9  # " + ("again" if prompt.split("## Last result")[1].startswith("\\n\\nworse\\nstatus: discard") else "first"))
print("experiment: worse")""", 3) == 0
    assert [r.status for r in rows()] == ["keep", "discard", "discard"]
    assert (repository / "train_cuda.py").read_text() == "SCORE = 1.5\n" and len(repo.git("log", "--format=%s").splitlines()) == 1


def test_the_prompt_may_be_an_argument(night, repository):
    agent = 'assert sys.stdin.read() == "" and "## This turn" in sys.argv[1]\ntrainer.write_text("SCORE = 1.2\\n")\nprint("did it")'
    assert night(agent, 2, ["{prompt}"]) == 0
    assert rows()[-1].description == "did it"


@pytest.mark.parametrize("agent, says", [
    ("trainer.write_text('half an edit'); sys.exit('no network')", "exit code 1: no network"),
    ("trainer.write_text('half an edit'); time.sleep(60)", "did not end within 2 s"),
    ("print('I only looked')", "changed nothing in train_cuda.py"),
    ("trainer.unlink()", "deleted train_cuda.py"),
])
def test_an_agent_that_fails_is_retried_with_growing_pauses(night, repository, monkeypatch, agent, says, capsys):
    monkeypatch.setattr(loop, "GIVE_UP", 4)
    assert night(agent, 2, agent_seconds=2.0) == 1
    assert [round(p) for p in night.pauses] == [7, 14, 28] and all(says in e["reason"] for e in recorded("failed"))
    assert len(recorded("failed")) == 4 and "gave up after 4 turns" in capsys.readouterr().out
    assert (repository / "train_cuda.py").read_text() == "SCORE = 1.5\n" and len(rows()) == 1


def test_after_the_network_came_back_the_night_goes_on(night, repository):
    agent = f"flag = Path({str(runner.home())!r}) / 'tries'\nn = int(flag.read_text()) if flag.exists() else 0\nflag.write_text(str(n + 1))\nif n < 3: sys.exit('no network')\n"
    assert night(agent + BETTER, 3) == 0
    assert len(rows()) == 3 and [round(p) for p in night.pauses] == [7, 14, 28]


def test_what_an_agent_does_elsewhere_is_taken_back_but_not_lost(night, repository, capsys):
    (repository / "README.md").write_text("the person's own edit\n")
    assert night("""
trainer.write_text("SCORE = 1.3\\n")
Path("prepare.py").write_text("RULES = 0\\n"); Path("README.md").write_text("by the agent\\n")
Path("launcher").mkdir(exist_ok=True); Path("launcher/helper.py").write_text("1\\n"); Path("train_mlx.py").unlink()
print("experiment: elsewhere too")""", 2) == 0
    assert (repository / "prepare.py").read_text() == "RULES = 1\n" and (repository / "README.md").read_text() == "the person's own edit\n"
    assert (repository / "train_mlx.py").exists() and not (repository / "launcher" / "helper.py").exists()
    assert rows()[-1].val_bpb == 1.3 and files_changed() == ["inner/train_cuda.py"]
    [stray] = repo.git("for-each-ref", "--format=%(refname)", "refs/autoresearch/stray/").splitlines()
    assert repo.git("show", f"{stray}:inner/README.md") == "by the agent" and repo.git("show", f"{stray}:inner/launcher/helper.py") == "1"
    assert "taken back: the agent's" in capsys.readouterr().err


def files_changed():
    return repo.git("show", "--format=", "--name-only", "HEAD").split()


def test_an_agent_that_commits_or_switches_branches_is_put_right(night, repository):
    assert night("""
trainer.write_text("SCORE = 1.3\\n")
git = lambda *a: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *a], check=True)
git("checkout", "-q", "-b", "agents"); git("commit", "-qam", "mine"); print("experiment: committed it myself")""", 2) == 0
    assert repo.branch() == "refs/heads/main" and repo.git("log", "--format=%s").splitlines() == ["committed it myself", "start"]
    assert repo.git("log", "-1", "--format=%s", "agents") == "mine" and repo.change("status", "--porcelain") == ""


def test_bad_edits_come_back_at_once_and_are_recorded(night, repository):
    assert night("""
prompt = sys.stdin.read()
trainer.write_text("def broken(:" if "No experiment came" not in prompt else "SCORE = 1  # NODRY" if "does not compile: line" in prompt
                   else "SCORE = 1.4" if "the tail" in prompt else "")
print("experiment: an edit")""", 2) == 0
    assert not night.pauses and [e["kind"] for e in recorded("failed")] == ["edit", "edit"]
    dry = rows()[1]
    assert (dry.status, dry.reason, dry.marks, rows()[-1].val_bpb) == ("crash", "dry run: bad", "dry", 1.4)
    assert repo.git("show", f"refs/autoresearch/{dry.run}:inner/train_cuda.py") == "SCORE = 1  # NODRY"


def test_an_idea_that_was_scored_is_not_run_again(night, repository, monkeypatch):
    monkeypatch.setattr(loop, "GIVE_UP", 2)
    assert night("trainer.write_text('SCORE = 1.8')\nprint('experiment: the same')", 9) == 1
    assert len(rows()) == 2 and "the same source was scored by run" in recorded("failed")[0]["reason"]


def test_a_busy_device_is_waited_for_and_then_the_edit_is_put_aside(night, repository, monkeypatch):
    monkeypatch.setattr(loop, "GIVE_UP", 1)
    assert night("trainer.write_text('SCORE = 1.0  # BUSY')\nprint('experiment: while others compute')", 2) == 1
    assert [r.marks for r in rows()] == ["", "contended", "contended", "contended"]
    assert (repository / "train_cuda.py").read_text() == "SCORE = 1.5\n"


def test_nothing_that_an_agent_starts_outlives_its_turn(night, repository):
    assert night("""
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
Path(os.environ["AUTORESEARCH_HOME"], "pid").write_text(str(child.pid))
trainer.write_text("SCORE = 1.3\\n"); print("experiment: with a helper")""", 2) == 0
    pid = int((runner.home() / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_an_agent_cannot_start_experiments_of_its_own(monkeypatch, repository):
    monkeypatch.setenv(trial.IN_LOOP, "1")
    with pytest.raises(UserError, match="runs the experiments"):
        trial.run_try(Options("mine"))


def test_what_lay_in_the_trainer_is_tried_first(night, repository):
    edit(repository, "SCORE = 1.45\n")
    assert night(BETTER, 2) == 0
    assert [r.description for r in rows()] == ["what lay in the trainer, uncommitted", "a tenth better than 1.45"]


@pytest.mark.parametrize("where", ["agent", "training"])
def test_a_loop_that_was_killed_goes_on(night, repository, where, capsys):
    """Killed while the agent was writing, or in the middle of a run: the same command goes on."""
    deadly = "trainer.write_text('half an ed')\nPath('prepare.py').write_text('torn')\nos.kill(os.getppid(), 9)\ntime.sleep(1)\n"
    if where == "training":
        deadly = "trainer.write_text('SCORE = 1.0  # DIE')\nprint('experiment: the fatal one')\n"
    child = os.fork()
    if child == 0:
        night(deadly, 3)
        os._exit(0)
    os.waitpid(child, 0)
    assert loop.state_path().exists() and len(rows()) == 1
    if where == "training":
        edit(repository, "SCORE = 1.05\n")
    assert night(BETTER, 3) == 0
    assert "going on with a loop that was cut off after 1 experiments" in capsys.readouterr().err
    scored = [r.val_bpb for r in rows() if r.scored]
    assert scored == ([1.5, 1.4, 1.3] if where == "agent" else [1.5, 1.05, 0.95]) or scored == [1.5, 1.05, 1.0]
    assert (repository / "prepare.py").read_text() == "RULES = 1\n"
    if where == "agent":
        [stray] = repo.git("for-each-ref", "--format=%(refname)", "refs/autoresearch/stray/").splitlines()
        assert repo.git("show", f"{stray}:inner/prepare.py") == "torn"


def test_ctrl_c_during_a_run_leaves_order(night, repository, capsys):
    assert night("trainer.write_text('SCORE = 1.0  # STOP')\nprint('experiment: stopped')", 5) == 130
    assert rows()[-1].reason == "interrupted" and not trial.journal().exists()
    assert "ended: interrupted" in capsys.readouterr().out and repo.git("for-each-ref", "refs/autoresearch/")
    assert night("sys.exit('not asked')", 1) == 0  # the edit that nobody judged is tried first, under its own name
    assert (rows()[-1].description, rows()[-1].status, rows()[-1].val_bpb) == ("stopped", "keep", 1.0) and not loop.state_path().exists()


def test_until(night, repository, capsys):
    assert parse_until("00:00") > datetime.now() and parse_until("23:59") - datetime.now() < timedelta(days=1)
    for text in ("25:00", "soon", "7"):
        with pytest.raises(UserError, match="is not a time of day"):
            parse_until(text)
    assert night(BETTER, None, until=datetime.now() + timedelta(seconds=60)) == 0  # five minutes do not fit
    assert not rows() and "another experiment would not end by" in capsys.readouterr().out


def test_a_laptop_on_battery_is_told_before_the_night(night, repository, monkeypatch):
    monkeypatch.setattr(loop, "mac_state", lambda: {"on_battery": True, "low_power_mode": False})
    with pytest.raises(UserError, match="on battery: no result"):
        night(BETTER)
    assert not rows()


def test_an_agent_that_does_not_exist_is_a_mistake(house):
    with pytest.raises(UserError, match="there is no program 'no-such-agent'"):
        parse_agent("no-such-agent -p")
    with pytest.raises(UserError, match="No closing quotation"):
        parse_agent("sh -c 'x")


def test_the_panel_tells_what_a_person_wants_to_know():
    status = loop.Status(Night(["agent"], Options(), 10, datetime.now() + timedelta(hours=2)))
    status.count(Row(status="keep", val_bpb=1.25, description="[/a] smaller [bold] window", total_seconds=390.0))
    status.count(Row(status="discard", val_bpb=1.30))
    status.phase, status.detail = "training: a larger batch", "step 12 | loss 3.1"
    console = Console(record=True, width=120, file=open(os.devnull, "w"))
    console.print(status.panel())
    text = console.export_text()
    for part in ("3 of 10: training: a larger batch", "step 12 | loss 3.1", "1.250000  [/a] smaller [bold] window", "1 kept, 1 discarded, 0 failed", "8 experiments", "1:59:"):
        assert part in text


# --- the real thing ------------------------------------------------------------------------------------------

@pytest.fixture
def checkout(tmp_path, tiny_cache):
    """This checkout's code in a repository of its own, with the tiny track."""
    root = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(root)], check=True)
    for name in subprocess.run(["git", "-C", str(ROOT), "ls-files", "-mo", "--exclude-standard"], capture_output=True, text=True, check=True).stdout.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((ROOT / name).read_bytes())
    (root / "platforms.yaml").write_text((tiny_cache / "platforms.yaml").read_text())
    trainer = root / "train_cuda.py"
    trainer.write_text(re.sub(r"^UNEMBEDDING_LR = [\d.]+", "UNEMBEDDING_LR = 0.0001", trainer.read_text(), flags=re.M))  # there is something to find
    for arguments in ("add -A", "-c user.name=me -c user.email=me@here commit -qm start"):
        subprocess.run(["git", "-C", str(root), *arguments.split()], check=True)
    return root


def command(root, tiny_cache, *arguments):
    return dict(args=[sys.executable, "-m", "launcher.cli", *map(str, arguments)], cwd=root, text=True, stdin=subprocess.DEVNULL,
                env={**{k: v for k, v in os.environ.items() if not k.startswith("AUTORESEARCH_")}, "AUTORESEARCH_CACHE": str(tiny_cache / "cache"),
                     "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.slow
def test_an_optimizer_over_the_constants_lowers_val_bpb(checkout, tiny_cache):
    done = subprocess.run(**command(checkout, tiny_cache, "loop", "--agent", f"{sys.executable} tests/agents/climber.py UNEMBEDDING_LR", "--experiments", "5",
                                    "--budget", "3", "--pause", "1"), capture_output=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    scored = [r for r in Ledger(checkout / "results.tsv").rows() if r.compares]
    assert len(scored) == 5 and scored[0].description.startswith("baseline")
    best = min(r.val_bpb for r in scored if r.status == "keep")
    assert best < scored[0].val_bpb - 0.01, [(r.description, r.val_bpb) for r in scored]
    kept = subprocess.run(["git", "log", "--format=%s"], cwd=checkout, capture_output=True, text=True).stdout.splitlines()
    assert kept[: kept.index("start")] == [r.description for r in reversed(scored[1:]) if r.status == "keep"]


@pytest.mark.slow
def test_a_signal_ends_a_real_loop_in_order(checkout, tiny_cache):
    process = subprocess.Popen(**command(checkout, tiny_cache, "loop", "--agent", f"{sys.executable} tests/agents/climber.py", "--budget", "600"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for_line(process, "training: baseline")
        wait_for_line(process, "run 2")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and "Traceback" not in err and "ended: interrupted" in out
    [row] = Ledger(checkout / "results.tsv").rows()
    assert row.reason == "interrupted"
    assert subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, text=True).stdout == ""


@pytest.mark.slow
def test_a_terminal_shows_the_night_live(checkout, tiny_cache):
    screen, slave = pty.openpty()
    process = subprocess.Popen(**command(checkout, tiny_cache, "loop", "--agent", f"{sys.executable} tests/agents/climber.py", "--budget", "600",
                                         "--experiments", "7"), stdout=subprocess.PIPE, stderr=slave)
    shown, deadline = b"", time.monotonic() + 100
    try:
        while b"tok/s" not in shown and time.monotonic() < deadline:
            if select.select([screen], [], [], 1.0)[0]:
                shown += os.read(screen, 65536)
        process.send_signal(signal.SIGINT)
        while process.poll() is None and time.monotonic() < deadline:  # a terminal that nobody reads would block it
            if select.select([screen], [], [], 0.2)[0]:
                shown += os.read(screen, 65536)
    finally:
        process.kill()
        out, _ = process.communicate()
        os.close(screen)
        os.close(slave)  # not before: a terminal without an owner answers with an error
    assert process.returncode == 130 and "ended: interrupted" in out
    for part in (b"1 of 7: training: baseline", b"none yet", b"0 kept, 0 discarded", b"7 experiments", b"step "):
        assert part in shown, shown[-2000:]
