"""`show` and `restore`: what a run was, and its trainer back in its place."""

import json

import pytest

from launcher import show
from launcher.ledger import Ledger, Row
from launcher.runs import run_dir
from launcher.show import restore_trainer, show_run, sparkline
from prepare import UserError


def add(house, run, source, text, **values):
    """Put a run with its trainer into the ledger."""
    row = Row(
        **{
            "run": run,
            "status": "keep",
            "rules": 1,
            "time": run,
            "platform": "cpu",
            "source": source,
            **values,
        }
    )
    Ledger(house / "results.tsv").append(row)
    folder = run_dir(run)
    folder.path.mkdir(parents=True)
    (folder.path / "train_cuda.py").write_text(text)
    folder.record.write_text(json.dumps({"trainer": "train_cuda.py"}))
    return folder


def point(at, loss):
    log = {
        "event": "log",
        "step": 1,
        "loss": loss,
        "smooth": loss,
        "tokens": 1,
        "tokens_per_s": 1.0,
        "mfu": 1.0,
    }
    return json.dumps({"at": at, "elapsed": at, **log}) + "\n"


def test_a_run_is_shown_with_its_curve_and_what_it_changed(house, capsys):
    add(house, "2026-1", "a", "LR = 0.1\nWIDTH = 64\n", val_bpb=1.5)
    folder = add(house, "2026-2", "b", "LR = 0.2\nWIDTH = 64\n", val_bpb=1.4, description="twice the rate")
    folder.events.write_text("".join(point(float(i), 6.0 - i / 100) for i in range(300)))
    show_run("best")
    out = capsys.readouterr().out
    assert "val_bpb: 1.4\n" in out and "description: twice the rate" in out
    assert "loss 6.000 -> 3.010 over 299 s" in out and "█" in out and "▁" in out
    assert "-LR = 0.1\n+LR = 0.2" in out and "2026-1 (1.500000)" in out


def test_a_program_may_read_a_run(house, capsys):
    add(house, "2026-1", "a", "LR = 0.1\n", val_bpb=1.5, track="tiny", device="a CPU", budget=300.0)
    folder = add(house, "2026-2", "b", "LR = 0.2\n", status="crash", marks="battery,slept", parent="a")
    folder.events.write_text(point(1.0, 6.0) + point(2.0, 5.0))
    show_run("last", as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data["row"]["val_bpb"] is None and data["row"]["flags"] == ["battery", "slept"]
    assert data["loss"] == [[1.0, 6.0], [2.0, 5.0]] and data["diff"][-1] == "+LR = 0.2"
    show_run("best")
    assert capsys.readouterr().out.startswith("board: tiny on a CPU (cpu): 300 s, ")


def test_without_a_ranked_run_best_says_what_to_do(house):
    add(house, "2026-1", "a", "LR = 0.1\n", val_bpb=1.5, marks="contended")
    for name in ("best", "baseline"):
        with pytest.raises(
            UserError, match=f"none of the 1 runs is ranked, .* no '{name}' .* autoresearch run"
        ):
            show_run(name)


def test_a_run_is_compared_with_what_it_was_made_from_not_with_the_best_before_it(house, capsys):
    add(house, "2026-1", "a", "LR = 0.1\n", val_bpb=1.5)
    add(house, "2026-2", "b", "LR = 0.2\n", val_bpb=1.3, parent="a")
    add(house, "2026-3", "c", "LR = 0.3\n", val_bpb=1.4, parent="a")
    show_run("2026-3")
    assert "-LR = 0.1\n+LR = 0.3" in capsys.readouterr().out


def test_a_trainer_that_is_no_utf8_is_shown(house, capsys):
    add(house, "2026-1", "a", "pass\n")
    folder = add(house, "2026-2", "b", "", parent="a")
    (folder.path / "train_cuda.py").write_bytes(b"caf\xe9 = 1\n")
    show_run("2026-2")
    assert "+caf\ufffd = 1" in capsys.readouterr().out


def test_a_sparkline_goes_from_high_to_low():
    line = sparkline([(float(i), 6.0 - i / 100) for i in range(300)])
    assert len(line) == 72 and line[0] == "█" and line[-1] == "▁"
    assert list(line) == sorted(line, reverse=True)
    assert sparkline([]) == sparkline([(0.0, 1.0)]) == "" and len(sparkline([(0.0, 1.0), (1.0, 1.0)])) == 72


def test_a_trainer_is_put_back_unless_an_edit_would_be_lost(repository, house, capsys):
    add(house, "2026-1", "a", "SCORE = 1.1\n", val_bpb=1.1)
    trainer = repository / "train_cuda.py"
    restore_trainer("2026-1", force=False)  # the file was as committed
    assert trainer.read_text() == "SCORE = 1.1\n" and "is now that of run 2026-1" in capsys.readouterr().err
    trainer.write_text("my own edit\n")
    with pytest.raises(UserError, match="changes that no run and no commit holds.*--force") as error:
        restore_trainer("2026-1", force=False)
    assert error.value.code == 2 and trainer.read_text() == "my own edit\n"
    restore_trainer("2026-1", force=True)
    assert trainer.read_text() == "SCORE = 1.1\n"


def test_a_trainer_that_a_run_holds_may_be_replaced(repository, house):
    text = "SCORE = 1.2\n"
    add(house, "2026-1", show.source_hash(text.encode()), text)
    add(house, "2026-2", "b", "SCORE = 1.3\n")
    (repository / "train_cuda.py").write_text(text)
    restore_trainer("2026-2", force=False)
    assert (repository / "train_cuda.py").read_text() == "SCORE = 1.3\n"


def test_a_run_without_a_trainer_says_so(house):
    Ledger(house / "results.tsv").append(Row(run="2026-1", status="keep"))
    with pytest.raises(UserError, match="made on another machine"):
        restore_trainer("2026-1", force=False)
