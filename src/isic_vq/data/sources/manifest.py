"""What a folder of prepared images holds: shards by split, a row about every image, and the totals.

    manifest.json            settings, sources, totals by split, the shards with their hashes; written last
    images.parquet           one row per image, those that were excluded or could not be read too, with the reason
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

from isic_vq.data.schema import FEATURES, DataError
from isic_vq.data.shards import parquet_bytes, tar_bytes, tar_contents
from isic_vq.data.sources.folder import file_digest
from isic_vq.data.uri import MANIFEST
from isic_vq.files import write_atomically

IMAGES = "images.parquet"
ROW_GROUP_SIZE = 256  # rows; what a reader that wants one image has to load
IMAGE_COLUMNS = pyarrow.schema(
    [
        *(
            (name, pyarrow.float32() if name == "age" else pyarrow.string())
            for name in FEATURES
            if name != "image"
        ),
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
    """What `manifest.json` says.

    Attributes:
        settings: what decides the bytes of the images, and the versions that made them.
        sources: what may be published about each source, and how many of its images could not be read.
        splits: counts by diagnosis and licence, attribution lines and `ids_sha256`, by split.
        shards: the files, in order.
        unreadable: name and reason of each image that could not be read.
        strata: how diagnoses, sources, sexes and licences came out in the splits, as `Stratum` has it.
        duplicates: what `duplicate_report` counts, without the pairs.
        classes: of the images, in the order of their ids; None if these are ISIC's, in their order.
    """

    settings: dict[str, Any]
    sources: list[dict[str, Any]]
    splits: dict[str, dict[str, Any]]
    shards: list[Shard]
    unreadable: dict[str, str]
    strata: list[dict[str, Any]]
    duplicates: dict[str, Any]
    classes: list[str] | None = None

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a folder's manifest.

        Raises:
            DataError: the folder has none, or it is damaged.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(
                f"{folder.name} has no {MANIFEST}: expected a folder that isic-vq data prepare has finished"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**content, "shards": [Shard(**shard) for shard in content["shards"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{folder.name}/{MANIFEST} is damaged ({error}): prepare the folder again"
            ) from error

    def write(self, folder: Path) -> None:
        """Write it, which finishes the folder."""
        write_atomically(folder / MANIFEST, (json.dumps(asdict(self), indent=2) + "\n").encode())

    def of_split(self, split: str) -> list[Shard]:
        """The shards of a split."""
        return [shard for shard in self.shards if shard.split == split]


def read_images(folder: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a prepared folder's images.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        return pyarrow.parquet.read_table(folder / IMAGES, columns=columns).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{folder.name}/{IMAGES} cannot be read ({error}): prepare the folder again"
        ) from error


def images_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """`images.parquet` of rows with the columns `IMAGE_COLUMNS`."""
    table = pyarrow.Table.from_pylist([dict(row) for row in rows], schema=IMAGE_COLUMNS)
    return parquet_bytes(table, ROW_GROUP_SIZE)


def write_shard(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records with encoded images as parquet, or as WebDataset if `path` ends in .tar; whole or not at all.

    The same records give the same bytes.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    if path.suffix == ".tar":
        write_atomically(path, tar_bytes(_members(records)))
        return
    table = pyarrow.Table.from_pylist([dict(record) for record in records], schema=FEATURES.arrow_schema)
    write_atomically(path, parquet_bytes(table, ROW_GROUP_SIZE))


def shard_of(path: Path, split: str, rows: int) -> Shard:
    """What the manifest says of a shard that was written."""
    return Shard(path.name, split, rows, path.stat().st_size, file_digest(path))


def read_shard(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield id and encoded image of every row of a shard."""
    if path.suffix == ".tar":
        contents = tar_contents(path)
        for name, content in contents.items():
            if name.endswith(".json"):
                about = json.loads(content)
                yield about["isic_id"], contents[f"{name.removesuffix('.json')}.{about['image_format']}"]
        return
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=64, columns=["isic_id", "image"]):
            for row in batch.to_pylist():
                yield row["isic_id"], row["image"]["bytes"]


def _members(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bytes]]:
    for number, record in enumerate(records):
        about = {name: value for name, value in record.items() if name != "image" and value is not None}
        suffix = Path(record["image"]["path"]).suffix.removeprefix(".")
        about["image_format"] = suffix
        yield f"{number:08d}.{suffix}", record["image"]["bytes"]
        yield f"{number:08d}.json", json.dumps(about).encode()
