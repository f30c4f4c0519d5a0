"""The agent's box around a real process: what it may touch, and what not."""

import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from launcher.box import missing_walls
from launcher.runs import home
from night import repo
from night.agent import TurnFiles, start_agent, wait_for_agent
from night.agent_box import agent_policy, installation, programs
from night.agents import Agent
from night.state import loop_folder
from night.workspace import make_workspace
from prepare import ROOT, cache_dir

pytestmark = pytest.mark.skipif(bool(missing_walls()), reason="this machine has no walls")

ATTEMPTS = """
import json, os, subprocess, sys, tempfile
from pathlib import Path

def attempt(what):
    try:
        what()
        return "done"
    except OSError as error:
        return type(error).__name__

def git():
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "x"], check=True)

def ours():
    subprocess.run(["autoresearch", "--help"], check=True, capture_output=True)

def connect():
    import socket
    socket.create_connection(("127.0.0.1", int(sys.argv[1]))).close()

here, project, person, rows, state = Path("."), *map(Path, sys.argv[2:])
print(json.dumps({
    "its folder": attempt(lambda: (here / "train_cuda.py").write_text("SCORE = 1.4")),
    "a commit there": attempt(git),
    "temporary files": attempt(lambda: tempfile.NamedTemporaryFile().close()),
    "the network": attempt(connect),
    "its state": attempt(lambda: (state / "x").write_text("x")),
    "reading the project": attempt(lambda: (project / "prepare.py").read_text()),
    "our command": attempt(ours),
    "writing the project": attempt(lambda: (project / "new.py").write_text("x")),
    "writing its git folder": attempt(lambda: (project / ".git" / "x").write_text("x")),
    "reading the person's files": attempt(lambda: (person / "secret").read_text()),
    "reading prepared rows": attempt(lambda: (rows / "val.bin").read_bytes()),
}))
"""
DENIED = (
    "writing the project",
    "writing its git folder",
    "reading the person's files",
    "reading prepared rows",
)


def test_an_agent_reaches_its_folder_and_its_model_and_nothing_of_the_person(repository, tmp_path_factory):
    from launcher.setting import resolve

    rows = resolve().data.path
    person, state = tmp_path_factory.mktemp("person"), tmp_path_factory.mktemp("state")
    (person / "secret").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = [str(server.getsockname()[1]), *map(str, (ROOT, person, rows, state))]
        agent = Agent("test", [sys.executable, "-c", ATTEMPTS, *arguments], state=(state,))
        files = TurnFiles(loop_folder(), "20260101-000000-abcd")
        workspace = make_workspace(repo.head(), "")
        child = start_agent(agent, "", files, workspace, boxed=True)
        assert wait_for_agent(child, time.monotonic() + 60.0, 60.0, files) == 0, files.log.read_text()
    came = json.loads(files.out.read_text())
    assert {name for name, outcome in came.items() if outcome != "done"} == set(DENIED), came
    assert {came[name] for name in DENIED} == {"PermissionError"}
    assert not (ROOT / "new.py").exists()


def test_the_rows_of_every_track_are_hidden_and_the_runs_are_not(repository):
    (cache_dir() / "track-0123").mkdir(parents=True, exist_ok=True)
    policy = agent_policy(Agent("test", ["/bin/true"]), make_workspace(repo.head(), ""))
    assert str(cache_dir() / "track-0123") in policy.hidden
    assert str(home()) in policy.read and policy.network


def test_what_a_program_needs_is_beside_it(tmp_path, monkeypatch):
    modules = tmp_path / "lib" / "node_modules"
    (modules / "agent" / "bin").mkdir(parents=True)
    (modules / "agent" / "bin" / "agent.js").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "agent").symlink_to("../lib/node_modules/agent/bin/agent.js")
    assert list(installation(modules / "agent" / "bin" / "agent.js")) == [modules]
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), "/somewhere/else"]))
    named = list(programs(str(tmp_path / "bin" / "agent")))
    assert str(tmp_path / "lib") in named and "/somewhere/else" in named and str(modules) in named
    assert str(tmp_path) not in named


def test_below_the_home_folder_keys_are_not_beside_the_programs(tmp_path, monkeypatch):
    """~/.local/share has keyrings, and what other agents keep; uv puts its tools there too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tool = tmp_path / ".local" / "share" / "uv" / "tools" / "aider"
    python = tmp_path / ".local" / "share" / "uv" / "python" / "cpython"
    for folder in (tool, python):
        (folder / "bin").mkdir(parents=True)
    (tool / "pyvenv.cfg").touch()
    (tool / "bin" / "aider").touch()
    (python / "bin" / "python3").touch()
    (tool / "bin" / "python").symlink_to(python / "bin" / "python3")
    own = tmp_path / ".local" / "bin"
    own.mkdir()
    (own / "aider").symlink_to(tool / "bin" / "aider")
    monkeypatch.setenv("PATH", os.pathsep.join([str(own), str(tmp_path), str(tmp_path.parent), "/usr/bin"]))
    named = {Path(name) for name in programs(str(own / "aider"))}
    below = {path for path in named if tmp_path in (path, *path.parents)}
    assert below == {own, tool, tool / "bin", python} and tmp_path.parent not in named
    assert Path("/usr/lib") in named
