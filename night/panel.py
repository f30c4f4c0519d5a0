"""What a person sees of a night: a live panel on a terminal, a line a phase elsewhere, and the counts."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from backends.protocol import Event, Log, Start
from launcher.belief import Standing
from launcher.console import is_quiet, say
from launcher.ledger import Row, single_line
from launcher.progress import STARTING, Progress, Scored
from launcher.report.timeline import DeviceNow
from night.state import NightCounts

OF_NO_EXPERIMENT = ("check", "confirm")  # phases of a night that are part of no experiment
REFRESHES_A_SECOND = 2.0
LAST_RESULTS = 5
MOST_DEVICES = 16  # that are shown
BAR_WIDTH = 40  # columns
STYLES = {"keep": "green", "discard": "dim"}  # of results; the others are red


class Panel:
    """The counts of a night, and their display while the `with` block runs.

    experiments, until: the number of experiments and the time at which the night ends, None for no limit.
    """

    def __init__(self, experiments: int | None, until: datetime | None) -> None:
        self.experiments = experiments
        self.until = until
        self.done = 0  # experiments, baselines included
        self.counts = NightCounts()
        self.branch = ""  # and the commit that the night ended on
        self.results: list[Row] = []  # the last ones
        self.best: Row | None = None  # a run of the trainer that is believed best
        self.belief: Standing | None = None  # what is believed of it
        self.tokens = 0  # that the agent used, as far as it prints them
        self.cost = 0.0  # dollars, likewise
        self.claim = ""  # what a person may repeat of the night
        self.seconds_a_run = 0.0  # that an experiment takes, 0 where it is not known
        self.phase = self.numbered("starting")
        self.limit: float | None = None  # seconds that the phase may take
        self.detail = ""  # the progress of the phase
        self.share: float | None = None  # of the training that is over
        self.words: Callable[[], str] = str  # what the agent printed last
        self.devices: Callable[[], list[DeviceNow]] = list  # what the devices of a fleet do
        self.is_stopping: Callable[[], bool] = bool  # somebody called `autoresearch stop`
        self._entered = time.monotonic()
        self._console = Console(stderr=True)
        self._live: Live | None = None
        if self._console.is_terminal and not is_quiet():
            self._live = Live(
                get_renderable=self.table,
                console=self._console,
                refresh_per_second=REFRESHES_A_SECOND,
                transient=True,
            )

    def __enter__(self) -> "Panel":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            self._console.set_window_title("")

    def enter(self, phase: str, limit: float | None = None, is_numbered: bool = True) -> None:
        """Show that a phase begins.

        limit: seconds that it may take. is_numbered: it is part of an experiment, which has a number.
        """
        self.phase = self.numbered(phase) if is_numbered else phase
        self.limit = limit
        self.detail = ""
        self.share = None
        self.words = str
        self._entered = time.monotonic()
        if self._live:
            self._console.set_window_title(f"autoresearch {self.phase}")
        else:
            self.note(phase)

    def set_phase(self, phase: str, seconds: float, limit: float, is_numbered: bool = True) -> None:
        """Show a phase that began so many seconds ago. limit: seconds that it may take, 0 for none."""
        self.phase = self.numbered(phase) if is_numbered else phase
        self.limit = limit or None
        self._entered = time.monotonic() - seconds

    def numbered(self, phase: str) -> str:
        """Return a phase with the number of its experiment."""
        return f"{self.done + 1}{self.of_all()}: {phase}"

    def note(self, text: str) -> None:
        """Print a line that stays."""
        say(f"{time.strftime('%H:%M:%S')} {text}")

    def count(self, row: Row) -> None:
        """Count an experiment. A run of the committed trainer is a baseline, and no edit."""
        self.done += 1
        if row.is_of_committed:
            name = "baselines"
        elif not row.scored:
            name = "failed"
        else:
            name = "kept" if row.status == "keep" else "discarded"
        self.add(name)
        self.results = [*self.results, row][-LAST_RESULTS:]

    def add(self, name: str) -> None:
        """Add one to a count, given its name in NightCounts."""
        self.counts = replace(self.counts, **{name: getattr(self.counts, name) + 1})

    def table(self) -> Table:
        """Return the panel as it is now."""
        best = f"{self.believed()}  {self.best.description}" if self.best else "none yet"
        so_far = self.counts
        counts = (
            f"{so_far.kept} kept, {so_far.discarded} discarded, {so_far.failed} failed, "
            f"{so_far.refused} refused, {so_far.turns_lost} turns without an edit"
        )
        table = Table.grid(padding=(0, 2))
        # Text is not parsed: an agent's brackets are no markup.
        table.add_row("experiment", Text(self.phase))
        table.add_row("", Text(f"{self.clock()}  {self.detail or single_line(self.words())}"))
        if self.share is not None:
            table.add_row("", ProgressBar(total=1.0, completed=self.share, width=BAR_WIDTH))
        devices = self.devices()
        for device in devices[:MOST_DEVICES]:
            since = minutes(max(0.0, time.time() - device.since))
            table.add_row(device.name, Text(device.told(f"{since}  {device.doing}")))
        if len(devices) > MOST_DEVICES:
            table.add_row("", Text(f"and {len(devices) - MOST_DEVICES} more devices"))
        for number, row in enumerate(reversed(self.results)):
            table.add_row("" if number else "results", Text(self.told(row), STYLES.get(row.status, "red")))
        table.add_row("best", Text(best))
        table.add_row("so far", Text(counts))
        table.add_row("left", Text(self.left()))
        return table

    def clock(self) -> str:
        """Return how long the phase has lasted, and how long it may."""
        lasted = minutes(time.monotonic() - self._entered)
        return lasted if self.limit is None else f"{lasted} of {minutes(self.limit)}"

    def told(self, row: Row) -> str:
        """Return a result in a line, with its distance from the best."""
        if not row.scored:
            return f"{row.status:8} {row.description} ({row.reason})"
        best = f" ({row.val_bpb - self.best.val_bpb:+.4f})" if self.best else ""
        return f"{row.status:8} {row.val_bpb:.4f}{best} {row.description}"

    def of_all(self) -> str:
        return f" of {self.experiments}" if self.experiments else ""

    def believed(self) -> str:
        """Return what is believed of the best trainer: its val_bpb, with its error."""
        if self.belief is None:
            return "unknown"
        return f"{self.belief.mean:.6f} +- {self.belief.error:.6f}"

    def left(self) -> str:
        """Return what is left of the night."""
        if self.is_stopping():
            return "it ends after this experiment: autoresearch stop"
        parts = []
        if self.until:
            seconds = int(max(0.0, (self.until - datetime.now()).total_seconds()))
            about = f", about {seconds / self.seconds_a_run:.0f} experiments" if self.seconds_a_run else ""
            parts.append(f"{timedelta(seconds=seconds)} until {self.until:%H:%M}{about}")
        if self.experiments:
            parts.append(f"{self.experiments - self.done} experiments")
        return ", ".join(parts) or "until Ctrl-C"

    def print_summary(self, ended: str) -> None:
        """Print the last lines of the night, greppable, on stdout. ended: why it ended."""
        print(f"claim: {self.claim or 'none was tested: autoresearch confirm'}")
        counts = self.counts
        print(f"experiments: {counts.edits}")
        print(f"kept: {counts.kept}")
        print(f"discarded: {counts.discarded}")
        print(f"failed: {counts.failed}")
        print(f"baselines: {counts.baselines}")
        print(f"refused: {counts.refused}")
        print(f"turns_lost: {counts.turns_lost}")
        if self.tokens:
            print(f"agent_tokens: {self.tokens}")
        if self.cost:
            print(f"agent_cost_dollars: {self.cost:.2f}")
        if self.best:
            print(f"best_val_bpb: {self.best.val_bpb:.6f}")
            print(f"best_believed: {self.believed()}")
            print(f"best_run: {self.best.run}")
            print(f"best: {self.best.description}")
        if self.branch:
            print(f"branch: {self.branch}")
        print(f"ended: {ended}")


class RunDetail(Progress):
    """The progress of a run as a line of the panel. Silent where there is no panel."""

    def __init__(
        self, budget: float, panel: Panel, training_began: Callable[[], None] = lambda: None
    ) -> None:
        """training_began: called then, beside what is shown."""
        super().__init__(budget)
        self.panel = panel
        self.training_began = training_began

    def __call__(self, event: Event | Scored | None) -> None:
        super().__call__(event)
        if isinstance(event, Start):
            self.training_began()
        if isinstance(event, Log):
            self.panel.share = min(1.0, event.elapsed / self.budget)

    def show(self, always: bool = False) -> None:
        self.panel.detail = self.text

    def close(self) -> None:
        self.text = STARTING
        self.panel.detail = ""
        self.panel.share = None


def minutes(seconds: float) -> str:
    """Return seconds as 1:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
