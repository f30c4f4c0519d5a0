"""The `autoresearch` command. Every command imports what it needs when it is called: --help is instant."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.command import AGENTS, KEEP_HOUSE, READ, RESEARCH, START, Group
from launcher.exit_codes import EXIT_DONE, EXIT_FAILED
from launcher.ledger import single_line
from launcher.options import (
    COLUMN,
    COLUMNS,
    RUN,
    Name,
    Seconds,
    budget_option,
    experiment_options,
    filter_options,
    hosts_option,
    json_option,
    ledgers_argument,
    message_option,
    open_option,
    platform_option,
    run_argument,
    seed_option,
    setting_options,
    track_option,
)

if TYPE_CHECKING:
    from backends.platforms import StartSizes
    from launcher.device import WhenBusy
    from launcher.setting import Setting

# What an agent of the loop may call.
FOR_AGENTS = ("show", "restore", "leaderboard", "diff", "log", "platforms", "program", "help")


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


@click.group(
    cls=Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="autoresearch COMMAND --help says more about a command, autoresearch help about the rest.",
)
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
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        return
    if os.environ.get("AUTORESEARCH_LOOP") and context.invoked_subcommand not in FOR_AGENTS:
        from prepare import UserError

        raise UserError(
            f"an agent of the loop may call {', '.join(FOR_AGENTS)}; the loop does the rest: "
            "edit the trainer, say what you did, and end"
        )


def setting_of(platform: str, track: str = "", budget: float | None = None) -> "Setting":
    """Return the setting that a command's options mean."""
    from launcher.setting import resolve
    from prepare import TIME_BUDGET

    return resolve(platform, track, budget or TIME_BUDGET)


def ask_description(given: str | None) -> str:
    """Return what an experiment changes. Where that was not said, and a person is there, ask for it."""
    if given is not None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return given or ""
    return single_line(click.prompt("What does it change", default="", show_default=False, err=True))


# ---------------------------------------------------------------------------
# Start
# ---------------------------------------------------------------------------


@main.command(section=START)
@platform_option
@track_option
@click.option(
    "--agent",
    metavar="NAME",
    default="",
    type=Name("agents"),
    help="Ask this agent for a trivial edit, as a night does before it begins. It costs its tokens.",
)
@json_option
def doctor(platform: str, track: str, agent: str, as_json: bool) -> None:
    """Look whether this machine is ready, and say what is wrong.

    Device, speed, memory, other processes, data, disk, hub, git and agents: each with its remedy. It takes
    half a minute.

    \b
    autoresearch doctor
    """
    from itertools import chain

    from launcher.doctor import STYLES, State, check_machine, print_checks
    from night.doctor import check_night

    def echo(text: str, state: "State") -> None:
        click.secho(text, fg=STYLES[state])

    checks = chain(check_machine(platform, track), check_night(agent, platform, track))
    sys.exit(EXIT_DONE if print_checks(checks, echo, as_json) else EXIT_FAILED)


@main.command(section=START)
@platform_option
@json_option
def platforms(platform: str, as_json: bool) -> None:
    """Show what this machine is, and which platform that makes it.

    \b
    autoresearch platforms
    """
    import json

    from backends.dtype import choose_dtype
    from backends.platforms import choose_platform, facts_for, load_platforms, machine_facts
    from backends.sizes import choose_start
    from prepare import load_track

    facts = machine_facts().known()
    chosen, why = choose_platform(platform)
    summary = {"platform": chosen.name, "why": why, "trainer": chosen.trainer, "track": chosen.track}
    dtype = choose_dtype(chosen, facts_for(chosen))
    summary |= {"dtype": dtype.dtype, "why_dtype": dtype.why}
    sized = choose_start(chosen, load_track(chosen.track), facts_for(chosen))
    summary |= {"start": size_of(sized.start), "why_start": sized.why}
    if as_json:
        click.echo(json.dumps({"facts": facts, **summary}))
        return
    for key, value in {**facts, **summary}.items():
        click.echo(f"{key}: {value}")
    click.echo()
    for name, entry in load_platforms().items():
        mark = "*" if name == chosen.name else " "
        hardware = f"{entry.framework} {entry.device_kind}"
        size = "measured" if entry.measured else size_of(entry.start)
        click.echo(f"{mark} {name:14} {hardware:10} {entry.track:12} {size}")


def size_of(start: "StartSizes") -> str:
    """Return a size to start with, for people."""
    return f"{start.n_layer} layers, width {start.n_embd}, {start.total_batch_size:,} tokens a step"


@main.command(section=START)
@track_option
@platform_option
@click.option("--force", is_flag=True, help="Prepare again although it is prepared.")
@json_option
def prepare(track: str, platform: str, force: bool, as_json: bool) -> None:
    """Prepare a track: corpus, tokenizer, packed rows.

    \b
    autoresearch prepare --track pysource
    """
    from dataclasses import asdict

    import prepare as corpus
    from backends.platforms import choose_platform
    from launcher.console import print_object

    name = track or choose_platform(platform)[0].track
    data = corpus.prepare_track(corpus.load_track(name), force=force)
    if as_json:
        print_object({"track": name, "path": str(data.path), **asdict(data.meta)})
    else:
        click.echo(data.path)


# ---------------------------------------------------------------------------
# Research
# ---------------------------------------------------------------------------


@main.command(section=RESEARCH)
@message_option
@experiment_options
@click.option(
    "--trainer", type=click.Path(path_type=Path), help="Run this file instead of the platform's trainer."
)
@click.option("--keep-weights", is_flag=True, help="Keep the model even if it is not the best.")
@json_option
def run(
    description: str | None,
    platform: str,
    track: str,
    budget: float | None,
    seed: int,
    when_busy: "WhenBusy",
    trainer: Path | None,
    keep_weights: bool,
    as_json: bool,
) -> None:
    """Run one experiment: five minutes of training, then the score.

    \b
    autoresearch run -m "warmdown over 0.7 of the budget"
    """
    from launcher.run import Request, exit_code, print_result, run_experiment

    setting = setting_of(platform, track, budget)
    description = ask_description(description)
    row = run_experiment(Request(setting, description, seed, trainer, keep_weights, when_busy=when_busy))
    print_result(row, as_json)
    sys.exit(exit_code(row))


@main.command("try", section=RESEARCH)
@message_option
@experiment_options
@json_option
def try_(
    description: str | None,
    platform: str,
    track: str,
    budget: float | None,
    seed: int,
    when_busy: "WhenBusy",
    as_json: bool,
) -> None:
    """Commit the trainer's edit, run it, and keep or revert it.

    What is reverted stays reachable as refs/autoresearch/<run>.

    \b
    autoresearch try -m "warmdown over 0.7 of the budget"
    """
    from launcher.run import Request
    from night.trial import require_edit, try_edit

    setting = setting_of(platform, track, budget)
    require_edit(setting)
    description = ask_description(description)
    sys.exit(try_edit(Request(setting, description, seed, when_busy=when_busy), as_json))


@main.command(section=RESEARCH)
@click.option(
    "--agent",
    default="builtin",
    show_default=True,
    metavar="NAME",
    type=Name("agents"),
    help="claude, codex, gemini, opencode, pi, qwen, aider, or the command of another one, which gets the "
    "prompt on standard input or in place of {prompt}. builtin needs no language model: it searches the "
    "trainer's constants.",
)
@click.option(
    "--experiments",
    type=click.IntRange(min=1),
    help="End after this many, a baseline included; without a limit, Ctrl-C ends the loop.",
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
@click.option(
    "--devices",
    metavar="LIST",
    help="Run experiments on several devices at once: all, or GPUs by number (0,1), or cpu:2 for the halves "
    "of a CPU (docs/fleet.md).",
)
@hosts_option
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Run experiments on the devices that have joined a scheduler of dask's: tls://HOST:PORT.",
)
@open_option
@click.option(
    "--agents",
    type=click.IntRange(1, 64),
    help="Agents that may work at once on several devices; as many as there are devices if left out.",
)
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
    devices: str | None,
    hosts: Path | None,
    scheduler: str | None,
    is_open: bool,
    agents: int | None,
) -> None:
    """Let an agent edit, run and keep what is better, all night.

    A night is on one device, or on those of --devices and --hosts, or --scheduler. An edit that fails its dry
    run is refused; what was not kept stays under a ref.

    \b
    autoresearch loop --experiments 20
    autoresearch loop --agent claude --until 07:30
    """
    from night.agents import parse_agent
    from night.loop import run_night
    from night.plan import Night, parse_until

    is_fleet = bool(devices or hosts or scheduler)
    if agents and not is_fleet:
        raise click.UsageError("--agents goes with --devices: on one device, one agent is enough.")
    if scheduler and (devices or hosts):
        raise click.UsageError("--scheduler has its own devices: leave --devices and --hosts out.")
    if is_open and not scheduler:
        raise click.UsageError("--open goes with --scheduler.")
    is_here = True
    if is_fleet:
        from night.pool import find_pool

        pool, setting = find_pool(devices or "", hosts, scheduler or "", is_open, platform, track, budget)
        is_here = bool(pool.here)
    else:
        setting = setting_of(platform, track, budget)
    night = Night(
        agent=parse_agent(agent).for_trainer(setting.trainer.name),
        setting=setting,
        seed=seed,
        experiments=experiments,
        until=parse_until(until) if until is not None else None,
        agent_seconds=agent_seconds,
        pause=pause,
        confirms=not no_confirm and is_here,
        when_busy=when_busy,
        boxed=boxed,
        ahead=ahead,
        is_here=is_here,
    )
    if is_fleet:
        from night.fleet import run_fleet

        sys.exit(run_fleet(night, pool, agents))
    sys.exit(run_night(night))


@main.command(section=RESEARCH)
@click.argument("scheduler", metavar="ADDRESS")
@click.option(
    "--devices",
    metavar="LIST",
    default="all",
    show_default=True,
    help="GPUs by number (0,1), or cpu:2 for the halves of a CPU.",
)
@click.option("--name", metavar="NAME", help="Of this machine; its own if left out.")
@open_option
def lend(scheduler: str, devices: str, name: str | None, is_open: bool) -> None:
    """Lend this machine's devices to a night elsewhere.

    They join a scheduler of dask's at ADDRESS, and `autoresearch loop --scheduler ADDRESS` uses them. Ctrl-C
    ends it. Over SSH nothing need be started by hand: `autoresearch loop --hosts`.

    \b
    uv run --extra fleet autoresearch lend tls://gpubox:8786
    """
    from launcher.processes import stop_on_signals
    from night.devices import parse_devices
    from night.workers import security_for

    security = security_for(scheduler, is_open)
    chosen = parse_devices(devices)
    with stop_on_signals():
        from night.lend import lend_by_hand

        lend_by_hand(scheduler, name or os.uname().nodename, chosen, security)


@main.command(section=RESEARCH)
@click.option("--wait", is_flag=True, help="Return when the loop is over.")
def stop(wait: bool) -> None:
    """End the loop of this repository after the experiment at hand.

    A training under way is finished and judged; an edit that has not begun to train waits for the next loop.
    Ctrl-C, or SIGTERM to the loop, ends it at once.

    \b
    autoresearch stop
    """
    from launcher.report.files import read_loop_log
    from launcher.report.timeline import current_phase
    from night.stop import ask_to_stop, wait_for_end

    loop = ask_to_stop()
    phase = current_phase(read_loop_log())
    doing = f" ({phase.data.get('text')})" if phase else ""
    click.echo(single_line(f"the loop, process {loop.pid}, ends after the experiment at hand{doing}"))
    if wait:
        wait_for_end(loop)


@main.command(section=RESEARCH)
@click.option("--repeats", type=click.IntRange(2, 50), default=3, show_default=True, help="Seeds to run.")
@setting_options
@json_option
def noise(repeats: int, platform: str, track: str, budget: float | None, as_json: bool) -> None:
    """Measure how much val_bpb differs between seeds.

    It says how large a change a run and a night can see. A night learns it by itself; what is measured
    here counts there too.

    \b
    autoresearch noise --repeats 3
    """
    from launcher.noise import measure_noise

    sys.exit(measure_noise(setting_of(platform, track, budget), repeats, as_json))


@main.command(section=RESEARCH)
@click.argument("trainer", default="", metavar="[FILE|RUN]")
@click.option(
    "--devices",
    metavar="LIST",
    default="all",
    show_default=True,
    help="GPUs by number (0,1), cpu, or cpu:2 for the halves of a CPU; separated by commas; or none.",
)
@hosts_option
@track_option
@budget_option
@seed_option
@json_option
def compare(
    trainer: str, devices: str, hosts: Path | None, track: str, budget: float | None, seed: int, as_json: bool
) -> None:
    """Run one trainer on several devices, and compare them.

    The trainer is a file or that of a run, or each platform's own. It needs the extra fleet.

    \b
    uv run --extra fleet autoresearch compare --devices 0,1,cpu
    """
    from night.compare import compare_devices

    sys.exit(compare_devices(trainer, devices, hosts, track, budget, seed, as_json))


@main.command(section=RESEARCH)
@run_argument(default="best")
@click.option(
    "--against",
    metavar="RUN",
    type=RUN,
    default="baseline",
    show_default=True,
    help="The run to be better than.",
)
@json_option
def confirm(run: str, against: str, as_json: bool) -> None:
    """Test whether a run is better than the baseline, p < 0.01.

    Both trainers get fresh seeds and are scored on the sealed set, three to sixteen times, as many as the
    answer needs. "best" is the trainer that is believed best. Interrupted, it goes on where it was when it
    is called again.

    \b
    autoresearch confirm best --against baseline
    """
    from launcher.confirm import confirm_run

    sys.exit(confirm_run(run, against, as_json))


@main.command(section=RESEARCH)
@run_argument()
@json_option
def verify(run: str, as_json: bool) -> None:
    """Score a saved run again, on text that no run was selected on.

    It is scored on val and on the sealed set, and compared with the baseline.

    \b
    autoresearch verify best
    """
    from launcher.verify import verify_run

    sys.exit(verify_run(run, as_json))


# ---------------------------------------------------------------------------
# Read
# ---------------------------------------------------------------------------


@main.command(section=READ)
@ledgers_argument
@filter_options
@click.option(
    "--columns",
    metavar="NAMES",
    type=COLUMNS,
    help="Show these columns, separated by commas, in place of those that fit.",
)
@click.option(
    "--sort",
    metavar="NAME",
    type=COLUMN,
    default="",
    help="Sort by this column; -NAME begins with the largest.",
)
@click.option(
    "-n", "--rows", "most", type=click.IntRange(min=1), default=20, show_default=True, help="Runs of a table."
)
@click.option("--json", "kind", flag_value="json", help="Everything, as JSON.")
@click.option("--tsv", "kind", flag_value="tsv", help="The ranked rows, as TSV.")
def leaderboard(
    ledgers: tuple[Path, ...],
    track: str | None,
    platform: str | None,
    columns: tuple[str, ...] | None,
    sort: str,
    most: int,
    kind: str | None,
) -> None:
    """Rank the experiments of each device, and compare devices.

    Ledgers of other machines are merged in. A ledger of another tool has a board of its own, which is not
    verified. The best run of a board is marked with a star.

    \b
    autoresearch leaderboard results.tsv /mnt/mac/results.tsv
    autoresearch leaderboard --sort -tokens_per_second --columns rank,val_bpb,tokens_per_second,run
    """
    from launcher.board import Wanted, print_leaderboard

    # launcher.runs knows this place too, but importing it takes as long as the whole leaderboard.
    home = Path(os.environ.get("AUTORESEARCH_HOME") or Path(__file__).resolve().parent.parent)
    wanted = Wanted(columns or (), sort, most)
    paths = ledgers or (home / "results.tsv",)
    print_leaderboard(paths, track, platform, kind or "text", wanted, runs=None if ledgers else home / "runs")


@main.command(section=READ)
@run_argument()
@json_option
def show(run: str, as_json: bool) -> None:
    """Show a run: its numbers, its loss curve, and what it changed.

    \b
    autoresearch show best
    """
    from launcher.show import show_run

    show_run(run, as_json)


@main.command(section=READ)
@run_argument("old")
@run_argument("new", default="")
@json_option
def diff(old: str, new: str, as_json: bool) -> None:
    """Show how the trainers of two runs differ.

    Without a second run, the second trainer is the one that lies here.

    \b
    autoresearch diff baseline best
    """
    from launcher.diff import print_difference

    print_difference(old, new, as_json)


@main.command(section=READ)
@run_argument(default="last")
@click.option("-n", "--lines", "most", type=click.IntRange(min=1), help="Only so many at the end.")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run is over.")
@click.option("--score", "of_scoring", is_flag=True, help="What the processes print which score the model.")
@json_option
def log(run: str, most: int | None, follow: bool, of_scoring: bool, as_json: bool) -> None:
    """Print what the trainer of a run printed, also while it runs.

    \b
    autoresearch log last -f
    """
    from launcher.log import print_log

    print_log(run, most, follow, of_scoring, as_json)


@main.command(section=READ)
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
@json_option
def report(
    ledgers: tuple[Path, ...],
    track: str | None,
    platform: str | None,
    runs: tuple[str, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    """Write the night on a page, and a card to share.

    report.html needs no network; report.png is the card.

    \b
    autoresearch report -o /tmp/report
    """
    from launcher.board import require_names
    from launcher.console import print_object
    from launcher.report import write_report
    from launcher.runs import home

    paths = ledgers or (home() / "results.tsv",)
    require_names(paths, track, platform)
    page, card = write_report(paths, output or home() / "report", track, platform, runs)
    if as_json:
        print_object({"page": str(page), "card": str(card)})
    else:
        click.echo(f"{page}\n{card}")


@main.command(section=READ)
@ledgers_argument
@filter_options
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8377, show_default=True, help="0: any that is free."
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Another than this machine's needs a --token."
)
@click.option("--token", default="", metavar="TEXT", help="Letters and digits that a reader must know.")
@click.option(
    "--terminal", is_flag=True, help="Show the panel of the loop that runs here, and serve nothing."
)
def watch(
    ledgers: tuple[Path, ...],
    track: str | None,
    platform: str | None,
    port: int,
    host: str,
    token: str,
    terminal: bool,
) -> None:
    """Serve that page on this machine, and keep it current.

    It updates itself while a loop runs. Ctrl-C ends it. With --terminal, the panel of the loop is shown in
    this terminal until the loop ends; in a pipe it is printed once.

    \b
    autoresearch watch --port 8377
    autoresearch watch --terminal
    """
    if terminal:
        from night.watch import watch_loop

        sys.exit(watch_loop())
    from launcher.board import require_names
    from launcher.console import say
    from launcher.report.watch import LiveReport, open_server
    from launcher.runs import home

    paths = ledgers or (home() / "results.tsv",)
    require_names(paths, track, platform)
    report = LiveReport(paths, track, platform)
    with open_server(host, port, token, report) as server:
        click.echo(server.url)
        say("Ctrl-C ends it")
        server.serve_forever()


# ---------------------------------------------------------------------------
# Keep house
# ---------------------------------------------------------------------------


@main.command(section=KEEP_HOUSE)
@run_argument()
@click.option("--force", is_flag=True, help="Overwrite changes that no run and no commit holds.")
def restore(run: str, force: bool) -> None:
    """Put a run's trainer back in its place.

    \b
    autoresearch restore best
    """
    from launcher.show import restore_trainer

    restore_trainer(run, force)


@main.command(section=KEEP_HOUSE)
@click.option("--yes", is_flag=True, help="Free it; without, only show.")
@json_option
def clean(yes: bool, as_json: bool) -> None:
    """Show what can be freed on the disk, and free it.

    That is weights, prepared data and compiled code.

    \b
    autoresearch clean --yes
    """
    from launcher.clean import free_disk

    free_disk(yes, as_json)


# ---------------------------------------------------------------------------
# Agents
# ---------------------------------------------------------------------------


@main.command(section=AGENTS)
@setting_options
@json_option
def program(platform: str, track: str, budget: float | None, as_json: bool) -> None:
    """Print what an agent is told: instructions, ideas, results.

    It is what to know before an edit is tried by hand.

    \b
    autoresearch program | claude -p
    """
    from launcher.console import print_object
    from night.program import write_program

    setting = setting_of(platform, track, budget)
    text = write_program(setting)
    if as_json:
        names = {"platform": setting.platform.name, "track": setting.track.name}
        print_object({**names, "trainer": str(setting.trainer), "budget": setting.budget, "text": text})
    else:
        click.echo(text, nl=False)


@main.command("help", section=AGENTS)
@click.argument("topic", type=Name("topics"), default="")
@click.pass_context
def help_(context: click.Context, topic: str) -> None:
    """Explain a command or a topic, such as exit-codes.

    \b
    autoresearch help exit-codes
    """
    from launcher.topics import TOPICS

    above = context.parent
    assert above
    if topic in TOPICS:
        click.echo(TOPICS[topic].write())
    elif topic in main.commands:
        command = main.commands[topic]
        click.echo(command.get_help(click.Context(command, parent=above, info_name=topic)))
    elif topic:
        raise click.UsageError(f"No such topic '{topic}': a command, or {', '.join(TOPICS)}.", context)
    else:
        click.echo(above.get_help())
        click.echo("\nTopics:")
        for name, about in TOPICS.items():
            click.echo(f"  {name:12} {about.summary}")


if __name__ == "__main__":
    main()
