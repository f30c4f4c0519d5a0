"""What `autoresearch doctor` looks at before a night: git, and the agents. See launcher/doctor.py."""

import shutil
from collections.abc import Iterator

from launcher.doctor import Check, make_check
from launcher.setting import resolve
from night import repo
from night.agents import load_agents, parse_agent
from night.loop import Loop
from night.panel import Panel
from night.plan import Night
from night.state import read_state, write_state
from night.stop import running_loop
from night.trial import hold_repository, repository_is_held
from prepare import UserError


def check_night(agent: str, platform: str, track: str) -> Iterator[Check]:
    """Look at git and at the agents. agent: that is asked for a trivial edit, "" for none."""
    yield make_check("git", lambda: check_git(platform))
    yield make_check("loop", check_loop)
    if agent:
        yield make_check("agent", lambda: ask_agent(agent, platform, track))
    else:
        yield check_agents()


def check_git(platform: str) -> Check:
    """Look whether trials can be committed, and what differs from the last commit."""
    repo.require_repository()
    trainer = resolve(platform).trainer.name
    where = repo.branch().removeprefix("refs/heads/") or "no branch (detached)"
    found = f"on {where}"
    others = repo.changed_besides(trainer)
    if others:
        remedy = "commit it or undo it: try and loop refuse, and the rows of run are marked"
        return Check("git", "warn", f"{found}; {repo.list_paths(others)} differ from the last commit", remedy)
    if not repo.branch():
        return Check("git", "warn", found, "git switch -c NAME: what is kept would be on no branch")
    if repo.is_edited(trainer):
        found += f"; {trainer} is edited: the next try or loop runs that first"
    return Check("git", "ok", found)


def check_loop() -> Check:
    """Look whether a loop works in this repository."""
    loop = running_loop()
    if loop is None:
        return Check("loop", "ok", "none runs in this repository")
    return Check("loop", "ok", f"process {loop.pid} runs one in this repository")


def check_agents() -> Check:
    """Look which of the agents that are known by name are installed."""
    found = [name for name, agent in load_agents().items() if shutil.which(agent.command[0])]
    if not found:
        return Check("agent", "ok", "none that is known by name is installed; builtin needs none")
    return Check("agent", "ok", f"installed: {', '.join(found)}; --agent NAME asks one for an edit")


def ask_agent(name: str, platform: str, track: str) -> Check:
    """Ask an agent for a trivial edit, as a night does before it begins. Raises UserError."""
    setting = resolve(platform, track)
    agent = parse_agent(name).for_trainer(setting.trainer.name)
    if repository_is_held():
        raise UserError("a try or a loop works in this repository: the agent is asked when that is over")
    with hold_repository():
        left = read_state()  # by an earlier loop, for the next one
        try:
            Loop(Night(agent, setting), Panel(None, None)).check_agent()
        finally:
            write_state(left)
    return Check("agent", "ok", f"{agent.name} is installed and edits")
