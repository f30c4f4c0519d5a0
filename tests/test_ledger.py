"""results.tsv: what is written can be read, whatever happens in between."""

import multiprocessing
import time

import pytest

from launcher.ledger import COLUMNS, Ledger, Row, parse, to_line
from launcher.verdict import Noise, champion, decide, noise_of


def row(**values):
    return Row(**{"commit": "abc1234", "val_bpb": 1.25, "status": "keep", "run": "r1", "rules": 1, "budget": 300.0, "track": "t", "source": "s", **values})


def test_round_trip_and_a_description_that_tries_to_break_the_line(tmp_path):
    ledger = Ledger(tmp_path / "results.tsv")
    nasty = "a\tb\nc\rd\x00e\u2028f  'quoted\""
    ledger.append(row(description=nasty, val_bpb=1.2345678, num_params_M=50.3, tokens_per_second=1670000.0))
    ledger.append(row(run="r2", status="crash", val_bpb=0.0))
    first, second = ledger.rows()
    assert first.description == "a b c d e f  'quoted\"" and first.val_bpb == 1.234568 and first.tokens_per_second == 1670000
    assert second.run == "r2" and second.status == "crash"
    assert (tmp_path / "results.tsv").read_text().split("\n")[0].startswith("commit\tval_bpb\tmemory_gb\tstatus\tdescription\t")


def test_a_torn_last_line_is_set_aside(tmp_path, capsys):
    ledger = Ledger(tmp_path / "results.tsv")
    ledger.append(row())
    with open(ledger.path, "a") as f:
        f.write(to_line(row(run="torn"))[:40])
    said = []
    assert [r.run for r in ledger.rows(said.append)] == ["r1"] and "torn" in said[0]
    ledger.append(row(run="r2"))
    assert [r.run for r in ledger.rows()] == ["r1", "r2"]
    assert (tmp_path / "results.tsv.torn").read_text() == to_line(row(run="torn"))[:40] + "\n"


def append_many(path, name):
    for i in range(40):
        Ledger(path).append(row(run=f"{name}-{i}", description="x" * 500))


def test_many_writers(tmp_path):
    path = tmp_path / "results.tsv"
    writers = [multiprocessing.get_context("spawn").Process(target=append_many, args=(path, n)) for n in range(4)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    rows = Ledger(path).rows()
    assert len(rows) == 160 == len({r.run for r in rows}) and all(r.description == "x" * 500 for r in rows)


ORIGINAL = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\na1b2c3d\t0.997900\t44.0\tkeep\tbaseline\nb2c3d4e\t0.000000\t0.0\tcrash\tdouble width (OOM)\n"


def test_the_originals_ledger_is_read_and_grows(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text(ORIGINAL)
    ledger = Ledger(path)
    assert [(r.val_bpb, r.status) for r in ledger.rows()] == [(0.9979, "keep"), (0.0, "crash")]
    assert not any(r.ranks for r in ledger.rows())  # nobody knows by which rules
    ledger.append(row(run="new"))
    assert [r.description for r in ledger.rows()][:2] == ["baseline", "double width (OOM)"] and ledger.rows()[-1].run == "new"


def test_a_bad_cell_costs_one_line():
    said = []
    rows = parse(ORIGINAL + "c\tbroken\t1\tkeep\tx\nd\t1.5\t2\tkeep\ty\n", "f.tsv", said.append)
    assert [r.commit for r in rows] == ["a1b2c3d", "b2c3d4e", "d"] and "f.tsv:4" in said[0]


def test_a_hundred_thousand_rows_are_read_quickly():
    text = "\t".join(COLUMNS) + "\n" + "".join(to_line(row(run=f"r{i}", val_bpb=1 + i / 1e5)) + "\n" for i in range(1000)) * 100
    began = time.perf_counter()
    assert len(parse(text)) == 100_000
    assert time.perf_counter() - began < 4


@pytest.mark.parametrize("values, best, noise, verdict", [
    ([1.0], [], None, "keep"),                                    # the first
    ([1.01], [1.0], Noise(0.001, 2), "discard"),                  # worse
    ([0.999], [1.0], None, "keep"),                               # better, but nobody knows the noise
    ([0.9], [1.0], Noise(0.001, 2), "keep"),                      # far beyond it
    ([0.999], [1.0], Noise(0.001, 2), "repeat"),                  # within it
    ([0.999, 0.998], [1.0], Noise(0.001, 2), "discard"),          # still within it after a second seed
    ([0.991, 0.992], [1.0, 1.0], Noise(0.001, 2), "keep"),
])
def test_decisions(values, best, noise, verdict):
    assert decide(values, best, noise)[0] == verdict
    if noise is None and best and verdict == "keep":
        assert "no noise on record" in decide(values, best, noise)[1]


def test_noise_keeps_luck_out():
    """Of comparisons of two equal trainers, about one in a hundred passes the margin."""
    import random

    rng, lucky = random.Random(0), 0
    for _ in range(3000):
        seeds = [row(val_bpb=rng.gauss(1.0, 0.01), marks="noise", run=str(i)) for i in range(4)]
        noise = noise_of(seeds, seeds[0].board)
        lucky += rng.gauss(1.0, 0.01) - rng.gauss(1.0, 0.01) > noise.margin()
    assert 0.003 < lucky / 3000 < 0.025


def test_rows_of_other_rules_or_marks_do_not_count():
    rows = [row(val_bpb=0.5, rules=2), row(val_bpb=0.6, marks="short", budget=60.0), row(val_bpb=0.7, marks="contended"), row(val_bpb=0.9, run="good")]
    assert [r.run for r in champion(rows, row().board)] == ["good"]
    assert noise_of(rows, row().board) is None


def test_a_refuted_run_is_nobodys_champion():
    rows = [row(val_bpb=0.9, run="honest", source="a"), row(val_bpb=0.5, run="fake", source="b"), row(run="fake", status="refuted")]
    assert [r.run for r in champion(rows, row().board)] == ["honest"]
    assert [r.run for r in champion([*rows, row(run="fake", status="verified")], row().board)] == ["fake"]
