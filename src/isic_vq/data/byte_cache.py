"""Bytes on disk by name, up to a size: the least recently used go first.

Several processes may share a folder, and several threads a cache. A file holds its content's sha256 and the content;
one that does not match (a machine that lost its power, for example) is not used, and written again.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from isic_vq.data.schema import DataError
from isic_vq.files import beside, tidy_once

DIGEST_BYTES = 32


class ByteCache:
    """Contents by key.

    Args:
        folder: made if needed.
        limit: bytes of all files together. Each process looks at what others wrote when it has written a twentieth
            of it, so that for a moment there may be so much more for each process.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._written = 0  # since the last look at the folder
        self._size = sum(size for _, size, _ in self._files())

    def get(self, key: str) -> bytes | None:
        """The content of a key, which becomes the most recently used; None if it is not there.

        Raises:
            DataError: it cannot be read.
        """
        path = self._path(key)
        with self._explained():
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
        temporary = beside(path.with_name(f"{path.name}.{threading.get_ident()}"), "tmp")
        with self._explained():
            tidy_once(path.parent)
            try:
                temporary.write_bytes(stored)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        with self._lock:
            self._written += len(stored)
            if self._size + self._written > self.limit or self._written > self.limit / 20:
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
        """If there is more than the limit, drop the least recently used files until nine tenths of it are left."""
        files = sorted(self._files())
        self._written = 0
        self._size = sum(size for _, size, _ in files)
        if self._size <= self.limit:
            return
        for _, size, path in files:
            if self._size <= 0.9 * self.limit:
                break
            path.unlink(missing_ok=True)
            self._size -= size

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"the cache {self.folder.name!r} cannot be used ({error.strerror}): point ISIC_VQ_CACHE to another "
                "folder, or unset it to do without"
            ) from error
