"""A folder of images as records: files found recursively, described by a table, JSON beside them or class folders.

Sources: the layout of Hugging Face's `imagefolder` (metadata.csv or metadata.jsonl with a column `file_name`); tables of
the ISIC challenges and of isic-cli, which name images by id; the archive's JSON files, NAME.json beside NAME.jpg.
Differs from `imagefolder`: a table row without its image is an error, and so is a folder whose name is no known class,
unless all images lie in that one folder. Images are not opened: loading counts the corrupt ones.
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
from isic_vq.data.schema import FEATURES, DataError, is_label, is_read, normalise, without_image
from isic_vq.data.sources.base import Source
from isic_vq.data.sources.image_files import file_digest, image_id, image_names, read_sidecar
from isic_vq.data.tables import is_table, raise_together, read_table
from isic_vq.data.uri import find_folder, public_path

# Columns of a table that may name the image, by its path or by an id without suffix; the first one counts.
NAME_COLUMNS = ("file_name", "isic_id", "image_id", "image_name", "image", "image_file")
FILES_PER_PART = 64


@dataclass(frozen=True)
class FolderSource(Source):
    """Images below a directory."""

    name: str
    folder: Path

    @classmethod
    def from_target(cls, target: str) -> "FolderSource":
        (folder,) = find_folder(target)
        return cls(f"folder:{public_path(target)}", Path(folder))

    def parts(self) -> list[list[dict[str, Any]]]:
        """Cut the list of records into parts; their images are paths."""
        records = self._records()
        return [records[start : start + FILES_PER_PART] for start in range(0, len(records), FILES_PER_PART)]

    def records_of(
        self, part: list[dict[str, Any]], reading: Reading, with_images: bool = True
    ) -> Iterator[dict[str, Any]]:
        yield from part

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        return map(without_image, read_folder(self.folder, reading))

    def fingerprint(self) -> str:
        """The sha256 over names and contents of the images, the table and the JSON files."""
        images, others = image_names(self.folder)
        table = _find_table(self.folder, others)
        digest = hashlib.sha256()
        for name in sorted([*images, *_sidecars(images, others), *([table] if table else [])]):
            digest.update(json.dumps([name, file_digest(self.folder / name)]).encode())
        return digest.hexdigest()

    def dataset(self) -> Dataset:
        return Dataset.from_list(self._records(), features=FEATURES)

    def _records(self) -> list[dict[str, Any]]:
        return list(self.checked(lambda reading: read_folder(self.folder, reading)))


def read_folder(folder: Path, reading: Reading | None = None) -> list[dict[str, Any]]:
    """Read one record per image, in the order of the relative names; `image` is the path.

    An image is described by its row of the table, else by NAME.json beside it. The table is metadata.csv, .tsv, .tab or
    .jsonl in the folder itself, else the only such file there. Without a diagnosis the class is that of the nearest folder
    that is named like a known class, else of the folder that the image lies in. The `isic_id` is the table's, else the file's
    stem, or its relative name where two files share the stem. A DataError names all wrong rows together.
    """
    reading = reading or Reading()
    names, others = image_names(folder, reading)
    path = _find_table(folder, others)
    table = {} if path is None else _table_rows(folder / path, names, reading)
    sidecars = _sidecars(names, others)
    for name in others:
        if name != path and name not in sidecars:
            reading.leave_out("no image by its name", name)
    tells_classes = any(is_label(column) for _, row in table.values() for column in row)
    labels = class_folders(names, reading.classes, known_only=tells_classes)
    stems = Counter(PurePosixPath(name).stem for name in names)
    records, problems = [], []
    for name in names:
        sidecar = PurePosixPath(name).with_suffix(".json").as_posix()
        where, values = table.get(name, (name, {}))
        if path is not None and name not in table:
            reading.note(f"images without a row in {path}", name)
        if name not in table and sidecar in sidecars:
            where, values = sidecar, read_sidecar((folder / sidecar).read_bytes(), sidecar)
        try:
            record = normalise({"file_name": name, **values}, where, reading=reading, label=labels.get(name))
        except DataError as error:
            problems.append(str(error))
            continue
        stem = PurePosixPath(name).stem
        if record["isic_id"] == stem:
            record["isic_id"] = name if stems[stem] > 1 else image_id(stem)
        records.append({"image": str(folder / name), **without_image(record)})
    raise_together(problems, path or folder.name)
    if len({PurePosixPath(name).parent for name in names}) == 1 and not labels and "/" in names[0]:
        for name, record in zip(names, records, strict=True):
            if record["diagnosis"] == UNKNOWN:
                reading.note("images in one folder, which is no known class and not taken for one", name)
    return records


def _sidecars(images: Sequence[str], others: Sequence[str]) -> set[str]:
    return {PurePosixPath(name).with_suffix(".json").as_posix() for name in images} & set(others)


def _find_table(folder: Path, others: Sequence[str]) -> str | None:
    """The file of the folder itself that describes the images; None if there is none."""
    tables = [name for name in others if "/" not in name and is_table(name)]
    named = [name for name in tables if PurePosixPath(name).stem.lower() == "metadata"]
    if len(named) > 1:
        raise DataError(f"The folder {folder.name!r} has {' and '.join(named)}; keep one of them.")
    if not named and len(tables) > 1:
        raise DataError(
            f"The folder {folder.name!r} has several tables ({', '.join(tables)}). Join them in one, metadata.csv."
        )
    return next(iter(named or tables), None)


def _table_rows(path: Path, names: list[str], reading: Reading) -> dict[str, tuple[str, dict[str, Any]]]:
    """The table's rows by the name of their image, each with its place for messages."""
    by_stem: dict[str, list[str]] = {}
    for name in names:
        stem = PurePosixPath(name).stem
        for key in {stem, image_id(stem)}:
            by_stem.setdefault(key, []).append(name)
    known, missing, problems = set(names), [], []
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
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
        images = [name] if name in known else by_stem.get(name, []) if column != "file_name" else []
        if len(images) > 1:
            problems.append(f"{where}: {name} may be {' or '.join(images)}; name it in a column file_name.")
        elif not images:
            missing.append(name)
        elif images[0] in rows:
            problems.append(f"{where}: {name} is named twice; keep one row per image.")
        else:
            rows[images[0]] = (where, record)
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
    """The folder that names an image's class, by the image's relative name; images without one are absent.

    That is the nearest folder named like a known class, else, unless `known_only`, the one that the image lies in. A
    single folder that holds all images and is no known class says nothing.
    """
    labels = {name: folder_label(name, classes) for name in names}
    guesses = [label for label, is_known in labels.values() if label and not is_known]
    is_one_folder = len(set(guesses)) == 1 and len(guesses) == len(names) and classes.others != "take"
    known_only = known_only or is_one_folder
    return {
        name: label for name, (label, is_known) in labels.items() if label and (is_known or not known_only)
    }


def folder_label(name: str, classes: Classes) -> tuple[str | None, bool]:
    """The folder that may name a file's class, None without folders, and whether it is a known class."""
    known = replace(classes, others="stop") if classes.others == "take" else classes
    folders = [part for part in PurePosixPath(name).parts[:-1] if part not in ("/", "..")]
    label = next((part for part in reversed(folders) if known.resolve(part) is not None), None)
    return label or next(reversed(folders), None), label is not None
