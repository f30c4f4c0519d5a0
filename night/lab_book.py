"""What the runs of a board say, as an agent reads it: a fact a line, changes as diffs, within a limit."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from launcher.belief import visible_change
from launcher.ledger import Row
from launcher.runs import append_json_line, loss_curve, run_dir, runs_dir, trainer_of
from launcher.setting import Setting
from launcher.verdict import runs_of
from night.agent import read_saved_answer
from night.change import compare, resolve_constants
from night.modes import Mode
from night.tried import Experiment, Tried, failures

NO_BEST = "best: none yet"
CURVE_POINTS = 12
LAST = 12  # experiments that "how it goes" looks back on
DESCRIPTION_CHARS = 200
LINE_CHARS = 110  # of a description on a list of one line each
REASON_CHARS = 120
FAILURES = 12  # reasons that are listed
EXAMPLES = 3  # descriptions of each
WISHES = 3  # `next:` lines that are listed, the newest
DETAIL_SHARE = 0.7  # of the room, for kept runs and near misses with their changes; the rest lists discards
HEADING_CHARS = 800  # that the headings and what was left out take


class Room:
    """Characters that are left to write in."""

    def __init__(self, chars: int) -> None:
        self.left = chars

    def take(self, text: str) -> bool:
        """Return whether the text and a newline fit. They are then taken."""
        if len(text) + 1 > self.left:
            return False
        self.left -= len(text) + 1
        return True


def write_lab_book(setting: Setting, tried: Tried, mode: Mode, chars: int) -> str:
    """Return what the runs say, in at most `chars` characters.

    When there is no room for all, the oldest discards go first, then diffs, then the oldest kept runs.
    """
    head = "\n".join(how_it_goes(tried))
    curves = "\n".join(curve_lines(tried))
    failed = "\n".join(failure_lines(failures(tried.rows, setting)))
    wanted = "\n".join(wish_lines(tried))
    room = Room(chars - len(head) - len(curves) - len(failed) - len(wanted) - HEADING_CHARS)

    kept = listed(tried.kept[::-1], room)[::-1]
    near = listed(tried.near_misses, room)
    details = Room(min(room.left, round(DETAIL_SHARE * chars)))
    by_need = sorted([*near, *kept[::-1]], key=lambda one: one.row.run not in mode.runs)
    changes = {}
    for one in by_need:
        text = details_of(one, tried, setting)
        if details.take(text):
            changes[one.row.run] = text
            room.take(text)
    near_runs = {one.row.run for one in tried.near_misses}
    others = [one for one in tried.discarded if one.row.run not in near_runs]
    newest = listed(others[::-1], room)[::-1]

    parts = [
        section("How it goes", len(head), head),
        section("Loss at equal progress", len(curves), curves),
        section(
            f"Kept, oldest first ({len(tried.kept)}; + in the current trainer, - not any more)",
            len(tried.kept),
            omitted(len(tried.kept) - len(kept), "older ones"),
            *(entry(one, tried, changes) for one in kept),
        ),
        section(
            f"Near misses: the discards with the lowest expected effect ({len(near)})",
            len(near),
            *(entry(one, tried, changes) for one in near),
        ),
        section(
            f"Other discards, oldest first ({len(others)})",
            len(others),
            omitted(len(others) - len(newest), "older ones"),
            *(short_line(one, " ") for one in newest),
        ),
        section("Without a score, by reason", len(failed), failed),
        section("What the last turns wanted to try next", len(wanted), wanted),
    ]
    return "\n\n".join(part for part in parts if part)


def section(heading: str, size: int, *lines: str) -> str:
    """Return a section, "" when there is nothing to say in it."""
    return "\n".join([f"### {heading}", "", *filter(None, lines)]) if size else ""


def listed(experiments: Iterable[Experiment], room: Room) -> list[Experiment]:
    """Return the first experiments, as many as have room for a line each."""
    found = []
    for one in experiments:
        if not room.take(short_line(one, " ")):
            break
        found.append(one)
    return found


def omitted(count: int, what: str) -> str:
    return f"({count} {what} are left out here)" if count else ""


# ---------------------------------------------------------------------------
# The facts of the board
# ---------------------------------------------------------------------------


def best_facts(setting: Setting, tried: Tried) -> list[str]:
    """Return the lines about the best trainer, its sizes and its speed. What is not on record is left out."""
    if not tried.survey:
        return [NO_BEST]
    believed = tried.survey.trainers[tried.survey.best]
    best = min(runs_of(tried.rows, setting.board, tried.survey.best), key=lambda row: row.val_bpb)
    first = next(iter(tried.survey.trainers))
    baseline = runs_of(tried.rows, setting.board, first)[0]
    lines = [
        f"best: {best.val_bpb:.6f} by {best.run} ({clip(best.description, LINE_CHARS)}); "
        f"baseline {baseline.val_bpb:.6f}",
        f"best_believed: {believed.mean:.6f} +- {believed.error:.6f} (its mean over seeds)",
    ]
    if tried.current not in ("", tried.survey.best):
        current = tried.survey.trainers.get(tried.current)
        names = [one.row for one in tried.experiments if one.row.source == tried.current]
        if current and names:
            lines.append(
                f"current_trainer: {names[0].run} ({clip(names[0].description, LINE_CHARS)}), "
                f"believed {current.mean:.6f} +- {current.error:.6f}"
            )
    return lines + sizes(setting, best)


def sizes(setting: Setting, row: Row) -> list[str]:
    """Return the resolved sizes of a run, and what it took."""
    trainer = trainer_of(row)
    constants = resolve_constants(read_text(trainer), setting.platform.start) if trainer else {}
    values = {
        "layers": row.depth,
        "width": constants.get("N_EMBD"),
        "parameters_M": row.num_params_M,
        "tokens_a_step": round(1e6 * row.tokens_M / row.num_steps) if row.num_steps else 0,
        "steps": row.num_steps,
        "tokens_M": row.tokens_M,
        "tokens_per_second": round(row.tokens_per_second),
        "mfu_percent": row.mfu_percent,
        "dtype": run_dir(row.run).read_result().get("dtype"),
    }
    lines = [f"{name}: {value}" for name, value in values.items() if value]
    shares = shares_of(row.source)
    if shares:
        told = ", ".join(f"{kind} {100 * share:.0f}%" for kind, share in shares.items())
        lines.append(f"step: {told}")
    if row.memory_gb:
        total = setting.facts.memory_gb
        free = f" of {total:g} ({total - row.memory_gb:.1f} free)" if total > row.memory_gb else ""
        lines.append(f"memory_gb: {row.memory_gb:g}{free}")
    machine = vars(setting.platform.start)
    started = [f"{name} {constants[name]}" for name in map(str.upper, machine) if name in constants]
    if started:
        lines.append(f"sizes: {', '.join(started)}")
    return lines and [f"of the best run, {row.run}:", *("  " + line for line in lines)]


def shares_path() -> Path:
    """Return the file with the share of each kind of work in a step, by trainer: what dry runs measured."""
    return runs_dir() / "loop" / "step_shares.jsonl"


def remember_shares(source: str, shares: Mapping[str, float]) -> None:
    """Keep what a dry run measured of a trainer, given by its content hash."""
    if shares:
        append_json_line(shares_path(), {"source": source, "shares": dict(shares)})


def shares_of(source: str) -> dict[str, float]:
    """Return what was measured of a trainer last, {} when nothing was."""
    shares: dict[str, float] = {}
    lines = read_text(shares_path()).splitlines() if shares_path().exists() else []
    for line in lines:
        try:
            data = json.loads(line)
            if data["source"] == source:
                shares = {str(kind): float(share) for kind, share in data["shares"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # torn
    return shares


def how_it_goes(tried: Tried) -> list[str]:
    """Return the lines about the last experiments and about the noise."""
    if not tried.decided:
        return ["tried: nothing yet"]
    recent = tried.decided[-LAST:]
    kept = sum(row.status == "keep" for row in recent)
    hint = "" if kept or len(recent) < LAST else ": be bolder, or combine near misses"
    lines = [
        f"experiments: {len(tried.decided)} in all, {len(tried.kept)} kept",
        f"last {len(recent)}: {kept} of {len(recent)} kept{hint}",
    ]
    if tried.survey:
        sigma = tried.survey.sigma
        visible = visible_change(sigma, len(tried.decided))
        lines.append(f"noise: sigma {sigma:.6f} between seeds, as believed")
        lines.append(f"visible: {visible.run:.6f} is the smallest change that one run shows")
    return lines


def curve_lines(tried: Tried) -> list[str]:
    """Return the smoothed loss of the best and of the last run, at equal shares of their budgets."""
    if not tried.survey or not tried.decided:
        return []
    best = [one.row for one in tried.experiments if one.row.source == tried.survey.best]
    rows = {"best": best[0]} if best else {}
    rows["last"] = tried.decided[-1]
    lines = []
    for name, row in rows.items():
        values = curve(row)
        if values:
            lines.append(f"{name + ':':10}" + " ".join(f"{value:6.3f}" for value in values))
    shares = " ".join(f"{round(100 * (i + 1) / CURVE_POINTS):5}%" for i in range(CURVE_POINTS))
    return [f"{'progress:':10}{shares}", *lines] if lines else []


def curve(row: Row) -> list[float]:
    """Return the smoothed loss after each twelfth of the budget, as far as the run came."""
    points = loss_curve(row.run)
    if not points or not row.budget:
        return []
    values = []
    at = 0
    for number in range(1, CURVE_POINTS + 1):
        # A run ends with the step that exceeds its budget, and its last point is a little before that.
        wanted = row.budget * number / CURVE_POINTS
        if wanted > points[-1][0] + row.budget / CURVE_POINTS / 2:
            break
        while at + 1 < len(points) and points[at + 1][0] <= wanted:
            at += 1
        values.append(points[at][1])
    return values


def failure_lines(rows: Sequence[Row]) -> list[str]:
    """Return the experiments without a score by their reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        reason = re.sub(r"\d+(\.\d+)?", "N", row.reason)
        groups.setdefault((row.status, clip(reason, REASON_CHARS)), []).append(row)
    lines = []
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    for (status, reason), members in largest[:FAILURES]:
        ideas = [clip(row.description, LINE_CHARS) for row in members[-EXAMPLES:]]
        lines.append(f"{len(members)} x {status}: {reason} [{'; '.join(dict.fromkeys(ideas))}]")
    rest = sum(len(members) for _, members in largest[FAILURES:])
    if rest:
        lines.append(f"{rest} x for other reasons")
    return lines


def wish_lines(tried: Tried) -> list[str]:
    """Return what the agents of the last experiments said that they would try next."""
    lines = []
    for row in tried.decided[-WISHES:]:
        answer = read_saved_answer(row.run)
        if answer and answer.next:
            lines.append(f"{row.run}: {clip(answer.next, DESCRIPTION_CHARS)}")
    return lines


# ---------------------------------------------------------------------------
# An experiment
# ---------------------------------------------------------------------------


def mark_of(one: Experiment, tried: Tried) -> str:
    """Return "+" for an edit of the current trainer, "-" for one that was kept and left again, else " "."""
    if one.row.source in tried.stack:
        return "+"
    return "-" if one.row.status == "keep" else " "


def short_line(one: Experiment, mark: str) -> str:
    """Return a line about an experiment."""
    row = one.row
    effect = f"effect {one.standing.effect:+.6f} " if one.is_edit else ""
    return f"{mark} {row.run} {row.status} {row.val_bpb:.6f} {effect}{clip(row.description, LINE_CHARS)}"


def entry(one: Experiment, tried: Tried, changes: dict[str, str]) -> str:
    """Return an experiment with its numbers and its change, or on a line where there is no room for them."""
    mark = mark_of(one, tried)
    return f"{mark} {changes[one.row.run]}" if one.row.run in changes else short_line(one, mark)


def details_of(one: Experiment, tried: Tried, setting: Setting) -> str:
    """Return all that is told of an experiment: what is believed of it, what it took, learned and changed."""
    row = one.row
    standing = one.standing
    numbers = [f"{row.run} {row.status} {row.val_bpb:.6f}"]
    if one.is_edit:
        numbers.append(
            f"effect {standing.effect:+.6f} +- {standing.effect_error:.6f}, P(better) {standing.p_better:.2f}"
        )
    if standing.runs > 1:
        numbers.append(f"{standing.runs} runs")
    if row.tokens_per_second:
        numbers.append(f"{row.tokens_per_second:,.0f} tokens/s")
    if row.memory_gb:
        numbers.append(f"{row.memory_gb:g} GiB")
    lines = [f"{', '.join(numbers)}: {clip(row.description, DESCRIPTION_CHARS)}"]
    if row.run in tried.lessons:
        lines.append(f"    learned: {clip(tried.lessons[row.run], DESCRIPTION_CHARS)}")
    if one.is_edit:
        lines += [f"    {clip(line, DESCRIPTION_CHARS)}" for line in change_lines(one, tried, setting)]
    return "\n".join(lines)


def change_lines(one: Experiment, tried: Tried, setting: Setting) -> list[str]:
    """Return how a trainer differs from the one that it was made from."""
    new = trainer_of(one.row)
    old = a_copy(tried.by_source.get(one.standing.parent, ()))
    if new is None or old is None:
        return ["(its trainer or the one before it is not here)"]
    change = compare(read_text(old), read_text(new), setting.platform.start)
    return change.lines(f"runs/{one.row.run}/{new.name}")


def a_copy(rows: Iterable[Row]) -> Path | None:
    """Return the trainer that one of these runs left, None when none did."""
    return next(filter(None, map(trainer_of, rows)), None)


# ---------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def clip(text: str, chars: int) -> str:
    """Return the text, or its beginning and three dots."""
    return text if len(text) <= chars else text[: chars - 3] + "..."
