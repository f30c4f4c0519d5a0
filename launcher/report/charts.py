"""The charts that the page's script draws: their numbers, as JSON."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from launcher.report.cards import effect_text, speed
from launcher.report.data import FigureLine, Run, Series, finite
from launcher.report.files import POINTS
from launcher.report.report import Report
from launcher.report.text import clip, clock, round_numbers, with_error

MOST_CURVES = 300  # loss curves that a page holds
NAME_CHARS = 160
REASON_CHARS = 160
CURVE_NAME_CHARS = 70


def charts_json(report: Report) -> str:
    """Return the numbers as JSON that may stand in a page: nothing in it ends the script element."""
    lines = {"gains": lines_of(report.gains, "hours since its first run", "% below its baseline")}
    for number, (_, agents) in enumerate(report.agents):
        lines[f"agents-{number}"] = lines_of(agents, "experiment of the agent", "best val_bpb kept")
    data = {
        "series": [columns_of(series, report) for series in report.series],
        "lines": lines,
        "curves": curves_of(report),
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def columns_of(series: Series, report: Report) -> dict[str, Any]:
    """Return the columns of a series, one value an experiment. Values that are not known are null."""
    runs = series.drawn
    beliefs = [run.belief for run in runs]
    return {
        "baseline": number(series.baseline.row.val_bpb),
        "id": [run.id for run in runs],
        "n": [run.number for run in runs],
        "t": [None if run.start is None else round(run.start + report.offset) for run in runs],
        "v": [number(run.row.val_bpb) if run.has_value else None for run in runs],
        "kind": [run.kind for run in runs],
        "built": [number(run.built_on) for run in runs],
        "low": [number(belief.mean - belief.error) if belief else None for belief in beliefs],
        "high": [number(belief.mean + belief.error) if belief else None for belief in beliefs],
        "gain": [number(-run.effect.value) if run.effect else None for run in runs],
        "name": [clip(run.row.description, NAME_CHARS) for run in runs],
        "tip": [tip_lines(run, series, report) for run in runs],
    }


def tip_lines(run: Run, series: Series, report: Report) -> list[str]:
    """Return what hovering over a run tells, below its description."""
    row = run.row
    digits = series.decimals
    value = with_error(row.val_bpb, finite(row.val_stderr), digits) if run.has_value else ""
    effect = ""
    if run.effect:
        chance = "" if run.effect.p_better is None else f", P(better) {run.effect.p_better:.2f}"
        effect = f"effect {effect_text(run.effect, digits)}{chance}"
    is_odd = run.kind == "failed" or run.why != ""
    lines = (
        ", ".join(filter(None, [value, run.status])),
        effect,
        ", ".join(filter(None, [clock(run.start, report.offset), speed(run)])),
        clip(round_numbers(row.reason, digits), REASON_CHARS) if is_odd else "",
        run.name,
    )
    return [line for line in lines if line]


def curves_of(report: Report) -> dict[str, Any]:
    """Return loss curves at the same times, so that they can be subtracted: the newest, and those chosen."""
    traces = {run.id: report.folders[run.id].trace.points for run in report.runs}
    recorded = [run for run in report.runs if traces[run.id]]
    newest = sorted(recorded, key=lambda run: run.start or 0.0)[-MOST_CURVES:]
    shown = {run.id: run for run in recorded if run.id in report.curves}
    shown.update({run.id: run for run in newest})
    longest = max((traces[run][-1][0] for run in shown), default=0.0)
    grid = np.linspace(0.0, longest, POINTS + 1)
    curves = {}
    for run in shown:
        seconds, losses = zip(*traces[run], strict=True)
        values = np.interp(grid, seconds, losses, left=np.nan, right=np.nan)
        curves[run] = [None if np.isnan(value) else round(float(value), 4) for value in values]
    bests = [series.best.id for series in report.series]
    return {
        "seconds": [round(float(value), 1) for value in grid],
        "curves": curves,
        "names": {run: curve_name(shown[run]) for run in shown},
        "chosen": report.curves,
        "best": next((best for best in bests if best in curves), ""),
    }


def curve_name(run: Run) -> str:
    value = f"{run.row.val_bpb:.4f}" if run.has_value else run.row.status
    return f"{value} {clip(run.row.description, CURVE_NAME_CHARS)}"


def lines_of(lines: Sequence[FigureLine], x: str, y: str) -> dict[str, Any]:
    """Return lines, with the names of their axes."""
    return {"x": x, "y": y, "lines": [{"label": line.label, "x": line.x, "y": line.y} for line in lines]}


def number(value: float | None) -> float | None:
    """Return a number for the script, None where there is none."""
    return None if value is None or finite(value) != value else round(value, 6)
