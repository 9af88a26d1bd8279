"""Subsets of a source: training or validation, and the images under some licences."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from isic_vq.data.classes import Classes, Reading
from isic_vq.data.licenses import license_id
from isic_vq.data.schema import DataError
from isic_vq.data.sources import Source, SourceInfo, find_source
from isic_vq.data.sources.base import describe_rows
from isic_vq.data.splits import GROUP_COLUMNS, split_rows
from isic_vq.models.checks import expect

_KEY_COLUMNS = (*GROUP_COLUMNS, "license")  # rows that are alike in these are in the same part

Key = tuple[str | None, ...]


@dataclass(frozen=True)
class SelectedSource(Source):
    """Some records of a source: those whose `_KEY_COLUMNS` have the values in `keys`; `info` describes them."""

    source: Source
    info: SourceInfo
    keys: frozenset[Key]

    def __post_init__(self) -> None:
        info = self.info
        same = {"snapshot": info.snapshot, "manifest_sha256": info.manifest_sha256}
        self.__dict__.update(name=info.name, classes=self.source.classes, **same)

    @property
    def has_random_access(self) -> bool:
        return self.source.has_random_access

    def parts(self) -> list[Any]:
        """List the source's parts, some of which may hold no selected record."""
        return self.source.parts()

    def records_of(self, part: Any, reading: Reading, with_images: bool = True) -> Iterator[dict[str, Any]]:
        records = self.source.records_of(part, reading, with_images)
        return (row for row in records if _key(row) in self.keys)

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        return (row for row in self.source.rows(reading) if _key(row) in self.keys)

    def fingerprint(self) -> str:
        """The whole source's fingerprint; subsets differ in `SourceInfo.ids_sha256`."""
        return self.info.fingerprint

    def dataset(self, whole: Dataset | None = None) -> Dataset:
        """Open the selected records, from `whole` if the source's records were opened already."""
        records = self.source.dataset() if whole is None else whole
        rows = records.select_columns(list(_KEY_COLUMNS)).to_list()
        return records.select([index for index, row in enumerate(rows) if _key(row) in self.keys])

    def describe(self) -> SourceInfo:
        self.source.tell()
        return self.info


def split_source(
    source: Source, share: float, licenses: Collection[str] = ()
) -> tuple[SelectedSource, SelectedSource]:
    """Split a source into training and validation by `split_rows` with seed 0; rows are read once.

    Licences are selected after splitting, so that they do not move an image to the other part.
    """
    rows, fingerprint = list(source.metadata()), source.fingerprint()
    train, validation = (
        _selected(
            source,
            [rows[index] for index in indices],
            f"{source.name} ({part} part, share {share:g})",
            licenses,
            fingerprint,
        )
        for part, indices in zip(("train", "validation"), split_rows(rows, share, seed=0), strict=True)
    )
    return train, validation


def licensed(source: Source, licenses: Collection[str]) -> Source:
    """Select the images, at least one, under one of these licences, in any spelling; without licences, all."""
    return _selected(source, source.metadata(), source.name, licenses) if licenses else source


def _selected(
    source: Source,
    rows: Iterable[dict[str, Any]],
    name: str,
    licenses: Collection[str],
    fingerprint: str | None = None,
) -> SelectedSource:
    rows = list(rows)
    if licenses:
        wanted = {license_id(text) for text in licenses} - {"unknown"}
        licensed_rows = [row for row in rows if license_id(row["license"]) in wanted]
        if not licensed_rows:
            counts = sorted(Counter(row["license"] or "unknown" for row in rows).items())
            present = ", ".join(f"{text} ({number} images)" for text, number in counts)
            raise DataError(f"No image of {name} is under {', '.join(licenses)}; there are {present}.")
        rows, name = licensed_rows, f"{name} (licence {', '.join(licenses)})"
    return SelectedSource(source, describe_rows(source, rows, name, fingerprint), frozenset(map(_key, rows)))


def open_part(
    uri: str,
    part: str = "all",
    share: float = 0.1,
    licenses: Collection[str] = (),
    classes: Classes | None = None,
) -> tuple[Dataset | Source, SourceInfo]:
    """Open a source, or its training or validation part.

    Args:
        uri: as for `find_source`.
        part: all, or the train or validation part, see `split_source`.
        share: share of the images that go to the validation part, see `split_source`.
        licenses: only images under one of these, such as CC-0, see `licensed`.
        classes: as for `find_source`.

    Returns:
        The records, or the source itself if it can only be streamed, and their description.

    Raises:
        ValueError, DataError: as `find_source`, `split_source` and `licensed`.
    """
    expect(part in ("all", "train", "validation"), "part", part, "all, train or validation")
    source = find_source(uri, classes)
    if part == "all":
        source = licensed(source, licenses)
    else:
        source = split_source(source, share, licenses)[part == "validation"]
    info = source.describe()
    return source.dataset() if source.has_random_access else source, info


def _key(row: Mapping[str, Any]) -> Key:
    return tuple(row[column] for column in _KEY_COLUMNS)
