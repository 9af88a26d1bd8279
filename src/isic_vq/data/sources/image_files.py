"""Files below a folder: which of them are images, and what a JSON file beside an image says.

Sources of the JSON: the ISIC archive, version 1 ({"name", "meta": {"clinical", "acquisition"}, "dataset"}) and version 2
of its API ({"isic_id", "copyright_license", "attribution", "metadata": {"clinical", "acquisition"}}), with a diagnosis by
name or by the levels diagnosis_1 to diagnosis_5. Any other object counts as flat, with names of `COLUMN_ALIASES`.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from isic_vq.data.classes import Reading
from isic_vq.data.errors import DataError
from isic_vq.data.uri import IMAGE_SUFFIXES
from isic_vq.models.diagnosis import archive_diagnosis

# What ISIC's archives put beside ISIC_0000001.jpg, and others beside images of any name.
_COMPANION = re.compile(r"(.+?)[._](segmentation|superpixels|mask|seg|attribute_\w+)", re.IGNORECASE)
_ISIC_ID = re.compile(r"ISIC_\d{7}", re.IGNORECASE)


def is_image(name: str) -> bool:
    """Whether a file has the suffix of an image."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_mask(stem: str, stems: Collection[str]) -> bool:
    """Whether a file is named like the mask of an image: of one of the `stems` beside it, or of any ISIC id."""
    match = _COMPANION.fullmatch(stem)
    return match is not None and (_ISIC_ID.fullmatch(match[1]) is not None or match[1] in stems)


def image_id(stem: str) -> str:
    """The id of an image from its file's stem; in 2019 ISIC names some ISIC_0000002_downsampled."""
    name = stem.removesuffix("_downsampled")
    return name if _ISIC_ID.fullmatch(name) else stem


def image_names(folder: Path, reading: Reading | None = None) -> tuple[list[str], list[str]]:
    """List the images, at least one, and the other files of a folder: sorted relative names with forward slashes.

    Masks, superpixels, downsampled copies, hidden files and folders that links lead to again are left out, which
    `reading` counts.
    """
    reading = reading or Reading()
    names = sorted(_walk(folder, folder, reading, set()))
    candidates = [name for name in names if is_image(name)]
    stems = {PurePosixPath(name).stem for name in candidates}
    images = []
    for name in candidates:
        stem = PurePosixPath(name).stem
        if is_mask(stem, stems):
            reading.leave_out("a mask or superpixels", name)
        elif image_id(stem) != stem and image_id(stem) in stems:
            reading.leave_out("a copy of less resolution", name)
        else:
            images.append(name)
    if not images:
        masks = f" ({len(candidates)} files there are masks or superpixels)" if candidates else ""
        raise DataError(
            f"No images in the folder {folder.name!r} or below{masks}: expected files that end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}. Parquet files are read with parquet:PATTERN."
        )
    return images, [name for name in names if not is_image(name)]


def _walk(root: Path, folder: Path, reading: Reading, seen: set[tuple[int, int]]) -> Iterator[str]:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:  # a link may lead back to a folder above it
        reading.leave_out("a link to a folder that is read already", folder.relative_to(root).as_posix())
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = Path(entry.path)
            name = path.relative_to(root).as_posix()
            if entry.name.startswith((".", "__MACOSX")):
                reading.leave_out("hidden", name)
            elif entry.is_dir():
                yield from _walk(root, path, reading, seen)
            elif entry.is_file():
                yield name
            else:
                reading.leave_out("a broken link or no file", name)


def file_digest(path: Path) -> str:
    """The sha256 of a file's content, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sidecar(content: bytes, where: str) -> dict[str, Any]:
    """Read the JSON object about an image, flattened to names that `normalise` reads; errors call it `where`."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:  # not UTF-8, too; thousands of brackets
        raise DataError(f"{where} is not JSON: {error}. Expected one object about the image.") from error
    if not isinstance(values, dict):
        raise DataError(f"{where} is a {type(values).__name__}; expected one JSON object about the image.")
    return flatten(values)


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Move the values of an object's groups to its top level."""
    flat = {name: value for name, value in values.items() if not isinstance(value, dict)}
    dataset = values.get("dataset")
    if isinstance(dataset, dict):
        flat |= {"source": dataset.get("name"), "license": dataset.get("license")}
    for outer in ("meta", "metadata"):
        groups = values.get(outer)
        for name in ("acquisition", "clinical"):
            group = groups.get(name) if isinstance(groups, dict) else None
            flat |= group if isinstance(group, dict) else {}
    if "meta" in values and "isic_id" not in flat:
        flat["isic_id"] = values.get("name")
    levels = [flat.get(f"diagnosis_{level}") for level in range(1, 6)]
    if any(levels):
        flat["diagnosis"] = archive_diagnosis([str(level) if level else None for level in levels])
    return flat
