"""The `autoresearch` command. Every command imports what it needs when it is called: --help is instant."""

import io
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from launcher.entry import EXIT_INTERRUPTED, leave
from launcher.ledger import single_line

if TYPE_CHECKING:
    from launcher.device import WhenBusy
    from launcher.setting import Setting

RUN_EXIT_CODES = """\b
    Exit codes: 0 keep, 3 discard, 1 crash, 4 timeout, 5 invalid, 6 no verdict (something else
    used the device, or a laptop without power), 2 usage, 130 interrupted.
    An error that the message names: 1."""

FOR_AGENTS = ("show", "restore", "leaderboard", "platforms", "program")  # what an agent of the loop may call

Command = TypeVar("Command", bound=Callable[..., Any])


class Group(click.Group):
    """Turns a user's mistake, and what the system refuses, into one line and an exit code."""

    def main(self, *arguments: Any, **more: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a path or a terminal may be no UTF-8
        try:
            return super().main(*arguments, **more)
        except Exception as error:
            # Not at the top: they bring numpy, and the leaderboard is quick.
            from launcher.console import describe_os_error
            from prepare import UserError

            if isinstance(error, UserError):
                message, code = str(error), error.code
            elif isinstance(error, OSError):  # a full or read-only disk, a file in the place of a folder
                message, code = describe_os_error(error), 1
            else:
                raise
            click.echo(f"autoresearch: {single_line(message)}", err=True)
            sys.exit(code)

    def invoke(self, context: click.Context) -> Any:
        try:
            with interruptible():
                return super().invoke(context)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            # The reader went away (`| head`). Python would complain once more when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)


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


class Seconds(click.FloatRange):
    """A finite number of seconds."""

    name = "seconds"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        seconds = super().convert(value, parameter, context)
        if not math.isfinite(seconds):
            self.fail(f"{value} is not a number of seconds.", parameter, context)
        return seconds


def print_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    """Print what decides whether results compare, and exit."""
    if not wanted or context.resilient_parsing:
        return
    import importlib.metadata

    from launcher.harness import harness_hash
    from launcher.runs import package_versions
    from prepare import RULES

    installed = package_versions()
    frameworks = [f"{name} {installed[name]}" for name in ("torch", "mlx") if name in installed]
    version = importlib.metadata.version("autoresearch")
    click.echo(f"autoresearch {version}, rules {RULES}, harness {harness_hash()}, {', '.join(frameworks)}")
    context.exit()


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Print version, rules, harness and framework.",
)
@click.pass_context
def main(context: click.Context) -> None:
    """An AI agent does language-model research overnight, on whatever accelerator you own."""
    if os.environ.get("AUTORESEARCH_LOOP") and context.invoked_subcommand not in FOR_AGENTS:
        from prepare import UserError

        raise UserError(
            f"an agent of the loop may call {', '.join(FOR_AGENTS)}; the loop does the rest: "
            "edit the trainer, say what you did, and end"
        )


def platform_option(command: Command) -> Command:
    text = "Use this entry of platforms.yaml, whatever the machine is."
    return click.option("--platform", metavar="NAME", default="", help=text)(command)


def track_option(command: Command) -> Command:
    text = "Learn this track instead of the platform's own."
    return click.option("--track", metavar="NAME", default="", help=text)(command)


def budget_option(command: Command) -> Command:
    text = "Seconds of training; other than 300 is marked and never ranks."
    return click.option("--budget", type=Seconds(min=1, max=86400), default=None, help=text)(command)


def seed_option(command: Command) -> Command:
    return click.option("--seed", type=click.IntRange(0, 2**31), default=1, show_default=True)(command)


class Line(click.ParamType):
    """Text on one line: a shell may hand over newlines, control characters, and bytes that are no UTF-8."""

    name = "text"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        return single_line(value)


def message_option(command: Command) -> Command:
    text = "What this experiment changes, in a line."
    return click.option("-m", "--message", "description", type=Line(), default="", help=text)(command)


def busy_option(command: Command) -> Command:
    text = "Where other processes compute: go on (the run does not rank), wait for them, or refuse (exit 6)."
    kinds = click.Choice(["go-on", "wait", "refuse"])
    return click.option("--busy", "when_busy", type=kinds, default="go-on", show_default=True, help=text)(
        command
    )


def experiment_options(command: Command) -> Command:
    """Add the options that say where experiments run and what they learn."""
    return platform_option(track_option(budget_option(seed_option(busy_option(command)))))


def ledgers_argument(command: Command) -> Command:
    kind = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.argument("ledgers", nargs=-1, type=kind)(command)


def filter_options(command: Command) -> Command:
    """Add the options that select boards."""
    track = click.option("--track", metavar="NAME", help="Only this track.")
    platform = click.option("--platform", metavar="NAME", help="Only this platform.")
    return track(platform(command))


def setting_of(platform: str, track: str = "", budget: float | None = None) -> "Setting":
    """Return the setting that a command's options mean."""
    from launcher.setting import resolve
    from prepare import TIME_BUDGET

    return resolve(platform, track, budget or TIME_BUDGET)


@main.command(epilog=RUN_EXIT_CODES)
@message_option
@experiment_options
@click.option(
    "--trainer", type=click.Path(path_type=Path), help="Run this file instead of the platform's trainer."
)
@click.option("--keep-weights", is_flag=True, help="Keep the model even if it is not the best.")
def run(
    description: str,
    platform: str,
    track: str,
    budget: float | None,
    seed: int,
    when_busy: "WhenBusy",
    trainer: Path | None,
    keep_weights: bool,
) -> None:
    """Run one experiment: five minutes of training, then the score.

    \b
    autoresearch run -m "warmdown over 0.7 of the budget"
    """
    from launcher.run import Request, exit_code, print_result, run_experiment

    setting = setting_of(platform, track, budget)
    row = run_experiment(Request(setting, description, seed, trainer, keep_weights, when_busy=when_busy))
    print_result(row)
    sys.exit(exit_code(row))


@main.command("try", epilog=RUN_EXIT_CODES)
@message_option
@experiment_options
def try_(
    description: str,
    platform: str,
    track: str,
    budget: float | None,
    seed: int,
    when_busy: "WhenBusy",
) -> None:
    """Commit the trainer's edit, run it, and keep the commit or revert it.

    What is reverted stays reachable as refs/autoresearch/<run>.

    \b
    autoresearch try -m "warmdown over 0.7 of the budget"
    """
    from launcher.run import Request
    from night.trial import try_edit

    setting = setting_of(platform, track, budget)
    sys.exit(try_edit(Request(setting, description, seed, when_busy=when_busy)))


@main.command()
@click.option(
    "--agent",
    default="builtin",
    show_default=True,
    metavar="NAME",
    help="claude, codex, gemini, opencode, pi, qwen, aider, or the command of another one, which gets the "
    "prompt on standard input or in place of {prompt}. builtin needs no language model: it searches the "
    "trainer's constants.",
)
@click.option(
    "--experiments",
    type=click.IntRange(min=1),
    help="End after this many; without a limit, Ctrl-C ends the loop.",
)
@click.option(
    "--until",
    metavar="HH:MM",
    help="Begin no experiment that would not end by then, and leave time to confirm the best.",
)
@experiment_options
@click.option(
    "--agent-seconds",
    type=Seconds(min=1, max=86400),
    default=900,
    show_default=True,
    help="Time that the agent has for a turn.",
)
@click.option(
    "--pause",
    type=Seconds(min=0, max=86400),
    default=30,
    show_default=True,
    help="Seconds to wait after a failed turn; doubles with every further one.",
)
@click.option(
    "--ahead",
    is_flag=True,
    help="The agent thinks of the next edit while an experiment runs. On a CPU it would disturb it.",
)
@click.option(
    "--box",
    "boxed",
    is_flag=True,
    help="The agent reads and writes nothing of yours but what it needs (docs/agents.md).",
)
@click.option("--no-confirm", is_flag=True, help="Leave no time at the end of --until for the claim.")
def loop(
    agent: str,
    experiments: int | None,
    until: str | None,
    platform: str,
    track: str,
    budget: float | None,
    seed: int,
    when_busy: "WhenBusy",
    agent_seconds: float,
    pause: float,
    ahead: bool,
    boxed: bool,
    no_confirm: bool,
) -> None:
    """Leave it running: the agent edits the trainer, every edit is tried, what is better is kept.

    \b
    autoresearch loop --experiments 20
    autoresearch loop --agent claude --until 07:30

    \b
    Exit codes: 0 at its end, 1 when turn after turn led to no experiment, 2 usage, 6 with --busy refuse
    where something else uses the device, 130 interrupted.
    """
    from night.agents import parse_agent
    from night.loop import run_night
    from night.plan import Night, parse_until

    setting = setting_of(platform, track, budget)
    night = Night(
        agent=parse_agent(agent).for_trainer(setting.trainer.name),
        setting=setting,
        seed=seed,
        experiments=experiments,
        until=parse_until(until) if until is not None else None,
        agent_seconds=agent_seconds,
        pause=pause,
        confirms=not no_confirm,
        when_busy=when_busy,
        boxed=boxed,
        ahead=ahead,
    )
    sys.exit(run_night(night))


@main.command()
@click.option(
    "--track", metavar="NAME", default="", help="Prepare this track; the platform's own if left out."
)
@platform_option
@click.option("--force", is_flag=True, help="Prepare again although it is prepared.")
def prepare(track: str, platform: str, force: bool) -> None:
    """Prepare a track: corpus, tokenizer, packed rows.

    \b
    autoresearch prepare --track pysource
    """
    import prepare as corpus
    from backends.platforms import choose_platform

    name = track or choose_platform(platform)[0].track
    click.echo(corpus.prepare_track(corpus.load_track(name), force=force).path)


@main.command()
@platform_option
@click.option("--json", "as_json", is_flag=True, help="Facts and match as JSON.")
def platforms(platform: str, as_json: bool) -> None:
    """Show what this machine is, which platform that makes it, and why.

    \b
    autoresearch platforms
    """
    import json

    from backends.platforms import choose_platform, load_platforms, machine_facts

    facts = machine_facts().known()
    chosen, why = choose_platform(platform)
    summary = {"platform": chosen.name, "why": why, "trainer": chosen.trainer, "track": chosen.track}
    if as_json:
        click.echo(json.dumps({"facts": facts, **summary}))
        return
    for key, value in {**facts, **summary}.items():
        click.echo(f"{key}: {value}")
    click.echo()
    for name, entry in load_platforms().items():
        mark = "*" if name == chosen.name else " "
        hardware = f"{entry.framework} {entry.device_kind}"
        start = entry.start
        size = f"{start.n_layer} layers, width {start.n_embd}, {start.total_batch_size:,} tokens a step"
        click.echo(f"{mark} {name:14} {hardware:10} {entry.track:12} {size}")


@main.command()
@platform_option
@track_option
@budget_option
def program(platform: str, track: str, budget: float | None) -> None:
    """Print what to know before an edit is tried by hand: instructions, ideas, and what the runs say.

    \b
    autoresearch program | claude -p
    """
    from night.program import write_program

    click.echo(write_program(setting_of(platform, track, budget)), nl=False)


@main.command()
@ledgers_argument
@filter_options
@click.option("--json", "kind", flag_value="json", help="Everything, as JSON.")
@click.option("--tsv", "kind", flag_value="tsv", help="The ranked rows, as TSV.")
def leaderboard(ledgers: tuple[Path, ...], track: str | None, platform: str | None, kind: str | None) -> None:
    """Rank the experiments of each device, and compare devices. Ledgers of other machines are merged in.

    \b
    autoresearch leaderboard results.tsv /mnt/mac/results.tsv
    """
    from launcher.board import print_leaderboard

    # launcher.runs knows this place too, but importing it takes as long as the whole leaderboard.
    home = Path(os.environ.get("AUTORESEARCH_HOME") or Path(__file__).resolve().parent.parent)
    runs = None if ledgers else home / "runs"
    print_leaderboard(ledgers or (home / "results.tsv",), track, platform, kind or "text", runs=runs)


@main.command()
@click.argument("run")
def show(run: str) -> None:
    """Show a run: its row, its loss curve, its trainer against the best before it.

    \b
    autoresearch show best
    """
    from launcher.show import show_run

    show_run(run)


@main.command()
@click.argument("run")
@click.option("--force", is_flag=True, help="Overwrite changes that no run and no commit holds.")
def restore(run: str, force: bool) -> None:
    """Put a run's trainer back in its place.

    \b
    autoresearch restore best
    """
    from launcher.show import restore_trainer

    restore_trainer(run, force)


@main.command()
@ledgers_argument
@filter_options
@click.option(
    "--run",
    "runs",
    multiple=True,
    metavar="ID",
    help="Draw this run's loss curve; repeat for several. The best ones if left out.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to; report/ if left out.",
)
def report(
    ledgers: tuple[Path, ...],
    track: str | None,
    platform: str | None,
    runs: tuple[str, ...],
    output: Path | None,
) -> None:
    """Write the morning report: report.html, a page that needs no network, and report.png, a card to share.

    \b
    autoresearch report -o /tmp/report
    """
    from launcher.report import write_report
    from launcher.runs import home

    paths = ledgers or (home() / "results.tsv",)
    for path in write_report(paths, output or home() / "report", track, platform, runs):
        click.echo(path)


@main.command()
@ledgers_argument
@filter_options
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8377, show_default=True, help="0: any that is free."
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Another than this machine's needs a --token."
)
@click.option("--token", default="", metavar="TEXT", help="Letters and digits that a reader must know.")
def watch(
    ledgers: tuple[Path, ...], track: str | None, platform: str | None, port: int, host: str, token: str
) -> None:
    """Serve the report on this machine, in a page that updates itself while a loop runs. Ctrl-C ends it.

    \b
    autoresearch watch --port 8377
    """
    from launcher.console import say
    from launcher.report.watch import LiveReport, open_server
    from launcher.runs import home

    report = LiveReport(ledgers or (home() / "results.tsv",), track, platform)
    with open_server(host, port, token, report) as server:
        click.echo(server.url)
        say("Ctrl-C ends it")
        server.serve_forever()


@main.command()
@click.argument("run")
def verify(run: str) -> None:
    """Score a saved run again, on val and on the sealed set, and compare it with the baseline.

    \b
    autoresearch verify best

    \b
    Exit codes: 0 verified, 5 refuted, 6 unverifiable, 1 no weights or other data, 2 usage.
    """
    from launcher.verify import verify_run

    sys.exit(verify_run(run))


@main.command()
@click.argument("run", default="best")
@click.option(
    "--against", metavar="RUN", default="baseline", show_default=True, help="The run to be better than."
)
def confirm(run: str, against: str) -> None:
    """Test whether a run's trainer is better than the baseline: fresh seeds, on the sealed set, p < 0.01.

    Both are run three to sixteen times, as many as the answer needs. "best" is the trainer that is
    believed best. Interrupted, it goes on where it was when it is called again.

    \b
    autoresearch confirm best --against baseline

    \b
    Exit codes: 0 better, 3 not shown, 1 an error that the message names, 2 usage, 130 interrupted.
    """
    from launcher.confirm import confirm_run

    sys.exit(confirm_run(run, against))


@main.command()
@click.option("--repeats", type=click.IntRange(2, 50), default=3, show_default=True, help="Seeds to run.")
@platform_option
@track_option
@budget_option
def noise(repeats: int, platform: str, track: str, budget: float | None) -> None:
    """Measure how much val_bpb differs between seeds, and what a run and a night can see.

    A night learns it by itself; what is measured here counts there too.

    \b
    autoresearch noise --repeats 3

    \b
    Exit codes: 0 measured, 1 too few of the runs count or one crashed, 4 timeout, 5 invalid,
    2 usage, 130 interrupted.
    """
    from launcher.noise import measure_noise

    sys.exit(measure_noise(setting_of(platform, track, budget), repeats))


@main.command()
@click.option("--yes", is_flag=True, help="Free it; without, only show.")
def clean(yes: bool) -> None:
    """Show what weights, prepared data and compiled code take, and free what is not needed.

    \b
    autoresearch clean --yes
    """
    from launcher.clean import free_disk

    free_disk(yes)


if __name__ == "__main__":
    main()
