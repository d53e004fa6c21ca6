import errno
import fcntl
import hashlib
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from http_server import Server, serving

from shards import files, lock
from shards.manifest import File, ShardError
from shards.remote import ahead, fetch, protocols, room
from shards.remote.cache import Cache

SIZE = 20_000
PREAMBLE = """
import sys
from pathlib import Path
from shards.remote import fetch, room, protocols
from shards.remote.cache import Cache
from shards.manifest import File
fetch.BACKOFF, room.PAUSE = 0.001, 0.01
def file(name):
    size, sha256 = (Path(sys.argv[2]) / name).read_text().split()
    return File(name=name, bytes=int(size), sha256=sha256)
url, limit = sys.argv[1], int(sys.argv[3]) or None
cache = Cache(Path(sys.argv[4]), limit)
"""


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF", 0.001)
    monkeypatch.setattr(protocols, "STALL", 20)
    monkeypatch.setattr(room, "GRACE", 0.2)
    monkeypatch.setattr(room, "PAUSE", 0.01)
    monkeypatch.setattr(ahead, "PAUSE", 0.01)


class Set:
    """Files of `SIZE` random bytes on a server, and a folder for a cache of them."""

    def __init__(self, server: Server, tmp_path: Path, count: int) -> None:
        self.server, self.folder, self.described = server, tmp_path / "cache", tmp_path / "described"
        self.described.mkdir()
        self.files = []
        for number in range(count):
            name, data = f"a-{number}.tar", random.Random(number).randbytes(SIZE)
            self.files.append(File(name=name, bytes=SIZE, sha256=hashlib.sha256(data).hexdigest()))
            (self.described / name).write_text(f"{SIZE} {self.files[-1].sha256}")
            server.files[f"/{name}"] = data

    def url(self, file: File) -> str:
        return f"{self.server.url}/{file.name}"

    def get(self, cache: Cache, file: File) -> Path:
        """Gets a file, releases nothing, and checks it."""
        path = cache.get(self.url(file), file)
        assert path.read_bytes() == self.server.files[f"/{file.name}"]
        return path

    def cache(self, files: int | None = None, said: list[str] | None = None) -> Cache:
        """A cache with room for that many files; it says nothing unless asked."""
        limit = None if files is None else files * SIZE
        return Cache(self.folder, limit, (lambda line: None) if said is None else said.append)

    def run(self, script: str, files: int = 0) -> subprocess.Popen:
        """A process with a cache; it gets files by file(name) from url."""
        words = [self.server.url, self.described, files * SIZE, self.folder]
        command = [sys.executable, "-W", "error", "-c", PREAMBLE + script, *map(str, words)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def held(self) -> list[str]:
        """What is in the cache, by the names of the files."""
        names = sorted(path.name.partition("-")[2] for path in self.folder.iterdir() if room.FILE.fullmatch(path.name))
        assert {path.suffix for path in self.folder.glob(".*")} <= {".lock"}
        assert [path for path in self.folder.glob(".*") if path.stat().st_size] == []
        return names

    def unused(self) -> list[Path]:
        """What is in the cache and nobody has open, not even who has just fetched it: what may be evicted."""
        free = []
        for path in self.folder.glob("[!.]*"):
            with path.open("rb") as stream, lock.attempt(self.folder / f".{path.name}.lock") as idle:
                free += [path] if idle and lock.try_lock(stream, path) else []
        return free


def test_four_processes_download_each_file_once_from_a_server_that_fails_twice(server, tmp_path):
    many = Set(server, tmp_path, 6)
    for file in many.files:
        server.faults[f"/{file.name}"].extend(["503", "short"])
    script = """
from hashlib import sha256
print("ready", flush=True)
input()
for number in range(6):
    name = f"a-{number}.tar"
    print(sha256(cache.get(f"{url}/{name}", file(name)).read_bytes()).hexdigest())
cache.close()
"""
    processes = [many.run(script) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate()[0].split() == [file.sha256 for file in many.files]
        assert process.returncode == 0
    assert set(server.wholes.values()) == {1}
    assert set(server.gets.values()) == {3}
    assert len(server.gets) == len(many.held()) == 6


def test_another_process_takes_over_from_a_downloader_that_was_killed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0)
    one = Set(server, tmp_path, 1)
    server.faults["/a-0.tar"].append("stall")
    downloader = one.run("protocols.STALL = 1000\ncache.get(f'{url}/a-0.tar', file('a-0.tar'))")
    assert server.stalling.wait(30)
    said = []

    def kill(line):
        said.append(line)
        assert [path.suffix for path in one.folder.glob(".*.part")] == [".part"]
        downloader.kill()

    with closing(Cache(one.folder, SIZE, kill)) as cache:
        one.get(cache, one.files[0])
    assert downloader.wait() == -signal.SIGKILL
    downloader.communicate()
    assert "waiting for another process or thread of this node" in said[0]
    assert one.held() == ["a-0.tar"]


def test_what_a_killed_downloader_has_left_is_removed_even_if_nobody_needs_it(server, tmp_path):
    one = Set(server, tmp_path, 1)
    server.faults["/a-0.tar"].append("stall")
    downloader = one.run("protocols.STALL = 1000\ncache.get(f'{url}/a-0.tar', file('a-0.tar'))")
    assert server.stalling.wait(30)
    one.cache().close()
    assert len(list(one.folder.glob(".*.part"))) == 1  # of one that lives
    downloader.kill()
    downloader.communicate()
    one.cache().close()
    assert one.held() == []


def test_a_file_that_stays_bad_is_one_line_and_nothing_is_kept(server, tmp_path):
    one = Set(server, tmp_path, 1)
    server.faults["/a-0.tar"].extend(["wrong"] * 7)
    with closing(one.cache(1)) as cache:
        with pytest.raises(ShardError, match=r"^http.*/a-0\.tar: other bytes came.*gave up after 6 tries; [^\n]*$"):
            one.get(cache, one.files[0])
        assert one.held() == []
        one.get(cache, one.files[0])  # the seventh is wrong too, but there is a next one


def test_a_byte_that_flips_on_the_disk_is_noticed_by_the_next_process(server, tmp_path):
    one = Set(server, tmp_path, 1)
    said: list[str] = []
    for spoiled in (bytes(SIZE), b"short"):
        with closing(one.cache()) as cache:
            path = one.get(cache, one.files[0])
        path.write_bytes(spoiled)
        with closing(one.cache(said=said)) as cache:
            one.get(cache, one.files[0])
    assert said == [f"{path}: its bytes have changed on the disk; fetching it again"] * 2
    assert server.gets["/a-0.tar"] == 3


def test_the_file_used_longest_ago_makes_room(server, tmp_path):
    many = Set(server, tmp_path, 4)
    a, b, c, d = many.files
    with closing(many.cache(3)) as cache:
        for file in (a, b, c, a):
            many.get(cache, file)
            cache.release(file)
        many.get(cache, d)
    assert many.held() == ["a-0.tar", "a-2.tar", "a-3.tar"]
    assert server.gets["/a-0.tar"] == 1


def test_a_file_that_another_process_uses_makes_no_room(server, tmp_path):
    many = Set(server, tmp_path, 4)
    b, c, d = many.files[1:]
    script = "cache.get(f'{url}/a-0.tar', file('a-0.tar'))\nprint('ready', flush=True)\ninput()\ncache.close()"
    user = many.run(script, files=2)
    assert user.stdout.readline() == "ready\n"
    with closing(many.cache(2)) as cache:
        for file in (b, c):
            many.get(cache, file)
            cache.release(file)
        assert many.held() == ["a-0.tar", "a-2.tar"]
        many.get(cache, c)
        match = rf"no room for {d.sha256[:16]}-a-3\.tar, 20,000 bytes: 40,000 of the limit of 40,000 bytes are in use; "
        with pytest.raises(ShardError, match=match):
            many.get(cache, d)
        assert many.held() == ["a-0.tar", "a-2.tar"]
        user.kill()  # the kernel releases what it used
        user.communicate()
        many.get(cache, d)
        assert many.held() == ["a-2.tar", "a-3.tar"]


def test_a_file_that_somebody_is_about_to_use_makes_no_room(server, tmp_path):
    many = Set(server, tmp_path, 2)
    with closing(many.cache(1)) as cache:
        path = many.get(cache, many.files[0])
        cache.release(many.files[0])
        with lock.exclusive(many.folder / f".{path.name}.lock", print), pytest.raises(ShardError, match="are in use"):
            many.get(cache, many.files[1])
        assert many.held() == ["a-0.tar"]
        many.get(cache, many.files[1])


def test_a_file_larger_than_the_limit_pushes_nothing_out(server, tmp_path):
    many = Set(server, tmp_path, 2)
    with closing(many.cache(1)) as cache:
        many.get(cache, many.files[0])
        cache.release(many.files[0])
    match = r"a-1\.tar has 20,000 bytes, the limit is 19,999; raise it"
    with closing(Cache(many.folder, SIZE - 1)) as cache, pytest.raises(ShardError, match=match):
        many.get(cache, many.files[1])
    assert many.held() == ["a-0.tar"]


def test_many_processes_keep_within_the_limit_and_never_lose_a_file_they_use(server, tmp_path):
    many = Set(server, tmp_path, 12)
    script = """
import random
from hashlib import sha256
chance = random.Random()
for _ in range(40):
    name = f"a-{chance.randrange(12)}.tar"
    path = cache.get(f"{url}/{name}", file(name))
    for _ in range(3):
        assert sha256(path.read_bytes()).hexdigest() == file(name).sha256
    cache.release(file(name))
cache.close()
"""
    processes = [many.run(script, files=5) for _ in range(3)]
    most = 0
    while any(process.poll() is None for process in processes):
        sizes = []
        for path in many.folder.glob("*"):
            try:
                sizes.append(0 if path.suffix == ".lock" else path.stat().st_size)
            except FileNotFoundError:
                continue
        most = max(most, sum(sizes))
        time.sleep(0.002)
    for process in processes:
        assert process.communicate()[0] == ""
        assert process.returncode == 0
    assert 4 * SIZE <= most <= 5 * SIZE
    assert len(many.held()) == 5


def test_prefetching_keeps_the_order(server, tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "THREADS", 1)
    many = Set(server, tmp_path, 6)
    order = [many.files[number] for number in (3, 1, 5, 0, 4, 2)]
    with closing(many.cache()) as cache:
        cache.prefetch([(many.url(file), file) for file in order[:4]])
        cache.prefetch([(many.url(file), file) for file in order[4:]])
        wait(lambda: len(many.held()) == 6)
        assert server.order == [f"/{file.name}" for file in order]
        for file in order:
            many.get(cache, file)
    assert set(server.gets.values()) == {1}


def test_prefetched_files_do_not_push_out_one_another(server, tmp_path):
    many = Set(server, tmp_path, 12)
    with closing(many.cache(4)) as cache:
        cache.prefetch([(many.url(file), file) for file in many.files])
        wait(lambda: len(many.held()) == 4)
        for file in many.files:
            many.get(cache, file)
            assert len(list(many.folder.glob("[!.]*"))) <= 4
            cache.release(file)
    assert set(server.gets.values()) == {1}


def test_a_file_that_is_needed_now_does_not_wait_for_those_that_are_needed_later(server, tmp_path):
    many = Set(server, tmp_path, 6)
    with closing(many.cache(3)) as cache:
        cache.prefetch([(many.url(file), file) for file in many.files])
        wait(lambda: len(many.unused()) == 3)
        many.get(cache, many.files[5])
        assert many.held() == ["a-0.tar", "a-1.tar", "a-5.tar"]  # the one needed last made room
        cache.release(many.files[5])
        for file in many.files[:5]:
            many.get(cache, file)
            cache.release(file)


def test_what_goes_wrong_in_the_background_is_raised_where_the_file_is_needed(server, tmp_path):
    many = Set(server, tmp_path, 3)
    server.faults["/a-1.tar"].extend(["wrong"] * 6)
    with closing(many.cache()) as cache:
        cache.prefetch([(many.url(file), file) for file in many.files])
        wait(lambda: server.gets["/a-1.tar"] == 6 and many.held() == ["a-0.tar", "a-2.tar"])
        many.get(cache, many.files[0])
        with pytest.raises(ShardError, match=r"/a-1\.tar: other bytes came"):
            many.get(cache, many.files[1])
        assert server.gets["/a-1.tar"] == 6
        many.get(cache, many.files[1])  # once raised it is forgotten
        many.get(cache, many.files[2])


@pytest.mark.parametrize(("fault", "stall"), [("drip", 1000), ("503", 1000), ("stall", 0.5), ("silent", 0.5)])
def test_closing_ends_the_threads_whatever_they_do(server, tmp_path, monkeypatch, fault, stall):
    monkeypatch.setattr(fetch, "BACKOFF", 1000)
    monkeypatch.setattr(protocols, "STALL", stall)
    many = Set(server, tmp_path, 6)
    for file in many.files:
        server.faults[f"/{file.name}"].extend([fault] * 6)
    cache = many.cache()
    cache.prefetch([(many.url(file), file) for file in many.files])
    wait(lambda: len(server.gets) == ahead.THREADS)
    since = time.monotonic()
    cache.close()
    assert time.monotonic() - since < 10
    assert [thread for thread in threading.enumerate() if thread.name == "fetch"] == []
    assert many.held() == []


def test_an_interpreter_ends_well_while_files_are_fetched(server, tmp_path):
    many = Set(server, tmp_path, 6)
    for file in many.files:
        server.faults[f"/{file.name}"].append("drip")
    process = many.run("cache.prefetch([(f'{url}/a-{n}.tar', file(f'a-{n}.tar')) for n in range(6)])\ninput()")
    wait(lambda: len(server.gets) == ahead.THREADS)
    process.communicate("\n", timeout=10)
    assert process.returncode == 0
    assert many.held() == []


def test_a_full_disk_is_one_line_and_leaves_no_half_file(server, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    one = Set(server, tmp_path, 1)
    monkeypatch.setattr(files.os, "fsync", full)
    with closing(one.cache()) as cache:
        match = r"^\S*-a-0\.tar: cannot be written \(No space left on device\); make room or name another folder$"
        with pytest.raises(ShardError, match=match):
            one.get(cache, one.files[0])
    assert one.held() == []


def test_a_folder_that_cannot_be_a_cache_is_one_line(server, tmp_path, monkeypatch):
    one = Set(server, tmp_path, 1)
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "cache")
    with pytest.raises(ShardError, match=r"lock: cannot be written \(Not a directory\); name a folder of your own$"):
        cache.get(one.url(one.files[0]), one.files[0])

    def unlocked(stream, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unlocked)
    match = r"lock: this file system has no locks \(No locks available\); name a folder on a disk of this node$"
    with pytest.raises(ShardError, match=match):
        one.cache().get(one.url(one.files[0]), one.files[0])
    assert server.gets == {}


def test_a_name_never_leads_out_of_the_cache(server, tmp_path):
    one = Set(server, tmp_path, 1)
    (file,) = one.files
    with closing(one.cache()) as cache:
        path = cache.get(one.url(file), File(name="../../a.tar", bytes=SIZE, sha256=file.sha256))
        assert path == one.folder / f"{file.sha256[:16]}-a.tar"
        with pytest.raises(ShardError, match="is not a sha256"):
            cache.get(one.url(file), File(name="a.tar", bytes=SIZE, sha256="../../../../" + file.sha256))


def wait(condition) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            if condition():
                return
        except (AssertionError, FileNotFoundError):  # of `held`: something is still being written
            pass
        assert time.monotonic() < deadline
        time.sleep(0.005)
