"""Loading from the Hugging Face hub, against a local server with the hub's layout."""

import hashlib
import io
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest

import prepare
from prepare import UserError
from test_prepare import words

COMMIT = "c" * 40


class Hub:
    """Serves datasets/acme/corpus: the listing of its files, and the files with ranges and ETags."""

    def __init__(self):
        self.files, self.log, self.cut_once = {}, [], set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                self.do_GET(body=False)

            def do_GET(self, body=True):
                path = unquote(urlparse(self.path).path)
                hub.log.append((self.command, path, self.headers.get("Range")))
                if path.startswith("/api/datasets/acme/corpus"):
                    entries = [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in hub.files.items()]
                    info = {"id": "acme/corpus", "sha": COMMIT, "siblings": [{"rfilename": n} for n in hub.files]}
                    return self.answer(json.dumps(entries if "/tree/" in path else info).encode(), "application/json", body)
                name = path.removeprefix("/datasets/acme/corpus/resolve/").partition("/")[2]
                if not path.startswith("/datasets/acme/corpus/") or name not in hub.files:
                    missing = "EntryNotFound" if path.startswith("/datasets/acme/corpus/") else "RepoNotFound"
                    return self.answer(b"no", "text/plain", body, 404, {"X-Error-Code": missing})
                data, start, status, more = hub.files[name], 0, 200, {}
                if self.headers.get("Range", "").startswith("bytes="):
                    start = int(self.headers["Range"][6:].split("-")[0])
                    status, more = 206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
                more |= {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                cut = name in hub.cut_once and body and self.command == "GET"
                self.answer(data[start:], "application/octet-stream", body, status, more, cut)
                if cut:
                    hub.cut_once.discard(name)

            def answer(self, data, kind, body, status=200, more=(), cut=False):
                self.send_response(status)
                for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **dict(more)}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body and self.command == "GET":
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                    if cut:
                        self.wfile.flush()
                        self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def parquet(self, name, texts, column="text", ballast=0):
        """A shard; ballast: bytes of another column, which does not compress."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        out = io.BytesIO()
        more = {"blob": [os.urandom(ballast // len(texts)) for _ in texts]} if ballast else {}
        pq.write_table(pa.table({column: texts, **more}), out)
        self.files[name] = out.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with three shards, and this process pointed at it."""
    import huggingface_hub.constants as constants

    server = Hub()
    for shard in range(3):
        server.parquet(f"shard_{shard:05}.parquet", [f"s{shard}d{i} {words(10000 * shard + i, 12)}" for i in range(2500)])
    server.files["README.md"] = b"a card"
    for name, value in {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
                        "AUTORESEARCH_CACHE": str(tmp_path / "cache"), "AUTORESEARCH_CONFIG": str(tmp_path / "platforms.yaml")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.server.shutdown()
    server.server.server_close()


def track(tmp_path, **settings):
    values = {"hub": "acme/corpus", "data_files": "shard_*.parquet", "train_shards": 2, "val_shard": 2,
              "vocab_size": 300, "seq_len": 32, "val_tokens": 640, **settings}
    (tmp_path / "platforms.yaml").write_text(json.dumps({"tracks": {"remote": values}}))
    return prepare.load_tracks()["remote"]


def text_of(prepared, split):
    encoding = prepared.encoding()
    return "".join(encoding.decode([int(t) for t in row if t != prepared.bos]) for row in prepared.rows(split))


@pytest.mark.parametrize("pack", ["split", "crop"])
def test_shards_and_the_pinned_validation_shard(hub, tmp_path, pack):
    prepared = prepare.prepare(track(tmp_path, pack=pack))
    assert "s0d" in text_of(prepared, "train") and "s1d" in text_of(prepared, "train") and "s2d" not in text_of(prepared, "train")
    assert "s2d" in text_of(prepared, "val") and "s0d" not in text_of(prepared, "val") and "s1d" not in text_of(prepared, "sealed")
    held_out = {split: set(re.findall(r"s2d\d+ ", text_of(prepared, split))) for split in ("val", "sealed")}
    assert held_out["val"] and held_out["sealed"] and not held_out["val"] & held_out["sealed"]
    assert len(prepared.rows("val")) == 20
    hub.log.clear()
    prepare.prepare(track(tmp_path, pack=pack))
    assert hub.log == []  # what is prepared needs no network


def test_a_training_shard_that_repeats_held_out_documents(hub, tmp_path):
    texts = [f"s2d{i} {words(20000 + i, 12)}" for i in range(2500)]
    hub.parquet("shard_00001.parquet", texts[::2] + [f"s1d{i} {words(10000 + i, 12)}" for i in range(1000)])
    text = text_of(prepare.prepare(track(tmp_path)), "train")
    assert "s1d" in text and "s2d" not in text


def test_a_dataset_without_a_validation_shard_is_split_by_document(hub, tmp_path):
    prepared = prepare.prepare(track(tmp_path, train_shards=0, val_shard=-1))
    assert len(prepared.rows("sealed")) == 20


def test_a_cut_download_is_resumed(hub, tmp_path):
    name = "shard_00001.parquet"
    hub.parquet(name, [f"s1d{i} {words(i, 12)}" for i in range(300)], ballast=24_000_000)  # the client keeps whole chunks of 10 MB
    hub.cut_once.add(name)
    try:
        prepared = prepare.prepare(track(tmp_path))
    except UserError as error:
        assert "run again to resume" in str(error)
        assert not list((tmp_path / "cache").glob("remote-*[!k]"))
        prepared = prepare.prepare(track(tmp_path))
    assert "s1d" in text_of(prepared, "train")
    assert hub.cut_once == set()
    assert [r for command, path, r in hub.log if command == "GET" and path.endswith(name) and r], "no request asked for the rest only"


def test_a_file_that_vanished(hub, tmp_path, monkeypatch):
    wanted = track(tmp_path)
    listing = prepare.list_hub_files(wanted)
    monkeypatch.setattr(prepare, "list_hub_files", lambda t: listing)
    del hub.files["shard_00000.parquet"]
    with pytest.raises(UserError, match="hub has no file acme/corpus/shard_00000.parquet"):
        prepare.prepare(wanted)


def test_an_unknown_dataset(hub, tmp_path):
    with pytest.raises(UserError, match="hub has no dataset acme/nothing"):
        prepare.prepare(track(tmp_path, hub="acme/nothing"))


@pytest.mark.slow  # the hub's client tries several times
def test_a_server_that_is_down(hub, tmp_path):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(UserError, match="cannot reach the hub.*pysource"):
        prepare.prepare(track(tmp_path))
    assert not [p for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")]


def test_a_missing_text_column(hub, tmp_path):
    hub.parquet("shard_00000.parquet", ["x"], column="body")
    with pytest.raises(UserError, match="no column 'text'"):
        prepare.prepare(track(tmp_path))


def test_a_validation_shard_that_does_not_exist(hub, tmp_path):
    with pytest.raises(UserError, match="val_shard 7, but acme/corpus has 3"):
        prepare.prepare(track(tmp_path, val_shard=7))
