"""Which failures of a request over HTTP are tried again, and when.

Busy servers, cut connections and silence pass; a wrong address or a file that is not there does not. What counts is
how often in a row nothing came: a request that gets on is never given up.
Source: RFC 9110, sections 10.2.3 (Retry-After) and 15 (status codes).
"""

import contextlib
import logging
import random
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from urllib3.exceptions import (
    HTTPError,
    LocationValueError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ResponseError,
    SSLError,
    TimeoutError,
)

from isic_vq.data.schema import DataError

logger = logging.getLogger(__name__)

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_RETRY_AFTER = 120.0  # seconds


class RemoteError(DataError):
    """A file of a server cannot be had; the message names it, and what happened."""


class ChangedError(Exception):
    """The file is not the one whose beginning was read."""


class _BusyError(Exception):
    def __init__(self, status: int, retry_after: float):
        self.status, self.retry_after = status, retry_after


def public_url(url: str) -> str:
    """An address without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Attempts:
    """The failures of one request.

    Args:
        url: what is asked for.
        retries: failures in a row, without a byte in between, after which it is given up.
        backoff: seconds before the second retry, doubled for each further one; the first comes at once.
        stopped: when set, the request ends with an error as soon as it can.

    Raises:
        RemoteError: the address is none.
    """

    def __init__(self, url: str, retries: int, backoff: float, stopped: threading.Event | None = None):
        self.url, self.retries, self.backoff = url, retries, backoff
        self.stopped = stopped or threading.Event()
        self._failures, self._reached = 0, 0
        if not url.startswith(("http://", "https://")):
            raise self._no_address()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Try once; a failure that may pass is waited for, and any other raised.

        Raises:
            RemoteError: it will not pass, or there were too many.
        """
        try:
            yield
        except ChangedError:
            wait = self._count("it changed while it was read")
        except _BusyError as error:
            wait = max(self._count(f"the server answered {error.status}"), error.retry_after)
        # urllib3's own messages hold the query, so that they are not chained to.
        except LocationValueError:
            raise self._no_address() from None
        except HTTPError as error:
            cause = error.reason if isinstance(error, MaxRetryError) and error.reason else error
            if isinstance(cause, ResponseError):
                raise RemoteError(
                    f"{public_url(self.url)} leads in a circle of redirects. Check the address."
                ) from None
            wait = self._count(_reason(cause))
        else:
            return
        self.stopped.wait(wait)
        self._check_stopped()

    def progress(self, position: int) -> None:
        """Bytes came up to a position: where they are new, earlier failures do not count any more.

        Raises:
            RemoteError: the request is to end.
        """
        self._check_stopped()
        if position > self._reached:
            self._failures, self._reached = 0, position

    def check(self, response: Any) -> None:
        """Raise unless an answer has a body that was asked for."""
        status = response.status
        if status in BUSY:
            raise _BusyError(status, _retry_after(response.headers.get("Retry-After")))
        if status == 412:
            raise self.changed()
        if status not in (200, 206):
            detail = response.read(200).decode("utf-8", "replace").strip() if status == 400 else ""
            raise RemoteError(
                f"{public_url(self.url)}: the server answered {status}{f' ({detail})' if detail else ''}. "
                "Check the address, and whether it is still there."
            )

    def changed(self) -> RemoteError:
        """The error of a file that is not of the version that it must have."""
        return RemoteError(f"{public_url(self.url)} changed while it was read. Start again.")

    def _no_address(self) -> RemoteError:
        return RemoteError(f"{public_url(self.url)!r} is no address: expected http or https, and a host.")

    def _check_stopped(self) -> None:
        if self.stopped.is_set():
            raise RemoteError(f"{public_url(self.url)} is not needed any more.")

    def _count(self, reason: str) -> float:
        """Seconds to wait after one more failure."""
        self._failures += 1
        logger.debug("%s: %s, failure %d", public_url(self.url), reason, self._failures)
        if self._failures > self.retries:
            raise RemoteError(
                f"{public_url(self.url)} could not be read: {reason}, {self._failures} times in a row. Try again "
                "later; what is finished stays."
            ) from None
        if self._failures == 1:
            return 0.0
        delay = min(self.backoff * 2 ** (self._failures - 2), LONGEST_BACKOFF)
        return delay * random.uniform(0.75, 1.25)  # many processes should not come back as one


def _retry_after(value: str | None) -> float:
    """Seconds that a server asks to wait; a date, which few send, counts as not said."""
    try:
        return min(max(float(value or 0), 0.0), LONGEST_RETRY_AFTER)
    except ValueError:
        return 0.0


def _reason(error: Exception) -> str:
    """What went wrong, without the address, which may hold a query."""
    if isinstance(error, NameResolutionError):
        return "its host is not known"
    if isinstance(error, NewConnectionError):
        return "no connection"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ProtocolError):
        return "the connection was cut"
    if isinstance(error, SSLError):
        return f"no trusted connection ({error})"
    return type(error).__name__
