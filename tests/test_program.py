"""program.md, for each kind of machine."""

import pytest

from launcher.ledger import Ledger, Row
from launcher.program import PARTS, program, sections
from prepare import ROOT


def test_the_page_has_a_part_for_every_backend():
    page = sections((ROOT / "program.md").read_text())
    assert {"Common", *PARTS.values()} == set(page)


@pytest.mark.parametrize("platform, part, others", [("cpu", "Element-wise work", "unified|shared with the desktop"), ("mlx-cpu", "shared with the desktop", "Element-wise work")])
def test_a_machine_gets_its_part_and_the_facts(house, platform, part, others):
    text = program(platform)
    assert part in text and others not in text and "best: none yet" in text
    trainer = {"cpu": "train_cuda.py", "mlx-cpu": "train_mlx.py"}[platform]
    assert f"trainer: {trainer}" in text


def test_what_was_tried_is_listed(house):
    from backends.platforms import machine_facts
    from prepare import RULES

    for i, (bpb, status) in enumerate([(1.5, "keep"), (1.4, "keep"), (0.0, "crash")]):
        Ledger(house / "results.tsv").append(Row(
            run=f"r{i}", val_bpb=bpb, status=status, rules=RULES, budget=300.0, track="tiny", platform="cpu", device=machine_facts().device,
            description=f"idea {i}", fingerprint="f", val_tokens=16384, time=f"2026-01-01T00:00:0{i}Z", reason="no luck"))
    text = program("cpu")
    assert "best: 1.400000 by r1 (idea 1); baseline 1.500000" in text and "noise: not on record" in text
    assert "crash    0.000000  idea 2  [no luck]" in text
