"""Split records into training and validation so that no lesion is in both.

Each group of records goes by a hash of its name: the side of a group does not depend on the order of the
records, on the other records or on the machine, and a larger share only moves groups from training to
validation.
Differs from a random split: the share holds on average over groups, not exactly, and diagnoses are not
stratified.
It does not find the same lesion under two ids (HAM10000 has some: Abhishek et al., arXiv 2401.14497).
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from isic_vq.data.schema import DataError
from isic_vq.data.sources import SourceInfo, describe_source, open_source

GROUP_COLUMNS = ("lesion_id", "patient_id", "isic_id")


def group_of(record: Mapping[str, Any]) -> str:
    """Return what must stay together: the lesion, else the patient, else the image itself.

    Raises:
        DataError: the record has none of the three ids.
    """
    for column in GROUP_COLUMNS:
        if record[column]:
            return record[column]
    raise DataError(
        f"A record has none of {', '.join(GROUP_COLUMNS)}, so it cannot be split; fill in one of them."
    )


def in_validation(group: str, share: float, seed: int) -> bool:
    """Tell whether a group belongs to validation: true for about `share` of all groups."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_by_group(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split a data set into training and validation, disjoint by `group_of`; both keep the order of the rows.

    Args:
        dataset: has the columns of `FEATURES`.
        share: expected share of the groups in validation, between 0 and 1.
        seed: another seed gives another split.

    Returns:
        Training set, validation set.

    Raises:
        ValueError: the share is not between 0 and 1.
        DataError: one of the two would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}, expected a number between 0 and 1 such as 0.1.")
    sides: tuple[list[int], list[int]] = ([], [])
    for index, record in enumerate(dataset.select_columns(list(GROUP_COLUMNS)).to_list()):
        sides[in_validation(group_of(record), share, seed)].append(index)
    if not all(sides):
        raise DataError(
            f"A share of {share} splits {len(dataset)} images into {len(sides[0])} for training and "
            f"{len(sides[1])} for validation. Use more images, another share or another seed."
        )
    return dataset.select(sides[0]), dataset.select(sides[1])


def open_part(uri: str, part: str = "all", share: float = 0.1) -> tuple[Dataset, SourceInfo]:
    """Open a source, or the training or validation part that `split_by_group` (seed 0) makes of it.

    Args:
        uri: as for `open_source`.
        part: "all", "train" or "validation".
        share: expected share of the groups in validation.

    Returns:
        The records, and what may be published about them.

    Raises:
        ValueError: the part or the share is not one.
        DataError: as `open_source` and `split_by_group`.
    """
    if part not in ("all", "train", "validation"):
        raise ValueError(f"part is {part!r}, expected 'all', 'train' or 'validation'.")
    records, info = open_source(uri), describe_source(uri)
    if part == "all":
        return records, info
    train, validation = split_by_group(records, share, seed=0)
    chosen = train if part == "train" else validation
    info = dataclasses.replace(
        info,
        name=f"{info.name} ({part} part, share {share:g})",
        num_images=len(chosen),
        licenses=dict(sorted(Counter(name or "unknown" for name in chosen["license"]).items())),
        diagnoses=dict(sorted(Counter(chosen["diagnosis"]).items())),
    )
    return chosen, info
