"""
Is the model allowed, and is the harness still itself? Pure numpy: both backends ask the same questions.

Each check returns None, or one line that says what is wrong: the run is then `invalid`.
"""

import ast
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

UNTRAINED_SHARE = 0.8  # a new model's loss is at least this share of uniform, log(vocab_size)
BF16_TOLERANCE = 0.05  # nats: a logit of 15 in bfloat16 is rounded to 1/16
FP32_TOLERANCE = 1e-3
RESCORE_TOLERANCE = 1e-3  # nats a token, between two scorings of the same rows

NatsOf = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (x, y), int64 [B, T] each -> float32 [B, T]


def untrained(mean_nats: float, vocab_size: int) -> str | None:
    """Check that the model is new: without training it cannot predict far better than chance."""
    if mean_nats < UNTRAINED_SHARE * math.log(vocab_size):
        return (
            f"the model was trained before exp.start: its loss is {mean_nats:.2f} nats a token, "
            f"chance is {math.log(vocab_size):.2f}; restore the initial state after the warm-up"
        )
    return None


def proper(logits_shape: Sequence[int], target_shape: Sequence[int], vocab_size: int) -> str | None:
    """Check that logits are [B, T, vocab_size]."""
    expected = [*target_shape, vocab_size]
    if list(logits_shape) != expected:
        return f"model(x) has shape {list(logits_shape)}, it must return logits {expected}"
    return None


def causal(
    nats_of: NatsOf,
    rows: np.ndarray,
    vocab_size: int,
    tolerance: float,
    rng: np.random.Generator,
    cuts: int = 4,
) -> str | None:
    """Check that a loss depends neither on later tokens of its row nor on other rows of the batch.

    The tokens of x behind a cut are replaced while y stays: the losses before the cut must stay too. One cut
    falls at the last token, where a mask that is off by one shows most.

    Args:
        nats_of: the model's losses.
        rows: int64 [B, T + 1], B >= 2, in the shape in which the model is scored.
        tolerance: nats by which a loss may move.
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
            return (
                f"not causal: other tokens from position {cut} on move the loss at position {first} "
                f"by {moved.max():.3g} nats (noise is below {tolerance:.2g}): a position sees its future"
            )
    other = x.copy()
    other[1:] = rng.integers(0, vocab_size, size=x[1:].shape)
    change = float(np.abs(nats_of(other, y)[0] - base[0]).max())
    if not change <= tolerance:
        return (
            f"rows of a batch are not independent: other rows move the loss of a row by {change:.3g} nats "
            f"(noise is below {tolerance:.2g})"
        )
    return None


def same_score(first: np.ndarray, second: np.ndarray) -> str | None:
    """Check that scoring is a function of the weights. first, second: nats [B, T] of the same rows."""
    moved = abs(float(np.mean(first, dtype=np.float64)) - float(np.mean(second, dtype=np.float64)))
    if not moved <= RESCORE_TOLERANCE:
        return (
            f"scoring the same rows twice differs by {moved:.3g} nats a token: "
            "the model keeps state or draws random numbers"
        )
    return None


# ---------------------------------------------------------------------------
# The harness in this process against its files
# ---------------------------------------------------------------------------


def harness_intact(experiment: object) -> str | None:
    """Check that the harness in this process is what its source files say.

    The files are compiled and compared, not executed: a second execution would define everything anew, with
    its side effects.
    """
    for name in [n for n in sys.modules if is_harness(n)]:
        changed = first_difference(sys.modules[name])
        if changed:
            return f"the harness was changed while it ran: {name}.{changed} is not what its file says"
    for attribute in vars(experiment):
        if callable(getattr(type(experiment), attribute, None)):
            return f"the harness was changed while it ran: exp.{attribute} was replaced"
    return None


def first_difference(module: types.ModuleType) -> str | None:
    """Return the first function, method, constant or imported name that is not as in the module's file."""
    assert module.__file__
    source = Path(module.__file__).read_bytes()
    tree = ast.parse(source)
    compiled = dict(code_objects(compile(source, module.__file__, "exec")))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            if code_of(vars(module).get(node.name)) != compiled[node.name]:
                return node.name
        elif isinstance(node, ast.ClassDef):
            held = getattr(vars(module).get(node.name), "__dict__", {})
            for method in node.body:
                name = getattr(method, "name", "")
                if (
                    isinstance(method, ast.FunctionDef)
                    and code_of(held.get(name)) != compiled[f"{node.name}.{name}"]
                ):
                    return f"{node.name}.{name}"
        elif isinstance(node, ast.Assign) and not same_constant(node, module):
            return ast.unparse(node.targets[0])
        elif isinstance(node, ast.ImportFrom) and is_harness(node.module or ""):
            for alias in node.names:
                held = vars(module).get(alias.asname or alias.name)
                if held is not getattr(sys.modules[node.module or ""], alias.name, None):
                    return alias.name
    return None


def is_harness(module: str) -> bool:
    """Return whether a module of this name belongs to the harness."""
    return module == "prepare" or module.split(".")[0] == "backends"


def code_objects(code: types.CodeType) -> Iterator[tuple[str, types.CodeType]]:
    """Yield (qualified name, code) of everything that a compiled module defines."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant.co_qualname, constant
            yield from code_objects(constant)


def code_of(item: Any) -> types.CodeType | None:
    """Return the code of a function, method or property; None for anything else."""
    if isinstance(item, property):
        item = item.fget
    item = getattr(item, "__func__", getattr(item, "func", item))  # class, static and cached methods
    item = inspect.unwrap(item) if callable(item) else item
    return getattr(item, "__code__", None)


def same_constant(node: ast.Assign, module: types.ModuleType) -> bool:
    """Return whether the module still holds the literal that its file assigns; True if that is no literal."""
    target = node.targets[0]
    try:
        expected = ast.literal_eval(node.value)
    except (ValueError, TypeError, SyntaxError):
        return True
    if not isinstance(target, ast.Name) or not isinstance(expected, int | float | str | tuple):
        return True
    held = vars(module).get(target.id)
    return type(held) is type(expected) and held == expected
