"""Fetch files over HTTP from servers that are busy, far away, or cut a connection in the middle.

A body that stops early goes on where it stopped, if the file is still the same one (`Range` with `If-Range`); busy
servers are asked again, as late as they say. Connections are few and memory is bounded. Nothing secret is sent, and
messages name addresses without their queries.
Source: RFC 9110 (ranges, conditional requests, Retry-After); retries and pooled connections are urllib3's.
"""

import contextlib
import io
import json
import logging
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit, urlunsplit

import urllib3
from urllib3.exceptions import HTTPError

from isic_vq import __version__
from isic_vq.data.byte_cache import ByteCache
from isic_vq.data.schema import DataError

logger = logging.getLogger(__name__)

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
CHUNK = 1 << 16  # bytes read at once
READ_AHEAD = 1 << 20  # bytes that `RangeFile` asks for at least


class RemoteError(DataError):
    """A file of a server cannot be had; the message names it, and what happened."""


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
        retries: failures in a row, without a byte in between, after which a request is given up.
        backoff: seconds before the second retry, doubled for each further one; the first comes at once.
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
            DataError: a number is none.
        """
        values: dict[str, Any] = {}
        for name, default in vars(cls()).items():
            text = os.environ.get(f"ISIC_VQ_{name.upper()}")
            if not text:
                continue
            try:
                values[name] = (
                    Path(text)
                    if name == "cache"
                    else text.rstrip("/")
                    if isinstance(default, str)
                    else type(default)(text)
                )
            except ValueError:
                raise DataError(f"ISIC_VQ_{name.upper()} is {text!r}: expected a number") from None
        return cls(**values)


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


class _ChangedError(Exception):
    """The file is not the one whose beginning was read."""


def public_url(url: str) -> str:
    """An address without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


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

        Args:
            url: the address.
            params: its query.
            byte_range: first byte, and the one after the last.
            version: the ETag that the file must have, if any.

        Raises:
            RemoteError: it does not exist, is shorter than the range, is of another version, or could not be read
                after all retries.
        """
        if params:
            url = f"{url}?{urlencode(params)}"
        key = f"{url} {byte_range} {version}"
        if self.cache is not None and (content := self.cache.get(key)) is not None:
            return content
        sink = io.BytesIO()
        self._receive(url, sink, byte_range, version, pinned=version is not None)
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
        url = f"{url}?{urlencode(params)}" if params else url
        self._receive(url, sink, None)
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
        attempts = _Attempts(url, self.settings)
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

        What an interrupted call left (`NAME.part`, with the ETag beside it) is gone on with, by any process. Two
        processes that download to one path at once each need their own; the second waits for nothing and starts over.

        Raises:
            RemoteError: as `get`.
            OSError: the file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part, tag = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.etag")
        with _own(part) as mine:
            if not mine:  # another process is at it
                part = path.with_name(f".{path.name}.{os.getpid()}.part")
                tag = path.with_name(f".{path.name}.{os.getpid()}.etag")
            version = tag.read_text() if tag.exists() and part.exists() else None
            with part.open("r+b" if version else "wb") as file:
                file.seek(0, os.SEEK_END)
                self._receive(url, file, None, version, lambda version: tag.write_text(version or ""))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            tag.unlink(missing_ok=True)

    def fetch(self, requests: Iterable[Request], window: int = 16) -> Iterator[bytes | RemoteError]:
        """Yield what `get` gives for each request, in order, several under way at once.

        A failure is yielded in its place. At most `window` results are held, fetched or under way, so that a slow
        reader bounds the memory. Closing the generator ends its threads after what is under way.
        """
        waiting: deque[Future[bytes | RemoteError]] = deque()
        pool = ThreadPoolExecutor(min(window, self.settings.connections), "isic-vq-fetch")
        try:
            for request in requests:
                waiting.append(pool.submit(self._get_or_error, request))
                if len(waiting) >= window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _get_or_error(self, request: Request) -> bytes | RemoteError:
        try:
            return self.get(request.url, byte_range=request.byte_range, version=request.version)
        except RemoteError as error:
            return error

    def _open(self, method: str, url: str, headers: dict[str, str]) -> Any:
        """A response whose body is not read yet; urllib3 follows redirects, all else is up to `_Attempts`."""
        retries = urllib3.Retry(
            total=5, connect=0, read=0, status=0, other=0, redirect=5, raise_on_status=False
        )
        return contextlib.closing(
            self.pool.request(
                method, url, headers={**self.pool.headers, **headers}, preload_content=False, retries=retries
            )
        )

    def _receive(
        self,
        url: str,
        sink: Any,
        byte_range: tuple[int, int] | None,
        version: str | None = None,
        note_version: Callable[[str | None], Any] | None = None,
        pinned: bool = False,
    ) -> None:
        """Write a body to the end of a seekable sink, which may hold its beginning already, of `version`.

        With `pinned`, another version is an error; else it replaces what was there.
        """
        first, end = byte_range or (0, None)
        attempts = _Attempts(url, self.settings)
        while True:
            have = sink.tell()
            if end is not None and have == end - first:
                return
            headers = {}
            if have or byte_range:
                headers["Range"] = f"bytes={first + have}-{'' if end is None else end - 1}"
            if version and (have or pinned):
                headers["If-Match" if pinned else "If-Range"] = version
            with attempts.one(), self._open("GET", url, headers) as response:
                if response.status == 416 and have and byte_range is None and _total(response) == have:
                    return  # all of it was there
                attempts.check(response)
                found = response.headers.get("ETag")
                if have and (response.status != 206 or found != version):
                    # Another version, or a server without ranges: what is there cannot be gone on with.
                    sink.seek(0)
                    sink.truncate()
                    version = None
                    if response.status == 206:
                        raise _ChangedError
                version = found
                if note_version is not None:
                    note_version(version)
                skip = first if byte_range and response.status == 200 else 0
                while chunk := response.read1(CHUNK):  # `stream` loses the end of a body that is cut
                    dropped = min(skip, len(chunk))
                    skip -= dropped
                    room = None if end is None else end - first - sink.tell()
                    sink.write(chunk[dropped:] if room is None else chunk[dropped:][:room])
                    attempts.progress(sink.tell())
                if end is not None and sink.tell() != end - first:
                    raise RemoteError(
                        f"{public_url(url)} ends before byte {end}: expected a longer file. It may have been replaced."
                    )
                return


class _Attempts:
    """The failures of one request: which are tried again, and when."""

    def __init__(self, url: str, settings: RemoteSettings):
        self.url, self.settings = url, settings
        self.failures, self.reached = 0, 0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Try once; a failure that may pass is waited for, and any other raised."""
        self.wait = 0.0
        try:
            yield
        except _ChangedError:
            self._count("it changed while it was read", None)
        except (HTTPError, OSError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # the disk, not the network
            self._count(_reason(error), error)
        except _BusyError as error:
            self._count(f"the server answered {error.status}", None)
            self.wait = max(self.wait, error.retry_after)
        else:
            return
        time.sleep(self.wait)

    def progress(self, position: int) -> None:
        """Bytes came: where they are new, earlier failures do not count any more."""
        if position > self.reached:
            self.failures, self.reached = 0, position

    def check(self, response: Any) -> None:
        """Raise unless the answer has a body that was asked for."""
        status = response.status
        if status in BUSY:
            raise _BusyError(status, _retry_after(response.headers.get("Retry-After"), self.settings))
        if status == 412:
            raise RemoteError(f"{public_url(self.url)} changed while it was read. Start again.")
        if status not in (200, 206):
            detail = response.read(200).decode("utf-8", "replace").strip() if response.status == 400 else ""
            raise RemoteError(
                f"{public_url(self.url)}: the server answered {status}{f' ({detail})' if detail else ''}. "
                "Check the address, and whether it is still there."
            )

    def _count(self, reason: str, cause: Exception | None) -> None:
        self.failures += 1
        if self.failures > self.settings.retries:
            raise RemoteError(
                f"{public_url(self.url)} could not be read: {reason}, {self.failures} times in a row. Try again later; "
                "what is finished stays."
            ) from cause
        if self.failures > 1:
            delay = self.settings.backoff * 2 ** (self.failures - 2)
            self.wait = min(delay, 60.0) * random.uniform(
                0.75, 1.25
            )  # many processes should not come back as one
        logger.debug("%s: %s, attempt %d", public_url(self.url), reason, self.failures)


class _BusyError(Exception):
    def __init__(self, status: int, retry_after: float):
        self.status, self.retry_after = status, retry_after


def _retry_after(value: str | None, settings: RemoteSettings) -> float:
    """Seconds to wait, at most two minutes; dates and what is no number count as not said."""
    try:
        return min(max(float(value or 0), 0.0), 120.0)
    except ValueError:
        return settings.backoff


def _reason(error: Exception) -> str:
    """What went wrong, without the address, which may hold a query."""
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason is not None:
        error = error.reason
    if isinstance(error, (urllib3.exceptions.TimeoutError, TimeoutError)):
        return "no answer in time"
    if isinstance(error, (urllib3.exceptions.IncompleteRead, urllib3.exceptions.ProtocolError)):
        return "the connection was cut"
    return type(error).__name__


def _total(response: Any) -> int | None:
    """The file's size as a range that cannot be satisfied tells it."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdecimal() else None


@contextlib.contextmanager
def _own(part: Path) -> Iterator[bool]:
    """Whether this process alone may write a partial file; a lock that ends with the process."""
    from filelock import FileLock, Timeout  # huggingface_hub's own

    lock = FileLock(part.with_name(f".{part.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
        part.with_name(f".{part.name}.lock").unlink(missing_ok=True)


class RangeFile(io.RawIOBase):
    """A remote file that is read by ranges: seekable, as zipfile and pyarrow want it.

    Args:
        url: its server must answer ranges.
        http: fetches; default: this process's client.
        read_ahead: bytes that are asked for at least, so that small reads in a row make one request.

    Raises:
        RemoteError: it does not exist, its server answers no ranges, or, on reading, it changed since it was opened.
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
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.info.size - self.position)
        if wanted <= 0:
            return 0
        if not self._start <= self.position < self._start + len(self._buffer):
            end = min(self.position + max(wanted, self.read_ahead), self.info.size)
            self._buffer = self.http.get(self.url, byte_range=(self.position, end), version=self.info.etag)
            self._start = self.position
        offset = self.position - self._start
        content = self._buffer[offset : offset + wanted]
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


_client: tuple[int, RemoteSettings, HttpClient] | None = None


def client() -> HttpClient:
    """This process's client, by the settings of its environment; after a fork, a new one."""
    global _client
    settings = RemoteSettings.from_environment()
    if _client is None or _client[:2] != (os.getpid(), settings):
        _client = (os.getpid(), settings, HttpClient(settings))
    return _client[2]
