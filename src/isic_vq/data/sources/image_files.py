"""Files below a folder, and which of them are images: what is left out is told to the reading."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from isic_vq.data.classes import Reading
from isic_vq.data.errors import DataError
from isic_vq.data.uri import IMAGE_SUFFIXES

# What ISIC's archives put beside ISIC_0000001.jpg, and others beside images of any name.
_COMPANION = re.compile(r"(.+?)[._](segmentation|superpixels|mask|seg|attribute_\w+)", re.IGNORECASE)
_ISIC_ID = re.compile(r"ISIC_\d{7}", re.IGNORECASE)
_DOWNSAMPLED = "_downsampled"


def is_image(name: str) -> bool:
    """Whether a file's name ends as one of an image does."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_mask(stem: str, stems: Iterable[str]) -> bool:
    """Whether a file without its suffix is called like a mask or the superpixels of an image.

    Args:
        stem: the file's.
        stems: of the images beside it; an ISIC id needs no image beside its mask.
    """
    match = _COMPANION.fullmatch(stem)
    return match is not None and (_ISIC_ID.fullmatch(match[1]) is not None or match[1] in stems)


def image_id(stem: str) -> str:
    """The id of an image by its file's name: in 2019 ISIC gives some as ISIC_0000002_downsampled."""
    name = stem.removesuffix(_DOWNSAMPLED)
    return name if _ISIC_ID.fullmatch(name) else stem


def image_names(folder: Path, reading: Reading | None = None) -> tuple[list[str], list[str]]:
    """The sorted names of a folder's images, relative to it with forward slashes, and those of its other files.

    Masks, superpixels, copies of less resolution, hidden files and folders that links lead to again are left out.

    Args:
        folder: searched recursively, through links.
        reading: told what is left out, but for the other files.

    Raises:
        DataError: there is no image.
    """
    reading = reading or Reading()
    names = sorted(_walk(folder, reading))
    found = [name for name in names if is_image(name)]
    stems = {PurePosixPath(name).stem for name in found}
    images = []
    for name in found:
        stem = PurePosixPath(name).stem
        if is_mask(stem, stems):
            reading.leave_out("a mask or superpixels", name)
        elif image_id(stem) != stem and image_id(stem) in stems:
            reading.leave_out("a copy of less resolution", name)
        else:
            images.append(name)
    if not images:
        masks = f" ({len(found)} files there are masks or superpixels)" if found else ""
        raise DataError(
            f"No images in the folder {folder.name!r} or below{masks}: expected files that end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}. Parquet files are read with parquet:PATTERN."
        )
    return images, [name for name in names if not is_image(name)]


def _walk(folder: Path, reading: Reading) -> Iterator[str]:
    """Names of all files below a folder, each folder once: a link may lead to one that is there already, or around."""
    seen: set[tuple[int, int]] = set()

    def visit(directory: Path) -> Iterator[str]:
        status = directory.stat()
        if (status.st_dev, status.st_ino) in seen:
            reading.leave_out(
                "a link to a folder that is read already", directory.relative_to(folder).as_posix()
            )
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = Path(entry.path)
                if entry.name.startswith((".", "__MACOSX")):
                    reading.leave_out("hidden", path.relative_to(folder).as_posix())
                elif entry.is_dir():
                    yield from visit(path)
                elif entry.is_file():
                    yield path.relative_to(folder).as_posix()
                else:
                    reading.leave_out("a broken link or no file", path.relative_to(folder).as_posix())

    yield from visit(folder)
