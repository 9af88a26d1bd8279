"""Where on the body: the archive's general anatomic sites, and every word of its data sets that means one of them.

Source: `anatom_site_general` of the ISIC archive and challenges; the archive's `anatom_site_special` and hierarchy
`anatom_site_1` to `anatom_site_5` (https://github.com/ImageMarkup/isic-metadata); `localization` of HAM10000 (Tschandl
et al., 2018, doi 10.1038/sdata.2018.161).
Differs: HAM10000's "trunk" and the 2020 challenge's "torso" say neither front nor back, and stay "torso". Hands and
feet belong to their limb; only what is called acral, palm or sole is "palms/soles". The inside of the mouth, which the
hierarchy files under the face, is "oral/genital", and so is its whole anogenital region.
"""

import re
from collections.abc import Sequence

# Words are compared without case and punctuation, and without "and" and "of".
_WORDS = {
    "head/neck": (
        "head",
        "face",
        "ear",
        "neck",
        "scalp",
        "nose",
        "lip",
        "forehead",
        "temple",
        "cheek",
        "chin",
        "eyelid",
    ),
    "upper extremity": (
        "upper extremities",
        "upper limb",
        "arm",
        "upper arm",
        "forearm",
        "hand",
        "shoulder",
        "elbow",
        "wrist",
        "finger",
    ),
    "lower extremity": (
        "lower extremities",
        "lower limb",
        "buttock",
        "buttocks",
        "leg",
        "upper leg",
        "lower leg",
        "thigh",
        "knee",
        "shin",
        "calf",
        "foot",
        "ankle",
        "toe",
    ),
    "anterior torso": ("anterior trunk", "abdomen", "anterior abdomen", "chest", "breast", "anterior chest"),
    "posterior torso": ("posterior trunk", "back", "upper back", "mid back", "lower back"),
    "lateral torso": ("lateral trunk", "flank", "axilla", "lateral chest", "lateral abdomen"),
    "torso": ("trunk",),
    "palms/soles": (
        "palm",
        "palm of hand",
        "sole",
        "sole of foot",
        "acral",
        "acral NOS",
        "palms or soles",
        "acral palms or soles",
    ),
    "oral/genital": (
        "oral",
        "oral or genital",
        "oral mucosa",
        "mouth",
        "mucosa",
        "genital",
        "genitalia",
        "genital region",
        "perianal region",
        "anogenital region",
    ),
}


def _key(text: str) -> str:
    return " ".join(word for word in re.findall(r"[a-z]+", text.lower()) if word not in ("and", "of", "the"))


SITES = tuple(_WORDS)
_SITE_OF = {_key(word): site for site, words in _WORDS.items() for word in (site, *words)}


def canonical_site(text: str) -> str:
    """The site that a word means, one of `SITES`; a word that is not in the table comes back in lower case.

    Example:
        >>> canonical_site("Back"), canonical_site("left heel")
        ('posterior torso', 'left heel')
    """
    return _SITE_OF.get(_key(text), text.strip().lower())


def is_canonical_site(text: str) -> bool:
    """Whether a word is in the table."""
    return _key(text) in _SITE_OF


def archive_site(levels: Sequence[str | None]) -> str | None:
    """The site that the ISIC archive's levels mean: of the most specific level that is in the table.

    Args:
        levels: `anatom_site_1` to `anatom_site_5`, from the general to the specific; None where a level is empty.

    Returns:
        One of `SITES`, the most general level in lower case if none is in the table, or None if all are empty.

    Example:
        >>> archive_site(["Upper extremity", "Hand", "Palm of hand", "Thenar eminence", None])
        'palms/soles'
    """
    present = [level for level in levels if level]
    known = next((level for level in reversed(present) if is_canonical_site(level)), None)
    return canonical_site(known or present[0]) if present else None
