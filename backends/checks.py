"""
Is the model allowed, and is the harness still itself? Pure numpy: both backends ask the same questions.

Each check returns None, or one line that says what is wrong: the run is then `invalid`.
"""

import importlib.util
import inspect
import math
import sys
import types

import numpy as np

UNTRAINED_SHARE = 0.8   # a new model's loss is at least this share of uniform, log(vocab_size)
BF16_TOLERANCE = 0.05   # nats: a logit of 15 in bfloat16 is rounded to 1/16
FP32_TOLERANCE = 1e-3
RESCORE_TOLERANCE = 1e-3  # nats a token, between two scorings of the same rows


def untrained(mean_nats, vocab_size):
    """A model that was initialised but not trained cannot predict far better than chance."""
    if mean_nats < UNTRAINED_SHARE * math.log(vocab_size):
        return (f"the model was trained before exp.start: its loss is {mean_nats:.2f} nats a token, "
                f"chance is {math.log(vocab_size):.2f}; restore the initial state after the warm-up")
    return None


def proper(logits_shape, target_shape, vocab_size):
    """Logits are [B, T, vocab_size]."""
    if tuple(logits_shape) != (*target_shape, vocab_size):
        return f"model(x) has shape {list(logits_shape)}, it must return logits {[*target_shape, vocab_size]}"
    return None


def causal(nats_of, rows, vocab_size, tolerance, rng, cuts=4):
    """The loss at a position must not depend on later tokens of the row, nor on other rows of the batch.

    nats_of: (x, y), int64 [B, T] -> float32 [B, T]; rows: int64 [B, T + 1], in the shape in which the model is
    scored, B >= 2. The tokens of x behind a cut are replaced while y stays, and the losses before the cut must
    stay too. One cut falls at the last token, where a mask that is off by one shows most.
    """
    x, y = rows[:, :-1], rows[:, 1:]
    base = nats_of(x, y)
    if not np.isfinite(base).all():
        return "model(x) holds NaN or infinity"
    T = x.shape[1]
    for cut in [T - 1, *rng.integers(1, T, size=cuts - 1)]:
        other = x.copy()
        other[:, cut:] = (x[:, cut:] + rng.integers(1, vocab_size, size=x[:, cut:].shape)) % vocab_size
        moved = np.abs(nats_of(other, y)[:, :cut] - base[:, :cut]).max(axis=0)
        if not moved.max() <= tolerance:
            first = int(np.argmax(~(moved <= tolerance)))
            return (f"not causal: other tokens from position {cut} on move the loss at position {first} "
                    f"by {moved.max():.3g} nats (noise is below {tolerance:.2g}): a position sees its future")
    other = x.copy()
    other[1:] = rng.integers(0, vocab_size, size=x[1:].shape)
    moved = float(np.abs(nats_of(other, y)[0] - base[0]).max())
    if not moved <= tolerance:
        return f"rows of a batch are not independent: other rows move the loss of a row by {moved:.3g} nats (noise is below {tolerance:.2g})"
    return None


def same_score(first, second):
    """Scoring is a function of the weights: twice gives the same. first, second: nats [B, T]."""
    moved = abs(float(np.mean(first, dtype=np.float64)) - float(np.mean(second, dtype=np.float64)))
    if not moved <= RESCORE_TOLERANCE:
        return f"scoring the same rows twice differs by {moved:.3g} nats a token: the model keeps state or draws random numbers"
    return None


# ---------------------------------------------------------------------------
# The harness in this process against its files
# ---------------------------------------------------------------------------

def harness_intact(experiment):
    """The functions of the harness that this process holds are those that its source files define."""
    for name in [n for n in sys.modules if n == "prepare" or n.startswith("backends.")]:
        module = sys.modules[name]
        spec = importlib.util.spec_from_file_location(f"_fresh_{name.replace('.', '_')}", module.__file__)
        fresh = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = fresh  # dataclasses look their module up
        try:
            spec.loader.exec_module(fresh)
        finally:
            del sys.modules[spec.name]
        changed = first_difference(module, fresh, name)
        if changed:
            return f"the harness was changed while it ran: {changed} is not what its file says"
    for attribute in vars(experiment):
        if callable(getattr(type(experiment), attribute, None)):
            return f"the harness was changed while it ran: exp.{attribute} was replaced"
    return None


def first_difference(held, fresh, path):
    for name, expected in vars(fresh).items():
        at = f"{path}.{name}"
        if isinstance(expected, type) and expected.__module__ == fresh.__name__:
            actual = vars(held).get(name)
            if not isinstance(actual, type):
                return at
            found = first_difference_in_class(actual, expected, at)
            if found:
                return found
        elif isinstance(expected, (types.FunctionType, int, float, str, tuple)) and not name.startswith("__"):
            if not same(vars(held).get(name), expected):
                return at
    return None


def first_difference_in_class(held, fresh, path):
    for name, expected in vars(fresh).items():
        if code_of(expected) is not None and not same(vars(held).get(name), expected):
            return f"{path}.{name}"
    return None


def same(held, expected):
    code = code_of(expected)
    if code is None:
        return isinstance(expected, types.FunctionType) or type(held) is type(expected) and held == expected
    return code_of(held) == code


def code_of(item):
    """The code object of a function, method or property; None for anything else."""
    if isinstance(item, property):
        item = item.fget
    item = inspect.unwrap(item) if callable(item) else getattr(item, "__func__", item)
    return getattr(item, "__code__", None)
