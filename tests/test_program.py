"""program.md, for each kind of machine."""

import pytest

from launcher.ledger import Flag, Ledger, Row
from launcher.setting import resolve
from night import program
from night.program import SECTIONS, read_sections, write_program
from prepare import UserError


def row(run, val_bpb, status, **more):
    number = run.removeprefix("r")
    values = {
        "run": run,
        "val_bpb": val_bpb,
        "status": status,
        **resolve("cpu").board._asdict(),
        "description": f"idea {number}",
        "time": f"2026-01-01T00:00:0{number}Z",
        "reason": "no luck",
    }
    return Row(**{**values, **more})


@pytest.fixture
def ledger(house):
    return Ledger(house / "results.tsv")


def test_the_page_has_a_section_for_every_kind_of_machine():
    assert {"Common", *SECTIONS.values()} == set(read_sections())


@pytest.mark.parametrize(
    "platform, trainer, section, other",
    [
        ("cpu", "train_cuda.py", "Element-wise work", "shared with the desktop"),
        ("mlx-cpu", "train_mlx.py", "shared with the desktop", "Element-wise work"),
    ],
)
def test_a_machine_gets_its_section_and_the_facts(house, platform, trainer, section, other):
    text = write_program(resolve(platform))
    assert section in text and other not in text and "best: none yet" in text
    assert f"trainer: {trainer}\nplatform: {platform} (named with --platform)\n" in text
    assert "track: tiny, vocab_size 512, seq_len 128, 16,384 tokens scored\nbudget: 300 s of training" in text


def test_what_was_tried_is_listed(ledger):
    ledger.append(row("r0", 1.5, "keep"))
    ledger.append(row("r1", 1.4, "keep"))
    ledger.append(row("r2", 0.0, "crash"))
    ledger.append(row("r3", 0.9, "keep", track="another"))
    ledger.append(row("r4", 0.9, "keep", device="another"))
    text = write_program(resolve("cpu"))
    assert "best: 1.400000 by r1 (idea 1); baseline 1.500000" in text
    assert "noise: not on record (autoresearch noise)" in text
    assert "tried, newest last (4 in all):\n  keep     1.500000  idea 0\n" in text
    assert "  crash    0.000000  idea 2  [no luck]\n" in text and "idea 3" not in text
    assert "idea 1\n" not in write_program(resolve("cpu"), recent=1).partition("tried")[2]


def test_the_best_of_a_short_budget_is_named_although_it_never_ranks(ledger):
    """`autoresearch loop --budget 60`: the agent must know what it has to beat."""
    short = {"budget": 60.0, "marks": Flag.SHORT}
    ledger.append(row("r0", 1.8, "keep", **short))
    ledger.append(row("r1", 1.7, "keep", **short))
    ledger.append(row("r2", 1.0, "keep", budget=60.0, marks="short,contended"))
    text = write_program(resolve("cpu", budget=60.0))
    assert "best: 1.700000 by r1 (idea 1); baseline 1.800000" in text
    ledger.append(row("r3", 1.2, "keep"))
    assert "best: 1.200000 by r3 (idea 3); baseline 1.200000" in write_program(resolve("cpu"))
    assert "best: none yet" in write_program(resolve("cpu", budget=61.0))


def test_a_page_without_any_run_prepares_no_data(house):
    setting = resolve("cpu")
    assert "best: none yet" in write_program(setting)
    assert "data" not in vars(setting)  # the property is cached where it was used


def test_the_seed_noise_is_named(ledger):
    for seed, val_bpb in enumerate((1.500, 1.502, 1.498)):
        ledger.append(row(f"r{seed}", val_bpb, "keep", seed=seed, source="s", marks=Flag.NOISE))
    assert "noise: sigma 0.002000, an improvement counts from 0.0" in write_program(resolve("cpu"))


def test_a_page_without_its_section_says_which(house, monkeypatch):
    monkeypatch.setattr(program, "ROOT", house)
    with pytest.raises(UserError, match="program.md cannot be read: No such file"):
        write_program(resolve("cpu"))
    (house / "program.md").write_bytes(b"# Program\n\n## Common\n\nb\xff\n")
    with pytest.raises(UserError, match="has no section '## CPU'"):
        write_program(resolve("cpu"))
