"""The morning report: a page that stands alone, and its figures."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict

import matplotlib
import pytest
from test_ledger import ORIGINAL

from backends.protocol import Log
from launcher.board import gather
from launcher.ledger import Ledger, Row
from launcher.report import (
    MAX_CURVES,
    agents_of,
    choose_curves,
    collect_series,
    running_best,
    running_best_of,
    value_limits,
    write_report,
)
from launcher.runs import run_dir
from prepare import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
CHROMIUM_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def add_run(house, number, **values):
    """Add a run to the ledger of the house."""
    defaults = {
        "run": f"20260101-0000{number:02}-abcd",
        "val_stderr": 0.01,
        "rules": 1,
        "budget": 300.0,
        "track": "pysource",
        "platform": "cpu",
        "device": "AMD EPYC, 2 cores",
        "fingerprint": "f" * 16,
        "val_tokens": 524288,
        "time": f"2026-01-01T{number:02}:00:00Z",
        "source": f"s{number}",
        "description": f"idea {number}: <b>bold</b> & long " + "x" * 30,
        "tokens_per_second": 12000.0,
        "mfu_percent": 50.0,
    }
    row = Row(**{**defaults, **values})
    Ledger(house / "results.tsv").append(row)
    return row


def add_folder(row, number):
    """Add the folder of a run: its trainer and its loss curve."""
    folder = run_dir(row.run)
    folder.path.mkdir(parents=True)
    folder.record.write_text(json.dumps({"trainer": "train_cuda.py"}))
    (folder.path / "train_cuda.py").write_text(f"MATRIX_LR = 0.0{number + 1}\nDEPTH = 4\n")
    with open(folder.events, "w") as f:
        for at in range(1, 300, 10):
            loss = 7 - at / 60 - number / 50
            event = Log(
                step=at, loss=loss, smooth=loss, tokens=at * 12000, elapsed=at, tokens_per_s=12000, mfu=50
            )
            f.write(json.dumps({"at": at + 5, **asdict(event)}) + "\n")


def make_night(house, count=24):
    """Make a ledger and runs/ as a night leaves them. Returns the path of the ledger."""
    best = 1.6
    for i in range(count):
        bpb = best - 0.02 if i % 4 == 0 else best + 0.01 * (i % 3)
        if i == 7:
            row = add_run(house, i, status="crash", reason="boom")
        else:
            row = add_run(house, i, val_bpb=bpb, status="keep" if bpb < best else "discard")
        best = min(best, bpb)
        add_folder(row, i)
    return house / "results.tsv"


# --- The page -----------------------------------------------------------------------------------------------


def test_the_page_stands_alone(house):
    page, picture = write_report([make_night(house)], house / "report")
    assert (page, picture) == (house / "report" / "report.html", house / "report" / "report.png")
    text = page.read_text()
    assert not re.search(r"(src|href)=[\"']?https?://", text) and "<script" not in text
    assert text.count("<svg") == 2 and "&lt;b&gt;bold" in text and "<b>bold" not in text
    assert "23 scored experiments, 6 of them set a new best" in text and "1 rows are not ranked" in text
    assert "crash: boom" in text and "prefers-color-scheme: dark" in text
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 20_000


def test_the_same_ledger_gives_the_same_page(house):
    ledger = make_night(house, count=3)
    first, _ = write_report([ledger], house / "one")
    second, _ = write_report([ledger], house / "two")

    def undated(page):
        return re.sub(r"<dc:date>.*?</dc:date>", "", page.read_text())

    assert undated(first) == undated(second)


def test_the_originals_ledger_is_plotted(house):
    old = house / "old.tsv"
    old.write_text(ORIGINAL + "c3d4e5f\t0.990000\t44.1\tkeep\tsmaller batch\n")
    page, _ = write_report([make_night(house), old], house / "report")
    text = page.read_text()
    assert "old.tsv (from another tool: its rules are unknown): 2 scored experiments" in text
    assert "smaller batch" in text and text.count("<svg") == 3


def test_a_description_with_dollar_signs_is_no_formula(house):
    row = add_run(house, 1, status="keep", val_bpb=1.5, description=r"costs $5 and $\nothing $ {more}")
    add_folder(row, 1)
    page, _ = write_report([house / "results.tsv"], house / "report")
    assert r"costs $5 and $\nothing $ {more}" in page.read_text()


def test_devices_are_compared(house):
    add_run(house, 1, status="keep", val_bpb=1.5)
    add_run(house, 2, status="keep", val_bpb=1.4, device="Apple M4 Max")
    page, _ = write_report([house / "results.tsv"], house / "report")
    assert "across devices" in page.read_text() and page.read_text().count("<svg") == 2


def test_matplotlib_is_left_as_it_was(house):
    before = dict(matplotlib.rcParams)
    write_report([make_night(house, count=2)], house / "report")
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_report_says_what_to_do(house):
    with pytest.raises(UserError, match="no scored experiment to report: autoresearch run"):
        write_report([house / "results.tsv"], house / "report")
    with pytest.raises(UserError, match="no run 'nope'") as raised:
        write_report([make_night(house)], house / "report", runs=["nope"])
    assert raised.value.code == 2 and not (house / "report").exists()


# --- What is drawn ------------------------------------------------------------------------------------------


def test_the_running_best_steps_down():
    scores = [(1.7, "discard"), (1.5, "keep"), (1.6, "discard"), (1.4, "keep"), (1.3, "discard")]
    rows = [Row(val_bpb=bpb, status=status) for bpb, status in scores]
    assert running_best(rows) == ([None, 1.5, 1.5, 1.4, 1.4], [1, 3])
    assert running_best([]) == ([], [])


def test_a_failure_far_above_does_not_flatten_the_rest():
    rows = [Row(val_bpb=1.5 - i / 100) for i in range(20)] + [Row(val_bpb=9.0)]
    low, high = value_limits(rows, falls=[0])
    assert 1.2 < low < 1.31 and 1.5 < high < 1.8


def test_curves_of_the_best_runs_or_of_those_named(house):
    boards = gather([make_night(house, count=12)])
    series = collect_series(boards)
    best = choose_curves(series, boards.unranked, [])
    scores = [curve.row.val_bpb for curve in best]
    assert (
        len(best) == MAX_CURVES and scores == sorted(scores) and best[0].points[0] == (1, 7 - 1 / 60 - 8 / 50)
    )
    crashed = "20260101-000007-abcd"
    [named] = choose_curves(series, boards.unranked, [crashed])
    assert named.row.run == crashed
    shutil.rmtree(run_dir(best[0].row.run).path)  # as of a run of another machine
    assert choose_curves(series, boards.unranked, [])[0].row == best[1].row


# --- In a browser -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1200, 400])
def test_it_renders_in_a_real_browser(house, width):
    page, _ = write_report([make_night(house)], house / "report")
    shot = house / f"shot{width}.png"

    def browse(*options):
        command = [
            CHROMIUM,
            *CHROMIUM_OPTIONS,
            f"--user-data-dir={house / 'profile'}",
            f"--window-size={width},2000",
            *options,
            page.as_uri(),
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=90).stdout

    browse(f"--screenshot={shot}")
    from PIL import Image

    image = Image.open(shot).convert("RGB")
    colors = {color for _, color in image.getcolors(1 << 24)}
    assert image.width == width and len(colors) > 50  # something was drawn, in colour
    assert any(g > r + 40 and g > b + 20 for r, g, b in colors), "the running best is not there"
    dom = browse("--dump-dom")
    assert "<svg" in dom and "idea 8" in dom


def test_agents_are_drawn_against_each_other_by_the_number_of_their_experiments(house):
    agents = ["", "builtin", "claude", "builtin", "claude", "claude"]
    values = [1.5, 1.45, 1.4, 1.44, 1.6, 1.3]
    for number, (agent, value) in enumerate(zip(agents, values, strict=True)):
        status = "keep" if value != 1.6 else "discard"
        add_run(house, number, agent=agent, val_bpb=value, status=status)
    [series] = collect_series(gather([house / "results.tsv"]))
    assert agents_of(series.rows) == ["builtin", "claude"]
    assert running_best_of(series.rows, "builtin") == ([1, 2], [1.45, 1.44])
    assert running_best_of(series.rows, "claude") == ([1, 2, 3], [1.4, 1.4, 1.3])
    page, _ = write_report([house / "results.tsv"], house / "report")
    assert "agents against each other" in page.read_text()


def test_one_agent_has_no_opponent_to_be_drawn_against(house):
    add_run(house, 1, agent="builtin", val_bpb=1.5, status="keep")
    page, _ = write_report([house / "results.tsv"], house / "report")
    assert "agents against each other" not in page.read_text()
