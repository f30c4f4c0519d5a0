"""Failed turns in a row: how long to pause after one, and when the night ends."""

from typing import NamedTuple

from night.agent import FailureKind, TurnFailed
from prepare import UserError

FREE_EDITS = 3  # bad edits in a row that go back to the agent without a pause
MOST = 20  # failed turns in a row, whatever they failed by


class Patience(NamedTuple):
    """How a kind of failure is met."""

    most: int  # in a row, before the night ends
    longest_pause: float  # seconds; the pause after a failed turn doubles up to this


# The agent may do better in another turn, and a person may undo a change. Waiting mends nothing else. For a
# busy device three runs were waited for already.
PATIENCE: dict[FailureKind, Patience] = {
    "agent": Patience(MOST, 1800.0),
    "edit": Patience(MOST, 1800.0),
    "harness": Patience(MOST, 1800.0),
    "repository": Patience(3, 15.0),
    "launcher": Patience(3, 15.0),
    "device": Patience(1, 15.0),
}


class Failures:
    """The failed turns since the last experiment. first_pause: seconds after one of them."""

    def __init__(self, first_pause: float) -> None:
        self.first_pause = first_pause
        self.in_a_row = 0
        self.kind: FailureKind | None = None  # of the last one
        self.alike = 0  # failures of this kind in a row

    def clear(self) -> None:
        """Forget them: there was an experiment."""
        self.in_a_row = 0
        self.alike = 0

    def add(self, kind: FailureKind) -> float:
        """Count a failed turn. Returns the seconds to pause."""
        self.in_a_row += 1
        self.alike = self.alike + 1 if kind == self.kind else 1
        self.kind = kind
        if kind == "edit" and self.alike <= FREE_EDITS:
            return 0.0
        return min(PATIENCE[kind].longest_pause, self.first_pause * 2 ** (self.in_a_row - 1))

    @property
    def are_too_many(self) -> bool:
        """Whether the night ends."""
        return self.in_a_row >= MOST or (self.kind is not None and self.alike >= PATIENCE[self.kind].most)


def kind_of(error: Exception) -> FailureKind:
    """Return what a turn failed by. "launcher" is a fault of ours."""
    if isinstance(error, TurnFailed):
        return error.kind
    return "repository" if isinstance(error, UserError | OSError) else "launcher"
