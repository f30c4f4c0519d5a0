"""What the next turn asks for: a new idea, a combination of near misses, or something taken out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from night.tried import Experiment, Tried

# Experiments without a keep after which the search stalls. Where one edit of six is kept (22 of 124 in the
# original's published night), twelve in a row fail by chance one time in ten.
STALL = 12
# Turns that a stall asks for something else, before it is back at new ideas: an edit that combines may fail
# by a slip, and there is more than one choice of what to combine.
TURNS = 3
COMBINED = 3  # near misses that are named: of more than three, one cannot say which helped
FEWEST_MISSES = 2  # to combine
MAYBE = 0.1  # P(better) from which a discard is worth combining; an edit without effect has 0.5
ABLATION_EVERY = 25  # experiments: over two hours of a night, in which four edits or five are kept
FEWEST_KEPT = 4  # edits in the current trainer; with fewer there is little to take out
WEAKEST = 5  # kept edits that an ablation names


@dataclass(frozen=True)
class Mode:
    """What the next turn asks for."""

    name: Literal["explore", "combine", "ablate"] = "explore"
    why: str = ""
    named: tuple[tuple[str, str], ...] = ()  # (run, description) of the edits that it is about

    @property
    def line(self) -> str:
        return f"mode: {self.name}" + (f" ({self.why})" if self.why else "")

    @property
    def runs(self) -> list[str]:
        return [run for run, _ in self.named]


def mode_of(tried: Tried) -> Mode:
    """Return the mode after the experiments of a board.

    After STALL experiments without a keep, TURNS turns ask for a combination; after as many again, for an
    ablation, and so on in turn. One turn after every ABLATION_EVERY experiments asks for an ablation too.
    """
    stalls, turn = divmod(tried.stalled, STALL)
    if stalls and turn < TURNS:
        why = f"{tried.stalled} experiments in a row were not kept"
        misses = promising(tried)
        if len(misses) >= FEWEST_MISSES and (stalls % 2 == 1 or not removable(tried)):
            return Mode("combine", why, named(misses))
        if removable(tried):
            return Mode("ablate", why, named(weakest(tried)))
    number = len(tried.decided)
    if number and number % ABLATION_EVERY == 0 and len(removable(tried)) >= FEWEST_KEPT:
        return Mode("ablate", f"after every {ABLATION_EVERY} experiments", named(weakest(tried)))
    return Mode()


def promising(tried: Tried) -> list[Experiment]:
    """Return the near misses to combine: those that are expected to gain, else the two that may."""
    misses = [one for one in tried.near_misses if one.standing.p_better >= MAYBE]
    gains = [one for one in misses if one.standing.effect < 0]
    return misses[:FEWEST_MISSES] if len(gains) < FEWEST_MISSES else gains[:COMBINED]


def removable(tried: Tried) -> list[Experiment]:
    """Return the edits that the current trainer consists of."""
    return [one for one in tried.kept if one.is_edit and one.row.source in tried.stack]


def weakest(tried: Tried) -> list[Experiment]:
    """Return the edits of the current trainer that say least for themselves, the weakest first."""
    return sorted(removable(tried), key=lambda one: one.standing.p_better)[:WEAKEST]


def named(experiments: Sequence[Experiment]) -> tuple[tuple[str, str], ...]:
    return tuple((one.row.run, one.row.description) for one in experiments)
