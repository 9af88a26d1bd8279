"""Pickles with a side effect, to put in the place of files that commands read."""

import pickle
from pathlib import Path
from typing import Any


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.mkdir, (self.marker,))


def plant(path: Path, marker: Path) -> None:
    """Put a pickle in a file's place that makes the folder `marker`."""
    path.write_bytes(pickle.dumps(Planted(marker)))
    assert not marker.exists()
