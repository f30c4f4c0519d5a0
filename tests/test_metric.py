"""Bits per byte against brute force and against models of known answer."""

import math

import numpy as np
import pytest

from prepare import (
    DocumentTotals,
    bits_per_byte,
    make_encoding,
    pack_rows,
    token_byte_lengths,
    train_tokenizer,
)

TEXT = "naïve café 日本語のテキスト 🙂🙃👩‍👩‍👧 plain words 12345 " * 30


@pytest.fixture(scope="module")
def encoding():
    return make_encoding(train_tokenizer([TEXT], 300))  # so few merges that characters split across tokens


def test_uniform_logits_give_log2_vocab_times_tokens_over_bytes(encoding):
    tokens = np.array(encoding.encode_ordinary(TEXT))
    lengths = token_byte_lengths(encoding)
    bos = encoding.n_vocab - 1
    rows = np.array([bos, *tokens], np.uint16)[None]
    totals = DocumentTotals(rows, np.zeros(1, np.int32), bos, lengths)
    totals.add(np.arange(1), np.full((1, len(tokens)), math.log(encoding.n_vocab), np.float32))
    bpb, _ = bits_per_byte(totals.nats, totals.num_bytes)
    assert bpb == pytest.approx(math.log2(encoding.n_vocab) * len(tokens) / len(TEXT.encode()), rel=1e-7)


def test_characters_split_across_tokens_count_their_raw_bytes(encoding):
    lengths = token_byte_lengths(encoding)
    for text in ("🙂", "語", "é", TEXT):
        tokens = encoding.encode_ordinary(text)
        assert lengths[tokens].sum() == len(text.encode())
    assert len(encoding.encode_ordinary("🦄")) > 1  # never seen: it is in pieces, none of which is UTF-8


def test_against_brute_force_by_document():
    """Documents that were split over rows add up, in any order; tokens without bytes count in no sum."""
    rng = np.random.default_rng(0)
    lengths = np.array([0, 1, 2, 3, 7, 0], np.int32)
    bos, T = 5, 16
    documents = [rng.integers(0, 5, size).astype(np.uint16) for size in (3, 70, 1, 24, 15, 40, 2)]
    packed = list(pack_rows([documents], T + 1, bos, "split"))
    rows = np.array([row.tokens for row in packed])
    named = np.array([number for row in packed for number in row.documents], np.int32)
    nats = rng.gamma(2.0, size=(len(rows), T)).astype(np.float32)

    expected = {number: [0.0, 0] for number in range(len(documents))}
    pieces = iter(named)
    for row, losses in zip(rows, nats, strict=True):
        for t, token in enumerate(row):
            if token == bos:
                document = int(next(pieces))
            elif t and lengths[token] > 0:
                expected[document][0] += float(losses[t - 1])
                expected[document][1] += int(lengths[token])
    totals = DocumentTotals(rows, named, bos, lengths)
    order = rng.permutation(len(rows))
    for start in range(0, len(rows), 3):
        picked = order[start : start + 3]
        totals.add(picked, nats[picked])
    assert totals.num_bytes[:-1].tolist() == [expected[i][1] for i in range(len(documents))]
    assert totals.nats[:-1] == pytest.approx([expected[i][0] for i in range(len(documents))], rel=1e-12)
    assert totals.num_bytes[-1] == totals.nats[-1] == 0
    bpb, _ = bits_per_byte(totals.nats, totals.num_bytes)
    sums = np.array(list(expected.values())).sum(axis=0)
    assert bpb == pytest.approx(sums[0] / sums[1] / math.log(2), rel=1e-12)


def test_standard_error_is_that_of_many_draws():
    """The stated error against the spread of the estimate over fresh samples of documents."""
    rng = np.random.default_rng(1)
    estimates, errors = [], []
    for _ in range(600):
        num_bytes = rng.integers(50, 150, 80)
        nats = num_bytes * rng.normal(1.0, 0.2, 80) + rng.normal(0, 5, 80)
        bpb, error = bits_per_byte(nats, num_bytes)
        estimates.append(bpb)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.1)


def test_what_cannot_be_scored():
    assert math.isnan(bits_per_byte([1.0, math.nan], [2, 2])[0])
    with pytest.raises(ValueError):
        bits_per_byte([0.0], [0])
