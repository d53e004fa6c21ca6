"""From a URL to a file that is whole, has the right bytes, and lies on the disk."""

import hashlib
import itertools
import random
import re
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, urlsplit

from shards.files import replacing
from shards.manifest import ShardError
from shards.remote import protocols
from shards.remote.protocols import BrokenError, chunks, shown

TRIES = 6
TRIES_IF_REFUSED = 2  # a wrong address should be known at once, but a proxy that stumbles should not end a run
BACKOFF = 1.0  # seconds before the second try, more or less; twice as long before each further one
WINDOW = 60.0  # seconds over which a source may give fewer than RATE bytes a second
UNKNOWN = 2**26  # bytes, at most, of a file whose size nobody has told
HTML = re.compile(rb"\s*<(!doctype\s+)?html", re.IGNORECASE)
PLACE = "{name}"
_chance = random.SystemRandom()  # not the seeded one, by which all nodes would come back at the same moment


class StoppedError(Exception):
    """A download was given up because nobody wants it any more."""


def is_remote(location: str) -> bool:
    """Whether a location is a URL, of whatever kind, and not a path."""
    return re.match(r"pipe:|[a-z][a-z0-9+.-]*://", location, re.IGNORECASE) is not None


def set_name(location: str) -> str:
    """What a set is called for short: the last part of where it lies, of a command's too."""
    return location.partition("/{name}")[0].rstrip("/").rpartition("/")[2]


def refuse_pipe(url: str, origin: str) -> None:
    """ShardError if a URL that was read from `origin`, a file, is a command: only the user names those, directly."""
    if url.startswith("pipe:"):
        raise ShardError(f"{origin}: names a command ({url}); write it on the command line if it is your own")


def join(base: str, name: str) -> str:
    """The URL of the file `name` below `base`; a command has the placeholder {name} for it. ShardError if it has not.

    The query of a web address stays behind the path: http://host/set?key=1 and a.tar are http://host/set/a.tar?key=1.
    """
    if base.startswith("pipe:"):
        return _fill(base, name)
    if not base.startswith(("http://", "https://")):
        return f"{base.rstrip('/')}/{name}"  # in the other schemes every character stands for itself
    parts = urlsplit(base)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl()


def _fill(command: str, name: str) -> str:
    if PLACE not in command:
        raise ShardError(f"{command}: say where the name of a file goes: pipe:gsutil cat gs://bucket/set/{PLACE}")
    probe = "a 'b' \"$c"
    try:  # within quotes of the user's, ours would end those, and the shell would read the name
        safe = any(probe in word for word in shlex.split(command.replace(PLACE, shlex.quote(probe))))
    except ValueError:
        safe = False
    if not safe:
        raise ShardError(f"{command}: write {PLACE} without quotes around it; it gets its own")
    return command.replace(PLACE, shlex.quote(name))


def download(
    url: str, path: Path, *, size: int | None, sha256: str | None, stopped: threading.Event | None = None
) -> None:
    """Make `path` the file behind a URL, of `size` bytes and with that `sha256` (hex); None: not known.

    It takes its name once it is whole, right and on the disk; not more than `size` bytes (None: `UNKNOWN`) are ever
    written. What may heal is tried `TRIES` times. ShardError, one line, after the last; StoppedError soon after
    `stopped` is set, in the worst case after `STALL` seconds.
    """
    stopped = threading.Event() if stopped is None else stopped
    for number in itertools.count(1):
        try:
            return _try(url, path, size, sha256, stopped)
        except BrokenError as error:
            if number >= (TRIES_IF_REFUSED if error.refused else TRIES):
                cure = "check the address and your rights" if error.refused else "check the source, then start again"
                raise ShardError(f"{shown(url)}: {error}; gave up after {number} tries; {cure}") from None
        if stopped.wait(BACKOFF * 2 ** (number - 1) * _chance.uniform(0.5, 1.5)):
            raise StoppedError


def _try(url: str, path: Path, size: int | None, sha256: str | None, stopped: threading.Event) -> None:
    digest, got, limit = hashlib.sha256(), 0, UNKNOWN if size is None else size
    try:
        with replacing(path) as stream, closing(chunks(url)) as source:
            for chunk in _brisk(source):
                if stopped.is_set():
                    raise StoppedError
                if not got and HTML.match(chunk):
                    raise BrokenError("a page of HTML came instead of the file")
                got += len(chunk)
                if got > limit:
                    raise BrokenError(f"more than {limit:,} bytes came")
                digest.update(chunk)
                stream.write(chunk)
            if size is not None and got != size:
                raise BrokenError(f"{got:,} of {size:,} bytes came")
            if sha256 is not None and digest.hexdigest() != sha256:
                is_not = f"sha256 {digest.hexdigest()[:16]}... where {sha256[:16]}... was expected"
                raise BrokenError(f"other bytes came, {got:,} of {limit:,}: {is_not}")
    except OSError as error:  # of the disk: those of the source are BrokenErrors
        raise ShardError(f"{path}: cannot be written ({error.strerror}); make room or name another folder") from None


def _brisk(source: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks unchanged; BrokenError when too few bytes come over a while."""
    since, got = time.monotonic(), 0
    for chunk in source:
        yield chunk
        got += len(chunk)
        passed = time.monotonic() - since
        if passed > WINDOW:
            if got < protocols.RATE * passed:
                raise BrokenError(f"only {got:,} bytes came in {passed:.0f} seconds")
            since, got = time.monotonic(), 0
