"""Licences of images: one id for all spellings of a licence, and the licence of weights trained on them.

Records keep the source's spelling; ids are compared. Source: the licences of the ISIC archive
(https://www.isic-archive.com) and the Hub's ids for them.
"""

import re
from collections.abc import Iterable

# By the letters of a licence's name, so that CC-BY-NC, CC-BY-NC-4.0 and CC BY-NC 4.0 are one; CC-0 leaves "cc".
_IDS = {
    "cc": "cc0-1.0",
    "publicdomain": "cc0-1.0",
    "ccby": "cc-by-4.0",
    "ccbync": "cc-by-nc-4.0",
    "unknown": "unknown",
    "": "unknown",
}
_RESTRICTIVENESS = ["cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "unknown"]


def license_id(name: str | None) -> str:
    """The Hub's id of a licence; "unknown" for None, ValueError if it is not one of ISIC's.

    Examples:
        >>> license_id("CC BY-NC 4.0"), license_id("CC-0")
        ('cc-by-nc-4.0', 'cc0-1.0')
    """
    letters = re.sub(r"[^a-z]", "", (name or "").lower())
    if letters not in _IDS:
        raise ValueError(f"images are under {name!r}: expected CC-0, CC-BY or CC-BY-NC, ISIC's licences")
    return _IDS[letters]


def weights_license(licenses: Iterable[str]) -> str:
    """The Hub's id of the most restrictive of the images' licences, or "unknown"; ValueError as `license_id`, or without any."""
    ids = {license_id(name) for name in licenses}
    if not ids:
        raise ValueError("weights of no images have no licence: expected at least one")
    return max(ids, key=_RESTRICTIVENESS.index)
