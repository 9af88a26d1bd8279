"""A real HTTP server on this machine that serves files, and fails on demand.

It speaks what sources need of a file server: ETag, ranges with If-Range, HEAD. Application routes (an API, a listing)
are functions. What it was asked, and by how many connections at once, can be looked up afterwards.
"""

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

FAULTS = ("429", "503", "404", "cut", "reset", "slow", "stall", "truncated", "etag")


@dataclass
class Request:
    """What a client asked: `byte_range` as the header has it, `status` as it was answered (0: not at all)."""

    method: str
    path: str
    query: dict[str, list[str]]
    byte_range: str | None
    headers: dict[str, str]
    status: int = 0
    sent: int = 0


@dataclass
class Answer:
    """What a route answers."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value, status=200):
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


@dataclass
class _Fault:
    prefix: str
    kind: str
    times: int
    after: int


class FaultServer:
    """Serve `files` (path -> bytes) and `routes` (prefix -> function of a Request) on 127.0.0.1.

    Example:
        >>> with FaultServer({"/a": b"abc"}) as server:  # doctest: +SKIP
        ...     server.fail("/a", "cut")
        ...     urllib3.request("GET", server.url + "/a")
    """

    def __init__(self, files: dict[str, bytes] | None = None, slow_seconds: float = 0.002):
        self.files = dict(files or {})
        self.routes: dict[str, Callable[[Request], Answer]] = {}
        self.log: list[Request] = []
        self.slow_seconds = slow_seconds  # pause between the pieces of a "slow" body
        self.stall_seconds = 5.0  # a "stall" sends half of the body, and nothing for so long
        self.num_connections = 0  # ever, and at once
        self.most_connections = 0
        self._open = 0
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._stop = threading.Event()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def fail(self, prefix: str, kind: str, times: int = 1, after: int = 0) -> None:
        """Let the next `times` requests of paths that begin with `prefix` fail, after `after` that do not.

        Kinds: "429" (Retry-After 0), "503", "404"; "cut" (the connection ends after half of the body), "reset" (it
        ends before an answer), "slow" (small pieces), "stall" (half of the body, then silence), "truncated" (a sound
        answer whose content is only the first half), "etag" (from now on the content is another one).
        """
        if kind not in FAULTS:
            raise ValueError(f"{kind!r} is none of {', '.join(FAULTS)}")
        with self._lock:
            self._faults.append(_Fault(prefix, kind, times, after))

    def requests(self, prefix: str = "/", method: str = "GET") -> list[Request]:
        """What was asked for under a prefix."""
        return [r for r in self.log if r.method == method and r.path.startswith(prefix)]

    def _fault(self, path: str) -> str | None:
        with self._lock:
            for fault in self._faults:
                if path.startswith(fault.prefix) and fault.times:
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault.kind
        return None

    def _enter(self, change: int) -> None:
        with self._lock:
            self._open += change
            self.num_connections += change > 0
            self.most_connections = max(self.most_connections, self._open)


def changed(content: bytes) -> bytes:
    """What an "etag" fault turns a file into: as long as before, every byte another one."""
    return bytes(byte ^ 255 for byte in content)


def etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


def _handler(server: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def setup(self):
            super().setup()
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server._enter(1)

        def handle(self):
            with contextlib.suppress(ConnectionError):  # the client had enough
                super().handle()

        def finish(self):
            server._enter(-1)
            super().finish()

        def log_message(self, *_):
            pass

        def do_GET(self):  # noqa: N802
            self._answer()

        def do_HEAD(self):  # noqa: N802
            self._answer()

        def _answer(self):
            parts = urlsplit(self.path)
            request = Request(
                self.command,
                parts.path,
                parse_qs(parts.query, keep_blank_values=True),
                self.headers.get("Range"),
                {name.lower(): value for name, value in self.headers.items()},
            )
            server.log.append(request)
            fault = server._fault(parts.path)
            if fault == "reset":
                self._reset()
                return
            if fault in ("429", "503", "404"):
                headers = {"Retry-After": "0"} if fault == "429" else {}
                self._send(request, Answer(b"not now", int(fault), headers), None)
                return
            if fault == "etag" and parts.path in server.files:
                server.files[parts.path] = changed(server.files[parts.path])
            self._send(request, self._find(request, fault == "truncated"), fault)

        def _find(self, request, truncated):
            route = max((p for p in server.routes if request.path.startswith(p)), key=len, default=None)
            if request.path not in server.files:
                return server.routes[route](request) if route else Answer(b"no such file", 404)
            content = server.files[request.path]
            if truncated:
                content = content[: len(content) // 2]
            headers = {"ETag": etag(server.files[request.path]), "Accept-Ranges": "bytes"}
            if request.headers.get("if-match", headers["ETag"]) != headers["ETag"]:
                return Answer(b"", 412, headers)
            condition = request.headers.get("if-range")
            match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.byte_range or "")
            if not match or (condition and condition != headers["ETag"]):
                return Answer(content, 200, headers)
            first, last = match.groups()
            start = int(first) if first else max(len(content) - int(last), 0)
            end = min(int(last) + 1, len(content)) if first and last else len(content)
            if start >= end:
                return Answer(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            return Answer(content[start:end], 206, headers)

        def _send(self, request, answer, fault):
            request.status = answer.status
            self.send_response(answer.status, HTTPStatus(answer.status).phrase)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if request.method == "HEAD":
                return
            try:
                if fault in ("cut", "stall"):
                    half = answer.body[: len(answer.body) // 2]
                    self.wfile.write(half)
                    request.sent = len(half)
                    if fault == "stall":
                        server._stop.wait(server.stall_seconds)
                    self.close_connection = True
                elif fault == "slow":
                    for start in range(0, len(answer.body), 4096):
                        request.sent += self.wfile.write(answer.body[start : start + 4096])
                        time.sleep(server.slow_seconds)
                else:
                    request.sent = self.wfile.write(answer.body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client had enough

        def _reset(self):
            """End the connection without an answer; the client gets "connection reset"."""
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return Handler
