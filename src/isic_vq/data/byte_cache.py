"""Bytes on disk by name, up to a size: the least recently used go first.

Several processes may share a folder, and several threads a cache. A file holds its content's sha256 and the content;
one that does not match (a machine that lost its power, for example) is not used, and written again.
"""

import contextlib
import hashlib
import os
import threading
from pathlib import Path

from isic_vq.files import beside, tidy_once


class ByteCache:
    """Contents by key; methods raise OSError if the folder cannot be read or written.

    Args:
        folder: made if needed.
        limit: bytes of all files together. Each process looks at what others wrote when it has written a twentieth
            of it, so that for a moment there may be so much more for each process.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._room = 0  # bytes that may be written before the next look at the folder

    def get(self, key: str) -> bytes | None:
        """The content of a key, which becomes the most recently used; None if it is not there."""
        path = self._path(key)
        try:
            stored = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        digest, content = stored[:32], stored[32:]
        return content if hashlib.sha256(content).digest() == digest else None

    def put(self, key: str, content: bytes) -> None:
        """Keep a content, and drop the least recently used ones if they are too many now."""
        path = self._path(key)
        stored = hashlib.sha256(content).digest() + content
        temporary = beside(path.with_name(f"{path.name}.{threading.get_ident()}"), "tmp")
        tidy_once(path.parent)
        try:
            temporary.write_bytes(stored)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        with self._lock:
            self._room -= len(stored)
            if self._room < 0:
                self._shrink()

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name

    def _shrink(self) -> None:
        """If there is more than the limit, drop the least recently used files until nine tenths of it are left."""
        files = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # another process dropped it
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        goal = self.limit if total <= self.limit else 0.9 * self.limit
        for _, size, path in sorted(files):
            if total <= goal:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._room = min(self.limit - total, self.limit // 20)
