"""
A corpus that lasts an H100 five minutes: the source code and documentation of large Debian packages.

    uv run python benchmarks/corpus.py FOLDER              # 1.6 GB of text, about 450M tokens of 8,192 kinds
    uv run python benchmarks/corpus.py FOLDER --megabytes 200

It downloads source packages with apt-get, about 1.5 GB, and writes FOLDER/<package>.jsonl, a document a line
under the key "text". FOLDER/track.yaml is an entry for platforms.yaml. A package that is there is not read
again, so a second call goes on where the first one ended. It needs Debian or a system like it, not root.

What is left out, and why:
- files that are not text of the endings below, are over 200 kB, or hold lines of over 1,000 characters: data
- files of which more than 15% are digits: tables
- files of which more than half of the lines stood in a file before: copies, which would be learned by heart,
  and would stand on both sides of the split
- what a package has beyond its share: the corpus is to be of many kinds
"""

import argparse
import hashlib
import heapq
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

# fmt: off
PACKAGES = [
    "python3.11", "golang-1.19", "rustc", "nodejs", "boost1.74", "qtbase-opensource-src", "blender",
    "emacs", "perl", "samba", "git", "qemu", "octave", "numpy", "scipy", "pandas", "sympy", "python-django",
    "erlang", "ghc", "systemd", "glibc", "gdb", "cmake", "mesa", "vtk9", "krita", "apache2", "ansible-core",
    "kubernetes", "node-typescript", "ruby3.1", "vim", "swi-prolog", "maxima", "inkscape",
    "llvm-toolchain-15", "gtk4", "networkx", "scikit-learn", "matplotlib", "linux", "libreoffice",
    "sagemath",
]
ENDINGS = {
    ".adoc", ".c", ".cc", ".cpp", ".cs", ".el", ".erl", ".ex", ".f90", ".go", ".h", ".hh", ".hpp", ".hs",
    ".java", ".jl", ".js", ".kt", ".lisp", ".m", ".md", ".ml", ".pas", ".php", ".pl", ".pm", ".pod", ".ps1",
    ".py", ".pyx", ".r", ".rb", ".rs", ".rst", ".scala", ".sh", ".sql", ".swift", ".tcl", ".tex", ".texi",
    ".ts", ".tsx", ".txt", ".vim",
}
# fmt: on
MIN_BYTES = 500
MAX_BYTES = 200_000
MAX_LINE = 1000  # characters
MAX_DIGITS = 0.15  # share of the characters
MAX_SEEN = 0.5  # share of the lines that stood in another file
MIN_LINE = 20  # characters of a line that counts for that
LEAST_PACKAGES = 22  # none gets more than this part of the corpus
TRACK = """\
tracks:
  debian:
    files: "{folder}/*.jsonl"
    vocab_size: 8192
    seq_len: 2048
    val_tokens: 4194304
"""


class Apt:
    """apt-get with lists and sources of its own: it needs no root, and changes nothing in the system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (folder / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        targets = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(ORIGIN) $(SITE) $(RELEASE)", "Created-By: Packages"],
            capture_output=True,
            text=True,
            check=True,
        )
        archives = [line.rsplit(" ", 2) for line in targets.stdout.splitlines()]
        # A release with a dash is one of updates or backports: they change from week to week.
        sites = sorted(
            {
                (site, release)
                for origin, site, release in archives
                if origin in ("Debian", "Ubuntu") and "-" not in release
            }
        )
        if not sites:
            raise SystemExit("corpus: apt-get knows no archive of Debian or Ubuntu")
        lines = [f"deb-src [trusted=yes] {site} {release} main\n" for site, release in sites]
        (folder / "sources.list").write_text("".join(lines))
        self.run("update")

    def run(self, *arguments: str, cwd: Path | None = None) -> None:
        """Run apt-get.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        options = {
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
            "Dir::Etc::SourceList": self.folder / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State::Lists": self.folder / "lists",
            "Dir::Cache": self.folder / "cache",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        subprocess.run(["apt-get", "-qq", *words, *arguments], cwd=cwd, check=True, capture_output=True)

    def source(self, package: str, into: Path) -> list[Path]:
        """Download a source package. Returns its archives of original text."""
        self.run("source", "--download-only", package, cwd=into)
        return sorted(path for path in into.iterdir() if re.search(r"\.orig.*\.tar\.\w+$", path.name))


class LinesSeen:
    """The lines of all files so far, as a bit for each CRC-32: one line in a hundred is mistaken for seen."""

    def __init__(self) -> None:
        self.bits = bytearray(2**29)

    def share(self, lines: list[int]) -> float:
        """Return the share of the lines that were seen before."""
        return sum(self.bits[line >> 3] >> (line & 7) & 1 for line in lines) / max(1, len(lines))

    def add(self, lines: list[int]) -> None:
        for line in lines:
            self.bits[line >> 3] |= 1 << (line & 7)


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files of an archive that may be text, as (path, content), in the archive's order."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if (
                member.isfile()
                and Path(member.name).suffix.lower() in ENDINGS
                and MIN_BYTES <= member.size <= MAX_BYTES
            ):
                file = tar.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def is_text(content: bytes) -> bool:
    """Return whether a file is text that somebody wrote, not data."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return False
    digits = sum(map(text.count, "0123456789"))
    return digits <= MAX_DIGITS * len(text) and max(map(len, text.splitlines())) <= MAX_LINE


def sample(archives: list[Path], share: int) -> list[tuple[str, bytes]]:
    """Return files of a package of `share` bytes in all, chosen by the hash of their path, sorted by path."""
    heap: list[tuple[int, str, bytes]] = []  # the largest hash first: it leaves first
    total = 0
    for archive in archives:
        for name, content in members(archive):
            if not is_text(content):
                continue
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
            heapq.heappush(heap, (-key, name, content))
            total += len(content)
            while total > share:
                total -= len(heapq.heappop(heap)[2])
    return sorted((name, content) for _, name, content in heap)


def checksums(content: bytes) -> list[int]:
    """Return a number for each line that says something."""
    lines = {line.strip() for line in content.splitlines()}
    return [zlib.crc32(line) for line in lines if len(line) >= MIN_LINE]


def write_package(files: list[tuple[str, bytes]], seen: LinesSeen, out: Path) -> int:
    """Write the files that are no copies, a document a line. Returns their bytes."""
    written = 0
    part = out.with_suffix(".part")
    with part.open("w") as f:
        for _, content in files:
            lines = checksums(content)
            if seen.share(lines) <= MAX_SEEN:
                f.write(json.dumps({"text": content.decode()}) + "\n")
                written += len(content)
            seen.add(lines)
    part.rename(out)
    return written


def read_again(path: Path, seen: LinesSeen) -> int:
    """Note the lines of a package that an earlier call wrote. Returns its bytes."""
    total = 0
    with path.open() as f:
        for line in f:
            content = json.loads(line)["text"].encode()
            seen.add(checksums(content))
            total += len(content)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=1600, help="of text, at most")
    parser.add_argument("--packages", nargs="+", default=PACKAGES)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    share = asked.megabytes * 10**6 // LEAST_PACKAGES
    seen = LinesSeen()
    total = 0
    apt = Apt(folder / "apt")
    for package in asked.packages:
        out = folder / f"{package}.jsonl"
        if out.exists():
            size = read_again(out, seen)
        else:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                try:
                    archives = apt.source(package, Path(scratch))
                except subprocess.CalledProcessError as error:
                    reasons = [line for line in error.stderr.decode().splitlines() if line.startswith("E:")]
                    print(f"{package}: left out: {' '.join(reasons[:1])}", flush=True)
                    continue
                size = write_package(sample(archives, share), seen, out)
        total += size
        print(f"{package:24} {size / 1e6:7.1f} MB   {total / 1e6:7.0f} MB in all", flush=True)
        if total >= asked.megabytes * 10**6:
            break
    (folder / "track.yaml").write_text(TRACK.format(folder=folder))
    print(f"corpus_bytes: {total}")


if __name__ == "__main__":
    sys.exit(main())
