"""The figure of a series, drawn once: as SVG for the page without script, and as the card, to be shared."""

import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.report.data import Headline, Run, Series, value_limits
from launcher.report.text import clip, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CARD_PIXELS = (1200, 630)
DPI = 100
LABEL_CHARS = 46
MOST_LABELS = 60
LINE_CHARS = 400  # of a line of the card, before it is measured
MOST_LINES = 3  # under the headline of the card
LINE = 0.044  # the height of one of them, a share of the card's
SMALLEST = 0.75  # of its size, that a line of the card may have, before it is cut
GAP = 6  # pixels between a point and its label
LEADER_LINES = 6  # so many lines of text below its point a label may be
DOT = 5  # pixels from the middle of a dot to its edge, with its border

# Figures are drawn in these colours. CSS variables replace them in the page: it follows light and dark.
INK = "#1b2127"
PAPER = "#fdfcfb"
FAINT = "#d4d4d1"
SOFT = "#6b6f75"
KEPT = "#0b7a4c"
TRIED = "#9a9a97"
VARIABLES = {
    INK: "--ink",
    PAPER: "--paper",
    FAINT: "--faint",
    SOFT: "--soft",
    KEPT: "--kept",
    TRIED: "--tried",
}
STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be selected, and the page's font draws it
    "svg.hashsalt": "autoresearch",  # the same figure gives the same bytes
    "text.parse_math": False,  # a description may hold dollar signs
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
}


@contextmanager
def our_style() -> Iterator[None]:
    """Draw in our style inside, and leave matplotlib as it was."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a description may have characters that the font has not
        yield


# ---------------------------------------------------------------------------
# What is made
# ---------------------------------------------------------------------------


def draw_svg(series: Series) -> str:
    """Return the progress of a series as an <svg> element in the page's colours."""
    out = io.StringIO()
    with our_style():
        figure = new_figure(960, 420)
        axes = figure.add_axes((0.075, 0.115, 0.915, 0.86))
        draw_progress(axes, series)
        figure.savefig(out, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text


def draw_card(path: Path, headline: Headline, counts: str, when: str, series: Series) -> None:
    """Write the card of a night: headline, counts and progress, 1200 pixels wide and 630 high.

    counts: what was done. when: of which night that is, "" where it is of all runs
    """
    with our_style():
        figure = new_figure(*CARD_PIXELS)
        color = KEPT if headline.is_claim else INK
        write_fitting(figure, 0.925, headline.large, 25, color, weight="bold")
        y = 0.873
        for line in headline.lines[:MOST_LINES]:
            write_fitting(figure, y, line, 12, INK)
            y -= LINE
        write_fitting(figure, y, counts, 12, SOFT)
        if when:
            write_fitting(figure, 0.048, when, 9, SOFT)
        write_fitting(figure, 0.02, f"autoresearch: {series.title}; {series.detail}", 9, SOFT)
        bottom = 0.15
        draw_progress(figure.add_axes((0.07, bottom, 0.9, y - 0.035 - bottom)), series)
        figure.savefig(path, format="png")


def new_figure(width: int, height: int) -> "Figure":
    """Return a figure of so many pixels, on which text can be measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def write_fitting(
    figure: "Figure", y: float, text: str, size: float, color: str, weight: str = "normal"
) -> None:
    """Write a line at the height y, a share of the figure's. A long one is smaller, a longer one is cut."""
    left = 0.032
    room = (1 - 2 * left) * figure.bbox.width
    text = clip(plain(text), LINE_CHARS)
    least = SMALLEST * size
    while text_width(figure, text, size, weight) > room and size > least:
        size = max(least, size * room / text_width(figure, text, size, weight) - 0.1)
    while text_width(figure, text, size, weight) > room and len(text) > 4:
        share = room / text_width(figure, text, size, weight)
        text = clip(text, min(len(text) - 1, math.ceil(share * len(text))))
    figure.text(left, y, text, size=size, color=color, weight=weight)


def text_width(figure: "Figure", text: str, size: float, weight: str = "normal") -> float:
    """Return the width of a text in pixels."""
    from matplotlib.font_manager import FontProperties

    font = FontProperties(family=STYLE["font.family"], size=size, weight=weight)
    renderer = figure.canvas.get_renderer()
    return float(renderer.get_text_width_height_descent(text, font, ismath=False)[0])


# ---------------------------------------------------------------------------
# The progress of a series
# ---------------------------------------------------------------------------


def draw_progress(axes: "Axes", series: Series) -> None:
    """Draw each run as a dot, what is built on as a step line with its belief as a band, and names."""
    runs = series.scored
    low, high = value_limits([run.row.val_bpb for run in runs], series.baseline.row.val_bpb)
    axes.set_ylim(low, high)
    last = max(2, series.drawn[-1].number)
    axes.set_xlim(1 - 0.02 * last, last + 0.02 * last)
    axes.set(xlabel="run", ylabel="val_bpb, lower is better")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    draw_belief(axes, series.drawn)
    draw_steps(axes, series.drawn)
    kept = [run for run in runs if run.kind == "kept"]
    tried = [run for run in runs if run.kind != "kept"]
    inside = [run for run in tried if run.row.val_bpb <= high]
    above = [run for run in tried if run.row.val_bpb > high]
    draw_dots(axes, inside, TRIED, 14)
    draw_dots(axes, kept, KEPT, 34)
    edge = high - 0.015 * (high - low)
    axes.scatter(
        [run.number for run in above], [edge] * len(above), s=22, marker="^", color=TRIED, linewidths=0
    )
    failed = [run.number for run in series.drawn if run.kind == "failed"]
    foot = low + 0.02 * (high - low)
    axes.scatter(failed, [foot] * len(failed), s=16, marker="x", color=TRIED, linewidths=0.9)
    marks = [*((run.number, run.row.val_bpb) for run in runs), *((number, foot) for number in failed)]
    draw_labels(axes, kept, marks, runs)


def draw_belief(axes: "Axes", runs: Iterable[Run]) -> None:
    """Draw the belief about what is built on, as it was after each run: its mean, give or take its error."""
    known = [(run.number, run.belief) for run in runs if run.belief]
    numbers = [number for number, _ in known]
    lows = [belief.mean - belief.error for _, belief in known]
    highs = [belief.mean + belief.error for _, belief in known]
    axes.fill_between(numbers, lows, highs, step="post", color=KEPT, alpha=0.16, linewidth=0)


def draw_steps(axes: "Axes", runs: Iterable[Run]) -> None:
    """Draw the score of the trainer that is built on."""
    known = [run for run in runs if run.built_on is not None]
    numbers = [run.number for run in known]
    axes.step(numbers, [run.built_on or 0.0 for run in known], where="post", color=KEPT, linewidth=1.4)


def draw_dots(axes: "Axes", runs: Sequence[Run], color: str, size: float) -> None:
    numbers = [run.number for run in runs]
    values = [run.row.val_bpb for run in runs]
    axes.scatter(numbers, values, s=size, color=color, edgecolors=PAPER, linewidths=0.5, zorder=3)


def draw_labels(
    axes: "Axes", kept: Sequence[Run], marks: Sequence[tuple[float, float]], runs: Sequence[Run]
) -> None:
    """Name the kept runs whose names collide with nothing, those with the largest gains first.

    marks: what no name may cover, (number of the run, val_bpb)
    runs: those of the step line, which none may cover either
    """
    figure = axes.figure
    to_pixels = axes.transData.transform
    dots = [Box.around(to_pixels(mark), DOT) for mark in marks]
    frame = Box(*axes.bbox.extents)
    wanted = sorted(kept, key=lambda run: run.effect.value if run.effect else 0.0)[:MOST_LABELS]
    texts = [clip(plain(run.row.description), LABEL_CHARS) for run in wanted]
    points = [to_pixels((run.number, run.row.val_bpb)) for run in wanted]
    widths = [1.08 * text_width(figure, text, 8) for text in texts]  # the page's font may be wider
    steps = step_boxes(to_pixels, runs)
    to_data = axes.transData.inverted().transform
    for text, label in zip(texts, place_labels(points, widths, 13, [*dots, *steps], frame), strict=True):
        if label is None:
            continue
        left, bottom = to_data((label.box.left, label.box.bottom + 3))
        axes.text(left, bottom, text, size=8, color=INK, clip_on=True)
        if label.leader:
            x, low = to_data((label.leader.left, label.leader.bottom))
            _, high = to_data((label.leader.left, label.leader.top))
            axes.vlines(x, low, high, color=FAINT, linewidth=0.8, zorder=1)


def step_boxes(to_pixels: Callable[[tuple[float, float]], Any], runs: Sequence[Run]) -> list["Box"]:
    """Return what the step line covers."""
    boxes = []
    for run, after in zip(runs, runs[1:], strict=False):
        if run.built_on is None or after.built_on is None:
            continue
        x, y = to_pixels((run.number, run.built_on))
        right, then = to_pixels((after.number, after.built_on))
        boxes.append(Box(x, y - 1, right, y + 1))
        boxes.append(Box(right - 1, min(y, then), right + 1, max(y, then)))
    return boxes


# ---------------------------------------------------------------------------
# Labels that do not collide
# ---------------------------------------------------------------------------


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, middle: tuple[float, float], half: float) -> "Box":
        x, y = middle
        return cls(x - half, y - half, x + half, y + half)

    def meets(self, other: "Box") -> bool:
        """Return whether two boxes overlap."""
        beside = self.right <= other.left or other.right <= self.left
        return not beside and self.bottom < other.top and other.bottom < self.top

    def lies_in(self, frame: "Box") -> bool:
        return (
            frame.left <= self.left
            and self.right <= frame.right
            and frame.bottom <= self.bottom
            and self.top <= frame.top
        )


class Label(NamedTuple):
    """Where a label goes, and the line from its point to it where it is not beside it."""

    box: Box
    leader: Box | None = None

    def parts(self) -> list[Box]:
        return [self.box, self.leader] if self.leader else [self.box]


def place_labels(
    points: Sequence[tuple[float, float]],
    widths: Sequence[float],
    height: float,
    taken: Sequence[Box],
    frame: Box,
) -> list[Label | None]:
    """Return where each label goes, None for one that has no room. Earlier labels come first.

    Args:
        points: what is named, in pixels.
        widths: of the labels.
        height: of each label.
        taken: what no label may cover.
        frame: in which all of a label must lie.
    """
    filled = list(taken)
    placed: list[Label | None] = []
    for (x, y), width in zip(points, widths, strict=True):
        found = None
        for label in candidates(x, y, width, height):
            free = not any(part.meets(other) for part in label.parts() for other in filled)
            if free and label.box.lies_in(frame):
                found = label
                filled += label.parts()
                break
        placed.append(found)
    return placed


def candidates(x: float, y: float, width: float, height: float) -> Iterator[Label]:
    """Yield the places of a label around its point, the best first; then those below it, on a leader."""
    for bottom in (y + GAP, y - GAP - height):
        yield Label(Box(x + GAP, bottom, x + GAP + width, bottom + height))
        yield Label(Box(x - GAP - width, bottom, x - GAP, bottom + height))
    middle = y - height / 2
    yield Label(Box(x + 2 * GAP, middle, x + 2 * GAP + width, middle + height))
    yield Label(Box(x - 2 * GAP - width, middle, x - 2 * GAP, middle + height))
    for step in range(1, LEADER_LINES + 1):
        bottom = y - 2 * DOT - (step + 1) * height
        leader = Box(x - 0.5, bottom, x + 0.5, y - DOT - 1)
        yield Label(Box(x - GAP - width, bottom, x - GAP, bottom + height), leader)
        yield Label(Box(x + GAP, bottom, x + GAP + width, bottom + height), leader)
