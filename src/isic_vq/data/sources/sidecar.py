"""A JSON object about one image: a file beside it in a folder, or a member of its sample in a tar.

Source: what the ISIC archive gives with an image, version 1 ({"name", "meta": {"clinical", "acquisition"},
"dataset"}) and version 2 of its API ({"isic_id", "copyright_license", "attribution", "metadata": {"clinical",
"acquisition"}}), diagnoses by one name or by the levels diagnosis_1 to diagnosis_5. Any other object counts as flat,
with the names in `COLUMN_ALIASES`.
"""

import json
from typing import Any

from isic_vq.data.schema import DataError
from isic_vq.models.diagnosis import archive_diagnosis


def read_sidecar(content: bytes, where: str) -> dict[str, Any]:
    """Return what a JSON object says about an image, flat, under names that `normalise` knows.

    Args:
        content: the JSON.
        where: what error messages call it.

    Raises:
        DataError: it is not one JSON object.
    """
    try:
        about = json.loads(content)
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8, or a tower of brackets
        raise DataError(f"{where} is not JSON: {error}. Expected one object about the image.") from error
    if not isinstance(about, dict):
        raise DataError(f"{where} is a {type(about).__name__}; expected one JSON object about the image.")
    return flatten(about)


def flatten(about: dict[str, Any]) -> dict[str, Any]:
    """Return what an object about an image says, without the groups it says it in."""
    flat = {name: value for name, value in about.items() if not isinstance(value, dict)}
    dataset = about.get("dataset")
    if isinstance(dataset, dict):
        flat |= {"source": dataset.get("name"), "license": dataset.get("license")}
    for outer in ("meta", "metadata"):
        groups = about.get(outer)
        for group in ("acquisition", "clinical"):
            values = groups.get(group) if isinstance(groups, dict) else None
            flat |= values if isinstance(values, dict) else {}
    if "meta" in about and "isic_id" not in flat:
        flat["isic_id"] = about.get("name")
    levels = [flat.get(f"diagnosis_{level}") for level in range(1, 6)]
    if any(levels):
        flat["diagnosis"] = archive_diagnosis([str(level) if level else None for level in levels])
    return flat
