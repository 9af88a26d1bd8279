"""Read the members of a zip archive, local or over HTTP, in large ranges instead of one by one.

The directory at the archive's end is read once. After that, members that lie next to each other come with one range
of bytes, and several ranges are under way at once.
Source: PKWARE's APPNOTE (local file header, section 4.3.7); the directory, zip64 included, is zipfile's.
Nothing is extracted to disk, and no member's name is used as a path.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from isic_vq.data.http import RangeFile, RemoteError, Request, client, public_url
from isic_vq.data.schema import DataError

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
RANGE_BYTES = 1 << 20  # of one request
ENCRYPTED = 1


class Member(NamedTuple):
    """A file in the archive: `start` and `end` enclose its local header and its packed bytes."""

    name: str
    start: int
    end: int
    packed: int
    size: int
    crc: int
    method: int


@dataclass(frozen=True)
class RangeZip:
    """A zip archive that was looked through.

    Attributes:
        location: path, or http(s) address.
        version: ETag of a remote one, which all later reads must find again.
        members: its files, in the order of their bytes.
    """

    location: str
    version: str | None
    members: tuple[Member, ...]

    @classmethod
    def open(cls, location: str) -> "RangeZip":
        """Read the directory of an archive.

        Raises:
            DataError: it is not there, no zip archive, or packed in a way that cannot be read here.
        """
        name = public_name(location)
        try:
            if is_remote(location):
                remote = RangeFile(location)
                return cls(location, remote.info.etag, _members(remote, name))  # type: ignore[arg-type]
            with open(location, "rb") as file:
                return cls(location, None, _members(file, name))
        except FileNotFoundError as error:
            raise DataError(f"{name} is not there: expected a zip archive") from error
        except zipfile.BadZipFile as error:
            raise DataError(f"{name} is not a whole zip archive ({error}). Fetch it again.") from error

    def read(self, members: Sequence[Member]) -> Iterator[tuple[Member, bytes | DataError]]:
        """Yield members with their contents, in order; what cannot be read is an error in its place.

        Args:
            members: of this archive, in the order of their bytes.
        """
        runs = list(_runs(members))
        for run, packed in zip(runs, self._ranges(runs), strict=True):
            for member in run:
                if isinstance(packed, DataError):
                    yield member, packed
                    continue
                try:
                    yield (
                        member,
                        _unpack(member, packed[member.start - run[0].start : member.end - run[0].start]),
                    )
                except DataError:
                    yield member, self._once_more(member)

    def _once_more(self, member: Member) -> bytes | DataError:
        """A member whose bytes were wrong, fetched again on its own."""
        (packed,) = self._ranges([[member]])
        if isinstance(packed, DataError):
            return packed
        try:
            return _unpack(member, packed)
        except DataError as error:
            return error

    def _ranges(self, runs: list[list[Member]]) -> Iterator[bytes | RemoteError]:
        """The bytes of each run."""
        ranges = [(run[0].start, run[-1].end) for run in runs]
        if is_remote(self.location):
            yield from client().fetch((Request(self.location, r, self.version) for r in ranges), window=6)
            return
        with open(self.location, "rb") as file:
            for start, end in ranges:
                file.seek(start)
                yield file.read(end - start)


def is_remote(location: str) -> bool:
    """Whether a location is an http(s) address."""
    return location.startswith(("http://", "https://"))


def public_name(location: str) -> str:
    """What messages call it: the address, or a path's last component."""
    return public_url(location) if is_remote(location) else Path(location).name


def _members(file: IO[bytes], name: str) -> tuple[Member, ...]:
    """The files of an archive's directory."""
    with zipfile.ZipFile(file) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        ends = [info.header_offset for info in infos[1:]] + [archive.start_dir]
    found = []
    for info, end in zip(infos, ends, strict=True):
        if info.is_dir():
            continue
        if info.flag_bits & ENCRYPTED or info.compress_type not in METHODS:
            raise DataError(
                f"{name} holds {info.filename!r}, which is encrypted or packed by method {info.compress_type}: expected "
                "stored or deflated files. Unpack it, and name the folder."
            )
        found.append(
            Member(
                info.filename,
                info.header_offset,
                end,
                info.compress_size,
                info.file_size,
                info.CRC,
                info.compress_type,
            )
        )
    return tuple(found)


def _runs(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Members in lists, each of which lies in one range of bytes without much else in between."""
    run: list[Member] = []
    for member in members:
        if run and (member.start != run[-1].end or member.end - run[0].start > RANGE_BYTES):
            yield run
            run = []
        run.append(member)
    if run:
        yield run


def _unpack(member: Member, packed: bytes) -> bytes:
    """A member's content from its local header and packed bytes.

    Raises:
        DataError: they are not what the directory says.
    """
    try:
        signature, *_, name_size, extra_size = LOCAL_HEADER.unpack_from(packed)
        if signature != b"PK\x03\x04":
            raise ValueError("no local header")
        start = LOCAL_HEADER.size + name_size + extra_size
        content = packed[start : start + member.packed]
        if member.method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.size + 1)
        if len(content) != member.size or zlib.crc32(content) != member.crc:
            raise ValueError("wrong checksum")
    except (struct.error, zlib.error, ValueError) as error:
        raise DataError(f"{Path(member.name).name} is damaged in the zip archive ({error})") from error
    return content
