"""The leaderboard: who is best on each device, and how the devices compare. Standard library and click only."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field

from launcher.ledger import REFUTED, UNRANKED, VERIFIED, Ledger, clean, warn

LISTED = ("rank", "val_bpb", "stderr", "gain", "verified", "status", "tokens_per_second", "mfu_percent", "memory_gb", "num_params_M", "run", "description")


@dataclass
class Board:
    """The ranked rows of one track, by one set of rules, on one device."""

    key: tuple
    rows: list = field(default_factory=list)

    @property
    def best(self):
        return self.rows[0]

    @property
    def baseline(self):
        """The first ranked run of the device on this board."""
        return min(self.rows, key=lambda row: (row.time, row.run))

    @property
    def title(self):
        track, fingerprint, rules, budget, val_tokens, platform, device = self.key
        return f"{track} on {device} ({platform}): {len(self.rows)} runs, {budget:g} s, {val_tokens:,} tokens scored, rules {rules}, data {fingerprint[:8]}"


def gather(paths, track=None, platform=None, complain=warn):
    """(boards, rows listed apart, {run: verification row}) of one or more ledgers, merged by run id."""
    rows, seen, checked = [], set(), {}
    for path in paths:
        for row in Ledger(path).rows(complain):
            if (track and row.track != track) or (platform and row.platform != platform):
                continue
            if row.status in (VERIFIED, REFUTED):
                checked[row.run] = row  # the last word counts
                continue
            if row.run and row.run in seen:
                continue
            seen.add(row.run)
            rows.append(row)
    boards, apart = {}, []
    for row in rows:
        refuted = row.run in checked and checked[row.run].status == REFUTED
        if row.ranks and not refuted:
            boards.setdefault(row.board, Board(row.board)).rows.append(row)
        else:
            apart.append(row)
    current = newest_rules(boards)
    for key in [k for k in boards if k[:3] not in current]:  # other rules, or other data of the same track
        apart += boards.pop(key).rows
    for board in boards.values():
        board.rows.sort(key=lambda row: row.val_bpb)
    return sorted(boards.values(), key=lambda b: (b.key[0], b.best.val_bpb)), apart, checked


def newest_rules(boards):
    """{(track, fingerprint, rules)} to rank: of each track the highest rules, and of those the data with the most rows."""
    counts, best = Counter(), {}
    for key, board in boards.items():
        counts[key[:3]] += len(board.rows)
    for chosen, count in counts.items():
        track, _, rules = chosen
        if track not in best or (rules, count) > best[track][0]:
            best[track] = (rules, count), chosen
    return {chosen for _, chosen in best.values()}


def why_apart(row, checked):
    if row.run in checked and checked[row.run].status == REFUTED:
        return f"refuted: {checked[row.run].reason}"
    if not row.scored:
        return f"{row.status}: {row.reason}" if row.reason else row.status
    if not row.rules:
        return "from another tool: its rules are unknown"
    marked = [UNRANKED[m] for m in row.mark_list if m in UNRANKED]
    return ", ".join(marked) if marked else "other rules or other data"


def listing(board, checked, most=None):
    """Dicts of a board's rows, best first; of the first `most` where it is given."""
    out, baseline = [], board.baseline.val_bpb
    for rank, row in enumerate(board.rows[:most], 1):
        verification = checked.get(row.run)
        out.append({"rank": rank, "val_bpb": row.val_bpb, "stderr": row.val_stderr, "gain": round(baseline - row.val_bpb, 6),
                    "verified": bool(verification and verification.status == VERIFIED), "status": row.status,
                    "tokens_per_second": row.tokens_per_second, "mfu_percent": row.mfu_percent, "memory_gb": row.memory_gb,
                    "num_params_M": row.num_params_M, "run": row.run, "description": row.description})
    return out


def across(boards):
    """Devices on the same track: best val_bpb, the share of the gap to the fastest device's best that research closed, what it cost."""
    out = []
    for track in dict.fromkeys(b.key[0] for b in boards):
        group = [b for b in boards if b.key[0] == track]
        target = min(b.best.val_bpb for b in group)
        for board in group:
            best, base = board.best, board.baseline
            gap = base.val_bpb - target
            out.append({"track": track, "device": best.device, "platform": best.platform, "runs": len(board.rows), "best_val_bpb": best.val_bpb,
                        "baseline_val_bpb": base.val_bpb, "gap_closed_percent": round(100 * (base.val_bpb - best.val_bpb) / gap, 1) if gap > 0 else None,
                        "val_tokens": best.val_tokens, "tokens_M": best.tokens_M, "petaflops": best.petaflops, "energy_kj": best.energy_kj or None})
    return out


def table(rows, columns, out):
    """Aligned text; numbers to the right."""
    cells = [[shown(column, row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    out.write("  ".join(c.ljust(w) for c, w in zip(columns, widths)).rstrip() + "\n")
    for line, row in zip(cells, rows):
        out.write("  ".join(text.ljust(w) if isinstance(row[c], str) else text.rjust(w) for text, w, c in zip(line, widths, columns)).rstrip() + "\n")


def shown(column, value):
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    if column in ("val_bpb", "stderr", "gain", "best_val_bpb", "baseline_val_bpb"):
        return f"{value:.6f}" if column != "stderr" else f"{value:.4f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
    return str(value)


def leaderboard(paths, track=None, platform=None, kind="text", most=20, out=None):
    """Print the boards of the ledgers: as text, tsv or json."""
    out = out or sys.stdout
    boards, apart, checked = gather(paths, track, platform)
    if kind == "json":
        json.dump({"boards": [{"title": b.title, "rows": listing(b, checked)} for b in boards], "across": across(boards),
                   "apart": [{"run": r.run, "val_bpb": r.val_bpb, "description": r.description, "why": why_apart(r, checked)} for r in apart]}, out, indent=1)
        out.write("\n")
        return
    if kind == "tsv":
        out.write("\t".join(("track", "device", *LISTED)) + "\n")
        for board in boards:
            for row in listing(board, checked):
                out.write("\t".join([board.key[0], clean(board.key[6]), *(clean(row[c]) for c in LISTED)]) + "\n")
        return
    if not boards and not apart:
        out.write("no experiments yet: autoresearch run\n")
        return
    for board in boards:
        out.write(f"{board.title}\n")
        table(listing(board, checked, most), LISTED, out)
        out.write(f"... {len(board.rows) - most} more (--json or --tsv has them)\n\n" if len(board.rows) > most else "\n")
    if len(boards) > 1:
        out.write("across devices\n")
        rows = across(boards)
        table(rows, tuple(rows[0]), out)
        out.write("\n")
    if apart:
        out.write(f"not ranked: {len(apart)}\n")
        table([{"val_bpb": r.val_bpb, "run": r.run or "-", "device": r.device or "-", "why": why_apart(r, checked)[:90], "description": r.description[:60]}
               for r in apart[-most:]], ("val_bpb", "run", "device", "why", "description"), out)
