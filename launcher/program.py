"""`autoresearch program`: the human's page for this machine, with what an agent needs to know now."""

import re

from backends.platforms import current_track, machine_facts
from launcher import verdict
from launcher.board import gather
from launcher.ledger import STATUSES
from launcher.run import choose_platform, home, ledger
from prepare import ROOT, RULES, TIME_BUDGET, UserError

PARTS = {"cuda": "CUDA", "mlx": "MLX", "mlx-cuda": "MLX", "mlx-cpu": "MLX", "torch-cpu": "CPU"}
RECENT = 15  # experiments listed where nobody asks for more


def sections(text):
    """{heading: body} of a page's second-level headings."""
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    return {name.strip(): body.strip() for name, body in zip(parts[1::2], parts[2::2])}


def program(platform=None, track=None, recent=RECENT):
    """The page as text: common part, the platform's part, facts with the `recent` newest experiments."""
    path = ROOT / "program.md"
    try:
        page = sections(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    chosen, why = choose_platform(platform)
    wanted = ["Common", PARTS[chosen.backend]]
    missing = [name for name in wanted if name not in page]
    if missing:
        raise UserError(f"program.md has no section '## {missing[0]}'")
    return "\n\n".join([f"# Program for {chosen.name}", page["Common"], f"## {wanted[1]}", page[wanted[1]], "## Now", facts(chosen, why, track, recent)]) + "\n"


def facts(platform, why, track, recent):
    """What is true at this moment, a line each."""
    track, val_tokens = current_track(platform, track or platform.track)
    device = machine_facts().device
    lines = [f"trainer: {platform.trainer}", f"platform: {platform.name} ({why})", f"device: {device}",
             f"track: {track.name}, vocab_size {track.vocab_size}, seq_len {track.seq_len}, {val_tokens:,} tokens scored",
             f"budget: {TIME_BUDGET} s of training; start-up at most {platform.startup_seconds:.0f} s"]
    boards, _, _ = gather([home() / "results.tsv"], track.name, platform.name)
    boards = [b for b in boards if b.key[6] == device and b.key[2] == RULES]
    rows = [row for row in ledger().rows() if row.platform == platform.name and row.track == track.name and row.status in STATUSES]
    if boards:
        board = boards[0]
        spread = verdict.noise_of(board.rows, board.key)
        lines.append(f"best: {board.best.val_bpb:.6f} by {board.best.run} ({board.best.description}); baseline {board.baseline.val_bpb:.6f}")
        lines.append(f"noise: sigma {spread.sigma:.6f}, an improvement counts from {spread.margin():.6f}" if spread
                     else "noise: not on record (autoresearch noise)")
    else:
        lines.append("best: none yet: run the trainer unchanged, that is the baseline")
    if rows:
        lines.append(f"tried, newest last ({len(rows)} in all):")
        lines += [f"  {row.status:8} {row.val_bpb:.6f}  {row.description}" + (f"  [{row.reason[:80]}]" if not row.scored else "") for row in rows[-recent:]]
    return "\n".join(lines)
