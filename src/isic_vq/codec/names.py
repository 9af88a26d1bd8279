"""What images are called in a file, and where they may be written: never outside the folder that was asked for."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from isic_vq.codec.container import CodecError
from isic_vq.data.uri import IMAGE_SUFFIXES


def check_names(names: Sequence[str]) -> None:
    """Refuse names that a file cannot give back.

    Raises:
        CodecError: two images have the same name, or a name is no relative path with forward slashes.
    """
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise CodecError(
            f"two images are called {twice[0]!r}: expected names of their own, so rename one of them"
        )
    for name in names:
        _check_name(name)


def png_paths(names: Sequence[str], folder: Path) -> list[Path]:
    """Where images are written: "a/b.jpg" becomes "a/b.png", or all keep their suffixes if two would become one.

    Raises:
        CodecError: a name would leave the folder, or two images have the same name.
    """
    check_names(names)
    stems = [_without_suffix(name) for name in names]
    paths = [folder / f"{name}.png" for name in (stems if len(set(stems)) == len(names) else names)]
    root = folder.resolve()
    for name, path in zip(names, paths, strict=True):
        if not path.resolve().is_relative_to(root):  # a link in the folder
            raise CodecError(
                f"the image {name!r} would be written outside of {folder.name}: nothing is written"
            )
    return paths


def _check_name(name: str) -> None:
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(
        character in "\\:" or ord(character) < 32 for character in name
    ):
        raise CodecError(
            f"an image is called {name!r}: expected a relative path with forward slashes, without '..', ':', "
            "backslashes or control characters"
        )


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return name[: -len(path.suffix)] if path.suffix.lower() in IMAGE_SUFFIXES else name
