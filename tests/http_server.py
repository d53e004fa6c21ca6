"""A web server on this machine that serves files, and misbehaves as a test tells it to."""

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Server(ThreadingHTTPServer):
    """`files` by path. `faults[path]` says what happens to the next GETs of it, one word each; then all is well."""

    daemon_threads = False  # server_close() waits for them

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, deque[str]] = defaultdict(deque)
        self.gets: Counter[str] = Counter()
        self.wholes: Counter[str] = Counter()  # GETs that were answered with the whole file
        self.queries: list[str] = []
        self.order: list[str] = []
        self.sent = 0  # bytes of bodies
        self.guard = threading.Lock()
        self.over = threading.Event()  # ends whoever stalls
        self.stalling = threading.Event()  # set as long as a body waits in its middle

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        with self.server.guard:
            self.server.gets[path] += 1
            self.server.order.append(path)
            self.server.queries.append(urlsplit(self.path).query)
            faults = self.server.faults[path]
            fault = faults.popleft() if faults else "none"
        with suppress(BrokenPipeError, ConnectionResetError):
            self.answer(path, fault)
        self.close_connection = True

    def answer(self, path: str, fault: str) -> None:
        body = self.server.files.get(path)
        if fault.isdigit():
            return self.send_error(int(fault))
        if fault.startswith("to:"):
            return self.head(302, Location=fault.removeprefix("to:"))
        if fault == "silent":
            return self.stall()
        if fault == "html":
            return self.whole(b"<!DOCTYPE html><title>404</title>")
        if body is None:
            return self.send_error(404)
        if fault == "wrong":
            return self.whole(bytes([body[0] ^ 1]) + body[1:])
        if fault == "none":
            self.server.wholes[path] += 1  # first, so that a client which has the file finds itself counted
            return self.whole(body)
        return self.begin(body, fault)

    def begin(self, body: bytes, fault: str) -> None:
        """A body that does not come to its proper end."""
        self.head(200, **({} if fault == "endless" else {"Content-Length": str(len(body))}))
        if fault == "short":
            self.send(body[: len(body) // 2])
        elif fault == "stall":
            self.send(body[: len(body) // 2])
            self.stall()
        elif fault == "drip":
            while not self.server.over.wait(0.01):
                self.send(b".")
        elif fault == "endless":
            while not self.server.over.is_set():
                self.send(b"x" * 10_000)
        else:
            raise AssertionError(fault)

    def stall(self) -> None:
        self.server.stalling.set()
        self.server.over.wait()

    def whole(self, body: bytes) -> None:
        self.head(200, **{"Content-Length": str(len(body))})
        self.send(body)

    def head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, data: bytes) -> None:
        self.wfile.write(data)
        with self.server.guard:
            self.server.sent += len(data)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    """A server in a thread; all its connections have ended when the block has."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
