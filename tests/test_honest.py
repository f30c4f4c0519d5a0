"""The honest trainers pass every check: 20 seeds each, none flagged. And the checks, by themselves."""

import importlib

import numpy as np
import pytest

from backends import checks


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "mlx-cpu"])
def test_twenty_seeds_pass(house, monkeypatch, platform):
    """In one process: new model, a few steps of training, every check that a run goes through."""
    monkeypatch.setenv("AUTORESEARCH_PLATFORM", platform)
    if platform == "mlx-cpu":
        pytest.importorskip("mlx.core")
    backend = importlib.import_module("backends.mlx" if platform == "mlx-cpu" else "backends.cuda")
    trainer = importlib.reload(importlib.import_module("train_mlx" if platform == "mlx-cpu" else "train_cuda"))
    monkeypatch.setattr(backend.Experiment, "_watch_validation_rows", lambda self: None)  # audit hooks of 20 seeds would pile up
    scores = []
    for seed in range(20):
        monkeypatch.setenv("AUTORESEARCH_SEED", str(seed))
        exp = backend.Experiment()
        exp.val_tokens = 4096
        model = trainer.build_model(exp.track, exp.platform)
        optimizer = trainer.Optimizer(model)
        if platform == "mlx-cpu":
            train_step = trainer.make_train_step(model, optimizer)
            exp.start(model, 2, model.flops_per_token())
            steps = [train_step(exp.batch, step / 6) for step in range(6)]
        else:
            exp.start(model, 2, model.flops_per_token())
            steps = [trainer.train_step(model, model.trunk, optimizer, exp.batch, step / 6) for step in range(6)]
        for step, loss in enumerate(steps):
            exp.log(step, loss)
        scores.append(exp.score(model, 8)[0])  # raises when a check refuses
    assert len(set(scores)) == 20 and 2 < min(scores) <= max(scores) < 8


def uniform(x, y):
    return np.full(y.shape, np.log(50.0), np.float32)


def by_row(leak):
    """Losses of a toy model: a hash of what it may see. leak(x, t): what else position t looks at."""
    def nats(x, y):
        out = np.zeros(y.shape, np.float32)
        for b in range(len(x)):
            for t in range(x.shape[1]):
                out[b, t] = (int(x[b, : t + 1].sum()) * 31 + leak(x, b, t)) % 97 / 10
        return out
    return nats


ROWS = np.random.default_rng(0).integers(0, 50, (4, 33))


@pytest.mark.parametrize("leak, says", [
    (lambda x, b, t: 0, None),
    (lambda x, b, t: x[b, min(t + 1, x.shape[1] - 1)], "not causal"),
    (lambda x, b, t: x[b, -1], "not causal"),
    (lambda x, b, t: x[(b + 1) % len(x), 0], "not independent"),
])
def test_causal(leak, says):
    found = checks.causal(by_row(leak), ROWS, 50, 1e-3, np.random.default_rng(1))
    assert (found is None) if says is None else says in found


def test_noise_of_the_arithmetic_is_allowed():
    rng = np.random.default_rng(2)
    noisy = lambda x, y: uniform(x, y) + rng.uniform(-0.01, 0.01, y.shape).astype(np.float32)
    assert checks.causal(noisy, ROWS, 50, checks.BF16_TOLERANCE, np.random.default_rng(3)) is None
    assert "not causal" in checks.causal(noisy, ROWS, 50, checks.FP32_TOLERANCE, np.random.default_rng(3))
    assert "NaN" in checks.causal(lambda x, y: uniform(x, y) * np.nan, ROWS, 50, 1.0, rng)


def test_the_others():
    assert checks.untrained(np.log(50), 50) is None and "trained before exp.start" in checks.untrained(2.0, 50)
    assert checks.proper((4, 32, 50), (4, 32), 50) is None and "must return logits" in checks.proper((4, 50), (4, 32), 50)
    assert checks.same_score(np.ones((2, 3)), np.ones((2, 3))) is None and "twice differs" in checks.same_score(np.ones((2, 3)), 1.1 * np.ones((2, 3)))
    assert "twice differs" in checks.same_score(np.ones(3), np.full(3, np.nan))


def test_a_patched_harness_is_noticed(house, monkeypatch):
    import backends.experiment
    import prepare

    class Experiment(backends.experiment.Experiment):
        def __init__(self):
            pass

    exp = Experiment()
    assert checks.harness_intact(exp) is None
    for target, name, value in ((prepare, "row_totals", lambda *a: None), (prepare, "RULES", 7), (backends.experiment.Experiment, "score", lambda *a: (0, 0, 0)),
                                (checks, "causal", lambda *a: None)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert name in checks.harness_intact(exp)
    exp.score = lambda *a: (0, 0, 0)
    assert "exp.score was replaced" in checks.harness_intact(exp)
