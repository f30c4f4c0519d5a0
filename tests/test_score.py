"""Scoring without a framework: two made-up processes, honest and not, around real rows."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from backends.protocol import RunDir
from launcher import shared_memory
from launcher.disk_space import DiskSpace
from launcher.score import MOST_FP32, NotScored, Sample, ScoringPair, suspicious_and_random
from prepare import DocumentTotals, bits_per_byte, load_track, prepare_track

BATCH = 8


class Model:
    """Logits of each position from its own token alone: a table that a seed fixes."""

    def __init__(self, data, seed=0):
        self.vocab_size = data.vocab_size
        self.table = np.random.default_rng(seed).normal(0, 1, (data.vocab_size, data.vocab_size))
        self.calls = 0

    def logits(self, x):
        self.calls += 1
        return self.table[x].astype(np.float32)


class Looking(Model):
    """The position before the last sees its future, at every hundredth token."""

    def logits(self, x):
        logits = super().logits(x)
        row, at = np.nonzero(x[:, 1:] % 10 == 0)
        logits[row, at, x[row, at + 1]] += 5
        return logits


class Learning(Model):
    """Better with each call."""

    def logits(self, x):
        return super().logits(x) * (1 + 0.05 * self.calls)


class Company(Model):
    """Sees the other rows of its batch."""

    def logits(self, x):
        logits = super().logits(x)
        return logits + 0.1 * logits.mean(axis=0)


class Drawing(Model):
    """Draws random numbers."""

    rng = np.random.default_rng()

    def logits(self, x):
        return super().logits(x) + self.rng.normal(0, 1, (len(x), x.shape[1], self.vocab_size))


class Process:
    """A process that scores, in this one."""

    def __init__(self, model, lies=0.0):
        self.model = model
        self.lies = lies
        self.batch = BATCH
        self.asked = []

    def load(self, weights):
        pass

    def nats(self, rows):
        logits = self.model.logits(rows[:, :-1]).astype(np.float64)
        self.asked.append(rows)
        total = np.log(np.exp(logits).sum(axis=2))
        hit = np.take_along_axis(logits, rows[:, 1:, None].astype(np.int64), axis=2)[:, :, 0]
        return (total - hit - self.lies).astype(np.float32)

    def logits(self, x, positions):
        self.asked.append(x)
        return np.take_along_axis(self.model.logits(x), positions[:, :, None], axis=1)


@pytest.fixture
def data(house):
    return prepare_track(load_track("tiny"))


@pytest.fixture
def score(data):
    """score(first process, second process) -> Score of 64 rows."""

    def score(first, second, bf16=False, rows=64):
        pair = object.__new__(ScoringPair)
        pair.job = SimpleNamespace(data=data, bf16=bf16, run=RunDir(data.path), disk=DiskSpace(data.path))
        pair.first, pair.second = first, second
        pair._end_first = lambda since: first.asked.append(None)
        [result] = pair.score(None, {"val": rows}, 60.0, lambda event: None)
        assert first.asked.pop() is None  # it had ended before the second was asked
        return result

    return score


def test_an_honest_model_has_the_score_of_all_its_losses(score, data):
    first = Process(Model(data))
    result = score(first, Process(Model(data)), rows=128)
    rows = data.rows("val")
    totals = DocumentTotals(rows, data.documents("val"), data.bos, data.token_bytes())
    totals.add(np.arange(128), Process(Model(data)).nats(rows))
    bpb, stderr = bits_per_byte(totals.nats, totals.num_bytes)
    assert result.bpb == pytest.approx(bpb, rel=1e-9) and result.stderr == pytest.approx(stderr, rel=1e-6)
    assert result.tokens == 128 * data.seq_len and max(result.difference) < 1e-5
    asked = np.concatenate(first.asked)
    assert {row.tobytes() for row in asked} == {row.tobytes() for row in rows}  # each once, in another order
    assert not (asked == rows).all()


def test_a_first_process_of_which_something_may_still_run_is_refused(house):
    """It has seen all rows, and could tell the second one of them."""
    pair = object.__new__(ScoringPair)
    pair.first = SimpleNamespace(end=lambda: False)
    pair._shared_before = shared_memory.files()
    with pytest.raises(NotScored, match="could not be ended") as refusal:
        pair._end_first(time.time())
    assert refusal.value.status == "invalid"


def test_a_last_batch_that_is_not_full_counts_once(score, data):
    assert score(Process(Model(data)), Process(Model(data)), rows=61).tokens == 61 * data.seq_len


@pytest.mark.parametrize(
    "model, says",
    [
        (Looking, "sees its future"),
        (Learning, "keeps state"),
        (Company, "not independent"),
        (Drawing, "draws random numbers"),
    ],
)
def test_a_model_that_is_no_function_of_the_past_is_refused(score, data, model, says):
    with pytest.raises(NotScored, match=says) as refusal:
        score(Process(model(data)), Process(model(data)))
    assert refusal.value.status == "invalid"


def test_a_loss_that_is_not_that_of_the_logits_is_refused(score, data):
    with pytest.raises(NotScored):
        score(Process(Model(data), lies=2 * MOST_FP32.bias), Process(Model(data)))


@pytest.mark.parametrize("rows", [128, 4000])
def test_a_lie_about_few_rows_does_not_go_unseen(rows):
    """It must be a large one to matter, and those with the lowest losses are always asked about."""
    rng = np.random.default_rng(0)
    nats = rng.gamma(2.0, size=(rows, 16)).astype(np.float32)
    nats[7] = 0.0
    picked = suspicious_and_random(nats, rng)
    assert 7 in picked and len(set(picked)) == len(picked) == 128


class Accomplice(Process):
    """Lies like the first process wherever the text shows it the target."""

    def logits(self, x, positions):
        logits = super().logits(x, positions).astype(np.float64)
        logits -= np.log(np.exp(logits).sum(axis=2))[:, :, None]
        for i, row in enumerate(x):
            for k, at in enumerate(positions[i, :-1]):
                token = row[at + 1]
                sure = np.exp(logits[i, k, token] + self.lies)
                rest = np.log((1 - sure) / (1 - np.exp(logits[i, k, token])))
                logits[i, k] += rest
                logits[i, k, token] = np.log(sure)
        return logits.astype(np.float32)


def test_two_processes_that_lie_alike_differ_where_the_target_is_hidden(score, data):
    """By less than bfloat16 rounds at one position, and on average by more."""
    with pytest.raises(NotScored):
        score(Process(Model(data), lies=0.25), Accomplice(Model(data), lies=0.25), bf16=True)


def test_another_model_in_the_second_process_is_refused(score, data):
    with pytest.raises(NotScored):
        score(Process(Model(data)), Process(Model(data, seed=1)))


def test_the_second_process_is_never_shown_the_targets(score, data):
    """Of a position just before a cut it sees the text up to there, and another token behind it."""
    second = Process(Model(data))
    score(Process(Model(data)), second)
    rows = {row.tobytes() for row in data.rows("val")[:, :-1]}
    assert not [row for asked in second.asked for row in asked if row.tobytes() in rows]


def test_a_sample_changes_what_lies_behind_a_cut_and_asks_before_it(data):
    rows = np.array(data.rows("val"))
    nats = np.random.default_rng(1).gamma(1.0, size=(len(rows), data.seq_len)).astype(np.float32)
    sample = Sample.draw(rows, nats, data.vocab_size, np.random.default_rng(0))
    K = sample.positions.shape[1]
    for i, row in enumerate(rows):
        cut = sample.positions[i, -1] + 1
        assert (sample.changed[i, :cut] == row[:cut]).all()
        assert sample.changed[i, cut] != row[cut]  # the target of the last position
        assert (sample.positions[i] < cut).all() and len(set(sample.positions[i])) == K
        assert (sample.targets[i] == row[sample.positions[i] + 1]).all()
        assert (sample.first_losses[i] == nats[i, sample.positions[i]]).all()
    assert sample.changed.max() < data.vocab_size and (sample.rows == rows).all()


def test_a_cut_hides_what_the_first_process_was_sure_of(data):
    rows = np.array(data.rows("val"))
    nats = np.full((len(rows), data.seq_len), 5.0, np.float32)
    nats[:, 100] = 0.01
    sample = Sample.draw(rows, nats, data.vocab_size, np.random.default_rng(0))
    hits = sample.positions[:, -1] == 100
    assert np.mean(hits[1::2]) > 0.5 and np.mean(hits[::2]) < 0.2  # and any token in every second row


@pytest.mark.parametrize("count", [1, 2, 9])
def test_of_few_rows_all_are_the_sample(score, data, count):
    second = Process(Model(data))
    score(Process(Model(data)), second, rows=count)
    assert len({row.tobytes() for asked in second.asked for row in asked}) == count


def test_losses_are_those_of_double_precision(score, data, monkeypatch):
    """The launcher's log-sum-exp against the definition, with logits that overflow unless shifted."""
    pair = object.__new__(ScoringPair)
    model = Model(data)
    model.table *= 300
    pair.second = Process(model)
    rows = np.array(data.rows("val"))
    nats = np.ones((len(rows), data.seq_len), np.float32)
    sample = Sample.draw(rows, nats, data.vocab_size, np.random.default_rng(0))
    losses = pair._losses(rows, sample)
    i, k = 3, 2
    logits = model.table[rows[i, sample.positions[i, k]]].astype(np.float32).astype(np.longdouble)
    expected = np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[sample.targets[i, k]]
    assert losses[i, k] == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    "trained, built, says",
    [
        ({"a": [2]}, {"a": [3]}, "'a' is [2] in the model that exp.start was given, [3] in what build_model"),
        ({"a": [2], "b": [1]}, {"a": [2]}, "'b' is [1] in the model that exp.start was given, not in"),
        ({}, {"a": [2]}, "'a' is not there, [2] in what build_model returns"),
    ],
)
def test_a_model_that_build_model_does_not_give_is_named_by_its_tensor(trained, built, says):
    pair = object.__new__(ScoringPair)
    pair.first = SimpleNamespace(shapes=built)
    with pytest.raises(NotScored) as refusal:
        pair.compare_shapes(trained)
    assert says in refusal.value.reason and "put its average" in refusal.value.reason


@pytest.fixture
def pair(house):
    """A pair whose processes only notice that they are killed."""
    pair = object.__new__(ScoringPair)
    pair.job = SimpleNamespace(run=RunDir(house), disk=DiskSpace(house))
    pair.killed = threading.Event()
    pair.first = pair.second = SimpleNamespace(kill=pair.killed.set)
    return pair


@pytest.mark.parametrize(
    ("act", "status", "says"),
    [
        (
            lambda pair: pair.job.run.score_log.write_text("x" * 2000),
            "crash",
            "printed more than 1,000 bytes",
        ),
        (lambda pair: setattr(pair.job.disk, "filled", lambda: "it wrote"), "crash", "it wrote"),
        (lambda pair: None, "timeout", "too long"),
    ],
)
def test_a_process_that_prints_or_writes_without_end_or_hangs_is_ended(pair, monkeypatch, act, status, says):
    monkeypatch.setattr("launcher.score.LONGEST_LOG", 1000)
    with pytest.raises(NotScored, match=says) as refusal, pair._in_time(1.0, "too long"):
        act(pair)
        assert pair.killed.wait(30)
        raise NotScored("crash", "the process went away")
    assert refusal.value.status == status


def test_a_broken_rule_says_more_than_the_time(pair):
    with pytest.raises(NotScored, match="not the model") as refusal, pair._in_time(0.1, "too long"):
        assert pair.killed.wait(30)
        raise NotScored("invalid", "not the model")
    assert refusal.value.status == "invalid"


def test_a_score_in_time_leaves_no_watcher(pair):
    before = threading.active_count()
    with pair._in_time(60.0, "too long"):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_score_that_is_none_is_refused(score, data):
    perfect = Process(Model(data))
    perfect.nats = lambda rows: np.zeros((len(rows), rows.shape[1] - 1), np.float32)
    with pytest.raises(NotScored):
        score(perfect, Process(Model(data)))
