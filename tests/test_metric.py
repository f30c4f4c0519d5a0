"""Bits per byte against brute force and against models of known answer."""

import math

import numpy as np
import pytest

from prepare import bits_per_byte, make_encoding, row_totals, token_byte_lengths, train_tokenizer

TEXT = "naïve café 日本語のテキスト 🙂🙃👩‍👩‍👧 plain words 12345 " * 30


@pytest.fixture(scope="module")
def encoding():
    return make_encoding(train_tokenizer([TEXT], 300))  # so few merges that characters split across tokens


def test_uniform_logits_give_log2_vocab_times_tokens_over_bytes(encoding):
    tokens = np.array(encoding.encode_ordinary(TEXT))
    lengths = token_byte_lengths(encoding)
    nats = np.full((1, len(tokens)), math.log(encoding.n_vocab), np.float32)
    bpb, _ = bits_per_byte(*row_totals(nats, tokens[None], lengths))
    assert bpb == pytest.approx(math.log2(encoding.n_vocab) * len(tokens) / len(TEXT.encode()), rel=1e-7)


def test_characters_split_across_tokens_count_their_raw_bytes(encoding):
    lengths = token_byte_lengths(encoding)
    for text in ("🙂", "語", "é", TEXT):
        tokens = encoding.encode_ordinary(text)
        assert lengths[tokens].sum() == len(text.encode())
    assert len(encoding.encode_ordinary("🦄")) > 1  # never seen: it is in pieces, none of which is UTF-8


def test_against_brute_force_and_tokens_without_bytes_do_not_count():
    rng = np.random.default_rng(0)
    lengths = np.array([0, 1, 2, 3, 7], np.int32)
    targets = rng.integers(0, 5, (13, 17))
    nats = rng.gamma(2.0, size=(13, 17)).astype(np.float32)
    total_nats = total_bytes = 0.0
    for row in range(13):
        for t in range(17):
            if lengths[targets[row, t]] > 0:
                total_nats += float(nats[row, t])
                total_bytes += int(lengths[targets[row, t]])
    bpb, _ = bits_per_byte(*row_totals(nats, targets, lengths))
    assert bpb == pytest.approx(total_nats / total_bytes / math.log(2), rel=1e-12)
    parts = [row_totals(nats[i : i + 4], targets[i : i + 4], lengths) for i in range(0, 13, 4)]
    in_parts, _ = bits_per_byte(*(np.concatenate(sums) for sums in zip(*parts, strict=True)))
    assert in_parts == pytest.approx(bpb, rel=1e-12)


def test_standard_error_is_that_of_many_draws():
    """The stated error against the spread of the estimate over fresh samples of rows."""
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
