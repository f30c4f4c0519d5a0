"""
The page: one HTML file with everything in it. It can be read without script, which draws, sorts and filters.

Every text of a ledger, a log or an agent goes through `escape`. Should one be forgotten, the page's policy
lets no script run but its own two, whose hashes it names, and lets nothing be fetched from anywhere.
"""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any

from launcher.board import DeviceResult, format_cell
from launcher.report.cards import Cards, anchor, description, effect_text, facts_list, note
from launcher.report.charts import charts_json
from launcher.report.data import FailureGroup, Run, Series, finite
from launcher.report.figure import draw_svg
from launcher.report.report import Report
from launcher.report.text import clip, clock, duration, escape
from launcher.report.timeline import AGENT, HOUR, KINDS, MOST_HOURS, Lane, Piece, by_hour

ASSETS = Path(__file__).with_name("assets")
SHOWN_ROWS = 20  # of the table of runs, before the reader asks for more
EXAMPLES = 3  # failed runs of a group that are named
EXAMPLE_CHARS = 60
REASON_CHARS = 200
# Columns of the comparison of devices.
DEVICE_COLUMNS = (
    "track",
    "device",
    "platform",
    "runs",
    "baseline_val_bpb",
    "best_val_bpb",
    "gap_closed_percent",
    "tokens_M",
    "petaflops",
    "energy_kj",
)
TEXT_COLUMNS = {"track", "device", "platform"}
EXTRA_COLUMNS = {"platform", "runs", "tokens_M", "petaflops", "energy_kj"}  # left out on a phone

HOW_TO_READ = (
    "val_bpb of each run, lower is better. Green: kept, joined by what was built on. Grey: not kept; at the "
    "upper edge: above the figure; \u00d7: failed. The band is what was believed of the trainer that was "
    "built on, give or take its error."
)
ABOUT_EFFECTS = (
    "Effect on val_bpb as believed now, from all runs, with its error; the more green, the surer a gain. "
    "Without a belief it is the difference from the run kept before. "
    "\u00abtaken back\u00bb: not in the trainer that was built on at the end."
)
ABOUT_GAP = (
    "Each device has a baseline and a board of its own. Gap closed: how far its research came on the way "
    "from its own baseline to the best value of any device of that track. 100% is that best value, and a "
    "slow device may never come near it in five minutes."
)
ABOUT_CURVES = (
    "Smoothed training loss, nats a token. As a difference: below zero is lower than the best run was then."
)
ABOUT_ALL = (
    "val_bpb: bits per byte of held-out text, lower is better. Kept means probably better, and is taken back "
    "when later runs say so; only a claim may be told others. Written by autoresearch report; the figures "
    "are drawn by uPlot (MIT license)."
)


# ---------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------


def build_page(report: Report, version: str = "") -> bytes:
    """Return the page. version: of what it tells, where a server says when there is a newer one."""
    return fill_template(report.headline.large, "\n".join(sections(report)), charts_json(report), version)


def build_waiting_page(reason: str, version: str) -> bytes:
    """Return the page of a server that has nothing to tell yet; the page asks on, and becomes the report."""
    body = f'<h1>Nothing to tell yet</h1><p>{escape(reason)}</p><p id="now" hidden></p>'
    return fill_template("nothing yet", body, "null", version)


def fill_template(title: str, body: str, data: str, version: str) -> bytes:
    """Return a page. data: for the script, as JSON; "null" where it has nothing to draw."""
    library = asset("uPlot.iife.min.js")
    script = asset("page.js")
    text = Template(asset("page.html")).substitute(
        policy=policy_of(library, script),
        version=escape(version),
        title=f"{escape(title)} - autoresearch",
        styles="\n".join([asset("uPlot.min.css"), asset("page.css")]),
        body=body,
        data=data,
        library=library,
        script=script,
    )
    return text.encode("utf-8", "replace")


def asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def policy_of(*scripts: str) -> str:
    """Return the page's Content-Security-Policy: no script but these, and nothing from anywhere else."""
    hashes = " ".join(f"'sha256-{digest(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )


def digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# ---------------------------------------------------------------------------
# The sections, in their order
# ---------------------------------------------------------------------------


def sections(report: Report) -> Iterator[str]:
    """Yield the parts of the page."""
    cards = Cards(report)
    yield part("headline", headline(report), "header")
    yield '<p id="now" hidden></p>'
    for number, series in enumerate(report.series):
        yield f"<h2>{escape(series.title)}</h2>{note(series.detail)}"
        yield f'<div class="needs-script" data-progress="{number}"></div>'
        yield part(f"figure-{number}", draw_svg(series), "figure")
        if number == 0:
            yield note(HOW_TO_READ)
    yield part("worked", worked(report, cards))
    yield part("nearly", nearly(report, cards))
    yield part("failed", failures(report.failures))
    yield part("night", night(report))
    yield f'<section id="curves" class="needs-script"><h2>Loss curves</h2>{note(ABOUT_CURVES)}</section>'
    yield all_runs(report, cards)
    if report.devices:
        yield part("devices", devices(report.devices))
    if report.gains:
        yield lines_place("gains", "Gain over time")
    for number, (title, _) in enumerate(report.agents):
        yield lines_place(f"agents-{number}", f"Agents against each other: {title}")
    yield part(
        "made", f"<h2>How it was made</h2>{facts_list(report.made.items())}{note(ABOUT_ALL)}", "footer"
    )


def part(name: str, content: str, tag: str = "section") -> str:
    """Return a part of the page that the live page replaces where it differs."""
    return f'<{tag} id="{name}" data-part="{name}">{content}</{tag}>'


def lines_place(name: str, title: str) -> str:
    """Return the place of a chart of lines, which the script draws."""
    return f'<div class="needs-script" data-lines="{name}"><h3>{escape(title)}</h3></div>'


def headline(report: Report) -> str:
    """Return the claim or what is believed, and the counts."""
    head = report.headline
    kind = ' class="claim"' if head.is_claim else ""
    lines = "".join(f"<p>{escape(line)}</p>" for line in head.lines)
    counts = "".join(f'<p class="soft">{escape(line)}</p>' for line in report.counts)
    return f"<h1{kind}>{escape(head.large)}</h1>{lines}{counts}"


def worked(report: Report, cards: Cards) -> str:
    """Return the kept edits of each series with their effects."""
    parts = [f"<h2>What worked</h2>{note(ABOUT_EFFECTS)}"]
    for series in report.series:
        kept = series.kept
        parts.append(heading_of(series, report))
        parts.append(cards.listing(series, kept) if kept else note("No edit was kept yet."))
    return "".join(parts)


def nearly(report: Report, cards: Cards) -> str:
    """Return the discarded edits that may well be gains."""
    lists = []
    for series in report.series:
        missed = series.near_misses
        if missed:
            lists.append(heading_of(series, report) + cards.listing(series, missed))
    return f"<h2>Nearly</h2>{''.join(lists) or note('No edit was discarded yet.')}"


def heading_of(series: Series, report: Report) -> str:
    return f"<h3>{escape(series.title)}</h3>" if len(report.series) > 1 else ""


def failures(groups: Sequence[FailureGroup]) -> str:
    """Return what failed, by reason."""
    if not groups:
        return f"<h2>What failed</h2>{note('Nothing.')}"
    head = '<tr><th>runs<th class="text">how<th class="text">reason<th class="text extra">what was tried'
    lines = []
    for group in groups:
        ideas = list(dict.fromkeys(clip(row.description, EXAMPLE_CHARS) for row in group.rows))
        more = f" and {len(ideas) - EXAMPLES} more" if len(ideas) > EXAMPLES else ""
        lines.append(
            f'<tr><td>{len(group.rows)}<td class="text">{escape(group.status)}'
            f'<td class="text wide">{escape(clip(group.reason, REASON_CHARS))}'
            f'<td class="text wide extra">{escape("; ".join(ideas[:EXAMPLES]) + more)}'
        )
    return f"<h2>What failed</h2>{table(head, lines)}"


# ---------------------------------------------------------------------------
# The night
# ---------------------------------------------------------------------------


def night(report: Report) -> str:
    """Return the time line: an hour a line, for each device."""
    if not report.lanes:
        return f"<h2>The night</h2>{note('How long the runs took is not on record.')}"
    zone = f"UTC{report.offset / HOUR:+g}" if report.offset else "UTC"
    about = (
        f"An hour a line, times in {zone}; the upper strip is the agent, the lower one the device. "
        "Start-up stands for scoring too where a run's folder is not here."
    )
    lanes = "".join(
        f"<h3>{escape(lane.device)}</h3>{legend(lane)}{hours(lane, report.offset)}" for lane in report.lanes
    )
    return f"<h2>The night</h2>{note(about)}{lanes}"


def legend(lane: Lane) -> str:
    """Return what the colours of a time line mean, with the time that each took."""
    entries = []
    for kind in KINDS:
        seconds = lane.seconds(kind)
        if seconds:
            box = f'<svg viewBox="0 0 1 1"><rect class="{css(kind)}" width="1" height="1"/></svg>'
            entries.append(f"<span>{box}{kind} {duration(seconds)}</span>")
    return f'<div class="legend">{"".join(entries)}</div>'


def hours(lane: Lane, offset: float) -> str:
    """Return the newest hours of a lane in which something was done."""
    device = by_hour(lane.spans, offset)
    agent = by_hour(lane.agent, offset)
    numbers = sorted(device.keys() | agent.keys())
    left_out = len(numbers) - MOST_HOURS
    lines = [note(f"{left_out} earlier hours are left out.")] if left_out > 0 else []
    day = ""
    for number in numbers[-MOST_HOURS:]:
        moment = datetime.fromtimestamp(number * HOUR, UTC)
        if day != f"{moment:%b %d}":
            day = f"{moment:%b %d}"
            lines.append(f'<div class="hour"><span>{day}</span></div>')
        drawn = "".join(
            rectangle(piece, offset) for piece in [*agent.get(number, []), *device.get(number, [])]
        )
        svg = f'<svg viewBox="0 0 3600 20" preserveAspectRatio="none">{drawn}</svg>'
        lines.append(f'<div class="hour"><span>{moment:%H:%M}</span>{svg}</div>')
    return "".join(lines)


def rectangle(piece: Piece, offset: float) -> str:
    """Return a stretch of an hour; its title says what it is."""
    span = piece.span
    top, height = (0, 6) if span.kind == AGENT else (7, 13)
    begun = clock(span.start, offset, "%H:%M:%S")
    title = f"{span.kind} {duration(span.seconds)}, {begun}: {clip(span.text, EXAMPLE_CHARS)}"
    link = f' data-run="{escape(span.run)}"' if span.run else ""
    width = max(piece.end - piece.start, 3)
    place = f'x="{piece.start:.0f}" y="{top}" width="{width:.0f}" height="{height}"'
    return f'<rect class="{css(span.kind)}" {place}{link}><title>{escape(title)}</title></rect>'


def css(kind: str) -> str:
    """Return the class of a kind of span."""
    return kind.replace(" ", "-")


# ---------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------


def all_runs(report: Report, cards: Cards) -> str:
    """Return the table of every run, newest first, and the runs that have no place further up."""
    several = len({series.device for series in report.series}) > 1
    # Title, classes, and how the column is sorted: as text or as numbers.
    columns = [
        ("run", "text", "t"),
        ("val_bpb", "", "n"),
        ("status", "text", "t"),
        ("what was changed", "text", "t"),
        ("effect", "extra", "n"),
        ("P(better)", "extra", "n"),
        ("tokens/s", "extra", "n"),
        ("begun", "extra", "n"),
    ]
    if several:
        columns.append(("device", "text extra", "t"))
    head = "".join(f'<th class="{style}" data-sort="{kind}">{name}' for name, style, kind in columns)
    pairs = [(run, series) for series in report.series for run in series.runs]
    pairs.sort(key=lambda pair: pair[0].start or 0.0, reverse=True)
    lines = "".join(table_row(run, series, several, report.offset) for run, series in pairs)
    left_out = note(f"{report.left_out} earlier runs have no room here.") if report.left_out else ""
    return (
        '<section id="runs"><h2>Every run</h2><div class="scroll">'
        f'<table id="run-table" data-shown="{SHOWN_ROWS}"><thead><tr>{head}</thead>'
        f'<tbody id="rows" data-part="rows">{lines}</tbody></table></div>{left_out}'
        f"{part('others', cards.others())}</section>"
    )


def table_row(run: Run, series: Series, several: bool, offset: float) -> str:
    """Return the row of a run. data-v: what its column is sorted by, where that is not the text."""
    row = run.row
    digits = series.decimals
    effect = run.effect if run.has_value else None
    value = f"{row.val_bpb:.{digits}f}" if run.has_value else "-"
    chance = f"{effect.p_better:.2f}" if effect and effect.p_better is not None else "-"
    fast = f"{row.tokens_per_second:,.0f}" if finite(row.tokens_per_second) else "-"
    cells = [
        f'<td class="text"><a class="run-id" href="#{anchor(run)}">{escape(run.name)}</a>',
        f"<td>{value}",
        f'<td class="text">{escape(run.status)}',
        f'<td class="text wide">{description(run)}',
        f'<td class="extra" data-v="{effect.value}">{effect_text(effect, digits)}'
        if effect
        else '<td class="extra">-',
        f'<td class="extra">{chance}',
        f'<td class="extra">{fast}',
        f'<td class="extra" data-v="{run.start or 0:.0f}">{clock(run.start, offset)}',
    ]
    if several:
        cells.append(f'<td class="text extra short">{escape(series.device)}')
    return f'<tr class="{run.kind}" data-run="{escape(run.id)}">{"".join(cells)}\n'


def devices(lines: Sequence[DeviceResult]) -> str:
    """Return the comparison of devices, and what its columns mean."""
    styles = {name: column_class(name) for name in DEVICE_COLUMNS}
    head = "".join(f"<th{style}>{escape(name.replace('_', ' '))}" for name, style in styles.items())
    body = []
    for line in lines:
        cells = (f"<td{style}>{escape(device_cell(name, line))}" for name, style in styles.items())
        body.append(f"<tr>{''.join(cells)}")
    return f"<h2>Devices</h2>{table(f'<tr>{head}', body)}{note(ABOUT_GAP)}"


def device_cell(name: str, line: DeviceResult) -> str:
    value: Any = getattr(line, name)
    return f"{value:.4f}" if name.endswith("val_bpb") else format_cell(name, value or None)


def column_class(name: str) -> str:
    text = "text" if name in TEXT_COLUMNS else ""
    extra = " extra" if name in EXTRA_COLUMNS else ""
    return f' class="{text}{extra}"'


def table(head: str, lines: Iterable[str]) -> str:
    body = "".join(lines)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
