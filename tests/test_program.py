"""What an agent is told: program.md for each kind of machine, ideas, facts, and the words of a turn."""

import re

import pytest
from click.testing import CliRunner
from made_up import Night

from launcher import cli
from launcher.ledger import Flag
from launcher.setting import resolve
from night import ideas, program
from night.agent import EXAMPLES, Answer, parse
from night.ideas import IDEA
from night.modes import Mode
from night.notes import NOTES_CHARS, notes_path
from night.program import PROMPT_CHARS, SECTIONS, read_sections, write_program, write_turn
from prepare import ROOT, UserError


def turn(setting, result="a result", complaint="", left="6:12:30 until 07:30", mode=None):
    with pytest.MonkeyPatch.context() as patch:
        if mode:
            patch.setattr(program, "mode_of", lambda tried: mode)
        return write_turn(setting, result, complaint, left)


# --- The page -----------------------------------------------------------------------------------------------


def test_the_page_has_a_section_for_every_kind_of_machine_and_way_of_working():
    assert {"Common", "By hand", "In the loop", *SECTIONS.values()} == set(read_sections())


@pytest.mark.parametrize(
    "platform, trainer, section, other",
    [
        ("cpu", "train_cuda.py", "Element-wise work", "shared with the desktop"),
        ("mlx-cpu", "train_mlx.py", "shared with the desktop", "Element-wise work"),
    ],
)
@pytest.mark.parametrize("write", [write_program, turn])
def test_a_machine_gets_its_section_and_the_facts(house, write, platform, trainer, section, other):
    text = write(resolve(platform))
    assert section in text and other not in text and "best: none yet" in text
    assert f"trainer: {trainer}\nplatform: {platform} (named with --platform)\n" in text
    assert "track: tiny, vocab_size 512, seq_len 128, 16,384 tokens scored\nbudget: 300 s of training" in text


def test_by_hand_and_in_the_loop_nothing_contradicts(house):
    setting = resolve("cpu")
    by_hand = write_program(setting)
    in_loop = turn(setting)
    assert "autoresearch try" in by_hand and "restore RUN" in by_hand
    assert "The loop runs the experiments" not in by_hand and "experiment: <" not in by_hand
    assert "go to" not in in_loop and "Exit codes" not in in_loop
    assert "Edit train_cuda.py, and end." in in_loop
    commands = re.findall(r"`autoresearch (\w+)", in_loop)
    assert set(commands) == {"loop", "show", "diff", "log", "restore", "leaderboard"}
    assert set(commands) <= {"loop", *cli.FOR_AGENTS}
    assert in_loop.index("If you have a shell") < in_loop.index("`autoresearch show")


def test_the_budget_at_hand_is_told_and_the_best_of_its_board(house):
    """`--budget 60`: the agent must know what it has to beat, although it never ranks."""
    short = Night(resolve("cpu", budget=60.0))
    short.run(1.702, "keep", marks=Flag.SHORT)
    short.run(1.7, "keep", marks=Flag.SHORT)
    short.run(1.0, "discard", marks="short,contended")
    text = write_program(short.setting)
    assert "best: 1.700000 by r001 (idea 1); baseline 1.702000" in text
    assert (
        "budget: 60 s of training" in text and "300 s" not in text and "five minutes of training" not in text
    )
    assert 'command: uv run autoresearch try --budget 60 -m "the idea in a line"\n' in text
    assert "best: none yet" in write_program(resolve("cpu"))


def test_the_command_names_what_differs_from_the_usual(house):
    assert 'command: uv run autoresearch try -m "' in write_program(resolve("cpu"))
    assert "command: uv run autoresearch try --platform mlx-cpu -m" in write_program(resolve("mlx-cpu"))


def test_the_command_line_takes_track_and_budget(house):
    done = CliRunner().invoke(cli.main, ["program", "--track", "tiny", "--budget", "4"])
    assert done.exit_code == 0 and "budget: 4 s of training" in done.output
    assert CliRunner().invoke(cli.main, ["program", "--track", "no-such-track"]).exit_code != 0


def test_a_page_without_any_run_prepares_no_data(house):
    setting = resolve("cpu")
    assert "best: none yet" in write_program(setting) and "best: none yet" in turn(setting)
    assert "data" not in vars(setting)  # the property is cached where it was used


def test_a_page_without_its_section_says_which(house, monkeypatch):
    monkeypatch.setattr(program, "ROOT", house)
    with pytest.raises(UserError, match="program.md cannot be read: No such file"):
        write_program(resolve("cpu"))
    (house / "program.md").write_bytes(
        b"# Program\n\n## Common\n\nb\xff\n\n## By hand\n\nc\n\n## In the loop\n\nd\n"
    )
    with pytest.raises(UserError, match="has no section '## CPU'"):
        write_program(resolve("cpu"))


# --- A turn -------------------------------------------------------------------------------------------------


def test_a_turn_ends_with_what_is_asked_for(house):
    text = turn(resolve("cpu"), "wider\nstatus: discard", "it does not compile", "2 experiments", Mode())
    end = text.partition("## Last result")[2]
    assert end.startswith(
        "\n\nwider\nstatus: discard\n\n## This turn\n\nNo experiment came of the last turn: it does"
    )
    assert "left: 2 experiments\nmode: explore\n" in end
    for name, example in EXAMPLES.items():
        assert f"\n{name}: {example}\n" in end
    assert "No experiment came" not in turn(resolve("cpu"))


def test_the_examples_of_a_turn_are_no_answer(house):
    text = turn(resolve("cpu"))
    assert parse(text + "\nexperiment: wider\n", text) == Answer("wider")
    assert parse(text + "\nexperiment: wider\n").description == "wider"
    assert "<" not in parse(text).description


def test_a_mode_names_its_edits(house):
    mode = Mode("combine", "12 experiments in a row were not kept", (("r1", "wider"), ("r2", "deeper")))
    text = turn(resolve("cpu"), mode=mode)
    assert text.count("mode: combine (12 experiments in a row were not kept)\n") == 1
    assert text.count("left: ") == 1
    assert "- r1: wider\n- r2: deeper\n" in text and "Combine these near misses in one edit" in text
    assert "needs no gain to be kept. These are" in turn(resolve("cpu"), mode=Mode("ablate"))


def test_notes_are_shown_and_named(house):
    assert "goes into runs/notes.md (now empty)" in turn(resolve("cpu"))
    notes_path().parent.mkdir()
    notes_path().write_text("width helps\n")
    text = turn(resolve("cpu"))
    assert "## Notes\n\nwidth helps\n" in text and "(now as shown above)" in text
    assert "## Notes\n\nwidth helps\n" in write_program(resolve("cpu"))


# --- Ideas --------------------------------------------------------------------------------------------------


def test_every_idea_has_an_id_of_its_own_and_an_effect():
    text = (ROOT / "ideas.md").read_text()
    lines = re.findall(r"^- .*$", text, re.M)
    assert len(lines) > 30 and all(IDEA.fullmatch(line) for line in lines)
    whence = ("public", "published", "estimated", "measured by us")
    assert all(any(word in line for word in whence) for line in lines)
    names = IDEA.findall(text)
    assert len(names) == len(set(names))
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert set(headings) == {"Common", *SECTIONS.values()}


def test_an_idea_that_was_tried_is_struck_out(house):
    night = Night()
    night.run(1.5, "keep", answer=Answer("baseline"))
    assert "\n- [qk-scale] " in turn(night.setting)
    night.run(1.6, "discard", answer=Answer("sharper", idea="[qk-scale]"))
    night.run(0.0, "crash", answer=Answer("sharper", idea="QK-scale, cpu-batch"))
    text = turn(night.setting)
    assert re.search(r"^- ~~\[qk-scale\] .*~~ tried: r001, discard; r002, crash$", text, re.M)
    assert re.search(r"^- ~~\[cpu-batch\] .*~~ tried: r002, crash$", text, re.M)
    assert "\n- [ema] " in text and "[mlx-batch]" not in text and text.count("~~ tried:") == 2


def test_without_the_file_there_are_no_ideas(house, monkeypatch):
    monkeypatch.setattr(ideas, "ROOT", house)
    assert "## Ideas" not in write_program(resolve("cpu"))


# --- The bound ----------------------------------------------------------------------------------------------


def test_a_prompt_is_bounded_whatever_was_tried_and_said(house, monkeypatch):
    night = Night()
    night.run(1.5, "keep")
    for number in range(1, 300):
        kept = number % 5 == 0
        low = 1.5 - number / 10_000 if kept else 1.9 - number / 500
        answer = Answer("x", "learned " * 99, "next " * 99)
        code = f"return x + {number} * mlp(x)\n" + "    # why\n" * 20
        status = "keep" if kept else "crash" if number % 7 == 0 else "discard"
        night.run(
            low,
            status,
            "return x + mlp(x)\n",
            code,
            answer,
            description="idea " * 40,
            reason=f"r{number % 50}" * 99,
        )
        night.trainer = night.trainer.replace(code, "return x + mlp(x)\n")
    notes_path().write_text("note " * NOTES_CHARS)
    sections = {name: "word " * 9999 for name in read_sections()}
    small = turn(night.setting, "result " * 9999, "complaint " * 9999)
    assert 0.9 * PROMPT_CHARS < len(small) <= PROMPT_CHARS
    assert "r299 " in small and "older ones are left out here" in small
    monkeypatch.setattr(program, "read_sections", lambda: sections)
    assert len(turn(night.setting, "result " * 9999, "complaint " * 9999)) <= PROMPT_CHARS
    assert len(write_program(night.setting)) <= PROMPT_CHARS
