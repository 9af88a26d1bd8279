"""Work in a folder that can be interrupted at any time, even by kill -9, and gone on with by the same command.

It is done in pieces, files that are there whole or not at all, by any number of processes that never talk to each other.
The settings it was begun with lie beside them; nobody goes on with others.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from isic_vq.data.errors import DataError
from isic_vq.files import write_atomically

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Work:
    """Pieces of work in a folder that its processes hold.

    Attributes:
        folder: where the pieces go.
        names: files of all pieces, in order.
        noun: what people call them.
        rank: number of this process, which makes the pieces rank, rank + world, ...
        world: number of processes.
    """

    folder: Path
    names: Sequence[str]
    noun: str
    rank: int = 0
    world: int = 1

    @property
    def own(self) -> range:
        """Numbers of the pieces of this process."""
        return range(self.rank, len(self.names), self.world)

    @property
    def missing(self) -> list[int]:
        """Numbers of its pieces that are not there."""
        return [number for number in self.own if not self.path(number).exists()]

    def path(self, number: int) -> Path:
        return self.folder / self.names[number]

    def begin(self, settings: Mapping[str, Any], name: str = SETTINGS) -> None:
        """Note the settings, see `begin`, and remove what a killed process left of this one's pieces."""
        with self.named(self.folder / name):
            begin(self.folder, settings, name)
        own = {self.names[number] for number in self.own}
        for path in self.folder.glob(".*.tmp"):
            if path.name[1:].rsplit(".", 2)[0] in own:  # without the process id
                path.unlink(missing_ok=True)

    @contextmanager
    def progress(self, total: int, initial: int, title: str, shown: bool) -> Iterator[tqdm]:
        """A bar of images, for the block that makes the missing pieces. An interruption says how many there are."""
        with tqdm(total=total, initial=initial, unit="image", desc=title, disable=not shown) as bar:
            try:
                yield bar
            except KeyboardInterrupt as error:
                done = len(self.own) - len(self.missing)
                raise KeyboardInterrupt(
                    f"{done} of {len(self.own)} {self.noun} are finished; run the same command to go on"
                ) from error

    @contextmanager
    def named(self, path: Path) -> Iterator[None]:
        """Let an error of the disk, while a file is written, name the file and the way out."""
        try:
            yield
        except OSError as error:
            reason = f"{error.strerror}; finished {self.noun} stay, the same command goes on"
            raise OSError(error.errno, reason, str(path)) from error


def settings_bytes(settings: Mapping[str, Any]) -> bytes:
    """The file that holds settings."""
    return f"{json.dumps(settings, indent=2)}\n".encode()


def begin(folder: Path, settings: Mapping[str, Any], name: str = SETTINGS) -> None:
    """Note the settings that work in a folder begins with, or check that it was begun with the same.

    Args:
        folder: is made if need be.
        settings: all that decides what comes out.
        name: JSON file of the settings.

    Raises:
        DataError: they differ, or the file does not hold settings.
        OSError: the file cannot be written.
    """
    path = folder / name
    if not path.is_file():
        write_atomically(path, settings_bytes(settings))
        return
    try:
        different = differences(dict(json.loads(path.read_text(encoding="utf-8"))), settings)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} does not hold settings ({error}): choose another folder") from error
    if different:
        raise DataError(
            f"{folder} was begun with {told(different)}: go on with the same settings, choose another folder, or remove "
            "this one"
        )


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping, with keys such as `loop.seed`; what JSON does not tell apart is alike."""
    if isinstance(settings, Mapping):
        entries = [(str(key), value) for key, value in settings.items()]
    elif isinstance(settings, (list, tuple)) and any(isinstance(value, Mapping) for value in settings):
        entries = [(str(index), value) for index, value in enumerate(settings)]
    else:
        return {prefix: list(settings) if isinstance(settings, tuple) else settings}
    found: dict[str, Any] = {}
    for key, value in entries:
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def differences(begun: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By key, what work was begun with and what it is to go on with, where they differ; None where there is nothing."""
    old, new = flat(json.loads(json.dumps(begun))), flat(json.loads(json.dumps(settings)))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def told(different: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences as "loop.seed = 0, and this is 1; ..."."""
    return "; ".join(f"{key} = {old!r}, and this is {new!r}" for key, (old, new) in different.items())


def launched_process() -> tuple[int, int]:
    """Rank of this process and number of processes, from what torchrun and accelerate launch set; (0, 1) alone.

    On a machine with several GPUs, the one of its local rank becomes the one it uses.

    Raises:
        ValueError: only one of RANK and WORLD_SIZE is set, or they contradict each other.
    """
    found = [os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(found) == 1:
        raise ValueError(
            "one of RANK and WORLD_SIZE is set in the environment: set both, as torchrun does, or neither"
        )
    rank, world = map(int, found) if found else (0, 1)
    check_process(rank, world)
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return rank, world


def check_process(rank: int, world: int) -> None:
    """Raise ValueError unless there is a process of that number."""
    if not 0 <= rank < world:
        raise ValueError(f"this is process {rank} of {world}: expected a number from 0 to {world - 1}")
