"""The ISIC challenges of 2016 to 2020: a zip archive of images, joined with its CSV files.

    challenge:2019           the training images of 2019
    challenge:2018:test      another part; 2018 is Task 3, the training images of which are HAM10000
    challenge:2018-task1     the images of the segmentation task of 2018, which have no diagnoses

Source: the challenges' download pages (https://challenge.isic-archive.com/data/), which also state the licences
that are recorded here; the archive's licence of a single image may differ.
Differs: labels become the classes of this package. In 2016 "malignant" is melanoma, and "benign", which is any other class,
is unknown. In 2017 a lesion that is neither melanoma nor seborrheic keratosis is a nevus; in 2018 and 2019 a row without
a 1 is unknown, and a row with two is an error.
The zip archive is opened once and never as a whole in memory.
"""

import copy
import functools
import hashlib
import io
import itertools
import json
import logging
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname
from zipfile import ZipInfo

from fsspec.utils import merge_offset_ranges

from isic_vq.data.classes import Reading
from isic_vq.data.http import RangeFile, RemoteError, RemoteSettings, Request, client
from isic_vq.data.schema import DataError, normalise
from isic_vq.data.sources.base import Source
from isic_vq.data.tables import read_table
from isic_vq.data.uri import is_url, public_path

logger = logging.getLogger(__name__)

RANGE_BYTES = 1 << 20  # of one request to a zip archive
PART_BYTES = 4 << 20
PART_MEMBERS = 64
NAME_COLUMNS = ("image", "image_id", "image_name")
# In 2019 some images are named ISIC_0000002_downsampled. Names of masks, ISIC_0000002_segmentation.png, do not match.
_IMAGE = re.compile(r"(ISIC_\d{7})(_downsampled)?\.jpe?g", re.IGNORECASE)
BCN_HAM_MSK = (
    "BCN_20000 (c) Department of Dermatology, Hospital Clinic de Barcelona; HAM10000 (c) ViDIR Group, Medical University "
    "of Vienna, doi 10.1038/sdata.2018.161; MSK (c) Anonymous, arXiv 1710.05006 and 1902.03368"
)
HAM = "HAM10000 (c) ViDIR Group, Medical University of Vienna, doi 10.1038/sdata.2018.161"
ISIC_2020 = "ISIC 2020 Challenge Dataset, doi 10.34970/2020-ds01, (c) by its contributors"
ISIC_CC0 = "ISIC Archive, International Skin Imaging Collaboration"


# The files of each part, below the folder of its year: the archive of images, then the tables.
_FILES = {
    "2016:train": "ISBI2016_ISIC_Part3_Training_Data.zip ISBI2016_ISIC_Part3_Training_GroundTruth.csv",
    "2016:test": "ISBI2016_ISIC_Part3_Test_Data.zip ISBI2016_ISIC_Part3_Test_GroundTruth.csv",
    "2017:train": "ISIC-2017_Training_Data.zip ISIC-2017_Training_Part3_GroundTruth.csv",
    "2017:validation": "ISIC-2017_Validation_Data.zip ISIC-2017_Validation_Part3_GroundTruth.csv",
    "2017:test": "ISIC-2017_Test_v2_Data.zip ISIC-2017_Test_v2_Part3_GroundTruth.csv",
    "2018:train": "ISIC2018_Task3_Training_Input.zip ISIC2018_Task3_Training_GroundTruth.zip "
    "ISIC2018_Task3_Training_LesionGroupings.csv",
    "2018:validation": "ISIC2018_Task3_Validation_Input.zip ISIC2018_Task3_Validation_GroundTruth.zip",
    "2018:test": "ISIC2018_Task3_Test_Input.zip ISIC2018_Task3_Test_GroundTruth.zip",
    "2018-task1:train": "ISIC2018_Task1-2_Training_Input.zip",
    "2018-task1:validation": "ISIC2018_Task1-2_Validation_Input.zip",
    "2018-task1:test": "ISIC2018_Task1-2_Test_Input.zip",
    "2019:train": "ISIC_2019_Training_Input.zip ISIC_2019_Training_GroundTruth.csv ISIC_2019_Training_Metadata.csv",
    "2019:test": "ISIC_2019_Test_Input.zip ISIC_2019_Test_GroundTruth.csv ISIC_2019_Test_Metadata.csv",
    "2020:train": "ISIC_2020_Training_JPEG.zip ISIC_2020_Training_GroundTruth_v2.csv",
    "2020:test": "ISIC_2020_Test_JPEG.zip ISIC_2020_Test_Metadata.csv",
}
_LICENSES = {
    "2016": ("CC-0", ISIC_CC0),
    "2017": ("CC-0", ISIC_CC0),
    "2018": ("CC-BY-NC", HAM),
    "2018-task1": ("CC-0", ISIC_CC0),
    "2019": ("CC-BY-NC", BCN_HAM_MSK),
    "2020": ("CC-BY-NC", ISIC_2020),
}


class Release(NamedTuple):
    """One part of a challenge; files are relative to the challenges' address."""

    images: str  # zip archive
    # CSV files, or zip archives of one, whose rows are joined by the image's name; later ones add columns
    tables: tuple[str, ...]
    license: str  # as the download page states it
    attribution: str  # whom to name
    in_archive_bucket: bool  # the files lie in the archive's bucket under `challenges/`


def _release(year: str, files: str) -> Release:
    images, *tables = (f"{year[:4]}/{file}" for file in files.split())
    return Release(images, tuple(tables), *_LICENSES[year], in_archive_bucket=year in ("2017", "2020"))


# By year and part.
RELEASES = {(*key.split(":"),): _release(key.split(":")[0], files) for key, files in _FILES.items()}


@dataclass(frozen=True)
class RangeZip:
    """A zip archive whose directory was read; members are fetched in large ranges, several at once, instead of one by one.

    `zipfile` reads the directory, zip64 included, and unpacks; nothing is extracted to disk.
    """

    location: str  # path, or http(s) address
    version: str | None  # ETag of a remote archive; later reads of another version fail
    directory: zipfile.ZipFile  # opened by zipfile
    members: tuple[ZipInfo, ...]  # its files, in the order of their bytes
    ends: dict[int, int]  # by the offset of a member's header, the offset after its last byte

    @classmethod
    def open(cls, location: str) -> "RangeZip":
        """Read the directory of an archive; DataError if it is missing or no zip archive."""
        name = public_path(location)
        try:
            with RangeFile(location) if is_url(location) else open(location, "rb") as file:
                directory = zipfile.ZipFile(file)
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{name} is not there: expected a zip archive") from error
        except (zipfile.BadZipFile, ValueError) as error:  # ValueError: of a remote one of a few bytes
            raise DataError(f"{name} is not a whole zip archive ({error}). Fetch it again.") from error
        infos = sorted(directory.infolist(), key=lambda info: info.header_offset)
        ends = itertools.pairwise([*(info.header_offset for info in infos), directory.start_dir])
        members = tuple(info for info in infos if not info.is_dir())
        return cls(location, getattr(file, "etag", None), directory, members, dict(ends))

    def read(self, members: Sequence[ZipInfo]) -> Iterator[tuple[ZipInfo, bytes | DataError]]:
        """Yield each member, given in the order of their bytes, with its content or the error of reading it."""
        starts = [member.header_offset for member in members]
        ends = [self.ends[start] for start in starts]
        _, starts, ends = merge_offset_ranges([""] * len(starts), starts, ends, max_block=RANGE_BYTES)
        ranges = list(zip(starts, ends, strict=True))
        blocks = zip(ranges, self._fetch(ranges), strict=True)
        start, end = 0, 0
        packed: bytes | RemoteError = b""
        for member in members:
            if member.header_offset >= end:
                (start, end), packed = next(blocks)
            content = packed if isinstance(packed, RemoteError) else self._unpack(member, packed, start)
            if isinstance(content, bytes) or content is packed or len(members) == 1:
                yield member, content
            else:  # the transfer may have damaged it: try once more, alone
                yield from self.read([member])

    def _fetch(self, ranges: list[tuple[int, int]]) -> Iterator[bytes | RemoteError]:
        if is_url(self.location):
            yield from client().fetch(Request(self.location, r, self.version) for r in ranges)
            return
        with open(self.location, "rb") as file:
            for start, end in ranges:
                file.seek(start)
                yield file.read(end - start)

    def _unpack(self, member: ZipInfo, packed: bytes, start: int) -> bytes | DataError:
        """A member's content from `packed`, the bytes of the archive from offset `start` on."""
        archive, info = copy.copy(self.directory), copy.copy(member)
        archive.fp, info.header_offset = io.BytesIO(packed), info.header_offset - start
        try:
            return archive.read(info)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, RuntimeError) as error:
            return DataError(f"{Path(info.filename).name} cannot be read from the zip archive ({error})")


@dataclass(frozen=True)
class ChallengeSource(Source):
    """The images of one part of a challenge: `year` is "2016" to "2020" or "2018-task1"."""

    year: str
    part: str
    is_listed_cheaply = False

    @classmethod
    def from_target(cls, target: str) -> "ChallengeSource":
        year, _, part = target.strip().partition(":")
        if (year, part or "train") not in RELEASES:
            known = ", ".join(_FILES)
            raise DataError(f"'challenge:{target}' is not known. Expected YEAR or YEAR:PART, of {known}.")
        return cls(year, part or "train")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"challenge:{self.year}:{self.part}"

    @property
    def release(self) -> Release:
        return RELEASES[self.year, self.part]

    def parts(self) -> list[tuple[int, int]]:
        """List ranges (start, stop) of images that are neighbours in the zip archive."""
        contents, parts, start = self._contents(), [], 0
        images, ends = contents.images, contents.archive.ends
        for stop in range(1, len(images) + 1):
            num_bytes = ends[images[stop - 1].header_offset] - images[start].header_offset
            is_full = stop - start == PART_MEMBERS or num_bytes >= PART_BYTES
            if is_full or stop == len(images):
                parts.append((start, stop))
                start = stop
        return parts

    def records_of(
        self, part: tuple[int, int], reading: Reading, with_images: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Yield the records of a range of images; one that cannot be read has no image, and a warning names it."""
        contents, release = self._contents(), self.release
        members = contents.images[slice(*part)]
        pairs = contents.archive.read(members) if with_images else ((member, None) for member in members)
        for member, content in pairs:
            name = contents.ids[member.filename]
            if release.tables and name not in contents.rows:
                reading.note("images in no table", name)
            values = {**contents.rows.get(name, {}), "isic_id": name, "source": f"isic-challenge-{self.year}"}
            values |= {"license": release.license, "attribution": release.attribution}
            row = normalise(values, self.name, reading=reading)
            if isinstance(content, DataError):
                logger.warning("%s: %s has no image: %s", self.name, name, content)
            yield {"image": content if isinstance(content, bytes) else None, **row}

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        """Yield the rows of all images; of the zip archive only the directory is read."""
        for name in self._contents().left_out:
            reading.leave_out("no photograph of the challenge", name)
        yield from super().rows(reading)

    def fingerprint(self) -> str:
        """The sha256 over names, sizes and checksums in the archive's directory, and the rows."""
        rows = [
            json.dumps([*row.values(), member.file_size, member.CRC])
            for member, row in zip(self._contents().images, self.metadata(), strict=True)
        ]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    def _contents(self) -> "_Contents":
        return _open(self.name, self.release, RemoteSettings.from_environment())


class _Contents(NamedTuple):
    archive: RangeZip
    images: tuple[ZipInfo, ...]  # its members that are photographs, in the order of their bytes
    ids: Mapping[str, str]  # ids of the images by their names in the archive
    rows: Mapping[str, dict[str, Any]]  # rows of the tables by the image's id
    left_out: tuple[str, ...]  # names of the other members, which are masks, superpixels and notes


@functools.lru_cache(maxsize=4)
def _open(name: str, release: Release, settings: RemoteSettings) -> _Contents:
    archive = RangeZip.open(_locate(release, release.images, settings))
    rows = _read_tables([_locate(release, path, settings) for path in release.tables])
    named = {m.filename: isic_id for m in archive.members if (isic_id := _image_id(m.filename))}
    images, ids = tuple(m for m in archive.members if m.filename in named), set(named.values())
    if not ids:
        raise DataError(f"{name}: no file in {public_path(archive.location)} is named like ISIC_0000000.jpg.")
    if len(ids) != len(images):
        raise DataError(
            f"{name}: {len(images) - len(ids)} images have the id of another one. Keep one of each."
        )
    if release.tables:
        logger.info(
            "%s: %d images; %d of them are in no table, %d rows have no image",
            *(name, len(ids), len(ids - rows.keys()), len(rows.keys() - ids)),
        )
    left_out = tuple(m.filename for m in archive.members if m.filename not in named)
    return _Contents(archive, images, named, rows, left_out)


def _image_id(name: str) -> str | None:
    """The id of a photograph from its name in an archive; None for masks, superpixels and files of macOS."""
    path = PurePosixPath(name)
    match = _IMAGE.fullmatch(path.name)
    return match[1] if match and not any(part.startswith((".", "__MACOSX")) for part in path.parts) else None


def _locate(release: Release, path: str, settings: RemoteSettings) -> str:
    base = settings.challenge_url
    if base.startswith("file://"):
        return str(Path(url2pathname(urlsplit(base).path)) / path)
    if not is_url(base):
        return str(Path(base).expanduser() / path)
    if release.in_archive_bucket and base == RemoteSettings.challenge_url:
        return f"{settings.bucket_url}/challenges/{path}"
    return f"{base}/{path}"


def _read_tables(locations: list[str]) -> dict[str, dict[str, Any]]:
    """The rows of a release's tables by the image's id, with names that `normalise` reads."""
    rows: dict[str, dict[str, Any]] = {}
    for location in locations:
        for row in _read_csv(location):
            name = next(row[column] for column in NAME_COLUMNS if column in row).strip()
            values = {key: value for key, value in row.items() if value and key not in NAME_COLUMNS}
            if "diagnosis" not in values and "benign_malignant" in values:  # 2016
                malignant = values["benign_malignant"] in ("malignant", "1.0", "1")
                values["diagnosis"] = "melanoma" if malignant else "unknown"
            if "patient" in values:  # the test images of 2020
                values["patient_id"] = values.pop("patient")
            rows.setdefault(name.removesuffix("_downsampled"), {}).update(values)
    return rows


def _read_csv(location: str) -> list[dict[str, str]]:
    """The rows of a CSV file, also within a zip archive; the files of 2016 have no header."""
    if is_url(location):
        content = client().get(Request(location))
    else:
        try:
            content = Path(location).read_bytes()
        except FileNotFoundError as error:
            raise DataError(f"{public_path(location)} is missing: put it beside the images") from error
    if location.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = [n for n in archive.namelist() if n.lower().endswith(".csv") and "__MACOSX" not in n]
            content = archive.read(name)
    header = None if not re.match(rb"ISIC_\d+,", content) else ("image", "benign_malignant")
    rows = read_table(content, public_path(location).removesuffix(".zip"), header)
    if not set(NAME_COLUMNS) & set(rows[0]):
        raise DataError(f"{public_path(location)} has none of the columns {', '.join(NAME_COLUMNS)}")
    return rows
