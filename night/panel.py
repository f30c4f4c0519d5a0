"""What a person sees of a night: a live panel on a terminal, a line a phase elsewhere, and the counts."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from backends.protocol import Event, Start
from launcher.belief import Standing
from launcher.console import Progress, Scored, say
from launcher.ledger import Row

REFRESHES_A_SECOND = 2.0


class Panel:
    """The counts of a night, and their display while the `with` block runs.

    experiments, until: the number of experiments and the time at which the night ends, None for no limit.
    """

    def __init__(self, experiments: int | None, until: datetime | None) -> None:
        self.experiments = experiments
        self.until = until
        self.done = 0  # experiments
        self.kept = 0
        self.discarded = 0
        self.failed = 0
        self.turns_lost = 0  # turns without an experiment
        self.best: Row | None = None  # a run of the trainer that is believed best
        self.belief: Standing | None = None  # what is believed of it
        self.tokens = 0  # that the agent used, as far as it prints them
        self.cost = 0.0  # dollars, likewise
        self.claim = ""  # what a person may repeat of the night
        self.phase = "starting"
        self.detail = ""  # the progress of the phase
        self._live: Live | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            self._live = Live(
                get_renderable=self.table,
                console=console,
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

    def enter(self, phase: str) -> None:
        """Show that a phase of an experiment begins."""
        self.phase = phase
        self.detail = ""
        if not self._live:
            self.note(phase)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        say(f"{time.strftime('%H:%M:%S')} {text}")

    def count(self, row: Row) -> None:
        """Count an experiment."""
        self.done += 1
        self.kept += row.status == "keep"
        self.discarded += row.status == "discard"
        self.failed += not row.scored

    def table(self) -> Table:
        """Return the panel as it is now."""
        limit = f" of {self.experiments}" if self.experiments else ""
        best = f"{self.believed()}  {self.best.description}" if self.best else "none yet"
        counts = (
            f"{self.kept} kept, {self.discarded} discarded, {self.failed} failed, "
            f"{self.turns_lost} turns without an experiment"
        )
        table = Table.grid(padding=(0, 2))
        for name, value in (
            ("experiment", f"{self.done + 1}{limit}: {self.phase}"),
            ("", self.detail),
            ("best", best),
            ("so far", counts),
            ("left", self.left()),
        ):
            table.add_row(name, Text(value))  # not parsed: an agent's brackets are no markup
        return table

    def believed(self) -> str:
        """Return what is believed of the best trainer: its val_bpb, with its error."""
        if self.belief is None:
            return "unknown"
        return f"{self.belief.mean:.6f} +- {self.belief.error:.6f}"

    def left(self) -> str:
        """Return what is left of the night."""
        parts = []
        if self.until:
            seconds = int(max(0.0, (self.until - datetime.now()).total_seconds()))
            parts.append(f"{timedelta(seconds=seconds)} until {self.until:%H:%M}")
        if self.experiments:
            parts.append(f"{self.experiments - self.done} experiments")
        return ", ".join(parts) or "until Ctrl-C"

    def print_summary(self, ended: str) -> None:
        """Print the last lines of the night, greppable, on stdout. ended: why it ended."""
        print(f"claim: {self.claim or 'none was tested: autoresearch confirm'}")
        print(f"experiments: {self.done}")
        print(f"kept: {self.kept}")
        print(f"discarded: {self.discarded}")
        print(f"failed: {self.failed}")
        print(f"turns_lost: {self.turns_lost}")
        if self.tokens:
            print(f"agent_tokens: {self.tokens}")
        if self.cost:
            print(f"agent_cost_dollars: {self.cost:.2f}")
        if self.best:
            print(f"best_val_bpb: {self.best.val_bpb:.6f}")
            print(f"best_believed: {self.believed()}")
            print(f"best_run: {self.best.run}")
            print(f"best: {self.best.description}")
        print(f"ended: {ended}")


class RunDetail(Progress):
    """The progress of a run as a line of the panel. Silent where there is no panel."""

    def __init__(self, budget: float, panel: Panel, on_start: Callable[[], None] = lambda: None) -> None:
        """on_start: called when the training begins, beside what is shown."""
        super().__init__(budget)
        self.panel = panel
        self.on_start = on_start

    def __call__(self, event: Event | Scored | None) -> None:
        super().__call__(event)
        if isinstance(event, Start):
            self.on_start()

    def show(self, always: bool = False) -> None:
        self.panel.detail = self.text

    def close(self) -> None:
        self.panel.detail = ""
