"""Coding agents by name: their data, what they print, and the real ones, whose model is a script of ours."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from agents.model_server import ModelServer
from test_loop import PAUSE, leftover_refs, recorded, rows

from launcher.box import missing_walls
from launcher.setting import resolve
from night import failures, loop, repo
from night.agents import READERS, Agent, Said, load_agents, parse_agent, read_output
from night.loop import run_night
from night.plan import Night
from night.workspace import workspace_path
from prepare import ROOT, UserError

PACKAGES = {
    "claude": "@anthropic-ai/claude-code",
    "codex": "@openai/codex",
    "gemini": "@google/gemini-cli",
    "opencode": "opencode-ai",
    "pi": "@mariozechner/pi-coding-agent",
    "qwen": "@qwen-code/qwen-code",
}
# Options that name the scripted model, where the environment does not.
MODEL = {"pi": ["--offline", "--provider", "local", "--model", "scripted"]}
MODEL["qwen"] = ["--auth-type", "openai", "--model", "scripted"]
MODEL["aider"] = ["--model", "openai/scripted", "--analytics-disable", "--no-show-model-warnings"]
pytestmark = pytest.mark.xdist_group("agents")  # one worker installs the real ones
boxed = pytest.mark.skipif(bool(missing_walls()), reason="this machine has no walls")
FOUR = ("codex", "gemini", "opencode", "pi")
CHECK_AGENT = loop.Loop.check_agent  # before a fixture replaces it


# --- The data -----------------------------------------------------------------------------------------------


def test_every_agent_is_told_of_in_full():
    agents = load_agents()
    assert set(PACKAGES) < set(agents) and "aider" in agents
    for agent in agents.values():
        assert agent.command and agent.output in READERS and agent.install and agent.log_in and agent.limits
        assert agent.state and all(path.is_absolute() for path in agent.state)
        assert agent.version == "untested" or agent.version[0].isdigit()


def test_the_page_on_agents_says_what_the_data_say():
    page = (ROOT / "docs" / "agents.md").read_text()
    for agent in load_agents().values():
        line = f"| `{agent.name}` | {agent.version} | `{agent.install}` | {agent.log_in} | {agent.limits} |"
        assert line in page


def test_an_agent_is_a_name_or_a_command(house, monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    for name in ("codex", "mine"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    known = parse_agent("codex")
    assert known.is_known and known.command == [str(folder / "codex"), *load_agents()["codex"].command[1:]]
    own = parse_agent("mine --edit '{prompt} now'")
    assert own == Agent("mine", [str(folder / "mine"), "--edit", "{prompt} now"]) and not own.is_known


def test_what_lies_here_and_in_no_commit_is_named_by_its_whole_path(repository, monkeypatch):
    monkeypatch.chdir(repository)
    (repository / "my_agent.py").write_text("")
    command = parse_agent("python my_agent.py train_cuda.py --x").command
    assert command[1:] == [str(repository / "my_agent.py"), "train_cuda.py", "--x"]


@pytest.mark.parametrize(
    "command, says",
    [
        ("no-such-agent -p", "there is no program 'no-such-agent'"),
        ("sh -c 'x", "No closing quotation"),
        ("", "the command is empty"),
        ("opencode", "no program 'opencode' here; install it: npm install -g opencode-ai"),
    ],
)
def test_an_agent_that_does_not_exist_is_a_mistake(house, monkeypatch, command, says):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(UserError, match=says) as caught:
        parse_agent(command)
    assert caught.value.code == 2


def test_a_command_may_name_the_trainer():
    assert load_agents()["aider"].for_trainer("train_mlx.py").command[-1] == "train_mlx.py"


# --- What they print ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "out", ["", "experiment: wider\n", "{}", "[]", "null", "[1, 2]", '{"result": 3}', "[" * 9999]
)
def test_output_that_is_not_as_expected_is_text(name, out):
    said = read_output(Agent("x", [], name), out, "")
    assert isinstance(said.text, str) and said.tokens == 0 and said.cost == 0


def test_tokens_and_cost_are_read():
    aider = "I made it wider.\nTokens: 2.1k sent, 25 received. Cost: $0.01 message, $0.02 session.\n"
    assert read_output(Agent("aider", [], "aider"), aider, "") == Said(aider, 2125, 0.01)
    claude = {"result": "done", "total_cost_usd": 0.5, "usage": {"input_tokens": 3, "output_tokens": 4}}
    assert read_output(Agent("claude", [], "claude"), json.dumps(claude), "") == Said("done", 7, 0.5)
    claude["total_cost_usd"] = float("nan")
    assert read_output(Agent("claude", [], "claude"), json.dumps(claude), "").cost == 0


def test_a_null_in_place_of_a_number_ends_no_night():
    claude = {"result": "done", "total_cost_usd": None, "usage": {"input_tokens": 3}}
    qwen = [{"type": "result", "result": "done", "usage": {"total_tokens": None}}]
    for name, data in (("claude", claude), ("qwen", qwen)):
        out = json.dumps(data)
        assert read_output(Agent("x", [], name), out, "") == Said(out)


# --- The real ones ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def installed():
    """The folder of the agents' programs, each in the version that agents.yaml names. Outside of the tree."""
    if not shutil.which("npm"):
        pytest.skip("npm is not here: real agents are not run")
    agents = load_agents()
    wanted = [f"{package}@{agents[name].version}" for name, package in PACKAGES.items()]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "autoresearch-tests" / "agents"
    known = folder / "installed.json"
    if not known.exists() or json.loads(known.read_text()) != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"npm cannot install the agents here: {done.stderr.strip()[-200:]}")
        known.write_text(json.dumps(wanted))
    return folder / "node_modules" / ".bin"


@pytest.fixture
def night(repository, installed, monkeypatch, tmp_path_factory):
    """night(name, mode, experiments) -> (exit code, server): a night of a real agent in a home of its own."""
    home = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.endswith(("_API_KEY", "_BASE_URL", "_TOKEN", "_proxy", "_PROXY")) or name.startswith(
            "CLAUDE"
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", str(installed), prepend=os.pathsep)
    monkeypatch.setattr("launcher.belief.SURPRISING", 1e9)
    monkeypatch.setattr(failures, "MOST", 2)
    monkeypatch.setattr(loop.Loop, "wait", lambda self, seconds: None)
    monkeypatch.setattr(loop.Loop, "check_agent", lambda self: None)

    def begin(name, mode="edit", experiments=2, seconds=60.0, **more):
        folder = workspace_path() / "inner"
        with ModelServer(folder, mode) as server:
            configure(home, server.url, monkeypatch)
            known = parse_agent(name).for_trainer("train_cuda.py")
            agent = replace_command(known, [*known.command[:-1], *MODEL.get(name, []), known.command[-1]])
            setting = resolve()
            code = run_night(
                Night(agent, setting, experiments=experiments, pause=PAUSE, agent_seconds=seconds)
            )
            return code, server

    return begin


def replace_command(agent, command):
    return replace(agent, command=command, version="")


def configure(home, url, monkeypatch):
    """Send every agent to the scripted model: dummy keys, no telemetry, no updates."""
    for name, value in {
        "ANTHROPIC_API_KEY": "dummy",
        "ANTHROPIC_BASE_URL": url,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_TELEMETRY": "1",
        "GEMINI_API_KEY": "dummy",
        "GOOGLE_GEMINI_BASE_URL": url,
        "NO_COLOR": "1",
        "OPENAI_API_KEY": "dummy",
        "OPENAI_BASE_URL": f"{url}/v1",
    }.items():
        monkeypatch.setenv(name, value)
    codex = f"""
model = "scripted"
model_provider = "local"
[model_providers.local]
name = "local"
base_url = "{url}/v1"
env_key = "OPENAI_API_KEY"
wire_api = "responses"
stream_max_retries = 1
request_max_retries = 1
"""
    model = {"name": "scripted", "tool_call": True, "limit": {"context": 100000, "output": 4096}}
    local = {"npm": "@ai-sdk/openai-compatible", "name": "local", "models": {"scripted": model}}
    local["options"] = {"baseURL": f"{url}/v1", "apiKey": "dummy"}
    opencode = {
        "autoupdate": False,
        "share": "disabled",
        "model": "local/scripted",
        "small_model": "local/scripted",
        "provider": {"local": local},
        "permission": {"edit": "allow", "bash": "allow"},
    }
    cost = {"input": 1, "output": 1, "cacheRead": 0, "cacheWrite": 0}
    scripted = {"id": "scripted", "name": "scripted", "reasoning": False, "input": ["text"], "cost": cost}
    scripted |= {"contextWindow": 100000, "maxTokens": 4096}
    provider = {"baseUrl": f"{url}/v1", "api": "openai-completions", "apiKey": "dummy", "models": [scripted]}
    gemini = {
        "security": {"auth": {"selectedType": "gemini-api-key"}},
        "general": {"enableAutoUpdate": False},
        "privacy": {"usageStatisticsEnabled": False},
        "telemetry": {"enabled": False},
    }
    for name, content in {
        ".codex/config.toml": codex,
        ".config/opencode/opencode.json": json.dumps(opencode),
        ".pi/agent/models.json": json.dumps({"providers": {"local": provider}}),
        ".gemini/settings.json": json.dumps(gemini),
    }.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(content)


def has_aider():
    """It is no package of npm, and too large to be installed for one test."""
    return pytest.mark.skipif(not shutil.which("aider"), reason="aider is not on PATH")


def is_clean():
    return repo.git_checked("status", "--porcelain") == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PACKAGES, pytest.param("aider", marks=has_aider())])
def test_a_real_agent_makes_an_experiment(night, repository, name, capsys):
    code, server = night(name)
    assert code == 0 and rows()[-1].val_bpb == 1.4 and rows()[-1].description == "SCORE is now 1.4"
    assert rows()[-1].agent == name and is_clean()
    said = capsys.readouterr().out
    [turn] = recorded("turn")
    assert turn["tokens"] >= 1020 and f"agent_tokens: {turn['tokens']}\n" in said
    if name in ("claude", "pi"):
        assert turn["cost"] > 0
    assert any("The loop runs the experiments, a turn each" in body for _, body in server.asked)


@pytest.mark.slow
@boxed
@pytest.mark.parametrize("name", [*PACKAGES, pytest.param("aider", marks=has_aider())])
def test_a_real_agent_works_in_a_box(night, repository, name):
    code, _ = night(name, boxed=True)
    assert code == 0 and rows()[-1].val_bpb == 1.4


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_without_its_line_an_edit_is_described_by_what_the_agent_said(night, repository, name):
    assert night(name, "mute")[0] == 0
    assert rows()[-1].description == "Done." and rows()[-1].val_bpb == 1.4


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_what_a_real_agent_edits_elsewhere_changes_nothing(night, repository, name):
    assert night(name, "elsewhere")[0] == 0
    assert rows()[-1].val_bpb == 1.4 and is_clean()
    assert (repository / "prepare.py").read_text() == "RULES = 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_a_broken_edit_of_a_real_agent_comes_back_to_it(night, repository, name):
    code, server = night(name, "broken")
    assert code == 1 and [entry["kind"] for entry in recorded("failed")] == ["edit"] * 2
    assert len(rows()) == 1 and leftover_refs() and is_clean()
    assert any("does not compile: line 1" in body for _, body in server.asked)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["busy", "cut", "hang"])
@pytest.mark.parametrize("name", FOUR)
def test_a_model_that_does_not_answer_fails_the_turn(night, repository, monkeypatch, name, mode):
    """An agent gives up by itself, or when its time is up."""
    monkeypatch.setattr(failures, "MOST", 1)
    code, _ = night(name, mode, seconds=4.0)
    assert code == 1 and [entry["kind"] for entry in recorded("failed")] == ["agent"]
    assert len(rows()) == 1 and is_clean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["claude", "codex", "gemini", "qwen"])
def test_our_page_for_agents_reaches_them(night, repository, name):
    """AGENTS.md, and for those that read another name a line that points there."""
    for page in ("AGENTS.md", "CLAUDE.md", "GEMINI.md"):
        shutil.copy(ROOT / page, repository / page)
    repo.git_checked("add", "AGENTS.md", "CLAUDE.md", "GEMINI.md")
    repo.git_checked("-c", "user.name=me", "-c", "user.email=me@here", "commit", "-qm", "pages")
    _, server = night(name)
    sentence = "This repository is used in two roles"
    assert any(sentence in body for _, body in server.asked)


@pytest.mark.slow
def test_before_a_night_a_known_agent_is_asked_whether_it_is_ready(night, repository, monkeypatch):
    monkeypatch.setattr("test_agents.replace_command", lambda agent, command: agent)
    monkeypatch.setattr(loop.Loop, "check_agent", CHECK_AGENT)
    with pytest.raises(UserError, match="--agent codex is not ready: the agent ended with"):
        night("codex", "busy")
    assert not rows()
    code, server = night("codex", "edit")
    assert code == 0 and "This is a check before a night" in server.asked[0][1]
    assert [row.val_bpb for row in rows()] == [1.5, 1.4]
