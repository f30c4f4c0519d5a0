"""prepare.py: packing, tokenizer, tracks, the cache, and what it says when something is wrong."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from prepare import PACK_BUFFER, PACK_REFILL, Corpus, UserError, load_tracks, pack_rows

BOS = 9999
ROOT = prepare.ROOT


def documents(lengths):
    """Documents whose tokens are all different: 0, 1, 2 ... over all of them."""
    out, at = [], 0
    for n in lengths:
        out.append(np.arange(at, at + n).astype(np.uint16))
        at += n
    return out


def batched(docs):
    return [docs[i : i + PACK_REFILL] for i in range(0, len(docs), PACK_REFILL)]


def crop_reference(docs, capacity):
    """The original's rule, read off its description: a list, searched from the front each time."""
    stream, buffer, rows = iter(batched(docs)), [], []
    row, exhausted = [], False
    while True:
        while len(buffer) < PACK_BUFFER and not exhausted:
            batch = next(stream, None)
            exhausted = batch is None
            buffer += [[BOS, *map(int, d)] for d in batch or []]
        if not buffer:
            return rows
        gap = capacity - len(row)
        fitting = [d for d in buffer if len(d) <= gap]
        if fitting:
            best = max(fitting, key=len)  # max and min return the first of equals
        else:
            best = min(buffer, key=len)
        for i, d in enumerate(buffer):
            if d is best:
                del buffer[i]
                break
        row += best[:gap]
        if len(row) == capacity:
            rows.append(row)
            row = []


lengths = st.lists(st.integers(1, 90), min_size=1, max_size=300)


@given(lengths, st.integers(2, 64))
@settings(max_examples=150, deadline=None)
def test_split_rows_are_full_and_lose_nothing(sizes, capacity):
    docs = documents(sizes)
    rows = list(pack_rows(batched(docs), capacity, BOS, "split"))
    assert all(len(row) == capacity and row[0] == BOS for row in rows)
    seen = np.concatenate(rows)
    seen = seen[seen != BOS]
    assert Counter(seen.tolist()) == Counter(np.concatenate(docs).tolist())  # each token once
    at = {int(token): i for i, token in enumerate(np.concatenate([row for row in rows])) if token != BOS}
    for doc in docs:  # within a row, a document's tokens stay in order and together with its BOS
        for row in rows:
            part = [int(t) for t in row if t in set(doc.tolist())]
            assert part == sorted(part)
    assert len(at) == sum(sizes)


@given(lengths, st.integers(2, 64))
@settings(max_examples=150, deadline=None)
def test_crop_equals_the_originals_rule(sizes, capacity):
    docs = documents(sizes)
    assert [row.tolist() for row in pack_rows(batched(docs), capacity, BOS, "crop")] == crop_reference(docs, capacity)


def test_crop_equals_the_originals_rule_when_the_buffer_refills():
    docs = documents(np.random.default_rng(0).integers(1, 40, size=2500) % 23 + 1)
    assert [row.tolist() for row in pack_rows(batched(docs), 33, BOS, "crop")] == crop_reference(docs, 33)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Write a configuration of one track, with a cache of its own: config(files="*.txt", ...)."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AUTORESEARCH_CONFIG", str(tmp_path / "platforms.yaml"))
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "hub"))

    def write(**settings):
        track = {"vocab_size": 300, "seq_len": 32, "val_tokens": 640, **settings}
        (tmp_path / "platforms.yaml").write_text(json.dumps({"tracks": {"mine": track}}, indent=1))
        return load_tracks()["mine"]
    return write


def words(seed, n=400):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(["alpha", "beta", "gamma", "delta", "naïve", "日本語", "🙂", "x1", "42"], size=n).tolist())


def write_corpus(folder, kind="txt", count=40):
    folder.mkdir(exist_ok=True)
    texts = [f"document {i} {words(i)}" for i in range(count)]
    if kind == "jsonl":
        (folder / "all.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": texts}), folder / "all.parquet", row_group_size=16)
    else:
        for i, text in enumerate(texts):
            (folder / f"{i:03}.{kind}").write_text(text)
    return texts


@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "parquet"])
def test_own_files(config, tmp_path, kind):
    texts = write_corpus(tmp_path / "docs", kind)
    prepared = prepare.prepare(config(files=f"docs/*.{kind}"))
    encoding, found = prepared.encoding(), Counter()
    for split in ("train", "val", "sealed"):
        rows = prepared.rows(split)
        assert (rows[:, 0] == prepared.bos).all() and rows.shape[1] == 33
        for i in range(len(texts)):
            if f"document {i} " in "".join(encoding.decode([int(t) for t in row if t != prepared.bos]) for row in rows):
                found[split] += 1
    assert all(found[split] for split in ("train", "val", "sealed"))
    assert prepared.vocab_size == 300 and (prepared.token_bytes()[-4:] == 0).all()


def test_splits_share_no_document_and_copies_are_dropped(config, tmp_path):
    texts = write_corpus(tmp_path / "docs")
    for i, text in enumerate(texts[:10]):
        (tmp_path / "docs" / f"copy{i}.txt").write_text(text)
    corpus = Corpus(config(files="docs/*.txt"))
    splits = {split: list(corpus.documents(split)) for split in ("train", "val", "sealed")}
    everything = [t for docs in splits.values() for t in docs]
    assert sorted(everything) == sorted(texts)


def test_result_does_not_depend_on_the_number_of_threads(config, tmp_path, monkeypatch):
    write_corpus(tmp_path / "docs")
    track = config(files="docs/*.txt")
    fingerprints = set()
    for threads in (1, 2, 5):
        monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / f"cache{threads}"))
        fingerprints.add(prepare.prepare(track, threads=threads).fingerprint)
    assert len(fingerprints) == 1


def test_token_bytes_are_raw_bytes_and_text_survives(config, tmp_path):
    write_corpus(tmp_path / "docs")
    prepared = prepare.prepare(config(files="docs/*.txt"))
    encoding, lengths = prepared.encoding(), prepared.token_bytes()
    for text in (words(77), "🙂🙃 日本語テキスト naïve café", "<|reserved_0|> is text here", "\t\n  12345"):
        tokens = encoding.encode_ordinary(text)
        assert encoding.decode(tokens) == text
        assert int(lengths[tokens].sum()) == len(text.encode())


def test_a_changed_or_cut_cache_is_noticed(config, tmp_path):
    write_corpus(tmp_path / "docs")
    track = config(files="docs/*.txt")
    prepared = prepare.prepare(track)
    path = prepared.path / "val.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert prepared.current_fingerprint() != prepared.fingerprint
    path.write_bytes(data[:-2])
    with pytest.raises(UserError, match="damaged.*--force"):
        prepare.prepare(track)
    assert prepare.prepare(track, force=True).current_fingerprint() == prepared.fingerprint
    (prepared.path / "meta.json").write_text("{")
    with pytest.raises(UserError, match="damaged.*--force"):
        prepare.prepare(track)


@pytest.mark.parametrize("settings, line, says", [
    ({"vocab_size": 70000}, 4, "65535"),
    ({"flies": "x"}, 7, "unknown key 'flies'"),
    ({"seq_len": "long"}, 5, "should be int"),
    ({"files": "nothing/*.txt"}, 7, "matches"),
    ({"pack": "tight"}, 7, "split or crop"),
    ({}, 3, "exactly one of packages, files and hub"),
])
def test_configuration_errors_name_the_line(config, tmp_path, settings, line, says):
    (tmp_path / "a.txt").write_text("text")
    if settings and "flies" not in settings and "files" not in settings:
        settings = {**settings, "files": "a.txt"}
    with pytest.raises(UserError) as error:
        config(**settings)
    assert says in str(error.value) and error.value.code == 2
    assert f"platforms.yaml:{line}:" in str(error.value)


@pytest.mark.parametrize("setup, settings, says", [
    (lambda d: [(d / "a.txt").write_text("short")], {}, "too little"),
    (lambda d: [(d / "a.txt").write_text(words(1, 9000))], {}, "too few"),
    (lambda d: write_corpus(d), {"vocab_size": 60000}, "lower vocab_size"),
])
def test_unusable_corpora_leave_nothing_behind(config, tmp_path, setup, settings, says):
    (tmp_path / "docs").mkdir()
    setup(tmp_path / "docs")
    with pytest.raises(UserError, match=says):
        prepare.prepare(config(files="docs/*.txt", **settings))
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_missing_text_column(config, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "hello"}) + "\n")
    with pytest.raises(UserError, match="no column 'text' .it has body.*text_column"):
        prepare.prepare(config(files="a.jsonl"))


def test_full_disk(config, tmp_path, monkeypatch):
    write_corpus(tmp_path / "docs")
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: prepare.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(UserError, match="AUTORESEARCH_CACHE"):
        prepare.prepare(config(files="docs/*.txt"))


def test_two_at_once_and_the_second_call_is_quick(config, tmp_path):
    write_corpus(tmp_path / "docs", count=200)
    config(files="docs/*.txt")
    command = [sys.executable, "prepare.py", "--track", "mine"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0] and outputs[0][0] == outputs[1][0]
    assert sum("training tokens" in err for _, err in outputs) == 1  # one of them built it
    done = subprocess.run([*command, "--track", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown track 'nothing'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_interrupt_leaves_nothing_half_made(config, tmp_path):
    (tmp_path / "docs").mkdir()
    for i in range(60):
        (tmp_path / "docs" / f"{i}.txt").write_text(words(i, 40000))
    config(files="docs/*.txt", vocab_size=2000)
    process = subprocess.Popen([sys.executable, "prepare.py", "--track", "mine"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert "tokenizer" in process.stderr.readline()  # it is at work
    process.send_signal(2)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_pysource_is_pinned(monkeypatch, tmp_path):
    """The embedded corpus holds no module that a build generates, and at least 30 MB."""
    monkeypatch.delenv("AUTORESEARCH_CONFIG", raising=False)
    track = load_tracks()["pysource"]
    files = prepare.list_package_files(track)
    assert sum(path.stat().st_size for _, path in files) > 30e6
    assert not [name for name, _ in files if name.endswith(("_version.py", "__config__.py"))]
    assert track.fingerprint
