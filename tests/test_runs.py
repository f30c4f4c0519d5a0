"""The runs on record: names, killed launchers, weights."""

import json
import os
import subprocess
import sys

import pytest

from launcher.ledger import Flag, Ledger, Row
from launcher.runs import (
    find_run,
    loss_curve,
    prune_weights,
    record_killed_runs,
    run_dir,
    trainer_of,
)
from prepare import UserError


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
    assert folder.recorded.exists() and not folder.weights.exists()
    assert "recorded as a crash" in capsys.readouterr().err


def test_a_run_under_way_is_left_alone(house, killed):
    folder = killed("20260101-000000-bbbb", os.getpid())
    record_killed_runs()
    assert not (house / "results.tsv").exists() and folder.weights.exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"row": 3, "pid": "x"}', '{"row": {"odd": 1}, "pid": 99999999}']
)
def test_a_damaged_record_ends_nothing(house, killed, content):
    killed("20260101-000000-cccc", gone()).record.write_text(content)
    killed("20260101-000000-dddd", gone())
    record_killed_runs()
    assert [row.run for row in Ledger(house / "results.tsv").rows()] == ["20260101-000000-dddd"]


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
