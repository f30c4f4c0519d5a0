"""The runs on record: names, killed launchers, weights."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from conftest import RESULT

from backends.protocol import write_json
from launcher.ledger import Flag, Ledger, Row
from launcher.runs import (
    append_row,
    find_run,
    loss_curve,
    prune_weights,
    record_killed_runs,
    run_dir,
    trainer_of,
)
from prepare import ROOT, UserError


def add(house, run, **values):
    """Put a run into the ledger, with weights and a trainer. Returns its row."""
    row = Row(**{"run": run, "status": "keep", "rules": 1, "val_bpb": 1.5, **values})
    Ledger(house / "results.tsv").append(row)
    folder = run_dir(run)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.weights.write_bytes(b"weights")
    (folder.path / "train_cuda.py").write_text(f"# {run}")
    folder.record.write_text(json.dumps({"trainer": "train_cuda.py"}))
    return row


def test_names_of_runs(house):
    for i, bpb in enumerate((1.5, 1.3, 1.4)):
        add(house, f"2026-{i}", val_bpb=bpb)
    names = {name: find_run(name).run for name in ("best", "last", "2026-0", "2026-1")}
    assert names == {"best": "2026-1", "last": "2026-2", "2026-0": "2026-0", "2026-1": "2026-1"}
    with pytest.raises(UserError, match="3 runs begin with"):
        find_run("2026")
    with pytest.raises(UserError, match="has no run '2025'"):
        find_run("2025")
    add(house, "2027-0", val_bpb=2.5, track="another")
    assert find_run("best").run == "2027-0"  # boards do not mix


def test_the_best_of_practice_is_the_best_until_a_run_ranks(house):
    for run, bpb in (("a", 1.5), ("b", 1.3), ("c", 1.4)):
        prune_weights(add(house, run, val_bpb=bpb, budget=10.0, marks="short"), False)
    assert find_run("best").run == "b"
    assert [run for run in "abc" if run_dir(run).weights.exists()] == ["a", "b"]  # the first and the best
    add(house, "busy", val_bpb=1.0, budget=10.0, marks="short,contended")
    assert find_run("best").run == "b"
    add(house, "ranked", val_bpb=1.9)
    assert find_run("best").run == "ranked"


def test_an_id_that_begins_another_is_found(house):
    add(house, "2026-1")
    add(house, "2026-10")
    assert find_run("2026-1").run == "2026-1"


def test_the_trainer_of_a_run(house):
    row = add(house, "a")
    assert trainer_of(row).read_text() == "# a"
    assert trainer_of(Row(run="elsewhere")) is None and trainer_of(Row()) is None


def test_a_loss_curve_that_is_not_there_is_empty(house):
    assert loss_curve("nothing") == [] and loss_curve("") == []


@pytest.fixture
def killed(house):
    """killed(run, pid) -> the folder of a run whose launcher is that process."""

    def killed(run, pid, **row):
        folder = run_dir(run)
        folder.path.mkdir(parents=True)
        folder.weights.write_bytes(b"weights")
        folder.record.write_text(json.dumps({"row": {"run": run, "description": "mine", **row}, "pid": pid}))
        return folder

    return killed


@pytest.fixture
def alive():
    """The id of a process that lives as long as the test."""
    process = subprocess.Popen(["sleep", "100"])
    yield process.pid
    process.kill()
    process.wait()


def gone():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_whose_launcher_was_killed_gets_its_row_once(house, killed, capsys):
    folder = killed("20260101-000000-aaaa", gone())
    for _ in range(2):
        record_killed_runs()
    [row] = Ledger(house / "results.tsv").rows()
    assert (row.status, row.description) == ("crash", "mine") and Flag.CUT_OFF in row.flags and not row.judged
    assert not folder.weights.exists()
    assert "recorded as a crash" in capsys.readouterr().err


def test_a_run_under_way_is_left_alone(house, killed, alive):
    folder = killed("20260101-000000-bbbb", alive)
    record_killed_runs()
    assert not (house / "results.tsv").exists() and folder.weights.exists()


def test_a_launcher_records_what_an_error_kept_it_from_recording(house, killed):
    killed("20260101-000000-bbbb", os.getpid())
    record_killed_runs()
    assert [row.status for row in Ledger(house / "results.tsv").rows()] == ["crash"]


@pytest.mark.parametrize("pid", [None, -1, 2.5, "x", 10**30, True, []])
def test_an_odd_process_id_is_of_no_launcher(house, killed, pid):
    killed("20260101-000000-bbbb", pid)
    record_killed_runs()
    assert [row.status for row in Ledger(house / "results.tsv").rows()] == ["crash"]


def test_a_score_is_not_lost_with_its_launcher(house, killed, capsys):
    """It was killed between result.json and the row: the run is judged by the next command."""
    about = {"rules": 1, "budget": 300.0, "track": "t"}
    scored = killed("20260101-000000-aaaa", gone(), source="a", **about)
    write_json(scored.result, asdict(RESULT))
    worse = killed("20260101-000001-aaaa", gone(), source="b", parent="a", **about)
    write_json(worse.result, asdict(replace(RESULT, val_bpb=1.6)))
    record_killed_runs()
    first, second = Ledger(house / "results.tsv").rows()
    assert (first.status, first.val_bpb, first.num_steps) == ("keep", 1.5, 10) and first.judged
    assert second.status == "discard" and second.effect > 0.05
    assert scored.weights.exists() and not worse.weights.exists()
    assert "had its score when its launcher was killed" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"[]", b'{"val_bpb": 1.5}', b"\xff", b'{"val_bpb": NaN}'])
def test_a_damaged_score_is_none(house, killed, content):
    killed("20260101-000000-aaaa", gone()).result.write_bytes(content)
    record_killed_runs()
    [row] = Ledger(house / "results.tsv").rows()
    assert row.status == "crash" and Flag.CUT_OFF in row.flags


# --- A ledger that lost rows --------------------------------------------------------------------------------


@pytest.fixture
def three_runs(house):
    """The ledger of three runs that ended in order, with their folders."""
    for number, status in enumerate(("keep", "crash", "discard")):
        folder = run_dir(f"2026010{number}-000000-aaaa")
        folder.path.mkdir(parents=True)
        folder.record.write_text(json.dumps({"row": {"run": folder.run_id}, "pid": gone()}))
        row = Row(run=folder.run_id, status=status, time=f"2026-01-0{number}T00:00:00Z", val_bpb=1.5)
        append_row(row)
    return house / "results.tsv"


DAMAGES = {
    "removed": lambda lines: None,
    "emptied": lambda lines: [],
    "zeroed": lambda lines: [b"\0" * 500],
    "something else": lambda lines: [b"my notes\n", b"1\t2\n"],
    "without a header": lambda lines: lines[1:],
    "with a torn header": lambda lines: [lines[0][:30] + b"\n", *lines[1:]],
    "with half a header": lambda lines: [lines[0][:-200], *lines[1:]],
    "with a foreign word in its header": lambda lines: [
        lines[0].replace(b"status", b"st\xfftus"),
        *lines[1:],
    ],
    "without its second row": lambda lines: [*lines[:2], lines[3]],
    "without its last row": lambda lines: lines[:3],
    "with a score that is none": lambda lines: [*lines[:2], lines[2].replace(b"1.500000", b"nan"), lines[3]],
    "cut": lambda lines: [*lines[:2], lines[2][:40]],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_ledger_is_written_again_from_the_runs(three_runs, damage):
    before = three_runs.read_bytes()
    lines = DAMAGES[damage](before.splitlines(keepends=True))
    three_runs.unlink()
    if lines is not None:
        three_runs.write_bytes(b"".join(lines))
    record_killed_runs()
    append_row(Row(run="20260109-000000-aaaa", status="crash", time="2026-01-09T00:00:00Z"))
    after = three_runs.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == before.count(b"\n") + 1


def test_a_line_says_that_rows_were_lost(three_runs, capsys):
    three_runs.unlink()
    for _ in range(2):
        record_killed_runs()
    said = capsys.readouterr().err
    assert said.count("results.tsv had lost 3 of the runs") == 1 and said.count("\n") == 1


def test_what_others_wrote_into_a_damaged_ledger_is_kept(three_runs):
    header, first, _, last = three_runs.read_text().splitlines(keepends=True)
    three_runs.write_text(f"{header}{first}not a row\n{last}")
    record_killed_runs()
    [copy] = three_runs.parent.glob("results.tsv.old-*")
    assert "not a row" in copy.read_text()


def test_a_ledger_that_cannot_be_written_costs_no_row(three_runs, capsys):
    before = three_runs.read_bytes()
    three_runs.unlink()
    three_runs.mkdir()
    folder = run_dir("20260109-000000-aaaa")
    folder.path.mkdir()
    folder.record.write_text("{}")
    row = Row(run=folder.run_id, status="keep", val_bpb=1.4, time="2026-01-09T00:00:00Z")
    append_row(row)
    assert "is not in the ledger yet, the next command adds it" in capsys.readouterr().err
    append_row(replace(row, status="crash"))  # as the launcher does with its own faults
    with pytest.raises((UserError, OSError)):
        record_killed_runs()
    three_runs.rmdir()
    record_killed_runs()
    assert three_runs.read_bytes().startswith(before)
    assert [row.status for row in Ledger(three_runs).rows()] == ["keep", "crash", "discard", "keep"]


def test_a_row_is_written_once(three_runs):
    [row, *_] = Ledger(three_runs).rows()
    append_row(replace(row, status="crash", reason="the launcher failed"))
    assert [row.status for row in Ledger(three_runs).rows()] == ["keep", "crash", "discard"]


RECORD = "import sys; from launcher.runs import record_killed_runs; sys.stdin.read(); record_killed_runs()"


def test_launchers_that_start_together_record_a_killed_one_once(house, killed):
    for repetition in range(3):
        killed(f"20260101-00000{repetition}-aaaa", gone())
        launchers = [
            subprocess.Popen([sys.executable, "-c", RECORD], cwd=ROOT, stdin=subprocess.PIPE)
            for _ in range(4)
        ]
        for launcher in launchers:  # each has imported what it needs, or will soon
            launcher.stdin.close()
        assert [launcher.wait() for launcher in launchers] == [0] * 4
        assert len(Ledger(house / "results.tsv").rows()) == repetition + 1


def test_a_refuted_run_is_not_the_best(house):
    add(house, "a", val_bpb=1.3)
    add(house, "b", val_bpb=1.4)
    Ledger(house / "results.tsv").append(Row(run="a", status="refuted"))
    assert find_run("best").run == "b"


def test_of_several_seeds_the_weights_of_the_best_stay(house):
    for run, bpb in (("first", 1.6), ("a", 1.5), ("b", 1.4), ("c", 1.6)):
        prune_weights(add(house, run, val_bpb=bpb, status="keep"), False)
    assert find_run("best").run == "b" and run_dir("b").weights.exists()
    assert not run_dir("a").weights.exists() and not run_dir("c").weights.exists()
    assert run_dir("first").weights.exists()  # verify compares with it


def test_weights_of_the_best_and_those_asked_for_stay(house):
    asked = {"c"}
    for run, bpb, status in (
        ("a", 1.5, "keep"),
        ("b", 1.4, "keep"),
        ("c", 1.6, "discard"),
        ("d", 1.7, "discard"),
    ):
        prune_weights(add(house, run, val_bpb=bpb, status=status), run in asked)
    assert [run for run in "abcd" if run_dir(run).weights.exists()] == ["a", "b", "c"]


def test_the_weights_of_the_best_stay_whatever_the_ledger_rounds(house):
    """The row that was just written has more digits and other blanks than the one that is read back."""
    row = add(house, "a", petaflops=13712.345, tokens_per_second=1911045.4, description="two\twords")
    prune_weights(row, False)
    assert run_dir("a").weights.exists()


def test_a_better_run_of_another_board_frees_nothing(house):
    prune_weights(add(house, "a"), False)
    prune_weights(add(house, "b", val_bpb=1.0, track="another"), False)
    assert run_dir("a").weights.exists() and run_dir("b").weights.exists()
