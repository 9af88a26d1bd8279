"""Bytes on disk by name, up to a size: the least recently used go first.

Several processes may share a folder. A file holds its content's sha256 and the content; one that does not match is
not used, and written again.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from isic_vq.data.schema import DataError
from isic_vq.files import write_atomically

DIGEST_BYTES = 32


class ByteCache:
    """Contents by key.

    Args:
        folder: made if needed.
        limit: bytes of all files together.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._explained(lambda: folder.mkdir(parents=True, exist_ok=True))
        self._size = sum(size for _, size, _ in self._files())

    def get(self, key: str) -> bytes | None:
        """The content of a key, which becomes the most recently used; None if it is not there."""
        path = self._path(key)
        try:
            stored = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
        return content if hashlib.sha256(content).digest() == digest else None

    def put(self, key: str, content: bytes) -> None:
        """Keep a content, and drop the least recently used ones if they are too many now.

        Raises:
            DataError: it cannot be written.
        """
        path = self._path(key)
        stored = hashlib.sha256(content).digest() + content
        if len(stored) > self.limit:
            return
        self._explained(lambda: write_atomically(path, stored))
        self._size += len(stored)
        if self._size > self.limit:
            self._shrink()

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of every file."""
        found = []
        for path in self.folder.glob("??/*"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # another process dropped it
            found.append((stat.st_mtime, stat.st_size, path))
        return found

    def _shrink(self) -> None:
        """Drop the least recently used files until nine tenths of the limit are left; also counts others' files."""
        files = sorted(self._files())
        self._size = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._size <= 0.9 * self.limit:
                break
            path.unlink(missing_ok=True)
            self._size -= size

    def _explained(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            raise DataError(
                f"the cache {self.folder.name!r} cannot be written ({error.strerror}): point ISIC_VQ_CACHE to another "
                "folder, or unset it to do without"
            ) from error
