"""Read the members of a zip archive, local or over HTTP, in large ranges instead of one by one.

The directory at the archive's end is read once. Then neighbouring members are fetched with one range of bytes, several
ranges at once. `zipfile` reads the directory, zip64 included, and unpacks; nothing is extracted to disk.
"""

import copy
import io
import itertools
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipInfo

from fsspec.utils import merge_offset_ranges

from isic_vq.data.errors import DataError
from isic_vq.data.http import RangeFile, RemoteError, Request, client
from isic_vq.data.uri import is_url, public_path

RANGE_BYTES = 1 << 20  # of one request


@dataclass(frozen=True)
class RangeZip:
    """A zip archive whose directory was read."""

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
