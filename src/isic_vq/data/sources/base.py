"""What every source of images has in common: parts that can be read independently, and what may be told of it.

A source is cheap to make and to pickle: it holds where the images are, not the images. Its parts are the unit in
which processes and workers share the reading, so that no part is read twice, and in which a reader resumes.
It does not split or decode: records carry encoded images.
"""

import copy
import hashlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from datasets import Dataset, IterableDataset

from isic_vq.data.classes import Classes, Reading
from isic_vq.data.schema import FEATURES, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceInfo:
    """What may be published about a source.

    Attributes:
        name: the URI with environment variables as written and any other path reduced to its last component.
        fingerprint: sha256 of the content as hex digits; the same wherever the files lie.
        num_images: number of rows, corrupt images included.
        licenses: number of images per licence, "unknown" where a row has none.
        attributions: the distinct attribution lines, sorted.
        diagnoses: number of images per class.
        snapshot: when the source's content was fixed, as the source says it; None where it does not.
        ids_sha256: `hash_ids` of its images; None in records of older versions.
        manifest_sha256: of the manifest of a prepared folder; None for other sources.
        classes: the images' classes in the order of their ids; None if these are ISIC's, in their order.
    """

    name: str
    fingerprint: str
    num_images: int
    licenses: dict[str, int]
    attributions: list[str]
    diagnoses: dict[str, int]
    snapshot: str | None = None
    ids_sha256: str | None = None
    manifest_sha256: str | None = None
    classes: list[str] | None = None


class Source(ABC):
    """Images of one origin, as records with the columns of `FEATURES`.

    Attributes:
        name: its URI, safe to publish.
        snapshot: when its content was fixed, as it says itself, or None.
        manifest_sha256: as `SourceInfo` has it.
        classes: the names that its labels may have.
        is_listed_cheaply: whether its rows are read without fetching images from another machine.
    """

    name: str
    snapshot: str | None = None
    manifest_sha256: str | None = None
    classes: Classes = Classes()
    is_listed_cheaply: bool = True

    def with_classes(self, classes: Classes) -> Self:
        """The source, its labels taken for names of these classes."""
        source = copy.copy(self)
        source.__dict__.update(classes=classes, _findings=Reading(classes))
        return source

    @property
    def findings(self) -> Reading:
        """What the last pass over all rows met."""
        return self.__dict__.get("_findings") or Reading(self.classes)

    @abstractmethod
    def parts(self) -> list[Any]:
        """Picklable names of what can be read independently, in the order of the records.

        Raises:
            DataError: the source cannot be used.
        """

    @abstractmethod
    def records_of(self, part: Any, reading: Reading) -> Iterator[dict[str, Any]]:
        """Yield the records of a part in order, images encoded: bytes, a path, or None where there is none.

        Args:
            part: one of `parts`.
            reading: names classes and is told what is left out; a diagnosis of None leaves out its record.

        Raises:
            DataError: a record cannot be used; it is named.
        """

    @abstractmethod
    def rows(self, reading: Reading) -> Iterable[dict[str, Any]]:
        """The rows of all records in order, without `image`, and without fetching images; else as `records_of`."""

    def read(self, part: Any) -> Iterator[dict[str, Any]]:
        """Yield the records of a part that are not left out, see `records_of`.

        Raises:
            DataError: as `records_of`, or a label is neither declared nor known.
        """
        records = self.records_of(part, Reading(self.classes))
        return (record for record in records if record["diagnosis"] is not None)

    def metadata(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of all records that are not left out, see `rows`, and keep what was met in `findings`.

        Raises:
            DataError: as `rows`; or, after the last row, because labels are neither declared nor known.
        """
        return self.checked(self.rows)

    def checked(self, rows: Callable[[Reading], Iterable[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        """Yield the rows that are not left out; all labels that cannot be used are refused together at the end."""
        reading = Reading(self.classes, is_strict=False)
        yield from (row for row in rows(reading) if row["diagnosis"] is not None)
        self.__dict__["_findings"] = reading
        reading.check(self.name)

    @abstractmethod
    def fingerprint(self) -> str:
        """The sha256 of the content, or of what stands for it, as hex digits; the same wherever it lies."""

    def stream(self, rank: int = 0, world: int = 1) -> IterableDataset:
        """Stream the records in order, reading them as they are asked for; each part is a shard of the stream.

        Args:
            rank: number of this process.
            world: number of processes; each streams every `world`-th part, so that together they stream each
                record once, and none reads what is another's.
        """
        return IterableDataset.from_generator(
            read_parts, gen_kwargs={"source": self, "parts": self.parts()[rank::world]}, features=FEATURES
        )

    @property
    def has_random_access(self) -> bool:
        """Whether there is a `dataset`; else the source can only be streamed."""
        return type(self).dataset is not Source.dataset

    def dataset(self) -> Dataset:
        """All records with random access.

        Raises:
            DataError: the source can only be streamed.
        """
        raise DataError(
            f"{self.name} can only be read as a stream: write its images to files first, with isic-vq data prepare"
        )

    def records(self) -> Dataset | IterableDataset:
        """All records in order, with random access if the source has it.

        Raises:
            DataError: as `dataset`, or as `parts`.
        """
        return self.dataset() if self.has_random_access else self.stream()

    def describe(self) -> SourceInfo:
        """What may be published about the source.

        Raises:
            DataError: as `metadata`.
        """
        info = describe_rows(self, self.metadata())
        self.tell()
        return info

    def tell(self) -> None:
        """Log what the last pass over all rows met."""
        for line in self.findings.lines():
            logger.info("%s: %s", self.name, line)


def read_parts(source: Source, parts: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield the records of some parts of a source in order."""
    for part in parts:
        yield from source.read(part)


def describe_rows(
    source: Source, rows: Iterable[dict[str, Any]], name: str | None = None, fingerprint: str | None = None
) -> SourceInfo:
    """What may be published about rows of a source.

    Args:
        source: the source.
        rows: with the columns of `FEATURES`; they are gone through once.
        name: what they are called, if they are not all of the source.
        fingerprint: the source's, if it is known.
    """
    counts = count_rows(rows)
    return SourceInfo(
        name=name or source.name,
        fingerprint=source.fingerprint() if fingerprint is None else fingerprint,
        snapshot=source.snapshot,
        manifest_sha256=source.manifest_sha256,
        classes=None if source.classes.is_default else source.classes.ordered(counts["diagnoses"]),
        **counts,
    )


def count_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Number of rows, images per class and licence, attribution lines and `ids_sha256`, by their names in `SourceInfo`."""
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
    """The sha256 of a set of image ids as hex digits: of the sorted ids, one per line; images without one do not count."""
    return hashlib.sha256("\n".join(sorted(name for name in ids if name)).encode()).hexdigest()
