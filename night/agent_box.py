"""
The agent's box (`loop --box`): what an agent may touch beside its own folder.

It reads the system, the programs on PATH, what its own program needs, git's configuration, this project and
the runs; not the prepared rows, and nothing else of the home folder. It writes its folder, its temporary
folder and what its entry in agents.yaml names. The network is open: it must reach its model.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from launcher.box import DEVICES, SHARED_MEMORY, SYSTEM, Policy
from launcher.runs import home
from launcher.walls import packages
from night.agents import Agent
from night.workspace import Workspace
from prepare import ROOT, cache_dir, config_path

TERMINAL = ("/dev/tty", "/dev/ptmx", "/dev/pts")
PERSONAL = ("~/.gitconfig", "~/.config/git")  # what git reads of the person's: the name of who commits
PROGRAM_FOLDERS = ("bin", "lib", "libexec", "share")  # beside each other, below a prefix such as /usr/local


def agent_policy(agent: Agent, workspace: Workspace) -> Policy:
    """Return what an agent may touch. What its entry names is made, where it is not there, as a folder."""
    for path in agent.state:
        if not path.exists() and not path.suffix:
            path.mkdir(parents=True)
    read = [*SYSTEM, *packages(), str(ROOT), str(home()), *programs(agent.command[0])]
    read += [os.path.expanduser(path) for path in PERSONAL]
    own = (workspace.top, workspace.temporary, *agent.state)
    write = [*DEVICES, *TERMINAL, SHARED_MEMORY, *map(str, own)]
    hidden = [path for path in cache_dir().glob("*-*") if path.is_dir()]
    return Policy(
        read=tuple(read),
        write=tuple(write),
        hidden=tuple(map(str, hidden)),
        files=(str(config_path()),),
        network=True,
    )


def programs(command: str) -> Iterator[str]:
    """Yield where the programs lie that an agent may call, with what they read.

    Below the home folder that is the folder of the programs alone: beside it may lie keys and the data of
    other programs. What the agent's own program needs there is found by itself.
    """
    yield from (sys.prefix, sys.base_prefix)
    for name in os.environ.get("PATH", os.defpath).split(os.pathsep):
        folder = Path(name).absolute()
        if not name or holds_home(folder):
            continue
        if folder.name == "bin" and Path.home() not in folder.parents:
            yield from (str(folder.with_name(part)) for part in PROGRAM_FOLDERS)
        else:
            yield str(folder)
    yield from map(str, installation(Path(os.path.realpath(command))))


def installation(program: Path) -> Iterator[Path]:
    """Yield the folders that a program was installed in.

    Of one from npm these are all packages beside it; of one in a virtual environment the environment, and the
    Python that it was made with.
    """
    for parent in program.parents:
        if parent.name == "node_modules":
            yield parent
            return
    yield program.parent
    environment = program.parent.parent
    if (environment / "pyvenv.cfg").is_file():
        python = Path(os.path.realpath(environment / "bin" / "python"))
        yield from (folder for folder in (environment, python.parent.parent) if not holds_home(folder))


def holds_home(folder: Path) -> bool:
    """Return whether a folder is the home folder or has it below."""
    return folder == Path.home() or folder in Path.home().parents
