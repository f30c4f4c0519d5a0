"""What an edit of the trainer changed, told in a few lines: constants by name, other code as a patch."""

import ast
import re
from dataclasses import dataclass

from backends.platforms import StartSizes
from launcher.show import unified_diff

PATCH_LINES = 24  # a longer patch is told by its size
PATCH_CHARS = 1400
VALUE_CHARS = 60  # of a constant; a longer one is told as code
HEADING = 2  # lines of a unified diff that name the files


@dataclass(frozen=True)
class Change:
    """An edit."""

    constants: list[str]  # `NAME: A -> B`
    patch: list[str]  # a unified diff of everything else

    def lines(self, where: str) -> list[str]:
        """Return the change in a few lines. where: the file in which a patch that is too long can be read."""
        if not self.patch or self.fits:
            return self.constants + self.patch
        added, removed = (sum(line.startswith(sign) for line in self.patch) for sign in "+-")
        return [*self.constants, f"+{added} -{removed} lines, {where}"]

    @property
    def fits(self) -> bool:
        return len(self.patch) <= PATCH_LINES and sum(map(len, self.patch)) <= PATCH_CHARS


def compare(old: str, new: str, start: StartSizes) -> Change:
    """Return what turns the trainer `old` into `new`.

    start: the sizes of this machine, which constants such as START.n_embd stand for
    """
    before = constants(old)
    after = constants(new)
    changed = [name for name in before if name in after and not same(before[name], after[name])]
    named = [
        name for name in changed if len(value_of(before[name])) + len(value_of(after[name])) < VALUE_CHARS
    ]
    told = [f"{name}: {shown(before[name], start)} -> {shown(after[name], start)}" for name in named]
    rest = with_constants(old, new, {name: (before[name], after[name]) for name in named})
    return Change(told, unified_diff(rest, new, "", "")[HEADING:])


def constants(source: str) -> dict[str, ast.Assign]:
    """Return the constants that a module assigns at its top level, {} when the source does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id.isupper():
                found[target.id] = node
    return found


def same(old: ast.Assign, new: ast.Assign) -> bool:
    return ast.dump(old.value) == ast.dump(new.value)


def value_of(constant: ast.Assign) -> str:
    return ast.unparse(constant.value)


def shown(constant: ast.Assign, start: StartSizes) -> str:
    """Return a constant's value as Python writes it, and what it stands for on this machine."""
    text = value_of(constant)
    found = re.fullmatch(r"START\.(\w+)", text)
    size = getattr(start, found[1], None) if found else None
    return f"{text} ({size})" if size is not None else text


def resolve_constants(source: str, start: StartSizes) -> dict[str, object]:
    """Return the constants of a trainer that are plain values, those from platforms.yaml included."""
    found: dict[str, object] = {}
    for name, constant in constants(source).items():
        text = value_of(constant)
        attribute = text.removeprefix("START.")
        if attribute != text:
            if hasattr(start, attribute):
                found[name] = getattr(start, attribute)
            continue
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            continue
    return found


def with_constants(old: str, new: str, pairs: dict[str, tuple[ast.Assign, ast.Assign]]) -> str:
    """Return the source `old` with the lines of these constants as they are in `new`."""
    lines = old.splitlines()
    new_lines = new.splitlines()
    for before, after in sorted(pairs.values(), key=lambda pair: -pair[0].lineno):
        lines[before.lineno - 1 : before.end_lineno] = new_lines[after.lineno - 1 : after.end_lineno]
    return "\n".join(lines)
