"""prepare.py: packing, tokenizer, tracks, the cache, and what it says when something is wrong."""

import errno
import json
import os
import random
import re
import shutil
import string
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from prepare import PACK_BUFFER, PACK_REFILL, Corpus, Track, UserError, load_tracks, pack_rows

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
    stream = iter(batched(docs))
    exhausted = False
    buffer = []
    rows = []
    row = []
    while True:
        while len(buffer) < PACK_BUFFER and not exhausted:
            batch = next(stream, None)
            exhausted = batch is None
            buffer += [[BOS, *map(int, d)] for d in batch or []]
        if not buffer:
            return rows
        gap = capacity - len(row)
        fitting = [d for d in buffer if len(d) <= gap]
        # max and min return the first of equals.
        best = max(fitting, key=len) if fitting else min(buffer, key=len)
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
    packed = list(pack_rows(batched(docs), capacity, BOS, "split"))
    rows = [row.tokens for row in packed]
    assert all(len(row) == capacity and row[0] == BOS for row in rows)
    owner = {int(token): number for number, doc in enumerate(docs) for token in doc}
    for row, named in packed:  # each BOS names the document that follows it
        opened = np.cumsum(row == BOS) - 1
        assert len(named) == opened[-1] + 1
        assert all(named[piece] == owner[int(t)] for piece, t in zip(opened, row, strict=True) if t != BOS)
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
    assert [row.tokens.tolist() for row in pack_rows(batched(docs), capacity, BOS, "crop")] == crop_reference(
        docs, capacity
    )


def test_crop_equals_the_originals_rule_when_the_buffer_refills():
    docs = documents(np.random.default_rng(0).integers(1, 40, size=2500) % 23 + 1)
    assert [row.tokens.tolist() for row in pack_rows(batched(docs), 33, BOS, "crop")] == crop_reference(
        docs, 33
    )


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


WORDS = ["alpha", "beta", "gamma", "delta", "naïve", "日本語", "🙂", "x1", "42"]


def words(seed, n=400):
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=n).tolist())


def leftovers(cache):
    """Names of what lies in the cache, apart from locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


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
    prepared = prepare.prepare_track(config(files=f"docs/*.{kind}"))
    encoding = prepared.encoding()
    for split in ("train", "val", "sealed"):
        rows = prepared.rows(split)
        assert (rows[:, 0] == prepared.bos).all() and rows.shape[1] == 33
        text = "".join(encoding.decode([int(t) for t in row if t != prepared.bos]) for row in rows)
        assert any(f"document {i} " in text for i in range(len(texts)))
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
        fingerprints.add(prepare.prepare_track(track, threads=threads).fingerprint)
    assert len(fingerprints) == 1


def test_token_bytes_are_raw_bytes_and_text_survives(config, tmp_path):
    write_corpus(tmp_path / "docs")
    prepared = prepare.prepare_track(config(files="docs/*.txt"))
    encoding, lengths = prepared.encoding(), prepared.token_bytes()
    for text in (words(77), "🙂🙃 日本語テキスト naïve café", "<|reserved_0|> is text here", "\t\n  12345"):
        tokens = encoding.encode_ordinary(text)
        assert encoding.decode(tokens) == text
        assert int(lengths[tokens].sum()) == len(text.encode())


def test_a_changed_or_cut_cache_is_noticed(config, tmp_path):
    write_corpus(tmp_path / "docs")
    track = config(files="docs/*.txt")
    prepared = prepare.prepare_track(track)
    path = prepared.path / "val.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert prepared.current_fingerprint() != prepared.fingerprint
    path.write_bytes(data[:-2])
    with pytest.raises(UserError, match="damaged.*--force"):
        prepare.prepare_track(track)
    assert prepare.prepare_track(track, force=True).current_fingerprint() == prepared.fingerprint


def truncate(name):
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - 1)


def write_meta(data):
    return lambda path: (path / "meta.json").write_bytes(data)


def edit_meta(**changes):
    def edit(path):
        meta = json.loads((path / "meta.json").read_text())
        meta = {key: value for key, value in {**meta, **changes}.items() if value is not None}
        (path / "meta.json").write_text(json.dumps(meta))

    return edit


DAMAGE = {
    **{f"{name} is cut": truncate(name) for name in (*prepare.DATA_FILES, "meta.json")},
    **{f"{name} is gone": (lambda path, name=name: (path / name).unlink()) for name in prepare.DATA_FILES},
    "meta.json is gone": lambda path: (path / "meta.json").unlink(),
    "meta.json is empty": write_meta(b""),
    "meta.json is a list": write_meta(b"[]"),
    "meta.json has no keys": write_meta(b"{}"),
    "meta.json is not UTF-8": write_meta(b"\xff\xfe"),
    "sizes are missing": edit_meta(sizes=None),
    "sizes are empty": edit_meta(sizes={}),
    "sizes are a number": edit_meta(sizes=7),
    "the vocabulary is text": edit_meta(vocab_size="many"),
}


def test_damaged_data_is_an_error_that_names_the_remedy(config, tmp_path):
    write_corpus(tmp_path / "docs")
    track = config(files="docs/*.txt")
    path = prepare.prepare_track(track).path
    whole = tmp_path / "whole"
    shutil.copytree(path, whole)
    for what, damage in DAMAGE.items():
        damage(path)
        with pytest.raises(UserError) as error:
            prepare.prepare_track(track)
        message = str(error.value)
        assert "damaged" in message and "--track mine --force" in message and "\n" not in message, what
        assert what.split()[0] not in prepare.DATA_FILES or what.split()[0] in message
        shutil.rmtree(path)
        shutil.copytree(whole, path)
    prepare.prepare_track(track)


@pytest.mark.parametrize(
    "settings, line, says",
    [
        ({"vocab_size": 70000}, 4, "65535"),
        ({"flies": "x"}, 7, "unknown key 'flies'"),
        ({"seq_len": "long"}, 5, "should be int"),
        ({"files": "nothing/*.txt"}, 7, "matches"),
        ({"pack": "tight"}, 7, "split or crop"),
        ({"files": "a**b.txt"}, 7, "is not a pattern of file names"),
        ({"files": "~no-such-user/*.txt"}, 7, "is not a pattern of file names"),
        ({"packages": ["mpmath", 5]}, 9, "'packages.1' should be str, not 5"),
        ({}, 3, "exactly one of packages, files and hub"),
    ],
)
def test_configuration_errors_name_the_line(config, tmp_path, settings, line, says):
    (tmp_path / "a.txt").write_text("text")
    if settings and not settings.keys() & {"flies", "files", "packages"}:
        settings = {**settings, "files": "a.txt"}
    with pytest.raises(UserError) as error:
        config(**settings)
    assert says in str(error.value) and error.value.code == 2
    assert f"platforms.yaml:{line}:" in str(error.value)


@dataclass(frozen=True)
class Sizes:
    layers: int
    window: str
    __pydantic_config__ = prepare.STRICT


@dataclass(frozen=True)
class Machine:
    name: str
    sizes: Sizes
    memory: float = 0.0
    auto: bool = True
    labels: list[str] = field(default_factory=list)
    __pydantic_config__ = prepare.STRICT


GOOD = """machines:
  one:
    sizes: {layers: 2, window: SL}
    memory: 40
  two:
    sizes:
      layers: 3
      window: L
    auto: false
    labels:
      - a
      - b
"""


def read_machines(path, text, **options):
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    path.write_bytes(data)
    return prepare.read_entries(path, "machines", Machine, lambda machine: None, **options)


def test_entries_are_dataclasses_and_nested_ones_too(tmp_path):
    machines = read_machines(tmp_path / "m.yaml", GOOD)
    assert machines == {
        "one": Machine("one", Sizes(2, "SL"), memory=40.0),
        "two": Machine("two", Sizes(3, "L"), auto=False, labels=["a", "b"]),
    }
    shared = "base: &base {sizes: &s {layers: 1, window: L}, memory: 5}\n"
    merged = read_machines(
        tmp_path / "m.yaml", shared + "machines: {7: {<<: *base, memory: 6}, b: {sizes: *s}}"
    )
    assert merged == {"7": Machine("7", Sizes(1, "L"), 6.0), "b": Machine("b", Sizes(1, "L"))}


@pytest.mark.parametrize(
    "old, new, line, says",
    [
        ("memory: 40", "memroy: 40", 4, "unknown key 'memroy' (known: auto, labels, memory, sizes)"),
        ("memory: 40", "name: 40", 4, "machine 'one': unknown key 'name'"),
        ("memory: 40", "4: 40", 4, "machine 'one': unknown key '4'"),
        ("memory: 40", "memory: '40'", 4, "machine 'one': 'memory' should be float, not '40'"),
        ("memory: 40", "memory: true", 4, "machine 'one': 'memory' should be float, not True"),
        ("memory: 40", "memory: .nan", 4, "machine 'one': 'memory' should be a finite number, not nan"),
        ("memory: 40", "memory: -.inf", 4, "machine 'one': 'memory' should be a finite number, not -inf"),
        ("memory: 40", "memory: 2024-01-01", 4, "timestamp"),
        ("memory: 40", "memory: 2024-13-41", 4, "timestamp"),
        ("memory: 40", "memory: 40\n    memory: 41", 5, "'memory' stands twice"),
        ("memory: 40", "? [memory]\n    : 40", 4, "a key must be text"),
        ("memory: 40", "memory: !!int x", 4, "'x' is no int"),
        ("memory: 40", "memory: !!int ''", 4, "'' is no int"),
        ("memory: 40", "memory: !!bool x", 4, "'x' is no bool"),
        ("memory: 40", "memory: !!python/name:os.system", 4, "python/name:os.system"),
        ("memory: 40", "memory: !!set {a}", 4, "type set"),
        ("memory: 40", "memory: =", 4, "not a plain value"),
        ("memory: 40", "memory: " + "9" * 5000, 4, "is no int"),
        ("memory: 40", "memory: 0x" + "f" * 5000, 4, "is no int"),
        ("memory: 40", "<<: 5", 4, "merging"),
        ("memory: 40", "memory: *unknown", 4, "undefined alias"),
        ("memory: 40", "memory: [40", 5, "not valid YAML"),
        ("memory: 40", "\tmemory: 40", 4, "not valid YAML"),
        ("memory: 40", "memory: 4\0", 4, "not valid YAML"),
        ("memory: 40", "memory: 4\udcff", 4, "not UTF-8"),
        ("memory: 40", "labels: " + "[" * 500, 4, "nested too deeply"),
        ("memory: 40", "labels: " + "[" * 50 + "]" * 50, 4, "machine 'one': 'labels.0' should be str"),
        ("window: SL", 'window: "\\ud800"', 3, "is no str"),
        ("{layers: 2, window: SL}", "5", 3, "machine 'one': 'sizes' should be a mapping, not 5"),
        ("{layers: 2, window: SL}", "{layers: yes, window: SL}", 3, "'sizes.layers' should be int, not True"),
        ("      layers: 3", "      layers: 3.0", 7, "machine 'two': 'sizes.layers' should be int, not 3.0"),
        ("      window: L", "      windows: L", 8, "unknown key 'windows' in sizes (known: layers, window)"),
        ("      window: L\n", "", 6, "machine 'two': missing sizes.window"),
        ("      - b", "      - 5", 12, "machine 'two': 'labels.1' should be str, not 5"),
        ("    sizes: {layers: 2, window: SL}\n", "", 2, "machine 'one': missing sizes"),
        ("    sizes: {layers: 2, window: SL}\n    memory: 40\n", "", 2, "machine 'one' has no settings"),
        (GOOD, "machines: {}", 1, "section 'machines' is missing or empty"),
        (GOOD, "a: 1\nmachines: 5", 2, "section 'machines' is missing or empty"),
        (GOOD, "a: 1", 1, "section 'machines' is missing or empty"),
        (GOOD, "", 1, "expected the sections"),
        (GOOD, "- a list", 1, "expected the sections"),
        (GOOD, "a: 1\n---\nb: 2", 2, "not valid YAML"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_an_error_that_names_the_line(tmp_path, old, new, line, says):
    with pytest.raises(UserError) as error:
        read_machines(tmp_path / "m.yaml", GOOD.replace(old, new, 1))
    assert f"m.yaml:{line}: " in str(error.value) and says in str(error.value)
    assert error.value.code == 2 and len(str(error.value)) < 300


def test_aliases_that_expand_without_bound(tmp_path):
    lists = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 12))
    merges = "".join(f"x{i}: &x{i} {{<<: [{', '.join([f'*x{i - 1}'] * 10)}]}}\n" for i in range(1, 12))
    for bomb in ("x0: &x0 [a]\n" + lists, "x0: &x0 {a: 1}\n" + merges, "x: &x [*x]\n", "x: &x {y: *x}\n"):
        with pytest.raises(UserError, match=r"m.yaml:\d+: .*aliases expanded"):
            read_machines(tmp_path / "m.yaml", GOOD + bomb)


def test_keys_of_older_files_are_upgraded(tmp_path):
    def upgrade(values):
        return {("memory" if key == "ram" else key): value for key, value in values.items()}

    older = GOOD.replace("memory", "ram")
    path = tmp_path / "m.yaml"
    assert read_machines(path, older, upgrade=upgrade) == read_machines(path, GOOD)
    with pytest.raises(UserError, match=r"m.yaml:2: machine 'one': 'memory' should be float"):
        read_machines(path, older.replace("40", "much"), upgrade=upgrade)


# What a slip or a torn file may put anywhere.
SCRAPS = [
    *":-?#'\"|>[]{},&*!%@`~=\t\0\x85\udcff", "- ", ": ", "? ", "<<: ", "*a ", "&a ", "\n", "\n  ", "---\n",
    "...\n", "yes", "null", ".nan", "-.inf", "1e999", "0x", "9" * 5000, "2024-01-01", "!!int ", "!!set ",
    "!!binary ",
]  # fmt: skip


def test_no_mutation_of_the_real_file_ends_in_a_traceback(tmp_path, monkeypatch):
    from backends.platforms import load_platforms

    path = tmp_path / "platforms.yaml"
    monkeypatch.setenv("AUTORESEARCH_CONFIG", str(path))
    text = (ROOT / "platforms.yaml").read_text()
    text = re.sub(r"(?m)^ *#.*\n", "", text[: text.index("\n  h100-pcie:")])  # the tracks and one platform
    rng = random.Random(0)
    outcomes = Counter()
    for _ in range(250):
        mutant = text
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(mutant))
            end = start + rng.choice([0, 0, 1, 5, 30])
            mutant = mutant[:start] + rng.choice(["", *SCRAPS]) + mutant[end:]
        path.write_bytes(mutant.encode("utf-8", "surrogateescape"))
        try:
            load_platforms.__wrapped__(path)
            outcomes["valid"] += 1
        except UserError as error:
            assert re.search(r"platforms\.yaml:\d+: ", str(error)) and error.code == 2, mutant
            outcomes["refused"] += 1
    assert outcomes["valid"] > 10 and outcomes["refused"] > 100, outcomes


@pytest.mark.parametrize(
    "setup, settings, says",
    [
        (lambda d: [(d / "a.txt").write_text("short")], {}, "too little"),
        (lambda d: [(d / "a.txt").write_text(words(1, 9000))], {}, "too few"),
        (lambda d: write_corpus(d), {"vocab_size": 60000}, "lower vocab_size"),
    ],
)
def test_unusable_corpora_leave_nothing_behind(config, tmp_path, setup, settings, says):
    (tmp_path / "docs").mkdir()
    setup(tmp_path / "docs")
    with pytest.raises(UserError, match=says):
        prepare.prepare_track(config(files="docs/*.txt", **settings))
    assert leftovers(tmp_path / "cache") == []


def test_missing_text_column(config, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "hello"}) + "\n")
    with pytest.raises(UserError, match="no column 'text' .it has body.*text_column"):
        prepare.prepare_track(config(files="a.jsonl"))


def test_full_disk(config, tmp_path, monkeypatch):
    write_corpus(tmp_path / "docs")
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: prepare.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(UserError, match="AUTORESEARCH_CACHE"):
        prepare.prepare_track(config(files="docs/*.txt"))


@pytest.mark.parametrize(
    "number, says", [(errno.ENOSPC, "no space left.*AUTORESEARCH_CACHE"), (errno.EIO, "cannot prepare mine")]
)
def test_a_disk_that_fails_while_rows_are_written(config, tmp_path, monkeypatch, number, says):
    write_corpus(tmp_path / "docs")

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(prepare.os, "fsync", fail)
    with pytest.raises(UserError, match=says):
        prepare.prepare_track(config(files="docs/*.txt"))
    assert leftovers(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written(config, tmp_path):
    write_corpus(tmp_path / "docs")
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(UserError, match="cannot write .*cache: .*AUTORESEARCH_CACHE"):
        prepare.prepare_track(config(files="docs/*.txt"))


def test_two_at_once_and_the_second_call_is_quick(config, tmp_path):
    write_corpus(tmp_path / "docs", count=200)
    config(files="docs/*.txt")
    command = [sys.executable, "prepare.py", "--track", "mine"]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0] and outputs[0][0] == outputs[1][0]
    assert sum("training tokens" in err for _, err in outputs) == 1  # one of them built it
    done = subprocess.run([*command, "--track", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown track 'nothing'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_interrupt_leaves_nothing_half_made(config, tmp_path):
    (tmp_path / "docs").mkdir()
    for i in range(60):
        (tmp_path / "docs" / f"{i}.txt").write_text(words(i, 40000))
    config(files="docs/*.txt", vocab_size=2000)
    process = subprocess.Popen(
        [sys.executable, "prepare.py", "--track", "mine"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert "tokenizer" in process.stderr.readline()  # it is at work
    process.send_signal(2)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("interrupted", ["train_tokenizer", "write_rows", "file_digest", "fingerprint_of"])
def test_an_interrupt_keeps_the_old_data(config, tmp_path, monkeypatch, interrupted):
    write_corpus(tmp_path / "docs")
    track = config(files="docs/*.txt")
    old = prepare.prepare_track(track)
    left_by_a_killed_process = old.path.with_name(old.path.name + ".tmp")
    left_by_a_killed_process.mkdir()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, interrupted, interrupt)
        prepare.prepare_track(track, force=True)
    assert leftovers(tmp_path / "cache") == [old.path.name]
    assert prepare.prepare_track(track).current_fingerprint() == old.fingerprint


def test_the_lock_is_free_after_preparing(config, tmp_path):
    from filelock import FileLock

    write_corpus(tmp_path / "docs")
    prepared = prepare.prepare_track(config(files="docs/*.txt"))
    with FileLock(f"{prepared.path}.lock", timeout=0):
        pass


def test_pysource_is_pinned(monkeypatch, tmp_path):
    """The embedded corpus holds no module that a build generates, and at least 30 MB."""
    monkeypatch.delenv("AUTORESEARCH_CONFIG", raising=False)
    track = load_tracks()["pysource"]
    files = prepare.list_package_files(track)
    assert sum(path.stat().st_size for _, _, path in files) > 30e6
    assert not [name for _, name, _ in files if name.endswith(("_version.py", "__config__.py"))]
    assert track.fingerprint


def module(seed: int, lines: int = 60) -> list[str]:
    """Return the lines of a made-up module."""
    rng = random.Random(seed)

    def name() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=9))

    return [f"value_{name()} = compute(number_{name()})" for _ in range(lines)]


def joined(modules: dict[str, list[str]]) -> tuple[list[str], dict[str, bytes]]:
    """Return the texts of modules given as lines, and the key of each by its name."""
    texts = ["\n".join(lines) for lines in modules.values()]
    return texts, dict(zip(modules, map(prepare.document_key, texts), strict=True))


def test_near_copies_are_found_and_what_shares_little_is_none():
    original = module(1)
    edited = [*original[:40], *module(2, 20)]  # two thirds of it
    texts, keys = joined(
        {
            "original": original,
            "edited": edited,
            "of edited": [*edited[:31], *module(3, 29)],
            "little": [*original[:10], *module(4, 50)],
            "short": original[:10],
        }
    )
    together = {keys[name] for name in ("original", "edited", "of edited")}
    for ordered in (texts, texts[::-1], texts[1:] + texts[:1]):
        groups = prepare.near_copies(ordered)
        assert groups.keys() == together and len(set(groups.values())) == 1


def test_a_licence_makes_no_near_copies_and_hides_none():
    """It is longer than any module under it."""
    licence = module(5, 200)
    others = {f"other {n}": licence + module(10 + n) for n in range(prepare.MAX_LINE_MODULES)}
    copied = module(6)
    pair = {"one": licence + copied, "copy": licence + copied[:40] + module(7, 20)}
    texts, keys = joined(others | pair)
    assert prepare.near_copies(texts).keys() == {keys["one"], keys["copy"]}


def test_a_family_of_near_copies_is_found_up_to_a_size():
    """All but a few lines are in each of them, as in the readers of `datasets`."""
    common = module(8)
    family = {str(n): common + module(20 + n, 15) for n in range(prepare.MAX_LINE_MODULES)}
    texts, keys = joined(family)
    groups = prepare.near_copies(texts)
    assert groups.keys() == set(keys.values()) and len(set(groups.values())) == 1
    one_more, _ = joined({**family, "one more": common + module(99, 15)})
    assert prepare.near_copies(one_more) == {}


def split(sizes: dict[bytes, int], trained: set[bytes], groups: dict[bytes, bytes]) -> dict[bytes, str]:
    """Return the split of documents of a track whose val takes 200 bytes, and sealed too."""
    track = Track("t", vocab_size=512, seq_len=64, val_tokens=40)
    return prepare.split_by_hash(sizes, track, trained, groups)


def test_near_copies_are_on_one_side():
    sizes = {bytes([n]) * 16: 40 for n in range(100)}
    keys = sorted(sizes)
    groups = {keys[50]: b"\0", keys[99]: b"\0", keys[1]: b"\1", keys[20]: b"\1"}
    split_of = split(sizes, {keys[20]}, groups)
    assert split_of.keys() == sizes.keys()
    assert split_of[keys[50]] == split_of[keys[99]] == "val"
    assert split_of[keys[1]] == split_of[keys[20]] == "train"
    alone = split(sizes, {keys[20]}, {})
    assert alone[keys[1]] == "val" and alone[keys[99]] == "train"
    assert {alone[key] for key in keys} == {"train", "val", "sealed"}


def test_a_large_group_takes_the_place_of_no_split():
    """Ten documents that are all of val and sealed go to train together."""
    sizes = {bytes([n]) * 16: 40 for n in range(100)}
    keys = sorted(sizes)
    split_of = split(sizes, set(), dict.fromkeys(keys[:10], keys[0]))
    assert {split_of[key] for key in keys[:10]} == {"train"}
    assert [split_of[key] for key in keys[10:20]] == ["val"] * 5 + ["sealed"] * 5


def test_near_copies_are_in_val_no_more_often_than_others():
    rng = random.Random(1)
    sizes = {rng.randbytes(16): 1 for _ in range(3000)}
    keys = list(sizes)
    groups = {}
    for first in range(0, 1500, 3):
        groups |= dict.fromkeys(keys[first : first + 3], prepare.group_key(min(keys[first : first + 3])))
    held_out = [key for key, name in split(sizes, set(), groups).items() if name != "train"]
    assert len(held_out) == pytest.approx(400, abs=3)
    assert sum(key in groups for key in held_out) / len(held_out) == pytest.approx(0.5, abs=0.1)


def test_too_little_that_may_be_held_out_is_an_error():
    sizes = {bytes([n]) * 16: 40 for n in range(100)}
    keys = sorted(sizes)
    with pytest.raises(UserError, match=r"can be held out, and val_tokens 40 needs .* held_out"):
        split(sizes, set(keys[8:]), {})
    assert set(split(sizes, set(keys[10:]), {}).values()) == {"train", "val", "sealed"}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return a function that installs packages, {name: {module: lines}}, for importlib.metadata."""

    def install(modules: dict[str, dict[str, list[str]]]) -> None:
        monkeypatch.syspath_prepend(str(tmp_path))
        for package, texts in modules.items():
            (tmp_path / package).mkdir()
            for name, lines in texts.items():
                (tmp_path / package / name).write_text("\n".join(lines))
            info = tmp_path / f"{package}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
            (info / "RECORD").write_text("".join(f"{package}/{name},,\n" for name in texts))

    return install


@pytest.mark.parametrize("held_out", [["unread"], []])
def test_packages_become_three_splits_without_tables_and_near_copies_across(packages, held_out):
    table = [", ".join(f"{n * 0.37:.6f}" for n in range(row, row + 9)) for row in range(60)]
    family = [module(900) + module(901 + n, 20) for n in range(3)]
    packages(
        {
            "readable": {"copy.py": family[0], **{f"m{n}.py": module(n) for n in range(40)}},
            "unread": {
                "copy_1.py": family[1],
                "copy_2.py": family[2],
                "table.py": table,
                **{f"m{n}.py": module(100 + n) for n in range(40)},
            },
        }
    )
    track = Track(
        "t", 512, 64, val_tokens=8000, packages=["readable", "unread"], held_out=held_out
    )  # about ten modules each
    corpus = Corpus(track)
    splits = {name: list(corpus.documents(name)) for name in ("train", "val", "sealed")}
    documents = [text for texts in splits.values() for text in texts]
    assert len(documents) == len(set(documents)) == 83 and "\n".join(table) not in documents
    assert min(len(texts) for texts in splits.values()) > 5
    sides = {name for name, texts in splits.items() for lines in family if "\n".join(lines) in texts}
    assert len(sides) == 1
    if held_out:
        assert sides == {"train"}
        readable = {"\n".join(module(n)) for n in range(40)}
        assert readable <= set(splits["train"])


def test_a_table_of_numbers_is_no_text_of_a_package():
    assert prepare.is_table("[" + "0.267004, 0.004874, 0.329415,\n" * 50)
    assert not prepare.is_table((ROOT / "tests" / "test_prepare.py").read_text())
    assert not prepare.is_table("1234abcdefghijklmnop") and prepare.is_table("12345abcdefghijklmnop")
    assert not prepare.is_table("def f(x):\n    return x + 1\n")


def test_a_track_that_is_no_package_keeps_its_directory(monkeypatch):
    """Prepared data of earlier versions is found: what enters its name has not changed since RULES 2."""
    climbmix = prepare.Track(
        name="climbmix",
        vocab_size=8192,
        seq_len=2048,
        val_tokens=20971520,
        hub="karpathy/climbmix-400b-shuffle",
        data_files="shard_*.parquet",
        train_shards=10,
        val_shard=6542,
        pack="crop",
    )
    assert prepare.prepared_path(climbmix).name == "climbmix-6109ce6d9050"
    pysource = load_tracks()["pysource"]
    before = prepare.prepared_path(pysource)
    monkeypatch.setattr(prepare, "MAX_LINE_MODULES", 3)  # a rule for packages
    assert prepare.prepared_path(climbmix).name == "climbmix-6109ce6d9050"
    assert prepare.prepared_path(pysource) != before


def test_only_numpy_is_imported_at_once():
    heavy = ["datasets", "filelock", "huggingface_hub", "pydantic", "rustbpe", "tiktoken", "torch", "yaml"]
    code = f"import sys, prepare; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
