"""The statistics of the audit by enumeration and simulation, and on real images: copies are found, new images are not."""

import io
import itertools
import os
from math import comb
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from transformers import ResNetConfig, ResNetModel

from isic_vq.data.encoding import encode_source
from isic_vq.data.sources import find_source
from isic_vq.evaluation.audit import Channel, compare_codes, compare_features, judge
from isic_vq.evaluation.features import FeatureModel
from isic_vq.evaluation.memorization import (
    LEVEL,
    empirical_p_values,
    excess_of_near_samples,
    found_pairs,
    held_out_neighbours,
    tail_p_values,
)
from isic_vq.evaluation.neighbours import Nearest
from isic_vq.hub.pretrained import load_model
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

PARTS = ("train", "validation")
NUM_TRAIN, NUM_COPIES = 300, 20


def nearest_distances(generator, number, dimension=6):
    """Of points to the nearest of many: exp(-d^dimension) of them are farther than d, as in a Poisson process."""
    return generator.exponential(size=number) ** (1 / dimension)


# p-values


def test_empirical_p_values_count_held_out_distances_as_near():
    p_values = empirical_p_values([0.0, 0.2, 0.25, 9.0], [0.4, 0.2, 0.2, 0.6])
    assert p_values.tolist() == [1 / 5, 3 / 5, 3 / 5, 5 / 5], "equal distances count, and 1 is added to both"


def test_empirical_p_values_are_uniform_under_the_null():
    """n = 19 held-out distances and a sample of the same kind: p is each of 1/20 to 20/20 equally often."""
    draws = np.random.default_rng(0).gamma(2.0, size=(20000, 20))
    p_values = np.array([empirical_p_values(row[:1], row[1:])[0] for row in draws[:4000]])
    counts = np.bincount((p_values * 20).round().astype(int), minlength=21)[1:]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_tail_p_values_are_the_formula():
    held_out = np.linspace(0.5, 2.0, 60)
    start, spread = held_out[6], np.log(held_out[6] / held_out[:6]).sum()
    expected = 7 / 61 * (1 + np.log(start / 0.3) / spread) ** -6
    found = tail_p_values([0.3, start, 1.0, 0.0], held_out)
    assert found[0] == pytest.approx(expected, rel=1e-12)
    assert found[1:3].tolist() == empirical_p_values([start, 1.0], held_out).tolist(), "beyond the tail"
    assert found[3] == 0, "a distance of none is no chance"


@pytest.mark.parametrize("num_held_out", [60, 597])
@pytest.mark.parametrize("dimension", [2, 20])
def test_tail_p_values_hold_their_level_far_below_one_in_n(num_held_out, dimension):
    """Whatever the dimension: p <= alpha has the probability alpha at most, and nearly alpha."""
    generator = np.random.default_rng(dimension)
    p_values = []
    for _ in range(400):
        drawn = nearest_distances(generator, num_held_out + 500, dimension)
        p_values.append(tail_p_values(drawn[num_held_out:], drawn[:num_held_out]))
    for alpha in (0.05, 0.01, 0.001):
        assert np.mean(np.stack(p_values) <= alpha) == pytest.approx(alpha, rel=0.3), alpha


def test_tail_p_values_keep_the_order_of_the_distances():
    generator = np.random.default_rng(0)
    samples = np.sort(generator.random(300))
    p_values = tail_p_values(samples, nearest_distances(generator, 100))
    assert (np.diff(p_values) >= 0).all()


@pytest.mark.parametrize(
    "held_out",
    [[0.5] * 90, [0.0, *np.linspace(0.5, 1, 89)], np.linspace(0.5, 1, 49)],
    ids=["equal", "zero", "few"],
)
def test_held_out_distances_that_do_not_tell_their_tail_leave_p_values_empirical(held_out):
    samples = [0.0, 0.1, 0.5, 0.7]
    assert tail_p_values(samples, held_out).tolist() == empirical_p_values(samples, held_out).tolist()


@pytest.mark.parametrize("distances", [[-0.1], [np.nan], [[0.5]]])
def test_numbers_that_are_no_distances_are_refused(distances):
    with pytest.raises(ValueError, match="expected finite numbers of at least 0, one per image"):
        empirical_p_values(distances, [0.5])
    with pytest.raises(ValueError, match="expected finite numbers of at least 0, one per image"):
        excess_of_near_samples([0.5], distances)


def test_without_held_out_distances_or_samples_nothing_is_judged():
    with pytest.raises(ValueError, match="there are no held-out distances"):
        tail_p_values([0.5], [])
    with pytest.raises(ValueError, match="0 samples and 1 held-out images"):
        excess_of_near_samples([], [0.5])


# Pairs


def test_found_pairs_are_those_of_the_step_up_procedure():
    """Benjamini and Hochberg by hand: the largest k with p_(k) <= k LEVEL / m, and all p-values up to it."""
    for seed in range(20):
        p_values = np.random.default_rng(seed).random((2, 40)) ** 4
        ordered = np.sort(p_values.ravel())
        ranks = [k for k in range(1, 81) if ordered[k - 1] <= k * LEVEL / 80]
        largest = ordered[ranks[-1] - 1] if ranks else -1.0
        assert (found_pairs(p_values) == (p_values <= largest)).all()


def test_one_copy_among_hundreds_is_found_by_the_tail_and_not_by_counting():
    generator = np.random.default_rng(0)
    held_out, samples = nearest_distances(generator, 597), nearest_distances(generator, 500)
    samples[7] = 0.02
    assert found_pairs(tail_p_values(samples, held_out)).nonzero()[0].tolist() == [7]
    assert not found_pairs(empirical_p_values(samples, held_out)).any(), "1 / 598 is too large for one of 500"


def test_pairs_are_found_among_new_images_as_rarely_as_the_level_says():
    generator = np.random.default_rng(1)
    found = 0
    for _ in range(400):
        drawn = nearest_distances(generator, 800)
        found += found_pairs(tail_p_values(drawn[300:], drawn[:300])).any()
    assert found / 400 <= LEVEL + 3 * (LEVEL * (1 - LEVEL) / 400) ** 0.5


# Verdict


@pytest.mark.parametrize(("num_samples", "num_held_out"), [(4, 5), (6, 3), (1, 1)])
def test_the_chance_of_an_excess_is_that_of_all_interleavings(num_samples, num_held_out):
    """Each of the (m + n choose n) orders of samples and held-out images is equally likely."""
    total = num_samples + num_held_out
    counts = []
    for places in itertools.combinations(range(total), num_held_out):
        samples = sorted(set(range(total)) - set(places))
        excess = excess_of_near_samples(samples, places)
        assert excess.radius == places[0], "of so few held-out images the nearest counts"
        counts.append((excess.count, excess.p_value))
    assert len(counts) == comb(total, num_held_out)
    for count, p_value in counts:
        assert p_value == pytest.approx(np.mean([other >= count for other, _ in counts]))
    assert excess.expected == pytest.approx(np.mean([count for count, _ in counts]))


@pytest.mark.slow
def test_verdicts_are_wrong_as_rarely_as_their_level_says_and_a_binomial_tests_are_not():
    generator = np.random.default_rng(0)
    wrong = wrong_binomial = 0
    worlds, num_held_out, num_samples = 2000, 117, 500
    for _ in range(worlds):
        drawn = generator.random(num_held_out + num_samples)
        excess = excess_of_near_samples(drawn[num_held_out:], drawn[:num_held_out])
        wrong += excess.verdict
        independent = stats.binom.sf(excess.count - 1, num_samples, excess.expected / num_samples)
        wrong_binomial += independent <= LEVEL
    error = 3 * (LEVEL * (1 - LEVEL) / worlds) ** 0.5
    assert 0.5 * LEVEL < wrong / worlds < LEVEL + error
    assert wrong_binomial / worlds > 2 * LEVEL, "all p-values share one set of held-out images"


def test_the_threshold_is_the_fewest_near_samples_that_are_a_verdict():
    held_out = np.arange(1, 598)
    threshold = excess_of_near_samples(np.full(500, 900.0), held_out).threshold
    for count in (threshold - 1, threshold):
        samples = np.r_[np.full(count, 0.5), np.full(500 - count, 900.0)]
        excess = excess_of_near_samples(samples, held_out)
        assert (excess.count, excess.verdict) == (count, count == threshold)
    assert excess.radius == 5, "the fifth of 597 is one in a hundred"
    assert excess.expected == pytest.approx(500 * 5 / 598)


def test_no_number_of_too_few_samples_is_a_verdict():
    excess = excess_of_near_samples([0.0, 0.0], [1.0, 2.0])
    assert (excess.count, excess.threshold, excess.verdict) == (2, None, False)
    assert excess.p_value == pytest.approx(1 / 6), "both first of four: one in (4 choose 2)"


def test_equal_distances_make_no_verdict():
    assert excess_of_near_samples([0.7] * 500, [0.7] * 597).count == 0


# Neighbours


def test_the_chance_of_held_out_neighbours_is_that_of_all_choices_of_held_out_images():
    rows = [0, 0, 0, 1, 2, 5, 6, 6]
    popularity = np.bincount(rows, minlength=7)
    choices = [popularity[list(chosen)].sum() for chosen in itertools.combinations(range(7), 3)]
    found = held_out_neighbours(rows, num_train=4, num_held_out=3, draws=20000)
    assert found.share == 3 / 8
    assert found.expected == 3 / 7
    assert found.p_value == pytest.approx(np.mean(np.array(choices) <= 3), abs=0.02)


def test_samples_that_avoid_held_out_images_are_told_and_plain_ones_are_not():
    generator = np.random.default_rng(0)
    plain = generator.choice(6000, 40)[
        generator.choice(40, 500)
    ]  # all near the same few images, of either kind
    assert held_out_neighbours(plain, 5400, 600).p_value > 0.05
    avoiding = generator.choice(5400, 500)
    assert held_out_neighbours(avoiding, 5400, 600).p_value < 0.001


# Real images


def planted_copies(images):
    """Copies as they leak: in every view but the first, as they are, recompressed, resized, and both of these."""
    views = list(Image.Transpose)
    for index, image in enumerate(images):
        copy = image.transpose(views[index % len(views)])
        if index % 4 >= 2:
            copy = copy.resize((copy.width * 3 // 5, copy.height * 3 // 5), Image.Resampling.BICUBIC)
        if index % 2:
            buffer = io.BytesIO()
            copy.save(buffer, "JPEG", quality=50)
            copy = Image.open(buffer)
        yield copy


@pytest.fixture(scope="module")
def model():
    return load_model(IsicVQModel)


@pytest.fixture(scope="module")
def extractor():
    """Features that know nothing of skin: an untrained network's."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
    return FeatureModel(ResNetModel(config), mean=[0.5] * 3, std=[0.25] * 3, size=64)


@pytest.fixture(scope="module")
def real(model):
    """Codes of some training images in all views, of 20 planted copies of them, and of all held-out images."""
    if not os.environ.get("ISIC_VQ_DATA"):
        pytest.skip("ISIC_VQ_DATA is not set")
    processor = IsicVQImageProcessor(size=128)
    sources = {part: find_source(f"parquet:${{ISIC_VQ_DATA}}/ham10000/{part}-*.parquet") for part in PARTS}
    rows = np.random.default_rng(0).choice(len(sources["train"].dataset()), NUM_TRAIN, replace=False)
    chosen = sources["train"].dataset().select(rows.tolist())
    train = encode_source(model.vqvae, processor, chosen, sources["train"].describe())
    held_out = encode_source(
        model.vqvae, processor, sources["validation"].dataset(), sources["validation"].describe(), num_views=1
    )
    images = chosen.select(range(NUM_COPIES)).cast_column("image", datasets.Image(mode="RGB"))["image"]
    with torch.inference_mode():
        copies = model.encode(processor(list(planted_copies(images)), return_tensors="pt")["pixel_values"])
    return SimpleNamespace(train=train, held_out=held_out, copies=copies)


@pytest.fixture(scope="module")
def channels(model, extractor, real):
    """What both channels say of all held-out images, and of the copies after them."""
    codes = torch.cat([real.held_out.first_views(), real.copies])
    return [
        compare_codes(codes, real.train, real.held_out, seed=0),
        compare_features("features", model, extractor, codes, real.train, real.held_out),
    ]


def chosen_rows(nearest, rows):
    """The nearest training images of some images alone."""
    return Nearest(nearest.distances[rows], nearest.rows[rows], nearest.views[rows])


def judged(channels, tested, calibration):
    """Judge some of the images by others."""
    return judge(
        [
            Channel(
                of.name,
                chosen_rows(of.samples, tested),
                chosen_rows(of.samples, calibration),
                of.neighbours[tested],
            )
            for of in channels
        ]
    )


def splits(real, num_tested):
    """Held-out images to be tested and those to test them by, drawn in two hundred ways."""
    for seed in range(200):
        order = np.random.default_rng(seed).permutation(len(real.held_out.isic_ids))
        yield order[:num_tested], order[num_tested:]


@pytest.mark.slow
@pytest.mark.real_data
def test_twenty_planted_copies_among_five_hundred_images_are_all_found(channels, real):
    """By codes in every split, by features most; of all that is found, as little is wrong as the level says."""
    copies = len(real.held_out.isic_ids) + np.arange(NUM_COPIES)
    recall, wrong = [], []
    for tested, calibration in splits(real, 500 - NUM_COPIES):
        excess, pairs = judged(channels, np.r_[tested, copies], calibration)
        assert excess["codes"].verdict
        found = {name: [pair for pair in of if pair.found] for name, of in pairs.items()}
        right = {
            name: {pair.row for pair in of if pair.sample - len(tested) == pair.row}  # copy i is of image i
            for name, of in found.items()
        }
        assert right["codes"] | right["features"] == set(range(NUM_COPIES))
        recall.append([len(right["codes"]), len(right["features"])])
        number = sum(map(len, found.values()))
        wrong.append((number - sum(recall[-1])) / number)
    by_codes, by_features = np.array(recall).T
    assert (by_codes == NUM_COPIES).all()
    assert by_features.mean() > 15, "an untrained network's features say less than codes"
    assert by_features.min() > 8
    assert np.mean(wrong) < LEVEL


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("num_tested", [298, 500])
def test_held_out_images_without_copies_give_no_verdict_but_as_rarely_as_the_level_says(
    channels, real, num_tested
):
    verdicts, found = [], []
    for tested, calibration in splits(real, num_tested):
        excess, pairs = judged(channels, tested, calibration)
        verdicts.append(any(of.verdict for of in excess.values()))
        found.append(any(pair.found for of in pairs.values() for pair in of))
    assert np.mean(verdicts) <= LEVEL
    assert np.mean(found) <= LEVEL
