"""The eight symmetries: written out by hand, closed under composition, exact, and reproducible."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isic_vq.data.augmentation import NUM_VIEWS, dihedral, random_views

SQUARE = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
BY_HAND = [
    [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
    [[3, 6, 9], [2, 5, 8], [1, 4, 7]],
    [[9, 8, 7], [6, 5, 4], [3, 2, 1]],
    [[7, 4, 1], [8, 5, 2], [9, 6, 3]],
    [[3, 2, 1], [6, 5, 4], [9, 8, 7]],
    [[1, 4, 7], [2, 5, 8], [3, 6, 9]],
    [[7, 8, 9], [4, 5, 6], [1, 2, 3]],
    [[9, 6, 3], [8, 5, 2], [7, 4, 1]],
]


def _apply(square, view):
    return dihedral(square[None], torch.tensor([view]))[0]


@pytest.mark.parametrize("view", range(NUM_VIEWS))
def test_view_is_as_written_by_hand(view):
    assert _apply(SQUARE, view).tolist() == BY_HAND[view]


def test_views_are_a_group():
    table = [[BY_HAND.index(_apply(_apply(SQUARE, a), b).tolist()) for b in range(8)] for a in range(8)]
    assert table[0] == list(range(8)), "view 0 is neutral"
    for a in range(8):
        assert sorted(table[a]) == list(range(8)), "each row is a permutation, so every view has an inverse"
        assert all(table[table[a][b]][c] == table[a][table[b][c]] for b in range(8) for c in range(8))


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=8),
    st.integers(1, 6),
    st.sampled_from([(), (1,), (3, 2)]),
)
def test_batch_equals_one_image_at_a_time(views, side, middle):
    images = torch.rand(len(views), *middle, side, side)
    batch = dihedral(images, torch.tensor(views))
    assert batch.shape == images.shape
    for image, view, result in zip(images, views, batch, strict=True):
        assert torch.equal(result, _apply(image, view))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bfloat16])
def test_values_and_type_pass_through(dtype):
    images = torch.arange(8 * 3 * 16).reshape(8, 3, 4, 4).remainder(256).to(dtype)
    result = dihedral(images, torch.arange(8))
    assert result.dtype == dtype
    assert torch.equal(result.flatten(2).sort().values, images.flatten(2).sort().values)


def test_input_is_left_alone():
    images = torch.rand(8, 3, 4, 4)
    before = images.clone()
    dihedral(images, torch.zeros(8, dtype=torch.int64)).zero_()
    assert torch.equal(images, before)


def test_empty_batch_stays_empty():
    assert dihedral(torch.empty(0, 3, 4, 4), random_views(0, 0, 0)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("shape", "views", "message"),
    [
        ((2, 3, 4, 5), torch.tensor([0, 1]), "batch, ..., side, side"),
        ((4, 4), torch.tensor([0, 1, 2, 3]), "batch, ..., side, side"),
        ((2, 4, 4), torch.tensor([0]), r"expected \(2,\) and int64"),
        ((2, 4, 4), torch.tensor([0.0, 1.0]), r"expected \(2,\) and int64"),
        ((2, 4, 4), torch.tensor([0, 8]), "from 0 to 7"),
        ((2, 4, 4), torch.tensor([-1, 0]), "from 0 to 7"),
    ],
)
def test_what_does_not_fit_is_refused(shape, views, message):
    with pytest.raises(ValueError, match=message):
        dihedral(torch.zeros(shape), views)


def test_random_views_depend_on_arguments_only():
    views = random_views(64, seed=5, epoch=7)
    torch.manual_seed(123)
    torch.rand(10)
    assert torch.equal(views, random_views(64, seed=5, epoch=7))
    assert (views.dtype, views.shape) == (torch.int64, (64,))
    recorded = [1, 5, 3, 6, 4, 2, 5, 1, 1, 3, 7, 4, 7, 7, 6, 0]
    assert random_views(16, seed=5, epoch=7).tolist() == recorded, (
        "other processes and versions draw the same"
    )


def test_epochs_and_seeds_draw_their_own_views():
    drawn = {tuple(random_views(32, seed, epoch).tolist()) for seed in range(8) for epoch in range(8)}
    assert len(drawn) == 64


def test_random_views_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    random_views(8, 0, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_each_image_meets_every_view_over_the_epochs():
    met = torch.stack([random_views(16, seed=3, epoch=epoch) for epoch in range(80)])
    assert [sorted(column.unique().tolist()) for column in met.t()] == [list(range(8))] * 16


def test_random_views_are_uniform():
    counts = torch.bincount(random_views(16_000, seed=1, epoch=0), minlength=8)
    assert counts.sum() == 16_000
    assert (counts - 2000).abs().max() < 200, "between four and five standard deviations of a binomial"
