"""Sites on the body, value by value as the sources write them."""

import pytest

from isic_vq.data.sites import SITES, archive_site, canonical_site, is_canonical_site

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
    "acral NOS": "palms/soles",
    "acral palms or soles": "palms/soles",
    "oral or genital": "oral/genital",
}
LEVELS = {
    "Head and neck:Head:Scalp:Vertex of scalp": "head/neck",
    "Head and neck:Head:Ear:Pinna:Concha": "head/neck",
    "Head and neck:Head:Face:Oral region:Lower lip": "head/neck",
    "Head and neck:Head:Face:Mouth:Tongue": "oral/genital",
    "Head and neck:Neck:Nape of neck": "head/neck",
    "Trunk": "torso",
    "Trunk:Anterior trunk:Anterior chest:Breast:Areola": "anterior torso",
    "Trunk:Anterior trunk:Anterior abdomen:Lower anterior abdomen:Inguinal region": "anterior torso",
    "Trunk:Posterior trunk:Upper back:Lateral upper back": "posterior torso",
    "Trunk:Lateral trunk:Axilla:Anterior axillary fold": "lateral torso",
    "Trunk:Lateral trunk:Lateral chest:Upper lateral chest": "lateral torso",
    "Upper extremity:Shoulder:Posterior shoulder": "upper extremity",
    "Upper extremity:Hand:Fingers and thumb:Thumb": "upper extremity",
    "Upper extremity:Hand:Palm of hand:Thenar eminence": "palms/soles",
    "Lower extremity:Buttock:Gluteal fold": "lower extremity",
    "Lower extremity:Thigh:Lateral thigh:Hip": "lower extremity",
    "Lower extremity:Foot:Dorsum of foot": "lower extremity",
    "Lower extremity:Foot:Sole of foot:Heel": "palms/soles",
    "Anogenital region:Perianal region:Anus": "oral/genital",
    "Anogenital region:Genital region:Vulva:Clitoris": "oral/genital",
    "Upper extremity:Hand::: nail NOS": "upper extremity",
    "Tail:Tip of tail": "tail",
}


@pytest.mark.parametrize("words", [HAM10000, ARCHIVE])
def test_words_of_the_sources(words):
    assert {word: canonical_site(word) for word in words} == words
    assert [word for word in words if not is_canonical_site(word)] == []
    assert [site for site in words.values() if canonical_site(site) != site] == [], "they stay what they are"


def test_the_most_specific_level_of_the_archive_that_is_a_site_counts():
    assert {path: archive_site([level or None for level in path.split(":")]) for path in LEVELS} == LEVELS


def test_levels_that_are_empty_are_no_site():
    assert archive_site([]) is None
    assert archive_site([None, "", None]) is None


def test_a_site_that_no_table_knows_stays_in_lower_case():
    assert canonical_site(" Left Heel ") == "left heel"
    assert not is_canonical_site("Left Heel")
    assert not is_canonical_site("")
