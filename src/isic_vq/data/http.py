"""Fetch files over HTTP from servers that are busy, far away, or drop connections.

Large files are read in ranges; a failed request is repeated, after the delay that the server asks for. Connections and
memory are bounded. No secret is sent, and messages name addresses without their queries.
Source: RFC 9110 (ranges, conditional requests, Retry-After). urllib3 retries and pools connections, fsspec buffers.
"""

import contextlib
import functools
import hashlib
import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import urllib3
from fsspec.spec import AbstractBufferedFile
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, LocationValueError, MaxRetryError

from isic_vq import __version__
from isic_vq.data.errors import DataError
from isic_vq.data.uri import public_path
from isic_vq.files import beside, tidy_once

READ_AHEAD = 1 << 20  # bytes that `RangeFile` reads beyond each request
WINDOW = 16  # contents that `fetch` holds at most
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


class RemoteError(DataError):
    """A remote file cannot be read; the message names the file and the cause."""


@dataclass(frozen=True)
class RemoteSettings:
    """Addresses of remote sources, and limits on requests."""

    api_url: str = "https://api.isic-archive.com/api/v2"  # of the ISIC archive's API v2
    bucket_url: str = "https://isic-archive.s3.us-east-1.amazonaws.com"  # of the archive's open bucket
    # Of the challenges' files; also a folder or file:// URL of the same layout
    challenge_url: str = "https://isic-challenge-data.s3.amazonaws.com"
    cache: Path | None = None  # folder of the cache of fetched bytes; None caches nothing
    cache_gib: float = 5.0  # maximum size of the cache, in GiB
    connections: int = 8  # open at once to one server
    retries: int = 6  # per request; each redirect counts as one
    # Seconds before the second retry, doubled for each further one; the first retry is immediate
    backoff: float = 0.5
    connect_timeout: float = 5.0  # seconds
    read_timeout: float = 30.0  # seconds without a byte

    @classmethod
    def from_environment(cls) -> "RemoteSettings":
        """Read `ISIC_VQ_API_URL`, `ISIC_VQ_CACHE` and so on over the defaults; DataError for a wrong number."""
        values: dict[str, Any] = {}
        for name, default in vars(cls()).items():
            variable = f"ISIC_VQ_{name.upper()}"
            text = os.environ.get(variable)
            if text and isinstance(default, int | float):
                values[name] = _number(variable, text, type(default), name in ("retries", "backoff"))
            elif text:
                values[name] = Path(text).expanduser() if name == "cache" else text.rstrip("/")
        return cls(**values)


def _number(variable: str, text: str, kind: type, may_be_zero: bool) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if (value > 0 and math.isfinite(value)) or (may_be_zero and value == 0):
        return value
    number = "a whole number" if kind is int else "a number"
    raise DataError(
        f"{variable} is {text!r}: expected {number}{' of at least 0' if may_be_zero else ' above 0'}"
    )


class Request(NamedTuple):
    """An address, a half-open range of bytes or all, and the ETag that the file must have, if any."""

    url: str
    byte_range: tuple[int, int] | None = None
    version: str | None = None


class ByteCache:
    """Contents by key on disk; above a limit in bytes the least recently used files are removed.

    Processes may share a folder, and threads a cache; each process may exceed the limit by a twentieth until it looks at the
    folder again. A file holds the sha256 of its content and the content; one that does not match, for example after a power
    failure, counts as missing.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._room = 0  # bytes that may be written until the folder is looked at again

    def get(self, key: str) -> bytes | None:
        """Return the content of a key, now the most recently used, or None."""
        path = self._path(key)
        try:
            stored = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        digest, content = stored[:32], stored[32:]
        return content if hashlib.sha256(content).digest() == digest else None

    def put(self, key: str, content: bytes) -> None:
        """Store a content, and remove the least recently used ones if the limit is exceeded."""
        path = self._path(key)
        stored = hashlib.sha256(content).digest() + content
        temporary = beside(path.with_name(f"{path.name}.{threading.get_ident()}"), "tmp")
        tidy_once(path.parent)
        try:
            temporary.write_bytes(stored)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        with self._lock:
            self._room -= len(stored)
            if self._room < 0:
                self._shrink()

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name

    def _shrink(self) -> None:
        """Above the limit, remove the least recently used files down to nine tenths of it."""
        files = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        goal = self.limit if total <= self.limit else 0.9 * self.limit
        for _, size, path in sorted(files):
            if total <= goal:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._room = min(self.limit - total, self.limit // 20)


class HttpClient:
    """Fetches bytes from any address; safe to use from several threads."""

    def __init__(self, settings: RemoteSettings):
        self.settings = settings
        retries = urllib3.Retry(
            settings.retries,
            status_forcelist=BUSY,
            backoff_factor=settings.backoff / 2,  # urllib3 doubles it before the second retry
            backoff_jitter=settings.backoff / 2,  # many processes should not come back as one
            retry_after_max=120,  # seconds
        )
        self.pool = urllib3.PoolManager(
            num_pools=4,
            maxsize=settings.connections,
            block=True,  # a thread waits for a connection instead of opening one more
            headers={"User-Agent": f"isic-vq/{__version__}", "Accept-Encoding": "identity"},
            retries=retries,
            timeout=urllib3.Timeout(connect=settings.connect_timeout, read=settings.read_timeout),
        )
        self.cache = ByteCache(settings.cache, int(settings.cache_gib * 2**30)) if settings.cache else None

    def get(self, request: Request) -> bytes:
        """Fetch an address, or a range of its bytes; RemoteError if that fails, DataError if the cache cannot be used.

        Cached content is returned without asking the server whether it changed (images of the archive never do); give the
        `version` of a file that may change.
        """
        if self.cache is None:
            return self._get(request)
        key = f"{request.url} {request.byte_range} {request.version}"
        try:
            content = self.cache.get(key)
            if content is None:
                content = self._get(request)
                self.cache.put(key, content)
        except OSError as error:
            raise DataError(
                f"the cache {self.cache.folder.name!r} cannot be used ({error.strerror}): set ISIC_VQ_CACHE to another"
            ) from error
        return content

    def _get(self, request: Request) -> bytes:
        url, byte_range, version = request
        first, end = byte_range or (0, None)
        headers = {}
        if end is not None:
            headers["Range"] = f"bytes={first}-{end - 1}"
        if version and not version.startswith("W/"):  # a weak ETag never matches
            headers["If-Match"] = version
        answer = self.request("GET", url, headers)
        if answer.status == 412 or (version and answer.headers.get("ETag") != version):
            raise RemoteError(f"{public_path(url)} changed while it was read. Start again.")
        content = answer.data
        if answer.status == 200:  # also the answer to a range, from a server that ignores ranges
            content = content[first:end]
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {first}-"):
            raise RemoteError(f"{public_path(url)}: the server answered with the wrong range.")
        if end is not None and len(content) < end - first:
            raise RemoteError(f"{public_path(url)} ends before byte {end}. It may have been replaced.")
        return content

    def get_json(self, url: str, params: dict[str, str] | None = None) -> Any:
        """Fetch a JSON value, uncached; RemoteError as in `get`, or if the answer is not JSON."""
        response = self.request("GET", f"{url}?{urlencode(params)}" if params else url)
        try:
            return response.json()
        except ValueError as error:
            raise RemoteError(f"{public_path(url)} did not answer with JSON: {error}") from error

    def fetch(self, requests: Iterable[Request]) -> Iterator[bytes | RemoteError]:
        """Yield the result of `get`, or its RemoteError, for each request in order, several at once.

        At most `WINDOW` results are fetched ahead, so that memory stays bounded whatever the reader's pace.
        """
        waiting: deque[Future[bytes | RemoteError]] = deque()
        for request in requests:
            waiting.append(Future())
            # Daemons, so that one that waits for a busy server does not delay the exit; `pool` bounds the connections.
            threading.Thread(
                target=self._resolve, args=(waiting[-1], request), name="isic-vq-fetch", daemon=True
            ).start()
            if len(waiting) >= WINDOW:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _resolve(self, future: "Future[bytes | RemoteError]", request: Request) -> None:
        try:
            future.set_result(self.get(request))
        except RemoteError as error:
            future.set_result(error)
        except BaseException as error:
            future.set_exception(error)

    def request(self, method: str, url: str, headers: Mapping[str, str] | None = None) -> BaseHTTPResponse:
        """Return a complete answer of status 200, 206 or 412 (another version); RemoteError for any other."""
        name = public_path(url)
        try:
            answer = self.pool.request(method, url, headers={**self.pool.headers, **(headers or {})})
        # Not chained, because the error's text may hold the query; the text of `reason` does not.
        except LocationValueError:
            raise RemoteError(f"{name!r} is no address: expected http or https, and a host.") from None
        except HTTPError as error:
            reason = error.reason if isinstance(error, MaxRetryError) else error
            raise RemoteError(
                f"{name} could not be read: {reason}, with {self.settings.retries} retries. Try again; what is finished stays."
            ) from None
        if answer.status not in (200, 206, 412):
            detail = answer.data[:200].decode("utf-8", "replace").strip() if answer.status == 400 else ""
            raise RemoteError(
                f"{name}: the server answered {answer.status}{f' ({detail})' if detail else ''}. Check the address."
            )
        return answer


class RangeFile(AbstractBufferedFile):
    """A seekable remote file for zipfile, tarfile and pyarrow, read in ranges; an error if its ETag changes."""

    def __init__(self, url: str):
        headers = client().request("HEAD", url).headers
        if headers.get("Accept-Ranges") != "bytes" or "Content-Length" not in headers:
            raise RemoteError(
                f"{public_path(url)}: the server supports no ranges, or tells no size. Download it, and name it by its path."
            )
        self.etag = headers.get("ETag")
        super().__init__(None, url, block_size=READ_AHEAD, size=int(headers["Content-Length"]))

    def _fetch_range(self, start: int, end: int) -> bytes:
        return client().get(Request(self.path, (start, end), self.etag))


def client() -> HttpClient:
    """The client for this process and the settings of its environment; a forked process gets its own."""
    return _client(os.getpid(), RemoteSettings.from_environment())


@functools.lru_cache(maxsize=1)
def _client(process: int, settings: RemoteSettings) -> HttpClient:
    return HttpClient(settings)
