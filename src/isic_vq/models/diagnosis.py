"""Names of diagnoses: the eight classes of ISIC 2019, `unknown`, and every spelling that means one of them.

Source: the order is that of ISIC 2019 (MEL, NV, BCC, AK, BKL, DF, VASC, SCC); the abbreviations of HAM10000
(Tschandl et al., 2018, doi 10.1038/sdata.2018.161) and the ISIC archive's own terms are aliases, as its vocabulary
(https://github.com/ImageMarkup/isic-metadata) has them.

    melanoma                 in situ, invasive and metastatic
    nevus                    every melanocytic nevus: common, blue, Spitz, congenital, spilus, atypical
    basal_cell_carcinoma     every growth pattern
    actinic_keratosis        HAM10000's akiec, Bowen's disease among it
    benign_keratosis         seborrheic, lichen planus-like and pigmented benign keratosis, solar lentigo, and what else
                             the archive files under "Benign epidermal proliferations"
    dermatofibroma
    vascular_lesion          angioma, angiokeratoma, pyogenic granuloma and the archive's other benign vascular ones
    squamous_cell_carcinoma  invasive, and what the archive itself calls in situ
    unknown                  nothing known, or known to be none of the eight

Differs: HAM10000's `akiec` joins actinic keratoses and intraepithelial carcinoma (Bowen's disease) under one
label, which counts as actinic keratosis here; the archive files Bowen's disease under squamous cell carcinoma in
situ, and its levels are followed. HAM10000's `vasc` holds hemorrhages, which the archive keeps apart: `unknown`.
It does not guess: a spelling that is not in the tables is an error that lists the closest known ones.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from numbers import Integral

DIAGNOSES = (
    "melanoma",
    "nevus",
    "basal_cell_carcinoma",
    "actinic_keratosis",
    "benign_keratosis",
    "dermatofibroma",
    "vascular_lesion",
    "squamous_cell_carcinoma",
    "unknown",
)

# Spellings are compared without case, spaces and punctuation: "Basal-cell carcinoma" is "basalcellcarcinoma".
_ALIASES = {
    "melanoma": "mel, malignant melanoma, melanoma nos, malignant melanocytic proliferations (melanoma)",
    "nevus": "nv, nevi, naevus, naevi, melanocytic nevus, melanocytic nevi, melanocytic naevus",
    "basal_cell_carcinoma": "bcc, basalioma",
    "actinic_keratosis": "ak, akiec, actinic keratoses, solar keratosis, solar or actinic keratosis, "
    "actinic keratoses and intraepithelial carcinoma",
    "benign_keratosis": "bkl, bk, benign keratosis like lesion, benign keratosis like lesions",
    "dermatofibroma": "df, dermatofibromas",
    "vascular_lesion": "vasc, vascular, vascular lesions, benign soft tissue proliferations - vascular",
    "squamous_cell_carcinoma": "scc, squamous cell carcinoma nos",
    "unknown": "unk, none of the others, not available",
}
# Aliases that name a part of their class: a list of classes may tell them apart, as "solar lentigo" from the rest.
# The 2020 challenge calls the lichen planus-like keratosis lichenoid; an epidermal nevus is one of keratinocytes, no nevus
# in the sense of the class.
_NARROWER = {
    "melanoma": "melanoma in situ, melanoma invasive, melanoma metastasis",
    "nevus": "nevus spilus, common nevus, blue nevus, spitz nevus, congenital nevus, atypical nevus, dysplastic nevus",
    "actinic_keratosis": "intraepithelial carcinoma, bowen disease, bowen's disease",
    "benign_keratosis": "seborrheic keratosis, seborrhoeic keratosis, sk, solar lentigo, lichen planus like keratosis, lplk, "
    "lichenoid keratosis, pigmented benign keratosis, benign epidermal proliferations, clear cell acanthoma, "
    "epidermal nevus",
    "vascular_lesion": "angioma, hemangioma, haemangioma, angiokeratoma, pyogenic granuloma",
    "squamous_cell_carcinoma": "invasive squamous cell carcinoma, squamous cell carcinoma invasive, "
    "squamous cell carcinoma in situ",
}

# Words for none of the eight, or for what cannot be told, in the challenges' tables and the archive's older metadata
# (AIMP: atypical intraepithelial melanocytic proliferation). In data they are `unknown`; they are no names to ask a model for.
_OTHER = (
    "acrochordon, adnexal tumor, AIMP, angiofibroma or fibrous papule, atypical melanocytic proliferation, "
    "atypical spitz tumor, cafe-au-lait macule, ephelis, lentigo NOS, lentigo simplex, merkel cell carcinoma, "
    "mucosal melanosis, neurofibroma, other, scar, sebaceous adenoma, sebaceous hyperplasia, verruca"
)

# Columns of the challenges' tables with one 1 in each row; upper case in 2018 and 2019, lower case in 2017.
_ONE_HOT = ("MEL", "NV", "BCC", "AK", "AKIEC", "BKL", "DF", "VASC", "SCC", "UNK")
_ONE_HOT_2017 = ("MELANOMA", "SEBORRHEIC_KERATOSIS")


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _keys(spellings: str) -> list[str]:
    return [_key(spelling) for spelling in spellings.split(", ")]


_OTHER_KEYS = frozenset(_keys(_OTHER))
_NARROWER_KEYS = {key: name for name, spellings in _NARROWER.items() for key in _keys(spellings)}
_CANONICAL_OF = {key: name for name, aliases in _ALIASES.items() for key in (_key(name), *_keys(aliases))}
_CANONICAL_OF |= _NARROWER_KEYS
_MAX_LISTED = 20  # classes in a message


def canonical_diagnosis(name: str) -> str:
    """Return the canonical name that a spelling, alias or abbreviation stands for.

    Args:
        name: case, spaces, hyphens and underscores do not matter.

    Returns:
        One of `DIAGNOSES`; "unknown" for the other diseases that ISIC's tables are known to name.

    Raises:
        ValueError: no diagnosis is called that; the message lists the known names and the closest spellings.

    Examples:
        >>> canonical_diagnosis("MEL"), canonical_diagnosis("Seborrheic keratosis")
        ('melanoma', 'benign_keratosis')
    """
    canonical = "unknown" if is_other_disease(name) else find_diagnosis(name)
    if canonical is None:
        meant = closest_diagnoses(name)
        hint = f" Did you mean {' or '.join(meant)}?" if meant else ""
        raise ValueError(f"{name!r} is not a known diagnosis.{hint} Known names: {', '.join(DIAGNOSES)}.")
    return canonical


def find_diagnosis(name: str, synonyms_only: bool = False) -> str | None:
    """Return the entry of `DIAGNOSES` that a spelling stands for, or None.

    With `synonyms_only`, aliases that name a part of their class do not count, such as "solar lentigo" of benign keratosis.
    """
    key = _key(name)
    return None if synonyms_only and key in _NARROWER_KEYS else _CANONICAL_OF.get(key)


def is_other_disease(name: str) -> bool:
    """Tell whether ISIC's tables know a name as one for none of the eight classes, such as "scar"."""
    return _key(name) in _OTHER_KEYS


def closest_diagnoses(name: str) -> list[str]:
    """Return up to three entries of `DIAGNOSES` with a spelling close to a name, the closest first."""
    close = difflib.get_close_matches(_key(name), _CANONICAL_OF, n=3, cutoff=0.7)
    return list(dict.fromkeys(_CANONICAL_OF[key] for key in close))


def archive_diagnosis(levels: Sequence[str | None]) -> str:
    """Return the canonical name of what the ISIC archive's `diagnosis_1` to `diagnosis_5` say.

    The most specific level that is one of the eight classes counts. The archive knows hundreds of other diagnoses, for
    which, as for "Benign", "Malignant" and "Indeterminate" alone, the result is `unknown`.

    Args:
        levels: from the general to the specific; None where a level is empty.

    Examples:
        >>> archive_diagnosis(["Malignant", "Malignant melanocytic proliferations (Melanoma)", "Melanoma Invasive"])
        'melanoma'
    """
    for level in reversed(levels):
        canonical = _CANONICAL_OF.get(_key(level or ""), "unknown")
        if canonical != "unknown":
            return canonical
    return "unknown"


def is_one_hot(column: str) -> bool:
    """Tell whether a column is one that `one_hot_diagnosis` reads."""
    return column.upper() in (*_ONE_HOT, *_ONE_HOT_2017)


def one_hot_diagnosis(row: Mapping[str, object]) -> str | None:
    """Return the canonical name of the column of a challenge's table that holds a 1; "unknown" if none does.

    Columns are MEL, NV, BCC and so on (2018, 2019), in upper or in lower case, or melanoma and seborrheic_keratosis (2017,
    where a row without a 1 is a nevus); numbers may be text. None if the row has no such columns.

    Raises:
        ValueError: several columns hold a 1, or one holds neither 0 nor 1.
    """
    row = {name.upper(): value for name, value in row.items()}
    columns = [name for name in _ONE_HOT if name in row]
    is_2017 = len(columns) < 2
    if is_2017:
        columns = [name for name in _ONE_HOT_2017 if name in row]
        if len(columns) < 2:
            return None
    named = []
    for name in columns:
        try:
            value = float(str(row[name]))
        except ValueError:
            value = -1.0
        if value not in (0.0, 1.0):
            raise ValueError(f"{name} is {row[name]!r}, expected 0 or 1.")
        named += [name] * int(value)
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} are both 1, expected one diagnosis.")
    if not named:
        return "nevus" if is_2017 else "unknown"
    return canonical_diagnosis(named[0])


def resolve_label(label: int | str, id2label: Mapping[int, str]) -> int:
    """Return the class id that a label means to a model.

    Args:
        label: a class id, or a class name, alias or abbreviation ("melanoma", "MEL", "3"). A name counts as it is
            written before it counts as anything else: "3" is the class called so, if there is one, else the id.
        id2label: the model's classes, as in its config.

    Returns:
        A key of `id2label`.

    Raises:
        ValueError: the model has no such class, or several; the message names the label and the model's classes.
    """
    if isinstance(label, bool) or not isinstance(label, (Integral, str)):
        raise ValueError(
            f"label {label!r} is a {type(label).__name__}; give a class id or a name. Classes: {_listed(id2label)}."
        )
    if isinstance(label, Integral):
        if int(label) in id2label:
            return int(label)
        raise ValueError(f"label {label!r} is not a class id of this model. Classes: {_listed(id2label)}.")
    text, wanted = label.strip(), find_diagnosis(label)
    number = int(text) if text.isdecimal() else None
    for matches in (
        [index for index, name in id2label.items() if name == text],
        [index for index, name in id2label.items() if name.casefold() == text.casefold()],
        [number] if number in id2label else [],
        [index for index, name in id2label.items() if _key(name) == _key(text) != ""],
        [index for index, name in id2label.items() if wanted and find_diagnosis(name, True) == wanted],
    ):
        if len(matches) == 1:
            return matches[0]  # type: ignore[return-value]  # a number is None only where its list is empty
        if matches:
            raise ValueError(
                f"label {label!r} may be {' or '.join(id2label[index] for index in matches)}: give the name as it is "
                "written, or its id."
            )
    if number is not None:
        raise ValueError(f"label {label!r} is not a class id of this model. Classes: {_listed(id2label)}.")
    known_as = f" ({wanted})" if wanted is not None else ""
    close = difflib.get_close_matches(text, id2label.values(), n=3, cutoff=0.7)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(
        f"label {label!r}{known_as} is not a class of this model.{hint} Classes: {_listed(id2label)}."
    )


def _listed(id2label: Mapping[int, str]) -> str:
    classes = [f"{index} = {name}" for index, name in sorted(id2label.items())]
    more = len(classes) - _MAX_LISTED
    return (", ".join(classes[:_MAX_LISTED]) or "none") + (f" and {more} more" if more > 0 else "")
