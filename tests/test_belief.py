"""The verdict rule: what a board's runs say about its trainers, and when a claim may be made."""

import itertools
import math
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import night
from launcher import belief
from launcher.belief import (
    LOOKS,
    PRIOR,
    Forest,
    Observation,
    Prior,
    claim,
    effects,
    judge,
    noise_of_repeats,
    survey,
    visible_change,
)
from launcher.belief import _rank_sums as rank_sums


def runs(*values, source="best", kept=True):
    """Runs of one trainer: the first is kept."""
    return [Observation(source, v, kept=kept and i == 0) for i, v in enumerate(values)]


def challengers(*values, start=0, parent="best"):
    """Runs of new trainers that were made from `parent` and not kept."""
    return [Observation(f"edit {start + i}", v, kept=False, parent=parent) for i, v in enumerate(values)]


QUIET = runs(1.0, 1.0004, 0.9996)  # a best and its noise


def test_the_first_run_is_kept():
    decision = judge(runs(1.5))
    assert decision.action == "keep" and decision.build_on == decision.best == "best"
    assert decision.before == decision.after == 1.5 and decision.p_better == 1.0
    assert decision.reason == "first result on this board"


def test_a_much_better_run_is_kept_and_a_much_worse_one_is_not():
    better = judge([*QUIET, *challengers(0.99)])
    assert better.action == "keep" and better.build_on == "edit 0" and better.p_better > 0.99
    assert better.effect == pytest.approx(-0.01, abs=0.001) and better.after < better.before
    worse = judge([*QUIET, *challengers(1.01)])
    assert worse.action == "discard" and worse.build_on == "best" and worse.p_better < 0.01
    assert worse.effect == pytest.approx(0.01, abs=0.001)


def test_without_noise_on_record_a_night_can_begin():
    history = runs(1.0)
    assert judge([*history, *challengers(0.99)]).action == "keep"
    assert judge([*history, *challengers(1.01)]).action == "discard"


def test_effects_are_symmetric_where_the_prior_is():
    prior = Prior(better=0.35, equal=0.3, gain=0.001, harm=0.001)
    seen = np.linspace(-5, 5, 21)
    var = np.full(21, 0.7)
    scale = np.ones(21)
    there, back = effects(seen, var, prior, scale), effects(-seen, var, prior, scale)
    assert there.mean == pytest.approx(-back.mean) and there.var == pytest.approx(back.var)
    assert there.p_gain == pytest.approx(back.p_harm) and there.mean[10] == pytest.approx(0, abs=1e-12)


def test_two_trainers_of_one_score_are_believed_alike():
    history = [*QUIET, *challengers(1.0003, 1.0003)]
    first, second = judge(history[:-1]), judge(history)
    assert second.effect == pytest.approx(first.effect, abs=1e-4)
    assert second.p_better == pytest.approx(first.p_better, abs=0.05)


def test_the_belief_follows_repeats():
    history = runs(1.0)
    errors, means = [], []
    for _ in range(8):
        history.append(Observation("best", 1.002, kept=False))
        decision = judge(history)
        means.append(decision.after)
        errors.append(decision.after_error)
    assert means == sorted(means) and means[-1] == pytest.approx(1.0018, abs=0.0003)
    assert errors[-1] < errors[0] and decision.reason == "another run of the current trainer, which stays"


def test_a_run_that_went_wrong_does_not_move_the_belief():
    spread = [0.0003, -0.0006, 0.0001, 0.0005, -0.0004]
    before = judge(runs(*(1 + x for x in spread)))
    after = judge(runs(*(1 + x for x in spread), 1.012))  # twenty sigma
    assert abs(after.after - before.after) < before.after_error
    assert after.sigma < 2 * before.sigma
    first_was_wrong = judge(runs(1.012, *(1 + x for x in spread)))
    assert first_was_wrong.after == pytest.approx(after.after, abs=2e-4)


def test_a_challenger_that_diverged_does_not_move_the_belief():
    history = [*QUIET, *challengers(1.0003, 1.0011)]
    before, after = judge(history), judge([*history, *challengers(3.2, start=2)])
    assert abs(after.after - before.after) < before.after_error and after.sigma < 2 * before.sigma


def test_a_best_that_was_lucky_is_found_out_by_its_challengers():
    history = [*runs(1.0, 1.0003, 0.9997, 1.0001), Observation("lucky", 0.9982, kept=True, parent="best")]
    assert judge(history).action == "keep"
    for i in range(12):  # edits that do nothing score as the best before it
        history.append(Observation(f"edit {i}", 1.0 + 0.0003 * (-1) ** i, kept=False, parent="lucky"))
        decision = judge(history)
        if decision.build_on != "lucky":
            break
    assert decision.before > 0.999 and (decision.build_on == "best" or decision.build_on.startswith("edit"))


def test_going_back_is_said():
    history = [*runs(1.0), Observation("lucky", 0.9985, kept=True, parent="best")]
    decisions = []
    for i in range(8):
        history.append(Observation(f"edit {i}", 1.003 + i * 1e-5, kept=False, parent="lucky"))
        decisions.append(judge(history))
    gone = [d for d in decisions if d.action == "discard" and d.build_on == "best"]
    assert gone and all("back to an earlier trainer" in d.reason for d in gone)
    assert all(d.best == d.build_on for d in gone)


def test_a_belief_that_grew_is_the_one_of_all_runs_at_once(monkeypatch):
    chance = random.Random(1)
    history = runs(1.0)
    for i in range(230):  # beyond the runs that are all taken one by one
        source = "best" if i % 40 == 7 else f"edit {i}"
        parent = "best" if i < 100 else "edit 50"
        history.append(Observation(source, 1 + chance.gauss(0.001, 0.001), kept=False, parent=parent))
        if i % 25 and i < 200:
            continue
        grown = judge(history), survey(history)
        monkeypatch.setattr(belief, "_beliefs", [])
        assert (judge(history), survey(history)) == grown


def test_an_error_leaves_no_half_belief(monkeypatch):
    history = [*QUIET, *challengers(0.99)]
    expected = judge(history)
    judge(history[:-1])

    def fail(*arguments):
        raise FloatingPointError

    with monkeypatch.context() as patch:
        patch.setattr(Forest, "fit", fail)
        with pytest.raises(FloatingPointError):
            judge(history)
    assert judge(history) == expected


def test_an_edit_that_removes_code_needs_no_gain():
    best = runs(*(1 + 0.0004 * (i % 3 - 1) for i in range(12)))
    within_noise = Observation("shorter", 1.0002, kept=False, parent="best")
    assert judge([*best, within_noise]).action == "discard"
    assert judge([*best, replace(within_noise, removes_code=True)]).action == "keep"
    assert judge([*best, replace(within_noise, val_bpb=1.002, removes_code=True)]).action == "discard"


def test_a_parent_that_is_not_named_is_the_one_kept_last():
    values = [1.0, 0.99, 0.995, 0.985]
    named = [
        Observation(s, v, k, p)
        for s, v, k, p in zip("abcd", values, [1, 1, 0, 0], [None, "a", "b", "b"], strict=True)
    ]
    assert judge(named) == judge([replace(one, parent=None) for one in named])


HISTORY = [*QUIET, *challengers(1.0011, 0.9991, 1.004), Observation("new", 0.9985, True, "edit 1")]
HISTORY += challengers(0.9989, 1.0002, 0.9977, start=3, parent="new")


def test_names_and_units_do_not_matter():
    one = judge(HISTORY)
    names = {o.source: str(random.Random(o.source).random()) for o in HISTORY}
    renamed = [replace(o, source=names[o.source], parent=o.parent and names[o.parent]) for o in HISTORY]
    assert replace(judge(renamed), build_on="", best="") == replace(one, build_on="", best="")
    scaled = [replace(o, val_bpb=1000 * o.val_bpb + 7) for o in HISTORY]
    other = judge(scaled, Prior(gain=1000 * PRIOR.gain, harm=1000 * PRIOR.harm, sigma=1000 * PRIOR.sigma))
    assert (other.action, other.build_on, other.best) == (one.action, one.build_on, one.best)
    assert other.p_better == pytest.approx(one.p_better) and other.sigma == pytest.approx(1000 * one.sigma)
    assert other.effect == pytest.approx(1000 * one.effect) and other.after == pytest.approx(
        1000 * one.after + 7
    )


def test_the_order_of_challengers_hardly_matters():
    values = [1.0011, 0.9998, 1.004, 1.0007, 1.0021, 1.0]
    last = challengers(1.0002, start=6)
    orders = itertools.islice(itertools.permutations(values), 0, None, 80)
    found = [judge([*QUIET, *challengers(*order), *last]).after for order in orders]
    assert max(found) - min(found) < 1e-4


def test_decisions_are_deterministic():
    assert judge(HISTORY) == judge(list(HISTORY))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcdef"),
            st.one_of(st.floats(0.5, 5.0), st.sampled_from([1.0, 1e-9, 1e6, 0.0])),
            st.booleans(),
            st.sampled_from(["a", "b", "f", None]),
            st.booleans(),
        ),
        min_size=1,
        max_size=14,
    )
)
def test_whatever_was_run_the_numbers_make_sense(rows):
    decision = judge([Observation(*row) for row in rows])
    sources = {row[0] for row in rows}
    assert decision.action in ("keep", "discard", "repeat") and {decision.build_on, decision.best} <= sources
    assert decision.action != "keep" or decision.build_on == rows[-1][0]
    assert 0 <= decision.p_better <= 1 and decision.sigma > 0
    numbers = (decision.effect, decision.before, decision.after)
    errors = (decision.effect_error, decision.before_error, decision.after_error)
    assert all(map(math.isfinite, numbers)) and all(math.isfinite(e) and e >= 0 for e in errors)


@pytest.mark.parametrize("history", [[], runs(math.nan), runs(1.0, math.inf)])
def test_what_is_no_score_is_refused(history):
    with pytest.raises(ValueError, match="at least one run"):
        judge(history)


def test_the_noise_is_learned_from_repeats_and_from_challengers():
    rng = random.Random(3)
    repeats = runs(*(1 + rng.gauss(0, 0.0024) for _ in range(40)))
    assert judge(repeats).sigma == pytest.approx(0.0024, rel=0.3)
    for sigma in (0.22, 0.6, 2.4):
        nights = night.draw(night.PUBLISHED, sigma, False, nights=40)
        assert night.new_rule(nights).sigma == pytest.approx(sigma, rel=0.3)


def test_effects_far_from_the_prior_are_learned():
    rng = random.Random(4)
    history = [*runs(2.5), *challengers(*(2.5 + rng.expovariate(10) for _ in range(10)))]
    decision = judge([*history, *challengers(2.47, start=10)])
    assert decision.action == "keep" and decision.effect < -0.005


def test_a_repeat_is_asked_for_where_it_is_worth_an_experiment():
    """Never in a simulated night; but where challengers gain little and the two best cannot be told apart."""
    forest = Forest(1, 10)
    node = forest.add(np.zeros(1, int), np.array([-1]))
    forest.observe(node, np.zeros(1))
    forest.fit()
    assert not forest.repeat_pays(node)[0]  # of what else is there to choose from
    new = forest.add(np.zeros(1, int), node)
    forest.observe(new, np.array([0.3]))
    forest.fit()
    forest.var[:], forest.scale[:] = 1.0, 0.1
    assert forest.repeat_pays(new)[0]
    forest.observe(np.repeat(new, 2), np.array([0.1, 0.2]))
    assert not forest.repeat_pays(new)[0]  # three runs are enough


def test_boards_side_by_side_decide_as_each_alone():
    """The simulator runs many boards at once; the launcher calls judge for one."""
    rng = np.random.default_rng(5)
    boards, length = 3, 30
    values = 1 + rng.standard_normal((boards, length)) * 0.001 + rng.exponential(0.0005, (boards, length))
    forest = Forest(boards, boards * length)
    every = np.arange(boards)
    current = forest.add(every, np.full(boards, -1))
    forest.observe(current, np.zeros(boards))
    forest.fit()
    histories = [[Observation("0", values[b, 0], True)] for b in range(boards)]
    for run in range(1, length):
        node = forest.add(every, current)
        forest.observe(node, (values[:, run] - values[:, 0]) / PRIOR.gain)
        forest.fit()
        chosen = forest.choose(current, node)
        for b in range(boards):
            parent = str(current[b] // boards)
            histories[b].append(Observation(str(run), values[b, run], chosen[b] == node[b], parent))
            decision = judge(histories[b])
            assert decision.action == "repeat" or decision.build_on == str(chosen[b] // boards)
            assert decision.sigma == pytest.approx(forest.sigma[b] * PRIOR.gain)
        current = chosen


def test_what_can_be_seen_shrinks_with_runs_and_grows_with_noise():
    one = visible_change(0.0006, 100)
    assert one.night == pytest.approx(one.run / math.sqrt(50)) and 0.001 < one.run < 0.002
    assert visible_change(0.0012, 100).run == pytest.approx(2 * one.run)
    assert visible_change(0.0006, 0).night == one.run


def test_the_belief_is_imported_without_scipy():
    code = "import launcher.belief, sys; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


BASELINE = [1.0000, 1.0004, 0.9997, 1.0002, 0.9999, 1.0001, 0.9996, 1.0003]


def test_a_clear_gain_is_claimed_at_the_first_look():
    answer = claim(BASELINE[:3], [v - 0.01 for v in BASELINE[3:6]])
    assert answer.verdict == "claim" and answer.runs == 3 and answer.p < 0.01
    assert answer.low > 0 and answer.low < answer.gain < answer.high
    assert answer.gain == pytest.approx(0.01, abs=0.0005)
    later = claim(BASELINE, [v - 0.01 for v in reversed(BASELINE)])
    assert later.verdict == "claim" and later.runs == 3  # a claim that was made stands


def test_nothing_is_claimed_where_there_is_nothing():
    assert claim([], []).verdict == claim([1.0], [0.9]).verdict == "go on"
    assert claim(BASELINE, BASELINE).verdict == "stop"
    assert claim([1.0] * 3, [1.0] * 3).verdict == "go on"
    assert claim(BASELINE[:4], [v + 0.01 for v in BASELINE[:4]]).verdict != "claim"
    full = [1 + 0.001 * math.sin(i) for i in range(16)]
    assert claim(full, full[::-1]).verdict == "stop"


def test_a_baseline_that_went_wrong_once_makes_no_claim():
    best = [v + 0.0001 for v in BASELINE]
    for n in LOOKS[:4]:
        assert claim([1.02, *BASELINE][:n], best[:n]).verdict != "claim"


def test_a_gain_is_claimed_through_runs_that_went_wrong():
    baseline = [*BASELINE, *BASELINE[:4]]
    best = [v - 0.003 for v in baseline]
    best[1] = 1.02
    answers = [claim(baseline[:n], best[:n]) for n in LOOKS[:5]]
    assert [a.verdict for a in answers] == ["go on", "go on", "go on", "go on", "claim"]
    assert answers[-1].gain == pytest.approx(0.003, abs=0.0005) and answers[-1].low > 0


def test_rank_sums_are_exact():
    for n in (1, 2, 3, 4):
        found = [0] * (n * n + 1)
        for ranks in itertools.combinations(range(2 * n), n):
            found[sum(r - i for i, r in enumerate(ranks))] += 1
        assert rank_sums(n) == found
    assert sum(rank_sums(16)) == math.comb(32, 16)


@pytest.mark.parametrize("tails", [False, True])
def test_nights_end_better_than_greedy_ones(tails):
    for sigma, least in ((0.22, 1.0), (0.6, 1.1), (2.4, 2.0)):
        nights = night.draw(night.PUBLISHED, sigma, tails, nights=100)
        greedy, new = night.greedy(nights), night.new_rule(nights)
        assert new.gain.mean() > least * greedy.gain.mean(), (sigma, night.ratio(new, greedy))
        assert new.gain.mean() > night.old_rule(nights, 3).gain.mean()


@pytest.mark.parametrize("tails", [False, True])
def test_false_claims_are_as_rare_as_stated(tails):
    for claims in night.claims_of_no_gain(600, tails).values():
        assert claims.made <= 0.01 * claims.tested + 2


# --- A board whose noise is not the prior's -----------------------------------------------------------------


def test_three_repeats_are_enough_to_know_a_noise_thirty_times_the_priors():
    believed = judge(runs(2.65, 2.69, 2.66))
    assert 0.012 < believed.sigma < 0.03
    small = judge([*runs(2.65, 2.69, 2.66), Observation("edit", 2.65, kept=False, parent="best")])
    assert small.sigma > 0.012 and abs(small.effect) < 0.005 and 0.3 < small.p_better < 0.7


def test_repeats_that_went_wrong_do_not_make_the_noise():
    assert noise_of_repeats(runs(1.0, 1.0006)) is None  # too few to say
    assert noise_of_repeats([*runs(1.0, 1.001), *runs(2.0, 2.001, source="other")]) == pytest.approx(
        0.001 / 2**0.5
    )
    gone_wrong = runs(1.0, 1.0006, 1.05, 0.9996, 1.0002, 1.0001)
    assert noise_of_repeats(gone_wrong) < 0.001 and judge(gone_wrong).sigma < 0.001


def test_two_repeats_that_are_close_by_luck_do_not_hide_the_noise():
    """Taken for the noise, they would make every other run one that went wrong."""
    rng = random.Random(3)
    history = runs(1.0, 1.0004, 1.012)
    for i in range(12):
        history.append(Observation(f"edit {i}", 1.0 + rng.gauss(0, 0.008), kept=False, parent="best"))
    assert judge(history).sigma > 0.003


@pytest.mark.parametrize("gain", [0.02, 0.05, 0.3])
def test_a_first_gain_of_any_size_is_kept(gain):
    """One child is no reason to take its parent's run for one that went wrong."""
    decision = judge([*runs(1.6), *challengers(1.6 - gain)])
    assert decision.action == "keep" and decision.effect == pytest.approx(-gain, rel=0.1)


def test_a_survey_agrees_with_the_decision():
    history = [*QUIET, *challengers(0.995, 1.004)]
    believed, decision = survey(history), judge(history)
    assert believed.best == decision.best and believed.sigma == decision.sigma
    last = believed.trainers["edit 1"]
    assert (last.effect, last.effect_error) == (decision.effect, decision.effect_error)
    assert believed.trainers["best"].runs == 3 and last.parent == "best" and survey([]) is None


def test_what_may_not_be_gone_back_to_is_not():
    history = [*runs(1.0), Observation("lucky", 0.9985, kept=True, parent="best")]
    history += [Observation(f"edit {i}", 1.003 + i * 1e-5, kept=False, parent="lucky") for i in range(8)]
    free = judge(history)
    assert free.build_on != "lucky"
    barred = judge(history, candidates={"lucky", "edit 3"})
    assert barred.build_on in ("lucky", "edit 3", "edit 7") and barred.best in ("lucky", "edit 3", "edit 7")


def test_scores_that_differ_much_leave_the_noise_open_until_there_are_repeats():
    assert not survey([*runs(1.0), *challengers(1.001, 0.999)]).noise_is_open
    wide = [*runs(1.0), *challengers(1.05, 0.97, 1.02)]
    assert survey(wide).noise_is_open
    assert not survey(
        [*wide, Observation("best", 1.03, False), Observation("best", 0.98, False)]
    ).noise_is_open
