"""The trainer's side of a run, without a framework: batches and epochs, the clock, the loss lag, refusals."""

import math
import socket
import sys
import time

import numpy as np
import pytest

from backends import experiment
from backends.device import Device
from backends.experiment import LOSS_LAG, Refused, RowOrder
from backends.protocol import ROWS_BYTE, RunSettings, parse_event
from prepare import load_track, prepare_track


class ToyDevice(Device):
    """A device that is numpy, and whose models are numbers."""

    def open(self):
        self.bf16 = False
        self.seeded = False

    def seed_changed(self):
        return self.seeded

    def copy(self, rows):
        return rows

    def arrived(self, copy):
        return copy[:, :-1], copy[:, 1:]

    def read_later(self, loss):
        return loss if callable(loss) else lambda: loss

    def synchronize(self):
        pass

    def shapes(self, model):
        return {"number": [int(model)]}

    def num_params(self, model):
        return 2_500_000

    def save(self, model, path):
        path.write_bytes(b"weights")

    def load(self, model, path):
        raise NotImplementedError

    drawn = ready_to_score = nats = logits = free_memory = load

    def peak_memory_mb(self):
        return 100.0

    def measured_tflops(self):
        return 1.0

    def out_of_memory(self, error):
        return isinstance(error, MemoryError)


class Toy(experiment.Experiment):
    device_class = ToyDevice


MODEL = 6.0


@pytest.fixture
def make(house, monkeypatch):
    """make(seed=..., budget=...) -> (experiment, a function that returns its events so far).

    The launcher's end of the socket has sent the training rows already, and will close.
    """
    data = prepare_track(load_track("tiny"))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    ends = []

    def make(num_rows=None, **settings):
        ours, theirs = socket.socketpair()
        ends.append(ours)
        told = RunSettings("cpu", weights=str(house / "weights"), launcher_fd=theirs.detach(), **settings)
        for name, value in told.to_env().items():
            monkeypatch.setenv(name, value)
        exp = Toy()
        with open(data.path / "train.bin", "rb") as rows:
            socket.send_fds(ours, [ROWS_BYTE], [rows.fileno()])
        ours.shutdown(socket.SHUT_WR)  # exp.finish waits for the end
        if num_rows:
            exp._train_rows = np.arange(num_rows)[:, None].repeat(exp.track.seq_len + 1, axis=1)
            exp._order = RowOrder(num_rows, exp.seed)

        def events():
            ours.setblocking(False)
            try:
                return [parse_event(line) for line in ours.recv(2**20).splitlines()]
            except BlockingIOError:
                return []

        return exp, events

    yield make
    for end in ends:
        end.close()


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
    exp.start(MODEL, depth=2, flops_per_token=1000)
    x, y = exp.batch(3)
    assert x.shape == y.shape == (3, exp.track.seq_len) and (x[:, 1:] == y[:, :-1]).all()
    picked = np.random.default_rng([1, 0]).permutation(exp.track.num_train_rows)[:3]
    assert (x == exp.track.rows("train")[picked, :-1]).all()


def test_losses_are_read_late_and_in_order(make):
    exp, events = make(budget=100.0)
    exp.start(MODEL, depth=2, flops_per_token=1000)
    read = []

    def loss(step):
        return lambda: read.append(step) or 4.0 - step / 10

    for step in range(5):
        exp.log(step, loss(step))
        assert read == list(range(max(0, step + 1 - LOSS_LAG)))
    exp.finish(MODEL)
    assert read == [0, 1, 2, 3, 4]
    logs = [event for event in events() if event.event == "log"]
    assert logs[0].step == 0 and logs[-1].step == 4  # the first and the last are always points of the curve
    assert logs[0].smooth == 4.0 and logs[-1].smooth == pytest.approx(3.87, abs=0.05)


def test_a_loss_that_is_not_finite_ends_the_run(make):
    exp, events = make()
    exp.start(MODEL, depth=2, flops_per_token=1000)
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
    exp.start(MODEL, depth=2, flops_per_token=1000)
    assert exp.progress == 0
    now[0] += 3
    assert exp.progress == 0.75
    exp.batch(8)
    exp.log(0, 4.0)
    now[0] += 2
    exp.finish(MODEL)
    now[0] += 60
    assert exp.elapsed == 5 and exp.progress == 1.25  # it has stopped
    stop = next(event for event in events() if event.event == "stop")
    assert (stop.num_steps, stop.tokens) == (1, 8 * exp.track.seq_len)


def test_the_weights_are_there_when_the_clock_stops(make, house, monkeypatch):
    exp, events = make(budget=4.0)
    exp.start(MODEL, depth=3, flops_per_token=1000)
    exp.batch(8)
    exp.log(0, 4.0)
    really = ToyDevice.save

    def save(self, model, path):
        assert exp._stop is None and "stop" not in [event.event for event in events()]
        really(self, model, path)

    monkeypatch.setattr(ToyDevice, "save", save)
    exp.finish(MODEL)
    assert (house / "weights").read_bytes() == b"weights"
    assert [event.event for event in events()] == ["log", "stop"]


def test_the_start_says_what_the_run_is(make):
    exp, events = make(budget=4.0)
    exp.start(MODEL, depth=3, flops_per_token=1000)
    [start] = events()
    assert (start.depth, start.num_params_M, start.dtype, start.weights) == (
        3,
        2.5,
        "float32",
        {"number": [6]},
    )


def test_another_model_at_the_end_is_refused(make):
    """Scoring builds what build_model gives, so what was trained beside it would not be scored."""
    exp, events = make()
    exp.start(MODEL, depth=3, flops_per_token=1000)
    with pytest.raises(Refused, match="another model than exp.start"):
        exp.finish(MODEL + 1)
    assert events()[-1].event == "invalid"


@pytest.mark.parametrize(
    "break_rule, says",
    [
        (lambda exp: exp.batch(4), "exp.batch was called before exp.start"),
        (lambda exp: setattr(exp._device, "seeded", True), "its own random seed"),
    ],
)
def test_what_must_not_happen_before_the_start(make, break_rule, says):
    exp, events = make()
    with pytest.raises(Refused, match=says):
        break_rule(exp)
        exp.start(MODEL, depth=2, flops_per_token=1000)
    assert says in events()[-1].message


def test_a_launcher_that_is_gone_ends_the_run(make, house):
    exp, _ = make()
    socket.recv_fds(exp._launcher, 1, 1)  # the rows are lost, and nothing follows
    with pytest.raises(SystemExit, match="the launcher is gone"):
        exp.start(MODEL, depth=2, flops_per_token=1000)


def test_alone_a_trainer_reads_the_rows_and_is_not_scored(house, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    exp = Toy()
    exp.start(MODEL, depth=2, flops_per_token=1000)
    exp.batch(8)
    exp.log(0, 4.0)
    exp.finish(MODEL)
    out = capsys.readouterr().out
    assert "num_steps: 1\n" in out and "not scored: autoresearch run" in out and "val_bpb" not in out


@pytest.mark.parametrize(
    "depth, flops", [(2.5, 1000), ("2", 1000), (0, 1000), (2, math.nan), (2, -1), (2, None)]
)
def test_numbers_that_no_ledger_can_hold_are_refused_at_the_start(make, depth, flops):
    exp, events = make()
    with pytest.raises(Refused, match="exp.start: depth"):
        exp.start(MODEL, depth, flops)
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
