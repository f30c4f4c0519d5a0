"""`autoresearch doctor`: what is wrong is said, with its remedy, and what is right is found."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import pytest

from backends import platforms
from launcher import doctor
from launcher.device import DeviceLock, Other
from launcher.doctor import Check, Speed, check_machine, estimate_flops, print_checks
from launcher.ledger import Ledger, Row
from launcher.setting import resolve
from night.doctor import check_night
from prepare import ROOT, UserError, load_track, prepare_track

CONFIG_WITH_HUB = """
tracks:
  far: {hub: someone/something, vocab_size: 512, seq_len: 128, val_tokens: 16384}
platforms:
  cpu:
    framework: torch
    device_kind: cpu
    trainer: train_cuda.py
    track: far
    bf16: false
    start: {n_layer: 2, n_embd: 64, head_dim: 32, window_pattern: SL, short_window: 32,
            total_batch_size: 1024, device_batch_size: 8, eval_batch_size: 8}
"""


@pytest.fixture
def quick(house, monkeypatch):
    """No measurement that takes seconds."""
    monkeypatch.setattr(doctor, "measure_speed", lambda platform: Speed("float32", 0.05))
    monkeypatch.setattr(doctor, "others_at_work", lambda seconds: [])
    return house


def found(*arguments):
    return {check.name: check for check in check_machine(*arguments)}


# --- The whole, as a person calls it ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_machine_that_is_ready(autoresearch):
    prepare_track(load_track("tiny"))
    done = autoresearch("doctor", "--json")
    data = json.loads(done.stdout)
    checks = {check["name"]: check for check in data["checks"]}
    assert done.returncode == 0 and data["ready"], done.stdout
    assert " ".join(checks) == "device speed expected memory others power box data disk hub git loop agent"
    assert "TFLOP/s of matrix products in float32" in checks["speed"]["found"]
    assert "an estimate; starts with 2 layers, width 64" in checks["expected"]["found"]
    assert checks["data"]["found"] == "prepared: tiny; not prepared: none"


def test_what_fails_is_the_exit_code_and_the_rest_is_looked_at(autoresearch, house):
    done = autoresearch("doctor", "--platform", "nope")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "fail  device    unknown platform 'nope'" in done.stdout and "\x1b" not in done.stdout
    assert "  disk " in done.stdout and "  agent " in done.stdout


# --- The device ---------------------------------------------------------------------------------------------


def test_the_estimate_of_the_operations_is_that_of_the_trainer(monkeypatch):
    """A token of a step costs what the trainer's own count says, on every platform of PyTorch."""
    import torch

    import train_cuda

    monkeypatch.delenv("AUTORESEARCH_CONFIG", raising=False)
    for platform in platforms.load_platforms(ROOT / "platforms.yaml").values():
        start = platform.start
        track = load_track(platform.track, ROOT / "platforms.yaml")
        config = train_cuda.Config(
            track.vocab_size, track.seq_len, start.n_layer, start.n_embd, start.head_dim,
            start.window_pattern, start.short_window, "T", 0, 0, torch.float32,
        )  # fmt: skip
        with torch.device("meta"):
            model = train_cuda.GPT(config)
        assert estimate_flops(start, track) == pytest.approx(model.flops_per_token(), rel=0.05), platform.name


def test_what_a_run_had_is_better_than_an_estimate(quick):
    setting = resolve()
    row = Row(
        run="r1", status="keep", val_bpb=1.5, rules=2, platform="cpu", track="tiny",
        device=setting.facts.device, tokens_per_second=15036.0,
    )  # fmt: skip
    assert "an estimate" in found()["expected"].found
    ledger = Ledger(quick / "results.tsv")
    ledger.append(replace(row, run="r0", device="another", tokens_per_second=9.0))
    ledger.append(row)
    assert found()["expected"].found.startswith("15,036 tokens/s (4.51M in 300 s), as run r1 had")


def test_nothing_is_measured_beside_an_experiment(quick, monkeypatch):
    def measure(platform):
        raise AssertionError("it would disturb the run")

    monkeypatch.setattr(doctor, "measure_speed", measure)
    holder = "from launcher.device import DeviceLock\nwith DeviceLock('cpu'): print(1, flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", holder], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"1\n"
    assert found()["speed"].state == "warn"
    other.communicate(b"\n")
    assert DeviceLock("cpu").is_free()


def test_a_framework_that_does_not_compute_is_a_failure(quick, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UserError, match="does not compute: .*unknown platform"):
        doctor.measure_speed("no-such-platform")


@pytest.mark.parametrize(
    "name, patch, says",
    [
        (
            "others",
            ("others_at_work", lambda seconds: [Other(7, "make -j", 0.5)]),
            "make -j (process 7, 50%)",
        ),
        ("memory", ("LEAST_MEMORY_GB", 1e6), "a run takes about 1000000.0"),
        ("disk", ("LEAST_DISK_GB", 1e6), "1e+06 GB are needed"),
        ("box", ("missing_walls", lambda: "no Landlock"), "cannot be boxed: no Landlock"),
        ("power", ("mac_state", lambda: {"on_battery": True}), "battery"),
    ],
)
def test_what_makes_runs_worthless_is_a_warning_with_a_remedy(quick, monkeypatch, name, patch, says):
    prepare_track(load_track("tiny"))
    assert found()[name].state == "ok"
    monkeypatch.setattr(doctor, *patch)
    check = found()[name]
    assert check.state == "warn" and says in check.found and check.remedy


def test_a_full_disk_of_the_cache_alone_is_seen(quick, monkeypatch):
    usage = namedtuple("usage", "total used free")
    cache = os.environ["AUTORESEARCH_CACHE"]
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: usage(0, 0, 1e6 if str(path).startswith(cache) else 1e12)
    )
    prepare_track(load_track("tiny"))
    assert found()["disk"].state == "warn"


# --- The data -----------------------------------------------------------------------------------------------


def test_damaged_data_is_a_failure(quick, monkeypatch, tmp_path):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    assert "tiny is not prepared" in found()["data"].found
    data = prepare_track(load_track("tiny"))
    assert found()["data"].state == "ok"
    (data.path / "train.bin").write_bytes(b"short")
    check = found()["data"]
    assert check.state == "fail" and "damaged" in check.found and "--force" in check.found


def test_a_hub_that_does_not_answer_matters_where_data_is_to_be_fetched(quick, monkeypatch, tmp_path):
    config = tmp_path / "hub.yaml"
    config.write_text(CONFIG_WITH_HUB)
    monkeypatch.setenv("AUTORESEARCH_CONFIG", str(config))
    platforms.load_platforms.cache_clear()

    def fail(*arguments, **more):
        raise ConnectionError("name not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    check = found()["hub"]
    assert check.state == "fail" and "cannot reach the hub for someone/something" in check.found
    monkeypatch.setattr(doctor, "prepared_path", lambda track: tmp_path)
    assert found()["hub"].state == "warn"
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *arguments, **more: None)
    assert found()["hub"] == Check("hub", "ok", "answers about someone/something")


# --- The night ----------------------------------------------------------------------------------------------


def night(agent=""):
    return {check.name: check for check in check_night(agent, "", "")}


def test_git_is_looked_at(repository):
    assert night()["git"].found == "on main"
    (repository / "train_cuda.py").write_text("SCORE = 1.4\n")
    assert night()["git"].state == "ok" and "train_cuda.py is edited" in night()["git"].found
    (repository / "prepare.py").write_text("RULES = 3\n")
    assert night()["git"].state == "warn" and "prepare.py differ" in night()["git"].found
    (repository.parent / ".git" / "HEAD").unlink()
    check = night()["git"]
    assert check.state == "fail" and "git init" in check.found


def test_an_agent_is_asked_for_an_edit(repository, tmp_path):
    good = tmp_path / "good.py"
    good.write_text("with open('train_cuda.py', 'a') as f: f.write('# checked\\n')\n")
    check = night(f"{sys.executable} {good}")["agent"]
    assert check.state == "ok" and "is installed and edits" in check.found
    assert (repository / "train_cuda.py").read_text() == "SCORE = 1.5\n"
    idle = tmp_path / "idle.py"
    idle.write_text("print('not logged in')\n")
    check = night(f"{sys.executable} {idle}")["agent"]
    assert check.state == "fail" and "is not ready" in check.found and "must edit the file" in check.found
    check = night("no-such-agent")["agent"]
    assert check.state == "fail" and "no program 'no-such-agent'" in check.found


def test_known_agents_are_looked_for_on_the_path(repository, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.path.dirname(sys.executable)}:/usr/bin:/bin")
    assert "builtin needs none" in night()["agent"].found
    (programs / "claude").write_text("#!/bin/sh\n")
    (programs / "claude").chmod(0o755)
    assert night()["agent"].found.startswith("installed: claude")


# --- How it is printed --------------------------------------------------------------------------------------


def test_a_remedy_stands_below_what_needs_one():
    lines = []
    checks = [Check("disk", "warn", "1 GB\nfree\x1b[2J", "clean"), Check("git", "ok", "on main", "unused")]
    assert print_checks(checks, lambda text, state: lines.append(text), False)
    assert [line.split() for line in lines] == [
        ["warn", "disk", "1", "GB", "free", "[2J"],
        ["->", "clean"],
        ["ok", "git", "on", "main"],
    ]
