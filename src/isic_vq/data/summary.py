"""Counts of a source's classes, sources, licences, sexes, ages, sites and missing values."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from isic_vq.data.schema import FEATURES
from isic_vq.data.sites import is_canonical_site

AGE_STEP = 10  # years
COUNTED = ("diagnosis", "source", "license", "attribution", "sex", "site")


def counts_lines(title: str, counts: Mapping[str, int], total: int) -> list[str]:
    """Format counts by value as lines, each with its share of `total` if that is at most 1."""
    shares = {value: f"{count / total:7.1%}" if count <= total else "" for value, count in counts.items()}
    return [title, *(f"  {value[:70]:<70} {count:>8} {shares[value]}" for value, count in counts.items())]


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """Format the counts of `summarise` as lines."""
    number = summary["num_images"]
    lines = [
        line
        for name in (*COUNTED, "age", "missing", "groups")
        for line in counts_lines(name, summary[name], number)
    ]
    if summary["other_sites"]:
        lines.append(f"sites that no table knows: {', '.join(summary['other_sites'])}")
    return lines


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Count rows with the columns of `FEATURES`.

    Returns:
        `num_images`; for each of `COUNTED`, the number of rows by value, the most frequent first; `age`, rows per decade;
        `missing`, rows without a value by column, the diagnosis "unknown" included; `groups`, the number of lesions and
        patients; `other_sites`, sites that `isic_vq.data.sites` does not know.
    """
    counts: dict[str, Counter[Any]] = {name: Counter() for name in FEATURES if name != "image"}
    number = 0
    for row in rows:
        number += 1
        for name, count in counts.items():
            count[row[name]] += 1
    missing = {name: count.pop(None, 0) + count["unknown"] for name, count in counts.items()}
    ages: Counter[int] = Counter()
    for age, repeats in counts["age"].items():
        ages[int(age // AGE_STEP) * AGE_STEP] += repeats
    return {
        "num_images": number,
        **{
            name: dict(sorted(counts[name].items(), key=lambda item: (-item[1], item[0]))) for name in COUNTED
        },
        "age": {f"{start} to {start + AGE_STEP - 1}": ages[start] for start in sorted(ages)},
        "missing": {name: number for name, number in missing.items() if number},
        "groups": {name: len(counts[name]) for name in ("lesion_id", "patient_id")},
        "other_sites": sorted(site for site in counts["site"] if not is_canonical_site(site)),
    }
