"""The checks of a model and of the harness, by themselves."""

import importlib.machinery

import numpy as np
import pytest

import backends.experiment
import backends.platforms
import backends.protocol
import prepare
from backends import checks


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


@pytest.mark.parametrize(
    "leak, says",
    [
        (lambda x, b, t: 0, None),
        (lambda x, b, t: x[b, min(t + 1, x.shape[1] - 1)], "not causal"),
        (lambda x, b, t: x[b, -1], "not causal"),
        (lambda x, b, t: x[(b + 1) % len(x), 0], "not independent"),
    ],
)
def test_causal(leak, says):
    found = checks.causal(by_row(leak), ROWS, 50, 1e-3, np.random.default_rng(1))
    assert (found is None) if says is None else says in found


def test_noise_of_the_arithmetic_is_allowed():
    rng = np.random.default_rng(2)

    def noisy(x, y):
        return uniform(x, y) + rng.uniform(-0.01, 0.01, y.shape).astype(np.float32)

    assert checks.causal(noisy, ROWS, 50, checks.BF16_TOLERANCE, np.random.default_rng(3)) is None
    assert "not causal" in checks.causal(noisy, ROWS, 50, checks.FP32_TOLERANCE, np.random.default_rng(3))
    assert "NaN" in checks.causal(lambda x, y: uniform(x, y) * np.nan, ROWS, 50, 1.0, rng)


def test_the_others():
    assert checks.untrained(np.log(50), 50) is None and "trained before exp.start" in checks.untrained(
        2.0, 50
    )
    assert checks.proper((4, 32, 50), (4, 32), 50) is None and "must return logits" in checks.proper(
        (4, 50), (4, 32), 50
    )
    assert checks.same_score(
        np.ones((2, 3)), np.ones((2, 3))
    ) is None and "twice differs" in checks.same_score(np.ones((2, 3)), 1.1 * np.ones((2, 3)))
    assert "twice differs" in checks.same_score(np.ones(3), np.full(3, np.nan))


class Sound(backends.experiment.Experiment):
    """An experiment that needs no device: only its class is looked at."""

    def __init__(self):
        pass


Sound.__abstractmethods__ = frozenset()


def test_the_harness_as_its_files_say_is_intact():
    assert checks.harness_intact(Sound()) is None


@pytest.mark.parametrize(
    "target, name, value",
    [
        (prepare, "row_totals", lambda *a: None),
        (prepare, "RULES", 7),
        (prepare.Prepared, "rows", lambda self, split: None),
        (backends.experiment.Experiment, "score", lambda *a: (0, 0, 0)),
        (backends.experiment.Experiment, "elapsed", property(lambda self: 0.0)),
        (backends.protocol.RunSettings, "from_env", classmethod(lambda cls: cls())),
        (backends.platforms, "load_platforms", lambda path=None: {}),
        (backends.experiment, "bits_per_byte", lambda *a: (0.1, 0.001)),  # a name that it imports
        (backends.experiment, "checks", None),
        (checks, "causal", lambda *a: None),
        (checks, "UNTRAINED_SHARE", 0.0),
    ],
)
def test_a_patched_harness_is_noticed(monkeypatch, target, name, value):
    monkeypatch.setattr(target, name, value)
    assert f"{name} is not what its file says" in checks.harness_intact(Sound())


def test_a_method_replaced_on_the_experiment_is_noticed():
    exp = Sound()
    exp.score = lambda *a: (0, 0, 0)
    assert "exp.score was replaced" in checks.harness_intact(exp)


def test_the_harness_is_compared_without_running_it(monkeypatch):
    """Whatever a module does when it is imported, it does once."""
    executed = []
    monkeypatch.setattr("builtins.exec", lambda *a: executed.append(a))
    loader = importlib.machinery.SourceFileLoader
    monkeypatch.setattr(loader, "exec_module", lambda self, module: executed.append(module))
    assert checks.harness_intact(Sound()) is None and executed == []
