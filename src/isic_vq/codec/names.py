"""Names of images in a file, and the paths they are written to, which never leave the folder."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from isic_vq.codec.container import CodecError
from isic_vq.data.uri import IMAGE_SUFFIXES


def check_names(names: Sequence[str]) -> None:
    """Raise CodecError if two images have the same name, or a name is no relative path with forward slashes."""
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise CodecError(f"two images are called {twice[0]!r}: expected unique names, so rename one of them")
    for name in names:
        is_wrong_part = any(part in ("", ".", "..") for part in name.split("/"))
        if is_wrong_part or any(character in "\\:" or ord(character) < 32 for character in name):
            raise CodecError(
                f"an image is called {name!r}: expected a relative path without '..', ':' and backslashes"
            )


def png_paths(names: Sequence[str], folder: Path) -> list[Path]:
    """Turn "a/b.jpg" into "a/b.png", or keep all suffixes if two would become the same; no path may leave the folder."""
    check_names(names)
    suffixes = [PurePosixPath(name).suffix for name in names]
    stems = [
        name.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else name
        for name, suffix in zip(names, suffixes, strict=True)
    ]
    paths = [folder / f"{name}.png" for name in (stems if len(set(stems)) == len(names) else names)]
    root = folder.resolve()
    for name, path in zip(names, paths, strict=True):
        if not path.resolve().is_relative_to(root):  # through a link in the folder
            raise CodecError(f"the image {name!r} would be written outside of {folder.name}")
    return paths
