"""What several commands do with pictures: read and name them, and tell them from others in a folder."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import torch


def read_images(
    data: str, processor: Any, max_corrupt_share: float, stream: bool = False
) -> tuple[Iterator[tuple[list[str], "torch.Tensor"]], int | None]:
    """Names and pixel values of a source or of one image file, in batches, and how many images there are.

    Their number is None if they are streamed: if the source can only be, or because only the first ones are wanted.
    """
    from isic_vq.data.classes import AUTO, Classes
    from isic_vq.data.loading import iter_batches
    from isic_vq.data.sources import find_source

    if Path(data).is_file() and not data.endswith(".parquet"):
        return iter([([Path(data).name], processor(data, return_tensors="pt")["pixel_values"])]), 1
    source = find_source(data, Classes.parse(AUTO))
    if stream and source.is_listed_cheaply:
        source.describe()  # which tells what is left out
    records = source.stream() if stream else source.records()
    number = len(records) if not stream and source.has_random_access else None
    batches = iter_batches(records, processor, batch_size=32, max_corrupt_share=max_corrupt_share)
    return ((batch["isic_ids"], batch["pixel_values"]) for batch in batches), number


def announce_other_images(folder: Path, names: Collection[str]) -> None:
    """Say which images are in a folder already that a command is about to write to and will not replace."""
    from isic_vq.data.uri import IMAGE_SUFFIXES

    others = sorted(path.name for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    others = [name for name in others if name not in names]
    if others:
        typer.echo(
            f"warning: {folder} holds {len(others)} other images, such as {others[0]}, which stay: choose another folder to "
            "keep sets apart",
            err=True,
        )
