"""Sites on the body, value by value as the sources write them."""

import pytest

from isic_vq.data.sites import SITES, canonical_site, is_canonical_site

HAM10000 = {
    "abdomen": "anterior torso",
    "acral": "palms/soles",
    "back": "posterior torso",
    "chest": "anterior torso",
    "ear": "head/neck",
    "face": "head/neck",
    "foot": "lower extremity",
    "genital": "oral/genital",
    "hand": "upper extremity",
    "lower extremity": "lower extremity",
    "neck": "head/neck",
    "scalp": "head/neck",
    "trunk": "torso",
    "upper extremity": "upper extremity",
}
ARCHIVE = {name: name for name in SITES} | {
    "Head & neck": "head/neck",
    "Head and neck": "head/neck",
    "Upper extremity": "upper extremity",
    "Lower extremity": "lower extremity",
    "Anterior trunk": "anterior torso",
    "Posterior trunk": "posterior torso",
    "Lateral trunk": "lateral torso",
    "Trunk": "torso",
    "Palms and soles": "palms/soles",
    "Oral and genital": "oral/genital",
}


@pytest.mark.parametrize(("written", "site"), [*HAM10000.items(), *ARCHIVE.items()])
def test_words_of_the_sources(written, site):
    assert canonical_site(written) == site
    assert is_canonical_site(written)
    assert canonical_site(site) == site, "a canonical site stays what it is"


def test_a_site_that_no_table_knows_stays_in_lower_case():
    assert canonical_site(" Left Heel ") == "left heel"
    assert not is_canonical_site("Left Heel")
    assert not is_canonical_site("")
