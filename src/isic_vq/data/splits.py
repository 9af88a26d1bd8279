"""Split records into training, validation and test so that no lesion and no patient is on two sides.

Records that share a lesion or a patient, directly or over others, are one group and go together. A group goes by a
hash of its smallest id: its side depends neither on the order of the records nor on other groups nor on the
machine, and a larger share only moves groups out of training. What was assigned once stays: `assign_splits` takes
earlier assignments as they are, and a new record that would join groups of different sides is excluded.
Differs from a random split: shares hold on average over groups, not exactly, and diagnoses are not stratified;
`stratified_report` shows how they came out.
It does not find the same lesion under two ids (HAM10000 has some: Abhishek et al., arXiv 2401.14497); that is
`isic_vq.data.duplicates`.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isic_vq.data.schema import DataError

SPLITS = ("train", "validation", "test", "excluded")
GROUP_COLUMNS = ("lesion_id", "patient_id", "isic_id")
SHARED_COLUMNS = GROUP_COLUMNS[:2]  # ids that several records may have
FEW = 10  # images of a class in a split below which figures of that class mean little

Key = tuple[str, str]  # a column of GROUP_COLUMNS and the id in it


@dataclass(frozen=True)
class Assignment:
    """Where a record goes.

    Attributes:
        split: one of `SPLITS`.
        reason: why it is excluded; else None.
    """

    split: str
    reason: str | None = None


def components(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of each record's group: the smallest lesion id in it, else patient id, else the record's own id.

    Raises:
        DataError: a record has none of the three ids.
    """
    names = _group_names(rows)
    return [names[_keys(row)[0]][1] for row in rows]


def in_validation(group: str, share: float, seed: int) -> bool:
    """Tell whether a group belongs to validation: true for about `share` of all groups."""
    return _position(group, seed) < share


def assign_splits(
    rows: Sequence[Mapping[str, Any]],
    shares: Mapping[str, float],
    seed: int = 0,
    wanted: Sequence[str | None] | None = None,
    frozen_rows: Sequence[Mapping[str, Any]] = (),
    frozen: Sequence[Assignment] = (),
) -> list[Assignment]:
    """Assign records to splits, beside others that were assigned before.

    A group with records that were assigned before, or whose source comes with a split, takes their side. Where these
    are several, none of its new records can go anywhere without a lesion or patient on two sides: they are excluded.

    Args:
        rows: have the columns `GROUP_COLUMNS`.
        shares: expected share of the groups in "validation" and "test"; the rest is for training.
        seed: another seed gives another split.
        wanted: the split that each record's source comes with, None where it has none.
        frozen_rows: the records that were assigned before.
        frozen: their assignments, which stay; excluded ones bind nobody.

    Returns:
        One assignment per row. Of rows with the same `isic_id`, the first one counts and the others are excluded.

    Raises:
        ValueError: shares or splits that are none.
        DataError: a record has no id.
    """
    _check_shares(shares)
    unknown = sorted({name for name in wanted or () if name is not None} - set(SPLITS[:3]))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a split: expected {', '.join(SPLITS[:3])}.")
    names = _group_names([*frozen_rows, *rows])
    sides: dict[Key, dict[str, str]] = defaultdict(dict)  # of a group: split -> who says so
    for row, assignment in zip(frozen_rows, frozen, strict=True):
        if assignment.split != "excluded":
            sides[names[_keys(row)[0]]].setdefault(assignment.split, _who(row))
    decided = set(sides)
    seen = {row["isic_id"]: "an image that is there already" for row in frozen_rows if row["isic_id"]}
    duplicated = []
    for row in rows:
        duplicated.append(seen.get(row["isic_id"]))
        if row["isic_id"]:
            seen.setdefault(row["isic_id"], "an earlier image")
    wanted = wanted or [None] * len(rows)
    for row, split, again in zip(rows, wanted, duplicated, strict=True):
        group = names[_keys(row)[0]]
        if split is not None and again is None and group not in decided:
            sides[group].setdefault(split, _who(row))
    found = []
    for row, split, again in zip(rows, wanted, duplicated, strict=True):
        group = names[_keys(row)[0]]
        told = " and ".join(f"{who} in {side}" for side, who in sorted(sides[group].items()))
        side = next(iter(sides[group]), None) or _split_of(group[1], shares, seed)
        if again is not None:
            found.append(Assignment("excluded", f"has the isic_id of {again}"))
        elif len(sides[group]) > 1:
            found.append(Assignment("excluded", f"joins {told}"))
        elif split not in (None, side):
            found.append(Assignment("excluded", f"comes for {split} and joins {told}"))
        else:
            found.append(Assignment(side))
    return found


def stratified_report(
    rows: Sequence[Mapping[str, Any]], assignments: Sequence[Assignment]
) -> dict[str, dict[str, dict[str, int]]]:
    """How often each value of diagnosis, source, sex and licence occurs in each split: column -> value -> split."""
    report: dict[str, dict[str, dict[str, int]]] = {}
    for column in ("diagnosis", "source", "sex", "license"):
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row, assignment in zip(rows, assignments, strict=True):
            counts[row[column] or "unknown"][assignment.split] += 1
        report[column] = {
            value: {split: counts[value][split] for split in SPLITS} for value in sorted(counts)
        }
    return report


def few_images(report: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """A sentence for each diagnosis with some, but fewer than `FEW`, images in validation or test."""
    return [
        f"{diagnosis}: {counts[split]} images in {split}, fewer than {FEW}; report it only with others"
        for diagnosis, counts in report["diagnosis"].items()
        for split in ("validation", "test")
        if 0 < counts[split] < FEW
    ]


def split_rows(rows: Sequence[Mapping[str, Any]], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split records into training and validation, disjoint by group; both keep the order of the rows.

    Args:
        rows: have the columns `GROUP_COLUMNS`.
        share: expected share of the groups in validation, between 0 and 1.
        seed: another seed gives another split.

    Returns:
        Numbers of the rows for training, and of those for validation.

    Raises:
        ValueError: the share is not between 0 and 1.
        DataError: one of the two would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}, expected a number between 0 and 1 such as 0.1.")
    sides: tuple[list[int], list[int]] = ([], [])
    for index, group in enumerate(components(rows)):
        sides[in_validation(group, share, seed)].append(index)
    if not all(sides):
        raise DataError(
            f"A share of {share} splits {len(rows)} images into {len(sides[0])} for training and "
            f"{len(sides[1])} for validation. Use more images, another share or another seed."
        )
    return sides


def _keys(row: Mapping[str, Any]) -> list[Key]:
    """What a record must stay together with: its lesion and its patient; itself if it has neither."""
    keys = [(column, str(row[column])) for column in SHARED_COLUMNS if row[column]]
    if not keys and row["isic_id"]:
        keys = [("isic_id", str(row["isic_id"]))]
    if not keys:
        raise DataError(
            f"A record has none of {', '.join(GROUP_COLUMNS)}, so it cannot be split; fill in one of them."
        )
    return keys


def _group_names(rows: Sequence[Mapping[str, Any]]) -> dict[Key, Key]:
    """The smallest key of its group for each key, by union-find with path halving."""
    parent: dict[Key, Key] = {}

    def root(key: Key) -> Key:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for row in rows:
        keys = _keys(row)
        for key in keys:
            parent.setdefault(key, key)
        if len(keys) == 2:
            low, high = sorted((root(keys[0]), root(keys[1])))
            parent[high] = low  # the smallest is the root; "lesion_id" comes before "patient_id"
    return {key: root(key) for key in parent}


def _position(group: str, seed: int) -> float:
    """Where a group lies between 0 and 1."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split_of(group: str, shares: Mapping[str, float], seed: int) -> str:
    """The split of a group: validation from the bottom of the line, test from its top, so that both only grow."""
    position = _position(group, seed)
    if position < shares.get("validation", 0):
        return "validation"
    return "test" if position >= 1 - shares.get("test", 0) else "train"


def _check_shares(shares: Mapping[str, float]) -> None:
    unknown = sorted(set(shares) - {"validation", "test"})
    if unknown:
        raise ValueError(f"a share of {unknown[0]!r}: expected shares of validation and test.")
    if not all(0 <= share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise ValueError(f"shares are {dict(shares)}: expected numbers from 0 on whose sum is below 1.")


def _who(row: Mapping[str, Any]) -> str:
    """What a reason calls a record: its lesion, else its patient, else itself."""
    column, name = _keys(row)[0]
    return f"{column.removesuffix('_id').replace('isic', 'image')} {name}"
