"""Where on the body: the archive's general anatomic sites, and every word of its data sets that means one of them.

Source: `anatom_site_general` of the ISIC archive and challenges; `localization` of HAM10000 (Tschandl et al., 2018,
doi 10.1038/sdata.2018.161).
Differs: HAM10000's "trunk" and the 2020 challenge's "torso" say neither front nor back, and stay "torso". Hands and
feet belong to their limb; only what is called acral, palm or sole is "palms/soles".
"""

import re

SITES = (
    "head/neck",
    "upper extremity",
    "lower extremity",
    "anterior torso",
    "posterior torso",
    "lateral torso",
    "torso",
    "palms/soles",
    "oral/genital",
)

# Words are compared without case and punctuation, and without "and" and "of".
_WORDS = {
    "head/neck": (
        "head neck",
        "head",
        "face",
        "ear",
        "neck",
        "scalp",
        "nose",
        "lip",
        "forehead",
        "cheek",
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
        "leg",
        "upper leg",
        "lower leg",
        "thigh",
        "knee",
        "foot",
        "ankle",
        "toe",
    ),
    "anterior torso": ("anterior trunk", "abdomen", "chest", "breast", "anterior chest"),
    "posterior torso": ("posterior trunk", "back", "upper back", "lower back", "buttocks"),
    "lateral torso": ("lateral trunk", "flank"),
    "torso": ("trunk",),
    "palms/soles": ("palms soles", "palm", "sole", "acral", "palms or soles"),
    "oral/genital": ("oral genital", "genital", "genitalia", "oral", "oral or genital", "mucosa"),
}


def _key(text: str) -> str:
    return " ".join(word for word in re.findall(r"[a-z]+", text.lower()) if word not in ("and", "of", "the"))


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
