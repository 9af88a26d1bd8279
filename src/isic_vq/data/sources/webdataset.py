"""Tar files of images in the WebDataset layout, local or over HTTP.

Members of one sample stand next to each other and share a name up to the first dot: an image, and optionally
NAME.json with columns under any of the names in `COLUMN_ALIASES` and NAME.cls with a diagnosis (a word, or its
number in `DIAGNOSES`, the order of ISIC 2019). Folders called like a diagnosis count as in a folder of images;
other members, such as NAME.txt, do not.
Source: the WebDataset convention (https://github.com/webdataset/webdataset).
Differs: a tar must be whole. `tarfile` takes one that was cut between two members, or in a header, for a shorter one.
No name of a member is ever used as a path.
"""

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from datasets import Dataset

from isic_vq.data.http import RangeFile, client, public_url
from isic_vq.data.schema import DataError, normalise
from isic_vq.data.sources.base import Source
from isic_vq.data.sources.cached import cached_dataset
from isic_vq.data.sources.folder import IMAGE_SUFFIXES, class_folder, file_digest
from isic_vq.data.sources.sidecar import read_sidecar
from isic_vq.data.sources.uri import expand_braces, expand_path, public_path
from isic_vq.models.diagnosis import DIAGNOSES, canonical_diagnosis

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
        if _is_url(target):
            return cls(f"webdataset:{public_url(target)}", tuple(expand_braces(target)))
        name = f"webdataset:{public_path(target)}"
        tars: list[str] = []
        for pattern in expand_braces(expand_path(target)):
            inside = os.path.join(glob.escape(pattern), "*.tar") if os.path.isdir(pattern) else pattern
            found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(inside, recursive=True))
            if not found:
                raise DataError(
                    f"Nothing matches {public_path(pattern)} of {name}. Expected a tar file, a pattern such as "
                    "shards/images-*.tar or images-{000..009}.tar, a directory of *.tar files, or an http(s) address."
                )
            tars += found
        return cls(name, tuple(tars))

    def parts(self) -> list[str]:
        """The tars."""
        return list(self.tars)

    def read(self, part: str) -> Iterator[dict[str, Any]]:
        """Yield the records of a tar, images as they are stored."""
        return _records(part, with_images=True)

    def metadata(self) -> Iterator[dict[str, Any]]:
        """The rows of all tars: of local ones, the images are skipped; over HTTP, most of their bytes come, too."""
        for tar in self.tars:
            for record in _records(tar, with_images=False):
                yield {name: value for name, value in record.items() if name != "image"}

    def fingerprint(self) -> str:
        """Of the contents of local files, whatever their names; of names, sizes and ETags over HTTP."""
        digests = sorted(_digest(tar) for tar in self.tars)
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def dataset(self) -> Dataset:
        """All records, written once into the cache of `datasets`."""
        return cached_dataset(self)


def _is_url(text: str) -> bool:
    """Whether it is an http(s) address."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def _file_name(tar: str) -> str:
    """What messages call a tar."""
    return PurePosixPath(urlsplit(tar).path).name if _is_url(tar) else Path(tar).name


def _digest(tar: str) -> str:
    """The sha256 of a tar's content, or of what stands for it."""
    if not _is_url(tar):
        return file_digest(Path(tar))
    remote = client().head(tar)
    return hashlib.sha256(json.dumps([_file_name(tar), remote.size, remote.etag]).encode()).hexdigest()


@contextmanager
def _opened(tar: str) -> Iterator[io.BufferedIOBase]:
    """A tar's bytes, seekable."""
    if not _is_url(tar):
        with open(tar, "rb") as file:
            yield file
        return
    with io.BufferedReader(RangeFile(tar)) as remote:
        yield remote


def _records(tar: str, with_images: bool) -> Iterator[dict[str, Any]]:
    """The records of a tar; `image` is None without images."""
    file_name, stems = _file_name(tar), Counter[str]()
    with _opened(tar) as file:
        try:
            for key, sample in _samples(file, file_name, with_images):
                record = _record(key, sample, f"{file_name}, sample {key}")
                if record is None:
                    continue
                stem = PurePosixPath(key).name
                stems[stem] += 1
                if record["isic_id"] == stem and stems[stem] > 1:
                    record["isic_id"] = key  # its folder tells it from the one before
                yield record
        except tarfile.ReadError as error:
            raise DataError(
                f"{file_name} is not a whole tar file ({error}); {stems.total()} sound samples come before. Fetch or write it "
                "again, or gunzip it if it is compressed."
            ) from error


def _samples(file: io.BufferedIOBase, file_name: str, with_images: bool) -> Iterator[tuple[str, Sample]]:
    """The samples of a tar: folders and name up to the first dot, and contents by suffix."""
    key, sample, seen = "", Sample(), {""}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            stem, _, suffix = path.name.partition(".")
            suffix = suffix.lower()
            if member.isdir() or not stem:  # a hidden file, such as macOS puts beside each
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
                yield from [(key, sample)] if key else []
                seen.add(name)
                key, sample = name, {}
            if suffix in sample:
                raise DataError(f"{file_name}: {member.name} comes twice; keep one of the two.")
            is_image = f".{suffix}" in IMAGE_SUFFIXES
            if suffix in ("json", "cls") or (is_image and with_images):
                content = tar.extractfile(member)
                sample[suffix] = content.read() if content is not None else None
            elif is_image:
                sample[suffix] = None
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it lacks its end")
    yield from [(key, sample)] if key else []


def _record(key: str, sample: Sample, where: str) -> dict[str, Any] | None:
    """The record of a sample; None if it has neither an image nor anything about one."""
    images = [suffix for suffix in sample if f".{suffix}" in IMAGE_SUFFIXES]
    if not sample:
        return None
    if len(images) > 1:
        raise DataError(f"{where} has {len(images)} images ({', '.join(images)}); keep one per sample.")
    about = read_sidecar(sample["json"] or b"", f"{where}, json") if "json" in sample else {}
    record = normalise({"file_name": f"{key}.sample", **about}, where)
    if "cls" in sample:
        diagnosis = _class(sample["cls"] or b"", where)
        if record["diagnosis"] not in ("unknown", diagnosis):
            raise DataError(
                f"{where}: json says {record['diagnosis']}, cls {diagnosis}; correct one of them."
            )
        record["diagnosis"] = diagnosis
    elif record["diagnosis"] == "unknown":
        record["diagnosis"] = class_folder(key)
    return {"image": sample[images[0]] if images else None, **record}


def _class(content: bytes, where: str) -> str:
    """The diagnosis that a .cls file names, by word or number."""
    text = content.decode(errors="replace").strip()
    if text.isdecimal() and int(text) < len(DIAGNOSES):
        return DIAGNOSES[int(text)]
    try:
        return canonical_diagnosis(text)
    except ValueError as error:
        raise DataError(
            f"{where}, cls: {error} A number is one of 0 to {len(DIAGNOSES) - 1} in this order."
        ) from None
