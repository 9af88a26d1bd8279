"""Every door of the shipped repository, from a folder, from a Hub and offline from the cache; and the table itself."""

import doors
import numpy as np
import pytest

from isic_vq.hub.pretrained import default_checkpoint

CODES = np.arange(4).reshape(2, 2)
OPENED = {"shape": [2, 2], "dtype": "int64", "values": [0, 1, 2, 3]}


@pytest.mark.slow
def test_every_door_opens_and_gives_the_same_numbers(tmp_path):
    rows = doors.table(default_checkpoint(), tmp_path)
    shut = [
        (row["opened"], row["door"], place, row[place])
        for row in rows
        for place in doors.PLACES
        if row[place] not in ("pass", "refused by the library", "-")
    ]
    assert shut == []
    refused = {
        (row["opened"], row["door"], place)
        for row in rows
        for place in doors.PLACES
        if row[place] == "refused by the library"
    }
    assert refused == set(doors.REFUSED), "what a library refuses is written down"


def test_equal_numbers_pass():
    assert doors.verdict(OPENED, CODES, None) == "pass"


@pytest.mark.parametrize(
    "change", [{"values": [0, 1, 2, 4]}, {"dtype": "int32"}, {"shape": [4, 1]}, {"shape": [1, 2, 2]}]
)
def test_other_numbers_do_not_pass(change):
    assert doors.verdict({**OPENED, **change}, CODES, None) == "other numbers"


def test_an_error_is_shown_unless_it_is_the_refusal_that_is_known():
    outcome = {"error": "ValueError: pass trust_remote_code=True"}
    assert doors.verdict(outcome, CODES, None) == outcome["error"]
    assert doors.verdict(outcome, CODES, "offline mode") == outcome["error"]
    assert doors.verdict(outcome, CODES, "trust_remote_code=True") == "refused by the library"


def test_a_door_that_used_to_be_refused_and_opens_is_shown():
    assert "used to refuse" in doors.verdict(OPENED, CODES, "offline mode")
