"""One schema for every source: eleven columns, in which a missing value is None.

Source: the column names of HAM10000, of the ISIC challenges' CSV files and of the ISIC archive's metadata.
Differs: "unknown", "" and NaN, the archives' missing values, become None, and a missing diagnosis the class `unknown`.
Column names are compared without case and outer blanks. Diagnoses become classes (`isic_vq.data.classes`), sites those of
`isic_vq.data.sites`, sex "male" or "female"; another site or sex stays, in lower case. Levels count where the archive
gives diagnosis or site in levels only. Age is in years; the archive caps it at "85+", which becomes 85.
Licence, attribution and encoded images stay as they are.
"""

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from datasets import Features, Image, Value

from isic_vq.data.classes import UNKNOWN, Reading
from isic_vq.data.errors import DataError
from isic_vq.data.sites import archive_site, canonical_site
from isic_vq.models.diagnosis import archive_diagnosis, is_one_hot, one_hot_diagnosis

__all__ = [
    "COLUMN_ALIASES",
    "FEATURES",
    "DataError",
    "is_label",
    "is_read",
    "named_classes",
    "normalise",
    "without_image",
]

FEATURES = Features(
    {
        "image": Image(),
        "isic_id": Value("string"),
        "lesion_id": Value("string"),
        "patient_id": Value("string"),
        "diagnosis": Value("string"),
        "age": Value("float32"),
        "sex": Value("string"),
        "site": Value("string"),
        "source": Value("string"),
        "license": Value("string"),
        "attribution": Value("string"),
    }
)

# Where a source has several of these columns, the first that is not missing in a row counts.
COLUMN_ALIASES: dict[str, tuple[str, ...]] = {
    "isic_id": ("isic_id", "image_id", "image_name"),
    "lesion_id": ("lesion_id",),
    "patient_id": ("patient_id",),
    "diagnosis": ("diagnosis", "dx", "label"),
    "age": ("age", "age_approx"),
    "sex": ("sex", "gender"),
    "site": ("site", "localization", "anatom_site_general", "anatom_site_general_challenge"),
    "source": ("source", "dataset"),
    "license": ("license", "copyright_license"),
    "attribution": ("attribution",),
}

# Of the ISIC archive's tables, from the general to the specific.
DIAGNOSIS_LEVELS = tuple(f"diagnosis_{level}" for level in range(1, 6))
SITE_LEVELS = (*(f"anatom_site_{level}" for level in range(1, 6)), "anatom_site_special")
_SEXES = {"m": "male", "man": "male", "f": "female", "w": "female", "woman": "female"}
_MISSING = frozenset({"", "unknown", "unk", "nan", "none", "null", "n/a", "na"})


def normalise(
    record: Mapping[str, Any],
    where: str,
    class_names: Mapping[str, list[str]] | None = None,
    reading: Reading | None = None,
    label: str | None = None,
) -> dict[str, Any]:
    """Convert a record of any source to the columns of `FEATURES`; a diagnosis of None says that it is left out.

    Args:
        record: a row with names of `COLUMN_ALIASES` and an undecoded image or none; other columns are dropped.
        where: what error messages call the row, such as its number.
        class_names: names behind the ids in columns of class ids (`datasets.ClassLabel`).
        reading: the pass over the source, which names the class; by default one with ISIC's classes.
        label: of a record without a diagnosis, such as the name of its folder.

    Raises:
        DataError: the diagnosis or the age cannot be read; the message names the row.
    """
    reading = reading or Reading()
    record = _lower_columns(named_classes(record, class_names or {}, where))
    values = {name: _first_present(record, aliases) for name, aliases in COLUMN_ALIASES.items()}
    if values["isic_id"] is None:
        values["isic_id"] = _file_stem(record)
    where = where if values["isic_id"] is None else f"{where} ({values['isic_id']})"
    normal: dict[str, Any] = {name: None if v is None else str(v).strip() for name, v in values.items()}
    named_label = _first_present(record, COLUMN_ALIASES["diagnosis"], reading)
    normal["diagnosis"] = _diagnosis(named_label, record, where, reading, label)
    normal["age"] = _age(values["age"], where)
    if normal["sex"] is not None:
        normal["sex"] = _SEXES.get(normal["sex"].lower(), normal["sex"].lower())
    site = normal["site"]
    normal["site"] = archive_site(_levels(record, SITE_LEVELS)) if site is None else canonical_site(site)
    return {"image": record["image"], **normal} if "image" in record else normal


def named_classes(
    record: Mapping[str, Any], class_names: Mapping[str, list[str]], where: str
) -> dict[str, Any]:
    """Copy a record with names in place of the class ids in some columns; DataError for an id without a name."""
    named = dict(record)
    for column, names in class_names.items():
        number = record[column]
        if number is None or number == -1:  # `datasets` writes -1 for a missing class
            named[column] = None
        elif isinstance(number, int) and 0 <= number < len(names):
            named[column] = names[number]
        else:
            raise DataError(
                f"{where}: {column} is {number!r}, expected 0 to {len(names) - 1} for {', '.join(names)}. Correct the row, or "
                "name all classes in order (of a hub: source by classes=A,B,...)."
            )
    return named


def without_image(record: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a record without its image."""
    return {name: value for name, value in record.items() if name != "image"}


def is_read(column: str) -> bool:
    """Whether `normalise` takes a value from a column of this name."""
    name = column.strip().lower()
    columns = {*DIAGNOSIS_LEVELS, *SITE_LEVELS, "file_name", "image"}.union(*COLUMN_ALIASES.values())
    return name in columns or is_one_hot(name)


def is_label(column: str) -> bool:
    """Whether a column of this name tells the class."""
    name = column.strip().lower()
    return name in (*COLUMN_ALIASES["diagnosis"], *DIAGNOSIS_LEVELS) or is_one_hot(name)


def _lower_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with lower-case columns without outer blanks; where two become one, a column already so named counts."""
    return {**{name.strip().lower(): value for name, value in record.items()}, **record}


def _first_present(
    record: Mapping[str, Any], columns: tuple[str, ...], reading: Reading | None = None
) -> Any:
    """The first value of these columns that is not missing; a declared class is never missing, whatever its name."""
    for column in columns:
        value = record.get(column)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        is_class = reading is not None and reading.classes.declares(value)
        if is_class or str(value).strip().lower() not in _MISSING:
            return value
    return None


def _levels(record: Mapping[str, Any], columns: tuple[str, ...]) -> list[str | None]:
    values = [_first_present(record, (column,)) for column in columns]
    return [None if value is None else str(value) for value in values]


def _file_stem(record: Mapping[str, Any]) -> str | None:
    image = record.get("image")
    name = record.get("file_name") or (image.get("path") if isinstance(image, Mapping) else None)
    return None if name is None else PurePosixPath(str(name).replace("\\", "/")).stem


def _diagnosis(
    value: object, record: Mapping[str, Any], where: str, reading: Reading, label: str | None
) -> str | None:
    """The class of one row: by its name, else by levels, else by the column that holds a 1, else by `label`."""
    if value is None:
        levels = _levels(record, DIAGNOSIS_LEVELS)
        try:
            value = archive_diagnosis(levels) if any(levels) else one_hot_diagnosis(record) or UNKNOWN
        except ValueError as error:
            raise DataError(f"{where}: {error} Correct the row, or leave its diagnosis empty.") from None
        value = label if value == UNKNOWN and label is not None else value
    return reading.name_class(str(value).strip(), where)


def _age(value: object, where: str) -> float | None:
    if value is None:
        return None
    try:
        age = 85.0 if str(value).strip() == "85+" else float(str(value))
    except ValueError:
        age = math.nan
    if not 0 <= age <= 130:
        raise DataError(f"{where}: age {value!r} is neither empty nor 0 to 130 years")
    return age
