"""
`autoresearch report` and `watch`: the night on a page.

    data      rows -> runs, series, effects, headline, counts, failures: pure functions
    files     what lies beside the ledgers: run folders, the loop's log
    timeline  when the agent thought, and what the devices did; the last night
    report    all of it gathered
    figure    the progress of a series, as the page's static picture and as the card
    cards     a run with all about it, folded
    charts    the numbers that the page's script draws
    page      the HTML file; page.html, page.css, page.js and uPlot are in assets/
    watch     the same page from a server on this machine, which updates itself

All of it reads; nothing of it is part of what a run executes.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.ledger import warn


def write_report(
    paths: Sequence[Path],
    folder: Path,
    track: str | None = None,
    platform: str | None = None,
    runs: Sequence[str] = (),
    complain: Callable[[str], None] = warn,
) -> list[Path]:
    """Write report.html and report.png, and return their paths. A reader never meets a half of them.

    Args:
        paths: the ledgers.
        folder: where to write; it is made when it is absent.
        track: report this track only.
        platform: report this platform only.
        runs: ids of the runs whose loss curves are drawn at first; the best and the last ones when empty.
        complain: gets a line about every row that cannot be read.

    Raises:
        UserError: the ledgers hold no scored run, or not the runs named.
        OSError: the folder cannot be written.
    """
    from launcher.report.figure import draw_card
    from launcher.report.page import build_page
    from launcher.report.report import make_report

    report = make_report(paths, track, platform, runs, complain)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    card = folder / "report.png"
    scratch = folder / f".report-{os.getpid()}.tmp"
    scratch.write_bytes(build_page(report))
    os.replace(scratch, page)
    counts = report.counts[0]
    draw_card(scratch, report.headline, counts.text, counts.title, report.series[0])
    os.replace(scratch, card)
    return [page, card]
