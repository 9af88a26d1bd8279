"""Fetch files over HTTP from servers that are busy, far away, or cut a connection in the middle.

Large files are read by ranges. A request that is cut or refused is repeated, as late as the server says. Connections
are few and memory is bounded. Nothing secret is sent, and messages name addresses without their queries.
Source: RFC 9110 (ranges, conditional requests, Retry-After). urllib3 retries and pools connections, fsspec buffers.
"""

import functools
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import urlencode

import urllib3
from fsspec.spec import AbstractBufferedFile
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, LocationValueError, MaxRetryError

from isic_vq import __version__
from isic_vq.data.byte_cache import ByteCache
from isic_vq.data.errors import DataError
from isic_vq.data.uri import public_path

READ_AHEAD = 1 << 20  # bytes that `RangeFile` reads beyond what it is asked for
WINDOW = 16  # contents that `fetch` holds at most
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


class RemoteError(DataError):
    """A file of a server cannot be read; the message names it, and what happened."""


@dataclass(frozen=True)
class RemoteSettings:
    """Addresses of remote sources, and limits on how they are asked.

    Attributes:
        api_url: of the ISIC archive's API v2.
        bucket_url: of the archive's open bucket.
        challenge_url: of the challenges' files; a folder or file:// URL of the same layout is as good.
        cache: folder of the cache of fetched bytes; None keeps nothing.
        cache_gib: its size at most, in GiB.
        connections: open at once to one server.
        retries: of one request; each redirect counts as one.
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
            DataError: a value is not a number, or is out of range.
        """
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
    """Address, half-open range of bytes or all, and the ETag that the file must have, if any."""

    url: str
    byte_range: tuple[int, int] | None = None
    version: str | None = None


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
        """The whole content of an address, or of a range of its bytes.

        With a cache, what was once fetched is taken as it is and nobody is asked whether it changed (an image of the
        archive never does): name the `version` of what may change.

        Raises:
            RemoteError: it does not exist, is shorter than the range, is of another version, or could not be read
                after all retries.
            DataError: the cache cannot be read or written.
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
                f"the cache {self.cache.folder.name!r} cannot be used ({error.strerror}): point ISIC_VQ_CACHE to another "
                "folder, or unset it to do without"
            ) from error
        return content

    def _get(self, request: Request) -> bytes:
        url, byte_range, version = request
        first, end = byte_range or (0, None)
        headers = {}
        if end is not None:
            headers["Range"] = f"bytes={first}-{end - 1}"
        if version and not version.startswith("W/"):  # a weak one matches nothing
            headers["If-Match"] = version
        answer = self.request("GET", url, headers)
        if answer.status == 412 or (version and answer.headers.get("ETag") != version):
            raise RemoteError(f"{public_path(url)} changed while it was read. Start again.")
        content = answer.data
        if answer.status == 200:  # for a range, too, by a server that knows none
            content = content[first:end]
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {first}-"):
            raise RemoteError(f"{public_path(url)}: the server answered with the wrong range.")
        if end is not None and len(content) < end - first:
            raise RemoteError(
                f"{public_path(url)} ends before byte {end}: expected a longer file. It may have been replaced."
            )
        return content

    def get_json(self, url: str, params: dict[str, str] | None = None) -> Any:
        """The JSON value of an address and its query, which is never cached.

        Raises:
            RemoteError: as `get`, or it is not JSON.
        """
        response = self.request("GET", f"{url}?{urlencode(params)}" if params else url)
        try:
            return response.json()
        except ValueError as error:
            raise RemoteError(
                f"{public_path(url)} did not answer with JSON: {error}. Check the address."
            ) from error

    def fetch(self, requests: Iterable[Request]) -> Iterator[bytes | RemoteError]:
        """Yield what `get` gives for each request, in order, several under way at once.

        A failure is yielded in its place. At most `WINDOW` results are held, fetched or under way, so that a slow
        reader bounds the memory.
        """
        waiting: deque[Future[bytes | RemoteError]] = deque()
        for request in requests:
            waiting.append(Future())
            # A daemon, so that one that waits for a busy server delays nobody; `pool` bounds the connections.
            Thread(
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
        """An answer that was read to its end: 200, 206, or 412, which is left to the caller.

        Raises:
            RemoteError: as `get`.
        """
        name = public_path(url)
        try:
            answer = self.pool.request(method, url, headers={**self.pool.headers, **(headers or {})})
        # An error's own text may hold the query, so that it is not chained to; that of a reason does not.
        except LocationValueError:
            raise RemoteError(f"{name!r} is no address: expected http or https, and a host.") from None
        except HTTPError as error:
            reason = error.reason if isinstance(error, MaxRetryError) else error
            raise RemoteError(
                f"{name} could not be read: {reason}, with {self.settings.retries} retries. Try again later; what is "
                "finished stays."
            ) from None
        if answer.status not in (200, 206, 412):
            detail = answer.data[:200].decode("utf-8", "replace").strip() if answer.status == 400 else ""
            raise RemoteError(
                f"{name}: the server answered {answer.status}{f' ({detail})' if detail else ''}. Check the address, "
                "and whether it is still there."
            )
        return answer


class RangeFile(AbstractBufferedFile):
    """A remote file that is read by ranges, with some read-ahead: seekable, as zipfile, tarfile and pyarrow want it.

    Raises:
        RemoteError: it does not exist, its server answers no ranges, or, on reading, it changed since it was opened,
            which shows if the server tells an ETag.
    """

    def __init__(self, url: str):
        headers = client().request("HEAD", url).headers
        if headers.get("Accept-Ranges") != "bytes" or "Content-Length" not in headers:
            raise RemoteError(
                f"{public_path(url)}: the server answers no ranges, or does not tell the file's size. Download it, and "
                "name it by its path."
            )
        self.etag = headers.get("ETag")
        super().__init__(None, url, block_size=READ_AHEAD, size=int(headers["Content-Length"]))

    def _fetch_range(self, start: int, end: int) -> bytes:
        return client().get(Request(self.path, (start, end), self.etag))


def client() -> HttpClient:
    """This process's client, by the settings of its environment; after a fork, a new one."""
    return _client(os.getpid(), RemoteSettings.from_environment())


@functools.lru_cache(maxsize=1)
def _client(process: int, settings: RemoteSettings) -> HttpClient:
    return HttpClient(settings)
