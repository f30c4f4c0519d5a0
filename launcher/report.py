"""
`autoresearch report`: the night on a page. One HTML file that needs no network, and a PNG of its figures.

Ledgers -> a series of runs for each board -> figures -> the page.
"""

import html
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean
from string import Template
from typing import TYPE_CHECKING, NamedTuple

from launcher.board import (
    Boards,
    TableLine,
    compare_devices,
    format_cell,
    gather,
    list_ranked,
    list_unranked,
)
from launcher.ledger import Row
from launcher.runs import loss_curve
from prepare import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LABELS = 14  # of the newest kept runs in a figure
MAX_CURVES = 6
LABEL_CHARS = 42
TITLE_CHARS = 110
PNG_DPI = 130

# Figures are drawn in these colours. CSS variables replace them in the page: it follows light and dark.
INK = "#112233"
PAPER = "#fefdfc"
FAINT = "#a1a2a3"
KEPT = "#0b7a4b"
TRIED = "#8a8b8c"
LINE = "#b5541c"
VARIABLES = {
    INK: "--ink",
    PAPER: "--paper",
    FAINT: "--faint",
    KEPT: "--kept",
    TRIED: "--tried",
    LINE: "--line",
}
CURVE_COLORS = (KEPT, LINE, "#3b6fb6", "#8d4fb0", "#b8860b", "#c2417c")

FIGURE_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be selected, and the page's font draws it
    "svg.hashsalt": "autoresearch",  # the same figure gives the same bytes
    "text.parse_math": False,  # a description may hold dollar signs
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
}

PAGE = Template("""\
<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>autoresearch report</title>
<style>
:root {
  --ink:#1b2126; --paper:#fdfcfa; --faint:#d4d4d0; --kept:#0b7a4b; --tried:#9a9a96; --line:#b5541c;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root { --ink:#e8e6e1; --paper:#15181b; --faint:#3a3f44; --kept:#4cc38a; --tried:#777b80; --line:#f0975a; }
}
body {
  background:var(--paper); color:var(--ink); font:16px/1.5 system-ui, sans-serif;
  max-width:62rem; margin:0 auto; padding:1rem;
}
h1 { font-size:1.5rem; }
h2 { font-size:1.15rem; margin-top:2rem; }
figure { margin:1rem 0; overflow-x:auto; }
svg { width:100%; height:auto; min-width:30rem; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; font-size:.85rem; white-space:nowrap; }
th, td { text-align:right; padding:.2rem .6rem; border-bottom:1px solid var(--faint); }
th.text, td.text { text-align:left; white-space:normal; min-width:14rem; }
tr.keep td { color:var(--kept); }
footer { margin-top:2rem; color:var(--tried); font-size:.85rem; }
</style>
</head>
<body>
<h1>autoresearch</h1>
$body
<footer>val_bpb: bits per byte of held-out text, lower is better.</footer>
</body>
</html>
""")

# Columns of the page's tables.
BOARD_COLUMNS = (
    "rank",
    "val_bpb",
    "description",
    "gain",
    "stderr",
    "verified",
    "tokens_per_second",
    "mfu_percent",
    "memory_gb",
    "num_params_M",
    "run",
)
UNRANKED_COLUMNS = ("val_bpb", "description", "why", "run")
TEXT_COLUMNS = {"description", "why"}


def write_report(
    paths: Sequence[Path],
    folder: Path,
    track: str | None = None,
    platform: str | None = None,
    runs: Sequence[str] = (),
) -> list[Path]:
    """Write report.html and report.png, and return their paths.

    Args:
        paths: the ledgers.
        folder: where to write; it is made when it is absent.
        track: report this track only.
        platform: report this platform only.
        runs: ids of the runs whose loss curves are drawn; the best ones when empty.

    Raises:
        UserError: the ledgers hold no scored run, or not the runs named.
    """
    import matplotlib

    boards = gather(paths, track, platform)
    series = collect_series(boards)
    if not series:
        raise UserError("no scored experiment to report: autoresearch run")
    curves = choose_curves(series, boards.unranked, runs)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    picture = folder / "report.png"
    with matplotlib.rc_context(FIGURE_STYLE):
        page.write_text(build_page(boards, series, draw_svgs(series, curves)), encoding="utf-8")
        draw_sheet(series, curves).savefig(picture, dpi=PNG_DPI)
    return [page, picture]


# ---------------------------------------------------------------------------
# Boards -> what is drawn
# ---------------------------------------------------------------------------


class Series(NamedTuple):
    """The runs of one figure, in the order in which they were made."""

    title: str
    rows: list[Row]


class Curve(NamedTuple):
    """The loss curve of a run: (seconds of training, smoothed loss in nats)."""

    row: Row
    points: list[tuple[float, float]]


def collect_series(boards: Boards) -> list[Series]:
    """Return a series for each board, then one for each ledger that another tool wrote."""
    series = []
    for board in boards.boards:
        series.append(Series(board.title, sorted(board.rows, key=lambda row: (row.time, row.run))))
    foreign: dict[str, list[Row]] = {}
    for row in boards.unranked:
        if not row.rules and row.val_bpb > 0:
            foreign.setdefault(row.ledger, []).append(row)
    for ledger, rows in foreign.items():
        series.append(Series(f"{ledger} (from another tool: its rules are unknown)", rows))
    return series


def choose_curves(series: Iterable[Series], unranked: Iterable[Row], runs: Sequence[str]) -> list[Curve]:
    """Return the loss curves of the runs named, or of the best ones. At most MAX_CURVES.

    Raises:
        UserError: the ledgers hold no run of that name.
    """
    drawn = [row for each in series for row in each.rows]
    by_id = {row.run: row for row in [*drawn, *unranked] if row.run}
    for run in runs:
        if run not in by_id:
            raise UserError(f"the ledger has no run '{run}'", 2)
    if runs:
        chosen = [by_id[run] for run in runs]
    else:
        chosen = sorted((row for row in drawn if row.run), key=lambda row: row.val_bpb)
    return list(islice(read_curves(chosen), MAX_CURVES))


def read_curves(rows: Iterable[Row]) -> Iterator[Curve]:
    """Yield the loss curves that are on record here. Runs of other machines have none."""
    for row in rows:
        points = loss_curve(row.run)
        if points:
            yield Curve(row, points)


def agents_of(rows: Iterable[Row]) -> list[str]:
    """Return the agents that made edits, in the order of their first run; a person is none of them."""
    return list(dict.fromkeys(row.agent for row in rows if row.agent))


def running_best_of(rows: Sequence[Row], agent: str) -> tuple[list[int], list[float]]:
    """Return (number of the agent's experiments, lowest val_bpb that it kept so far), from its first keep."""
    best, _ = running_best(row for row in rows if row.agent == agent)
    known = [(number, value) for number, value in enumerate(best, 1) if value is not None]
    return [number for number, _ in known], [value for _, value in known]


def running_best(rows: Iterable[Row]) -> tuple[list[float | None], list[int]]:
    """Return the best val_bpb so far after each row, None before the first, and the indices at which it fell.

    Only rows of status "keep" count.
    """
    best: float | None = None
    so_far = []
    falls = []
    for i, row in enumerate(rows):
        if row.status == "keep" and (best is None or row.val_bpb < best):
            best = row.val_bpb
            falls.append(i)
        so_far.append(best)
    return so_far, falls


# ---------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------


def draw_svgs(series: Iterable[Series], curves: Sequence[Curve]) -> list[str]:
    """Return the figures of the page as SVG: one for each series, one for the loss curves."""
    from matplotlib.figure import Figure

    svgs = []
    for each in series:
        figure = Figure(figsize=(10, 4.6))
        draw_progress(figure.subplots(), each)
        svgs.append(to_svg(figure))
        if len(agents_of(each.rows)) > 1:
            figure = Figure(figsize=(10, 3.2))
            draw_agents(figure.subplots(), each)
            svgs.append(to_svg(figure))
    if curves:
        figure = Figure(figsize=(10, 4))
        draw_curves(figure.subplots(), curves)
        svgs.append(to_svg(figure))
    return svgs


def draw_sheet(series: Sequence[Series], curves: Sequence[Curve]) -> "Figure":
    """Return all figures below each other on one sheet."""
    from matplotlib.figure import Figure

    count = len(series) + bool(curves)
    figure = Figure(figsize=(11, 5 * count), layout="tight")
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    for i, each in enumerate(series):
        draw_progress(axes[i], each)
    if curves:
        draw_curves(axes[-1], curves)
    return figure


def draw_progress(axes: "Axes", series: Series) -> None:
    """Draw each run as a dot and the running best as a line that steps down; label what was kept."""
    rows = series.rows
    so_far, falls = running_best(rows)
    kept = set(falls)
    tried = [i for i in range(len(rows)) if i not in kept]
    if falls:
        first = falls[0]
        numbers = range(first + 1, len(rows) + 1)
        axes.step(numbers, so_far[first:], where="post", color=KEPT, linewidth=1.2)
    draw_dots(axes, rows, tried, color=TRIED, size=14, label="tried")
    draw_dots(axes, rows, falls, color=KEPT, size=28, label="kept")
    for i in falls[-MAX_LABELS:]:
        axes.annotate(
            rows[i].description[:LABEL_CHARS],
            (i + 1, rows[i].val_bpb),
            xytext=(5, 6),
            textcoords="offset points",
            fontsize=8,
            rotation=20,
            color=INK,
        )
    axes.set_ylim(*value_limits(rows, falls))
    axes.set(title=series.title[:TITLE_CHARS], xlabel="experiment", ylabel="val_bpb")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)


def draw_agents(axes: "Axes", series: Series) -> None:
    """Draw the running best of each agent against the number of its experiments."""
    for color, agent in zip(CURVE_COLORS, agents_of(series.rows), strict=False):
        numbers, so_far = running_best_of(series.rows, agent)
        axes.step(numbers, so_far, where="post", color=color, linewidth=1.2, label=agent)
    axes.set(title="agents against each other", xlabel="experiment of the agent", ylabel="best val_bpb kept")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)


def draw_dots(
    axes: "Axes", rows: Sequence[Row], indices: Sequence[int], color: str, size: float, label: str
) -> None:
    """Draw the val_bpb of some rows. The first row is experiment 1."""
    numbers = [i + 1 for i in indices]
    values = [rows[i].val_bpb for i in indices]
    axes.scatter(numbers, values, s=size, color=color, label=label, zorder=2)


def value_limits(rows: Sequence[Row], falls: Sequence[int]) -> tuple[float, float]:
    """Return the range of val_bpb to show. Failures far above it do not flatten the rest."""
    values = sorted(row.val_bpb for row in rows)
    low = values[0]
    high = values[max(0, int(0.9 * len(values)) - 1)]
    margin = 0.25 * (high - low or 0.01)
    top = max(high, rows[falls[0]].val_bpb) if falls else high
    return low - margin, top + 2 * margin


def draw_curves(axes: "Axes", curves: Iterable[Curve]) -> None:
    """Draw the smoothed training loss against the training time."""
    for color, curve in zip(CURVE_COLORS, curves, strict=False):
        seconds = [at for at, _ in curve.points]
        losses = [loss for _, loss in curve.points]
        label = f"{curve.row.val_bpb:.4f} {curve.row.description[:LABEL_CHARS]}"
        axes.plot(seconds, losses, color=color, linewidth=1.2, label=label)
    axes.set(xlabel="seconds of training", ylabel="training loss (nats)", title="loss curves")
    axes.legend(frameon=False, fontsize=8)


def to_svg(figure: "Figure") -> str:
    """Return the figure as an <svg> element in the page's colours."""
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text


# ---------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------


def build_page(boards: Boards, series: Iterable[Series], svgs: Iterable[str]) -> str:
    """Return the HTML of the page: a summary, the figures, the tables."""
    parts = [f"<p>{html.escape(line)}</p>" for line in summarize(series, boards.unranked)]
    parts += [f"<figure>{svg}</figure>" for svg in svgs]
    for board in boards.boards:
        parts.append(html_table(board.title, list_ranked(board, boards.claims), BOARD_COLUMNS))
    if len(boards.boards) > 1:
        devices = compare_devices(boards.boards)
        parts.append(html_table("across devices", devices, devices[0]._fields))
    if boards.unranked:
        unranked = list_unranked(boards.unranked, boards.verifications)
        parts.append(html_table("not ranked", unranked, UNRANKED_COLUMNS))
    return PAGE.substitute(body="\n".join(parts))


def summarize(series: Iterable[Series], unranked: Sequence[Row]) -> list[str]:
    """Return the night in a few sentences: one paragraph for each series, one for what is not ranked."""
    paragraphs = []
    for title, rows in series:
        _, falls = running_best(rows)
        first = rows[0].val_bpb
        best = min(rows, key=lambda row: row.val_bpb)
        lower = 100 * (first - best.val_bpb) / first
        text = (
            f"{title}: {len(rows)} scored experiments, {len(falls)} of them set a new best; "
            f"val_bpb from {first:.6f} to {best.val_bpb:.6f} ({lower:.2f}% lower) by “{best.description}”."
        )
        rates = [row.tokens_per_second for row in rows if row.tokens_per_second]
        if rates:
            text += f" {mean(rates):,.0f} tokens/s on average."
        paragraphs.append(text)
    if unranked:
        failed = [row for row in unranked if not row.scored]
        paragraphs.append(f"{len(unranked)} rows are not ranked, {len(failed)} of them failed.")
    return paragraphs


def html_table(title: str, lines: Iterable[TableLine], columns: Iterable[str]) -> str:
    """Return a heading and a table of the board's lines. What was kept has its class."""
    columns = tuple(columns)
    head = "".join(html_cell("th", name, name.replace("_", " ")) for name in columns)
    body = []
    for line in lines:
        cells = (html_cell("td", name, format_cell(name, getattr(line, name))) for name in columns)
        status = html.escape(getattr(line, "status", ""))
        body.append(f'<tr class="{status}">{"".join(cells)}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f"<h2>{html.escape(title)}</h2><div class=scroll>{table}</div>"


def html_cell(tag: str, column: str, text: str) -> str:
    """Return a cell; the long text columns have a class of their own."""
    kind = " class=text" if column in TEXT_COLUMNS else ""
    return f"<{tag}{kind}>{html.escape(text)}</{tag}>"
