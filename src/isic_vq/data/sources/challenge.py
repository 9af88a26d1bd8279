"""The ISIC challenges of 2016 to 2020: a zip archive of images, joined with its CSV files.

    challenge:2019           the training images of 2019
    challenge:2018:test      another part; 2018 is Task 3, the training images of which are HAM10000
    challenge:2018-task1     the images that were to be segmented in 2018; nothing says what they show

Source: the challenges' download pages (https://challenge.isic-archive.com/data/), which also state the licences
that are recorded here; the archive's licence of a single image may differ.
Differs: labels become the classes of this package. In 2016 "malignant" is melanoma, and "benign" is whatever is not:
unknown. In 2017 what is neither melanoma nor seborrheic keratosis is a nevus; in 2018 and 2019 a row without a 1 is
unknown. A row with two is an error: the table is not the challenge's.
The zip archive is opened once and never as a whole in memory; see `range_zip`.
"""

import functools
import hashlib
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname
from zipfile import ZipInfo

from isic_vq.data.classes import Reading
from isic_vq.data.http import RemoteSettings, Request, client
from isic_vq.data.schema import DataError, normalise
from isic_vq.data.sources.base import Source
from isic_vq.data.sources.range_zip import RangeZip
from isic_vq.data.tables import read_table
from isic_vq.data.uri import is_url, public_path

logger = logging.getLogger(__name__)

PART_BYTES = 4 << 20
PART_MEMBERS = 64
NAME_COLUMNS = ("image", "image_id", "image_name")
# In 2019 some images are called ISIC_0000002_downsampled. Masks, ISIC_0000002_segmentation.png, are no such name.
_IMAGE = re.compile(r"(ISIC_\d{7})(_downsampled)?\.jpe?g", re.IGNORECASE)
BCN_HAM_MSK = (
    "BCN_20000 (c) Department of Dermatology, Hospital Clinic de Barcelona; HAM10000 (c) ViDIR Group, Medical University "
    "of Vienna, doi 10.1038/sdata.2018.161; MSK (c) Anonymous, arXiv 1710.05006 and 1902.03368"
)
HAM = "HAM10000 (c) ViDIR Group, Medical University of Vienna, doi 10.1038/sdata.2018.161"
ISIC_2020 = "ISIC 2020 Challenge Dataset, doi 10.34970/2020-ds01, (c) by its contributors"
ISIC_CC0 = "ISIC Archive, International Skin Imaging Collaboration"


@dataclass(frozen=True)
class Release:
    """The files of one part of a challenge, relative to the challenges' address.

    Attributes:
        images: zip archive.
        tables: CSV files, or zip archives of one, whose rows are joined by the image's name; later ones add columns.
        license: as the download page states it.
        attribution: whom to name.
        in_archive_bucket: the files lie in the archive's bucket under `challenges/`.
    """

    images: str
    tables: tuple[str, ...]
    license: str
    attribution: str
    in_archive_bucket: bool = False


def _release_2016(part: str) -> Release:
    stem = f"2016/ISBI2016_ISIC_Part3_{part}"
    return Release(f"{stem}_Data.zip", (f"{stem}_GroundTruth.csv",), "CC-0", ISIC_CC0)


def _release_2017(part: str, data: str) -> Release:
    return Release(
        f"2017/ISIC-2017_{data}.zip",
        (f"2017/ISIC-2017_{part}_Part3_GroundTruth.csv",),
        "CC-0",
        ISIC_CC0,
        in_archive_bucket=True,
    )


def _release_2018(part: str, *more: str) -> Release:
    stem = f"2018/ISIC2018_Task3_{part}"
    return Release(f"{stem}_Input.zip", (f"{stem}_GroundTruth.zip", *more), "CC-BY-NC", HAM)


def _release_2018_task1(part: str) -> Release:
    return Release(f"2018/ISIC2018_Task1-2_{part}_Input.zip", (), "CC-0", ISIC_CC0)


def _release_2019(part: str) -> Release:
    stem = f"2019/ISIC_2019_{part}"
    return Release(
        f"{stem}_Input.zip", (f"{stem}_GroundTruth.csv", f"{stem}_Metadata.csv"), "CC-BY-NC", BCN_HAM_MSK
    )


RELEASES = {
    ("2016", "train"): _release_2016("Training"),
    ("2016", "test"): _release_2016("Test"),
    ("2017", "train"): _release_2017("Training", "Training_Data"),
    ("2017", "validation"): _release_2017("Validation", "Validation_Data"),
    ("2017", "test"): _release_2017("Test_v2", "Test_v2_Data"),
    ("2018", "train"): _release_2018("Training", "2018/ISIC2018_Task3_Training_LesionGroupings.csv"),
    ("2018", "validation"): _release_2018("Validation"),
    ("2018", "test"): _release_2018("Test"),
    ("2018-task1", "train"): _release_2018_task1("Training"),
    ("2018-task1", "validation"): _release_2018_task1("Validation"),
    ("2018-task1", "test"): _release_2018_task1("Test"),
    ("2019", "train"): _release_2019("Training"),
    ("2019", "test"): _release_2019("Test"),
    ("2020", "train"): Release(
        "2020/ISIC_2020_Training_JPEG.zip",
        ("2020/ISIC_2020_Training_GroundTruth_v2.csv",),
        "CC-BY-NC",
        ISIC_2020,
        in_archive_bucket=True,
    ),
    ("2020", "test"): Release(
        "2020/ISIC_2020_Test_JPEG.zip",
        ("2020/ISIC_2020_Test_Metadata.csv",),
        "CC-BY-NC",
        ISIC_2020,
        in_archive_bucket=True,
    ),
}


@dataclass(frozen=True)
class ChallengeSource(Source):
    """The images of one part of a challenge.

    Attributes:
        year: "2016" to "2020", or "2018-task1".
        part: "train", "validation" or "test".
    """

    year: str
    part: str

    @classmethod
    def from_target(cls, target: str) -> "ChallengeSource":
        """Parse YEAR[:PART].

        Raises:
            DataError: there is no such part of a challenge.
        """
        year, _, part = target.strip().partition(":")
        if (year, part or "train") not in RELEASES:
            known = ", ".join(":".join(key) for key in RELEASES)
            raise DataError(f"'challenge:{target}' is not known. Expected YEAR or YEAR:PART, of {known}.")
        return cls(year, part or "train")

    is_listed_cheaply = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """The URI with its part."""
        return f"challenge:{self.year}:{self.part}"

    @property
    def release(self) -> Release:
        """Its files."""
        return RELEASES[self.year, self.part]

    def parts(self) -> list[tuple[int, int]]:
        """Ranges of images that lie next to each other in the zip archive, by number."""
        contents, parts, start = self._contents(), [], 0
        images, ends = contents.images, contents.archive.ends
        for stop in range(1, len(images) + 1):
            num_bytes = ends[images[stop - 1].header_offset] - images[start].header_offset
            is_full = stop - start == PART_MEMBERS or num_bytes >= PART_BYTES
            if is_full or stop == len(images):
                parts.append((start, stop))
                start = stop
        return parts

    def records_of(self, part: tuple[int, int], reading: Reading) -> Iterator[dict[str, Any]]:
        """Yield the records of a range of images; one that cannot be read has no image, and a warning names it."""
        contents = self._contents()
        for member, content in contents.archive.read(contents.images[slice(*part)]):
            row = self._row(member, contents, reading)
            if isinstance(content, DataError):
                logger.warning("%s: %s has no image: %s", self.name, row["isic_id"], content)
            yield {"image": content if isinstance(content, bytes) else None, **row}

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        """The rows of all images; of the zip archive only the directory is read."""
        contents = self._contents()
        for name in contents.left_out:
            reading.leave_out("no photograph of the challenge", name)
        for member in contents.images:
            if self.release.tables and contents.ids[member.filename] not in contents.rows:
                reading.note("images in no table", contents.ids[member.filename])
            yield self._row(member, contents, reading)

    def fingerprint(self) -> str:
        """Of names, sizes and checksums in the archive's directory, and of the rows."""
        images = self._contents().images
        rows = [
            json.dumps([*row.values(), member.file_size, member.CRC])
            for member, row in zip(images, self.metadata(), strict=True)
        ]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    def _contents(self) -> "_Contents":
        return _open(self.name, self.release, RemoteSettings.from_environment())

    def _row(self, member: ZipInfo, contents: "_Contents", reading: Reading) -> dict[str, Any]:
        name, release = contents.ids[member.filename], self.release
        about = {**contents.rows.get(name, {}), "isic_id": name, "source": f"isic-challenge-{self.year}"}
        about |= {"license": release.license, "attribution": release.attribution}
        return normalise(about, self.name, reading=reading)


class _Contents(NamedTuple):
    """What was found in a release.

    Attributes:
        archive: of the images.
        images: its members that are photographs, in the order of their bytes.
        ids: of the images, by their names in the archive.
        rows: of the tables, by the image's id.
        left_out: names of the other files in the archive, which are masks, superpixels and notes.
    """

    archive: RangeZip
    images: tuple[ZipInfo, ...]
    ids: Mapping[str, str]
    rows: Mapping[str, dict[str, Any]]
    left_out: tuple[str, ...]


@functools.lru_cache(maxsize=4)
def _open(name: str, release: Release, settings: RemoteSettings) -> _Contents:
    """Look through the files of a release, once in a process."""
    archive = RangeZip.open(_locate(release, release.images, settings))
    rows = _read_tables([_locate(release, path, settings) for path in release.tables])
    named = {m.filename: found for m in archive.members if (found := _image_id(m.filename))}
    images, ids = tuple(m for m in archive.members if m.filename in named), set(named.values())
    if not ids:
        raise DataError(
            f"{name}: no file in {public_path(archive.location)} is called like ISIC_0000000.jpg. Expected the "
            "challenge's images."
        )
    if len(ids) != len(images):
        raise DataError(
            f"{name}: {len(images) - len(ids)} images of {public_path(archive.location)} have the id of another one. "
            "Keep one of each."
        )
    if release.tables:
        logger.info(
            "%s: %d images; %d of them are in no table, %d rows have no image",
            *(name, len(ids), len(ids - rows.keys()), len(rows.keys() - ids)),
        )
    left_out = tuple(m.filename for m in archive.members if m.filename not in named)
    return _Contents(archive, images, named, rows, left_out)


def _image_id(name: str) -> str | None:
    """The id of an image by its name in an archive; None for what is no photograph.

    Challenges keep masks and superpixels beside them, and macOS its own files.
    """
    path = PurePosixPath(name)
    match = _IMAGE.fullmatch(path.name)
    return match[1] if match and not any(part.startswith((".", "__MACOSX")) for part in path.parts) else None


def _locate(release: Release, path: str, settings: RemoteSettings) -> str:
    """Address, or path, of a file of a release."""
    base = settings.challenge_url
    if base.startswith("file://"):
        return str(Path(url2pathname(urlsplit(base).path)) / path)
    if not is_url(base):
        return str(Path(base).expanduser() / path)
    if release.in_archive_bucket and base == RemoteSettings.challenge_url:
        return f"{settings.bucket_url}/challenges/{path}"
    return f"{base}/{path}"


def _read_tables(locations: list[str]) -> dict[str, dict[str, Any]]:
    """The rows of a release's tables by the image's id, under names that `normalise` knows."""
    rows: dict[str, dict[str, Any]] = {}
    for location in locations:
        for row in _read_csv(location):
            name = next(row[column] for column in NAME_COLUMNS if column in row).strip()
            about = {key: value for key, value in row.items() if value and key not in NAME_COLUMNS}
            if "diagnosis" not in about and "benign_malignant" in about:  # 2016
                malignant = about["benign_malignant"] in ("malignant", "1.0", "1")
                about["diagnosis"] = "melanoma" if malignant else "unknown"
            if "patient" in about:  # the test images of 2020
                about["patient_id"] = about.pop("patient")
            rows.setdefault(name.removesuffix("_downsampled"), {}).update(about)
    return rows


def _read_csv(location: str) -> list[dict[str, str]]:
    """The rows of a CSV file, which a zip archive may hold; those of 2016 have no header."""
    if is_url(location):
        content = client().get(Request(location))
    else:
        try:
            content = Path(location).read_bytes()
        except FileNotFoundError as error:
            raise DataError(
                f"{public_path(location)} is not there: it belongs to the challenge's images"
            ) from error
    if location.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = [n for n in archive.namelist() if n.lower().endswith(".csv") and "__MACOSX" not in n]
            content = archive.read(name)
    header = None if not re.match(rb"ISIC_\d+,", content) else ("image", "benign_malignant")
    rows = read_table(content, public_path(location).removesuffix(".zip"), header)
    if not set(NAME_COLUMNS) & set(rows[0]):
        raise DataError(
            f"{public_path(location)} has no column image, image_id or image_name: expected a challenge's CSV"
        )
    return rows
