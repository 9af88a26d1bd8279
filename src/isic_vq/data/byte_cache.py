"""A cache of bytes on disk with a size limit: the least recently used files are removed first.

Processes may share a folder, and threads a cache. A file holds the sha256 of its content and the content; one that does
not match, for example after a power failure, counts as missing.
"""

import contextlib
import hashlib
import os
import threading
from pathlib import Path

from isic_vq.files import beside, tidy_once


class ByteCache:
    """Contents by key; each process may exceed the limit, in bytes, by a twentieth until it looks at the folder again."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._room = 0  # bytes that may be written until the folder is looked at again

    def get(self, key: str) -> bytes | None:
        """Return the content of a key, now the most recently used, or None."""
        path = self._path(key)
        try:
            stored = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        digest, content = stored[:32], stored[32:]
        return content if hashlib.sha256(content).digest() == digest else None

    def put(self, key: str, content: bytes) -> None:
        """Store a content, and remove the least recently used ones if the limit is exceeded."""
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
        """Above the limit, remove the least recently used files down to nine tenths of it."""
        files = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
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
