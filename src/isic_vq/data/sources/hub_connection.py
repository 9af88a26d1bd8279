"""Requests about a Hub repository that survive what passes, and say clearly what does not."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pyarrow
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from isic_vq.data.schema import DataError
from isic_vq.models.upload import HubError, hub_errors

RETRIES = 4  # without progress, each after five of huggingface_hub's own

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Connection:
    """Requests about one repository: repeated where that may help, and one clear error where it does not.

    Attributes:
        name: what messages call the source.
        repo: OWNER/NAME.
        revision: what was asked for, None for main.
    """

    name: str
    repo: str
    revision: str | None

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """One answer.

        Raises:
            DataError: as `resumed`.
        """
        return next(self.resumed(lambda: iter([question()])))

    def resumed(self, rows: Callable[[], Iterator[Answer]]) -> Iterator[Answer]:
        """Yield what `rows()` yields; where it breaks, call it again and go on after the last that came.

        Raises:
            DataError: it broke more than `RETRIES` times at one place, or in a way that will not pass.
        """
        done, failures = 0, 0
        while True:
            try:
                for row in itertools.islice(rows(), done, None):
                    yield row
                    done, failures = done + 1, 0
                return
            except (OSError, HTTPError, pyarrow.ArrowException) as error:
                failures += 1
                if failures > RETRIES or not _may_pass(error):
                    raise self._explained(error) from None
                logger.warning(
                    "%s: %s while reading, try %d of %d", self.name, type(error).__name__, failures, RETRIES
                )
                time.sleep(min(2**failures, 30))

    def _explained(self, error: BaseException) -> DataError:
        try:
            with hub_errors(f"datasets/{self.repo}", self.revision):
                raise error
        except HubError as explained:
            return DataError(f"{self.name}: {explained}")


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return not isinstance(error, FileNotFoundError)
