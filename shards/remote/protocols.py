"""Where the bytes of a URL come from: a web server, an object store, a shared disk, or a command of the user's own."""

import http.client
import os
import select
import signal
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shards.manifest import ShardError

STALL = 30.0  # seconds without one byte, from the attempt to connect on
CHUNK = 2**18  # bytes read at a time from a connection or a pipe
PIECE = 2**22  # bytes of one request to an object store
RATE = 20_000  # bytes a second: whoever gives fewer will not feed a training
PERMANENT = range(400, 500)  # answers of a web server that repeating the question will hardly change, except
PASSING = (408, 425, 429)  # time-out, too early, too many requests
HOPELESS = (http.client.InvalidURL, ssl.SSLCertVerificationError)
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}


class BrokenError(Exception):
    """A try that came to nothing; `refused` if the source said no and will hardly say yes to the same request."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


def chunks(url: str) -> Generator[bytes, None, None]:
    """The bytes behind a URL, in pieces of at most `PIECE`; close the generator to let go of the source.

    BrokenError when the source fails or falls silent, ShardError if this program cannot read such URLs at all.
    """
    scheme = url.partition(":")[0]
    if scheme in ("http", "https"):
        return _web(url)
    if scheme in PACKAGES:
        return _store(url, scheme)
    if scheme == "pipe":
        return _command(url.removeprefix("pipe:"))
    if url.startswith("file:///"):
        return _file(url.removeprefix("file://"))
    raise ShardError(f"{url}: cannot be read; a URL begins with http:, https:, s3:, gs:, hf:, file:/// or pipe:")


def _web(url: str) -> Generator[bytes, None, None]:
    request = urllib.request.Request(url, headers={"User-Agent": "vaedist"})  # some servers turn urllib's own away
    try:
        with _opener().open(request, timeout=STALL) as response:
            while chunk := response.read1(CHUNK):
                yield chunk
            if response.length:  # what is left of the Content-Length
                raise BrokenError(f"the connection ended {response.length:,} bytes too early")
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            refused = error.code in PERMANENT and error.code not in PASSING
            raise BrokenError(f"status {error.code} {_one_line(error.reason)}", refused=refused) from None
    except TimeoutError:
        raise BrokenError(f"no byte for {STALL:g} seconds") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise BrokenError(_one_line(reason), refused=isinstance(reason, HOPELESS)) from None


def _opener() -> urllib.request.OpenerDirector:
    """Knows no scheme but http and https, to which therefore alone a server can redirect."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _store(url: str, scheme: str) -> Generator[bytes, None, None]:
    """An object in pieces, each of which has a time limit of its own whatever the package does about it."""
    import fsspec  # with its packages half a second, which local files need not wait for

    options: dict[str, Any] = {}
    if scheme == "s3":
        times = {"connect_timeout": STALL, "read_timeout": STALL}
        options["config_kwargs"] = {**times, "retries": {"max_attempts": 1}}
    try:
        files = fsspec.filesystem(scheme, **options)
    except ImportError:
        package = PACKAGES[scheme]
        raise ShardError(f"{url}: {scheme}:// needs a package: pip install {package}") from None
    limit: dict[str, Any] = {}
    if files.async_impl:  # the others, such as hf, have time limits that cannot be set from here
        files.retries = 1  # the caller tries again
        limit["timeout"] = max(STALL, PIECE / RATE)
    try:
        size = files.info(url, **limit)["size"]
        for start in range(0, size, PIECE):
            yield files.cat_file(url, start=start, end=min(start + PIECE, size), **limit)
    except (FileNotFoundError, PermissionError) as error:
        raise BrokenError(_one_line(error), refused=True) from None
    except Exception as error:  # every store has errors of its own, and of the packages below it
        raise BrokenError(_one_line(error)) from None


def _file(path: str) -> Generator[bytes, None, None]:
    try:
        with Path(path).open("rb") as stream:
            while chunk := stream.read(PIECE):
                yield chunk
    except OSError as error:  # a network file system may come back
        refused = isinstance(error, FileNotFoundError | PermissionError)
        raise BrokenError(error.strerror or _one_line(error), refused=refused) from None


def _command(command: str) -> Generator[bytes, None, None]:
    """What a shell command writes to its standard output; the command dies when it falls silent or is not needed."""
    from webdataset.gopen import Pipe  # imports torch: seconds

    # a session, so that a whole pipeline can be killed; unbuffered, so that poll sees all there is
    pipe = Pipe(command, mode="rb", shell=True, bufsize=0, start_new_session=True, timeout=STALL)
    try:
        ready = select.poll()
        ready.register(pipe.stream, select.POLLIN)
        while ready.poll(STALL * 1000):
            if not (chunk := os.read(pipe.stream.fileno(), CHUNK)):
                pipe.close()  # OSError unless it ends well, and soon
                return
            yield chunk
        raise BrokenError(f"no byte for {STALL:g} seconds")
    except subprocess.TimeoutExpired:
        raise BrokenError(f"the command did not end {STALL:g} seconds after its output") from None
    except OSError:
        raise BrokenError(f"the command failed with exit status {pipe.status}") from None
    finally:
        _kill(pipe.proc)
        pipe.stream.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def shown(url: str) -> str:
    """A URL as an error may print it: what is behind a question mark may be a key that opens the store."""
    return f"{url.partition('?')[0]}?..." if urlsplit(url).query and not url.startswith("pipe:") else url
