"""
Corpus -> tokenizer -> packed token rows, and the metric: bits per byte.

    python prepare.py --track pysource        # needs no network
    autoresearch prepare                      # the track of this machine's platform

No experiment changes this file. Both trainers share it, so every val_bpb on a track is measured on the same
rows, with the same tokenizer, by the same arithmetic. Prepared data lies under ~/.cache/autoresearch (or
$AUTORESEARCH_CACHE), in a directory named for the track and a hash of everything that went into it.

numpy is the only third-party import at the top: a training process reads a memory map and starts at once.
"""

import bisect
import errno
import hashlib
import json
import math
import os
import shutil
import string
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatch
from functools import cached_property, lru_cache
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import pydantic
    import tiktoken
    import yaml

Entry = TypeVar("Entry")
Tokens = NDArray[np.uint16]

# ---------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------

RULES = 2  # raised when metric, clock or scoring change: val_bpb under different rules never rank together
TIME_BUDGET = 300  # training time of an experiment in seconds (5 minutes)
MAX_VOCAB = 65535  # token ids are stored as uint16
PACK_BUFFER = 1000  # documents that best-fit packing chooses from (the original's figure)
PACK_REFILL = 128  # documents added to it at a time (likewise)
TOKENIZER_CHARS = 10**9  # the tokenizer is trained on at most this many characters of the training split
TOKENIZER_DOC_CHARS = 10**4  # and on at most this many of one document
VAL_BYTES_PER_TOKEN = 5  # text set aside for each validation token when documents are split by hash

# GPT-4's split pattern (tiktoken cl100k_base) with digits in groups of one or two, as in nanochat: a small
# vocabulary does not want a thousand three-digit tokens.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]  # the first, BOS, opens every document

ROOT = Path(__file__).resolve().parent
DATA_FILES = (
    "tokenizer.json",
    "token_bytes.npy",
    "train.bin",
    "val.bin",
    "sealed.bin",
    "val_documents.npy",
    "sealed_documents.npy",
)
NO_DOCUMENT = -1  # the number of what a bare BOS opens
# Modules that a package's build writes, different on each platform: never part of a corpus.
GENERATED_MODULES = ("*_version*.py", "*__config__.py", "*_generated*.py", "*_sysconfig*.py")

# What of packages enters a corpus, and which modules go together.
CORPUS_VERSION = 2  # raised when is_table, near_copies or split_by_hash change
MAX_DIGIT_SHARE = 0.2  # of a module's characters: with more it is a table of numbers
# Distinctive lines are long and in few modules: others are a licence, an import or an idiom. Near copies
# share half the distinctive lines of the one that has fewer.
MIN_LINE_CHARS = 21
MAX_LINE_MODULES = 50
MIN_DISTINCTIVE_LINES = 20  # of a module that is compared
MIN_SHARED_LINES = 0.5


# ---------------------------------------------------------------------------
# Errors and messages
# ---------------------------------------------------------------------------


class UserError(Exception):
    """Say in one line what is wrong and what to do about it. `code` is the exit code: 2 for usage, else 1."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def note(message: str) -> None:
    """Print a message to stderr: stdout is for data. Where the person asked for quiet, print nothing."""
    if not os.environ.get("AUTORESEARCH_QUIET"):
        print(message, file=sys.stderr, flush=True)


def bar(items: Iterable[Any], what: str, unit: str) -> Iterable[Any]:
    """Show a tqdm bar on a terminal and nothing elsewhere: a log wants lines, not carriage returns."""
    from tqdm import tqdm

    disable = True if os.environ.get("AUTORESEARCH_QUIET") else None  # None: where there is no terminal
    return tqdm(items, desc=what, unit=unit, disable=disable, leave=False, file=sys.stderr)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, its type when it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---------------------------------------------------------------------------
# Configuration: the tracks of platforms.yaml
# ---------------------------------------------------------------------------

STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # pydantic's settings for an entry
MAX_YAML_SIZE = 200_000  # characters, aliases expanded: a few lines of aliases can stand for gigabytes
YAML_TAG = "tag:yaml.org,2002:"
PLAIN_KINDS = {"str", "int", "float", "bool", "null", "seq", "map"}
# How pydantic's errors name the types, and how we do.
TYPE_ERRORS = {
    "int_type": "int",
    "float_type": "float",
    "bool_type": "bool",
    "string_type": "str",
    "list_type": "list",
    "dataclass_type": "a mapping",
}
Complaint = tuple[str | tuple[str | int, ...], str]  # the key at fault, or the path to it, and what is wrong


@dataclass(frozen=True)
class Track:
    """One learning problem. Exactly one of `packages`, `files` and `hub` says where its text comes from."""

    name: str
    vocab_size: int  # tokens, the four reserved ones included
    seq_len: int  # tokens the model sees; a row holds one more
    val_tokens: int  # tokens scored
    packages: list[str] = field(default_factory=list)  # installed packages whose .py files are the corpus
    held_out: list[str] = field(default_factory=list)  # those that val and sealed are taken from; none: all
    files: str = ""  # glob below the repository, or absolute: txt, md, jsonl, parquet
    hub: str = ""  # dataset on the Hugging Face hub, owner/name
    data_files: str = "*"  # glob of the dataset's files
    revision: str = "main"  # branch, tag or commit of the dataset
    text_column: str = "text"
    train_shards: int = 0  # files to train on, in name order; 0 takes all
    val_shard: int = -1  # index of the file that holds the validation text; -1: split by document
    pack: str = "split"  # what happens when no document fits: see pack_rows
    fingerprint: str = ""  # what prepared data must hash to for results to compare
    __pydantic_config__ = STRICT


class YamlFile:
    """A YAML mapping that knows on which line each of its keys stands.

    Values are plain: text, numbers, booleans, null, lists and mappings. Every key is text.

    Args:
        path: where the text was read; messages name it.
        text: the YAML.

    Attributes:
        data: the mapping.

    Raises:
        UserError: code 2. The text is not such a mapping; the message names the line.
    """

    def __init__(self, path: Path, text: str) -> None:
        import yaml

        self.path = path
        try:
            loader = yaml.SafeLoader(text)
            self._root: Any = loader.get_single_node()
            if not isinstance(self._root, yaml.MappingNode):
                raise self._error_at(1, "expected the sections 'tracks' and 'platforms'")
            self._check(loader)
            self.data: dict[str, Any] = loader.construct_document(self._root)
        except yaml.reader.ReaderError as e:
            line = text.count("\n", 0, e.position) + 1
            raise self._error_at(line, f"not valid YAML: {e.reason}") from None
        except yaml.MarkedYAMLError as e:
            mark = e.problem_mark or e.context_mark
            raise self._error_at(mark.line + 1 if mark else 1, f"not valid YAML: {e.problem}") from None
        except RecursionError:
            mark = loader.tokens[0].start_mark if loader.tokens else loader.get_mark()
            raise self._error_at(mark.line + 1, "not valid YAML: nested too deeply") from None

    def line(self, *keys: str | int) -> int:
        """Return the 1-based line of the key at this path, or of the last key of the path that is there."""
        node = self._root
        line = 1
        for wanted in keys:
            found = []
            if node.id == "mapping":
                found = [(key, value) for key, value in node.value if key.value == wanted]
            elif node.id == "sequence" and isinstance(wanted, int):
                found = [(item, item) for item in node.value[wanted : wanted + 1]]
            if not found:
                break
            key, node = found[-1]  # a mapping's own keys come after those merged into it (<<)
            line = key.start_mark.line + 1
        return line

    def error(self, message: str, *keys: str | int) -> UserError:
        """Return a UserError (code 2) that names the line of the key at this path."""
        return self._error_at(self.line(*keys), message)

    def _error_at(self, line: int, message: str) -> UserError:
        return UserError(f"{self.path}:{line}: {message}", 2)

    def _check(self, loader: "yaml.SafeLoader") -> None:
        """Refuse values that are not plain and keys that stand twice. Make every key text."""
        size = 0
        stack = [self._root]
        while stack:
            node = stack.pop()
            size += 1 + len(node.value)
            line = node.start_mark.line + 1
            if size > MAX_YAML_SIZE:
                raise self._error_at(line, f"more than {MAX_YAML_SIZE} characters with all aliases expanded")
            kind = node.tag.removeprefix(YAML_TAG)
            if kind not in PLAIN_KINDS:
                raise self._error_at(line, f"not a plain value but of type {kind}: put text in quotes")
            if node.id == "mapping":
                self._check_keys(node)
                for key, value in reversed(node.value):
                    stack += [value] if key.tag == YAML_TAG + "merge" else [value, key]
            elif node.id == "sequence":
                stack += reversed(node.value)
            else:
                try:
                    json.dumps(loader.construct_object(node), ensure_ascii=False).encode()
                except (LookupError, ValueError):  # !!int x; 5000 digits; half a surrogate pair
                    raise self._error_at(line, f"not valid YAML: {node.value!r:.60} is no {kind}") from None

    def _check_keys(self, mapping: "yaml.MappingNode") -> None:
        seen = set()
        for key, _ in mapping.value:
            line = key.start_mark.line + 1
            if key.id != "scalar":
                raise self._error_at(line, "a key must be text, not a list or mapping")
            if key.value in seen:
                raise self._error_at(line, f"{key.value!r:.60} stands twice")
            seen.add(key.value)
            if key.tag != YAML_TAG + "merge":
                key.tag = YAML_TAG + "str"


parse_yaml = lru_cache(maxsize=2)(YamlFile)  # parsing takes 0.1 s, and two sections are read from one file


def load_yaml(path: Path) -> YamlFile:
    """Read and parse a YAML file.

    Raises:
        UserError: code 2. It cannot be read, or is not a mapping of plain values.
    """
    try:
        return parse_yaml(path, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text: {e.reason}", 2) from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}", 2) from None


def read_entries(
    path: str | Path,
    section: str,
    cls: type[Entry],
    check: Callable[[Entry], Complaint | None],
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Entry]:
    """Return the entries of one section of a YAML file, validated, in the file's order: {name: entry}.

    Args:
        path: the file.
        section: its key at the top, a plural: "tracks".
        cls: dataclass with `__pydantic_config__ = STRICT`. Its field `name` is the entry's key. A field that
            is a mapping in the file is such a dataclass too.
        check: returns what is wrong with a valid entry, or None.
        upgrade: replaces an entry's values before they are validated: it translates the keys of older files.

    Raises:
        UserError: code 2. It names the line and what is wrong there: the file cannot be parsed, a key is
            unknown, missing or of a wrong type, or `check` complains.
    """
    from pydantic import TypeAdapter, ValidationError

    file = load_yaml(Path(path))
    named_values = file.data.get(section)
    if not isinstance(named_values, dict) or not named_values:
        raise file.error(f"section '{section}' is missing or empty", section)
    adapter = TypeAdapter(cls)
    entries = {}
    for name, values in named_values.items():
        title = f"{section.removesuffix('s')} '{name}'"
        if not isinstance(values, dict):
            raise file.error(f"{title} has no settings", section, name)
        if "name" in values:
            raise file.error(f"{title}: unknown key 'name': its key is its name", section, name, "name")
        values = upgrade(dict(values)) if upgrade else values
        try:
            # As JSON: given Python objects, strict validation does not take a dict for a dataclass.
            entries[name] = adapter.validate_json(json.dumps({"name": name, **values}))
            complaint = check(entries[name])
        except ValidationError as e:
            complaint = describe_error(e, cls)
        if complaint:
            keys, message = complaint
            keys = (keys,) if isinstance(keys, str) else keys
            raise file.error(f"{title}: {message}", section, name, *keys)
    return entries


def describe_error(error: "pydantic.ValidationError", cls: Any) -> Complaint:
    """Return the first unknown key, else the first wrong value, else all missing keys.

    An unknown key comes first because it often is the missing one, misspelt.
    """
    errors = error.errors(include_url=False)
    for e in errors:
        if e["type"] == "unexpected_keyword_argument":
            *parents, key = e["loc"]
            for parent in parents:
                cls = get_type_hints(cls)[str(parent)]
            known = sorted(f.name for f in fields(cls) if parents or f.name != "name")
            inside = f" in {dotted(parents)}" if parents else ""
            return e["loc"], f"unknown key '{key}'{inside} (known: {', '.join(known)})"
    for e in errors:
        if e["type"] != "missing":
            expected = TYPE_ERRORS.get(e["type"]) or e["msg"].removeprefix("Input should be ")
            return e["loc"], f"'{dotted(e['loc'])}' should be {expected}, not {e['input']!r:.60}"
    return errors[0]["loc"], f"missing {', '.join(dotted(e['loc']) for e in errors)}"


def dotted(keys: Iterable[str | int]) -> str:
    return ".".join(map(str, keys))


def check_track(track: Track) -> Complaint | None:
    """Return what is wrong with the values of a track, or None."""
    sources = [key for key in ("packages", "files", "hub") if getattr(track, key)]
    if len(sources) != 1:
        return (), "needs exactly one of packages, files and hub"
    strangers = [name for name in track.held_out if name not in track.packages]
    if strangers:
        return "held_out", f"held_out names '{strangers[0]}', which is none of the track's packages"
    if not 256 + len(SPECIAL_TOKENS) < track.vocab_size <= MAX_VOCAB:
        return "vocab_size", f"vocab_size must be 261 to {MAX_VOCAB} (token ids are stored in 16 bits)"
    if track.seq_len < 2 or track.val_tokens < track.seq_len:
        return "val_tokens", "val_tokens must be at least one row of seq_len tokens"
    if track.pack not in ("split", "crop"):
        return "pack", "pack must be split or crop"
    if track.files:
        try:
            found = list_files(track)
        except (LookupError, RuntimeError, ValueError) as e:  # from pathlib, for a**b or ~no-such-user
            return "files", f"{track.files!r} is not a pattern of file names: {e}"
        if not found:
            return "files", f"no .txt, .md, .jsonl or .parquet file matches {track.files!r}"
    return None


def load_tracks(path: str | Path | None = None) -> dict[str, Track]:
    """Return all tracks of platforms.yaml (or $AUTORESEARCH_CONFIG), validated: {name: Track}."""
    return read_entries(path or config_path(), "tracks", Track, check_track)


def load_track(name: str, path: str | Path | None = None) -> Track:
    """Return one track by name.

    Raises:
        UserError: code 2. The name is unknown; the message lists the known ones.
    """
    tracks = load_tracks(path)
    if name not in tracks:
        file = Path(path or config_path()).name
        raise UserError(f"unknown track '{name}': {file} has {', '.join(tracks)}", 2)
    return tracks[name]


def config_path() -> Path:
    """Return the path of platforms.yaml, or $AUTORESEARCH_CONFIG."""
    return Path(os.environ.get("AUTORESEARCH_CONFIG") or ROOT / "platforms.yaml")


def cache_dir() -> Path:
    """Return the directory of all prepared data: $AUTORESEARCH_CACHE, or ~/.cache/autoresearch."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


# ---------------------------------------------------------------------------
# Files: where a track's text lies
# ---------------------------------------------------------------------------


def list_files(track: Track) -> list[Path]:
    """Return the files of a `files` track, sorted by path."""
    base = config_path().parent
    pattern = Path(track.files).expanduser()
    if pattern.is_absolute():
        base = Path(pattern.anchor)
        pattern = pattern.relative_to(base)
    return sorted(path for path in base.glob(str(pattern)) if path.suffix in READERS and path.is_file())


def list_package_files(track: Track) -> list[tuple[str, str, Path]]:
    """Return the .py files of the installed packages, sorted: [(package, name, path)].

    Raises:
        UserError: a package is not installed.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    found = []
    for package in sorted(track.packages):
        try:
            dist = distribution(package)
        except (PackageNotFoundError, ValueError):  # ValueError: the name is empty
            raise UserError(
                f"track '{track.name}' reads package '{package}', which is not installed: uv sync"
            ) from None
        sources = [f for f in dist.files or [] if f.suffix == ".py" and ".." not in f.parts]
        for name in sorted(f.as_posix() for f in sources):
            if not any(fnmatch(Path(name).name, generated) for generated in GENERATED_MODULES):
                found.append((package, name, Path(str(dist.locate_file(name)))))
    return found


def held_out_files(track: Track) -> list[Path]:
    """Return the files and folders with text that no trainer may read: those that val and sealed come from.

    Of a track of files that is every file. Text of the hub lies in the hub's own folder.
    """
    if track.packages:
        tops = {
            (path, Path(name).parts)
            for _, name, path in list_package_files(replace(track, packages=track.held_out))
        }
        return sorted({path.parents[len(parts) - 2] if len(parts) > 1 else path for path, parts in tops})
    return list_files(track) if track.files else []


def list_hub_files(track: Track) -> list[str]:
    """Return the names of the dataset's files that match, sorted. Needs the network.

    Raises:
        UserError: no file matches, or the hub cannot be read.
    """
    from huggingface_hub import HfApi

    with hub_errors(track):
        names = HfApi().list_repo_files(track.hub, repo_type="dataset", revision=track.revision)
    names = sorted(n for n in names if fnmatch(n, track.data_files) and Path(n).suffix in READERS)
    if not names:
        raise UserError(
            f"track '{track.name}': {track.hub} has no txt, md, jsonl or parquet file "
            f"matching {track.data_files!r}"
        )
    return names


def download(track: Track, name: str) -> Path:
    """Download one file of the dataset into the hub's own cache and return its path.

    A download that was cut off is resumed.

    Raises:
        UserError: the hub cannot be read, or the disk is full.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(track, name):
        return Path(hf_hub_download(track.hub, name, repo_type="dataset", revision=track.revision))


@contextmanager
def hub_errors(track: Track, name: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises while it reads file `name` into a UserError that says what to do."""
    from huggingface_hub import errors

    what = f"{track.hub}/{name}" if name else track.hub
    try:
        yield
    except Exception as e:
        if isinstance(e, errors.EntryNotFoundError) and not isinstance(e, errors.LocalEntryNotFoundError):
            message = f"the hub has no file {what} (revision {track.revision})"
        elif isinstance(e, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
            message = (
                f"the hub has no dataset {track.hub} at revision {track.revision}, "
                "or it needs a token (hf auth login)"
            )
        elif isinstance(e, OSError) and e.errno == errno.ENOSPC:
            message = f"no space left while downloading {what}: free some, or set HF_HOME to a larger disk"
        else:
            message = (
                f"cannot reach the hub for {what} ({first_line(e)}): run again to resume, "
                "or try --track pysource, which needs no network"
            )
        raise UserError(message) from None


def download_shards(track: Track) -> list[Path]:
    """Download the shards of a `hub` track and return their paths, the validation shard's last.

    Raises:
        UserError: there is no such validation shard, or a file cannot be downloaded.
    """
    names = list_hub_files(track)
    if track.val_shard >= len(names):
        raise UserError(
            f"track '{track.name}': val_shard {track.val_shard}, "
            f"but {track.hub} has {len(names)} matching files",
            2,
        )
    wanted = [name for i, name in enumerate(names) if i != track.val_shard][: track.train_shards or None]
    if track.val_shard >= 0:
        wanted.append(names[track.val_shard])
    note(f"downloading {len(wanted)} of {len(names)} files of {track.hub}")
    return [download(track, name) for name in bar(wanted, "download", "file")]


def read_plain(path: Path, column: str) -> Iterator[str]:
    """Yield a text file as one document. `column` is ignored."""
    yield path.read_text(encoding="utf-8", errors="replace")


def read_table(path: Path, column: str) -> Iterator[str]:
    """Yield one column of a parquet or jsonl file, streamed by `datasets`; nulls are skipped.

    Raises:
        UserError: the file cannot be read, has no such column, or the column does not hold text.
    """
    import datasets

    datasets.disable_progress_bars()
    kind = "parquet" if path.suffix == ".parquet" else "json"
    remedy = f"set text_column in {config_path().name}"
    try:
        rows = datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True)
        known = rows.column_names or list(next(iter(rows), {}))
        if column not in known:
            has = ", ".join(known) or "none"
            raise UserError(f"{path.name} has no column '{column}' (it has {has}): {remedy}")
        for batch in rows.select_columns([column]).iter(batch_size=PACK_REFILL):
            for text in batch[column]:
                if isinstance(text, str):
                    yield text
                elif text is not None:
                    found = type(text).__name__
                    raise UserError(f"{path.name}: column '{column}' holds {found}, not text: {remedy}")
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{path} cannot be read as {kind}: {first_line(e)}") from None


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": read_plain,
    ".md": read_plain,
    ".jsonl": read_table,
    ".parquet": read_table,
}


# ---------------------------------------------------------------------------
# Corpus: documents, split three ways
# ---------------------------------------------------------------------------


class Corpus:
    """The documents of a track, in a fixed order, split three ways. Copies of a document are dropped.

    With a validation shard, the splits "val" and "sealed" are both that shard: the sealed rows continue where
    the val rows end. Otherwise each document belongs to one split by its hash (see split_by_hash). Of
    packages, modules that are tables of numbers are left out, and near copies belong to one split.

    Attributes:
        has_val_shard: whether the track names a validation shard.
        num_bytes: size of the text; with a validation shard, that of the files.

    Raises:
        UserError: the files are missing, or hold too little text to be split.
    """

    def __init__(self, track: Track) -> None:
        self.track = track
        self.has_val_shard = bool(track.hub) and track.val_shard >= 0
        never_held_out: list[Path] = []
        if track.packages:
            found = list_package_files(track)
            self.paths = [path for _, _, path in found]
            never_held_out = [path for package, _, path in found if package not in track.held_out]
        elif track.files:
            self.paths = list_files(track)
        else:
            self.paths = download_shards(track)
        if self.has_val_shard:
            self.num_bytes = sum(path.stat().st_size for path in self.paths)
        else:
            sizes: dict[bytes, int] = {}
            for text in self._read(self.paths):
                sizes.setdefault(document_key(text), len(utf8(text)))
            trained = self._read(never_held_out) if track.held_out else []
            groups = near_copies(self._read(self.paths)) if track.packages else {}
            self._split_of = split_by_hash(sizes, track, {document_key(text) for text in trained}, groups)
            self.num_bytes = sum(sizes.values())

    def documents(self, split: str) -> Iterator[str]:
        """Yield the documents of "train", "val" or "sealed"."""
        paths = self.paths
        seen: set[bytes] = set()
        if self.has_val_shard and split == "train":
            paths = self.paths[:-1]
            seen |= self._val_shard_keys
        elif self.has_val_shard:
            paths = self.paths[-1:]
        for text in self._read(paths):
            key = document_key(text)
            if key not in seen and (self.has_val_shard or self._split_of[key] == split):
                seen.add(key)
                yield text

    @cached_property
    def _val_shard_keys(self) -> set[bytes]:
        """Keys of documents that are never trained on, even where a training shard repeats them."""
        return {document_key(text) for text in self._read(self.paths[-1:])}

    def _read(self, paths: Iterable[Path]) -> Iterator[str]:
        """Yield the documents of some files, copies included, empty ones and tables of numbers not."""
        for path in paths:
            reader = READERS.get(path.suffix, read_plain)
            try:
                for text in filter(None, reader(path, self.track.text_column)):
                    if not (self.track.packages and is_table(text)):
                        yield text
            except OSError as e:
                raise UserError(f"{path} cannot be read: {e.strerror}") from None


def split_by_hash(
    sizes: dict[bytes, int], track: Track, trained: Set[bytes], groups: Mapping[bytes, bytes]
) -> dict[bytes, str]:
    """Return the split of each document by its key, given its size in bytes.

    Of the documents that are not in `trained`, those with the smallest keys are val, the next sealed; the
    rest is train. So the split does not change with the order of files. The track's val_tokens say how much
    text val and sealed get. `groups` gives near copies the key of their group. They go together, and that key
    is compared in place of theirs. They are train if one of them is in `trained`, or if they would fill half
    of val.

    Raises:
        UserError: there is too little text, or there are too few documents.
    """
    need = track.val_tokens * VAL_BYTES_PER_TOKEN
    total = sum(sizes.values())
    if total < 3 * need:
        raise UserError(
            f"track '{track.name}': {total / 1e6:.1f} MB of text is too little for val_tokens "
            f"{track.val_tokens:,}: it needs {3 * need / 1e6:.1f} MB; lower val_tokens or add text"
        )
    members: dict[bytes, list[bytes]] = {}  # of each group; a document without near copies is one by itself
    for key in sizes:
        members.setdefault(groups.get(key, key), []).append(key)
    split_of = {}
    filled = 0
    for _, keys in sorted(members.items()):
        size = sum(sizes[key] for key in keys)
        split = "val" if filled < need else "sealed" if filled < 2 * need else "train"
        if not trained.isdisjoint(keys) or (len(keys) > 1 and size > need / 2):
            split = "train"
        split_of.update(dict.fromkeys(keys, split))
        filled += size if split != "train" else 0
    if filled < 2 * need:
        raise UserError(
            f"track '{track.name}': {filled / 1e6:.1f} MB of text can be held out, and val_tokens "
            f"{track.val_tokens:,} needs {2 * need / 1e6:.1f} MB: lower it"
            f"{', or add packages to held_out' if trained else ''}"
        )
    if "train" not in split_of.values():
        raise UserError(
            f"track '{track.name}': {len(sizes)} documents are too few to split: use more and smaller files"
        )
    return split_of


def is_table(text: str) -> bool:
    """Return whether a module holds numbers rather than code."""
    return sum(map(text.count, string.digits)) > MAX_DIGIT_SHARE * len(text)


def near_copies(texts: Iterable[str]) -> dict[bytes, bytes]:
    """Return the modules that have near copies, each with a key of its group: {key: the group's key}.

    Two modules are in one group when a chain of near copies leads from one to the other.
    """
    holders: dict[int, set[bytes]] = {}  # of each line
    for text in texts:
        key = document_key(text)
        for line in map(str.strip, text.splitlines()):
            if len(line) >= MIN_LINE_CHARS:
                holders.setdefault(zlib.crc32(utf8(line)), set()).add(key)
    distinctive = [keys for keys in holders.values() if len(keys) <= MAX_LINE_MODULES]
    num_lines = Counter(key for keys in distinctive for key in keys)
    num_shared = Counter(pair for keys in distinctive for pair in combinations(sorted(keys), 2))
    parents: dict[bytes, bytes] = {}  # a module -> a smaller one of its group; the smallest -> itself

    def smallest(key: bytes) -> bytes:
        while parents.get(key, key) != key:
            key = parents[key]
        return key

    for (one, other), count in num_shared.items():
        fewer = min(num_lines[one], num_lines[other])
        if fewer >= MIN_DISTINCTIVE_LINES and count >= MIN_SHARED_LINES * fewer:
            low, high = sorted((smallest(one), smallest(other)))
            parents[high] = low
            parents.setdefault(low, low)
    return {key: group_key(smallest(key)) for key in parents}


def group_key(smallest: bytes) -> bytes:
    """Return the key of a group of near copies, from the smallest of their keys.

    The smallest of several is small: ordered by it, near copies would come before other modules.
    """
    return hashlib.sha256(smallest).digest()[:16]


def document_key(text: str) -> bytes:
    """Return the hash by which copies of a document are recognised."""
    return hashlib.sha256(utf8(text)).digest()[:16]


def utf8(text: str) -> bytes:
    """Return the text in UTF-8, with ? for what UTF-8 cannot hold (half a surrogate pair)."""
    return text.encode("utf-8", "replace")


# ---------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
    """Train byte-pair merges with rustbpe. Return {"pattern": str, "ranks": [token bytes as hex]}.

    Args:
        texts: documents; TOKENIZER_CHARS and TOKENIZER_DOC_CHARS say how much of them is read.
        vocab_size: tokens wanted, reserved ones included. Too little text yields fewer.
    """
    import rustbpe

    def capped() -> Iterator[str]:
        left = TOKENIZER_CHARS
        for text in texts:
            yield text[:TOKENIZER_DOC_CHARS]
            left -= min(len(text), TOKENIZER_DOC_CHARS)
            if left <= 0:
                return

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(capped(), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = sorted((rank, bytes(token)) for token, rank in tokenizer.get_mergeable_ranks())
    return {"pattern": SPLIT_PATTERN, "ranks": [token.hex() for _, token in ranks]}


def make_encoding(data: dict[str, Any]) -> "tiktoken.Encoding":
    """Return the Encoding of what train_tokenizer returned. That is no pickle, so loading runs no code."""
    import tiktoken

    ranks = {bytes.fromhex(token): rank for rank, token in enumerate(data["ranks"])}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding(
        "autoresearch", pat_str=data["pattern"], mergeable_ranks=ranks, special_tokens=special
    )


def token_byte_lengths(encoding: "tiktoken.Encoding") -> NDArray[np.int32]:
    """Return the number of bytes of each token, int32 [vocab_size]; 0 for the reserved ones.

    Raw bytes are counted: a token may be a piece of a UTF-8 character, which decoding would turn into U+FFFD.
    """
    lengths = np.zeros(encoding.n_vocab, dtype=np.int32)
    for token in range(encoding.n_vocab - len(SPECIAL_TOKENS)):
        lengths[token] = len(encoding.decode_single_token_bytes(token))
    return lengths


def encode_batches(
    encoding: "tiktoken.Encoding", texts: Iterable[str], threads: int
) -> Iterator[list[Tokens]]:
    """Encode documents on several threads (tiktoken frees the GIL) and yield them in order.

    Yields:
        Lists of at most PACK_REFILL documents, each uint16 [tokens] without BOS.
    """
    # encode_to_numpy would look for special tokens in the text; the core call with none allowed does not.
    encode_one = encoding._core_bpe.encode_to_tiktoken_buffer

    def encode(batch: list[str]) -> list[Tokens]:
        buffers = (encode_one(utf8(text).decode(), set()) for text in batch)
        return [np.frombuffer(buffer, np.uint32).astype(np.uint16) for buffer in buffers]

    texts = iter(texts)
    pending: deque[Future[list[Tokens]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(texts, PACK_REFILL)):
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * threads:  # bounds memory: a corpus may be larger than it
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# ---------------------------------------------------------------------------
# Packing: documents -> full rows of seq_len + 1 tokens
# ---------------------------------------------------------------------------


class Piece(NamedTuple):
    """A document, or what is left of one."""

    document: int  # its number, in the order in which documents came
    tokens: Tokens  # without BOS


class PackBuffer:
    """Pieces that wait to be packed, ordered by length. Of equals, the one that came first goes first."""

    def __init__(self) -> None:
        self._order: list[tuple[int, int]] = []  # (length with BOS, -arrival), ascending
        self._pieces: dict[int, Piece] = {}  # by arrival
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._order)

    def put(self, piece: Piece) -> None:
        self._arrivals += 1
        self._pieces[self._arrivals] = piece
        bisect.insort(self._order, (len(piece.tokens) + 1, -self._arrivals))

    def take_longest(self) -> Piece:
        return self._take(len(self) - 1)

    def take_shortest(self) -> Piece:
        return self._take(self._last_within(self._order[0][0]))

    def take_fitting(self, gap: int) -> Piece | None:
        """Take the longest piece that fits into `gap` tokens with its BOS. Return None when none does."""
        index = self._last_within(gap)
        return self._take(index) if index >= 0 else None

    def _last_within(self, length: int) -> int:
        """Return the index of the longest piece of at most `length` tokens, -1 when there is none."""
        return bisect.bisect_right(self._order, (length, 0)) - 1

    def _take(self, index: int) -> Piece:
        _, negative_arrival = self._order.pop(index)
        return self._pieces.pop(-negative_arrival)


def take_piece(buffer: PackBuffer, gap: int, rule: str) -> Piece:
    """Take what goes into a gap of so many tokens, its BOS included: see pack_rows."""
    fitting = buffer.take_fitting(gap)
    if fitting is not None:
        return fitting
    if rule == "crop":
        shortest = buffer.take_shortest()
        return Piece(shortest.document, shortest.tokens[: gap - 1])
    if gap == 1:
        return Piece(NO_DOCUMENT, np.empty(0, np.uint16))
    longest = buffer.take_longest()
    buffer.put(Piece(longest.document, longest.tokens[gap - 1 :]))
    return Piece(longest.document, longest.tokens[: gap - 1])


class PackedRow(NamedTuple):
    """A full row, and where its text comes from."""

    tokens: Tokens  # [capacity]
    documents: list[int]  # of each BOS in it, in order: the document that it opens or goes on with


def pack_rows(batches: Iterable[list[Tokens]], capacity: int, bos: int, rule: str) -> Iterator[PackedRow]:
    """Pack documents into rows, best fit first, and yield the rows.

    Each gap takes the longest buffered document that fits it. When none fits:
      rule "crop"   the shortest document fills the gap and its rest is dropped (the rule of the original
                    autoresearch); an unfinished last row is dropped.
      rule "split"  the longest document fills the gap and its rest returns to the buffer, so that nothing
                    is lost; a gap of one token takes a bare BOS, and so does the end of the last row.

    Args:
        batches: lists of documents, uint16 [tokens] without BOS. A batch is taken when the buffer has room.
        capacity: tokens of a row, at least 2.
        bos: token written before every document and every rest of one.
        rule: "crop" or "split".
    """
    buffer = PackBuffer()
    batches = iter(batches)
    arrived = 0
    row = np.empty(capacity, np.uint16)
    documents: list[int] = []
    pos = 0
    while True:
        while len(buffer) < PACK_BUFFER and (batch := next(batches, None)) is not None:
            for tokens in batch:
                buffer.put(Piece(arrived, tokens))
                arrived += 1
        if not buffer:
            break
        piece = take_piece(buffer, capacity - pos, rule)
        end = pos + 1 + len(piece.tokens)
        row[pos] = bos
        row[pos + 1 : end] = piece.tokens
        documents.append(piece.document)
        pos = end
        if pos == capacity:
            yield PackedRow(row.copy(), documents)
            documents = []
            pos = 0
    if pos and rule == "split":
        row[pos:] = bos
        yield PackedRow(row.copy(), documents + [NO_DOCUMENT] * (capacity - pos))


# ---------------------------------------------------------------------------
# Prepare: everything above, once, into a directory that appears when it is complete
# ---------------------------------------------------------------------------


def source_signature(track: Track) -> Any:
    """Return what identifies the corpus without reading it, as JSON: versions, file times, or a revision."""
    if track.packages:
        return {package: installed_version(package) for package in sorted(track.packages)}
    if track.files:
        return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in list_files(track)]
    return [track.hub, track.revision]


def installed_version(package: str) -> str:
    """Return the version of an installed package, "missing" when it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except (PackageNotFoundError, ValueError):  # ValueError: the name is empty
        return "missing"


def prepared_path(track: Track) -> Path:
    """Return the directory of the track's prepared data; it need not exist."""
    settings = {key: value for key, value in asdict(track).items() if key != "fingerprint"}
    parts = [settings, source_signature(track), SPLIT_PATTERN, PACK_BUFFER, PACK_REFILL]
    if track.packages:
        parts += [CORPUS_VERSION, MAX_DIGIT_SHARE, MIN_LINE_CHARS, MAX_LINE_MODULES]
        parts += [MIN_DISTINCTIVE_LINES, MIN_SHARED_LINES]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return cache_dir() / f"{track.name}-{digest[:12]}"


def prepare_track(track: Track, force: bool = False, threads: int | None = None) -> "Prepared":
    """Prepare the track unless it is prepared, and return it opened.

    Args:
        track: what to prepare.
        force: prepare again although it is prepared.
        threads: threads that encode; None takes one for each core. The result does not depend on it.

    Raises:
        UserError: the corpus cannot be read or is too small, the cache cannot be written, or the data that
            was prepared before is damaged.
    """
    target = prepared_path(track)
    if force or not os.path.isdir(target):
        with locked(target):
            if force or not os.path.isdir(target):  # else another process built it while this one waited
                build_directory(track, target, threads or os.cpu_count() or 1)
    return Prepared(track)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock on a directory of the cache. Create the cache when it is missing."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            note(f"another process prepares {target.name}; waiting for it")
            lock.acquire()
    except OSError as e:
        raise UserError(
            f"cannot write {target.parent}: {e.strerror}; set AUTORESEARCH_CACHE to a directory you own"
        ) from None
    try:
        yield
    finally:
        lock.release()


def build_directory(track: Track, target: Path, threads: int) -> None:
    """Build the prepared data beside `target` and move it there when it is complete.

    Whatever stops this, `target` is the old data, the new data or missing, never a part of either.
    """
    scratch = target.with_name(target.name + ".tmp")
    replaced = target.with_name(target.name + ".old")
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed: we hold the lock
        shutil.rmtree(replaced, ignore_errors=True)
        scratch.mkdir()
        build(track, scratch, threads)
        if target.exists():
            target.rename(replaced)
        scratch.rename(target)
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise UserError(f"cannot prepare {track.name}: {e}") from None
        remedy = "free some, or set AUTORESEARCH_CACHE to a larger disk"
        raise UserError(f"no space left in {target.parent}: {remedy}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@dataclass(frozen=True)
class Meta:
    """What meta.json says about prepared data."""

    track: str
    seq_len: int
    vocab_size: int
    bos: int
    rows: dict[str, int]  # by split
    sizes: dict[str, int]  # bytes by file
    digests: dict[str, str]  # sha256 by file
    fingerprint: str  # of the digests
    train_text_bytes: int
    source: Any  # see source_signature
    pack: str
    prepared: str  # local time


def build(track: Track, out: Path, threads: int) -> None:
    """Write tokenizer, token_bytes, train, val and sealed rows and meta.json into the directory `out`."""
    began = time.time()
    corpus = Corpus(track)
    check_space(corpus, out)
    encoding = build_tokenizer(corpus, out)
    rows, train_text_bytes = build_rows(corpus, encoding, out, threads)
    digests = {name: file_digest(out / name) for name in DATA_FILES}
    meta = Meta(
        track=track.name,
        seq_len=track.seq_len,
        vocab_size=encoding.n_vocab,
        bos=bos_of(encoding),
        rows=rows,
        sizes={name: (out / name).stat().st_size for name in DATA_FILES},
        digests=digests,
        fingerprint=fingerprint_of(digests),
        train_text_bytes=train_text_bytes,
        source=source_signature(track),
        pack=track.pack,
        prepared=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    (out / "meta.json").write_text(json.dumps(asdict(meta), indent=1))
    note(
        f"{track.name}: {rows['train'] * track.seq_len / 1e6:.1f}M training tokens, "
        f"{rows['val'] * track.seq_len / 1e6:.2f}M val, "
        f"fingerprint {meta.fingerprint}, {time.time() - began:.0f} s"
    )
    if track.fingerprint and meta.fingerprint != track.fingerprint:
        note(
            f"warning: {track.name} has fingerprint {meta.fingerprint}, not the pinned {track.fingerprint} "
            "(other package versions?): results do not compare with those of other machines"
        )


def check_space(corpus: Corpus, out: Path) -> None:
    """Raise a UserError when the disk of `out` has less room than the text takes. Its tokens take less."""
    need = corpus.num_bytes + 2**26
    free = shutil.disk_usage(out).free
    if free < need:
        raise UserError(
            f"preparing {corpus.track.name} needs {need / 1e9:.1f} GB in {out.parent}, "
            f"{free / 1e9:.1f} GB are free: free some, or set AUTORESEARCH_CACHE to a larger disk"
        )


def build_tokenizer(corpus: Corpus, out: Path) -> "tiktoken.Encoding":
    """Train the tokenizer, write tokenizer.json and token_bytes.npy, and return its encoding.

    Raises:
        UserError: the text yields fewer tokens than the track wants.
    """
    track = corpus.track
    note(f"tokenizer: training {track.vocab_size} tokens")
    data = train_tokenizer(bar(corpus.documents("train"), "tokenizer", "doc"), track.vocab_size)
    encoding = make_encoding(data)
    if encoding.n_vocab != track.vocab_size:
        raise UserError(
            f"track '{track.name}': the text yields {encoding.n_vocab} tokens, not {track.vocab_size}: "
            "lower vocab_size or add text"
        )
    (out / "tokenizer.json").write_text(json.dumps(data))
    np.save(out / "token_bytes.npy", token_byte_lengths(encoding))
    return encoding


def build_rows(
    corpus: Corpus, encoding: "tiktoken.Encoding", out: Path, threads: int
) -> tuple[dict[str, int], int]:
    """Pack the splits and write train.bin, val.bin and sealed.bin.

    Returns:
        The number of rows of each split, and the number of bytes of training text.

    Raises:
        UserError: there is too little text for one of them.
    """
    track = corpus.track
    train_text_bytes = 0

    def batches_of(texts: Iterable[str]) -> Iterator[list[Tokens]]:
        return encode_batches(encoding, texts, threads)

    def train_texts() -> Iterator[str]:
        nonlocal train_text_bytes
        for text in corpus.documents("train"):
            train_text_bytes += len(utf8(text))
            yield text

    def write(split: str, batches: Iterable[list[Tokens]], limit: int | None = None) -> int:
        documents: list[int] = []

        def tokens() -> Iterator[Tokens]:
            rows = pack_rows(batches, track.seq_len + 1, bos_of(encoding), track.pack)
            for row in islice(rows, limit):
                if split != "train":
                    documents.extend(row.documents)
                yield row.tokens

        num_rows = write_rows(out / f"{split}.bin", tokens())
        if split != "train":
            np.save(out / f"{split}_documents.npy", np.array(documents, np.int32))
        return num_rows

    need = -(-track.val_tokens // track.seq_len)
    val = batches_of(corpus.documents("val"))
    # One validation shard serves both splits: sealed takes the batches that val left.
    sealed = val if corpus.has_val_shard else batches_of(corpus.documents("sealed"))
    rows = {"val": write("val", val, need), "sealed": write("sealed", sealed, need)}
    for split, least in (("val", need), ("sealed", max(1, need // 4))):
        if rows[split] < least:
            raise UserError(
                f"track '{track.name}': its held-out text fills {rows[split]} {split} rows of {need}: "
                "lower val_tokens or add text"
            )
    rows["train"] = write("train", batches_of(train_texts()))
    if not rows["train"]:
        raise UserError(
            f"track '{track.name}': no training text is left after the validation set: "
            "lower val_tokens or add text"
        )
    return rows, train_text_bytes


def write_rows(path: Path, rows: Iterable[Tokens]) -> int:
    """Write rows to a file and return how many there were."""
    count = 0
    with open(path, "wb") as f:
        for row in bar(rows, f"pack {path.stem}", "row"):
            f.write(row.tobytes())
            count += 1
        f.flush()
        os.fsync(f.fileno())
    return count


def bos_of(encoding: "tiktoken.Encoding") -> int:
    """Return the token that opens every document."""
    return encoding.encode_single_token(SPECIAL_TOKENS[0])


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint_of(digests: dict[str, str]) -> str:
    """Return one short hash of the digests of all data files."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def read_meta(path: Path) -> Meta:
    """Return what meta.json in a directory of prepared data says.

    Raises:
        OSError, ValueError: a file is missing, torn or cut.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        meta = TypeAdapter(Meta).validate_json((path / "meta.json").read_bytes())
    except ValidationError as e:
        first = e.errors()[0]
        raise ValueError(f"meta.json: {dotted(first['loc'])} {first['msg']}") from None
    for name in DATA_FILES:
        size = (path / name).stat().st_size
        if size != meta.sizes.get(name):
            raise ValueError(f"{name} has {size} bytes, not {meta.sizes.get(name)}")
    return meta


class Prepared:
    """A track's prepared data, opened. Rows are read-only memory maps, opened when they are asked for.

    Args:
        track: what was prepared.
        path: its directory; None: where prepare_track puts it.

    Attributes:
        path: the directory.
        meta: what meta.json says.
        name, seq_len, val_tokens: as in the track.
        vocab_size, bos, fingerprint: as in meta.
        num_train_rows: rows of the split "train".

    Raises:
        UserError: the track is not prepared, or a file of it is missing, cut or torn.
    """

    def __init__(self, track: Track, path: Path | None = None) -> None:
        self.path = path or prepared_path(track)
        if not os.path.isdir(self.path):
            raise UserError(
                f"track '{track.name}' is not prepared: autoresearch prepare --track {track.name}"
            )
        try:
            self.meta = read_meta(self.path)
        except (OSError, ValueError) as e:
            raise UserError(
                f"the prepared data in {self.path} is damaged ({e}): "
                f"rebuild it with: autoresearch prepare --track {track.name} --force"
            ) from None
        self.name = track.name
        self.seq_len = track.seq_len
        self.val_tokens = track.val_tokens
        self.vocab_size = self.meta.vocab_size
        self.bos = self.meta.bos
        self.fingerprint = self.meta.fingerprint
        self.num_train_rows = self.meta.sizes["train.bin"] // (2 * (track.seq_len + 1))

    def rows(self, split: str) -> Tokens:
        """Return the rows of "train", "val" or "sealed", uint16 [rows, seq_len + 1].

        Only `autoresearch verify` reads "sealed".
        """
        return np.memmap(self.path / f"{split}.bin", np.uint16, "r").reshape(-1, self.seq_len + 1)

    def documents(self, split: str) -> NDArray[np.int32]:
        """Return the document of each BOS in the rows of "val" or "sealed", in order: int32 [BOS tokens].

        NO_DOCUMENT where a BOS opens none. A document that was split goes on behind several of them.
        """
        return np.load(self.path / f"{split}_documents.npy")

    def token_bytes(self) -> NDArray[np.int32]:
        """Return the number of bytes of each token, int32 [vocab_size]."""
        return np.load(self.path / "token_bytes.npy")

    def encoding(self) -> "tiktoken.Encoding":
        """Return the tokenizer."""
        return make_encoding(json.loads((self.path / "tokenizer.json").read_text()))

    def current_fingerprint(self) -> str:
        """Return the fingerprint of the files on disk now. It differs from `fingerprint` after a change."""
        return fingerprint_of({name: file_digest(self.path / name) for name in DATA_FILES})


# ---------------------------------------------------------------------------
# The metric
# ---------------------------------------------------------------------------


class DocumentTotals:
    """The sums of each document of some rows: text of one document is more alike than that of two.

    Tokens without bytes (BOS) are prompts, not text, and count in no sum.

    Args:
        rows: uint16 [rows, T + 1].
        documents: int32, of each BOS in more rows, of which these are the first (Prepared.documents).
        bos: the token.
        token_bytes: int32 [vocab_size], bytes of each token.

    Attributes:
        nats: float64 [documents], cross-entropy in nats.
        num_bytes: int64 [documents].
    """

    def __init__(
        self, rows: Tokens, documents: NDArray[np.int32], bos: int, token_bytes: NDArray[np.int32]
    ) -> None:
        opened = (rows == bos).sum(axis=1)
        self._first = np.cumsum(opened) - opened  # BOS tokens before each row
        self._documents = documents[: opened.sum()]
        self._rows = rows
        self._bos = bos
        self._token_bytes = token_bytes
        size = int(self._documents.max(initial=NO_DOCUMENT)) + 2  # one more, which NO_DOCUMENT means
        self.nats = np.zeros(size)
        self.num_bytes = np.zeros(size, np.int64)

    def add(self, picked: NDArray[np.integer], nats: ArrayLike) -> None:
        """Add rows, by their indices. nats: float [len(picked), T], cross-entropy of each target."""
        rows = self._rows[picked]
        targets = rows[:, 1:]
        opened = np.cumsum(rows == self._bos, axis=1)[:, 1:] - 1
        document = self._documents[self._first[picked][:, None] + opened].ravel() % len(self.nats)
        num_bytes = self._token_bytes[targets].ravel()
        counted = np.where(num_bytes > 0, np.asarray(nats, np.float64).ravel(), 0.0)
        self.nats += np.bincount(document, counted, len(self.nats))
        self.num_bytes += np.bincount(document, num_bytes, len(self.nats)).astype(np.int64)


def bits_per_byte(nats: ArrayLike, num_bytes: ArrayLike) -> tuple[float, float]:
    """Return bits per byte and its standard error, from the sums of each document.

    The estimate is a ratio: the sum of nats over ln 2 times the sum of bytes. So its value does not depend on
    the vocabulary. Documents are the independent units, and the error is that of a ratio of sums over them
    (Cochran, Sampling Techniques, 1977, section 6.4).

    Args:
        nats: float [documents]. A NaN makes the result NaN.
        num_bytes: int [documents]. Documents without bytes do not count.

    Raises:
        ValueError: no document has bytes.
    """
    num_bytes = np.asarray(num_bytes, np.float64)
    nats = np.asarray(nats, np.float64)[num_bytes > 0]
    num_bytes = num_bytes[num_bytes > 0]
    total = num_bytes.sum()
    n = len(num_bytes)
    if total == 0:
        raise ValueError("no token with bytes was scored")
    ratio = nats.sum() / total
    variance = math.nan
    if n > 1:
        variance = n / (n - 1) * np.square(nats - ratio * num_bytes).sum() / total**2
    return float(ratio / math.log(2)), float(math.sqrt(variance) / math.log(2))


# ---------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Prepare a track and print the directory of its data. Exit codes: 1, 2 (usage), 130 (interrupted)."""
    import argparse

    parser = argparse.ArgumentParser(description="Prepare a track: tokenizer and packed rows.")
    parser.add_argument("--track", help="a track of platforms.yaml; the first one if left out")
    parser.add_argument("--force", action="store_true", help="prepare again although it is prepared")
    options = parser.parse_args(arguments)
    try:
        track = load_track(options.track) if options.track else next(iter(load_tracks().values()))
        print(prepare_track(track, force=options.force).path)
    except UserError as e:
        note(f"prepare: {e}")
        sys.exit(e.code)
    except KeyboardInterrupt:
        note("prepare: interrupted; downloads resume on the next run")
        sys.exit(130)


if __name__ == "__main__":
    main()
