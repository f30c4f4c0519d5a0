"""`autoresearch verify`: the saved model scored in fresh processes, on val and on sealed text."""

import json

import numpy as np
import pytest

from launcher.ledger import REFUTED, VERIFIED, Ledger, Row
from launcher.score import Difference, Score
from launcher.verify import Scores, gap_between, print_outcome


def test_a_program_may_read_the_outcome(capsys):
    rng = np.random.default_rng(0)
    both = scores(1.5, 1.6, rng)
    print_outcome(Row(run="r1"), VERIFIED, "it matches", both, as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data["val_bpb"] == both.val.bpb and data["sealed_bpb"] == both.sealed.bpb
    assert (data["run"], data["status"]) == ("r1", VERIFIED)
    print_outcome(Row(run="r1"), REFUTED, "it differs", None, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"run": "r1", "status": REFUTED, "reason": "it differs"}


def damage(weights):
    data = bytearray(weights.read_bytes())
    data[-40000:-20000] = bytes(20000)
    weights.write_bytes(data)


@pytest.mark.slow
def test_a_run_of_mlx_is_verified_and_a_damaged_one_refuted(autoresearch, house):
    pytest.importorskip("mlx.core")
    done = autoresearch("run", "--budget", "3", "--keep-weights", "--platform", "mlx-cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    good = autoresearch("verify", "last")
    assert good.returncode == 0 and "status: verified" in good.stdout, good.stdout + good.stderr
    [row, _] = Ledger(house / "results.tsv").rows()
    assert row.platform == "mlx-cpu" and 0.5 < row.val_bpb < 8
    damage(house / "runs" / row.run / "model.safetensors")
    bad = autoresearch("verify", "last")
    assert bad.returncode == 5 and "status: refuted" in bad.stdout


@pytest.mark.slow
def test_a_saved_run_is_verified_and_a_damaged_one_refuted(autoresearch, house):
    for seed in (1, 2):
        done = autoresearch("run", "--budget", "3", "--keep-weights", "--seed", seed)
        assert done.returncode in (0, 3), done.stdout + done.stderr
    baseline, row = Ledger(house / "results.tsv").rows()
    assert row.platform == "cpu" and 0.5 < row.val_bpb < 8
    good = autoresearch("verify", row.run[:18])
    assert good.returncode == 0, good.stdout + good.stderr
    assert "status: verified" in good.stdout and "its gain over the baseline" in good.stdout
    first = autoresearch("verify", baseline.run)
    assert first.returncode == 0 and "it is the baseline" in first.stdout
    folder = house / "runs" / row.run
    weights = folder / "model.safetensors"
    damage(weights)
    bad = autoresearch("verify", "last")
    assert bad.returncode == 5 and "status: refuted" in bad.stdout
    weights.write_bytes(b"no weights")
    lost = autoresearch("verify", "last")
    assert lost.returncode == 6 and "status: unverifiable" in lost.stdout
    trainer = next(folder.glob("train_*.py"))
    trainer.write_text(trainer.read_text() + "# another\n")
    other = autoresearch("verify", "last")
    assert other.returncode == 5 and "is not the one that was run" in other.stdout
    weights.unlink()
    gone = autoresearch("verify", "last")
    assert gone.returncode == 1 and "has no weights" in gone.stderr
    words = [line.status for line in Ledger(house / "results.tsv").rows()[2:]]
    assert words == [VERIFIED, VERIFIED, REFUTED, "unverifiable", REFUTED]


@pytest.mark.slow
def test_a_ledger_that_says_something_else_is_noticed(autoresearch, house):
    done = autoresearch("run", "--budget", "2", "--keep-weights")
    assert done.returncode == 0, done.stdout + done.stderr
    path = house / "results.tsv"
    [row] = Ledger(path).rows()
    path.write_text(path.read_text().replace(f"{row.val_bpb:.6f}", "0.900000"))
    edited = autoresearch("verify", "last")
    assert edited.returncode == 5 and "the ledger says 0.900000" in edited.stdout


def scores(val, sealed, rng, baseline=None):
    """Made-up scores of 200 documents a split, in bits per byte, with what a document has of its own."""
    both = []
    for split, mean in enumerate((val, sealed)):
        if baseline is None:
            num_bytes = rng.integers(100, 10_000, 200)
            own = rng.normal(0.0, 0.3, 200)  # documents differ far more than models do
        else:
            before = (baseline.val, baseline.sealed)[split]
            num_bytes = before.num_bytes
            own = before.nats / np.log(2) / num_bytes - (1.5, 1.9)[split] + rng.normal(0.0, 0.01, 200)
        both.append(
            Score(mean, 0.0, 1, Difference(0.0, 0.0, 0.0), np.log(2) * num_bytes * (mean + own), num_bytes)
        )
    return Scores(*both)


def test_a_gain_that_both_sets_show_is_none_to_doubt_whatever_the_sets_are():
    """Sealed text may be harder than val by far more than chance: the baseline finds it so too."""
    rng = np.random.default_rng(0)
    refuted = 0
    for _ in range(200):
        baseline = scores(1.5, 1.9, rng)
        refuted += gap_between(scores(1.45, 1.85, rng, baseline), baseline).refutes
    assert refuted <= 1


def test_a_gain_on_val_alone_is_refuted():
    rng = np.random.default_rng(0)
    baseline = scores(1.5, 1.9, rng)
    gap = gap_between(scores(1.45, 1.9, rng, baseline), baseline)
    assert gap.refutes and gap.value == pytest.approx(0.05, abs=0.005)
