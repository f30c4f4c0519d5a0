"""Devices of other machines: who may lend, over what, and that a run of theirs counts here once."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from conftest import ROOT, row

from backends.protocol import write_json
from launcher.carried import pack_run, unpack_run
from launcher.harness import harness_hash
from launcher.ledger import Flag
from launcher.runs import append_row, ledger, record_killed_runs, run_dir
from launcher.setting import resolve
from night import hosts
from night.devices import Device
from night.hosts import (
    Host,
    Link,
    Unreachable,
    ask_host,
    night_hash,
    read_answer,
    read_hosts,
    require_same_board,
)
from night.lend import describe
from night.pool import find_pool
from night.tls import make_certificate
from night.workers import security_for
from prepare import UserError

sys.path.append(str(ROOT / "benchmarks"))  # last: it has a night.py of its own

import lab  # noqa: E402
from hostile import build_template, loop  # noqa: E402
from house import copy_house, ledger_faults  # noqa: E402

pytestmark = pytest.mark.usefixtures("house")

# --- hosts.yaml ---------------------------------------------------------------------------------------------


def test_a_host_is_a_folder_and_what_ssh_knows_it_by(tmp_path):
    file = tmp_path / "hosts.yaml"
    file.write_text(
        "hosts:\n"
        "  gpubox: {folder: ~/my work, devices: '0,1'}\n"
        "  mac: {folder: /srv/a, ssh: me@10.0.0.7, python: /opt/python, options: [-p, '2222']}\n"
    )
    gpubox, mac = read_hosts(file)
    *_, name, there = gpubox.command(do="describe")
    assert (name, there) == (
        "gpubox",
        "cd ~/'my work' && exec .venv/bin/python -m night.lend describe",
    )
    command = mac.command("-L1:127.0.0.1:2", do="lend")
    assert command[-5:] == [
        "-p",
        "2222",
        "-L1:127.0.0.1:2",
        "me@10.0.0.7",
        "cd /srv/a && exec /opt/python -m night.lend lend",
    ]
    assert "-oBatchMode=yes" in command


@pytest.mark.parametrize(
    "text, says",
    [
        ("hosts:\n  a: {}\n", "hosts.yaml:2: host 'a': missing folder"),
        ("hosts:\n  a: {folder: x, gpus: 2}\n", "unknown key 'gpus'"),
        ("hosts:\n  a/b: {folder: x}\n", "letters, digits, dots and hyphens"),
        ("tracks: {}\n", "section 'hosts' is missing"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_with_its_line(tmp_path, text, says):
    file = tmp_path / "hosts.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        read_hosts(file)


# --- What a host says of itself -----------------------------------------------------------------------------


def answer(**more):
    board = resolve("cpu").board
    told = {
        "error": "",
        "harness": harness_hash(),
        "night": night_hash(),
        "platform": "cpu",
        "board": board._asdict(),
        "facts": asdict(resolve("cpu").facts),
        "start": asdict(resolve("cpu").platform.start),
        "devices": [asdict(Device("cpu0", "cpu", cores=(0,)))],
    }
    return json.dumps({**told, **more})


def test_a_machine_says_what_it_is(monkeypatch):
    monkeypatch.setattr("night.devices.usable_cores", lambda: [0, 1])
    said = describe({"platform": "", "track": "", "budget": 300.0, "devices": "cpu:2"})
    lent = read_answer("box", json.dumps(said))
    assert [device.name for device in lent.devices] == ["box/cpu0", "box/cpu1"]
    assert all(device.host == "box" for device in lent.devices)
    assert lent.board == resolve().board._replace(device=lent.facts["device"])
    assert lent.facts["device"].endswith(", 1 cores")


def test_another_harness_or_board_is_refused_by_name():
    with pytest.raises(UserError, match="host box: its harness is 0123, here it is .*one commit"):
        read_answer("box", answer(harness="0123"))
    with pytest.raises(UserError, match="host box: no GPU"):
        read_answer("box", json.dumps({"error": "no GPU"}))
    for text in ("", "[]", "{}", answer(board={}), answer(devices=[{"name": "x"}])):
        with pytest.raises(UserError, match="host box: its answer is not understood"):
            read_answer("box", text)
    lent = read_answer("box", answer())
    start = resolve("cpu").platform.start
    require_same_board(lent, lent.board, start)
    with pytest.raises(UserError, match="host box: there the platform cpu starts with .*'n_layer': 9"):
        require_same_board(replace(lent, start={**lent.start, "n_layer": 9}), lent.board, start)
    other = replace(lent, board=lent.board._replace(fingerprint="ffff"))
    with pytest.raises(
        UserError, match="host box: fingerprint ffff there, .* here: uv run autoresearch prep"
    ):
        require_same_board(other, lent.board, start)


def put_ssh(folder, script, monkeypatch):
    """Put a shell script in the place of ssh."""
    (folder / "ssh").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_host_that_does_not_answer_is_left_out(tmp_path, monkeypatch, capsys):
    put_ssh(tmp_path, "echo no route >&2\nexit 255", monkeypatch)
    with pytest.raises(Unreachable, match=r"box does not answer \(no route\): does `ssh box ls x` work"):
        ask_host(Host("box", "x"), {})
    file = tmp_path / "hosts.yaml"
    file.write_text("hosts:\n  box: {folder: x}\n")
    with pytest.raises(UserError, match="none of the hosts in"):
        find_pool("", file, "", False, "", "", None)
    assert "host box does not answer (no route)" in capsys.readouterr().err


def test_a_connection_that_ends_is_made_anew_after_a_pause_that_grows(tmp_path, monkeypatch):
    put_ssh(tmp_path, 'read order\necho "$order" > order\necho refused >&2\nexit 255', monkeypatch)
    monkeypatch.setattr(hosts, "ROOT", tmp_path)
    monkeypatch.setattr(hosts, "FIRST_PAUSE", 0.05)
    lent = replace(read_answer("box", answer()), devices=(Device("box/gpu0", "gpu"),))
    link = Link(Host("box", "x", devices="0"), lent, 4711, make_certificate(), tmp_path / "box.log")
    pauses = []
    assert link.tend() == ""
    while len(pauses) < 3:
        link.child and link.child.wait(30)
        why = link.tend()
        if why:
            assert why == "host box: the connection ended (255): refused"
        if link.pause not in pauses:
            pauses.append(link.pause)
    link.end()
    assert pauses == [0.1, 0.2, 0.4] and link.is_shaky
    order = json.loads((tmp_path / "order").read_text())
    assert [one["device"]["name"] for one in order["workers"]] == ["box/gpu0"]
    assert order["scheduler"].startswith("tls://127.0.0.1:") and "BEGIN" in order["certificate"]["key"]


# --- Runs of other machines ---------------------------------------------------------------------------------


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """carried(row) -> the files of a run that another machine made."""

    def carried(made):
        here = os.environ["AUTORESEARCH_HOME"]
        monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "other"))
        folder = run_dir(made.run)
        folder.path.mkdir(parents=True)
        (folder.path / "train_cuda.py").write_text("A = 1\n")
        folder.weights.write_bytes(b"weights")
        write_json(folder.record, {"row": asdict(made), "pid": os.getpid(), "trainer": "train_cuda.py"})
        append_row(made)
        files = pack_run(made.run)
        monkeypatch.setenv("AUTORESEARCH_HOME", here)
        return files

    return carried


def late(**more):
    return row(source="b", parent="a", val_bpb=1.2, marks="parallel", time="2031-01-01T00:00:00Z", **more)


def test_a_run_of_another_machine_gets_its_verdict_here(carried):
    ledger().append(row(run="r1", source="a", parent="a", build_on="a", val_bpb=1.5))
    # There, where the other runs are not known, it was the first of all, and kept.
    files = carried(late(run="r2", status="keep", build_on="b"))
    assert "model.safetensors" not in files and files["train_cuda.py"] == b"A = 1\n"
    judged = unpack_run("r2", files, {})
    assert (judged.status, judged.build_on) == ("keep", "b") and judged.effect < 0
    assert judged.time < "2030", "the time is this machine's"
    assert run_dir("r2").trainer().read_text() == "A = 1\n"
    assert unpack_run("r2", files, {}).build_on == "b"
    assert [one.run for one in ledger().rows()] == ["r1", "r2"]


def test_what_the_other_machine_found_out_of_order_counts_as_here(carried):
    ledger().append(row(run="r1", source="c", parent="c", build_on="c", val_bpb=1.1))
    worse = unpack_run("r2", carried(late(run="r2", status="keep", build_on="b")), {})
    assert worse.status == "discard" and "by hand" in worse.reason
    failed = unpack_run("r3", carried(replace(late(run="r3"), status="crash", val_bpb=0.0, reason="no")), {})
    assert (failed.status, failed.reason) == ("crash", "no")
    undecided = late(run="r4", status="discard")
    undecided.add_flags(Flag.REPEAT)
    assert Flag.REPEAT not in unpack_run("r4", carried(undecided), {}).flags


def test_another_run_than_was_asked_for_counts_for_nothing(carried):
    files = carried(late(run="r7", status="keep"))
    with pytest.raises(UserError, match="run r7, whose seed is 0, not 2"):
        unpack_run("r7", files, {"source": "b", "seed": 2})
    assert not ledger().rows() and not run_dir("r7").path.exists()
    unpack_run("r7", files, {"source": "b", "board": late().board})
    with pytest.raises(UserError, match="run r7, whose source is b, not c"):  # two of one name
        unpack_run("r7", files, {"source": "c"})


@pytest.mark.parametrize("name", ["../r5", ".", "a/b", ""])
def test_a_run_lands_in_its_own_folder_alone(carried, name):
    files = carried(late(run="r5", status="keep"))
    with pytest.raises(UserError, match="another machine sent"):
        unpack_run(name, files, {})
    with pytest.raises(UserError, match="another machine sent"):
        unpack_run("r5", {**files, f"../{name or 'x'}": b""}, {})
    assert not ledger().path.exists() or not ledger().rows()


def test_a_run_that_came_when_the_process_was_killed_is_there_afterwards(carried, monkeypatch):
    ledger().append(row(run="r1", source="a", parent="a", build_on="a", val_bpb=1.5))
    files = carried(late(run="r6", status="keep"))

    def killed(row):
        raise KeyboardInterrupt

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr("launcher.carried.append_row", killed)
        unpack_run("r6", files, {})
    assert len(ledger().rows()) == 1
    record_killed_runs()
    assert unpack_run("r6", files, {}).build_on == "b"
    assert [(one.run, one.status) for one in ledger().rows()] == [("r1", "keep"), ("r6", "keep")]


# --- Schedulers ---------------------------------------------------------------------------------------------


def test_a_scheduler_without_encryption_is_on_this_machine_or_asked_for_by_name():
    security_for("tcp://127.0.0.1:8786", False)
    security_for("tcp://10.0.0.1:8786", True)
    with pytest.raises(UserError, match="neither encryption nor a password"):
        security_for("tcp://10.0.0.1:8786", False)
    with pytest.raises(UserError, match="needs certificates in dask's configuration.*ca-file"):
        security_for("tls://10.0.0.1:8786", False)
    for address in ("10.0.0.1:8786", "http://a", "tls://"):
        with pytest.raises(UserError, match="is no address of a scheduler"):
            security_for(address, True)


@pytest.mark.alone
def test_devices_join_a_scheduler_and_a_night_uses_them(tmp_path):
    """With dask's own scheduler, certificates in dask's configuration, and a machine in another checkout."""
    here = build_template(tmp_path / "here")
    there = copy_house(here, tmp_path / "there")
    certificate = make_certificate()
    for part in ("cert", "key"):
        (tmp_path / f"{part}.pem").write_text(certificate[part])
    prefix = "DASK_DISTRIBUTED__COMM__TLS__"
    variables = {f"{prefix}CA_FILE": str(tmp_path / "cert.pem")}
    for role in ("CLIENT", "SCHEDULER", "WORKER"):
        for part in ("cert", "key"):
            variables[f"{prefix}{role}__{part.upper()}"] = str(tmp_path / f"{part}.pem")
    address = "tls://127.0.0.1:29876"
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "tls://127.0.0.1"]
        + ["--port", "29876", "--no-dashboard"],
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        lender = there.start("lend", address, "--devices", "cpu:2", "--name", "box", **variables)
        deadline = time.monotonic() + 60
        while "lending box/cpu0, box/cpu1" not in (there.folder / "err").read_text():
            assert time.monotonic() < deadline, (there.folder / "err").read_text()
            time.sleep(0.2)
        night = here.wait(here.start(*loop(here, experiments=3, scheduler=address), **variables))
        assert night.code == 0, night.err
        assert night.experiments == 3 and "box/cpu0" in night.err
        os.killpg(lender.pid, signal.SIGINT)  # as a terminal does: its workers get it too
        ended = there.wait(lender)
        assert ended.code == 130 and "Traceback" not in ended.err
        again = here.wait(here.start(*loop(here, scheduler=address), **variables))
        assert again.code == 1 and f"no device has joined {address}: autoresearch lend" in again.err
    finally:
        scheduler.terminate()
        scheduler.wait()
    assert not ledger_faults(here)


# --- Three hosts --------------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.skipif(lab.why_not() != "", reason=lab.why_not() or "-")
def test_a_host_that_vanishes_in_a_night_comes_back():
    """Real sshds in namespaces. All faults: uv run python benchmarks/hostile.py --part hosts"""
    options = ("--part", "hosts", "--only", "gone and back 8", "--patience", "30")
    command = [sys.executable, "benchmarks/hostile.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed_hosts: 0 of 1" in done.stdout
