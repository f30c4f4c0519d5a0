"""The trainer's side of a run, without a framework: batches and epochs, the clock, the loss lag, refusals."""

import json
import math
import os
import sys
import time

import numpy as np
import pytest

from backends import experiment
from backends.experiment import LOSS_LAG, BrokenRule, RowOrder
from backends.protocol import RunSettings, parse_event
from prepare import load_track, prepare_track


class Toy(experiment.Experiment):
    """An experiment whose device is numpy, and whose model is a number: its loss in nats."""

    def _open_device(self):
        self.seeded = False

    def _seed_changed(self):
        return self.seeded

    def _to_device(self, rows):
        return rows

    def _arrived(self, copy):
        return copy[:, :-1], copy[:, 1:]

    def _read_later(self, loss):
        return loss if callable(loss) else lambda: loss

    def _nats(self, model, x, y):
        return np.full(y.shape, model, np.float32)

    def _num_params(self, model):
        return 2_500_000

    def _save(self, model, path):
        path.write_bytes(b"weights")

    def _load(self, model, path):
        pass

    def _synchronize(self):
        pass

    def _peak_memory_mb(self):
        return 100.0

    def _measured_tflops(self):
        return 1.0

    def _out_of_memory(self, error):
        return isinstance(error, MemoryError)


UNTRAINED = math.log(512)  # the tiny track has 512 tokens


@pytest.fixture
def make(house, monkeypatch):
    """make(seed=..., budget=...) -> (experiment, a function that returns its events so far)."""
    prepare_track(load_track("tiny"))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(Toy, "_watch_held_out_rows", lambda self: None)  # audit hooks would pile up
    monkeypatch.setattr(Toy, "_end_with_the_launcher", lambda self: None)
    pipes = []

    def make(num_rows=None, **settings):
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        pipes.append(reading)
        run_dir = house / "run"
        run_dir.mkdir(exist_ok=True)
        told = RunSettings("cpu", run_dir=str(run_dir), events_fd=writing, **settings)
        for name, value in told.to_env().items():
            monkeypatch.setenv(name, value)
        exp = Toy()
        if num_rows:
            exp._train_rows = np.arange(num_rows)[:, None].repeat(exp.track.seq_len + 1, axis=1)
            exp._order = RowOrder(num_rows, exp.seed)

        def events():
            try:
                return [parse_event(line) for line in os.read(reading, 2**20).splitlines()]
            except BlockingIOError:
                return []

        return exp, events

    yield make
    for pipe in pipes:
        os.close(pipe)


def drawn(exp, sizes):
    """The numbers of the rows that batches of these sizes bring."""
    return np.concatenate([exp.batch(size)[0][:, 0] for size in sizes])


@pytest.mark.parametrize(
    "sizes", [[8] * 25, [7] * 30, [100, 100], [300], [8] * 12 + [4] * 30, [1, 2, 4, 8, 16, 32, 64, 128]]
)
def test_every_row_comes_once_an_epoch_whatever_the_batch_sizes(make, sizes):
    exp, _ = make(num_rows=100)
    rows = drawn(exp, sizes)
    epochs = [rows[i : i + 100] for i in range(0, len(rows), 100)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
    assert all(set(epoch) == set(range(100)) for epoch in epochs if len(epoch) == 100)
    if len(epochs) > 1:
        assert list(epochs[0][:50]) != list(epochs[1][:50])


def test_a_smaller_batch_just_after_an_epoch_ended_does_not_hang(make):
    exp, _ = make(num_rows=100)
    drawn(exp, [8] * 12)  # the batch under way, 96 to 104, crosses into the second epoch
    assert len(drawn(exp, [4])) == 4


def test_the_order_depends_on_the_seed_alone(make):
    first = drawn(make(num_rows=100, seed=1)[0], [8] * 20)
    again = drawn(make(num_rows=100, seed=1)[0], [5] * 32)
    other = drawn(make(num_rows=100, seed=2)[0], [8] * 20)
    assert list(first) == list(again) and list(first) != list(other)


def test_row_order_is_numpys_permutation_of_each_epoch():
    order = RowOrder(10, seed=3)
    expected = [np.random.default_rng([3, epoch]).permutation(10) for epoch in range(4)]
    assert list(order.indices(0, 40)) == list(np.concatenate(expected))
    assert list(order.indices(7, 8)) == list(np.concatenate(expected)[7:15])
    assert list(order.indices(2, 3)) == list(expected[0][2:5])  # back in an earlier epoch


def test_x_and_y_are_a_row_shifted_by_one(make):
    exp, _ = make()
    x, y = exp.batch(3)
    assert x.shape == y.shape == (3, exp.track.seq_len) and (x[:, 1:] == y[:, :-1]).all()
    picked = np.random.default_rng([1, 0]).permutation(exp.track.num_train_rows)[:3]
    assert (x == exp.track.rows("train")[picked, :-1]).all()


def test_losses_are_read_late_and_in_order(make):
    exp, events = make(budget=100.0)
    exp.start(UNTRAINED, depth=2, flops_per_token=1000)
    read = []

    def loss(step):
        return lambda: read.append(step) or 4.0 - step / 10

    for step in range(5):
        exp.log(step, loss(step))
        assert read == list(range(max(0, step + 1 - LOSS_LAG)))
    exp.finish(UNTRAINED, 8)
    assert read == [0, 1, 2, 3, 4]
    logs = [event for event in events() if event.event == "log"]
    assert logs[0].step == 0 and logs[-1].step == 4  # the first and the last are always points of the curve
    assert logs[0].smooth == 4.0 and logs[-1].smooth == pytest.approx(3.87, abs=0.05)


def test_a_loss_that_is_not_finite_ends_the_run(make):
    exp, events = make()
    exp.start(UNTRAINED, depth=2, flops_per_token=1000)
    for loss in (4.0, math.nan, 4.0):
        exp.log(0, loss)
    with pytest.raises(SystemExit, match="the loss is nan at step 0: lower the learning rates"):
        exp.log(0, 4.0)
    assert events()[-1].kind == "nonfinite"


def test_the_clock(make, monkeypatch):
    exp, events = make(budget=4.0)
    with pytest.raises(SystemExit, match="before exp.start"):
        print(exp.progress)
    now = [time.monotonic() + 1000]
    monkeypatch.setattr(experiment.time, "monotonic", lambda: now[0])
    exp.start(UNTRAINED, depth=2, flops_per_token=1000)
    assert exp.progress == 0
    now[0] += 3
    assert exp.progress == 0.75
    exp.batch(8)
    exp.log(0, 4.0)
    now[0] += 2
    exp.finish(UNTRAINED, 8)
    now[0] += 60
    assert exp.elapsed == 5 and exp.progress == 1.25  # it has stopped
    stop = next(event for event in events() if event.event == "stop")
    assert (stop.training_seconds, stop.num_steps, stop.tokens) == (5.0, 1, 8 * exp.track.seq_len)


def test_the_result_is_sent_and_written(make, house, capsys):
    exp, events = make(budget=4.0)
    exp.start(UNTRAINED, depth=3, flops_per_token=1000)
    exp.batch(8)
    exp.log(0, 4.0)
    exp.finish(UNTRAINED, 8)
    result = events()[-1]
    assert (
        result.event == "result"
        and result.depth == 3
        and result.num_params_M == 2.5
        and result.num_steps == 1
    )
    assert json.loads((house / "run" / "result.json").read_text()) == result.printed()
    assert f"val_bpb: {result.val_bpb}\n" in capsys.readouterr().out
    lengths = exp.track.token_bytes()[exp.track.rows("val")[:128, 1:]]
    uniform = math.log2(512) * (lengths > 0).sum() / lengths.sum()
    assert result.val_bpb == pytest.approx(uniform, rel=1e-5) and result.val_tokens == 16384


@pytest.mark.parametrize(
    "break_rule, says",
    [
        (lambda exp: None, "trained before exp.start"),
        (lambda exp: exp.batch(4), "exp.batch was called before exp.start"),
        (lambda exp: setattr(exp, "seeded", True), "its own random seed"),
    ],
)
def test_what_must_not_happen_before_the_start(make, break_rule, says):
    exp, events = make()
    break_rule(exp)
    with pytest.raises(BrokenRule, match=says):
        exp.start(2.0 if "trained" in says else UNTRAINED, depth=2, flops_per_token=1000)
    assert says in events()[-1].message


@pytest.mark.parametrize(
    "depth, flops", [(2.5, 1000), ("2", 1000), (0, 1000), (2, math.nan), (2, -1), (2, None)]
)
def test_numbers_that_no_ledger_can_hold_are_refused_at_the_start(make, depth, flops):
    exp, events = make()
    with pytest.raises(BrokenRule, match="exp.start: depth"):
        exp.start(UNTRAINED, depth, flops)
    assert [event.event for event in events()] == ["invalid"]


def test_a_crash_is_told_to_the_launcher(make, capsys):
    exp, events = make()
    sys.excepthook(MemoryError, MemoryError("no more"), None)
    sys.excepthook(KeyError, KeyError("w"), None)
    oom, other = events()
    assert oom.kind == "oom" and "lower DEVICE_BATCH_SIZE" in oom.message and other.message == "KeyError: 'w'"


def test_an_odd_environment_is_a_sentence(house, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_SEED", "one")
    with pytest.raises(SystemExit, match="AUTORESEARCH_SEED is 'one': expected int"):
        Toy()
