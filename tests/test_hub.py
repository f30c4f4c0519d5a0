"""Loading from the Hugging Face hub, against a local server with the hub's layout."""

import errno
import hashlib
import io
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest
from test_prepare import words

import prepare
from prepare import UserError

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Serves the dataset acme/corpus as the hub does.

    Attributes:
        files: {name: bytes}.
        log: (method, path, Range header) of every request.
        cut_once: names of files whose next download breaks off halfway.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {}
        self.log = []
        self.cut_once = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()

    def parquet(self, name, texts, column="text", ballast=0):
        """Add a shard. ballast: bytes of another column, which does not compress."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {column: texts}
        if ballast:
            columns["blob"] = [os.urandom(ballast // len(texts)) for _ in texts]
        out = io.BytesIO()
        pq.write_table(pa.table(columns), out)
        self.files[name] = out.getvalue()


class HubHandler(BaseHTTPRequestHandler):
    """Answers the listing of the files, and the files with ranges and ETags."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.server.log.append((self.command, path, self.headers.get("Range")))
        name = path.removeprefix("/datasets/acme/corpus/resolve/").partition("/")[2]
        if path.startswith("/api/datasets/acme/corpus"):
            self.answer_listing(path)
        elif not path.startswith("/datasets/acme/corpus/"):
            self.answer(404, {"X-Error-Code": "RepoNotFound"}, b"no")
        elif name not in self.server.files:
            self.answer(404, {"X-Error-Code": "EntryNotFound"}, b"no")
        else:
            self.answer_file(name)

    def answer_listing(self, path):
        files = self.server.files
        body = {"id": "acme/corpus", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        if "/tree/" in path:
            body = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def answer_file(self, name):
        data = self.server.files[name]
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        cut = self.command == "GET" and name in self.server.cut_once
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.answer(206, headers, data[start:], cut)
        else:
            self.answer(200, headers, data, cut)
        if cut:
            self.server.cut_once.discard(name)

    def answer(self, status, headers, body, cut=False):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True


def numbered(shard, count=2500):
    """Documents of a shard, each with a name of its own: "s1d0 ...", "s1d1 ..."."""
    return [f"s{shard}d{i} {words(10000 * shard + i, 12)}" for i in range(count)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with three shards, and this process pointed at it."""
    import huggingface_hub.constants as constants

    server = Hub()
    for shard in range(3):
        server.parquet(f"shard_{shard:05}.parquet", numbered(shard))
    server.files["README.md"] = b"a card"
    cache = str(tmp_path / "hf" / "hub")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", cache)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AUTORESEARCH_CONFIG", str(tmp_path / "platforms.yaml"))
    url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.stop()


def track(tmp_path, **settings):
    values = {
        "hub": "acme/corpus",
        "data_files": "shard_*.parquet",
        "train_shards": 2,
        "val_shard": 2,
        "vocab_size": 300,
        "seq_len": 32,
        "val_tokens": 640,
        **settings,
    }
    (tmp_path / "platforms.yaml").write_text(json.dumps({"tracks": {"remote": values}}))
    return prepare.load_tracks()["remote"]


def text_of(prepared, split):
    encoding = prepared.encoding()
    return "".join(
        encoding.decode([int(t) for t in row if t != prepared.bos]) for row in prepared.rows(split)
    )


@pytest.mark.parametrize("pack", ["split", "crop"])
def test_shards_and_the_pinned_validation_shard(hub, tmp_path, pack):
    prepared = prepare.prepare_track(track(tmp_path, pack=pack))
    train, val, sealed = (text_of(prepared, split) for split in ("train", "val", "sealed"))
    assert "s0d" in train and "s1d" in train and "s2d" not in train
    for held_out in (val, sealed):
        assert "s2d" in held_out and "s0d" not in held_out and "s1d" not in held_out
    assert not set(re.findall(r"s2d\d+ ", val)) & set(re.findall(r"s2d\d+ ", sealed))
    assert len(prepared.rows("val")) == len(prepared.rows("sealed")) == 20
    hub.log.clear()
    prepare.prepare_track(track(tmp_path, pack=pack))
    assert hub.log == []  # what is prepared needs no network


def test_a_training_shard_that_repeats_held_out_documents(hub, tmp_path):
    hub.parquet("shard_00001.parquet", numbered(2)[::2] + numbered(1, 1000))
    text = text_of(prepare.prepare_track(track(tmp_path)), "train")
    assert "s1d" in text and "s2d" not in text


def test_a_dataset_without_a_validation_shard_is_split_by_document(hub, tmp_path):
    prepared = prepare.prepare_track(track(tmp_path, train_shards=0, val_shard=-1))
    assert len(prepared.rows("sealed")) == 20


def test_a_cut_download_is_resumed(hub, tmp_path):
    name = "shard_00001.parquet"
    hub.parquet(name, numbered(1, 300), ballast=24_000_000)  # the client keeps whole chunks of 10 MB
    hub.cut_once.add(name)
    try:
        prepared = prepare.prepare_track(track(tmp_path))
    except UserError as error:
        assert "run again to resume" in str(error)
        assert not list((tmp_path / "cache").glob("remote-*[!k]"))
        prepared = prepare.prepare_track(track(tmp_path))
    assert "s1d" in text_of(prepared, "train")
    assert hub.cut_once == set()
    ranges = [asked for method, path, asked in hub.log if method == "GET" and path.endswith(name)]
    assert any(ranges), "no request asked for the rest only"


def test_a_file_that_vanished(hub, tmp_path, monkeypatch):
    wanted = track(tmp_path)
    listing = prepare.list_hub_files(wanted)
    monkeypatch.setattr(prepare, "list_hub_files", lambda t: listing)
    del hub.files["shard_00000.parquet"]
    with pytest.raises(UserError, match="hub has no file acme/corpus/shard_00000.parquet"):
        prepare.prepare_track(wanted)


def test_an_unknown_dataset(hub, tmp_path):
    with pytest.raises(UserError, match="hub has no dataset acme/nothing"):
        prepare.prepare_track(track(tmp_path, hub="acme/nothing"))


@pytest.mark.slow  # the hub's client tries several times
def test_a_server_that_is_down(hub, tmp_path):
    hub.stop()
    with pytest.raises(UserError, match="cannot reach the hub.*pysource"):
        prepare.prepare_track(track(tmp_path))
    assert not [p for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")]


def test_a_missing_text_column(hub, tmp_path):
    hub.parquet("shard_00000.parquet", ["x"], column="body")
    with pytest.raises(UserError, match="no column 'text'"):
        prepare.prepare_track(track(tmp_path))


def test_a_validation_shard_that_does_not_exist(hub, tmp_path):
    with pytest.raises(UserError, match="val_shard 7, but acme/corpus has 3"):
        prepare.prepare_track(track(tmp_path, val_shard=7))


def test_a_full_disk_while_downloading(hub, tmp_path):
    with (
        pytest.raises(UserError, match="no space left while downloading acme/corpus/a.txt.*HF_HOME"),
        prepare.hub_errors(track(tmp_path), "a.txt"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
