"""What keeps a night in order: noise, repetition within it, weights, clean, laptop marks, memory."""

import json

import pytest
from conftest import RESULT

from launcher import run as runner
from launcher.child import Outcome
from launcher.ledger import Ledger, Row
from launcher.repo import source_hash
from prepare import RULES, UserError


@pytest.fixture
def scores(house, monkeypatch):
    """Experiments without training: each run takes the next of the scores that the test names."""
    waiting, seeds = [], []

    def supervise(trainer, run_dir, settings, platform, budget, watch, show):
        seeds.append(int(settings["AUTORESEARCH_SEED"]))
        (run_dir / "model.safetensors").write_bytes(b"weights")
        return Outcome(training_seconds=300.0, total_seconds=310.0, exit_code=0,
                       result={**RESULT, "val_bpb": waiting.pop(0), "seed": seeds[-1]})
    monkeypatch.setattr(runner, "supervise", supervise)
    monkeypatch.setattr(runner, "harness_modified", lambda: False)
    return waiting, seeds


def trainer(house, text):
    path = house / "trainer.py"
    path.write_text(text)
    return path


def test_a_night_of_verdicts(scores, house, capsys):
    waiting, seeds = scores
    run = lambda text, *values: (waiting.extend(values), runner.run(runner.Options(text, trainer=trainer(house, text))))[1]
    assert run("baseline", 1.500) == 0
    assert "first result" in Ledger(house / "results.tsv").rows()[-1].reason
    assert run("worse", 1.510) == 3
    assert run("better, who knows", 1.490) == 0
    assert "no noise on record" in Ledger(house / "results.tsv").rows()[-1].reason
    assert run("better, who knows", 1.495) == 0  # unchanged: it stays the best


def test_noise_is_recorded_and_read(scores, house, capsys):
    from launcher.verify import noise

    waiting, seeds = scores
    trainer_text = (runner.ROOT / "train_cuda.py").read_text()
    waiting.extend([1.500, 1.502, 1.498])
    assert noise(3, "cpu", None, 300.0) == 0
    out = capsys.readouterr().out
    assert "noise_sigma: 0.002000" in out and "noise_runs: 3" in out and seeds == [1, 2, 3]
    assert all("noise" in r.mark_list and r.source == source_hash(runner.ROOT / "train_cuda.py") for r in Ledger(house / "results.tsv").rows())
    # within the noise (the margin of one run is 0.016): repeated with a second seed, and the means decide
    waiting.extend([1.499, 1.4985])
    assert runner.run(runner.Options("small", trainer=trainer(house, trainer_text + "# small\n"))) == 3
    first, second = Ledger(house / "results.tsv").rows()[-2:]
    assert first.reason.startswith("repeat:") and (first.seed, second.seed) == (1, 2) and "over 2 seeds, within the noise" in second.reason
    waiting.append(1.40)
    assert runner.run(runner.Options("large", trainer=trainer(house, trainer_text + "# large\n"))) == 0
    assert "beyond the noise" in Ledger(house / "results.tsv").rows()[-1].reason


def test_weights_of_the_best_and_those_asked_for_stay(scores, house, capsys):
    from launcher.verify import clean

    waiting, _ = scores
    waiting.extend([1.5, 1.4, 1.6, 1.7])
    for i, asked in enumerate((False, False, True, False)):
        runner.run(runner.Options(f"run {i}", trainer=trainer(house, f"# {i}"), keep_weights=asked))
    kept = [bool((house / "runs" / r.run / "model.safetensors").exists()) for r in Ledger(house / "results.tsv").rows()]
    assert kept == [False, True, True, False]
    orphan = house / "runs" / "20200101-000000-dead"
    orphan.mkdir()
    (orphan / "model.safetensors").write_bytes(b"x" * 2**20)
    clean(apply=False)
    assert (orphan / "model.safetensors").exists() and "would free" in capsys.readouterr().out
    clean(apply=True)
    assert not (orphan / "model.safetensors").exists() and "freed: 1.0 MiB" in capsys.readouterr().out
    assert len(list((house / "runs").glob("*/model.safetensors"))) == 2


@pytest.mark.parametrize("state, mark", [({"on_battery": True}, "battery"), ({"low_power_mode": True}, "low-power")])
def test_a_laptop_without_power_is_marked(scores, house, monkeypatch, state, mark, capsys):
    waiting, _ = scores
    waiting.append(1.5)
    monkeypatch.setattr(runner, "mac_state", lambda: state)
    assert runner.run(runner.Options("on the road", trainer=trainer(house, "#"))) == 6
    [row] = Ledger(house / "results.tsv").rows()
    assert row.marks == mark and not row.ranks and f"warning: {mark}" in capsys.readouterr().err
    assert json.loads((house / "runs" / row.run / "run.json").read_text())["laptop"] == state


def test_a_modified_harness_is_marked_but_ranks(scores, house, monkeypatch, capsys):
    waiting, _ = scores
    waiting.append(1.5)
    monkeypatch.setattr(runner, "harness_modified", lambda: True)
    runner.run(runner.Options("mine", trainer=trainer(house, "#")))
    [row] = Ledger(house / "results.tsv").rows()
    assert row.marks == "harness-modified" and row.ranks and row.rules == RULES
    assert "differs from the last commit" in capsys.readouterr().err


def test_a_model_too_large_for_a_mac_is_refused_with_the_batch_that_fits(house, monkeypatch):
    mx = pytest.importorskip("mlx.core")
    from backends.mlx import Experiment

    exp, said = object.__new__(Experiment), []
    exp._memory_limit, exp._events = 10 * 2**30, None
    exp._emit = lambda event, **values: said.append((event, values))
    monkeypatch.setattr(mx, "get_active_memory", lambda: 2 * 2**30)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 3 * 2**30)
    exp.check_memory(8)
    with pytest.raises(SystemExit, match="16 rows need about 18.0 GiB, this machine gives 10.0 GiB.*lower DEVICE_BATCH_SIZE to 8"):
        exp.check_memory(16)
    assert said[0][1]["kind"] == "oom"
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 13 * 2**30)
    with pytest.raises(SystemExit, match="lower N_LAYER or N_EMBD"):
        exp.check_memory(1)


def test_names_of_runs(house):
    from launcher.verify import find_run

    for i, bpb in enumerate((1.5, 1.3, 1.4)):
        Ledger(house / "results.tsv").append(Row(run=f"2026-{i}", val_bpb=bpb, status="keep", rules=1))
    assert [find_run(n).run for n in ("best", "last", "2026-0")] == ["2026-1", "2026-2", "2026-0"]
    with pytest.raises(UserError, match="3 runs begin with"):
        find_run("2026")
    Ledger(house / "results.tsv").append(Row(run="2027-0", val_bpb=2.5, status="keep", rules=1, track="another"))
    assert find_run("best").run == "2027-0"  # boards do not mix
