"""The report in a real browser: hover, zoom, sort, filter, the live page, phone width, dark, no script."""

from dataclasses import replace

import pytest
from browser import CHROMIUM, Browser
from made_up_night import make_night
from PIL import Image
from test_report import HOSTILE
from test_report_watch import served

from launcher.ledger import Ledger
from launcher.report import write_report
from launcher.report.files import loop_log_path
from launcher.runs import append_json_line, now_utc

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]

# Where on the screen the dot of a run of the first series is. INDEX: of the run.
DOT_AT = """(() => {
  const plot = charts.get("progress-0").plot, box = plot.over.getBoundingClientRect();
  const dot = plot.dots.find(dot => dot.i === INDEX);
  return [box.left + dot.x, box.top + dot.y];
})()"""
VISIBLE_ROWS = "[...document.querySelectorAll('#rows tr:not([hidden])')]"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def ledgers(house):
    return make_night(house, runs=40, mac_runs=25, points=60)


@pytest.fixture
def opened(browser, house, ledgers):
    """Return a function that opens the report of a night, and check that no page complained or went out."""
    page, _ = write_report(ledgers, house / "report")
    pages = []

    def open_page(**options):
        pages.append(browser.open(page.as_uri(), **options))
        return pages[-1]

    yield open_page
    for each in pages:
        assert each.complaints() == []
        assert each.fetched() == [page.as_uri()]
        each.close()


def find_row(series, kind):
    """Return an expression for the index of the first run of a kind in a series, not of the baseline."""
    return f"data.series[{series}].kind.indexOf({kind!r}, 1)"


def shows(page, expression):
    """Wait until a JavaScript expression is true."""
    assert page.wait(expression)


# --- The page -----------------------------------------------------------------------------------------------


def test_hover_tells_of_a_run_and_a_click_opens_it(opened):
    page = opened()
    index = page.evaluate(find_row(0, "kept"))
    at = page.evaluate(DOT_AT.replace("INDEX", str(index)))
    assert page.evaluate("tip.hidden")
    page.move(*at)
    shows(page, "!tip.hidden")
    told = page.evaluate("tip.innerText")
    name, run = page.evaluate(f"[data.series[0].name[{index}], data.series[0].id[{index}]]")
    assert name in told and run in told and "effect" in told and "P(better)" in told and "tokens/s" in told
    page.click(*at)
    shows(page, "opened.open")
    inside = page.evaluate("opened.innerText")
    assert name in inside and run in inside and "against run" in inside
    assert page.evaluate("opened.querySelectorAll('pre ins').length") > 0
    page.evaluate("opened.close()")
    page.move(2, 2)
    shows(page, "tip.hidden")


def test_dragging_zooms_and_a_double_click_shows_all(opened):
    page = opened()
    over = "charts.get('progress-0').plot.over.getBoundingClientRect()"
    left, top, width = page.evaluate(f"(({{left, top, width}}) => [left, top, width])({over})")
    scale = "(({min, max}) => max - min)(charts.get('progress-0').plot.scales.x)"
    height = "(({min, max}) => max - min)(charts.get('progress-0').plot.scales.y)"
    whole, tall = page.evaluate(scale), page.evaluate(height)
    page.drag((left + 0.6 * width, top + 50), (left + 0.9 * width, top + 60))
    shows(page, f"{scale} < {0.4 * whole}")
    assert page.evaluate(height) < tall  # the values fill the figure again
    page.evaluate("charts.get('progress-0').plot.over.dispatchEvent(new MouseEvent('dblclick'))")
    shows(page, f"{scale} === {whole}")
    click(page, "last 20")
    shows(page, f"Math.abs({scale} - 19 * 1.04) < 1e-6")
    click(page, "by clock")
    shows(page, f"{scale} > 3600 && {height} < 0.1")


def click(page, text):
    """Click the first button with this text."""
    page.evaluate(f"[...document.querySelectorAll('button')].find(b => b.innerText === {text!r}).click()")


def test_the_table_folds_sorts_and_filters(opened):
    page = opened()
    values = f"{VISIBLE_ROWS}.map(row => parseFloat(row.cells[1].innerText)).filter(v => !isNaN(v))"
    assert page.evaluate(f"{VISIBLE_ROWS}.length") == 20
    click(page, "show all 71")
    assert page.evaluate(f"{VISIBLE_ROWS}.length") == 71
    click(page, "val_bpb")
    ascending = page.evaluate(values)
    assert ascending == sorted(ascending) and len(ascending) > 50
    assert page.evaluate(f"{VISIBLE_ROWS}.at(-1).cells[1].innerText") == "-"  # what has no value is last
    click(page, "val_bpb")
    assert page.evaluate(values) == sorted(ascending, reverse=True)
    assert page.evaluate(f"{VISIBLE_ROWS}.at(-1).cells[1].innerText") == "-"
    click(page, "kept")
    kinds = set(page.evaluate(f"{VISIBLE_ROWS}.map(row => row.className)"))
    assert kinds == {"kept"}
    click(page, "all")
    page.evaluate(
        "(() => { const input = document.querySelector('#runs input'); input.value = 'apple width';"
        "input.dispatchEvent(new Event('input')); })()"
    )
    found = page.evaluate(f"{VISIBLE_ROWS}.map(row => row.textContent.toLowerCase())")
    assert found and all("apple" in text and "width" in text for text in found)


def test_a_run_of_the_table_and_of_the_time_line_is_opened(opened):
    page = opened()
    name = page.evaluate(f"{VISIBLE_ROWS}[3].querySelector('a').innerText")
    page.evaluate(f"{VISIBLE_ROWS}[3].querySelector('a').click()")
    assert name in page.evaluate("opened.open && opened.innerText")
    page.evaluate("opened.close()")
    click = "dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    page.evaluate(f"document.querySelector('.hour rect.training').{click}")
    assert page.evaluate("opened.open && opened.innerText.includes('baseline')")


def test_loss_curves_are_chosen_and_subtracted(opened):
    page = opened()
    lines = "charts.get('curves').plot.series.length - 1"
    best = "charts.get('curves').plot.data[1].filter(value => value !== null)"
    before = page.evaluate(lines)
    assert before == 4 and set(page.evaluate(best)) == {0}
    page.evaluate(
        "(() => { const add = document.querySelector('#curves select'); add.selectedIndex = 3;"
        "add.dispatchEvent(new Event('change')); })()"
    )
    assert page.evaluate(lines) == before + 1
    click(page, "loss")
    assert min(page.evaluate(best)) > 2
    page.evaluate("document.querySelector('#curves button[title=remove]').click()")
    assert page.evaluate(lines) == before


@pytest.mark.parametrize("script", [True, False])
def test_a_phone_does_not_scroll_sideways(opened, house, script):
    page = opened(width=390, height=844, script=script)
    if script:
        assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
        wide = (
            "[...document.querySelectorAll('.plot, .hour svg, h1')].map(e => e.getBoundingClientRect().right)"
        )
        assert max(page.evaluate(wide)) <= 390
        return
    shot = house / "phone.png"
    page.screenshot(shot, whole=True)
    assert Image.open(shot).width == 390


@pytest.mark.parametrize(("dark", "script"), [(False, True), (True, True), (False, False)])
def test_the_figures_are_drawn_in_light_in_dark_and_without_script(opened, house, dark, script):
    page = opened(dark=dark, script=script)
    shot = house / "shot.png"
    page.screenshot(shot)
    image = Image.open(shot).convert("RGB").crop((60, 330, 1140, 700))  # in the first figure
    colors = dict((color, number) for number, color in image.getcolors(1 << 20))
    paper = (21, 24, 27) if dark else (253, 252, 250)
    assert max(colors, key=colors.get) == paper
    green = sum(number for (red, g, blue), number in colors.items() if g > red + 60 and g > blue + 20)
    assert green > 300, "no step line"


# --- The live page ------------------------------------------------------------------------------------------


@pytest.fixture
def live(ledgers):
    """Serve the report, and yield its address."""
    with served(ledgers, token="t0ken") as ask:
        yield ask.url


def test_an_open_page_takes_over_what_is_new_and_stays_where_it_was(browser, ledgers, live):
    page = browser.open(live)
    click(page, "show all 71")
    click(page, "last 20")
    click(page, "kept")
    folded = "document.querySelector('#worked details.run')"
    page.evaluate(f"{folded}.open = true")
    page.evaluate("document.getElementById('curves').scrollIntoView()")
    top = page.evaluate("document.getElementById('curves').getBoundingClientRect().top")
    id_of_open = page.evaluate(f"{folded}.id")

    entry = {"time": now_utc(), "event": "phase", "phase": "training", "text": "training: an idea"}
    append_json_line(loop_log_path(), entry)
    last = [row for row in Ledger(ledgers[0]).rows() if row.status == "keep"][-1]
    new = replace(
        last, run="20260611-235959-beef", description=HOSTILE, val_bpb=last.val_bpb - 0.01, source="new"
    )
    new.parent, new.build_on, new.time = last.source, "new", "2026-06-11T23:59:59Z"
    Ledger(ledgers[0]).append(new)

    shows(page, "document.querySelector('[data-run=\"20260611-235959-beef\"]') !== null")
    shows(page, "document.getElementById('now').innerText.startsWith('training: an idea, for')")
    assert page.evaluate("data.series[0].id.at(-1)") == "20260611-235959-beef"
    assert page.evaluate(f"document.getElementById({id_of_open!r}).open")
    assert page.evaluate(
        "[...document.querySelectorAll('#rows tr:not([hidden])')].every(r => r.className == 'kept')"
    )
    assert page.evaluate("charts.get('progress-0').plot.scales.x.min") > 15  # still the last 20
    now = page.evaluate("document.getElementById('curves').getBoundingClientRect().top")
    assert abs(now - top) < 3
    assert page.evaluate("document.images.length") == 0 and page.complaints() == []
    base = live.partition("?")[0]
    assert {url.partition("?")[0] for url in page.fetched()} == {base, base + "state"}
    page.close()


def test_a_page_that_waits_becomes_the_report(browser, house):
    with served([house / "results.tsv"]) as ask:
        page = browser.open(ask.url)
        assert "Nothing to tell yet" in page.evaluate("document.body.innerText")
        make_night(house, runs=4, mac_runs=0, points=10, claims=False)
        shows(
            page,
            "document.body?.innerText.includes('not confirmed') && document.querySelector('canvas') !== null",
        )
    shows(page, "document.getElementById('now').innerText.includes('not live any more')")
    page.close()


def test_a_fault_of_the_pages_own_is_no_end_of_the_server(browser, ledgers, live):
    page = browser.open(live)
    page.evaluate("takeOver = () => { throw new Error('made up'); }")
    append_json_line(loop_log_path(), {"time": now_utc(), "event": "end"})
    shows(page, "document.getElementById('now').innerText.includes('reload the page')")
    page.close()
