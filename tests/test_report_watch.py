"""The live page: who may ask, what is answered, and when the page is another."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace

import pytest
from conftest import ROOT, row
from made_up_night import make_night

from launcher.ledger import Ledger
from launcher.report.files import loop_log_path
from launcher.report.watch import LiveReport, is_this_machine, open_server
from launcher.runs import append_json_line, now_utc
from prepare import UserError


@contextmanager
def served(ledgers, token="", **options):
    """Serve a report, and yield a function that asks for a path and returns (status, headers, body)."""
    with open_server("127.0.0.1", 0, token, LiveReport(ledgers, **options)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def ask(path="/", **headers):
            port = server.server_address[1]
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
            opener = urllib.request.build_opener(StayHere)
            try:
                with opener.open(request, timeout=60) as answer:
                    return answer.status, answer.headers, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.headers, error.read()

        ask.url = server.url
        try:
            yield ask
        finally:
            server.shutdown()
            thread.join()


class StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirection."""

    def redirect_request(self, *arguments):
        return None


def state_of(ask, **headers):
    return json.loads(ask("/state", **headers)[2])


# --- What is answered ---------------------------------------------------------------------------------------


def test_the_page_and_its_version_are_served(house):
    ledgers = make_night(house, runs=8, mac_runs=0, points=10, claims=False)
    with served(ledgers) as ask:
        status, headers, body = ask()
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        assert b"climbmix on NVIDIA H100" in body and headers["Cache-Control"] == "no-store"
        assert state_of(ask)["version"].encode() in body
        assert ask("/../../etc/passwd")[0] == ask("/runs")[0] == 404


def test_a_new_row_makes_another_version_and_another_page(house):
    ledgers = make_night(house, runs=5, mac_runs=0, points=10, claims=False)
    with served(ledgers) as ask:
        before = state_of(ask)["version"]
        assert state_of(ask)["version"] == before
        last = Ledger(ledgers[0]).rows()[-1]
        Ledger(ledgers[0]).append(replace(last, run="new", description="the newest idea"))
        assert state_of(ask)["version"] != before
        assert b"the newest idea" in ask()[2]


def test_a_line_of_the_loops_log_makes_another_version_and_tells_the_phase(house):
    ledgers = make_night(house, runs=5, mac_runs=0, points=10, claims=False)
    with served(ledgers) as ask:
        before = state_of(ask)
        entry = {"time": now_utc(), "event": "phase", "phase": "training", "text": "training: an idea"}
        append_json_line(loop_log_path(), entry)
        after = state_of(ask)
        assert before["phase"] == "" and after["phase"].startswith("training: an idea, for ")
        assert after["version"] != before["version"]
        entry = {"time": now_utc(), "event": "device", "device": "gpu1", "doing": "", "last": "keep 0.97 it"}
        append_json_line(loop_log_path(), entry)
        assert state_of(ask)["phase"].splitlines()[1:] == ["gpu1: free; last: keep 0.97 it"]
        append_json_line(loop_log_path(), {"time": now_utc(), "event": "end"})
        assert state_of(ask)["phase"] == ""


def test_a_loop_that_was_killed_is_told_as_gone(house):
    ledgers = make_night(house, runs=5, mac_runs=0, points=10, claims=False)
    loop = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    begin = {"time": now_utc(), "event": "begin", "done": 0, "pid": loop.pid, "host": platform.node()}
    phase = {"time": now_utc(), "event": "phase", "phase": "training", "text": "training: edit 9"}
    append_json_line(loop_log_path(), begin)
    append_json_line(loop_log_path(), phase)
    report = LiveReport(ledgers)
    alive = report.state()
    loop.communicate()
    dead = report.state()
    assert alive["alive"] and alive["phase"].startswith("training: edit 9, for ")
    assert not dead["alive"] and dead["phase"].startswith("the loop is gone: it was killed")
    assert dead["phase"].endswith("training: edit 9") and dead["version"] != alive["version"]


def test_before_the_first_run_the_page_waits(house):
    with served([house / "results.tsv"]) as ask:
        status, _, body = ask()
        assert status == 200 and b"no scored experiment to report" in body
        Ledger(house / "results.tsv").append(row(val_bpb=1.5, description="the first one"))
        assert b"the first one" in ask()[2]


# --- Who may ask --------------------------------------------------------------------------------------------


def test_only_a_name_of_this_machine_is_answered(house):
    with served([house / "results.tsv"]) as ask:
        assert ask("/", Host="evil.example:8377")[0] == ask("/state", Host="192.168.1.5")[0] == 403
        assert ask("/", Host="localhost:8377")[0] == ask("/", Host="[::1]:8377")[0] == 200


@pytest.mark.parametrize(
    ("host", "is_here"),
    [("127.0.0.1", True), ("127.9.9.9:80", True), ("[::1]:80", True), ("localhost", True)]
    + [("0.0.0.0", False), ("localhost.evil.example", False), ("", False), ("[", False)],
)
def test_names_of_this_machine(host, is_here):
    assert is_this_machine(host) == is_here


def test_with_a_token_only_who_knows_it_is_answered(house):
    with served([house / "results.tsv"], token="s3cret") as ask:
        assert ask.url.endswith("/?token=s3cret")
        assert ask("/")[0] == ask("/?token=")[0] == ask("/?token=wrong")[0] == ask("/state")[0] == 403
        status, headers, _ = ask("/?token=s3cret")
        assert (status, headers["Location"]) == (303, "/")
        assert "HttpOnly" in headers["Set-Cookie"] and "SameSite=Strict" in headers["Set-Cookie"]
        cookie = headers["Set-Cookie"].split(";")[0]
        assert ask("/", Cookie=cookie, Host="my-gpu:8377")[0] == 200
        assert ask("/", Cookie=cookie + "x")[0] == ask("/", Cookie="\x7f=; ;;\xff")[0] == 403


def test_another_host_needs_a_token(house):
    report = LiveReport([house / "results.tsv"])
    with pytest.raises(UserError, match="set a --token") as raised:
        open_server("0.0.0.0", 0, "", report)
    assert raised.value.code == 2
    with pytest.raises(UserError, match="letters and digits"):
        open_server("0.0.0.0", 0, "a b", report)
    open_server("0.0.0.0", 0, "s3cret", report).server_close()


# --- The command --------------------------------------------------------------------------------------------


def test_a_busy_port_is_one_line(house, autoresearch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = autoresearch("watch", "--port", taken.getsockname()[1])
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "try another --port" in done.stderr


def test_ctrl_c_ends_it_with_130(house):
    command = [sys.executable, "-m", "launcher.entry", "watch", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and "Traceback" not in said
