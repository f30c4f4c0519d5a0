"""
How our commands differ from click's: groups in the help, exit codes, how much is said, one style of mistakes.
"""

import difflib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from launcher import console
from launcher.entry import leave
from launcher.exit_codes import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_READER_GONE,
    EXIT_USAGE,
    MEANINGS,
    in_a_line,
)
from launcher.ledger import single_line

# The groups of the help, in the order of use.
START = "Start"
RESEARCH = "Research"
READ = "Read"
KEEP_HOUSE = "Keep house"
AGENTS = "Agents and help"
SECTIONS = (START, RESEARCH, READ, KEEP_HOUSE, AGENTS)


def loudness_options() -> list[click.Option]:
    """Return -q and -v. They may stand before the command or after it."""
    quiet = click.Option(
        ["-q", "--quiet"],
        is_flag=True,
        expose_value=False,
        callback=choose_loudness("quiet"),
        help="Say nothing but warnings, errors and results.",
    )
    verbose = click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        callback=choose_loudness("verbose"),
        help="Say more: what the trainer prints, and where an error came from.",
    )
    return [quiet, verbose]


def choose_loudness(loudness: console.Loudness) -> Callable[[click.Context, click.Parameter, bool], None]:
    """Return what the flag of a loudness does."""

    def choose(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
        if wanted and not context.resilient_parsing:
            console.set_loudness(loudness)

    return choose


class Command(click.Command):
    """A command in a section of the help, with -q, -v and its exit codes."""

    def __init__(self, *arguments: Any, section: str = START, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.section = section
        self.params += loudness_options()

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit codes, where they say more than done or failed."""
        if self.name in MEANINGS:
            formatter.write_paragraph()
            formatter.write_text(f"Exit codes: {in_a_line(self.name)}.")
        super().format_epilog(context, formatter)


class Group(click.Group):
    """The commands by section. A mistake, and what the system refuses, is one line and an exit code."""

    command_class = Command

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.params += loudness_options()

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of the commands in the order of use."""
        return list(self.commands)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each section with its commands and their summaries."""
        width = max(map(len, self.commands))
        limit = formatter.width - width - 6
        for section in SECTIONS:
            rows = [
                (name.ljust(width), command.get_short_help_str(limit))
                for name, command in self.commands.items()
                if isinstance(command, Command) and command.section == section
            ]
            with formatter.section(section):
                formatter.write_dl(rows)

    def resolve_command(self, context: click.Context, arguments: list[str]) -> Any:
        """Find a command; of a name that is none, say which one is near."""
        near = difflib.get_close_matches(arguments[0], self.commands, 1)
        if near and arguments[0] not in self.commands:
            raise click.UsageError(f"No such command '{arguments[0]}'. Did you mean '{near[0]}'?", context)
        return super().resolve_command(context, arguments)

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        """Read the options that stand before the command: --help and --version print, and end there."""
        with reader_may_leave():
            return super().make_context(*arguments, **more)

    def main(self, *arguments: Any, **more: Any) -> Any:
        """Call a command and exit with its code."""
        console.set_loudness("usual")
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a path or a terminal may be no UTF-8
        try:
            with reader_may_leave():
                code = super().main(*arguments, **{**more, "standalone_mode": False})
        except click.Abort:
            click.echo("interrupted", err=True)
            code = EXIT_INTERRUPTED
        except Exception as error:
            code = complain(error)
        sys.exit(code)

    def invoke(self, context: click.Context) -> Any:
        """Call the command that the context names."""
        if not console.wants_colour():
            context.color = False
        try:
            with interruptible(), reader_may_leave():
                return super().invoke(context)
        except (KeyboardInterrupt, RuntimeError) as error:
            if not is_interruption(error):
                raise
            click.echo("interrupted", err=True)
            sys.exit(EXIT_INTERRUPTED)


def is_interruption(error: BaseException) -> bool:
    """Return whether an exception is one of a signal, or came of one.

    Python before 3.12 raises RuntimeError in place of what comes while a class is made, as in an import.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__
    return cause is not None


def complain(error: Exception) -> int:
    """Print a line about a mistake or about what the system refused. Returns the exit code.

    Raises:
        Exception: it is a fault of ours.
    """
    from prepare import UserError  # not at the top: it brings numpy, and the leaderboard is quick

    if isinstance(error, click.ClickException):
        message = error.format_message()
        context = getattr(error, "ctx", None)
        if isinstance(error, click.UsageError):
            message = f"{message} ({context.command_path if context else 'autoresearch'} --help)"
        code = error.exit_code if isinstance(error, click.UsageError) else EXIT_USAGE
    elif isinstance(error, UserError):
        message = str(error)
        code = error.code
    elif isinstance(error, OSError):  # a full or read-only disk, a file in the place of a folder
        message = console.describe_os_error(error)
        code = EXIT_FAILED
    else:
        raise error
    if console.is_verbose():
        traceback.print_exception(error)
    click.echo(f"autoresearch: {single_line(message)}", err=True)
    return code


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt: the command is under way, and ends in order."""
    at_once = signal.getsignal(signal.SIGINT) is leave
    if at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if at_once:
            signal.signal(signal.SIGINT, leave)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """End the process quietly when the reader of stdout goes away, as `| head` does."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # what Python would write at its end, and complain about
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_READER_GONE)
