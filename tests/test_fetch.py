import errno
import hashlib
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from http_server import Server, serving

from shards import files
from shards.manifest import ShardError
from shards.remote import fetch, protocols
from shards.remote.fetch import StoppedError, download, is_remote, join, refuse_pipe, set_name

DATA = os.urandom(100_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server():
    with serving() as server:
        server.files["/set/a.tar"] = DATA
        yield server


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF", 0.001)
    monkeypatch.setattr(protocols, "STALL", 20)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(protocols, "STALL", 0.4)


def get(url: str, path: Path, **kwargs) -> bytes:
    download(url, path, **{"size": len(DATA), "sha256": SHA256, **kwargs})
    return path.read_bytes()


def complaint(url: str, path: Path, **kwargs) -> str:
    """The one line of a download that fails, which leaves nothing behind."""
    with pytest.raises(ShardError) as caught:
        get(url, path, **kwargs)
    assert list(path.parent.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def faulty(server: Server, *faults: str) -> str:
    server.faults["/set/a.tar"].extend(faults)
    return f"{server.url}/set/a.tar"


def test_locations_are_urls_or_paths():
    for url in ("http://h/a", "https://h", "s3://b/k", "gs://b", "hf://datasets/u/r", "pipe:cat {name}", "ftp://h"):
        assert is_remote(url)
    for path in ("data/celeba", "/data/celeba", "~/x", "C:x", "a:b/c", "pipes"):
        assert not is_remote(path)


def test_a_set_is_called_what_its_directory_is_called_wherever_it_lies():
    places = ("data/celeba", "data/celeba/", "https://host/sets/celeba", "pipe:ssh host cat /sets/celeba/{name}")
    assert {set_name(place) for place in places} == {"celeba"}


def test_a_name_goes_into_the_path_of_a_url_and_the_query_stays():
    assert join("http://h/dir", "a.tar") == join("http://h/dir/", "a.tar") == "http://h/dir/a.tar"
    assert join("https://h/dir?token=a%2Fb&x", "a b.tar") == "https://h/dir/a%20b.tar?token=a%2Fb&x"
    assert join("s3://bucket/dir/", "a b.tar") == "s3://bucket/dir/a b.tar"
    assert join("pipe:cat /dir/{name} | cat", "a.tar") == "pipe:cat /dir/a.tar | cat"
    with pytest.raises(ShardError, match=r"^pipe:cat /dir: say where the name of a file goes"):
        join("pipe:cat /dir", "a.tar")


def test_a_name_cannot_become_a_command(tmp_path):
    name = 'it\'s $(touch evil) `touch evil`; touch evil "x"'
    (tmp_path / name).write_bytes(DATA)
    assert get(join(f"pipe:cd {tmp_path} && cat ./{{name}}", name), tmp_path / "out") == DATA
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "out"]
    for base in ("pipe:cat '{name}'", 'pipe:cat "/set/{name}"', "pipe:sh -c 'cat {name}'", "pipe:echo ' {name}"):
        with pytest.raises(ShardError, match="without quotes around it"):
            join(base, name)


def test_a_command_that_comes_from_a_file_is_refused():
    refuse_pipe("http://h/a.tar", "set.json")
    with pytest.raises(ShardError, match=r"^set\.json: names a command \(pipe:rm x\)"):
        refuse_pipe("pipe:rm x", "set.json")


@pytest.mark.parametrize("fault", ["503", "429", "silent", "stall", "short", "html", "wrong", "drip", "endless"])
def test_what_may_heal_is_tried_again(server, tmp_path, monkeypatch, impatient, fault):
    monkeypatch.setattr(fetch, "WINDOW", 0.1)
    assert get(faulty(server, fault, fault), tmp_path / "a.tar") == DATA
    assert server.gets["/set/a.tar"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


SAID = {
    "503": "status 503 Service Unavailable",
    "silent": "no byte for 0.4 seconds",
    "stall": "no byte for 0.4 seconds",
    "short": "the connection ended 50,000 bytes too early",
    "html": "a page of HTML came instead of the file",
    "wrong": rf"other bytes came, 100,000 of 100,000: sha256 \w{{16}}\.\.\. where {SHA256[:16]}\.\.\. was expected",
    "drip": r"only \d+ bytes came in 0 seconds",
    "endless": "more than 100,000 bytes came",
}


@pytest.mark.parametrize("fault", SAID)
def test_what_does_not_heal_is_one_line(server, tmp_path, monkeypatch, impatient, fault):
    monkeypatch.setattr(fetch, "WINDOW", 0.1)
    monkeypatch.setattr(fetch, "TRIES", 3)
    url = faulty(server, *[fault] * 10)
    line = complaint(url, tmp_path / "a.tar")
    assert re.fullmatch(rf"{url}: {SAID[fault]}; gave up after 3 tries; check the source, then start again", line)


def test_a_source_is_tried_six_times_unless_it_refuses(server, tmp_path):
    complaint(faulty(server, *["503"] * 10), tmp_path / "a.tar")
    assert server.gets["/set/a.tar"] == 6
    line = complaint(f"{server.url}/set/b.tar?key=secret", tmp_path / "b.tar")
    assert line.startswith(f"{server.url}/set/b.tar?...: status 404 Not Found; gave up after 2 tries; check the addr")
    assert "secret" not in line
    assert server.gets["/set/b.tar"] == 2
    assert server.queries[-1] == "key=secret"


def test_a_source_that_is_not_there_is_one_line(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar"
        assert f"{address}: [Errno 111] Connection refused; gave up after 6" in complaint(address, tmp_path / "a.tar")
    assert "a URL begins with http:" in complaint("ftp://h/a.tar", tmp_path / "a.tar")
    assert "control characters" in complaint("http://127.0.0.1/a b", tmp_path / "a.tar")


def test_the_pauses_between_tries_grow_and_differ(server, tmp_path, monkeypatch):
    pauses: list[float] = []

    class Hasty(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            return False

    monkeypatch.setattr(fetch, "BACKOFF", 1)
    assert get(faulty(server, *["503"] * 5), tmp_path / "a.tar", stopped=Hasty()) == DATA
    assert all(2**n / 2 <= pause <= 2**n * 1.5 for n, pause in enumerate(pauses)), pauses
    assert len(pauses) == len(set(pauses)) == 5


def test_endless_data_of_unknown_size_ends(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "UNKNOWN", 10**6)
    monkeypatch.setattr(fetch, "TRIES", 1)
    line = complaint(faulty(server, "endless"), tmp_path / "a.json", size=None, sha256=None)
    assert "more than 1,000,000 bytes came" in line
    assert get(f"{server.url}/set/a.tar", tmp_path / "a.json", size=None, sha256=None) == DATA


def test_a_truncated_file_of_unknown_size_is_noticed(server, tmp_path):
    assert get(faulty(server, "short"), tmp_path / "a.json", size=None, sha256=None) == DATA
    assert server.gets["/set/a.tar"] == 2


def test_a_redirect_leads_to_web_servers_only(server, tmp_path):
    (tmp_path / "in").mkdir()
    server.files["/elsewhere"] = DATA
    assert get(faulty(server, "to:/elsewhere"), tmp_path / "a.tar") == DATA
    (tmp_path / "a.tar").unlink()
    for target in (f"file://{__file__}", "ftp://127.0.0.1/a", "data:,x"):
        line = complaint(faulty(server, *[f"to:{target}"] * 6), tmp_path / "in" / "a.tar")
        assert re.search("302 .*not allowed|unknown url type", line)


def test_a_full_disk_is_one_line_and_not_tried_again(server, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    line = complaint(f"{server.url}/set/a.tar", tmp_path / "a.tar")
    assert line.startswith(f"{tmp_path / 'a.tar'}: cannot be written (No space left on device); make room")
    assert server.gets["/set/a.tar"] == 1


def test_a_download_nobody_wants_any_more_ends(server, tmp_path, monkeypatch):
    stopped = threading.Event()
    monkeypatch.setattr(fetch, "BACKOFF", 1000)
    threading.Timer(0.1, stopped.set).start()
    for fault in ("drip", "503"):  # while bytes come, and between two tries
        with pytest.raises(StoppedError):
            get(faulty(server, fault), tmp_path / "a.tar", stopped=stopped)
    assert list(tmp_path.iterdir()) == []


def test_a_command_gives_a_file(tmp_path):
    (tmp_path / "in").write_bytes(DATA)
    assert get(f"pipe:cat {tmp_path / 'in'} | cat", tmp_path / "out") == DATA


def test_a_shared_disk_gives_a_file(tmp_path):
    source = tmp_path / "a $b%20'.tar"
    source.write_bytes(DATA)
    assert get(f"file://{source}", tmp_path / "out") == DATA
    source.unlink()
    (tmp_path / "out").unlink()
    assert complaint(f"file://{source}", tmp_path / "a.tar") == (
        f"file://{source}: No such file or directory; gave up after 2 tries; check the address and your rights"
    )


def test_a_command_that_fails_is_one_line(tmp_path):
    source = tmp_path / "in"
    source.write_bytes(DATA)
    (tmp_path / "out").mkdir()
    line = complaint(f"pipe:cat {source}; echo x >> {source}.tries; exit 3", tmp_path / "out" / "a.tar")
    assert "the command failed with exit status 3; gave up after 6 tries" in line
    assert Path(f"{source}.tries").read_text() == "x\n" * 6


def test_a_command_that_falls_silent_is_killed_with_all_its_processes(tmp_path, monkeypatch, impatient):
    monkeypatch.setattr(fetch, "TRIES", 1)
    out = tmp_path / "out"
    out.mkdir()
    script = f"echo $$ > {tmp_path}/pid; head -c 1000 /dev/zero; sleep 1000 | cat"
    assert "no byte for 0.4 seconds" in complaint(f"pipe:{script}", out / "a")
    group = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5  # orphans are reaped by init, in its own time
    while time.monotonic() < deadline and _alive(group):
        time.sleep(0.01)
    assert not _alive(group)
    assert "did not end 0.4 seconds after" in complaint("pipe:exec >&-; sleep 1000", out / "a")
    assert "more than 100,000 bytes came" in complaint("pipe:cat /dev/zero", out / "a")


def _alive(group: int) -> bool:
    """Whether a process of the group runs; the zombies of a container without an init do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(pgrp) == group and state != "Z":
            return True
    return False


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert complaint("gs://bucket/a", tmp_path / "a") == "gs://bucket/a: gs:// needs a package: pip install gcsfs"
