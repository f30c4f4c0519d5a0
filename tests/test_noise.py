"""`autoresearch noise`: seeds, numbers, flags. Training is made up."""

import json
import re

import pytest
from test_run import rows, scores  # noqa: F401  a fixture

from launcher.harness import source_hash
from launcher.noise import measure_noise
from launcher.setting import resolve
from prepare import ROOT


def test_noise_is_measured_and_recorded(scores, house, capsys):  # noqa: F811
    scores += [1.500, 1.502, 1.498]
    assert measure_noise(resolve("cpu"), 3) == 0
    out = capsys.readouterr().out
    assert "noise_sigma: 0.002000" in out and "noise_runs: 3" in out and "noise_mean: 1.500000" in out
    # 1.645 is the one-sided 95% quantile of the normal distribution.
    visible = float(re.search(r"^visible_in_a_run: (\S+)$", out, re.M)[1])
    assert visible == pytest.approx(1.645 * 0.002 * 2**0.5, rel=1e-4)
    assert scores.seeds == [1, 2, 3]
    source = source_hash((ROOT / "train_cuda.py").read_bytes())
    assert all("noise" in row.flags and row.source == source for row in rows(house))


def test_a_program_may_read_it(scores, house, capsys):  # noqa: F811
    scores += [1.500, 1.502]
    assert measure_noise(resolve("cpu"), 2, as_json=True) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["noise_runs"] == 2 and data["noise_sigma"] == pytest.approx(0.002 / 2**0.5)
    assert [run["val_bpb"] for run in data["runs"]] == [1.5, 1.502] and data["runs"][0]["flags"] == ["noise"]


def test_a_short_budget_is_said(scores, house, capsys):  # noqa: F811
    scores += [1.5, 1.6]
    assert measure_noise(resolve("cpu", budget=10.0), 2) == 0
    assert "runs of the same budget alone" in capsys.readouterr().out


def test_runs_that_do_not_compare_measure_nothing(scores, house, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("launcher.run.mac_state", lambda: {"on_battery": True})
    scores += [1.5, 1.6]
    assert measure_noise(resolve("cpu"), 2) == 1
    assert "fewer than two of the runs count" in capsys.readouterr().out


def test_a_run_that_fails_ends_it_with_its_exit_code(scores, house, monkeypatch):  # noqa: F811
    monkeypatch.setattr("prepare.Prepared.current_fingerprint", lambda self: "something is off")
    scores += [1.5, 1.6]
    assert measure_noise(resolve("cpu"), 2) == 5
    assert len(rows(house)) == 1
