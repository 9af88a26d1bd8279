"""URIs of sources: environment variables in them, and what of them may be published."""

import os
import re
from pathlib import Path

from isic_vq.data.schema import DataError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expand_path(path: str) -> str:
    """Replace `~` and environment variables; unlike with `os.path.expandvars`, an unset one is an error.

    Raises:
        DataError: a variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        variable = match[1] or match[2]
        if not os.environ.get(variable):
            raise DataError(
                f"{path!r} needs the environment variable {variable}, which is not set. Set it to a folder."
            )
        return os.environ[variable]

    return os.path.expanduser(_VARIABLE.sub(value, path))


def public_path(path: str) -> str:
    """A path that tells nothing about the machine: without its folders, unless a variable stands for them."""
    if _VARIABLE.match(path):
        return path
    return Path(path).name or Path(path).resolve().name
