"""Packs that are killed or find no room: whatever was left, the same command finishes with the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from disk import make_room, small_disk
from tiny_celeba import add_options, write_source

WORKERS = (2, 1, 1) * 8  # of the packs that are killed; every worker takes a second to start


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    source = write_source(tmp_path_factory.mktemp("interrupted") / "source", 240)
    add_options(source, 240)
    return source


def command(source, dst, workers):
    words = ("pack", "celeba", source, dst, "--shard-mb=0.002", f"--workers={workers}")
    return [sys.executable, "-m", "shards", *map(str, words)]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def expected(source):
    """What an uninterrupted pack writes: a shard for every image."""
    dst = source.with_name("uninterrupted")
    subprocess.run(command(source, dst, 1), check=True, capture_output=True)
    assert len(list(dst.glob("*.tar"))) == 240
    return contents(dst)


def records(dst):
    return len(list(dst.glob(".*.record"))) if dst.exists() else 0


SERVER = """
import json, os, sys
from shards.__main__ import main
if __name__ == "__main__":
    for line in sys.stdin:
        if not (pid := os.fork()):
            os.setpgid(0, 0)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os._exit(main(json.loads(line)))
        os.setpgid(pid, pid)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """Starts `python -m shards` in a group of its own, with the seconds of its imports behind it; (pid, wait)."""
    (tmp_path / "server.py").write_text(SERVER)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, str(tmp_path / "server.py")], **pipes) as server:

        def start(words):
            server.stdin.write(json.dumps(words[3:]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline()), lambda: int(server.stdout.readline())

        yield start


def kill_while_it_writes(start, words, dst, moment):
    """Kill the whole group of a pack so many seconds after it has recorded another shard; whether it was in time."""
    before, deadline = records(dst), time.monotonic() + 60
    group, wait = start(words)
    while records(dst) == before and not (dst / "manifest.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(moment)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    return wait() == -signal.SIGKILL


def test_after_24_kills_at_random_moments_the_set_is_byte_for_byte_that_of_an_uninterrupted_pack(
    source, expected, start
):
    dst, moments, kills = source.with_name("killed"), random.Random(0), 0

    def finish():
        subprocess.run(command(source, dst, 2), check=True, capture_output=True)
        assert contents(dst) == expected

    for workers in WORKERS:
        before = records(dst)
        kills += kill_while_it_writes(start, command(source, dst, workers), dst, moments.uniform(0, 0.03))
        if (dst / "manifest.json").exists():
            finish()
            shutil.rmtree(dst)
        else:
            assert records(dst) > before
    finish()
    assert kills >= 20


@pytest.mark.parametrize("workers", [1, 2])
def test_on_a_full_disk_one_line_names_the_file_and_with_room_the_same_command_finishes(
    source, expected, tmp_path, workers
):
    dst = tmp_path / "disk" / "set"
    with small_disk(tmp_path / "disk", 400):
        done = subprocess.run(command(source, dst, workers), capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(f"shards: {dst}/")
        assert done.stderr.endswith(": No space left on device\n")
        assert done.stderr.count("\n") == 1
        left = contents(dst)
        assert {name: data for name, data in left.items() if name.endswith(".tar")}.items() <= expected.items()
        assert not any(name == "manifest.json" or name.endswith(".part") for name in left)
        assert sum(name.endswith(".tar") for name in left) > 10
        make_room(tmp_path / "disk")
        subprocess.run(command(source, dst, workers), check=True, capture_output=True)
        assert contents(dst) == expected
