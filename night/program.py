"""
What an agent is told: the human's page for this machine, the ideas, and what the runs say.

`autoresearch program` prints it for whoever works by hand with `autoresearch try`; the loop gives it to its
agent with the words of one turn. The two differ in one section of program.md, and contradict each other in
nothing. Everything is bounded: a night of 300 experiments has a prompt as long as one of 60.
"""

import re
import sys
from pathlib import Path

from backends.platforms import choose_platform
from launcher.ledger import warn
from launcher.runs import ledger
from launcher.setting import Setting
from night import repo
from night.agent import EXAMPLES
from night.ideas import write_ideas
from night.lab_book import best_facts, clip, write_lab_book
from night.modes import Mode, mode_of
from night.notes import NOTES, read_notes
from night.tried import Tried, read_tried
from prepare import ROOT, TIME_BUDGET, UserError

# Characters. What is longer is cut, and says so; the lab book takes what the others leave.
PROMPT_CHARS = 60_000  # of the whole prompt
PAGE_CHARS = 16_000  # of program.md
IDEAS_CHARS = 10_000
RESULT_CHARS = 4_000  # of the last result, the end of a log included
COMPLAINT_CHARS = 4_000
DESCRIPTION_CHARS = 120  # of an edit that a mode names

# The section of program.md for each kind of machine, by framework and kind of device.
SECTIONS = {
    ("torch", "gpu"): "CUDA",
    ("torch", "cpu"): "CPU",
    ("mlx", "gpu"): "MLX",
    ("mlx", "cpu"): "MLX",
}
COMMON = "Common"
BY_HAND = "By hand"
IN_LOOP = "In the loop"
# What each mode asks for. {named}: the edits that it is about, a line each.
INSTRUCTIONS = {
    "explore": "Try one new idea: the one that you expect most of.",
    "combine": "Combine these near misses in one edit, or the two of them that fit together best. Each alone "
    "was too small to be told from luck; what they changed stands under Near misses:\n{named}",
    "ablate": "Take out of the trainer what may not earn its place. An edit that removes code needs no gain "
    "to be kept. These are its parts with the weakest evidence; their changes stand under Kept:\n{named}",
}
TURN = """\
{complaint}`autoresearch loop` called you, and runs the experiment when you are done. Edit {trainer}, and end.
left: {left}
{mode}

{instruction}

What later turns should know goes into {notes} (now {notes_now}). Keep it short.
End your answer with these lines; those without anything to say may be left out:

{lines}"""


def write_program(setting: Setting) -> str:
    """Return what is told to whoever works by hand.

    Raises:
        UserError: program.md is missing, or lacks a section.
    """
    tried = look(setting)
    mode = mode_of(tried)
    now = [*facts(setting), f"command: {try_command(setting)}", *best_facts(setting, tried)]
    parts = opening(setting, tried, BY_HAND)
    parts["Now"] = "\n".join(now)
    parts["Notes"] = read_notes()
    parts["This time"] = f"{mode.line}\n\n{instruct(mode)}"
    return assemble(setting, tried, mode, parts)


def write_turn(setting: Setting, result: str, complaint: str, left: str) -> str:
    """Return the prompt of a turn of the loop.

    result: what came of the last experiment
    complaint: why no experiment came of the last turn, "" when one did
    left: time and experiments that are left, as the agent reads it

    Raises:
        UserError: program.md is missing, or lacks a section.
    """
    tried = look(setting)
    mode = mode_of(tried)
    notes = read_notes()
    parts = opening(setting, tried, IN_LOOP)
    now = [*facts(setting), f"command: autoresearch, or {our_command()}"]
    parts["Now"] = "\n".join([*now, *best_facts(setting, tried)])
    parts["Notes"] = notes
    parts["Last result"] = shorten(result, RESULT_CHARS)
    failed = f"No experiment came of the last turn: {shorten(complaint, COMPLAINT_CHARS)}\n\n"
    parts["This turn"] = TURN.format(
        complaint=failed if complaint else "",
        trainer=setting.platform.trainer,
        left=left,
        mode=mode.line,
        instruction=instruct(mode),
        notes=NOTES,
        notes_now="empty" if not notes else "as shown above",
        lines="\n".join(f"{name}: {text}" for name, text in EXAMPLES.items()),
    )
    return assemble(setting, tried, mode, parts)


def look(setting: Setting) -> Tried:
    """Return what was tried on the setting's board."""
    rows = ledger().rows(warn)
    if not any(row.comparable for row in rows):
        return Tried(rows, [], None)  # the board would need the data, and there are none prepared yet
    return read_tried(rows, setting.board, repo.committed_source(setting.trainer.name))


def opening(setting: Setting, tried: Tried, role: str) -> dict[str, str]:
    """Return the human's page as {heading: text}: what all are told, the role, the machine, the ideas."""
    machine = SECTIONS[setting.platform.framework, setting.platform.device_kind]
    page = read_sections()
    wanted = (COMMON, role, machine)
    for name in wanted:
        if name not in page:
            raise UserError(f"program.md has no section '## {name}'")
    parts = {name: page[name] for name in wanted}
    if sum(map(len, parts.values())) > PAGE_CHARS:
        parts = {name: shorten(text, PAGE_CHARS // len(parts)) for name, text in parts.items()}
    parts["Ideas"] = shorten(write_ideas((COMMON, machine), tried), IDEAS_CHARS)
    return parts


def assemble(setting: Setting, tried: Tried, mode: Mode, parts: dict[str, str]) -> str:
    """Return the prompt: the parts in their order, and after the facts what the runs say."""
    title = f"# Program for {setting.platform.name}"
    others = len(join(title, {**parts, "Lab book": "-"}))
    book = write_lab_book(setting, tried, mode, PROMPT_CHARS - others)
    ordered: dict[str, str] = {}
    for heading, text in parts.items():
        ordered[heading] = text
        if heading == "Now":
            ordered["Lab book"] = book
    return join(title, ordered)


def join(title: str, parts: dict[str, str]) -> str:
    sections = [f"## {heading}\n\n{text.strip()}" for heading, text in parts.items() if text.strip()]
    return "\n\n".join([title, *sections]) + "\n"


def read_sections() -> dict[str, str]:
    """Return the second-level headings of program.md with their text. Raises UserError when it is missing."""
    path = ROOT / "program.md"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    _, *parts = re.split(r"^## (.+)$", text, flags=re.M)
    return {heading.strip(): body.strip() for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def facts(setting: Setting) -> list[str]:
    """Return what is true of the setting, a line each."""
    platform = setting.platform
    track = setting.track
    memory = f", {setting.facts.memory_gb:g} GiB" if setting.facts.memory_gb else ""
    return [
        f"trainer: {platform.trainer}",
        f"platform: {platform.name} ({setting.why})",
        f"device: {setting.facts.device}{memory}",
        f"track: {track.name}, vocab_size {track.vocab_size}, seq_len {track.seq_len}, "
        f"{setting.val_tokens:,} tokens scored",
        f"budget: {setting.budget:g} s of training; start-up at most {platform.startup_seconds:.0f} s",
    ]


def our_command() -> str:
    """Return how our command is called where a shell has another PATH than we gave it."""
    script = Path(sys.executable).with_name("autoresearch")
    return str(script) if script.exists() else f"{sys.executable} -m launcher.entry"


def try_command(setting: Setting) -> str:
    """Return the command that tries an edit in this very setting."""
    try:
        usual = choose_platform("")[0].name
    except UserError:
        usual = ""
    options = []
    if setting.platform.name != usual:
        options.append(f"--platform {setting.platform.name}")
    if setting.track.name != setting.platform.track:
        options.append(f"--track {setting.track.name}")
    if setting.budget != TIME_BUDGET:
        options.append(f"--budget {setting.budget:g}")
    return " ".join(["uv run autoresearch try", *options, '-m "the idea in a line"'])


def instruct(mode: Mode) -> str:
    """Return what a mode asks for, in words."""
    named = "\n".join(f"- {run}: {clip(description, DESCRIPTION_CHARS)}" for run, description in mode.named)
    return INSTRUCTIONS[mode.name].format(named=named)


def shorten(text: str, chars: int) -> str:
    """Return the text, or its beginning and its end."""
    if len(text) <= chars:
        return text
    left_out = "\n[... the middle is left out: it is too long ...]\n"
    half = (chars - len(left_out)) // 2
    return text[:half] + left_out + text[-half:]
