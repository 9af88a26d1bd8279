"""Folders and files that one launch at a time may write to.

A lock is a file `.NAME.lock` (of several processes `.NAME.lock.RANK`) beside what it protects, or in it if nobody may write
beside it. It is held by `flock`, which the kernel drops when its process dies, however it dies. Its text names the process
for people, and for file systems that have no such locks.
"""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

HOST = socket.gethostname().replace(".", "-")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held: dict[Path, tuple[int, int]] = {}  # lock files of this process: descriptor, and how many blocks hold it


class InUseError(RuntimeError):
    """Another process works on the same folder or file."""


def is_running(pid: int, host: str) -> bool:
    """Whether a process runs, as far as this host can tell: those of other hosts may."""
    if host != HOST:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def hold(target: Path, rank: int = 0, world: int = 1) -> Iterator[None]:
    """Hold a folder or file, which need not be there, for a block: alone or with the other ranks of one launch.

    A process may hold what it holds already. Processes that it forks do not.

    Raises:
        InUseError: another launch holds it, or another process is this one's rank.
    """
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder that is mounted, say, may be ours where the one around it is not.
    place = target.parent if os.access(target.parent, os.W_OK) or not target.is_dir() else target
    path = place / f".{target.name}.lock{'' if world == 1 else f'.{rank}'}"
    _acquire(path, target)
    try:
        _check_other_launches(path, target)
        yield
    finally:
        _release(path)


def _launch() -> str:
    """Identify a launch by the meeting point that torchrun and accelerate give all its processes."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    return ",".join(os.environ.get(name, "") for name in names)


def _acquire(path: Path, target: Path) -> None:
    if path in _held:
        descriptor, count = _held[path]
        _held[path] = descriptor, count + 1
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(descriptor):
            text = _read(descriptor)
            os.close(descriptor)
            raise _in_use(target, path, text)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # its holder has removed the file in between
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {HOST} {_launch()}\n".encode(), 0)
    _held[path] = descriptor, 1


def _lock(descriptor: int) -> bool:
    """Whether the lock is ours now."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    pid, host, _ = _parse(_read(descriptor))
    if pid and is_running(pid, host):
        return False
    if pid:
        logger.warning("took over from process %d of this host, which is gone", pid)
    return True


def _read(descriptor: int) -> str:
    return os.pread(descriptor, 4096, 0).decode(errors="replace")


def _parse(text: str) -> tuple[int, str, str]:
    """Parse a lock's text into process id, host and launch; the id is 0 while the lock is being taken."""
    pid, _, rest = text.strip().partition(" ")
    host, _, launch = rest.partition(" ")
    return (int(pid) if pid.isdigit() else 0), host, launch


def _in_use(target: Path, path: Path, text: str) -> InUseError:
    pid, host, _ = _parse(text)
    who = f"process {pid} of host {host}" if pid else "another process"
    way_out = "wait for it, end it" if host in ("", HOST) else f"if it is gone, delete {path.name} beside it"
    return InUseError(f"{target.name} is in use by {who}: {way_out}, or choose another place")


def _check_other_launches(path: Path, target: Path) -> None:
    """Refuse a target that other launches hold; locks that nobody holds are removed."""
    alone = f".{target.name}.lock"
    for name in os.listdir(path.parent):
        other = path.with_name(name)
        is_lock = name == alone or (name.startswith(f"{alone}.") and name[len(alone) + 1 :].isdigit())
        if not is_lock or other in _held:
            continue
        try:
            descriptor = os.open(other, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            text = _read(descriptor)
            if _lock(descriptor):
                other.unlink(missing_ok=True)
            elif _parse(text)[2] not in ("", _launch()):
                raise _in_use(target, other, text)
        finally:
            os.close(descriptor)


def _release(path: Path) -> None:
    descriptor, count = _held[path]
    if count > 1:
        _held[path] = descriptor, count - 1
        return
    del _held[path]
    path.unlink(missing_ok=True)  # before it is let go: nobody else holds it yet
    os.close(descriptor)


def _let_go_in_child() -> None:
    """Release locks in a forked process, such as a data loader's, which would keep those of a killed parent."""
    for descriptor, _ in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
