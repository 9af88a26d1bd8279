"""Nearest training images against searches that compare everything with everything, and across flips and turns."""

import numpy as np
import pytest
import torch

from isic_vq.data.augmentation import NUM_VIEWS, dihedral
from isic_vq.evaluation.neighbours import INVERSE_VIEWS, CodeIndex, nearest_by_features


@pytest.fixture
def codes():
    """Of 12 images in 3 views; few codes, so that many distances are equal."""
    return np.random.default_rng(0).integers(0, 5, (12, 3, 4, 4)).astype(np.uint16)


def test_code_distances_are_those_of_comparing_every_position(codes):
    queries = np.random.default_rng(1).integers(0, 5, (40, 4, 4))
    differ = (queries[:, None, None] != codes[None]).mean(axis=(3, 4)).reshape(40, -1)
    found = CodeIndex(codes, num_codes=5).nearest(queries)
    assert found.distances == pytest.approx(differ.min(axis=1), abs=1e-12)
    first = differ.argmin(axis=1)
    assert (found.rows == first // 3).all()
    assert (found.views == first % 3).all()


def test_a_training_grid_in_any_view_is_its_own_neighbour(codes):
    index = CodeIndex(codes, num_codes=5)
    for view in range(3):
        found = index.nearest(codes[:, view])
        assert (found.distances == 0).all(), "exactly"
        assert found.rows.tolist() == list(range(12))
        assert (found.views == view).all()


def test_a_code_that_no_training_image_has_is_far_from_all(codes):
    found = CodeIndex(codes, num_codes=9).nearest(np.full((1, 4, 4), 8))
    assert found.distances.tolist() == [1.0]


def test_grids_of_another_shape_or_codebook_are_refused(codes):
    index = CodeIndex(codes, num_codes=5)
    with pytest.raises(ValueError, match=r"grids of \(2, 2\): expected \(4, 4\)"):
        index.nearest(np.zeros((1, 2, 2), np.int64))
    with pytest.raises(ValueError, match="codes run from 0 to 5: expected 0 to 4"):
        index.nearest(np.arange(16).reshape(1, 4, 4) % 6)


def test_feature_distances_are_the_cosines_of_comparing_everything():
    generator = np.random.default_rng(0)
    features, others = generator.normal(size=(7, 8, 5)), generator.normal(size=(20, 5)) * 3
    found = nearest_by_features(torch.from_numpy(features), torch.from_numpy(others))
    for index, views in enumerate(features):
        cosines = views @ others.T / np.linalg.norm(views, axis=1)[:, None] / np.linalg.norm(others, axis=1)
        view, row = np.unravel_index(cosines.argmax(), cosines.shape)
        assert found.distances[index] == pytest.approx(1 - cosines.max(), abs=1e-12)
        assert (found.rows[index], found.views[index]) == (row, INVERSE_VIEWS[view])


def test_nearly_equal_features_keep_the_digits_of_their_distance():
    """At an angle of 1e-5 the cosine is 1 - 5e-11, which float32 cannot tell from 1."""
    found = nearest_by_features(torch.tensor([[[1.0, 1e-5]]]), torch.tensor([[2.0, 0.0]]))
    assert found.distances[0] == pytest.approx(0.5e-10, rel=1e-4)


def test_the_view_found_by_features_turns_the_training_image_into_the_sample():
    image = torch.rand(1, 3, 6, 6)
    for view in range(NUM_VIEWS):
        sample = dihedral(image, torch.tensor([view]))
        seen = torch.stack([dihedral(sample, torch.tensor([v])).flatten() for v in range(NUM_VIEWS)])
        found = nearest_by_features(seen[None], image.flatten(1))
        assert found.distances[0] == 0
        assert torch.equal(dihedral(image, torch.from_numpy(found.views)), sample), view
