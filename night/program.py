"""`autoresearch program`: the human's page for this machine, with what an agent needs to know now."""

import re

from launcher.ledger import STATUSES, Row, warn
from launcher.runs import ledger
from launcher.setting import Setting
from launcher.verdict import best_run, survey_board
from prepare import ROOT, UserError

# The section of program.md for each kind of machine, by framework and kind of device.
SECTIONS = {
    ("torch", "gpu"): "CUDA",
    ("torch", "cpu"): "CPU",
    ("mlx", "gpu"): "MLX",
    ("mlx", "cpu"): "MLX",
}
NO_BEST = "best: none yet: run the trainer unchanged, that is the baseline"
RECENT = 15  # experiments that are listed unless told otherwise
REASON_LENGTH = 80  # characters of a failure's reason in that list


def write_program(setting: Setting, recent: int = RECENT) -> str:
    """Return the page: its common section, the machine's section, and the facts of the moment.

    recent: how many of the newest experiments the facts list.

    Raises:
        UserError: program.md is missing, or lacks a section.
    """
    platform = setting.platform
    name = SECTIONS[platform.framework, platform.device_kind]
    page = read_sections()
    for wanted in ("Common", name):
        if wanted not in page:
            raise UserError(f"program.md has no section '## {wanted}'")
    parts = [
        f"# Program for {platform.name}",
        page["Common"],
        f"## {name}",
        page[name],
        "## Now",
        "\n".join(facts(setting, recent)),
    ]
    return "\n\n".join(parts) + "\n"


def read_sections() -> dict[str, str]:
    """Return the second-level headings of program.md with their text. Raises UserError when it is missing."""
    path = ROOT / "program.md"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    _, *parts = re.split(r"^## (.+)$", text, flags=re.M)
    return {heading.strip(): body.strip() for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def facts(setting: Setting, recent: int) -> list[str]:
    """Return what is true at this moment, a line each."""
    platform = setting.platform
    track = setting.track
    return [
        f"trainer: {platform.trainer}",
        f"platform: {platform.name} ({setting.why})",
        f"device: {setting.facts.device}",
        f"track: {track.name}, vocab_size {track.vocab_size}, seq_len {track.seq_len}, "
        f"{setting.val_tokens:,} tokens scored",
        f"budget: {setting.budget:g} s of training; start-up at most {platform.startup_seconds:.0f} s",
        *standing(setting),
        *tried(setting, recent),
    ]


def standing(setting: Setting) -> list[str]:
    """Return the lines about the trainer to beat, the baseline and the seed noise, of the setting's board."""
    rows = ledger().rows(warn)
    if not any(row.comparable for row in rows):
        return [NO_BEST]  # and no data are prepared, as the board would need
    board = setting.board
    best = best_run(rows, board)
    if best is None:
        return [NO_BEST]
    baseline = next(row for row in rows if row.comparable and row.board == board)
    believed = survey_board(rows, board)
    assert believed
    lines = [f"best: {best.val_bpb:.6f} by {best.run} ({best.description}); baseline {baseline.val_bpb:.6f}"]
    lines.append(f"noise: sigma {believed.sigma:.6f}, as believed from {len(rows)} runs")
    return lines


def tried(setting: Setting, recent: int) -> list[str]:
    """Return the newest experiments on this platform and track, a line each."""
    rows = [
        row
        for row in ledger().rows()
        if row.platform == setting.platform.name
        and row.track == setting.track.name
        and row.status in STATUSES
    ]
    if not rows:
        return []
    return [f"tried, newest last ({len(rows)} in all):", *map(describe, rows[-recent:])]


def describe(row: Row) -> str:
    """Return a line about an experiment."""
    line = f"  {row.status:8} {row.val_bpb:.6f}  {row.description}"
    if not row.scored:
        line += f"  [{row.reason[:REASON_LENGTH]}]"
    return line
