"""Split records into training, validation and test so that no lesion and no patient is in two splits.

Records that share a lesion or a patient, directly or through other records, form a group, which stays together. A hash of
the group's smallest id decides its split: it depends neither on the order of the records nor on other groups nor on the
machine, and a larger share only moves groups out of training. Earlier assignments stay: `assign_splits` keeps them, and
excludes a new record that would join groups of different splits.
Differs from a random split: shares hold on average over groups, and classes are not stratified, except that a class
without any training image is moved to training. `stratified_report` shows the outcome.
The same lesion under two ids (HAM10000 has some: Abhishek et al., arXiv 2401.14497) is left to `isic_vq.data.duplicates`.
"""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isic_vq.data.classes import UNKNOWN, counted
from isic_vq.data.schema import DataError
from isic_vq.models.checks import expect

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "excluded")
GROUP_COLUMNS = ("lesion_id", "patient_id", "isic_id")
SHARED_COLUMNS = GROUP_COLUMNS[:2]  # ids that several records may have
FEW = 10  # images of a class in a split; metrics of a class with fewer mean little

Key = tuple[str, str]  # a column of GROUP_COLUMNS and the id in it


def warn_of_shared(train: Mapping[str, Iterable], validation: Mapping[str, Iterable]) -> None:
    """Warn of validation images that share an id with a training image; both are columns of ids, None where unknown."""
    known = {name: set(ids) - {None} for name, ids in train.items()}
    rows = list(zip(*validation.values(), strict=True))
    shared = [
        pairs[0]
        for row in rows
        if (pairs := [(n, i) for n, i in zip(validation, row, strict=True) if i in known[n]])
    ]
    if shared:
        logger.warning(
            "%d of %d validation images share an id with training images, such as %s %s: what is measured on them does not "
            "tell how the model does on new images (isic-vq data prepare splits by lesion and patient)",
            len(shared), len(rows), *shared[0],
        )  # fmt: skip


@dataclass(frozen=True)
class Assignment:
    """The split of a record, one of `SPLITS`, and the reason if it is excluded."""

    split: str
    reason: str | None = None


def assign_splits(
    rows: Sequence[Mapping[str, Any]],
    shares: Mapping[str, float],
    seed: int = 0,
    wanted: Sequence[str | None] | None = None,
    frozen_rows: Sequence[Mapping[str, Any]] = (),
    frozen: Sequence[Assignment] = (),
) -> list[Assignment]:
    """Assign new records to splits, beside records that were assigned before.

    A group joins the split of its earlier records, or the split that comes with its source. If these are several, its
    new records are excluded, because any split would leave a lesion or patient in two.

    Args:
        rows: have the columns `GROUP_COLUMNS`; of those with the same `isic_id`, all but the first are excluded.
        shares: expected share of the groups in "validation" and "test"; the rest is for training.
        seed: another seed gives another split.
        wanted: the split that comes with each record's source, or None.
        frozen_rows: the records that were assigned before.
        frozen: their assignments, which stay; excluded ones bind no group.
    """
    _check_shares(shares)
    unknown = sorted({name for name in wanted or () if name is not None} - set(SPLITS[:3]))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a split: expected {', '.join(SPLITS[:3])}.")
    num_frozen, wanted = len(frozen_rows), wanted or [None] * len(rows)
    keys = [_keys(row) for row in (*frozen_rows, *rows)]
    groups = _groups(keys)
    bound = _Sides()
    for old_keys, group, assignment in zip(keys[:num_frozen], groups[:num_frozen], frozen, strict=True):
        if assignment.split != "excluded":
            bound.add(group, old_keys, assignment.split)
    decided = set(bound.of_group)
    seen = {row["isic_id"]: "an image that is there already" for row in frozen_rows if row["isic_id"]}
    new = []
    for row, row_keys, group, split in zip(rows, keys[num_frozen:], groups[num_frozen:], wanted, strict=True):
        again = seen.get(row["isic_id"])
        if row["isic_id"]:
            seen.setdefault(row["isic_id"], "an earlier image")
        if split is not None and again is None and group not in decided:
            bound.add(group, row_keys, split)
        new.append((row_keys, group, split, again))
    drawn = {group: _split_of(group[1], shares, seed) for _, group, _, again in new if again is None}
    drawn |= {group: next(iter(sides)) for group, sides in bound.of_group.items()}
    every = list(zip((*frozen_rows, *rows), groups, strict=True))
    drawn |= dict.fromkeys(_keep_in_training(every, drawn, set(bound.of_group)), "train")
    assignments = []
    for row_keys, group, split, again in new:
        side = drawn.get(group, "train")
        if again is not None:
            assignments.append(Assignment("excluded", f"has the isic_id of {again}"))
        elif len(bound.of_group.get(group, {})) > 1:
            assignments.append(Assignment("excluded", f"joins {bound.describe(group, row_keys)}"))
        elif split not in (None, side):
            reason = f"comes for {split} and joins {bound.describe(group, row_keys)}"
            assignments.append(Assignment("excluded", reason))
        else:
            assignments.append(Assignment(side))
    return assignments


class _Sides:
    """The splits that groups are bound to, and the lesions and patients that bind them."""

    def __init__(self) -> None:
        # By group and split, the smallest key that binds it there.
        self.of_group: dict[Key, dict[str, Key]] = {}
        self.pairs: set[tuple[Key, str]] = set()  # every key and split that were added

    def add(self, group: Key, keys: Sequence[Key], split: str) -> None:
        sides = self.of_group.setdefault(group, {})
        sides[split] = min(sides.get(split, keys[0]), keys[0])
        self.pairs.update((key, split) for key in keys)

    def describe(self, group: Key, keys: Sequence[Key]) -> str:
        """Name the splits that a record's group is bound to, each by the record's own lesion or patient if possible."""
        reasons = []
        for split, smallest in sorted(self.of_group[group].items()):
            column, name = next((key for key in keys if (key, split) in self.pairs), smallest)
            reasons.append(f"{column.removesuffix('_id').replace('isic', 'image')} {name} in {split}")
        return " and ".join(reasons)


@dataclass(frozen=True)
class Stratum:
    """The frequency of one value of a column in one split."""

    column: str  # "diagnosis", "source", "sex" or "license"
    value: str  # "unknown" where a record has none
    split: str  # one of `SPLITS`
    num_images: int  # records with the value in the split
    share: float  # their share of the split, in [0, 1]
    deviation: float  # `share` minus the value's share of all records, in [-1, 1]


def stratified_report(rows: Sequence[Mapping[str, Any]], assignments: Sequence[Assignment]) -> list[Stratum]:
    """Count the values of diagnosis, source, sex and licence in the splits that hold records."""
    sizes = Counter(assignment.split for assignment in assignments)
    report = []
    for column in ("diagnosis", "source", "sex", "license"):
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row, assignment in zip(rows, assignments, strict=True):
            counts[row[column] or "unknown"][assignment.split] += 1
        for value, count in sorted(counts.items()):
            overall = count.total() / len(rows)
            for split in filter(sizes.get, SPLITS):
                share = count[split] / sizes[split]
                report.append(Stratum(column, value, split, count[split], share, share - overall))
    return report


def few_images(report: Sequence[Stratum]) -> list[str]:
    """Return a warning for each diagnosis with fewer than `FEW` images in a validation or test split."""
    return [
        f"{stratum.value}: {stratum.num_images} images in {stratum.split}, fewer than {FEW}; metrics of this class "
        "alone mean little there"
        for stratum in report
        if stratum.column == "diagnosis"
        and stratum.split in ("validation", "test")
        and stratum.num_images < FEW
    ]


def split_rows(rows: Sequence[Mapping[str, Any]], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split records, which have the columns `GROUP_COLUMNS`, into training and validation rows, disjoint by group.

    `share` is the expected share of the groups in validation; DataError if one of the two would be empty.
    """
    expect(0 < share < 1, "share", share, "a number between 0 and 1 such as 0.1")
    sides: tuple[list[int], list[int]] = ([], [])
    groups = _groups([_keys(row) for row in rows])
    drawn = {group: _split_of(group[1], {"validation": share}, seed) for group in groups}
    kept = _keep_in_training(list(zip(rows, groups, strict=True)), drawn, set())
    for index, group in enumerate(groups):
        sides[drawn[group] == "validation" and group not in kept].append(index)
    if not all(sides):
        raise DataError(
            f"A share of {share} of {len(rows)} images leaves one part empty. Use more images, or another share or seed."
        )
    return sides


def _keep_in_training(
    rows: Sequence[tuple[Mapping[str, Any], Key]], drawn: Mapping[Key, str], bound: set[Key]
) -> set[Key]:
    """Groups to move to training, whose class would have no training image otherwise; `bound` groups stay."""
    groups: dict[str, Counter[Key]] = defaultdict(Counter)
    for row, group in rows:
        if group in drawn and row.get("diagnosis") not in (None, UNKNOWN):
            groups[row["diagnosis"]][group] += 1
    kept: set[Key] = set()
    counts: dict[str, int] = {}
    for name, members in groups.items():
        if all(drawn[group] != "train" and group not in kept for group in members):
            moved = members.keys() - bound
            kept |= moved
            if moved:
                counts[name] = sum(members[group] for group in moved)
    if counts:
        logger.info("moved to training, because no other image of the class is there: %s", counted(counts))
    return kept


def _keys(row: Mapping[str, Any]) -> list[Key]:
    """The ids that a record shares its split with: its lesion and its patient, or itself if it has neither."""
    keys = [(column, str(row[column])) for column in SHARED_COLUMNS if row[column]]
    if not keys and row["isic_id"]:
        keys = [("isic_id", str(row["isic_id"]))]
    if not keys:
        raise DataError(f"A record has none of {', '.join(GROUP_COLUMNS)}; fill in one of them.")
    return keys


def _groups(keys: Sequence[Sequence[Key]]) -> list[Key]:
    """The smallest key of each record's group, from the records' keys: union-find with path halving."""
    parent: dict[Key, Key] = {}

    def root(key: Key) -> Key:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for row_keys in keys:
        for key in row_keys:
            parent.setdefault(key, key)
        if len(row_keys) == 2:
            low, high = sorted((root(row_keys[0]), root(row_keys[1])))
            parent[high] = low  # the smallest is the root; "lesion_id" comes before "patient_id"
    return [root(row_keys[0]) for row_keys in keys]


def _split_of(group: str, shares: Mapping[str, float], seed: int) -> str:
    """The split of a group by its hash in [0, 1): validation from 0 up, test from 1 down, so that both only grow."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < shares.get("validation", 0):
        return "validation"
    return "test" if position >= 1 - shares.get("test", 0) else "train"


def _check_shares(shares: Mapping[str, float]) -> None:
    unknown = sorted(set(shares) - {"validation", "test"})
    if unknown:
        raise ValueError(f"a share of {unknown[0]!r}: expected shares of validation and test.")
    if not all(0 <= share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise ValueError(f"shares are {dict(shares)}: expected numbers from 0 on whose sum is below 1.")
