"""The morning report and the looks at one run."""

import json
import re
import shutil
import subprocess

import pytest

from launcher.ledger import Ledger, Row
from launcher.report import report, running_best
from launcher.show import best_before, sparkline
from test_ledger import ORIGINAL

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def night(house, count=24):
    """A ledger and runs/ as a night leaves them."""
    best = 1.6
    for i in range(count):
        bpb = best - 0.02 if i % 4 == 0 else best + 0.01 * (i % 3)
        status = "crash" if i == 7 else "keep" if bpb < best else "discard"
        best = min(best, bpb)
        row = Row(run=f"20260101-0000{i:02}-abcd", val_bpb=0.0 if i == 7 else bpb, val_stderr=0.01, status=status, rules=1, budget=300.0, track="pysource",
                  platform="cpu", device="AMD EPYC, 2 cores", fingerprint="f" * 16, val_tokens=524288, time=f"2026-01-01T{i:02}:00:00Z", source=f"s{i}",
                  description=f"idea {i}: <b>bold</b> & long " + "x" * 30, tokens_per_second=12000.0, mfu_percent=50.0, reason="boom" if i == 7 else "")
        Ledger(house / "results.tsv").append(row)
        folder = house / "runs" / row.run
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"trainer": "train_cuda.py"}))
        (folder / "train_cuda.py").write_text(f"MATRIX_LR = 0.0{i + 1}\nDEPTH = 4\n")
        with open(folder / "events.jsonl", "w") as f:
            for t in range(1, 300, 10):
                f.write(json.dumps({"event": "log", "elapsed": t, "smooth": 7 - t / 60 - i / 50}) + "\n")
    return house / "results.tsv"


def test_the_page_stands_alone(house):
    page, picture = report([night(house)], house / "report")
    text = page.read_text()
    assert not re.search(r"(src|href)=[\"']?https?://", text) and "<script" not in text
    assert text.count("<svg") == 2 and "&lt;b&gt;bold" in text and "<b>bold" not in text
    assert "23 scored experiments" in text and "not ranked" in text and "prefers-color-scheme: dark" in text
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 20_000


def test_the_originals_ledger_is_plotted(house):
    (house / "old.tsv").write_text(ORIGINAL + "c3d4e5f\t0.990000\t44.1\tkeep\tsmaller batch\n")
    page, _ = report([house / "old.tsv"], house / "report")
    assert "from another tool" in page.read_text() and "smaller batch" in page.read_text()


def test_the_running_best_steps_down():
    rows = [Row(val_bpb=v, status=s) for v, s in [(1.5, "keep"), (1.6, "discard"), (1.4, "keep"), (1.3, "discard")]]
    assert running_best(rows) == ([1.5, 1.5, 1.4, 1.4], [0, 2])


def test_a_sparkline_falls():
    line = sparkline([(t, 9.0 - t) for t in range(1, 9)], width=8)
    assert len(line) == 8 and line[0] == "█" and line[-1] == "▁"


def test_show_and_restore(house, autoresearch, monkeypatch, tmp_path):
    night(house)
    shown = autoresearch("show", "20260101-000008")
    assert shown.returncode == 0 and "description: idea 8" in shown.stdout and "▁" in shown.stdout
    assert "+MATRIX_LR = 0.09" in shown.stdout and "-MATRIX_LR = 0.05" in shown.stdout
    assert "no run 'nope'" in autoresearch("show", "nope").stderr
    import launcher.show as module

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(module, "ROOT", work)
    (work / "train_cuda.py").write_text("precious, in no run and no commit\n")
    with pytest.raises(Exception, match="no run and no commit holds"):
        module.restore("20260101-000008", force=False)
    module.restore("20260101-000008", force=True)
    assert (work / "train_cuda.py").read_text() == "MATRIX_LR = 0.09\nDEPTH = 4\n"


def test_the_best_before(house):
    night(house)
    rows = Ledger(house / "results.tsv").rows()
    assert best_before(rows[9]).run == rows[8].run and best_before(rows[0]) is None


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1200, 400])
def test_it_renders_in_a_real_browser(house, width):
    page, _ = report([night(house)], house / "report")
    shot = house / f"shot{width}.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
               "--disable-sync", f"--user-data-dir={house / 'profile'}", f"--window-size={width},2000"]
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=90)
    from PIL import Image

    image = Image.open(shot).convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert image.width == width and len(colours) > 50  # something was drawn, in colour
    assert any(g > r + 40 and g > b + 20 for r, g, b in colours), "the running best is not there"
    dom = subprocess.run([*command, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=90).stdout
    assert "<svg" in dom and "idea 8" in dom
