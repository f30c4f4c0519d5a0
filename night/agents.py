"""
Coding agents by name: how each is called, and how what it prints is read.

The data are in agents.yaml. A command that is none of the names is called as it is given, and its answer is
what it prints on standard output.
"""

import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from night import repo
from prepare import UserError

ENTRIES = Path(__file__).with_name("agents.yaml")
BUILTIN = "builtin"  # names the search over the constants in the place of an agent
TRAINER = "{trainer}"  # in a command, it stands for the trainer's name


@dataclass(frozen=True)
class Agent:
    """A coding agent: its command and what is known of it."""

    name: str  # in rows and commits
    command: list[str]
    output: str = "text"  # a key of READERS
    version: str = ""  # that the command was run with; "" for a command of the person's own
    install: str = ""
    log_in: str = ""
    state: tuple[Path, ...] = ()  # what it writes beside its folder
    boxed: tuple[str, ...] = ()  # its arguments in a box, where they are others
    limits: str = ""

    @property
    def boxed_command(self) -> list[str]:
        return [self.command[0], *self.boxed] if self.boxed else self.command

    @property
    def is_known(self) -> bool:
        return self.version != ""

    @property
    def is_builtin(self) -> bool:
        return self.name == BUILTIN

    def for_trainer(self, trainer: str) -> "Agent":
        """Return the agent with a command that names this machine's trainer."""
        return replace(self, command=[part.replace(TRAINER, trainer) for part in self.command])


def load_agents() -> dict[str, Agent]:
    """Return the agents of agents.yaml by name."""
    import yaml

    found = {}
    for name, entry in yaml.safe_load(ENTRIES.read_text(encoding="utf-8")).items():
        entry["command"] = shlex.split(entry["command"])
        entry["state"] = tuple(Path(path).expanduser() for path in entry["state"])
        entry["boxed"] = tuple(shlex.split(entry.get("boxed", ""))[1:])
        found[name] = Agent(name=name, **entry)
    return found


def parse_agent(text: str) -> Agent:
    """Return the agent that a name or a command means.

    The agent starts in another folder: a script that lies here and in no commit is named by its whole path.

    Raises:
        UserError: there is no such program.
    """
    if text == BUILTIN:
        # -P: our modules, not those that lie in the agent's folder.
        return Agent(BUILTIN, [sys.executable, "-P", "-m", "night.builtin"])
    known = load_agents().get(text.strip())
    try:
        command = known.command if known else shlex.split(text)
    except ValueError as error:
        raise UserError(f"--agent: {error}: {text}", 2) from None
    if not command:
        raise UserError("--agent: the command is empty: name a program, such as 'claude -p'", 2)
    program = shutil.which(command[0])
    if not program:
        remedy = f"; install it: {known.install}" if known else ""
        raise UserError(f"--agent: there is no program {command[0]!r} here{remedy}", 2)
    whole = [os.path.abspath(program), *map(whole_path, command[1:])]
    return replace(known, command=whole) if known else Agent(Path(command[0]).name, whole)


def whole_path(argument: str) -> str:
    """Return the whole path for an argument that names a file here which no commit has."""
    with suppress(OSError, ValueError):
        if os.path.isfile(argument) and not repo.committed_blob(argument):
            return os.path.abspath(argument)
    return argument


# ---------------------------------------------------------------------------
# What it prints
# ---------------------------------------------------------------------------


class Said(NamedTuple):
    """What an agent printed, read."""

    text: str  # its answer
    tokens: int = 0  # of all its requests, 0 where it does not print them
    cost: float = 0.0  # in dollars, 0 where it does not print it


def read_output(agent: Agent, out: str, err: str) -> Said:
    """Return what an agent said. Output that is not as expected is taken as text."""
    try:
        said = READERS[agent.output](out, err)
        cost = said.cost if math.isfinite(said.cost) and said.cost > 0 else 0.0
        return Said(str(said.text), max(0, int(said.tokens)), cost)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError):
        return Said(out)


def read_codex(out: str, err: str) -> Said:
    used = re.findall(r"^tokens used\n([\d,]+)$", err, re.M)
    return Said(out, int(used[-1].replace(",", "")) if used else 0)


def read_claude(out: str, err: str) -> Said:
    data = json.loads(out)
    usage = data["usage"]
    kinds = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
    return Said(data["result"], sum(usage.get(kind, 0) for kind in kinds), data["total_cost_usd"])


def read_gemini(out: str, err: str) -> Said:
    data = json.loads(out)
    models = data["stats"]["models"].values()
    return Said(data["response"], sum(model["tokens"]["total"] for model in models))


def read_opencode(out: str, err: str) -> Said:
    parts = [event["part"] for event in json_lines(out) if "part" in event]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    steps = [part for part in parts if part["type"] == "step-finish"]
    return Said(text, sum(step["tokens"]["total"] for step in steps), sum(step["cost"] for step in steps))


def read_pi(out: str, err: str) -> Said:
    messages = [event["messages"] for event in json_lines(out) if event.get("type") == "agent_end"][-1]
    own = [message for message in messages if message["role"] == "assistant"]
    text = "\n".join(part["text"] for part in own[-1]["content"] if part["type"] == "text")
    tokens = sum(message["usage"]["totalTokens"] for message in own)
    return Said(text, tokens, sum(message["usage"]["cost"]["total"] for message in own))


def read_qwen(out: str, err: str) -> Said:
    result = [event for event in json.loads(out) if event["type"] == "result"][-1]
    return Said(result["result"], result["usage"]["total_tokens"])


def read_aider(out: str, err: str) -> Said:
    """Return aider's answer. It prints `Tokens: 2.1k sent, 25 received. Cost: $0.01 message, ...`."""
    tokens = 0.0
    for number, thousand in re.findall(r"([\d.]+)(k?) (?:sent|received)", out):
        tokens += float(number) * (1000 if thousand else 1)
    costs = re.findall(r"Cost: \$([\d.]+) message", out)
    return Said(out, round(tokens), sum(map(float, costs)))


def json_lines(text: str) -> Iterator[dict[str, Any]]:
    """Yield the lines that are JSON objects."""
    for line in text.splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value


READERS: dict[str, Callable[[str, str], Said]] = {
    "text": lambda out, err: Said(out),
    "aider": read_aider,
    "claude": read_claude,
    "codex": read_codex,
    "gemini": read_gemini,
    "opencode": read_opencode,
    "pi": read_pi,
    "qwen": read_qwen,
}
