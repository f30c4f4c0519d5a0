"""The benchmark that takes the noise between seeds apart finds the parts that were put in."""

import json
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.seed_parts import components, print_table, run_all


def made_up(start: float, order: float, both: float, count: int = 60) -> list[SimpleNamespace]:
    """Return runs whose val_bpb has a part of each seed and one of the pair, of these standard deviations."""
    rng = np.random.default_rng(5)
    by_start = rng.normal(scale=start, size=count)
    by_order = rng.normal(scale=order, size=count)
    return [
        SimpleNamespace(start=s, order=o, val_bpb=1 + by_start[s] + by_order[o] + rng.normal(scale=both))
        for s in range(count)
        for o in range(count)
    ]


@pytest.mark.parametrize("parts", [(0.03, 0.01, 0.02), (0.0, 0.02, 0.005), (0.01, 0.0, 0.03)])
def test_each_part_of_the_noise_is_found(parts):
    found = components(made_up(*parts), "val_bpb")
    assert found == pytest.approx(parts, abs=0.0025, rel=0.2)


def test_what_only_the_start_decides_is_not_the_orders():
    runs = [SimpleNamespace(start=s, order=o, val_bpb=1 + s / 10) for s in range(3) for o in range(3)]
    found = components(runs, "val_bpb")
    assert found.start == pytest.approx(0.1) and found.order == pytest.approx(0, abs=1e-9)
    assert found.rest == pytest.approx(0, abs=1e-9)


class FakeTrainer:
    """It trains nothing, and counts its runs."""

    data = SimpleNamespace(seq_len=100)

    def __init__(self, track="pysource"):
        self.problem = {"track": track}
        self.runs = []
        self.compiled = False

    def compile(self):
        self.compiled = True

    def run(self, start, order, steps, val_tokens):
        self.runs.append((start, order, steps))
        value = {"val_bpb": start + order / 10, "averaged_bpb": 9.0}
        return {"start": start, "order": order, "steps": steps, **value}


def wanted(file, **more):
    common = {"starts": [1, 2], "orders": [1, 2], "steps": [5], "val_tokens": 250, "again": False}
    return Namespace(file=file, **{**common, **more})


def test_what_the_file_holds_is_not_run_again_and_another_problem_is_refused(tmp_path):
    file = tmp_path / "runs.jsonl"
    first = FakeTrainer()
    run_all(wanted(file, starts=[1]), first)
    assert first.runs == [(1, 1, 5), (1, 2, 5)]
    second = FakeTrainer()
    run_all(wanted(file), second)
    assert second.runs == [(2, 1, 5), (2, 2, 5)]
    again = FakeTrainer()
    run_all(wanted(file, starts=[1], again=True), again)
    assert again.runs == first.runs
    nothing = FakeTrainer()
    run_all(wanted(file), nothing)
    assert first.compiled and not nothing.compiled and not nothing.runs
    other = FakeTrainer("climbmix")
    with pytest.raises(SystemExit, match="holds runs of .*pysource.* name another file"):
        run_all(wanted(file), other)
    with pytest.raises(SystemExit, match="val_tokens"):
        run_all(wanted(file, val_tokens=999), FakeTrainer())
    assert not other.runs and len(file.read_text().splitlines()) == 6


def test_a_table_with_a_gap_says_nothing_of_the_parts(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    run_all(wanted(file), FakeTrainer())
    results = [SimpleNamespace(**json.loads(line)) for line in file.read_text().splitlines()]
    print_table(results)
    whole = capsys.readouterr().out
    assert "1: 1.1000 (9.0000)  1.2000 (9.0000)" in whole
    assert "val_bpb: sigma by start 0.7071, by order 0.0707, of the pair 0.0000" in whole
    print_table(results[:-1])
    gap = capsys.readouterr().out
    assert "2: 2.1000 (9.0000)  -" in gap and "sigma" not in gap
