"""The interface of all sources of images: they are read in parts, and described for publication.

A source is small and picklable: it knows where its images are and does not hold them. Processes and workers share its
parts, so that no part is read twice, and reading resumes at a part. Records carry encoded images.
"""

import collections
import copy
import hashlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError

from isic_vq import __version__
from isic_vq.data.classes import Classes, Reading, ordered_classes
from isic_vq.data.schema import FEATURES, DataError, without_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceInfo:
    """The description of a source, which is safe to publish."""

    name: str  # the URI; other paths than environment variables are reduced to their last component
    fingerprint: str  # sha256 of the content as hex digits; the same wherever the files lie
    num_images: int  # number of rows, corrupt images included
    licenses: dict[str, int]  # number of images per licence, "unknown" where a row has none
    attributions: list[str]  # the distinct attribution lines, sorted
    diagnoses: dict[str, int]  # number of images per class
    snapshot: str | None = None  # when the source says that its content was fixed; None if it does not say
    ids_sha256: str | None = None  # `hash_ids` of its images; None in records of older versions
    manifest_sha256: str | None = None  # of the manifest of a prepared folder; None for other sources
    # The images' classes in the order of their ids; None if these are ISIC's, in their order
    classes: list[str] | None = None


class Source(ABC):
    """Images of one origin, as records with the columns of `FEATURES`.

    All methods raise DataError if the source or one of its records cannot be used; the message names it.
    """

    name: str  # this and the next two are as in `SourceInfo`
    snapshot: str | None = None
    manifest_sha256: str | None = None
    classes: Classes = Classes()  # the names that its labels may have
    is_listed_cheaply: bool = True  # its rows are read without fetching images from another machine

    def with_classes(self, classes: Classes) -> Self:
        """Copy the source, with these names for its labels."""
        source = copy.copy(self)
        source.__dict__.update(classes=classes, _findings=Reading(classes))  # past the frozen dataclass
        return source

    @property
    def findings(self) -> Reading:
        """The counts of the last pass over all rows."""
        return self.__dict__.get("_findings") or Reading(self.classes)

    @abstractmethod
    def parts(self) -> list[Any]:
        """List the units that can be read independently, picklable and in the order of the records."""

    @abstractmethod
    def records_of(self, part: Any, reading: Reading, with_images: bool = True) -> Iterator[dict[str, Any]]:
        """Yield the records of a part in order, counted by `reading`; a diagnosis of None leaves out its record.

        Images are encoded: bytes, a path, or None. Without them, `image` is absent or None.
        """

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        """Yield all records in order, without `image`; like `records_of`, without fetching images."""
        for part in self.parts():
            yield from map(without_image, self.records_of(part, reading, with_images=False))

    def read(self, part: Any) -> Iterator[dict[str, Any]]:
        """Yield the records of a part that are not left out; a label that is no known class is a DataError."""
        records = self.records_of(part, Reading(self.classes))
        return (record for record in records if record["diagnosis"] is not None)

    def metadata(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are not left out; after the last, `findings` is set, or all unknown labels are refused."""
        return self.checked(self.rows)

    def checked(self, rows: Callable[[Reading], Iterable[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        """Check rows like `metadata`, if they are read in another way."""
        reading = Reading(self.classes, is_strict=False)
        yield from (row for row in rows(reading) if row["diagnosis"] is not None)
        self.__dict__["_findings"] = reading
        reading.check(self.name)

    @abstractmethod
    def fingerprint(self) -> str:
        """Return the sha256 of the content, or of names, sizes and versions, as hex digits; the location does not count."""

    def stream(self, rank: int = 0, world: int = 1) -> IterableDataset:
        """Stream the records of every `world`-th part from part `rank` on, in order; each part is a shard of the stream."""
        return stream_parts(self, self.parts()[rank::world])

    @property
    def has_random_access(self) -> bool:
        """Whether there is a `dataset`; else the source can only be streamed."""
        return type(self).dataset is not Source.dataset

    def dataset(self) -> Dataset:
        raise DataError(
            f"{self.name} can only be read as a stream: write its images to files first, with isic-vq data prepare"
        )

    def records(self) -> Dataset | IterableDataset:
        """Open all records in order, with random access if the source has it."""
        return self.dataset() if self.has_random_access else self.stream()

    def describe(self) -> SourceInfo:
        """Read all rows, log `findings`, and return the description."""
        info = describe_rows(self, self.metadata())
        self.tell()
        return info

    def tell(self) -> None:
        for line in self.findings.lines():
            logger.info("%s: %s", self.name, line)


def read_parts(source: Source, parts: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield the records of some parts of a source in order."""
    for part in parts:
        yield from source.read(part)


def stream_parts(source: Source, parts: Sequence[Any]) -> IterableDataset:
    """Stream the records of some parts of a source in order."""
    arguments = {"source": source, "parts": list(parts)}
    return IterableDataset.from_generator(read_parts, gen_kwargs=arguments, features=FEATURES)


def cached_dataset(source: Source) -> Dataset:
    """Open all records with random access: they are read once and kept in the cache of `datasets`.

    The cache key holds the source's fingerprint and classes and this package's version.
    """
    key = hashlib.sha256(f"{__version__} {source.fingerprint()} {source.classes}".encode()).hexdigest()
    arguments = {"source": source, "parts": source.parts()}
    try:
        return Dataset.from_generator(read_parts, gen_kwargs=arguments, features=FEATURES, fingerprint=key)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            collections.deque(source.metadata(), maxlen=0)  # refuses all unknown labels together
            raise error.__cause__ from None
        raise


def ranges(number: int, size: int) -> list[range]:
    """Cut the numbers below `number` into ranges of at most `size`."""
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def describe_rows(
    source: Source, rows: Iterable[dict[str, Any]], name: str | None = None, fingerprint: str | None = None
) -> SourceInfo:
    """Describe rows of a source, which are read once, under its name and fingerprint or those given."""
    counts = count_rows(rows)
    return SourceInfo(
        name=name or source.name,
        fingerprint=source.fingerprint() if fingerprint is None else fingerprint,
        snapshot=source.snapshot,
        manifest_sha256=source.manifest_sha256,
        classes=None
        if source.classes.is_default
        else ordered_classes(counts["diagnoses"], source.classes.names),
        **counts,
    )


def count_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Count rows: those fields of `SourceInfo` that follow from rows alone."""
    ids: list[str | None] = []
    licenses, attributions, diagnoses = Counter[str](), set(), Counter[str]()
    for row in rows:
        ids.append(row["isic_id"])
        licenses[row["license"] or "unknown"] += 1
        diagnoses[row["diagnosis"]] += 1
        attributions.add(row["attribution"])
    return {
        "num_images": len(ids),
        "diagnoses": dict(sorted(diagnoses.items())),
        "licenses": dict(sorted(licenses.items())),
        "attributions": sorted(filter(None, attributions)),
        "ids_sha256": hash_ids(ids),
    }


def hash_ids(ids: Iterable[str | None]) -> str:
    """The sha256 of the sorted image ids, one per line, as hex digits; images without an id do not count."""
    return hashlib.sha256("\n".join(sorted(name for name in ids if name)).encode()).hexdigest()
