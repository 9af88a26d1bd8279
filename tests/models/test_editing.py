import itertools

import numpy as np
import pytest
import torch
from tiny_models import joined

from isic_vq.models.editing import (
    IsicVQEditOutput,
    blended,
    central_region,
    code_masks,
    effective_sample_size,
    filter_particles,
    membrane,
    pixel_mask,
    redraw_codes,
    systematic_resampling,
)
from isic_vq.models.sampling import image_generators

K, SIDE, LABEL = 3, 3, 1
SPREAD = {"gated": 1.2, "plain": 0.7}  # of the logits over grids, in nats: enough for weights to matter
# Position 0 is the upper left code, 8 the lower right one.
MASKS = {
    "first code": [0],
    "middle": [4],
    "middle row": [3, 4, 5],
    "left column": [0, 3, 6],
    "scattered": [1, 3, 5, 6],
}
LOWER = {
    "last code": [8],
    "lower row": [6, 7, 8],
    "from the middle on": [4, 5, 6, 7, 8],
    "everything": range(9),
}
GRIDS = torch.tensor(list(itertools.product(range(K), repeat=SIDE * SIDE)))  # (19683, 9)
KEPT = torch.tensor([2, 0, 1, 2, 2, 0, 0, 0, 2])  # codes that surprise both priors, so that weights matter


def mask_of(positions):
    mask = torch.zeros(SIDE * SIDE, dtype=torch.bool)
    mask[list(positions)] = True
    return mask.view(SIDE, SIDE)


@pytest.fixture(scope="module", params=SPREAD)
def prior(request, make_prior):
    """A prior over 3 x 3 grids of 3 codes whose logits depend on the earlier codes."""
    model = make_prior(num_codes=K, grid_size=SIDE, architecture=request.param)
    with torch.no_grad():
        model.code_embedding.weight.mul_(2)
        logits = model(GRIDS.view(-1, SIDE, SIDE), torch.full((len(GRIDS),), LABEL)).logits
        model.head[-1].weight.mul_(SPREAD[request.param] / logits.std(0).mean())
        model.head[-1].bias.zero_()
    return model


@pytest.fixture(scope="module")
def log_joint(prior):
    """log p(grid | label) of all 19683 grids, `(9 positions)` factors each, from full forward passes."""
    grids = GRIDS.view(-1, SIDE, SIDE)
    with torch.no_grad():
        logits = prior(grids, torch.full((len(grids),), LABEL)).logits
    factors = logits.double().log_softmax(1).gather(1, grids[:, None])[:, 0].flatten(1)
    assert factors.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)
    return factors


def posterior(log_joint, mask):
    """p(masked codes | kept codes, label) as an array over all grids, 0 where a kept code differs."""
    kept = ~mask.flatten()
    fits = (GRIDS[:, kept] == KEPT[kept]).all(1)
    return log_joint.sum(1).masked_fill(~fits, -torch.inf).softmax(0).numpy()


def unweighted(log_joint, mask):
    """What drawing from left to right with kept codes forced gives, without any weights."""
    exact = posterior(log_joint, mask)
    drawn = log_joint[:, mask.flatten()].sum(1).exp().numpy() * (exact > 0)
    assert drawn.sum() == pytest.approx(1)
    return drawn


def evidence(log_joint, mask):
    """p(kept codes after the first masked one | kept codes before it, label), by summing grids."""
    masked = mask.flatten()
    first = masked.tolist().index(True)
    kept = ~masked
    before = torch.arange(SIDE * SIDE) < first
    joint = log_joint.sum(1).exp()
    fits, starts_alike = ((GRIDS[:, part] == KEPT[part]).all(1) for part in (kept, before))
    return (joint[fits].sum() / joint[starts_alike].sum()).item()


def distribution(grids, weights):
    """Total weight of each of all grids, as an array."""
    places = grids.flatten(1) @ K ** torch.arange(SIDE * SIDE - 1, -1, -1)
    return np.bincount(places.numpy(), weights.numpy(), minlength=len(GRIDS))


def total_variation(first, second):
    return np.abs(first - second).sum() / 2


def particles_of(prior, mask, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(count, SIDE * SIDE, generator=generator, dtype=torch.float64)
    comb = torch.rand(SIDE * SIDE, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        return filter_particles(prior.walk(torch.full((count,), LABEL)), KEPT, mask.flatten(), uniforms, comb)


def redrawn(prior, mask, runs, num_particles, seed=0):
    """Many draws for the same grid."""
    was_training = prior.training
    model = joined(prior)
    prior.train(was_training)
    return redraw_codes(
        model,
        KEPT.view(SIDE, SIDE).expand(runs, -1, -1),
        mask.expand(runs, -1, -1),
        torch.full((runs,), LABEL),
        num_particles,
        image_generators(seed, runs),
    )


# --- against the enumeration of every grid -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
def test_particles_approach_the_exact_posterior_as_they_grow_in_number(prior, log_joint, name):
    mask = mask_of(MASKS[name])
    exact = posterior(log_joint, mask)
    assert total_variation(unweighted(log_joint, mask), exact) > 0.4, "weights decide too little to be tested"
    distances = []
    for count, seeds in ((10, 8), (200, 8), (20_000, 1)):
        sets = [particles_of(prior, mask, count, seed) for seed in range(seeds)]
        found = [distribution(particles.codes, particles.log_weights.softmax(0)) for particles in sets]
        distances.append(np.mean([total_variation(each, exact) for each in found]))
    (particles,) = sets
    assert distances[2] < 0.05, distances
    assert distances[0] > 2 * distances[1] > 4 * distances[2], distances
    assert particles.log_evidence == pytest.approx(np.log(evidence(log_joint, mask)), abs=0.05)


def test_draws_weighted_by_their_evidence_are_exact_for_any_number_of_particles(prior, log_joint):
    """E[Z 1(chosen = x)] = p(x, kept) for any number of particles, here 4: Z is unbiased, and so is the choice."""
    mask = mask_of(MASKS["left column"])
    output = redrawn(prior, mask, 300, 4)
    assert (output.ess[:, :-1].min(1).values < 2).float().mean() > 0.2, "resampling plays no part"
    weights = output.log_evidence.exp() / evidence(log_joint, mask)
    error = (weights.std() / len(weights) ** 0.5).item()
    assert error < 0.15, "too noisy to tell"
    assert weights.mean().item() == pytest.approx(1, abs=3 * error), "the evidence is biased"
    exact = posterior(log_joint, mask)
    found = distribution(output.codes, weights / len(weights))
    assert total_variation(found, exact) < 0.2 < total_variation(unweighted(log_joint, mask), exact)


@pytest.mark.parametrize("name", LOWER)
def test_a_single_particle_is_used_where_nothing_is_kept_after_the_mask(prior, log_joint, name):
    mask = mask_of(LOWER[name])
    np.testing.assert_allclose(unweighted(log_joint, mask), posterior(log_joint, mask), atol=1e-9)
    output = redrawn(prior, mask, 2, 64)
    assert output.num_particles.tolist() == [1, 1]
    assert output.ess.unique().tolist() == [1]
    assert output.log_evidence.unique().tolist() == [0]


def test_a_single_particle_draws_the_lower_row_from_the_exact_posterior(prior, log_joint):
    mask = mask_of(LOWER["lower row"])
    expected = 300 * posterior(log_joint, mask)
    observed = distribution(redrawn(prior, mask, 300, 64).codes, torch.ones(300))
    often = expected >= 5
    observed, expected = (np.append(counts[often], counts[~often].sum()) for counts in (observed, expected))
    chi_square = ((observed - expected) ** 2 / expected).sum()
    freedom = often.sum()
    assert freedom > 5, "a distribution with something to test"
    assert chi_square < freedom + 3 * (2 * freedom) ** 0.5


def test_the_label_is_part_of_the_condition(prior):
    mask = mask_of(MASKS["scattered"])
    arguments = (KEPT.view(1, SIDE, SIDE), mask[None])
    found = [
        redraw_codes(
            joined(prior), *arguments, torch.tensor([label]), 64, image_generators(0, 1)
        ).log_evidence.item()
        for label in (0, 1, 3)
    ]
    assert len(set(found)) == 3


def test_ess_is_the_number_of_particles_until_kept_codes_differ_in_likelihood(prior):
    output = redrawn(prior, mask_of([3]), 5, 16)
    torch.testing.assert_close(output.ess[:, 0], torch.full((5,), 16.0, dtype=torch.float64))
    assert (output.ess[:, 1:] < 15.99).all()
    assert (output.ess >= 1 - 1e-9).all()


def test_training_mode_is_restored_and_never_used(make_prior):
    calm, noisy = (make_prior(num_codes=K, grid_size=SIDE, dropout=dropout) for dropout in (0.0, 0.5))
    noisy.train()
    mask = mask_of(MASKS["scattered"])
    assert torch.equal(redrawn(noisy, mask, 4, 8).codes, redrawn(calm, mask, 4, 8).codes)
    assert noisy.training


# --- resampling and its measure ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1, 1, 1, 1], 4), ([1, 0, 0, 0], 1), ([0.5, 0.25, 0.25], 8 / 3), ([2, 1, 1], 8 / 3), ([3, 1], 1.6)],
)
def test_effective_sample_size_by_hand(weights, expected):
    log_weights = torch.tensor(weights, dtype=torch.float64).log()
    assert effective_sample_size(log_weights) == pytest.approx(expected)
    assert effective_sample_size(log_weights - 900) == pytest.approx(expected), "only ratios count"


def children(weights, uniform):
    ancestors = systematic_resampling(torch.tensor(weights, dtype=torch.float64).log(), uniform)
    return np.bincount(ancestors.numpy(), minlength=len(weights))


def test_systematic_resampling_by_hand():
    """Cumulative weights .5, .6, .9, 1; teeth at (0, 1, 2, 3) / 4 plus a quarter of the uniform."""
    assert children([0.5, 0.1, 0.3, 0.1], 0.0).tolist() == [2, 1, 1, 0]
    assert children([0.5, 0.1, 0.3, 0.1], 0.2).tolist() == [2, 1, 1, 0]
    assert children([0.5, 0.1, 0.3, 0.1], 0.5).tolist() == [2, 0, 2, 0]
    assert children([0.5, 0.1, 0.3, 0.1], 0.9).tolist() == [2, 0, 1, 1]


def test_systematic_resampling_keeps_expected_counts():
    weights = np.random.default_rng(0).dirichlet(np.full(7, 0.5))
    counts = np.stack([children(weights, (i + 0.5) / 1000) for i in range(1000)])
    assert (counts.sum(1) == 7).all()
    assert (np.floor(7 * weights) <= counts).all()
    assert (counts <= np.ceil(7 * weights)).all()
    np.testing.assert_allclose(counts.mean(0), 7 * weights, atol=0.002)


def test_equal_weights_keep_every_particle():
    assert children([0.2] * 5, 0.999).tolist() == [1] * 5


@pytest.mark.parametrize("uniform", [0.0, 0.5, 0.999])
def test_an_impossible_particle_leaves_no_children(uniform):
    assert children([0, 0.5, 0, 0.5, 0], uniform)[[0, 2, 4]].sum() == 0


# --- masks ---------------------------------------------------------------------------------------------------------


def pixels(*places, size=16):
    mask = torch.zeros(size, size, dtype=torch.bool)
    for row, column in places:
        mask[row, column] = True
    return mask


def only_mask(mask, num_images, size, downsampling, dilation=0):
    """The codes to draw anew of a tokenizer with a single grid."""
    (codes,) = code_masks(mask, num_images, size, [size // downsampling], dilation)
    return codes


def where(mask):
    return [tuple(place) for place in mask.nonzero().tolist()]


@pytest.mark.parametrize(
    ("places", "codes"),
    [
        ([(0, 0)], [(0, 0)]),
        ([(3, 3)], [(0, 0)]),
        ([(3, 4)], [(0, 1)]),
        ([(4, 3)], [(1, 0)]),
        ([(7, 8), (15, 15)], [(1, 2), (3, 3)]),
        ([(3, 3), (4, 4)], [(0, 0), (1, 1)]),
    ],
)
def test_a_code_is_masked_if_its_patch_touches_the_mask(places, codes):
    assert where(only_mask(pixels(*places), 1, 16, 4)[0]) == codes


def test_dilation_grows_the_mask_by_codes_in_every_direction():
    mask = pixels((3, 4))  # code (0, 1)
    assert where(only_mask(mask, 1, 16, 4, dilation=1)[0]) == [(r, c) for r in (0, 1) for c in (0, 1, 2)]
    assert where(only_mask(mask, 1, 16, 4, dilation=2)[0]) == [(r, c) for r in range(3) for c in range(4)]
    assert only_mask(mask, 1, 16, 4, dilation=9).all()


def test_pixel_mask_is_the_patches_of_the_codes():
    mask = pixel_mask(only_mask(pixels((5, 9)), 1, 16, 4), 16)
    assert mask.shape == (1, 1, 16, 16)
    assert where(mask[0, 0]) == [(row, column) for row in range(4, 8) for column in range(8, 12)]


def test_three_shapes_of_a_mask_mean_the_same():
    mask = pixels((5, 9))
    expected = only_mask(mask, 2, 16, 4)
    assert expected.shape == (2, 4, 4)
    assert torch.equal(only_mask(mask.expand(2, 16, 16), 2, 16, 4), expected)
    assert torch.equal(only_mask(mask.expand(2, 1, 16, 16), 2, 16, 4), expected)


def test_each_image_may_have_its_own_mask():
    masks = only_mask(torch.stack([pixels((0, 0)), pixels((15, 15))]), 2, 16, 4)
    assert [where(mask) for mask in masks] == [[(0, 0)], [(3, 3)]]


def test_central_region_is_the_middle_half():
    region = central_region(16)
    assert where(region) == [(row, column) for row in range(4, 12) for column in range(4, 12)]


# --- the composite's methods ---------------------------------------------------------------------------------------

CENTRE = pixels((6, 6), (9, 9))  # codes (1, 1) and (2, 2)


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def test_kept_codes_stay_as_encoded_and_masked_ones_change(composite, images):
    output = composite.inpaint(images, CENTRE, "nevus", seed=0, dilation=1)
    assert isinstance(output, IsicVQEditOutput)
    encoded = composite.encode(images)
    assert where(output.mask[0]) == [
        (row, column) for row in range(4) for column in range(4) if abs(row - column) < 3
    ]
    assert torch.equal(output.codes[~output.mask], encoded[~output.mask])
    assert not torch.equal(output.codes[output.mask], encoded[output.mask])
    assert output.labels.tolist() == [1, 1, 1]
    assert output.num_particles.tolist() == [64] * 3


def test_pasting_keeps_every_bit_outside_the_mask_and_decodes_inside(composite, images):
    output = composite.inpaint(images, CENTRE, seed=0, blend="paste")
    inside = pixel_mask(output.mask, 16).expand_as(images)
    assert inside.float().mean().item() == 2 / 16
    assert torch.equal(output.pixel_values[~inside], images[~inside])
    decoded = composite.decode(output.codes)
    torch.testing.assert_close(output.pixel_values[inside], decoded[inside])
    whole = composite.inpaint(images, CENTRE, seed=0, blend="decode")
    assert torch.equal(whole.codes, output.codes)
    torch.testing.assert_close(whole.pixel_values, decoded)


def test_blending_keeps_every_bit_outside_the_mask_and_the_drawn_codes(composite, images):
    pasted = composite.inpaint(images, CENTRE, seed=0, blend="paste")
    output = composite.inpaint(images, CENTRE, seed=0)
    inside = pixel_mask(output.mask, 16).expand_as(images)
    assert torch.equal(output.codes, pasted.codes)
    assert torch.equal(output.pixel_values[~inside], images[~inside])
    assert (output.pixel_values[inside] != pasted.pixel_values[inside]).float().mean() > 0.9
    assert output.pixel_values.min() >= 0
    assert output.pixel_values.max() <= 1


def laplace(values, known):
    """Each unknown pixel is the mean of its neighbours, as a dense system of linear equations."""
    height, width = values.shape
    equations, right = torch.eye(height * width, dtype=torch.float64), values.double().flatten().clone()
    for row, column in where(~known):
        index = row * width + column
        nearby = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        nearby = [(y, x) for y, x in nearby if 0 <= y < height and 0 <= x < width]
        equations[index, index], right[index] = len(nearby), 0
        equations[index, [y * width + x for y, x in nearby]] = -1
    return torch.linalg.solve(equations, right).view(height, width)


def test_a_membrane_solves_laplaces_equation():
    generator = torch.Generator().manual_seed(0)
    for height, width in ((16, 16), (24, 20)):
        values = torch.rand(1, 2, height, width, generator=generator)
        for known in (
            ~central_region(height)[:, :width],  # a hole
            torch.arange(height)[:, None].expand(height, width) > height // 2,  # a half
            torch.rand(height, width, generator=generator) < 0.2,  # scattered
        ):
            found = membrane(values, known[None, None])
            for channel in range(2):
                expected = laplace(values[0, channel], known)
                torch.testing.assert_close(found[0, channel].double(), expected, rtol=0, atol=3e-3)
            assert torch.equal(found[:, :, known], values[:, :, known])
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    assert torch.equal(membrane(torch.rand(1, 2, 4, 4), nothing), torch.zeros(1, 2, 4, 4))


def test_a_wrong_tint_that_decoding_adds_is_taken_away():
    original = 0.3 + 0.4 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    slope = torch.linspace(-1, 1, 32)
    decoded = original + torch.tensor([0.1, -0.05, 0.02])[:, None, None] + 0.1 * slope + 0.05 * slope[:, None]
    mask = central_region(32)[None, None]
    torch.testing.assert_close(blended(decoded, original, mask, "poisson"), original, rtol=0, atol=1e-4)
    assert torch.equal(blended(decoded, original, mask, "paste")[..., 16, 16], decoded[..., 16, 16])
    assert torch.equal(blended(decoded, original, mask, "decode"), decoded)


@pytest.mark.parametrize("mask", [CENTRE, pixels((8, 0), (15, 15))], ids=["filtered", "to the end"])
def test_an_edit_is_the_same_whatever_the_batch(composite, images, mask):
    together = composite.inpaint(images, mask, ["mel", "nv", "df"], seed=3)
    for index, label in enumerate(("mel", "nv", "df")):
        alone = composite.inpaint(images[index : index + 1], mask, label, seed=3, first_index=index)
        for name, value in together.items():
            assert torch.equal(alone[name][0], value[index]), name


def test_seeds_and_indices_give_different_variants(composite, images):
    same = images[:1].expand(6, -1, -1, -1)
    variants = composite.inpaint(same, central_region(16), seed=0).codes
    assert len({tuple(codes.flatten().tolist()) for codes in variants}) > 1
    assert torch.equal(composite.inpaint(same, central_region(16), seed=0).codes, variants)
    assert not torch.equal(composite.inpaint(same, central_region(16), seed=1).codes, variants)
    assert not torch.equal(
        composite.inpaint(same, central_region(16)).codes, composite.inpaint(same, central_region(16)).codes
    )


def test_an_edit_does_not_repeat_the_noise_its_image_was_generated_with(composite):
    generated = composite.generate(4, seed=0)
    everything = torch.ones(16, 16, dtype=torch.bool)
    again = composite.inpaint(generated.pixel_values, everything, seed=0).codes
    assert (again != generated.codes).float().mean() > 0.3, (
        "the same seed would complete an image with itself"
    )


def test_a_counterfactual_is_an_edit_of_the_central_region(composite, images):
    default = composite.counterfactual(images, "melanoma", seed=0)
    named = composite.inpaint(images, central_region(16), "melanoma", seed=0)
    assert where(default.mask[0]) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert torch.equal(default.pixel_values, named.pixel_values)
    other = composite.counterfactual(images, "melanoma", CENTRE, seed=0, num_particles=8)
    assert where(other.mask[0]) == [(1, 1), (2, 2)]
    assert other.num_particles.tolist() == [8] * 3


def test_on_row_is_called_once_per_row_and_image(composite, images):
    rows = []
    composite.inpaint(images, CENTRE, seed=0, num_particles=2, on_step=lambda: rows.append(1))
    assert len(rows) == 12


def test_edited_tensors_can_be_trained_on(make_composite, images):
    model = make_composite()
    output = model.inpaint(images, CENTRE, seed=0, num_particles=2)
    loss = model(output.pixel_values).loss + model.prior(output.codes, output.labels).loss
    loss.backward()
    assert model.prior.code_embedding.weight.grad.any()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mask": torch.zeros(16, 16, dtype=torch.bool)}, "mask is empty for image 0, 1, 2: nothing to redraw"),
        ({"mask": torch.stack([CENTRE, CENTRE & False, CENTRE])}, "mask is empty for image 1: nothing"),
        ({"mask": CENTRE.float()}, r"mask is of type torch.float32: expected a torch.bool tensor"),
        ({"mask": CENTRE.numpy()}, r"mask is of type bool: expected a torch.bool tensor"),
        ({"mask": CENTRE[:8]}, r"mask has shape \(8, 16\): expected \(3, 1, 16, 16\), \(3, 16, 16\) or \(16, 16\)"),
        ({"mask": CENTRE.expand(2, 16, 16)}, r"mask has shape \(2, 16, 16\)"),
        ({"pixel_values": torch.rand(3, 3, 32, 32)}, r"shape \(3, 3, 32, 32\): expected floats of shape \(batch, 3, 16, 16\)"),
        ({"pixel_values": torch.zeros(3, 3, 16, 16, dtype=torch.uint8)}, "pixel_values are torch.uint8"),
        ({"labels": "bcc"}, "label 'bcc' .* is not a class of this model"),
        ({"labels": ["mel", "nv"]}, "2 labels for 3 images"),
        ({"num_particles": 0}, "num_particles is 0: expected a whole number of at least 1"),
        ({"num_particles": 2.5}, "num_particles is 2.5"),
        ({"dilation": -1}, "dilation is -1: expected 0 codes or more"),
        ({"seed": -1}, "seed is -1: expected 0 or more"),
        ({"blend": "feather"}, "blend is 'feather': expected one of poisson, paste, decode"),
    ],
)  # fmt: skip
def test_edits_without_a_meaning_are_refused(composite, images, arguments, text):
    with pytest.raises(ValueError, match=text):
        composite.inpaint(**{"pixel_values": images, "mask": CENTRE, **arguments})


def test_a_counterfactual_needs_a_diagnosis(composite, images):
    with pytest.raises(ValueError, match="labels is None: expected the diagnosis"):
        composite.counterfactual(images, None)
