"""Topics of the help that belong to no command: `autoresearch help exit-codes`."""

from collections.abc import Callable
from typing import NamedTuple

from launcher.exit_codes import COMMON, MEANINGS, meanings


class Topic(NamedTuple):
    """A page of the help."""

    summary: str
    write: Callable[[], str]


def write_exit_codes() -> str:
    """Return the exit codes of all commands, and of those that say more, each code."""
    lines = ["Every command:"]
    lines += [f"  {code:3}  {text}" for code, text in sorted(COMMON.items())]
    for command in MEANINGS:
        own = {code: text for code, text in meanings(command).items() if COMMON.get(code) != text}
        lines += ["", f"autoresearch {command}:"]
        lines += [f"  {code:3}  {text}" for code, text in own.items()]
    return "\n".join(lines)


def write_environment() -> str:
    """Return the variables that a person may set."""
    return """\
AUTORESEARCH_HOME    where results.tsv, runs/ and report/ lie; the repository if left out
AUTORESEARCH_CACHE   prepared data, compiled code and locks; ~/.cache/autoresearch if left out
AUTORESEARCH_CONFIG  another platforms.yaml
CUDA_VISIBLE_DEVICES the first of them is the GPU that a run computes on
HF_HOME, HF_TOKEN    where downloads of the hub lie, and who asks it
NO_COLOR             no colours, on a terminal too
COLUMNS              the width of a table on a terminal"""


def write_completion() -> str:
    """Return how a shell learns to complete our commands."""
    return """\
Commands, options, runs, tracks, platforms and agents complete where the shell finds `autoresearch` itself:
in an activated environment (source .venv/bin/activate), not behind `uv run`. Type the line in an open shell,
or write it into its startup file (~/.bashrc, ~/.zshrc, ~/.config/fish/config.fish):

  bash 4.4 or newer   eval "$(_AUTORESEARCH_COMPLETE=bash_source autoresearch)"
  zsh                 eval "$(_AUTORESEARCH_COMPLETE=zsh_source autoresearch)"
  fish                _AUTORESEARCH_COMPLETE=fish_source autoresearch | source"""


def write_names() -> str:
    """Return how runs, tracks and platforms are named."""
    return """\
A run is named by its id (20261126-200422-a558), by a beginning of it that no other run has, or by a word:

  last      the newest run
  best      the lowest val_bpb of the board on which the newest ranked run stands
  baseline  the first run of that board

Tracks and platforms are the entries of platforms.yaml; `autoresearch platforms` lists the latter."""


TOPICS = {
    "exit-codes": Topic("what the exit code of each command says", write_exit_codes),
    "names": Topic("how runs, tracks and platforms are named", write_names),
    "environment": Topic("the variables that are read", write_environment),
    "completion": Topic("how a shell completes commands and names", write_completion),
}
