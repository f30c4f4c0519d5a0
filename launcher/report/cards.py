"""Runs with all about them, folded: what is believed of the edit, numbers, the agent's words, the diff."""

from collections.abc import Iterable, Iterator, Sequence

from launcher.report.data import Effect, Run, Series, finite
from launcher.report.files import Diff
from launcher.report.report import Report
from launcher.report.text import clip, clock, duration, escape, plural, round_numbers, with_error

FOLDED = 20  # edits of a list that are shown before the reader asks for more
DIFFS_CHARS = 600_000  # of all diffs together; those of kept edits and near misses come first
DESCRIPTION_CHARS = 200
BAR_WIDTH = 120  # of an effect's picture, in its own units


class Cards:
    """Writes each run once: among the kept, among the near misses, or among the others."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.written: set[str] = set()  # ids of the runs that have their place
        self.room = DIFFS_CHARS

    def listing(self, series: Series, runs: Sequence[Run]) -> str:
        """Return edits with their effects on one scale; those from FOLDED on are folded together."""
        ends = [0.0]
        for run in runs:
            if run.effect:
                error = run.effect.error or 0.0
                ends += [run.effect.value - error, run.effect.value + error]
        cards = [self.edit(run, series, min(ends), max(ends)) for run in runs]
        shown = "".join(cards[:FOLDED])
        if len(cards) <= FOLDED:
            return shown
        summary = f"<summary>{len(cards) - FOLDED} more, with smaller effects</summary>"
        rest = "".join(cards[FOLDED:])
        return f'{shown}<details id="more-{escape(runs[0].id)}">{summary}{rest}</details>'

    def edit(self, run: Run, series: Series, low: float, high: float) -> str:
        """Return an edit with what is believed of its effect. low, high: ends of the scale."""
        effect = run.effect
        if effect is None:
            return self.other(run, series)
        chance = ""
        shade = ""
        if effect.p_better is not None:
            chance = f"P {effect.p_better:.2f}"
            shade = f' style="--p:{100 * effect.p_better:.0f}%"'
        is_left = run.kind == "kept" and not run.is_current and series.survey is not None
        left = ' class="left"' if is_left else ""
        summary = (
            effect_bar(effect, low, high)
            + f"<span>{escape(effect_text(effect, series.decimals))}</span><span>{chance}</span>"
            + f"<span{left}>{description(run)}</span>"
        )
        return self.card(run, series, "run believed" if shade else "run", summary, shade)

    def other(self, run: Run, series: Series) -> str:
        """Return a run without an effect, or one that has no place among the edits."""
        value = f"{run.row.val_bpb:.{series.decimals}f}" if run.has_value else run.status
        summary = f"<span>{escape(value)}</span><span>{description(run)}</span>"
        return self.card(run, series, "run plain", summary)

    def others(self) -> str:
        """Return the runs that stand nowhere else on the page, folded together."""
        pairs = [(run, series) for series in self.report.series for run in series.runs]
        rest = [self.other(run, series) for run, series in pairs if run.id not in self.written]
        if not rest:
            return ""
        summary = f"{plural(len(rest), 'run')} that stand nowhere above, with their diffs"
        return f'<details id="other-runs"><summary>{summary}</summary>{"".join(rest)}</details>'

    def card(self, run: Run, series: Series, kind: str, summary: str, more: str = "") -> str:
        """Return a run's element. kind: its classes. more: further attributes."""
        self.written.add(run.id)
        inside = facts_list(facts_of(run, series, self.report)) + self.diff(run, series)
        return (
            f'<details class="{kind}" id="{anchor(run)}"{more}><summary>{summary}</summary>'
            f'<div class="inside">{inside}</div></details>'
        )

    def diff(self, run: Run, series: Series) -> str:
        """Return the diff of a run's trainer, as far as the page has room for diffs."""
        if series.is_of_baseline(run):
            return note("No diff: it is the baseline.")
        diff = self.report.diffs.get(run.id)
        if diff is None:
            return note("No diff: the copies of the trainers are not here.")
        size = sum(len(line) + 1 for line in diff.lines)
        if size > self.room:
            return note(f"No room for its diff here: autoresearch show {run.id}")
        self.room -= size
        return diff_block(diff, run.id)


def facts_of(run: Run, series: Series, report: Report) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of what is known of a run; "" for what is not."""
    row = run.row
    digits = series.decimals
    yield "run", run.name
    if run.has_value:
        over = " over documents" if row.val_stderr else ""
        yield "val_bpb", with_error(row.val_bpb, finite(row.val_stderr), digits) + over
    yield "status", run.status
    yield "reason", round_numbers(row.reason, digits)
    yield "not ranked", run.why if row.scored else ""
    yield "begun", clock(run.start, report.offset)
    yield "took", duration(row.total_seconds) if finite(row.total_seconds) > 0 else ""
    yield "speed", speed(run)
    if finite(row.num_params_M):
        yield "model", f"{row.num_params_M:g}M parameters, {row.depth} layers"
    if row.rules:
        has_author = not series.is_of_baseline(run) and run.kind != "evidence"
        yield "by", (row.agent or "a person") if has_author else ""
        yield "seed", str(row.seed)
    yield "taught", report.lessons.get(run.id, "")
    yield "next idea", report.folders[run.id].next


# ---------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------


def anchor(run: Run) -> str:
    """Return the id of a run's element."""
    return f"run-{escape(run.id)}"


def description(run: Run) -> str:
    return escape(clip(run.row.description, DESCRIPTION_CHARS))


def note(text: str) -> str:
    """Return a line of explanation."""
    return f'<p class="soft">{escape(text)}</p>'


def facts_list(facts: Iterable[tuple[str, str]]) -> str:
    entries = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts if text)
    return f"<dl>{''.join(entries)}</dl>"


def effect_text(effect: Effect, digits: int) -> str:
    return with_error(effect.value, effect.error, digits, sign="+")


def effect_bar(effect: Effect, low: float, high: float) -> str:
    """Return an effect with its error as a small picture. low, high: ends of its scale."""
    unit = BAR_WIDTH / ((high - low) or 1.0)
    at = (effect.value - low) * unit
    zero = -low * unit
    reach = (effect.error or 0.0) * unit
    return (
        f'<svg class="effect" viewBox="0 0 {BAR_WIDTH} 16" preserveAspectRatio="none">'
        f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="16"/>'
        f'<line class="bar" x1="{at - reach:.1f}" x2="{at + reach:.1f}" y1="8" y2="8"/>'
        f'<line class="dot" x1="{at:.1f}" x2="{at:.1f}" y1="8" y2="8"/></svg>'
    )


def diff_block(diff: Diff, run: str) -> str:
    """Return a diff with its additions and removals marked."""
    if not diff.lines:
        return note(f"The same trainer as run {diff.against}.")
    lines = []
    for line in diff.lines:
        tag = {"+": "ins", "-": "del"}.get(line[:1])
        lines.append(f"<{tag}>{escape(line)}</{tag}>" if tag else escape(line))
    text = "\n".join(lines)
    rest = note(f"{plural(diff.missing, 'more line')}: autoresearch show {run}") if diff.missing else ""
    return f"{note(f'against run {diff.against}')}<pre>{text}</pre>{rest}"


def speed(run: Run) -> str:
    """Return how fast a run was, and what it took."""
    row = run.row
    amounts = (
        (row.tokens_per_second, ",.0f", " tokens/s"),
        (row.mfu_percent, ".0f", "% MFU"),
        (row.memory_gb, ".1f", " GiB"),
        (row.energy_kj, ".0f", " kJ"),
    )
    return ", ".join(f"{amount:{form}}{unit}" for amount, form, unit in amounts if finite(amount))
