"""Against a real server of S3 on this machine."""

import hashlib
import logging
import os
import socket

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from shards.manifest import ShardError
from shards.remote import fetch, protocols
from shards.remote.fetch import download, join

DATA = os.urandom(3 * protocols.PIECE // 2)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def account(monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF", 0.001)
    for key, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # a client goes on speaking to the server it met first


def test_an_object_is_fetched_from_any_server_of_s3(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("werkzeug"), "disabled", True)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        store = fsspec.filesystem("s3")
        store.mkdir("bucket")
        store.pipe_file("bucket/set/a b.tar", DATA)
        url = join("s3://bucket/set", "a b.tar")
        download(url, tmp_path / "a.tar", size=len(DATA), sha256=SHA256)
        assert (tmp_path / "a.tar").read_bytes() == DATA
        with pytest.raises(ShardError, match=r"^s3://bucket/set/a b\.tar: more than 100 bytes came; gave up after 6 t"):
            download(url, tmp_path / "b.tar", size=100, sha256=SHA256)
        with pytest.raises(ShardError, match=r"^s3://bucket/set/c\.tar: .*bucket/set/c\.tar; gave up after 2 tries"):
            download(join("s3://bucket/set", "c.tar"), tmp_path / "b.tar", size=100, sha256=SHA256)
    finally:
        server.stop()
    with pytest.raises(ShardError, match=r"^s3://bucket/set/a b\.tar: Could not connect .*; gave up after 6 tries"):
        download(url, tmp_path / "b.tar", size=len(DATA), sha256=SHA256)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_server_of_s3_that_never_answers_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TRIES", 2)
    monkeypatch.setattr(protocols, "STALL", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(ShardError, match=r"^s3://bucket/a: [Rr]ead timeout.*; gave up after 2 tries"):
            download("s3://bucket/a", tmp_path / "a", size=1, sha256=SHA256)
