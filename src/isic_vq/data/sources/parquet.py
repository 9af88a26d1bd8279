"""Parquet files with an `image` column, as the Hugging Face stack writes them."""

import glob
import hashlib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets, load_dataset

from isic_vq.data.classes import Reading
from isic_vq.data.schema import FEATURES, DataError, normalise, without_image
from isic_vq.data.sources.base import Source
from isic_vq.data.sources.image_files import file_digest
from isic_vq.data.uri import expand_path, find_parquet, public_path

Part = tuple[Any, int, int]  # file, number of a row group, and of its first row

_SPLIT_PREFIX = re.compile(r"(train|val|test|dev)", re.IGNORECASE)
# Of an image column that is no struct.
_FILE_TYPES = ("binary", "large_binary", "string", "large_string", "null")


@dataclass(frozen=True)
class ParquetSource(Source):
    """Rows of parquet files, in the order of `files`."""

    name: str
    files: tuple[Path, ...]

    @classmethod
    def from_target(cls, target: str) -> "ParquetSource":
        """Find the files of a path, directory or pattern, and check that they can be read together."""
        name, files = f"parquet:{public_path(target)}", list(map(Path, find_parquet(target)))
        splits = sorted({match[0].lower() for file in files if (match := _SPLIT_PREFIX.match(file.name))})
        if len(splits) > 1 and os.path.isdir(expand_path(target)):  # a pattern may mean all of them
            raise DataError(
                f"{name} holds several splits ({', '.join(splits)}). Name one by a pattern: {splits[0]}*.parquet."
            )
        columns: dict[str, Path] = {}
        for file in files:
            columns.setdefault(", ".join(sorted(_column_names(file))), file)
        if len(columns) > 1:
            listed = "; ".join(f"{file.name}: {names}" for names, file in columns.items())
            raise DataError(f"The files of {name} have different columns ({listed}): open them separately")
        files = [file for file in files if pyarrow.parquet.read_metadata(file).num_rows > 0]
        if not files:
            raise DataError(f"{name} has no rows. Expected one row per image.")
        return cls(name, tuple(files))

    def parts(self) -> list[Part]:
        """List row groups; rows are numbered within each file."""
        return [part for file in self.files for part in row_groups(file, pyarrow.parquet.read_metadata(file))]

    def records_of(self, part: Part, reading: Reading, with_images: bool = True) -> Iterator[dict[str, Any]]:
        """Yield the rows of a row group, images as they are stored.

        pyarrow reads them, because a stream of `datasets` over parquet that is left early hangs at the interpreter's
        exit. An image's path is dropped where there are bytes: `datasets` prefers a file of that name in the working
        directory, which may be another image.
        """
        path, group, first = part
        with pyarrow.parquet.ParquetFile(path) as file:
            features = Features.from_arrow_schema(file.schema_arrow)
            names = {
                column: feature.names
                for column, feature in features.items()
                if isinstance(feature, ClassLabel)
            }
            # Paths without bytes must be seen to be checked.
            with_images = with_images or not _has_all_bytes(file, group)
            for number, row in enumerate(read_group(file, group, "image", with_images), start=first):
                where = f"{path.name}, row {number}"
                record = normalise(row, where, names, reading)
                image = _stored_image(record["image"]) if with_images else None
                if isinstance(image, dict):
                    _check_inside(image["path"], path, where)
                yield {**record, "image": image}

    def fingerprint(self) -> str:
        """The sha256 over the files' contents, whatever their names."""
        digests = sorted(file_digest(path) for path in self.files)
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def dataset(self) -> Dataset:
        """Open all rows, without copying or decoding an image."""
        numbered = self.checked(
            lambda reading: ({**row, "number": n} for n, row in enumerate(self.rows(reading)))
        )
        rows = list(numbered)
        table = load_dataset("parquet", data_files=[glob.escape(str(f)) for f in self.files], split="train")
        images = table.select_columns("image").cast_column("image", Image())
        kept = [row.pop("number") for row in rows]
        if len(kept) < len(images):
            images = images.select(kept)
        return concatenate_datasets(
            [images, Dataset.from_list(rows, features=Features(without_image(FEATURES)))], axis=1
        )


def row_groups(path: Any, metadata: pyarrow.parquet.FileMetaData, first: int = 0) -> list[Part]:
    """List the row groups of a file whose first row has this number."""
    parts = []
    for group in range(metadata.num_row_groups):
        parts.append((path, group, first))
        first += metadata.row_group(group).num_rows
    return parts


def read_group(
    file: pyarrow.parquet.ParquetFile, group: int, image: str, with_images: bool
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a row group, a few in memory at a time.

    Without images, the column `image` is None, or holds the path beside the image's bytes alone.
    """
    schema = file.schema_arrow
    columns = [column for column in schema.names if column != image]
    if with_images:
        columns.insert(0, image)
    elif "path" in _struct_fields(schema.field(image).type):
        columns.append(f"{image}.path")
    for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=columns, use_threads=False):
        for row in batch.to_pylist():
            yield {image: None, **row}


def _struct_fields(kind: pyarrow.DataType) -> Collection[str]:
    return {field.name for field in kind} if pyarrow.types.is_struct(kind) else ()


def _has_all_bytes(file: pyarrow.parquet.ParquetFile, group: int) -> bool:
    """Whether every image of a row group is stored as bytes, as the statistics of its column say."""
    kind, columns = file.schema_arrow.field("image").type, file.metadata.row_group(group)
    name = "image.bytes" if "bytes" in _struct_fields(kind) else "image"
    for column in map(columns.column, range(columns.num_columns)):
        if column.path_in_schema == name and str(kind) not in ("string", "large_string"):
            return column.statistics is not None and column.statistics.null_count == 0
    return False


def _column_names(file: Path) -> list[str]:
    """The columns of a parquet file; `image` must be one of them and hold images."""
    try:
        schema = pyarrow.parquet.read_schema(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file.name} is not a readable parquet file: {error}") from error
    columns = schema.names
    if "image" not in columns:
        raise DataError(f"{file.name} has no column image, only {', '.join(columns)}.")
    kind = schema.field("image").type
    if not {"bytes", "path"}.intersection(_struct_fields(kind)) and str(kind) not in _FILE_TYPES:
        raise DataError(f"{file.name}: the column image holds {kind}, expected images or their bytes.")
    return columns


def _check_inside(image: str, file: Path, where: str) -> None:
    if not Path(image).resolve().is_relative_to(file.resolve().parent):
        raise DataError(f"{where}: the image {image!r} is outside of the file's folder: store its bytes")


def _stored_image(image: dict[str, Any] | str | bytes | None) -> dict[str, Any] | bytes | None:
    """An image's bytes, its path where it has no bytes, or None where it has neither."""
    if isinstance(image, dict):
        content, path = image.get("bytes"), image.get("path")
        return content if content is not None or path is None else {"bytes": None, "path": path}
    return {"bytes": None, "path": image} if isinstance(image, str) else image
