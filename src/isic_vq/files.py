"""Write files and folders whole or not at all: beside the target first, then renamed over it.

What a killed process left half-written is removed by the next one that writes to the same folder.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from isic_vq.locks import HOST, hold, is_running

if TYPE_CHECKING:
    from torch import Tensor

# `.NAME.PID-HOST.tmp` is being written, `.NAME.PID-HOST.old` stepped aside for it.
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(-(?P<host>[^.]*))?\.(?P<kind>tmp|old)")

_tidied: set[Path] = set()  # folders of which this process has removed what others left


def beside(target: Path, kind: str) -> Path:
    """Name a file of this process beside a target."""
    return target.with_name(f".{target.name}.{os.getpid()}-{HOST}.{kind}")


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are gone left half-written in a folder; what had stepped aside for it comes back."""
    for path in folder.iterdir():
        match = LEFTOVER.fullmatch(path.name)
        if match is None or is_running(int(match["pid"]), match["host"] or HOST):
            continue
        target = path.with_name(match["name"])
        if match["kind"] == "old" and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def tidy_once(folder: Path) -> None:
    """Make a folder if need be, and remove the leftovers in it at this process's first call."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    if place not in _tidied:
        _tidied.add(place)
        remove_leftovers(place)


PREVIEWS = ("unconditional", "scales", "reconstructions")  # pictures of a repository beside those of classes
MAX_PREVIEWS = 24  # classes that have one


def preview_name(name: str) -> str:
    """Name the file, without suffix, that shows a class in a repository folder."""
    return f"class {name}" if name in PREVIEWS else file_name(name)


def file_name(text: str) -> str:
    """Make a text, such as a class's name, the name of one file: characters that are special in paths become %XX."""
    return re.sub(r'[\x00-\x1f/\\:*?"<>|%]|^\.', lambda match: f"%{ord(match[0]):02X}", text)


@contextmanager
def name_full_disk(target: Path) -> Iterator[None]:
    """Add the file's name to the error of a full disk, which the system leaves out."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(error.errno, f"{os.strerror(error.errno)}, nothing was written", str(target)) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; an OSError names it, and an old file stays as it was."""
    tidy_once(path.parent)
    temporary = beside(path, "tmp")
    try:
        with name_full_disk(path):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write a safetensors file whole or not at all, with the mode that the umask gives; OSError as `write_atomically`."""
    from safetensors.torch import save

    write_atomically(path, save(dict(tensors), metadata={"format": "pt"}))


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it takes the place of `target` when the block ends without an error.

    InUseError if another process is at it.

    Examples:
        >>> with replaced_directory(Path("run/model")) as folder:  # doctest: +SKIP
        ...     model.save_pretrained(folder)
    """
    with hold(target):
        tidy_once(target.parent)
        yield from _replaced(target)


def _replaced(target: Path) -> Iterator[Path]:
    temporary, old = beside(target, "tmp"), beside(target, "old")
    if old.exists() and not target.exists():  # a process of this number was killed between the two renames
        old.rename(target)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        with name_full_disk(target):
            yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
