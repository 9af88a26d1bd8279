"""Parts of a source: training or validation, and the images under some licences."""

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

_KEY_COLUMNS = (*GROUP_COLUMNS, "license")  # rows that are alike in these are in the same part

Key = tuple[str | None, ...]


@dataclass(frozen=True)
class SelectedSource(Source):
    """Some of the records of a source.

    Attributes:
        source: the whole.
        info: what may be published about the selected records.
        keys: their values in `GROUP_COLUMNS` and `license`.
    """

    source: Source
    info: SourceInfo
    keys: frozenset[Key]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The source's, and what was selected."""
        return self.info.name

    @property
    def snapshot(self) -> str | None:  # type: ignore[override]
        """The source's."""
        return self.info.snapshot

    @property
    def manifest_sha256(self) -> str | None:  # type: ignore[override]
        """The source's."""
        return self.info.manifest_sha256

    @property
    def classes(self) -> Classes:  # type: ignore[override]
        """The source's."""
        return self.source.classes

    @property
    def has_random_access(self) -> bool:
        """Whether the source has it."""
        return self.source.has_random_access

    def parts(self) -> list[Any]:
        """The source's, some of which may hold no selected record."""
        return self.source.parts()

    def records_of(self, part: Any, reading: Reading) -> Iterator[dict[str, Any]]:
        """The selected records of a part."""
        return (row for row in self.source.records_of(part, reading) if _key(row) in self.keys)

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        """The rows of the selected records."""
        return (row for row in self.source.rows(reading) if _key(row) in self.keys)

    def fingerprint(self) -> str:
        """The source's; `ids_sha256` of its description tells parts apart."""
        return self.info.fingerprint

    def dataset(self) -> Dataset:
        """The selected records."""
        records = self.source.dataset()
        rows = records.select_columns(list(_KEY_COLUMNS)).to_list()
        return records.select([index for index, row in enumerate(rows) if _key(row) in self.keys])

    def describe(self) -> SourceInfo:
        """What may be published about the selected records."""
        self.source.tell()
        return self.info


def find_part(
    uri: str,
    part: str = "all",
    share: float = 0.1,
    licenses: Collection[str] = (),
    classes: Classes | None = None,
) -> Source:
    """Find a source, or the training or validation part that `split_rows` (seed 0) makes of it.

    Parts are taken of all images, before licences are looked at, so that those under one licence lie in the part in
    which they lie without that.

    Args:
        uri: as for `find_source`.
        part: "all", "train" or "validation".
        share: expected share of the groups in validation.
        licenses: images under one of these alone, however they are spelled; none takes all.
        classes: as for `find_source`.

    Raises:
        ValueError: the part, the share or a licence is not one.
        DataError: as `find_source` and `split_rows`, or no image has such a licence.
    """
    if part not in ("all", "train", "validation"):
        raise ValueError(f"part is {part!r}, expected 'all', 'train' or 'validation'.")
    source = find_source(uri, classes)
    if part != "all":
        return split_source(source, share, licenses)[part == "validation"]
    return _selected(source, source.metadata(), source.name, licenses) if licenses else source


def split_source(
    source: Source, share: float, licenses: Collection[str] = ()
) -> tuple[SelectedSource, SelectedSource]:
    """Split a source into its training and its validation part, see `find_part`.

    Raises:
        ValueError, DataError: as `find_part`.
    """
    rows = list(source.metadata())
    train, validation = (
        _selected(
            source,
            [rows[index] for index in indices],
            f"{source.name} ({part} part, share {share:g})",
            licenses,
        )
        for part, indices in zip(("train", "validation"), split_rows(rows, share, seed=0), strict=True)
    )
    return train, validation


def _selected(
    source: Source, rows: Iterable[dict[str, Any]], name: str, licenses: Collection[str]
) -> SelectedSource:
    """Those of some rows of a source that are under some licences; without any, all of these rows."""
    if licenses:
        rows = _with_licenses(rows, name, licenses)
        name = f"{name} (licence {', '.join(licenses)})"
    rows = list(rows)
    return SelectedSource(source, describe_rows(source, rows, name), frozenset(map(_key, rows)))


def open_part(
    uri: str,
    part: str = "all",
    share: float = 0.1,
    licenses: Collection[str] = (),
    classes: Classes | None = None,
) -> tuple[Dataset | Source, SourceInfo]:
    """Open what `find_part` finds.

    Returns:
        The records, or the source itself if it can only be streamed, and what may be published about them.

    Raises:
        ValueError, DataError: as `find_part`.
    """
    source = find_part(uri, part, share, licenses, classes)
    info = source.describe()
    return source.dataset() if source.has_random_access else source, info


def _key(row: Mapping[str, Any]) -> Key:
    return tuple(row[column] for column in _KEY_COLUMNS)


def _with_licenses(
    rows: Iterable[dict[str, Any]], name: str, licenses: Collection[str]
) -> list[dict[str, Any]]:
    """The rows under one of some licences; one without a licence is under none."""
    wanted = {license_id(text) for text in licenses} - {"unknown"}
    present, passing = Counter[str](), []
    for row in rows:
        present[row["license"] or "unknown"] += 1
        if license_id(row["license"]) in wanted:
            passing.append(row)
    if not passing:
        there = ", ".join(f"{text} ({number} images)" for text, number in sorted(present.items()))
        raise DataError(f"No image of {name} is under {', '.join(licenses)}; there are {there}.")
    return passing
