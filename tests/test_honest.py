"""The honest trainers pass every check of a run: 20 seeds each, none flagged."""

import importlib

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "platform, framework, trainer", [("cpu", "cuda", "train_cuda"), ("mlx-cpu", "mlx", "train_mlx")]
)
def test_twenty_seeds_pass(house, monkeypatch, platform, framework, trainer):
    """In one process: a new model, a few steps of training, every check that a run goes through."""
    monkeypatch.setenv("AUTORESEARCH_PLATFORM", platform)
    if framework == "mlx":
        pytest.importorskip("mlx.core")
    backend = importlib.import_module(f"backends.{framework}")
    module = importlib.reload(importlib.import_module(trainer))
    monkeypatch.setattr(
        backend.Experiment, "_watch_held_out_rows", lambda self: None
    )  # audit hooks would pile up
    scores = []
    for seed in range(20):
        monkeypatch.setenv("AUTORESEARCH_SEED", str(seed))
        exp = backend.Experiment()
        exp.val_tokens = 4096
        model = module.build_model(exp.track, exp.platform)
        train_step = module.make_train_step(model, module.Optimizer(model))
        exp.start(model, 2, model.flops_per_token())
        for step in range(6):
            exp.log(step, train_step(exp.batch, step / 6))
        scores.append(exp.score(model, 8)[0])  # raises when a check refuses
    assert len(set(scores)) == 20 and 2 < min(scores) <= max(scores) < 8
