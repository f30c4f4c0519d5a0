"""What the runs say, as an agent reads it."""

import pytest
from made_up import Night

from launcher.runs import ledger
from night.agent import Answer
from night.lab_book import best_facts, write_lab_book
from night.modes import Mode, mode_of
from night.tried import read_tried

WIDER = ("START.n_embd", "640")
CODE = ("return x + mlp(x)", "return x + 2 * mlp(x)")


@pytest.fixture
def night(house):
    return Night()


def tried(night):
    return read_tried(ledger().rows(), night.setting.board)


def book(night, mode=None, chars=30_000):
    return write_lab_book(night.setting, tried(night), mode or Mode(), chars)


def part(text, heading):
    """Return a section of the lab book."""
    return text.partition(f"### {heading}")[2].partition("###")[0]


# --- Facts --------------------------------------------------------------------------------------------------


def test_the_best_run_is_told_with_its_resolved_sizes(night):
    night.run(1.5, "keep")
    took = {"depth": 2, "num_params_M": 1.5, "num_steps": 100, "tokens_M": 0.1024}
    night.run(
        1.498,
        "keep",
        *WIDER,
        **took,
        tokens_per_second=341.0,
        mfu_percent=40.5,
        memory_gb=1.5,
        description="wide",
    )
    facts = "\n".join(best_facts(night.setting, tried(night)))
    assert "best: 1.498000 by r001 (wide); baseline 1.500000\n" in facts
    for line in (
        "layers: 2",
        "width: 640",
        "parameters_M: 1.5",
        "tokens_a_step: 1024",
        "steps: 100",
        "tokens_per_second: 341",
        "mfu_percent: 40.5",
        "sizes: N_LAYER 2, N_EMBD 640",
    ):
        assert f"\n  {line}\n" in facts + "\n"
    total = night.setting.facts.memory_gb
    assert f"\n  memory_gb: 1.5 of {total:g} ({total - 1.5:.1f} free)" in facts


def test_what_is_not_on_record_is_left_out(night):
    night.run(1.5, "keep")
    facts = "\n".join(best_facts(night.setting, tried(night)))
    assert "width: 64" in facts and "layers" not in facts and "memory" not in facts
    assert best_facts(night.setting, read_tried([], night.setting.board)) == ["best: none yet"]


def test_the_trainer_to_build_on_is_named_where_it_is_not_the_best(night):
    first = night.run(1.5, "keep")
    night.run(1.498, "keep", *WIDER, build_on=first.source)
    assert "current_trainer: r000 (idea 0), believed 1." in "\n".join(best_facts(night.setting, tried(night)))


def test_the_loss_of_best_and_last_run_stands_side_by_side(night):
    night.run(1.5, "keep", curve=[24.0 - i for i in range(24)])
    night.run(0.0, "crash", curve=[9.0, 8.0, 7.0])  # of a third of the budget each: it came to the end
    assert part(book(night), "Loss").strip().splitlines()[1:] == [
        "",
        "progress:     8%    17%    25%    33%    42%    50%    58%    67%    75%    83%    92%   100%",
        "best:     23.000 21.000 19.000 17.000 15.000 13.000 11.000  9.000  7.000  5.000  3.000  1.000",
        "last:      9.000  9.000  9.000  9.000  9.000  9.000  9.000  8.000  8.000  8.000  8.000  7.000",
    ]


def test_how_it_goes_is_counted(night):
    night.run(1.5, "keep")
    text = book(night)
    assert "last 1: 1 of 1 kept\n" in text and "noise: sigma 0.0" in text and "visible: 0.0" in text
    for _ in range(12):
        night.run(1.6, "discard")
    assert "experiments: 13 in all, 1 kept\nlast 12: 0 of 12 kept: be bolder, or combine near misses" in book(
        night
    )


# --- Experiments --------------------------------------------------------------------------------------------


def test_a_kept_run_is_told_with_belief_speed_lesson_and_change(night):
    night.run(1.5, "keep")
    night.run(1.498, "keep", *WIDER, tokens_per_second=12345.0, memory_gb=1.5)
    night.run(0.0, "crash", answer=Answer("huge", learned="width pays"))  # says what the run before it taught
    told = part(book(night), "Kept")
    assert "+ r000 keep 1.500000: idea 0\n" in told
    assert "+ r001 keep 1.498000, effect -0." in told and ", 12,345 tokens/s, 1.5 GiB: idea 1\n" in told
    assert "\n    learned: width pays\n    N_EMBD: START.n_embd (64) -> 640" in told


def test_the_belief_is_that_of_today(night):
    """The row's own is what was believed when the run ended."""
    night.run(1.5, "keep")
    night.run(1.49, "keep", *WIDER, effect=-0.5, p_better=0.125)
    told = part(book(night), "Kept")
    assert "-0.5" not in told and "0.12" not in told and "effect -0.0" in told


def test_a_kept_run_that_was_left_again_says_so(night):
    first = night.run(1.5, "keep")
    night.run(1.49, "keep", *WIDER)
    night.run(1.6, "discard", build_on=first.source)
    told = part(book(night), "Kept")
    assert "+ r000" in told and "- r001 keep" in told


def test_a_discard_that_the_search_went_back_to_counts_as_kept(night):
    night.run(1.5, "keep")
    missed = night.run(1.499, "discard", *CODE)
    night.run(1.6, "discard", build_on=missed.source)
    told = part(book(night), "Kept")
    assert "+ r001 discard" in told and "+    return x + 2 * mlp(x)" in told


def test_the_ten_best_discards_are_near_misses_and_the_others_take_a_line(night):
    night.run(1.5, "keep")
    for number in range(12):
        night.run(1.53 - number / 1000, "discard", "0.04", f"0.04{number + 1}")
    text = book(night)
    near = part(text, "Near misses")
    assert near.count("P(better)") == 10 and near.index("r012") < near.index("r011")
    assert "\n    MATRIX_LR: 0.04 -> 0.0412\n" in near
    others = part(text, "Other discards")
    assert "r001 discard 1.530000 effect +0." in others and "MATRIX_LR" not in others
    assert others.index("r001") < others.index("r002")


def test_a_trainer_that_is_not_here_is_no_error(night, house):
    night.run(1.5, "keep")
    row = night.run(1.498, "keep", *WIDER)
    (house / "runs" / row.run / "train_cuda.py").unlink()
    assert "(its trainer or the one before it is not here)" in book(night)


def test_failures_are_counted_by_reason(night):
    night.run(1.5, "keep")
    night.run(0.0, "crash", reason="out of memory: 12.5 GiB", description="huge")
    night.run(0.0, "crash", reason="out of memory: 80 GiB", description="larger")
    night.run(0.0, "timeout", reason="too slow")
    night.run(0.0, "invalid", reason="a seed of its own", marks="dry", budget=0.0)
    night.run(0.0, "crash", reason="interrupted", marks="interrupted")
    night.run(0.0, "crash", reason="of another board", budget=4.0)
    told = part(book(night), "Without a score")
    assert "2 x crash: out of memory: N GiB [huge; larger]\n1 x timeout: too slow [idea 3]\n" in told
    assert "1 x invalid: a seed of its own" in told and "interrupted" not in told and "another" not in told


def test_what_agents_want_next_is_listed(night):
    night.run(1.5, "keep", answer=Answer("a", next="narrower heads"))
    assert "r000: narrower heads" in part(book(night), "What the last turns wanted")


def test_a_ledger_of_an_older_version_is_read(house):
    """Its rows have no parent and no belief."""
    night = Night()
    for number in range(4):
        night.run(1.5 - number / 100, "keep", "0.04", f"0.04{number}", parent="", build_on="")
    assert part(book(night), "Kept").count("+ r00") == 4


# --- Room ---------------------------------------------------------------------------------------------------


def long_night(night, experiments):
    night.run(1.5, "keep")
    for number in range(1, experiments):
        kept = number % 6 == 0
        low = 1.5 - number / 1000 if kept else 1.9 - number / 500  # the first discards are the worst
        night.run(
            low, "keep" if kept else "discard", "0.04", f"0.04{number}", description=f"idea {number} " * 40
        )


def test_the_oldest_discards_go_first(night):
    long_night(night, 120)
    text = book(night, chars=16_000)
    assert len(text) <= 16_000
    assert "r001 " not in text and "r119 " in text and "older ones are left out here" in text
    kept = part(text, "Kept")
    assert all(f" r{number:03} keep" in kept for number in range(0, 120, 6))


@pytest.mark.parametrize("chars", [3_000, 6_000, 12_000])
def test_a_small_room_is_kept(night, chars):
    long_night(night, 60)
    assert len(book(night, chars=chars)) <= chars


def test_the_runs_of_a_mode_are_told_before_all_others(night):
    long_night(night, 60)
    mode = Mode("ablate", "", (("r006", "idea 6"),))
    assert "+ r006 keep" in (told := part(book(night, mode, 6_000), "Kept")) and "P(better)" in told
    assert told.index("P(better)") == told.index("P(better)", told.index("r006"))
    assert mode_of(tried(night)).name == "explore"
