"""
Corpus -> tokenizer -> packed token rows, and the metric: bits per byte.

    python prepare.py --track pysource        # needs no network
    autoresearch prepare                      # the track of this machine's platform

No experiment changes this file. Everything below is shared by both trainers, so that every val_bpb on a
track is measured on the same rows, with the same tokenizer, by the same arithmetic. What is prepared lies
under ~/.cache/autoresearch (or $AUTORESEARCH_CACHE), in a directory named by the track and by what went
into it. numpy is the only import at the top: a training process reads a memory map and starts at once.
"""

import bisect
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatch
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------

RULES = 1                   # raised when the metric, the clock or the scoring changes: val_bpb of other rules never rank together
TIME_BUDGET = 300           # training time of an experiment in seconds (5 minutes)
MAX_VOCAB = 65535           # token ids are stored as uint16
PACK_BUFFER = 1000          # documents that best-fit packing chooses from (the original's figure)
PACK_REFILL = 128           # documents added to it at a time (likewise)
TOKENIZER_CHARS = 10**9     # the tokenizer is trained on this many characters of the training split at most ...
TOKENIZER_DOC_CHARS = 10**4  # ... and on this many of one document
VAL_BYTES_PER_TOKEN = 5     # text set aside for a validation token where the corpus names no validation shard

# GPT-4's split pattern (tiktoken cl100k_base) with digits in groups of one or two, as in nanochat: a small
# vocabulary does not want a thousand three-digit tokens.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]  # the first opens every document

ROOT = Path(__file__).resolve().parent
DATA_FILES = ("tokenizer.json", "token_bytes.npy", "train.bin", "val.bin", "sealed.bin")
# Modules that a package's build writes, different on each platform: never part of a corpus.
GENERATED_MODULES = ("*_version*.py", "*__config__.py", "*_generated*.py", "*_sysconfig*.py")


class UserError(Exception):
    """What is wrong and what to do about it, in one line. `code` is the exit status: 2 for usage, else 1."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


# ---------------------------------------------------------------------------
# Configuration: the tracks of platforms.yaml
# ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Track:
    """One learning problem. Exactly one of `packages`, `files` and `hub` says where its text comes from."""

    name: str
    vocab_size: int                 # tokens, the four reserved ones included
    seq_len: int                    # tokens the model sees; a row holds one more
    val_tokens: int                 # tokens scored
    packages: list = field(default_factory=list)  # installed distributions whose .py files are the corpus
    files: str = ""                 # glob below the repository, or absolute: txt, md, jsonl, parquet
    hub: str = ""                   # dataset on the Hugging Face hub, owner/name
    data_files: str = "*"           # glob of the dataset's files
    revision: str = "main"          # branch, tag or commit of the dataset
    text_column: str = "text"
    train_shards: int = 0           # files to train on, in name order; 0 takes all
    val_shard: int = -1             # index of the file that holds the validation text; -1: split by document
    pack: str = "split"             # what happens when no document fits: see pack_rows
    fingerprint: str = ""           # what prepared data must hash to for results to compare


def load_yaml(path):
    """Parse a YAML file. Returns (data, line) where line(*keys) is the 1-based line on which that key stands."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}", 2) from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(e, 'problem', e)}", 2) from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected the sections 'tracks' and 'platforms'", 2)

    def refuse_duplicates(mapping):
        seen = set()
        for key, value in mapping.value:
            if key.value in seen:
                raise UserError(f"{path}:{key.start_mark.line + 1}: '{key.value}' stands twice", 2)
            seen.add(key.value)
            if isinstance(value, yaml.MappingNode):
                refuse_duplicates(value)

    def line(*keys):
        at, found = node, 1
        for wanted in keys:
            for key, value in getattr(at, "value", []):
                if key.value == str(wanted):
                    at, found = value, key.start_mark.line + 1
                    break
        return found

    refuse_duplicates(node)
    return data, line


def read_entries(path, section, cls, check):
    """The entries of one section as {name: cls}; `check(entry)` returns (key, complaint) or None.

    Raises UserError naming file and line: unknown key, missing key, wrong type, or what `check` says.
    """
    data, line = load_yaml(path)
    entries, known = {}, {f.name: f for f in fields(cls) if f.name != "name"}
    if not isinstance(data.get(section), dict):
        raise UserError(f"{path}:{line(section)}: section '{section}' is missing or empty", 2)
    for name, values in data[section].items():
        at = lambda *keys: f"{path}:{line(section, name, *keys)}: {section[:-1]} '{name}'"
        if not isinstance(values, dict):
            raise UserError(f"{at()} has no settings", 2)
        for key, value in values.items():
            if key not in known:
                raise UserError(f"{at(key)}: unknown key '{key}' (known: {', '.join(sorted(known))})", 2)
            want = known[key].type
            want = (int, float) if want is float else want
            if not isinstance(value, want) or (isinstance(value, bool) and want is not bool):
                raise UserError(f"{at(key)}: '{key}' should be {known[key].type.__name__}, not {value!r}", 2)
        try:
            entry = cls(name=str(name), **values)
        except TypeError as e:
            missing = re.findall(r"'(\w+)'", str(e))
            raise UserError(f"{at()}: missing {', '.join(missing) or e}", 2) from None
        complaint = check(entry)
        if complaint:
            keys, says = complaint
            raise UserError(f"{at(*(keys if isinstance(keys, tuple) else (keys,)))}: {says}", 2)
        entries[str(name)] = entry
    return entries


def check_track(track):
    sources = [key for key in ("packages", "files", "hub") if getattr(track, key)]
    if len(sources) != 1:
        return "", "needs exactly one of packages, files and hub"
    if not 256 + len(SPECIAL_TOKENS) < track.vocab_size <= MAX_VOCAB:
        return "vocab_size", f"vocab_size must be 261 to {MAX_VOCAB} (token ids are stored in 16 bits)"
    if track.seq_len < 2 or track.val_tokens < track.seq_len:
        return "val_tokens", "val_tokens must be at least one row of seq_len tokens"
    if track.pack not in ("split", "crop"):
        return "pack", "pack must be split or crop"
    if track.files and not list_files(track):
        return "files", f"no .txt, .md, .jsonl or .parquet file matches {track.files!r}"
    return None


def load_tracks(path=None):
    """All tracks of platforms.yaml (or $AUTORESEARCH_CONFIG), validated: {name: Track}."""
    return read_entries(path or config_path(), "tracks", Track, check_track)


def load_track(name, path=None):
    """One track by name. Raises UserError (2) that lists the known ones."""
    tracks = load_tracks(path)
    if name not in tracks:
        raise UserError(f"unknown track '{name}': {config_path().name} has {', '.join(tracks)}", 2)
    return tracks[name]


def config_path():
    return Path(os.environ.get("AUTORESEARCH_CONFIG") or ROOT / "platforms.yaml")


def cache_dir():
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


# ---------------------------------------------------------------------------
# Corpus: where the documents come from
# ---------------------------------------------------------------------------

def list_files(track):
    """Files of a `files:` track, sorted by path."""
    base = config_path().parent
    pattern = Path(track.files).expanduser()
    if pattern.is_absolute():
        base, pattern = Path(pattern.anchor), pattern.relative_to(pattern.anchor)
    return sorted(p for p in base.glob(str(pattern)) if p.suffix in READERS and p.is_file())


def list_package_files(track):
    """The .py files of the installed packages, sorted by (package, path): [(label, path)]."""
    from importlib.metadata import PackageNotFoundError, distribution

    found = []
    for package in sorted(track.packages):
        try:
            dist = distribution(package)
        except PackageNotFoundError:
            raise UserError(f"track '{track.name}' reads package '{package}', which is not installed: uv sync") from None
        names = sorted(f.as_posix() for f in dist.files or [] if f.suffix == ".py" and ".." not in f.parts)
        found += [(name, Path(dist.locate_file(name))) for name in names
                  if not any(fnmatch(Path(name).name, skip) for skip in GENERATED_MODULES)]
    return found


def list_hub_files(track):
    """Names of the dataset's files that match, sorted. Needs the network."""
    from huggingface_hub import HfApi

    with hub_errors(track):
        names = HfApi().list_repo_files(track.hub, repo_type="dataset", revision=track.revision)
    names = sorted(n for n in names if fnmatch(n, track.data_files) and Path(n).suffix in READERS)
    if not names:
        raise UserError(f"track '{track.name}': {track.hub} has no txt, md, jsonl or parquet file matching {track.data_files!r}")
    return names


def download(track, name):
    """Fetch one file of the dataset into the hub's own cache; a cut download is resumed. Returns its path."""
    from huggingface_hub import hf_hub_download

    with hub_errors(track, name):
        return Path(hf_hub_download(track.hub, name, repo_type="dataset", revision=track.revision))


class hub_errors:
    """Turn what huggingface_hub raises into one line that says what to do."""

    def __init__(self, track, name=""):
        self.track, self.what = track, f"{track.hub}/{name}" if name else track.hub

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or not isinstance(error, Exception) or isinstance(error, UserError):
            return False
        from huggingface_hub import errors

        offline = "try --track pysource, which needs no network"
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            raise UserError(f"the hub has no file {self.what} (revision {self.track.revision})") from None
        if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
            raise UserError(f"the hub has no dataset {self.track.hub} at revision {self.track.revision}, or it needs a token (hf auth login)") from None
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(f"no space left while downloading {self.what}: free some, or set HF_HOME to a larger disk") from None
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot reach the hub for {self.what} ({reason}): run again to resume, or {offline}") from None


def read_plain(path, column):
    yield path.read_text(encoding="utf-8", errors="replace")


def read_table(path, column):
    """Rows of a parquet or jsonl file, streamed by `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    kind = "parquet" if path.suffix == ".parquet" else "json"
    try:
        rows = datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True)
        known = rows.column_names or list(next(iter(rows), {}))
        if column not in known:
            raise UserError(f"{path.name} has no column '{column}' (it has {', '.join(known) or 'none'}): set text_column in {config_path().name}")
        for batch in rows.select_columns([column]).iter(batch_size=PACK_REFILL):
            for text in batch[column]:
                if not isinstance(text, str):
                    if text is not None:
                        raise UserError(f"{path.name}: column '{column}' holds {type(text).__name__}, not text: set text_column in {config_path().name}")
                    continue
                yield text
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{path} cannot be read as {kind}: {str(e).strip().splitlines()[0][:200]}") from None


READERS = {".txt": read_plain, ".md": read_plain, ".jsonl": read_table, ".parquet": read_table}


class Corpus:
    """The documents of a track, in a fixed order, as often as they are asked for, split three ways.

    `split` is "train", "val" or "sealed". A document stands in one of them only: its copies are dropped.
    With a validation shard, val is its beginning and sealed what follows; otherwise the documents with the
    smallest hashes are val, the next sealed, so that the split does not move when the order of files does.
    """

    def __init__(self, track):
        self.track = track
        self.shared_shard = bool(track.hub) and track.val_shard >= 0
        if track.packages:
            self.paths = [path for _, path in list_package_files(track)]
        elif track.files:
            self.paths = list_files(track)
        else:
            names = list_hub_files(track)
            if track.val_shard >= len(names):
                raise UserError(f"track '{track.name}': val_shard {track.val_shard}, but {track.hub} has {len(names)} matching files", 2)
            train = [n for i, n in enumerate(names) if i != track.val_shard][: track.train_shards or None]
            wanted = train + ([names[track.val_shard]] if self.shared_shard else [])
            note(f"downloading {len(wanted)} of {len(names)} files of {track.hub}")
            self.paths = [download(track, name) for name in bar(wanted, "download", "file")]
        self.num_bytes = sum(p.stat().st_size for p in self.paths)
        if not self.shared_shard:
            self._split_by_hash()

    def _documents(self, paths):
        for path in paths:
            reader = READERS.get(path.suffix, read_plain)
            try:
                yield from (text for text in reader(path, self.track.text_column) if text)
            except OSError as e:
                raise UserError(f"{path} cannot be read: {e.strerror}") from None

    def _split_by_hash(self):
        sizes = {}
        for text in self._documents(self.paths):
            sizes.setdefault(document_key(text), len(text.encode("utf-8", "replace")))
        need, total = self.track.val_tokens * VAL_BYTES_PER_TOKEN, sum(sizes.values())
        if total < 3 * need:
            raise UserError(f"track '{self.track.name}': {total / 1e6:.1f} MB of text is too little for val_tokens {self.track.val_tokens:,}: "
                            f"it needs {3 * need / 1e6:.1f} MB; lower val_tokens or add text")
        self.where, filled = {}, 0
        for key in sorted(sizes):
            self.where[key] = "val" if filled < need else "sealed" if filled < 2 * need else "train"
            filled += sizes[key]
        if "train" not in self.where.values():
            raise UserError(f"track '{self.track.name}': {len(sizes)} documents are too few to split: use more and smaller files")
        self.num_bytes = total

    def documents(self, split):
        seen = set(self._held_out) if self.shared_shard and split == "train" else set()
        paths = self.paths if not self.shared_shard else self.paths[:-1] if split == "train" else self.paths[-1:]
        for text in self._documents(paths):
            key = document_key(text)
            if key not in seen and (self.shared_shard or self.where[key] == split):
                seen.add(key)
                yield text

    @cached_property
    def _held_out(self):
        """Keys of the validation shard's documents: none of them is trained on, should a training shard repeat it."""
        return {document_key(text) for text in self._documents(self.paths[-1:])}


def document_key(text):
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[:16]


# ---------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------

def train_tokenizer(texts, vocab_size):
    """Train byte-pair merges with rustbpe. Returns {"pattern": str, "ranks": [token bytes as hex]}."""
    import rustbpe

    def capped():
        left = TOKENIZER_CHARS
        for text in texts:
            yield text[:TOKENIZER_DOC_CHARS]
            left -= min(len(text), TOKENIZER_DOC_CHARS)
            if left <= 0:
                return

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(capped(), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = sorted(((rank, bytes(token)) for token, rank in tokenizer.get_mergeable_ranks()))
    return {"pattern": SPLIT_PATTERN, "ranks": [token.hex() for _, token in ranks]}


def make_encoding(data):
    """A tiktoken Encoding from saved data: ranks and pattern, never a pickle, so loading cannot run code."""
    import tiktoken

    ranks = {bytes.fromhex(token): rank for rank, token in enumerate(data["ranks"])}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("autoresearch", pat_str=data["pattern"], mergeable_ranks=ranks, special_tokens=special)


def token_byte_lengths(encoding):
    """int32 [vocab_size]: bytes of each token, 0 for the reserved ones.

    Raw bytes are counted: a token may be a piece of a UTF-8 character, which decoding would turn into U+FFFD.
    """
    lengths = np.zeros(encoding.n_vocab, dtype=np.int32)
    for token in range(encoding.n_vocab - len(SPECIAL_TOKENS)):
        lengths[token] = len(encoding.decode_single_token_bytes(token))
    return lengths


def encode_batches(encoding, texts, threads):
    """Encode on all cores, in order: lists of up to PACK_REFILL uint16 arrays (no BOS). tiktoken frees the GIL."""

    def encode(batch):
        # encode_to_numpy would look for special tokens in the text; the core call with none allowed does not.
        encode_one = encoding._core_bpe.encode_to_tiktoken_buffer
        return [np.frombuffer(encode_one(t.encode("utf-8", "replace").decode(), set()), np.uint32).astype(np.uint16) for t in batch]

    def grouped():
        batch = []
        for text in texts:
            batch.append(text)
            if len(batch) == PACK_REFILL:
                yield batch
                batch = []
        if batch:
            yield batch

    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for batch in grouped():
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * threads:  # bounds memory: a corpus may be larger than it
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# ---------------------------------------------------------------------------
# Packing: documents -> full rows of seq_len + 1 tokens
# ---------------------------------------------------------------------------

def pack_rows(batches, capacity, bos, rule):
    """Pack documents into rows of `capacity` tokens, best fit first. Yields uint16 [capacity] arrays.

    batches: iterable of lists of token arrays without BOS; every piece is written with a BOS before it.
    Each gap takes the longest buffered document that fits it, the earliest of equals. When none fits:
      rule "crop"   the shortest document fills the gap and its rest is dropped (the rule of the original
                    autoresearch); an unfinished last row is dropped.
      rule "split"  the longest document fills the gap and its rest returns to the buffer, so that nothing
                    is lost; a gap of one token takes a bare BOS, and so does the end of the last row.
    """
    ordered, tokens = [], {}  # ordered: (length with BOS, -arrival), ascending
    batches, arrivals, more = iter(batches), 0, True
    row, pos = np.empty(capacity, np.uint16), 0

    def put(document):
        nonlocal arrivals
        arrivals += 1
        tokens[arrivals] = document
        bisect.insort(ordered, (len(document) + 1, -arrivals))

    def take(index):
        return tokens.pop(-ordered.pop(index)[1])

    while True:
        while more and len(ordered) < PACK_BUFFER:
            batch = next(batches, None)
            more = batch is not None
            for document in batch or []:
                put(document)
        if not ordered:
            break
        gap = capacity - pos
        fits = bisect.bisect_right(ordered, (gap, 0)) - 1
        if fits >= 0:
            document = take(fits)
        elif rule == "crop":
            # The earliest of the shortest is the last of its length, since arrivals are negated.
            document = take(bisect.bisect_right(ordered, (ordered[0][0], 0)) - 1)[: gap - 1]
        elif gap == 1:
            document = row[:0]
        else:
            document = take(len(ordered) - 1)
            put(document[gap - 1 :])
            document = document[: gap - 1]
        row[pos] = bos
        row[pos + 1 : pos + 1 + len(document)] = document
        pos += 1 + len(document)
        if pos == capacity:
            yield row.copy()
            pos = 0
    if pos and rule == "split":
        row[pos:] = bos
        yield row.copy()


# ---------------------------------------------------------------------------
# Prepare: everything above, once, into a directory that appears when it is complete
# ---------------------------------------------------------------------------

def source_signature(track):
    """What the prepared directory depends on, without reading the corpus."""
    if track.packages:
        from importlib.metadata import PackageNotFoundError, version

        def version_of(package):
            try:
                return version(package)
            except PackageNotFoundError:
                return "missing"
        return {package: version_of(package) for package in sorted(track.packages)}
    if track.files:
        return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in list_files(track)]
    return [track.hub, track.revision]


def prepared_path(track):
    """Directory of the track's prepared data; it need not exist."""
    settings = {k: v for k, v in asdict(track).items() if k != "fingerprint"}
    key = json.dumps([settings, source_signature(track), SPLIT_PATTERN, PACK_BUFFER, PACK_REFILL], sort_keys=True)
    return cache_dir() / f"{track.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def prepare(track, force=False, threads=None):
    """Prepare the track unless it is prepared, and return it as Prepared. Raises UserError."""
    from filelock import FileLock, Timeout

    target = prepared_path(track)
    if target.exists() and not force:
        return Prepared(track)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            note(f"another process prepares {track.name}; waiting for it")
            lock.acquire()
    except OSError as e:
        raise UserError(f"cannot write {target.parent}: {e.strerror}; set AUTORESEARCH_CACHE to a directory you own") from None
    with lock:
        if target.exists() and not force:
            return Prepared(track)
        scratch = target.with_name(target.name + ".tmp")
        shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed: we hold the lock
        try:
            scratch.mkdir()
            build(track, scratch, threads or os.cpu_count() or 1)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(scratch, target)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            raise UserError(f"no space left in {target.parent}: free some, or set AUTORESEARCH_CACHE to a larger disk") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    prepared = Prepared(track)
    if track.fingerprint and prepared.fingerprint != track.fingerprint:
        note(f"warning: {track.name} has fingerprint {prepared.fingerprint}, not the pinned {track.fingerprint} (other package versions?): "
             "results do not compare with those of other machines")
    return prepared


def build(track, out, threads):
    """Write tokenizer, token_bytes, train, val and sealed rows and meta.json into the directory `out`."""
    began = time.time()
    corpus = Corpus(track)
    free = shutil.disk_usage(out).free
    if free < corpus.num_bytes + 2**26:
        raise UserError(f"preparing {track.name} needs {corpus.num_bytes / 1e9 + 0.07:.1f} GB in {out.parent}, {free / 1e9:.1f} GB are free: "
                        "free some, or set AUTORESEARCH_CACHE to a larger disk")

    note(f"tokenizer: training {track.vocab_size} tokens")
    data = train_tokenizer(bar(corpus.documents("train"), "tokenizer", "doc"), track.vocab_size)
    vocab_size = len(data["ranks"]) + len(SPECIAL_TOKENS)
    if vocab_size != track.vocab_size:
        raise UserError(f"track '{track.name}': the text yields {vocab_size} tokens, not {track.vocab_size}: lower vocab_size or add text")
    encoding = make_encoding(data)
    (out / "tokenizer.json").write_text(json.dumps(data))
    np.save(out / "token_bytes.npy", token_byte_lengths(encoding))
    bos = encoding.encode_single_token(SPECIAL_TOKENS[0])

    capacity, need = track.seq_len + 1, -(-track.val_tokens // track.seq_len)
    rows, text_bytes = {}, 0

    def write(split, texts, limit=None):
        """Pack texts into rows, `limit` at most. Returns how many documents the packer took."""
        count = taken = 0

        def counted_batches():
            nonlocal taken
            for batch in encode_batches(encoding, texts, threads):
                taken += len(batch)
                yield batch

        with open(out / f"{split}.bin", "wb") as f, bar(None, f"pack {split}", "row") as progress:
            for row in pack_rows(counted_batches(), capacity, bos, track.pack):
                f.write(row.tobytes())
                count += 1
                progress.update(1)
                if count == limit:
                    break
            f.flush()
            os.fsync(f.fileno())
        rows[split] = count
        return taken

    def counted(texts):
        nonlocal text_bytes
        for text in texts:
            text_bytes += len(text.encode("utf-8", "replace"))
            yield text

    if corpus.shared_shard:
        taken = write("val", corpus.documents("val"), need)
        write("sealed", islice(corpus.documents("val"), taken, None), need)
    else:
        write("val", corpus.documents("val"), need)
        write("sealed", corpus.documents("sealed"), need)
    for split in ("val", "sealed"):
        if rows[split] < (need if split == "val" else max(1, need // 4)):
            raise UserError(f"track '{track.name}': its held-out text fills {rows[split]} {split} rows of {need}: lower val_tokens or add text")
    write("train", counted(corpus.documents("train")))
    if not rows["train"]:
        raise UserError(f"track '{track.name}': no training text is left after the validation set: lower val_tokens or add text")

    digests = {name: file_digest(out / name) for name in DATA_FILES}
    meta = {
        "track": track.name, "seq_len": track.seq_len, "vocab_size": vocab_size, "bos": bos, "rows": rows,
        "sizes": {name: (out / name).stat().st_size for name in DATA_FILES}, "digests": digests,
        "fingerprint": fingerprint_of(digests), "train_text_bytes": text_bytes, "source": source_signature(track),
        "pack": track.pack, "prepared": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    (out / "meta.json").write_text(json.dumps(meta, indent=1))
    note(f"{track.name}: {rows['train'] * track.seq_len / 1e6:.1f}M training tokens, {rows['val'] * track.seq_len / 1e6:.2f}M val, "
         f"fingerprint {meta['fingerprint']}, {time.time() - began:.0f} s")


def file_digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint_of(digests):
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


class Prepared:
    """A track's prepared data, opened. Rows are read-only memory maps.

    name, seq_len, vocab_size, val_tokens, bos, fingerprint. Rows are opened when asked for: a trainer that
    opens the validation rows before its training ends is caught.
    """

    def __init__(self, track):
        self.path = prepared_path(track)
        again = f"rebuild it with: autoresearch prepare --track {track.name} --force"
        if not self.path.exists():
            raise UserError(f"track '{track.name}' is not prepared: autoresearch prepare --track {track.name}")
        try:
            self.meta = json.loads((self.path / "meta.json").read_text())
            sizes = {name: (self.path / name).stat().st_size for name in DATA_FILES}
        except (OSError, ValueError) as e:
            raise UserError(f"the prepared data in {self.path} is damaged ({e}): {again}") from None
        for name, size in sizes.items():
            if size != self.meta["sizes"][name]:
                raise UserError(f"the prepared data in {self.path} is damaged ({name} has {size} bytes, not {self.meta['sizes'][name]}): {again}")
        self.name, self.seq_len, self.val_tokens = track.name, track.seq_len, track.val_tokens
        self.vocab_size, self.bos, self.fingerprint = self.meta["vocab_size"], self.meta["bos"], self.meta["fingerprint"]
        self.num_train_rows = self.meta["rows"]["train"]

    def rows(self, split):
        """uint16 [rows, seq_len + 1] of "train", "val" or "sealed". Only `autoresearch verify` reads sealed."""
        return np.memmap(self.path / f"{split}.bin", np.uint16, "r").reshape(-1, self.seq_len + 1)

    def token_bytes(self):
        """int32 [vocab_size]: bytes of each token."""
        return np.load(self.path / "token_bytes.npy")

    def encoding(self):
        return make_encoding(json.loads((self.path / "tokenizer.json").read_text()))

    def current_fingerprint(self):
        """The fingerprint of what lies on disk now: differs from `fingerprint` when somebody changed it."""
        return fingerprint_of({name: file_digest(self.path / name) for name in DATA_FILES})


# ---------------------------------------------------------------------------
# The metric
# ---------------------------------------------------------------------------

def row_totals(nats, targets, token_bytes):
    """Sum a batch by row: (nats float64 [B], bytes int64 [B]).

    nats: float [B, T], cross-entropy of each target in nats. targets: int [B, T]. Tokens without bytes (BOS)
    are prompts, not text, and count in neither sum.
    """
    num_bytes = token_bytes[targets].astype(np.int64)
    counted = np.where(num_bytes > 0, np.asarray(nats, np.float64), 0.0)
    return counted.sum(axis=1), num_bytes.sum(axis=1)


def bits_per_byte(row_nats, row_bytes):
    """(bits per byte, its standard error) from per-row sums of any number of rows.

    The estimate is a ratio, sum of nats over ln 2 times the sum of bytes, so that the value does not depend
    on the vocabulary. Rows are the independent units: the error is that of a ratio of sums over them
    (Cochran, Sampling Techniques, 1977, section 6.4). NaN in one row makes the result NaN.
    """
    nats, num_bytes = np.asarray(row_nats, np.float64), np.asarray(row_bytes, np.float64)
    total, n = num_bytes.sum(), len(num_bytes)
    if total == 0:
        raise ValueError("no token with bytes was scored")
    ratio = nats.sum() / total
    variance = n / (n - 1) * np.square(nats - ratio * num_bytes).sum() / total**2 if n > 1 else math.nan
    return float(ratio / math.log(2)), float(math.sqrt(variance) / math.log(2))


# ---------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------

def note(message):
    print(message, file=sys.stderr, flush=True)


def bar(items, what, unit):
    """A tqdm bar on a terminal, nothing elsewhere: a log wants lines, not carriage returns."""
    from tqdm import tqdm

    return tqdm(items, desc=what, unit=unit, disable=None, leave=False, file=sys.stderr)


def main(arguments=None):
    import argparse

    parser = argparse.ArgumentParser(description="Prepare a track: tokenizer and packed rows.")
    parser.add_argument("--track", help="a track of platforms.yaml; the first one if left out")
    parser.add_argument("--force", action="store_true", help="prepare again although it is prepared")
    options = parser.parse_args(arguments)
    try:
        track = load_track(options.track) if options.track else next(iter(load_tracks().values()))
        print(prepare(track, force=options.force).path)
    except UserError as e:
        note(f"prepare: {e}")
        sys.exit(e.code)
    except KeyboardInterrupt:
        note("prepare: interrupted; downloads resume on the next run")
        sys.exit(130)


if __name__ == "__main__":
    main()
