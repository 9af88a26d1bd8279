import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isic_vq.codec.container import CodecError
from isic_vq.codec.integer_weights import integer_weights, static_weights, table_hash, training_code_counts
from isic_vq.codec.range_coder import CodeDecoder, CodeEncoder
from isic_vq.hub.pretrained import ModelError, default_checkpoint

ONE = 2**24


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_integer_probabilities_are_those_of_the_logits_and_sum_to_one(scale):
    logits = scale * torch.randn(50, 37)
    frequencies = integer_weights(logits) + 1
    assert (frequencies == np.round(frequencies)).all(), "whole numbers"
    assert frequencies.min() >= 1, "no code is impossible"
    assert (frequencies.sum(axis=1) == ONE).all()
    np.testing.assert_allclose(frequencies / ONE, logits.double().softmax(-1), atol=2 * 37 / ONE)


def test_broken_logits_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        integer_weights(torch.tensor([[0.0, torch.nan]]))


@given(st.lists(st.integers(0, 10**18), min_size=1, max_size=20))
def test_static_probabilities_are_counts_plus_one_by_exact_arithmetic(counts):
    weights = [int(weight) for weight in static_weights(counts)]
    total = ONE - len(counts)
    exact = [Fraction((count + 1) * total, sum(counts) + len(counts)) for count in counts]
    assert sum(weights) == total
    largest = counts.index(max(counts))
    for index, (weight, value) in enumerate(zip(weights, exact, strict=True)):
        assert index == largest or weight == value.numerator // value.denominator
    assert 0 <= weights[largest] - exact[largest] + 1 <= len(counts)


def test_without_counts_all_codes_are_equally_likely():
    assert set(static_weights([0] * 512) + 1) == {ONE / 512}


def test_tables_that_differ_have_other_hashes():
    assert table_hash(static_weights([3, 4])) != table_hash(static_weights([4, 3]))


@given(st.data())
def test_codes_come_back_and_cost_what_their_probabilities_say(data):
    num_codes = data.draw(st.integers(2, 9))
    number = data.draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    weights = integer_weights(4 * torch.randn(number, num_codes, generator=generator))
    codes = torch.randint(num_codes, (number,), generator=generator).numpy()
    encoder = CodeEncoder()
    for part in np.array_split(np.arange(number), 3):
        encoder.push(codes[part], weights[part])
    payload = encoder.payload()
    bits = -np.log2((weights[np.arange(number), codes] + 1) / ONE).sum()
    assert bits - 1 <= 8 * len(payload) <= bits + 65
    decoder = CodeDecoder(payload)
    np.testing.assert_array_equal(np.concatenate([decoder.pull(row[None]) for row in weights]), codes)


def test_bytes_of_a_static_table_are_always_the_same():
    """Files outlive versions: this payload was written once, and its codes are known."""
    codes = np.array([0, 3, 1, 1, 2, 0, 0, 3, 0, 1, 2, 2, 0, 0, 0, 1])
    weights = static_weights([6, 3, 2, 1])
    encoder = CodeEncoder()
    encoder.push(codes, weights)
    assert encoder.payload().hex() == GOLDEN
    np.testing.assert_array_equal(CodeDecoder(bytes.fromhex(GOLDEN)).pull(weights, 16), codes)
    low, width = Fraction(0), Fraction(1)  # the interval that stands for the codes, in exact arithmetic
    for code in codes:
        low += width * Fraction(int((weights + 1)[:code].sum()), ONE)
        width *= Fraction(int(weights[code] + 1), ONE)
    number = Fraction(int.from_bytes(bytes.fromhex(GOLDEN), "little"), 2**32)
    assert low - 1e-11 <= number < low + width + 1e-11


GOLDEN = "0051496a"


def test_a_payload_of_broken_words_is_refused():
    with pytest.raises(CodecError, match="multiple of 4"):
        CodeDecoder(b"12345")


def test_bytes_that_no_code_has_are_refused():
    weights = static_weights([10**6, 1])
    with pytest.raises(CodecError, match="do not belong"):
        CodeDecoder(b"\xff" * 12).pull(weights, 10_000)


def test_the_shipped_checkpoint_tells_how_often_codes_occur():
    counts = training_code_counts()
    provenance = json.loads((default_checkpoint() / "provenance.json").read_text())
    assert len(counts) == 512
    assert sum(counts) == provenance["training_data"]["num_images"] * 4 * 256, "four views of 16 x 16 codes"


def test_a_checkpoint_without_counts_has_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert training_code_counts(str(tmp_path)) is None
    (tmp_path / "provenance.json").write_text("{}")
    assert training_code_counts(str(tmp_path)) is None


def test_counts_that_are_none_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "provenance.json").write_text(json.dumps({"training_code_counts": [1, -1]}))
    with pytest.raises(ValueError, match="training_code_counts"):
        training_code_counts(str(tmp_path))
    with pytest.raises(ModelError):
        training_code_counts(str(tmp_path / "missing"))
