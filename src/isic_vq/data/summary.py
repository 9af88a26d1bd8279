"""What is in a source, counted: classes, sources, licences, sexes, ages, sites, and what is missing."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from isic_vq.data.schema import FEATURES
from isic_vq.data.sites import is_canonical_site

AGE_STEP = 10  # years
COUNTED = ("diagnosis", "source", "license", "attribution", "sex", "site")


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Count rows with the columns of `FEATURES`.

    Returns:
        `num_images`; for each of `COUNTED`, how often each value occurs, the most frequent first and without the
        missing ones; `age`, images per decade; `missing`, how many rows lack each column, where a diagnosis
        "unknown" lacks; `groups`, how many lesions and patients there are; `other_sites`, sites that no table knows.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTED}
    ages: Counter[int] = Counter()
    missing: Counter[str] = Counter({name: 0 for name in FEATURES if name != "image"})
    groups: dict[str, set[str]] = {"lesion_id": set(), "patient_id": set()}
    number = 0
    for row in rows:
        number += 1
        missing.update(name for name in missing if row[name] in (None, "unknown"))
        for name in COUNTED:
            if row[name] is not None:
                counts[name][row[name]] += 1
        for name, seen in groups.items():
            if row[name]:
                seen.add(row[name])
        if row["age"] is not None:
            ages[int(row["age"] // AGE_STEP) * AGE_STEP] += 1
    return {
        "num_images": number,
        **{
            name: dict(sorted(count.items(), key=lambda item: (-item[1], item[0])))
            for name, count in counts.items()
        },
        "age": {f"{start} to {start + AGE_STEP - 1}": ages[start] for start in sorted(ages)},
        "missing": {name: count for name, count in missing.items() if count},
        "groups": {name: len(seen) for name, seen in groups.items()},
        "other_sites": sorted(site for site in counts["site"] if not is_canonical_site(site)),
    }
