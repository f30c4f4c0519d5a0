"""The options and types of values that several commands share. Names complete in a shell."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from launcher.ledger import single_line

Command = TypeVar("Command", bound=Callable[..., Any])


class Seconds(click.FloatRange):
    """A finite number of seconds."""

    name = "seconds"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        seconds = super().convert(value, parameter, context)
        if not math.isfinite(seconds):
            self.fail(f"{value} is not a number of seconds.", parameter, context)
        return seconds


class Line(click.ParamType):
    """Text on one line: a shell may hand over newlines, control characters, and bytes that are no UTF-8."""

    name = "text"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        return single_line(value)


class Name(click.ParamType):
    """A name of something, which a shell completes.

    kind: a function of launcher.completion that lists the names
    """

    name = "name"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the names that begin as what was typed."""
        from launcher import completion  # not at the top: only a shell needs it

        names = getattr(completion, self.kind)()
        return [
            CompletionItem(name, help=text) for name, text in names.items() if name.startswith(incomplete)
        ]


class Column(Name):
    """A column of the leaderboard, with a "-" before it or not."""

    def __init__(self) -> None:
        super().__init__("columns")

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if value:
            self.require(value.removeprefix("-"), parameter, context)
        return value

    def require(self, name: str, parameter: click.Parameter | None, context: click.Context | None) -> None:
        """Fail when there is no column of that name."""
        from launcher.board import RankedRun

        if name not in RankedRun._fields:
            known = ", ".join(RankedRun._fields)
            self.fail(f"there is no column {name!r}: the columns are {known}.", parameter, context)


class Columns(Column):
    """Columns of the leaderboard, separated by commas."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        names = tuple(name.strip() for name in value.split(","))
        for name in names:
            self.require(name, parameter, context)
        return names

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the last of the names, completed, behind those before it."""
        before, comma, last = incomplete.rpartition(",")
        found = super().shell_complete(context, parameter, last)
        return [CompletionItem(f"{before}{comma}{item.value}") for item in found]


RUN = Name("runs")
COLUMN = Column()
COLUMNS = Columns()


def run_argument(name: str = "run", **more: Any) -> Callable[[Command], Command]:
    """Return a decorator that adds the name of a run."""
    return click.argument(name, type=RUN, **more)


def platform_option(command: Command) -> Command:
    text = "Use this entry of platforms.yaml, whatever the machine is."
    kind = Name("platforms")
    return click.option("--platform", metavar="NAME", default="", type=kind, help=text)(command)


def track_option(command: Command) -> Command:
    text = "Learn this track instead of the platform's own."
    return click.option("--track", metavar="NAME", default="", type=Name("tracks"), help=text)(command)


def budget_option(command: Command) -> Command:
    text = "Seconds of training; other than 300 is practice, which has boards of its own and never ranks."
    return click.option("--budget", type=Seconds(min=1, max=86400), default=None, help=text)(command)


def seed_option(command: Command) -> Command:
    return click.option("--seed", type=click.IntRange(0, 2**31), default=1, show_default=True)(command)


def message_option(command: Command) -> Command:
    text = "What this experiment changes, in a line."
    return click.option("-m", "--message", "description", type=Line(), default=None, help=text)(command)


def busy_option(command: Command) -> Command:
    text = "Where other processes compute: go on (the run does not rank), wait for them, or refuse (exit 6)."
    kinds = click.Choice(["go-on", "wait", "refuse"])
    option = click.option("--busy", "when_busy", type=kinds, default="go-on", show_default=True, help=text)
    return option(command)


def setting_options(command: Command) -> Command:
    """Add the options that say on what an experiment is made."""
    return platform_option(track_option(budget_option(command)))


def experiment_options(command: Command) -> Command:
    """Add the options that say where experiments run and what they learn."""
    return setting_options(seed_option(busy_option(command)))


def hosts_option(command: Command) -> Command:
    text = "Use the devices of other machines too, over SSH: a file that names them (docs/fleet.md)."
    kind = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option("--hosts", metavar="FILE", type=kind, default=None, help=text)(command)


def open_option(command: Command) -> Command:
    text = "Talk to a scheduler without encryption: whoever reaches that network runs code as you."
    return click.option("--open", "is_open", is_flag=True, help=text)(command)


def ledgers_argument(command: Command) -> Command:
    kind = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.argument("ledgers", nargs=-1, type=kind)(command)


def filter_options(command: Command) -> Command:
    """Add the options that select boards."""
    track = click.option("--track", metavar="NAME", type=Name("tracks"), help="Only this track.")
    platform = click.option("--platform", metavar="NAME", type=Name("platforms"), help="Only this platform.")
    return track(platform(command))


def json_option(command: Command) -> Command:
    text = "Print one JSON object, for a program."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)
