"""Parquet files with an `image` column, as the Hugging Face stack writes them."""

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets, load_dataset

from isic_vq.data.classes import Reading
from isic_vq.data.schema import FEATURES, DataError, normalise
from isic_vq.data.sources.base import Source
from isic_vq.data.sources.folder import file_digest
from isic_vq.data.uri import expand_path, find_parquet, public_path

_SPLIT_PREFIX = re.compile(r"(train|val|test|dev)", re.IGNORECASE)


@dataclass(frozen=True)
class ParquetSource(Source):
    """Rows of parquet files.

    Attributes:
        name: as `Source` has it.
        files: in the order of their rows.
    """

    name: str
    files: tuple[Path, ...]

    @classmethod
    def from_target(cls, target: str) -> "ParquetSource":
        """Find the files of a path, directory or pattern.

        Raises:
            DataError: there are none, or they cannot be used together.
        """
        name = f"parquet:{public_path(target)}"
        return cls(
            name, _usable(list(map(Path, find_parquet(target))), name, os.path.isdir(expand_path(target)))
        )

    def parts(self) -> list[tuple[Path, int, int]]:
        """Row groups: file, number of the group, and of its first row in the file."""
        found = []
        for path in self.files:
            metadata = pyarrow.parquet.read_metadata(path)
            first = 0
            for group in range(metadata.num_row_groups):
                found.append((path, group, first))
                first += metadata.row_group(group).num_rows
        return found

    def records_of(self, part: tuple[Path, int, int], reading: Reading) -> Iterator[dict[str, Any]]:
        """Yield the rows of a row group, images as they are stored, a few rows in memory at a time.

        This reads by pyarrow because a stream of `datasets` over parquet that is left early hangs at the
        interpreter's exit. An image's path is dropped where there are bytes: `datasets` prefers a file of that
        name in the working directory, which may be another image.
        """
        path, group, row = part
        with pyarrow.parquet.ParquetFile(path) as file:
            names = _class_names(Features.from_arrow_schema(file.schema_arrow))
            for batch in file.iter_batches(batch_size=64, row_groups=[group], use_threads=False):
                for record in batch.to_pylist():
                    normal = normalise(record, f"{path.name}, row {row}", names, reading)
                    image = _stored_image(normal["image"])
                    if isinstance(image, dict):
                        check_inside(image["path"], (path,), f"{path.name}, row {row}")
                    yield {**normal, "image": image}
                    row += 1

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        """The rows of all files."""
        return _rows(_load(self.files), reading, self.files)

    def fingerprint(self) -> str:
        """Of the files' contents, whatever their names."""
        digests = sorted(file_digest(path) for path in self.files)
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def dataset(self) -> Dataset:
        """All rows, without copying or decoding an image."""
        table = _load(self.files)
        rows = list(self.checked(lambda reading: _rows(table, reading, self.files, numbered=True)))
        images = table.select_columns("image").cast_column("image", Image())
        kept = [row.pop("number") for row in rows]
        if len(kept) < len(images):
            images = images.select(kept)
        metadata = Dataset.from_list(
            rows, features=Features({k: v for k, v in FEATURES.items() if k != "image"})
        )
        return concatenate_datasets([images, metadata], axis=1)


def _usable(files: list[Path], name: str, is_folder: bool) -> tuple[Path, ...]:
    """Return those of the files that hold rows, once they can be read together."""
    splits = sorted({match[0].lower() for file in files if (match := _SPLIT_PREFIX.match(file.name))})
    if len(splits) > 1 and is_folder:  # a pattern may mean all of them
        raise DataError(
            f"{name} holds several splits ({', '.join(splits)}). Name one by a pattern: {splits[0]}*.parquet."
        )
    columns: dict[str, Path] = {}
    for file in files:
        columns.setdefault(", ".join(sorted(_column_names(file))), file)
    if len(columns) > 1:
        listed = "; ".join(f"{file.name}: {names}" for names, file in columns.items())
        raise DataError(
            f"The files of {name} have different columns ({listed}). Open them as separate sources."
        )
    files = [file for file in files if pyarrow.parquet.read_metadata(file).num_rows > 0]
    if not files:
        raise DataError(f"{name} has no rows. Expected one row per image.")
    return tuple(files)


def _column_names(file: Path) -> list[str]:
    """Return the columns of a parquet file, which must have `image` among them."""
    try:
        schema = pyarrow.parquet.read_schema(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file.name} is not a readable parquet file: {error}") from error
    columns = schema.names
    if "image" not in columns:
        raise DataError(
            f"{file.name} has no column image, only {', '.join(columns)}. Rename the column of the images."
        )
    kind = schema.field("image").type
    names = {field.name for field in kind} if pyarrow.types.is_struct(kind) else set()
    if not (
        names & {"bytes", "path"} or str(kind) in ("binary", "large_binary", "string", "large_string", "null")
    ):
        raise DataError(f"{file.name}: the column image holds {kind}, expected images or their bytes.")
    return columns


def _load(paths: tuple[Path, ...]) -> Dataset:
    return load_dataset("parquet", data_files=[glob.escape(str(file)) for file in paths], split="train")


def check_inside(path: str, files: tuple[Path, ...], where: str) -> None:
    """Refuse an image's path that leaves the folders of the files that name it.

    Raises:
        DataError: it does.
    """
    if not any(Path(path).resolve().is_relative_to(file.resolve().parent) for file in files):
        raise DataError(
            f"{where}: the image {path!r} is outside of the parquet file's folder: store its bytes"
        )


def _rows(
    table: Dataset, reading: Reading, files: tuple[Path, ...], numbered: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the rows without images, each with its `number` if these are asked for."""
    images = table.select_columns("image").cast_column("image", Image())
    column = images.data.column("image")
    paths = pyarrow.compute.struct_field(column, "path").to_pylist()
    is_stored = pyarrow.compute.struct_field(column, "bytes").is_valid().to_pylist()
    names = _class_names(table.features)
    for index, row in enumerate(table.remove_columns("image").to_list()):
        if paths[index] is not None and not is_stored[index]:
            check_inside(paths[index], files, f"row {index}")
        normal = normalise({**row, "image": {"path": paths[index]}}, f"row {index}", names, reading)
        del normal["image"]
        yield {**normal, "number": index} if numbered else normal


def _stored_image(image: dict[str, Any] | str | bytes | None) -> dict[str, Any] | bytes | None:
    """Return an image's bytes, its path where it has no bytes, or None where it has neither."""
    if isinstance(image, str):
        return {"bytes": None, "path": image}
    if not isinstance(image, dict):
        return image
    if image.get("bytes") is not None:
        return image["bytes"]
    return {"bytes": None, "path": image["path"]} if image.get("path") is not None else None


def _class_names(features: Features) -> dict[str, list[str]]:
    return {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}
