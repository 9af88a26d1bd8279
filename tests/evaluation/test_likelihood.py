"""Bits per code against a softmax written out in numpy, and the two yardsticks by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from isic_vq.evaluation.bits_per_code import (
    bits_per_code,
    class_bits,
    conditioning_metrics,
    likelihood_metrics,
    unigram_bits,
)
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.models.configuration_isic_vq import IsicVQConfig
from isic_vq.models.modeling_isic_vq import IsicVQModel

NUM_CODES = 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = IsicVQConfig(
        vqvae_config={
            "image_size": 16,
            "hidden_sizes": (4, 4),
            "residual_size": 4,
            "num_codes": NUM_CODES,
            "code_dim": 4,
        },
        prior_config={
            "num_codes": NUM_CODES,
            "grid_size": 4,
            "hidden_size": 8,
            "num_layers": 1,
            "head_size": 8,
            "first_kernel_size": 3,
            "dropout": 0.5,
            "id2label": {0: "melanoma", 1: "nevus"},
        },
    )
    model = IsicVQModel(config)
    with torch.no_grad():
        for parameter in model.prior.parameters():  # class biases start at zero
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def codes():
    return torch.randint(NUM_CODES, (5, 4, 4), generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 0, 1])


def bits_by_hand(prior, codes, labels):
    """-log2 of the softmax probability of each code, averaged over the 16 codes of each image."""
    with torch.no_grad():
        logits = prior.eval()(codes, labels).logits.double().numpy()
    found = []
    for image in range(len(codes)):
        bits = []
        for row in range(4):
            for column in range(4):
                scores = np.exp(logits[image, :, row, column])
                bits.append(-math.log2(scores[codes[image, row, column]] / scores.sum()))
        found.append(sum(bits) / 16)
    return found


@pytest.mark.parametrize("labels", [LABELS, None], ids=["conditional", "unconditional"])
def test_bits_per_code_equal_a_softmax_written_out(model, codes, labels):
    found = bits_per_code(model, codes, labels)
    assert (found.shape, found.dtype) == ((5,), torch.float64)
    np.testing.assert_allclose(found.numpy(), bits_by_hand(model.prior, codes, labels), rtol=1e-5)


def test_labels_matter_and_none_is_the_unconditional_id(model, codes):
    none = bits_per_code(model, codes, None)
    assert torch.equal(none, bits_per_code(model, codes, torch.full((5,), 2)))
    assert not torch.allclose(none, bits_per_code(model, codes, torch.zeros(5, dtype=torch.long)))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_bits_do_not_depend_on_the_batch_size(model, codes, batch_size):
    whole = bits_per_code(model, codes, LABELS)
    torch.testing.assert_close(bits_per_code(model, codes, LABELS, batch_size), whole, rtol=1e-5, atol=1e-6)


def test_prior_is_measured_without_dropout_and_left_in_its_mode(model, codes):
    model.prior.train()
    first, second = (bits_per_code(model, codes, LABELS) for _ in range(2))
    assert torch.equal(first, second)
    assert model.prior.training
    model.prior.eval()


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_uniform_prior_needs_log2_k_bits(model, codes, scale):
    """A head that says the same of every code: zero, or any constant."""
    head = model.prior.head[-1]
    before = {name: value.clone() for name, value in head.state_dict().items()}
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, scale)
    np.testing.assert_allclose(bits_per_code(model, codes, None).numpy(), 3.0, rtol=1e-6)
    head.load_state_dict(before)


def test_unigram_by_hand():
    counts = torch.tensor([3, 1, 0, 0])  # one is added to each: 4/8, 2/8, 1/8, 1/8
    assert unigram_bits(counts, torch.tensor([[0, 0], [1, 2]])).mean().item() == pytest.approx(
        (1 + 1 + 2 + 3) / 4
    )


def test_code_that_training_never_saw_costs_finitely_many_bits():
    counts = torch.tensor([10**6, 0])
    bits = unigram_bits(counts, torch.tensor([1])).item()
    assert bits == pytest.approx(math.log2(10**6 + 2), rel=1e-9)


def test_unigram_of_even_counts_is_the_flat_code():
    assert unigram_bits(torch.full((NUM_CODES,), 7), torch.arange(NUM_CODES)).mean().item() == pytest.approx(
        3.0
    )


def test_report_lines_hold_bits_and_their_yardsticks(model, codes):
    counts = torch.arange(NUM_CODES)
    metrics = {
        m.text: m for m in likelihood_metrics(model, counts, codes, LABELS, MeasuredOn("test", "folder:mine"))
    }
    conditional = np.mean(bits_by_hand(model.prior, codes, LABELS))
    expected = {
        "bits_per_code": (conditional, "bits per code"),
        "bits_per_code_unconditional": (np.mean(bits_by_hand(model.prior, codes, None)), "bits per code"),
        "bits_per_pixel": (conditional / 16, "bits per pixel"),
        "bits_per_code_flat": (3.0, "bits per code"),
        "bits_per_code_unigram": (unigram_bits(counts, codes).mean().item(), "bits per code"),
    }
    assert set(metrics) == set(expected)
    for name, (value, unit) in expected.items():
        assert metrics[name].value == pytest.approx(value, rel=1e-5), name
        assert (metrics[name].unit, metrics[name].n, metrics[name].split) == (unit, 5, "test")


def test_without_training_counts_there_is_no_unigram_line(model, codes):
    metrics = likelihood_metrics(model, None, codes, LABELS, MeasuredOn("test", "folder:mine"))
    assert "bits_per_code_unigram" not in {metric.text for metric in metrics}


def test_bits_of_each_class_are_those_of_its_label(model, codes):
    found = class_bits(model, codes)
    assert found.shape == (5, 2)
    for label in (0, 1):
        expected = bits_by_hand(model.prior, codes, torch.full((5,), label))
        np.testing.assert_allclose(found[:, label].numpy(), expected, rtol=1e-5)


def made(labels, gain, predicted):
    """Bits of three classes and of none: `gain` bits per code cheaper given the right one, least given `predicted`."""
    unconditional = torch.linspace(3, 4, len(labels), dtype=torch.float64)
    by_class = unconditional[:, None].repeat(1, 3) + 1
    for row, (label, guess) in enumerate(zip(labels.tolist(), predicted.tolist(), strict=True)):
        if label < 3:
            by_class[row, label] = unconditional[row] - gain[row]
        by_class[row, guess] = min(by_class[row].min() - 0.25 * (guess != label), by_class[row, guess])
    return by_class, unconditional


def test_conditioning_is_paired_by_image_in_bits_of_the_whole_image():
    labels, predicted = torch.tensor([0, 1, 2, 0, 3, 1]), torch.tensor([0, 1, 2, 0, 0, 1])
    gain = torch.tensor([0.1, -0.2, 0.3, 0.4, 9.0, 0.0], dtype=torch.float64)
    by_class, unconditional = made(labels, gain, predicted)
    by_class[1, 1] = unconditional[1] + 0.2  # the diagnosis misleads; still the likeliest
    found = {
        m.text: m for m in conditioning_metrics(by_class, unconditional, labels, 16, MeasuredOn("test", "x"))
    }
    kept = np.array([0.1, -0.2, 0.3, 0.4, 0.0]) * 16
    assert found["conditioning_gain"].value == pytest.approx(kept.mean()), (
        "the image of another diagnosis is left out"
    )
    assert (found["conditioning_gain"].n, found["conditioning_gain"].unit) == (5, "bits per image")
    half = 2.776445105 * kept.std(ddof=1) / math.sqrt(5)
    assert found["conditioning_gain"].interval == pytest.approx([kept.mean() - half, kept.mean() + half])


def test_the_accuracy_of_the_likeliest_diagnosis_is_scikit_learns():
    generator = np.random.default_rng(0)
    labels = torch.from_numpy(generator.integers(0, 3, 60))
    predicted = torch.from_numpy(np.where(generator.random(60) < 0.6, labels, generator.integers(0, 3, 60)))
    by_class, unconditional = made(labels, torch.zeros(60, dtype=torch.float64), predicted)
    assert torch.equal(by_class.argmin(1), predicted)
    metric = conditioning_metrics(by_class, unconditional, labels, 16, MeasuredOn("test", "x"))[1]
    assert metric.value == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert 0 < metric.interval[0] < metric.value < metric.interval[1] < 1


def test_an_accuracy_of_one_image_per_diagnosis_has_no_interval():
    labels = torch.tensor([0, 1])
    by_class, unconditional = made(labels, torch.zeros(2, dtype=torch.float64), labels)
    gain, accuracy = conditioning_metrics(by_class, unconditional, labels, 16, MeasuredOn("test", "x"))
    assert accuracy.interval is None
    assert gain.interval is not None


def test_images_of_other_diagnoses_alone_say_nothing():
    assert (
        conditioning_metrics(
            torch.ones(2, 3), torch.ones(2), torch.tensor([3, 3]), 16, MeasuredOn("test", "x")
        )
        == []
    )
