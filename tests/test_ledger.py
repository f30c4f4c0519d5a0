"""results.tsv: what is written can be read, whatever happens in between."""

import errno
import math
import multiprocessing
import time

import pytest
from conftest import row
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.ledger import (
    COLUMNS,
    HEADER,
    TYPES,
    UNRANKED,
    Flag,
    Ledger,
    Row,
    parse,
    remembered,
    row_from,
    to_line,
)
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
    str: st.text(st.characters()),  # half characters included
    int: st.integers(),
    float: st.floats(),
}


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({name: VALUES[kind] for name, kind in TYPES.items()}))
def test_every_row_is_one_line_and_is_read_back(values):
    """The first writing cleans text and rounds numbers; from then on nothing changes."""
    said = []
    [once] = parse(written(Row(**values)), complain=said.append)
    [twice] = parse(written(once), complain=said.append)
    assert once == twice and not said
    for name, kind in TYPES.items():
        if kind is int:
            assert getattr(once, name) == values[name]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(COLUMNS), st.none() | st.booleans() | st.floats() | st.text()))
def test_what_a_column_cannot_hold_costs_no_row(values):
    """As `exp.start(depth=2.5)` once did: the run was kept, and its row could not be read."""
    said = []
    assert len(parse(written(Row(**values)), complain=said.append)) == 1 and not said


def test_a_row_is_made_of_json_whatever_that_holds():
    values = {"run": "r1", "depth": 2.5, "val_bpb": "x", "seed": None, "status": ["keep"], "mine": 1}
    made = row_from(values)
    assert (made.run, made.depth, made.val_bpb, made.seed, made.status) == ("r1", 2, 0.0, 0, "['keep']")


def test_a_budget_is_read_back_as_it_was():
    """It is part of the board: a run would be on another one than the command that asks for it."""
    assert parse(written(row(budget=12.345678)))[0].board == row(budget=12.345678).board


@pytest.mark.parametrize("run", ["../x", "a/b", "/etc", ".", "..", "a\0b", "x" * 200, "-x"])
def test_a_run_that_is_named_like_no_folder_of_ours_has_no_name(run):
    assert [each.run for each in parse(f"val_bpb\trun\n1.5\t{run}\n")] == [""]


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


DAMAGED_HEADERS = {
    "gone": "",
    "cut": HEADER[:40] + "\n",
    "empty": "\n",
    "one name": HEADER.replace("val_bpb", "v?l_bpb") + "\n",
    "some names": HEADER.replace("a", "\ufffd") + "\n",
    "a tab": HEADER.replace("\t", " ", 1) + "\n",
    "a byte order mark": "\ufeff" + HEADER + "\n",
    "noise": "\0" * 100 + "\n",
}


@pytest.mark.parametrize("header", DAMAGED_HEADERS.values(), ids=DAMAGED_HEADERS)
def test_a_damaged_header_costs_no_row(tmp_path, header, capsys):
    some = [row(run=f"r{i}", description=f"idea {i}", val_bpb=1 + i / 10) for i in range(3)]
    path = tmp_path / "results.tsv"
    path.write_text(header + "".join(to_line(each) + "\n" for each in some))
    assert Ledger(path).rows() == some
    Ledger(path).append(row(run="new"))
    assert path.read_text() == written(*some, row(run="new"))
    [copy] = tmp_path.glob("results.tsv.old-*")
    assert copy.read_text().startswith(header)


@pytest.mark.parametrize("content", [b"", b"\n", b"\0" * 4096, b"\r\n \r\n"])
def test_an_emptied_ledger_is_begun_anew(tmp_path, content):
    path = tmp_path / "results.tsv"
    path.write_bytes(content)
    assert Ledger(path).rows() == []
    Ledger(path).append(row())
    assert path.read_text() == written(row())


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    ledger = Ledger(tmp_path / "results.tsv")
    ledger.append(row())
    before = ledger.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("launcher.ledger.os.fsync", fail)
        with pytest.raises(OSError):
            ledger.append(row(run="r2"))
    assert ledger.path.read_bytes() == before
    ledger.append(row(run="r2"))
    assert [each.run for each in ledger.rows()] == ["r1", "r2"]


# --- What was read is remembered ----------------------------------------------------------------------------


def test_only_what_was_added_is_read(tmp_path, monkeypatch):
    path = tmp_path / "results.tsv"
    Ledger(path).append(row(run="r1"))
    first = Ledger(path).rows()
    assert Ledger(path).rows() is first
    Ledger(path).append(row(run="r2"))
    second = Ledger(path).rows()
    assert [each.run for each in second] == ["r1", "r2"] and second[0] is first[0]
    assert [each.run for each in first] == ["r1"]


def test_a_ledger_that_was_written_anew_is_read_anew(tmp_path):
    path = tmp_path / "results.tsv"
    for i in range(3):
        Ledger(path).append(row(run=f"r{i}"))
    assert len(Ledger(path).rows()) == 3
    path.write_text(written(row(run="other"), row(run="r1"), row(run="r2"), row(run="r3")))  # the same inode
    assert [each.run for each in Ledger(path).rows()] == ["other", "r1", "r2", "r3"]
    path.write_text(written(row(run="short")))
    assert [each.run for each in Ledger(path).rows()] == ["short"]
    path.unlink()
    assert Ledger(path).rows() == []


def test_complaints_are_repeated_to_each_who_asks(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text(ORIGINAL + "c\tbroken\t1\tkeep\tx\nd\t1.5")
    for _ in range(2):
        said = []
        assert len(Ledger(path).rows(said.append)) == 2
        assert len(said) == 2 and ":4: not counted" in said[0] and "torn" in said[1]


def test_only_the_columns_that_are_wanted_are_read(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text(written(row(agent="me", description="idea")))
    [read] = Ledger(path).rows(wanted={"val_bpb", "agent"})
    assert (read.val_bpb, read.agent, read.description) == (1.25, "me", "")
    assert Ledger(path).rows()[0].description == "idea"


def test_an_answer_about_the_rows_of_a_file_is_found_once(tmp_path):
    asked = []

    @remembered
    def count(rows, status):
        asked.append(status)
        return sum(each.status == status for each in rows)

    ledger = Ledger(tmp_path / "results.tsv")
    ledger.append(row())
    for _ in range(2):
        assert (count(ledger.rows(), "keep"), count(ledger.rows(), "crash")) == (1, 0)
    assert asked == ["keep", "crash"]
    ledger.append(row(run="r2"))
    assert count(ledger.rows(), "keep") == 2
    assert count([row()], "keep") == 1 and len(asked) == 4


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
        ({"status": "crash", "marks": "fault"}, False, False, False),
        ({"status": ""}, False, False, False),
        ({"val_bpb": 0.0}, False, False, True),
        ({"val_bpb": -1.0}, False, False, True),
        ({"val_bpb": math.inf}, False, False, True),
        ({"val_bpb": math.nan}, False, False, True),
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
