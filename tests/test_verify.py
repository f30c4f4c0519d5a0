"""`autoresearch verify`: the saved model scored in a fresh process."""

import pytest

from launcher.ledger import REFUTED, VERIFIED, Ledger, Row
from launcher.verify import Scores, compare


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "mlx-cpu"])
def test_a_saved_run_is_verified_and_a_damaged_one_refuted(autoresearch, house, platform):
    if platform == "mlx-cpu":
        pytest.importorskip("mlx.core")
    done = autoresearch("run", "--budget", "3", "--keep-weights", "--platform", platform)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = Ledger(house / "results.tsv").rows()
    assert row.platform == platform and 0.5 < row.val_bpb < 8
    good = autoresearch("verify", row.run[:18])
    assert good.returncode == 0, good.stdout + good.stderr
    assert "status: verified" in good.stdout and "sealed minus val" in good.stdout
    weights = house / "runs" / row.run / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-40000:-20000] = bytes(20000)
    weights.write_bytes(data)
    bad = autoresearch("verify", "last")
    assert bad.returncode == 5 and "status: refuted" in bad.stdout
    weights.unlink()
    gone = autoresearch("verify", "last")
    assert gone.returncode == 1 and "has no weights" in gone.stderr


ROW = Row(run="a", val_bpb=1.5, fingerprint="f", val_tokens=1000)


@pytest.mark.parametrize(
    "scores, status, says",
    [
        (Scores(1.5, 0.01, 1000, 1.501, 0.01, 1000, "f"), VERIFIED, "no sign that val is overfitted"),
        (Scores(1.5, 0.01, 1000, 1.6, 0.01, 1000, "f"), VERIFIED, "overfitted, or another mixture"),
        (Scores(1.502, 0.01, 1000, 1.5, 0.01, 1000, "f"), REFUTED, "the ledger says 1.500000"),
    ],
)
def test_what_a_second_scoring_says(scores, status, says):
    word, reason = compare(ROW, scores)
    assert word == status and says in reason
