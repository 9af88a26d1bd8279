"""A folder of images as records: files found recursively, described by a table, by JSON beside them or by class folders.

Sources: the layout of Hugging Face's `imagefolder` (metadata.csv or metadata.jsonl with a `file_name` column); the
tables of the ISIC challenges and of isic-cli, which name images by id; the archive's JSON files, NAME.json beside
NAME.jpg.
Differs from `imagefolder`: class folders count only where their name is a known diagnosis (it takes any folder
name, even a host, for a class), and a table that names an image which is not there is an error.
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
from isic_vq.data.sources.sidecar import read_sidecar
from isic_vq.data.sources.uri import expand_path, public_path
from isic_vq.models.diagnosis import canonical_diagnosis

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
# The column of a table that names the image: a file with its folders, or an id without suffix; the first counts.
NAME_COLUMNS = ("file_name", "isic_id", "image_id", "image_name", "image", "image_file")
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

    @classmethod
    def from_target(cls, target: str) -> "FolderSource":
        """Find a directory.

        Raises:
            DataError: there is none.
        """
        name, folder = f"folder:{public_path(target)}", Path(expand_path(target))
        if not folder.is_dir():
            raise DataError(f"{name} is not a directory. Expected folder:DIR with images in DIR or below.")
        return cls(name, folder)

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

    A record's `image` is the path of its file. What is known of an image is its row of the table; without one,
    NAME.json beside it. The table is metadata.csv or metadata.jsonl in the folder itself, else the only file there
    that ends in .csv or .jsonl. An image without a diagnosis in it has that of the nearest folder that is called
    like one, else `unknown`. Its `isic_id` is the table's, else the file's name without suffix, or the whole
    relative name where two files share that.

    Args:
        folder: searched recursively; hidden files and folders are left out.

    Raises:
        DataError: there is no image, or the metadata cannot be used.
    """
    names = image_names(folder)
    table = _read_table(folder, names)
    stems = Counter(PurePosixPath(name).stem for name in names)
    records = []
    for name in names:
        sidecar = (folder / name).with_suffix(".json")
        where, described = table.get(name, (name, {}))
        if name not in table and sidecar.is_file():
            where = PurePosixPath(name).with_suffix(".json").as_posix()
            described = read_sidecar(sidecar.read_bytes(), where)
        record = normalise({"file_name": name, **described}, where)
        if record["diagnosis"] == "unknown":
            record["diagnosis"] = class_folder(name)
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
    """Return the sha256 over names and contents of the images, the table and the JSON files, as hex digits."""
    images = image_names(folder)
    sidecars = {PurePosixPath(name).with_suffix(".json").as_posix() for name in images}
    names = [*images, *(name for name in sidecars if (folder / name).is_file())]
    if (table := _find_table(folder)) is not None:
        names.append(table.name)
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(json.dumps([name, file_digest(folder / name)]).encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's content, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_table(folder: Path) -> Path | None:
    """Return the file that describes the images, or None if there is none."""
    present = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(present) > 1:
        raise DataError(f"The folder {folder.name!r} has {' and '.join(METADATA_NAMES)}; keep one of them.")
    if not present:
        present = sorted(
            path for path in folder.glob("[!.]*") if path.suffix in (".csv", ".jsonl") and path.is_file()
        )
    if len(present) > 1:
        raise DataError(
            f"The folder {folder.name!r} has several tables ({', '.join(path.name for path in present)}). Join them in "
            "one metadata.csv, or leave one."
        )
    return present[0] if present else None


def _read_table(folder: Path, names: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the table's rows by the name of their image, each with its place; empty without a table."""
    path = _find_table(folder)
    if path is None:
        return {}
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(PurePosixPath(name).stem, []).append(name)
    known, missing = set(names), []
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, record in enumerate(_read_csv(path) if path.suffix == ".csv" else _read_jsonl(path)):
        where = f"{path.name}, row {number}"
        column = next((column for column in NAME_COLUMNS if column in record), None)
        if column is None or not record[column]:
            raise DataError(
                f"{where}: no {column or 'file_name'}. Expected a column file_name, or one with the image's id "
                f"({', '.join(NAME_COLUMNS[1:])}), filled in every row."
            )
        name = PurePosixPath(str(record[column]).strip().replace("\\", "/")).as_posix()
        found = [name] if name in known else []
        if column != "file_name" and not found:
            found = by_stem.get(name, [])
        if len(found) > 1:
            raise DataError(f"{where}: {name} may be {' or '.join(found)}; name it in a column file_name.")
        missing += [] if found else [name]
        for image in found:
            if image in rows:
                raise DataError(f"{where}: {name} is named twice; keep one row per image.")
            rows[image] = (where, record)
    if missing:
        raise DataError(
            f"{path.name} names {len(missing)} image(s) that are not in the folder, for example "
            f"{', '.join(sorted(missing)[:3])}. Expected file names relative to the folder, or ids of images in it; "
            "correct or remove these rows."
        )
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


def class_folder(name: str) -> str:
    """Return the diagnosis that the nearest enclosing folder is called by, or `unknown`."""
    for part in reversed(PurePosixPath(name).parts[:-1]):
        try:
            return canonical_diagnosis(part)
        except ValueError:
            continue
    return "unknown"
