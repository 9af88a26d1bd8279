"""Work in a folder that can be interrupted at any time, even by kill -9, and resumed by the same command.

It is done in pieces, files that are there whole or not at all, by any number of processes that never talk to each other.
The settings it was begun with lie beside them, and it is resumed with the same ones only.
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
    """Files to be made in a folder by one process or several, which can be interrupted at any time."""

    folder: Path  # where the pieces go
    names: Sequence[str]  # files of all pieces, in order
    noun: str  # name of the pieces in messages
    rank: int = 0  # number of this process, which makes the pieces rank, rank + world, ...
    world: int = 1  # number of processes

    @property
    def numbers(self) -> range:
        return range(self.rank, len(self.names), self.world)

    @property
    def missing(self) -> list[int]:
        return [number for number in self.numbers if not self.path(number).exists()]

    def path(self, number: int) -> Path:
        return self.folder / self.names[number]

    def begin(self, settings: Mapping[str, Any], name: str = SETTINGS) -> None:
        """Write or check the settings, see `begin`, and remove what a killed process left of this one's pieces."""
        with self.naming(self.folder / name):
            begin(self.folder, settings, name)
        names = {self.names[number] for number in self.numbers}
        for path in self.folder.glob(".*.tmp"):
            if path.name[1:].rsplit(".", 2)[0] in names:  # without the process id
                path.unlink(missing_ok=True)

    @contextmanager
    def progress(self, total: int, initial: int, title: str, shown: bool) -> Iterator[tqdm]:
        """Show a bar of images during the block that makes the missing pieces; an interruption tells how many there are."""
        with tqdm(total=total, initial=initial, unit="image", desc=title, disable=not shown) as bar:
            try:
                yield bar
            except KeyboardInterrupt as error:
                done = len(self.numbers) - len(self.missing)
                raise KeyboardInterrupt(
                    f"{done} of {len(self.numbers)} {self.noun} are finished; run the same command to resume"
                ) from error

    @contextmanager
    def naming(self, path: Path) -> Iterator[None]:
        """Add the file's name and the way out to disk errors while a file is written."""
        try:
            yield
        except OSError as error:
            reason = f"{error.strerror}; finished {self.noun} stay, the same command resumes"
            raise OSError(error.errno, reason, str(path)) from error


def settings_bytes(settings: Mapping[str, Any]) -> bytes:
    """Encode settings as their file holds them."""
    return f"{json.dumps(settings, indent=2)}\n".encode()


def begin(folder: Path, settings: Mapping[str, Any], name: str = SETTINGS) -> None:
    """Write the settings of work in a folder, or check that it was begun with the same; DataError if they differ."""
    path = folder / name
    if not path.is_file():
        write_atomically(path, settings_bytes(settings))
        return
    try:
        changed = differences(dict(json.loads(path.read_text(encoding="utf-8"))), settings)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} does not hold settings ({error}): choose another folder") from error
    if changed:
        raise DataError(
            f"{folder} was begun with {differences_text(changed)}: resume it with the same settings, choose another folder, "
            "or remove this one"
        )


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings, with keys such as `loop.seed`; a tuple becomes the list that JSON makes of it."""
    if isinstance(settings, Mapping):
        entries = [(str(key), value) for key, value in settings.items()]
    elif isinstance(settings, (list, tuple)) and any(isinstance(value, Mapping) for value in settings):
        entries = [(str(index), value) for index, value in enumerate(settings)]
    else:
        return {prefix: list(settings) if isinstance(settings, tuple) else settings}
    flattened: dict[str, Any] = {}
    for key, value in entries:
        flattened |= flat(value, f"{prefix}.{key}" if prefix else key)
    return flattened


def differences(begun: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that changed since work was begun, by key: the old and the new value, None where there is none."""
    old, new = flat(json.loads(json.dumps(begun))), flat(json.loads(json.dumps(settings)))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def differences_text(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Format differences as "loop.seed = 0, and this is 1; ..."."""
    return "; ".join(f"{key} = {old!r}, and this is {new!r}" for key, (old, new) in changed.items())


def launched_process() -> tuple[int, int]:
    """Return rank and number of processes, from what torchrun and accelerate launch set; (0, 1) alone.

    On a machine with several GPUs, the one of its local rank becomes the one it uses.
    """
    values = [os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(values) == 1:
        raise ValueError("RANK or WORLD_SIZE is set in the environment: set both, as torchrun does")
    rank, world = map(int, values) if values else (0, 1)
    check_process(rank, world)
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return rank, world


def check_process(rank: int, world: int) -> None:
    """Raise ValueError unless 0 <= rank < world."""
    if not 0 <= rank < world:
        raise ValueError(f"this is process {rank} of {world}: expected a number from 0 to {world - 1}")


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Compute on a number of threads within the block: with another one, sums may be rounded differently."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
