"""A folder of images as records: files found recursively, described by a table, by JSON beside them or by class folders.

Sources: the layout of Hugging Face's `imagefolder` (metadata.csv or metadata.jsonl with a `file_name` column); the
tables of the ISIC challenges and of isic-cli, which name images by id; the archive's JSON files, NAME.json beside
NAME.jpg.
Differs from `imagefolder`: a table that names an image which is not there is an error, and so is a folder whose name is
no known class, unless all images lie in that one folder.
It does not open the images: a file is a record even if it turns out to be corrupt, and loading counts it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset

from isic_vq.data.classes import UNKNOWN, Classes, Reading
from isic_vq.data.schema import FEATURES, DataError, is_label, is_read, normalise
from isic_vq.data.sources.base import Source
from isic_vq.data.sources.image_files import image_id, image_names
from isic_vq.data.sources.sidecar import read_sidecar
from isic_vq.data.tables import is_table, raise_together, read_table
from isic_vq.data.uri import find_folder, public_path

# The column of a table that names the image: a file with its folders, or an id without suffix; the first counts.
NAME_COLUMNS = ("file_name", "isic_id", "image_id", "image_name", "image", "image_file")
FILES_PER_PART = 64

Row = tuple[str, dict[str, Any]]  # place, for messages, and values


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
        (folder,) = find_folder(target)
        return cls(f"folder:{public_path(target)}", Path(folder))

    def parts(self) -> list[list[dict[str, Any]]]:
        """The records themselves, in lists: their images are paths."""
        records = self._records()
        return [records[start : start + FILES_PER_PART] for start in range(0, len(records), FILES_PER_PART)]

    def records_of(self, part: list[dict[str, Any]], reading: Reading) -> Iterator[dict[str, Any]]:
        """The records of a part."""
        yield from part

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        """The rows of all files."""
        for record in read_folder(self.folder, reading):
            yield {name: value for name, value in record.items() if name != "image"}

    def fingerprint(self) -> str:
        """As `folder_fingerprint`."""
        return folder_fingerprint(self.folder)

    def dataset(self) -> Dataset:
        """All records; images are paths."""
        return Dataset.from_list(self._records(), features=FEATURES)

    def _records(self) -> list[dict[str, Any]]:
        return list(self.checked(lambda reading: read_folder(self.folder, reading)))


def read_folder(folder: Path, reading: Reading | None = None) -> list[dict[str, Any]]:
    """Return one record per image file, in the order of the relative names, under the names of `FEATURES`.

    A record's `image` is the path of its file. What is known of an image is its row of the table; without one,
    NAME.json beside it. The table is metadata.csv, .tsv, .tab or .jsonl in the folder itself, else the only file there
    that ends so. An image without a diagnosis in it has that of the nearest folder that is called like a known class,
    else of the folder it lies in. Its `isic_id` is the table's, else the file's name without suffix, or the whole
    relative name where two files share that.

    Args:
        folder: searched recursively, see `image_names`.
        reading: names classes and is told what is left out.

    Raises:
        DataError: there is no image, or the metadata cannot be used; all rows that cannot are named together.
    """
    reading = reading or Reading()
    names, others = image_names(folder, reading)
    path = _find_table(folder, others)
    table = {} if path is None else _table_rows(folder / path, names, reading)
    sidecars = {PurePosixPath(name).with_suffix(".json").as_posix() for name in names} & set(others)
    for name in others:
        if name != path and name not in sidecars:
            reading.leave_out("no image by its name", name)
    tells_classes = any(is_label(column) for _, row in table.values() for column in row)
    labels = class_folders(names, reading.classes, known_only=tells_classes)
    stems = Counter(PurePosixPath(name).stem for name in names)
    records, problems = [], []
    for name in names:
        sidecar = PurePosixPath(name).with_suffix(".json").as_posix()
        where, described = table.get(name, (name, {}))
        if path is not None and name not in table:
            reading.note(f"images without a row in {path}", name)
        if name not in table and sidecar in sidecars:
            where, described = (
                sidecar,
                read_sidecar((folder / name).with_suffix(".json").read_bytes(), sidecar),
            )
        try:
            record = normalise(
                {"file_name": name, **described}, where, reading=reading, label=labels.get(name)
            )
        except DataError as error:
            problems.append(str(error))
            continue
        stem = PurePosixPath(name).stem
        if record["isic_id"] == stem:
            record["isic_id"] = name if stems[stem] > 1 else image_id(stem)
        records.append({"image": None, **record} | {"image": str(folder / name)})
    raise_together(problems, path or folder.name)
    if len({PurePosixPath(name).parent for name in names}) == 1 and not labels and "/" in names[0]:
        for name, record in zip(names, records, strict=False):
            if record["diagnosis"] == UNKNOWN:
                reading.note("images in one folder, which is no known class and not taken for one", name)
    return records


def folder_fingerprint(folder: Path) -> str:
    """Return the sha256 over names and contents of the images, the table and the JSON files, as hex digits."""
    images, others = image_names(folder)
    sidecars = {PurePosixPath(name).with_suffix(".json").as_posix() for name in images} & set(others)
    names = [*images, *sidecars]
    if (table := _find_table(folder, others)) is not None:
        names.append(table)
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(json.dumps([name, file_digest(folder / name)]).encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's content, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_table(folder: Path, others: Sequence[str]) -> str | None:
    """Return the file of the folder itself that describes the images, or None if there is none."""
    tables = [name for name in others if "/" not in name and is_table(name)]
    named = [name for name in tables if PurePosixPath(name).stem.lower() == "metadata"]
    if len(named) > 1:
        raise DataError(f"The folder {folder.name!r} has {' and '.join(named)}; keep one of them.")
    if not named and len(tables) > 1:
        raise DataError(
            f"The folder {folder.name!r} has several tables ({', '.join(tables)}). Join them in one metadata.csv, or "
            "leave one."
        )
    return next(iter(named or tables), None)


def _table_rows(path: Path, names: list[str], reading: Reading) -> dict[str, Row]:
    """Return the table's rows by the name of their image, each with its place."""
    by_stem: dict[str, list[str]] = {}
    for name in names:
        stem = PurePosixPath(name).stem
        for key in {stem, image_id(stem)}:
            by_stem.setdefault(key, []).append(name)
    known, missing, problems = set(names), [], []
    rows: dict[str, Row] = {}
    records = read_table(path.read_bytes(), path.name)
    for number, record in enumerate(records):
        where = f"{path.name}, row {number}"
        column = next((column for column in NAME_COLUMNS if column in record), None)
        if column is None or not record[column]:
            problems.append(
                f"{where}: no {column or 'file_name'}. Expected a column file_name, or one with the image's id "
                f"({', '.join(NAME_COLUMNS[1:])}), filled in every row."
            )
            continue
        name = PurePosixPath(str(record[column]).strip().replace("\\", "/")).as_posix()
        found = [name] if name in known else []
        if column != "file_name" and not found:
            found = by_stem.get(name, [])
        if len(found) > 1:
            problems.append(f"{where}: {name} may be {' or '.join(found)}; name it in a column file_name.")
            continue
        missing += [] if found else [name]
        for image in found:
            if image in rows:
                problems.append(f"{where}: {name} is named twice; keep one row per image.")
            rows[image] = (where, record)
    raise_together(problems, path.name)
    if missing:
        raise DataError(
            f"{path.name} names {len(missing)} image(s) that are not in the folder, for example "
            f"{', '.join(sorted(missing)[:3])}. Expected file names relative to the folder, or ids of images in it; "
            "correct or remove these rows."
        )
    for column in dict.fromkeys(name for record in records for name in record):
        if column not in NAME_COLUMNS and not is_read(column):
            reading.note(f"columns of {path.name} that are not read", column or "(without a name)")
    return rows


def class_folders(names: Sequence[str], classes: Classes, known_only: bool = False) -> dict[str, str]:
    """Return the folder's name that tells an image's class, by the image's name; images in none are not there.

    That is the nearest folder called like a known class, else the one that the image lies in, unless that is the same
    for all: then it is no class.

    Args:
        names: of all images, relative to the source's folder.
        classes: the names that labels may have.
        known_only: take no folder for a class that is not called like a known one.
    """
    found = {name: folder_label(name, classes) for name in names}
    guessed = {name: label for name, (label, is_known) in found.items() if label and not is_known}
    is_one = len(set(guessed.values())) == 1 and len(guessed) == len(names) and classes.others != "take"
    is_taken = not (is_one or known_only)
    return {name: label for name, (label, is_known) in found.items() if label and (is_known or is_taken)}


def folder_label(name: str, classes: Classes) -> tuple[str | None, bool]:
    """Return the folder's name that may tell a file's class, None without folders, and whether that is a known class."""
    known = replace(classes, others="stop") if classes.others == "take" else classes
    folders = [part for part in PurePosixPath(name).parts[:-1] if part not in ("/", "..")]
    label = next((part for part in reversed(folders) if known.resolve(part) is not None), None)
    return label or next(reversed(folders), None), label is not None
