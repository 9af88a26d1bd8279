"""Sites on the body: the archive's general anatomic sites, and the words of its data sets for each.

Source: `anatom_site_general` of the ISIC archive and challenges; the archive's `anatom_site_special` and hierarchy
`anatom_site_1` to `anatom_site_5` (https://github.com/ImageMarkup/isic-metadata); `localization` of HAM10000 (Tschandl
et al., 2018, doi 10.1038/sdata.2018.161).
Differs: HAM10000's "trunk" and the 2020 challenge's "torso" say neither front nor back, and stay "torso". Hands and
feet belong to their limb; only "acral", "palm" and "sole" are "palms/soles". The inside of the mouth, which the hierarchy
puts under the face, is "oral/genital", like the anogenital region.
"""

import re
from collections.abc import Sequence

# Words are compared without case and punctuation, and without "and", "of" and "the".
_WORDS = {
    "head/neck": "head, face, ear, neck, scalp, nose, lip, forehead, temple, cheek, chin, eyelid",
    "upper extremity": "upper extremities, upper limb, arm, upper arm, forearm, hand, shoulder, elbow, wrist, finger",
    "lower extremity": "lower extremities, lower limb, buttock, buttocks, leg, upper leg, lower leg, thigh, knee, shin, "
    "calf, foot, ankle, toe",
    "anterior torso": "anterior trunk, abdomen, anterior abdomen, chest, breast, anterior chest",
    "posterior torso": "posterior trunk, back, upper back, mid back, lower back",
    "lateral torso": "lateral trunk, flank, axilla, lateral chest, lateral abdomen",
    "torso": "trunk",
    "palms/soles": "palm, palm of hand, sole, sole of foot, acral, acral NOS, palms or soles, acral palms or soles",
    "oral/genital": "oral, oral or genital, oral mucosa, mouth, mucosa, genital, genitalia, genital region, perianal region, "
    "anogenital region",
}


def _key(text: str) -> str:
    return " ".join(word for word in re.findall(r"[a-z]+", text.lower()) if word not in ("and", "of", "the"))


SITES = tuple(_WORDS)
_SITE_OF = {_key(word): site for site, words in _WORDS.items() for word in (site, *words.split(","))}


def canonical_site(text: str) -> str:
    """The site that a word means, one of `SITES`; an unknown word is returned in lower case.

    Examples:
        >>> canonical_site("Back"), canonical_site("left heel")
        ('posterior torso', 'left heel')
    """
    return _SITE_OF.get(_key(text), text.strip().lower())


def is_canonical_site(text: str) -> bool:
    """Whether `canonical_site` knows a word."""
    return _key(text) in _SITE_OF


def archive_site(levels: Sequence[str | None]) -> str | None:
    """The site of the ISIC archive's levels, `anatom_site_1` (general) to `anatom_site_5` (specific), or None if all are empty.

    The most specific known level counts; without any, the most general one is returned in lower case.

    Examples:
        >>> archive_site(["Upper extremity", "Hand", "Palm of hand", "Thenar eminence", None])
        'palms/soles'
    """
    present = [level for level in levels if level]
    known = next((level for level in reversed(present) if is_canonical_site(level)), None)
    return canonical_site(known or present[0]) if present else None
