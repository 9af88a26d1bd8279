"""Parts of a source: training or validation, and the images under some licences."""

from collections import Counter
from collections.abc import Collection

from datasets import Dataset

from isic_vq.data.licenses import license_id
from isic_vq.data.schema import DataError
from isic_vq.data.sources import Source, SourceInfo, find_source
from isic_vq.data.sources.base import describe_rows
from isic_vq.data.splits import split_by_group


def open_part(
    uri: str, part: str = "all", share: float = 0.1, licenses: Collection[str] = ()
) -> tuple[Dataset | Source, SourceInfo]:
    """Open a source, or the training or validation part that `split_by_group` (seed 0) makes of it.

    A source that can only be streamed is returned itself; no part of it can be taken.

    Args:
        uri: as for `open_source`.
        part: "all", "train" or "validation".
        share: expected share of the groups in validation.
        licenses: images under one of these alone, however they are spelled; none takes all.

    Returns:
        The records, and what may be published about them.

    Raises:
        ValueError: the part, the share or a licence is not one.
        DataError: as `open_source` and `split_by_group`, or no image has such a licence.
    """
    if part not in ("all", "train", "validation"):
        raise ValueError(f"part is {part!r}, expected 'all', 'train' or 'validation'.")
    source = find_source(uri)
    if not source.has_random_access:
        if part != "all" or licenses:
            raise DataError(
                f"{source.name} can only be read as a stream, so no part of it can be taken here: take it in the source's "
                "own filters, or write the images to files first, with isic-vq data prepare"
            )
        return source, source.describe()
    records, name = source.dataset(), source.name
    if licenses:
        records, name = _with_licenses(records, name, licenses), f"{name} (licence {', '.join(licenses)})"
    if part != "all":
        train, validation = split_by_group(records, share, seed=0)
        records = train if part == "train" else validation
        name = f"{name} ({part} part, share {share:g})"
    rows = records.remove_columns("image").to_list()
    return records, describe_rows(name, source.fingerprint(), rows, source.snapshot)


def _with_licenses(records: Dataset, name: str, licenses: Collection[str]) -> Dataset:
    """The records under one of some licences; one without a licence is under none."""
    wanted = {license_id(text) for text in licenses} - {"unknown"}
    present = Counter(text or "unknown" for text in records["license"])
    passing = {text for text in present if text != "unknown" and license_id(text) in wanted}
    if not passing:
        there = ", ".join(f"{text} ({number} images)" for text, number in sorted(present.items()))
        raise DataError(f"No image of {name} is under {', '.join(licenses)}; there are {there}.")
    return records.select([i for i, text in enumerate(records["license"]) if text in passing])
