"""Bits of every position against enumeration: all grids of a small prior, their probabilities added up by hand."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import joined, stirred
from torch import nn

from isic_vq.models.configuration_var import VARConfig
from isic_vq.models.likelihood import mixture_log_weights, score_codes
from isic_vq.models.modeling_var import VARModel
from isic_vq.models.modes import evaluating

# Side of the grid, K and architecture; few enough grids (K to the side squared) to look at all of them.
SMALL = [(2, 3, "gated"), (3, 2, "gated"), (3, 2, "plain")]
CLASSES = 3  # those of the fixtures
WEIGHTS = torch.tensor([5.0, 0.0, 3.0])


def every_grid(side, num_codes):
    return torch.tensor(list(itertools.product(range(num_codes), repeat=side**2))).view(-1, side, side)


def probabilities_by_hand(model, grids, label):
    """p(grid | label) of every grid: the product of each code's softmax probability, in numpy."""
    with torch.no_grad():
        logits = model.predict(grids, torch.full((len(grids),), label)).double().numpy()
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax = scores / scores.sum(axis=1, keepdims=True)
    chosen = np.take_along_axis(softmax, grids.numpy()[:, None], axis=1)
    return chosen.reshape(len(grids), -1).prod(axis=1)


def conditionals_by_hand(grids, probabilities):
    """p(code | earlier codes), one per grid and position: grids that agree so far, counted with their weight."""
    flat = grids.flatten(1).numpy()
    found = np.empty(flat.shape)
    for index, position in itertools.product(*map(range, flat.shape)):
        same_before = (flat[:, :position] == flat[index, :position]).all(axis=1)
        same_now = same_before & (flat[:, position] == flat[index, position])
        found[index, position] = probabilities[same_now].sum() / probabilities[same_before].sum()
    return found.reshape(grids.shape)


@pytest.fixture(scope="module", params=[*SMALL, "scales"], ids=["2x2", "3x3", "3x3-plain", "1x1+2x2"])
def enumerated(request, make_prior):
    """A model with a small prior, all its grids, and p(grid | y) of each by hand, shape (classes, grids)."""
    if request.param == "scales":
        config = VARConfig(num_codes=3, scales=(1, 2), code_dim=4, hidden_size=8, num_layers=1, num_heads=2)
        config.id2label = {0: "melanoma", 1: "nevus", 2: "basal_cell_carcinoma"}
        torch.manual_seed(0)
        prior = stirred(VARModel(config))
        grids = torch.tensor(list(itertools.product(range(3), repeat=5)))
    else:
        side, num_codes, architecture = request.param
        prior = make_prior(grid_size=side, num_codes=num_codes, architecture=architecture)
        grids = every_grid(side, num_codes)
    model = joined(prior)
    return model, grids, np.stack([probabilities_by_hand(model, grids, label) for label in range(CLASSES)])


def probabilities(bits):
    return 2.0 ** -bits.flatten(1).sum(1).numpy()


@pytest.mark.parametrize(
    "settings",
    [{}, {"marginalize": True}, {"marginalize": True, "class_weights": WEIGHTS}],
    ids=["unconditional", "marginal", "weighted"],
)
def test_the_probabilities_of_all_grids_sum_to_one(enumerated, settings):
    model, grids, _ = enumerated
    assert probabilities(score_codes(model, grids, **settings)).sum() == pytest.approx(1, abs=1e-5)


def test_bits_given_a_class_are_the_products_of_a_softmax_written_out(enumerated):
    model, grids, by_class = enumerated
    for label, expected in enumerate(by_class):
        bits = score_codes(model, grids, torch.full((len(grids),), label))
        assert (bits.shape, bits.dtype) == (grids.shape, torch.float64)
        np.testing.assert_allclose(probabilities(bits), expected, rtol=1e-5)


def test_the_marginal_is_the_mean_of_the_classes_probabilities(enumerated):
    model, grids, by_class = enumerated
    assert np.ptp(by_class, axis=0).max() > 1e-3, "classes that all say the same would test nothing"
    bits = score_codes(model, grids, marginalize=True)
    np.testing.assert_allclose(probabilities(bits), by_class.mean(axis=0), rtol=1e-5)


def test_class_weights_weigh_the_classes_in_proportion(enumerated):
    model, grids, by_class = enumerated
    expected = (5 * by_class[0] + 3 * by_class[2]) / 8
    for weights in (WEIGHTS, 10 * WEIGHTS, torch.tensor([5, 0, 3])):
        bits = score_codes(model, grids, marginalize=True, class_weights=weights)
        np.testing.assert_allclose(probabilities(bits), expected, rtol=1e-5)


def test_positions_of_the_marginal_hold_conditional_probabilities(enumerated):
    model, grids, by_class = enumerated
    bits = score_codes(model, grids, marginalize=True)
    expected = conditionals_by_hand(grids, by_class.mean(axis=0))
    np.testing.assert_allclose(2.0 ** -bits.numpy(), expected, rtol=1e-4)


def test_positions_given_a_class_hold_conditional_probabilities(enumerated):
    model, grids, by_class = enumerated
    bits = score_codes(model, grids, torch.ones(len(grids), dtype=torch.long))
    np.testing.assert_allclose(2.0 ** -bits.numpy(), conditionals_by_hand(grids, by_class[1]), rtol=1e-4)


def test_all_weight_on_one_class_is_that_class(make_prior):
    model = joined(make_prior())
    codes = torch.randint(7, (3, 4, 4))
    mixture = score_codes(model, codes, marginalize=True, class_weights=torch.tensor([0.0, 2.0, 0.0]))
    torch.testing.assert_close(mixture, score_codes(model, codes, torch.ones(3, dtype=torch.long)))


class Biased(nn.Module):
    """A model that knows nothing but its classes' code frequencies, at every position: logits are their logs."""

    def __init__(self, frequencies):
        super().__init__()
        self.config = type("Config", (), {"class_names": dict(enumerate("ab"))})
        self.device = torch.device("cpu")
        self.prior = SimpleNamespace(clusters_of=lambda codes: None)
        self.frequencies = torch.tensor(frequencies)

    def predict(self, codes, labels):
        return self.frequencies[labels].log()[:, :, None, None].expand(-1, -1, *codes.shape[1:])


def test_any_prior_with_logits_per_position_will_do():
    """Two coins, one fair and one that shows heads in 3 of 4: after heads the second is 3/5 likely."""
    model = Biased([[0.5, 0.5], [0.75, 0.25]])
    heads_tails = torch.tensor([[[0, 1]]])
    bits = score_codes(model, heads_tails, marginalize=True).flatten()
    assert bits.tolist() == pytest.approx([-math.log2(5 / 8), -math.log2(2 / 5 * 1 / 2 + 3 / 5 * 1 / 4)])


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
@pytest.mark.parametrize("marginalize", [False, True])
def test_bits_do_not_depend_on_the_batch_size(make_prior, batch_size, marginalize):
    model, codes = joined(make_prior()), torch.randint(7, (5, 4, 4))
    whole = score_codes(model, codes, marginalize=marginalize)
    found = score_codes(model, codes, marginalize=marginalize, batch_size=batch_size)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


def test_no_forward_pass_sees_more_than_a_batch(make_prior):
    prior, sizes = make_prior(), []
    handle = prior.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    score_codes(joined(prior), torch.randint(7, (5, 4, 4)), marginalize=True, batch_size=4)
    handle.remove()
    assert max(sizes) <= 4
    assert sum(sizes) == 5 * CLASSES


def test_every_module_gets_its_own_mode_back_even_after_an_error(make_prior):
    model = joined(make_prior(dropout=0.5)).train()
    model.prior.head.eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    first, second = (score_codes(model, torch.zeros(2, 4, 4, dtype=torch.long)) for _ in range(2))
    assert torch.equal(first, second), "dropout was on"
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="codes have shape"):
        score_codes(model, torch.zeros(2, 5, 5, dtype=torch.long))
    assert [module.training for module in model.modules()] == before
    with evaluating(model):
        assert not any(module.training for module in model.modules())


def test_labels_and_a_mixture_exclude_each_other(make_prior):
    codes = torch.zeros(2, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="labels and marginalize are both given"):
        score_codes(joined(make_prior()), codes, torch.zeros(2, dtype=torch.long), marginalize=True)
    with pytest.raises(ValueError, match="class_weights are given without marginalize"):
        score_codes(joined(make_prior()), codes, class_weights=torch.ones(3))


def test_a_prior_without_classes_has_no_mixture(make_prior):
    model = joined(make_prior(id2label={}))
    codes = torch.zeros(1, 4, 4, dtype=torch.long)
    assert score_codes(model, codes).shape == (1, 4, 4)
    with pytest.raises(ValueError, match="no classes to marginalize over"):
        score_codes(model, codes, marginalize=True)


@pytest.mark.parametrize(
    "weights",
    [[1.0, 1.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [math.nan, 1.0, 1.0], [math.inf, 1.0, 1.0], [[1.0] * 3]],
)
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="expected 3 finite numbers of at least 0, one per class"):
        mixture_log_weights(torch.tensor(weights), 3)


# The composite


@pytest.fixture(scope="module")
def images():
    return torch.rand(33, 3, 16, 16, generator=torch.Generator().manual_seed(0))  # more than one batch


@pytest.mark.parametrize("settings", [{}, {"labels": "nevus"}, {"marginalize": True}])
def test_the_heat_map_sums_to_the_total(composite, images, settings):
    output = composite.score(images, **settings)
    assert output.bits.shape == output.codes.shape == (33, 4, 4)
    assert (output.bits_per_code.dtype, output.bits.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(output.bits.sum((1, 2)), 16 * output.bits_per_code, rtol=1e-12, atol=0)
    assert torch.equal(output.codes, composite.encode(images))
    ids = None if "labels" not in settings else torch.ones(33, dtype=torch.long)
    again = score_codes(composite, output.codes, ids, settings.get("marginalize", False))
    assert torch.equal(output.bits, again)


def test_a_mixture_is_between_its_likeliest_class_and_that_plus_log2_of_their_number(composite, images):
    by_class = [composite.score(images, label).bits.sum((1, 2)) for label in range(CLASSES)]
    least = torch.stack(by_class).amin(0)
    mixture = composite.score(images, marginalize=True).bits.sum((1, 2))
    assert (mixture >= least - 1e-6).all()
    assert (mixture <= least + math.log2(CLASSES) + 1e-6).all()


def test_labels_are_names_ids_or_one_per_image(composite, images):
    images = images[:3]
    named = composite.score(images, labels=["melanoma", "nv", 2]).bits
    for index, label in enumerate(("melanoma", 1, "dermatofibroma")):
        torch.testing.assert_close(
            named[index], composite.score(images, labels=label).bits[index], rtol=1e-5, atol=1e-5
        )
    unconditional = composite.score(images, labels=torch.tensor([3, 3, 3])).bits
    assert torch.equal(unconditional, composite.score(images).bits)
    with pytest.raises(ValueError, match="there are 2 labels for 3 images"):
        composite.score(images, labels=["melanoma", "nevus"])
    with pytest.raises(ValueError, match="labels and marginalize are both given"):
        composite.score(images, labels="melanoma", marginalize=True)


def test_scoring_leaves_the_mode_and_the_gradients_alone(make_composite, images):
    model = make_composite().train()
    output = model.score(images[:2])
    assert all(module.training for module in model.modules())
    assert not output.bits.requires_grad
    assert torch.equal(output.bits, model.eval().score(images[:2]).bits)
    (output.bits * torch.ones((), dtype=torch.float64, requires_grad=True)).sum().backward()
