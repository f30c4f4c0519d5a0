"""The `autoresearch` command. Every command imports what it needs when it is called: --help is instant."""

import os
import sys
from pathlib import Path

import click


class Group(click.Group):
    """Turns a user's mistake into one line and an exit code; nobody gets a traceback for a typo."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            from prepare import UserError

            if not isinstance(error, UserError):
                raise
            click.echo(f"autoresearch: {error}", err=True)
            sys.exit(error.code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """An AI agent does language-model research overnight, on whatever accelerator you own."""


platform_option = click.option("--platform", metavar="NAME", help="Use this entry of platforms.yaml, whatever the machine is.")
track_option = click.option("--track", metavar="NAME", help="Learn this track instead of the platform's own.")
budget_option = click.option("--budget", type=click.FloatRange(min=1, max=86400), default=None, help="Seconds of training; other than 300 is marked and never ranks.")
seed_option = click.option("--seed", type=click.IntRange(0, 2**31), default=1, show_default=True)
message_option = click.option("-m", "--message", "description", default="", help="What this experiment changes, in a line.")


@main.command()
@message_option
@platform_option
@track_option
@budget_option
@seed_option
@click.option("--trainer", type=click.Path(path_type=Path), help="Run this file instead of the platform's trainer.")
@click.option("--keep-weights", is_flag=True, help="Keep the model even if it is not the best.")
def run(description, platform, track, budget, seed, trainer, keep_weights):
    """Run one experiment: five minutes of training, then the score.

    \b
    autoresearch run -m "warmdown over 0.7 of the budget"
    Exit code: 0 keep, 3 discard, 1 crash, 4 timeout, 5 invalid, 130 interrupted, 2 usage.
    """
    from launcher.run import Options
    from launcher.run import run as run_experiment
    from prepare import TIME_BUDGET

    sys.exit(run_experiment(Options(description, platform, track, budget or TIME_BUDGET, seed, trainer, keep_weights)))


@main.command("try")
@message_option
@platform_option
@track_option
@budget_option
@seed_option
def try_(description, platform, track, budget, seed):
    """Commit the trainer's edit, run it, and keep the commit or take it back.

    \b
    autoresearch try -m "warmdown over 0.7 of the budget"
    Exit code: as of run. What is taken back stays reachable as refs/autoresearch/<run>.
    """
    from launcher.run import Options
    from launcher.trial import run_try
    from prepare import TIME_BUDGET

    sys.exit(run_try(Options(description, platform, track, budget or TIME_BUDGET, seed)))


@main.command()
@click.option("--agent", required=True, metavar="CMD", help="A headless agent; it gets the prompt on standard input, or in place of {prompt}.")
@click.option("--experiments", type=click.IntRange(min=1), help="End after this many; without a limit, Ctrl-C ends the loop.")
@click.option("--until", metavar="HH:MM", help="Begin no experiment that would not end by then.")
@platform_option
@track_option
@budget_option
@seed_option
@click.option("--agent-seconds", type=click.FloatRange(min=1), default=900, show_default=True, help="Time that the agent has for a turn.")
@click.option("--pause", type=click.FloatRange(min=0), default=30, show_default=True, help="Seconds to wait after a failed turn; doubles with every further one.")
def loop(agent, experiments, until, platform, track, budget, seed, agent_seconds, pause):
    """Leave it running: the agent edits the trainer, every edit is tried, what is better is kept.

    \b
    autoresearch loop --agent "claude -p --permission-mode acceptEdits" --until 07:30
    Exit code: 0 at its end, 1 when turn after turn led to no experiment, 130 interrupted.
    """
    from launcher.loop import Night, loop, parse_agent, parse_until
    from launcher.run import Options
    from prepare import TIME_BUDGET

    options = Options("", platform, track, budget or TIME_BUDGET, seed)
    sys.exit(loop(Night(parse_agent(agent), options, experiments, parse_until(until) if until else None, agent_seconds, pause)))


@main.command()
@click.option("--track", metavar="NAME", help="Prepare this track; the platform's own if left out.")
@platform_option
@click.option("--force", is_flag=True, help="Prepare again although it is prepared.")
def prepare(track, platform, force):
    """Prepare a track: corpus, tokenizer, packed rows.

    \b
    autoresearch prepare --track pysource
    """
    import prepare as corpus
    from launcher.run import choose_platform

    track = corpus.load_track(track or choose_platform(platform)[0].track)
    click.echo(corpus.prepare(track, force=force).path)


@main.command()
@platform_option
@click.option("--json", "as_json", is_flag=True, help="Facts and match as JSON.")
def platforms(platform, as_json):
    """Show what this machine is, which platform that makes it, and why.

    \b
    autoresearch platforms
    """
    import json

    from backends.platforms import describe, load_platforms, machine_facts
    from launcher.run import choose_platform

    facts = machine_facts()
    chosen, why = choose_platform(platform)
    if as_json:
        click.echo(json.dumps({"facts": describe(facts), "platform": chosen.name, "why": why, "trainer": chosen.trainer, "track": chosen.track}))
        return
    for key, value in describe(facts).items():
        click.echo(f"{key}: {value}")
    click.echo(f"platform: {chosen.name}\nwhy: {why}\ntrainer: {chosen.trainer}\ntrack: {chosen.track}\n")
    for name, p in load_platforms().items():
        size = f"{p.start['n_layer']} layers, width {p.start['n_embd']}, {p.start['total_batch_size']:,} tokens a step"
        click.echo(f"{'*' if name == chosen.name else ' '} {name:14} {p.backend:10} {p.track:12} {size}")


@main.command()
@platform_option
def program(platform):
    """Print the agent's instructions for this machine, with the facts of the moment.

    \b
    autoresearch program | claude -p
    """
    from launcher.program import program

    click.echo(program(platform), nl=False)


@main.command()
@click.argument("ledgers", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--track", metavar="NAME", help="Only this track.")
@click.option("--platform", metavar="NAME", help="Only this platform.")
@click.option("--json", "kind", flag_value="json", help="Everything, as JSON.")
@click.option("--tsv", "kind", flag_value="tsv", help="The ranked rows, as TSV.")
def leaderboard(ledgers, track, platform, kind):
    """Rank the experiments of each device, and compare devices. Ledgers of other machines are merged in.

    \b
    autoresearch leaderboard results.tsv /mnt/mac/results.tsv
    """
    from launcher.board import leaderboard

    home = Path(os.environ.get("AUTORESEARCH_HOME") or Path(__file__).resolve().parent.parent)
    leaderboard(ledgers or [home / "results.tsv"], track, platform, kind or "text")


@main.command()
@click.argument("run")
def show(run):
    """Show a run: its line, its loss curve, its trainer against the best before it.

    \b
    autoresearch show best
    """
    from launcher.show import show

    show(run)


@main.command()
@click.argument("run")
@click.option("--force", is_flag=True, help="Overwrite changes that no run and no commit holds.")
def restore(run, force):
    """Put a run's trainer back in its place.

    \b
    autoresearch restore best
    """
    from launcher.show import restore

    restore(run, force)


@main.command()
@click.argument("ledgers", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--track", metavar="NAME", help="Only this track.")
@click.option("--platform", metavar="NAME", help="Only this platform.")
@click.option("--run", "runs", multiple=True, metavar="ID", help="Draw this run's loss curve; repeat for several. The best ones if left out.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder to write to; report/ if left out.")
def report(ledgers, track, platform, runs, output):
    """Write the morning report: report.html, which needs no network, and report.png.

    \b
    autoresearch report -o /tmp/report
    """
    from launcher.report import report
    from launcher.run import home

    for path in report(ledgers or [home() / "results.tsv"], output or home() / "report", track, platform, runs):
        click.echo(path)


@main.command()
@click.argument("run")
def verify(run):
    """Score a saved run in a fresh process, on val and on the sealed set.

    \b
    autoresearch verify best
    Exit code: 0 verified, 5 refuted.
    """
    from launcher.verify import verify

    sys.exit(verify(run))


@main.command()
@click.option("--repeats", type=click.IntRange(2, 50), default=3, show_default=True, help="Seeds to run.")
@platform_option
@track_option
@budget_option
def noise(repeats, platform, track, budget):
    """Measure how much val_bpb differs between seeds: an improvement below that means nothing.

    \b
    autoresearch noise --repeats 3
    """
    from launcher.verify import noise
    from prepare import TIME_BUDGET

    sys.exit(noise(repeats, platform, track, budget or TIME_BUDGET))


@main.command()
@click.option("--yes", is_flag=True, help="Free it; without, only show.")
def clean(yes):
    """Show what weights and prepared data take, and free what nobody needs.

    \b
    autoresearch clean --yes
    """
    from launcher.verify import clean

    clean(yes)


if __name__ == "__main__":
    main()
