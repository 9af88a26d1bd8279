"""A folder of images as records: files found recursively, described by a metadata file or by class folders.

Source: the layout of Hugging Face's `imagefolder` (metadata.csv or metadata.jsonl with a `file_name` column).
Differs: class folders count only where their name is a known diagnosis (`imagefolder` takes any folder name,
even a host, for a class), and metadata that names a file which is not there is an error.
It does not open the images: a file is a record even if it turns out to be corrupt, and loading counts it.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset

from isic_vq.data.schema import FEATURES, DataError, normalise
from isic_vq.data.sources.base import Source
from isic_vq.models.diagnosis import canonical_diagnosis

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
FILES_PER_PART = 64


@dataclass(frozen=True)
class FolderSource(Source):
    """Images below a directory.

    Attributes:
        name: as `Source` has it.
        folder: the directory.
    """

    name: str
    folder: Path

    def parts(self) -> list[list[dict[str, Any]]]:
        """The records themselves, in lists: their images are paths."""
        records = read_folder(self.folder)
        return [records[start : start + FILES_PER_PART] for start in range(0, len(records), FILES_PER_PART)]

    def read(self, part: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The records of a part."""
        yield from part

    def metadata(self) -> list[dict[str, Any]]:
        """The rows of all files."""
        return [
            {name: value for name, value in row.items() if name != "image"}
            for row in read_folder(self.folder)
        ]

    def fingerprint(self) -> str:
        """As `folder_fingerprint`."""
        return folder_fingerprint(self.folder)

    def dataset(self) -> Dataset:
        """All records; images are paths."""
        return Dataset.from_list(read_folder(self.folder), features=FEATURES)


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """Return one record per image file, in the order of the relative names, under the names of `FEATURES`.

    A record's `image` is the path of its file. An image that the metadata does not mention, or mentions
    without a diagnosis, has the diagnosis of the nearest folder that is called like one, else `unknown`. Its
    `isic_id` is the metadata's, else the file's name without suffix, or the whole relative name where two
    files share that.

    Args:
        folder: searched recursively; hidden files and folders are left out.

    Raises:
        DataError: there is no image, or the metadata cannot be used.
    """
    names = image_names(folder)
    metadata = _read_metadata(folder)
    missing = sorted(set(metadata) - set(names))
    if missing:
        raise DataError(
            f"The metadata names {len(missing)} file(s) that are not in the folder, for example "
            f"{', '.join(missing[:3])}. Expected file_name relative to the folder; correct or remove these rows."
        )
    stems = Counter(PurePosixPath(name).stem for name in names)
    records = []
    for name in names:
        where, described = metadata.get(name, (name, {}))
        record = normalise({"file_name": name, **described}, where)
        if record["diagnosis"] == "unknown":
            record["diagnosis"] = _class_folder(name)
        if record["isic_id"] == PurePosixPath(name).stem and stems[record["isic_id"]] > 1:
            record["isic_id"] = name
        records.append({"image": None, **record} | {"image": str(folder / name)})
    return records


def image_names(folder: Path) -> list[str]:
    """Return the sorted names of a folder's image files, relative to it, with forward slashes.

    Raises:
        DataError: there is none.
    """
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    names = sorted(
        path.as_posix()
        for path in files
        if not any(part.startswith(".") for part in path.parts) and (folder / path).is_file()
    )
    if not names:
        raise DataError(
            f"No images in the folder {folder.name!r} or below: expected files that end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}. Parquet files are read with parquet:PATTERN."
        )
    return names


def folder_fingerprint(folder: Path) -> str:
    """Return the sha256 over names and contents of the images and the metadata file, as hex digits."""
    names = [*image_names(folder), *(name for name in METADATA_NAMES if (folder / name).is_file())]
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(json.dumps([name, file_digest(folder / name)]).encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's content, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_metadata(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the metadata's rows by file name, each with its place; empty without a metadata file."""
    present = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(present) > 1:
        raise DataError(f"The folder {folder.name!r} has {' and '.join(METADATA_NAMES)}; keep one of them.")
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in present:
        for row, record in enumerate(_read_csv(path) if path.suffix == ".csv" else _read_jsonl(path)):
            where = f"{path.name}, row {row}"
            if not record.get("file_name"):
                raise DataError(f"{where}: no file_name. Expected a column file_name, filled in every row.")
            name = PurePosixPath(str(record["file_name"]).strip().replace("\\", "/")).as_posix()
            if name in rows:
                raise DataError(f"{where}: {name} is named twice; keep one row per image.")
            rows[name] = (where, record)
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file with a header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that has one JSON object per line."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path.name}, line {number} is not JSON: {error}. Expected one object per line."
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path.name}, line {number} is a {type(record).__name__}; expected one object per line."
            )
        records.append(record)
    return records


def _class_folder(name: str) -> str:
    """Return the diagnosis that the nearest enclosing folder is called by, or `unknown`."""
    for part in reversed(PurePosixPath(name).parts[:-1]):
        try:
            return canonical_diagnosis(part)
        except ValueError:
            continue
    return "unknown"
