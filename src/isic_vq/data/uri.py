"""URIs of sources: schemes, the local files that they name, environment variables, and what may be published of them.

Imports no library, so that a mistyped path is refused at once.
"""

import glob
import os
import re
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from isic_vq.data.errors import DataError

SCHEMES = (
    "isic-archive[:FILTERS], challenge:YEAR[:PART], hub:OWNER/NAME, webdataset:PATTERN, parquet:PATTERN, folder:DIR, "
    "prepared:DIR[:SPLIT], synthetic:NUM[:SEED] or a path"
)
MANIFEST = "manifest.json"  # of a prepared folder
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
MAX_NAMES = 100_000  # in one range in braces

_BRACES = re.compile(r"(?<!\$)\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_SPLIT = re.compile(r":(train|validation|test)$")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def parse_uri(uri: str, schemes: Collection[str]) -> tuple[str, str]:
    """Split a URI into scheme, which must be known, and target; the scheme of a path is that of its content."""
    match = re.match(
        r"([A-Za-z][A-Za-z0-9+.-]+):(.*)", "isic-archive:" if uri == "isic-archive" else uri, re.DOTALL
    )
    scheme, target = (match[1].lower(), match[2]) if match else ("", uri)
    if scheme and scheme not in schemes:
        raise DataError(f"{uri!r} has the unknown scheme {scheme!r}. Expected {SCHEMES}.")
    if not target.strip() and scheme != "isic-archive":
        raise DataError(f"{uri!r} names nothing. Expected {SCHEMES}.")
    return scheme or _scheme_of_path(target), target


def _scheme_of_path(target: str) -> str:
    path = expand_path(target)
    if os.path.isfile(os.path.join(_SPLIT.sub("", path), MANIFEST)):
        return "prepared"
    if os.path.isdir(path) and not any(Path(path).glob("*.parquet")):
        return "webdataset" if any(Path(path).glob("*.tar")) else "folder"
    if Path(path).suffix.lower() in IMAGE_SUFFIXES and glob.glob(path):
        raise DataError(f"{public_path(target)!r} names images: expected the folder that they lie in")
    return "webdataset" if path.endswith(".tar") else "parquet"


def check_uri(uri: str) -> list[str]:
    """Return the files, or the folder of images, that a URI names; DataError for an unknown scheme or a missing local one.

    Remote files are not looked up.
    """
    scheme, target = parse_uri(uri, re.findall(r"[a-z-]+(?=[\[:])", SCHEMES))
    if scheme in LOCAL:
        return LOCAL[scheme](target)
    if scheme == "prepared":
        folder = Path(_SPLIT.sub("", expand_path(target)))
        if not (folder / MANIFEST).is_file():
            raise DataError(f"{folder.name} has no {MANIFEST}: isic-vq data prepare writes it last")
    return []


def find_folder(target: str) -> list[str]:
    """The directory of folder:TARGET; DataError if there is none."""
    folder = expand_path(target)
    if not os.path.isdir(folder):
        raise DataError(f"folder:{public_path(target)} is not a directory.")
    return [folder]


def find_parquet(target: str) -> list[str]:
    """The files of parquet:TARGET, sorted; DataError if there are none."""
    files = _files(expand_path(target), ".parquet")
    if not files:
        raise DataError(
            f"Nothing matches parquet:{public_path(target)}: expected a file, directory or pattern of parquet files, or "
            "folder:DIR for images."
        )
    return files


def find_tars(target: str) -> list[str]:
    """The files or http(s) addresses of webdataset:TARGET, in order, with braces expanded; DataError if there are none."""
    if is_url(target):
        return expand_braces(target)
    tars: list[str] = []
    for pattern in expand_braces(expand_path(target)):
        files = _files(pattern, ".tar")
        if not files:
            raise DataError(
                f"Nothing matches {public_path(pattern)} of webdataset:{public_path(target)}. Expected a tar file, a pattern "
                "such as shards/images-*.tar or images-{000..009}.tar, a directory of *.tar files, or an http(s) address."
            )
        tars += files
    return tars


def _files(path: str, suffix: str) -> list[str]:
    """The file of a path, the files in a directory with this suffix, or those that a pattern matches, sorted."""
    if os.path.isfile(path):  # before patterns: its name may hold brackets
        return [path]
    pattern = os.path.join(glob.escape(path), f"*{suffix}") if os.path.isdir(path) else path
    return sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))


LOCAL = {"folder": find_folder, "parquet": find_parquet, "webdataset": find_tars}


def set_name(uri: str) -> str:
    """Name the images of a URI for a report: by the split that it says, otherwise by its folder, file or data set.

    Examples:
        >>> set_name("folder:data/my_test_images"), set_name("challenge:2018:test"), set_name("hub:me/moles?split=test")
        ('my_test_images', 'test', 'test')
    """
    split = re.search(
        r"[?&]split=([\w-]+)|[:/\\](train|validation|test)(?:-[^/\\]*)?(?:\.parquet|\.tar)?$", uri
    )
    if split:
        return split[1] or split[2]
    parts = [part for part in re.split(r"[/\\]", uri.partition("?")[0]) if not re.search(r"[*?${}]|^$", part)]
    name = re.sub(r"^(folder|parquet|webdataset|prepared):|\.(parquet|tar)$", "", parts[-1] if parts else "")
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "images"


def is_url(text: str) -> bool:
    """Whether a text is an http(s) address."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def expand_path(path: str) -> str:
    """Replace `~` and environment variables; unlike in `os.path.expandvars`, an unset variable is a DataError."""

    def value(match: re.Match[str]) -> str:
        variable = match[1] or match[2]
        if not os.environ.get(variable):
            raise DataError(f"{path!r} needs the environment variable {variable}: set it to a folder")
        return os.environ[variable]

    return os.path.expanduser(_VARIABLE.sub(value, path))


def public_path(path: str) -> str:
    """Strip a path to its last component, unless it begins with a variable, and an address of user, password and query."""
    if is_url(path):
        parts = urlsplit(path)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    if _VARIABLE.match(path):
        return path
    return Path(path).name or Path(path).resolve().name


def expand_braces(pattern: str) -> list[str]:
    """Expand {000..009}, padded to the width of the first number, and {a,b}, in order, as a shell does.

    DataError for a range that goes down, or has more than `MAX_NAMES` names.

    Examples:
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
            raise DataError(f"{match[0]} stands for no range of up to {MAX_NAMES} names.")
        choices = [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    rests = expand_braces(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{choice}{rest}" for choice in choices for rest in rests]
