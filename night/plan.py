"""What a night was asked for, and what its hours allow: another run, another turn, the claim at its end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from backends.platforms import mac_state
from launcher.confirm import Contest, seconds_to_first_look
from launcher.device import WhenBusy
from launcher.ledger import BoardKey, Row
from launcher.run import POWER_FLAGS
from launcher.runs import ledger
from launcher.setting import Setting
from launcher.verdict import best_since_moved, board_runs
from night import repo
from night.agents import Agent
from prepare import UserError

LARGEST_RESERVE = 0.25  # of the night, that a claim may take at its end
RUN_SECONDS = 1.3  # of a whole run, for each second of training, before one was seen
RECENT_RUNS = 30  # of a board, by which the next one's seconds are told
LONG_RUN = 0.9  # of them, that took no longer than is expected of the next one
SHORTEST_TURN = 60.0  # seconds to think; with fewer an agent is not called


@dataclass
class Night:
    """What `autoresearch loop` was asked to do."""

    agent: Agent
    setting: Setting  # of every experiment
    seed: int = 1
    experiments: int | None = None  # None: no limit
    until: datetime | None = None  # None: no limit
    agent_seconds: float = 900.0  # that an agent has for a turn
    pause: float = 30.0  # seconds after a first failed turn
    confirms: bool = True  # the end of a night with an `until` is for the claim
    when_busy: WhenBusy = "go-on"  # what to do where other processes compute when it begins
    boxed: bool = False  # the agent works in a box
    is_here: bool = True  # experiments run on this machine, and not on others alone
    ahead: bool = False  # the agent thinks of the next edit while an experiment runs

    def seconds_left(self) -> float:
        """Return the seconds until the night ends, infinite without an `until`."""
        if self.until is None:
            return math.inf
        return max(0.0, (self.until - datetime.now()).total_seconds())


def parse_until(text: str) -> datetime:
    """Return the next time at which the clock on the wall shows HH:MM. Raises UserError."""
    try:
        clock = datetime.strptime(text, "%H:%M").time()
    except ValueError:
        raise UserError(f"--until: {text!r} is not a time of day such as 07:30", 2) from None
    now = datetime.now()
    today = datetime.combine(now, clock)
    return today if today > now else today + timedelta(days=1)


def require_power() -> None:
    """Raise UserError on a Mac whose results would not count."""
    laptop = mac_state()
    for key, flag in POWER_FLAGS.items():
        if laptop.get(key):
            raise UserError(
                f"no result of the night would count ({flag}): plug this Mac in and leave low-power mode"
            )


class Hours:
    """What is left of a night, as it goes on."""

    def __init__(self, night: Night) -> None:
        self.night = night
        self.total = night.seconds_left()
        self.dry_seconds = 0.0  # that the last dry run took

    def of_a_run(self) -> float:
        """Return the seconds that the next run is expected to take.

        Of the last scored runs of the board few took longer. One that hung does not count.
        """
        board = self.night.setting.board
        return seconds_of_a_run(ledger().rows(), board) or RUN_SECONDS * board.budget

    def for_the_claim(self) -> float:
        """Return the seconds at the end of the night that are for the claim: enough for its first look.

        None in a night that is too short for it, or while there is nothing to claim.
        """
        if not (self.night.confirms and self.night.until):
            return 0.0
        try:
            contest = find_contest(self.night.setting)
        except (UserError, OSError):  # the next turn says what is wrong with git
            return 0.0
        seconds = seconds_to_first_look(contest) if contest else 0.0
        return seconds if seconds <= LARGEST_RESERVE * self.total else 0.0

    def to_train(self) -> float:
        """Return the seconds that are left for experiments."""
        return max(0.0, self.night.seconds_left() - self.for_the_claim())

    def to_think(self, runs: int = 1) -> float:
        """Return the seconds that an agent has for a turn, 0 where they would be too few.

        runs: that must fit into the time after it: its own, and one that is under way
        """
        left = self.to_train() - runs * self.of_a_run() - self.dry_seconds
        return min(self.night.agent_seconds, left) if left >= SHORTEST_TURN else 0.0

    def why_over(self, done: int, baselines: int = 0) -> str:
        """Return why no further experiment is begun after so many, "" when one is.

        baselines: how many of them were runs of the committed trainer
        """
        night = self.night
        if night.experiments and done >= night.experiments:
            included = ", the baseline included" if baselines else ""
            return f"{night.experiments} experiments were asked for{included}"
        if night.until and self.of_a_run() > self.to_train():
            claimed = " and leave time to confirm the best" if self.for_the_claim() else ""
            return f"another experiment would not end by {night.until:%H:%M}{claimed}"
        return ""


def seconds_of_a_run(rows: Sequence[Row], board: BoardKey) -> float:
    """Return the seconds that few of the last scored runs of a board exceeded, 0 before there is one."""
    seconds = sorted(row.total_seconds for row in board_runs(rows, board)[-RECENT_RUNS:])
    return seconds[math.ceil(LONG_RUN * len(seconds)) - 1] if seconds else 0.0


def find_contest(setting: Setting) -> Contest | None:
    """Return the trainer that is believed best, and the baseline; None while they are the same."""
    rows = ledger().rows()
    runs = board_runs(rows, setting.board)
    best = best_since_moved(rows, setting.board, repo.committed_source(setting.trainer.name))
    if not best or best.source == runs[0].source:
        return None
    return Contest(runs[0], best)
