"""ideas.md, the reading list: which of its ideas are still open, and what became of the others."""

import re
from collections.abc import Sequence

from night.agent import read_saved_answer
from night.tried import Tried
from prepare import ROOT

IDEA = re.compile(r"^- \[([a-z0-9-]+)\] .+$", re.M)  # `- [its-id] what to do: effect`


def write_ideas(sections: Sequence[str], tried: Tried) -> str:
    """Return the ideas of these sections of ideas.md, the tried ones struck out; "" without the file."""
    try:
        text = (ROOT / "ideas.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    outcomes = read_outcomes(tried)

    def strike(found: re.Match[str]) -> str:
        runs = outcomes.get(found[1])
        return f"- ~~{found[0].removeprefix('- ')}~~ tried: {'; '.join(runs)}" if runs else found[0]

    _, *parts = re.split(r"^## (.+)$", text, flags=re.M)
    bodies = {heading.strip(): body.strip() for heading, body in zip(parts[::2], parts[1::2], strict=True)}
    chosen = [IDEA.sub(strike, bodies[name]) for name in sections if bodies.get(name)]
    return "\n".join(chosen)


def read_outcomes(tried: Tried) -> dict[str, list[str]]:
    """Return {id of an idea: the runs of edits that were about it, with what became of them}."""
    outcomes: dict[str, list[str]] = {}
    for row in tried.decided:
        answer = read_saved_answer(row.run)
        for name in re.findall(r"[a-z0-9-]+", answer.idea.lower()) if answer else []:
            outcomes.setdefault(name, []).append(f"{row.run}, {row.status}")
    return outcomes
