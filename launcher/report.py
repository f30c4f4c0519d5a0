"""`autoresearch report`: the night on a page. One HTML file without a network, and a PNG."""

import html
import io
from statistics import mean

from launcher.board import across, gather, listing, shown, why_apart
from launcher.ledger import Ledger
from launcher.show import loss_curve
from prepare import UserError

# Colours are drawn as these and replaced by CSS variables in the page, so that it follows light and dark.
INK, PAPER, FAINT, KEPT, TRIED, LINE = "#112233", "#fefdfc", "#a1a2a3", "#0b7a4b", "#8a8b8c", "#b5541c"
VARIABLES = {INK: "--ink", PAPER: "--paper", FAINT: "--faint", KEPT: "--kept", TRIED: "--tried", LINE: "--line"}
CURVES = (KEPT, LINE, "#3b6fb6", "#8d4fb0", "#b8860b", "#c2417c")
MOST_LABELS = 14
MOST_CURVES = 6

STYLE = """
:root { --ink:#1b2126; --paper:#fdfcfa; --faint:#d4d4d0; --kept:#0b7a4b; --tried:#9a9a96; --line:#b5541c; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink:#e8e6e1; --paper:#15181b; --faint:#3a3f44; --kept:#4cc38a; --tried:#777b80; --line:#f0975a; } }
body { background:var(--paper); color:var(--ink); font:16px/1.5 system-ui, sans-serif; max-width:62rem; margin:0 auto; padding:1rem; }
h1 { font-size:1.5rem; } h2 { font-size:1.15rem; margin-top:2rem; }
figure { margin:1rem 0; overflow-x:auto; } svg { width:100%; height:auto; min-width:30rem; }
.scroll { overflow-x:auto; } table { border-collapse:collapse; font-size:.85rem; white-space:nowrap; }
th, td { text-align:right; padding:.2rem .6rem; border-bottom:1px solid var(--faint); }
th.text, td.text { text-align:left; white-space:normal; min-width:14rem; }
tr.keep td { color:var(--kept); } footer { margin-top:2rem; color:var(--tried); font-size:.85rem; }
"""


def series_of(paths, track, platform):
    """[(title, rows in the order in which they were made)]: a board each, and a ledger each of other tools."""
    boards, apart, checked = gather(paths, track, platform)
    series = [(b.title, sorted(b.rows, key=lambda r: (r.time, r.run))) for b in boards]
    for path in paths:
        foreign = [r for r in Ledger(path).rows() if not r.rules and r.val_bpb > 0 and not track and not platform]
        if foreign:
            series.append((f"{path} (from another tool: its rules are unknown)", foreign))
    return series, boards, apart, checked


def running_best(rows):
    """[best so far after each row], and the indices at which it fell: of the rows that were kept, where the ledger says so."""
    best, steps, falls = None, [], []
    for i, row in enumerate(rows):
        if row.status == "keep" and (best is None or row.val_bpb < best):
            best = row.val_bpb
            falls.append(i)
        steps.append(best)
    return steps, falls


def figure_style():
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "autoresearch", "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
        "xtick.color": INK, "ytick.color": INK, "axes.facecolor": PAPER, "figure.facecolor": PAPER, "savefig.facecolor": PAPER,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.5})
    import matplotlib.pyplot as plt

    return plt


def draw_progress(axes, title, rows):
    """Every experiment as a dot, the running best as a line that steps down, kept changes labelled."""
    steps, falls = running_best(rows)
    xs = range(1, len(rows) + 1)
    kept = set(falls)
    axes.scatter([x for x in xs if x - 1 not in kept], [rows[x - 1].val_bpb for x in xs if x - 1 not in kept], s=14, color=TRIED, label="tried", zorder=2)
    axes.scatter([i + 1 for i in falls], [rows[i].val_bpb for i in falls], s=28, color=KEPT, label="kept", zorder=3)
    known = [(x, s) for x, s in zip(xs, steps) if s is not None]
    axes.step([x for x, _ in known], [s for _, s in known], where="post", color=KEPT, linewidth=1.2)
    for i in falls[-MOST_LABELS:]:
        axes.annotate(rows[i].description[:42], (i + 1, rows[i].val_bpb), xytext=(5, 6), textcoords="offset points", fontsize=8, rotation=20, color=INK)
    values = sorted(row.val_bpb for row in rows)
    low, high = values[0], values[max(0, int(0.9 * len(values)) - 1)]
    margin = (high - low or 0.01) * 0.25
    axes.set_ylim(low - margin, max(high, rows[falls[0]].val_bpb if falls else high) + 2 * margin)  # failures far above do not flatten the rest
    axes.set(title=title[:110], xlabel="experiment", ylabel="val_bpb")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)


def draw_curves(axes, chosen):
    """Smoothed training loss against training time."""
    for color, row in zip(CURVES, chosen):
        points = loss_curve(row.run)
        axes.plot([t for t, _ in points], [v for _, v in points], color=color, linewidth=1.2, label=f"{row.val_bpb:.4f} {row.description[:40]}")
    axes.set(xlabel="seconds of training", ylabel="training loss (nats)", title="loss curves")
    axes.legend(frameon=False, fontsize=8)


def as_svg(figure):
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    text = out.getvalue()
    text = text[text.index("<svg"):]
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text


def summary(series, apart):
    """The night in a few lines."""
    lines = []
    for title, rows in series:
        _, falls = running_best(rows)
        first, best = rows[0], min(rows, key=lambda r: r.val_bpb)
        lines.append(f"{title}: {len(rows)} scored experiments, {len(falls)} of them set a new best; val_bpb from {first.val_bpb:.6f} to {best.val_bpb:.6f} "
                     f"({100 * (first.val_bpb - best.val_bpb) / first.val_bpb:.2f}% lower) by “{best.description}”.")
        rates = [r.tokens_per_second for r in rows if r.tokens_per_second]
        if rates:
            lines[-1] += f" {mean(rates):,.0f} tokens/s on average."
    failed = [r for r in apart if not r.scored]
    if apart:
        lines.append(f"{len(apart)} rows are not ranked, {len(failed)} of them failed.")
    return lines


def table(rows, columns):
    kind = lambda c: " class=text" if c in ("description", "why") else ""
    head = "".join(f"<th{kind(c)}>{html.escape(c.replace('_', ' '))}</th>" for c in columns)
    body = "".join(f"<tr class=\"{html.escape(str(row.get('status', '')))}\">" + "".join(f"<td{kind(c)}>{html.escape(shown(c, row[c]))}</td>" for c in columns)
                   + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def report(paths, folder, track=None, platform=None, runs=()):
    """Write report.html and report.png into `folder`. runs: ids whose loss curves are drawn; the best ones if empty."""
    series, boards, apart, checked = series_of(paths, track, platform)
    if not series:
        raise UserError("no scored experiment to report: autoresearch run")
    plt = figure_style()
    everything = [row for _, rows in series for row in rows]
    by_id = {row.run: row for row in everything + apart if row.run}
    unknown = [run for run in runs if run not in by_id]
    if unknown:
        raise UserError(f"the ledger has no run '{unknown[0]}'", 2)
    chosen = [by_id[run] for run in runs] or sorted((r for r in everything if r.run), key=lambda r: r.val_bpb)
    chosen = [row for row in chosen if loss_curve(row.run)][:MOST_CURVES]

    pictures = []
    for title, rows in series:
        figure, axes = plt.subplots(figsize=(10, 4.6))
        draw_progress(axes, title, rows)
        pictures.append(as_svg(figure))
        plt.close(figure)
    if chosen:
        figure, axes = plt.subplots(figsize=(10, 4))
        draw_curves(axes, chosen)
        pictures.append(as_svg(figure))
        plt.close(figure)

    count = len(series) + bool(chosen)
    figure, all_axes = plt.subplots(count, 1, figsize=(11, 5 * count), squeeze=False)
    for axes, (title, rows) in zip(all_axes[:, 0], series):
        draw_progress(axes, title, rows)
    if chosen:
        draw_curves(all_axes[-1, 0], chosen)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "report.png", dpi=130)
    plt.close(figure)

    columns = ("rank", "val_bpb", "description", "gain", "stderr", "verified", "tokens_per_second", "mfu_percent", "memory_gb", "num_params_M", "run")
    parts = [f"<p>{html.escape(line)}</p>" for line in summary(series, apart)]
    parts += [f"<figure>{picture}</figure>" for picture in pictures]
    for board in boards:
        parts.append(f"<h2>{html.escape(board.title)}</h2>" + table(listing(board, checked), columns))
    if len(boards) > 1:
        rows = across(boards)
        parts.append("<h2>across devices</h2>" + table(rows, tuple(rows[0])))
    if apart:
        rows = [{"val_bpb": r.val_bpb, "run": r.run, "why": why_apart(r, checked), "description": r.description} for r in apart]
        parts.append("<h2>not ranked</h2>" + table(rows, ("val_bpb", "description", "why", "run")))
    page = (f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content=\"width=device-width, initial-scale=1\">"
            f"<title>autoresearch report</title><style>{STYLE}</style></head><body><h1>autoresearch</h1>{''.join(parts)}"
            f"<footer>val_bpb: bits per byte of held-out text, lower is better.</footer></body></html>")
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html", folder / "report.png"
