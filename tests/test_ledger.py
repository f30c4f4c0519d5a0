"""results.tsv: what is written can be read, whatever happens in between."""

import multiprocessing
import time

import pytest
from conftest import row
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.ledger import COLUMNS, TYPES, UNRANKED, Flag, Ledger, Row, parse, to_line
from prepare import UserError

ORIGINAL = (
    "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
    "a1b2c3d\t0.997900\t44.0\tkeep\tbaseline\n"
    "b2c3d4e\t0.000000\t0.0\tcrash\tdouble width (OOM)\n"
)


def written(*rows):
    """Return the text of a ledger with these rows."""
    return "\n".join(["\t".join(COLUMNS), *map(to_line, rows), ""])


# --- Lines --------------------------------------------------------------------------------------------------


def test_a_description_that_tries_to_break_the_line(tmp_path):
    ledger = Ledger(tmp_path / "results.tsv")
    nasty = "a\tb\nc\rd\x00e\u2028f  'quoted\""
    ledger.append(row(description=nasty, val_bpb=1.2345678, num_params_M=50.3, tokens_per_second=1670000.0))
    ledger.append(row(run="r2", status="crash", val_bpb=0.0))
    first, second = ledger.rows()
    assert first.description == "a b c d e f  'quoted\""
    assert first.val_bpb == 1.234568 and first.tokens_per_second == 1670000
    assert second.run == "r2" and second.status == "crash"
    header = ledger.path.read_text().split("\n")[0]
    assert header.startswith("commit\tval_bpb\tmemory_gb\tstatus\tdescription\t")


VALUES = {
    str: st.text(),
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
}


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({name: VALUES[kind] for name, kind in TYPES.items() if name != "ledger"}))
def test_every_row_is_one_line_and_is_read_back(values):
    """The first writing cleans text and rounds numbers; from then on nothing changes."""
    said = []
    [once] = parse(written(Row(**values)), complain=said.append)
    [twice] = parse(written(once), complain=said.append)
    assert once == twice and not said
    for name, kind in TYPES.items():
        if kind is int:
            assert getattr(once, name) == values[name]


def test_text_that_is_no_unicode_is_written(tmp_path):
    """A shell may hand over bytes that are no UTF-8: the run is not lost for it."""
    ledger = Ledger(tmp_path / "results.tsv")
    ledger.append(row(description="caf\udce9"))
    assert [row.description for row in ledger.rows()] == ["caf?"]


def test_a_torn_last_line_is_set_aside(tmp_path, capsys):
    ledger = Ledger(tmp_path / "results.tsv")
    ledger.append(row())
    torn = to_line(row(run="torn"))[:40]
    with open(ledger.path, "a") as f:
        f.write(torn)
    said = []
    assert [row.run for row in ledger.rows(said.append)] == ["r1"] and "torn" in said[0]
    ledger.append(row(run="r2"))
    assert [row.run for row in ledger.rows()] == ["r1", "r2"]
    assert (tmp_path / "results.tsv.torn").read_text() == torn + "\n"
    assert "moved to results.tsv.torn" in capsys.readouterr().err


def test_a_bad_cell_costs_one_line():
    said = []
    rows = parse(ORIGINAL + "c\tbroken\t1\tkeep\tx\nd\t1.5\t2\tkeep\ty\n", "f.tsv", said.append)
    assert [row.commit for row in rows] == ["a1b2c3d", "b2c3d4e", "d"] and "f.tsv:4" in said[0]


def append_many(path, name):
    for i in range(40):
        Ledger(path).append(row(run=f"{name}-{i}", description="x" * 500))


def test_many_writers(tmp_path):
    path = tmp_path / "results.tsv"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_many, args=(path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = Ledger(path).rows()
    assert len(rows) == 160 == len({row.run for row in rows})
    assert all(row.description == "x" * 500 for row in rows)


def test_a_hundred_thousand_rows_are_read_quickly():
    text = written(*[row(run=f"r{i}", val_bpb=1 + i / 1e5) for i in range(100_000)])
    began = time.process_time()
    assert len(parse(text)) == 100_000
    assert time.process_time() - began < 4  # 1.5 s on a quiet machine


# --- Ledgers of other tools and of older versions -----------------------------------------------------------


def test_the_originals_ledger_is_read_and_grows(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text(ORIGINAL)
    ledger = Ledger(path)
    assert [(row.val_bpb, row.status) for row in ledger.rows()] == [(0.9979, "keep"), (0.0, "crash")]
    assert not any(row.ranked for row in ledger.rows())  # its rules are unknown
    ledger.append(row(run="new"))
    assert [row.description for row in ledger.rows()][:2] == ["baseline", "double width (OOM)"]
    assert ledger.rows()[-1].run == "new"


@pytest.mark.parametrize(
    "status, reason, flag",
    [
        ("crash", "interrupted", Flag.INTERRUPTED),
        ("crash", "the launcher was killed during the run", Flag.CUT_OFF),
        ("discard", "repeat: better by 0.001, within the noise of 0.002: 0.9 against 1.0", Flag.REPEAT),
    ],
)
def test_rows_of_version_0_1_get_their_flags_when_read(status, reason, flag):
    [old] = parse(written(row(status=status, reason=reason, marks="noise")))
    assert old.flags == {Flag.NOISE, flag}
    assert not old.judged
    [again] = parse(written(old))
    assert again.marks == old.marks  # the flag is added once


def test_a_reason_that_only_mentions_it_sets_no_flag():
    [read] = parse(written(row(status="crash", reason="the agent's text: interrupted, repeat: no")))
    assert read.flags == set() and read.judged


# --- Flags --------------------------------------------------------------------------------------------------


def test_a_flag_equals_its_text():
    both = row(marks="contended,noise")
    assert both.flags == {Flag.CONTENDED, Flag.NOISE} == {"contended", "noise"}
    assert Flag.NOISE in both.flags and "noise" in both.flags
    assert both.flags & UNRANKED.keys() == {"contended"}


def test_flags_are_added_once_and_in_order():
    some = row()
    some.add_flags(Flag.SHORT)
    some.add_flags("noise", Flag.SHORT)
    assert some.marks == "short,noise"
    assert parse(written(some))[0].flags == {Flag.SHORT, Flag.NOISE}


@pytest.mark.parametrize(
    "values, comparable, ranked, judged",
    [
        ({}, True, True, True),
        ({"status": "discard"}, True, True, True),
        ({"marks": "short"}, True, False, True),
        ({"marks": "noise"}, True, True, True),
        ({"marks": "contended"}, False, False, False),
        ({"marks": "repeat"}, True, True, False),
        ({"rules": 0}, False, False, False),
        ({"status": "crash"}, False, False, True),
        ({"status": "timeout"}, False, False, True),
        ({"status": "invalid"}, False, False, True),
        ({"status": "crash", "marks": "interrupted"}, False, False, False),
        ({"status": "crash", "marks": "cut-off"}, False, False, False),
        ({"status": ""}, False, False, False),
    ],
)
def test_what_a_row_is_good_for(values, comparable, ranked, judged):
    some = row(**values)
    assert (some.comparable, some.ranked, some.judged) == (comparable, ranked, judged)


def test_a_file_that_is_no_ledger_is_left_alone(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text("my own notes\n1\t2\n")
    with pytest.raises(UserError, match="is no ledger.*move it away"):
        Ledger(path).append(Row(run="a"))
    assert path.read_text() == "my own notes\n1\t2\n"


def test_a_ledger_of_other_columns_is_copied_before_it_is_rewritten(tmp_path, capsys):
    path = tmp_path / "results.tsv"
    lines = (
        "commit val_bpb memory_gb status description mine",
        "abc 1.5 1 keep first extra",
        "abc x 1 keep bad -",
    )
    text = "".join(line.replace(" ", "\t") + "\n" for line in lines)
    path.write_text(text)
    Ledger(path).append(Row(run="a", val_bpb=1.4))
    assert [row.val_bpb for row in Ledger(path).rows()] == [1.5, 1.4]
    [copy] = tmp_path.glob("results.tsv.old-*")
    assert copy.read_text() == text and "was copied to" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "x"])
def test_a_score_that_is_no_number_is_not_counted(value):
    said = []
    assert parse(f"val_bpb\tstatus\n{value}\tkeep\n1.5\tkeep\n", "a.tsv", said.append)[0].val_bpb == 1.5
    assert len(said) == 1 and "a.tsv:2: not counted, val_bpb is" in said[0]


def test_a_reason_that_only_begins_like_an_old_one_gets_no_flag():
    [row] = parse("val_bpb\tstatus\treason\n0\tcrash\tinterrupted system call\n")
    assert row.flags == set() and row.judged
