"""Tar files of images in the WebDataset layout, local or over HTTP.

Members of one sample stand next to each other and share a name up to the last dot: an image, and optionally NAME.json
with columns of `COLUMN_ALIASES` and NAME.cls with a class (a word, or its index among the declared classes, by default
in the order of ISIC 2019). Folders name classes as in a folder of images; other members, such as NAME.txt and masks, are left
out. No member's name is ever used as a path.
Source: the WebDataset convention (https://github.com/webdataset/webdataset).
Differs: a name ends at the last dot, not at the first, because names of images hold dots; and a truncated tar is an
error, where `tarfile` ends silently if the cut lies between two members or in a header.
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
from isic_vq.data.sources.base import Source, cached_dataset
from isic_vq.data.sources.folder import folder_label
from isic_vq.data.sources.image_files import file_digest, image_id, is_image, is_mask, read_sidecar
from isic_vq.data.uri import IMAGE_SUFFIXES, find_tars, is_url, public_path

Sample = dict[str, bytes | None]  # content by suffix; None for an image that is not read


@dataclass(frozen=True)
class WebDatasetSource(Source):
    """Samples of tar files, given as paths or http(s) addresses in the order of their samples."""

    name: str
    tars: tuple[str, ...]

    @classmethod
    def from_target(cls, target: str) -> "WebDatasetSource":
        """Find the tars of a path, pattern, directory or http(s) address; {000..009} and {a,b} stand for several."""
        return cls(f"webdataset:{public_path(target)}", tuple(find_tars(target)))

    @property
    def is_listed_cheaply(self) -> bool:  # type: ignore[override]
        return not any(map(is_url, self.tars))

    def parts(self) -> list[str]:
        return list(self.tars)

    def records_of(self, part: str, reading: Reading, with_images: bool = True) -> Iterator[dict[str, Any]]:
        """Yield the records of a tar, images as they are stored.

        Without images, those of a local tar are skipped; over HTTP most of their bytes are fetched all the same.
        """
        file_name, stems = _file_name(part), Counter[str]()
        with _opened(part) as file:
            try:
                for key, sample in _samples(file, file_name, with_images, reading):
                    label = self._label(key, reading)
                    record = _record(key, sample, f"{file_name}, sample {key}", reading, label)
                    stem = PurePosixPath(key).name
                    stems[stem] += 1
                    if record["isic_id"] == stem:  # a second sample of this name has its folder in the id
                        record["isic_id"] = key if stems[stem] > 1 else image_id(stem)
                    yield record
            except tarfile.ReadError as error:
                raise DataError(
                    f"{file_name} is not a whole tar file ({error}); {stems.total()} sound samples come before. Fetch or "
                    "write it again, or gunzip it if it is compressed."
                ) from error

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        row = None
        for row in super().rows(reading):
            yield row
        if row is None:
            files = ", ".join(sorted({name for names in reading.left_out.values() for name in names})[:3])
            raise DataError(
                f"{self.name} holds no image{f' (but {files})' if files else ''}: expected members that end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )

    def _label(self, key: str, reading: Reading) -> str | None:
        """The folder that names a sample's class, as in `class_folders`; a single folder counts in remote tars."""
        label, is_known = folder_label(key, reading.classes)
        is_guess = label is not None and not is_known and reading.classes.others != "take"
        return None if is_guess and label == self._lone_folder else label

    @functools.cached_property
    def _lone_folder(self) -> str | None:
        """The folder that holds all images of all local tars; None if there are several."""
        if not self.is_listed_cheaply:
            return None
        folders: set[str] = set()
        for tar in self.tars:
            with (
                contextlib.suppress(tarfile.ReadError),  # `records_of` reports it
                _opened(tar) as file,
                tarfile.open(fileobj=file, mode="r:") as members,
            ):
                for path in (PurePosixPath(member.name) for member in members if member.isfile()):
                    folders |= {path.parent.name} if is_image(path.name) else set()
                    if len(folders) > 1:
                        return None
        return next(iter(folders), None)

    def fingerprint(self) -> str:
        """The sha256 over the contents of local files, whatever their names; over names, sizes and ETags of remote ones."""
        digests = sorted(_digest(tar) for tar in self.tars)
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def dataset(self) -> Dataset:
        return cached_dataset(self)


def _file_name(tar: str) -> str:
    return PurePosixPath(urlsplit(tar).path).name if is_url(tar) else Path(tar).name


def _digest(tar: str) -> str:
    if not is_url(tar):
        return file_digest(Path(tar))
    with RangeFile(tar) as remote:
        return hashlib.sha256(json.dumps([_file_name(tar), remote.size, remote.etag]).encode()).hexdigest()


def _opened(tar: str) -> IO[bytes]:
    return RangeFile(tar) if is_url(tar) else open(tar, "rb")


def _samples(
    file: IO[bytes], file_name: str, with_images: bool, reading: Reading
) -> Iterator[tuple[str, Sample]]:
    """Yield each sample of a tar: its path up to the last dot, and its contents by suffix."""
    key, sample, seen = "", Sample(), {""}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            stem, suffix = path.stem, path.suffix.removeprefix(".").lower()
            shows = is_image(path.name)
            if member.isdir():
                continue
            if path.name.startswith("."):  # macOS writes ._NAME beside NAME
                reading.leave_out("hidden", member.name)
                continue
            if not shows and suffix not in ("json", "cls"):
                reading.leave_out("no image by its name", member.name)
                continue
            if shows and is_mask(stem, {PurePosixPath(name).name for name in seen if name}):
                reading.leave_out("a mask or superpixels", member.name)
                continue
            if not member.isfile():
                raise DataError(f"{file_name}: {member.name} is a link or device; write the image itself.")
            name = str(path.with_name(stem))
            if name != key:
                if name in seen:
                    raise DataError(
                        f"{file_name}: the sample {name} comes twice; write its files next to each other."
                    )
                yield from [(key, sample)] if sample else []
                seen.add(name)
                key, sample = name, {}
            if suffix in sample:
                raise DataError(f"{file_name}: {member.name} comes twice; keep one of the two.")
            content = tar.extractfile(member) if with_images or not shows else None
            sample[suffix] = None if content is None else content.read()
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it lacks its end")
    yield from [(key, sample)] if sample else []


def _record(key: str, sample: Sample, where: str, reading: Reading, label: str | None) -> dict[str, Any]:
    images = [suffix for suffix in sample if f".{suffix}" in IMAGE_SUFFIXES]
    if len(images) > 1:
        raise DataError(f"{where} has {len(images)} images ({', '.join(images)}); keep one per sample.")
    values = read_sidecar(sample["json"] or b"", f"{where}, json") if "json" in sample else {}
    if "cls" in sample:
        text = (sample["cls"] or b"").decode(errors="replace").strip()
        label = reading.classes.of_number(text) or text
        takes_all = Reading(replace(reading.classes, others="take"))
        diagnosis = normalise(values, where, reading=takes_all)["diagnosis"]
        if diagnosis not in (UNKNOWN, reading.classes.resolve(label)):
            raise DataError(f"{where}: json says {diagnosis}, cls {label}; correct one of them.")
    record = normalise({"file_name": f"{key}.sample", **values}, where, reading=reading, label=label)
    return {"image": sample[images[0]] if images else None, **record}
