"""The files of a prepared folder: shards by split, a row about every image, and the totals.

    manifest.json            settings, sources, totals by split, the shards with their hashes; written last
    images.parquet           one row per image; excluded and unreadable ones have a reason
    train-00000.parquet ...  the images at the training size, with the columns of `FEATURES`; or .tar

A folder without `manifest.json` is not finished.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from isic_vq.data.schema import FEATURES, DataError, without_image
from isic_vq.data.shards import parquet_bytes, tar_bytes, tar_contents
from isic_vq.data.uri import MANIFEST
from isic_vq.files import write_atomically

IMAGES = "images.parquet"
_PARQUET = {"row_group_size": 256, "write_page_checksum": True}  # a reader of one image loads its row group
IMAGE_COLUMNS = pyarrow.schema(
    [
        *without_image({field.name: field for field in FEATURES.arrow_schema}).values(),
        ("split", pyarrow.string()),
        ("reason", pyarrow.string()),  # why it is excluded
        ("origin", pyarrow.string()),  # the source's name in the manifest
        ("sha256", pyarrow.string()),  # of the image as the source has it
        ("signature", pyarrow.binary()),  # as isic_vq.data.duplicates has it
        ("shard", pyarrow.string()),  # file of its split; null if excluded
        ("row", pyarrow.int64()),  # in that file
    ]
)


@dataclass(frozen=True)
class Shard:
    """A file of images of one split: its name, rows, bytes, and the sha256 of its content."""

    file: str
    split: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    settings: dict[str, Any]  # all that decides the bytes of the images, and the versions that made them
    sources: list[dict[str, Any]]  # `SourceInfo` of each source, as a dictionary
    splits: dict[str, dict[str, Any]]  # `count_rows` of each split
    shards: list[Shard]  # the files, in order
    unreadable: dict[str, str]  # reasons by image
    strata: list[dict[str, Any]]  # `Stratum` of each value and split, as a dictionary
    duplicates: dict[str, Any]  # the counts of `duplicate_report`
    # Of the images, in the order of their ids; None if these are ISIC's, in their order
    classes: list[str] | None = None

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a folder's manifest; DataError if it is missing or damaged."""
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(f"{folder.name} has no {MANIFEST}: isic-vq data prepare writes it last")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**content, "shards": [Shard(**shard) for shard in content["shards"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{folder.name}/{MANIFEST} is damaged ({error}): prepare it again") from error

    def write(self, folder: Path) -> None:
        """Write the manifest, which marks the folder as finished."""
        write_atomically(folder / MANIFEST, (json.dumps(asdict(self), indent=2) + "\n").encode())

    def of_split(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]


def read_images(folder: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read the rows of a prepared folder's images; DataError if the file is missing or damaged."""
    try:
        return pyarrow.parquet.read_table(folder / IMAGES, columns=columns).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{folder.name}/{IMAGES} is damaged ({error}): prepare it again") from error


def write_images(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of a prepared folder's images, with the columns `IMAGE_COLUMNS`."""
    table = pyarrow.Table.from_pylist([dict(row) for row in rows], schema=IMAGE_COLUMNS)
    write_atomically(folder / IMAGES, parquet_bytes(table, **_PARQUET))


def write_shard(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records with encoded images as parquet, or as WebDataset if `path` ends in .tar; the same records, the same bytes."""
    if path.suffix == ".tar":
        write_atomically(path, tar_bytes(_members(records)))
        return
    table = pyarrow.Table.from_pylist([dict(record) for record in records], schema=FEATURES.arrow_schema)
    write_atomically(path, parquet_bytes(table, **_PARQUET))


def read_shard(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield id and encoded image of every row of a shard."""
    if path.suffix == ".tar":
        contents = tar_contents(path)
        for name, content in contents.items():
            if name.endswith(".json"):
                values = json.loads(content)
                yield values["isic_id"], contents[f"{name.removesuffix('.json')}.{values['image_format']}"]
        return
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=64, columns=["isic_id", "image"]):
            for row in batch.to_pylist():
                yield row["isic_id"], row["image"]["bytes"]


def _members(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bytes]]:
    for number, record in enumerate(records):
        values = {name: value for name, value in without_image(record).items() if value is not None}
        suffix = Path(record["image"]["path"]).suffix.removeprefix(".")
        yield f"{number:08d}.{suffix}", record["image"]["bytes"]
        yield f"{number:08d}.json", json.dumps({**values, "image_format": suffix}).encode()
