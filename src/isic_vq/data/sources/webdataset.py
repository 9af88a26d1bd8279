"""Tar files of images in the WebDataset layout, local or over HTTP.

Members of one sample stand next to each other and share a name up to the last dot: an image, and optionally
NAME.json with columns under any of the names in `COLUMN_ALIASES` and NAME.cls with a class (a word, or its place
among the declared classes, by default in the order of ISIC 2019). Folders count as in a folder of images;
other members, such as NAME.txt and masks, are left out.
Source: the WebDataset convention (https://github.com/webdataset/webdataset).
Differs: a name ends at the last dot, not at the first, because names of images hold dots; and a tar must be whole. `tarfile` takes one that was cut between two members, or in a header, for a shorter one.
No name of a member is ever used as a path.
"""

import contextlib
import functools
import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

from datasets import Dataset

from isic_vq.data.classes import UNKNOWN, Reading
from isic_vq.data.http import RangeFile
from isic_vq.data.schema import DataError, normalise
from isic_vq.data.sources.base import Source
from isic_vq.data.sources.cached import cached_dataset
from isic_vq.data.sources.folder import file_digest, folder_label
from isic_vq.data.sources.image_files import image_id, is_mask
from isic_vq.data.sources.sidecar import read_sidecar
from isic_vq.data.uri import IMAGE_SUFFIXES, find_tars, is_url, public_path

Sample = dict[str, bytes | None]  # content by suffix; None for an image that is not read


@dataclass(frozen=True)
class WebDatasetSource(Source):
    """Samples of tar files.

    Attributes:
        name: as `Source` has it.
        tars: paths or http(s) addresses, in the order of their samples.
    """

    name: str
    tars: tuple[str, ...]

    @classmethod
    def from_target(cls, target: str) -> "WebDatasetSource":
        """Find what a path, pattern, directory or http(s) address names; {000..009} and {a,b} stand for several.

        Raises:
            DataError: it names no tar.
        """
        return cls(f"webdataset:{public_path(target)}", tuple(find_tars(target)))

    @property
    def is_listed_cheaply(self) -> bool:  # type: ignore[override]
        """Whether all tars are local."""
        return not any(map(is_url, self.tars))

    def parts(self) -> list[str]:
        """The tars."""
        return list(self.tars)

    def records_of(self, part: str, reading: Reading) -> Iterator[dict[str, Any]]:
        """Yield the records of a tar, images as they are stored."""
        return self._records(part, True, reading)

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        """The rows of all tars: of local ones, the images are skipped; over HTTP, most of their bytes come, too."""
        is_empty = True
        for tar in self.tars:
            for record in self._records(tar, False, reading):
                is_empty = False
                yield {name: value for name, value in record.items() if name != "image"}
        if is_empty:
            files = ", ".join(sorted({name for names in reading.left_out.values() for name in names})[:3])
            raise DataError(
                f"{self.name} holds no image{f' (but {files})' if files else ''}: expected members that end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )

    def _records(self, tar: str, with_images: bool, reading: Reading) -> Iterator[dict[str, Any]]:
        """The records of a tar; `image` is None without images."""
        file_name, stems = _file_name(tar), Counter[str]()
        with _opened(tar) as file:
            try:
                for key, sample in _samples(file, file_name, with_images, reading):
                    label = self._label(key, reading)
                    record = _record(key, sample, f"{file_name}, sample {key}", reading, label)
                    stem = PurePosixPath(key).name
                    stems[stem] += 1
                    if record["isic_id"] == stem:
                        # Its folder tells it from the one before.
                        record["isic_id"] = key if stems[stem] > 1 else image_id(stem)
                    yield record
            except tarfile.ReadError as error:
                raise DataError(
                    f"{file_name} is not a whole tar file ({error}); {stems.total()} sound samples come before. Fetch or "
                    "write it again, or gunzip it if it is compressed."
                ) from error

    def _label(self, key: str, reading: Reading) -> str | None:
        """The name of the folder that tells a sample's class, as `class_folders` finds it; of remote tars, any folder's."""
        label, is_known = folder_label(key, reading.classes)
        is_guess = label is not None and not is_known and reading.classes.others != "take"
        return None if is_guess and label == self._lone_folder else label

    @functools.cached_property
    def _lone_folder(self) -> str | None:
        """The folder that all images of all tars lie in, if it is one."""
        if not self.is_listed_cheaply:
            return None
        folders: set[str] = set()
        for tar in self.tars:
            with (
                contextlib.suppress(tarfile.ReadError),  # reading it tells what is wrong
                _opened(tar) as file,
                tarfile.open(fileobj=file, mode="r:") as members,
            ):
                for path in (PurePosixPath(member.name) for member in members if member.isfile()):
                    folders |= {path.parent.name} if path.suffix.lower() in IMAGE_SUFFIXES else set()
                    if len(folders) > 1:
                        return None
        return next(iter(folders), None)

    def fingerprint(self) -> str:
        """Of the contents of local files, whatever their names; of names, sizes and ETags over HTTP."""
        digests = sorted(_digest(tar) for tar in self.tars)
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def dataset(self) -> Dataset:
        """All records, written once into the cache of `datasets`."""
        return cached_dataset(self)


def _file_name(tar: str) -> str:
    return PurePosixPath(urlsplit(tar).path).name if is_url(tar) else Path(tar).name


def _digest(tar: str) -> str:
    """The sha256 of a tar's content, or of what stands for it."""
    if not is_url(tar):
        return file_digest(Path(tar))
    with RangeFile(tar) as remote:
        return hashlib.sha256(json.dumps([_file_name(tar), remote.size, remote.etag]).encode()).hexdigest()


def _opened(tar: str) -> IO[bytes]:
    return RangeFile(tar) if is_url(tar) else open(tar, "rb")


def _samples(
    file: IO[bytes], file_name: str, with_images: bool, reading: Reading
) -> Iterator[tuple[str, Sample]]:
    """The samples of a tar: folders and name up to the last dot, and contents by suffix."""
    key, sample, seen = "", Sample(), {""}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            stem, suffix = path.stem, path.suffix.removeprefix(".").lower()
            is_image = f".{suffix}" in IMAGE_SUFFIXES
            if member.isdir():
                continue
            if path.name.startswith("."):  # such as macOS puts beside each
                reading.leave_out("hidden", member.name)
                continue
            if not is_image and suffix not in ("json", "cls"):
                reading.leave_out("no image by its name", member.name)
                continue
            if is_image and is_mask(stem, {PurePosixPath(name).name for name in seen if name}):
                reading.leave_out("a mask or superpixels", member.name)
                continue
            if not member.isfile():
                raise DataError(f"{file_name}: {member.name} is a link or device; write the image itself.")
            name = str(path.with_name(stem))
            if name != key:
                if name in seen:
                    raise DataError(
                        f"{file_name}: the sample {name} comes twice; write the files of a sample next to each other, "
                        "and give each sample a name of its own."
                    )
                yield from [(key, sample)] if sample else []
                seen.add(name)
                key, sample = name, {}
            if suffix in sample:
                raise DataError(f"{file_name}: {member.name} comes twice; keep one of the two.")
            content = tar.extractfile(member) if with_images or not is_image else None
            sample[suffix] = None if content is None else content.read()
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it lacks its end")
    yield from [(key, sample)] if sample else []


def _record(key: str, sample: Sample, where: str, reading: Reading, label: str | None) -> dict[str, Any]:
    """The record of a sample."""
    images = [suffix for suffix in sample if f".{suffix}" in IMAGE_SUFFIXES]
    if len(images) > 1:
        raise DataError(f"{where} has {len(images)} images ({', '.join(images)}); keep one per sample.")
    about = read_sidecar(sample["json"] or b"", f"{where}, json") if "json" in sample else {}
    if "cls" in sample:
        label = _class(sample["cls"] or b"", reading)
        said = normalise(about, where, reading=Reading(replace(reading.classes, others="take")))["diagnosis"]
        if said not in (UNKNOWN, reading.classes.resolve(label)):
            raise DataError(f"{where}: json says {said}, cls {label}; correct one of them.")
    record = normalise({"file_name": f"{key}.sample", **about}, where, reading=reading, label=label)
    return {"image": sample[images[0]] if images else None, **record}


def _class(content: bytes, reading: Reading) -> str:
    """The class that a .cls file names, by word or number."""
    text = content.decode(errors="replace").strip()
    return reading.classes.of_number(text) or text
