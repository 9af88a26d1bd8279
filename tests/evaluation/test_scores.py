"""The scores by hand, and the training images they are compared with."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from isic_vq.data.code_cache import read_code_cache, write_code_cache
from isic_vq.data.schema import DataError
from isic_vq.evaluation import scores
from isic_vq.evaluation.bits_per_code import own_entropy, unigram_bits
from isic_vq.evaluation.scores import SCORES, Reference, image_scores, read_reference, score_images
from isic_vq.hub.pretrained import load_model
from isic_vq.models.likelihood import score_codes
from isic_vq.models.modeling_isic_vq import IsicVQModel

CODES = torch.tensor([[[0, 0], [1, 1]], [[2, 2], [2, 2]]])
BITS = torch.tensor([[[1.0, 2.0], [3.0, 2.0]], [[0.5, 0.5], [0.5, 0.5]]], dtype=torch.float64)


@pytest.fixture(scope="module")
def model(tiny_run):
    return load_model(IsicVQModel, str(tiny_run.prior / "model"))


@pytest.fixture(scope="module")
def cache(tiny_run):
    return read_code_cache(tiny_run.codes["train"])


def test_the_scores_by_hand():
    """Smoothed counts are 4, 2, 1, 1 of 8, so codes cost 1, 2, 3, 3 bits; usual images cost 1.5 bits per code."""
    reference = Reference(torch.tensor([3, 1, 0, 0]), bits_per_code=1.5, num_images=9, source="mine")
    found = image_scores(BITS, CODES, reference)
    assert tuple(found) == SCORES
    assert found["bits_per_code"].tolist() == [2.0, 0.5]
    assert found["typicality"].tolist() == [0.5, 1.0], "too likely is unusual, too"
    assert found["complexity_corrected"].tolist() == [2.0 - 1.0, 0.5 - 0.0]
    assert found["unigram_corrected"].tolist() == [2.0 - 1.5, 0.5 - 3.0]


def test_without_training_codes_there_are_the_scores_that_need_none():
    assert list(image_scores(BITS, CODES, None)) == ["bits_per_code", "complexity_corrected"]


def test_entropy_of_an_images_own_codes_against_numpy():
    codes = torch.randint(9, (4, 5, 5))
    expected = []
    for image in codes.numpy():
        share = np.unique(image, return_counts=True)[1] / 25
        expected.append(-(share * np.log2(share)).sum())
    np.testing.assert_allclose(own_entropy(codes).numpy(), expected, rtol=1e-12)
    assert own_entropy(torch.arange(16).view(1, 4, 4)).item() == pytest.approx(4)


def test_unigram_bits_of_every_code_keep_its_place():
    bits = unigram_bits(torch.tensor([3, 1, 0, 0]), torch.tensor([[0, 1], [2, 3]]))
    assert bits.tolist() == [[1.0, 2.0], [3.0, 3.0]]


def test_the_reference_is_the_mean_over_training_codes(tiny_run, model, cache):
    reference = read_reference(tiny_run.codes["train"], model)
    first_views = torch.from_numpy(cache.codes[:, 0].astype("int64"))
    expected = score_codes(model, first_views).mean().item()
    assert reference.bits_per_code == pytest.approx(expected, rel=1e-6)
    assert (reference.num_images, reference.source) == (16, "folder:train")
    assert torch.equal(reference.code_counts, cache.counts())


def test_a_reference_given_a_class_is_of_that_class_and_scored_so(tiny_run, model, cache):
    name = model.config.class_names[1]
    rows = [index for index, diagnosis in enumerate(cache.diagnoses) if diagnosis == name]
    codes = torch.from_numpy(cache.codes[rows, 0].astype("int64"))
    expected = score_codes(model, codes, torch.full((len(rows),), 1)).mean().item()
    reference = read_reference(tiny_run.codes["train"], model, label=1)
    assert reference.num_images == len(rows) == 2
    assert reference.bits_per_code == pytest.approx(expected, rel=1e-6)
    mixture = read_reference(tiny_run.codes["train"], model, marginalize=True)
    assert mixture.bits_per_code != read_reference(tiny_run.codes["train"], model).bits_per_code


def test_a_subset_depends_on_its_seed_alone(tiny_run, model, monkeypatch):
    monkeypatch.setattr(scores, "MAX_REFERENCE_IMAGES", 5)
    first, again, other = (read_reference(tiny_run.codes["train"], model, seed=seed) for seed in (0, 0, 1))
    assert first.num_images == 5
    assert first.bits_per_code == again.bits_per_code != other.bits_per_code


def test_training_codes_without_the_class_or_of_another_tokenizer_are_refused(
    tiny_run, model, cache, tmp_path
):
    write_code_cache(dataclasses.replace(cache, diagnoses=["unknown"] * 16), tmp_path / "codes.parquet")
    with pytest.raises(DataError, match=r"codes\.parquet has no image of melanoma"):
        read_reference(tmp_path / "codes.parquet", model, label=0)
    write_code_cache(dataclasses.replace(cache, tokenizer_hash="0"), tmp_path / "codes.parquet")
    with pytest.raises(DataError, match="encoded by another tokenizer"):
        read_reference(tmp_path / "codes.parquet", model)


def test_images_come_out_one_by_one_with_their_names_and_bits(model):
    images = torch.rand(5, 3, 16, 16)
    batches = [(["a", "b"], images[:2]), (["c", "d", "e"], images[2:])]
    scored = list(score_images(model, batches, label=1))
    assert [image.name for image in scored] == list("abcde")
    whole = model.score(images, 1)
    for index, image in enumerate(scored):
        assert torch.equal(image.pixel_values, images[index])
        torch.testing.assert_close(image.bits_map, whole.bits[index], rtol=1e-5, atol=1e-5)
        assert image.scores["bits_per_code"] == pytest.approx(image.bits_map.mean().item())
        entropy = own_entropy(whole.codes)[index].item()
        assert image.scores["complexity_corrected"] == pytest.approx(image.bits_map.mean().item() - entropy)
        assert math.isfinite(image.scores["complexity_corrected"])
