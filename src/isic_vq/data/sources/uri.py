"""URIs of sources: environment variables in them, and what of them may be published."""

import os
import re
from pathlib import Path

from isic_vq.data.errors import DataError

MAX_NAMES = 100_000  # that braces may stand for

_BRACES = re.compile(r"(?<!\$)\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
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


def expand_braces(pattern: str) -> list[str]:
    """Write out {000..009}, numbers of the width of the first, and {a,b}, in order, as a shell does.

    Raises:
        DataError: a range goes down, or stands for more than `MAX_NAMES` names.

    Example:
        >>> expand_braces("{train,test}-{08..10}.tar")[:4]
        ['train-08.tar', 'train-09.tar', 'train-10.tar', 'test-08.tar']
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    choices = (match[3] or "").split(",")
    if match[1] is not None:
        first, last = int(match[1]), int(match[2])
        if not 0 <= last - first < MAX_NAMES:
            raise DataError(
                f"{match[0]} stands for no range of up to {MAX_NAMES} names, such as {{000..009}}."
            )
        choices = [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    rests = expand_braces(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{choice}{rest}" for choice in choices for rest in rests]
