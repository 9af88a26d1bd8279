"""How the rows of a Hub repository become records, by the source's URI and by `KNOWN_SETS`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from datasets import ClassLabel, Features, Image, Value

from isic_vq.data.classes import AUTO, NONE
from isic_vq.data.schema import COLUMN_ALIASES, FEATURES, DataError

_SETTINGS = ("split", "config", "classes")
_COLUMN_IN_TEXT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Columns:
    """How the rows of a repository become records."""

    names: Mapping[str, str] = field(default_factory=dict)  # column of the repository by column of `FEATURES`
    # Text by column of `FEATURES`; {COLUMN} in it stands for the row's value
    constants: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()  # diagnoses that integers stand for, in order

    def updated(self, other: "Columns") -> "Columns":
        """Replace the origin of those columns that another names."""
        replaced = {*other.names, *other.constants}
        return Columns(
            {**{k: v for k, v in self.names.items() if k not in replaced}, **other.names},
            {**{k: v for k, v in self.constants.items() if k not in replaced}, **other.constants},
            other.classes or self.classes,
        )

    def used(self) -> set[str]:
        """The repository's columns that are read by name."""
        texts = self.constants.values()
        return {*self.names.values(), *(name for text in texts for name in _COLUMN_IN_TEXT.findall(text))}

    def rename(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Rename a row for `normalise`; aliases of a column that is named here are dropped."""
        named = {*self.names, *self.constants}
        hidden = {alias for name in named for alias in COLUMN_ALIASES.get(name, (name,))}
        values = {column: value for column, value in row.items() if column not in hidden}
        values |= {name: row[column] for name, column in self.names.items() if column in row}
        for name, text in self.constants.items():
            values[name] = _COLUMN_IN_TEXT.sub(lambda match: str(row[match[1]]), text)
        return values


# Columns of repositories that do not describe themselves, and a warning.
KNOWN_SETS: dict[str, tuple[Columns, str | None]] = {
    "flwrlabs/fed-isic2019": (
        Columns(
            {"diagnosis": "label"},
            {
                "source": "fed-isic2019 center {center}",
                "license": "CC-BY-NC-4.0",
                "attribution": "Fed-ISIC2019 (Ogier du Terrail et al., FLamby, 2022) of ISIC 2019: BCN_20000 (c) "
                "Department of Dermatology, Hospital Clinic de Barcelona; HAM10000 (c) ViDIR Group, Medical "
                "University of Vienna, doi 10.1038/sdata.2018.161; MSK (c) Anonymous, arXiv 1710.05006, 1902.03368",
            },
            ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"),
        ),
        None,
    ),
    "marmal88/skin_cancer": (
        Columns(
            {"isic_id": "image_id", "diagnosis": "dx", "site": "localization"},
            {
                "source": "HAM10000",
                "attribution": "HAM10000 (Tschandl, Rosendahl, Kittler, 2018), (c) ViDIR Group, Medical University "
                "of Vienna, doi 10.1038/sdata.2018.161",
            },
        ),
        "its splits repeat images and share lesions, and it declares no licence. Let `isic-vq data prepare` drop the "
        "repeated images and split by lesion anew, and see HAM10000 for the licence (CC BY-NC 4.0).",
    ),
}


def parse_query(name: str, query: str) -> tuple[dict[str, str], Columns]:
    """Parse what follows the question mark: settings, and how columns are read."""
    pairs = parse_qsl(query, keep_blank_values=True)
    values = dict(pairs)
    expected = (
        f"Expected {', '.join(f'{key}=' for key in (*_SETTINGS, *FEATURES))} or set.COLUMN=TEXT with a column of these "
        "from isic_id on."
    )
    for key, value in pairs:
        known = key in _SETTINGS or key in FEATURES
        known = known or (key.startswith("set.") and key.removeprefix("set.") in COLUMN_ALIASES)
        if not known or not value.strip():
            wrong = f"no value for {key}" if known else f"the unknown key {key!r}"
            raise DataError(f"{name} has {wrong}. {expected}")
        if [other for other, _ in pairs].count(key) > 1 or (key in FEATURES and f"set.{key}" in values):
            raise DataError(f"{name} names {key} twice. {expected}")
    columns = Columns(
        {key: value for key, value in values.items() if key in FEATURES},
        {key.removeprefix("set."): value for key, value in values.items() if key.startswith("set.")},
        tuple(text.strip() for text in values["classes"].split(",")) if "classes" in values else (),
    )
    return {key: value for key, value in values.items() if key in _SETTINGS}, columns


def check_columns(name: str, columns: Columns, features: Features) -> Columns:
    """Add the image column; DataError if the split lacks a column, or the image column holds no images."""
    listed = ", ".join(features)
    columns = Columns({"image": "image", **columns.names}, columns.constants, columns.classes)
    missing = sorted(columns.used() - set(features))
    if missing:
        raise DataError(f"{name} has no column {', '.join(missing)}, only {listed}. Name it by image=COLUMN.")
    feature = features[columns.names["image"]]
    is_image = isinstance(feature, Image) or feature in (Value("binary"), Value("large_binary"))
    is_image = is_image or (isinstance(feature, Mapping) and "bytes" in feature)
    if not is_image:
        raise DataError(
            f"{name}: the column {columns.names['image']} holds {feature}, expected images or their bytes. Name "
            f"another by image=COLUMN; there are {listed}."
        )
    return columns


def class_names_of(columns: Columns, features: Features) -> dict[str, list[str]]:
    """Names behind the integers of columns: the repository's own, else `columns.classes` for the diagnoses."""
    names = {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}
    aliases = COLUMN_ALIASES["diagnosis"]
    column = columns.names.get("diagnosis") or next((alias for alias in aliases if alias in features), None)
    feature = features[column] if column else None
    is_named = columns.classes and columns.classes not in ((AUTO,), (NONE,))
    if is_named and isinstance(feature, Value) and "int" in feature.dtype:
        names[str(column)] = list(columns.classes)
    return names
