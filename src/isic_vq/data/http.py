"""Fetch files over HTTP from servers that are busy, far away, or cut a connection in the middle.

A body that stops early goes on where it stopped, if the file is still the same one (`Range` with `If-Range`); busy
servers are asked again, as late as they say. Connections are few and memory is bounded. Nothing secret is sent, and
messages name addresses without their queries.
Source: RFC 9110 (ranges, conditional requests, Retry-After); retries and pooled connections are urllib3's.
"""

import contextlib
import errno
import io
import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlencode

import urllib3
from filelock import FileLock

from isic_vq import __version__
from isic_vq.data.byte_cache import ByteCache
from isic_vq.data.retries import Attempts, ChangedError, RemoteError, public_url
from isic_vq.data.schema import DataError
from isic_vq.files import name_full_disk

CHUNK = 1 << 16  # bytes read at once
READ_AHEAD = 1 << 20  # bytes that `RangeFile` asks for at least


@dataclass(frozen=True)
class RemoteSettings:
    """Where remote sources are, and how politely they are asked.

    Attributes:
        api_url: of the ISIC archive's API v2.
        bucket_url: of the archive's open bucket.
        challenge_url: of the challenges' files; a folder or file:// URL of the same layout is as good.
        cache: folder of the cache of fetched bytes; None keeps nothing.
        cache_gib: its size at most, in GiB.
        connections: open at once to one server.
        retries, backoff: as `Attempts` has them.
        connect_timeout: seconds.
        read_timeout: seconds without a byte.
    """

    api_url: str = "https://api.isic-archive.com/api/v2"
    bucket_url: str = "https://isic-archive.s3.us-east-1.amazonaws.com"
    challenge_url: str = "https://isic-challenge-data.s3.amazonaws.com"
    cache: Path | None = None
    cache_gib: float = 5.0
    connections: int = 8
    retries: int = 6
    backoff: float = 0.5
    connect_timeout: float = 5.0
    read_timeout: float = 30.0

    @classmethod
    def from_environment(cls) -> "RemoteSettings":
        """The defaults, with those that `ISIC_VQ_API_URL`, `ISIC_VQ_CACHE` and so on set.

        Raises:
            DataError: a number is none, or is out of range.
        """
        values: dict[str, Any] = {}
        for name, default in vars(cls()).items():
            variable = f"ISIC_VQ_{name.upper()}"
            text = os.environ.get(variable)
            if not text:
                continue
            if name == "cache":
                values[name] = Path(text).expanduser()
            elif isinstance(default, str):
                values[name] = text.rstrip("/")
            else:
                values[name] = _number(
                    variable, text, type(default), may_be_zero=name in ("retries", "backoff")
                )
        return cls(**values)


def _number(variable: str, text: str, kind: type, may_be_zero: bool) -> float:
    """The value of a variable of the environment."""
    with contextlib.suppress(ValueError):
        value = kind(text)
        if math.isfinite(value) and (value > 0 or (may_be_zero and value == 0)):
            return value
    number = "a whole number" if kind is int else "a number"
    raise DataError(
        f"{variable} is {text!r}: expected {number}{' of at least 0' if may_be_zero else ' above 0'}"
    )


class RemoteFile(NamedTuple):
    """What a server says of a file: bytes, what tells one version from another, whether parts can be asked for."""

    size: int
    etag: str | None
    ranges: bool


class Request(NamedTuple):
    """What to fetch: an address, the half-open range of bytes or all, and the ETag that it must have, if any."""

    url: str
    byte_range: tuple[int, int] | None = None
    version: str | None = None


class HttpClient:
    """Fetches bytes; safe to use from several threads.

    Args:
        settings: addresses are the callers' business; this takes the rest.
    """

    def __init__(self, settings: RemoteSettings):
        self.settings = settings
        self.pool = urllib3.PoolManager(
            num_pools=4,
            maxsize=settings.connections,
            block=True,  # a thread waits for a connection instead of opening one more
            headers={"User-Agent": f"isic-vq/{__version__}", "Accept-Encoding": "identity"},
            timeout=urllib3.Timeout(connect=settings.connect_timeout, read=settings.read_timeout),
        )
        self.cache = ByteCache(settings.cache, int(settings.cache_gib * 2**30)) if settings.cache else None

    def get(
        self,
        url: str,
        params: Mapping[str, str] | None = None,
        byte_range: tuple[int, int] | None = None,
        version: str | None = None,
    ) -> bytes:
        """The whole content of an address, or of a half-open range of its bytes.

        With a cache, what was once fetched is taken as it is and nobody is asked whether it changed (an image of the
        archive never does): name the `version` of what may change.

        Args:
            url: the address.
            params: its query.
            byte_range: first byte, and the one after the last.
            version: the ETag that the file must have, if any.

        Raises:
            RemoteError: it does not exist, is shorter than the range, is of another version, or could not be read
                after all retries.
            DataError: the cache cannot be written.
        """
        return self._get(self._attempts(_with_query(url, params)), byte_range, version)

    def _get(self, attempts: Attempts, byte_range: tuple[int, int] | None, version: str | None) -> bytes:
        key = f"{attempts.url} {byte_range} {version}"
        if self.cache is not None and (content := self.cache.get(key)) is not None:
            return content
        sink = io.BytesIO()
        self._receive(attempts, sink, byte_range, version, pinned=version is not None)
        content = sink.getvalue()
        if self.cache is not None:
            self.cache.put(key, content)
        return content

    def get_json(self, url: str, params: Mapping[str, str] | None = None) -> Any:
        """The JSON value of an address, which is never cached.

        Raises:
            RemoteError: as `get`, or it is no JSON.
        """
        sink = io.BytesIO()
        self._receive(self._attempts(_with_query(url, params)), sink)
        try:
            return json.loads(sink.getvalue())
        except ValueError as error:
            raise RemoteError(
                f"{public_url(url)} did not answer with JSON: {error}. Check the address."
            ) from error

    def head(self, url: str) -> RemoteFile:
        """Size and version of a file.

        Raises:
            RemoteError: as `get`, or the server does not tell the size.
        """
        attempts = self._attempts(url)
        while True:
            with attempts.one(), self._open("HEAD", url, {}) as response:
                attempts.check(response)
                if "Content-Length" not in response.headers:
                    raise RemoteError(
                        f"{public_url(url)}: the server does not tell its size, which is needed here."
                    )
                return RemoteFile(
                    int(response.headers["Content-Length"]),
                    response.headers.get("ETag"),
                    response.headers.get("Accept-Ranges") == "bytes",
                )

    def download(self, url: str, path: Path) -> None:
        """Write an address's content to a file, whole or not at all.

        What an interrupted call left (`NAME.part`, with the ETag beside it) is gone on with, by any process. Of
        several that download to one path at once, one does and the others wait for it.

        Raises:
            RemoteError: as `get`.
            OSError: the file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part, tag, lock = (path.with_name(f"{path.name}.part{end}") for end in ("", ".etag", ".lock"))
        before = _identity(path)
        with FileLock(lock):  # ends with the process
            if _identity(path) == before:  # nobody else has finished it meanwhile
                with name_full_disk(path):
                    self._download_part(url, part, tag)
                    os.replace(part, path)
                tag.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)

    def _download_part(self, url: str, part: Path, tag: Path) -> None:
        """Write what is missing of a partial file, whose version is in another one."""
        version = tag.read_text() if tag.exists() and part.exists() else ""
        with part.open("r+b" if version else "wb") as file:
            file.seek(0, os.SEEK_END)
            self._receive(
                self._attempts(url),
                file,
                version=version or None,
                note_version=lambda v: tag.write_text(v or ""),
            )
            file.flush()
            os.fsync(file.fileno())

    def fetch(self, requests: Iterable[Request], window: int = 16) -> Iterator[bytes | RemoteError]:
        """Yield what `get` gives for each request, in order, several under way at once.

        A failure is yielded in its place. At most `window` results are held, fetched or under way, so that a slow
        reader bounds the memory. Closing the generator gives up what is under way, and ends its threads.
        """
        waiting: deque[Future[bytes | RemoteError]] = deque()
        stopped = threading.Event()
        pool = ThreadPoolExecutor(min(window, self.settings.connections), "isic-vq-fetch")
        try:
            for request in requests:
                waiting.append(pool.submit(self._get_or_error, request, stopped))
                if len(waiting) >= window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)

    def _get_or_error(self, request: Request, stopped: threading.Event) -> bytes | RemoteError:
        try:
            return self._get(self._attempts(request.url, stopped), request.byte_range, request.version)
        except RemoteError as error:
            return error

    def _attempts(self, url: str, stopped: threading.Event | None = None) -> Attempts:
        return Attempts(url, self.settings.retries, self.settings.backoff, stopped)

    @contextlib.contextmanager
    def _open(self, method: str, url: str, headers: dict[str, str]) -> Iterator[Any]:
        """A response whose body is not read yet; urllib3 follows redirects, all else is up to `Attempts`."""
        retries = urllib3.Retry(
            total=5, connect=0, read=0, status=0, other=0, redirect=5, raise_on_status=False
        )
        response = self.pool.request(
            method, url, headers={**self.pool.headers, **headers}, preload_content=False, retries=retries
        )
        try:
            yield response
        finally:
            response.close()  # the connection, too, where a body was not read to its end
            response.release_conn()  # which `close` does not: its place in the pool would be lost

    def _receive(
        self,
        attempts: Attempts,
        sink: BinaryIO,
        byte_range: tuple[int, int] | None = None,
        version: str | None = None,
        note_version: Callable[[str | None], Any] | None = None,
        pinned: bool = False,
    ) -> None:
        """Write a body to the end of a seekable sink, which may hold its beginning already, of `version`.

        With `pinned`, another version is an error; else it replaces what was there.
        """
        first, end = byte_range or (0, None)
        while True:
            if sink.tell() and version is None:  # nothing tells whether what is there is of the same file
                sink.seek(0)
                sink.truncate()
            have = sink.tell()
            if end is not None and have == end - first:
                return
            headers = {}
            if have or byte_range:
                headers["Range"] = f"bytes={first + have}-{'' if end is None else end - 1}"
            if version and pinned and not version.startswith("W/"):  # a weak one matches nothing
                headers["If-Match"] = version
            elif version and have and not pinned:
                headers["If-Range"] = version
            with attempts.one(), self._open("GET", attempts.url, headers) as response:
                if response.status == 416 and have and byte_range is None and _total(response) == have:
                    return  # all of it was there
                attempts.check(response)
                found = response.headers.get("ETag")
                if pinned and found != version:
                    raise attempts.changed()
                if have and response.status == 206 and found != version:
                    version = None
                    raise ChangedError
                if have and response.status == 200:  # another version, or a server without ranges
                    sink.seek(0)
                    sink.truncate()
                version = found
                if note_version is not None:
                    note_version(version)
                skip = first + sink.tell() - _first_byte(response)
                if skip < 0:
                    raise RemoteError(
                        f"{public_url(attempts.url)}: the server answered with the wrong range."
                    )
                while chunk := response.read1(CHUNK):  # `stream` loses the end of a body that is cut
                    dropped = min(skip, len(chunk))
                    skip -= dropped
                    room = None if end is None else end - first - sink.tell()
                    sink.write(chunk[dropped:][:room])
                    attempts.progress(sink.tell())
                    if end is not None and sink.tell() == end - first:
                        return  # without the rest that a server without ranges sends
                if end is not None:
                    raise RemoteError(
                        f"{public_url(attempts.url)} ends before byte {end}: expected a longer file. It may have been "
                        "replaced."
                    )
                return


def _with_query(url: str, params: Mapping[str, str] | None) -> str:
    return f"{url}?{urlencode(params)}" if params else url


def _first_byte(response: Any) -> int:
    """Where in the file a body begins."""
    if response.status == 200:
        return 0
    unit, _, span = response.headers.get("Content-Range", "").partition(" ")
    start = span.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdecimal() else sys.maxsize


def _total(response: Any) -> int | None:
    """The file's size as a range that cannot be satisfied tells it."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdecimal() else None


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that replaces it."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


class RangeFile(io.RawIOBase):
    """A remote file that is read by ranges: seekable, as zipfile and pyarrow want it.

    Args:
        url: its server must answer ranges.
        http: fetches; default: this process's client.
        read_ahead: bytes that are asked for at least, so that small reads in a row make one request.

    Raises:
        RemoteError: it does not exist, its server answers no ranges, or, on reading, it changed since it was opened,
            which shows if the server tells an ETag.
    """

    def __init__(self, url: str, http: HttpClient | None = None, read_ahead: int = READ_AHEAD):
        self.url, self.http, self.read_ahead = url, http or client(), read_ahead
        self.info = self.http.head(url)
        if not self.info.ranges:
            raise RemoteError(
                f"{public_url(url)}: the server answers no ranges. Download the file, and name it by its path."
            )
        self.position = 0
        self._start, self._buffer = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.info.size}[whence]
        if base + offset < 0:
            raise OSError(
                errno.EINVAL, "a position before the beginning of the file"
            )  # as zipfile expects it
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or as much of it as the file has: zipfile takes a short read for the end."""
        wanted = min(len(buffer), max(self.info.size - self.position, 0))
        filled = 0
        while filled < wanted:
            if not self._start <= self.position < self._start + len(self._buffer):
                end = min(self.position + max(wanted - filled, self.read_ahead), self.info.size)
                self._buffer = self.http.get(
                    self.url, byte_range=(self.position, end), version=self.info.etag
                )
                self._start = self.position
            offset = self.position - self._start
            piece = self._buffer[offset : offset + wanted - filled]
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
            self.position += len(piece)
        return filled


_client: tuple[int, RemoteSettings, HttpClient] | None = None


def client() -> HttpClient:
    """This process's client, by the settings of its environment; after a fork, a new one."""
    global _client
    settings = RemoteSettings.from_environment()
    if _client is None or _client[:2] != (os.getpid(), settings):
        _client = (os.getpid(), settings, HttpClient(settings))
    return _client[2]
