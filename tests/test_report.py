"""The morning report: a page that stands alone, and a card. In a browser: test_report_browser.py."""

import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import pytest
from conftest import row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_night import make_night
from PIL import Image
from test_ledger import ORIGINAL

from launcher import report as room
from launcher.ledger import COLUMNS, Ledger, Row, to_line
from launcher.report import write_report
from launcher.report.cards import Cards
from launcher.report.figure import Box, place_labels
from launcher.report.files import loop_log_path
from launcher.report.page import ASSETS, digest
from launcher.report.report import make_report
from launcher.report.text import UNWRITABLE
from launcher.runs import append_json_line, run_dir
from prepare import UserError

HOSTILE = "</script><img src=x onerror=alert(1)> \"quoted\" 'single' & $x$ <!-- \u202e \U0001f600"


@pytest.fixture
def night(house):
    """A small night of two machines. Yields the ledgers."""
    return make_night(house, runs=24, mac_runs=12, points=40)


def page_of(ledgers, folder, **options):
    page, _ = write_report(ledgers, folder, **options)
    return page.read_text(encoding="utf-8")


def data_of(page):
    """Return what the page gives to its script."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


class Structure(HTMLParser):
    """The tags of a page with their attributes, and its text outside scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.cdata_elem is None:  # neither script nor style
            self.text += data


# --- The page -----------------------------------------------------------------------------------------------


def test_the_page_stands_alone(night, house):
    page = page_of(night, house / "report")
    read = Structure(page)
    addresses = [attributes.get(name) for _, attributes in read.tags for name in ("src", "href")]
    assert not [address for address in addresses if address and not address.startswith(("#", "data:"))]
    assert "http://" not in re.sub(
        r"http://www\.w3\.org/\S+", "", page.replace(asset("uPlot.iife.min.js"), "")
    )
    policy = next(attributes["content"] for tag, attributes in read.tags if "content" in attributes and
                  attributes.get("http-equiv") == "Content-Security-Policy")  # fmt: skip
    assert policy.startswith("default-src 'none'") and f"'sha256-{digest(asset('page.js'))}'" in policy


def asset(name):
    return (ASSETS / name).read_text(encoding="utf-8")


def test_it_is_read_without_script(night, house):
    read = Structure(page_of(night, house / "report"))
    text = " ".join(read.text.split())
    headings = (
        "What worked",
        "Nearly",
        "What failed",
        "The night",
        "Every run",
        "Devices",
        "How it was made",
    )
    assert [heading for heading in headings if heading not in text] == []
    assert "bits per byte better than the baseline" in text and "fresh" not in text
    assert "NVIDIA H100 80GB HBM3" in text and "Apple M4 Max" in text and "gap closed" in text
    assert "agent tokens" in text and "kWh" in text and "RULES" in text and "5c1b8a53d948444b" in text
    rows = [attributes for tag, attributes in read.tags if tag == "tr" and "data-run" in attributes]
    assert len(rows) == 24 + 12 + 6  # and the pairs of the claim
    assert sum(tag == "figure" for tag, _ in read.tags) == 2
    assert any(tag == "rect" and attributes.get("class") == "training" for tag, attributes in read.tags)


def test_a_run_has_its_numbers_its_words_and_its_diff_once(night, house):
    page = page_of(night, house / "report")
    read = Structure(page)
    ids = [attributes["id"] for _, attributes in read.tags if attributes.get("id", "").startswith("run-2026")]
    assert len(ids) == len(set(ids)) == 42
    links = {attributes["href"] for tag, attributes in read.tags if tag == "a"}
    assert links == {"#" + each for each in ids}
    assert "<ins>+" in page and "<del>-" in page and "try it together with a longer warmdown" in page


def test_no_text_of_a_ledger_or_an_agent_is_markup(house):
    texts = (
        "description",
        "reason",
        "device",
        "platform",
        "track",
        "agent",
        "marks",
        "fingerprint",
        "harness",
    )
    hostile = {name: f"{HOSTILE} {name}" for name in texts}
    for number in range(3):
        each = row(run=f"r{number}", val_bpb=1.5 - number / 10, source=f"s{number}", parent=f"s{number - 1}")
        each.time = f"2026-01-01T0{number}:00:00Z"
        each.total_seconds = 400.0
        for name, text in hostile.items():
            setattr(each, name, text)
        Ledger(house / "results.tsv").append(each)
        folder = house / "runs" / each.run
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"trainer": "train.py"}))
        (folder / "train.py").write_text(f"# {HOSTILE} {number}\n\0\x1b[31m\n")
        (folder / "answer.json").write_text(
            json.dumps({"next": HOSTILE + "\ud800", "learned": "\x00" + HOSTILE})
        )
    log = house / "runs" / "loop" / "loop.jsonl"
    log.parent.mkdir()
    turn = {"time": "2026-01-01T01:00:00Z", "event": "turn", "agent": HOSTILE + "\udfff", "seconds": 60}
    done = {"time": "2026-01-01T01:10:00Z", "event": "experiment", "run": "r1"}
    log.write_text(json.dumps(turn) + "\n" + json.dumps(done) + "\n{torn")
    page = page_of([house / "results.tsv"], house / "report")
    read = Structure(page)
    assert [tag for tag, _ in read.tags].count("script") == 3 and "img" not in [tag for tag, _ in read.tags]
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert HOSTILE.split()[0] not in page.replace("</script>\n", "").split('id="data">')[0]
    assert not UNWRITABLE.search(page) and HOSTILE + " description" in read.text
    assert data_of(page)["series"][0]["name"][0].startswith(HOSTILE)


def test_the_same_ledger_gives_the_same_page(night, house):
    first, second = (page_of(night, house / name) for name in ("one", "two"))
    assert re.sub(r"<dt>written.*?</dd>", "", first) == re.sub(r"<dt>written.*?</dd>", "", second)


def test_a_night_of_200_runs_is_a_page_of_a_megabyte_and_a_half_at_most(house):
    page, _ = write_report(make_night(house, runs=200, mac_runs=0, points=60, claims=False), house / "report")
    assert page.stat().st_size < 1_500_000


# --- What may be absent -------------------------------------------------------------------------------------


def test_without_folders_and_log_the_rows_are_told(night, house):
    shutil.rmtree(house / "runs")
    page = page_of(night, house / "report")
    assert "No diff: the copies of the trainers are not here." in page and "agent tokens" not in page
    assert data_of(page)["curves"]["curves"] == {} and 'class="training"' in page


def test_the_originals_ledger_is_told_beside_ours(night, house):
    old = house / "old.tsv"
    old.write_text(ORIGINAL + "c3d4e5f\t0.990000\t44.1\tkeep\tsmaller batch\n")
    text = Structure(page_of([*night, old], house / "report")).text
    assert "old.tsv" in text and "its rules are unknown" in text and "smaller batch" in text
    alone = Structure(page_of([old], house / "report")).text
    assert "val_bpb 0.9900, not confirmed" in alone and "How long the runs took is not on record." in alone


def test_nothing_to_report_says_what_to_do(house):
    with pytest.raises(UserError, match="no scored experiment to report: autoresearch run"):
        write_report([house / "results.tsv"], house / "report")
    (house / "results.tsv").write_text("")
    with pytest.raises(UserError, match="no scored experiment"):
        write_report([house / "results.tsv"], house / "report")
    assert not (house / "report").exists()


def test_a_run_that_is_not_there_is_an_error(night, house):
    with pytest.raises(UserError, match="no run 'nope'") as raised:
        write_report(night, house / "report", runs=["nope"])
    assert raised.value.code == 2 and not (house / "report").exists()


def test_only_what_was_asked_for_is_told(night, house):
    text = Structure(page_of(night, house / "report", platform="apple-max")).text
    assert "Apple M4 Max" in text and "NVIDIA H100" not in text
    with pytest.raises(UserError, match="no scored experiment"):
        write_report(night, house / "report", track="nope")


def test_agents_are_compared_where_several_took_part(house):
    for number, agent in enumerate(["", "builtin", "claude", "builtin", "claude"]):
        each = row(run=f"r{number}", agent=agent, val_bpb=1.5 - number / 100, source=f"s{number}")
        Ledger(house / "results.tsv").append(each)
    page = page_of([house / "results.tsv"], house / "report")
    assert "Agents against each other" in page
    assert [line["label"] for line in data_of(page)["lines"]["agents-0"]["lines"]] == ["builtin", "claude"]


def test_a_long_ledger_is_shortened_to_its_newest_runs_and_says_so(house, monkeypatch):
    monkeypatch.setattr("launcher.report.report.MOST_RUNS", 10)
    ledgers = make_night(house, runs=30, mac_runs=0, points=10, claims=False)
    report = make_report(ledgers)
    kept = {report.series[0].baseline.number, report.series[0].best.number}
    assert [run.number for run in report.runs] == sorted({*range(21, 31), *kept})
    assert "29 experiments, " in report.counts[0].text
    old = next(row.run for row in Ledger(ledgers[0]).rows()[1:] if row.run not in report.folders)
    assert old in make_report(ledgers, runs=[old]).folders
    assert f"{report.left_out} earlier runs have no room here." in page_of(ledgers, house / "report")


# --- The last night -----------------------------------------------------------------------------------------


def log_of(house, *entries):
    """Write the loop's log. entries: (time, event, values)."""
    for time, event, values in entries:
        append_json_line(loop_log_path(), {"time": time, "event": event, **values})


def a_row(house, name, hour, **values):
    Ledger(house / "results.tsv").append(
        row(run=name, source=name, time=f"2026-01-{hour}:00:00Z", total_seconds=1800.0, **values)
    )


def test_the_last_night_is_counted_apart_from_all_runs(house):
    a_row(house, "old", "01T01", val_bpb=1.5)
    a_row(house, "older-edit", "01T02", val_bpb=1.4, parent="old")
    a_row(house, "new", "03T01", val_bpb=1.3, parent="older-edit", status="discard")
    a_row(house, "later", "03T04", val_bpb=1.3, parent="older-edit", status="discard")
    log_of(
        house,
        ("2026-01-01T01:00:00Z", "begin", {"done": 0}),
        ("2026-01-01T02:00:00Z", "turn", {"tokens": 2_000_000, "cost": 7.0}),
        ("2026-01-01T02:30:00Z", "experiment", {"run": "older-edit"}),
        ("2026-01-01T02:30:00Z", "end", {"why": "enough"}),
        ("2026-01-03T00:00:00Z", "begin", {"done": 0}),
        ("2026-01-03T00:30:00Z", "turn", {"tokens": 500_000, "cost": 2.0}),
        ("2026-01-03T01:30:00Z", "experiment", {"run": "new"}),
        ("2026-01-03T02:00:00Z", "begin", {"done": 1}),  # it was cut off, and went on
        ("2026-01-03T02:00:00Z", "end", {"why": "enough"}),
    )
    night, everything = map(str, make_report([house / "results.tsv"]).counts)
    assert night == (
        "The last night, Jan 03 00:00 to 02:00 (enough): 0.5 hours, 1 experiment, 2.0 an hour, "
        "0 kept, 1 discarded, 0 failed, 0.50M agent tokens, $2.00"
    )
    assert everything.startswith("All runs: 2.5 hours, 3 experiments, 1.2 an hour, 1 kept, 2 discarded, ")
    assert everything.endswith("2.50M agent tokens, $9.00")
    assert night.partition(": ")[2] in page_of([house / "results.tsv"], house / "report")


def test_the_board_of_the_last_night_is_told_first(house):
    a_row(house, "night", "01T01", val_bpb=1.5)
    a_row(house, "check", "02T01", val_bpb=1.1, track="pysource")
    assert make_report([house / "results.tsv"]).series[0].title.startswith("pysource")
    log_of(
        house,
        ("2026-01-01T01:00:00Z", "begin", {"done": 0}),
        ("2026-01-01T01:30:00Z", "experiment", {"run": "night"}),
    )
    report = make_report([house / "results.tsv"])
    assert report.series[0].baseline.id == "night" and "1.5" in report.headline.large


def test_a_night_whose_process_is_gone_is_told_as_cut_off(house):
    a_row(house, "r1", "01T01", val_bpb=1.5)
    here = {"done": 0, "pid": dead_process(), "host": platform.node()}
    log_of(
        house,
        ("2026-01-01T01:00:00Z", "begin", here),
        ("2026-01-01T01:30:00Z", "experiment", {"run": "r1"}),
    )
    report = make_report([house / "results.tsv"])
    assert report.counts[0].title == "The last night, from Jan 01 01:00, cut off after 01:30"


def dead_process():
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_baseline_has_no_author_and_misses_no_diff(night, house):
    report = make_report(night)
    series = report.series[0]
    cards = Cards(report)
    told = cards.other(series.baseline, series)
    assert "No diff: it is the baseline." in told and "a person" not in told
    assert "<dt>by</dt><dd>claude</dd>" in cards.other(series.best, series)


# --- Curves and diffs ---------------------------------------------------------------------------------------


def test_curves_of_the_best_and_the_last_runs_or_of_those_named(night, house):
    report = make_report(night)
    series = report.series[0]
    assert report.curves[:2] == [series.best.id, series.baseline.id] and series.scored[-1].id in report.curves
    failed = next(run.id for run in series.runs if run.kind == "failed")
    assert make_report(night, runs=[failed]).curves == [failed]
    data = data_of(page_of(night, house / "report"))["curves"]
    assert data["best"] == series.best.id and set(report.curves) <= data["curves"].keys()
    lengths = {len(curve) for curve in data["curves"].values()}
    assert lengths == {len(data["seconds"])}


def test_a_diff_is_against_the_trainer_that_the_edit_was_made_on(night):
    report = make_report(night)
    for run in report.series[0].drawn[1:]:
        diff = report.diffs[run.id]
        parent = next(other.row for other in report.runs if other.id == diff.against)
        assert parent.source == run.row.parent and any(line.startswith("+") for line in diff.lines)


def test_a_damaged_folder_is_an_empty_one(night, house):
    report = make_report(night)
    run = report.series[0].best.id
    folder = run_dir(run)
    folder.events.write_bytes(b'\xff\xfe{"at": 1}\n[]\n{"at": "x"}\n\n{"at": 1, "event": "log"')
    (folder.path / "answer.json").write_text("[" * 100_000)
    folder.record.write_text("{}")
    told = make_report(night).folders[run]
    assert told.trainer is None and told.trace.points == [] and told.next == ""


def test_a_trainer_too_long_to_be_compared_has_no_diff(night):
    run = Ledger(night[0]).rows()[5].run
    run_dir(run).trainer().write_text("x = 1\n" * 6000)
    assert run not in make_report(night).diffs


# --- The card -----------------------------------------------------------------------------------------------


def test_the_card_is_1200_by_630_and_in_colour(night, house):
    _, card = write_report(night, house / "report")
    image = Image.open(card).convert("RGB")
    assert image.size == (1200, 630)
    colors = {color for _, color in image.getcolors(1 << 20)}
    assert any(green > red + 60 for red, green, _ in colors), "no step line"


def test_labels_collide_with_nothing():
    draw = random.Random(1)
    points = [(draw.uniform(0, 900), draw.uniform(0, 300)) for _ in range(60)]
    dots = [Box.around(point, 5) for point in points]
    widths = [draw.uniform(40, 250) for _ in points]
    frame = Box(0, 0, 900, 300)
    placed = [label for label in place_labels(points, widths, 11, dots, frame) if label]
    assert len(placed) > 10
    for number, label in enumerate(placed):
        assert label.box.lies_in(frame) and not any(label.box.meets(dot) for dot in dots)
        others = [part for other in placed[number + 1 :] for part in other.parts()]
        assert not any(label.box.meets(part) for part in others)


def test_a_reader_never_meets_half_a_page(night, house, monkeypatch):
    page, card = write_report(night, house / "report")
    before = page.read_bytes(), card.read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(night, house / "report")
    assert (page.read_bytes(), card.read_bytes()) == before


def test_nothing_but_the_two_files_is_left(night, house):
    write_report(night, house / "report")
    assert sorted(path.name for path in (house / "report").iterdir()) == ["report.html", "report.png"]


def test_matplotlib_is_left_as_it_was(night, house):
    before = dict(matplotlib.rcParams)
    write_report(night, house / "report")
    assert dict(matplotlib.rcParams) == before


def test_a_description_with_dollar_signs_is_no_formula(house):
    text = r"costs $5 and $\nothing $ {more}"
    Ledger(house / "results.tsv").append(row(val_bpb=1.5, description=text))
    assert text in Structure(page_of([house / "results.tsv"], house / "report")).text


# --- Anything -----------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from([0.0, -1.0, 1e308, -1e308, 1e-308, float("nan"), float("inf")]), st.floats(0, 3)
)
VALUES = {float: NUMBERS, int: st.integers(-5, 10**20), str: st.text(max_size=20)}
SPECIAL = {
    "status": st.sampled_from(["keep", "keep", "discard", "crash", "confirmed", "moved", "odd"]),
    "time": st.sampled_from(
        ["", "2026-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "2026-01-01T05:00:00+05:00"]
    ),
    "source": st.sampled_from(["", "a", "b", "c"]),
    "parent": st.sampled_from(["", "a", "b", "c"]),
    "rules": st.integers(0, 2),
    "run": st.sampled_from(["", "r1", "r2", "../x", "r 3"]),
    "marks": st.sampled_from(["", "noise", "confirm", "repeat,short", "dry", ",,odd"]),
}
ANYTHING = {name: VALUES[type(getattr(Row(), name))] for name in COLUMNS} | SPECIAL
NEEDED = {name: ANYTHING.pop(name) for name in ("status", "val_bpb", "run", "rules")}
ROWS = st.fixed_dictionaries(NEEDED, optional=ANYTHING)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, min_size=1, max_size=6))
def test_whatever_the_ledger_holds_there_is_a_report_or_a_line(house, rows):
    lines = ["\t".join(COLUMNS), *(to_line(Row(**values)) for values in rows)]
    (house / "results.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    try:
        page = page_of([house / "results.tsv"], house / "report", complain=lambda line: None)
    except UserError as error:
        assert "no scored experiment" in str(error)
        return
    assert data_of(page)["series"] and not UNWRITABLE.search(page)


def test_the_assets_say_what_they_are_and_whence():
    told = (ASSETS / "README.md").read_text()
    version = re.search(r"uPlot \(v([\d.]+)\)", asset("uPlot.iife.min.js"))[1]
    assert f"uPlot {version}" in told and "MIT" in asset("uPlot.LICENSE") and room.__doc__
