"""The leaderboard: what is ranked with what."""

import io
import json
import subprocess
import sys
import time

from launcher.board import gather, leaderboard
from launcher.ledger import COLUMNS, Ledger, Row, to_line
from prepare import ROOT

H100, MAC = "NVIDIA H100 80GB HBM3", "Apple M4 Max"


def row(run, val_bpb, **values):
    return Row(**{"run": run, "val_bpb": val_bpb, "status": "keep", "rules": 1, "budget": 300.0, "track": "climbmix", "fingerprint": "f" * 16,
                  "val_tokens": 1000, "platform": "h100", "device": H100, "time": f"2026-01-01T00:00:{len(run):02}Z", "description": run, **values})


def write(path, *rows):
    for r in rows:
        Ledger(path).append(r)
    return path


def test_ranked_by_device_and_the_rest_listed_apart(tmp_path):
    path = write(tmp_path / "a.tsv", row("a", 1.0), row("bb", 0.9), row("ccc", 0.95, status="discard"), row("mac", 1.5, device=MAC, platform="apple-max"),
                 row("old", 0.1, rules=0), row("short", 0.2, marks="short", budget=20.0), row("busy", 0.3, marks="contended"), row("dead", 0.0, status="crash"))
    boards, apart, _ = gather([path])
    assert [[r.run for r in b.rows] for b in boards] == [["bb", "ccc", "a"], ["mac"]]
    assert {r.run for r in apart} == {"old", "short", "busy", "dead"}
    assert boards[0].baseline.run == "a"


def test_other_rules_and_other_data_do_not_mix(tmp_path):
    path = write(tmp_path / "a.tsv", row("a", 1.0, rules=2), row("b", 0.5, rules=1), row("c", 0.4, rules=2, fingerprint="other"), row("d", 1.1, rules=2))
    boards, apart, _ = gather([path])
    assert [[r.run for r in b.rows] for b in boards] == [["a", "d"]] and {r.run for r in apart} == {"b", "c"}


def test_ledgers_merge_by_run(tmp_path):
    one = write(tmp_path / "one.tsv", row("a", 1.0), row("b", 0.9))
    two = write(tmp_path / "two.tsv", row("b", 0.9), row("c", 1.2, device=MAC))
    boards, _, _ = gather([one, two])
    assert sorted(r.run for b in boards for r in b.rows) == ["a", "b", "c"]


def test_verified_is_shown_and_refuted_does_not_rank(tmp_path):
    path = write(tmp_path / "a.tsv", row("good", 1.0), row("fake", 0.5), row("good", 1.0, status="verified"), row("fake", 1.4, status="refuted", reason="differs"))
    out = io.StringIO()
    leaderboard([path], kind="json", out=out)
    data = json.loads(out.getvalue())
    assert [(r["run"], r["verified"]) for r in data["boards"][0]["rows"]] == [("good", True)]
    assert data["apart"][0]["why"] == "refuted: differs"


def test_the_comparison_of_devices(tmp_path):
    path = write(tmp_path / "a.tsv", row("a", 1.0), row("bb", 0.9), row("m", 1.5, device=MAC), row("mm", 1.2, device=MAC, energy_kj=12.5))
    out = io.StringIO()
    leaderboard([path], kind="json", out=out)
    mac = [r for r in json.loads(out.getvalue())["across"] if r["device"] == MAC][0]
    assert mac["best_val_bpb"] == 1.2 and mac["gap_closed_percent"] == 50.0 and mac["energy_kj"] == 12.5


def test_text_and_tsv(tmp_path):
    path = write(tmp_path / "a.tsv", row("a", 1.0, description="wide\ttext"), row("m", 1.5, device=MAC))
    out = io.StringIO()
    leaderboard([path], out=out)
    assert "climbmix on NVIDIA H100" in out.getvalue() and "across devices" in out.getvalue() and "1.000000" in out.getvalue()
    out = io.StringIO()
    leaderboard([path], kind="tsv", out=out)
    lines = out.getvalue().splitlines()
    assert len({len(line.split("\t")) for line in lines}) == 1 and len(lines) == 3


def test_it_answers_in_a_blink_without_torch_or_numpy(tmp_path):
    path = write(tmp_path / "results.tsv", *[row(f"r{i}", 1 + i / 1000) for i in range(200)])
    code = "import sys; sys.argv[1:] = ['leaderboard', sys.argv[1]]\ntry:\n from launcher.cli import main; main()\nexcept SystemExit: pass\n" \
           "assert not {'torch', 'mlx', 'numpy', 'datasets'} & sys.modules.keys(), 'heavy import'"
    times = []
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
        times.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
    assert min(times) < 0.6, times  # 0.3 s on a quiet machine


def test_a_hundred_thousand_rows(tmp_path):
    text = "\t".join(COLUMNS) + "\n" + "".join(to_line(row(f"r{i}", 1 + (i * 7919 % 100003) / 1e5)) + "\n" for i in range(100_000))
    (tmp_path / "big.tsv").write_text(text)
    # Resident memory when all is read and ranked: the peak that getrusage names is the parent's where a process was forked.
    code = "import psutil, sys, time, io; t = time.perf_counter(); from launcher.board import gather, leaderboard; " \
           "held = gather([sys.argv[1]]); print(psutil.Process().memory_info().rss / 2**20); " \
           "del held; t = time.perf_counter(); leaderboard([sys.argv[1]], out=io.StringIO()); print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "big.tsv")], cwd=ROOT, capture_output=True, text=True)
    megabytes, seconds = map(float, done.stdout.split())
    assert seconds < 4 and megabytes < 500, (seconds, megabytes)  # 2 s on a quiet machine
